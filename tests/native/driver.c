/* SPDX-License-Identifier: Apache-2.0 */
/*
 * driver.c: the data plane against the model kernel, under a seeded scheduler.
 *
 *   driver [--seeds N] [--from S] [--steps K] [-v]
 *
 * Guest threads read and write, fault workers serve, one worker evicts, a killer kills the daemon and starts another. Every
 * page-table access and every piece of a system call is a point where somebody else may run; a seed says who. One invariant:
 * every byte that the guest reads is the last one it wrote (of a page that the VMM gave back itself: zeros, or what it last
 * held). And nobody waits for ever. A failing seed is printed and fails again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "internal.h"
#include "model.h"

enum {
	STACK_BYTES = 128 << 10,
	COROUTINES_MAX = 16,
	ALLOCATIONS_MAX = 4096,
	QUIESCE_STEPS = 200000,
	GUEST_THREADS_MAX = 6
};

enum kind { GUEST, DAEMON };

struct coroutine {
	ucontext_t context;
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
static ucontext_t scheduler;
static uint64_t random_state, seed, step;
static uint32_t stall_chance, guest_threads;
static void (*staller)(uint32_t); /* who stalls; NULL: anybody */
static bool verbose, guests_stop, stopping, daemon_done, adopting;

/* What the guest last wrote; pages that the VMM gave back may read as zeros, too. One corner is known and allowed: a
 * daemon that is killed between the COPY of a fetch and the fetch's last move, and a page that the VMM gives back before the
 * successor has looked at it. The successor cannot tell whether the COPY was made, and serves what was stored: what the page
 * held when it last left. */
static uint64_t last[MODEL_PAGES_MAX];
static bool maybe_zero[MODEL_PAGES_MAX], maybe_arrived[MODEL_PAGES_MAX];
static int giving_back[MODEL_PAGES_MAX];
static uint64_t next_value;

static struct tierd_guest *guest;
static int table_fd = -1;
static uint64_t kills, accesses, faults, evictions;

/* --- chance ------------------------------------------------------------------------------------------------------------- */

static uint64_t roll(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state * 0x2545f4914f6cdd1dull >> 16;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)(roll() % n);
}

bool model_chance(uint32_t thousandths)
{
	return thousandths && below(1000) < thousandths;
}

_Noreturn void model_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	printf("seed %lu, step %lu: ", seed, step);
	vprintf(format, arguments);
	printf("\n");
	va_end(arguments);
	fflush(stdout);
	_exit(1);
}

/* --- coroutines --------------------------------------------------------------------------------------------------------- */

static void switch_to(ucontext_t *from, ucontext_t *to)
{
	if (swapcontext(from, to))
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
	if (!c->stack || getcontext(&c->context))
		abort();
	c->context.uc_stack.ss_sp = c->stack;
	c->context.uc_stack.ss_size = STACK_BYTES;
	makecontext(&c->context, trampoline, 0);
}

static bool runnable(struct coroutine *c)
{
	if (!c->used || c->over)
		return false;
	if (c->kind == GUEST && M.waiter[c->argument].waiting)
		return false;
	if (c->idle && !model_unread() && !daemon_done)
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
		free(allocations[i].memory);
		allocations[i].memory = NULL;
	}
}

/* thread.c is not linked: workers are coroutines here */
int threads_stop(struct tierd_guest *g)
{
	(void)g;
	return 0;
}

/* --- the guest ---------------------------------------------------------------------------------------------------------- */

static void read_page(uint32_t thread, uint32_t page)
{
	uint64_t value;

	while (!model_access(thread, page, false, &value))
		to_scheduler();
	accesses++;
	if (value != last[page] && !(maybe_zero[page] && value == 0) &&
	    !(maybe_zero[page] && maybe_arrived[page] && value == M.arrived[page]))
		model_fail("page %u reads %lu, the guest last wrote %lu", page, value, last[page]);
	last[page] = value;
	if (!giving_back[page])
		maybe_zero[page] = false;
	maybe_arrived[page] &= adopting || maybe_zero[page];
}

static void write_page(uint32_t thread, uint32_t page, uint64_t value)
{
	while (!model_access(thread, page, true, &value))
		to_scheduler();
	accesses++;
	last[page] = value;
	maybe_zero[page] = giving_back[page] != 0;
	maybe_arrived[page] &= adopting;
}

/* The VMM itself punches a page (a balloon): from here on it reads as zeros, or as what was stored. */
static void give_back(uint32_t page)
{
	for (uint32_t i = 0; i < M.regions; i++) {
		struct model_region *r = &M.region[i];

		if (page - r->first_page >= r->pages)
			continue;
		giving_back[page]++;
		maybe_zero[page] = true;
		sys_mem_punch(FD_MEM + (int)i, r->offset + (page - r->first_page) * MODEL_PAGE_BYTES, MODEL_PAGE_BYTES);
		giving_back[page]--;
	}
}

static void run_guest(uint32_t thread)
{
	uint32_t hot = below(M.pages);

	while (!guests_stop) {
		uint32_t page = below(3) ? (hot + below(4)) % M.pages : below(M.pages), what = below(100);

		if (what < 40)
			read_page(thread, page);
		else if (what < 50) /* a walk, for the read-ahead */
			for (uint32_t i = 0; i < 6; i++)
				read_page(thread, (page + i) % M.pages);
		else if (what < 86)
			write_page(thread, page, ++next_value);
		else if (what < 93)
			write_page(thread, page, 0);
		else
			give_back(page);
		for (uint32_t i = below(12); i; i--)
			to_scheduler();
		if (!below(40))
			hot = below(M.pages);
	}
}

static void run_final_read(uint32_t thread)
{
	for (uint32_t page = 0; page < M.pages; page++)
		read_page(thread, page);
}

/* --- the daemon --------------------------------------------------------------------------------------------------------- */

static void run_fault_worker(uint32_t unused)
{
	struct tierd_worker *w;
	uint32_t tid;

	(void)unused;
	if (tierd_worker_create(guest, &w))
		model_fail("no fault worker");
	while (!daemon_done) {
		int n = tierd_worker_serve(w, &tid);
		uint64_t due_ns;

		tierd_worker_retry(w, &due_ns);
		if (n > 0)
			faults += (uint64_t)n;
		current->idle = n == -EAGAIN && !due_ns;
		to_scheduler();
		current->idle = false;
	}
	tierd_worker_destroy(w);
}

static bool cancelled_at_will(struct tierd_batch *b, struct tierd_batch_result *r)
{
	if (!model_chance(40))
		return false;
	tierd_batch_cancel(b, r);
	return true;
}

static void evict_batch(struct tierd_batch *b, uint64_t *page)
{
	struct tierd_batch_result r;
	double min_idle_s = below(2) ? 0 : 0.002;

	if (tierd_batch_select(b, *page, min_idle_s, 1 + below(16), &r))
		model_fail("select failed");
	*page = r.next_page;
	if (!r.selected_pages || cancelled_at_will(b, &r))
		return;
	if (tierd_batch_hold(b, &r) || cancelled_at_will(b, &r) || tierd_batch_copy(b, &r) ||
	    cancelled_at_will(b, &r) || tierd_batch_write(b, 1, &r) || cancelled_at_will(b, &r) ||
	    tierd_batch_drop(b, &r)) {
		tierd_batch_cancel(b, &r);
		return;
	}
	evictions += r.evicted_pages;
	tierd_batch_release(b, &r);
}

static void one_cycle(void)
{
	struct tierd_pass pass;
	struct tierd_batch *b;
	uint64_t page = 0, n;

	while (page < guest->pages) {
		if (tierd_guest_pass(guest, page, &pass))
			model_fail("pass failed");
		page = pass.next_page;
	}
	for (uint32_t i = below(80); i; i--)
		model_pause();
	if (tierd_batch_create(guest, 16, &b))
		model_fail("no batch");
	for (page = 0; page < guest->pages;)
		evict_batch(b, &page);
	tierd_batch_destroy(b);
	page = 0;
	if (model_chance(100))
		tierd_guest_restore(guest, &page, below(MODEL_PAGES_MAX), &n);
	if (model_chance(400))
		tierd_guest_discard(guest, below(MODEL_PAGES_MAX) + 1, &n);
}

static uint64_t stored_pages(void)
{
	struct tierd_counters c;

	tierd_guest_counters(guest, &c);
	if (c.pages_lost)
		model_fail("%lu pages lost, and nothing destroyed their stored copy", c.pages_lost);
	return c.state_pages[STORED] + c.state_pages[ARRIVING] + c.state_pages[DROPPING] + c.state_pages[LEAVING];
}

static void run_worker(uint32_t adopted)
{
	struct tierd_adoption adoption;
	uint64_t page, n;

	if (adopted ? tierd_guest_adopt(guest, &adoption) : tierd_guest_arm(guest))
		model_fail("%s failed", adopted ? "adoption" : "arm");
	adopting = false;
	for (page = 0; page < guest->pages; page++)
		maybe_arrived[page] &= word_state(atomic_load(&guest->words[page])) != RESIDENT;
	for (uint32_t i = 0; i < 1 + (seed % 3 != 0); i++) /* only now: adoption moves pages without asking */
		spawn(DAEMON, run_fault_worker, i);
	while (!stopping) {
		stored_pages();
		if (model_chance(20)) { /* an order that finds nothing to do hurts nobody */
			uint64_t recovered;

			if (tierd_guest_retry(guest, &recovered, &n) || n)
				model_fail("retry: %lu pages are lost", n);
		}
		if (guests_stop) /* whoever waits now must be served without a later cycle's help */
			model_pause();
		else
			one_cycle();
	}
	do {
		page = 0;
		tierd_guest_restore(guest, &page, UINT64_MAX, &n);
	} while (stored_pages());
}

static void daemon_start(bool adopted)
{
	struct tierd_guest_args args = {
		.table_fd = table_fd,
		.uffd = FD_UFFD,
		.pidfd = FD_PIDFD,
		.pagemap_fd = FD_PAGEMAP,
		.zap = TIERD_ZAP_PAGEOUT,
		.use_pagemap = seed % 2,
		.chunk_bytes = 8 * MODEL_PAGE_BYTES,
		.region_count = M.regions,
		.readahead_pages = 1u << seed % 4,
	};

	for (uint32_t i = 0; i < M.regions; i++)
		args.regions[i] = (struct tierd_region){.address = M.region[i].address,
							.bytes = M.region[i].pages * MODEL_PAGE_BYTES,
							.offset = M.region[i].offset,
							.memfd = FD_MEM + (int)i};
	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i].fd = -1;
	args.tiers[1] = (struct tierd_tier){
		.fd = FD_STORE, .flags = M.direct ? TIERD_SPACE_DIRECT : 0, .capacity_pages = M.pages - below(4)};
	if (!adopted) {
		struct tierd_identity identity = {.pid = 1, .epoch_ns = 1000000};

		table_fd = args.table_fd = memfd_create("table", 0);
		if (tierd_table_create(table_fd, &identity, args.regions, args.region_count))
			model_fail("no table");
	}
	if (tierd_guest_create(&args, &guest))
		model_fail("no guest");
	tierd_guest_set_reads(guest, UINT64_MAX, TIERD_LOST_POISON); /* what is read wrong now is read right some day */
	atomic_store(&guest->thread_count, seed % 4 == 1 ? 2 : 9);   /* who may read at once: park.c */
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
	munmap(guest->header, guest->table_bytes);
	free_everything();
	daemon_start(true);
}

/* --- a run -------------------------------------------------------------------------------------------------------------- */

static void set_up(void)
{
	uint32_t faulty = below(3);
	bool crowded = !below(3); /* few pages and long stalls: batches of the same pages follow each other closely */

	memset(&M, 0, sizeof(M));
	memset(coroutines, 0, sizeof(coroutines));
	memset(last, 0, sizeof(last));
	memset(maybe_zero, 0, sizeof(maybe_zero));
	memset(maybe_arrived, 0, sizeof(maybe_arrived));
	memset(giving_back, 0, sizeof(giving_back));
	guests_stop = stopping = daemon_done = adopting = false;
	M.now_ns = 1000000000;
	M.regions = crowded ? 1 : 1 + below(MODEL_REGIONS_MAX);
	for (uint32_t i = 0; i < M.regions; i++) {
		struct model_region *r = &M.region[i];

		r->pages = crowded ? 2 + below(3) : 4 + below(9);
		r->first_page = M.pages;
		r->address = 0x100000 * (i + 1);
		r->offset = below(3) * MODEL_PAGE_BYTES;
		M.pages += r->pages;
	}
	M.direct = below(2);
	if (faulty)
		M.faults = (struct model_faults){.copy_nomem = below(60),
						 .copy_again = below(60),
						 .protect_fails = below(20),
						 .store_eio = below(100),
						 .store_short = below(100),
						 .sync_loses = below(300),
						 .punch_stays = 0};
	if (faulty == 2 && !crowded) {
		M.faults.read_eio = below(200);
		M.faults.read_short = below(200);
		M.faults.read_flip = below(200);
	}
	stall_chance = below(3) ? below(30) : 0;
	staller = crowded ? run_fault_worker : NULL;
	if (crowded)
		stall_chance = 20 + below(60);
	M.store_pauses = crowded ? below(100) : 0;
	guest_threads = 1 + below(GUEST_THREADS_MAX);
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
		if (coroutines[i].used && !coroutines[i].over)
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

static void run_seed(uint64_t steps)
{
	uint32_t kill_chance;

	random_state = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
	step = 0;
	roll();
	set_up();
	kill_chance = below(2) ? 1 + below(3) : 0; /* in 1/1000 of every hundredth step */
	for (uint32_t i = 0; i < guest_threads; i++)
		spawn(GUEST, run_guest, i);
	daemon_start(false);
	for (uint64_t i = 0; i < steps; i++) {
		if (!schedule())
			model_fail("hang: nobody can run");
		if (i % 10 == 9 && model_chance(kill_chance * 3))
			daemon_kill();
		if (i % 64 == 63)
			model_write_back();
	}
	memset(&M.faults, 0, sizeof(M.faults));
	guests_stop = true;
	run_until(guests_over, "a guest thread waits for ever");
	stopping = true;
	for (uint32_t i = 0; i < guest_threads; i++)
		spawn(GUEST, run_final_read, i);
	run_until(guests_over, "a guest thread waits for ever at the end");
	daemon_done = true;
	run_until(all_over, "the daemon does not end");
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
		else if (i + 1 < count && !strcmp(arguments[i], "--seeds"))
			seeds = strtoull(arguments[++i], NULL, 10);
		else if (i + 1 < count && !strcmp(arguments[i], "--from"))
			from = strtoull(arguments[++i], NULL, 10);
		else if (i + 1 < count && !strcmp(arguments[i], "--steps"))
			steps = strtoull(arguments[++i], NULL, 10);
		else
			return fprintf(stderr, "usage: driver [--seeds N] [--from S] [--steps K] [-v]\n"), 2;
	}
	for (seed = from; seed < from + seeds; seed++) {
		if (verbose)
			printf("seed %lu\n", seed);
		run_seed(steps);
	}
	printf("%lu seeds from %lu: %lu accesses, %lu faults, %lu pages evicted, %lu kills; every byte right\n", seeds,
	       from, accesses, faults, evictions, kills);
	return 0;
}
