/*
 * tierd.h: the boundary between Python (which decides) and C (which does).
 *
 * The text is given to cffi's cdef verbatim, so there is no preprocessor in it. Every function returns 0 or -errno and puts
 * its result into the last parameter; no function calls back into Python, and none may be called from a signal handler.
 * "Blocks" below means: it may sleep in the kernel or do I/O, call it from a worker thread. Sizes are in the unit that the
 * name ends with; a "page" is one of the guest's: the system's size (never assumed to be 4 KiB), or hugetlbfs's; times are CLOCK_MONOTONIC nanoseconds.
 */

enum {
	TIERD_TABLE_VERSION = 8,
	TIERD_REGIONS_MAX = 32,
	TIERD_RANGES_MAX = 1024,
	/* tier 0 is "one 64-bit word, again and again", which needs no store; 1 to TIERD_LADDER_MAX are where pages are stored, in the
	 * order in which they sink; 14 is the staging area; 15 is guest memory itself, and in the word of a RESIDENT page says that it was
	 * never seen touched */
	TIERD_TIERS = 16,
	TIERD_LADDER_MAX = 8,
	TIERD_TIER_STAGING = 14,
	TIERD_TIER_GUEST = 15,
	TIERD_STATES = 9,
	TIERD_LATENCY_BUCKETS = 40, /* bucket i counts service times below 2^i ns (and not below 2^(i-1)) */
	TIERD_NAME_BYTES = 256,
	TIERD_BOOT_ID_BYTES = 40,
	TIERD_PATH_BYTES = 1024
};

/* what the kernel is asked to do it with: engine.c */
enum { TIERD_ENGINE_STOCK = 0, TIERD_ENGINE_RWP = 1, TIERD_ENGINE_RFC = 2 };

/* how the stock engine makes untouched pages visible */
enum { TIERD_ZAP_PAGEOUT = 1, TIERD_ZAP_INJECT = 2 };

/* what becomes of a page that cannot be read within the deadline */
enum { TIERD_LOST_POISON = 0, TIERD_LOST_HOLD = 1 };

/* what a tier is: a sparse file addressed by page number; a pool of compressed pages in a file on tmpfs (pool.c); a store that Python
 * asks, of which the data plane has no descriptor (ask.c) */
enum { TIERD_KIND_NONE = 0, TIERD_KIND_FILE = 1, TIERD_KIND_MEMORY = 2, TIERD_KIND_ASKED = 3 };

/* how pages are compressed in a pool */
enum { TIERD_CODEC_LZ4 = 1, TIERD_CODEC_ZSTD = 2 };

/* flags of a tier. LATE: a write or discard of a process that was killed may still land, at any time (FUSE, network
 * file systems): what a predecessor may have had in flight is not used again. */
enum {
	TIERD_SPACE_DIRECT = 1,
	TIERD_SPACE_DROP_CACHE = 2,
	TIERD_SPACE_LATE = 4,
	TIERD_SPACE_NEW = 8,    /* an empty file, to become a pool */
	TIERD_SPACE_SEALED = 16 /* a file whose pages are encrypted: its tier has the key */
};

/* Where a tier's pages are, for a successor. */
struct tierd_place {
	uint32_t kind;   /* TIERD_KIND_* */
	uint32_t flags;  /* TIERD_SPACE_* */
	char name[64];   /* of the store, NUL-terminated */
	char path[1024]; /* NUL-terminated */
};

/* What the state file says about the VMM: adoption compares all of it before it touches anything. */
struct tierd_identity {
	int32_t pid;
	int32_t uffd_in_vmm;          /* the number of the userfaultfd in the VMM */
	uint64_t start_ticks;         /* field 22 of /proc/PID/stat */
	uint64_t page_bytes;          /* tierd_table_create: 0: the system's */
	uint64_t epoch_ns;            /* step of the last-access epochs */
	uint64_t created_ns;          /* CLOCK_MONOTONIC at epoch 0; filled by tierd_table_create */
	char boot_id[40];             /* /proc/sys/kernel/random/boot_id, NUL-terminated */
	char name[256];               /* the guest's name, NUL-terminated, for people */
	struct tierd_place places[8]; /* of tier 1, 2, ...; the last ones may be TIERD_KIND_NONE */
};

/* What a successor must know before it has read its configuration. In the state file, outside of the header's checksum: each
 * field is changed by itself while the guest is served. */
struct tierd_serving {
	uint32_t known; /* 0: nothing of this was ever said */
	uint32_t on_lost;
	uint64_t read_deadline_ns;
	uint32_t readahead_pages;
	int32_t uffd_moved; /* not 0: the userfaultfd's number in the VMM is uffd_moved - 1 by now */
	uint32_t engine;    /* TIERD_ENGINE_*: with what it is registered. It cannot be changed while pages are away */
	uint32_t handshake; /* 1: the VMM brought its descriptors and brings them to every successor */
	uint64_t calls;     /* where in the VMM batches of calls are run from: tierd_calls_create; 0: nowhere yet */
};

struct tierd_region {
	uint64_t address; /* in the VMM, page aligned */
	uint64_t bytes;   /* whole pages */
	uint64_t offset;  /* of `address` in the file */
	uint64_t device;  /* st_dev and st_ino of the file: its identity across a restart */
	uint64_t inode;
	uint64_t staging; /* of private anonymous memory: where in the VMM its staging area is, as large; else 0 */
	int32_t memfd;    /* our descriptor; -1: there is no file (and in what tierd_table_read gives back) */
	int32_t reserved;
};

struct tierd_range {
	uint64_t address; /* in the VMM */
	uint64_t bytes;
};

struct tierd_tier {
	int32_t fd;     /* -1: no such tier, or one that Python asks */
	uint32_t kind;  /* TIERD_KIND_*; one pool at most */
	uint32_t flags; /* TIERD_SPACE_*; LATE: only of the last one */
	uint32_t codec; /* TIERD_CODEC_*, of a new pool */
	uint64_t capacity_bytes;
	uint8_t key[64]; /* SEALED: for AES-256-XTS */
};

struct tierd_guest_args {
	int32_t table_fd; /* the state file; the guest keeps a duplicate and holds its flock by it */
	int32_t uffd;
	int32_t pidfd;
	int32_t pagemap_fd;
	int32_t mem_fd; /* /proc/PID/mem; needed for private anonymous memory only */
	int32_t idle_fd; /* /sys/kernel/mm/page_idle/bitmap, for private anonymous memory whose reads are not seen; or -1 */
	int32_t asked_fd; /* an eventfd that is rung when Python is asked for pages; -1: no tier is of TIERD_KIND_ASKED */
	int32_t zap;      /* TIERD_ZAP_* */
	int32_t inject_tid;  /* thread of the VMM that runs TIERD_ZAP_INJECT, and batches of calls */
	uint32_t engine;     /* TIERD_ENGINE_*; an adoption takes what the state file says */
	uint32_t page_bytes; /* 0: the system's; more: the memory is of hugetlbfs with pages of this size */
	int32_t use_pagemap; /* 1: read /proc/PID/pagemap even where PAGEMAP_SCAN exists (kernels before 6.7 have only that) */
	uint32_t chunk_bytes; /* MISSING is registered in pieces of this size; 0: 64 MiB */
	uint32_t region_count;
	uint32_t readahead_pages;
	uint32_t
		spin_us_max; /* a fault thread spins at most this long after a fault before it sleeps; 0: always sleep */
	uint32_t follow;     /* 1: a sleeping fault thread moves to the CPU of a pinned faulting thread */
	struct tierd_region regions[32];
	struct tierd_tier tiers[16];
};

/* Counters since tierd_guest_create. One snapshot; each number is exact, the set is not taken at one instant. */
struct tierd_counters {
	uint64_t pages;             /* size of the guest */
	uint64_t state_pages[9];    /* by enum page_state, from the table; MOVING counts as STORED */
	uint64_t tier_pages[16];    /* STORED by tier */
	uint64_t untouched_pages;   /* RESIDENT and never seen touched */
	uint64_t stale_pages;       /* RESIDENT, store space not yet given back */
	uint64_t spent_pages;       /* RESIDENT, their room in the staging area not yet given back */
	uint64_t quarantined_pages; /* not evicted again: a predecessor's I/O may still land in their space */
	uint64_t faults_fetch;      /* STORED: brought back from a tier */
	uint64_t faults_zero;       /* hole, or tier 0 */
	uint64_t faults_cancel;     /* took a page away from an eviction */
	uint64_t faults_resolve;    /* lifted a hold from a page that stays */
	uint64_t faults_wait;       /* left to the owner of the page */
	uint64_t faults_failed;     /* could not be served (now LOST or to be retried) */
	uint64_t pages_fetched;     /* by faults, read-ahead included */
	uint64_t pages_readahead;   /* of these, not asked for by the guest itself */
	uint64_t pages_restored;    /* by tierd_guest_restore */
	uint64_t pages_evicted;
	uint64_t pages_evicted_zero; /* of these, of one word: no store needed */
	uint64_t pages_cancelled;    /* LEAVING and back: touched meanwhile, or an error */
	uint64_t pages_lost;
	uint64_t pages_repaired; /* a punch did not punch: the bytes were written back */
	uint64_t
		pages_unwritten; /* evicted, and not written since they were fetched: their stored copy was right still */
	uint64_t pages_demoted; /* from one tier to the next */
	uint64_t pages_refused; /* no tier took them: they do not compress well enough, or there is no room */
	uint64_t pages_staged;
	uint64_t pages_unmovable; /* shared by fork or KSM, pinned, or gone: they stay with the guest */
	uint64_t faults_staged;   /* of a page in the staging area: it was read after all */
	uint64_t pages_refaulted; /* fetched from there, those by read-ahead included */
	uint64_t store_read_errors;
	uint64_t store_write_errors;
	uint64_t checksum_errors;
	uint64_t kernel_errors;  /* unexpected errno of a userfaultfd, pagemap or memfd call */
	uint64_t last_errno;     /* of the most recent of the four above */
	uint64_t missing_chunks; /* chunks registered MISSING */
	uint64_t inject_stops;   /* ptrace stops of the VMM */
	uint64_t inject_stopped_ns;
	uint64_t stop_buckets[40]; /* like latency_buckets: a stop of a thread of the VMM for a batch of calls */
	uint64_t fault_threads;
	uint64_t parked_pages;
	uint64_t large_folios_split; /* seen mapped by one large entry, and only a part of their pages left */
	uint64_t faults_window;      /* resolved in a sync window, on a page that did not leave in it */
	uint64_t windows;            /* in sync mode, of rwp and rfc */
	uint64_t window_sum_ns;
	uint64_t window_buckets[40]; /* like latency_buckets: from leaving async mode to being back in it */
	uint64_t latency_count;
	uint64_t latency_sum_ns;
	uint64_t latency_buckets[40]; /* from reading the message to the page being in place */
};

/* One tier of a guest. */
struct tierd_tier_counters {
	uint64_t used_bytes;       /* of a pool: memory that its file takes; else: of pages that have space there */
	uint64_t metadata_bytes;   /* of a pool: what of that, and of ours, is neither pages nor waste */
	uint64_t compressed_bytes; /* of a pool: what its pages have become */
	uint64_t written_pages, read_pages, refused_pages;
	uint64_t write_errors, read_errors, checksum_errors;
	uint64_t read_sum_ns, read_buckets[40]; /* like latency_buckets: reads of one or several pages */
};

/* What a watchdog looks at: cheap, unlike the counters, which read the whole table. */
struct tierd_health {
	uint32_t fault_threads;
	uint32_t hung_threads;   /* busy with one fault for longer than what was asked about */
	uint32_t parked_pages;   /* faults that wait for a read of the store */
	uint32_t asked_pages;    /* that Python was asked for */
	uint64_t oldest_busy_ns; /* for how long the oldest fault is in service; 0: none is */
	uint64_t overdue_ns;     /* for how long a parked fault has been due, or an answer of Python's; 0: none is */
	uint64_t asked_ns
		[TIERD_TIERS]; /* by tier: for how long the oldest request waits for Python's answer; 0: none does */
	uint64_t worker_io_ns; /* for how long the worker has been in one call of the store; 0: it is in none */
	uint64_t pages_lost;   /* so far */
	uint64_t spent_pages;  /* about: with the guest and, still, in the staging area */
};

/* For tests: how often, in 1/1000 of the calls, the guest's store misbehaves. The pages of a call that hangs or is slow are
 * read or written after that. seed 0: it behaves from now on; another seed only while it behaves. */
struct tierd_store_faults {
	uint32_t read_error, read_short, read_flip, read_slow, read_hang;
	uint32_t write_error, write_short, write_slow, write_hang;
	uint32_t slow_us, hang_us;
	uint32_t reserved;
	uint64_t seed;
};

/* What one pass over a stretch of pages saw and did. */
struct tierd_pass {
	uint64_t pages;         /* looked at */
	uint64_t touched_pages; /* touched since the last pass */
	uint64_t zapped_pages;  /* deactivated now */
	uint64_t scan_ns;
	uint64_t zap_ns;
	uint64_t zap_calls;
	uint64_t next_page; /* where to go on; == pages of the guest when the pass is complete */
};

struct tierd_batch_result {
	uint64_t selected_pages; /* RESIDENT -> LEAVING */
	uint64_t held_pages;     /* still cold after the hold */
	uint64_t written_pages;
	uint64_t zero_pages;
	uint64_t evicted_pages;
	uint64_t cancelled_pages;
	uint64_t next_page;     /* select: where to look next; == pages of the guest at the end */
	uint64_t left_pages;    /* window: still to leave, in another one */
	uint64_t refused_pages; /* write: no tier took them */
	uint64_t failed_tier;   /* after an error: the tier that took no pages, or gave no space back; 0: none */
	uint64_t offered_pages; /* write: to tiers that Python asks */
	uint64_t select_ns, hold_ns, copy_ns, write_ns, drop_ns, release_ns;
	uint64_t stopped_ns; /* drop: a thread of the VMM, 0: none was */
};

/* Pages that may be moved into the staging area. */
struct tierd_span {
	uint64_t next_page, end_page; /* where to look next; beyond the last one */
	uint64_t max_pages;           /* to move. For the stock engine's samples a large page may be more */
	uint64_t selected_pages;      /* set: of so many a move was tried */
	uint64_t staged_pages;        /* set: and so many have moved */
};

/* What one batch of moves into the staging area, or of drops there, did. */
struct tierd_staged {
	uint64_t selected_pages;
	uint64_t staged_pages;
	uint64_t unmovable_pages;
	uint64_t next_page;  /* of drops: where to look next; == pages of the guest at the end */
	uint64_t stopped_ns; /* a thread of the VMM, 0: none was */
	uint64_t ns;
};

/* A run of pages that is stored in a tier that Python asks, and is wanted. */
struct tierd_request {
	uint64_t page;   /* the first one: for that one a thread of the guest waits, if `demand` */
	uint32_t number; /* for tierd_guest_answer */
	uint32_t count;
	uint32_t tier;
	uint32_t demand;
};

/* A run of neighbours in a batch. */
struct tierd_run {
	uint64_t page;
	uint32_t slot, count; /* count 0: there is none */
	uint8_t *bytes;       /* of all of them, one after the other */
};

struct tierd_adoption {
	uint64_t resident_pages, stored_pages, corrected_pages;
	uint64_t lost_pages;
	uint64_t quarantined_pages;
	uint64_t ns;
};

struct tierd_guest;
struct tierd_batch;

/* --- the state file ------------------------------------------------------------------------------------------------- */

/* Size of the pages of a memory file: of hugetlbfs, or the system's. */
int tierd_page_bytes_of(int memfd, uint64_t *ret);
/* Lays out a new state file in an empty file on tmpfs: space reserved, header written, every page RESIDENT and untouched.
 * Blocks (fallocate). -ENOSPC, -EINVAL. On failure the file is to be unlinked by the caller. */
int tierd_table_create(int fd, const struct tierd_identity *identity, const struct tierd_region *regions,
		       uint32_t count);
/* Reads a header back. -EBADMSG: broken or not ours; -EPROTONOSUPPORT: of another version. Changes nothing. */
int tierd_table_read(int fd, struct tierd_identity *identity, struct tierd_region *regions, uint32_t *count,
		     struct tierd_serving *serving);
/* Pages that are not with the guest, by the table (which may lag behind the kernel): 0 means that nothing is needed to leave
 * it. With the lock held. */
int tierd_table_away(int fd, uint64_t *pages);
/* flock(LOCK_EX|LOCK_NB) on fd: free only when the last thread of a predecessor is gone. -EWOULDBLOCK while it is held. */
int tierd_table_lock(int fd);

/* --- one guest's life ---------------------------------------------------------------------------------------------- */

/* Maps and locks the table and allocates everything that serving faults will need. Descriptors are duplicated. Changes
 * nothing in the VMM. */
int tierd_guest_create(const struct tierd_guest_args *args, struct tierd_guest **ret);
/* Stops the fault threads first. NULL is fine. Leaves the VMM's registrations as they are: see tierd_guest_disarm. */
void tierd_guest_destroy(struct tierd_guest *g);
/* First attach: registers every region WP, and marks what the files already hold as touched now. Blocks. */
int tierd_guest_arm(struct tierd_guest *g);
/* After a crash or a `keep` stop: reconciles the table with the kernel, clears every hold, registers again, wakes every
 * waiter. `mapped`: the parts of the regions that the VMM maps still; what else is there now is never touched. Call with the
 * lock held and before tierd_guest_start. Blocks. */
int tierd_guest_adopt(struct tierd_guest *g, const struct tierd_range *mapped, uint32_t count,
		      struct tierd_adoption *ret);
/* The first part of an adoption, before the stores are opened, of which `args` says nothing: back to async mode, where the predecessor was
 * killed in a window. Pages that it was dropping are decided without a store; 0 also where one cannot be (it was punched in vain, and
 * is so again): then the guest waits on, and tierd_guest_adopt does it. Nothing where the engine has no modes. With the lock held. */
int tierd_leave_window(const struct tierd_guest_args *args);
/* 1 when the VMM's memory is gone: it exited, or executed another program. */
int tierd_guest_gone(struct tierd_guest *g, int32_t *ret);
/* Unregisters every region. -EBUSY while a page is not RESIDENT: an evicted page would then read as zeros. Blocks. */
int tierd_guest_disarm(struct tierd_guest *g);
/* Starts one more fault thread (one that finds nothing to do for some seconds ends again, but the last one) / ends all of them (a fault
 * in service is finished first). */
int tierd_guest_start(struct tierd_guest *g);
void tierd_guest_stop(struct tierd_guest *g);
/* The VMM shares the userfaultfd's open file and can make its reads block: not from now on, and not those that do. Cheap. */
int tierd_guest_keep_nonblocking(struct tierd_guest *g);
/* Takes effect at once, from any thread. */
void tierd_guest_set_readahead(struct tierd_guest *g, uint32_t readahead_pages);
void tierd_guest_set_capacity(struct tierd_guest *g, uint32_t tier, uint64_t bytes);
void tierd_guest_counters(struct tierd_guest *g, struct tierd_counters *ret);
/* -ENODEV: there is no such tier. How many pages are in it: tier_pages of tierd_counters. */
int tierd_guest_tier_counters(struct tierd_guest *g, uint32_t tier, struct tierd_tier_counters *ret);
/* A read that fails is tried again for so long; then the page is LOST: TIERD_LOST_POISON gives the guest a memory error,
 * TIERD_LOST_HOLD leaves its thread blocked for tierd_guest_retry. Takes effect at once, on what is LOST already, too. */
void tierd_guest_set_reads(struct tierd_guest *g, uint64_t read_deadline_ns, uint32_t on_lost);
/* hung: in service for longer than hung_ns. Takes a lock that is never held over I/O. */
void tierd_guest_health(struct tierd_guest *g, uint64_t hung_ns, struct tierd_health *ret);
/* The VMM has the userfaultfd under another number now. */
void tierd_guest_set_uffd_in_vmm(struct tierd_guest *g, int32_t uffd_in_vmm);
/* The VMM brought its descriptors over a socket: a successor waits until it brings them again. */
void tierd_guest_set_handshake(struct tierd_guest *g);
/* Addresses in the VMM of pages that are LOST, from *next_page on, at most max of them. *next_page == pages of the guest when
 * there are no more. Reads the table only. */
int tierd_guest_lost(struct tierd_guest *g, uint64_t *next_page, uint64_t *addresses, uint32_t max, uint32_t *count);
void tierd_guest_set_store_faults(struct tierd_guest *g, const struct tierd_store_faults *faults);
/* Pages that are STORED in `tier`, by idle time; with TIERD_TIER_GUEST, those that are RESIDENT and touched (of anonymous memory, with
 * the stock engine: in the staging area). ret[i] counts pages idle at least edges_s[i] seconds and less than edges_s[i + 1] (the
 * last one is open). edges_s ascends. Reads the table only. */
int tierd_guest_idle(struct tierd_guest *g, uint32_t tier, const double *edges_s, uint32_t count, uint64_t *ret);

/* What Python is asked for, those first that a guest thread waits for; asked_fd is rung for it. Each is Python's until it answers it.
 * From any thread; cheap. -ENODEV: no tier is asked. */
int tierd_guest_asked(struct tierd_guest *g, struct tierd_request *requests, uint32_t max, uint32_t *count);
/* `bytes` of the first `good` pages of a request (0: none, and `error` says why, -errno). They are verified and placed by a fault thread,
 * and must stay where they are until tierd_guest_asked gives this number out again or the guest is destroyed. The other pages go back
 * to their tier; a page that is waited for is asked for again, until the deadline of reads. From any thread; cheap. -EINVAL: no
 * such request. */
int tierd_guest_answer(struct tierd_guest *g, uint32_t number, const void *bytes, uint32_t good, int32_t error);

/* Whether these are the bytes that were stored of a page, which is stored or on its way back. From any thread; cheap. */
int tierd_guest_is_right(struct tierd_guest *g, uint64_t page, const void *bytes);

/* The calls below belong to the guest's one worker: a second one at the same time gets -EBUSY. All block. */

/* How pages are deactivated from the next pass on: TIERD_ZAP_*, and the thread of the VMM that runs TIERD_ZAP_INJECT. */
int tierd_guest_set_zap(struct tierd_guest *g, int32_t zap, int32_t inject_tid);
/* From first_page on, chunk after chunk until some milliseconds are over: scans it, stamps what was touched, deactivates exactly that. */
int tierd_guest_pass(struct tierd_guest *g, uint64_t first_page, struct tierd_pass *ret);
/* Brings up to max_pages STORED pages back, from *next_page on. *next_page == pages of the guest when there are no more. A
 * page that cannot be read stays STORED; one that is not mapped any more goes back into its file. Those of tiers that Python asks are
 * asked for, and come later (asked_pages of tierd_health): with no room for a request, it ends early. */
int tierd_guest_restore(struct tierd_guest *g, uint64_t *next_page, uint64_t max_pages, uint64_t *restored);
/* After a repair of the store: reads every LOST page from *next_page on again (those that are still waited for are tried at once,
 * too), counts what is RESIDENT again and what stays LOST. Pages of tiers that Python asks are asked for and not counted: with no room
 * for a request, it ends early. *next_page == pages of the guest when there are no more. */
int tierd_guest_retry(struct tierd_guest *g, uint64_t *next_page, uint64_t *recovered, uint64_t *still_lost);
/* Nobody relies on the copies that a tier has of clean pages any more: these are written when they leave. */
int tierd_guest_unclean(struct tierd_guest *g, uint32_t tier);
/* What a worker read or wrote in a tier that Python asks failed (-EBADMSG: something else was read than was written): it is counted. Any
 * thread. */
int tierd_guest_read_failed(struct tierd_guest *g, uint32_t tier, int32_t error);
int tierd_guest_write_failed(struct tierd_guest *g, uint32_t tier, int32_t error);
/* Gives back store space of pages that were fetched since; but, in the tiers of `keep` (bit i: tier i), not of those that nobody has
 * written to since. After an error the others' went, and *failed_tier did not give any back; 0: it is not about one. */
int tierd_guest_discard(struct tierd_guest *g, uint64_t max_pages, uint32_t keep, uint64_t *discarded,
			uint32_t *failed_tier);
/* Pages that `tier`, one that Python asks, need not keep: the first run of them from first_page on, at most max_pages long. Python
 * has the store discard them and then says that they are gone: no batch may write there meanwhile. -ENODEV: no such tier. */
int tierd_guest_garbage(struct tierd_guest *g, uint32_t tier, uint64_t first_page, uint64_t max_pages, uint64_t *page,
			uint64_t *count);
int tierd_guest_garbage_gone(struct tierd_guest *g, uint32_t tier, uint64_t page, uint64_t count);
/* In the guest's pool: moves at most max_pages stored pages closer together, so that memory becomes free. 0 moved: there is nothing to do. */
int tierd_guest_compact(struct tierd_guest *g, uint32_t max_pages, uint32_t *moved);

/* --- private anonymous memory: pages go through a staging area in the VMM (stage.c) ---------------------------------- */

/* RESIDENT -> STORED in the staging area, for touched pages idle at least min_idle_s, span after span, as many as one stop of a
 * thread of the VMM may take. Where such pages were fetched again soon, it takes longer until they are tried again. What one large
 * entry of the page table maps moves as a whole, or not at all (but see below). -EINVAL: the guest's memory is not anonymous. */
int tierd_guest_stage(struct tierd_guest *g, struct tierd_span *spans, uint32_t count, double min_idle_s,
		      struct tierd_staged *ret);
/* What one large entry maps may move in part, too: the kernel splits it. */
void tierd_guest_set_split_large(struct tierd_guest *g, uint32_t split);
/* Pages that faults took out of the staging area since this was asked last, of [first_page, first_page + pages): of 64 neighbours
 * up to 255. From the worker. */
uint64_t tierd_guest_refaults(struct tierd_guest *g, uint64_t first_page, uint64_t pages);
/* Gives back room in the staging area whose pages were fetched: at most one stop of the VMM, from first_page on. */
int tierd_guest_unstage(struct tierd_guest *g, uint64_t first_page, struct tierd_staged *ret);

/* --- eviction: select, hold, copy, write, drop, release, in this order; cancel is legal at any point. With an engine that
 * has a sync mode: select, copy, write, window until no page is left. From one tier to another, and out of the staging area: select,
 * copy, write, drop, release ------------------------------------------------------------------------------------------- */

int tierd_batch_create(struct tierd_guest *g, uint32_t max_pages, struct tierd_batch **ret);
/* Cancels what is still LEAVING, releases what is still held. NULL is fine. */
void tierd_batch_destroy(struct tierd_batch *b);
/* from TIERD_TIER_GUEST: RESIDENT -> LEAVING, for touched pages idle at least min_idle_s, from first_page on. Also registers MISSING
 * for their chunks. From another tier: STORED there -> MOVING, for pages that are idle (of the staging area: that are there) at
 * least as long. Pages from the first to the last one of another batch are passed over. pool_only: and those that the pool has refused
 * and nobody has touched since. -EINVAL: anonymous memory leaves by the staging area only. */
int tierd_batch_select(struct tierd_batch *b, uint32_t from, uint32_t pool_only, uint64_t first_page, double min_idle_s,
		       uint64_t max_pages, struct tierd_batch_result *ret);
/* Write-protects the batch, scans again, gives back what was touched meanwhile. */
int tierd_batch_hold(struct tierd_batch *b, struct tierd_batch_result *ret);
/* The first run at or after `slot`: after select out of a tier that Python asks, all that are selected (`tier` 0); after write, those
 * that are offered to `tier`. Valid until the next step. */
int tierd_batch_run(struct tierd_batch *b, uint32_t tier, uint32_t slot, struct tierd_run *ret);
/* Of a batch out of a tier that Python asks: the bytes of a run, before copy. */
int tierd_batch_supply(struct tierd_batch *b, uint32_t slot, uint32_t count, const void *bytes);
/* Reads the bytes through the file (of a tier that Python asks: takes those that were supplied, the others stay there); finds pages
 * that are one word again and again; takes checksums. */
int tierd_batch_copy(struct tierd_batch *b, struct tierd_batch_result *ret);
/* Gives each page to the first of `tiers` that takes it. A page that none takes stays where it is. Any error: nothing of the batch
 * counts as written; cancel it. -ENOSPC: all are at capacity. To a pool it writes; to files and to tiers that Python asks it only offers
 * its pages (offered_pages): then comes tierd_batch_store, Python has each run of its tiers stored durably, and says so:
 * tierd_batch_stored. `keep`, bit i: the copies that tier i has of clean pages are relied on, these need not be written; but for one page,
 * which is read: a store that is gone would not be noticed else. Of a tier that Python asks it reads that one. */
int tierd_batch_write(struct tierd_batch *b, const uint32_t *tiers, uint32_t count, uint32_t keep,
		      struct tierd_batch_result *ret);
/* After copy: the page whose copy in a tier of `keep` is to be read; UINT64_MAX: there is none. */
uint64_t tierd_batch_unchanged(struct tierd_batch *b, uint32_t tier);
/* Writes what is offered to files, durably; to be called also if nothing is. In whichever thread, while the worker is busy with another
 * batch. No step of this batch, nor tierd_batch_destroy, before it returned; and meanwhile nothing of the guest is discarded. */
int tierd_batch_store(struct tierd_batch *b, struct tierd_batch_result *ret);
/* All that was offered is stored, durably. */
int tierd_batch_stored(struct tierd_batch *b, struct tierd_batch_result *ret);
/* LEAVING -> DROPPING, punch exactly those runs, see the hole, STORED. From the staging area: MOVING -> DROPPING, dropped there, STORED.
 * From another tier: MOVING -> STORED in the new one, and its space in the old one is given back. */
int tierd_batch_drop(struct tierd_batch *b, struct tierd_batch_result *ret);
/* Lifts the hold, which wakes whoever waited. The batch is empty afterwards and can be used again. */
int tierd_batch_release(struct tierd_batch *b, struct tierd_batch_result *ret);
/* One sync window of at most about window_ns_max (one run is finished): sync mode, scan again, LEAVING -> DROPPING for what was
 * touched neither before nor since the copy, punch, see the hole, STORED, wake, async mode. One call, because Python might
 * wait for its lock with guests held. What it had no time for is still LEAVING; when nothing is, the batch is empty. On an
 * error async mode is back, and the batch is to be cancelled. */
int tierd_batch_window(struct tierd_batch *b, uint64_t window_ns_max, struct tierd_batch_result *ret);
/* LEAVING -> RESIDENT, and release. */
int tierd_batch_cancel(struct tierd_batch *b, struct tierd_batch_result *ret);

/* --- calls made inside the VMM ------------------------------------------------------------------------------------ */

struct tierd_call {
	int64_t number; /* of the system call */
	uint64_t argument[6];
	uint32_t in_scratch; /* bit i: argument[i] is an offset into the scratch area */
	uint32_t reserved;
	uint64_t
		pointers; /* bit i: the i-th 64-bit word of the scratch area is an offset into it, to be made a pointer */
	int64_t result;   /* out: what the call returned (-errno as the kernel gives it) */
	uint64_t stopped_ns; /* out: how long the thread was stopped */
};

/*
 * Runs one system call in thread tid of the VMM. The thread restores itself: if we die at any instruction it goes on
 * unharmed. scratch (scratch_bytes <= 4096, may be NULL) is laid on its stack below the red zone before the call and read
 * back after it. Blocks, at most timeout_ms and a second. -ESRCH: gone; -EBUSY: traced by somebody else; -ETIMEDOUT: the thread did not
 * stop; -ENOTSUP: shadow stack, AMX or SME state, or no `syscall; ret` found.
 */
int tierd_inject(int32_t tid, struct tierd_call *call, void *scratch, uint32_t scratch_bytes, uint32_t timeout_ms);

/*
 * A batch of calls at the price of one stop: the thread is sent through a table of them in an area of the VMM's memory, and
 * restores itself at the end. Batches of one area follow each other: whoever calls sees to that. Whoever knows the area's
 * address can wait for what a predecessor left behind.
 */
enum { TIERD_CALLS_MAX = 64 };

struct tierd_inside_call {
	int64_t number; /* of the system call */
	uint64_t argument[6];
	uint32_t in_data; /* bit i: argument[i] is an offset into data */
	uint32_t reserved;
	uint64_t data[8]; /* in and out: memory that the call is pointed at */
	int64_t result;   /* out: what the call returned (-errno as the kernel gives it) */
};

/*
 * An area: 16 KiB (arm64: 128 KiB) of private memory of the process that thread tid is of, its first part executable. Blocks, a few
 * seconds at most. Errors as tierd_inject(); -ENOTSUP also where there is no stub for the architecture; -EACCES or -EPERM: a security module
 * or prctl(PR_SET_MDWE) forbids executable memory there. On failure nothing stays mapped, unless the thread cannot be stopped
 * any more; nor is it known to anybody if we die meanwhile.
 */
int tierd_calls_create(int32_t tid, uint64_t *area);
/* Unmaps it, after seeing every thread outside of its code: those that do not sleep are stopped for that. Blocks, a few seconds
 * at most. -EBUSY: a batch runs, or a thread did not leave in time (it is stopped, say); -EFAULT: there is no area. On failure
 * the area is as usable as before. */
int tierd_calls_destroy(int32_t tid, uint64_t area);
/*
 * Runs calls[0..count) in thread tid, in that order, whatever they return. When budget_ns have passed since it began
 * (it is seen to, once it has a CPU), the thread goes on after the call that it is in; as when it does not begin within 10 ms. *done:
 * how many were made; of those `result` and `data` are filled in.
 * *stopped_ns: from the interrupt to the end, as we saw it. Blocks, at most twice timeout_ms and a second.
 *
 * -EINPROGRESS: it does not come to its end (uninterruptible sleep, SIGSTOP), or what became of it cannot be read just now (the area
 * is swapped out, and there is no memory; the thread has ended; we may not look any more). calls[*done] and those after it may be made
 * until tierd_calls_settle() has returned 0.
 * -ESRCH, -EFAULT: the process is gone, or its area, as by execve(2). With any other error no call was or will be made: -EINVAL;
 * -EBUSY: traced by somebody else, or a batch still ran after 10 ms; -EAGAIN: stopped by a SIGSTOP; -ETIMEDOUT, -ENOTSUP: as
 * tierd_inject().
 */
int tierd_calls_run(int32_t tid, uint64_t area, struct tierd_inside_call *calls, uint32_t count, uint64_t budget_ns,
		    uint32_t timeout_ms, uint32_t *done, uint64_t *stopped_ns);
/* Cancels what runs, by whomever it was sent (us, a predecessor that was killed), and waits until no call is being made. After 0
 * none will be, also by a thread that was sent and has not run yet. Blocks, at most twice timeout_ms. -ETIMEDOUT: a call is still
 * being made, or the area cannot be read just now. -ESRCH: no such process, or it is dying: a call that is being made ends with it.
 * -EFAULT: no area. `mem`: its /proc/PID/mem, opened for reading, better for writing as well, which shows the area also where it is not
 * found by its number, or may not be asked any more; then -ESRCH says that the address space is gone. -1: any other error tells
 * nothing. */
int tierd_calls_settle(int32_t pid, int32_t mem, uint64_t area, uint32_t timeout_ms);

/* --- records: what pages become on their way to a store that Python asks (records.c) ---------------------------------
 *
 * Records lie one behind the other in a buffer: record i from bounds[i] to bounds[i + 1], which are counted from the buffer's begin; so
 * are to_bounds, of count + 1. Any thread. These compute and do not block; `to` holds anything after an error.
 */
enum {
	TIERD_TAG_BYTES = 16,
	TIERD_UNIT_BYTES = 64,   /* a record in a segment is a multiple of it */
	TIERD_HEADER_BYTES = 16, /* of a record in a segment */
	TIERD_ROW_BYTES = 16     /* of a segment's table */
};
enum { TIERD_AS_IT_IS = 0, TIERD_ZSTD = 1 }; /* the first byte of a record */

/* Zstandard's work space for records of at most bytes_max, for one thread at a time. -ELIBACC: libzstd.so.1 is not installed; -ELIBBAD: it
 * lacks a function; -ENOMEM */
struct tierd_packer;
int tierd_packer_create(uint32_t bytes_max, int32_t level, struct tierd_packer **packer);
void tierd_packer_destroy(struct tierd_packer *packer);
/* A byte that says which, and a Zstandard frame of the record or the record as it is. `to` has room for all of them and a byte each.
 * -EINVAL: one is longer than bytes_max; -EIO: the library failed. */
int tierd_pack(struct tierd_packer *packer, const void *from, const uint32_t *bounds, uint32_t count, void *to,
	       uint32_t *to_bounds);
/* AES-256-GCM: ciphertext and tag; nonce and page are 64-bit little-endian numbers, the latter is authenticated with the record. `to` has
 * room for all of them and a tag each. -ELIBACC: neither libcrypto.so.3 nor .1.1 is installed; -ENOMEM; -EIO: the library failed. */
int tierd_seal(const void *key, const uint64_t *nonces, uint64_t first_page, const void *from, const uint32_t *bounds,
	       uint32_t count, void *to, uint32_t *to_bounds);
/* Records of a segment, with headers, and its table: segments.py. `seed`: of all checksums. `to` has room for each record, its header, and a
 * unit, and a row of the table each. Returns the length. */
uint64_t tierd_segment(uint32_t seed, const uint32_t *pages, const uint32_t *generations, const void *from,
		       const uint32_t *bounds, uint32_t count, void *to, uint32_t *to_bounds);
/* The length of the data of a record as it is in a segment. -EBADMSG: it is not as it was written. */
int64_t tierd_segment_record(uint32_t seed, const void *record, uint32_t length);

/* --- what this kernel can do ---------------------------------------------------------------------------------------- */

/* steps of the trials of rwp and rfc */
enum {
	TIERD_TRIAL_API = 1,
	TIERD_TRIAL_REGISTER,
	TIERD_TRIAL_DEACTIVATE,
	TIERD_TRIAL_SCAN,
	TIERD_TRIAL_ASYNC_TOUCH,
	TIERD_TRIAL_SCAN_TOUCHED,
	TIERD_TRIAL_SYNC,
	TIERD_TRIAL_SYNC_TOUCH,
	TIERD_TRIAL_RESOLVE,
	TIERD_TRIAL_ASYNC
};

struct tierd_probe {
	uint64_t features; /* uffdio_api.features as offered */
	uint64_t page_bytes;
	int32_t userfaultfd;   /* each: 0, or the -errno of the trial on scratch pages in our own process */
	int32_t write_protect; /* hold on a zapped shmem page leaves a marker, a write to it waits */
	int32_t missing;       /* a punched page faults as MISSING and COPY answers it */
	int32_t pageout;       /* process_madvise(MADV_PAGEOUT) zaps a shmem page and keeps its bytes */
	int32_t pagemap_scan;
	int32_t poison;
	int32_t self_zap;  /* process_madvise(self, MADV_DONTNEED): several ranges in one injected call */
	int32_t anonymous; /* writes to anonymous memory are seen, and UFFDIO_MOVE takes a page out of it */
	int32_t rwp;       /* -EILSEQ: it does something else than it should */
	int32_t rfc;
	int32_t rwp_anonymous; /* the same with anonymous memory */
	int32_t rfc_anonymous;
	uint32_t rwp_step; /* TIERD_TRIAL_*: where the trial ended, if it failed */
	uint32_t rfc_step;
};

/* Tries everything on a few pages of a memfd of our own. Blocks for some milliseconds. Leaves nothing behind. */
int tierd_probe(struct tierd_probe *ret);
