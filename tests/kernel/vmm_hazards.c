/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmm_hazards.c: what a VMM may do that makes its guest impossible to tier, one command each, and how it is undone.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "vmm.h"

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static int pipe_of_splice[2] = {-1, -1}, ring = -1, own_uffd = -1;
static void *second = MAP_FAILED;
static uint64_t second_bytes;
static pid_t child;

/* PRIVATE PAGES (0 or missing: 1) */
void map_second(const uint64_t *a, int count)
{
	(void)count;
	second_bytes = (a[1] ? a[1] : 1) * page_bytes;
	second = mmap(NULL, second_bytes, PROT_READ | PROT_WRITE, a[0] ? MAP_PRIVATE : MAP_SHARED, memfd[0], 0);
	answer(second == MAP_FAILED ? -1 : 0);
}

void unmap_second(const uint64_t *a, int count)
{
	(void)a, (void)count;
	answer(munmap(second, second_bytes));
}

void lock(const uint64_t *a, int count)
{
	(void)count;
	answer(mlock(page_at(a[0]), (end_of(a) - a[0]) * page_bytes));
}

void unlock(const uint64_t *a, int count)
{
	(void)count;
	answer(munlock(page_at(a[0]), (end_of(a) - a[0]) * page_bytes));
}

/* A long-term pin, as of a registered buffer. */
void pin(const uint64_t *a, int count)
{
	struct io_uring_params parameters = {0};
	struct iovec buffer = {page_at(a[0]), (end_of(a) - a[0]) * page_bytes};

	(void)count;
	ring = (int)syscall(SYS_io_uring_setup, 4, &parameters);
	if (ring < 0)
		answer(-1);
	else
		answer(syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1));
}

void unpin(const uint64_t *a, int count)
{
	long result = syscall(SYS_io_uring_register, ring, IORING_UNREGISTER_BUFFERS, NULL, 0);

	(void)a, (void)count;
	close(ring);
	answer(result);
}

/* An extra reference to one page, which no counter shows. */
void splice_page(const uint64_t *a, int count)
{
	struct iovec page = {page_at(a[0]), page_bytes};

	(void)count;
	answer(pipe(pipe_of_splice) ? -1 : vmsplice(pipe_of_splice[1], &page, 1, 0));
}

void unsplice(const uint64_t *a, int count)
{
	(void)a, (void)count;
	close(pipe_of_splice[0]);
	answer(close(pipe_of_splice[1]));
}

/* Another process that has the memory: a child, as a VMM's helper would be. */
void fork_child(const uint64_t *a, int count)
{
	(void)a, (void)count;
	child = fork();
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;)
			pause();
	}
	answer(child);
}

void end_child(const uint64_t *a, int count)
{
	(void)a, (void)count;
	kill(child, SIGKILL);
	answer(waitpid(child, NULL, 0));
}

/* As QEMU's background snapshot does, from FIRST on. */
void register_own(const uint64_t *a, int count)
{
	struct uffdio_api api = {.api = UFFD_API};
	struct uffdio_register range = {
		.range = {(uint64_t)page_at(a[0]), (end_of(a) - a[0]) * page_bytes},
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	(void)count;
	own_uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (own_uffd < 0 || ioctl(own_uffd, UFFDIO_API, &api))
		answer(-1);
	else
		answer(ioctl(own_uffd, UFFDIO_REGISTER, &range));
}

void unregister_own(const uint64_t *a, int count)
{
	(void)a, (void)count;
	answer(close(own_uffd));
}

/* A filter that allows everything: what it allows cannot be seen from outside. */
void filter(const uint64_t *a, int count)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	struct sock_fprog program = {1, &allow};

	(void)a, (void)count;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
		answer(-1);
	else
		answer(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program));
}

/* Makes large folios, whatever the host allows for new memory. */
void collapse(const uint64_t *a, int count)
{
	(void)count;
	answer(madvise(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, MADV_COLLAPSE));
}

/* FIRST COUNT: what is touched first there from now on may come in large pages. */
void large(const uint64_t *a, int count)
{
	(void)count;
	answer(madvise(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, MADV_HUGEPAGE));
}

/* FIRST COUNT: KSM may merge these pages. */
void mergeable(const uint64_t *a, int count)
{
	(void)count;
	answer(madvise(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, MADV_MERGEABLE));
}

/* FIRST COUNT: a copy of these pages, which KSM may merge with them. */
void twin(const uint64_t *a, int count)
{
	size_t bytes = (end_of(a) - a[0]) * page_bytes;
	void *copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	(void)count;
	if (copy != MAP_FAILED)
		memcpy(copy, page_at(a[0]), bytes);
	answer(copy == MAP_FAILED ? -1 : madvise(copy, bytes, MADV_MERGEABLE));
}

static int remove_pages(void *at, size_t bytes)
{
	return madvise(at, bytes, anonymous ? MADV_DONTNEED : MADV_REMOVE);
}

/* Gives pages back, as a balloon does. */
void give_back(const uint64_t *a, int count)
{
	(void)count;
	for (uint64_t page = a[0]; page < end_of(a); page++)
		sequence[page] = 0;
	answer(remove_pages(page_at(a[0]), (end_of(a) - a[0]) * page_bytes));
}

/* FIRST COUNT: unmapped by the VMM itself; the file keeps the bytes (of anonymous memory: see give-back). */
void zap(const uint64_t *a, int count)
{
	(void)count;
	answer(madvise(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, MADV_DONTNEED));
}

/* FIRST COUNT: to swap, where there is some. */
void page_out(const uint64_t *a, int count)
{
	(void)count;
	answer(madvise(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, MADV_PAGEOUT));
}

/*
 * FIRST COUNT ROUNDS, at any time, on pages that no thread works on (see `hot`): gives each page back, reads it, writes it
 * again. It must read as zeros or, had it left the guest, as what it held: never as a mixture or as anything older.
 */
void balloon(const uint64_t *a, int count)
{
	uint64_t zeros = 0, kept = 0;

	(void)count;
	for (uint64_t round = 0; round < a[2]; round++) {
		for (uint64_t page = a[0]; page < end_of(a); page++) {
			uint64_t *words = page_at(page);

			if (remove_pages(words, page_bytes)) {
				answer(-1);
				return;
			}
			if (*(volatile uint64_t *)words) {
				kept++;
			} else {
				zeros++;
				sequence[page] = 0;
			}
			check_page(page, words);
			write_page(page, words);
		}
	}
	say("ok %lu %lu", zeros, kept);
}

/* The mapping of one page is another one from now on. */
void replace_mapping(const uint64_t *a, int count)
{
	(void)count;
	if (anonymous)
		sequence[a[0]] = 0;
	answer(mmap(page_at(a[0]), page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
		    0) == MAP_FAILED
		       ? -1
		       : 0);
}

/* FIRST COUNT pages, of one region. */
void unmap_region(const uint64_t *a, int count)
{
	(void)count;
	answer(munmap(page_at(a[0]), (end_of(a) - a[0]) * page_bytes));
}

/* FIRST COUNT REGION START: the same bytes of the same file at the same addresses; the region begins with page START. Of
 * anonymous memory: zeros. */
void map_again(const uint64_t *a, int count)
{
	uint64_t offset = (uint64_t)((char *)page_at(a[0]) - (char *)page_at(a[3]));
	void *at = mmap(page_at(a[0]), (end_of(a) - a[0]) * page_bytes, PROT_READ | PROT_WRITE,
			(anonymous ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_FIXED, memfd[a[2]], (off_t)offset);

	(void)count;
	for (uint64_t page = a[0]; anonymous && page < end_of(a); page++)
		sequence[page] = 0;
	answer(at == MAP_FAILED ? -1 : 0);
}

/* FIRST COUNT: memory of the VMM's own where the guest's was. */
void map_other(const uint64_t *a, int count)
{
	size_t bytes = (end_of(a) - a[0]) * page_bytes;
	void *at = mmap(page_at(a[0]), bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);

	(void)count;
	answer(at == MAP_FAILED ? -1 : 0);
}

/* Another program under the same pid. */
void execute(const uint64_t *a, int count)
{
	(void)a, (void)count;
	execl("/bin/sleep", "sleep", "1000", NULL);
	answer(-1);
}

/* BYTES: one more region, as a hot-plugged DIMM is. */
void add_memory(const uint64_t *a, int count)
{
	int fd = anonymous ? -1 : memfd_create("memory-backend-memfd", MFD_CLOEXEC);
	void *at = MAP_FAILED;

	(void)count;
	if (anonymous)
		at = mmap(NULL, a[0], PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	else if (fd >= 0 && !ftruncate(fd, (off_t)a[0]))
		at = mmap(NULL, a[0], PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	answer(at == MAP_FAILED ? -1 : 0);
}
