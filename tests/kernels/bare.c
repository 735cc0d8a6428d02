/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bare.c: what the system calls of an engine cost by themselves, in the kernel that this runs in.
 *
 *   bare stock|rfc|rwp MIB ROUNDS
 *
 * Shared memory of MIB MiB. One line of JSON with medians: scan and deactivation of all of it when all of it was touched (ms), by
 * another process, as a daemon does it; and the price of a touch after the deactivation (us, read and write). Of an engine with
 * a sync mode also that of a touch that a handler thread resolves in it, and of the change of mode.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "sys.h"

enum { ROUNDS_MAX = 64, TOUCHES = 512, SHORT_TOUCHES = 64, STRETCH_BYTES = 64 << 20 };

struct engine {
	const char *name;
	uint64_t features, mode, touched; /* of UFFDIO_API, UFFDIO_REGISTER, PAGEMAP_SCAN */
	int (*deactivate)(int uffd, uint64_t address, uint64_t bytes);
	int (*resolve)(int uffd, uint64_t address, uint64_t bytes);
	int (*set_async)(int uffd, bool async); /* NULL: there is no sync mode */
};

static int uffd, memfd, pagemap, pidfd;
static size_t bytes, page_bytes, rounds;
static uint8_t *memory;
static int order_pipe[2], answer_pipe[2];
static _Atomic bool stop;

static int page_out(int unused, uint64_t address, uint64_t length)
{
	const struct iovec range = {(void *)(uintptr_t)address, length};
	ssize_t n = sys_pageout(pidfd, &range, 1);

	(void)unused;
	return n < 0 ? (int)n : (size_t)n == length ? 0 : -EIO;
}

static const struct engine engines[] = {
	{"stock", 1ull << 12, UFFDIO_REGISTER_MODE_WP, SYS_PAGE_PRESENT, page_out, NULL, NULL},
	{"rfc", 1ull << 10 | 1ull << 12 | 1ull << 17 | 1ull << 18, UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP,
	 SYS_PAGE_PRESENT, sys_rfc_deactivate, sys_uffd_continue, sys_rfc_set_async},
	{"rwp", 1ull << 10 | 1ull << 12 | 1ull << 17 | 1ull << 18, SYS_RWP_REGISTER_MODE, SYS_RWP_ACCESSED,
	 sys_rwp_protect, sys_rwp_unprotect, sys_rwp_set_async},
};
static const struct engine *engine;

static void must(bool good, const char *what)
{
	if (good)
		return;
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* As tierd does it: in stretches, so that mmap_lock is not held for long. */
static void deactivate(void)
{
	for (size_t at = 0; at < bytes; at += STRETCH_BYTES) {
		size_t n = bytes - at < STRETCH_BYTES ? bytes - at : STRETCH_BYTES;

		must(!engine->deactivate(uffd, (uintptr_t)memory + at, n), "deactivation");
	}
}

static void scan(void)
{
	uint64_t at = (uintptr_t)memory, end = at + bytes;
	const struct sys_scan wanted = {.any_of = engine->touched};
	struct sys_page_region found[256];

	while (at < end)
		must(sys_pagemap_scan(pagemap, at, end, wanted, found, 256, &at) >= 0, "scan");
}

/* The process that has what a daemon would have. It takes orders by a pipe and says how long they took. */
static void other_process(int orders, int answers)
{
	char order;

	while (read(orders, &order, 1) == 1) {
		uint64_t ns = sys_now_ns();

		if (order == 's')
			scan();
		else
			deactivate();
		ns = sys_now_ns() - ns;
		must(write(answers, &ns, sizeof(ns)) == sizeof(ns), "answer");
	}
	_exit(0);
}

static uint64_t ordered(char order)
{
	uint64_t ns;

	must(write(order_pipe[1], &order, 1) == 1 && read(answer_pipe[0], &ns, sizeof(ns)) == sizeof(ns),
	     "other process");
	return ns;
}

/* ns a page */
static uint64_t touch(size_t first, size_t count, bool write)
{
	uint64_t began = sys_now_ns();

	for (size_t i = first; i < first + count; i++) {
		volatile uint8_t *at = memory + i * page_bytes;

		if (write)
			*at = 1;
		else
			(void)*at;
	}
	return (sys_now_ns() - began) / count;
}

static void *handler(void *unused)
{
	struct pollfd ready = {.fd = uffd, .events = POLLIN};
	struct uffd_msg m;

	(void)unused;
	while (!stop) {
		if (poll(&ready, 1, 10) != 1 || sys_uffd_read(uffd, &m, 1) != 1)
			continue;
		engine->resolve(uffd, m.arg.pagefault.address & ~(page_bytes - 1), page_bytes);
	}
	return NULL;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static double median(uint64_t *values)
{
	qsort(values, rounds, sizeof(*values), compare);
	return (double)values[rounds / 2];
}

static void set_up(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = engine->features};
	char path[64];

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	must(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
	snprintf(path, sizeof(path), "/proc/%d/pagemap", getpid());
	pagemap = open(path, O_RDONLY | O_CLOEXEC);
	pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	memfd = memfd_create("bare", MFD_CLOEXEC);
	must(pagemap >= 0 && pidfd >= 0 && memfd >= 0 && !ftruncate(memfd, (off_t)bytes), "memory");
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	must(memory != MAP_FAILED, "memory");
	must(!sys_uffd_register(uffd, (uintptr_t)memory, bytes, engine->mode), "registration");
	must(!madvise(memory, bytes, MADV_DONTFORK), "MADV_DONTFORK");
	memset(memory, 1, bytes);
	must(!pipe(order_pipe) && !pipe(answer_pipe), "pipe");
	if (!fork()) {
		close(order_pipe[1]);
		other_process(order_pipe[0], answer_pipe[1]);
	}
}

/* ns of the change to sync mode, and of a touch in it */
static void in_sync_mode(uint64_t *mode, uint64_t *trip)
{
	uint64_t began = sys_now_ns();

	must(!engine->set_async(uffd, false), "change of mode");
	*mode = sys_now_ns() - began;
	*trip = touch(2 * TOUCHES, SHORT_TOUCHES, false);
	must(!engine->set_async(uffd, true), "change of mode");
}

static void parse(int count, char **arguments)
{
	must(count == 4, "usage: bare stock|rfc|rwp MIB ROUNDS");
	for (size_t i = 0; i < sizeof(engines) / sizeof(engines[0]); i++)
		if (!strcmp(engines[i].name, arguments[1]))
			engine = &engines[i];
	bytes = strtoul(arguments[2], NULL, 10) << 20;
	rounds = strtoul(arguments[3], NULL, 10);
	must(engine && rounds && rounds <= ROUNDS_MAX, "engine or rounds");
}

int main(int count, char **arguments)
{
	uint64_t deactivations[ROUNDS_MAX], scans[ROUNDS_MAX], reads[ROUNDS_MAX], writes[ROUNDS_MAX], trips[ROUNDS_MAX];
	uint64_t modes[ROUNDS_MAX];
	pthread_t thread;

	parse(count, arguments);
	page_bytes = sys_page_bytes();
	set_up();
	must(!pthread_create(&thread, NULL, handler, NULL), "thread");
	for (size_t i = 0; i < rounds; i++) {
		scans[i] = ordered('s');
		deactivations[i] = ordered('d');
		reads[i] = touch(0, TOUCHES, false);
		writes[i] = touch(TOUCHES, TOUCHES, true);
		if (engine->set_async)
			in_sync_mode(&modes[i], &trips[i]);
		touch(0, bytes / page_bytes, false);
	}
	stop = true;
	pthread_join(thread, NULL);
	printf("{\"deactivate_ms\": %.3f, \"scan_ms\": %.3f, \"read_us\": %.3f, \"write_us\": %.3f",
	       median(deactivations) / 1e6, median(scans) / 1e6, median(reads) / 1e3, median(writes) / 1e3);
	if (engine->set_async)
		printf(", \"sync_us\": %.3f, \"set_mode_us\": %.3f", median(trips) / 1e3, median(modes) / 1e3);
	printf("}\n");
	return 0;
}
