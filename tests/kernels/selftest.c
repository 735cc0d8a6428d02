// SPDX-License-Identifier: Apache-2.0
// What the kernel under us promises, one small test per promise: selftest [--list] [--system] [GROUP|TEST...].
// Groups are stock, rwp and rfc; a TEST is a name as printed, or the part before its slash or a dot. Every test runs in a
// child with an alarm. Prints `ok NAME`, `not ok NAME: file:line: what` or `skip NAME: why`; the exit status is 1 if any
// failed. Needs root for most of it. --system: this is a throw-away machine, whose sysctls, huge pages and swap may change.
#include "selftest.h"
#include <dirent.h>
#include <limits.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <time.h>
#include <sys/prctl.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4U
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define HUGE  ((size_t)2 << 20)
#define SMALL ((size_t)4096)

bool may_change_system;
static int verdict_pipe = -1;

// ---- verdicts

_Noreturn void test_end(int verdict, const char *file, int line, const char *format, ...)
{
	char text[400];
	int n = verdict == 1 ? snprintf(text, 200, "%s:%d: ", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line)
			     : 0;
	va_list list;
	va_start(list, format);
	vsnprintf(text + n, sizeof(text) - (size_t)n, format, list);
	va_end(list);
	if (write(verdict_pipe, text, strlen(text) + 1) < 0)
		perror("selftest");
	_exit(verdict);
}

bool set_system(const char *path, const char *value)
{
	if (!may_change_system)
		return false;
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t n = write(fd, value, strlen(value));
	close(fd);
	return n == (ssize_t)strlen(value);
}

static bool file_contains(const char *path, const char *what)
{
	char text[4096];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[n < 0 ? 0 : n] = 0;
	return strstr(text, what);
}

int zram_disk(char id[16])
{
	char path[64];

	if (!may_change_system)
		SKIP("a block device: needs --system");
	memset(id, 0, 16);
	int control = open("/sys/class/zram-control/hot_add", O_RDONLY | O_CLOEXEC);
	if (control < 0 || read(control, id, 15) <= 0)
		SKIP("no zram");
	close(control);
	snprintf(path, sizeof(path), "/sys/block/zram%d/disksize", atoi(id));
	CHECK(set_system(path, "16M"));
	snprintf(path, sizeof(path), "/dev/zram%d", atoi(id));
	return (int)MUST(open(path, O_RDWR | O_DIRECT | O_CLOEXEC));
}

void zram_disk_gone(int fd, const char *id)
{
	close(fd);
	set_system("/sys/class/zram-control/hot_remove", id);
}

long vmstat(const char *name)
{
	char line[128], key[96];
	long value, found = -1;
	FILE *f = fopen("/proc/vmstat", "re");

	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "%95s %ld", key, &value) == 2 && !strcmp(key, name))
			found = value;
	if (f)
		fclose(f);
	return found;
}

void need_swap(void)
{
	if (file_contains("/proc/swaps", "zram"))
		return;
	if (!may_change_system)
		SKIP("swap: needs --system");
	if (!set_system("/sys/block/zram0/disksize", "256M"))
		SKIP("no zram");
	// The header mkswap would write: version 1, the last page, the magic at the end of the first page.
	char page[4096] = {0};
	uint32_t head[2] = {1, (256 << 20) / 4096 - 1};
	memcpy(page + 1024, head, sizeof(head));
	memcpy(page + 4096 - 10, "SWAPSPACE2", 10);
	int fd = MUST(open("/dev/zram0", O_RDWR | O_CLOEXEC));
	EQUAL(pwrite(fd, page, sizeof(page), 0), sizeof(page));
	fsync(fd);
	close(fd);
	MUST(swapon("/dev/zram0", 0));
}

void need_root(void)
{
	if (geteuid())
		SKIP("needs root");
}

int numa_nodes(void)
{
	int n = 0;
	char path[64];
	do
		snprintf(path, sizeof(path), "/sys/devices/system/node/node%d", n);
	while (!access(path, F_OK) && ++n);
	return n ? n : 1;
}

// ---- memory

struct memory memory(enum kind kind, size_t pages)
{
	bool huge = kind & (ANON_THP | SHMEM_THP | HUGETLB | HUGETLB_PRIVATE);
	struct memory m = {.kind = kind, .page = huge ? HUGE : SMALL, .pages = pages, .fd = -1};
	m.size = m.page * pages;
	if (kind & (HUGETLB | HUGETLB_PRIVATE)) {
		long free = 0;
		FILE *f = fopen("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "re");
		if (!f || fscanf(f, "%ld", &free) != 1)
			SKIP("no hugetlbfs");
		fclose(f);
		if (free < (long)pages + 8 && !set_system("/proc/sys/vm/nr_hugepages", "64"))
			SKIP("no free 2 MiB hugetlbfs pages");
	}
	if (kind == SHMEM_THP && !file_contains("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "[advise]") &&
	    !file_contains("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "[always]") &&
	    !set_system("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "advise"))
		SKIP("no huge pages for memfds");
	if (kind == ANON_THP && (access("/sys/kernel/mm/transparent_hugepage/enabled", F_OK) ||
				 file_contains("/sys/kernel/mm/transparent_hugepage/enabled", "[never]")))
		SKIP("no transparent huge pages");
	if (!(kind & (ANON | ANON_THP))) {
		m.fd = memfd_create("selftest", MFD_CLOEXEC | (kind & (HUGETLB | HUGETLB_PRIVATE) ? MFD_HUGETLB : 0));
		if (m.fd < 0)
			SKIP("memfd_create: %s", strerror(errno));
		MUST(ftruncate(m.fd, (off_t)m.size));
	}
	// Aligned to 2 MiB, and a gap on both sides: no neighbour merges with it.
	char *hole = MUST(mmap(NULL, m.size + 3 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
	m.at = (char *)(((uintptr_t)hole + 2 * HUGE - 1) & ~(HUGE - 1));
	int flags = MAP_FIXED | (kind & (SHMEM | SHMEM_THP | HUGETLB) ? MAP_SHARED : MAP_PRIVATE) |
		    (m.fd < 0 ? MAP_ANONYMOUS : 0);
	if (mmap(m.at, m.size, PROT_READ | PROT_WRITE, flags, m.fd, 0) != m.at)
		SKIP("mmap: %s", strerror(errno));
	if (kind & (ANON | ANON_THP | SHMEM | SHMEM_THP | SHMEM_PRIVATE))
		madvise(m.at, m.size, kind & (ANON_THP | SHMEM_THP) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	return m;
}

uint64_t fill_word(const struct memory *m, size_t offset)
{
	return (offset / SMALL + 1) * 0x9E3779B97F4A7C15ULL ^ m->size;
}

void fill(const struct memory *m)
{
	for (size_t o = 0; o < m->size; o += SMALL)
		*(volatile uint64_t *)(m->at + o) = fill_word(m, o);
	if (m->kind & (ANON_THP | SHMEM_THP) && !is_huge(m, 0))
		SKIP("the kernel gave no huge page");
}

void check_fill(const struct memory *m, const char *at)
{
	for (size_t o = 0; o < m->size; o += SMALL)
		if (*(volatile const uint64_t *)(at + o) != fill_word(m, o))
			FAIL("wrong bytes at 0x%zx", o);
}

char *unit(const struct memory *m, size_t page)
{
	return m->at + page * m->page;
}

bool is_huge(const struct memory *m, size_t page)
{
	return categories(unit(m, page)) & PAGE_IS_HUGE;
}

// A new page waits in a batch of the CPU that made it, and PAGEOUT passes over it unless called there.
void page_out(const struct memory *m)
{
	cpu_set_t before, one;

	MUST(sched_getaffinity(0, sizeof(before), &before));
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
		if (!CPU_ISSET(cpu, &before))
			continue;
		CPU_ZERO(&one);
		CPU_SET(cpu, &one);
		MUST(sched_setaffinity(0, sizeof(one), &one));
		MUST(madvise(m->at, m->size, MADV_PAGEOUT));
	}
	MUST(sched_setaffinity(0, sizeof(before), &before));
}

// ---- userfaultfd

int xioctl(int fd, unsigned long request, void *argument)
{
	return ioctl(fd, request, argument) < 0 ? -errno : 0;
}

int uffd_create(int flags)
{
	long fd = syscall(SYS_userfaultfd, flags | O_CLOEXEC);
	return fd < 0 ? -errno : (int)fd;
}

int try_api(int uffd, uint64_t features, struct uffdio_api *answer)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	int e = xioctl(uffd, UFFDIO_API, &api);
	if (answer)
		*answer = api;
	return e;
}

int uffd_open(uint64_t features)
{
	int fd = uffd_create(O_NONBLOCK);
	if (fd < 0)
		SKIP("userfaultfd: %s", strerror(-fd));
	int e = try_api(fd, features, NULL);
	if (e)
		FAIL("UFFDIO_API with 0x%llx: %s", (unsigned long long)features, strerror(-e));
	return fd;
}

static struct uffdio_api offered(void)
{
	struct uffdio_api api;
	int fd = uffd_create(0);
	if (fd < 0)
		SKIP("userfaultfd: %s", strerror(-fd));
	EQUAL(try_api(fd, 0, &api), 0);
	close(fd);
	return api;
}

uint64_t uffd_features(void)
{
	return offered().features;
}

uint64_t uffd_api_ioctls(void)
{
	return offered().ioctls;
}

int try_register(int uffd, const void *at, size_t size, uint64_t mode, uint64_t *ioctls)
{
	struct uffdio_register r = {.range = {(uintptr_t)at, size}, .mode = mode};
	int e = xioctl(uffd, UFFDIO_REGISTER, &r);
	if (ioctls)
		*ioctls = r.ioctls;
	return e;
}

uint64_t uffd_register(int uffd, const void *at, size_t size, uint64_t mode)
{
	uint64_t ioctls;
	int e = try_register(uffd, at, size, mode, &ioctls);
	if (e)
		FAIL("UFFDIO_REGISTER with mode %llu: %s", (unsigned long long)mode, strerror(-e));
	return ioctls;
}

static int range_ioctl(int uffd, unsigned long request, const void *at, size_t size)
{
	struct uffdio_range r = {(uintptr_t)at, size};
	return xioctl(uffd, request, &r);
}

int try_unregister(int uffd, const void *at, size_t size)
{
	return range_ioctl(uffd, UFFDIO_UNREGISTER, at, size);
}

int try_wake(int uffd, const void *at, size_t size)
{
	return range_ioctl(uffd, UFFDIO_WAKE, at, size);
}

int try_deactivate(int uffd, const void *at, size_t size)
{
	return range_ioctl(uffd, UFFDIO_DEACTIVATE, at, size);
}

int try_copy(int uffd, void *to, const void *from, size_t size, uint64_t mode, int64_t *done)
{
	struct uffdio_copy c = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = size, .mode = mode};
	int e = xioctl(uffd, UFFDIO_COPY, &c);
	if (done)
		*done = c.copy;
	return e;
}

int try_zeropage(int uffd, void *at, size_t size, uint64_t mode, int64_t *done)
{
	struct uffdio_zeropage z = {.range = {(uintptr_t)at, size}, .mode = mode};
	int e = xioctl(uffd, UFFDIO_ZEROPAGE, &z);
	if (done)
		*done = z.zeropage;
	return e;
}

int try_continue(int uffd, void *at, size_t size, uint64_t mode, int64_t *done)
{
	struct uffdio_continue c = {.range = {(uintptr_t)at, size}, .mode = mode};
	int e = xioctl(uffd, UFFDIO_CONTINUE, &c);
	if (done)
		*done = c.mapped;
	return e;
}

int try_writeprotect(int uffd, const void *at, size_t size, uint64_t mode)
{
	struct uffdio_writeprotect w = {.range = {(uintptr_t)at, size}, .mode = mode};
	return xioctl(uffd, UFFDIO_WRITEPROTECT, &w);
}

int try_move(int uffd, void *to, void *from, size_t size, uint64_t mode, int64_t *done)
{
	struct uffdio_move m = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = size, .mode = mode};
	int e = xioctl(uffd, UFFDIO_MOVE, &m);
	if (done)
		*done = m.move;
	return e;
}

int try_set_mode(int uffd, uint64_t enable, uint64_t disable)
{
	struct uffdio_set_mode s = {enable, disable};
	return xioctl(uffd, UFFDIO_SET_MODE, &s);
}

int try_rwprotect(int uffd, const void *at, size_t size, uint64_t mode)
{
	struct uffdio_rwprotect r = {.range = {(uintptr_t)at, size}, .mode = mode};
	return xioctl(uffd, UFFDIO_RWPROTECT, &r);
}

bool read_message(int uffd, struct uffd_msg *message, int ms)
{
	struct pollfd p = {.fd = uffd, .events = POLLIN};
	uint64_t until = now_ns() + (uint64_t)ms * 1000000;
	for (;;) {
		int64_t left = (int64_t)(until - now_ns()) / 1000000;
		if (poll(&p, 1, left < 0 ? 0 : (int)left) <= 0)
			return false;
		ssize_t n = read(uffd, message, sizeof(*message));
		if (n == sizeof(*message))
			return true;
		if (n >= 0 || errno != EAGAIN)
			FAIL("reading the userfaultfd: %s", n < 0 ? strerror(errno) : "short");
	}
}

void expect_fault(int uffd, const void *at, uint64_t flags, const char *file, int line)
{
	struct uffd_msg m;
	if (!read_message(uffd, &m, 5000))
		test_end(1, file, line, "no message");
	if (m.event != UFFD_EVENT_PAGEFAULT || m.arg.pagefault.flags != flags ||
	    (m.arg.pagefault.address ^ (uintptr_t)at) & ~(SMALL - 1))
		test_end(1, file, line, "event 0x%x, flags 0x%llx at %llx, not flags 0x%llx at %p", m.event,
			 (unsigned long long)m.arg.pagefault.flags, (unsigned long long)m.arg.pagefault.address,
			 (unsigned long long)flags, at);
}

// ---- accesses that may block

static void *touch_thread(void *argument)
{
	struct touch *t = argument;
	volatile uint64_t *at = t->at;
	t->tid = (pid_t)syscall(SYS_gettid);
	if (t->write)
		*at = t->value;
	else
		t->value = *at;
	atomic_store(&t->done, 1);
	return NULL;
}

static void touch_start(struct touch *t)
{
	atomic_store(&t->done, 0);
	if (pthread_create(&t->thread, NULL, touch_thread, t))
		FAIL("pthread_create");
}

void touch(struct touch *t, void *at)
{
	*t = (struct touch){.at = at};
	touch_start(t);
}

void touch_write(struct touch *t, void *at, uint64_t value)
{
	*t = (struct touch){.at = at, .write = true, .value = value};
	touch_start(t);
}

static bool flag_within(atomic_int *flag, int ms)
{
	for (uint64_t until = now_ns() + (uint64_t)ms * 1000000; !atomic_load(flag);) {
		if (now_ns() > until)
			return false;
		sleep_ms(1);
	}
	return true;
}

bool touch_done(struct touch *t, int ms)
{
	return flag_within(&t->done, ms);
}

uint64_t touch_value(struct touch *t)
{
	pthread_join(t->thread, NULL);
	return t->value;
}

static void *call_thread(void *argument)
{
	struct call *c = argument;
	errno = 0;
	c->answer = c->function(c->argument);
	c->error = errno;
	atomic_store(&c->done, 1);
	return NULL;
}

void call(struct call *c, long (*function)(void *), void *argument)
{
	*c = (struct call){.function = function, .argument = argument};
	if (pthread_create(&c->thread, NULL, call_thread, c))
		FAIL("pthread_create");
}

bool call_done(struct call *c, int ms)
{
	return flag_within(&c->done, ms);
}

static sigjmp_buf jump;

static void on_signal(int number)
{
	siglongjmp(jump, number);
}

int signal_of(volatile void *at, bool write)
{
	struct sigaction act = {.sa_handler = on_signal}, segv, bus;
	sigaction(SIGSEGV, &act, &segv);
	sigaction(SIGBUS, &act, &bus);
	int number = sigsetjmp(jump, 1);
	if (!number) {
		uint64_t v = *(volatile uint64_t *)at;
		if (write)
			*(volatile uint64_t *)at = v;
	}
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return number;
}

// ---- looking

int pagemap(pid_t pid)
{
	char path[40];
	if (pid)
		snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	else
		strcpy(path, "/proc/self/pagemap");
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		FAIL("%s: %s", path, strerror(errno));
	return fd;
}

long scan(int fd, const void *at, size_t size, uint64_t mask, uint64_t inverted, uint64_t anyof, uint64_t returned,
	  struct page_region *to, size_t regions, uint64_t flags, uint64_t *walk_end)
{
	struct pm_scan_arg a = {
		.size = sizeof(a),
		.flags = flags,
		.start = (uintptr_t)at,
		.end = (uintptr_t)at + size,
		.vec = (uintptr_t)to,
		.vec_len = regions,
		.category_inverted = inverted,
		.category_mask = mask,
		.category_anyof_mask = anyof,
		.return_mask = returned,
	};
	long n = ioctl(fd, PAGEMAP_SCAN, &a);
	if (walk_end)
		*walk_end = a.walk_end;
	return n < 0 ? -errno : n;
}

size_t count(const struct memory *m, uint64_t mask, uint64_t inverted, uint64_t anyof, bool *which)
{
	struct page_region r[64];
	size_t found = 0;
	int fd = pagemap(0);
	uint64_t at = (uintptr_t)m->at, end = at + m->size;
	if (which)
		memset(which, 0, m->pages * sizeof(*which));
	while (at < end) {
		uint64_t walk;
		long n = scan(fd, (void *)at, end - at, mask, inverted, anyof, mask | anyof, r, 64, 0, &walk);
		if (n == -ENOTTY)
			SKIP("no PAGEMAP_SCAN");
		if (n < 0)
			FAIL("PAGEMAP_SCAN: %s", strerror((int)-n));
		for (long i = 0; i < n; i++)
			for (uint64_t a = r[i].start; a < r[i].end; a += SMALL)
				if (!((a - (uintptr_t)m->at) % m->page)) {
					found++;
					if (which)
						which[(a - (uintptr_t)m->at) / m->page] = true;
				}
		at = walk;
	}
	close(fd);
	return found;
}

uint64_t categories(const void *at)
{
	struct page_region r;
	int fd = pagemap(0);
	const void *page = (const void *)((uintptr_t)at & ~(SMALL - 1));
	long n = -EINVAL;
	for (int bits = 10; bits >= 8 && n == -EINVAL; bits--) // 6.7 knows 8, 6.14 or so 9, the native ones 10
		for (int guard = 1; guard >= 0 && n == -EINVAL; guard--) {
			uint64_t all = ((1ULL << bits) - 1) & ~(guard ? 0 : PAGE_IS_GUARD);
			n = scan(fd, page, SMALL, 0, 0, all, all, &r, 1, 0, NULL);
		}
	close(fd);
	if (n == -ENOTTY)
		SKIP("no PAGEMAP_SCAN");
	if (n < 0)
		FAIL("PAGEMAP_SCAN: %s", strerror((int)-n));
	return n ? r.categories : 0;
}

uint64_t pagemap_entry(const void *at)
{
	uint64_t entry;
	int fd = pagemap(0);
	EQUAL(pread(fd, &entry, 8, (off_t)((uintptr_t)at / SMALL * 8)), 8);
	close(fd);
	return entry;
}

// The line of smaps that starts with `field`, of the mapping that holds `at`.
static bool smaps_line(const void *at, const char *field, char line[512])
{
	FILE *f = fopen("/proc/self/smaps", "re");
	bool here = false, found = false;
	if (!f)
		FAIL("smaps: %s", strerror(errno));
	while (!found && fgets(line, 512, f)) {
		unsigned long long from, to;
		char space;
		if (sscanf(line, "%llx-%llx%c", &from, &to, &space) == 3 && space == ' ')
			here = from <= (uintptr_t)at && (uintptr_t)at < to;
		found = here && !strncmp(line, field, strlen(field)) && line[strlen(field)] == ':';
	}
	fclose(f);
	return found;
}

bool vm_flag(const void *at, const char *two_letters)
{
	char line[512], word[8];
	snprintf(word, sizeof(word), " %s", two_letters);
	return smaps_line(at, "VmFlags", line) && strstr(line, word);
}

long smaps_kib(const void *at, const char *field)
{
	char line[512];
	return smaps_line(at, field, line) ? strtol(line + strlen(field) + 1, NULL, 10) : -1;
}

bool is_cached(const struct memory *m, size_t page)
{
	off_t at = (off_t)(page * m->page);
	return lseek(m->fd, at, SEEK_DATA) == at;
}

int punch(const struct memory *m, size_t page, size_t pages)
{
	int e = fallocate(m->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(page * m->page),
			  (off_t)(pages * m->page));
	return e ? -errno : 0;
}

long process_read(pid_t pid, const void *at, void *to, size_t size)
{
	struct iovec local = {to, size}, remote = {(void *)at, size};
	ssize_t n = process_vm_readv(pid ? pid : getpid(), &local, 1, &remote, 1, 0);
	return n < 0 ? -errno : n;
}

long proc_mem_read(pid_t pid, const void *at, void *to, size_t size)
{
	char path[40];
	snprintf(path, sizeof(path), "/proc/%d/mem", pid ? pid : getpid());
	int fd = MUST(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = pread(fd, to, size, (off_t)(uintptr_t)at);
	long answer = n < 0 ? -errno : n;
	close(fd);
	return answer;
}

void sleep_ms(int ms)
{
	struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

pid_t fork_child(void)
{
	pid_t pid = MUST(fork());
	if (!pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	return pid;
}

int wait_child(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			FAIL("waitpid: %s", strerror(errno));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int take_fd(pid_t pid, int fd)
{
	int pidfd = (int)MUST(syscall(434 /* pidfd_open */, pid, 0));
	int copy = (int)MUST(syscall(438 /* pidfd_getfd */, pidfd, fd, 0));
	close(pidfd);
	return copy;
}

// ---- running

static const struct {
	enum kind kind;
	const char *name;
} kinds[] = {
	{ANON, "anon"},
	{ANON_THP, "anon-thp"},
	{SHMEM, "shmem"},
	{SHMEM_THP, "shmem-thp"},
	{SHMEM_PRIVATE, "shmem-private"},
	{HUGETLB, "hugetlb"},
	{HUGETLB_PRIVATE, "hugetlb-private"},
};

static int failed, passed, skipped;

static void run(const struct test *t, enum kind kind, const char *name)
{
	int ends[2], status;
	if (pipe2(ends, O_CLOEXEC))
		exit(2);
	fflush(stdout);
	pid_t pid = fork();
	if (pid < 0)
		exit(2);
	if (!pid) {
		setpgid(0, 0);
		close(ends[0]);
		verdict_pipe = ends[1];
		alarm(t->seconds ? t->seconds : 10);
		t->run(kind);
		_exit(0);
	}
	close(ends[1]);
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	char text[401] = "";
	fcntl(ends[0], F_SETFL, O_NONBLOCK);
	ssize_t n = read(ends[0], text, 400);
	if (n <= 0)
		text[0] = 0;
	close(ends[0]);
	kill(-pid, SIGKILL);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 2) {
		skipped++;
		printf("skip %s: %s\n", name, text);
	} else if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && !text[0]) {
		passed++;
		printf("ok %s\n", name);
	} else {
		failed++;
		if (WIFSIGNALED(status))
			printf("not ok %s: %s%s%s\n", name,
			       WTERMSIG(status) == SIGALRM ? "timed out" : strsignal(WTERMSIG(status)),
			       text[0] ? ": " : "", text);
		else
			printf("not ok %s: %s\n", name, text);
	}
	fflush(stdout);
}

// A word of the command line: the whole name or what comes before one of its dots or its slash.
static bool wanted(const char *name, char **words)
{
	if (!*words)
		return true;
	for (; *words; words++) {
		size_t n = strlen(*words);
		if (!strncmp(name, *words, n) && (!name[n] || name[n] == '.' || name[n] == '/'))
			return true;
	}
	return false;
}

int main(int argc, char **argv)
{
	bool list = false;
	int from = 1;
	for (; from < argc && argv[from][0] == '-'; from++) {
		if (!strcmp(argv[from], "--list"))
			list = true;
		else if (!strcmp(argv[from], "--system"))
			may_change_system = true;
		else {
			fprintf(stderr, "selftest [--list] [--system] [GROUP|TEST...]\n");
			return 2;
		}
	}
	const struct test *tables[] = {stock_tests, rwp_tests, rfc_tests};
	int matched = 0;
	for (size_t i = 0; i < 3; i++)
		for (const struct test *t = tables[i]; t->name; t++)
			for (size_t k = 0; k < (t->kinds ? sizeof(kinds) / sizeof(kinds[0]) : 1); k++) {
				char name[128];
				if (t->kinds && !(t->kinds & kinds[k].kind))
					continue;
				snprintf(name, sizeof(name), t->kinds ? "%s/%s" : "%s", t->name,
					 t->kinds ? kinds[k].name : "");
				if (!wanted(name, argv + from))
					continue;
				matched++;
				if (list)
					puts(name);
				else
					run(t, t->kinds ? kinds[k].kind : NONE, name);
			}
	if (!matched) {
		fprintf(stderr, "no such test\n");
		return 2;
	}
	if (!list)
		printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
	return failed != 0;
}
