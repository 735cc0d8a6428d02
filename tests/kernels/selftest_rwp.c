// SPDX-License-Identifier: Apache-2.0
// Generation "rwp", what Linux 7.3 has: section 3 of kernel-uapi.md, and of section 8 each row of its rwp column:
//
//  1, 2 rwp.foreign                           13 rwp.protect.misaligned
//  3, 4 rwp.gup.*                             14 rwp.foreign: whoever holds the descriptor can answer; without, rwp.close
//  5    rwp.gup.vmsplice, rwp.gup.direct      15 rwp.unregister.wakes_not
//                                             16 rwp.set_mode.wakes_missing
//  6    rwp.move.*                            17 rwp.protect.errors
//  7    rwp.swap*, migrate, compaction, ...   18 rwp.gup.user_mode_only
//  8    rwp.protect.twice                     19 rwp.zero_page
//  9    rwp.thp.in_place                      20 rwp.scan.elsewhere
//  10   rwp.evict, rwp.evict.copy             21 rwp.fork*
//  11   rwp.numa.hints (needs two nodes)      22 rwp.wp
//  12   all of it on shmem-private            23 rwp.set_mode.load
//
// 24 and 25 are measurements.
#include "selftest.h"
#include <sched.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define RWP           UFFDIO_REGISTER_MODE_RWP
#define MISSING       UFFDIO_REGISTER_MODE_MISSING
#define MINOR         UFFDIO_REGISTER_MODE_MINOR
#define WP            UFFDIO_REGISTER_MODE_WP
#define ASYNC         UFFD_FEATURE_RWP_ASYNC
#define ACCESSED      PAGE_IS_ACCESSED
#define PRESENT       PAGE_IS_PRESENT
#define FAULT         UFFD_PAGEFAULT_FLAG_RWP
#define WRITE_FAULT   (UFFD_PAGEFAULT_FLAG_RWP | UFFD_PAGEFAULT_FLAG_WRITE)
#define MADV_COLLAPSE 25
#define MPOL_BIND     2
#define MPOL_MF_MOVE  2
#define HUGE          ((size_t)2 << 20)

// Every backing whose pages stay mapped when they are protected: not a memfd in huge pages, see rwp.thp.shmem.
#define BACKINGS  (ANON | ANON_THP | SHMEM | SHMEM_PRIVATE | HUGETLB | HUGETLB_PRIVATE)
#define FILES     (SHMEM | HUGETLB)
#define HUGEPAGES (ANON_THP | HUGETLB | HUGETLB_PRIVATE)

static void need_rwp(void)
{
	if (!(uffd_api_ioctls() & (1 << 10)))
		SKIP("no rwp");
}

static int open_rwp(uint64_t features)
{
	need_rwp();
	return uffd_open(UFFD_FEATURE_RWP | features);
}

static void protect(int uffd, const struct memory *m)
{
	EQUAL(try_rwprotect(uffd, m->at, m->size, UFFDIO_RWPROTECT_MODE_RWP), 0);
}

static void resolve(int uffd, const struct memory *m, size_t page, size_t pages)
{
	EQUAL(try_rwprotect(uffd, unit(m, page), pages * m->page, 0), 0);
}

static size_t accessed(const struct memory *m)
{
	return count(m, ACCESSED, 0, 0, NULL);
}

static size_t cold(const struct memory *m)
{
	return count(m, ACCESSED | PRESENT, ACCESSED, 0, NULL);
}

static size_t cold_or_swapped(const struct memory *m)
{
	return count(m, ACCESSED, ACCESSED, PRESENT | PAGE_IS_SWAPPED, NULL);
}

static uint64_t load(const void *at)
{
	return *(volatile const uint64_t *)at;
}

static void store(void *at, uint64_t value)
{
	*(volatile uint64_t *)at = value;
}

// Filled, registered, protected: `pages` units of it.
static struct memory tracked(enum kind kind, size_t pages, int uffd, uint64_t mode)
{
	struct memory m = memory(kind, pages);
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP | mode);
	protect(uffd, &m);
	return m;
}

static void *page_of(unsigned char byte, size_t size)
{
	char *at = MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(at, byte, size);
	return at;
}

// ---- 3.1 to 3.3

static void probe(enum kind kind)
{
	(void)kind;
	need_rwp();
	EQUAL(uffd_features(), 0x7ffff);
	EQUAL(uffd_api_ioctls(), 0x8000000000000403);
	EQUAL(UFFDIO_RWPROTECT, 0xC018AA09);
	EQUAL(UFFDIO_SET_MODE, 0x4010AA0A);
}

static void api(enum kind kind)
{
	struct uffdio_api a;
	(void)kind;
	need_rwp();
	int uffd = uffd_create(0);
	EQUAL(try_api(uffd, ASYNC, &a), -EINVAL); // needs RWP beside it
	CHECK(!a.api && !a.features && !a.ioctls);
	EQUAL(try_api(uffd, 1 << 19, &a), -EINVAL);
	CHECK(!a.api && !a.features && !a.ioctls);
	EQUAL(try_api(uffd, UFFD_FEATURE_RWP | ASYNC, &a), 0);
	EQUAL(a.features, 0x7ffff);
	EQUAL(try_api(uffd, UFFD_FEATURE_RWP, &a), -EINVAL); // once
	// rfc's DEACTIVATE has another request number
	EQUAL(try_deactivate(uffd, page_of(0, 4096), 4096), -EINVAL);
}

static void register_ioctls(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = memory(kind, 1);
	uint64_t want = kind & ANY_HUGETLB ? 0x30c : 0x33c;
	EQUAL(uffd_register(uffd, m.at, m.size, RWP), want);
	EQUAL(uffd_register(uffd, m.at, m.size, RWP | MISSING), want);
	CHECK(vm_flag(m.at, "ur") && vm_flag(m.at, "um"));
	if (!(kind & (ANON | ANON_THP))) {
		EQUAL(uffd_register(uffd, m.at, m.size, RWP | MISSING | MINOR), want | 0x80);
		CHECK(vm_flag(m.at, "ui"));
	} else
		EQUAL(try_register(uffd, m.at, m.size, RWP | MISSING | MINOR, NULL), -EINVAL);
	struct memory other = memory(kind, 1);
	EQUAL(uffd_register(uffd, other.at, other.size, MISSING), want & ~0x200ULL);
	CHECK(!vm_flag(other.at, "ur"));
}

static void register_protects_nothing(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = memory(kind, 2);
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(accessed(&m), 2);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

static void register_errors(enum kind kind)
{
	int uffd = open_rwp(0), other = uffd_open(UFFD_FEATURE_RWP), plain = uffd_open(0);
	struct memory m = memory(kind, 2);
	EQUAL(try_register(plain, m.at, m.size, RWP, NULL), -EINVAL); // not negotiated
	EQUAL(try_register(uffd, m.at, m.size, RWP | WP, NULL), -EINVAL);
	EQUAL(try_register(uffd, m.at, m.size, 1 << 4, NULL), -EINVAL);
	MUST(mprotect(m.at, m.size, PROT_NONE));
	EQUAL(try_register(uffd, m.at, m.size, RWP, NULL), -EINVAL);
	MUST(mprotect(m.at, m.size, PROT_READ));
	EQUAL(try_register(uffd, m.at, m.size, RWP, NULL), 0); // readable is enough
	MUST(mprotect(m.at, m.size, PROT_READ | PROT_WRITE));
	EQUAL(try_register(other, m.at, m.size, RWP, NULL), -EBUSY);
	EQUAL(try_register(uffd, m.at, m.size, MISSING, NULL), -EBUSY); // would drop RWP
	EQUAL(try_register(uffd, m.at, m.size, WP, NULL), -EBUSY);
	EQUAL(try_register(uffd, m.at, m.size, RWP | MISSING, NULL), 0);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EQUAL(try_register(uffd, m.at, m.size, WP, NULL), 0);
	EQUAL(try_register(uffd, m.at, m.size, RWP, NULL), -EBUSY); // would drop WP
	EQUAL(try_register(uffd, m.at, m.size, MISSING, NULL), -EBUSY);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EQUAL(try_register(uffd, m.at, m.size, MISSING, NULL), 0);
	EQUAL(try_register(uffd, m.at, m.size, RWP, NULL), 0); // adds it
}

static void register_wrong_memory(enum kind kind)
{
	int uffd = open_rwp(0);
	(void)kind;
	int file = MUST(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
	void *at = MUST(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0));
	EQUAL(try_register(uffd, at, 4096, RWP, NULL), -EINVAL); // a regular file
	struct memory m = memory(SHMEM, 1);
	char path[40];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", m.fd);
	file = MUST(open(path, O_RDONLY | O_CLOEXEC));
	at = MUST(mmap(NULL, 4096, PROT_READ, MAP_SHARED, file, 0));
	EQUAL(try_register(uffd, at, 4096, RWP, NULL), -EPERM); // never writable
}

// ---- 3.4

static void protect_errors(enum kind kind)
{
	int uffd = open_rwp(ASYNC), other = uffd_open(UFFD_FEATURE_RWP);
	struct memory m = memory(kind, 4);
	const uint64_t on = UFFDIO_RWPROTECT_MODE_RWP;
	fill(&m);
	EQUAL(try_rwprotect(uffd, m.at, m.size, on), -ENOENT);
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(try_rwprotect(uffd, m.at + 1, m.page, on), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.page + 1, on), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, 0, on), -EINVAL);
	EQUAL(try_rwprotect(uffd, (void *)(1UL << 63), m.page, on), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, (size_t)-4096, on), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.page, on | UFFDIO_RWPROTECT_MODE_DONTWAKE), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.page, 4), -EINVAL);
	EQUAL(xioctl(uffd, UFFDIO_RWPROTECT, NULL), -EFAULT);
	EQUAL(try_rwprotect(other, m.at, m.page, on), -ENOENT); // another's
	EQUAL(accessed(&m), 4);
	// all or nothing: the last page is not registered
	EQUAL(try_unregister(uffd, unit(&m, 3), m.page), 0);
	EQUAL(try_rwprotect(uffd, m.at, m.size, on), -ENOENT);
	EQUAL(accessed(&m), 3);
	// a hole in the middle is ignored, nothing but holes is not
	MUST(munmap(unit(&m, 1), m.page));
	EQUAL(try_rwprotect(uffd, m.at, 3 * m.page, on), 0);
	EQUAL(accessed(&m), 0);
	EQUAL(try_rwprotect(uffd, unit(&m, 1), m.page, on), -ENOENT);
}

// Section 8, row 13.
static void protect_misaligned(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 2);
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(try_rwprotect(uffd, m.at + 4096, m.page, 1), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.page - 4096, 1), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at + 4096, 4096, 0), -EINVAL);
	EQUAL(accessed(&m), 2);
}

// A process of its own that serves as the target: memory at `at`, registered, filled.
struct target {
	pid_t pid;
	int uffd, pagemap;
	struct memory m;
	atomic_int *stage; // shared: the target waits for 3 before it touches anything
};

static void target(struct target *t, enum kind kind, size_t pages, uint64_t features, int (*then)(struct target *))
{
	struct shared {
		atomic_int stage;
		int uffd, pagemap;
		struct memory m;
	} *s = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
	need_rwp();
	t->stage = &s->stage;
	t->pid = fork_child();
	if (!t->pid) {
		t->pid = getpid();
		s->m = t->m = memory(kind, pages);
		fill(&t->m);
		s->uffd = t->uffd = uffd_open(UFFD_FEATURE_RWP | features);
		s->pagemap = t->pagemap = pagemap(0);
		atomic_store(&s->stage, 1);
		while (atomic_load(&s->stage) < 2)
			sleep_ms(1);
		_exit(then(t));
	}
	while (!atomic_load(&s->stage))
		sleep_ms(1);
	t->m = s->m;
	t->uffd = take_fd(t->pid, s->uffd);
	t->pagemap = take_fd(t->pid, s->pagemap);
	if (t->m.fd >= 0)
		t->m.fd = take_fd(t->pid, t->m.fd);
	atomic_store(&s->stage, 2);
}

static int exit_at_once(struct target *t)
{
	(void)t;
	return 0;
}

static void gone(enum kind kind)
{
	struct target t;
	(void)kind;
	target(&t, ANON, 1, ASYNC, exit_at_once);
	wait_child(t.pid);
	EQUAL(try_rwprotect(t.uffd, t.m.at, t.m.size, 1), -ESRCH);
	EQUAL(try_rwprotect(t.uffd, t.m.at, t.m.size, 0), -ESRCH);
	EQUAL(try_set_mode(t.uffd, 0, ASYNC), -ESRCH);
	EQUAL(try_set_mode(t.uffd, ASYNC, 0), -ESRCH);
}

static long drop_all(void *argument)
{
	const struct memory *m = argument;
	return madvise(m->at, m->size, MADV_DONTNEED);
}

// EAGAIN while a non-cooperative event is unread.
static void protect_again(enum kind kind)
{
	int uffd = open_rwp(ASYNC | UFFD_FEATURE_EVENT_REMOVE);
	struct memory m = memory(kind, 2);
	struct uffd_msg message;
	struct call c;
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP);
	call(&c, drop_all, &m);
	CHECK(!call_done(&c, 100));
	EQUAL(try_rwprotect(uffd, m.at, m.size, 1), -EAGAIN);
	CHECK(read_message(uffd, &message, 1000));
	EQUAL(message.event, UFFD_EVENT_REMOVE);
	CHECK(call_done(&c, 5000));
	EQUAL(try_rwprotect(uffd, m.at, m.size, 1), 0);
}

static void protect_twice(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 4, uffd, 0);
	protect(uffd, &m);
	EQUAL(cold(&m), 4);
	resolve(uffd, &m, 1, 1);
	resolve(uffd, &m, 1, 1); // section 8, row 8
	resolve(uffd, &m, 1, 2);
	EQUAL(accessed(&m), 2);
	EQUAL(load(unit(&m, 1)), fill_word(&m, m.page));
	protect(uffd, &m);
	EQUAL(cold(&m), 4);
	resolve(uffd, &m, 0, 4);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

// ---- 3.5

static void async(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 6, uffd, 0);
	bool which[6];
	for (int round = 0; round < 3; round++) {
		EQUAL(accessed(&m), 0);
		EQUAL(cold(&m), 6);
		EQUAL(load(unit(&m, 1) + 64), round ? 7 : 0);
		store(unit(&m, 4) + 64, round + 100);
		EQUAL(count(&m, ACCESSED, 0, 0, which), 2);
		CHECK(which[1] && which[4]);
		EQUAL(load(unit(&m, 4) + 64), round + 100);
		store(unit(&m, 1) + 64, 7);
		EXPECT_SILENCE(uffd);
		protect(uffd, &m);
	}
	check_fill(&m, m.at);
	EQUAL(accessed(&m), 6);
}

static void sync_read(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	bool which[3];
	struct touch t, u;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, unit(&m, 1), m.page), 0); // nothing has changed: again
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	touch(&u, unit(&m, 1) + 8); // a second waiter
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	resolve(uffd, &m, 1, 1);
	EXPECT_DONE(&t);
	EXPECT_DONE(&u);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	EQUAL(count(&m, ACCESSED, 0, 0, which), 1);
	CHECK(which[1]);
	EXPECT_SILENCE(uffd);
}

static void sync_write(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	struct touch t;
	touch_write(&t, unit(&m, 2), 77);
	EXPECT_FAULT(uffd, unit(&m, 2), WRITE_FAULT);
	EXPECT_BLOCKED(&t);
	EQUAL(accessed(&m), 0);
	EQUAL(try_rwprotect(uffd, unit(&m, 2), m.page, UFFDIO_RWPROTECT_MODE_DONTWAKE), 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, unit(&m, 2), m.page), 0);
	EXPECT_DONE(&t);
	EQUAL(load(unit(&m, 2)), 77);
	EQUAL(accessed(&m), 1);
	EXPECT_SILENCE(uffd);
}

// A write after an asynchronous resolve is one fault, not two (PTE and PMD).
static void one_fault(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 8, uffd, 0);
	struct rusage before, after;
	EQUAL(getrusage(RUSAGE_THREAD, &before), 0);
	EQUAL(getrusage(RUSAGE_THREAD, &before), 0);
	for (size_t i = 0; i < 8; i++)
		store(unit(&m, i), i);
	EQUAL(getrusage(RUSAGE_THREAD, &after), 0);
	EQUAL(after.ru_minflt - before.ru_minflt, 8);
	EQUAL(accessed(&m), 8);
}

// With the SIGBUS feature the protected access raises it.
static void sigbus(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_SIGBUS);
	struct memory m = tracked(kind, 2, uffd, 0);
	EQUAL(signal_of(m.at, false), SIGBUS);
	resolve(uffd, &m, 0, 1);
	EQUAL(signal_of(m.at, true), 0);
	EQUAL(signal_of(unit(&m, 1), true), SIGBUS);
}

// Unpopulated pages are not armed and count as accessed once they are there: by a fault, by UFFDIO_COPY.
static void holes(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = memory(kind, 4);
	uffd_register(uffd, m.at, m.size, RWP);
	protect(uffd, &m);
	EQUAL(accessed(&m), 0);
	EQUAL(cold(&m), 0);
	store(unit(&m, 1), 5);
	EQUAL(accessed(&m), 1);
	EQUAL(cold(&m), 0);
	EXPECT_SILENCE(uffd);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	uffd_register(uffd, m.at, m.size, RWP | MISSING);
	EQUAL(try_copy(uffd, unit(&m, 2), page_of(3, m.page), m.page, 0, NULL), 0);
	EQUAL(accessed(&m), 2);
	protect(uffd, &m);
	EQUAL(cold(&m), 2);
	EQUAL(accessed(&m), 0);
}

// Section 8, row 19: the zero page is tracked as any other.
static void zero_page(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 2);
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(load(m.at) + load(unit(&m, 1)), 0);
	EQUAL(count(&m, PAGE_IS_PFNZERO, 0, 0, NULL), 2);
	EQUAL(accessed(&m), 2);
	protect(uffd, &m);
	EQUAL(cold(&m), 2);
	EQUAL(load(m.at), 0);
	EQUAL(accessed(&m), 1);
	store(unit(&m, 1), 9);
	EQUAL(load(unit(&m, 1)), 9);
	EQUAL(load(unit(&m, 1) + 8), 0);
	EQUAL(accessed(&m), 2);
	EQUAL(count(&m, PAGE_IS_PFNZERO, 0, 0, NULL), 1);
}

static void zero_page_thp(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 2);
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(load(m.at) + load(unit(&m, 1)), 0);
	if (!is_huge(&m, 0))
		SKIP("no huge zero page");
	protect(uffd, &m);
	EQUAL(cold(&m), 2);
	EQUAL(load(unit(&m, 1) + 4096), 0);
	EQUAL(accessed(&m), 1);
	EQUAL(try_rwprotect(uffd, m.at, 4096, 0), 0); // splits it
	CHECK(!is_huge(&m, 0));
	EQUAL(load(m.at), 0);
	struct memory pages = m;
	pages.page = 4096;
	pages.pages = 512;
	pages.size = HUGE;
	EQUAL(cold(&pages), 511);
	store(m.at + 8192, 3);
	EQUAL(load(m.at + 8192 + 8), 0);
	EQUAL(cold(&pages), 510);
}

// ---- 3.6

static void set_mode_errors(enum kind kind)
{
	int uffd = open_rwp(0), plain = uffd_open(0);
	(void)kind;
	EQUAL(try_set_mode(uffd, ASYNC, ASYNC), -EINVAL);
	EQUAL(try_set_mode(uffd, UFFD_FEATURE_RWP, 0), -EINVAL);
	EQUAL(try_set_mode(uffd, 0, UFFD_FEATURE_RWP), -EINVAL);
	EQUAL(try_set_mode(uffd, UFFD_FEATURE_WP_ASYNC, 0), -EINVAL);
	EQUAL(try_set_mode(uffd, ASYNC | 1ULL << 40, 0), -EINVAL);
	EQUAL(xioctl(uffd, UFFDIO_SET_MODE, NULL), -EFAULT);
	EQUAL(try_set_mode(plain, ASYNC, 0), -EINVAL); // RWP was not negotiated
	EQUAL(try_set_mode(uffd, 0, 0), 0);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0); // need not have been negotiated
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	int raw = uffd_create(0);
	EQUAL(try_set_mode(raw, 0, ASYNC), -EINVAL); // before UFFDIO_API
}

static void set_mode_wakes(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 4, uffd, 0);
	struct touch t, u;
	touch(&t, unit(&m, 0));
	EXPECT_FAULT(uffd, unit(&m, 0), FAULT);
	touch_write(&u, unit(&m, 3), 4);
	sleep_ms(50); // its message stays unread
	EXPECT_BLOCKED(&t);
	EXPECT_BLOCKED(&u);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_DONE(&t);
	EXPECT_DONE(&u);
	EQUAL(touch_value(&t), fill_word(&m, 0));
	EQUAL(load(unit(&m, 3)), 4);
	EQUAL(accessed(&m), 2);
	EXPECT_SILENCE(uffd);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	EXPECT_BLOCKED(&t);
	resolve(uffd, &m, 1, 1);
	EXPECT_DONE(&t);
}

// Section 8, row 16: a thread that waits for a missing page wakes too, and asks again.
static void set_mode_wakes_missing(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = memory(kind, 2);
	struct touch t;
	uffd_register(uffd, m.at, m.size, RWP | MISSING);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_copy(uffd, unit(&m, 1), page_of(1, m.page), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

// The mode belongs to the context, not to a range, and other contexts keep theirs.
static void set_mode_scope(enum kind kind)
{
	int uffd = open_rwp(0), other = uffd_open(UFFD_FEATURE_RWP);
	struct memory m = tracked(kind, 1, uffd, 0), n = tracked(kind, 1, uffd, 0), o = tracked(kind, 1, other, 0);
	struct touch t;
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	check_fill(&m, m.at);
	check_fill(&n, n.at);
	touch(&t, o.at);
	EXPECT_FAULT(other, o.at, FAULT);
	resolve(other, &o, 0, 1);
	EXPECT_DONE(&t);
}

struct hammer {
	pthread_t thread;
	const struct memory *m;
	unsigned seed;
	atomic_int *stop;
	uint64_t accesses;
	size_t wrong;
	uint64_t *last; // what this thread wrote last, per page
	unsigned slot;
};

static void *hammer(void *argument)
{
	struct hammer *h = argument;
	setpriority(PRIO_PROCESS, 0, 19); // the thread that toggles comes first
	while (!atomic_load(h->stop)) {
		size_t page = (size_t)rand_r(&h->seed) % h->m->pages;
		uint64_t *at = (uint64_t *)(unit(h->m, page) + 512) + h->slot * 8;
		if (load(at) != h->last[page])
			h->wrong++;
		if (rand_r(&h->seed) % 2)
			store(at, h->last[page] = (uint64_t)rand_r(&h->seed));
		h->accesses++;
	}
	return NULL;
}

static void hammer_start(struct hammer h[2], const struct memory *m, atomic_int *stop)
{
	for (unsigned i = 0; i < 2; i++) {
		h[i] = (struct hammer){.m = m, .seed = i + 1, .stop = stop, .slot = i};
		h[i].last = calloc(m->pages, sizeof(uint64_t));
		pthread_create(&h[i].thread, NULL, hammer, &h[i]);
	}
}

static void hammer_stop(struct hammer h[2])
{
	atomic_store(h[0].stop, 1);
	for (unsigned i = 0; i < 2; i++) {
		pthread_join(h[i].thread, NULL);
		EQUAL(h[i].wrong, 0);
		CHECK(h[i].accesses > 0);
	}
}

struct answer {
	pthread_t thread;
	int uffd;
	const struct memory *m;
	atomic_int *stop;
	uint64_t faults;
};

static void *answer(void *argument)
{
	struct answer *a = argument;
	struct uffd_msg message;
	while (!atomic_load(a->stop))
		if (read_message(a->uffd, &message, 20)) {
			uint64_t at = message.arg.pagefault.address & ~(a->m->page - 1);
			if (!(message.arg.pagefault.flags & FAULT))
				FAIL("flags 0x%llx", (unsigned long long)message.arg.pagefault.flags);
			EQUAL(try_rwprotect(a->uffd, (void *)at, a->m->page, 0), 0);
			a->faults++;
		}
	return NULL;
}

// Section 8, row 23: many toggles and protections under load; no wrong byte, no message in async mode, nobody stuck.
static void toggle_load(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	size_t pages = kind & HUGEPAGES ? 4 : 64;
	struct memory m = tracked(kind, pages, uffd, 0);
	atomic_int stop = 0;
	struct hammer h[2];
	struct answer a = {.uffd = uffd, .m = &m, .stop = &stop};
	protect(uffd, &m);
	hammer_start(h, &m, &stop);
	pthread_create(&a.thread, NULL, answer, &a);
	int toggles = 0;
	for (uint64_t until = now_ns() + LOAD_NS; now_ns() < until || toggles <= 5; toggles++) {
		EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
		protect(uffd, &m);
		if (toggles % 4 == 0)
			sleep_ms(1);
		EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
		if (toggles % 3 == 0)
			protect(uffd, &m);
	}
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	hammer_stop(h);
	pthread_join(a.thread, NULL);
	check_fill(&m, m.at);
}

// No fault that saw the old mode survives the switch: from then on the hot set stands still.
static void drain(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	size_t pages = kind & HUGEPAGES ? 8 : 256;
	struct memory m = tracked(kind, pages, uffd, 0);
	atomic_int stop = 0;
	struct hammer h[2];
	hammer_start(h, &m, &stop);
	for (int round = 0; round < 30; round++) {
		protect(uffd, &m);
		if (round % 2)
			sched_yield();
		EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
		size_t hot = accessed(&m);
		sleep_ms(5);
		EQUAL(accessed(&m), hot);
		EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	}
	hammer_stop(h);
}

// ---- 3.7

static void scan_polarity(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 5);
	bool which[5];
	for (size_t i = 0; i < 4; i++)
		store(unit(&m, i), i + 1); // the last stays a hole
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(accessed(&m), 4);
	protect(uffd, &m);
	EQUAL(load(unit(&m, 2)), 3);
	EQUAL(count(&m, ACCESSED, 0, 0, which), 1);
	CHECK(which[2]);
	EQUAL(count(&m, ACCESSED | PRESENT, ACCESSED, 0, which), 3);
	CHECK(which[0] && which[1] && !which[2] && which[3] && !which[4]);
	EQUAL(cold_or_swapped(&m), 3);
	EQUAL(count(&m, ACCESSED, ACCESSED, 0, which), 4); // trap 6: the hole matches too
	CHECK(which[4]);
	EQUAL(count(&m, PRESENT, 0, 0, NULL), 4); // protected pages are present
	EQUAL(count(&m, PAGE_IS_WRITTEN, 0, 0, NULL), 0);
	EQUAL(categories(unit(&m, 2)) & (ACCESSED | PRESENT | PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED), ACCESSED | PRESENT);
	EQUAL(categories(unit(&m, 0)) & (ACCESSED | PRESENT | PAGE_IS_WRITTEN), PRESENT);
	EQUAL(categories(unit(&m, 4)) & ~PAGE_IS_HUGE, 0);
	CHECK(!(pagemap_entry(unit(&m, 2)) & PM_UFFD_WP));
	CHECK(pagemap_entry(unit(&m, 0)) & PM_UFFD_WP && pagemap_entry(unit(&m, 0)) & PM_PRESENT);
	CHECK(!(pagemap_entry(unit(&m, 4)) & PM_UFFD_WP));
}

// WRITTEN belongs to uffd-wp mappings, ACCESSED to uffd-rwp ones. Section 8, row 20: an unregistered page looks cold.
static void scan_elsewhere(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
	struct memory plain = memory(kind, 2), wp = memory(kind, 2);
	fill(&plain);
	fill(&wp);
	EQUAL(categories(plain.at) & (ACCESSED | PRESENT | PAGE_IS_WRITTEN), PRESENT);
	EQUAL(cold(&plain), 2);
	EQUAL(count(&plain, PAGE_IS_WRITTEN, 0, 0, NULL), 0);
	uffd_register(uffd, wp.at, wp.size, WP);
	EQUAL(categories(wp.at) & (ACCESSED | PRESENT | PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED),
	      PRESENT | PAGE_IS_WRITTEN | PAGE_IS_WPALLOWED);
	EQUAL(count(&wp, PAGE_IS_WRITTEN, 0, 0, NULL), 2);
	EQUAL(accessed(&wp), 0);
}

// Nothing else is SWAPPED of a huge page that is not in the cache: a memory error is told by that, and not by WRITTEN.
static void scan_poison(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_POISON);
	struct memory m = tracked(kind, 2, uffd, MISSING);
	struct uffdio_poison p = {.range = {(uintptr_t)m.at, m.page}};
	EQUAL(punch(&m, 0, 2), 0);
	EQUAL(xioctl(uffd, UFFDIO_POISON, &p), 0);
	EQUAL(categories(m.at) & (PAGE_IS_SWAPPED | PRESENT | PAGE_IS_WRITTEN), PAGE_IS_SWAPPED);
	EQUAL(categories(unit(&m, 1)) & (PAGE_IS_SWAPPED | PRESENT | PAGE_IS_WRITTEN), 0);
}

// There is no atomic scan and re-arm for RWP.
static void scan_wp_matching(enum kind kind)
{
	int uffd = open_rwp(ASYNC), fd = pagemap(0);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct page_region r[4];
	check_fill(&m, m.at);
	EQUAL(scan(fd, m.at, m.size, ACCESSED, 0, 0, ACCESSED, r, 4, PM_SCAN_WP_MATCHING, NULL), 0);
	EQUAL(scan(fd, m.at, m.size, ACCESSED, 0, 0, ACCESSED, r, 4, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, NULL),
	      -EPERM);
	EQUAL(scan(fd, m.at, m.size, ACCESSED, 0, 0, ACCESSED, r, 4, PM_SCAN_CHECK_WPASYNC, NULL), -EPERM);
	EQUAL(accessed(&m), 2);
	EQUAL(scan(fd, m.at, m.size, ACCESSED, 0, 0, ACCESSED, r, 4, 0, NULL), 1);
	EQUAL(r[0].start, (uintptr_t)m.at);
	EQUAL(r[0].end, (uintptr_t)m.at + m.size);
	EQUAL(r[0].categories, ACCESSED);
	EQUAL(scan(fd, m.at, m.size, 1 << 10, 0, 0, 0, r, 4, 0, NULL), -EINVAL);
}

// Neighbours of an accessed page do not look accessed: no fault-around.
static void fault_around(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 32);
	fill(&m);
	MUST(madvise(m.at, m.size, MADV_DONTNEED)); // cached, not mapped
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(load(unit(&m, 16)), fill_word(&m, 16 * m.page));
	EQUAL(accessed(&m), 1);
}

// ---- 3.8

static void gup_async(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 4, uffd, 0);
	uint64_t word = 0;
	bool which[4];
	EQUAL(process_read(0, unit(&m, 1), &word, 8), 8);
	EQUAL(word, fill_word(&m, m.page));
	EQUAL(count(&m, ACCESSED, 0, 0, which), 1);
	CHECK(which[1]);
	EQUAL(proc_mem_read(0, unit(&m, 3), &word, 8), 8);
	EQUAL(word, fill_word(&m, 3 * m.page));
	EQUAL(count(&m, ACCESSED, 0, 0, which), 2);
	CHECK(which[3]);
	EXPECT_SILENCE(uffd);
}

static long read_page(void *at)
{
	uint64_t word;
	long n = process_read(0, at, &word, 8);
	return n == 8 ? (long)word : n;
}

static void gup_sync(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	uint64_t word;
	struct call c;
	call(&c, read_page, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	CHECK(!call_done(&c, 100));
	EQUAL(proc_mem_read(0, unit(&m, 2), &word, 8), -EIO);
	EQUAL(accessed(&m), 0);
	resolve(uffd, &m, 1, 1);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, (long)fill_word(&m, m.page));
	EQUAL(proc_mem_read(0, unit(&m, 1), &word, 8), 8);
	EQUAL(accessed(&m), 1);
	// The file can be read all the time, without a trap (section 8, row 4), and so can another mapping of it.
	if (kind & FILES) {
		if (kind == SHMEM) {
			EQUAL(pread(m.fd, &word, 8, (off_t)(2 * m.page)), 8);
			EQUAL(word, fill_word(&m, 2 * m.page));
		}
		const char *second = MUST(mmap(NULL, m.size, PROT_READ, MAP_SHARED, m.fd, 0));
		check_fill(&m, second);
		EXPECT_SILENCE(uffd);
		EQUAL(accessed(&m), 1);
	}
}

static long splice_page(void *at)
{
	int ends[2];
	uint64_t word;
	struct iovec v = {at, 4096};
	if (pipe(ends))
		return -1;
	if (vmsplice(ends[1], &v, 1, 0) != 4096 || read(ends[0], &word, 8) != 8)
		return -2;
	close(ends[0]);
	close(ends[1]);
	return (long)word;
}

static void gup_vmsplice(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct call c;
	EQUAL(splice_page(unit(&m, 1)), (long)fill_word(&m, m.page));
	EQUAL(accessed(&m), 1);
	protect(uffd, &m);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	call(&c, splice_page, m.at);
	EXPECT_FAULT(uffd, m.at, FAULT);
	CHECK(!call_done(&c, 100));
	resolve(uffd, &m, 0, 1);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, (long)fill_word(&m, 0));
}

struct direct {
	int fd;
	void *from;
};

static long write_directly(void *argument)
{
	struct direct *d = argument;
	return pwrite(d->fd, d->from, 4096, 0);
}

// Both ways between a protected page and a disk.
static void gup_direct(enum kind kind)
{
	char id[16], *back = MUST(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	int fd = zram_disk(id), uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 3, uffd, 0);
	struct direct d = {fd, m.at};
	struct call c;
	EQUAL(pwrite(fd, unit(&m, 1), 4096, 0), 4096);
	EQUAL(accessed(&m), 1);
	EQUAL(pread(fd, unit(&m, 2), 4096, 0), 4096);
	EQUAL(accessed(&m), 2);
	EQUAL(load(unit(&m, 2)), fill_word(&m, m.page));
	EXPECT_SILENCE(uffd);
	protect(uffd, &m);
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	call(&c, write_directly, &d);
	EXPECT_FAULT(uffd, m.at, FAULT);
	CHECK(!call_done(&c, 100));
	resolve(uffd, &m, 0, 1);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 4096);
	EQUAL(pread(fd, back, 4096, 0), 4096);
	EQUAL(load(back), fill_word(&m, 0));
	zram_disk_gone(fd, id);
}

// In a mapping that was made inaccessible later, the stock rules: FOLL_FORCE reads through it.
static void gup_inaccessible(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, 0);
	uint64_t word = 0;
	MUST(mprotect(m.at, m.size, PROT_NONE));
	EQUAL(process_read(0, m.at, &word, 8), -EFAULT);
	long n = proc_mem_read(0, m.at, &word, 8);
	if (n != 8 && n != -EIO) // a kernel parameter can forbid FOLL_FORCE
		EQUAL(n, 8);
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m), 2);
}

// Section 8, row 18.
static void user_mode_only(enum kind kind)
{
	need_rwp();
	int uffd = uffd_create(O_NONBLOCK | UFFD_USER_MODE_ONLY), ends[2];
	EQUAL(try_api(uffd, UFFD_FEATURE_RWP, NULL), 0);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct touch t;
	MUST(pipe(ends));
	EQUAL(write(ends[1], m.at, 8), -1);
	EQUAL(errno, EFAULT);
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, FAULT);
	resolve(uffd, &m, 0, 1);
	EXPECT_DONE(&t);
	EQUAL(write(ends[1], m.at, 8), 8);
}

// A system call that copies from a protected page waits for the answer.
static long write_page(void *at)
{
	int ends[2];
	return pipe(ends) ? -1 : write(ends[1], at, 8);
}

static void kernel_access(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct call c;
	call(&c, write_page, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	CHECK(!call_done(&c, 100));
	resolve(uffd, &m, 1, 1);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 8);
}

// ---- 3.9: eviction

static void evict(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 4, uffd, MISSING | MINOR);
	bool hot[4];
	struct touch t;
	char *copy = page_of(0, m.page);
	const char *second = MUST(mmap(NULL, m.size, PROT_READ, MAP_SHARED, m.fd, 0));
	EQUAL(load(unit(&m, 0)), fill_word(&m, 0));
	EQUAL(try_set_mode(uffd, 0, ASYNC), 0);
	EQUAL(count(&m, ACCESSED, 0, 0, hot), 1);
	CHECK(hot[0]);
	touch(&t, unit(&m, 2)); // during the loop
	EXPECT_FAULT(uffd, unit(&m, 2), FAULT);
	memcpy(copy, second + 2 * m.page, m.page);
	EQUAL(punch(&m, 2, 1), 0);
	EXPECT_BLOCKED(&t); // section 8, row 10: no wake, no new message
	EXPECT_SILENCE(uffd);
	EQUAL(try_wake(uffd, unit(&m, 2), m.page), 0);
	EXPECT_FAULT(uffd, unit(&m, 2), 0); // MISSING
	EXPECT_BLOCKED(&t);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EXPECT_FAULT(uffd, unit(&m, 2), 0);
	EQUAL(try_copy(uffd, unit(&m, 2), copy, m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, 2 * m.page));
	EQUAL(count(&m, ACCESSED, 0, 0, hot), 2); // what was fetched is not armed
	CHECK(hot[0] && hot[2]);
	protect(uffd, &m);
	EQUAL(cold(&m), 4);
	check_fill(&m, m.at);
}

// The other way of row 10: the answer without a wake. And anonymous memory, which its own process drops.
static void evict_copy(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, MISSING);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	if (kind & FILES)
		EQUAL(punch(&m, 1, 1), 0);
	else
		MUST(madvise(unit(&m, 1), m.page, MADV_DONTNEED));
	EXPECT_BLOCKED(&t);
	CHECK(!(pagemap_entry(unit(&m, 1)) & PM_UFFD_WP)); // no marker stays
	EQUAL(categories(unit(&m, 1)) & ~PAGE_IS_HUGE, 0);
	EQUAL(try_copy(uffd, unit(&m, 1), page_of(6, m.page), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), 0x0606060606060606);
	EQUAL(accessed(&m), 1);
}

// Without MISSING, a wake lets the thread fill the hole itself.
static void evict_plain(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	MUST(madvise(unit(&m, 1), m.page, MADV_DONTNEED));
	EQUAL(try_wake(uffd, unit(&m, 1), m.page), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), kind == SHMEM || kind == HUGETLB ? fill_word(&m, m.page) : 0);
	EXPECT_SILENCE(uffd);
}

// Cached pages that are not mapped here do not trap: MINOR shows them, CONTINUE answers.
static void minor(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 4, uffd, MISSING | MINOR);
	struct touch t;
	int64_t done;
	MUST(madvise(unit(&m, 1), m.page, MADV_DONTNEED));
	EQUAL(cold(&m), 3);
	CHECK(is_cached(&m, 1));
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_MINOR);
	EXPECT_BLOCKED(&t);
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, 0, &done), 0);
	EQUAL(done, m.page);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	EQUAL(accessed(&m), 1);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, NULL), -EEXIST); // protected, but mapped
	EQUAL(cold(&m), 3);
	touch(&t, unit(&m, 3));
	EXPECT_FAULT(uffd, unit(&m, 3), FAULT);
	resolve(uffd, &m, 3, 1);
	EXPECT_DONE(&t);
	// in async mode too MINOR is a message
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	MUST(madvise(unit(&m, 0), m.page, MADV_DONTNEED));
	touch(&t, unit(&m, 0));
	EXPECT_FAULT(uffd, unit(&m, 0), UFFD_PAGEFAULT_FLAG_MINOR);
	EQUAL(try_continue(uffd, unit(&m, 0), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

// Section 8, rows 1 and 2: all of it from another process that holds the descriptors.
static int touch_three(struct target *t)
{
	struct touch a, b, c;
	// units 2 and 3 are holes; of a file, 4 is cached and not mapped
	if (t->m.fd >= 0)
		EQUAL(punch(&t->m, 2, 2), 0);
	else
		MUST(madvise(unit(&t->m, 2), 2 * t->m.page, MADV_DONTNEED));
	if (t->m.fd >= 0)
		MUST(madvise(unit(&t->m, 4), t->m.page, MADV_DONTNEED));
	while (atomic_load(t->stage) < 3)
		sleep_ms(1);
	touch(&a, unit(&t->m, 0));
	EXPECT_DONE(&a);
	CHECK(touch_value(&a) == fill_word(&t->m, 0));
	touch(&b, unit(&t->m, 1));
	CHECK(touch_value(&b) == fill_word(&t->m, t->m.page));
	touch(&c, unit(&t->m, 2));
	CHECK(touch_value(&c) == 0x0404040404040404);
	sleep_ms(8000);
	return 0;
}

static void foreign(enum kind kind)
{
	struct target t;
	struct page_region r[8];
	struct uffd_msg message;
	int64_t done;
	target(&t, kind, 5, ASYNC, touch_three);
	const struct memory *m = &t.m;
	uffd_register(t.uffd, m->at, m->size, RWP | MISSING | (kind & FILES ? MINOR : 0));
	protect(t.uffd, m);
	atomic_store(t.stage, 3);
	CHECK(read_message(t.uffd, &message, 8000)); // after units 0 and 1 it waits for 2
	EQUAL(message.arg.pagefault.address & ~(m->page - 1), (uintptr_t)unit(m, 2));
	EQUAL(message.arg.pagefault.flags, 0);
	EQUAL(scan(t.pagemap, m->at, m->size, ACCESSED, 0, 0, ACCESSED, r, 8, 0, NULL), 1);
	EQUAL(r[0].start, (uintptr_t)m->at);
	EQUAL(r[0].end, (uintptr_t)unit(m, 2));
	EQUAL(try_set_mode(t.uffd, 0, ASYNC), 0);
	if (kind != HUGETLB) { // which has no zero pages
		EQUAL(try_zeropage(t.uffd, unit(m, 3), m->page, 0, &done), 0);
		EQUAL(done, m->page);
		EQUAL(scan(t.pagemap, unit(m, 3), m->page, PRESENT, 0, 0, PRESENT, r, 8, 0, NULL), 1);
	}
	if (kind & FILES) {
		EQUAL(try_continue(t.uffd, unit(m, 4), m->page, 0, &done), 0);
		EQUAL(done, m->page);
		EQUAL(scan(t.pagemap, unit(m, 4), m->page, PRESENT, 0, 0, PRESENT, r, 8, 0, NULL), 1);
	}
	EQUAL(try_copy(t.uffd, unit(m, 2), page_of(4, m->page), m->page, 0, NULL), 0);
	EQUAL(try_rwprotect(t.uffd, unit(m, 1), m->page, 0), 0);
	EQUAL(try_wake(t.uffd, m->at, m->size), 0);
	EQUAL(try_move(t.uffd, unit(m, 2), unit(m, 3), m->page, 0, NULL), -EINVAL);
	int pidfd = (int)MUST(syscall(434, t.pid, 0));
	struct iovec v = {m->at, m->page};
	EQUAL(syscall(440 /* process_madvise */, pidfd, &v, 1, MADV_DONTNEED, 0), -1);
	EQUAL(errno, EINVAL);
	EQUAL(try_unregister(t.uffd, m->at, m->size), 0);
	kill(t.pid, SIGKILL);
	wait_child(t.pid);
}

// ---- 3.10: life cycle

static void unregister(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, MISSING);
	struct touch t, w;
	touch(&t, unit(&m, 1));
	touch_write(&w, unit(&m, 2), 8);
	EXPECT_BLOCKED(&t);
	EXPECT_BLOCKED(&w);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EXPECT_DONE(&t);
	EXPECT_DONE(&w);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	EQUAL(load(unit(&m, 2)), 8);
	CHECK(!vm_flag(m.at, "ur") && !vm_flag(m.at, "um"));
	for (size_t i = 0; i < 3; i++)
		CHECK(!(pagemap_entry(unit(&m, i)) & PM_UFFD_WP));
	EQUAL(accessed(&m), 0); // nothing is tracked any more
	EXPECT_SILENCE(uffd);
	// again, and in part
	uffd_register(uffd, m.at, m.size, RWP);
	EQUAL(accessed(&m), 3);
	protect(uffd, &m);
	EQUAL(try_unregister(uffd, m.at, m.page), 0);
	EQUAL(load(m.at), fill_word(&m, 0));
	EQUAL(pagemap_entry(unit(&m, 1)) & PM_UFFD_WP, PM_UFFD_WP);
}

// Section 8, row 15: without MISSING somebody has to wake the blocked.
static void unregister_wakes_not(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct touch t;
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, FAULT);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, m.at, m.size), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, 0));
}

static void close_fd(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	struct touch t, w;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	touch_write(&w, unit(&m, 2), 8);
	EXPECT_BLOCKED(&t);
	close(uffd);
	EXPECT_DONE(&t);
	EXPECT_DONE(&w);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	EQUAL(load(unit(&m, 2)), 8);
	CHECK(!vm_flag(m.at, "ur"));
	for (size_t i = 0; i < 3; i++)
		CHECK(!(pagemap_entry(unit(&m, i)) & PM_UFFD_WP));
}

// Section 8, row 21.
static void fork_plain(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	struct touch t;
	bool private = kind & (ANON | ANON_THP | SHMEM_PRIVATE | HUGETLB_PRIVATE);
	pid_t pid = fork_child();
	if (!pid) {
		CHECK(!vm_flag(m.at, "ur"));
		EQUAL(accessed(&m), 0);
		for (size_t i = 0; i < 3; i++)
			CHECK(!(pagemap_entry(unit(&m, i)) & PM_UFFD_WP));
		check_fill(&m, m.at);
		store(unit(&m, 2) + 16, 99); // its own, of private memory
		sleep_ms(300);
		EQUAL(load(unit(&m, 1)), fill_word(&m, m.page)); // the parent wrote its copy
		_exit(0);
	}
	sleep_ms(100);
	EQUAL(cold(&m), 3);
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, FAULT);
	resolve(uffd, &m, 0, 3);
	EXPECT_DONE(&t);
	if (private)
		store(unit(&m, 1), 55);
	EQUAL(wait_child(pid), 0);
	EQUAL(load(unit(&m, 2) + 16), private ? 0 : 99);
}

// The same with a parent whose resolve is the kernel's: what is shared must not become writable.
static void fork_async(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 2, uffd, 0);
	pid_t pid = fork_child();
	if (!pid) {
		sleep_ms(200);
		check_fill(&m, m.at);
		_exit(0);
	}
	EQUAL(cold(&m), 2);
	store(unit(&m, 0), 1);
	EQUAL(load(unit(&m, 1)), fill_word(&m, m.page));
	store(unit(&m, 1), 2);
	EQUAL(accessed(&m), 2);
	EQUAL(wait_child(pid), 0);
	EQUAL(load(unit(&m, 0)), 1);
	EQUAL(load(unit(&m, 1)), 2);
}

static const struct memory *forked;

static long fork_and_read(void *argument)
{
	// Another descriptor table would hold the userfaultfd open.
	pid_t pid = argument ? (pid_t)syscall(SYS_clone, SIGCHLD | CLONE_FILES, 0, 0, 0, 0) : fork_child();
	if (!pid) {
		bool same = true;
		for (size_t i = 0; i < forked->pages; i++)
			same = same && load(unit(forked, i)) == fill_word(forked, i * forked->page);
		_exit(same ? 0 : 3);
	}
	return wait_child(pid);
}

static void fork_event(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_EVENT_FORK);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct uffd_msg message;
	struct call c;
	forked = &m;
	resolve(uffd, &m, 1, 1);
	call(&c, fork_and_read, NULL);
	CHECK(read_message(uffd, &message, 5000));
	EQUAL(message.event, UFFD_EVENT_FORK);
	int child = (int)message.arg.fork.ufd;
	EXPECT_FAULT(child, m.at, FAULT); // the child reads unit 0
	CHECK(!call_done(&c, 100));
	EQUAL(try_rwprotect(child, unit(&m, 1), m.page, 1), 0);
	EQUAL(try_rwprotect(child, m.at, m.page, 0), 0);
	EXPECT_FAULT(child, unit(&m, 1), FAULT);
	EQUAL(try_set_mode(child, ASYNC, 0), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 0);
	EQUAL(cold(&m), 1); // the parent's are its own
	EQUAL(accessed(&m), 1);
}

// The child's context is released before anybody took it: the child is left with ordinary memory.
static void fork_event_closed(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_EVENT_FORK);
	struct memory m = tracked(kind, 2, uffd, 0);
	struct call c;
	forked = &m;
	call(&c, fork_and_read, &m);
	CHECK(!call_done(&c, 200));
	close(uffd);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 0);
	check_fill(&m, m.at);
}

// Pinned pages are copied at fork; the copy is protected where the child is tracked, the original stays so.
static void fork_pinned(enum kind kind)
{
	char params[120] = {0};
	int uffd = open_rwp(UFFD_FEATURE_EVENT_FORK);
	struct memory m = memory(kind, 2);
	struct uffd_msg message;
	struct call c;
	struct iovec v = {m.at, m.size};
	fill(&m);
	int ring = (int)syscall(425 /* io_uring_setup */, 2, params);
	if (ring < 0)
		SKIP("no io_uring");
	if (syscall(427 /* io_uring_register */, ring, 0 /* IORING_REGISTER_BUFFERS */, &v, 1))
		SKIP("IORING_REGISTER_BUFFERS: %s", strerror(errno));
	uffd_register(uffd, m.at, m.size, RWP);
	protect(uffd, &m);
	forked = &m;
	call(&c, fork_and_read, NULL);
	CHECK(read_message(uffd, &message, 5000));
	EQUAL(message.event, UFFD_EVENT_FORK);
	int child = (int)message.arg.fork.ufd;
	EXPECT_FAULT(child, m.at, FAULT);
	EQUAL(try_set_mode(child, ASYNC, 0), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 0);
	EQUAL(cold(&m), kind == ANON_THP ? 2 : m.pages);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	check_fill(&m, m.at);
}

static void protections(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, 0);
	struct touch t;
	MUST(mprotect(m.at, m.size, PROT_READ));
	EQUAL(cold(&m), 3);
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, FAULT);
	resolve(uffd, &m, 0, 1);
	EXPECT_DONE(&t);
	EQUAL(signal_of(m.at, true), SIGSEGV);
	MUST(mprotect(m.at, m.size, PROT_NONE));
	EQUAL(cold(&m), 2);
	EQUAL(signal_of(m.at, false), SIGSEGV);
	EQUAL(signal_of(unit(&m, 1), false), SIGSEGV);
	EXPECT_SILENCE(uffd);
	protect(uffd, &m);
	EQUAL(cold(&m), 3);
	resolve(uffd, &m, 2, 1);
	MUST(mprotect(m.at, m.size, PROT_READ | PROT_WRITE));
	EQUAL(cold(&m), 2);
	CHECK(vm_flag(m.at, "ur"));
	EQUAL(load(unit(&m, 2)), fill_word(&m, 2 * m.page));
	touch_write(&t, m.at, 6);
	EXPECT_FAULT(uffd, m.at, WRITE_FAULT);
	resolve(uffd, &m, 0, 1);
	EXPECT_DONE(&t);
	EQUAL(load(m.at), 6);
	MUST(mprotect(m.at, m.size, PROT_NONE));
	EQUAL(try_unregister(uffd, m.at, m.size), 0); // v9
	MUST(mprotect(m.at, m.size, PROT_READ | PROT_WRITE));
	EQUAL(load(unit(&m, 1)), fill_word(&m, m.page));
	store(unit(&m, 1), 4);
	CHECK(!(pagemap_entry(unit(&m, 1)) & PM_UFFD_WP));
}

static struct memory elsewhere(const struct memory *m)
{
	struct memory n = *m;
	char *hole =
		MUST(mmap(NULL, m->size + 2 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	n.at = (char *)(((uintptr_t)hole + HUGE - 1) & ~(HUGE - 1));
	return n;
}

static long remap(void *argument)
{
	struct memory *m = argument;
	return mremap(m[0].at, m[0].size, m[0].size, MREMAP_MAYMOVE | MREMAP_FIXED, m[1].at) == m[1].at ? 0 : -errno;
}

static void remap_plain(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m[2];
	m[0] = tracked(kind, 2, uffd, 0);
	m[1] = elsewhere(m);
	EQUAL(remap(m), 0);
	CHECK(!vm_flag(m[1].at, "ur"));
	for (size_t i = 0; i < 2; i++)
		CHECK(!(pagemap_entry(unit(&m[1], i)) & PM_UFFD_WP));
	check_fill(&m[1], m[1].at);
	store(m[1].at, 5);
	EQUAL(load(m[1].at), 5);
	EXPECT_SILENCE(uffd);
}

static void remap_event(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_EVENT_REMAP);
	struct memory m[2];
	struct uffd_msg message;
	struct touch t;
	struct call c;
	m[0] = tracked(kind, 2, uffd, 0);
	m[1] = elsewhere(m);
	call(&c, remap, m);
	CHECK(read_message(uffd, &message, 5000));
	EQUAL(message.event, UFFD_EVENT_REMAP);
	EQUAL(message.arg.remap.to, (uintptr_t)m[1].at);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 0);
	CHECK(vm_flag(m[1].at, "ur"));
	EQUAL(cold(&m[1]), 2);
	touch(&t, unit(&m[1], 1));
	EXPECT_FAULT(uffd, unit(&m[1], 1), FAULT);
	resolve(uffd, &m[1], 1, 1);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(m, m->page));
}

// ---- huge pages

static struct memory small_pages(const struct memory *m)
{
	struct memory s = *m;
	s.page = 4096;
	s.pages = m->size / 4096;
	return s;
}

static void thp_in_place(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 2, uffd, 0), s = small_pages(&m);
	struct touch t;
	CHECK(is_huge(&m, 0) && is_huge(&m, 1));
	EQUAL(smaps_kib(m.at, "AnonHugePages"), 4096);
	// a fault says the address, and a 4 KiB answer splits; section 8, row 9
	touch(&t, m.at + 5 * 4096 + 8);
	EXPECT_FAULT(uffd, m.at + 5 * 4096, FAULT);
	EQUAL(try_rwprotect(uffd, m.at + 5 * 4096, 4096, 0), 0);
	EXPECT_DONE(&t);
	CHECK(!is_huge(&m, 0) && is_huge(&m, 1));
	EQUAL(accessed(&s), 1);
	EQUAL(cold(&s), 1023);
	touch(&t, m.at + 7 * 4096);
	EXPECT_FAULT(uffd, m.at + 7 * 4096, FAULT);
	EQUAL(try_rwprotect(uffd, m.at, HUGE, 0), 0);
	EXPECT_DONE(&t);
	// a 2 MiB answer restores the whole
	touch_write(&t, unit(&m, 1) + 4096 + 64, 3);
	EXPECT_FAULT(uffd, unit(&m, 1) + 4096, WRITE_FAULT);
	resolve(uffd, &m, 1, 1);
	EXPECT_DONE(&t);
	CHECK(is_huge(&m, 1));
	EQUAL(accessed(&s), 1024);
	check_fill(&m, m.at);
}

static void thp_async(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = tracked(kind, 2, uffd, 0), s = small_pages(&m);
	store(m.at + 9 * 4096 + 8, 1); // all 2 MiB become accessed
	EQUAL(accessed(&s), 512);
	CHECK(is_huge(&m, 0));
	// a part of it splits the PMD
	EQUAL(try_rwprotect(uffd, m.at + 4096, 2 * 4096, 1), 0);
	CHECK(!is_huge(&m, 0));
	EQUAL(cold(&s), 512 + 2);
	check_fill(&m, m.at);
	EQUAL(cold(&s), 0);
}

// A split keeps every part protected; what is dropped is a hole.
static void thp_split(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 1, uffd, 0), s = small_pages(&m);
	MUST(madvise(m.at + 3 * 4096, 4096, MADV_DONTNEED));
	CHECK(!is_huge(&m, 0));
	EQUAL(cold(&s), 511);
	EQUAL(accessed(&s), 0);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	EQUAL(load(m.at + 3 * 4096), 0);
	EQUAL(load(m.at + 4 * 4096), fill_word(&m, 4 * 4096));
	EQUAL(accessed(&s), 2);
}

// A memfd's huge mapping is dropped: holes, that MINOR shows. What comes back by CONTINUE are 4 KiB pages.
static void thp_shmem(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 1, uffd, MISSING | MINOR), s = small_pages(&m);
	struct touch t;
	CHECK(!is_huge(&m, 0));
	EQUAL(accessed(&s), 0);
	if (!cold(&s)) {
		touch(&t, m.at + 2 * 4096);
		EXPECT_FAULT(uffd, m.at + 2 * 4096, UFFD_PAGEFAULT_FLAG_MINOR);
		EQUAL(try_continue(uffd, m.at, HUGE, 0, NULL), 0);
		EXPECT_DONE(&t);
		EQUAL(touch_value(&t), fill_word(&m, 2 * 4096));
		EQUAL(accessed(&s), 512);
		CHECK(!is_huge(&m, 0));
		protect(uffd, &m);
	}
	EQUAL(cold(&s), 512);
	touch(&t, m.at + 3 * 4096);
	EXPECT_FAULT(uffd, m.at + 3 * 4096, FAULT);
	EQUAL(try_rwprotect(uffd, m.at + 3 * 4096, 4096, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(accessed(&s), 1);
	EQUAL(cold(&s), 511);
	resolve(uffd, &m, 0, 1);
	check_fill(&m, m.at);
}

// khugepaged and MADV_COLLAPSE leave protected pages alone.
static void collapse(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 512);
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP);
	protect(uffd, &m);
	madvise(m.at, m.size, MADV_HUGEPAGE);
	int e = madvise(m.at, m.size, MADV_COLLAPSE);
	if (kind == ANON) {
		EQUAL(e, -1);
		EQUAL(cold(&m), 512);
	} else {
		CHECK(!is_huge(&m, 0)); // the file may have collapsed, this mapping of it may not be huge
		EQUAL(accessed(&m), 0);
	}
	check_fill(&m, m.at);
}

// ---- swap, migration and others who change entries

static void swap_out(const struct memory *m, size_t at_least)
{
	struct memory s = small_pages(m);
	for (int i = 0; i < 50; i++) {
		page_out(m);
		if (count(&s, PAGE_IS_SWAPPED, 0, 0, NULL) >= at_least)
			return;
		sleep_ms(20);
	}
	SKIP("nothing was swapped out");
}

static void swap(enum kind kind)
{
	int uffd = open_rwp(0);
	need_swap();
	struct memory m = tracked(kind, kind == ANON_THP ? 1 : 64, uffd, 0), s = small_pages(&m);
	struct touch t;
	swap_out(&m, s.pages);
	EQUAL(accessed(&s), 0);
	EQUAL(cold(&s), 0);
	EQUAL(cold_or_swapped(&s), s.pages);
	CHECK(pagemap_entry(m.at) & PM_UFFD_WP);
	touch(&t, m.at + 4096);
	EXPECT_FAULT(uffd, m.at + 4096, FAULT);
	EQUAL(try_rwprotect(uffd, m.at + 4096, 4096, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, 4096));
	touch_write(&t, m.at + 2 * 4096, fill_word(&m, 2 * 4096));
	EXPECT_FAULT(uffd, m.at + 2 * 4096, WRITE_FAULT);
	EQUAL(try_rwprotect(uffd, m.at + 2 * 4096, 4096, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(accessed(&s), 2);
	// resolve and protect reach the swapped
	EQUAL(try_rwprotect(uffd, m.at + 3 * 4096, 4096, 0), 0);
	EQUAL(accessed(&s), 3);
	EQUAL(load(m.at + 3 * 4096), fill_word(&m, 3 * 4096));
	swap_out(&m, s.pages);
	EQUAL(accessed(&s), 3);
	protect(uffd, &m);
	EQUAL(cold_or_swapped(&s), s.pages);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	CHECK(!(pagemap_entry(m.at) & PM_UFFD_WP));
	check_fill(&m, m.at);
}

static void swap_async(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	need_swap();
	struct memory m = tracked(kind, 64, uffd, 0);
	swap_out(&m, 64);
	EQUAL(load(unit(&m, 5)), fill_word(&m, 5 * 4096));
	store(unit(&m, 6), 6);
	EQUAL(accessed(&m), 2);
	EQUAL(load(unit(&m, 6)), 6);
	store(unit(&m, 6), fill_word(&m, 6 * 4096));
	EQUAL(cold_or_swapped(&m), 62);
	check_fill(&m, m.at);
}

// v8: a swapped page that a child shares is copied only after the trap, and not lost from tracking by the write.
static void swap_cow(enum kind kind)
{
	int uffd = open_rwp(0);
	need_swap();
	struct memory m = tracked(kind, 16, uffd, 0);
	struct touch t;
	swap_out(&m, 16);
	pid_t pid = fork_child();
	if (!pid) {
		sleep_ms(3000);
		check_fill(&m, m.at);
		_exit(0);
	}
	EQUAL(accessed(&m), 0);
	for (size_t i = 0; i < 4; i++) {
		touch_write(&t, unit(&m, i), 1);
		EXPECT_FAULT(uffd, unit(&m, i), WRITE_FAULT);
		EXPECT_BLOCKED(&t);
		EQUAL(accessed(&m), i);
		resolve(uffd, &m, i, 1);
		EXPECT_DONE(&t);
	}
	EQUAL(accessed(&m), 4);
	EQUAL(wait_child(pid), 0);
}

static void swapoff_keeps(enum kind kind)
{
	int uffd = open_rwp(0);
	need_swap();
	struct memory m = tracked(kind, 32, uffd, 0);
	swap_out(&m, 32);
	resolve(uffd, &m, 7, 1);
	if (!may_change_system || swapoff("/dev/zram0"))
		SKIP("swapoff: %s", strerror(errno));
	EQUAL(count(&m, PRESENT, 0, 0, NULL), 32);
	EQUAL(accessed(&m), 1);
	EQUAL(cold(&m), 31);
	MUST(swapon("/dev/zram0", 0));
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	check_fill(&m, m.at);
}

static int node_of(const void *at)
{
	void *page = (void *)at;
	int status = -1;
	MUST(syscall(SYS_move_pages, 0, 1UL, &page, NULL, &status, 0));
	return status;
}

static void migrate(enum kind kind)
{
	int uffd = open_rwp(0);
	if (numa_nodes() < 2)
		SKIP("needs two nodes");
	struct memory m = tracked(kind, 4, uffd, 0);
	struct touch t;
	resolve(uffd, &m, 2, 1);
	int to = !node_of(m.at);
	unsigned long mask = 1UL << to;
	for (int i = 0; i < 50 && node_of(m.at) != to; i++, sleep_ms(20)) // it gives up on a page that somebody holds
		MUST(syscall(SYS_mbind, m.at, m.size, MPOL_BIND, &mask, 8UL, MPOL_MF_MOVE));
	if (node_of(m.at) != to)
		SKIP("it did not move");
	EQUAL(accessed(&m), 1);
	EQUAL(cold(&m), 3);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), FAULT);
	resolve(uffd, &m, 1, 1);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), fill_word(&m, m.page));
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	store(unit(&m, 3) + 8, 1);
	check_fill(&m, m.at);
}

// Migration back and forth under accesses and protections; no wrong byte.
static void migrate_load(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	if (numa_nodes() < 2)
		SKIP("needs two nodes");
	size_t pages = kind & HUGEPAGES ? 4 : 64;
	struct memory m = tracked(kind, pages, uffd, 0);
	atomic_int stop = 0;
	struct hammer h[2];
	hammer_start(h, &m, &stop);
	uint64_t until = now_ns() + LOAD_NS;
	for (int moves = 0; now_ns() < until || moves < 10; moves++) {
		unsigned long mask = 1UL << moves % 2;
		protect(uffd, &m);
		syscall(SYS_mbind, m.at, m.size, MPOL_BIND, &mask, 8UL, MPOL_MF_MOVE);
		protect(uffd, &m);
		EQUAL(try_rwprotect(uffd, m.at, m.page, 0), 0);
	}
	hammer_stop(h);
	check_fill(&m, m.at);
}

// Swapping and forking under accesses and protections; no wrong byte, in the children neither.
static void swap_load(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	need_swap();
	struct memory m = tracked(kind, kind == ANON_THP ? 2 : 128, uffd, 0);
	atomic_int stop = 0;
	struct hammer h[2];
	hammer_start(h, &m, &stop);
	for (uint64_t until = now_ns() + LOAD_NS, round = 0; now_ns() < until || round < 10; round++) {
		protect(uffd, &m);
		madvise(m.at, m.size, MADV_PAGEOUT);
		if (round % 2)
			EQUAL(try_rwprotect(uffd, m.at, m.size / 2, 0), 0);
	}
	hammer_stop(h);
	check_fill(&m, m.at);
}

static void fork_load(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	size_t pages = kind & HUGEPAGES ? 2 : 64;
	struct memory m = tracked(kind, pages, uffd, 0);
	atomic_int stop = 0;
	struct hammer h[2];
	hammer_start(h, &m, &stop);
	uint64_t until = now_ns() + LOAD_NS;
	for (int forks = 0; now_ns() < until || forks < 10; forks++) {
		protect(uffd, &m);
		pid_t pid = fork_child();
		if (!pid) {
			uint64_t words[2][64];
			for (int round = 0; round < 2; round++)
				for (size_t i = 0; i < pages; i++)
					words[round][i] = load(unit(&m, i) + 512) ^ load(unit(&m, i) + 512 + 64);
			_exit(memcmp(words[0], words[1], pages * 8) != 0); // the parent goes on writing: not here
		}
		protect(uffd, &m);
		EQUAL(wait_child(pid), 0);
	}
	hammer_stop(h);
	check_fill(&m, m.at);
}

// Section 8, row 7: compaction, as reclaim of anonymous memory, loses nothing.
static void compaction(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 256, uffd, 0);
	if (!set_system("/proc/sys/vm/compact_memory", "1"))
		SKIP("needs --system");
	EQUAL(cold(&m), 256);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0);
	check_fill(&m, m.at);
}

// NUMA balancing goes on beside it: nothing but RWP messages, nothing lost. Section 8, row 11.
static void numa_hints(enum kind kind)
{
	int uffd = open_rwp(0);
	if (numa_nodes() < 2)
		SKIP("needs two nodes");
	if (!set_system("/proc/sys/kernel/numa_balancing", "1"))
		SKIP("needs --system");
	set_system("/sys/kernel/debug/sched/numa_balancing/scan_delay_ms", "10");
	size_t pages = kind & HUGEPAGES ? 4 : 512;
	struct memory m = memory(kind, pages);
	fill(&m);
	uffd_register(uffd, m.at, m.size, RWP);
	atomic_int stop = 0;
	struct answer a = {.uffd = uffd, .m = &m, .stop = &stop};
	pthread_create(&a.thread, NULL, answer, &a);
	long hints = vmstat("numa_pte_updates"), faults = vmstat("numa_hint_faults");
	bool hinted = false;
	// a scan comes once a second, of the time that the process runs
	uint64_t began = now_ns();
	for (uint64_t round = 0; now_ns() < began + 2 * LOAD_NS || (hints >= 0 && !hinted); round++) {
		if (round % 16 == 0)
			protect(uffd, &m);
		check_fill(&m, m.at);
		if (round % 64 == 0)
			hinted = vmstat("numa_pte_updates") > hints && vmstat("numa_hint_faults") > faults;
		CHECK(now_ns() < began + 20 * LOAD_NS);
	}
	// whatever hints are set now, protection is another thing
	protect(uffd, &m);
	EQUAL(cold(&m), pages);
	sleep_ms(500);
	EQUAL(cold(&m), pages);
	atomic_store(&stop, 1);
	pthread_join(a.thread, NULL);
	set_system("/proc/sys/kernel/numa_balancing", "0");
}

static void ksm(enum kind kind)
{
	int uffd = open_rwp(ASYNC);
	struct memory m = memory(kind, 32);
	for (size_t o = 0; o < m.size; o += 8)
		store(m.at + o, 0x5555);
	uffd_register(uffd, m.at, m.size, RWP);
	protect(uffd, &m);
	if (madvise(m.at, m.size, MADV_MERGEABLE))
		SKIP("no KSM");
	set_system("/sys/kernel/mm/ksm/sleep_millisecs", "5");
	if (!set_system("/sys/kernel/mm/ksm/run", "1"))
		SKIP("needs --system");
	sleep_ms(2500);
	EQUAL(cold(&m), 32);
	for (size_t i = 0; i < 32; i++) {
		EQUAL(load(unit(&m, i)), 0x5555);
		store(unit(&m, i), i);
	}
	EQUAL(accessed(&m), 32);
	for (size_t i = 0; i < 32; i++) {
		EQUAL(load(unit(&m, i)), i);
		EQUAL(load(unit(&m, i) + 8), 0x5555);
	}
	set_system("/sys/kernel/mm/ksm/run", "0");
}

// Reclaim of a memfd drops the protection with the mapping; the page comes back by an ordinary fault (or MINOR).
static void reclaim_shmem(enum kind kind)
{
	int uffd = open_rwp(0);
	need_swap();
	struct memory m = tracked(kind, 32, uffd, 0);
	for (int i = 0; i < 50 && cold(&m); i++, sleep_ms(20))
		page_out(&m);
	EQUAL(accessed(&m), 0);
	if (cold(&m))
		SKIP("it was not reclaimed");
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
	EQUAL(accessed(&m), 32);
}

// ---- UFFDIO_MOVE

// Section 8, row 6: out of the tracked range into plain memory, in sync mode.
static void move_out(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = tracked(kind, 3, uffd, MISSING), plain = memory(kind, 3);
	struct touch t;
	uffd_register(uffd, plain.at, plain.size, MISSING);
	EQUAL(try_move(uffd, plain.at, unit(&m, 1), m.page, 0, NULL), 0);
	EQUAL(load(plain.at), fill_word(&m, m.page)); // accessible
	store(plain.at, 3);
	CHECK(!(pagemap_entry(plain.at) & PM_UFFD_WP));
	EXPECT_SILENCE(uffd);
	EQUAL(cold(&m), 2);
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0); // MISSING
	EQUAL(try_copy(uffd, unit(&m, 1), page_of(2, m.page), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

static void move_in(enum kind kind)
{
	int uffd = open_rwp(0);
	struct memory m = memory(kind, 2), plain = memory(kind, 2);
	struct touch t;
	fill(&plain);
	uffd_register(uffd, m.at, m.size, RWP | MISSING);
	EQUAL(try_move(uffd, m.at, plain.at, m.size, 0, NULL), 0);
	EQUAL(cold(&m), 2);
	if (kind == ANON_THP)
		CHECK(is_huge(&m, 0));
	touch_write(&t, unit(&m, 1), 3);
	EXPECT_FAULT(uffd, unit(&m, 1), WRITE_FAULT);
	resolve(uffd, &m, 0, 2);
	EXPECT_DONE(&t);
	EQUAL(load(m.at), fill_word(&m, 0));
	// the zero page
	struct memory zero = memory(kind, 1), to = memory(kind, 1);
	uffd_register(uffd, to.at, to.size, RWP | MISSING);
	EQUAL(load(zero.at), 0);
	EQUAL(try_move(uffd, to.at, zero.at, zero.size, 0, NULL), 0);
	EQUAL(cold(&to), 1);
	touch(&t, to.at);
	EXPECT_FAULT(uffd, to.at, FAULT);
	resolve(uffd, &to, 0, 1);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), 0);
}

static void move_swapped(enum kind kind)
{
	int uffd = open_rwp(0);
	need_swap();
	struct memory plain = memory(kind, 16), m = memory(kind, 16), back = memory(kind, 16);
	fill(&plain);
	uffd_register(uffd, m.at, m.size, RWP | MISSING);
	uffd_register(uffd, back.at, back.size, MISSING);
	swap_out(&plain, 16);
	EQUAL(try_move(uffd, m.at, plain.at, m.size, 0, NULL), 0);
	EQUAL(accessed(&m), 0);
	EQUAL(cold_or_swapped(&m), 16);
	EQUAL(try_move(uffd, back.at, m.at, m.size, 0, NULL), 0);
	check_fill(&m, back.at);
	CHECK(!(pagemap_entry(back.at) & PM_UFFD_WP));
	EXPECT_SILENCE(uffd);
}

// ---- WP beside it

// Section 8, row 22; other mappings of the same context may use WP.
static void wp_excluded(enum kind kind)
{
	int uffd = open_rwp(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
	struct memory m = tracked(kind, 2, uffd, 0), wp = memory(kind, 2);
	struct touch t;
	fill(&wp);
	EQUAL(try_register(uffd, m.at, m.size, RWP | WP, NULL), -EINVAL);
	EQUAL(try_register(uffd, m.at, m.size, WP, NULL), -EBUSY);
	uffd_register(uffd, wp.at, wp.size, WP);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 1), -ENOENT);
	EQUAL(try_rwprotect(uffd, wp.at, wp.size, 1), -ENOENT);
	EQUAL(try_copy(uffd, m.at, page_of(1, m.page), m.page, UFFDIO_COPY_MODE_WP, NULL), -EINVAL);
	EQUAL(try_writeprotect(uffd, wp.at, wp.size, 1), 0);
	EQUAL(load(wp.at), fill_word(&wp, 0)); // reads pass
	touch_write(&t, wp.at, 1);
	EXPECT_FAULT(uffd, wp.at, UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_WRITE);
	EQUAL(try_set_mode(uffd, ASYNC, 0), 0); // not its business
	EXPECT_FAULT(uffd, wp.at, UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_writeprotect(uffd, wp.at, wp.size, 0), 0);
	EXPECT_DONE(&t);
	check_fill(&m, m.at);
}

const struct test rwp_tests[] = {
	{"rwp.probe", probe, 0, 0},
	{"rwp.api", api, 0, 0},
	{"rwp.register.ioctls", register_ioctls, BACKINGS, 0},
	{"rwp.register.protects_nothing", register_protects_nothing, BACKINGS, 0},
	{"rwp.register.errors", register_errors, ANON | SHMEM | HUGETLB, 0},
	{"rwp.register.wrong_memory", register_wrong_memory, 0, 0},
	{"rwp.protect.errors", protect_errors, ANON | SHMEM | HUGETLB, 0},
	{"rwp.protect.misaligned", protect_misaligned, ANY_HUGETLB, 0},
	{"rwp.protect.gone", gone, 0, 0},
	{"rwp.protect.eagain", protect_again, ANON | SHMEM, 0},
	{"rwp.protect.twice", protect_twice, BACKINGS, 0},
	{"rwp.async", async, BACKINGS, 0},
	{"rwp.sync.read", sync_read, BACKINGS, 0},
	{"rwp.sync.write", sync_write, BACKINGS, 0},
	{"rwp.one_fault", one_fault, ANON | ANON_THP | SHMEM, 0},
	{"rwp.sigbus", sigbus, BACKINGS, 0},
	{"rwp.holes", holes, ANON | SHMEM | HUGETLB, 0},
	{"rwp.zero_page", zero_page, ANON, 0},
	{"rwp.zero_page.thp", zero_page_thp, ANON_THP, 0},
	{"rwp.set_mode.errors", set_mode_errors, 0, 0},
	{"rwp.set_mode.wakes", set_mode_wakes, BACKINGS, 0},
	{"rwp.set_mode.wakes_missing", set_mode_wakes_missing, ANON | SHMEM | HUGETLB, 0},
	{"rwp.set_mode.scope", set_mode_scope, ANON | SHMEM, 0},
	{"rwp.set_mode.drain", drain, BACKINGS, 30},
	{"rwp.set_mode.load", toggle_load, BACKINGS, 30},
	{"rwp.scan.polarity", scan_polarity, BACKINGS, 0},
	{"rwp.scan.elsewhere", scan_elsewhere, ANON | SHMEM | HUGETLB, 0},
	{"rwp.scan.poison", scan_poison, SHMEM | HUGETLB, 0},
	{"rwp.scan.wp_matching", scan_wp_matching, ANON | SHMEM | HUGETLB, 0},
	{"rwp.fault_around", fault_around, SHMEM, 0},
	{"rwp.gup.async", gup_async, BACKINGS, 0},
	{"rwp.gup.sync", gup_sync, BACKINGS, 0},
	{"rwp.gup.vmsplice", gup_vmsplice, BACKINGS, 0},
	{"rwp.gup.direct", gup_direct, BACKINGS, 0},
	{"rwp.gup.inaccessible", gup_inaccessible, BACKINGS, 0},
	{"rwp.gup.user_mode_only", user_mode_only, BACKINGS, 0},
	{"rwp.gup.kernel_access", kernel_access, BACKINGS, 0},
	{"rwp.evict", evict, FILES, 0},
	{"rwp.evict.copy", evict_copy, ANON | ANON_THP | SHMEM | HUGETLB, 0},
	{"rwp.evict.plain", evict_plain, ANON | ANON_THP | SHMEM | HUGETLB, 0},
	{"rwp.minor", minor, FILES, 0},
	{"rwp.foreign", foreign, ANON | SHMEM | HUGETLB, 20},
	{"rwp.unregister", unregister, BACKINGS, 0},
	{"rwp.unregister.wakes_not", unregister_wakes_not, ANON | SHMEM | HUGETLB, 0},
	{"rwp.close", close_fd, BACKINGS, 0},
	{"rwp.fork", fork_plain, BACKINGS, 0},
	{"rwp.fork.async", fork_async, ANON | ANON_THP | SHMEM_PRIVATE | HUGETLB_PRIVATE, 0},
	{"rwp.fork.event", fork_event, BACKINGS, 0},
	{"rwp.fork.event_closed", fork_event_closed, BACKINGS, 0},
	{"rwp.fork.pinned", fork_pinned, ANON | ANON_THP | HUGETLB_PRIVATE, 0},
	{"rwp.mprotect", protections, BACKINGS, 0},
	{"rwp.mremap", remap_plain, BACKINGS, 0},
	{"rwp.mremap.event", remap_event, BACKINGS, 0},
	{"rwp.thp.in_place", thp_in_place, ANON_THP, 0},
	{"rwp.thp.async", thp_async, ANON_THP, 0},
	{"rwp.thp.split", thp_split, ANON_THP, 0},
	{"rwp.thp.shmem", thp_shmem, SHMEM_THP, 0},
	{"rwp.thp.collapse", collapse, ANON | SHMEM, 0},
	{"rwp.swap", swap, ANON | ANON_THP | SHMEM_PRIVATE, 0},
	{"rwp.swap.async", swap_async, ANON | SHMEM_PRIVATE, 0},
	{"rwp.swap.cow", swap_cow, ANON, 20},
	{"rwp.swap.swapoff", swapoff_keeps, ANON, 0},
	{"rwp.migrate", migrate, BACKINGS, 0},
	{"rwp.migrate.load", migrate_load, BACKINGS, 20},
	{"rwp.swap.load", swap_load, ANON | ANON_THP | SHMEM_PRIVATE, 20},
	{"rwp.fork.load", fork_load, ANON | ANON_THP | SHMEM_PRIVATE | HUGETLB_PRIVATE, 20},
	{"rwp.compaction", compaction, ANON | SHMEM, 30},
	{"rwp.numa.hints", numa_hints, ANON | ANON_THP | SHMEM, 30},
	{"rwp.ksm", ksm, ANON, 0},
	{"rwp.reclaim", reclaim_shmem, SHMEM, 0},
	{"rwp.move.out", move_out, ANON | ANON_THP, 0},
	{"rwp.move.in", move_in, ANON | ANON_THP, 0},
	{"rwp.move.swapped", move_swapped, ANON, 0},
	{"rwp.wp", wp_excluded, ANON | ANON_THP | SHMEM | HUGETLB, 0},
	{0},
};
