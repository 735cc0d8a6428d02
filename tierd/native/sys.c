/* SPDX-License-Identifier: Apache-2.0 */
/* sys.c: the real system calls behind sys.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "sys.h"
#include "tierd.h"

/* kernel interfaces that the headers of older distributions lack */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif

#ifndef UFFDIO_MOVE
struct uffdio_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
_Static_assert(sizeof(struct uffdio_move) == 40, "UFFDIO_MOVE");

struct pagemap_scan { /* struct pm_scan_arg, Documentation/admin-guide/mm/pagemap.rst */
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
_Static_assert(sizeof(struct pagemap_scan) == 96, "the kernel checks this size");
_Static_assert(sizeof(struct sys_page_region) == 24, "struct page_region");
_Static_assert(sizeof(struct uffd_msg) == 32, "read(2) gives whole messages");
#define IOCTL_PAGEMAP_SCAN _IOWR('f', 16, struct pagemap_scan)

#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

enum { INJECT_TIMEOUT_MS = 1000, AGAIN_MAX = 1000, SETTLE_TIMEOUT_MS = 1000 };
/* For how long a thread of the VMM may be ours at once; and for how long it is waited for: one that waits in the kernel for a page that
 * is just leaving does not stop before that is called off. */
enum { BATCH_BUDGET_NS = 2000000, BATCH_TIMEOUT_MS = 500 };
_Static_assert((int)SYS_INSIDE_MAX == (int)TIERD_CALLS_MAX, "of a batch");

uint64_t sys_now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

size_t sys_page_bytes(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

void sys_pause_us(uint32_t us)
{
	struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = (long)(us % 1000000) * 1000};

	nanosleep(&t, NULL);
}

int sys_dup(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

	return copy < 0 ? -errno : copy;
}

void sys_close(int fd)
{
	close(fd);
}

void *sys_alloc(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	if (mlock(memory, bytes)) { /* RLIMIT_MEMLOCK: the host's reclaim must not stall faults behind us */
		munmap(memory, bytes);
		return NULL;
	}
	return memory;
}

void sys_free(void *memory, size_t bytes)
{
	munmap(memory, bytes);
}

static int uffd_ioctl(int uffd, unsigned long request, void *argument)
{
	return ioctl(uffd, request, argument) ? -errno : 0;
}

int sys_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode)
{
	struct uffdio_register r = {.range = {.start = address, .len = bytes}, .mode = mode};

	return uffd_ioctl(uffd, UFFDIO_REGISTER, &r);
}

int sys_uffd_unregister(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_range r = {.start = address, .len = bytes};

	return uffd_ioctl(uffd, UFFDIO_UNREGISTER, &r);
}

int sys_uffd_protect(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_writeprotect w = {.range = {.start = address, .len = bytes}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};

	return uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &w);
}

int sys_uffd_unprotect(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_writeprotect w = {.range = {.start = address, .len = bytes}};

	return uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &w);
}

int sys_uffd_wake(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_range r = {.start = address, .len = bytes};

	return uffd_ioctl(uffd, UFFDIO_WAKE, &r);
}

int sys_uffd_copy(int uffd, uint64_t address, const void *from, uint64_t bytes, bool protect, uint64_t *done)
{
	struct uffdio_copy c = {
		.dst = address, .src = (uintptr_t)from, .len = bytes, .mode = protect ? UFFDIO_COPY_MODE_WP : 0};
	int error = uffd_ioctl(uffd, UFFDIO_COPY, &c);

	*done = c.copy > 0 ? (uint64_t)c.copy : 0;
	return error;
}

int sys_uffd_continue(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_continue c = {.range = {.start = address, .len = bytes}};

	return uffd_ioctl(uffd, UFFDIO_CONTINUE, &c);
}

/* The two generations of working set tracking use the same numbers for different things; headers have neither. */
enum { SET_MODE_ASYNC = 1 << 18 /* RWP_ASYNC, MINOR_ASYNC */ };

struct set_mode {
	uint64_t enable, disable;
};

struct rwp_protect {
	struct uffdio_range range;
	uint64_t mode;
};

static const unsigned long SET_MODE = _IOW(UFFDIO, 0x0a, struct set_mode),
			   RWP_PROTECT = _IOWR(UFFDIO, 9, struct rwp_protect),
			   RFC_DEACTIVATE = _IOR(UFFDIO, 9, struct uffdio_range);

static int set_async(int uffd, bool async)
{
	struct set_mode m = {.enable = async ? SET_MODE_ASYNC : 0, .disable = async ? 0 : SET_MODE_ASYNC};

	return uffd_ioctl(uffd, SET_MODE, &m);
}

int sys_rwp_protect(int uffd, uint64_t address, uint64_t bytes)
{
	struct rwp_protect p = {.range = {.start = address, .len = bytes}, .mode = 1};

	return uffd_ioctl(uffd, RWP_PROTECT, &p);
}

int sys_rwp_unprotect(int uffd, uint64_t address, uint64_t bytes)
{
	struct rwp_protect p = {.range = {.start = address, .len = bytes}};

	return uffd_ioctl(uffd, RWP_PROTECT, &p);
}

int sys_rwp_set_async(int uffd, bool async)
{
	return set_async(uffd, async);
}

int sys_rfc_deactivate(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_range r = {.start = address, .len = bytes};

	return uffd_ioctl(uffd, RFC_DEACTIVATE, &r);
}

int sys_rfc_set_async(int uffd, bool async)
{
	return set_async(uffd, async);
}

int sys_uffd_poison(int uffd, uint64_t address, uint64_t bytes)
{
	struct uffdio_poison p = {.range = {.start = address, .len = bytes}};

	return uffd_ioctl(uffd, UFFDIO_POISON, &p);
}

int64_t sys_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t bytes)
{
	struct uffdio_move m = {.dst = to, .src = from, .len = bytes};
	int error = uffd_ioctl(uffd, UFFDIO_MOVE, &m);

	return error && m.move <= 0 ? error : m.move;
}

ssize_t sys_uffd_read(int uffd, struct uffd_msg *messages, size_t count)
{
	ssize_t n = read(uffd, messages, count * sizeof(*messages));

	return n < 0 ? -errno : n / (ssize_t)sizeof(*messages);
}

ssize_t sys_pagemap_scan(int pagemap, uint64_t start, uint64_t end, struct sys_scan wanted,
			 struct sys_page_region *regions, size_t count, uint64_t *walk_end)
{
	struct pagemap_scan scan = {.size = sizeof(scan),
				    .start = start,
				    .end = end,
				    .vec = (uintptr_t)regions,
				    .vec_len = count,
				    .category_inverted = wanted.inverted,
				    .category_mask = wanted.all_of,
				    .category_anyof_mask = wanted.any_of,
				    .return_mask = wanted.any_of | SYS_PAGE_HUGE};
	int n = ioctl(pagemap, IOCTL_PAGEMAP_SCAN, &scan);

	*walk_end = scan.walk_end;
	return n < 0 ? -errno : n;
}

ssize_t sys_pagemap_read(int pagemap, uint64_t *entries, size_t count, uint64_t address)
{
	ssize_t n = pread(pagemap, entries, count * sizeof(*entries),
			  (off_t)(address / sys_page_bytes() * sizeof(*entries)));

	return n < 0 ? -errno : n;
}

/* The word of the bitmap that has the page's bit: its offset in the file; -EINVAL: not mapped, or we may not see where. */
static int64_t idle_word(uint64_t entry, uint64_t *bit)
{
	uint64_t frame = entry & ((1ull << 55) - 1);

	if (!(entry >> 63) || !frame)
		return -EINVAL;
	*bit = 1ull << frame % 64;
	return (int64_t)(frame / 64 * sizeof(uint64_t));
}

int sys_idle_get(int idle, uint64_t entry)
{
	uint64_t bit, word;
	int64_t at = idle_word(entry, &bit);
	ssize_t n = at < 0 ? 0 : pread(idle, &word, sizeof(word), at);

	return at < 0 ? (int)at : n < 0 ? -errno : n == sizeof(word) && word & bit;
}

int sys_idle_set(int idle, uint64_t entry)
{
	uint64_t bit = 0; /* bits that are not set are left alone */
	int64_t at = idle_word(entry, &bit);
	ssize_t n = at < 0 ? 0 : pwrite(idle, &bit, sizeof(bit), at);

	return at < 0 ? (int)at : n < 0 ? -errno : 0;
}

ssize_t sys_pageout(int pidfd, const struct iovec *ranges, size_t count)
{
	ssize_t n = syscall(SYS_process_madvise, pidfd, ranges, count, MADV_PAGEOUT, 0);

	return n < 0 ? -errno : n;
}

int sys_zap_inside(int tid, uint64_t address, uint64_t bytes, uint64_t *stopped_ns)
{
	struct tierd_call call = {.number = SYS_madvise, .argument = {address, bytes, MADV_DONTNEED}};
	int error = tierd_inject(tid, &call, NULL, 0, INJECT_TIMEOUT_MS);

	*stopped_ns = call.stopped_ns;
	return error ? error : (int)call.result;
}

ssize_t sys_vmm_read(int mem, void *to, size_t bytes, uint64_t address)
{
	ssize_t n = pread(mem, to, bytes, (off_t)address);

	return n < 0 ? -errno : n;
}

ssize_t sys_vmm_copy(int32_t pid, void *to, size_t bytes, uint64_t address)
{
	struct iovec here = {to, bytes}, there = {(void *)(uintptr_t)address, bytes};
	ssize_t n = process_vm_readv(pid, &here, 1, &there, 1, 0);

	return n < 0 ? -errno : n;
}

int sys_inside_create(int32_t tid, uint64_t *area)
{
	return tierd_calls_create(tid, area);
}

/* Never with UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: a page that is given back between the two looks of a move makes it go round for ever
 * (seen on 6.18). */
static struct tierd_inside_call inside_call(const struct sys_inside *in, const struct sys_inside_call *c)
{
	struct uffdio_move move = {.dst = c->to, .src = c->from, .len = c->bytes};
	struct uffdio_register whole = {.range = {c->from, c->bytes}, .mode = c->mode};
	struct tierd_inside_call call = {.number = SYS_madvise, .argument = {c->from, c->bytes, MADV_DONTNEED}};

	if (c->what == SYS_INSIDE_DROP)
		return call;
	call = (struct tierd_inside_call){
		.number = SYS_ioctl, .argument = {(uint64_t)in->uffd_in_vmm, UFFDIO_MOVE, 0}, .in_data = 1 << 2};
	if (c->what == SYS_INSIDE_MOVE) {
		memcpy(call.data, &move, sizeof(move));
	} else {
		call.argument[1] = UFFDIO_REGISTER;
		memcpy(call.data, &whole, sizeof(whole));
	}
	return call;
}

static int64_t inside_result(const struct sys_inside_call *c, const struct tierd_inside_call *call)
{
	struct uffdio_move move;

	if (c->what != SYS_INSIDE_MOVE)
		return call->result;
	memcpy(&move, call->data, sizeof(move));
	return move.move > 0 && (uint64_t)move.move <= c->bytes ? move.move : call->result ? call->result : -EIO;
}

int sys_inside_run(const struct sys_inside *in, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
		   uint64_t *stopped_ns)
{
	struct tierd_inside_call batch[TIERD_CALLS_MAX];
	int error;

	for (uint32_t i = 0; i < count; i++)
		batch[i] = inside_call(in, &calls[i]);
	error = tierd_calls_run(in->tid, in->area, batch, count, BATCH_BUDGET_NS, BATCH_TIMEOUT_MS, done, stopped_ns);
	for (uint32_t i = 0; i < *done; i++)
		calls[i].result = inside_result(&calls[i], &batch[i]);
	return error;
}

int64_t sys_filters(int32_t tid)
{
	unsigned int mode = 0, filters = 0; /* Seccomp_filters: Linux 5.9 */
	char path[64], line[256];
	FILE *status;

	snprintf(path, sizeof(path), "/proc/%d/status", tid);
	status = fopen(path, "re");
	if (!status)
		return errno == ENOENT ? -ESRCH : -errno;
	while (fgets(line, sizeof(line), status))
		if (!sscanf(line, "Seccomp: %u", &mode))
			sscanf(line, "Seccomp_filters: %u", &filters);
	fclose(status);
	return (int64_t)mode << 32 | filters;
}

int sys_inside_settle(const struct sys_inside *in)
{
	return tierd_calls_settle(in->pid, in->mem, in->area, SETTLE_TIMEOUT_MS);
}

ssize_t sys_mem_read(int memfd, void *to, size_t bytes, uint64_t offset)
{
	ssize_t n = pread(memfd, to, bytes, (off_t)offset);

	return n < 0 ? -errno : n;
}

/* Through a mapping that wants no large folios. Not by memcpy: beyond the end of a file that was cut short this is an error and
 * no signal. */
static ssize_t write_mapped(int memfd, const void *from, size_t bytes, uint64_t offset)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, (off_t)offset);
	struct iovec here = {(void *)(uintptr_t)from, bytes}, there = {at, bytes};
	ssize_t n = -1;

	if (at == MAP_FAILED)
		return -errno;
	if (!madvise(at, bytes, MADV_NOHUGEPAGE) || errno == EINVAL) /* a kernel without large folios */
		n = process_vm_writev(getpid(), &here, 1, &there, 1, 0);
	n = n < 0 ? -errno : n;
	munmap(at, bytes);
	return n;
}

ssize_t sys_mem_write(int memfd, const void *from, size_t bytes, uint64_t offset)
{
	ssize_t n = write_mapped(memfd, from, bytes, offset);

	if (n == (ssize_t)bytes || sys_mem_seek_data(memfd, offset) != (int64_t)offset)
		return n;
	/* no memory for a mapping, say: what the file holds is written in place */
	n = pwrite(memfd, from, bytes, (off_t)offset);
	return n < 0 ? -errno : n;
}

int sys_mem_place(int memfd, const void *from, size_t bytes, uint64_t offset)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	void *at = uffd < 0 ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, (off_t)offset);
	int error = at == MAP_FAILED ? -errno : uffd_ioctl(uffd, UFFDIO_API, &api);
	uint64_t done;

	if (!error)
		error = sys_uffd_register(uffd, (uintptr_t)at, bytes, UFFDIO_REGISTER_MODE_MISSING);
	if (!error)
		error = sys_uffd_copy(uffd, (uintptr_t)at, from, bytes, false, &done);
	if (at != MAP_FAILED)
		munmap(at, bytes);
	if (uffd >= 0)
		close(uffd);
	return error;
}

int sys_mem_punch(int memfd, uint64_t offset, uint64_t bytes)
{
	return fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) ? -errno : 0;
}

int64_t sys_mem_seek_data(int memfd, uint64_t offset)
{
	off_t at = lseek(memfd, (off_t)offset, SEEK_DATA);

	return at < 0 ? -errno : at;
}

int64_t sys_mem_seek_hole(int memfd, uint64_t offset)
{
	off_t at = lseek(memfd, (off_t)offset, SEEK_HOLE);

	return at < 0 ? -errno : at;
}

int tierd_page_bytes_of(int memfd, uint64_t *ret)
{
	struct statfs fs;

	if (fstatfs(memfd, &fs))
		return -errno;
	*ret = fs.f_type == HUGETLBFS_MAGIC ? (uint64_t)fs.f_bsize : sys_page_bytes();
	return 0;
}

int sys_huge_open(struct sys_huge *h, int memfd, uint64_t offset, uint64_t bytes, uint64_t page_bytes)
{
	struct uffdio_api api = {.api = UFFD_API,
				 .features = UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS};
	int error;

	h->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (h->uffd < 0)
		return -errno;
	h->bytes = bytes;
	h->page_bytes = page_bytes;
	/* without a reservation: that is the VMM's */
	h->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memfd, (off_t)offset);
	if (h->memory == MAP_FAILED) {
		error = -errno;
		h->memory = NULL;
	} else {
		error = uffd_ioctl(h->uffd, UFFDIO_API, &api);
	}
	if (!error)
		error = sys_uffd_register(h->uffd, (uintptr_t)h->memory, bytes,
					  UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
	if (!error && madvise(h->memory, bytes, MADV_DONTFORK))
		error = -errno;
	if (error)
		sys_huge_close(h);
	return error;
}

void sys_huge_close(struct sys_huge *h)
{
	if (h->memory)
		munmap(h->memory, h->bytes);
	h->memory = NULL;
	close(h->uffd);
}

/* CONTINUE maps what is there. Unmapped again, so that the page has no user more than it had. */
int sys_huge_cached(struct sys_huge *h, uint64_t at)
{
	int error, tries = 0;

	do
		error = sys_uffd_continue(h->uffd, (uintptr_t)h->memory + at, h->page_bytes);
	while (error == -EAGAIN && tries++ < AGAIN_MAX);
	if (error == -EFAULT)
		return 0;
	if (error && error != -EEXIST)
		return error;
	return madvise(h->memory + at, h->page_bytes, MADV_DONTNEED) ? -errno : 1;
}

int sys_huge_place(struct sys_huge *h, uint64_t at, const void *from)
{
	uint64_t done;
	int error = sys_uffd_copy(h->uffd, (uintptr_t)h->memory + at, from, h->page_bytes, false, &done);

	if (error)
		return error;
	return madvise(h->memory + at, h->page_bytes, MADV_DONTNEED) ? -errno : 0;
}

ssize_t sys_store_read(int fd, void *to, size_t bytes, uint64_t offset)
{
	ssize_t n = pread(fd, to, bytes, (off_t)offset);

	return n < 0 ? -errno : n;
}

ssize_t sys_store_write(int fd, const struct iovec *from, int count, uint64_t offset)
{
	ssize_t n = pwritev(fd, from, count, (off_t)offset);

	return n < 0 ? -errno : n;
}

int sys_store_sync(int fd)
{
	return fdatasync(fd) ? -errno : 0;
}

int sys_store_discard(int fd, uint64_t offset, uint64_t bytes)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) ? -errno : 0;
}

int sys_store_drop_cache(int fd, uint64_t offset, uint64_t bytes)
{
	return -posix_fadvise(fd, (off_t)offset, (off_t)bytes, POSIX_FADV_DONTNEED);
}

int64_t sys_pool_bytes(int fd)
{
	struct stat st;

	return fstat(fd, &st) ? -errno : st.st_size;
}

ssize_t sys_pool_read(int fd, void *to, size_t bytes, uint64_t offset)
{
	ssize_t n = pread(fd, to, bytes, (off_t)offset);

	return n < 0 ? -errno : n;
}

int sys_pool_resize(int fd, uint64_t bytes)
{
	return ftruncate(fd, (off_t)bytes) ? -errno : 0;
}

int sys_pool_map(int fd, uint64_t bytes, void **memory, bool *locked)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int error = 0;

	if (at == MAP_FAILED)
		return -errno;
	/* a guest's memory has no business in a core dump, nor in a child */
	if (madvise(at, bytes, MADV_DONTDUMP) || madvise(at, bytes, MADV_DONTFORK))
		error = -errno;
	*locked = !error && !mlock2(at, bytes, MLOCK_ONFAULT);
	if (error)
		munmap(at, bytes);
	else
		*memory = at;
	return error;
}

void sys_pool_unmap(void *memory, uint64_t bytes)
{
	munmap(memory, bytes);
}

int sys_pool_reserve(int fd, void *at, uint64_t offset, uint64_t bytes)
{
	if (fallocate(fd, 0, (off_t)offset, (off_t)bytes))
		return -errno;
	/* all at once what writing would fault in page by page; before Linux 5.14 it does */
	if (madvise(at, bytes, MADV_POPULATE_WRITE) && errno != EINVAL)
		return -errno;
	return 0;
}

int sys_pool_punch(int fd, uint64_t offset, uint64_t bytes)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) ? -errno : 0;
}

int sys_pool_data(int fd, uint64_t offset, uint64_t *start, uint64_t *end)
{
	off_t from = lseek(fd, (off_t)offset, SEEK_DATA), to;

	if (from < 0)
		return -errno;
	to = lseek(fd, from, SEEK_HOLE);
	if (to < 0)
		return -errno;
	*start = (uint64_t)from;
	*end = (uint64_t)to;
	return 0;
}

void *sys_alloc_sparse(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	mlock2(memory, bytes, MLOCK_ONFAULT); /* an ordinary user may not lock so much */
	return memory;
}
