/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model.h: a kernel small enough to be believed, behind the seam of tierd/native/sys.h.
 *
 * One VMM address space, its memory files, one userfaultfd and one store, at page granularity. What each call does is what
 * userfaultfd(2), ioctl_userfaultfd(2), PAGEMAP_SCAN and experiments on Linux 6.18 say; for rwp and rfc, what their
 * descriptions and the kernels of tests/kernels say. Every call yields to the scheduler
 * before, after and between pages; a daemon that is killed inside a call goes on in the kernel until the call ends.
 */
#ifndef TIERD_MODEL_H
#define TIERD_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "sys.h"

enum {
	MODEL_PAGE_BYTES = 64,
	MODEL_BASE_BYTES = 16, /* where the guest's pages are huge */
	MODEL_PAGES_MAX = 64,
	MODEL_LARGE_PAGES = 8, /* of a large folio: as of a page of 64 bytes with entries of 8 */
	MODEL_REGIONS_MAX = 3,
	MODEL_THREADS_MAX = 8,
	MODEL_LATE_MAX = 256
};
enum { MODEL_FILES = 2, MODEL_POOL = MODEL_FILES, MODEL_STORES };
enum {
	FD_UFFD = 1000,
	FD_PIDFD,
	FD_PAGEMAP,
	FD_VMM,
	FD_IDLE,
	FD_STORE /* + file */,
	FD_POOL = FD_STORE + MODEL_FILES,
	FD_MEM /* + region */
};
enum { MODEL_STAGING = 0x80000, MODEL_CALLS_MAX = 64 }; /* from a region's address to its staging area's */

struct model_faults { /* how often what goes wrong, in 1/1000 of the calls */
	/* punch_stays: zeroed and cached, as a large folio may; of hugetlbfs the punch is refused */
	uint32_t discard_fails; /* each so many-th */
	uint32_t copy_nomem, copy_again, protect_fails, store_eio, store_short, sync_loses, punch_stays;
	uint32_t read_eio, read_short, read_flip;
	uint32_t pool_refuses, pool_full;
	uint32_t odd_answers;                               /* of WRITEPROTECT, POISON, PAGEOUT */
	uint32_t resolve_fails, register_fails, mode_fails; /* not of a stock kernel, whose seeds stay what they are */
	uint32_t move_busy, miscounts, enter_fails, cut_short; /* of anonymous memory */
};

enum model_access { ACCESS_MADE, ACCESS_WAITS, ACCESS_POISONED };

struct model_region {
	uint64_t address, offset;
	uint32_t first_page, pages;
};

/* What reads give, what is on the device, what of the former is not yet on the latter; stored copies that were destroyed (by other
 * bytes, or they cannot be read), and what they were. The pool is in memory: it has no device, and no numbers of pages (model_pool.c). */
struct model_store {
	uint64_t bytes[MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8], device[MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8];
	bool dirty[MODEL_PAGES_MAX], sync_error;
	uint32_t discards;
	bool destroyed[MODEL_PAGES_MAX], unreadable[MODEL_PAGES_MAX];
	uint64_t intact[MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8];
};

struct model {
	uint32_t pages, regions;
	struct model_region region[MODEL_REGIONS_MAX];
	struct model_faults faults;
	uint32_t read_pauses, write_pauses; /* how long a read or a write of the store takes */
	bool direct;                        /* the store is opened with O_DIRECT */
	bool late_io; /* the store is served elsewhere: what a killed thread has asked for goes on there, and ends some day */
	_Atomic uint64_t now_ns;
	/* page cache */
	bool cached[MODEL_PAGES_MAX];
	bool idle[MODEL_PAGES_MAX];    /* of its page frame: nobody has touched it since that was asked for */
	bool zeroed[MODEL_PAGES_MAX];  /* by a punch that left it there */
	bool swapped[MODEL_PAGES_MAX]; /* still in the file, but to be read from swap first */
	uint64_t bytes[MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8];
	/* page table of the VMM */
	uint64_t arrived[MODEL_PAGES_MAX]; /* what the last COPY brought */
	bool present[MODEL_PAGES_MAX], protected[MODEL_PAGES_MAX], marker[MODEL_PAGES_MAX], poisoned[MODEL_PAGES_MAX];
	bool rwp_protected[MODEL_PAGES_MAX];
	bool large_entries; /* shared memory is in large folios, and a first touch maps one by one entry */
	bool mapped_large[MODEL_PAGES_MAX];
	bool wp[MODEL_PAGES_MAX], missing[MODEL_PAGES_MAX]; /* registered modes */
	bool minor[MODEL_PAGES_MAX], rwp[MODEL_PAGES_MAX];
	uint32_t generation; /* TIERD_ENGINE_*: what kind of kernel it is */
	bool async;          /* RWP_ASYNC or MINOR_ASYNC is on */
	bool gone;           /* the VMM has ended, and its memory with it: the files are there still */
	bool huge;           /* the memory files are of hugetlbfs: a page of theirs is several of the system's */
	uint32_t under_way;  /* faults that have seen the mode and are not done */
	/* private anonymous memory: `cached` is `present`; a staging area; a thread of the VMM that makes calls of a batch */
	bool anon;
	uint32_t border; /* where another mapping begins; 0: nowhere */
	bool staged[MODEL_PAGES_MAX];
	uint64_t staged_bytes[MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8];
	struct sys_inside_call calls[MODEL_CALLS_MAX];
	uint32_t calls_count, calls_done;
	bool calls_run, calls_cancelled;
	bool no_remap; /* a move is being made, or is the next call: that gap is not closed */
	struct model_store store[MODEL_STORES];
	uint32_t pool_index[MODEL_PAGES_MAX]; /* where in the pool the page is, counted from 1; 0: it is not there */
	uint64_t pool_object[2 * MODEL_PAGES_MAX][MODEL_PAGE_BYTES / 8];
	bool pool_changes;              /* somebody is inside of a call that changes it */
	bool may_fail[MODEL_PAGES_MAX]; /* the guest may get a memory error there */
	struct {
		bool discard;
		uint32_t file;
		uint64_t page, bytes[MODEL_PAGE_BYTES / 8];
	} late[MODEL_LATE_MAX];
	uint32_t late_count;
	/* one message a waiting guest thread at most */
	struct {
		bool waiting, unread;
		uint32_t page;
		uint64_t flags;
	} waiter[MODEL_THREADS_MAX];
};

extern struct model M;

/* the scheduler's side (driver.c) */
void model_pause(void);                  /* another coroutine may run */
void model_enter(void);                  /* a system call begins ... */
void model_exit(void);                   /* ... and ends: a killed daemon's coroutine ends here */
bool model_dying(void);                  /* the caller of this system call was killed */
bool model_chance(uint32_t thousandths); /* seeded */
void *model_alloc(size_t bytes);
void model_free(void *memory, size_t bytes);
void model_swapped_in(void); /* the caller waits for swap */
_Noreturn void model_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* the guest's side: one try of an access. Made: *value read or written, the whole page at once. Waits: a fault was raised,
 * the thread waits for its waiter slot to be cleared. Poisoned: a memory error. */
enum model_access model_access(uint32_t thread, uint32_t page, bool write, uint64_t *value);
void model_give_back(
	uint32_t
		page); /* MADV_REMOVE by the VMM itself; always leaves a hole, large folios or not: it reads zeros anyway */
void model_zap(uint32_t page); /* MADV_DONTNEED by the VMM itself: poison goes, markers of a hold stay */
/* The host unmaps a page that the file holds: it swaps the page out, or splits a large folio that the page is in. */
void model_reclaim(uint32_t page, bool swap_out);
void model_inside(void); /* the VMM's thread, while there is a batch: to its end */
bool model_remap(
	uint32_t page); /* the VMM maps the file there anew: not registered with anybody. False: not just now */
bool model_unread(void);

/* the store's side */
void model_write_back(void); /* the host's kernel writes a dirty page of the store, or fails to */
void model_destroy(uint32_t store, uint32_t page);
void model_repair(uint32_t page);                      /* in all stores */
uint64_t *model_stored(uint32_t store, uint32_t page); /* its bytes; NULL: it is not there */
void model_late_lands(void);                           /* one request that outlived its daemon, if there is one */

#endif
