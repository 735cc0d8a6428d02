// SPDX-License-Identifier: Apache-2.0
// Generation "rfc": MINOR faults on anonymous memory, their async mode, DEACTIVATE and SET_MODE. "Row" is a row of the table in section 8 of
// kernel-uapi.md, "trap" one of its section 0. What is not here, and why:
// - row 13 (a misaligned hugetlbfs range) is a kernel BUG: no test may pass one.
// - that SET_MODE does not drain the faults under way (2.6): there is no way to hold one of them still; the tests of load live with it.
// - row 20 and the MOVE of row 6 have no rfc column; what MOVE does to the state is in rfc.lost.move.
// - row 23's number of accesses and row 24's times are a benchmark's; that a write faults twice is in rfc.async.write_faults_twice.
// - row 25 is the size of a patch; trap 7 is stock's (PTE markers of shmem under WP).
// - the 2.10 row on KVM needs a vCPU: tests/kernel/kvm_vcpu.c.
#include "selftest.h"
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define SMALL ((size_t)4096)
#define HUGE  ((size_t)2 << 20)

#define MINORS   (UFFD_FEATURE_MINOR_ANON | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS)
#define ASYNC    UFFD_FEATURE_MINOR_ASYNC
#define MISSING  UFFDIO_REGISTER_MODE_MISSING
#define MINOR    UFFDIO_REGISTER_MODE_MINOR
#define WP       UFFDIO_REGISTER_MODE_WP
#define WP_ALL   (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
#define ON_MINOR UFFD_PAGEFAULT_FLAG_MINOR
#define ON_WRITE UFFD_PAGEFAULT_FLAG_WRITE
#define ON_WP    UFFD_PAGEFAULT_FLAG_WP
#define COLD     PAGE_IS_UFFD_DEACTIVATED

#define IN_PLACE (ANON | ANON_THP) // becomes PROT_NONE, the others lose their page table entries
#define ZAPPED   (SHMEM | SHMEM_THP | HUGETLB)
#define TRACKED  (IN_PLACE | ZAPPED)

// ---- helpers

static volatile uint64_t *word(const struct memory *m, size_t page)
{
	return (volatile uint64_t *)unit(m, page);
}

#define INTACT(m, n) EQUAL(*word(m, n), fill_word(m, (n) * (m)->page))

static size_t cold(const struct memory *m, bool *which)
{
	if (m->kind & IN_PLACE)
		return count(m, COLD, 0, 0, which);
	return count(m, PAGE_IS_PRESENT, PAGE_IS_PRESENT, 0, which);
}

static bool is_cold(const struct memory *m, size_t page)
{
	bool which[512];
	cold(m, which);
	return which[page];
}

static void deactivate(int uffd, const struct memory *m)
{
	EQUAL(try_deactivate(uffd, m->at, m->size), 0);
	EQUAL(cold(m, NULL), m->pages);
}

// Filled, registered (MINOR and MISSING) and deactivated: the userfaultfd.
static int tracked(const struct memory *m, uint64_t features)
{
	int uffd = uffd_open(MINORS | features);
	if (numa_nodes() > 1)
		set_system("/proc/sys/kernel/numa_balancing", "0"); // its hints on shmem would be minor faults
	fill(m);
	uffd_register(uffd, m->at, m->size, MINOR | MISSING);
	EQUAL(cold(m, NULL), 0);
	deactivate(uffd, m);
	return uffd;
}

static char *buffer(size_t size)
{
	char *at = MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(at, 7, size);
	return at;
}
#define SEVENS 0x0707070707070707

static long minor_faults(void)
{
	struct rusage r;
	getrusage(RUSAGE_THREAD, &r);
	return r.ru_minflt;
}

static bool pageout(const struct memory *m) // some of it is swapped out
{
	for (int i = 0; i < 20; i++) {
		page_out(m);
		if (count(m, PAGE_IS_SWAPPED, 0, 0, NULL))
			return true;
		sleep_ms(20);
	}
	return false;
}

// A process that owns the memory and the userfaultfd, which we hold too: the VMM, we are the daemon.
struct orders {
	atomic_int ready, wanted, done, fd;
	char *at;
	uint64_t value;
};
struct vmm {
	pid_t pid;
	int uffd, pidfd;
	struct orders *orders;
};

static int vmm_adopt(const struct vmm *v)
{
	return (int)MUST(syscall(SYS_pidfd_getfd, v->pidfd, atomic_load(&v->orders->fd), 0));
}

static struct vmm vmm(const struct memory *m, uint64_t features)
{
	struct vmm v;
	v.orders = MUST(mmap(NULL, SMALL, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	v.pid = fork_child();
	if (!v.pid) {
		atomic_store(&v.orders->fd, uffd_open(MINORS | features));
		fill(m);
		atomic_store(&v.orders->ready, 1);
		for (int n = 0;; n++) {
			while (atomic_load(&v.orders->wanted) == n)
				sleep_ms(1);
			v.orders->value = *(volatile uint64_t *)v.orders->at;
			atomic_store(&v.orders->done, n + 1);
		}
	}
	while (!atomic_load(&v.orders->ready))
		sleep_ms(1);
	v.pidfd = (int)MUST(syscall(SYS_pidfd_open, v.pid, 0));
	v.uffd = vmm_adopt(&v);
	return v;
}

static void vmm_read(const struct vmm *v, void *at)
{
	v->orders->at = at;
	atomic_fetch_add(&v->orders->wanted, 1);
}

static bool vmm_done(const struct vmm *v, int ms)
{
	for (uint64_t until = now_ns() + (uint64_t)ms * 1000000; now_ns() < until; sleep_ms(1))
		if (atomic_load(&v->orders->done) == atomic_load(&v->orders->wanted))
			return true;
	return false;
}

static size_t vmm_count(const struct vmm *v, const struct memory *m, uint64_t mask, uint64_t inverted)
{
	struct page_region r[64];
	size_t n = 0;
	int fd = pagemap(v->pid);
	long regions = scan(fd, m->at, m->size, mask, inverted, 0, mask, r, 64, 0, NULL);
	if (regions < 0)
		FAIL("PAGEMAP_SCAN: %s", strerror((int)-regions));
	for (long i = 0; i < regions; i++)
		n += (r[i].end - r[i].start) / m->page;
	close(fd);
	return n;
}

// ---- what is advertised (2.1, 2.2; trap 1)

static void probe_api(enum kind kind)
{
	(void)kind;
	EQUAL(uffd_features(), 0x7ffff);
	EQUAL(uffd_api_ioctls(), 0x8000000000000003);
	CHECK(!(uffd_api_ioctls() & (1 << 10))); // SET_MODE exists and is not announced: this is not rwp
	EQUAL(UFFDIO_DEACTIVATE, 0x8010AA09);
	EQUAL(UFFDIO_SET_MODE, 0x4010AA0A);
	EQUAL(COLD, 1 << 9);
}

// The other generation's 0x09, and ioctls before UFFDIO_API.
static void probe_unknown(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int raw = uffd_create(O_NONBLOCK);
	EQUAL(try_deactivate(raw, m.at, m.size), -EINVAL);
	EQUAL(try_set_mode(raw, ASYNC, 0), -EINVAL);
	int uffd = tracked(&m, 0);
	EQUAL(try_rwprotect(uffd, m.at, m.size, UFFDIO_RWPROTECT_MODE_RWP), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.size, 0), -EINVAL);
	EQUAL(cold(&m, NULL), 2);
}

static void probe_register(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(MINORS | WP_ALL);
	bool hugetlb = kind & HUGETLB;
	EQUAL(try_register(uffd, m.at, m.size, UFFDIO_REGISTER_MODE_RWP, NULL), -EINVAL);
	EQUAL(try_register(uffd, m.at, m.size, UFFDIO_REGISTER_MODE_RWP | MINOR, NULL), -EINVAL);
	EQUAL(uffd_register(uffd, m.at, m.page, MINOR), hugetlb ? 0x38c : 0x3bc);
	EQUAL(uffd_register(uffd, m.at, m.page, MINOR | MISSING), hugetlb ? 0x38c : 0x3bc);
	CHECK(vm_flag(m.at, "ui"));
	EQUAL(uffd_register(uffd, unit(&m, 1), m.page, MINOR | WP), hugetlb ? 0x3cc : 0x3fc);
	EQUAL(uffd_register(uffd, unit(&m, 2), m.page, MISSING), hugetlb ? 0x10c : 0x13c);
	CHECK(!vm_flag(unit(&m, 2), "ui"));
}

static void probe_negotiation(enum kind kind)
{
	(void)kind;
	struct memory m = memory(ANON, 1);
	struct uffdio_api answer;
	int uffd = uffd_create(O_NONBLOCK);
	if (uffd < 0)
		SKIP("userfaultfd: %s", strerror(-uffd));
	EQUAL(try_api(uffd, ASYNC, &answer), -EINVAL);
	EQUAL(answer.api | answer.features | answer.ioctls, 0);
	EQUAL(try_api(uffd, ASYNC | UFFD_FEATURE_WP_ASYNC, NULL), -EINVAL);
	EQUAL(try_api(uffd, 1ULL << 19, NULL), -EINVAL);
	EQUAL(try_api(uffd, ASYNC | UFFD_FEATURE_MINOR_SHMEM, &answer), 0);
	EQUAL(answer.features, 0x7ffff);
	EQUAL(try_register(uffd, m.at, m.size, MINOR, NULL), -EINVAL); // without MINOR_ANON
	EQUAL(try_register(uffd, m.at, m.size, MINOR | MISSING, NULL), -EINVAL);
	EQUAL(try_register(uffd, m.at, m.size, MISSING, NULL), 0);
	close(uffd_open(ASYNC | UFFD_FEATURE_MINOR_HUGETLBFS));
	uffd = uffd_open(ASYNC | UFFD_FEATURE_MINOR_ANON);
	EQUAL(try_register(uffd, m.at, m.size, MINOR, NULL), -EBUSY);
	struct memory other = memory(ANON, 1);
	EQUAL(try_register(uffd, other.at, other.size, MINOR, NULL), 0);
}

// ---- UFFDIO_DEACTIVATE (2.3)

static void deactivate_errors(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(MINORS);
	fill(&m);
	EQUAL(try_deactivate(uffd, m.at, m.size), -ENOENT); // not registered
	uffd_register(uffd, m.at, m.size / 2, MISSING);
	EQUAL(try_deactivate(uffd, m.at, m.size / 2), -ENOENT); // not MINOR
	EQUAL(try_deactivate(uffd, m.at - SMALL, SMALL), -ENOENT);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	uffd_register(uffd, m.at, m.size, MINOR);
	EQUAL(xioctl(uffd, UFFDIO_DEACTIVATE, NULL), -EFAULT);
	EQUAL(try_deactivate(uffd, m.at + 1, m.page), -EINVAL);
	EQUAL(try_deactivate(uffd, m.at, m.page - 1), -EINVAL);
	EQUAL(try_deactivate(uffd, m.at, 0), -EINVAL);
	EQUAL(try_deactivate(uffd, (void *)~(SMALL - 1), SMALL), -EINVAL);
	EQUAL(try_deactivate(uffd, m.at, ~(SMALL - 1)), -EINVAL);
	MUST(munmap(m.at, m.size));
	EQUAL(try_deactivate(uffd, m.at, m.size), -ENOENT); // no VMA
}

// An event that nobody read: EAGAIN from DEACTIVATE and CONTINUE until it was.
static long drop(void *argument)
{
	const struct memory *m = argument;
	return madvise(m->at, m->page, MADV_DONTNEED);
}

static void deactivate_eagain(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, UFFD_FEATURE_EVENT_REMOVE);
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	struct uffd_msg message;
	struct call c;
	int64_t done = 0;
	call(&c, drop, &m);
	EQUAL(poll(&p, 1, 5000), 1);
	EQUAL(try_deactivate(uffd, m.at, m.size), -EAGAIN);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, &done), -EAGAIN);
	EQUAL(done, -EAGAIN);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	CHECK(read_message(uffd, &message, 1000));
	EQUAL(message.event, UFFD_EVENT_REMOVE);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 0);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0);
}

static void deactivate_private_hugetlb(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(uffd, m.at, m.size), -EINVAL);
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, 0, NULL), 2);
	check_fill(&m, m.at);
}

// Row 12: it answers 0 and what was written to the private mapping is gone.
static void deactivate_private_file(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS | ASYNC);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	check_fill(&m, m.at);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0);
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, 0, NULL), 0);
	EQUAL(*word(&m, 0), 0);
	EQUAL(*word(&m, 1), 0);
}

// Row 17: a hole between VMAs is skipped, an unregistered VMA is ENOENT and what lies before it has changed.
static void deactivate_prefix(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(MINORS);
	bool which[8];
	fill(&m);
	uffd_register(uffd, m.at, 5 * m.page, MINOR);
	MUST(munmap(unit(&m, 2), m.page));
	EQUAL(try_deactivate(uffd, m.at, 4 * m.page), 0);
	cold(&m, which);
	CHECK(which[0] && which[1] && which[3] && !which[4]);
	for (int i = 0; i < 4; i++)
		if (i != 2)
			EQUAL(try_continue(uffd, unit(&m, (size_t)i), m.page, 0, NULL), 0);
	EQUAL(try_deactivate(uffd, m.at, m.size), -ENOENT);
	cold(&m, which);
	CHECK(which[0] && which[1] && which[3] && which[4] && !which[5] && !which[7]);
}

// Exactly what was asked for, twice is once, and nobody is woken.
static void deactivate_range(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(MINORS);
	struct touch t;
	bool which[8];
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(uffd, unit(&m, 2), 3 * m.page), 0);
	EQUAL(cold(&m, which), 3);
	CHECK(which[2] && which[3] && which[4]);
	touch(&t, unit(&m, 3));
	EXPECT_FAULT(uffd, unit(&m, 3), ON_MINOR);
	EQUAL(try_deactivate(uffd, unit(&m, 2), 3 * m.page), 0);
	EQUAL(cold(&m, NULL), 3);
	EXPECT_BLOCKED(&t);
	EXPECT_SILENCE(uffd);
	EQUAL(try_continue(uffd, unit(&m, 2), 3 * m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, 3 * m.page));
	check_fill(&m, m.at);
}

// Holes stay holes: MISSING in both modes.
static void deactivate_holes(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS);
	struct touch t;
	char *from = buffer(m.page);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0);
	for (size_t page = 0; page < 2; page++) {
		if (page)
			EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
		touch(&t, unit(&m, page));
		EXPECT_FAULT(uffd, unit(&m, page), 0);
		EXPECT_BLOCKED(&t);
		EQUAL(try_copy(uffd, unit(&m, page), from, m.page, 0, NULL), 0);
		EXPECT_DONE(&t);
		EQUAL(touch_value(&t), SEVENS);
	}
}

// Pages that NUMA balancing would leave alone: zero pages (row 19), pages shared with a child, KSM.
static void deactivate_zero(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS);
	struct touch t;
	EQUAL(*word(&m, 0) | *word(&m, 1), 0);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	deactivate(uffd, &m);
	if (kind == ANON)
		EQUAL(count(&m, COLD | PAGE_IS_PFNZERO, 0, 0, NULL), 2);
	touch_write(&t, unit(&m, 1), 5);
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR | ON_WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(*word(&m, 1), 5);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EQUAL(*word(&m, 0), 0);
	*word(&m, 0) = 6;
	EQUAL(*word(&m, 0), 6);
	EQUAL(*word(&m, 1), 5);
}

static void deactivate_cow(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS | ASYNC), status;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	pid_t pid = fork_child();
	if (!pid) {
		raise(SIGSTOP);
		check_fill(&m, m.at);
		_exit(0);
	}
	MUST(waitpid(pid, &status, WUNTRACED));
	deactivate(uffd, &m);
	*word(&m, 0) = 1;
	INTACT(&m, 1);
	*word(&m, 1) = 2;
	kill(pid, SIGCONT);
	EQUAL(wait_child(pid), 0);
	EQUAL(*word(&m, 0), 1);
	EQUAL(*word(&m, 1), 2);
}

static void deactivate_ksm(enum kind kind)
{
	struct memory m = memory(kind, 64);
	int uffd = uffd_open(MINORS);
	struct touch t;
	long merged = 0;
	if (madvise(m.at, m.size, MADV_MERGEABLE))
		SKIP("no KSM");
	memset(m.at, 9, m.size);
	if (!set_system("/sys/kernel/mm/ksm/pages_to_scan", "1000") ||
	    !set_system("/sys/kernel/mm/ksm/sleep_millisecs", "10") || !set_system("/sys/kernel/mm/ksm/run", "1"))
		SKIP("KSM: needs --system");
	for (int i = 0; i < 80 && merged < 63; i++) {
		FILE *f = fopen("/sys/kernel/mm/ksm/pages_sharing", "re");
		if (!f || fscanf(f, "%ld", &merged) != 1)
			SKIP("no KSM");
		fclose(f);
		sleep_ms(100);
	}
	set_system("/sys/kernel/mm/ksm/run", "0");
	if (merged < 60)
		SKIP("KSM merged %ld pages", merged);
	uffd_register(uffd, m.at, m.size, MINOR);
	deactivate(uffd, &m);
	touch_write(&t, unit(&m, 7), 5);
	EXPECT_FAULT(uffd, unit(&m, 7), ON_MINOR | ON_WRITE);
	EQUAL(try_continue(uffd, unit(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(*word(&m, 7), 5);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EQUAL(*word(&m, 8), 0x0909090909090909);
	EQUAL(cold(&m, NULL), 62);
}

// The file keeps what was deactivated, and its other mappings are not touched.
static void deactivate_file(enum kind kind)
{
	struct memory m = memory(kind, 4);
	char *second = MUST(mmap(NULL, m.size, PROT_READ, MAP_SHARED, m.fd, 0));
	int uffd = tracked(&m, 0);
	uint64_t value = 0;
	for (size_t i = 0; i < m.pages; i++)
		CHECK(is_cached(&m, i));
	check_fill(&m, second);
	EQUAL(pread(m.fd, &value, 8, 0), 8);
	EQUAL(value, fill_word(&m, 0));
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m, NULL), 4);
}

static void deactivate_then_fill(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, 0);
	char *from = buffer(m.page);
	int64_t done = 0;
	EQUAL(try_copy(uffd, m.at, from, m.page, 0, &done), -EEXIST);
	EQUAL(done, -EEXIST);
	if (!(kind & HUGETLB)) // not offered there
		EQUAL(try_zeropage(uffd, m.at, m.page, 0, &done), -EEXIST);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	check_fill(&m, m.at);
}

// ---- async (2.4)

static void async(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = tracked(&m, ASYNC);
	bool which[8];
	INTACT(&m, 2);
	*word(&m, 5) = 55;
	EQUAL(cold(&m, which), 6);
	CHECK(!which[2] && !which[5]);
	EQUAL(*word(&m, 5), 55);
	*word(&m, 5) = fill_word(&m, 5 * m.page);
	for (int i = 0; i < 3; i++) {
		deactivate(uffd, &m);
		check_fill(&m, m.at);
		EQUAL(cold(&m, NULL), 0);
	}
	EXPECT_SILENCE(uffd);
}

// One touched byte of an anonymous THP makes all of it hot.
static void async_thp(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, ASYNC);
	CHECK(*(volatile uint64_t *)(m.at + 300 * SMALL) == fill_word(&m, 300 * SMALL));
	for (size_t o = 0; o < HUGE; o += SMALL)
		CHECK(!(categories(m.at + o) & COLD));
	CHECK(is_huge(&m, 0) && is_huge(&m, 1) && is_cold(&m, 1));
	EXPECT_SILENCE(uffd);
}

// Row 24 and section 4: base protection first, so a write faults once more; CONTINUE upgrades.
static void async_write_faults_twice(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	long before = minor_faults();
	(void)*word(&m, 0);
	EQUAL(minor_faults() - before, 1);
	before = minor_faults();
	*word(&m, 1) = 1;
	EQUAL(minor_faults() - before, 2);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, NULL), 0);
	before = minor_faults();
	*word(&m, 2) = 1;
	EQUAL(minor_faults() - before, 0);
}

static void async_kernel(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC), ends[2];
	uint64_t value = 0;
	MUST(pipe(ends));
	EQUAL(write(ends[1], unit(&m, 1), 8), 8);
	EQUAL(read(ends[0], &value, 8), 8);
	EQUAL(value, fill_word(&m, m.page));
	EQUAL(write(ends[1], "abcdefgh", 8), 8);
	EQUAL(read(ends[0], unit(&m, 2), 8), 8);
	CHECK(!memcmp(unit(&m, 2), "abcdefgh", 8));
	EQUAL(cold(&m, NULL), 2);
	EXPECT_SILENCE(uffd);
}

// Deactivated shmem pages are on their own afterwards, in swap too.
static void async_swapped(enum kind kind)
{
	struct memory m = memory(kind, 64);
	struct touch t;
	need_swap();
	int uffd = uffd_open(MINORS | ASYNC);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	for (int i = 0; i < 20 && smaps_kib(m.at, "Swap") < 128; i++, sleep_ms(20))
		page_out(&m);
	if (smaps_kib(m.at, "Swap") < 128)
		SKIP("it was not swapped out");
	deactivate(uffd, &m);
	check_fill(&m, m.at);
	EQUAL(cold(&m, NULL), 0);
	EXPECT_SILENCE(uffd);
	for (int i = 0; i < 20 && smaps_kib(m.at, "Swap") < 256; i++, sleep_ms(20))
		page_out(&m);
	if (smaps_kib(m.at, "Swap") < 256)
		SKIP("it was not swapped out twice");
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	touch(&t, unit(&m, 9));
	EXPECT_FAULT(uffd, unit(&m, 9), ON_MINOR); // the file has it, if only in swap
	EQUAL(try_continue(uffd, unit(&m, 9), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, 9 * m.page));
}

// ---- sync (2.4)

static void sync_faults(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = tracked(&m, 0);
	struct touch r, w, again;
	touch(&r, unit(&m, 2) + 8);
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR);
	touch_write(&w, unit(&m, 5), 55);
	EXPECT_FAULT(uffd, unit(&m, 5), ON_MINOR | ON_WRITE);
	touch(&again, unit(&m, 2));
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR);
	EXPECT_BLOCKED(&r);
	EXPECT_BLOCKED(&w);
	EQUAL(cold(&m, NULL), 8);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, NULL), 0);
	EXPECT_DONE(&r);
	EXPECT_DONE(&again);
	EQUAL(touch_value(&again), fill_word(&m, 2 * m.page));
	EXPECT_BLOCKED(&w);
	EQUAL(cold(&m, NULL), 7);
	EQUAL(try_continue(uffd, unit(&m, 5), m.page, 0, NULL), 0);
	EXPECT_DONE(&w);
	EQUAL(*word(&m, 5), 55);
	EQUAL(cold(&m, NULL), 6);
	EXPECT_SILENCE(uffd);
}

static int pipe_in;
static long write_out(void *at)
{
	return write(pipe_in, at, 8);
}

// Row 18 and trap 8: kernel accesses block as well, or fail if the userfaultfd is for user mode only.
static void sync_kernel(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0), ends[2];
	struct call c;
	MUST(pipe(ends));
	pipe_in = ends[1];
	call(&c, write_out, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	CHECK(!call_done(&c, 150));
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 8);
}

static void sync_user_mode_only(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_create(O_NONBLOCK | UFFD_USER_MODE_ONLY), ends[2];
	struct touch t;
	EQUAL(try_api(uffd, MINORS, NULL), 0);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	deactivate(uffd, &m);
	MUST(pipe(ends));
	EQUAL(write(ends[1], unit(&m, 1), 8), -1);
	EQUAL(errno, EFAULT);
	EXPECT_SILENCE(uffd);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(write(ends[1], unit(&m, 2), 8), 8);
}

static void sync_sigbus(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, UFFD_FEATURE_SIGBUS);
	EQUAL(signal_of(unit(&m, 1), false), SIGBUS);
	EQUAL(signal_of(unit(&m, 1), true), SIGBUS);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EQUAL(signal_of(unit(&m, 1), true), 0);
	EXPECT_SILENCE(uffd);
}

// ---- UFFDIO_CONTINUE (2.5; rows 8 and 9)

static void continue_active(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = tracked(&m, 0), active = kind & ANON ? -EFAULT : -EEXIST;
	bool which[8];
	int64_t done;
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, &done), 0);
	EQUAL(done, m.page);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, &done), active);
	EQUAL(done, active);
	EQUAL(try_continue(uffd, m.at, 4 * m.page, 0, &done), -EAGAIN); // stops there
	EQUAL(done, 2 * m.page);
	EQUAL(cold(&m, which), 5);
	CHECK(!which[0] && !which[1] && !which[2] && which[3]);
	EQUAL(try_continue(uffd, unit(&m, 3), 5 * m.page, 0, &done), 0);
	EQUAL(done, 5 * m.page);
	EQUAL(cold(&m, NULL), 0);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

static int drop_unit(const struct memory *m, size_t page)
{
	return m->fd < 0 ? madvise(unit(m, page), m->page, MADV_DONTNEED) : punch(m, page, 1);
}

static void continue_evicted(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t;
	int64_t done;
	char *from = buffer(m.page);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	EQUAL(drop_unit(&m, 1), 0);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, &done), -EFAULT);
	EQUAL(done, -EFAULT);
	EXPECT_BLOCKED(&t); // nobody was woken
	EXPECT_SILENCE(uffd);
	EQUAL(try_wake(uffd, unit(&m, 1), m.page), 0);
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EQUAL(try_copy(uffd, unit(&m, 1), from, m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), SEVENS);
}

// A blocked thread on a page that somebody else made active is not woken by the failing CONTINUE.
static void continue_dontwake(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	EXPECT_BLOCKED(&t); // its message comes before it sleeps, and it looks once more in between
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, UFFDIO_CONTINUE_MODE_DONTWAKE, NULL), 0);
	EXPECT_BLOCKED(&t);
	CHECK(!is_cold(&m, 1));
	CHECK(try_continue(uffd, unit(&m, 1), m.page, 0, NULL) < 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, unit(&m, 1), m.page), 0);
	EXPECT_DONE(&t);
	EXPECT_SILENCE(uffd);
}

static void continue_thp(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch high, low;
	int64_t done;
	touch(&high, m.at + 100 * SMALL);
	EXPECT_FAULT(uffd, m.at + 100 * SMALL, ON_MINOR);
	touch(&low, m.at + 10 * SMALL);
	EXPECT_FAULT(uffd, m.at + 10 * SMALL, ON_MINOR);
	EQUAL(try_continue(uffd, m.at + 100 * SMALL, SMALL, 0, &done), -EAGAIN);
	EQUAL(done, HUGE);
	EXPECT_DONE(&high);
	EXPECT_BLOCKED(&low);
	CHECK(!is_cold(&m, 0) && is_huge(&m, 0));
	EQUAL(try_continue(uffd, m.at + 10 * SMALL, SMALL, 0, &done), -EEXIST);
	EQUAL(done, -EEXIST);
	EXPECT_BLOCKED(&low);
	EQUAL(try_wake(uffd, m.at, HUGE), 0);
	EXPECT_DONE(&low);
	EQUAL(touch_value(&low), fill_word(&m, 10 * SMALL));
	EQUAL(try_continue(uffd, unit(&m, 1), HUGE, 0, &done), 0);
	EQUAL(done, HUGE);
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m, NULL), 2);
	// From the middle of one into the next (our reading): both are active, at least what was asked for is counted.
	EQUAL(try_continue(uffd, unit(&m, 2) + HUGE / 2, HUGE, 0, &done), -EAGAIN);
	EQUAL(done, HUGE / 2 + HUGE);
	EQUAL(cold(&m, NULL), 0);
	check_fill(&m, m.at);
}

static void continue_wp(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS | WP_ALL);
	int64_t done;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	deactivate(uffd, &m);
	EQUAL(try_continue(uffd, m.at, m.page, UFFDIO_CONTINUE_MODE_WP, &done), -EINVAL);
	EQUAL(done, -EINVAL);
	uffd_register(uffd, m.at, m.size, MINOR | WP);
	deactivate(uffd, &m);
	EQUAL(try_continue(uffd, m.at, m.page, UFFDIO_CONTINUE_MODE_WP, &done), 0);
	CHECK(!(pagemap_entry(m.at) & PM_UFFD_WP));
	long before = minor_faults();
	*word(&m, 0) = 7;
	EQUAL(minor_faults() - before, 1); // by permission only
	EXPECT_SILENCE(uffd);
}

static void continue_errors(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(MINORS);
	int64_t done;
	fill(&m);
	EQUAL(try_continue(uffd, m.at, m.page, 0, NULL), -ENOENT);
	uffd_register(uffd, m.at, m.size, MINOR);
	deactivate(uffd, &m);
	EQUAL(xioctl(uffd, UFFDIO_CONTINUE, NULL), -EFAULT);
	EQUAL(try_continue(uffd, m.at + 1, m.page, 0, NULL), -EINVAL);
	EQUAL(try_continue(uffd, m.at, 0, 0, NULL), -EINVAL);
	EQUAL(try_continue(uffd, m.at, m.page, 4, NULL), -EINVAL);
	EQUAL(try_continue(uffd, m.at, m.size + m.page, 0, &done), -ENOENT);
	EQUAL(cold(&m, NULL), 4);
	if (kind & ANON) { // anonymous memory without MINOR, as stock
		struct memory n = memory(kind, 1);
		fill(&n);
		uffd_register(uffd, n.at, n.size, MISSING);
		EQUAL(try_continue(uffd, n.at, n.size, 0, &done), -EINVAL);
		EQUAL(done, -EINVAL);
	}
}

// ---- UFFDIO_SET_MODE (2.6)

static void set_mode_errors(enum kind kind)
{
	(void)kind;
	int uffd = uffd_open(0);
	EQUAL(xioctl(uffd, UFFDIO_SET_MODE, NULL), -EFAULT);
	EQUAL(try_set_mode(uffd, ASYNC, ASYNC), -EINVAL);
	for (int bit = 0; bit < 64; bit++)
		if (1ULL << bit != ASYNC) {
			EQUAL(try_set_mode(uffd, 1ULL << bit, 0), -EINVAL);
			EQUAL(try_set_mode(uffd, 0, 1ULL << bit), -EINVAL);
		}
	EQUAL(try_set_mode(uffd, 0, 0), 0);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0); // nothing was negotiated: it does not ask
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
}

static void set_mode_wakes(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	struct touch a, b;
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	touch(&a, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	touch_write(&b, unit(&m, 2), 9); // its message is not read
	EXPECT_BLOCKED(&b);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	EQUAL(try_set_mode(uffd, 0, 0), 0);
	EXPECT_BLOCKED(&a);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_DONE(&a);
	EXPECT_DONE(&b);
	EQUAL(touch_value(&a), fill_word(&m, m.page));
	EQUAL(*word(&m, 2), 9);
	EXPECT_SILENCE(uffd);
	INTACT(&m, 3);
}

// Row 16: those that wait for a missing page are woken too and ask again.
static void set_mode_wakes_missing(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS);
	char *from = buffer(m.page);
	struct touch t;
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EXPECT_SILENCE(uffd);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_copy(uffd, unit(&m, 1), from, m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

static void set_mode_scope(enum kind kind)
{
	struct memory m = memory(kind, 2), n = memory(kind, 2);
	int first = tracked(&m, 0), second = tracked(&n, 0);
	struct touch t;
	EQUAL(try_set_mode(first, ASYNC, 0), 0);
	check_fill(&m, m.at);
	touch(&t, n.at);
	EXPECT_FAULT(second, n.at, ON_MINOR);
	EXPECT_BLOCKED(&t);
	EQUAL(try_set_mode(second, ASYNC, 0), 0);
	EXPECT_DONE(&t);
}

static void set_mode_toggle(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, 0);
	struct touch t;
	for (int i = 0; i < 20; i++) {
		touch(&t, unit(&m, 1));
		if (i & 1) {
			EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
			CHECK(!touch_done(&t, 10));
		}
		EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
		EXPECT_DONE(&t);
		EQUAL(touch_value(&t), fill_word(&m, m.page));
		EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
		EQUAL(try_deactivate(uffd, m.at, m.size), 0);
	}
	EXPECT_SILENCE(uffd);
}

// ---- toggling under load: no wrong byte, nobody hangs (row 23)

struct load {
	const struct memory *m;
	int uffd;
	atomic_bool stop;
	atomic_long accesses;
};
struct worker {
	pthread_t thread;
	struct load *load;
	size_t lane;
};

static void *load_worker(void *argument)
{
	struct worker *w = argument;
	const struct memory *m = w->load->m;
	size_t n = m->size / SMALL;
	uint64_t *is = calloc(n, sizeof(*is)), seed = w->lane * 77 + 1;
	while (is && !atomic_load(&w->load->stop)) {
		seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
		size_t i = (seed >> 33) % n;
		volatile uint64_t *at = (volatile uint64_t *)(m->at + i * SMALL) + w->lane;
		if (*at != is[i])
			FAIL("wrong bytes in page %zu", i);
		if (seed >> 63) {
			is[i] = seed;
			*at = seed;
		}
		atomic_fetch_add(&w->load->accesses, 1);
	}
	free(is);
	return NULL;
}

static void *load_handler(void *argument)
{
	struct load *l = argument;
	size_t step = l->m->kind & HUGETLB ? HUGE : SMALL;
	struct uffd_msg message;
	while (!atomic_load(&l->stop)) {
		if (!read_message(l->uffd, &message, 10))
			continue;
		if (message.event != UFFD_EVENT_PAGEFAULT || !(message.arg.pagefault.flags & ON_MINOR))
			FAIL("event 0x%x, flags 0x%llx", message.event,
			     (unsigned long long)message.arg.pagefault.flags);
		uintptr_t at = message.arg.pagefault.address & ~(step - 1);
		if (try_continue(l->uffd, (void *)at, step, 0, NULL)) {
			at &= ~(l->m->page - 1);
			EQUAL(try_wake(l->uffd, (void *)at, l->m->page), 0);
		}
	}
	return NULL;
}

// What loses the state silently (row 7) must not lose anything else.
static void disturb(const struct load *l, unsigned n)
{
	const struct memory *m = l->m;
	size_t page = n / 4 % m->pages;
	pid_t pid;
	switch (n % 4) {
	case 0:
		pid = fork_child();
		if (!pid)
			_exit(0);
		EQUAL(wait_child(pid), 0);
		break;
	case 1:
		madvise(unit(m, page), m->page, MADV_PAGEOUT);
		break;
	case 2:
		if (m->kind & (ANON_THP | SHMEM_THP))
			try_deactivate(l->uffd, unit(m, page) + 5 * SMALL, 9 * SMALL);
		else if (m->fd >= 0)
			madvise(unit(m, page), m->page, MADV_DONTNEED);
		break;
	case 3:
		if (m->kind & (ANON_THP | SHMEM_THP))
			madvise(unit(m, page), m->page, MADV_COLLAPSE);
		break;
	}
}

static void load(enum kind kind)
{
	struct memory m = memory(kind, kind & (ANON | SHMEM) ? 128 : 4);
	struct load l = {.m = &m, .uffd = uffd_open(MINORS | ASYNC)};
	struct worker w[3];
	pthread_t handler;
	unsigned toggles = 0;
	fill(&m);
	uffd_register(l.uffd, m.at, m.size, MINOR);
	pthread_create(&handler, NULL, load_handler, &l);
	for (size_t i = 0; i < 3; i++) {
		w[i] = (struct worker){.load = &l, .lane = i + 1};
		pthread_create(&w[i].thread, NULL, load_worker, &w[i]);
	}
	for (uint64_t until = now_ns() + LOAD_NS; now_ns() < until || toggles < 20 || l.accesses < 1000; toggles++) {
		EQUAL(try_deactivate(l.uffd, m.at, m.size), 0);
		EQUAL(try_set_mode(l.uffd, 0, ASYNC), 0);
		if (toggles % 8 == 7)
			disturb(&l, toggles / 8);
		else
			sched_yield();
		if (toggles % 3 == 0)
			sleep_ms(1);
		EQUAL(try_set_mode(l.uffd, ASYNC, 0), 0);
		if (toggles % 5 == 0)
			sleep_ms(1);
	}
	atomic_store(&l.stop, true);
	for (size_t i = 0; i < 3; i++)
		pthread_join(w[i].thread, NULL);
	pthread_join(handler, NULL);
	check_fill(&m, m.at);
	EXPECT_SILENCE(l.uffd);
}

static void load_async(enum kind kind)
{
	struct memory m = memory(kind, kind & (ANON | SHMEM) ? 128 : 4);
	struct load l = {.m = &m, .uffd = uffd_open(MINORS | ASYNC)};
	struct worker w[2];
	fill(&m);
	uffd_register(l.uffd, m.at, m.size, MINOR);
	for (size_t i = 0; i < 2; i++) {
		w[i] = (struct worker){.load = &l, .lane = i + 1};
		pthread_create(&w[i].thread, NULL, load_worker, &w[i]);
	}
	for (uint64_t until = now_ns() + 1000000000; now_ns() < until; sched_yield())
		EQUAL(try_deactivate(l.uffd, m.at, m.size), 0);
	atomic_store(&l.stop, true);
	for (size_t i = 0; i < 2; i++)
		pthread_join(w[i].thread, NULL);
	check_fill(&m, m.at);
	EXPECT_SILENCE(l.uffd);
}

// ---- PAGEMAP_SCAN (2.7; traps 1, 4, 6)

static void scan_polarity(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(MINORS | ASYNC);
	bool which[8];
	for (size_t i = 0; i < 6; i++)
		*word(&m, i) = i;
	uffd_register(uffd, m.at, m.size, MINOR);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0);
	(void)*word(&m, 0);
	EQUAL(count(&m, COLD, 0, 0, which), 5);
	CHECK(!which[0] && which[1] && which[5] && !which[6]);
	EQUAL(count(&m, COLD, COLD, 0, which), 3); // inverted: the hot one, and the holes
	CHECK(which[0] && which[6] && which[7]);
	EQUAL(count(&m, COLD | PAGE_IS_PRESENT, COLD, 0, which), 1);
	CHECK(which[0]);
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, 0, NULL), 6); // a deactivated page is present
	if (kind == ANON_THP)
		EQUAL(count(&m, COLD | PAGE_IS_HUGE, 0, 0, NULL), 5);
}

static void scan_file(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(MINORS | ASYNC);
	bool which[8];
	size_t evictable = 0;
	for (size_t i = 0; i < 6; i++)
		*word(&m, i) = i;
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0);
	(void)*word(&m, 0);
	EQUAL(count(&m, COLD, 0, 0, NULL), 0); // bit 9 is anonymous memory's
	EQUAL(count(&m, PAGE_IS_PRESENT, PAGE_IS_PRESENT, 0, which), 7);
	CHECK(!which[0] && which[1] && which[7]); // holes too: intersect with what the file holds
	for (size_t i = 0; i < 8; i++)
		evictable += which[i] && (kind & HUGETLB ? i < 6 : is_cached(&m, i)); // hugetlbfs has no SEEK_DATA
	EQUAL(evictable, 5);
}

// Trap 4: what is touched between an early scan and the switch is in the old list and accessible.
static void scan_before_sync(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	bool old[4], new[4];
	struct touch t;
	EQUAL(cold(&m, old), 4);
	*word(&m, 1) = 1;
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	CHECK(old[1]);
	*word(&m, 1) = 2; // nothing stops it
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m, new), 3);
	CHECK(!new[1]);
	touch(&t, unit(&m, 2)); // what the new list has is held
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR);
	EXPECT_BLOCKED(&t);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_DONE(&t);
}

// Bit 9 is nowhere else: other mappings, PROT_NONE ones, swap entries.
static void scan_elsewhere(enum kind kind)
{
	struct memory m = memory(kind, 4), plain = memory(kind, 4);
	int uffd = tracked(&m, 0);
	fill(&plain);
	MUST(mprotect(plain.at, plain.size, PROT_NONE));
	EQUAL(count(&plain, COLD, 0, 0, NULL), 0);
	EQUAL(count(&plain, PAGE_IS_PRESENT, 0, 0, NULL), 4);
	MUST(mprotect(m.at, m.size, PROT_NONE));
	EQUAL(count(&m, COLD, 0, 0, NULL), 0);
	MUST(mprotect(m.at, m.size, PROT_READ | PROT_WRITE));
	EQUAL(count(&m, COLD, 0, 0, NULL), 0);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

// ---- GUP (2.8; rows 3, 4, 5; trap 3)

static long read_vm(void *at)
{
	uint64_t value = 0;
	long n = process_read(0, at, &value, 8);
	return n == 8 ? (long)value : n;
}

static long write_vm(void *at)
{
	uint64_t value = 99;
	struct iovec local = {&value, 8}, remote = {at, 8};
	return process_vm_writev(getpid(), &local, 1, &remote, 1, 0);
}

static void gup_anon(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	uint64_t value;
	for (int mode = 0; mode < 2; mode++) {
		for (size_t i = 0; i < m.size; i += m.page / 2) {
			EQUAL(process_read(0, m.at + i, &value, 8), 8);
			EQUAL(value, i % SMALL ? 0 : fill_word(&m, i));
			value = 1;
			EQUAL(proc_mem_read(0, m.at + i, &value, 8), 8);
			EQUAL(value, i % SMALL ? 0 : fill_word(&m, i));
		}
		EQUAL(cold(&m, NULL), 4);
		EXPECT_SILENCE(uffd);
		EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	}
}

static void gup_file(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	struct call c;
	uint64_t value;
	EQUAL(read_vm(unit(&m, 0)), fill_word(&m, 0));
	EQUAL(proc_mem_read(0, unit(&m, 1), &value, 8), 8);
	EQUAL(value, fill_word(&m, m.page));
	EQUAL(cold(&m, NULL), 2); // active again
	deactivate(uffd, &m);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	call(&c, read_vm, unit(&m, 2));
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR);
	CHECK(!call_done(&c, 150));
	EQUAL(proc_mem_read(0, unit(&m, 1), &value, 8), -EIO); // as stock: this one cannot wait
	EXPECT_SILENCE(uffd);
	EQUAL(pread(m.fd, &value, 8, (off_t)(3 * m.page)), 8); // the way to read
	EQUAL(value, fill_word(&m, 3 * m.page));
	EQUAL(cold(&m, NULL), 4);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, fill_word(&m, 2 * m.page));
	EQUAL(cold(&m, NULL), 3);
}

// Writing is different: it needs a writable entry, so it faults everywhere.
static void gup_write(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, ASYNC);
	struct call c;
	EQUAL(write_vm(unit(&m, 0)), 8);
	EQUAL(*word(&m, 0), 99);
	EQUAL(cold(&m, NULL), 3);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	call(&c, write_vm, unit(&m, 2));
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR | ON_WRITE);
	CHECK(!call_done(&c, 150));
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 8);
	EQUAL(*word(&m, 2), 99);
}

static void gup_vmsplice(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, 0), ends[2];
	struct iovec v = {unit(&m, 1), SMALL};
	uint64_t value = 0;
	MUST(pipe(ends));
	EQUAL(vmsplice(ends[1], &v, 1, 0), SMALL);
	EQUAL(read(ends[0], &value, 8), 8);
	EQUAL(value, fill_word(&m, m.page));
	EQUAL(cold(&m, NULL), 2);
	EXPECT_SILENCE(uffd);
}

static void gup_direct(enum kind kind)
{
	struct memory m = memory(kind, 2);
	char id[16];
	int fd = zram_disk(id), uffd = tracked(&m, 0);
	char *back = buffer(SMALL);
	EQUAL(pwrite(fd, unit(&m, 1), SMALL, 0), SMALL);
	EQUAL(cold(&m, NULL), 2);
	EXPECT_SILENCE(uffd);
	EQUAL(pread(fd, back, SMALL, 0), SMALL);
	EQUAL(*(uint64_t *)back, fill_word(&m, m.page));
	zram_disk_gone(fd, id);
}

// ---- eviction (2.9; row 10; trap 5)

static void evict_wake(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t, w;
	char *from = buffer(m.page);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	touch_write(&w, unit(&m, 2), 3);
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR | ON_WRITE);
	EQUAL(drop_unit(&m, 1), 0);
	EQUAL(drop_unit(&m, 2), 0);
	EXPECT_BLOCKED(&t);
	EXPECT_SILENCE(uffd);
	EQUAL(try_wake(uffd, unit(&m, 1), m.page), 0);
	EXPECT_FAULT(uffd, unit(&m, 1), 0); // now missing
	EXPECT_BLOCKED(&t);
	EQUAL(try_copy(uffd, unit(&m, 1), from, m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), SEVENS);
	EXPECT_BLOCKED(&w);
	EQUAL(try_copy(uffd, unit(&m, 2), from, m.page, 0, NULL), 0); // or at once, without a WAKE
	EXPECT_DONE(&w);
	EQUAL(*word(&m, 2), 3);
	EQUAL(word(&m, 2)[1], SEVENS);
	EQUAL(cold(&m, NULL), 2);
	EXPECT_SILENCE(uffd);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	INTACT(&m, 0);
	INTACT(&m, 3);
}

// The whole cycle: deactivate, use, switch, scan, read without a fault, drop, wake, switch back, fetch.
static void evict_cycle(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = tracked(&m, ASYNC);
	char *store[8] = {0};
	bool which[8];
	struct touch t;
	(void)*word(&m, 3);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	EQUAL(cold(&m, which), 7);
	for (size_t i = 0; i < 8; i++)
		if (which[i]) {
			store[i] = buffer(m.page);
			if (m.fd < 0)
				EQUAL(process_read(0, unit(&m, i), store[i], m.page), m.page);
			else if (kind & HUGETLB) // read() is there, but only a mapping is quick
				memcpy(store[i],
				       MUST(mmap(NULL, m.page, PROT_READ, MAP_SHARED, m.fd, (off_t)(i * m.page))),
				       m.page);
			else
				EQUAL(pread(m.fd, store[i], m.page, (off_t)(i * m.page)), m.page);
			EQUAL(drop_unit(&m, i), 0);
		}
	EXPECT_SILENCE(uffd);
	EQUAL(try_wake(uffd, m.at, m.size), 0);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	INTACT(&m, 3);
	for (size_t i = 0; i < 8; i++) {
		touch(&t, unit(&m, i));
		if (which[i]) {
			EXPECT_FAULT(uffd, unit(&m, i), 0);
			EQUAL(try_copy(uffd, unit(&m, i), store[i], m.page, 0, NULL), 0);
		}
		EXPECT_DONE(&t);
		EQUAL(touch_value(&t), fill_word(&m, i * m.page));
	}
	check_fill(&m, m.at);
}

// ---- cleanup (2.10; rows 14, 15)

static void cleanup_unregister(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = tracked(&m, 0);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	EQUAL(try_unregister(uffd, m.at, 4 * m.page), 0);
	EXPECT_DONE(&t); // MISSING was registered too
	CHECK(!vm_flag(m.at, "ui"));
	if (kind & IN_PLACE) {
		EQUAL(cold(&m, NULL), 4);
		long before = minor_faults();
		*word(&m, 0) = fill_word(&m, 0); // writable at once
		EQUAL(minor_faults() - before, 0);
	}
	for (size_t i = 0; i < 4; i++)
		INTACT(&m, i);
	EXPECT_SILENCE(uffd);
	touch(&t, unit(&m, 5));
	EXPECT_FAULT(uffd, unit(&m, 5), ON_MINOR);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EXPECT_DONE(&t);
	check_fill(&m, m.at);
	uffd_register(uffd, m.at, m.size, MINOR);
	EQUAL(cold(&m, NULL), 0);
}

static void cleanup_unregister_minor(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS);
	struct touch t;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	deactivate(uffd, &m);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, m.at, m.size), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
}

static void cleanup_close(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
	close(uffd);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	check_fill(&m, m.at);
	CHECK(!vm_flag(m.at, "ui"));
	*word(&m, 3) = 4;
	uffd = tracked(&m, ASYNC); // and again
	check_fill(&m, m.at);
}

static void cleanup_exit(enum kind kind)
{
	struct memory m = memory(kind, 2);
	pid_t pid = fork_child();
	if (!pid) {
		int uffd = tracked(&m, 0);
		struct touch t;
		touch(&t, unit(&m, 1));
		EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR);
		_exit(0);
	}
	EQUAL(wait_child(pid), 0);
}

static void cleanup_orphan(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, 0);
	uffd_register(v.uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(v.uffd, m.at, m.size), 0);
	close(v.uffd); // the daemon dies, the VMM has its own descriptor
	vmm_read(&v, unit(&m, 1));
	CHECK(!vmm_done(&v, 300));
	v.uffd = vmm_adopt(&v);
	EQUAL(try_set_mode(v.uffd, ASYNC, 0), 0);
	CHECK(vmm_done(&v, 5000));
	EQUAL(v.orders->value, fill_word(&m, m.page));
}

// ---- from another process (rows 1, 2; 2.6's and 2.3's ESRCH)

static void remote(enum kind kind)
{
	struct memory m = memory(kind, 4);
	struct vmm v = vmm(&m, 0);
	char *from = buffer(m.page);
	uint64_t value;
	bool in_place = kind & IN_PLACE;
	uffd_register(v.uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(v.uffd, m.at, m.size), 0);
	EQUAL(in_place ? vmm_count(&v, &m, COLD, 0) : vmm_count(&v, &m, PAGE_IS_PRESENT, PAGE_IS_PRESENT), 4);
	vmm_read(&v, unit(&m, 1));
	EXPECT_FAULT(v.uffd, unit(&m, 1), ON_MINOR);
	CHECK(!vmm_done(&v, 100));
	if (in_place) {
		EQUAL(process_read(v.pid, unit(&m, 1), &value, 8), 8);
		EQUAL(value, fill_word(&m, m.page));
		EQUAL(proc_mem_read(v.pid, unit(&m, 2), &value, 8), 8);
		EQUAL(value, fill_word(&m, 2 * m.page));
		EQUAL(vmm_count(&v, &m, COLD, 0), 4);
	}
	EQUAL(try_continue(v.uffd, unit(&m, 1), m.page, 0, NULL), 0);
	CHECK(vmm_done(&v, 5000));
	EQUAL(v.orders->value, fill_word(&m, m.page));
	EQUAL(try_set_mode(v.uffd, ASYNC, 0), 0);
	vmm_read(&v, unit(&m, 2));
	CHECK(vmm_done(&v, 5000));
	EQUAL(v.orders->value, fill_word(&m, 2 * m.page));
	EQUAL(in_place ? vmm_count(&v, &m, COLD, 0) : vmm_count(&v, &m, PAGE_IS_PRESENT, PAGE_IS_PRESENT), 2);
	if (!in_place) {
		EQUAL(punch(&m, 3, 1), 0);
		vmm_read(&v, unit(&m, 3));
		EXPECT_FAULT(v.uffd, unit(&m, 3), 0);
		EQUAL(try_wake(v.uffd, unit(&m, 3), m.page), 0);
		EXPECT_FAULT(v.uffd, unit(&m, 3), 0);
		if (kind == SHMEM)
			EQUAL(try_zeropage(v.uffd, unit(&m, 3), m.page, 0, NULL), 0);
		else
			EQUAL(try_copy(v.uffd, unit(&m, 3), from, m.page, 0, NULL), 0);
		CHECK(vmm_done(&v, 5000));
		EQUAL(v.orders->value, kind == SHMEM ? 0 : SEVENS);
	}
	EQUAL(try_move(v.uffd, unit(&m, 0), unit(&m, 1), m.page, 0, NULL), -EINVAL);
	struct iovec range = {m.at, m.size};
	EQUAL(syscall(SYS_process_madvise, v.pidfd, &range, 1UL, MADV_DONTNEED, 0UL), -1);
	EQUAL(errno, EINVAL);
	EQUAL(try_unregister(v.uffd, m.at, m.size), 0);
	EQUAL(try_deactivate(v.uffd, m.at, m.size), -ENOENT);
	EQUAL(in_place ? vmm_count(&v, &m, COLD, 0) : 0, 0);
}

static void remote_gone(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, 0);
	uffd_register(v.uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(v.uffd, m.at, m.size), 0);
	kill(v.pid, SIGKILL);
	wait_child(v.pid);
	EQUAL(try_deactivate(v.uffd, m.at, m.size), -ESRCH);
	EQUAL(try_set_mode(v.uffd, ASYNC, 0), -ESRCH);
	EQUAL(try_set_mode(v.uffd, 0, ASYNC), -ESRCH);
	EQUAL(try_continue(v.uffd, m.at, m.page, 0, NULL), -ESRCH);
	EXPECT_SILENCE(v.uffd);
}

// ---- fork, and what loses the state without a word, in sync mode (2.10; rows 7, 21)

static void fork_sync(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t;
	pid_t pid = fork_child();
	if (!pid) {
		check_fill(&m, m.at);
		EQUAL(count(&m, COLD, 0, 0, NULL), 0);
		if (m.fd < 0)
			*word(&m, 1) = 1;
		_exit(0);
	}
	EQUAL(wait_child(pid), 0);
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m, NULL), 4);
	touch_write(&t, unit(&m, 1), 2);
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR | ON_WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(*word(&m, 1), 2);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	INTACT(&m, 2);
}

// None of it is cold any more, no access is seen or held, all bytes are there.
static void lost(const struct memory *m, int uffd)
{
	EQUAL(count(m, COLD, 0, 0, NULL), 0);
	check_fill(m, m->at);
	EXPECT_SILENCE(uffd);
	EQUAL(count(m, COLD, 0, 0, NULL), 0);
}

static void lost_mprotect(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = tracked(&m, 0);
	MUST(mprotect(m.at, m.size, PROT_READ));
	MUST(mprotect(m.at, m.size, PROT_READ | PROT_WRITE));
	lost(&m, uffd);
	for (size_t i = 0; i < m.pages; i++)
		*word(&m, i) = fill_word(&m, i * m.page);
	deactivate(uffd, &m);
}

static void lost_swap(enum kind kind)
{
	struct memory m = memory(kind, 64);
	bool swapped[64];
	struct touch t;
	need_swap();
	int uffd = tracked(&m, 0);
	if (!pageout(&m))
		SKIP("it was not swapped out");
	size_t n = count(&m, PAGE_IS_SWAPPED, 0, 0, swapped);
	EQUAL(cold(&m, NULL), 64 - n);
	EQUAL(try_deactivate(uffd, m.at, m.size), 0); // does nothing to a swap entry
	EQUAL(count(&m, COLD | PAGE_IS_SWAPPED, 0, 0, NULL), 0);
	for (size_t i = 0; i < 64; i++)
		if (swapped[i]) {
			touch(&t, unit(&m, i));
			EXPECT_DONE(&t);
			EQUAL(touch_value(&t), fill_word(&m, i * m.page));
			CHECK(!is_cold(&m, i));
		}
	EXPECT_SILENCE(uffd);
}

static void lost_migration(enum kind kind)
{
	struct memory m = memory(kind, 8);
	void *pages[8];
	int nodes[8], status[8];
	if (numa_nodes() < 2)
		SKIP("one NUMA node: numa=fake=2");
	int uffd = tracked(&m, 0);
	for (int node = 0; node < 2; node++) {
		for (size_t i = 0; i < 8; i++) {
			pages[i] = unit(&m, i);
			nodes[i] = node;
		}
		EQUAL(syscall(SYS_move_pages, 0, 8UL, pages, nodes, status, 2 /* MPOL_MF_MOVE */), 0);
		for (size_t i = 0; i < 8; i++)
			EQUAL(status[i], node);
	}
	lost(&m, uffd);
}

static void lost_mremap(enum kind kind)
{
	struct memory m = memory(kind, 4), to = memory(kind, 4);
	int uffd = tracked(&m, 0);
	MUST(mremap(m.at, m.size, m.size, MREMAP_MAYMOVE | MREMAP_FIXED, to.at));
	CHECK(!vm_flag(to.at, "ui"));
	lost(&to, uffd);
	*word(&to, 1) = 1;
	EXPECT_SILENCE(uffd);
}

static void lost_move(enum kind kind)
{
	struct memory m = memory(kind, 4), to = memory(kind, 4);
	int uffd = tracked(&m, 0);
	struct touch t;
	uffd_register(uffd, to.at, to.size, MINOR | MISSING);
	EQUAL(try_move(uffd, to.at, m.at, 3 * m.page, 0, NULL), 0);
	for (size_t i = 0; i < 3; i++)
		INTACT(&to, i);
	EXPECT_SILENCE(uffd);
	EQUAL(count(&to, COLD, 0, 0, NULL), 0);
	EQUAL(cold(&m, NULL), 1);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EQUAL(try_move(uffd, unit(&m, 1), unit(&to, 1), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
}

// Either direction of WRITEPROTECT is a change of protection too (PM_SCAN_WP_MATCHING is not: rfc.wp.async).
static void lost_writeprotect(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(MINORS | WP_ALL);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | WP);
	deactivate(uffd, &m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, UFFDIO_WRITEPROTECT_MODE_WP), 0);
	lost(&m, uffd);
	deactivate(uffd, &m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	lost(&m, uffd);
}

// (All of it deactivated is refused: the kernel wants a writable entry.)
static void lost_collapse(enum kind kind)
{
	struct memory m = memory(kind, 512);
	int uffd = tracked(&m, 0);
	MUST(madvise(m.at, m.size, MADV_HUGEPAGE));
	EQUAL(try_continue(uffd, unit(&m, 5), m.page, 0, NULL), 0);
	EQUAL(cold(&m, NULL), 511);
	if (madvise(m.at, m.size, MADV_COLLAPSE))
		SKIP("MADV_COLLAPSE: %s", strerror(errno));
	CHECK(is_huge(&m, 0));
	lost(&m, uffd);
}

static void lost_split(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = tracked(&m, 0);
	MUST(madvise(m.at + 3 * SMALL, SMALL, MADV_DONTNEED)); // splits
	CHECK(!is_huge(&m, 0));
	for (size_t o = 0; o < HUGE; o += SMALL)
		if (o != 3 * SMALL) {
			CHECK(!(categories(m.at + o) & COLD));
			CHECK(*(volatile uint64_t *)(m.at + o) == fill_word(&m, o));
		}
	EXPECT_SILENCE(uffd);
	CHECK(is_cold(&m, 1) && is_huge(&m, 1));
	// A part of an active one splits it too: exactly that part is cold.
	EQUAL(try_continue(uffd, unit(&m, 1), HUGE, 0, NULL), 0);
	EQUAL(try_deactivate(uffd, unit(&m, 1) + 7 * SMALL, 2 * SMALL), 0);
	CHECK(!is_huge(&m, 1));
	for (size_t i = 0; i < 512; i++)
		EQUAL(!!(categories(unit(&m, 1) + i * SMALL) & COLD), i == 7 || i == 8);
}

// A part of a PMD-mapped shmem THP: the kernel drops the whole PMD, its neighbours look cold as well and come back without harm.
static void split_file(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(MINORS | ASYNC);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | MISSING);
	EQUAL(try_deactivate(uffd, m.at + 3 * SMALL, 2 * SMALL), 0);
	CHECK(!(categories(m.at + 3 * SMALL) & PAGE_IS_PRESENT));
	CHECK(!(categories(m.at + 4 * SMALL) & PAGE_IS_PRESENT));
	CHECK(categories(unit(&m, 1)) & PAGE_IS_PRESENT);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

// ---- write protection beside it (2.10; row 22)

static void wp(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(MINORS | WP_ALL);
	struct touch t;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | WP);
	EQUAL(try_writeprotect(uffd, m.at, m.size, UFFDIO_WRITEPROTECT_MODE_WP), 0);
	deactivate(uffd, &m);
	touch_write(&t, unit(&m, 1), 8);
	EXPECT_FAULT(uffd, unit(&m, 1), ON_MINOR | ON_WRITE);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, kind & IN_PLACE ? 0 : UFFDIO_CONTINUE_MODE_WP, NULL), 0);
	EXPECT_FAULT(uffd, unit(&m, 1), ON_WP | ON_WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_writeprotect(uffd, unit(&m, 1), m.page, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(*word(&m, 1), 8);
	touch(&t, unit(&m, 2));
	EXPECT_FAULT(uffd, unit(&m, 2), ON_MINOR);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_DONE(&t);
	touch_write(&t, unit(&m, 2), 9); // the mode is of minor faults only
	EXPECT_FAULT(uffd, unit(&m, 2), ON_WP | ON_WRITE);
	EQUAL(try_writeprotect(uffd, unit(&m, 2), m.page, 0), 0);
	EXPECT_DONE(&t);
}

static void wp_async(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(MINORS | WP_ALL | ASYNC | UFFD_FEATURE_WP_ASYNC), fd = pagemap(0);
	struct page_region r[16];
	bool which[8];
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR | WP);
	CHECK(scan(fd, m.at, m.size, PAGE_IS_WRITTEN, 0, 0, PAGE_IS_WRITTEN, r, 16,
		   PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, NULL) > 0);
	deactivate(uffd, &m);
	EQUAL(count(&m, PAGE_IS_WRITTEN, 0, 0, NULL), 0);
	*word(&m, 3) = 3;
	(void)*word(&m, 5);
	EQUAL(count(&m, PAGE_IS_WRITTEN, 0, 0, which), 1);
	CHECK(which[3]);
	EQUAL(cold(&m, which), 6);
	CHECK(!which[3] && !which[5]);
	EXPECT_SILENCE(uffd);
}

// ---- NUMA balancing (2.4; row 11)

struct spin {
	const struct memory *m;
	atomic_bool stop;
	atomic_long rounds;
};

static long spin(void *argument)
{
	struct spin *s = argument;
	while (!atomic_load(&s->stop)) {
		for (size_t i = 0; i < s->m->pages; i++)
			if (*word(s->m, i) != fill_word(s->m, i * s->m->page))
				FAIL("wrong bytes in page %zu", i);
		atomic_fetch_add(&s->rounds, 1);
	}
	return 0;
}

static void numa(enum kind kind)
{
	struct memory m = memory(kind, 64);
	struct uffd_msg message;
	struct spin s = {.m = &m};
	struct call c;
	int64_t done;
	if (numa_nodes() < 2)
		SKIP("one NUMA node: numa=fake=2");
	if (!set_system("/proc/sys/kernel/numa_balancing", "1"))
		SKIP("numa_balancing: needs --system");
	int uffd = uffd_open(MINORS);
	fill(&m);
	uffd_register(uffd, m.at, m.size, MINOR);
	call(&c, spin, &s);
	bool came = read_message(uffd, &message, kind == SHMEM ? 30000 : 6000);
	if (kind == ANON) { // the scanner leaves it alone
		if (came)
			FAIL("a message came");
	} else {
		if (!came)
			SKIP("no NUMA hint within 30 s");
		EQUAL(message.event, UFFD_EVENT_PAGEFAULT);
		EQUAL(message.arg.pagefault.flags, ON_MINOR); // spurious: nothing was deactivated
		void *at = (void *)(uintptr_t)(message.arg.pagefault.address & ~(SMALL - 1));
		EQUAL(try_continue(uffd, at, SMALL, 0, &done), -EEXIST);
		EQUAL(try_wake(uffd, at, SMALL), 0);
		EXPECT_FAULT(uffd, at, ON_MINOR); // only faults again
		EQUAL(try_deactivate(uffd, at, SMALL), 0);
		EQUAL(try_continue(uffd, at, SMALL, 0, &done), 0);
		EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
		long rounds = atomic_load(&s.rounds);
		for (int i = 0; i < 500 && atomic_load(&s.rounds) < rounds + 2; i++)
			sleep_ms(10);
		CHECK(atomic_load(&s.rounds) >= rounds + 2);
	}
	set_system("/proc/sys/kernel/numa_balancing", "0");
	atomic_store(&s.stop, true);
	CHECK(call_done(&c, 5000));
}

const struct test rfc_tests[] = {
	{"rfc.probe.api", probe_api, NONE, 0},
	{"rfc.probe.unknown", probe_unknown, ANY_SMALL, 0},
	{"rfc.probe.register", probe_register, ANON | SHMEM | HUGETLB, 0},
	{"rfc.probe.negotiation", probe_negotiation, NONE, 0},
	{"rfc.deactivate.errors", deactivate_errors, ANON | SHMEM | HUGETLB, 0},
	{"rfc.deactivate.eagain", deactivate_eagain, ANY_SMALL, 0},
	{"rfc.deactivate.private_hugetlb", deactivate_private_hugetlb, HUGETLB_PRIVATE, 0},
	{"rfc.deactivate.private_file", deactivate_private_file, SHMEM_PRIVATE, 0},
	{"rfc.deactivate.prefix", deactivate_prefix, TRACKED, 0},
	{"rfc.deactivate.range", deactivate_range, TRACKED, 0},
	{"rfc.deactivate.holes", deactivate_holes, TRACKED, 0},
	{"rfc.deactivate.zero", deactivate_zero, IN_PLACE, 0},
	{"rfc.deactivate.cow", deactivate_cow, IN_PLACE, 0},
	{"rfc.deactivate.ksm", deactivate_ksm, ANON, 20},
	{"rfc.deactivate.file", deactivate_file, ZAPPED, 0},
	{"rfc.deactivate.then_fill", deactivate_then_fill, TRACKED, 0},
	{"rfc.async", async, TRACKED, 0},
	{"rfc.async.thp", async_thp, ANON_THP, 0},
	{"rfc.async.write_faults_twice", async_write_faults_twice, IN_PLACE, 0},
	{"rfc.async.kernel", async_kernel, TRACKED, 0},
	{"rfc.async.swapped", async_swapped, SHMEM, 20},
	{"rfc.sync", sync_faults, TRACKED, 0},
	{"rfc.sync.kernel", sync_kernel, TRACKED, 0},
	{"rfc.sync.user_mode_only", sync_user_mode_only, ANON | SHMEM | HUGETLB, 0},
	{"rfc.sync.sigbus", sync_sigbus, TRACKED, 0},
	{"rfc.continue.active", continue_active, TRACKED, 0},
	{"rfc.continue.evicted", continue_evicted, TRACKED, 0},
	{"rfc.continue.dontwake", continue_dontwake, TRACKED, 0},
	{"rfc.continue.thp", continue_thp, ANON_THP, 0},
	{"rfc.continue.wp", continue_wp, IN_PLACE, 0},
	{"rfc.continue.errors", continue_errors, ANON | SHMEM | HUGETLB, 0},
	{"rfc.set_mode.errors", set_mode_errors, NONE, 0},
	{"rfc.set_mode.wakes", set_mode_wakes, TRACKED, 0},
	{"rfc.set_mode.wakes_missing", set_mode_wakes_missing, ANY_SMALL, 0},
	{"rfc.set_mode.scope", set_mode_scope, ANY_SMALL, 0},
	{"rfc.set_mode.toggle", set_mode_toggle, TRACKED, 0},
	{"rfc.load", load, TRACKED, 30},
	{"rfc.load.async", load_async, TRACKED, 20},
	{"rfc.scan.polarity", scan_polarity, IN_PLACE, 0},
	{"rfc.scan.file", scan_file, ZAPPED, 0},
	{"rfc.scan.before_sync", scan_before_sync, TRACKED, 0},
	{"rfc.scan.elsewhere", scan_elsewhere, IN_PLACE, 0},
	{"rfc.gup.anon", gup_anon, IN_PLACE, 0},
	{"rfc.gup.file", gup_file, ZAPPED, 0},
	{"rfc.gup.write", gup_write, TRACKED, 0},
	{"rfc.gup.vmsplice", gup_vmsplice, IN_PLACE, 0},
	{"rfc.gup.direct", gup_direct, IN_PLACE, 0},
	{"rfc.evict.wake", evict_wake, TRACKED, 0},
	{"rfc.evict.cycle", evict_cycle, TRACKED, 20},
	{"rfc.cleanup.unregister", cleanup_unregister, TRACKED, 0},
	{"rfc.cleanup.unregister_minor", cleanup_unregister_minor, TRACKED, 0},
	{"rfc.cleanup.close", cleanup_close, TRACKED, 0},
	{"rfc.cleanup.exit", cleanup_exit, TRACKED, 0},
	{"rfc.cleanup.orphan", cleanup_orphan, ANON | SHMEM | HUGETLB, 0},
	{"rfc.remote", remote, ANON | SHMEM | HUGETLB, 0},
	{"rfc.remote.gone", remote_gone, ANY_SMALL, 0},
	{"rfc.fork", fork_sync, TRACKED, 0},
	{"rfc.lost.mprotect", lost_mprotect, IN_PLACE, 0},
	{"rfc.lost.swap", lost_swap, ANON, 20},
	{"rfc.lost.migration", lost_migration, ANON, 0},
	{"rfc.lost.mremap", lost_mremap, IN_PLACE, 0},
	{"rfc.lost.move", lost_move, IN_PLACE, 0},
	{"rfc.lost.writeprotect", lost_writeprotect, IN_PLACE, 0},
	{"rfc.lost.collapse", lost_collapse, ANON, 0},
	{"rfc.lost.split", lost_split, ANON_THP, 0},
	{"rfc.split.file", split_file, SHMEM_THP, 0},
	{"rfc.wp", wp, ANY_SMALL, 0},
	{"rfc.wp.async", wp_async, ANY_SMALL, 0},
	{"rfc.numa", numa, ANY_SMALL, 60},
	{0},
};
