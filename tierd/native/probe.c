/* SPDX-License-Identifier: Apache-2.0 */
/* probe.c: what this kernel can do, found out by doing it to a few pages of our own: never by version or feature bits. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "sys.h"
#include "tierd.h"

void tierd_probe_native(struct tierd_probe *ret); /* probe_native.c */
int trial_uffd_open(void);

enum { PAGES = 4, FAULT_TIMEOUT_MS = 2000, FILLED = 0x5a, FETCHED = 0xa5 };

struct trial {
	int uffd, memfd, pidfd, pagemap;
	size_t page_bytes;
	uint8_t *memory;
};

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* The faults of a trial are user faults: an ordinary user, who may have no others, can find out about the rest. A guest's
 * userfaultfd is never one of these. */
int trial_uffd_open(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0 && errno == EPERM)
		uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	return uffd < 0 ? -errno : uffd;
}

static int kernel_faults_allowed(void)
{
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0)
		return -errno;
	close(uffd);
	return 0;
}

static int open_uffd(struct tierd_probe *ret)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_api wanted = {.api = UFFD_API,
				    .features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_PAGEFAULT_FLAG_WP |
						UFFD_FEATURE_THREAD_ID | 1ull << 12 /* WP_HUGETLBFS_SHMEM, 5.19 */};
	int uffd = trial_uffd_open();

	if (uffd < 0)
		return uffd;
	/* the first handshake only asks what there is; it binds the descriptor, so a second one is opened to use */
	if (ioctl(uffd, UFFDIO_API, &api)) {
		close(uffd);
		return -EOPNOTSUPP;
	}
	ret->features = api.features;
	close(uffd);
	uffd = trial_uffd_open();
	if (uffd < 0)
		return uffd;
	if (ioctl(uffd, UFFDIO_API, &wanted)) {
		close(uffd);
		return -EOPNOTSUPP;
	}
	return uffd;
}

static bool page_entry(struct trial *t, int page, uint64_t *entry)
{
	return sys_pagemap_read(t->pagemap, entry, 1, (uintptr_t)t->memory + page * t->page_bytes) == sizeof(*entry);
}

static int try_pageout(struct trial *t)
{
	struct iovec range = {t->memory, PAGES * t->page_bytes};
	uint8_t byte = 0;
	uint64_t entry;
	ssize_t n = sys_pageout(t->pidfd, &range, 1);

	if (n < 0)
		return (int)n;
	if (!page_entry(t, 0, &entry))
		return -EIO;
	if (entry >> 63)
		return -EBUSY; /* still mapped */
	return sys_mem_read(t->memfd, &byte, 1, 0) == 1 && byte == FILLED ? 0 : -EIO;
}

static int try_write_protect(struct trial *t)
{
	uint64_t entry;
	int error;

	if (madvise(t->memory, t->page_bytes, MADV_DONTNEED)) /* not mapped, whatever the trial of PAGEOUT said */
		return -errno;
	error = sys_uffd_protect(t->uffd, (uintptr_t)t->memory, t->page_bytes);
	if (error)
		return error;
	if (!page_entry(t, 0, &entry) || entry >> 63 || !(entry >> 57 & 1))
		error = -EOPNOTSUPP; /* no marker */
	sys_uffd_unprotect(t->uffd, (uintptr_t)t->memory, t->page_bytes);
	return error;
}

static int try_pagemap_scan(struct trial *t)
{
	const struct sys_scan wanted = {.any_of = SYS_PAGE_PRESENT};
	struct sys_page_region found[PAGES];
	uint64_t walk_end, start = (uintptr_t)t->memory;
	ssize_t n = sys_pagemap_scan(t->pagemap, start, start + PAGES * t->page_bytes, wanted, found, PAGES, &walk_end);

	return n < 0 ? (int)n : 0;
}

static void *touch(void *byte)
{
	return (void *)(uintptr_t)*(volatile uint8_t *)byte;
}

/* A punched page faults as MISSING, and COPY answers it. The touching thread is let go whatever happens. */
static int try_missing(struct trial *t, uint8_t *page)
{
	struct pollfd ready = {.fd = t->uffd, .events = POLLIN};
	uint64_t at = (uintptr_t)t->memory, done;
	struct uffd_msg message = {0};
	void *seen = NULL;
	pthread_t thread;
	int error = sys_uffd_register(t->uffd, at, PAGES * t->page_bytes,
				      UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING);

	if (!error)
		error = sys_mem_punch(t->memfd, 0, t->page_bytes);
	if (!error)
		error = -pthread_create(&thread, NULL, touch, t->memory);
	if (error)
		return error;
	if (poll(&ready, 1, FAULT_TIMEOUT_MS) != 1 || sys_uffd_read(t->uffd, &message, 1) != 1 ||
	    message.event != UFFD_EVENT_PAGEFAULT)
		error = -ETIME;
	memset(page, FETCHED, t->page_bytes);
	if (!error)
		error = sys_uffd_copy(t->uffd, at, page, t->page_bytes, false, &done);
	if (error)
		sys_uffd_unregister(t->uffd, at, PAGES * t->page_bytes);
	pthread_join(thread, &seen);
	return error ? error : (uintptr_t)seen == FETCHED ? 0 : -EIO;
}

static int try_poison(struct trial *t)
{
	int error = sys_mem_punch(t->memfd, t->page_bytes, t->page_bytes);

	return error ? error : sys_uffd_poison(t->uffd, (uintptr_t)t->memory + t->page_bytes, t->page_bytes);
}

static int try_self_zap(struct trial *t)
{
	struct iovec range = {t->memory + 2 * t->page_bytes, t->page_bytes};

	return syscall(SYS_process_madvise, t->pidfd, &range, 1, MADV_DONTNEED, 0) < 0 ? -errno : 0;
}

static bool anonymous_written(struct trial *t, uint8_t *page)
{
	const struct sys_scan wanted = {.all_of = SYS_PAGE_PRESENT, .any_of = SYS_PAGE_WRITTEN};
	struct sys_page_region found;
	uint64_t walk_end, at = (uintptr_t)page;

	return sys_pagemap_scan(t->pagemap, at, at + t->page_bytes, wanted, &found, 1, &walk_end) == 1;
}

/* Page 0 of the memory is the guest's; it goes to page 2, its staging area. Touched by /proc/self/mem, where what should not have to
 * wait for anybody is an error if it does. */
static int try_anonymous_in(struct trial *t, int uffd, int mem, uint8_t *memory)
{
	uint8_t byte = FETCHED;
	uint64_t guest = (uintptr_t)memory, staging = guest + 2 * t->page_bytes;
	int error;

	memory[0] = FILLED;
	error = sys_uffd_register(uffd, guest, t->page_bytes, UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING);
	if (!error)
		error = sys_uffd_register(uffd, staging, t->page_bytes, UFFDIO_REGISTER_MODE_MISSING);
	if (!error)
		error = sys_uffd_protect(uffd, guest, t->page_bytes);
	if (error)
		return error;
	if (anonymous_written(t, memory))
		return -EILSEQ;
	if (pwrite(mem, &byte, 1, (off_t)guest) != 1 || !anonymous_written(t, memory))
		return -EILSEQ;
	byte = 0;
	if (sys_uffd_move(uffd, staging, guest, t->page_bytes) != (int64_t)t->page_bytes)
		return -EOPNOTSUPP;
	return pread(mem, &byte, 1, (off_t)staging) == 1 && byte == FETCHED && !anonymous_written(t, memory) ? 0
													     : -EILSEQ;
}

static int try_anonymous(struct trial *t)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_THREAD_ID |
					     1ull << 15 /* WP_ASYNC, 6.7 */ | 1ull << 16 /* MOVE, 6.8 */};
	int uffd = trial_uffd_open(), mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC), error;
	uint8_t *memory;

	if (uffd < 0) {
		close(mem);
		return uffd;
	}
	memory = mmap(NULL, 3 * t->page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	error = memory == MAP_FAILED ? -errno : ioctl(uffd, UFFDIO_API, &api) ? -EOPNOTSUPP : 0;
	if (!error)
		error = try_anonymous_in(t, uffd, mem, memory);
	if (memory != MAP_FAILED)
		munmap(memory, 3 * t->page_bytes);
	close(mem);
	close(uffd);
	return error;
}

static int trial_open(struct trial *t)
{
	t->memfd = memfd_create("tierd-trial", MFD_CLOEXEC);
	t->pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	t->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (t->memfd < 0 || t->pidfd < 0 || t->pagemap < 0 || ftruncate(t->memfd, (off_t)(PAGES * t->page_bytes)))
		return -errno;
	t->memory = mmap(NULL, PAGES * t->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, t->memfd, 0);
	if (t->memory == MAP_FAILED)
		return -errno;
	memset(t->memory, FILLED, PAGES * t->page_bytes);
	return 0;
}

static void trial_close(struct trial *t)
{
	int fds[] = {t->uffd, t->memfd, t->pidfd, t->pagemap};

	if (t->memory && t->memory != MAP_FAILED)
		munmap(t->memory, PAGES * t->page_bytes);
	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
}

/* A new page waits in a batch of the CPU that made it, and PAGEOUT passes over it unless it is called there: on a busy host the
 * trial failed now and then. */
static void stay_on_this_cpu(cpu_set_t *before)
{
	cpu_set_t here;
	int cpu = sched_getcpu();

	if (sched_getaffinity(0, sizeof(*before), before) || cpu < 0) {
		CPU_ZERO(before);
		return;
	}
	CPU_ZERO(&here);
	CPU_SET(cpu, &here);
	sched_setaffinity(0, sizeof(here), &here);
}

static void go_anywhere_again(const cpu_set_t *before)
{
	if (CPU_COUNT(before))
		sched_setaffinity(0, sizeof(*before), before);
}

int tierd_probe(struct tierd_probe *ret)
{
	cpu_set_t cpus;
	struct trial t = {.uffd = -1, .memfd = -1, .pidfd = -1, .pagemap = -1, .page_bytes = sys_page_bytes()};
	uint8_t *page = sys_alloc(t.page_bytes);
	int error;

	stay_on_this_cpu(&cpus);
	error = page ? trial_open(&t) : -ENOMEM;
	memset(ret, 0, sizeof(*ret));
	ret->page_bytes = t.page_bytes;
	ret->userfaultfd = t.uffd = open_uffd(ret);
	if (t.uffd >= 0)
		ret->userfaultfd = kernel_faults_allowed();
	if (!error && t.uffd >= 0) {
		ret->write_protect =
			sys_uffd_register(t.uffd, (uintptr_t)t.memory, PAGES * t.page_bytes, UFFDIO_REGISTER_MODE_WP);
		ret->pageout = try_pageout(&t);
		if (!ret->write_protect)
			ret->write_protect = try_write_protect(&t);
		ret->pagemap_scan = try_pagemap_scan(&t);
		ret->self_zap = try_self_zap(&t);
		ret->anonymous = try_anonymous(&t);
		ret->missing = try_missing(&t, page);
		ret->poison = try_poison(&t);
	}
	tierd_probe_native(ret);
	if (page)
		sys_free(page, t.page_bytes);
	trial_close(&t);
	go_anywhere_again(&cpus);
	return error;
}
