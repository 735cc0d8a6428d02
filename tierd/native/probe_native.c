/* SPDX-License-Identifier: Apache-2.0 */
/* probe_native.c: whether this kernel is rwp or rfc, by trial: both have the same feature bits, and category bit 9 of the scan
 * means "touched" in one and "untouched" in the other. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "sys.h"
#include "tierd.h"

int trial_uffd_open(void); /* probe.c */

enum { PAGES = 3, TOUCHED = 0, UNTOUCHED = 1, NEVER_DEACTIVATED = 2, FAULT_TIMEOUT_MS = 2000 };
/* RWP or MINOR_ANON, RWP_ASYNC or MINOR_ASYNC */
static const uint64_t FEATURES = 1ull << 17 | 1ull << 18 | 1ull << 10 /* MINOR_SHMEM */ | UFFD_FEATURE_MISSING_SHMEM |
				 1ull << 12 /* WP_HUGETLBFS_SHMEM */;
static const uint64_t SET_MODE_BIT = 1ull << 10;

struct generation {
	bool offers_set_mode; /* in uffdio_api.ioctls */
	bool anonymous;
	uint64_t register_mode, fault_flag;
	struct sys_scan scan; /* for pages that were touched */
	int (*deactivate)(int uffd, uint64_t address, uint64_t bytes);
	int (*set_async)(int uffd, bool async);
	int (*resolve)(int uffd, uint64_t address, uint64_t bytes);
};

static const struct generation rwp = {.offers_set_mode = true,
				      .register_mode = SYS_RWP_REGISTER_MODE,
				      .fault_flag = SYS_RWP_FAULT,
				      .scan = {.any_of = SYS_RWP_ACCESSED},
				      .deactivate = sys_rwp_protect,
				      .set_async = sys_rwp_set_async,
				      .resolve = sys_rwp_unprotect};
static const struct generation rfc = {.register_mode = UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP,
				      .fault_flag = UFFD_PAGEFAULT_FLAG_MINOR,
				      .scan = {.any_of = SYS_PAGE_PRESENT},
				      .deactivate = sys_rfc_deactivate,
				      .set_async = sys_rfc_set_async,
				      .resolve = sys_uffd_continue};

struct native_trial {
	const struct generation *g;
	int uffd, memfd, pagemap;
	size_t page_bytes;
	uint8_t *memory;
	pthread_t thread;
	bool touching;
	_Atomic bool done;
	int page; /* that the thread touches */
};

static uint64_t at(const struct native_trial *t, int page)
{
	return (uintptr_t)t->memory + (size_t)page * t->page_bytes;
}

static int open_api(struct native_trial *t)
{
	struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};

	t->uffd = trial_uffd_open();
	if (t->uffd < 0)
		return t->uffd;
	if (ioctl(t->uffd, UFFDIO_API, &api))
		return -errno;
	return !(api.ioctls & SET_MODE_BIT) == !t->g->offers_set_mode ? 0 : -EOPNOTSUPP;
}

static int map_memory(struct native_trial *t)
{
	int flags = t->g->anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;

	t->memfd = memfd_create("tierd-trial", MFD_CLOEXEC);
	t->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (t->memfd < 0 || t->pagemap < 0 || ftruncate(t->memfd, (off_t)(PAGES * t->page_bytes)))
		return -errno;
	t->memory =
		mmap(NULL, PAGES * t->page_bytes, PROT_READ | PROT_WRITE, flags, t->g->anonymous ? -1 : t->memfd, 0);
	if (t->memory == MAP_FAILED)
		return -errno;
	memset(t->memory, 1, PAGES * t->page_bytes);
	return sys_uffd_register(t->uffd, at(t, 0), PAGES * t->page_bytes, t->g->register_mode);
}

/* Bit n: page n was touched since its deactivation, or never deactivated. */
static int scan(struct native_trial *t, unsigned int *touched)
{
	struct sys_page_region found[PAGES];
	uint64_t end = at(t, PAGES), walk_end;
	ssize_t n = sys_pagemap_scan(t->pagemap, at(t, 0), end, t->g->scan, found, PAGES, &walk_end);

	*touched = 0;
	for (ssize_t i = 0; i < n; i++)
		for (int page = 0; page < PAGES; page++)
			if (at(t, page) >= found[i].start && at(t, page) < found[i].end)
				*touched |= 1u << page;
	return n < 0 ? (int)n : 0;
}

static int expect(struct native_trial *t, unsigned int wanted)
{
	unsigned int touched;
	int error = scan(t, &touched);

	return error ? error : touched == wanted ? 0 : -EILSEQ;
}

static void *touch(void *argument)
{
	struct native_trial *t = argument;

	*(volatile uint8_t *)(uintptr_t)at(t, t->page) = 2;
	t->done = true;
	return NULL;
}

static int start_touch(struct native_trial *t, int page)
{
	t->page = page;
	t->done = false;
	t->touching = !pthread_create(&t->thread, NULL, touch, t);
	return t->touching ? 0 : -EAGAIN;
}

static int finish_touch(struct native_trial *t)
{
	for (int ms = 0; !t->done; ms++) {
		if (ms == FAULT_TIMEOUT_MS)
			return -ETIME;
		sys_pause_us(1000);
	}
	pthread_join(t->thread, NULL);
	t->touching = false;
	return 0;
}

static int expect_message(struct native_trial *t)
{
	struct pollfd ready = {.fd = t->uffd, .events = POLLIN};
	struct uffd_msg m;

	if (poll(&ready, 1, FAULT_TIMEOUT_MS) != 1 || sys_uffd_read(t->uffd, &m, 1) != 1 || t->done)
		return -ETIME;
	return m.event == UFFD_EVENT_PAGEFAULT && m.arg.pagefault.flags & t->g->fault_flag ? 0 : -EILSEQ;
}

static int try_step(struct native_trial *t, uint32_t step)
{
	switch (step) {
	case TIERD_TRIAL_API:
		return open_api(t);
	case TIERD_TRIAL_REGISTER:
		return map_memory(t);
	case TIERD_TRIAL_DEACTIVATE:
		return t->g->deactivate(t->uffd, at(t, 0), 2 * t->page_bytes);
	case TIERD_TRIAL_SCAN:
		return expect(t, 1u << NEVER_DEACTIVATED);
	case TIERD_TRIAL_ASYNC_TOUCH:
		return start_touch(t, TOUCHED) ? -EAGAIN : finish_touch(t);
	case TIERD_TRIAL_SCAN_TOUCHED:
		return expect(t, 1u << NEVER_DEACTIVATED | 1u << TOUCHED);
	case TIERD_TRIAL_SYNC:
		return t->g->set_async(t->uffd, false);
	case TIERD_TRIAL_SYNC_TOUCH:
		return start_touch(t, UNTOUCHED) ? -EAGAIN : expect_message(t);
	case TIERD_TRIAL_RESOLVE:
		return t->g->resolve(t->uffd, at(t, UNTOUCHED), t->page_bytes) ? -errno : finish_touch(t);
	default:
		return t->g->set_async(t->uffd, true);
	}
}

static int try_generation(const struct generation *g, uint32_t *step)
{
	struct native_trial t = {.g = g, .uffd = -1, .memfd = -1, .pagemap = -1, .page_bytes = sys_page_bytes()};
	int fds[2], error = 0;

	for (*step = TIERD_TRIAL_API; *step <= TIERD_TRIAL_ASYNC; (*step)++) {
		error = try_step(&t, *step);
		if (error)
			break;
	}
	if (t.uffd >= 0) /* which lets go of whoever waits */
		close(t.uffd);
	if (t.touching)
		pthread_join(t.thread, NULL);
	if (t.memory && t.memory != MAP_FAILED)
		munmap(t.memory, PAGES * t.page_bytes);
	fds[0] = t.memfd, fds[1] = t.pagemap;
	for (int i = 0; i < 2; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	return error;
}

void tierd_probe_native(struct tierd_probe *ret)
{
	struct generation anonymous = rwp;
	uint32_t ignored;

	ret->rwp = try_generation(&rwp, &ret->rwp_step);
	ret->rfc = try_generation(&rfc, &ret->rfc_step);
	anonymous.anonymous = true;
	ret->rwp_anonymous = try_generation(&anonymous, &ignored);
	anonymous = rfc;
	anonymous.anonymous = true;
	anonymous.register_mode = UFFDIO_REGISTER_MODE_MINOR;
	anonymous.scan = (struct sys_scan){
		.inverted = SYS_RFC_DEACTIVATED, .all_of = SYS_PAGE_PRESENT, .any_of = SYS_RFC_DEACTIVATED};
	ret->rfc_anonymous = try_generation(&anonymous, &ignored);
}
