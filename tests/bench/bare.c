/* SPDX-License-Identifier: Apache-2.0 */
/*
 * bare.c: the limits. Nothing but the system calls that the job takes; no table, no ages, no checksum, no promise.
 *
 *   bare fault STYLE PAGES COUNT STORE LOAD-CPU HANDLER-CPU   STYLE: spin, sleep -> p50 p99 in ns
 *   bare deactivate PID ADDRESS BYTES                         PAGEMAP_SCAN and MADV_PAGEOUT of another process -> ns
 *   bare evict BYTES STORE                                    read, write with O_DIRECT, punch in 2 MiB pieces -> ns
 *   bare anonymous BYTES STORE                                move, read, write with O_DIRECT, drop in 2 MiB pieces -> ns
 */
#include "load.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sys.h"

enum { PIECE_BYTES = 2 << 20, STRETCH_BYTES = 64 << 20, RANGES = 256 };

_Noreturn static void die(const char *what)
{
	printf("error %s: %s\n", what, strerror(errno));
	exit(1);
}

/* --- faults ------------------------------------------------------------------------------------------------------------- */

/* In a process of its own, as tierd is: a fault costs a switch of address space. */
_Noreturn static void handle(int uffd, int store, uint64_t base, uint64_t page_bytes, int spin)
{
	uint8_t *page = aligned_alloc(page_bytes, page_bytes);
	struct pollfd fd = {.fd = uffd, .events = POLLIN};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		struct uffd_msg message;
		struct uffdio_copy copy = {.len = page_bytes, .src = (uint64_t)page};

		if (read(uffd, &message, sizeof(message)) != sizeof(message)) {
			if (!spin)
				poll(&fd, 1, -1);
			continue;
		}
		copy.dst = message.arg.pagefault.address & ~(page_bytes - 1);
		if (pread(store, page, page_bytes, (off_t)(copy.dst - base)) != (ssize_t)page_bytes ||
		    ioctl(uffd, UFFDIO_COPY, &copy))
			_exit(1);
	}
}

static void fault(char **a)
{
	uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), pages = strtoull(a[1], NULL, 10),
		 bytes = pages * page_bytes;
	int memfd = memfd_create("bare", MFD_CLOEXEC), store = open(a[3], O_RDWR | O_CREAT | O_TRUNC, 0600);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM};
	struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
	uint64_t p50, p99;
	uint8_t *memory;
	pid_t child;

	if (memfd < 0 || store < 0 || uffd < 0 || ftruncate(memfd, (off_t)bytes))
		die("files");
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	fill(memory, bytes);
	if (pwrite(store, memory, bytes, 0) != (ssize_t)bytes)
		die("store");
	range.range.start = (uint64_t)memory;
	range.range.len = bytes;
	if (ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
		die("userfaultfd");
	if (fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)bytes))
		die("punch");
	child = fork();
	if (!child) {
		pin(atoi(a[5]));
		handle(uffd, store, (uint64_t)memory, page_bytes, !strcmp(a[0], "spin"));
	}
	pin(atoi(a[4]));
	touch_randomly(memory, pages, page_bytes, strtoull(a[2], NULL, 10), &p50, &p99);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	printf("ok %lu %lu\n", (unsigned long)p50, (unsigned long)p99);
}

/* --- deactivation ------------------------------------------------------------------------------------------------------- */

static void deactivate(char **a)
{
	uint64_t start = strtoull(a[1], NULL, 10), end = start + strtoull(a[2], NULL, 10), began;
	char path[64];
	int pagemap, pidfd = (int)syscall(SYS_pidfd_open, atoi(a[0]), 0);

	snprintf(path, sizeof(path), "/proc/%s/pagemap", a[0]);
	pagemap = open(path, O_RDONLY);
	if (pagemap < 0 || pidfd < 0)
		die("process");
	began = now_ns();
	for (uint64_t at = start; at < end; at += STRETCH_BYTES) {
		uint64_t stop = at + STRETCH_BYTES < end ? at + STRETCH_BYTES : end, from = at;

		while (from < stop) {
			const struct sys_scan wanted = {.any_of = SYS_PAGE_PRESENT};
			struct sys_page_region found[RANGES];
			struct iovec ranges[RANGES];
			ssize_t n = sys_pagemap_scan(pagemap, from, stop, wanted, found, RANGES, &from);

			for (ssize_t i = 0; i < n; i++)
				ranges[i] = (struct iovec){(void *)found[i].start, found[i].end - found[i].start};
			if (n < 0 || (n && sys_pageout(pidfd, ranges, (size_t)n) < 0))
				die("deactivation");
		}
	}
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

/* --- eviction ----------------------------------------------------------------------------------------------------------- */

static void evict(char **a)
{
	uint64_t bytes = strtoull(a[0], NULL, 10), began;
	int memfd = memfd_create("bare", MFD_CLOEXEC), store = open(a[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	uint8_t *memory, *piece = aligned_alloc(4096, PIECE_BYTES);

	if (memfd < 0 || store < 0 || ftruncate(memfd, (off_t)bytes) || ftruncate(store, (off_t)bytes))
		die("files");
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	fill(memory, bytes);
	began = now_ns();
	for (uint64_t at = 0; at < bytes; at += PIECE_BYTES)
		if (pread(memfd, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    pwrite(store, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, PIECE_BYTES))
			die("eviction");
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

static uint8_t *map_anonymous(uint64_t bytes)
{
	uint8_t *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("memory");
	return memory;
}

static void anonymous(char **a)
{
	uint64_t bytes = strtoull(a[0], NULL, 10), began;
	int store = open(a[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API, .features = 1 << 16 /* MOVE */};
	uint8_t *memory = map_anonymous(bytes), *staging = map_anonymous(bytes),
		*piece = aligned_alloc(4096, PIECE_BYTES);

	if (store < 0 || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ftruncate(store, (off_t)bytes))
		die("files");
	fill(memory, bytes);
	if (sys_uffd_register(uffd, (uint64_t)memory, bytes, UFFDIO_REGISTER_MODE_MISSING) ||
	    sys_uffd_register(uffd, (uint64_t)staging, bytes, UFFDIO_REGISTER_MODE_MISSING))
		die("registration");
	began = now_ns();
	for (uint64_t at = 0; at < bytes; at += PIECE_BYTES) {
		if (sys_uffd_move(uffd, (uint64_t)staging + at, (uint64_t)memory + at, PIECE_BYTES) != PIECE_BYTES)
			die("move");
		memcpy(piece, staging + at, PIECE_BYTES);
		if (pwrite(store, piece, PIECE_BYTES, (off_t)at) != PIECE_BYTES ||
		    madvise(staging + at, PIECE_BYTES, MADV_DONTNEED))
			die("eviction");
	}
	printf("ok %lu\n", (unsigned long)(now_ns() - began));
}

int main(int argc, char **argv)
{
	if (argc == 8 && !strcmp(argv[1], "fault"))
		fault(argv + 2);
	else if (argc == 5 && !strcmp(argv[1], "deactivate"))
		deactivate(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "evict"))
		evict(argv + 2);
	else if (argc == 4 && !strcmp(argv[1], "anonymous"))
		anonymous(argv + 2);
	else
		return 2;
	return 0;
}
