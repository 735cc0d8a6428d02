// SPDX-License-Identifier: Apache-2.0
// What the stock engine relies on: each line of stock-kernel-facts.md, and of kernel-uapi.md's section 6 (and section 1 where 6 stands on it),
// that can be a test is one, named for what it says.
//
// Not tests, because no right kernel can fail them or no test can provoke them for certain:
//   costs, placement of the handler thread, spinning, Python's switch interval   times; `make bench`
//   what is injected into a VMM, a tracer that dies in it, a filter that kills   tests/kernel/test_inject.py, test_hazards.py
//   a KVM vCPU's faults                                                          tests/kernel/test_life.py (here: fetch.kernel_fault)
//   a store write that fails, hangs or lands late                                the store's, not the interface's; tests/kernel/test_store.py
//   a fetch inside the punch's truncate loop, direct I/O in flight               races without a moment to wait for; states DROPPING, min_idle_s
//   a page that waits in a CPU's batch is passed over by PAGEOUT                 depends on what else runs; hence on_one_cpu() here
//   nested guests, a VFIO device, a NUMA hint under process_vm_readv             not to be had on these machines
//   reads of anonymous memory cannot be seen, no stock interface shows a pin     that something does not exist
//   systemd's RuntimeDirectoryPreserve, a /run that is no tmpfs                  not the kernel's
//   PAGE_IS_WRITTEN of holes, the fixes of 6.7                                   they changed in stable kernels; the engine asks for what is PRESENT, too
#include "selftest.h"
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#define SMALL   ((size_t)4096)
#define MISSING UFFDIO_REGISTER_MODE_MISSING
#define WP      UFFDIO_REGISTER_MODE_WP
#define MINOR   UFFDIO_REGISTER_MODE_MINOR
#define PROTECT UFFDIO_WRITEPROTECT_MODE_WP
#define WRITE   UFFD_PAGEFAULT_FLAG_WRITE
#define FEATURES                                                                                                       \
	(UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS |                \
	 UFFD_FEATURE_WP_HUGETLBFS_SHMEM)
#define OVERFLOW_ID 65534 // nobody

// The advice that Debian 12's headers do not know.
#define ADVICE_FREE            8
#define ADVICE_REMOVE          9
#define ADVICE_COLD            20
#define ADVICE_PAGEOUT         21
#define ADVICE_POPULATE_READ   22
#define ADVICE_DONTNEED_LOCKED 24
#define ADVICE_GUARD_INSTALL   102

// ---- helpers

static int version(void) // 6.12 is 6012
{
	struct utsname name;
	int major, minor;
	uname(&name);
	if (sscanf(name.release, "%d.%d", &major, &minor) != 2)
		FAIL("a kernel release %s", name.release);
	return major * 1000 + minor;
}

static void need_feature(uint64_t bit, const char *what)
{
	if (!(uffd_features() & bit))
		SKIP("this kernel has no %s", what);
}

static void need_stock(void)
{
	if (uffd_features() >> 17)
		SKIP("a kernel with a native interface: these numbers are taken");
}

static bool has_scan(void)
{
	return scan(pagemap(0), NULL, 0, 0, 0, 0, 0, NULL, 0, 0, NULL) != -ENOTTY;
}

static void need_scan(void)
{
	if (!has_scan())
		SKIP("this kernel has no PAGEMAP_SCAN");
}

static void need_no_swap(void)
{
	char line[256];
	FILE *f = fopen("/proc/swaps", "re");
	int lines = 0;
	while (f && fgets(line, sizeof(line), f))
		lines++;
	if (f)
		fclose(f);
	if (lines > 1)
		SKIP("this machine swaps");
}

// A new page waits in a batch of the CPU that made it, and PAGEOUT passes over it unless called there.
static void on_one_cpu(void)
{
	cpu_set_t one;
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	MUST(sched_setaffinity(0, sizeof(one), &one));
}

static bool text_in(const char *path, const char *what)
{
	char text[8192];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[n < 0 ? 0 : n] = 0;
	return strstr(text, what);
}

static long number_in(const char *path, const char *field)
{
	char line[256];
	long value = -1;
	FILE *f = fopen(path, "re");
	if (!f)
		FAIL("%s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), f))
		if (!strncmp(line, field, strlen(field)))
			value = strtol(line + strlen(field), NULL, 10);
	fclose(f);
	return value;
}

static uint64_t entry_of(int fd, const void *at)
{
	uint64_t entry;
	EQUAL(pread(fd, &entry, 8, (off_t)((uintptr_t)at / SMALL * 8)), 8);
	return entry;
}

static bool is_mapped(const struct memory *m, size_t page)
{
	return pagemap_entry(unit(m, page)) & PM_PRESENT;
}

static bool is_held(const struct memory *m, size_t page)
{
	return pagemap_entry(unit(m, page)) & PM_UFFD_WP;
}

static bool is_marker(uint64_t entry)
{
	return (entry & (PM_PRESENT | PM_SWAP | PM_UFFD_WP)) == (PM_SWAP | PM_UFFD_WP);
}

static void unmap_all(const struct memory *m)
{
	MUST(madvise(m->at, m->size, MADV_DONTNEED));
}

static uint64_t word(const struct memory *m, size_t page)
{
	return fill_word(m, page * m->page);
}

static uint64_t load(const struct memory *m, size_t page)
{
	return *(volatile uint64_t *)unit(m, page);
}

static void *source(const struct memory *m, unsigned char byte) // a page to copy from
{
	void *at = MUST(mmap(NULL, m->page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(at, byte, m->page);
	return at;
}
#define SEVENS 0x0707070707070707LL

static long advise(int pidfd, void *at, size_t size, int advice) // process_madvise: bytes or -errno
{
	struct iovec range = {at, size};
	long n = syscall(SYS_process_madvise, pidfd, &range, 1L, advice, 0);
	return n < 0 ? -errno : n;
}

static blkcnt_t blocks(const struct memory *m)
{
	struct stat s;
	MUST(fstat(m->fd, &s));
	return s.st_blocks;
}

// Does what must be undone again whatever becomes of it: the verdict is the child's.
static void guarded(void (*body)(void *argument), void *argument, void (*undo)(void *argument))
{
	pid_t pid = fork_child();
	if (!pid) {
		body(argument);
		_exit(0);
	}
	int status = wait_child(pid);
	undo(argument);
	if (status)
		_exit(status);
}

// ---- a VMM: a child with the memory and a userfaultfd, which does what it is told; we hold duplicates of its descriptors

typedef long action(long argument);

struct vmm {
	struct memory m;
	pid_t pid;
	int pidfd, uffd, uffd_there, pagemap;
	int orders, answers;
};
struct order {
	action *what;
	long argument;
};
static struct memory in_vmm; // the child's own
static int uffd_in_vmm = -1;

static void vmm_main(const struct memory *m, uint64_t features, int orders, int answers)
{
	struct order order;
	in_vmm = *m;
	uffd_in_vmm = uffd_open(features);
	long answer = uffd_in_vmm;
	do
		EQUAL(write(answers, &answer, sizeof(answer)), sizeof(answer));
	while (read(orders, &order, sizeof(order)) == sizeof(order) && (answer = order.what(order.argument), true));
	_exit(0);
}

static void tell(const struct vmm *v, action *what, long argument)
{
	struct order order = {what, argument};
	EQUAL(write(v->orders, &order, sizeof(order)), sizeof(order));
}

static bool answered(const struct vmm *v, int ms)
{
	struct pollfd p = {.fd = v->answers, .events = POLLIN};
	return poll(&p, 1, ms) == 1;
}

static long answer_of(const struct vmm *v)
{
	long answer;
	if (read(v->answers, &answer, sizeof(answer)) != sizeof(answer)) {
		int status = wait_child(v->pid); // it said why, unless a signal took it
		if (status == 1 || status == 2)
			_exit(status);
		FAIL("the VMM ended: %d", status);
	}
	return answer;
}

static long ask(const struct vmm *v, action *what, long argument)
{
	tell(v, what, argument);
	return answer_of(v);
}

static struct vmm vmm(const struct memory *m, uint64_t features)
{
	struct vmm v = {.m = *m};
	int orders[2], answers[2];
	MUST(pipe2(orders, O_CLOEXEC));
	MUST(pipe2(answers, O_CLOEXEC));
	v.pid = fork_child();
	if (!v.pid) {
		close(orders[1]);
		close(answers[0]);
		vmm_main(m, features, orders[0], answers[1]);
	}
	close(orders[0]);
	close(answers[1]);
	v.orders = orders[1];
	v.answers = answers[0];
	v.uffd_there = (int)answer_of(&v);
	v.pidfd = (int)MUST(syscall(SYS_pidfd_open, v.pid, 0));
	v.uffd = (int)MUST(syscall(SYS_pidfd_getfd, v.pidfd, v.uffd_there, 0));
	v.pagemap = pagemap(v.pid);
	MUST(munmap(m->at, m->size)); // ours; the address goes on meaning the VMM's
	return v;
}

static bool vmm_maps(const struct vmm *v, size_t page)
{
	return entry_of(v->pagemap, unit(&v->m, page)) & PM_PRESENT;
}

static size_t vmm_mapped(const struct vmm *v)
{
	size_t n = 0;
	for (size_t i = 0; i < v->m.pages; i++)
		n += vmm_maps(v, i);
	return n;
}

static long do_fill(long unused)
{
	fill(&in_vmm);
	return unused;
}

static long do_check(long unused)
{
	check_fill(&in_vmm, in_vmm.at);
	return unused;
}

static long do_read(long page)
{
	return (long)load(&in_vmm, (size_t)page);
}

static long do_write(long page)
{
	*(volatile uint64_t *)unit(&in_vmm, (size_t)page) = 1234;
	return 0;
}

static long do_unmap(long unused)
{
	unmap_all(&in_vmm);
	return unused;
}

static long do_close(long unused)
{
	return unused + MUST(close(uffd_in_vmm));
}

static long do_lock(long page)
{
	return MUST(mlock(unit(&in_vmm, (size_t)page), in_vmm.page));
}

static long do_count_minor(long major)
{
	struct rusage usage;
	MUST(getrusage(RUSAGE_SELF, &usage));
	return major ? usage.ru_majflt : usage.ru_minflt;
}

static long do_pin(long pages)
{
	struct io_uring_params parameters = {0};
	struct iovec buffer = {in_vmm.at, (size_t)pages * in_vmm.page};
	int ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);
	if (ring < 0)
		SKIP("io_uring: %s", strerror(errno));
	return MUST(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1));
}

static long do_exit(long status)
{
	_exit((int)status);
}

static void vmm_ends(struct vmm *v)
{
	tell(v, do_exit, 0);
	EQUAL(wait_child(v->pid), 0);
}

// ---- numbers

static void request_numbers(enum kind kind)
{
	(void)kind;
	EQUAL(UFFDIO_REGISTER, 0xC020AA00);
	EQUAL(UFFDIO_UNREGISTER, 0x8010AA01);
	EQUAL(UFFDIO_WAKE, 0x8010AA02);
	EQUAL(UFFDIO_COPY, 0xC028AA03);
	EQUAL(UFFDIO_ZEROPAGE, 0xC020AA04);
	EQUAL(UFFDIO_MOVE, 0xC028AA05);
	EQUAL(UFFDIO_WRITEPROTECT, 0xC018AA06);
	EQUAL(UFFDIO_CONTINUE, 0xC020AA07);
	EQUAL(UFFDIO_POISON, 0xC020AA08);
	EQUAL(UFFDIO_DEACTIVATE, 0x8010AA09);
	EQUAL(UFFDIO_RWPROTECT, 0xC018AA09);
	EQUAL(UFFDIO_SET_MODE, 0x4010AA0A);
	EQUAL(UFFDIO_API, 0xC018AA3F);
	EQUAL(USERFAULTFD_IOC_NEW, 0xAA00);
	EQUAL(PAGEMAP_SCAN, 0xC0606610);
}

static void features_by_version(enum kind kind)
{
	static const int since[] = {5007, 4011, 4011, 4011, 4011, 4011, 4011, 4014, 4014,
				    5013, 5014, 5018, 5019, 6004, 6006, 6007, 6008};
	uint64_t features = uffd_features();
	int here = version();
	(void)kind;
	for (size_t bit = 0; bit < sizeof(since) / sizeof(since[0]); bit++)
		if ((features >> bit & 1) != (here >= since[bit]))
			FAIL("feature %zu on %d.%d: features are 0x%llx", bit, here / 1000, here % 1000,
			     (unsigned long long)features);
}

static void api_ioctls(enum kind kind)
{
	(void)kind;
	need_stock();
	EQUAL(uffd_api_ioctls(), 0x8000000000000003);
}

// What REGISTER says can be called: bits for what came later are there where the feature is.
static void register_ioctls(enum kind kind)
{
	struct memory m = memory(kind, 2);
	uint64_t features = uffd_features(), both = FEATURES | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS;
	uint64_t base = 1 << 2 | 1 << 3, wp = 1 << 6, minor = 1 << 7, got;
	if (kind != HUGETLB)
		base |= 1 << 4 | (features & UFFD_FEATURE_MOVE ? 1 << 5 : 0);
	base |= features & UFFD_FEATURE_POISON ? 1 << 8 : 0;
	int uffd = uffd_open(both);
	need_stock();
	EQUAL(uffd_register(uffd, m.at, m.size, MISSING), base);
	EQUAL(uffd_register(uffd, m.at, m.size, WP), base | wp);
	EQUAL(uffd_register(uffd, m.at, m.size, MISSING | WP), base | wp);
	EQUAL(try_unregister(uffd, m.at, m.size), 0);
	if (kind == ANON) {
		EQUAL(try_register(uffd, m.at, m.size, MINOR, &got), -EINVAL);
	} else {
		EQUAL(uffd_register(uffd, m.at, m.size, MINOR), base | minor);
		EQUAL(uffd_register(uffd, m.at, m.size, WP | MINOR), base | wp | minor);
	}
}

static void native_numbers_refused(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES);
	struct page_region r;
	need_stock();
	EQUAL(try_register(uffd, m.at, m.size, 8, NULL), -EINVAL);
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	EQUAL(try_deactivate(uffd, m.at, m.size), -EINVAL);
	EQUAL(try_rwprotect(uffd, m.at, m.size, 1), -EINVAL);
	EQUAL(try_set_mode(uffd, 0, 0), -EINVAL);
	if (!has_scan())
		SKIP("all but the scan: this kernel has no PAGEMAP_SCAN");
	EQUAL(scan(pagemap(0), m.at, m.size, 1 << 9, 0, 0, 1 << 9, &r, 1, 0, NULL), -EINVAL);
}

// ---- attach: from outside

// The VMM's own copy is ours too, and everything works through it; a copy's bytes come from our memory.
static void attach_from_outside(enum kind kind)
{
	struct memory m = memory(kind, 4);
	struct vmm v = vmm(&m, FEATURES);
	int64_t done;
	uffd_register(v.uffd, m.at, m.size, MISSING | WP);
	tell(&v, do_read, 1);
	EXPECT_FAULT(v.uffd, unit(&m, 1), 0);
	EQUAL(try_copy(v.uffd, unit(&m, 1), source(&m, 7), m.page, 0, &done), 0);
	EQUAL(done, m.page);
	EQUAL(answer_of(&v), SEVENS);
	EQUAL(try_writeprotect(v.uffd, unit(&m, 1), m.page, PROTECT), 0);
	tell(&v, do_write, 1);
	EXPECT_FAULT(v.uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	CHECK(!answered(&v, 100));
	EQUAL(try_writeprotect(v.uffd, unit(&m, 1), m.page, 0), 0);
	EQUAL(answer_of(&v), 0);
	EQUAL(ask(&v, do_read, 1), 1234);
	EQUAL(try_wake(v.uffd, m.at, m.size), 0);
	EQUAL(try_unregister(v.uffd, m.at, m.size), 0);
	EQUAL(ask(&v, do_read, 0), 0);
}

static void attach_memfd_from_outside(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	struct stat ours, theirs;
	uint64_t got;
	ask(&v, do_fill, 0);
	int fd = (int)MUST(syscall(SYS_pidfd_getfd, v.pidfd, m.fd, 0));
	MUST(fstat(fd, &theirs));
	MUST(fstat(m.fd, &ours));
	EQUAL(theirs.st_ino, ours.st_ino);
	EQUAL(pread(fd, &got, 8, (off_t)m.page), 8);
	EQUAL(got, word(&m, 1));
}

// A manager takes the descriptor, evicts and dies: the range stays registered, and a successor serves what comes.
static void attach_outlives_the_manager(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	close(v.uffd);
	pid_t manager = fork_child();
	if (!manager) {
		int uffd = (int)MUST(syscall(SYS_pidfd_getfd, v.pidfd, v.uffd_there, 0));
		uffd_register(uffd, m.at, m.size, MISSING | WP);
		EQUAL(punch(&m, 0, 1), 0);
		raise(SIGKILL);
	}
	EQUAL(wait_child(manager), 128 + SIGKILL);
	tell(&v, do_read, 0);
	CHECK(!answered(&v, 150));
	int uffd = (int)MUST(syscall(SYS_pidfd_getfd, v.pidfd, v.uffd_there, 0));
	EXPECT_FAULT(uffd, m.at, 0);
	EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, 0, NULL), 0);
	EQUAL(answer_of(&v), SEVENS);
}

static void attach_last_descriptor_closed(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	uffd_register(v.uffd, m.at, m.size, MISSING | WP);
	EQUAL(punch(&m, 1, 1), 0);
	close(v.uffd);
	tell(&v, do_close, 0);
	EQUAL(answer_of(&v), 0);
	EQUAL(ask(&v, do_read, 1), 0); // nobody was asked: what was evicted reads as zeros
	EQUAL(ask(&v, do_read, 0), word(&m, 0));
}

// What a process read and did not answer before it died is not told its successor, until a wake.
static void attach_message_is_told_once(enum kind kind)
{
	struct memory m = memory(kind, 1);
	struct vmm v = vmm(&m, FEATURES);
	uffd_register(v.uffd, m.at, m.size, MISSING);
	tell(&v, do_read, 0);
	pid_t first = fork_child();
	if (!first) {
		EXPECT_FAULT(v.uffd, m.at, 0);
		raise(SIGKILL);
	}
	EQUAL(wait_child(first), 128 + SIGKILL);
	EXPECT_SILENCE(v.uffd);
	EQUAL(try_wake(v.uffd, m.at, m.size), 0);
	EXPECT_FAULT(v.uffd, m.at, 0);
	EQUAL(try_copy(v.uffd, m.at, source(&m, 7), m.page, 0, NULL), 0);
	EQUAL(answer_of(&v), SEVENS);
}

// MISSING is added to a chunk of a range that is registered WP, and registering all of it WP again leaves the chunk's alone.
static void attach_missing_by_chunk(enum kind kind)
{
	struct memory m = memory(kind, 6);
	int uffd = uffd_open(FEATURES);
	fill(&m);
	uffd_register(uffd, m.at, m.size, WP);
	CHECK(vm_flag(m.at, "uw") && !vm_flag(m.at, "um"));
	uffd_register(uffd, unit(&m, 2), 2 * m.page, MISSING | WP);
	uffd_register(uffd, m.at, m.size, WP);
	for (size_t i = 0; i < m.pages; i++) {
		CHECK(vm_flag(unit(&m, i), "uw"));
		EQUAL(vm_flag(unit(&m, i), "um"), i / 2 == 1);
	}
	check_fill(&m, m.at);
}

static void attach_register_replaces_modes(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	need_stock(); // rwp says EBUSY
	uffd_register(uffd, m.at, m.size, WP);
	uffd_register(uffd, m.at, m.size, MISSING);
	CHECK(vm_flag(m.at, "um") && !vm_flag(m.at, "uw"));
}

// ---- zap: deactivation

static void zap_pageout_from_outside(enum kind kind)
{
	struct memory m = memory(kind, 64);
	need_no_swap();
	on_one_cpu();
	struct vmm v = vmm(&m, FEATURES);
	uffd_register(v.uffd, m.at, m.size, WP);
	ask(&v, do_fill, 0);
	EQUAL(vmm_mapped(&v), 64);
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), m.size);
	EQUAL(vmm_mapped(&v), 0);
	for (size_t i = 0; i < m.pages; i++)
		CHECK(is_cached(&m, i));
	EXPECT_SILENCE(v.uffd);
	long minor = ask(&v, do_count_minor, 0), major = ask(&v, do_count_minor, 1);
	ask(&v, do_check, 0);
	EQUAL(ask(&v, do_count_minor, 1), major);
	CHECK(ask(&v, do_count_minor, 0) >= minor + 64); // registered WP: one fault a page
	EXPECT_SILENCE(v.uffd);
}

static void zap_pageout_second_mapper(enum kind kind)
{
	struct memory m = memory(kind, 8);
	need_no_swap();
	on_one_cpu();
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	volatile uint64_t *ours = MUST(mmap(NULL, m.page, PROT_READ, MAP_SHARED, m.fd, (off_t)(3 * m.page)));
	EQUAL(*ours, word(&m, 3));
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), m.size);
	for (size_t i = 0; i < m.pages; i++)
		EQUAL(vmm_maps(&v, i), i == 3);
}

static void zap_pageout_mlocked(enum kind kind)
{
	struct memory m = memory(kind, 8);
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	tell(&v, do_lock, 4);
	EQUAL(answer_of(&v), 0);
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), -EINVAL);
	EQUAL(advise(v.pidfd, unit(&m, 4), m.page, ADVICE_PAGEOUT), -EINVAL);
	CHECK(vmm_maps(&v, 4));
}

static void zap_pageout_anon_without_swap(enum kind kind)
{
	struct memory m = memory(kind, 8);
	need_no_swap();
	on_one_cpu();
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), m.size);
	EQUAL(vmm_mapped(&v), 8);
}

static void zap_dontneed_inside(enum kind kind)
{
	struct memory m = memory(kind, 8);
	int uffd = uffd_open(FEATURES);
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	unmap_all(&m);
	for (size_t i = 0; i < m.pages; i++)
		CHECK(!is_mapped(&m, i));
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
}

static void zap_advice_from_outside(enum kind kind)
{
	static const int taken[] = {ADVICE_COLD, ADVICE_PAGEOUT, MADV_WILLNEED},
			 refused[] = {MADV_DONTNEED, ADVICE_FREE, ADVICE_REMOVE, ADVICE_DONTNEED_LOCKED,
				      ADVICE_POPULATE_READ};
	struct memory m = memory(kind, 4);
	need_no_swap();
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	for (size_t i = 0; i < sizeof(taken) / sizeof(taken[0]); i++)
		if (advise(v.pidfd, m.at, m.size, taken[i]) != (long)m.size)
			FAIL("advice %d is refused", taken[i]);
	for (size_t i = 0; i < sizeof(refused) / sizeof(refused[0]); i++)
		if (advise(v.pidfd, m.at, m.size, refused[i]) != -EINVAL)
			FAIL("advice %d is taken", refused[i]);
	ask(&v, do_check, 0);
}

static void zap_advice_to_oneself(enum kind kind)
{
	struct memory m = memory(kind, 2);
	fill(&m);
	int pidfd = (int)MUST(syscall(SYS_pidfd_open, getpid(), 0));
	if (version() < 6013) {
		EQUAL(advise(pidfd, m.at, m.size, MADV_DONTNEED), -EINVAL);
		SKIP("refused before 6.13, as it should be");
	}
	EQUAL(advise(pidfd, m.at, m.size, MADV_DONTNEED), m.size);
	CHECK(!is_mapped(&m, 0));
}

// A long-term pin does not keep a page mapped: it looks cold, and a punch would cut the device off. VmPin tells.
static void zap_unmaps_pinned(enum kind kind)
{
	struct memory m = memory(kind, 4);
	char path[40];
	need_no_swap();
	on_one_cpu();
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	snprintf(path, sizeof(path), "/proc/%d/status", v.pid);
	EQUAL(number_in(path, "VmPin:"), 0);
	EQUAL(ask(&v, do_pin, 2), 0);
	EQUAL(number_in(path, "VmPin:"), 8);
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), m.size);
	EQUAL(vmm_mapped(&v), 0);
	ask(&v, do_check, 0);
	EQUAL(vmm_mapped(&v), 4);
	ask(&v, do_unmap, 0);
	EQUAL(vmm_mapped(&v), 0);
	EQUAL(number_in(path, "VmPin:"), 8);
	ask(&v, do_check, 0);
}

#define SWAP_FILE "/var/tmp/tierd-selftest-swap"

static void swap_body(void *argument)
{
	(void)argument;
	struct memory m = memory(SHMEM, 64);
	on_one_cpu();
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	char page[4096] = {0};
	uint32_t head[2] = {1, (16 << 20) / 4096 - 1};
	memcpy(page + 1024, head, sizeof(head));
	memcpy(page + 4096 - 10, "SWAPSPACE2", 10);
	int fd = open(SWAP_FILE, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		SKIP(SWAP_FILE ": %s", strerror(errno));
	if (posix_fallocate(fd, 0, 16 << 20))
		SKIP("no room for a swap file");
	EQUAL(pwrite(fd, page, sizeof(page), 0), sizeof(page));
	MUST(fsync(fd));
	if (swapon(SWAP_FILE, 0))
		SKIP("no swap can be had here: %s", strerror(errno));
	long before = number_in("/proc/meminfo", "SwapFree:");
	EQUAL(advise(v.pidfd, m.at, m.size, ADVICE_PAGEOUT), m.size);
	EQUAL(vmm_mapped(&v), 0);
	CHECK(number_in("/proc/meminfo", "SwapFree:") <= before - 64 * 4);
	ask(&v, do_check, 0);
}

static void swap_undo(void *argument)
{
	(void)argument;
	swapoff(SWAP_FILE);
	unlink(SWAP_FILE);
}

// Where there is swap, PAGEOUT writes the guest's memory to it.
static void zap_pageout_with_swap(enum kind kind)
{
	(void)kind;
	if (!may_change_system)
		SKIP("swap: needs --system");
	need_no_swap();
	guarded(swap_body, NULL, swap_undo);
}

// ---- scan: who was touched

static void scan_fault_around(enum kind kind)
{
	struct memory m = memory(kind, 32);
	size_t mapped = 0;
	fill(&m);
	unmap_all(&m);
	(void)load(&m, 8);
	for (size_t i = 0; i < m.pages; i++)
		mapped += is_mapped(&m, i);
	CHECK(mapped > 1);
}

static void scan_page_exact_under_wp(enum kind kind)
{
	struct memory m = memory(kind, 32);
	int uffd = uffd_open(FEATURES);
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	unmap_all(&m);
	(void)load(&m, 8);
	for (size_t i = 0; i < m.pages; i++)
		EQUAL(is_mapped(&m, i), i == 8);
}

// Cold is what is not PRESENT: by PAGEMAP_SCAN and by bit 63 of an entry the same; from outside.
static void scan_cold(enum kind kind)
{
	struct memory m = memory(kind, 32);
	struct vmm v = vmm(&m, FEATURES);
	struct page_region r[32];
	uint64_t end;
	uffd_register(v.uffd, m.at, m.size, WP);
	ask(&v, do_fill, 0);
	ask(&v, do_unmap, 0);
	EQUAL(ask(&v, do_read, 3), word(&m, 3));
	EQUAL(ask(&v, do_write, 20), 0);
	for (size_t i = 0; i < m.pages; i++)
		EQUAL(vmm_maps(&v, i), i == 3 || i == 20);
	if (!has_scan())
		SKIP("all but the scan: this kernel has no PAGEMAP_SCAN");
	EQUAL(scan(v.pagemap, m.at, m.size, PAGE_IS_PRESENT, PAGE_IS_PRESENT, 0, PAGE_IS_PRESENT, r, 32, 0, &end), 3);
	EQUAL(end, (uintptr_t)m.at + m.size);
	EQUAL(r[0].start, (uintptr_t)m.at);
	EQUAL(r[0].end, (uintptr_t)unit(&m, 3));
	EQUAL(r[1].start, (uintptr_t)unit(&m, 4));
	EQUAL(r[1].end, (uintptr_t)unit(&m, 20));
	EQUAL(r[2].start, (uintptr_t)unit(&m, 21));
	EQUAL(r[2].end, (uintptr_t)m.at + m.size);
	EQUAL(r[0].categories, 0); // raw, not inverted
}

static void scan_inverted_matches_foreign(enum kind kind)
{
	struct memory m = memory(kind, 6);
	struct page_region r[4];
	size_t matched = 0;
	need_scan();
	for (size_t i = 0; i < 4; i++)
		*(volatile char *)unit(&m, i) = 1;
	MUST(munmap(unit(&m, 1), m.page)); // this does not match; beyond the end is PROT_NONE memory of somebody else
	long n = scan(pagemap(0), m.at, m.size + SMALL, PAGE_IS_PRESENT, PAGE_IS_PRESENT, 0, PAGE_IS_PRESENT, r, 4, 0,
		      NULL);
	CHECK(n > 0);
	for (long i = 0; i < n; i++)
		matched += (r[i].end - r[i].start) / SMALL;
	EQUAL(matched, 3);
	EQUAL(r[0].start, (uintptr_t)unit(&m, 4));
	EQUAL(r[n - 1].end, (uintptr_t)m.at + m.size + SMALL);
}

static void scan_goes_on_at_walk_end(enum kind kind)
{
	struct memory m = memory(kind, 20);
	struct page_region r[2];
	uint64_t at = (uintptr_t)m.at, end = at + m.size;
	int fd = pagemap(0), calls = 0;
	need_scan();
	for (size_t i = 0; i < m.pages; i += 2)
		*(volatile char *)unit(&m, i) = 1;
	while (at < end) {
		uint64_t walk_end;
		long n = scan(fd, (void *)at, end - at, PAGE_IS_PRESENT, 0, 0, PAGE_IS_PRESENT, r, 2, 0, &walk_end);
		if (calls < 5) {
			EQUAL(n, 2);
			EQUAL(r[0].start, (uintptr_t)unit(&m, 4 * (size_t)calls));
			EQUAL(r[1].start, (uintptr_t)unit(&m, 4 * (size_t)calls + 2));
			CHECK(walk_end >= r[1].end);
		} else {
			EQUAL(n, 0);
		}
		CHECK(walk_end > at);
		at = walk_end;
		calls++;
	}
	CHECK(calls == 5 || calls == 6);
}

static void scan_errors(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct page_region r;
	int fd = pagemap(0);
	uint64_t p = PAGE_IS_PRESENT;
	struct pm_scan_arg a = {.size = 8, .start = (uintptr_t)m.at, .end = (uintptr_t)m.at + m.size};
	need_scan();
	fill(&m);
	EQUAL(xioctl(fd, PAGEMAP_SCAN, &a), -EINVAL);
	EQUAL(scan(fd, m.at, m.size, p, 0, 0, p, &r, 1, 1 << 9, NULL), -EINVAL);
	EQUAL(scan(fd, m.at, m.size, 1ULL << 40, 0, 0, p, &r, 1, 0, NULL), -EINVAL);
	EQUAL(scan(fd, m.at + 1, m.size, p, 0, 0, p, &r, 1, 0, NULL), -EINVAL);
	EQUAL(scan(fd, m.at, m.size, p, 0, 0, p, NULL, 1, 0, NULL), -EINVAL);
	CHECK(scan(fd, m.at, m.size, p, 0, 0, p, NULL, 0, 0, NULL) >= 0);
	EQUAL(scan(fd, m.at, m.size, p, 0, 0, p, (void *)SMALL, 1, 0, NULL), -EFAULT);
}

static void scan_of_the_dead(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	struct page_region r;
	uint64_t entry = 1, p = PAGE_IS_PRESENT;
	ask(&v, do_fill, 0);
	vmm_ends(&v);
	EQUAL(pread(v.pagemap, &entry, 8, (off_t)((uintptr_t)m.at / SMALL * 8)), 0);
	if (!has_scan())
		SKIP("all but the scan: this kernel has no PAGEMAP_SCAN");
	long n = scan(v.pagemap, m.at, m.size, p, 0, 0, p, &r, 1, 0, NULL);
	CHECK(n == 0 || n == -ESRCH); // 6.18, 6.12
}

static void scan_guard_page(enum kind kind)
{
	struct memory m = memory(kind, 2);
	need_scan();
	fill(&m);
	if (madvise(unit(&m, 1), m.page, ADVICE_GUARD_INSTALL))
		SKIP("this kernel has no guard pages");
	uint64_t c = categories(unit(&m, 1));
	if (!(c & PAGE_IS_GUARD))
		SKIP("this kernel's PAGEMAP_SCAN does not know guard pages");
	EQUAL(c & (PAGE_IS_GUARD | PAGE_IS_SWAPPED | PAGE_IS_PRESENT), PAGE_IS_GUARD | PAGE_IS_SWAPPED);
}

// How the engine sees who writes to anonymous memory: what is protected is not WRITTEN until then.
static void scan_written_of_anon(enum kind kind)
{
	struct memory m = memory(kind, 8);
	bool which[8];
	need_scan();
	need_feature(UFFD_FEATURE_WP_ASYNC, "WP_ASYNC");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_WP_ASYNC);
	uffd_register(uffd, m.at, m.size, WP);
	for (size_t i = 0; i < 6; i++)
		*(volatile char *)unit(&m, i) = 1;
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, PAGE_IS_WRITTEN, NULL), 6); // no hole
	EQUAL(try_writeprotect(uffd, m.at, 6 * m.page, PROTECT), 0);
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, PAGE_IS_WRITTEN, NULL), 0);
	(void)*(volatile char *)unit(&m, 1); // a read does not count
	*(volatile char *)unit(&m, 4) = 2;
	*(volatile char *)unit(&m, 7) = 2; // a hole until now
	EQUAL(count(&m, PAGE_IS_PRESENT, 0, PAGE_IS_WRITTEN, which), 2);
	CHECK(which[4] && which[7]);
	EXPECT_SILENCE(uffd);
}

// Of a huge page neither has an entry in /proc/PID/pagemap: that is what tells a memory error from a hold's marker.
static void scan_poison_is_written(enum kind kind)
{
	struct memory m = memory(kind, 3);
	const uint64_t both = PAGE_IS_SWAPPED | PAGE_IS_WRITTEN;
	need_scan();
	need_feature(UFFD_FEATURE_POISON, "POISON");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_POISON);
	struct uffdio_poison p = {.range = {(uintptr_t)m.at, m.page}};
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	EQUAL(xioctl(uffd, UFFDIO_POISON, &p), 0);
	EQUAL(try_writeprotect(uffd, unit(&m, 1), m.page, PROTECT), 0);
	EQUAL(categories(unit(&m, 0)) & (both | PAGE_IS_PRESENT), both);
	EQUAL(categories(unit(&m, 1)) & (both | PAGE_IS_PRESENT), PAGE_IS_SWAPPED);
	EQUAL(categories(unit(&m, 2)) & (PAGE_IS_SWAPPED | PAGE_IS_PRESENT), 0);
}

// Between the scan and the hold a page may be touched: scanning again after the hold tells, also of what is read later.
static void scan_again_after_the_hold(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES);
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	unmap_all(&m);
	EQUAL(load(&m, 1), word(&m, 1)); // after the scan, before the hold
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	EQUAL(load(&m, 2), word(&m, 2)); // after the hold
	for (size_t i = 0; i < m.pages; i++) {
		CHECK(is_held(&m, i));
		EQUAL(is_mapped(&m, i), i == 1 || i == 2);
	}
	EXPECT_SILENCE(uffd);
}

// ---- holes

static void holes_were_never_touched(enum kind kind)
{
	struct memory m = memory(kind, 8);
	*(volatile char *)unit(&m, 2) = 1;
	*(volatile char *)unit(&m, 5) = 1;
	EQUAL(lseek(m.fd, 0, SEEK_DATA), 2 * m.page);
	EQUAL(lseek(m.fd, (off_t)(2 * m.page), SEEK_HOLE), 3 * m.page);
	EQUAL(lseek(m.fd, (off_t)(3 * m.page), SEEK_DATA), 5 * m.page);
	EQUAL(lseek(m.fd, (off_t)(6 * m.page), SEEK_DATA), -1);
	EQUAL(errno, ENXIO);
	char byte = 1;
	EQUAL(pread(m.fd, &byte, 1, 0), 1);
	EQUAL(byte, 0);
	CHECK(!is_cached(&m, 0)); // reading the file makes no page
}

// ---- hold: write protection

static void hold_blocks_writers_only(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	check_fill(&m, m.at);
	EXPECT_SILENCE(uffd);
	touch_write(&t, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(load(&m, 1), word(&m, 1));
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0); // the release wakes
	EXPECT_DONE(&t);
	EQUAL(load(&m, 1), 99);
	CHECK(!is_held(&m, 0) || kind == HUGETLB);
}

// On what is not mapped the protection is a marker, which is no page: not PRESENT, and SWAPPED.
static void hold_marker_on_zapped(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	uint64_t bytes;
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	unmap_all(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	CHECK(is_marker(pagemap_entry(m.at)));
	EQUAL(pread(m.fd, &bytes, 8, 0), 8); // the copy out: reading the file maps nothing
	EQUAL(bytes, word(&m, 0));
	CHECK(is_marker(pagemap_entry(m.at)));
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	EQUAL(pagemap_entry(m.at) & (PM_PRESENT | PM_SWAP | PM_UFFD_WP), 0); // the release takes the marker away
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	if (!has_scan())
		SKIP("all but the scan: this kernel has no PAGEMAP_SCAN");
	EQUAL(categories(m.at) & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED), PAGE_IS_SWAPPED);
}

// The same by what it does: the first touch of a zapped page that is held is told if it writes, and the page stays held if it reads.
static void hold_zapped_blocks_writers_only(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	unmap_all(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	touch_write(&t, unit(&m, 0), 99);
	EXPECT_FAULT(uffd, unit(&m, 0), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(load(&m, 1), word(&m, 1));
	EXPECT_SILENCE(uffd);
	EQUAL(try_writeprotect(uffd, unit(&m, 0), m.page, 0), 0);
	EXPECT_DONE(&t);
	touch_write(&t, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EQUAL(try_writeprotect(uffd, unit(&m, 1), m.page, 0), 0);
	EXPECT_DONE(&t);
	EQUAL(load(&m, 0), 99);
	EQUAL(load(&m, 1), 99);
}

// Zapped while held: a read brings it back without a word and still protected.
static void hold_outlives_a_zap(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	MUST(fallocate(m.fd, 0, 0, (off_t)m.size));
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	unmap_all(&m);
	EQUAL(load(&m, 1), word(&m, 1));
	EXPECT_SILENCE(uffd);
	if (kind == SHMEM)
		CHECK(is_mapped(&m, 1) && is_held(&m, 1));
	touch_write(&t, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	EXPECT_DONE(&t);
}

// Mappings that are MISSING and WP and others that are only WP, in one call. Not before 6.4, whatever stock-kernel-facts.md says of 6.1.
static void hold_across_both_kinds(enum kind kind)
{
	struct memory m = memory(kind, 6);
	int uffd = uffd_open(FEATURES);
	fill(&m);
	uffd_register(uffd, m.at, m.size, WP);
	uffd_register(uffd, unit(&m, 2), 2 * m.page, MISSING | WP);
	if (version() < 6004) {
		EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), -ENOENT);
		EQUAL(try_writeprotect(uffd, m.at, m.size, 0), -ENOENT);
		SKIP("WRITEPROTECT takes one mapping at a time before 6.4");
	}
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	for (size_t i = 0; i < m.pages; i++)
		CHECK(is_held(&m, i));
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	for (size_t i = 0; i < m.pages; i++)
		CHECK(!is_held(&m, i));
}

// The VMM mapped something else over a page: ENOENT, and what came before it may be held. (Before 6.4 nothing is.)
static void hold_over_a_remapped_page(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES);
	fill(&m);
	uffd_register(uffd, m.at, m.size, WP);
	CHECK(mmap(unit(&m, 2), m.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	      unit(&m, 2));
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), -ENOENT);
	CHECK(!is_held(&m, 3));
	if (uffd_features() & UFFD_FEATURE_RWP && uffd_api_ioctls() >> 10 & 1)
		SKIP("rwp promises all or nothing");
	EQUAL(is_held(&m, 0), version() >= 6004);
	EQUAL(is_held(&m, 1), version() >= 6004);
}

static void hold_errors(enum kind kind)
{
	struct memory m = memory(kind, 4);
	struct vmm v = vmm(&m, FEATURES);
	uffd_register(v.uffd, m.at, 2 * m.page, WP);
	uffd_register(v.uffd, unit(&m, 2), m.page, MISSING);
	EQUAL(try_writeprotect(v.uffd, m.at, m.page, PROTECT | UFFDIO_WRITEPROTECT_MODE_DONTWAKE), -EINVAL);
	EQUAL(try_writeprotect(v.uffd, m.at + 1, m.page, PROTECT), -EINVAL);
	EQUAL(try_writeprotect(v.uffd, m.at, 0, PROTECT), -EINVAL);
	EQUAL(try_writeprotect(v.uffd, unit(&m, 2), m.page, PROTECT), -ENOENT);
	EQUAL(try_writeprotect(v.uffd, unit(&m, 3), m.page, PROTECT), -ENOENT);
	EQUAL(try_writeprotect(v.uffd, m.at - SMALL, SMALL, PROTECT), -ENOENT);
}

// Never touched: held too on shmem and hugetlbfs, passed over on anonymous memory.
static void hold_unpopulated(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.size, WP);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	touch_write(&t, m.at, 99);
	if (kind == ANON) {
		EXPECT_DONE(&t);
		EXPECT_SILENCE(uffd);
		return;
	}
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	EXPECT_DONE(&t);
}

static void hold_unpopulated_anon_by_feature(enum kind kind)
{
	struct memory m = memory(kind, 1);
	need_feature(UFFD_FEATURE_WP_UNPOPULATED, "WP_UNPOPULATED");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_WP_UNPOPULATED);
	struct touch t;
	uffd_register(uffd, m.at, m.size, WP);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	touch_write(&t, m.at, 99);
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	EXPECT_DONE(&t);
}

static void hold_marker_survives(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES);
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	EQUAL(punch(&m, 0, 1), 0);
	MUST(madvise(unit(&m, 1), m.page, MADV_DONTNEED));
	MUST(madvise(unit(&m, 2), m.page, MADV_REMOVE));
	for (size_t i = 0; i < 3; i++)
		CHECK(is_marker(pagemap_entry(unit(&m, i))));
	CHECK(!is_cached(&m, 0) && is_cached(&m, 1) && !is_cached(&m, 2));
}

static void hold_anon_zap_drops(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES);
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	CHECK(is_held(&m, 0));
	unmap_all(&m);
	EQUAL(pagemap_entry(m.at) & (PM_UFFD_WP | PM_PRESENT | PM_SWAP), 0);
	*(volatile uint64_t *)m.at = 1; // nobody stops it
	EXPECT_SILENCE(uffd);
}

static void hold_huge_in_place(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.size, WP);
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	CHECK(is_huge(&m, 0) && is_held(&m, 0));
	EQUAL(try_writeprotect(uffd, m.at + SMALL, SMALL, 0), 0);
	CHECK(!is_huge(&m, 0));
	for (size_t i = 0; i < 8; i++)
		EQUAL(!!(pagemap_entry(m.at + i * SMALL) & PM_UFFD_WP), i != 1);
	*(volatile uint64_t *)(m.at + SMALL) = fill_word(&m, SMALL);
	EXPECT_SILENCE(uffd);
	touch_write(&t, m.at, fill_word(&m, 0));
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EQUAL(try_writeprotect(uffd, m.at, m.size, 0), 0);
	EXPECT_DONE(&t);
	check_fill(&m, m.at);
}

static void hold_ends(enum kind kind, bool close_it)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch writer, missing;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	EQUAL(try_writeprotect(uffd, m.at, m.page, PROTECT), 0);
	if (kind == ANON)
		MUST(madvise(unit(&m, 1), m.page, MADV_DONTNEED));
	else
		EQUAL(punch(&m, 1, 1), 0);
	touch_write(&writer, m.at, 99);
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_WP | WRITE);
	touch(&missing, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EXPECT_BLOCKED(&writer);
	if (close_it)
		close(uffd);
	else
		EQUAL(try_unregister(uffd, m.at, m.size), 0);
	// Before c88033efe9a3 (6.9) a close leaves the protection in the page table: it stops nobody, but on hugetlbfs for ever.
	if (close_it && version() < 6009 && is_held(&m, 0)) {
		EXPECT_DONE(&missing);
		if (kind != HUGETLB)
			EXPECT_DONE(&writer);
		SKIP("all but that a close clears the protection: not before 6.9");
	}
	EXPECT_DONE(&writer);
	EXPECT_DONE(&missing);
	EQUAL(load(&m, 0), 99);
	EQUAL(touch_value(&missing), 0);
	CHECK(!is_held(&m, 0));
	CHECK(!vm_flag(m.at, "uw") && !vm_flag(m.at, "um"));
}

static void hold_ends_with_unregister(enum kind kind)
{
	hold_ends(kind, false);
}

static void hold_ends_with_close(enum kind kind)
{
	hold_ends(kind, true);
}

static void hold_async_scan(enum kind kind)
{
	struct memory m = memory(kind, 8);
	struct page_region r[8];
	need_feature(UFFD_FEATURE_WP_ASYNC, "WP_ASYNC");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_WP_ASYNC), fd = pagemap(0);
	uint64_t w = PAGE_IS_WRITTEN, flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
	fill(&m);
	EQUAL(scan(fd, m.at, m.size, w, 0, 0, w, r, 8, flags, NULL), -EPERM); // not registered yet
	uffd_register(uffd, m.at, m.size, WP);
	EQUAL(scan(fd, m.at, m.size, w, 0, 0, w, r, 8, flags, NULL), 1);
	EQUAL(r[0].end - r[0].start, m.size);
	EQUAL(scan(fd, m.at, m.size, w, 0, 0, w, r, 8, flags, NULL), 0);
	*(volatile uint64_t *)unit(&m, 5) = 1;
	EQUAL(load(&m, 2), word(&m, 2)); // a read does not count
	EQUAL(scan(fd, m.at, m.size, w, 0, 0, w, r, 8, flags, NULL), 1);
	EQUAL(r[0].start, (uintptr_t)unit(&m, 5));
	EQUAL(r[0].end, (uintptr_t)unit(&m, 6));
	EXPECT_SILENCE(uffd);
}

// ---- drop: the punch

static void drop_frees_and_unmaps_everywhere(enum kind kind)
{
	struct memory m = memory(kind, 4);
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	volatile uint64_t *ours = MUST(mmap(NULL, m.size, PROT_READ, MAP_SHARED, m.fd, 0));
	EQUAL(ours[m.page / 8], word(&m, 1));
	blkcnt_t before = blocks(&m);
	EQUAL(punch(&m, 1, 2), 0);
	EQUAL(before - blocks(&m), 2 * m.page / 512);
	for (size_t i = 0; i < m.pages; i++)
		EQUAL(vmm_maps(&v, i), i == 0 || i == 3);
	EQUAL(ours[m.page / 8], 0);
	EQUAL(ours[0], word(&m, 0));
	EQUAL(ours[3 * m.page / 8], word(&m, 3));
}

static void drop_of_part_of_a_page(enum kind kind)
{
	struct memory m = memory(kind, 2);
	fill(&m);
	*(volatile uint64_t *)(m.at + 2048) = 5;
	MUST(fallocate(m.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 2048, 2048));
	CHECK(is_cached(&m, 0));
	EQUAL(load(&m, 0), word(&m, 0));
	EQUAL(*(volatile uint64_t *)(m.at + 2048), 0);
}

static void drop_of_a_sealed_memfd(enum kind kind)
{
	static const unsigned seals[] = {0x8 /* F_SEAL_WRITE */, 0x10 /* F_SEAL_FUTURE_WRITE */};
	(void)kind;
	for (size_t i = 0; i < 2; i++) {
		int fd = MUST(memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
		MUST(ftruncate(fd, 8192));
		EQUAL(pwrite(fd, "x", 1, 0), 1);
		MUST(fcntl(fd, F_ADD_SEALS, seals[i]));
		EQUAL(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
		EQUAL(errno, EPERM);
		close(fd);
	}
}

// Who waits for a page that is punched goes on waiting, and nobody is told, until a wake: then it is MISSING.
static void drop_wakes_nobody(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	touch_write(&t, m.at, 99);
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EQUAL(punch(&m, 0, 1), 0);
	EXPECT_SILENCE(uffd);
	EXPECT_BLOCKED(&t);
	EQUAL(try_wake(uffd, m.at, m.page), 0);
	EXPECT_FAULT(uffd, m.at, WRITE);
	EXPECT_BLOCKED(&t);
	EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
	EQUAL(load(&m, 0), 99);
	EQUAL(*(volatile uint64_t *)(m.at + 8), SEVENS);
}

// Another process that maps the file and touches the hole makes a page of zeros, and the guest is not asked.
static void drop_and_a_second_mapper(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	ask(&v, do_fill, 0);
	uffd_register(v.uffd, m.at, m.size, MISSING | WP);
	EQUAL(punch(&m, 1, 1), 0);
	volatile uint64_t *ours = MUST(mmap(NULL, m.size, PROT_READ, MAP_SHARED, m.fd, 0));
	EQUAL(ours[m.page / 8], 0);
	CHECK(kind != SHMEM || is_cached(&m, 1));
	EQUAL(ask(&v, do_read, 1), 0);
	EXPECT_SILENCE(v.uffd);
}

// One page of a large folio that something else refers to: the punch says 0, and the page stays, present and zeroed.
static void drop_of_a_page_of_a_folio(enum kind kind)
{
	const size_t huge = 2 << 20;
	char directory[] = "/tmp/selftest-XXXXXX", path[64];
	(void)kind;
	need_root();
	MUST(unshare(CLONE_NEWNS));
	MUST(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL));
	if (mount("tmpfs", "/tmp", "tmpfs", 0, "huge=always,size=64m"))
		SKIP("no tmpfs of large folios: %s", strerror(errno));
	snprintf(path, sizeof(path), "%s", MUST(mkdtemp(directory)) ? directory : "");
	strcat(path, "/ram");
	int fd = MUST(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
	MUST(ftruncate(fd, (off_t)huge));
	char *hole = MUST(mmap(NULL, 2 * huge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	char *at = (char *)(((uintptr_t)hole + huge - 1) & ~(huge - 1));
	CHECK(mmap(at, huge, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == at);
	memset(at, 5, huge);
	if (smaps_kib(at, "ShmemPmdMapped") <= 0)
		SKIP("the kernel gave no large folio");
	int uffd = uffd_open(FEATURES), ends[2];
	MUST(pipe2(ends, O_CLOEXEC));
	struct iovec extra = {at + 77 * SMALL, SMALL};
	MUST(vmsplice(ends[1], &extra, 1, 0));
	uffd_register(uffd, at, huge, MISSING | WP);
	MUST(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8 * SMALL, SMALL));
	EQUAL(*(volatile char *)(at + 8 * SMALL), 0); // no message, and zeros
	EXPECT_SILENCE(uffd);
	EQUAL(*(volatile char *)(at + 9 * SMALL), 5);
	EQUAL(lseek(fd, 8 * SMALL, SEEK_DATA), 8 * SMALL); // which tells
	close(ends[0]);
	close(ends[1]); // nothing refers to it any more: now the punch splits the folio
	MUST(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8 * SMALL, SMALL));
	CHECK(lseek(fd, 8 * SMALL, SEEK_DATA) != 8 * SMALL);
	EQUAL(*(volatile char *)(at + 9 * SMALL), 5);
}

// ---- fetch: MISSING faults and their answers

// A fault in a hole blocks, is reported, and UFFDIO_COPY ends it.
static void fetch_missing(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES);
	struct touch reader, writer;
	uffd_register(uffd, m.at, m.size, MISSING);
	touch(&reader, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EXPECT_BLOCKED(&reader);
	touch_write(&writer, unit(&m, 2), 99);
	EXPECT_FAULT(uffd, unit(&m, 2), WRITE);
	EXPECT_BLOCKED(&writer);
	EQUAL(try_copy(uffd, unit(&m, 1), source(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&reader);
	EQUAL(touch_value(&reader), SEVENS);
	EXPECT_BLOCKED(&writer);
	EQUAL(try_copy(uffd, unit(&m, 2), source(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&writer);
	EQUAL(load(&m, 2), 99);
}

// The round of the engine: held, punched; MISSING comes first, and COPY without MODE_WP leaves neither marker nor protection.
static void fetch_over_a_marker(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch reader, writer;
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	MUST(fallocate(m.fd, 0, 0, (off_t)m.size));
	fill(&m);
	EQUAL(try_writeprotect(uffd, m.at, m.size, PROTECT), 0);
	EQUAL(punch(&m, 0, 2), 0);
	touch(&reader, m.at);
	EXPECT_FAULT(uffd, m.at, 0);
	touch_write(&writer, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), WRITE);
	for (size_t i = 0; i < 2; i++)
		EQUAL(try_copy(uffd, unit(&m, i), source(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&reader);
	EXPECT_DONE(&writer);
	EQUAL(touch_value(&reader), SEVENS);
	CHECK(!is_held(&m, 0) && is_mapped(&m, 0));
	*(volatile uint64_t *)m.at = 1;
	EQUAL(load(&m, 1), 99);
	EXPECT_SILENCE(uffd);
}

static void fetch_copy_eexist(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	int64_t done;
	fill(&m);
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, 0, &done), -EEXIST);
	EQUAL(done, -EEXIST);
	if (kind != ANON) { // in the page cache, and not mapped
		unmap_all(&m);
		EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, 0, &done), -EEXIST);
		EQUAL(done, -EEXIST);
	}
	check_fill(&m, m.at);
}

// A run that meets a page stops there and says how far it came.
static void fetch_copy_partly(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES);
	int64_t done;
	char *from = MUST(mmap(NULL, m.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	memset(from, 7, m.size);
	*(volatile char *)unit(&m, 2) = 1;
	uffd_register(uffd, m.at, m.size, MISSING);
	EQUAL(try_copy(uffd, m.at, from, m.size, 0, &done), -EAGAIN);
	EQUAL(done, 2 * m.page);
	EQUAL(load(&m, 1), SEVENS);
	EQUAL(load(&m, 2), 1);
	EQUAL(try_copy(uffd, unit(&m, 2), from, 2 * m.page, 0, &done), -EEXIST);
	EQUAL(try_copy(uffd, unit(&m, 3), from, m.page, 0, &done), 0);
	EQUAL(done, m.page);
}

static void fetch_copy_wp(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	uffd_register(uffd, m.at, m.page, MISSING);
	uffd_register(uffd, unit(&m, 1), m.page, MISSING | WP);
	EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, UFFDIO_COPY_MODE_WP, NULL), -EINVAL);
	EQUAL(try_copy(uffd, unit(&m, 1), source(&m, 7), m.page, UFFDIO_COPY_MODE_WP, NULL), 0);
	CHECK(is_held(&m, 1) || kind == HUGETLB);
	touch_write(&t, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EQUAL(load(&m, 1), SEVENS);
	EQUAL(try_writeprotect(uffd, unit(&m, 1), m.page, 0), 0);
	EXPECT_DONE(&t);
}

static void fetch_zeropage(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES);
	struct touch t;
	int64_t done;
	uffd_register(uffd, m.at, m.size, MISSING);
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, 0);
	if (kind == HUGETLB) {
		EQUAL(try_zeropage(uffd, m.at, m.page, 0, &done), -EINVAL);
		EXPECT_BLOCKED(&t);
		return;
	}
	EQUAL(try_zeropage(uffd, m.at, m.page, 0, &done), 0);
	EQUAL(done, m.page);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), 0);
	EQUAL(try_zeropage(uffd, m.at, m.page, 0, &done), -EEXIST);
	EQUAL(done, -EEXIST);
}

static void fetch_continue(enum kind kind)
{
	struct memory m = memory(kind, 4);
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS);
	struct touch t;
	int64_t done;
	fill(&m);
	EQUAL(punch(&m, 2, 1), 0);
	unmap_all(&m);
	uffd_register(uffd, m.at, m.size, MINOR | WP);
	touch(&t, m.at);
	EXPECT_FAULT(uffd, m.at, UFFD_PAGEFAULT_FLAG_MINOR);
	EXPECT_BLOCKED(&t);
	EQUAL(try_continue(uffd, m.at, m.page, 0, &done), 0);
	EQUAL(done, m.page);
	EXPECT_DONE(&t);
	EQUAL(touch_value(&t), word(&m, 0));
	EQUAL(try_continue(uffd, m.at, m.page, 0, &done), -EEXIST);
	EQUAL(try_continue(uffd, unit(&m, 2), m.page, 0, &done), -EFAULT);
	if (!(uffd_features() & UFFD_FEATURE_WP_UNPOPULATED)) {
		EQUAL(try_continue(uffd, unit(&m, 1), m.page, UFFDIO_CONTINUE_MODE_WP, &done), -EINVAL);
		SKIP("all but CONTINUE_MODE_WP, which this kernel has not");
	}
	EQUAL(try_continue(uffd, unit(&m, 1), m.page, UFFDIO_CONTINUE_MODE_WP, &done), 0);
	touch_write(&t, unit(&m, 1), 99);
	EXPECT_FAULT(uffd, unit(&m, 1), UFFD_PAGEFAULT_FLAG_WP | WRITE);
	EQUAL(try_writeprotect(uffd, unit(&m, 1), m.page, 0), 0);
	EXPECT_DONE(&t);
}

// What is lost for good is a memory error there and only there.
static void fetch_poison(enum kind kind)
{
	struct memory m = memory(kind, 2);
	need_feature(UFFD_FEATURE_POISON, "POISON");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_POISON);
	struct uffdio_poison p = {.range = {(uintptr_t)m.at, m.page}};
	fill(&m);
	uffd_register(uffd, m.at, m.size, MISSING | WP);
	if (kind != ANON)
		EQUAL(punch(&m, 0, 1), 0);
	else
		MUST(madvise(m.at, m.page, MADV_DONTNEED));
	EQUAL(xioctl(uffd, UFFDIO_POISON, &p), 0);
	EQUAL(p.updated, m.page);
	EQUAL(signal_of(m.at, false), SIGBUS);
	EQUAL(signal_of(unit(&m, 1), true), 0);
	EXPECT_SILENCE(uffd);
	p.range.start = (uintptr_t)unit(&m, 1);
	EQUAL(xioctl(uffd, UFFDIO_POISON, &p), -EEXIST);
	if (kind == ANON)
		MUST(madvise(m.at, m.page, MADV_DONTNEED));
	else
		EQUAL(punch(&m, 0, 1), 0);
	EQUAL(signal_of(unit(&m, 1), true), 0);
}

static void fetch_sigbus_feature(enum kind kind)
{
	struct memory m = memory(kind, 2);
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_SIGBUS);
	*(volatile char *)m.at = 1;
	uffd_register(uffd, m.at, m.size, MISSING);
	EQUAL(signal_of(m.at, true), 0);
	EQUAL(signal_of(unit(&m, 1), false), SIGBUS);
	EXPECT_SILENCE(uffd);
}

static void fetch_thread_id(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_THREAD_ID);
	struct touch t;
	struct uffd_msg message;
	uffd_register(uffd, m.at, m.size, MISSING);
	touch(&t, m.at);
	CHECK(read_message(uffd, &message, 5000));
	EQUAL(message.arg.pagefault.ptid, t.tid);
	EQUAL(try_zeropage(uffd, m.at, m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

// The number is that of the faulting thread's own pid namespace: not one to look up in ours.
static void fetch_thread_id_in_a_namespace(enum kind kind)
{
	struct memory m = memory(kind, 1);
	struct uffd_msg message;
	need_root();
	if (unshare(CLONE_NEWPID))
		SKIP("no pid namespace: %s", strerror(errno));
	struct vmm v = vmm(&m, FEATURES | UFFD_FEATURE_THREAD_ID); // process 1 there
	uffd_register(v.uffd, m.at, m.size, MISSING);
	tell(&v, do_read, 0);
	CHECK(read_message(v.uffd, &message, 5000));
	EQUAL(message.arg.pagefault.ptid, 1);
	CHECK(v.pid != 1);
	EQUAL(try_zeropage(v.uffd, m.at, m.page, 0, NULL), 0);
	EQUAL(answer_of(&v), 0);
}

static int zeros = -1;

static long read_zeros(void *at)
{
	return read(zeros, at, 8);
}

// A fault of the kernel's own on the VMM's behalf (as a vCPU's are) waits like any other; not so with UFFD_USER_MODE_ONLY.
static void fetch_kernel_fault(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct call c;
	int uffd = uffd_open(FEATURES);
	zeros = MUST(open("/dev/zero", O_RDONLY | O_CLOEXEC));
	uffd_register(uffd, m.at, m.size, MISSING);
	call(&c, read_zeros, m.at);
	EXPECT_FAULT(uffd, m.at, WRITE);
	CHECK(!call_done(&c, 150));
	EQUAL(try_copy(uffd, m.at, source(&m, 7), m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, 8);
	EQUAL(load(&m, 0), 0);
	close(uffd);

	uffd = uffd_create(O_NONBLOCK | UFFD_USER_MODE_ONLY);
	CHECK(uffd >= 0);
	EQUAL(try_api(uffd, FEATURES, NULL), 0);
	uffd_register(uffd, m.at, m.size, MISSING);
	EQUAL(read_zeros(unit(&m, 1)), -1);
	EQUAL(errno, EFAULT);
	EXPECT_SILENCE(uffd);
	struct touch t;
	touch(&t, unit(&m, 1));
	EXPECT_FAULT(uffd, unit(&m, 1), 0);
	EQUAL(try_copy(uffd, unit(&m, 1), source(&m, 7), m.page, 0, NULL), 0);
	EXPECT_DONE(&t);
}

// ---- the VMM ends

static void exit_is_told_by_errors_only(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	struct pollfd p[2] = {{.fd = v.uffd, .events = POLLIN}, {.fd = v.pidfd, .events = POLLIN}};
	uffd_register(v.uffd, m.at, m.size, MISSING | WP);
	EQUAL(poll(p, 2, 0), 0);
	vmm_ends(&v);
	EQUAL(poll(p, 1, 100), 0);
	EQUAL(poll(p + 1, 1, 1000), 1); // the pidfd tells
	EQUAL(try_writeprotect(v.uffd, m.at, m.size, PROTECT), -ESRCH);
	EQUAL(try_copy(v.uffd, m.at, source(&m, 7), m.page, 0, NULL), -ESRCH);
	EQUAL(try_unregister(v.uffd, m.at, m.size), -ENOMEM);
}

// ---- EVENT_REMOVE: two calls, one of which keeps the bytes, and one event; who calls waits until it is read

static void *dropped;

static long drop_by_advice(void *advice)
{
	return madvise(dropped, SMALL, (int)(intptr_t)advice);
}

static void event_remove(enum kind kind)
{
	struct memory m = memory(kind, 1);
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_EVENT_REMOVE);
	uffd_register(uffd, m.at, m.size, WP);
	dropped = m.at;
	for (int remove = 0; remove < 2; remove++) {
		struct call c;
		struct uffd_msg message;
		fill(&m);
		call(&c, drop_by_advice, (void *)(intptr_t)(remove ? MADV_REMOVE : MADV_DONTNEED));
		CHECK(!call_done(&c, 150));
		CHECK(read_message(uffd, &message, 5000));
		EQUAL(message.event, UFFD_EVENT_REMOVE);
		EQUAL(message.arg.remove.start, (uintptr_t)m.at);
		EQUAL(message.arg.remove.end, (uintptr_t)m.at + m.size);
		CHECK(call_done(&c, 5000));
		EQUAL(c.answer, 0);
		EQUAL(is_cached(&m, 0), !remove);
	}
}

// ---- rights

static void as_nobody(void (*body)(void *argument), void *argument)
{
	need_root();
	pid_t pid = fork_child();
	if (!pid) {
		MUST(syscall(SYS_setgroups, 0L, NULL));
		MUST(syscall(SYS_setresgid, OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID));
		MUST(syscall(SYS_setresuid, OVERFLOW_ID, OVERFLOW_ID, OVERFLOW_ID));
		body(argument);
		_exit(0);
	}
	int status = wait_child(pid);
	if (status)
		_exit(status);
}

static void create_as_nobody(void *argument)
{
	(void)argument;
	EQUAL(uffd_create(0), -EPERM);
	CHECK(uffd_create(UFFD_USER_MODE_ONLY) >= 0);
	EQUAL(open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), -1);
}

static void rights_of_the_system_call(enum kind kind)
{
	(void)kind;
	if (!text_in("/proc/sys/vm/unprivileged_userfaultfd", "0"))
		SKIP("vm.unprivileged_userfaultfd is set");
	as_nobody(create_as_nobody, NULL);
}

static void device_as_nobody(void *argument)
{
	int uffd = ioctl(*(int *)argument, USERFAULTFD_IOC_NEW, (unsigned long)(O_CLOEXEC | O_NONBLOCK));
	if (uffd < 0)
		FAIL("USERFAULTFD_IOC_NEW: %s", strerror(errno));
	EQUAL(try_api(uffd, FEATURES, NULL), 0);
	struct memory m = memory(SHMEM, 1);
	struct call c;
	zeros = MUST(open("/dev/zero", O_RDONLY | O_CLOEXEC));
	uffd_register(uffd, m.at, m.size, MISSING);
	call(&c, read_zeros, m.at); // a kernel fault
	EXPECT_FAULT(uffd, m.at, WRITE);
	EQUAL(try_zeropage(uffd, m.at, m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
}

static void rights_of_an_inherited_device(enum kind kind)
{
	int fd = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	struct stat s;
	(void)kind;
	if (fd < 0)
		SKIP("/dev/userfaultfd: %s", strerror(errno));
	MUST(fstat(fd, &s));
	if ((s.st_mode & 07777) != 0600)
		SKIP("/dev/userfaultfd is %o here, not 600", s.st_mode & 07777);
	as_nobody(device_as_nobody, &fd);
}

static void manage_as_nobody(void *argument)
{
	struct vmm *v = argument;
	struct memory *m = &v->m;
	char path[40];
	snprintf(path, sizeof(path), "/proc/%d/pagemap", v->pid);
	EQUAL(open(path, O_RDONLY | O_CLOEXEC), -1);
	EQUAL(errno, EACCES);
	uffd_register(v->uffd, m->at, m->size, MISSING | WP | MINOR);
	EQUAL(try_writeprotect(v->uffd, m->at, m->page, PROTECT), 0);
	CHECK(is_marker(entry_of(v->pagemap, m->at))); // also bit 57, which needs no right
	EQUAL(try_copy(v->uffd, unit(m, 1), source(m, 7), m->page, 0, NULL), 0);
	CHECK(entry_of(v->pagemap, unit(m, 1)) & PM_PRESENT);
	EQUAL(pwrite(m->fd, "x", 1, (off_t)(2 * m->page)), 1);
	EQUAL(try_continue(v->uffd, unit(m, 2), m->page, 0, NULL), 0);
	EQUAL(try_unregister(v->uffd, m->at, m->size), 0);
	struct page_region r;
	long n = scan(v->pagemap, m->at, m->size, PAGE_IS_PRESENT, 0, 0, PAGE_IS_PRESENT, &r, 1, 0, NULL);
	if (n == -ENOTTY)
		SKIP("all but the scan: this kernel has no PAGEMAP_SCAN");
	EQUAL(n, 1);
	EQUAL(r.end - r.start, 2 * m->page);
}

// A manager without any right, to which the VMM passes its userfaultfd, its memfd and its pagemap.
static void rights_of_passed_descriptors(enum kind kind)
{
	struct memory m = memory(kind, 4);
	need_root();
	struct vmm v = vmm(&m, FEATURES | UFFD_FEATURE_MINOR_SHMEM);
	as_nobody(manage_as_nobody, &v);
}

// ---- reading another process's page

static struct vmm *read_of;

static long read_remotely(void *page)
{
	uint64_t got = 0;
	long n = process_read(read_of->pid, unit(&read_of->m, (size_t)(intptr_t)page), &got, 8);
	return n == 8 ? (long)got : n;
}

static void read_of_a_missing_page(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	struct call c;
	uint64_t got;
	read_of = &v;
	uffd_register(v.uffd, m.at, m.size, MISSING);
	EQUAL(proc_mem_read(v.pid, m.at, &got, 8), -EIO);
	EXPECT_SILENCE(v.uffd);
	call(&c, read_remotely, NULL);
	EXPECT_FAULT(v.uffd, m.at, 0);
	CHECK(!call_done(&c, 150));
	EQUAL(try_copy(v.uffd, m.at, source(&m, 7), m.page, 0, NULL), 0);
	CHECK(call_done(&c, 5000));
	EQUAL(c.answer, SEVENS);
}

static void read_of_a_held_page(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	uint64_t got;
	ask(&v, do_fill, 0);
	uffd_register(v.uffd, m.at, m.size, WP);
	EQUAL(try_writeprotect(v.uffd, m.at, m.size, PROTECT), 0);
	CHECK(entry_of(v.pagemap, unit(&m, 1)) & PM_UFFD_WP);
	EQUAL(process_read(v.pid, unit(&m, 1), &got, 8), 8);
	EQUAL(got, word(&m, 1));
	EQUAL(proc_mem_read(v.pid, unit(&m, 1), &got, 8), 8);
	EQUAL(got, word(&m, 1));
	EXPECT_SILENCE(v.uffd);
}

static long do_forbid(long unused)
{
	return unused + MUST(mprotect(in_vmm.at, in_vmm.size, PROT_NONE));
}

static void read_of_a_forbidden_page(enum kind kind)
{
	struct memory m = memory(kind, 2);
	struct vmm v = vmm(&m, FEATURES);
	uint64_t got;
	ask(&v, do_fill, 0);
	EQUAL(ask(&v, do_forbid, 0), 0);
	EQUAL(process_read(v.pid, unit(&m, 1), &got, 8), -EFAULT);
	long n = proc_mem_read(v.pid, unit(&m, 1), &got, 8);
	if (n == -EIO)
		SKIP("/proc/PID/mem does not override protections here (a kernel option since 6.12)");
	EQUAL(n, 8);
	EQUAL(got, word(&m, 1));
}

// ---- MOVE: anonymous memory

static long do_move_out(long page) // to a staging range of the VMM's; its address
{
	char *staging = MUST(mmap(NULL, in_vmm.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	int64_t done;
	uffd_register(uffd_in_vmm, staging, in_vmm.page, MISSING);
	EQUAL(try_move(uffd_in_vmm, staging, unit(&in_vmm, (size_t)page), in_vmm.page, 0, &done), 0);
	EQUAL(done, in_vmm.page);
	return (long)staging;
}

static long staged;

static long do_move_back(long page)
{
	return try_move(uffd_in_vmm, unit(&in_vmm, (size_t)page), (void *)staged, in_vmm.page, 0, NULL);
}

static long do_set_staged(long at)
{
	return staged = at;
}

static void move_out_and_back(enum kind kind)
{
	struct memory m = memory(kind, 4);
	need_feature(UFFD_FEATURE_MOVE, "MOVE");
	struct vmm v = vmm(&m, FEATURES | UFFD_FEATURE_MOVE);
	ask(&v, do_fill, 0);
	uffd_register(v.uffd, m.at, m.size, MISSING);
	long at = ask(&v, do_move_out, 1);
	CHECK(!vmm_maps(&v, 1) && vmm_maps(&v, 0));
	char *bytes = source(&m, 0); // from outside: read where it is staged, answer the next touch with it
	EQUAL(process_read(v.pid, (void *)at, bytes, m.page), m.page);
	EQUAL(*(uint64_t *)bytes, word(&m, 1));
	tell(&v, do_read, 1);
	EXPECT_FAULT(v.uffd, unit(&m, 1), 0);
	CHECK(!answered(&v, 100));
	EQUAL(try_copy(v.uffd, unit(&m, 1), bytes, m.page, 0, NULL), 0);
	EQUAL(answer_of(&v), word(&m, 1));
	at = ask(&v, do_move_out, 2); // inside: moved back
	CHECK(!vmm_maps(&v, 2));
	ask(&v, do_set_staged, at);
	EQUAL(ask(&v, do_move_back, 2), 0);
	CHECK(vmm_maps(&v, 2));
	ask(&v, do_check, 0);
}

static void move_from_outside(enum kind kind)
{
	struct memory m = memory(kind, 4);
	need_feature(UFFD_FEATURE_MOVE, "MOVE");
	struct vmm v = vmm(&m, FEATURES | UFFD_FEATURE_MOVE);
	ask(&v, do_read, 0);
	EQUAL(ask(&v, do_write, 0), 0);
	uffd_register(v.uffd, unit(&m, 1), 3 * m.page, MISSING);
	EQUAL(try_move(v.uffd, unit(&m, 1), m.at, m.page, 0, NULL), -EINVAL);
	CHECK(vmm_maps(&v, 0));
}

static void move_errors(enum kind kind)
{
	struct memory m = memory(kind, 6);
	need_feature(UFFD_FEATURE_MOVE, "MOVE");
	int uffd = uffd_open(FEATURES | UFFD_FEATURE_MOVE);
	int64_t done;
	uffd_register(uffd, unit(&m, 2), 4 * m.page, MISSING);
	*(volatile char *)unit(&m, 0) = 1;
	if (kind == SHMEM) {
		EQUAL(try_move(uffd, unit(&m, 2), unit(&m, 0), m.page, 0, NULL), -EINVAL);
		return;
	}
	EQUAL(try_zeropage(uffd, unit(&m, 2), m.page, 0, NULL), 0);
	EQUAL(try_move(uffd, unit(&m, 2), unit(&m, 0), m.page, 0, NULL), -EEXIST);
	EQUAL(try_move(uffd, unit(&m, 3), unit(&m, 1), m.page, 0, NULL), -ENOENT);
	EQUAL(try_move(uffd, unit(&m, 3), unit(&m, 0), 2 * m.page, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES, &done), 0);
	EQUAL(done, 2 * m.page);
	CHECK(!is_mapped(&m, 0) && is_mapped(&m, 3) && !is_mapped(&m, 4));
	pid_t child = fork_child(); // now the page is shared
	if (!child) {
		sleep_ms(60000);
		_exit(0);
	}
	*(volatile char *)unit(&m, 0) = 1;
	uffd_register(uffd, m.at, m.page, MISSING);
	EQUAL(try_unregister(uffd, unit(&m, 3), m.page), 0);
	EQUAL(try_move(uffd, unit(&m, 5), unit(&m, 3), m.page, 0, NULL), -EBUSY);
}

// ---- a memory cgroup at its limit

struct group {
	char path[128];
	const char *limit;
};

// The kernel charges the VMM for what is fetched: at its limit COPY says ENOMEM, and its OOM killer has taken the VMM.
static void copy_at_the_limit(void *argument)
{
	struct group *g = argument;
	char path[192], text[32];
	struct memory m = memory(SHMEM, 4096); // 16 MiB, twice the limit
	struct vmm v = vmm(&m, FEATURES);
	uffd_register(v.uffd, m.at, m.size, MISSING);
	for (int i = 0; i < 2; i++) {
		snprintf(path, sizeof(path), "%s/%s", g->path, i ? "cgroup.procs" : g->limit);
		snprintf(text, sizeof(text), "%d", i ? v.pid : 8 << 20);
		int fd = MUST(open(path, O_WRONLY | O_CLOEXEC));
		EQUAL(write(fd, text, strlen(text)), strlen(text));
		close(fd);
	}
	void *from = source(&m, 7);
	int e = 0;
	size_t i = 0;
	while (i < m.pages && !(e = try_copy(v.uffd, unit(&m, i), from, m.page, 0, NULL)))
		i++;
	if (!e)
		FAIL("16 MiB fit into 8");
	CHECK(e == -ENOMEM || e == -ESRCH);
	EQUAL(wait_child(v.pid), 128 + SIGKILL);
}

static void group_gone(void *argument)
{
	for (int i = 0; i < 1000 && rmdir(((struct group *)argument)->path) && errno == EBUSY; i++)
		sleep_ms(5);
}

static void memory_cgroup_at_its_limit(enum kind kind)
{
	static struct group g;
	char directory[] = "/tmp/selftest-XXXXXX", path[64];
	(void)kind;
	need_root();
	need_no_swap();
	if (!access("/sys/fs/cgroup/memory/memory.limit_in_bytes", F_OK)) {
		snprintf(g.path, sizeof(g.path), "/sys/fs/cgroup/memory/selftest-%d", getpid());
		g.limit = "memory.limit_in_bytes";
	} else {
		MUST(unshare(CLONE_NEWNS));
		MUST(mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL));
		MUST(mount("none", "/tmp", "tmpfs", 0, NULL));
		CHECK(mkdtemp(directory));
		if (mount("none", directory, "cgroup2", 0, NULL))
			SKIP("no cgroups: %s", strerror(errno));
		snprintf(path, sizeof(path), "%s/cgroup.subtree_control", directory);
		if (!text_in(path, "memory") && !set_system(path, "+memory"))
			SKIP("no memory cgroups, or none without --system");
		snprintf(g.path, sizeof(g.path), "%s/selftest-%d", directory, getpid());
		g.limit = "memory.max";
	}
	MUST(mkdir(g.path, 0755));
	guarded(copy_at_the_limit, &g, group_gone);
}

// ---- a tracer under seccomp

static void suspend_seccomp_under_seccomp(enum kind kind)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {.len = 1, .filter = &allow};
	(void)kind;
	need_root();
	pid_t child = fork_child();
	if (!child) {
		sleep_ms(60000);
		_exit(0);
	}
	if (ptrace(PTRACE_SEIZE, child, NULL, (void *)PTRACE_O_SUSPEND_SECCOMP))
		SKIP("PTRACE_O_SUSPEND_SECCOMP: %s", strerror(errno)); // CONFIG_CHECKPOINT_RESTORE
	MUST(ptrace(PTRACE_INTERRUPT, child, NULL, NULL));
	EQUAL(waitpid(child, NULL, __WALL), child);
	MUST(ptrace(PTRACE_DETACH, child, NULL, NULL));
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
	EQUAL(ptrace(PTRACE_SEIZE, child, NULL, (void *)PTRACE_O_SUSPEND_SECCOMP), -1);
	EQUAL(errno, EPERM);
	MUST(ptrace(PTRACE_SEIZE, child, NULL, NULL)); // without it, it goes
}

const struct test stock_tests[] = {
	{"stock.numbers.requests", request_numbers, 0, 0},
	{"stock.numbers.features_by_version", features_by_version, 0, 0},
	{"stock.numbers.api_ioctls", api_ioctls, 0, 0},
	{"stock.numbers.register_ioctls", register_ioctls, ANY_SMALL | HUGETLB, 0},
	{"stock.numbers.native_ones_refused", native_numbers_refused, ANY_SMALL, 0},

	{"stock.attach.from_outside", attach_from_outside, ANY_SMALL | HUGETLB, 0},
	{"stock.attach.memfd_from_outside", attach_memfd_from_outside, SHMEM | HUGETLB, 0},
	{"stock.attach.outlives_the_manager", attach_outlives_the_manager, SHMEM | HUGETLB, 0},
	{"stock.attach.last_descriptor_closed_reads_zeros", attach_last_descriptor_closed, SHMEM | HUGETLB, 0},
	{"stock.attach.message_is_told_once", attach_message_is_told_once, ANY_SMALL, 0},
	{"stock.attach.missing_by_chunk", attach_missing_by_chunk, ANY_SMALL | HUGETLB, 0},
	{"stock.attach.register_replaces_modes", attach_register_replaces_modes, ANY_SMALL, 0},

	{"stock.zap.pageout_from_outside", zap_pageout_from_outside, SHMEM, 0},
	{"stock.zap.pageout_passes_over_second_mapper", zap_pageout_second_mapper, SHMEM, 0},
	{"stock.zap.pageout_refuses_mlocked", zap_pageout_mlocked, SHMEM, 0},
	{"stock.zap.pageout_leaves_anon_without_swap", zap_pageout_anon_without_swap, ANON, 0},
	{"stock.zap.pageout_writes_to_swap", zap_pageout_with_swap, 0, 30},
	{"stock.zap.dontneed_inside", zap_dontneed_inside, SHMEM | HUGETLB, 0},
	{"stock.zap.advice_from_outside", zap_advice_from_outside, ANY_SMALL, 0},
	{"stock.zap.any_advice_to_oneself", zap_advice_to_oneself, SHMEM, 0},
	{"stock.zap.unmaps_pinned", zap_unmaps_pinned, SHMEM, 0},

	{"stock.scan.fault_around", scan_fault_around, SHMEM, 0},
	{"stock.scan.page_exact_under_wp", scan_page_exact_under_wp, SHMEM, 0},
	{"stock.scan.cold", scan_cold, SHMEM, 0},
	{"stock.scan.inverted_matches_foreign", scan_inverted_matches_foreign, ANY_SMALL, 0},
	{"stock.scan.goes_on_at_walk_end", scan_goes_on_at_walk_end, ANY_SMALL, 0},
	{"stock.scan.errors", scan_errors, SHMEM, 0},
	{"stock.scan.of_the_dead", scan_of_the_dead, SHMEM, 0},
	{"stock.scan.guard_page", scan_guard_page, ANON, 0},
	{"stock.scan.again_after_the_hold", scan_again_after_the_hold, SHMEM, 0},
	{"stock.scan.written_of_anon", scan_written_of_anon, ANON, 0},
	{"stock.scan.poison_is_written", scan_poison_is_written, HUGETLB, 0},

	{"stock.holes.were_never_touched", holes_were_never_touched, SHMEM, 0},

	{"stock.hold.blocks_writers_only", hold_blocks_writers_only, ANY_SMALL | HUGETLB, 0},
	{"stock.hold.marker_on_zapped", hold_marker_on_zapped, SHMEM, 0},
	{"stock.hold.zapped_blocks_writers_only", hold_zapped_blocks_writers_only, SHMEM | HUGETLB, 0},
	{"stock.hold.outlives_a_zap", hold_outlives_a_zap, SHMEM | HUGETLB, 0},
	{"stock.hold.across_both_kinds", hold_across_both_kinds, ANY_SMALL, 0},
	{"stock.hold.over_a_remapped_page", hold_over_a_remapped_page, ANY_SMALL, 0},
	{"stock.hold.errors", hold_errors, ANY_SMALL | HUGETLB, 0},
	{"stock.hold.unpopulated", hold_unpopulated, ANY_SMALL | HUGETLB, 0},
	{"stock.hold.unpopulated_anon_by_feature", hold_unpopulated_anon_by_feature, ANON, 0},
	{"stock.hold.marker_survives_punch_dontneed_remove", hold_marker_survives, SHMEM, 0},
	{"stock.hold.anon_zap_drops_it", hold_anon_zap_drops, ANON, 0},
	{"stock.hold.huge_in_place", hold_huge_in_place, ANON_THP, 0},
	{"stock.hold.ends_with_unregister", hold_ends_with_unregister, ANY_SMALL | HUGETLB, 0},
	{"stock.hold.ends_with_close", hold_ends_with_close, ANY_SMALL | HUGETLB, 0},
	{"stock.hold.async_scan", hold_async_scan, ANY_SMALL, 0},

	{"stock.drop.frees_and_unmaps_everywhere", drop_frees_and_unmaps_everywhere, SHMEM | HUGETLB, 0},
	{"stock.drop.of_part_of_a_page", drop_of_part_of_a_page, SHMEM, 0},
	{"stock.drop.of_a_sealed_memfd", drop_of_a_sealed_memfd, 0, 0},
	{"stock.drop.wakes_nobody", drop_wakes_nobody, SHMEM | HUGETLB, 0},
	{"stock.drop.and_a_second_mapper", drop_and_a_second_mapper, SHMEM | HUGETLB, 0},
	{"stock.drop.of_a_page_of_a_referenced_folio", drop_of_a_page_of_a_folio, 0, 0},

	{"stock.fetch.missing", fetch_missing, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.over_a_marker", fetch_over_a_marker, SHMEM | HUGETLB, 0},
	{"stock.fetch.copy_eexist", fetch_copy_eexist, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.copy_partly", fetch_copy_partly, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.copy_wp", fetch_copy_wp, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.zeropage", fetch_zeropage, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.continue", fetch_continue, SHMEM | HUGETLB, 0},
	{"stock.fetch.poison", fetch_poison, ANY_SMALL | HUGETLB, 0},
	{"stock.fetch.sigbus_feature", fetch_sigbus_feature, ANY_SMALL, 0},
	{"stock.fetch.thread_id", fetch_thread_id, ANY_SMALL, 0},
	{"stock.fetch.thread_id_in_a_namespace", fetch_thread_id_in_a_namespace, SHMEM, 0},
	{"stock.fetch.kernel_fault", fetch_kernel_fault, ANY_SMALL | HUGETLB, 0},

	{"stock.exit.is_told_by_errors_only", exit_is_told_by_errors_only, ANY_SMALL, 0},
	{"stock.event.remove_tells_two_calls_apart_not", event_remove, SHMEM, 0},

	{"stock.rights.of_the_system_call", rights_of_the_system_call, 0, 0},
	{"stock.rights.of_an_inherited_device", rights_of_an_inherited_device, 0, 0},
	{"stock.rights.of_passed_descriptors", rights_of_passed_descriptors, SHMEM, 0},

	{"stock.read.of_a_missing_page", read_of_a_missing_page, ANY_SMALL, 0},
	{"stock.read.of_a_held_page", read_of_a_held_page, ANY_SMALL, 0},
	{"stock.read.of_a_forbidden_page", read_of_a_forbidden_page, ANY_SMALL, 0},

	{"stock.move.out_and_back", move_out_and_back, ANON, 0},
	{"stock.move.from_outside_is_refused", move_from_outside, ANON, 0},
	{"stock.move.errors", move_errors, ANY_SMALL, 0},

	{"stock.cgroup.copy_at_the_limit_kills_the_vmm", memory_cgroup_at_its_limit, 0, 30},
	{"stock.tracer.cannot_suspend_seccomp_under_seccomp", suspend_seccomp_under_seccomp, 0, 0},
	{0},
};
