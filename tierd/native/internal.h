/* SPDX-License-Identifier: Apache-2.0 */
/*
 * internal.h: what the files of the data plane share, and the theory of the page table.
 *
 * One 32-bit word a page, in a file that outlives the process. Whoever moves a word by compare-and-swap into RESOLVING,
 * LEAVING, DROPPING or ARRIVING owns the page until it moves it on; nobody issues an ioctl on a page that it does not own.
 * LEAVING is the one state whose owner can lose the page: a fault takes it (-> RESOLVING) and the eviction finds out at its
 * next compare-and-swap. There is one evictor a guest ("the worker"), so a page that left LEAVING cannot be LEAVING again
 * within the same batch.
 *
 *   state      the truth is in                          who may move it on
 *   RESIDENT   guest memory (or a hole: zeros)          fault thread -> RESOLVING; worker -> LEAVING
 *   RESOLVING  guest memory                             its owner -> RESIDENT
 *   LEAVING    guest memory; held or about to be        worker -> DROPPING, RESIDENT; fault thread -> RESOLVING
 *   DROPPING   the tier, durably; punch under way       worker -> STORED once seen to be a hole, RESIDENT when written back
 *   STORED     the tier                                 fault thread or restore -> ARRIVING
 *   STAGING    guest memory or the staging area,        worker -> STORED, RESIDENT
 *              whichever has it
 *   MOVING     the old tier                             worker -> DROPPING, STORED; fault thread -> ARRIVING
 *   ARRIVING   the tier until the COPY, then memory     its owner -> RESIDENT, STORED (COPY refused), LOST
 *   LOST       nowhere; poisoned, or its waiters blocked    an operator's `tierd retry` -> ARRIVING
 */
#ifndef TIERD_INTERNAL_H
#define TIERD_INTERNAL_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stddef.h>

#include "crypto.h"
#include "pool.h"
#include "sys.h"
#include "tierd.h"

#ifdef TIERD_MODEL
void tierd_model_yield(void);
#define TIERD_YIELD() tierd_model_yield()
#else
#define TIERD_YIELD() ((void)0)
#endif

enum { STORING_LANES = 4 }; /* batches whose stores are watched each by itself */
enum page_state { RESIDENT, RESOLVING, LEAVING, DROPPING, STORED, MOVING, ARRIVING, LOST, STAGING, PAGE_STATES };
_Static_assert((int)PAGE_STATES == TIERD_STATES, "counters");

enum { TIER_ZERO = 0, TIER_STAGING = TIERD_TIER_STAGING, TIER_GUEST = TIERD_TIER_GUEST, TIER_UNTOUCHED = TIER_GUEST };

/* word: state 0-3, tier 4-7, copy 8 (the tier holds space for this page), generation 9-13, clean 14 (it was fetched from there, is
 * write-protected since, and nobody has asked to write: RESIDENT and LEAVING only), refused 15 (the pool did not take it, and it was
 * not touched since), epoch 16-31 */
typedef uint32_t page_word;

static inline enum page_state word_state(page_word w)
{
	return w & 0xf;
}

static inline unsigned int word_tier(page_word w)
{
	return w >> 4 & 0xf;
}

static inline bool word_copy(page_word w)
{
	return w >> 8 & 1;
}

static inline uint16_t word_epoch(page_word w)
{
	return (uint16_t)(w >> 16);
}

static inline page_word word_with_state(page_word w, enum page_state state)
{
	return (w & ~0xfu) | (page_word)state;
}

static inline page_word word_with_tier(page_word w, unsigned int tier)
{
	return (w & ~0xf0u) | tier << 4;
}

static inline page_word word_with_copy(page_word w, bool copy)
{
	return (w & ~0x100u) | (page_word)copy << 8;
}

static inline bool word_clean(page_word w)
{
	return w >> 14 & 1;
}

static inline page_word word_with_clean(page_word w, bool clean)
{
	return (w & ~0x4000u) | (page_word)clean << 14;
}

static inline page_word word_with_epoch(page_word w, uint16_t epoch)
{
	return (w & 0xffffu) | (page_word)epoch << 16;
}

static inline page_word word_next_generation(page_word w)
{
	return (w & ~0x3e00u) | ((w + 0x200u) & 0x3e00u);
}

static inline bool word_refused(page_word w)
{
	return w >> 15 & 1;
}

static inline page_word word_with_refused(page_word w, bool refused)
{
	return (w & ~0x8000u) | (page_word)refused << 15;
}

/* RESIDENT, touched at this epoch: what the pool said of the page as it was says nothing any more. */
static inline page_word word_touched(page_word w, uint16_t epoch)
{
	return word_with_refused(word_with_epoch(word_with_state(w, RESIDENT), epoch), false);
}

/* A fault thread's, which lifts the protection: whatever it is, it is clean no more. */
static inline page_word word_resolving(page_word w)
{
	return word_with_clean(word_with_state(w, RESOLVING), false);
}

/* A store holds space for the page. */
static inline bool word_takes_space(page_word w)
{
	return word_copy(w) && word_tier(w) != TIER_STAGING;
}

/* Fetched from the staging area, whose room is not given back yet. */
static inline bool word_spent(page_word w)
{
	return word_state(w) == RESIDENT && word_copy(w) && word_tier(w) == TIER_STAGING;
}

static inline bool word_staged(page_word w)
{
	return word_state(w) == STORED && word_tier(w) == TIER_STAGING;
}

static inline bool word_untouched(page_word w)
{
	return word_state(w) == RESIDENT && word_tier(w) == TIER_UNTOUCHED;
}

struct table_header {
	char magic[8];
	uint32_t version;
	uint32_t region_count;
	uint64_t pages;
	struct tierd_identity identity;
	struct tierd_region regions[TIERD_REGIONS_MAX];
	uint32_t checksum; /* of everything between magic and this */
	struct tierd_serving serving;
};

enum { TABLE_HEADER_BYTES = 65536 }; /* a multiple of every page size we run on */

struct region {
	uint64_t address, bytes, offset;
	uint64_t first_page, pages;
	int memfd;
	uint64_t staging;     /* address in the VMM; 0: not of anonymous memory */
	struct sys_huge huge; /* of hugetlbfs, and there is a memfd */
};

/* counters of struct tierd_counters that are kept as they happen; the rest is counted from the table */
struct counters {
	_Atomic uint64_t faults_fetch, faults_zero, faults_cancel, faults_resolve, faults_wait, faults_failed;
	_Atomic uint64_t pages_fetched, pages_readahead, pages_restored;
	_Atomic uint64_t pages_evicted, pages_evicted_zero, pages_cancelled, pages_lost, pages_repaired;
	_Atomic uint64_t pages_unwritten, pages_demoted, pages_refused, pages_staged, pages_unmovable, faults_staged,
		pages_refaulted;
	_Atomic uint64_t store_read_errors, store_write_errors, checksum_errors, kernel_errors, last_errno;
	_Atomic uint64_t inject_stops, inject_stopped_ns, stop_buckets[TIERD_LATENCY_BUCKETS];
	_Atomic uint64_t large_folios_split;
	_Atomic uint64_t faults_window, windows, window_sum_ns, window_buckets[TIERD_LATENCY_BUCKETS];
	_Atomic uint64_t latency_count, latency_sum_ns, latency_buckets[TIERD_LATENCY_BUCKETS];
};

struct tier_count {
	_Atomic uint64_t written_pages, read_pages, refused_pages, write_errors, read_errors, checksum_errors;
	_Atomic uint64_t read_sum_ns, read_buckets[TIERD_LATENCY_BUCKETS];
};

/* a word of a bitmap; few in the model, whose guests are small */
#ifdef TIERD_MODEL
enum { GROUP_PAGES = 4 };
#else
enum { GROUP_PAGES = 64 };
#endif

enum { AGAIN_MAX = 1000 };

struct tierd_guest;

/* What an engine does to pages: engine.c. Runs in the worker, but for `resolve`. */
struct engine {
	uint64_t mode, mode_missing; /* of UFFDIO_REGISTER: at attach, and for a chunk whose pages may leave */
	struct sys_scan
		scan; /* for pages that were touched since their deactivation; any_of: the category that says so */
	bool protects_fetched; /* a page that is fetched can be write-protected, and who writes to it is a fault */
	bool reads_unseen;     /* of anonymous memory: who reads is found out in the staging area */
	bool holds_mapped;     /* a page that is mapped and was not touched waits in sync mode */
	int (*deactivate)(struct tierd_guest *g, struct iovec *ranges, size_t count, struct tierd_pass *ret);
	int (*hold)(struct tierd_guest *g, uint64_t page, uint64_t count);
	int (*release)(struct tierd_guest *g, uint64_t page, uint64_t count); /* wakes, too */
	int (*resolve)(struct tierd_guest *g, uint64_t page, uint64_t flags); /* a fault on a page that stays; wakes */
	int (*set_async)(int uffd, bool async); /* NULL: there is no sync mode, and no window */
};

struct tierd_thread; /* a fault thread: thread.c */
struct parking;      /* faults that wait for the store: park.c */
struct asking;       /* pages that Python brings: ask.c */

struct parked {
	uint64_t page;
	page_word owned;    /* its word: ARRIVING */
	bool was_moving;    /* before that */
	bool to_write;      /* who waits wants to write */
	uint32_t pause_us;  /* before the next try; 0: not tried yet */
	uint64_t fault_ns;  /* when the guest faulted */
	uint64_t failed_ns; /* when a read failed first; 0: none has */
	uint64_t due_ns;    /* when to try next */
};

/* A run of pages that Python is asked for, all ARRIVING: ask.c. */
struct request {
	struct parked first; /* its `owned` is not used */
	uint32_t number, count;
	bool demand; /* a thread of the guest waits for the first page; else nobody does: an order to bring them back */
	bool was_lost; /* before that */
	uint64_t asked_ns;
	/* the answer: bytes of the first `good` pages, or an error */
	uint32_t good;
	int error;
	const uint8_t *bytes;
};

struct tierd_guest {
	const struct engine *engine;
	int uffd, pidfd, pagemap, mem, table_fd;
	int zap, inject_tid;
	int64_t filters; /* that this thread had when it was chosen: sys_filters */
	bool use_pagemap;
	uint64_t page_bytes;
	uint32_t chunk_pages;
	bool huge;      /* hugetlbfs */
	bool anon;      /* private anonymous memory */
	uint8_t *zeros; /* a page of it; NULL: fault.c has enough of its own */
	uint32_t spin_us_max, follow;
	uint32_t readahead_max; /* what the workers' buffers hold */
	_Atomic uint32_t readahead_pages;

	uint64_t pages;
	uint32_t region_count;
	struct region regions[TIERD_REGIONS_MAX];
	struct tierd_range mapped[TIERD_RANGES_MAX]; /* of the regions: where the VMM maps them still */
	uint32_t mapped_count;
	struct tierd_tier tiers[TIERD_TIERS];
	struct page_cipher *ciphers[TIERD_TIERS]; /* of files that are encrypted; NULL: others */
	unsigned int pool_tier;                   /* the one that is a pool; 0: none is */
	struct pool *pool; /* NULL also where its file is damaged: what is in there cannot be had */
	_Atomic uint64_t capacity_bytes[TIERD_TIERS];
	_Atomic uint64_t copies[TIERD_TIERS]; /* words with the copy bit; written by the worker only */
	struct pool_reader *reader;           /* the worker's own; NULL: there is no pool */
	struct tier_count tier_counts[TIERD_TIERS];

	struct table_header *header; /* the mapped state file */
	size_t table_bytes;
	_Atomic page_word *words;
	/* when every page of a group was last seen touched: one store for all of them */
	_Atomic uint16_t *groups;
	_Atomic uint8_t *heat;     /* by group: staged pages were read, so often (stage.c) */
	_Atomic uint8_t *refaults; /* by group: so many pages since the worker has asked */
	_Atomic bool split_large;
	/* of stored pages the checksum, or the word that fills them (TIER_ZERO); written by the worker before DROPPING, read by the
	 * owner of ARRIVING */
	uint64_t *sums;
	uint64_t epoch_ns, epoch_zero_ns;

	_Atomic bool worker_busy;
	uint8_t *missing; /* one a chunk: MISSING is registered; the worker's own */
	uint64_t chunks;
	_Atomic uint64_t missing_chunks;
	uint64_t *touched, *other;    /* bitmaps of one chunk; the worker's own */
	_Atomic uint64_t spent_pages; /* about: fetched, and their room in the staging area is not given back */
	uint16_t *aged;  /* one a chunk: when a pass last looked for ages that would wrap; the worker's own */
	uint64_t *large; /* bitmap of the guest, the worker's own: seen mapped by a large entry that begins here */
	uint64_t *
		quarantine; /* bitmap of the guest: adoption's, then only read by the worker; NULL: nothing lands late */
	_Atomic uint64_t quarantined_pages;
	int idle_fd; /* idle page tracking, where reads are not seen otherwise; -1: the kernel has none */
	uint8_t *
		idle_asked; /* one a page, the worker's own: after which pass the kernel was asked to watch it; 0: never */
	uint8_t idle_round;               /* of passes: 1 to 255 */
	uint32_t looks;                   /* in this call */
	_Atomic bool filing[TIERD_TIERS]; /* a batch is being written to the file, and not synced yet */
	_Atomic uint64_t worker_io_since_ns;
	_Atomic uint64_t storing_since_ns
		[STORING_LANES];     /* of batches: what they write to files is written by threads of their own */
	struct tierd_batch *batches; /* all that there are; the worker's own */
	struct tierd_worker *restorer;

	struct parking *parking;
	_Atomic uint32_t parked_pages, readers;
	struct asking *asking; /* NULL: no tier is asked */
	uint64_t *garbage
		[TIERD_TIERS];   /* bitmaps of the guest, the worker's own: what a tier that is asked need not keep */
	int asked_fd, answer_fd; /* eventfds: rung for Python, and for fault threads */
	_Atomic uint32_t asked_pages, answers;
	_Atomic uint64_t read_deadline_ns;
	_Atomic uint32_t on_lost;   /* TIERD_LOST_* */
	_Atomic uint32_t poisoning; /* fault threads that are about to poison a LOST page */
	struct tierd_store_faults store_faults;
	_Atomic bool store_faults_on;
	_Atomic uint64_t store_faults_state;

	_Atomic bool in_window; /* sync mode, that is */
	_Atomic uint32_t
		holding; /* batches; from before a hold until it is lifted, which unprotects what was fetched in between */
	_Atomic uint64_t waits; /* faults that were left to the owner of their page: fault.c, wake_waiters */
	struct counters count;
	pthread_mutex_t threads_lock;
	struct tierd_thread *threads; /* newest first; under the lock */
	_Atomic uint32_t thread_count;
	_Atomic bool stopping;
	int stop_fd;
	size_t bytes; /* of this allocation */
};

/* table.c */
static inline page_word page_load(struct tierd_guest *g, uint64_t page)
{
	TIERD_YIELD();
	return atomic_load_explicit(&g->words[page], memory_order_acquire);
}

/* True when the word was `from` and is now `to`. An illegal move aborts: a table that cannot be trusted must not be used. */
bool page_move(struct tierd_guest *g, uint64_t page, page_word from, page_word to);
uint16_t epoch_now(const struct tierd_guest *g);
uint16_t epoch_next(const struct tierd_guest *g); /* the first epoch that lies wholly in the future */
uint32_t page_age(const struct tierd_guest *g, uint64_t page, uint16_t now,
		  page_word w); /* in epochs, never too large */
uint32_t epoch_age(uint16_t now, uint16_t epoch);
/* Of a STORED page: since the guest touched it; of one in the staging area, since it is there. */
uint32_t stored_age(const struct tierd_guest *g, uint64_t page, uint16_t now, page_word w);
int table_map(struct tierd_guest *g);
int table_pin(struct tierd_guest *g); /* in memory */
void table_unmap(struct tierd_guest *g);
uint64_t table_bytes(uint64_t pages);
uint32_t checksum(const void *page, size_t bytes);

/* evict.c */
/* A page that is one word again and again, zeros mostly. */
bool same_filled(const uint8_t *page, size_t bytes);
void fill_with(uint8_t *page, size_t bytes, uint64_t word);

/* guest.c */
struct region *region_of_page(struct tierd_guest *g, uint64_t page);
int64_t page_of_address(struct tierd_guest *g, uint64_t address);
uint64_t address_of(struct tierd_guest *g, uint64_t page);
uint64_t mem_offset_of(const struct region *r, uint64_t page);
/* The offset of the first page at or after `page` that the memory file holds (INT64_MAX: there is none), or -errno. Of hugetlbfs,
 * which can be asked for one page only: one beyond the page's own when it is a hole. For who owns the page. */
int64_t mem_next_data(struct tierd_guest *g, struct region *r, uint64_t page);
/* What COPY meant by EEXIST: 0 when the file really holds the page. hugetlbfs says it, too, when its pool is empty (seen on 6.18),
 * and who believed that would leave a hole, which is filled with zeros at the next touch. For who owns the page. */
int mem_exists(struct tierd_guest *g, uint64_t page);
/* Writes a page that a live process does not map, or maps anew. 0 also when the file holds one already. For who owns the page. */
int mem_put(struct tierd_guest *g, struct region *r, uint64_t page, const void *bytes);
void use_thread(struct tierd_guest *g, int32_t tid); /* for calls inside the VMM */
int may_enter(struct tierd_guest *g);                /* 0, or why no call may be made there now */
int guest_enter(struct tierd_guest *g);              /* the worker's calls: -EBUSY when there is one */
int leave_sync(struct tierd_guest *g);               /* the worker's: back to async mode */
void guest_leave(struct tierd_guest *g);
void count_error(struct tierd_guest *g, _Atomic uint64_t *which, int error);
int missing_register(struct tierd_guest *g, uint64_t page);
/* length of the run of consecutive pages in pages[0..count): the same region, neighbours in it */
uint32_t run_length(struct tierd_guest *g, const uint64_t *pages, uint32_t count);

/* A large entry of the page table maps as many pages as a table of it has entries. */
static inline uint64_t large_pages(const struct tierd_guest *g)
{
	return g->page_bytes / sizeof(uint64_t);
}

#define NO_PAGE UINT64_MAX
/* The first page of what a large entry would map at `page`; NO_PAGE where that begins outside of the region. */
uint64_t large_head(struct tierd_guest *g, uint64_t page);
/* Whether it was seen to be mapped by one, and not split since. The worker's. */
bool was_mapped_large(struct tierd_guest *g, uint64_t page);
/* rfc unmaps as a whole what is mapped large, and who was touched there is not seen any more: all of it counts as touched now. */
void date_large(struct tierd_guest *g, uint64_t page);

/* around the worker's calls of the store, for the watchdog */
static inline void worker_io_begin(struct tierd_guest *g)
{
	atomic_store_explicit(&g->worker_io_since_ns, sys_now_ns(), memory_order_relaxed);
}

static inline void worker_io_end(struct tierd_guest *g)
{
	atomic_store_explicit(&g->worker_io_since_ns, 0, memory_order_relaxed);
}

static inline void count_add(_Atomic uint64_t *counter, uint64_t n)
{
	atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

/* engine.c */
const struct engine *engine_of(uint32_t number, bool anon); /* NULL: no such engine */

/* stage.c */
static inline uint64_t staging_of(const struct region *r, uint64_t page)
{
	return r->staging + (page - r->first_page) * (r->bytes / r->pages);
}
struct sys_inside inside_of(struct tierd_guest *g);
/* All of the calls, in as many stops as they take, and nothing of them is under way afterwards: how many were made. */
int inside_run(struct tierd_guest *g, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
	       uint64_t *stopped_ns);
/* Drops what the staging area holds of the pages [page, page + count), by address. */
struct sys_inside_call drop_of(struct tierd_guest *g, uint64_t page, uint64_t count);
int staged_register(struct tierd_guest *g);
int staged_read(struct tierd_guest *g, uint64_t page, uint32_t count, void *to); /* never waits for a page */
/*
 * The same with one copy less, for the worker and pages that are MOVING. It would wait for one that is missing, and none is: only the
 * worker drops staged pages, and no page that it has not made DROPPING. Where the VMM itself has dropped one, and so has lost it, the
 * fault thread ends the wait: staged_poison. And whatever is read of a process that has the VMM's pid by now goes nowhere:
 * nothing is dropped before it is asked whether the VMM is gone.
 */
int staged_copy(struct tierd_guest *g, uint64_t page, uint32_t count, void *to);
/* A fault at an address of the staging area: whoever waits there, for a page that nobody will bring, gets an error. False: not there,
 * or there is a page now. */
bool staged_poison(struct tierd_guest *g, uint64_t address);
/* Bits of the pages [page, page + count) that the staging area holds; asks until it is told. -ESRCH: the VMM is gone. */
int staged_look(struct tierd_guest *g, uint64_t page, uint64_t count, uint64_t *there);
/* A staged page of the group was wanted / left the host. */
void staged_refault(struct tierd_guest *g, uint64_t page, uint64_t count);
void heat_down(struct tierd_guest *g, uint64_t page);

/* of latency_buckets and window_buckets */
static inline int bucket_of(uint64_t ns)
{
	int bucket = 64 - __builtin_clzll(ns | 1);

	return bucket < TIERD_LATENCY_BUCKETS ? bucket : TIERD_LATENCY_BUCKETS - 1;
}

/* scan.c: bits of `touched` since the deactivation and, where wanted, of `other`: pages of category SYS_PAGE_PRESENT or
 * SYS_PAGE_SWAPPED (a hold's marker, where the page is not present) */
int scan_range(struct tierd_guest *g, uint64_t first_page, uint64_t pages, uint64_t *touched, uint64_t other_category,
	       uint64_t *other);

/* Bits of what is mapped at address, or swapped (markers look like that, too). */
int scan_there(struct tierd_guest *g, uint64_t address, uint64_t pages, uint64_t *there);
int scan_for(struct tierd_guest *g, uint64_t address, uint64_t pages, struct sys_scan wanted, uint64_t *there);

/* Pages that are mapped and carry the uffd bit, and mapped ones that do not. From the entries themselves: PAGEMAP_SCAN says nothing
 * of a mapping that is not registered. */
int scan_protected(struct tierd_guest *g, uint64_t first_page, uint64_t pages, uint64_t *bare, uint64_t *protected);

static inline size_t bitmap_bytes(uint64_t bits)
{
	return (bits + 63) / 64 * 8;
}

static inline bool bit_get(const uint64_t *bits, uint64_t i)
{
	return bits[i / 64] >> (i % 64) & 1;
}

static inline void bit_set(uint64_t *bits, uint64_t i)
{
	bits[i / 64] |= 1ull << (i % 64);
}

static inline void bit_clear(uint64_t *bits, uint64_t i)
{
	bits[i / 64] &= ~(1ull << (i % 64));
}

/* fault.c: serving faults, without a thread of its own */
/* Who owns pages and moves them on asks before, and says after, that somebody may have been left to it: fault.c. */
uint64_t waits_now(struct tierd_guest *g);
void wake_waiters(struct tierd_guest *g, uint64_t page, uint64_t count, uint64_t waits_before);
struct tierd_worker;
int tierd_worker_create(struct tierd_guest *g, struct tierd_worker **ret);
void tierd_worker_destroy(struct tierd_worker *w);
/* Reads what is pending once and handles it: number of messages, or -EAGAIN. *tid: the last faulting thread. */
int tierd_worker_serve(struct tierd_worker *w, uint32_t *tid);
uint64_t tierd_worker_busy_since(struct tierd_worker *w);
/* Tries parked faults that are due. *next_due_ns: when the next one is, 0 when none is parked. */
void tierd_worker_retry(struct tierd_worker *w, uint64_t *next_due_ns);
/* Deals with what Python has answered. */
void tierd_worker_answers(struct tierd_worker *w);
/* Brings back the pages in [page, page + count) that are STORED in `tier`, up to the first that is not: how many are RESIDENT, or -errno. On
 * UNREADABLE the first page is still ARRIVING, and the caller's. */
enum { UNREADABLE = -ENODATA };
int64_t fetch_run(struct tierd_worker *w, unsigned int tier, uint64_t page, uint32_t count, bool to_write,
		  uint32_t *claimed);

static inline bool quarantined(struct tierd_guest *g, uint64_t page)
{
	return g->quarantine && bit_get(g->quarantine, page);
}

/* store.c: a run of pages of one tier; also the staging area is read so. */
int tier_read(struct tierd_guest *g, struct pool_reader *reader, unsigned int tier, uint64_t page, uint32_t count,
	      void *to);
int tier_discard(struct tierd_guest *g, unsigned int tier, uint64_t page, uint64_t count);
/* of a file */
int store_write(struct tierd_guest *g, unsigned int tier, uint64_t page, uint32_t count, const void *from);
void store_enter(struct tierd_guest *g, unsigned int tier);
void store_leave(struct tierd_guest *g, unsigned int tier);
int store_settle(struct tierd_guest *g, unsigned int tier, uint64_t first_page, uint64_t end_page);

static inline bool tier_is_pool(const struct tierd_guest *g, unsigned int tier)
{
	return tier && tier == g->pool_tier;
}

static inline bool tier_is_asked(const struct tierd_guest *g, unsigned int tier)
{
	return g->tiers[tier].kind == TIERD_KIND_ASKED;
}

static inline bool tier_exists(const struct tierd_guest *g, unsigned int tier)
{
	return g->tiers[tier].fd >= 0 || tier_is_asked(g, tier);
}

/* A read of it is no I/O: it does not keep a fault thread from the others. */
static inline bool tier_in_memory(const struct tierd_guest *g, unsigned int tier)
{
	return tier == TIER_ZERO || tier == TIER_STAGING || tier_is_pool(g, tier);
}

/* park.c */
int parking_create(struct tierd_guest *g);
void parking_destroy(struct tierd_guest *g);
bool park(struct tierd_guest *g, const struct parked *p); /* false: no room */
/* Takes out one page that is due. *next_due_ns: when the first one is, 0 when none is parked. */
bool unpark_due(struct tierd_guest *g, uint64_t now_ns, struct parked *ret, uint64_t *next_due_ns);
void parking_hurry(struct tierd_guest *g); /* all are due now */
uint64_t parking_overdue_ns(struct tierd_guest *g, uint64_t now_ns);
/* Whether a fault thread may go into a read now: one of several always stays out of them. */
bool reader_enter(struct tierd_guest *g);
void reader_leave(struct tierd_guest *g);
uint64_t reader_due_ns(uint64_t now_ns); /* when to ask again */

/* ask.c: any thread; a lock that is held for a look at the table of requests */
int asking_create(struct tierd_guest *g);
void asking_destroy(struct tierd_guest *g);
bool ask(struct tierd_guest *g, const struct request *r); /* false: no room */
/* An answer that nobody has in hand, oldest first; request_end gives its place back when it was dealt with. */
bool answer_take(struct tierd_guest *g, struct request *ret);
void request_end(struct tierd_guest *g, const struct request *r);
/* For how long the oldest request waits for Python, and the oldest answer for a fault thread; 0: none does. */
void asking_ages(struct tierd_guest *g, uint64_t now_ns, uint64_t asked_ns[TIERD_TIERS], uint64_t *answered_ns);

/* thread.c */
int threads_stop(struct tierd_guest *g);
void ring(int eventfd); /* -1: nobody listens */

#endif
