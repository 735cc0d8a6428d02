/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bare.c: what the system calls of an engine cost by themselves, in the kernel that this runs in.
 *
 *   bare rwp|rfc MIB ROUNDS
 *
 * Shared memory of MIB MiB. One line of JSON with medians: scan and deactivation of all of it when all of it was touched (ms), by
 * another process, as a daemon does it; the price of a touch after the deactivation in async mode (us, read and write), of a
 * touch that a handler thread resolves in sync mode, and of the stock engine's way to see a touch: an ordinary minor fault.
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
#include <time.h>
#include <unistd.h>

#include "sys.h"

enum { ROUNDS_MAX = 64, TOUCHES = 512, SHORT_TOUCHES = 64 };

static bool is_rwp;
static int uffd, memfd, pagemap;
static size_t bytes, page_bytes, rounds;
static uint8_t *memory;
static int order_pipe[2], answer_pipe[2];
static _Atomic bool stop;

static void must(bool good, const char *what)
{
	if (good)
		return;
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void deactivate(void)
{

	/* as tierd does it: in stretches, so that mmap_lock is not held for long */
	for (size_t at = 0; at < bytes; at += 64 << 20) {
		size_t n = bytes - at < 64 << 20 ? bytes - at : 64 << 20;
		uint64_t address = (uintptr_t)memory + at;

		must(!(is_rwp ? sys_rwp_protect(uffd, address, n) : sys_rfc_deactivate(uffd, address, n)),
		     "deactivation");
	}
}

static void scan(void)
{
	uint64_t at = (uintptr_t)memory, end = at + bytes;
	const struct sys_scan wanted = {.any_of = is_rwp ? SYS_RWP_ACCESSED : SYS_PAGE_PRESENT};
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
		if (is_rwp)
			sys_rwp_unprotect(uffd, m.arg.pagefault.address & ~(page_bytes - 1), page_bytes);
		else
			sys_uffd_continue(uffd, m.arg.pagefault.address & ~(page_bytes - 1), page_bytes);
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

static void set_async(bool async)
{
	must(!(is_rwp ? sys_rwp_set_async(uffd, async) : sys_rfc_set_async(uffd, async)), "change of mode");
}

static void set_up(void)
{
	struct uffdio_api api = {.api = UFFD_API, .features = 1ull << 17 | 1ull << 18 | 1ull << 10 | 1ull << 12};
	char path[64];
	uint64_t mode = is_rwp ? SYS_RWP_REGISTER_MODE : UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP;

	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	must(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
	snprintf(path, sizeof(path), "/proc/%d/pagemap", getpid());
	pagemap = open(path, O_RDONLY | O_CLOEXEC);
	memfd = memfd_create("bare", MFD_CLOEXEC);
	must(pagemap >= 0 && memfd >= 0 && !ftruncate(memfd, (off_t)bytes), "memory");
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	must(memory != MAP_FAILED, "memory");
	must(!sys_uffd_register(uffd, (uintptr_t)memory, bytes, mode), "registration");
	must(!madvise(memory, bytes, MADV_DONTFORK), "MADV_DONTFORK");
	memset(memory, 1, bytes);
	must(!pipe(order_pipe) && !pipe(answer_pipe), "pipe");
	if (!fork()) {
		close(order_pipe[1]);
		other_process(order_pipe[0], answer_pipe[1]);
	}
}

/* The stock engine's re-access: registered WP, so that no neighbour is mapped with the page. */
static void stock(uint64_t *reads, uint64_t *writes)
{
	must(!sys_uffd_unregister(uffd, (uintptr_t)memory, bytes), "unregistration");
	must(!sys_uffd_register(uffd, (uintptr_t)memory, bytes, UFFDIO_REGISTER_MODE_WP), "registration");
	for (size_t i = 0; i < rounds; i++) {
		must(!madvise(memory, bytes, MADV_DONTNEED), "MADV_DONTNEED");
		reads[i] = touch(0, TOUCHES, false);
		writes[i] = touch(TOUCHES, TOUCHES, true);
		touch(0, bytes / page_bytes, false);
	}
}

int main(int count, char **arguments)
{
	uint64_t deactivations[ROUNDS_MAX], scans[ROUNDS_MAX], reads[ROUNDS_MAX], writes[ROUNDS_MAX], trips[ROUNDS_MAX];
	uint64_t stock_reads[ROUNDS_MAX], stock_writes[ROUNDS_MAX], modes[ROUNDS_MAX];
	pthread_t thread;

	must(count == 4, "usage: bare rwp|rfc MIB ROUNDS");
	is_rwp = !strcmp(arguments[1], "rwp");
	bytes = strtoul(arguments[2], NULL, 10) << 20;
	rounds = strtoul(arguments[3], NULL, 10);
	must(rounds && rounds <= ROUNDS_MAX, "rounds");
	page_bytes = sys_page_bytes();
	set_up();
	must(!pthread_create(&thread, NULL, handler, NULL), "thread");
	for (size_t i = 0; i < rounds; i++) {
		scans[i] = ordered('s');
		deactivations[i] = ordered('d');
		reads[i] = touch(0, TOUCHES, false);
		writes[i] = touch(TOUCHES, TOUCHES, true);
		modes[i] = sys_now_ns();
		set_async(false);
		modes[i] = sys_now_ns() - modes[i];
		trips[i] = touch(2 * TOUCHES, SHORT_TOUCHES, false);
		set_async(true);
		touch(0, bytes / page_bytes, false);
	}
	stop = true;
	pthread_join(thread, NULL);
	stock(stock_reads, stock_writes);
	printf("{\"deactivate_ms\": %.3f, \"scan_ms\": %.3f, \"read_us\": %.3f, \"write_us\": %.3f, \"sync_us\": %.3f, "
	       "\"set_mode_us\": %.3f, \"stock_read_us\": %.3f, \"stock_write_us\": %.3f}\n",
	       median(deactivations) / 1e6, median(scans) / 1e6, median(reads) / 1e3, median(writes) / 1e3,
	       median(trips) / 1e3, median(modes) / 1e3, median(stock_reads) / 1e3, median(stock_writes) / 1e3);
	return 0;
}
