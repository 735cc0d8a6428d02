/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fault.c: the way of a fault. Allocates nothing, logs nothing, takes no lock.
 *
 * A fault that cannot be served now (COPY says ENOMEM or EAGAIN) goes back to where it was and its waiter is woken: it faults
 * again and the kernel delivers a new message, so there is no queue of our own that a crash could lose.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Who reads one for a store that hangs must not have others in hand: nobody else would get them. In the model, where that is no
 * matter, several come at once. */
#ifdef TIERD_MODEL
enum { MESSAGES_AT_ONCE = 16 };
#else
enum { MESSAGES_AT_ONCE = 1 };
#endif

enum {
	MESSAGES = MESSAGES_AT_ONCE,
	STREAMS = 4,    /* sequential walks followed at once */
	READ_TRIES = 2, /* at once: with its neighbours, then alone */
	RETRY_PAUSE_US_MIN = 1000,
	RETRY_PAUSE_US_MAX = 1000000,
	NO_MEMORY_PAUSE_US = 1000,
	ZERO_BYTES = 65536,
};

/* the page is there: something is to be lifted from it, or it is to be mapped */
enum { STAYS = UFFD_PAGEFAULT_FLAG_WP | UFFD_PAGEFAULT_FLAG_MINOR | SYS_RWP_FAULT };

static uint8_t zeros[ZERO_BYTES] __attribute__((aligned(ZERO_BYTES)));

static const void *zeros_of(const struct tierd_guest *g)
{
	return g->zeros ? g->zeros : zeros;
}

struct stream {
	uint64_t next_page;
	uint32_t window, last_use;
};

struct tierd_worker {
	struct tierd_guest *g;
	struct pool_reader *reader;
	bool was_moving; /* claimed[0] */
	uint8_t *buffer; /* readahead_max pages */
	page_word *claimed;
	struct stream streams[STREAMS];
	uint32_t clock;
	_Atomic uint64_t busy_since_ns;
	struct uffd_msg messages[MESSAGES];
};

int tierd_worker_create(struct tierd_guest *g, struct tierd_worker **ret)
{
	struct tierd_worker *w = sys_alloc(sizeof(*w));

	if (!w)
		return -ENOMEM;
	w->g = g;
	w->buffer = sys_alloc((size_t)g->readahead_max * g->page_bytes);
	w->claimed = sys_alloc(g->readahead_max * sizeof(*w->claimed));
	if (!w->buffer || !w->claimed || (g->pool && pool_reader_create(g->pool, &w->reader))) {
		tierd_worker_destroy(w);
		return -ENOMEM;
	}
	*ret = w;
	return 0;
}

void tierd_worker_destroy(struct tierd_worker *w)
{
	struct tierd_guest *g = w->g;

	if (w->buffer)
		sys_free(w->buffer, (size_t)g->readahead_max * g->page_bytes);
	if (w->claimed)
		sys_free(w->claimed, g->readahead_max * sizeof(*w->claimed));
	if (w->reader)
		pool_reader_destroy(w->reader);
	sys_free(w, sizeof(*w));
}

uint64_t tierd_worker_busy_since(struct tierd_worker *w)
{
	return atomic_load_explicit(&w->busy_since_ns, memory_order_relaxed);
}

static void wake(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	int error = count ? sys_uffd_wake(g->uffd, address_of(g, page), count * g->page_bytes) : 0;

	if (error && error != -ESRCH)
		count_error(g, &g->count.kernel_errors, error);
}

/*
 * A fault on a page that somebody owns is left to the owner, who wakes its waiters. COPY and WRITEPROTECT wake them before
 * the owner has moved the page on; whoever faults in between (the VMM may punch the page again at any time) would wait for
 * ever. So: who leaves a fault counts it and then looks at the page again; who owns a page moves it on and then looks at the
 * count. One of the two sees the other.
 */
uint64_t waits_now(struct tierd_guest *g)
{
	return atomic_load(&g->waits);
}

void wake_waiters(struct tierd_guest *g, uint64_t page, uint64_t count, uint64_t waits_before)
{
	atomic_thread_fence(memory_order_seq_cst);
	if (waits_now(g) != waits_before)
		wake(g, page, count);
}

static int leave_to_owner(struct tierd_guest *g, uint64_t page, page_word seen)
{
	atomic_fetch_add(&g->waits, 1);
	atomic_thread_fence(memory_order_seq_cst);
	if (page_load(g, page) != seen)
		return -EALREADY;
	count_add(&g->count.faults_wait, 1);
	return 0;
}

static bool transient(int error)
{
	return error == -EAGAIN || error == -ENOMEM || error == -EINTR;
}

/* Owned page -> RESIDENT, touched now; `clean`: it is what the store has, and write-protected. */
static void settle(struct tierd_guest *g, uint64_t page, page_word owned, bool clean)
{
	page_word to = word_with_clean(word_touched(owned, epoch_next(g)), clean);

	if (word_tier(to) == TIER_UNTOUCHED)
		to = word_with_tier(to, TIER_ZERO);
	if (word_state(owned) == ARRIVING && word_spent(to))
		atomic_fetch_add(&g->spent_pages, 1);
	if (!page_move(g, page, owned, to))
		abort();
}

/*
 * Places n pages that we own, from `from` or zeros. Returns how many are in place. A page that the memory file holds already is
 * in place: the kernel is right, and its waiter is woken. *error says what stopped it. `protect`, in: against writes; out: all that
 * are in place are.
 */
static uint32_t place(struct tierd_guest *g, uint64_t page, uint32_t n, const void *from, bool *protect, int *error)
{
	uint64_t bytes_max = g->huge ? g->page_bytes : from ? UINT64_MAX : ZERO_BYTES;
	uint32_t placed = 0;

	*error = 0;
	while (placed < n) {
		const void *bytes = from ? (const uint8_t *)from + (size_t)placed * g->page_bytes : zeros_of(g);
		uint64_t want = (uint64_t)(n - placed) * g->page_bytes, done = 0;
		int err;

		if (want > bytes_max)
			want = bytes_max;
		err = sys_uffd_copy(g->uffd, address_of(g, page + placed), bytes, want, *protect, &done);
		placed += (uint32_t)(done / g->page_bytes);
		if (!err || (done && err == -EAGAIN))
			continue;
		if (err == -ENOENT && want > g->page_bytes) { /* some of it is not mapped, or it lies in two mappings */
			bytes_max = g->page_bytes;
			continue;
		}
		if (err == -EEXIST && placed < n)
			err = mem_exists(g, page + placed);
		if (!err) {
			wake(g, page + placed, 1);
			*protect = false;
			placed++;
			continue;
		}
		*error = err;
		break;
	}
	return placed;
}

/* --- a page that stays: RESIDENT or LEAVING ----------------------------------------------------------------------------- */

/* A fault on a hole: zeros for it, and for the untouched pages behind it when the guest walks. */
static uint32_t claim_untouched(struct tierd_worker *w, uint64_t page, uint32_t want)
{
	struct tierd_guest *g = w->g;
	struct region *r = region_of_page(g, page);
	uint32_t n = 1;

	while (n < want && page + n < r->first_page + r->pages) {
		page_word word = page_load(g, page + n);

		if (!word_untouched(word) || !page_move(g, page + n, word, word_with_state(word, RESOLVING)))
			break;
		w->claimed[n++] = word_with_state(word, RESOLVING);
	}
	return n;
}

static uint32_t stream_window(struct tierd_worker *w, uint64_t page, struct stream **ret)
{
	struct stream *oldest = &w->streams[0];
	uint32_t limit = atomic_load_explicit(&w->g->readahead_pages, memory_order_relaxed);

	w->clock++;
	for (int i = 0; i < STREAMS; i++) {
		struct stream *s = &w->streams[i];

		if (s->window && s->next_page == page) {
			s->last_use = w->clock;
			s->window = s->window * 2 < limit ? s->window * 2 : limit;
			*ret = s;
			return s->window;
		}
		if (w->clock - s->last_use > w->clock - oldest->last_use)
			oldest = s;
	}
	*oldest = (struct stream){.window = 1, .last_use = w->clock};
	*ret = oldest;
	return 1;
}

static int resolve_missing(struct tierd_worker *w, uint64_t page, page_word owned)
{
	struct tierd_guest *g = w->g;
	uint64_t waits = waits_now(g);
	struct stream *s;
	uint32_t n, placed;
	bool protect = false;
	int error;

	n = claim_untouched(w, page, stream_window(w, page, &s));
	w->claimed[0] = owned;
	s->next_page = page + n;
	placed = place(g, page, n, NULL, &protect, &error);
	for (uint32_t i = 0; i < n; i++) {
		if (i < placed)
			settle(g, page + i, w->claimed[i], false);
		else if (!page_move(g, page + i, w->claimed[i], word_with_state(w->claimed[i], RESIDENT)))
			abort();
	}
	wake_waiters(g, page, placed, waits);
	if (placed < n)
		wake(g, page + placed, n - placed);
	return placed ? 0 : error;
}

/* Returns 0, or the error after which the guest must try again. */
static int resolve(struct tierd_worker *w, uint64_t page, page_word word, uint64_t flags)
{
	struct tierd_guest *g = w->g;
	page_word owned = word_resolving(word);
	uint64_t waits = waits_now(g);
	int error;

	if (!(flags & STAYS)) {
		error = resolve_missing(w, page, owned);
	} else {
		error = g->engine->resolve(g, page, flags);
		settle(g, page, owned, false);
		wake_waiters(g, page, 1, waits);
	}
	if (!error) /* each fault is of one kind */
		count_add(word_state(word) == LEAVING ? &g->count.faults_cancel
			  : flags & STAYS             ? &g->count.faults_resolve
						      : &g->count.faults_zero,
			  1);
	if (!error && atomic_load_explicit(&g->in_window, memory_order_relaxed))
		count_add(&g->count.faults_window, 1);
	return error;
}

/* --- a page that is stored ---------------------------------------------------------------------------------------------- */

/* A page on its way to another tier is taken back where it is; only the one that is waited for. */
static uint32_t claim_stored(struct tierd_worker *w, unsigned int tier, uint64_t page, uint32_t want)
{
	struct tierd_guest *g = w->g;
	struct region *r = region_of_page(g, page);
	uint32_t n = 0;

	while (n < want && page + n < r->first_page + r->pages) {
		page_word word = page_load(g, page + n);

		if ((word_state(word) != STORED && (n || word_state(word) != MOVING)) || word_tier(word) != tier)
			break;
		if (!page_move(g, page + n, word, word_with_state(word, ARRIVING)))
			break;
		if (!n)
			w->was_moving = word_state(word) == MOVING;
		w->claimed[n++] = word_with_state(word, ARRIVING);
	}
	return n;
}

/* Claimed pages that did not get here go back; whoever faulted on them meanwhile was left to us. One that was MOVING is so again: a
 * write of it to the next tier may be under way, which a successor must know, and its bytes have not changed. */
static void give_back(struct tierd_worker *w, uint64_t page, uint32_t from, uint32_t to)
{
	if (from >= to)
		return;
	for (uint32_t i = from; i < to; i++)
		if (!page_move(w->g, page + i, w->claimed[i],
			       word_with_state(w->claimed[i], !i && w->was_moving ? MOVING : STORED)))
			abort();
	wake(w->g, page + from, to - from);
}

/* Number of pages at the start of the run whose bytes are what was written. */
static uint32_t verified(struct tierd_worker *w, uint64_t page, uint32_t n, const uint8_t *bytes)
{
	struct tierd_guest *g = w->g;

	for (uint32_t i = 0; i < n; i++) {
		if (checksum(bytes + (size_t)i * g->page_bytes, g->page_bytes) != g->sums[page + i]) {
			count_error(g, &g->count.checksum_errors, -EBADMSG);
			count_add(&g->tier_counts[word_tier(w->claimed[0])].checksum_errors, 1);
			return i;
		}
	}
	return n;
}

/* The staging area holds the pages themselves: there is nothing to verify. */
static int read_verified(struct tierd_worker *w, uint64_t page, uint32_t n, uint32_t *good)
{
	struct tierd_guest *g = w->g;
	unsigned int tier = word_tier(w->claimed[0]);
	int error = tier_read(g, w->reader, tier, page, n, w->buffer);

	*good = error ? 0 : tier == TIER_STAGING ? n : verified(w, page, n, w->buffer);
	return error;
}

/* Reads what is claimed. Shrinks the claim to what could be read; 0: not even the first page, which stays claimed. */
static uint32_t read_claimed(struct tierd_worker *w, uint64_t page, uint32_t n)
{
	struct tierd_guest *g = w->g;

	for (int try = 0; try < READ_TRIES; try++) {
		uint32_t good;
		int error = read_verified(w, page, n, &good);

		if (error)
			count_error(g, &g->count.store_read_errors, error);
		if (good) {
			give_back(w, page, good, n);
			return good;
		}
		/* the neighbours must not fail the page that is waited for: alone, then */
		give_back(w, page, 1, n);
		n = 1;
	}
	return 0;
}

/*
 * A LOST page gets its poison while nobody owns it, so a retry that brings the page back must not be overtaken by a poison
 * that is on its way: who poisons says so and then looks at the word, who retries takes the word and then waits (retry_lost).
 */
static void poison_lost(struct tierd_guest *g, uint64_t page, page_word lost)
{
	uint64_t address = address_of(g, page);
	int error = 0;

	atomic_fetch_add(&g->poisoning, 1);
	atomic_thread_fence(memory_order_seq_cst);
	if (page_load(g, page) == lost && atomic_load(&g->on_lost) == TIERD_LOST_POISON) {
		error = sys_uffd_poison(g->uffd, address, g->page_bytes);
		if (error == -EEXIST) { /* poisoned already, or a hold's marker is in the way: lift it, then poison */
			sys_uffd_unprotect(g->uffd, address, g->page_bytes);
			error = sys_uffd_poison(g->uffd, address, g->page_bytes);
		}
	}
	atomic_fetch_sub(&g->poisoning, 1);
	if (error && error != -EEXIST)
		count_error(g, &g->count.kernel_errors, error);
	if (error == -EINVAL || error == -ENOTTY)
		atomic_store(&g->on_lost, TIERD_LOST_HOLD); /* no such call here: to wake would be to fault for ever */
	else
		wake(g, page, 1);
}

/* Nothing can bring the page back: an honest memory error, never zeros or stale bytes; or, by policy and without
 * UFFDIO_POISON (before 6.6), the guest's thread stays blocked. We own the page (ARRIVING). */
static void lose(struct tierd_guest *g, uint64_t page, page_word owned)
{
	page_word lost = word_with_state(owned, LOST);

	if (!page_move(g, page, owned, lost))
		abort();
	count_add(&g->count.pages_lost, 1);
	poison_lost(g, page, lost);
}

/* Pages that we own and that the VMM does not map any more, or maps anew: their bytes go back into the file, so that whoever
 * maps it later finds them. A page that is in its cache already is right. How many are in place. */
static uint32_t put_into_file(struct tierd_guest *g, uint64_t page, uint32_t n, const uint8_t *from, uint32_t skip)
{
	struct region *r = region_of_page(g, page);

	for (uint32_t i = 0; i < n; i++) {
		const void *bytes = from ? from + (size_t)(skip + i) * g->page_bytes : zeros_of(g);

		if (mem_put(g, r, page + i, bytes))
			return i;
	}
	return n;
}

/*
 * Of pages that are ours: whether they are to be write-protected, so that it is known whether the stored copy is right still. Not
 * for who wants to write, nor of a pool, where a copy takes the host's memory. While pages are held, what is fetched may be one
 * that has just left from there: to lift the hold is to unprotect it.
 */
static bool keeps_clean(struct tierd_guest *g, unsigned int tier, bool to_write)
{
	return g->engine->protects_fetched && !g->huge && !to_write && tier >= 1 && tier <= TIERD_LADDER_MAX &&
	       !tier_is_pool(g, tier) && !atomic_load(&g->holding);
}

/* What fills pages that no tier has to hold: NULL, for all of them zeros. */
static const void *filled(struct tierd_worker *w, uint64_t page, uint32_t n)
{
	struct tierd_guest *g = w->g;
	bool any = false;

	for (uint32_t i = 0; i < n; i++)
		any |= g->sums[page + i];
	for (uint32_t i = 0; any && i < n; i++)
		fill_with(w->buffer + (size_t)i * g->page_bytes, g->page_bytes, g->sums[page + i]);
	return any ? w->buffer : NULL;
}

int64_t fetch_run(struct tierd_worker *w, unsigned int tier, uint64_t page, uint32_t count, bool to_write,
		  uint32_t *claimed)
{
	struct tierd_guest *g = w->g;
	uint64_t waits = waits_now(g);
	bool clean;
	uint32_t n = claim_stored(w, tier, page, count < g->readahead_max ? count : g->readahead_max), placed;
	const void *from = NULL;
	int error;

	*claimed = n;
	if (!n)
		return 0;
	if (tier != TIER_ZERO) {
		n = read_claimed(w, page, n);
		if (!n)
			return UNREADABLE;
		from = w->buffer;
	} else {
		from = filled(w, page, n);
	}
	clean = keeps_clean(g, tier, to_write);
	placed = place(g, page, n, from, &clean, &error);
	if (error == -ENOENT && w == g->restorer)
		placed += put_into_file(g, page + placed, n - placed, from, placed);
	for (uint32_t i = 0; i < placed; i++)
		settle(g, page + i, w->claimed[i], clean);
	wake_waiters(g, page, placed, waits);
	give_back(w, page, placed, n);
	return placed ? (int64_t)placed : error;
}

/* The page is ours (ARRIVING, w->claimed[0]): its fault waits in the lot, this thread does not. */
static int fetch_later(struct tierd_worker *w, struct parked *p)
{
	struct tierd_guest *g = w->g;

	p->owned = w->claimed[0];
	p->was_moving = w->was_moving;
	if (park(g, p))
		return -EINPROGRESS;
	give_back(w, p->page, 0, 1); /* no room: the guest faults again */
	return -ENOMEM;
}

/* After a read that failed: when to try again; false: the deadline has passed. */
static bool schedule_retry(struct tierd_guest *g, struct parked *p, uint64_t now_ns)
{
	uint64_t began_ns = p->due_ns;

	if (!p->failed_ns)
		p->failed_ns = now_ns;
	if (began_ns < p->failed_ns)
		began_ns = p->failed_ns;
	/* The try that decides began after the deadline: tierd, or the host, may have stood still in the one before. */
	if (began_ns - p->failed_ns >= atomic_load(&g->read_deadline_ns))
		return false;
	p->pause_us = !p->pause_us                           ? RETRY_PAUSE_US_MIN
		      : p->pause_us * 2 < RETRY_PAUSE_US_MAX ? p->pause_us * 2
							     : RETRY_PAUSE_US_MAX;
	p->due_ns = now_ns + p->pause_us * 1000ull;
	return true;
}

static int fetch_failed(struct tierd_worker *w, struct parked *p)
{
	if (schedule_retry(w->g, p, sys_now_ns()))
		return fetch_later(w, p);
	lose(w->g, p->page, w->claimed[0]);
	return -EIO;
}

/* The pages are ours (ARRIVING, w->claimed[]): from now on they are the request's, or they go back. */
static int ask_for(struct tierd_worker *w, const struct request *r)
{
	if (ask(w->g, r))
		return -EINPROGRESS;
	give_back(w, r->first.page, 0, r->count); /* no room: the guest faults again */
	return -ENOMEM;
}

static int fetch_asked(struct tierd_worker *w, unsigned int tier, uint64_t page, uint32_t window, bool to_write,
		       uint64_t began_ns)
{
	uint32_t n = claim_stored(w, tier, page, window < w->g->readahead_max ? window : w->g->readahead_max);

	if (!n)
		return -EALREADY;
	return ask_for(w, &(struct request){.first = {.page = page,
						      .fault_ns = began_ns,
						      .was_moving = w->was_moving,
						      .to_write = to_write},
					    .count = n,
					    .demand = true});
}

static int fetch(struct tierd_worker *w, uint64_t page, bool to_write, uint64_t began_ns)
{
	struct tierd_guest *g = w->g;
	unsigned int tier = word_tier(page_load(g, page));
	bool memory = tier_in_memory(g, tier);
	struct parked later = {.page = page, .to_write = to_write, .fault_ns = began_ns, .due_ns = began_ns};
	struct stream *s;
	uint32_t claimed, window = stream_window(w, page, &s);
	int64_t placed;

	if (tier_is_asked(g, tier)) {
		s->next_page = page + window;
		return fetch_asked(w, tier, page, window, to_write, began_ns);
	}
	if (!memory && !reader_enter(g))
		return claim_stored(w, tier, page, 1) ? fetch_later(w, &later) : -EALREADY;
	placed = fetch_run(w, tier, page, window, to_write, &claimed);
	if (!memory)
		reader_leave(g);
	if (!claimed)
		return -EALREADY; /* somebody else took it: look again */
	if (placed == UNREADABLE)
		return fetch_failed(w, &later);
	s->next_page = page + (placed > 0 ? (uint64_t)placed : 1);
	if (placed < 0)
		return (int)placed;
	count_add(tier == TIER_ZERO      ? &g->count.faults_zero
		  : tier == TIER_STAGING ? &g->count.faults_staged
					 : &g->count.faults_fetch,
		  1);
	if (tier == TIER_STAGING) {
		staged_refault(g, page, (uint64_t)placed);
		count_add(&g->count.pages_refaulted, (uint64_t)placed);
	}
	count_add(&g->count.pages_fetched, (uint64_t)placed);
	count_add(&g->count.pages_readahead, (uint64_t)placed - 1);
	return 0;
}

/* --- messages ----------------------------------------------------------------------------------------------------------- */

/* One look at the page. -EALREADY: it changed under us, look again. */
static int serve_page(struct tierd_worker *w, uint64_t page, uint64_t flags, uint64_t began_ns)
{
	struct tierd_guest *g = w->g;
	page_word word = page_load(g, page);

	switch (word_state(word)) {
	case RESIDENT:
	case LEAVING:
		if (!page_move(g, page, word, word_resolving(word)))
			return -EALREADY;
		return resolve(w, page, word, flags);
	case STORED:
	case MOVING:
		return fetch(w, page, flags & UFFD_PAGEFAULT_FLAG_WRITE, began_ns);
	case LOST:
		if (atomic_load(&g->on_lost) == TIERD_LOST_HOLD)
			return leave_to_owner(g, page, word); /* the operator, whose retry wakes it */
		poison_lost(g, page, word);
		return -EIO;
	default: /* RESOLVING, DROPPING, ARRIVING, STAGING: whoever owns the page wakes its waiters */
		return leave_to_owner(g, page, word);
	}
}

static void observe_latency(struct tierd_guest *g, uint64_t ns)
{
	count_add(&g->count.latency_buckets[bucket_of(ns)], 1);
	count_add(&g->count.latency_count, 1);
	count_add(&g->count.latency_sum_ns, ns);
}

static void serve_fault(struct tierd_worker *w, uint64_t address, uint64_t flags, uint64_t began_ns)
{
	struct tierd_guest *g = w->g;
	int64_t page = page_of_address(g, address);
	int error;

	if (page < 0) { /* in the staging area: nothing else of what we do not serve is registered by us */
		count_error(g, &g->count.kernel_errors, (int)page);
		if (staged_poison(g, address))
			return;
		sys_uffd_wake(g->uffd, address & ~((uint64_t)g->page_bytes - 1), g->page_bytes);
		return;
	}
	do
		error = serve_page(w, (uint64_t)page, flags, began_ns);
	while (error == -EALREADY);
	if (!error) {
		observe_latency(g, sys_now_ns() - began_ns);
		return;
	}
	if (error == -ESRCH || error == -EIO ||
	    error == -EINPROGRESS) /* the VMM is gone; the page is LOST; or parked */
		return;
	if (!transient(error)) {
		count_add(&g->count.faults_failed, 1);
		count_error(g, &g->count.kernel_errors, error);
	}
	if (error != -EAGAIN)
		sys_pause_us(NO_MEMORY_PAUSE_US);
	wake(g, (uint64_t)page, 1);
}

int tierd_worker_serve(struct tierd_worker *w, uint32_t *tid)
{
	struct tierd_guest *g = w->g;
	ssize_t n = sys_uffd_read(g->uffd, w->messages, MESSAGES);

	if (n < 0)
		return (int)n;
	for (ssize_t i = 0; i < n; i++) {
		struct uffd_msg *m = &w->messages[i];
		uint64_t now_ns;

		if (m->event != UFFD_EVENT_PAGEFAULT)
			continue; /* no other event is ever asked for */
		now_ns = sys_now_ns();
		atomic_store_explicit(&w->busy_since_ns, now_ns, memory_order_relaxed);
		*tid = m->arg.pagefault.feat.ptid;
		serve_fault(w, m->arg.pagefault.address, m->arg.pagefault.flags, now_ns);
	}
	atomic_store_explicit(&w->busy_since_ns, 0, memory_order_relaxed);
	return (int)n;
}

/* One try at a parked fault, which we own again. */
static void retry_page(struct tierd_worker *w, struct parked *p)
{
	struct tierd_guest *g = w->g;
	bool clean;
	int error;

	w->claimed[0] = p->owned;
	w->was_moving = p->was_moving;
	if (tier_is_asked(g, word_tier(p->owned))) {
		ask_for(w, &(struct request){.first = *p, .count = 1, .demand = true});
		return;
	}
	if (!read_claimed(w, p->page, 1)) {
		fetch_failed(w, p);
		return;
	}
	clean = keeps_clean(g, word_tier(p->owned), p->to_write);
	if (!place(g, p->page, 1, w->buffer, &clean, &error)) {
		if (error == -ENOMEM)
			sys_pause_us(NO_MEMORY_PAUSE_US);
		give_back(w, p->page, 0, 1);
		return;
	}
	settle(g, p->page, p->owned, clean);
	wake(g, p->page, 1); /* whoever came while it was parked was left to us */
	count_add(&g->count.faults_fetch, 1);
	count_add(&g->count.pages_fetched, 1);
	observe_latency(g, sys_now_ns() - p->fault_ns);
}

void tierd_worker_retry(struct tierd_worker *w, uint64_t *next_due_ns)
{
	struct tierd_guest *g = w->g;
	struct parked p;

	*next_due_ns = 0;
	while (atomic_load(&g->parked_pages)) {
		uint64_t now_ns = sys_now_ns();

		if (!reader_enter(g)) {
			*next_due_ns = reader_due_ns(now_ns);
			break;
		}
		if (!unpark_due(g, now_ns, &p, next_due_ns)) {
			reader_leave(g);
			break;
		}
		atomic_store_explicit(&w->busy_since_ns, now_ns, memory_order_relaxed);
		retry_page(w, &p);
		reader_leave(g);
	}
	atomic_store_explicit(&w->busy_since_ns, 0, memory_order_relaxed);
}

/* --- what Python has brought ------------------------------------------------------------------------------------------------ */

/* A page that an operator wanted again, and that cannot be had. */
static void lost_again(struct tierd_worker *w, uint64_t page)
{
	if (!page_move(w->g, page, w->claimed[0], word_with_state(w->claimed[0], LOST)))
		abort();
	wake(w->g, page, 1); /* whoever came meanwhile was left to us */
}

/* The first page of a request could not be had; the others went back. */
static void not_answered(struct tierd_worker *w, struct request *r)
{
	uint64_t page = r->first.page;

	if (r->was_lost) {
		lost_again(w, page);
	} else if (r->demand &&
		   r->count > 1) { /* its neighbours must not fail the page that is waited for: alone, then */
		ask_for(w, &(struct request){.first = r->first, .count = 1, .demand = true});
	} else if (r->demand) {
		fetch_failed(w, &r->first);
	} else {
		give_back(w, page, 0, 1); /* nobody waits for it: a fault, or the next try, decides */
	}
}

static void count_read(struct tierd_guest *g, unsigned int tier, const struct request *r)
{
	struct tier_count *c = &g->tier_counts[tier];
	uint64_t ns = sys_now_ns() - r->asked_ns;

	if (r->error) {
		bool wrong = r->error == -EBADMSG; /* what came was not what was written, or nothing did */

		count_add(wrong ? &c->checksum_errors : &c->read_errors, 1);
		count_error(g, wrong ? &g->count.checksum_errors : &g->count.store_read_errors, r->error);
		return;
	}
	count_add(&c->read_pages, r->good);
	count_add(&c->read_sum_ns, ns);
	count_add(&c->read_buckets[bucket_of(ns)], 1);
}

static void count_brought(struct tierd_guest *g, const struct request *r, uint32_t placed)
{
	if (r->demand) {
		count_add(&g->count.faults_fetch, 1);
		count_add(&g->count.pages_fetched, placed);
		count_add(&g->count.pages_readahead, placed - 1);
		observe_latency(g, sys_now_ns() - r->first.fault_ns);
	} else {
		count_add(&g->count.pages_restored, placed);
	}
}

static void place_answer(struct tierd_worker *w, struct request *r)
{
	struct tierd_guest *g = w->g;
	uint64_t page = r->first.page;
	uint32_t good, placed;
	bool clean;
	int error;

	for (uint32_t i = 0; i < r->count; i++)
		w->claimed[i] = page_load(g, page + i); /* nobody else moves them */
	w->was_moving = r->first.was_moving;
	count_read(g, word_tier(w->claimed[0]), r);
	good = verified(w, page, r->good, r->bytes);
	give_back(w, page, good ? good : 1, r->count);
	if (!good) {
		not_answered(w, r);
		return;
	}
	clean = keeps_clean(g, word_tier(w->claimed[0]), r->first.to_write || !r->demand);
	placed = place(g, page, good, r->bytes, &clean, &error);
	if (error == -ENOENT && !r->demand)
		placed += put_into_file(g, page + placed, good - placed, r->bytes, placed);
	for (uint32_t i = 0; i < placed; i++)
		settle(g, page + i, w->claimed[i], clean);
	wake(g, page, placed); /* whoever came meanwhile was left to us */
	if (placed) {
		count_brought(g, r, placed);
	} else if (r->was_lost) {
		not_answered(w, r);
		return;
	} else if (error == -ENOMEM) {
		sys_pause_us(NO_MEMORY_PAUSE_US);
	} else if (!transient(error)) {
		count_add(&g->count.faults_failed, r->demand);
		count_error(g, &g->count.kernel_errors, error);
	}
	give_back(w, page, placed, good);
}

void tierd_worker_answers(struct tierd_worker *w)
{
	struct tierd_guest *g = w->g;
	struct request r;

	while (atomic_load(&g->answers) && answer_take(g, &r)) {
		atomic_store_explicit(&w->busy_since_ns, sys_now_ns(), memory_order_relaxed);
		place_answer(w, &r);
		request_end(g, &r);
	}
	atomic_store_explicit(&w->busy_since_ns, 0, memory_order_relaxed);
}

/* --- an operator's orders about LOST pages ------------------------------------------------------------------------------ */

void tierd_guest_set_reads(struct tierd_guest *g, uint64_t read_deadline_ns, uint32_t on_lost)
{
	uint32_t before = atomic_exchange(&g->on_lost, on_lost);

	atomic_store(&g->read_deadline_ns, read_deadline_ns);
	g->header->serving.read_deadline_ns = read_deadline_ns;
	g->header->serving.on_lost = on_lost;
	g->header->serving.known = 1;
	if (before != TIERD_LOST_HOLD || on_lost != TIERD_LOST_POISON)
		return;
	for (uint64_t page = 0; page < g->pages; page++) /* who was left blocked faults again, and is told */
		if (word_state(page_load(g, page)) == LOST)
			wake(g, page, 1);
}

enum retried { RECOVERED, STILL_LOST, ASKED, NO_ROOM };

/* COPY overwrites poison: a page whose bytes are right again may be had again. */
static enum retried retry_lost(struct tierd_worker *w, uint64_t page, page_word word)
{
	struct tierd_guest *g = w->g;
	bool protect = false;
	int error;

	w->claimed[0] = word_with_state(word, ARRIVING);
	w->was_moving = false;
	if (!page_move(g, page, word, w->claimed[0]))
		return STILL_LOST;
	atomic_thread_fence(memory_order_seq_cst);
	while (atomic_load(&g->poisoning))
		sys_pause_us(1);
	if (tier_is_asked(g, word_tier(word))) {
		struct request r = {.first = {.page = page}, .count = 1, .was_lost = true};

		if (ask(g, &r))
			return ASKED;
		lost_again(w, page);
		return NO_ROOM;
	}
	if (!read_claimed(w, page, 1) || !place(g, page, 1, w->buffer, &protect, &error)) {
		lost_again(w, page);
		return STILL_LOST;
	}
	settle(g, page, w->claimed[0], false);
	wake(g, page, 1);
	return RECOVERED;
}

int tierd_guest_retry(struct tierd_guest *g, uint64_t *next_page, uint64_t *recovered, uint64_t *still_lost)
{
	int error = guest_enter(g);

	*recovered = *still_lost = 0;
	if (error)
		return error;
	parking_hurry(g);
	for (; *next_page < g->pages; (*next_page)++) {
		page_word word = page_load(g, *next_page);
		enum retried retried;

		if (word_state(word) != LOST)
			continue;
		retried = retry_lost(g->restorer, *next_page, word);
		if (retried == NO_ROOM)
			break;
		*recovered += retried == RECOVERED;
		*still_lost += retried == STILL_LOST;
	}
	guest_leave(g);
	return 0;
}

/* --- bringing everything back ------------------------------------------------------------------------------------------- */

/* How many were asked for, from `page` on; -ENOBUFS: not now. */
static int64_t restore_asked(struct tierd_worker *w, unsigned int tier, uint64_t page, uint64_t max_pages)
{
	uint32_t n = claim_stored(w, tier, page,
				  max_pages < w->g->readahead_max ? (uint32_t)max_pages : w->g->readahead_max);
	struct request r = {.first = {.page = page, .was_moving = w->was_moving}, .count = n};

	return n && ask_for(w, &r) != -EINPROGRESS ? -ENOBUFS : (int64_t)n;
}

int tierd_guest_restore(struct tierd_guest *g, uint64_t *next_page, uint64_t max_pages, uint64_t *restored)
{
	int error = guest_enter(g);

	*restored = 0;
	while (!error && *next_page < g->pages && *restored < max_pages) {
		uint64_t left = max_pages - *restored;
		page_word word = page_load(g, *next_page);
		bool stored = word_state(word) == STORED || word_state(word) == MOVING;
		uint32_t claimed = 0;
		int64_t n = 0;

		if (stored && tier_is_asked(g, word_tier(word))) {
			n = restore_asked(g->restorer, word_tier(word), *next_page, left);
			if (n == -ENOBUFS)
				break;
			*next_page += n ? (uint64_t)n : 1;
			continue;
		}
		if (stored) {
			worker_io_begin(g);
			n = fetch_run(g->restorer, word_tier(word), *next_page,
				      left < UINT32_MAX ? (uint32_t)left : UINT32_MAX, true, &claimed);
			worker_io_end(g);
		}
		if (n == UNREADABLE) { /* nobody waits for it: a fault, or the next try, decides */
			give_back(g->restorer, *next_page, 0, 1);
			n = 0;
		}
		if (n < 0) {
			error = (int)n;
			break;
		}
		*restored += n > 0 ? (uint64_t)n : 0;
		*next_page += n > 0 ? (uint64_t)n : 1;
	}
	count_add(&g->count.pages_restored, *restored);
	if (error != -EBUSY)
		guest_leave(g);
	return error;
}
