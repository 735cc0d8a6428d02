/*
 * sys.h: every system call that the data plane makes on a guest's behalf, one thin wrapper each.
 *
 * sys.c has the real ones. The seeded driver (tests/native) links a model kernel in their place: this header is the seam, so
 * nothing else in the data plane (table.c, guest.c, fault.c, scan.c, evict.c, store.c) may call the kernel about a guest.
 * All return -errno on failure. Nothing here allocates, logs or retries: EINTR and EAGAIN are the caller's.
 */
#ifndef TIERD_SYS_H
#define TIERD_SYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <linux/userfaultfd.h>

struct sys_page_region { /* struct page_region of PAGEMAP_SCAN */
	uint64_t start, end, categories;
};
enum {
	SYS_PAGE_PRESENT = 1 << 3,
	SYS_PAGE_SWAPPED = 1 << 4,
	SYS_PAGE_WRITTEN = 1 << 1,
	SYS_PAGE_HUGE = 1 << 6,
	SYS_PAGE_FILE = 1 << 2
};
/* Only on a kernel that is rwp: on one that is rfc the same bits mean something else. */
enum { SYS_RWP_ACCESSED = 1 << 9, SYS_RWP_REGISTER_MODE = 1 << 3, SYS_RWP_FAULT = 1 << 3 };
/* Only on one that is rfc. */
enum { SYS_RFC_DEACTIVATED = 1 << 9 };

uint64_t
sys_now_ns(void); /* CLOCK_MONOTONIC: the same for every process of a boot, so it dates pages across a restart */
size_t sys_page_bytes(void);
void sys_pause_us(uint32_t us);

/* descriptors of a guest are duplicated, so that their owner may close them; memory comes page aligned, zeroed and locked */
int sys_dup(int fd);
void sys_close(int fd);
void *sys_alloc(size_t bytes);
void sys_free(void *memory, size_t bytes);

/* userfaultfd: addresses are the VMM's */
int sys_uffd_register(int uffd, uint64_t address, uint64_t bytes, uint64_t mode);
int sys_uffd_unregister(int uffd, uint64_t address, uint64_t bytes);
int sys_uffd_protect(int uffd, uint64_t address, uint64_t bytes);   /* WRITEPROTECT on */
int sys_uffd_unprotect(int uffd, uint64_t address, uint64_t bytes); /* WRITEPROTECT off; wakes the range */
int sys_uffd_wake(int uffd, uint64_t address, uint64_t bytes);
/* *done: bytes placed and woken, also when an error is returned after a part (then -EAGAIN, or the error that stopped it) */
int sys_uffd_copy(int uffd, uint64_t address, const void *from, uint64_t bytes, bool protect, uint64_t *done);
int sys_uffd_poison(int uffd, uint64_t address, uint64_t bytes);
int sys_uffd_continue(int uffd, uint64_t address, uint64_t bytes); /* maps what the page cache has; wakes */
/* generation rwp (Linux 7.3) */
int sys_rwp_protect(int uffd, uint64_t address, uint64_t bytes);
int sys_rwp_unprotect(int uffd, uint64_t address, uint64_t bytes); /* wakes the range */
int sys_rwp_set_async(int uffd, bool async);                       /* on: wakes everybody */
/* generation rfc (2026-04) */
int sys_rfc_deactivate(int uffd, uint64_t address, uint64_t bytes);
int sys_rfc_set_async(int uffd, bool async); /* on: wakes everybody */
/* anonymous memory of our own, for trials; a guest's is moved by its VMM: sys_inside_run */
int64_t sys_uffd_move(int uffd, uint64_t to, uint64_t from, uint64_t bytes);
/* number of messages read (never 0), -EAGAIN when there is none */
ssize_t sys_uffd_read(int uffd, struct uffd_msg *messages, size_t count);

/* page tables of the VMM */
struct sys_scan { /* what PAGEMAP_SCAN looks for: all of `all_of` set, and any of `any_of`, those of `inverted` turned round before */
	uint64_t inverted, all_of, any_of;
};
/* Regions that match; of their categories those of `any_of` as they are, and SYS_PAGE_HUGE. Returns
 * how many were filled, *walk_end says where the walk ended. -ENOTTY or -EINVAL where the kernel has no PAGEMAP_SCAN. */
ssize_t sys_pagemap_scan(int pagemap, uint64_t start, uint64_t end, struct sys_scan wanted,
			 struct sys_page_region *regions, size_t count, uint64_t *walk_end);
/* 64-bit entries of /proc/PID/pagemap; returns bytes read */
ssize_t sys_pagemap_read(int pagemap, uint64_t *entries, size_t count, uint64_t address);
/* Idle page tracking (Documentation/admin-guide/mm/idle_page_tracking.rst). `entry`: of a pagemap. get: 1: nobody has touched the page
 * since set; 0: somebody has, or the kernel does not track it. -EINVAL: the entry shows no page frame. */
int sys_idle_get(int idle, uint64_t entry);
int sys_idle_set(int idle, uint64_t entry);
/* process_madvise(MADV_PAGEOUT); returns bytes advised */
ssize_t sys_pageout(int pidfd, const struct iovec *ranges, size_t count);
/* madvise(MADV_DONTNEED) executed by thread tid of the VMM: unmaps, the file keeps the bytes */
int sys_zap_inside(int tid, uint64_t address, uint64_t bytes, uint64_t *stopped_ns);

/* private anonymous memory of the VMM: /proc/PID/mem, which answers EIO where a page is missing and never waits for it */
ssize_t sys_vmm_read(int mem, void *to, size_t bytes, uint64_t address);
/* The same with one copy less, and it waits where a page is missing: process_vm_readv. */
ssize_t sys_vmm_copy(int32_t pid, void *to, size_t bytes, uint64_t address);

/* Batches of calls made by thread tid of the VMM, in one stop: calls.c. A batch goes on when we die. */
struct sys_inside {
	int32_t pid, tid;
	int32_t mem; /* /proc/PID/mem */
	int32_t uffd_in_vmm;
	uint64_t area; /* from sys_inside_create */
};
struct sys_inside_call {
	enum { SYS_INSIDE_MOVE, SYS_INSIDE_DROP, SYS_INSIDE_REGISTER } what; /* UFFDIO_MOVE; MADV_DONTNEED */
	uint64_t to;                                                         /* of a move */
	uint64_t mode;                                                       /* of UFFDIO_REGISTER */
	uint64_t from, bytes;
	int64_t result; /* bytes moved, 0, or -errno */
};
enum { SYS_INSIDE_MAX = 64 };
int sys_inside_create(int32_t tid, uint64_t *area);
/* The first *done of the calls were made: in a stop that took too long, not all of them. -EINPROGRESS: the thread does not come to
 * the end of a call. On other errors none was made. */
int sys_inside_run(const struct sys_inside *in, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
		   uint64_t *stopped_ns);
/* What of seccomp the thread has: a number that changes with a filter more. -errno: it is gone, say. */
int64_t sys_filters(int32_t tid);
/* Nothing of a batch will be made any more once this is 0, -ESRCH or -EFAULT; else it may be under way still. By anybody: a successor,
 * too. */
int sys_inside_settle(const struct sys_inside *in);

/* the memory file */
ssize_t sys_mem_read(int memfd, void *to, size_t bytes, uint64_t offset);
/* Whole pages. A page that the file does not hold is made for itself alone: write(2) may make a large folio there, and what is
 * stored of its neighbours would be zeros in memory. */
ssize_t sys_mem_write(int memfd, const void *from, size_t bytes, uint64_t offset);
/* One page that the file does not hold (-EEXIST: it does), in whole or not at all, whenever we are killed. A mapping that is written to is
 * given a page of zeros first, and who dies before its bytes are there leaves what a successor would take for the guest's. */
int sys_mem_place(int memfd, const void *from, size_t bytes, uint64_t offset);
int sys_mem_punch(int memfd, uint64_t offset, uint64_t bytes);
/* first offset >= offset that holds data; -ENXIO when there is none */
int64_t sys_mem_seek_data(int memfd, uint64_t offset);
int64_t sys_mem_seek_hole(int memfd, uint64_t offset);

/*
 * A memory file of hugetlbfs: SEEK_DATA calls all of it data, and it has no write(2). So it is looked at and written to through a
 * mapping of ours with a userfaultfd of ours: nobody touches it, and the VMM's page table is left alone. `at`: from `offset` on.
 */
struct sys_huge {
	uint8_t *memory; /* NULL: none */
	uint64_t bytes, page_bytes;
	int uffd;
};
int sys_huge_open(struct sys_huge *h, int memfd, uint64_t offset, uint64_t bytes, uint64_t page_bytes);
void sys_huge_close(struct sys_huge *h);
int sys_huge_cached(struct sys_huge *h, uint64_t at);                  /* 1: the file holds the page; 0: it is a hole */
int sys_huge_place(struct sys_huge *h, uint64_t at, const void *from); /* a page for a hole; -EEXIST: it is none */

/* the store's file */
ssize_t sys_store_read(int fd, void *to, size_t bytes, uint64_t offset);
ssize_t sys_store_write(int fd, const struct iovec *from, int count, uint64_t offset);
int sys_store_sync(int fd);
int sys_store_discard(int fd, uint64_t offset, uint64_t bytes);
int sys_store_drop_cache(int fd, uint64_t offset, uint64_t bytes);

/*
 * A pool's file on tmpfs (pool.c), mapped shared and in full. A hole must not be touched: on a full file system that is a signal. So
 * space is reserved first; what was reserved, and what a punch left alone, reads as it was written.
 */
int64_t sys_pool_bytes(int fd); /* of the file */
ssize_t sys_pool_read(int fd, void *to, size_t bytes, uint64_t offset);
int sys_pool_resize(int fd, uint64_t bytes);
/* *locked: the host's reclaim leaves alone what will be in it; false without the right to lock so much */
int sys_pool_map(int fd, uint64_t bytes, void **memory, bool *locked);
void sys_pool_unmap(void *memory, uint64_t bytes);
/* Space for [offset, offset + bytes), mapped at `at` and ready to be written; zeros where there was a hole. -ENOSPC leaves holes. */
int sys_pool_reserve(int fd, void *at, uint64_t offset, uint64_t bytes);
int sys_pool_punch(int fd, uint64_t offset, uint64_t bytes);
/* The next piece at or after `offset` that was reserved and touched; -ENXIO: there is none. */
int sys_pool_data(int fd, uint64_t offset, uint64_t *start, uint64_t *end);
/* Zeroed memory that is taken page by page when it is touched, and locked then, where that is allowed; NULL: no room. */
void *sys_alloc_sparse(size_t bytes); /* sys_free gives it back */

#endif
