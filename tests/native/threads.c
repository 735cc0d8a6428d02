/* SPDX-License-Identifier: Apache-2.0 */
/*
 * threads.c: the data plane against the model kernel with real threads, for the thread sanitizer.
 *
 *   threads [--rounds N] [--cycles N] [--seed S] [--anon 1] [--asked 1]
 *
 * driver.c decides who runs, so it cannot show what a compiler or a CPU may reorder. Here guest threads, fault workers, the
 * evictor and a reader of the counters really run at once; the model kernel has one lock, which it lets go between pages. Each
 * round ends as a `keep` stop does: the daemon's threads end, another one adopts what they left. Every guest thread owns the
 * pages whose number it leaves as a remainder, and checks what it reads there.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"
#include "model.h"

enum { GUEST_THREADS = 3, WORKERS = 2, BATCH_PAGES = 16 };

/*
 * The lock of the model kernel orders nothing that the data plane may rely on, so the sanitizer must not see it: it is taken in
 * functions that are not instrumented, and model.c, which it guards, is compiled without.
 */
#define UNSEEN __attribute__((no_sanitize("thread"), noinline))

static char kernel;

UNSEEN static void kernel_lock(void)
{
	while (__atomic_test_and_set(&kernel, __ATOMIC_ACQUIRE))
		sched_yield();
}

UNSEEN static void kernel_unlock(void)
{
	__atomic_clear(&kernel, __ATOMIC_RELEASE);
}

/* model.c calls these instead of memcpy and memset, which the sanitizer would see */
void *model_copy(void *to, const void *from, size_t bytes);
void *model_set(void *to, int value, size_t bytes);

UNSEEN void *model_copy(void *to, const void *from, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		((volatile char *)to)[i] = ((const volatile char *)from)[i];
	return to;
}

UNSEEN void *model_set(void *to, int value, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		((volatile char *)to)[i] = (char)value;
	return to;
}

static _Thread_local uint64_t random_state;
static uint64_t seed = 1, rounds = 8, cycles_per_round = 100;
static struct tierd_guest *guest;
static int table_fd = -1;
static _Atomic bool guests_stop, daemon_stop, over;
static bool asked; /* the tier is one that Python asks */
static _Atomic uint64_t accesses, evicted, served;

static uint32_t below(uint32_t n)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)((random_state * 0x2545f4914f6cdd1dull >> 16) % n);
}

static void seed_thread(uint64_t number)
{
	random_state = (seed * 64 + number + 1) * 0x9e3779b97f4a7c15ull;
}

/* --- what the model asks of its scheduler ------------------------------------------------------------------------------- */

bool model_chance(uint32_t thousandths)
{
	return thousandths && below(1000) < thousandths;
}

_Noreturn void model_fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	printf("seed %lu: ", seed);
	vprintf(format, arguments);
	printf("\n");
	va_end(arguments);
	fflush(stdout);
	_exit(1);
}

bool model_dying(void)
{
	return false;
}

void model_enter(void)
{
	kernel_lock();
}

void model_exit(void)
{
	kernel_unlock();
}

void model_pause(
	void) /* only ever within a call, or in a pause of the caller's own, which then gains a lock for a moment */
{
	if (below(4))
		return;
	kernel_unlock();
	sched_yield();
	kernel_lock();
}

void tierd_model_yield(void)
{
	if (!below(8))
		sched_yield();
}

void model_swapped_in(void)
{
}

void *model_alloc(size_t bytes)
{
	void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);

	memset(memory, 0, bytes);
	return memory;
}

void model_free(void *memory, size_t bytes)
{
	(void)bytes;
	free(memory);
}

/* thread.c is not linked: this file has its own */
int threads_stop(struct tierd_guest *g)
{
	(void)g;
	return 0;
}

void ring(int eventfd)
{
	(void)eventfd;
}

/* --- the guest ---------------------------------------------------------------------------------------------------------- */

UNSEEN static uint64_t access_page(uint32_t thread, uint32_t page, bool write, uint64_t value)
{
	kernel_lock();
	while (model_access(thread, page, write, &value) != ACCESS_MADE) {
		while (M.waiter[thread].waiting) {
			kernel_unlock();
			sched_yield();
			kernel_lock();
		}
	}
	kernel_unlock();
	atomic_fetch_add(&accesses, 1);
	return value;
}

static void *guest_thread(void *argument)
{
	uint32_t thread = (uint32_t)(uintptr_t)argument;
	uint64_t last[MODEL_PAGES_MAX] = {0}, next = thread;
	uint32_t hot = 0;

	seed_thread(thread);
	while (!atomic_load(&guests_stop)) {
		uint32_t page = ((hot + below(3)) % (M.pages / GUEST_THREADS)) * GUEST_THREADS + thread;

		if (!below(20)) {
			hot = below(M.pages);
			usleep(below(300)); /* so that something is idle, now and then */
		}
		if (below(2)) {
			last[page] = below(12) ? next += GUEST_THREADS : 0;
			access_page(thread, page, true, last[page]);
		} else {
			uint64_t value = access_page(thread, page, false, 0);

			if (value != last[page])
				model_fail("page %u reads %lu, the guest last wrote %lu", page, value, last[page]);
		}
	}
	for (uint32_t page = thread; page < M.pages; page += GUEST_THREADS)
		if (access_page(thread, page, false, 0) != last[page])
			model_fail("page %u is wrong at the end", page);
	return NULL;
}

/* --- the daemon --------------------------------------------------------------------------------------------------------- */

static void *fault_thread(void *argument)
{
	struct tierd_worker *w;
	uint32_t tid;

	seed_thread(10 + (uint64_t)(uintptr_t)argument);
	if (tierd_worker_create(guest, &w))
		model_fail("no fault worker");
	while (!atomic_load(&daemon_stop)) {
		int n = tierd_worker_serve(w, &tid);
		uint64_t due_ns;

		if (asked)
			tierd_worker_answers(w);
		tierd_worker_retry(w, &due_ns);
		if (n > 0)
			atomic_fetch_add(&served, (uint64_t)n);
		else
			sched_yield();
	}
	tierd_worker_destroy(w);
	return NULL;
}

/* What metrics and orders do from other threads. */
static void *watching_thread(void *unused)
{
	struct tierd_counters c;
	uint64_t idle[2];

	(void)unused;
	seed_thread(20);
	while (!atomic_load(&daemon_stop)) {
		tierd_guest_counters(guest, &c);
		if (c.pages_lost)
			model_fail("%lu pages lost", c.pages_lost);
		tierd_guest_idle(guest, below(3), (double[]){0, 1}, 2, idle);
		tierd_guest_set_readahead(guest, 1 + below(8));
		tierd_guest_set_capacity(guest, 1, (M.pages - below(4)) * MODEL_PAGE_BYTES);
		sched_yield();
	}
	return NULL;
}

/* What trio's thread does where the tier is asked. */
static void *asking_thread(void *unused)
{
	static uint64_t bytes[256][8 * MODEL_PAGE_BYTES / 8];
	struct tierd_request r;
	uint32_t n;

	(void)unused;
	seed_thread(21);
	while (!atomic_load(&daemon_stop)) {
		if (tierd_guest_asked(guest, &r, 1, &n))
			model_fail("nothing is asked");
		if (n) {
			ssize_t got = sys_store_read(FD_STORE, bytes[r.number], r.count * MODEL_PAGE_BYTES,
						     r.page * MODEL_PAGE_BYTES);
			uint32_t good = got > 0 ? (uint32_t)got / MODEL_PAGE_BYTES : 0;

			if (tierd_guest_answer(guest, r.number, bytes[r.number], good, good ? 0 : -EIO))
				model_fail("an answer was not taken");
		}
		sched_yield();
	}
	return NULL;
}

static int store_offered(struct tierd_batch *b)
{
	struct tierd_batch_result r;
	struct tierd_run run;

	if (tierd_batch_store(b, &r))
		return -EIO;
	for (uint32_t slot = 0; asked && !tierd_batch_run(b, 1, slot, &run) && run.count; slot = run.slot + run.count) {
		struct iovec from = {.iov_base = run.bytes, .iov_len = run.count * MODEL_PAGE_BYTES};

		if (sys_store_write(FD_STORE, &from, 1, run.page * MODEL_PAGE_BYTES) != (ssize_t)from.iov_len)
			return -EIO;
	}
	return asked && sys_store_sync(FD_STORE) ? -EIO : 0;
}

static bool take_batch(struct tierd_batch *b, uint64_t *page)
{
	struct tierd_batch_result r;

	if (tierd_batch_select(b, M.anon ? TIER_STAGING : TIER_GUEST, false, *page, 0, BATCH_PAGES, &r))
		model_fail("select failed");
	*page = r.next_page;
	if (!r.selected_pages)
		return false;
	if (!(!M.anon && tierd_batch_hold(b, &r)) && !tierd_batch_copy(b, &r) &&
	    !tierd_batch_write(b, (uint32_t[]){1}, 1, UINT32_MAX, &r))
		return true;
	tierd_batch_cancel(b, &r);
	return false;
}

static void *store_thread(void *argument)
{
	seed_thread(50);
	return (void *)(intptr_t)store_offered(argument);
}

static void finish_batch(struct tierd_batch *b, pthread_t storer)
{
	struct tierd_batch_result r;
	void *error;

	pthread_join(storer, &error);
	if ((!error && tierd_batch_stored(b, &r)) || error || tierd_batch_drop(b, &r)) {
		tierd_batch_cancel(b, &r);
		return;
	}
	atomic_fetch_add(&evicted, r.evicted_pages);
	tierd_batch_release(b, &r);
}

/* Each batch is stored by a thread of its own, while the other one is taken or dropped. */
static void evict(struct tierd_batch *two[2])
{
	pthread_t storer[2];
	bool storing[2] = {false, false};
	uint32_t k = 0;

	for (uint64_t page = 0; page < guest->pages || storing[0] || storing[1]; k ^= 1) {
		if (storing[k])
			finish_batch(two[k], storer[k]);
		storing[k] = page < guest->pages && take_batch(two[k], &page);
		if (storing[k] && pthread_create(&storer[k], NULL, store_thread, two[k]))
			model_fail("no thread");
	}
}

static void stage(void)
{
	struct tierd_span span = {.end_page = guest->pages, .max_pages = BATCH_PAGES};
	struct tierd_staged r;

	for (uint64_t page = 0; page < guest->pages; page = r.next_page)
		if (tierd_guest_unstage(guest, page, &r))
			model_fail("unstage failed");
	while (span.next_page < span.end_page)
		if (tierd_guest_stage(guest, &span, 1, 0, &r))
			model_fail("stage failed");
	tierd_guest_refaults(guest, 0, guest->pages);
}

/* The VMM's, which makes our calls. */
static void *inside_thread(void *unused)
{
	(void)unused;
	seed_thread(40);
	while (!atomic_load(&over)) {
		model_enter();
		if (M.calls_run)
			model_inside();
		model_exit();
		sched_yield();
	}
	return NULL;
}

static void cycle(void)
{
	struct tierd_batch *two[2];
	struct tierd_pass pass;
	uint64_t n;
	uint32_t failed_tier;

	for (uint64_t page = 0; page < guest->pages; page = pass.next_page)
		if (tierd_guest_pass(guest, page, &pass))
			model_fail("pass failed");
	if (M.anon)
		stage();
	if (tierd_batch_create(guest, BATCH_PAGES, &two[0]) || tierd_batch_create(guest, BATCH_PAGES, &two[1]))
		model_fail("no batch");
	evict(two);
	tierd_batch_destroy(two[1]);
	tierd_batch_destroy(two[0]);
	tierd_guest_discard(guest, MODEL_PAGES_MAX, below(2) ? UINT32_MAX : 0, &n, &failed_tier);
}

static void daemon_create(bool adopted)
{
	struct tierd_guest_args args = {
		.table_fd = table_fd,
		.uffd = FD_UFFD,
		.pidfd = FD_PIDFD,
		.pagemap_fd = FD_PAGEMAP,
		.mem_fd = FD_VMM,
		.idle_fd = FD_IDLE,
		.zap = TIERD_ZAP_PAGEOUT,
		.chunk_bytes = 8 * MODEL_PAGE_BYTES,
		.region_count = 1,
		.readahead_pages = 8,
	};
	struct tierd_adoption adoption;

	args.regions[0] = (struct tierd_region){.address = M.region[0].address,
						.bytes = M.pages * MODEL_PAGE_BYTES,
						.staging = M.anon ? M.region[0].address + MODEL_STAGING : 0,
						.memfd = M.anon ? -1 : FD_MEM};
	for (int i = 0; i < TIERD_TIERS; i++)
		args.tiers[i].fd = -1;
	args.tiers[1] = (struct tierd_tier){
		.fd = FD_STORE, .kind = TIERD_KIND_FILE, .capacity_bytes = M.pages * MODEL_PAGE_BYTES};
	if (asked) {
		args.tiers[1].kind = TIERD_KIND_ASKED;
		args.tiers[1].fd = args.asked_fd = -1;
	}
	if (!adopted) {
		struct tierd_identity identity = {.pid = 1, .epoch_ns = 1000000};

		table_fd = args.table_fd = memfd_create("table", 0);
		if (tierd_table_create(table_fd, &identity, args.regions, 1))
			model_fail("no table");
	}
	if (tierd_guest_create(&args, &guest) ||
	    (adopted ? tierd_guest_adopt(guest, guest->mapped, guest->mapped_count, &adoption)
		     : tierd_guest_arm(guest)))
		model_fail("no guest");
}

static void start(pthread_t *thread, void *(*run)(void *), uint64_t number)
{
	if (pthread_create(thread, NULL, run, (void *)(uintptr_t)number))
		abort();
}

/* One daemon's life, while the guest runs. The last one sees the guest out and brings everything back. */
static void daemon_life(bool adopted, pthread_t *guests)
{
	pthread_t workers[WORKERS], watcher, asker;
	uint64_t page = 0, n;

	atomic_store(&daemon_stop, false);
	daemon_create(adopted);
	for (uint64_t i = 0; i < WORKERS; i++)
		start(&workers[i], fault_thread, i);
	start(&watcher, watching_thread, 0);
	if (asked)
		start(&asker, asking_thread, 0);
	for (uint64_t i = 0; i < cycles_per_round; i++)
		cycle();
	if (guests) {
		atomic_store(&guests_stop, true);
		for (int i = 0; i < GUEST_THREADS; i++)
			pthread_join(guests[i], NULL);
		do
			for (page = 0; page < guest->pages;)
				if (tierd_guest_restore(guest, &page, UINT64_MAX, &n) == -EBUSY)
					model_fail("two workers");
		while (tierd_guest_disarm(guest) && asked); /* where it is asked, they come later */
	}
	atomic_store(&daemon_stop, true);
	for (int i = 0; i < WORKERS; i++)
		pthread_join(workers[i], NULL);
	pthread_join(watcher, NULL);
	if (asked)
		pthread_join(asker, NULL);
	tierd_guest_destroy(guest);
}

int main(int count, char **arguments)
{
	pthread_t guests[GUEST_THREADS], inside;

	for (int i = 1; i + 1 < count; i += 2) {
		uint64_t n = strtoull(arguments[i + 1], NULL, 10);

		if (!strcmp(arguments[i], "--rounds"))
			rounds = n;
		else if (!strcmp(arguments[i], "--cycles"))
			cycles_per_round = n;
		else if (!strcmp(arguments[i], "--seed"))
			seed = n;
		else if (!strcmp(arguments[i], "--anon"))
			M.anon = n;
		else if (!strcmp(arguments[i], "--asked"))
			asked = n;
	}
	seed_thread(30);
	M.regions = 1;
	M.pages = M.region[0].pages = 48;
	M.region[0].address = 0x100000;
	M.now_ns = 1000000000;
	M.faults = (struct model_faults){.copy_again = 20, .copy_nomem = 5, .store_short = 50, .store_eio = 20};
	for (uint64_t i = 0; i < GUEST_THREADS; i++)
		start(&guests[i], guest_thread, i);
	start(&inside, inside_thread, 0);
	for (uint64_t i = 0; i < rounds; i++)
		daemon_life(i != 0, i == rounds - 1 ? guests : NULL);
	atomic_store(&over, true);
	pthread_join(inside, NULL);
	close(table_fd);
	printf("%lu rounds: %lu accesses, %lu faults, %lu pages evicted; every byte right\n", rounds, accesses, served,
	       evicted);
	return 0;
}
