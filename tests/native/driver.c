/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver.c: the data plane against the model kernel, under a seeded scheduler.
 *
 *   driver [--seeds N] [--from S] [--steps K] [--late-io] [--remap] [--odd] [--large] [--hugetlb] [--anon] [--ladder] [--asked] [--often]
 *          [--vmm-ends] [--engine stock|rwp|rfc] [-v]
 *
 * --asked: of the ladder's files one or all are tiers that Python asks; without a ladder, the only tier is.
 * --large: shared memory is in large folios, and a first touch maps all of one; of rfc, which unmaps that as a whole.
 * --often: it is killed often, while writes take long, and pages often cannot come back at once.
 *
 * Guest threads read and write, fault workers serve, one worker evicts, a killer kills the daemon and starts another, an
 * operator repairs what was destroyed. Every page-table access and every piece of a system call is a point where somebody else
 * may run; a seed says who. What they do and what must be true of it: script.h. And nobody waits for ever. A failing seed is
 * printed and fails again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "internal.h"
#include "model.h"
#include "script.h"

enum {
	STACK_BYTES = 128 << 10,
	COROUTINES_MAX = 16,
	ALLOCATIONS_MAX = 4096,
	QUIESCE_STEPS = 200000,
	GUEST_THREADS_MAX = 6
};

enum kind { GUEST, DAEMON, INSIDE /* the VMM's thread that makes a batch of calls */ };

/* swapcontext saves the signal mask by a system call each time, which took half of a run; but the address sanitizer must see
 * that another stack is used, and it knows swapcontext. */
#ifdef __SANITIZE_ADDRESS__
enum { JUMPS = 0 };
#else
enum { JUMPS = 1 };
#endif

struct context {
	ucontext_t first;
	jmp_buf later;
	bool begun;
};

struct coroutine {
	struct context context;
	void *stack;
	void (*run)(uint32_t argument);
	uint32_t argument;
	enum kind kind;
	bool used, over, idle; /* idle: in poll(), runnable when there is a message */
	int in_call;           /* depth of system calls */
	bool dying;
	uint32_t asleep; /* steps for which the scheduler leaves it alone */
};

static struct coroutine coroutines[COROUTINES_MAX], *current;
static struct context scheduler;
static uint64_t seed, step;
static uint32_t engine; /* TIERD_ENGINE_* */
static uint32_t stall_chance, reclaim_chance, guest_threads;
static void (*staller)(uint32_t); /* who stalls; NULL: anybody */
static uint32_t remapped;         /* nobody sees what is touched there: MODEL_PAGES_MAX: none */
static bool odd, large, remap, verbose, vmm_ends, late_io, hugetlb, anon, ladder, asked, often, worker_done,
	guests_stop, stopping, daemon_done, adopting, repaired;

/* One corner is known and allowed: a daemon that is killed between the COPY of a fetch and the fetch's last move, and a page
 * that the VMM gives back before the successor has looked at it. The successor cannot tell whether the COPY was made, and
 * serves what was stored: what the page held when it last left. */
static bool maybe_arrived[MODEL_PAGES_MAX];
static uint64_t touched_ns[MODEL_PAGES_MAX]; /* when the guest last did */
static bool hidden[MODEL_PAGES_MAX];         /* whether the guest touches it may not be seen: forget_touches */
static bool touched_late[MODEL_PAGES_MAX];   /* it was leaving by then: the stock engine does not see who reads it */
static bool moving_before[MODEL_PAGES_MAX];
static bool watched, arriving[MODEL_PAGES_MAX]; /* since it is watched */

static struct tierd_guest *guest;
static int table_fd = -1;
static uint64_t kills, faults, evictions, unwritten, demotions, accesses, memory_errors, repairs;

bool model_chance(uint32_t thousandths)
{
	return thousandths && below(1000) < thousandths;
}

_Noreturn static void fail(const char *format, va_list arguments)
{
	printf("seed %lu, step %lu: ", seed, step);
	vprintf(format, arguments);
	printf("\n");
	fflush(stdout);
	_exit(1);
}

_Noreturn void model_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fail(format, arguments);
}

_Noreturn void script_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fail(format, arguments);
}

static enum page_state state_of(uint32_t page)
{
	return word_state(atomic_load(&guest->words[page]));
}

/* --- coroutines --------------------------------------------------------------------------------------------------------- */

static void switch_to(struct context *from, struct context *to)
{
	if (!JUMPS) {
		if (swapcontext(&from->first, &to->first))
			abort();
		return;
	}
	from->begun = true;
	if (_setjmp(from->later))
		return;
	if (to->begun)
		_longjmp(to->later, 1);
	setcontext(&to->first);
	abort();
}

static void to_scheduler(void)
{
	switch_to(&current->context, &scheduler);
}

void model_pause(void)
{
	if (current)
		to_scheduler();
}

void tierd_model_yield(void)
{
	model_pause();
}

void model_enter(void)
{
	model_pause();
	if (current)
		current->in_call++;
}

bool model_dying(void)
{
	return current && current->dying;
}

void model_exit(void)
{
	model_pause();
	if (!current)
		return;
	current->in_call--;
	if (current->dying) {
		current->over = true;
		to_scheduler();
	}
}

static void trampoline(void)
{
	current->run(current->argument);
	current->over = true;
	to_scheduler();
}

static void spawn(enum kind kind, void (*run)(uint32_t), uint32_t argument)
{
	struct coroutine *c = coroutines;

	while (c->used && !c->over)
		if (++c == coroutines + COROUTINES_MAX)
			abort();
	if (!c->stack)
		c->stack = malloc(STACK_BYTES);
	*c = (struct coroutine){.stack = c->stack, .run = run, .argument = argument, .kind = kind, .used = true};
	if (!c->stack || getcontext(&c->context.first))
		abort();
	c->context.first.uc_stack.ss_sp = c->stack;
	c->context.first.uc_stack.ss_size = STACK_BYTES;
	makecontext(&c->context.first, trampoline, 0);
}

/* Whose pages are asked for, the worker cannot bring back by itself. */
static bool served_out(void)
{
	return daemon_done && (!asked || worker_done);
}

static bool runnable(struct coroutine *c)
{
	if (!c->used || c->over)
		return false;
	if (c->kind == GUEST && M.waiter[c->argument].waiting)
		return false;
	if (c->kind == INSIDE)
		return M.calls_run;
	if (c->idle && !model_unread() && !served_out() && !atomic_load(&guest->answers))
		return false;
	return true;
}

/* One step of one coroutine; false when none can run. Now and then one is left alone for a long while. */
static bool schedule(void)
{
	struct coroutine *ready[COROUTINES_MAX];
	uint32_t n = 0, awake = 0;

	for (int i = 0; i < COROUTINES_MAX; i++) {
		struct coroutine *c = &coroutines[i];

		if (c->asleep)
			c->asleep--;
		if (!runnable(c))
			continue;
		ready[n++] = c;
		if (!c->asleep) {
			struct coroutine *swap = ready[awake];

			ready[awake++] = c;
			ready[n - 1] = swap;
		}
	}
	if (!n)
		return false;
	current = ready[below(awake ? awake : n)];
	if ((!staller || current->run == staller) && model_chance(stall_chance))
		current->asleep = staller ? below(1200) : below(below(8) ? 200 : 4000);
	step++;
	M.now_ns += 1000;
	switch_to(&scheduler, &current->context);
	current = NULL;
	for (uint32_t page = 0; watched && page < S.pages; page++)
		arriving[page] |= state_of(page) == ARRIVING;
	return true;
}

/* --- memory of a daemon, which dies with it ----------------------------------------------------------------------------- */

static struct {
	void *memory;
	size_t bytes;
} allocations[ALLOCATIONS_MAX];

void *model_alloc(size_t bytes)
{
	void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
	int i = 0;

	while (allocations[i].memory)
		if (++i == ALLOCATIONS_MAX)
			abort();
	allocations[i].memory = memory;
	allocations[i].bytes = bytes;
	memset(memory, 0, bytes);
	return memory;
}

void model_free(void *memory, size_t bytes)
{
	int i = 0;

	while (allocations[i].memory != memory)
		if (++i == ALLOCATIONS_MAX)
			model_fail("free of memory that was not allocated");
	if (allocations[i].bytes != bytes)
		model_fail("freed %zu bytes of %zu", bytes, allocations[i].bytes);
	allocations[i].memory = NULL;
	free(memory);
}

static void free_everything(void)
{
	for (int i = 0; i < ALLOCATIONS_MAX; i++) {
		struct tierd_guest *g = allocations[i].memory;

		if (g && allocations[i].bytes == sizeof(*g)) /* the daemon's, or the one by which it left a window */
			munmap(g->header, g->table_bytes);
		free(allocations[i].memory);
		allocations[i].memory = NULL;
	}
}

/* thread.c is not linked: workers are coroutines here, which look by themselves */
int threads_stop(struct tierd_guest *g)
{
	(void)g;
	return 0;
}

void ring(int eventfd)
{
	(void)eventfd;
}

/* --- the script's world ------------------------------------------------------------------------------------------------- */

enum outcome world_access(uint32_t thread, uint32_t page, bool write, uint64_t *value)
{
	enum model_access access;

	while ((access = model_access(thread, page, write, value)) == ACCESS_WAITS) {
		to_scheduler();
		if (!write && state_of(page) == MOVING && model_chance(800))
			return UNKNOWN; /* a signal: it does not touch the page again, which could not come back */
	}
	touched_ns[page] = M.now_ns;
	touched_late[page] = state_of(page) == LEAVING || state_of(page) == DROPPING;
	return access == ACCESS_MADE ? MADE : MEMORY_ERROR;
}

bool world_may_be_older(uint32_t page, uint64_t value)
{
	return maybe_arrived[page] && value == M.arrived[page];
}

/* A page that is STORED can be had: no poison of an earlier time may be there still. */
bool world_may_fail(uint32_t page)
{
	return M.may_fail[page] && state_of(page) != STORED;
}

static bool looks_untouched(uint32_t page)
{
	return !M.present[page] || M.rwp_protected[page];
}

/* Where readers are not held (by the stock engine) they may see it. That is why it refuses guests with large folios; the daemon
 * writes the bytes back before the page is anything else than DROPPING. */
bool world_zeroed(uint32_t page)
{
	return M.generation == TIERD_ENGINE_STOCK && M.zeroed[page] && state_of(page) == DROPPING;
}

void world_settled(uint32_t page)
{
	maybe_arrived[page] &= adopting || S.maybe_zero[page];
}

/* What one entry maps: the pages whose touches are not seen any more when one of them is unmapped. */
static uint32_t mapped_together(uint32_t page, uint32_t *count)
{
	*count = large ? MODEL_LARGE_PAGES : 1;
	return page - page % *count;
}

/* With large entries, until the next pass: one that is made anew between a pass's look and its deactivation hides touches, too. */
static void forget_touches(uint32_t page)
{
	uint32_t count, first = mapped_together(page, &count);

	for (uint32_t p = first; p < first + count; p++) {
		touched_ns[p] = 0;
		hidden[p] = large;
	}
}

static bool is_given_back(uint32_t page)
{
	uint32_t count, first = mapped_together(page, &count);
	bool any = false;

	for (uint32_t p = first; p < first + count; p++)
		any |= S.giving_back[p];
	return any;
}

void world_give_back(uint32_t page)
{
	model_give_back(page);
	forget_touches(page); /* it is nobody's now: it may leave as the zeros that it is */
}

void world_zap(uint32_t page)
{
	model_zap(page);
	forget_touches(page);
}

/* With swap, and guests that have large folios: not where the stock engine serves, whose seeds stay what they are. */
static void reclaim(void)
{
	uint32_t page = below(S.pages);

	model_reclaim(page, below(2));
	forget_touches(page);
}

void world_lock(uint32_t page)
{
	(void)page; /* nobody else runs between an access and its check */
}

void world_unlock(uint32_t page)
{
	(void)page;
}

void world_rest(uint32_t steps)
{
	while (steps--)
		model_pause();
}

bool world_stopped(void)
{
	return guests_stop;
}

static int (*beside_run)(struct tierd_batch *);
static struct tierd_batch *beside_batch;
static int beside_error;
static bool beside_over;

static void run_beside(uint32_t unused)
{
	(void)unused;
	beside_error = beside_run(beside_batch);
	beside_over = true;
}

void world_begin_beside(int (*run)(struct tierd_batch *), struct tierd_batch *b)
{
	beside_run = run;
	beside_batch = b;
	beside_over = false;
	spawn(DAEMON, run_beside, 0);
}

int world_end_beside(void)
{
	while (!beside_over)
		model_pause();
	return beside_error;
}

void world_before_pass(void)
{
	for (uint32_t page = 0; page < S.pages; page++) {
		if (hidden[page])
			touched_ns[page] = 0;
		hidden[page] = false;
	}
}

void world_before_select(void)
{
	for (uint32_t page = 0; page < S.pages; page++)
		/* of a batch that is over: a fault took it, and gives it back; or of the other batch, which is being stored */
		moving_before[page] =
			state_of(page) == MOVING || state_of(page) == ARRIVING || state_of(page) == LEAVING;
}

/* The data plane has lost sight of it since it was selected, and knows that: it does not leave. */
static bool dated_since(uint32_t page, double min_idle_s)
{
	return page_age(guest, page, epoch_now(guest), atomic_load(&guest->words[page])) * (double)guest->epoch_ns <
	       min_idle_s * 1e9;
}

/* Rule 8: what leaves was idle for long enough. A page that is mapped was touched since, and is turned back by the hold (or it was
 * fetched from the staging area, so the batch has lost it). */
void world_selected(double min_idle_s, bool sinks)
{
	for (uint32_t page = 0; page < S.pages; page++)
		if (page != remapped && state_of(page) == (anon || sinks ? MOVING : LEAVING) && !moving_before[page] &&
		    looks_untouched(page) && !(sinks && touched_late[page]) && !is_given_back(page) && !hidden[page] &&
		    !(large && dated_since(page, min_idle_s)) &&
		    M.now_ns - touched_ns[page] < (uint64_t)(min_idle_s * 1e9))
			model_fail("page %u leaves %lu ns after the guest touched it", page,
				   M.now_ns - touched_ns[page]);
}

/* Once, somewhere among the pages that may leave: a mapping made anew. Of one that is with the guest, or about to be moved: what is
 * stored is lost to it with every engine, and what fills such a hole is the kernel. */
static void run_remapper(uint32_t unused)
{
	enum page_state state = anon && below(2) ? STAGING : RESIDENT;

	(void)unused;
	for (int pauses = 0; pauses < 300; pauses++)
		model_pause();
	while (!guests_stop) {
		uint32_t page = below(S.pages);

		if (guest && guest->words && !adopting && state_of(page) == state && !M.staged[page] &&
		    M.missing[page] && model_remap(page)) {
			S.maybe_zero[page] |= anon; /* new memory, and not the same file again */
			remapped = page;
			break;
		}
		model_pause();
	}
}

static void run_inside(uint32_t unused)
{
	(void)unused;
	for (;;) {
		model_inside();
		model_pause();
	}
}

static void run_guest(uint32_t thread)
{
	script_guest(thread);
}

static void run_final_read(uint32_t thread)
{
	script_read_all(thread);
}

/* --- the daemon --------------------------------------------------------------------------------------------------------- */

static void run_fault_worker(uint32_t unused)
{
	struct tierd_worker *w;
	uint32_t tid;

	(void)unused;
	if (tierd_worker_create(guest, &w))
		model_fail("no fault worker");
	while (!served_out()) {
		int n = tierd_worker_serve(w, &tid);
		uint64_t due_ns;

		if (asked)
			tierd_worker_answers(w);
		tierd_worker_retry(w, &due_ns);
		if (n > 0)
			faults += (uint64_t)n;
		current->idle = n == -EAGAIN && !due_ns;
		to_scheduler();
		current->idle = false;
	}
	tierd_worker_destroy(w);
}

/* Python's part in trio's thread. */
static void run_asker(uint32_t unused)
{
	struct script_requests held = {0};

	(void)unused;
	while (!served_out())
		if (!script_answer(guest, &held))
			to_scheduler();
}

/* A page may be LOST where its stored copy was destroyed. */
static void check_lost(void)
{
	for (uint32_t page = 0; page < S.pages; page++)
		if (state_of(page) == LOST && !M.may_fail[page])
			model_fail("page %u is lost, and nothing destroyed its stored copy", page);
}

static uint32_t store_of_tier(uint32_t tier)
{
	return !ladder ? tier - 1 : tier == 1 ? MODEL_POOL : tier - 2;
}

/* Somebody else spoils the store, or repairs it. */
static void spoil_store(void)
{
	uint32_t page = below(S.pages);
	page_word word = atomic_load(&guest->words[page]);
	bool stored = word_state(word) == STORED || word_state(word) == ARRIVING;

	if (model_chance(400))
		model_repair(below(S.pages));
	else if (stored && word_tier(word) != TIER_ZERO && word_tier(word) != TIER_STAGING && !M.late_io)
		model_destroy(store_of_tier(word_tier(word)), page);
}

/* A copy may be destroyed just when its page was fetched from there. The page leaves once more, unwritten, and nobody reads it. */
static bool unreadable(uint32_t page)
{
	page_word word = atomic_load(&guest->words[page]);

	return word_state(word) == STORED && word_tier(word) != TIER_ZERO && word_tier(word) != TIER_STAGING &&
	       M.store[store_of_tier(word_tier(word))].destroyed[page];
}

static uint64_t unreadable_pages(void)
{
	uint64_t n = 0;

	for (uint32_t page = 0; page < S.pages; page++)
		n += unreadable(page);
	return n;
}

static bool engine_has_windows(void)
{
	return engine != TIERD_ENGINE_STOCK && !anon;
}

static bool is_dropping(void);

/* Sync mode outlives a death exactly as long as a page that was being dropped is undecided, whatever else fails. */
static void check_left_window(void)
{
	if (engine_has_windows() && !M.gone && M.async == is_dropping())
		model_fail(M.async ? "a page is undecided, and the guest is not held"
				   : "the guest is held, and no page is being dropped");
}

/* Between two cycles no page is on its way and left to nobody: its tier could never be emptied. One that a fault has in hand meanwhile
 * may be so again. */
static void check_sinks(void)
{
	memset(arriving, 0, sizeof(arriving));
	watched = true;
	script_select_all(guest);
	for (uint32_t page = 0; page < S.pages; page++)
		if (state_of(page) == MOVING && !arriving[page] && !quarantined(guest, page))
			model_fail("page %u is moving, and in no batch", page);
	watched = false;
}

static void serve(uint32_t adopted)
{
	struct tierd_adoption adoption;
	int error;

	while ((error = adopted ? tierd_guest_adopt(guest, guest->mapped, guest->mapped_count, &adoption)
				: tierd_guest_arm(guest)))
		if (M.gone)
			return;
		else if (error == -EINTR)
			continue; /* the mode could not be changed */
		else if (check_left_window(),
			 ((error == -ETIMEDOUT || error == -EPERM) && anon) || (error == -EBUSY && asked))
			continue; /* the predecessor's batch is under way still; or a punch must be made again, and was not */
		else if (!adopted || !S.failures) /* the daemon tries again for as long as the VMM lives */
			model_fail("%s failed: error %d", adopted ? "adoption" : "arm", -error);
	adopting = false;
	for (uint64_t page = 0; page < guest->pages; page++)
		maybe_arrived[page] &= word_state(atomic_load(&guest->words[page])) != RESIDENT || S.maybe_zero[page];
	for (uint32_t i = 0; i < 1 + (seed % 3 != 0); i++) /* only now: adoption moves pages without asking */
		spawn(DAEMON, run_fault_worker, i);
	if (asked)
		spawn(DAEMON, run_asker, 0);
	while (!guests_stop) {
		check_lost();
		script_cycle(guest);
		if ((ladder || anon) && !M.gone)
			check_sinks();
	}
	tierd_guest_set_reads(guest, S.losses ? 0 : UINT64_MAX, TIERD_LOST_POISON);
	while (!stopping) /* whoever waits now must be served without a later cycle's help */
		model_pause();
	while (script_bring_back(guest, repaired) > (repaired ? 0 : unreadable_pages()) && !M.gone)
		check_lost();
}

static struct tierd_guest_args described(bool adopted);

/* The part of an adoption that needs no store, and a time in which there is none, and nobody serves: who touches what does not leave
 * goes on. */
static void leave_window(void)
{
	struct tierd_guest_args args = described(true);
	uint32_t stays = M.faults.punch_stays;
	bool punches = !stays || below(2);
	int error;

	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i] = (struct tierd_tier){.fd = -1};
	M.faults.punch_stays = punches ? 0 : 800;
	do
		error = tierd_leave_window(&args);
	while (error == -EINTR || (error == -ENOMEM && hugetlb)); /* of the mode, or for the look at a page */
	M.faults.punch_stays = stays;
	if (error && !M.gone)
		model_fail("the window was not left: error %d", -error);
	if (punches && engine_has_windows() && !M.async && !M.gone)
		model_fail("the guest is held, and nothing but a store is wanted");
	check_left_window();
	world_rest(below(3) ? below(200) : 0);
}

static void run_worker(uint32_t adopted)
{
	worker_done = false;
	if (adopted && engine_has_windows())
		leave_window();
	serve(adopted);
	worker_done = true;
}

/* It dies: its threads, wherever they are, and every call about its memory from now on. The daemon must come to an end all the same. */
static void vmm_end(void)
{
	int32_t gone = 0;

	M.gone = true;
	S.failures = true;
	for (int i = 0; i < COROUTINES_MAX; i++)
		coroutines[i].over |= coroutines[i].kind == GUEST;
	memset(M.waiter, 0, sizeof(M.waiter));
	M.under_way = 0;
	if (tierd_guest_gone(guest, &gone) || !gone)
		model_fail("the VMM has ended, and the daemon cannot tell");
}

/* How long a window lasts must not depend on a disk. (rfc compares pages with their copies there.) */
void model_swapped_in(void)
{
	if (engine == TIERD_ENGINE_RWP && !M.faults.mode_fails && current && current->run == run_worker &&
	    atomic_load(&guest->in_window))
		model_fail("a sync window reads from swap");
}

/* One file; or a pool, and a file or two. */
static void set_tiers(struct tierd_guest_args *args, bool adopted)
{
	uint32_t files = ladder ? S.tiers - 1 : 1, first = S.tiers - files + 1;

	if (ladder)
		args->tiers[1] = (struct tierd_tier){.fd = FD_POOL,
						     .kind = TIERD_KIND_MEMORY,
						     .flags = adopted ? 0 : TIERD_SPACE_NEW,
						     .capacity_bytes = below(M.pages + 1) * MODEL_PAGE_BYTES};
	for (uint32_t i = 0; i < files; i++)
		args->tiers[first + i] = (struct tierd_tier){.fd = FD_STORE + (int)i,
							     .kind = TIERD_KIND_FILE,
							     .flags = M.direct ? TIERD_SPACE_DIRECT : 0,
							     .capacity_bytes = (M.pages - below(4)) * MODEL_PAGE_BYTES};
	if (M.late_io)
		args->tiers[S.tiers].flags |= TIERD_SPACE_LATE;
	for (uint32_t tier = 1; tier <= S.tiers; tier++)
		if (S.asked >> tier & 1) {
			args->tiers[tier].kind = TIERD_KIND_ASKED;
			args->tiers[tier].fd = -1;
			args->tiers[tier].flags = 0;
		}
}

/* Of a tier that is asked: a file of the model, whose bytes are on the device when a write of it ends. */
static int store_file(uint32_t tier)
{
	return FD_STORE + (int)store_of_tier(tier);
}

int world_store_write(uint32_t tier, uint64_t page, uint32_t count, const uint8_t *bytes)
{
	for (uint32_t i = 0; i < count; i++) {
		struct iovec one = {.iov_base = (void *)(bytes + i * MODEL_PAGE_BYTES), .iov_len = MODEL_PAGE_BYTES};
		ssize_t n = sys_store_write(store_file(tier), &one, 1, (page + i) * MODEL_PAGE_BYTES);

		if (n != MODEL_PAGE_BYTES)
			return n < 0 ? (int)n : -EIO;
	}
	return sys_store_sync(store_file(tier));
}

int world_store_read(uint32_t tier, uint64_t page, uint32_t count, uint8_t *bytes)
{
	for (uint32_t i = 0; i < count; i++) {
		ssize_t n = sys_store_read(store_file(tier), bytes + i * MODEL_PAGE_BYTES, MODEL_PAGE_BYTES,
					   (page + i) * MODEL_PAGE_BYTES);

		if (n != MODEL_PAGE_BYTES)
			return n < 0 ? (int)n : -EIO;
	}
	return 0;
}

int world_store_discard(uint32_t tier, uint64_t page, uint64_t count)
{
	return sys_store_discard(store_file(tier), page * MODEL_PAGE_BYTES, count * MODEL_PAGE_BYTES);
}

/* What a daemon is told of the guest. */
static struct tierd_guest_args described(bool adopted)
{
	struct tierd_guest_args args = {
		.table_fd = table_fd,
		.uffd = FD_UFFD,
		.pidfd = FD_PIDFD,
		.pagemap_fd = FD_PAGEMAP,
		.mem_fd = FD_VMM,
		.idle_fd = anon && engine == TIERD_ENGINE_STOCK && seed % 2 ? FD_IDLE : -1,
		.zap = hugetlb ? TIERD_ZAP_INJECT : TIERD_ZAP_PAGEOUT,
		.engine = engine,
		.page_bytes = hugetlb ? MODEL_PAGE_BYTES : 0,
		.use_pagemap = engine == TIERD_ENGINE_STOCK && seed % 2 && !hugetlb && !anon,
		.chunk_bytes = 8 * MODEL_PAGE_BYTES,
		.region_count = M.regions,
		.readahead_pages = 1u << seed % 4,
	};

	for (uint32_t i = 0; i < M.regions; i++)
		args.regions[i] = (struct tierd_region){.address = M.region[i].address,
							.bytes = M.region[i].pages * MODEL_PAGE_BYTES,
							.offset = M.region[i].offset,
							.staging = anon ? M.region[i].address + MODEL_STAGING : 0,
							.memfd = anon ? -1 : FD_MEM + (int)i};
	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i].fd = -1;
	set_tiers(&args, adopted);
	return args;
}

static void daemon_start(bool adopted)
{
	struct tierd_guest_args args = described(adopted);

	if (!adopted) {
		struct tierd_identity identity = {.pid = 1, .epoch_ns = 1000000, .page_bytes = args.page_bytes};

		table_fd = args.table_fd = memfd_create("table", 0);
		if (tierd_table_create(table_fd, &identity, args.regions, args.region_count))
			model_fail("no table");
	}
	if (tierd_guest_create(&args, &guest))
		model_fail("no guest");
	script_set_reads(guest);
	atomic_store(&guest->thread_count, seed % 4 == 1 ? 2 : 9); /* who may read at once: park.c */
	daemon_done = false;
	spawn(DAEMON, run_worker, adopted);
}

/* SIGKILL: who is in user space is gone at once; who is in the kernel finishes the call first, and holds the lock until
 * then. */
static void daemon_kill(void)
{
	bool dying = true;

	kills++;
	for (uint64_t page = 0; page < guest->pages; page++)
		maybe_arrived[page] |= word_state(atomic_load(&guest->words[page])) == ARRIVING;
	adopting = true;
	for (int i = 0; i < COROUTINES_MAX; i++) {
		struct coroutine *c = &coroutines[i];

		if (!c->used || c->over || c->kind != DAEMON)
			continue;
		c->dying = true;
		c->idle = false;
		c->over = !c->in_call;
	}
	while (dying) { /* adoption waits for the lock */
		dying = false;
		for (int i = 0; i < COROUTINES_MAX; i++)
			dying |= coroutines[i].used && !coroutines[i].over && coroutines[i].dying;
		if (dying)
			schedule();
	}
	for (uint32_t page = 0; page < S.pages; page++)
		if (looks_untouched(
			    page)) /* by a pass that was to stamp it once more at its end: as old as the pass was long */
			touched_ns[page] = 0;
	free_everything();
	watched = false;
	daemon_start(true);
}

/* --- a run -------------------------------------------------------------------------------------------------------------- */

static void set_up(void)
{
	uint32_t faulty = below(3);
	bool crowded = !below(3); /* few pages and long stalls: batches of the same pages follow each other closely */

	memset(&M, 0, sizeof(M));
	memset(coroutines, 0, sizeof(coroutines));
	memset(&S, 0, sizeof(S));
	memset(maybe_arrived, 0, sizeof(maybe_arrived));
	memset(touched_ns, 0, sizeof(touched_ns));
	memset(touched_late, 0, sizeof(touched_late));
	memset(hidden, 0, sizeof(hidden));
	remapped = MODEL_PAGES_MAX;
	guests_stop = stopping = daemon_done = adopting = repaired = watched = false;
	M.now_ns = 1000000000;
	M.regions = crowded ? 1 : 1 + below(MODEL_REGIONS_MAX);
	for (uint32_t i = 0; i < M.regions; i++) {
		struct model_region *r = &M.region[i];

		r->pages = large ? MODEL_LARGE_PAGES * (1 + below(2)) : crowded ? 2 + below(3) : 4 + below(9);
		r->first_page = M.pages;
		r->address = 0x100000 * (i + 1);
		r->offset = large ? 0 : below(3) * MODEL_PAGE_BYTES; /* else no large entry could map it */
		M.pages += r->pages;
	}
	M.direct = below(2);
	if (faulty)
		M.faults = (struct model_faults){.copy_nomem = below(60),
						 .copy_again = below(60),
						 .protect_fails = below(20),
						 .store_eio = below(100),
						 .store_short = below(100),
						 .sync_loses = below(300)};
	if (faulty)
		M.faults.discard_fails = 2 + M.faults.store_eio % 4;
	if (!below(4) && !anon)
		M.faults.punch_stays = below(300);
	if (faulty && odd)
		M.faults.odd_answers = below(25);
	if (faulty && engine != TIERD_ENGINE_STOCK) {
		M.faults.resolve_fails = below(200);
		M.faults.register_fails = below(200);
		M.faults.mode_fails = below(3) ? 0 : below(300);
	}
	if (anon && remap)
		M.faults.register_fails = 0; /* nothing helps then */
	M.late_io = late_io;
	M.huge = hugetlb;
	M.large_entries = large;
	M.anon = S.anon = anon;
	if (anon && !below(3))
		M.border = below(M.pages);
	if (anon && faulty) {
		M.faults.move_busy = below(100);
		M.faults.miscounts = below(300);
		M.faults.enter_fails = below(100);
		M.faults.cut_short = below(60);
	}
	M.generation = engine;
	M.async = true;
	S.pages = M.pages;
	S.tiers = ladder ? 2 + below(2) : 1;
	if (asked)
		S.asked = !ladder ? 1u << 1 : S.tiers == 2 ? 1u << 2 : (1 + below(3)) << 2;
	if (ladder) {
		M.faults.pool_refuses = below(400);
		M.faults.pool_full = below(100);
	}
	S.failures = faulty || (hugetlb && M.faults.punch_stays);
	S.losses = faulty != 2 && !below(3);
	if (faulty == 2 && !crowded) {
		M.faults.read_eio = below(200);
		M.faults.read_short = below(200);
		M.faults.read_flip = below(200);
	}
	stall_chance = below(3) ? below(30) : 0;
	staller = crowded ? run_fault_worker : NULL;
	if (crowded)
		stall_chance = 20 + below(60);
	reclaim_chance = engine == TIERD_ENGINE_STOCK || hugetlb || anon || below(3) ? 0 : below(400);
	M.write_pauses = crowded || late_io ? below(100) : 0;
	M.read_pauses = below(4) ? 0 : below(100);
	guest_threads = 1 + below(GUEST_THREADS_MAX);
	S.often = often;
	if (often) {
		M.faults.copy_nomem = 300 + below(600);
		M.faults.store_eio = 0;
		M.write_pauses = 30 + below(270);
		S.failures = true;
	}
}

static void run_until(bool (*over)(void), const char *what)
{
	for (uint64_t i = 0; !over(); i++)
		if (i > QUIESCE_STEPS || !schedule())
			model_fail("hang: %s", what);
		else
			M.now_ns += 50000; /* what was to be tried again later is tried now */
}

static bool all_over(void)
{
	for (int i = 0; i < COROUTINES_MAX; i++)
		if (coroutines[i].used && !coroutines[i].over && coroutines[i].kind != INSIDE)
			return false;
	return true;
}

static bool guests_over(void)
{
	for (int i = 0; i < COROUTINES_MAX; i++)
		if (coroutines[i].used && !coroutines[i].over && coroutines[i].kind == GUEST)
			return false;
	return true;
}

static bool pool_is_quiet(void)
{
	return !M.pool_changes;
}

/* Every page was read at the end: it is RESIDENT again, or LOST, or cannot be read, because its stored copy is still destroyed. */
static void check_end(void)
{
	if (!M.async)
		model_fail("the guest is held still at the end");
	for (uint32_t page = 0; page < S.pages; page++)
		if (state_of(page) != RESIDENT && (repaired || state_of(page) != LOST || !M.may_fail[page]) &&
		    (repaired || !unreadable(page)))
			model_fail("page %u is in state %d at the end", page, state_of(page));
}

/* What a tier that is asked was given, and no word speaks of, is known for garbage until it is discarded. */
static void check_garbage(void)
{
	static const uint64_t zeros[MODEL_PAGE_BYTES / 8];

	for (uint32_t tier = 1; tier <= S.tiers; tier++)
		for (uint32_t page = 0; S.asked >> tier & 1 && page < S.pages; page++) {
			page_word word = atomic_load(&guest->words[page]);

			if ((word_takes_space(word) && word_tier(word) == tier) ||
			    bit_get(guest->garbage[tier], page) ||
			    !memcmp(M.store[store_of_tier(tier)].bytes[page], zeros, MODEL_PAGE_BYTES))
				continue;
			model_fail("page %u has space in tier %u, and nobody knows", page, tier);
		}
}

static void count_up(void)
{
	accesses += S.accesses;
	memory_errors += S.memory_errors;
	evictions += S.evicted;
	demotions += S.demoted;
	repairs += atomic_load(&guest->count.pages_repaired);
	unwritten += atomic_load(&guest->count.pages_unwritten);
}

/* Where a kill leaves most to its successor: the page has its copy, and may be the guest's still. */
static bool is_dropping(void)
{
	for (uint32_t page = 0; page < S.pages; page++)
		if (state_of(page) == DROPPING)
			return true;
	return false;
}

static void run_seed(uint64_t steps)
{
	uint32_t kill_chance;
	uint64_t ends_at;

	script_random = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
	step = 0;
	below(2);
	set_up();
	ends_at = vmm_ends ? 200 + below((uint32_t)steps - 200) : steps;
	kill_chance = often ? 6 : below(2) && !remap ? 1 + below(3) : 0; /* in 1/1000 of every hundredth step */
	for (uint32_t i = 0; i < guest_threads; i++)
		spawn(GUEST, run_guest, i);
	if (remap) {
		spawn(GUEST, run_remapper, GUEST_THREADS_MAX);
		S.failures = true; /* it is refused, then */
	}
	if (anon)
		spawn(INSIDE, run_inside, 0);
	daemon_start(false);
	for (uint64_t i = 0; i < steps; i++) {
		if (!schedule())
			model_fail("hang: nobody can run");
		if (i % 10 == 9 && model_chance(kill_chance * (often && is_dropping() ? 30 : 3)))
			daemon_kill();
		if (i == ends_at) {
			vmm_end();
			break;
		}
		if (i % 64 == 63)
			model_write_back();
		if (i % 64 == 31 && S.losses)
			spoil_store();
		if (i % (often ? 2048 : ladder ? 1024 : 256) == 128) /* a page may take its time until it sinks there */
			model_late_lands();
		if (i % 16 == 5 && model_chance(reclaim_chance))
			reclaim();
	}
	memset(&M.faults, 0, sizeof(M.faults));
	guests_stop = true;
	run_until(guests_over, "a guest thread waits for ever");
	while (M.late_count)
		model_late_lands();
	run_until(pool_is_quiet, "a change of the pool does not end");
	repaired = below(2);
	for (uint32_t page = 0; page < S.pages && repaired; page++)
		model_repair(page);
	stopping = true;
	for (uint32_t i = 0; i < guest_threads && !M.gone; i++)
		spawn(GUEST, run_final_read, i);
	run_until(guests_over, "a guest thread waits for ever at the end");
	daemon_done = true;
	run_until(all_over, "the daemon does not end");
	if (!M.gone) {
		check_end();
		check_garbage();
	}
	count_up();
	tierd_guest_destroy(guest);
	for (int i = 0; i < ALLOCATIONS_MAX; i++)
		if (allocations[i].memory)
			model_fail("%zu bytes leaked", allocations[i].bytes);
	close(table_fd);
	for (int i = 0; i < COROUTINES_MAX; i++)
		free(coroutines[i].stack);
}

int main(int count, char **arguments)
{
	uint64_t seeds = 1000, from = 1, steps = 8000;

	for (int i = 1; i < count; i++) {
		if (!strcmp(arguments[i], "-v"))
			verbose = true;
		else if (!strcmp(arguments[i], "--late-io"))
			late_io = true;
		else if (!strcmp(arguments[i], "--remap"))
			remap = true;
		else if (!strcmp(arguments[i], "--odd"))
			odd = true;
		else if (!strcmp(arguments[i], "--vmm-ends"))
			vmm_ends = true;
		else if (!strcmp(arguments[i], "--large"))
			large = true;
		else if (!strcmp(arguments[i], "--hugetlb"))
			hugetlb = true;
		else if (!strcmp(arguments[i], "--anon"))
			anon = true;
		else if (!strcmp(arguments[i], "--ladder"))
			ladder = true;
		else if (!strcmp(arguments[i], "--asked"))
			asked = true;
		else if (!strcmp(arguments[i], "--often"))
			often = true;
		else if (i + 1 < count && !strcmp(arguments[i], "--engine") && script_engine(arguments[i + 1], &engine))
			i++;
		else if (i + 1 < count && !strcmp(arguments[i], "--seeds"))
			seeds = strtoull(arguments[++i], NULL, 10);
		else if (i + 1 < count && !strcmp(arguments[i], "--from"))
			from = strtoull(arguments[++i], NULL, 10);
		else if (i + 1 < count && !strcmp(arguments[i], "--steps"))
			steps = strtoull(arguments[++i], NULL, 10);
		else
			return fprintf(stderr,
				       "usage: driver [--seeds N] [--from S] [--steps K] [--late-io] [--remap] [--odd] "
				       "[--large] [--hugetlb] [--anon] [--ladder] [--asked] [--often] [--vmm-ends] "
				       "[--engine "
				       "stock|rwp|rfc] [-v]\n"),
			       2;
	}
	for (seed = from; seed < from + seeds; seed++) {
		if (verbose)
			printf("seed %lu\n", seed);
		run_seed(steps);
	}
	printf("%lu seeds from %lu: %lu accesses, %lu faults, %lu pages evicted, %lu unwritten, %lu pages demoted, %lu "
	       "repaired, %lu "
	       "memory "
	       "errors, %lu kills; every byte right\n",
	       seeds, from, accesses, faults, evictions, unwritten, demotions, repairs, memory_errors, kills);
	return 0;
}
