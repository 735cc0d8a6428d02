/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stage.c: private anonymous memory on its way out, by way of a staging area.
 *
 * Nobody outside of a process can hold or drop its anonymous pages. But UFFDIO_MOVE, called by the VMM itself, takes a page out of
 * the guest's range and puts it into another range of the VMM, atomically and without a copy. From then on an access of the guest
 * is a MISSING fault, and nobody writes the page: it can be read from outside (/proc/PID/mem), written to a store and dropped, at
 * leisure. So the staging area is a tier like another (TIER_STAGING): pages are STORED there, addressed by their number, and
 * fetched from there on a fault. Their room is the copy bit of the word, given back by tierd_guest_unstage.
 *
 * The calls are made in batches by one thread of the VMM (calls.c), and a batch goes on when we die. Hence whoever comes next
 * waits for its end before it looks at a page.
 *
 *   RESIDENT   -> STAGING    claimed: faults wait
 *   STAGING    -> STORED     it is seen in the staging area
 *              -> RESIDENT   it is not: shared, pinned, a hole
 *   STORED     -> MOVING     evict.c: being written to the next tier; a fault may take it back
 *   MOVING     -> DROPPING   written, durably: its room in the staging area is being dropped
 *   DROPPING   -> STORED     of the next tier, once it is seen to be gone; or of the staging area again
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { PAGES_MAX = 4096, HEAT_MAX = 8, SETTLE_PAUSE_US = 100, IN_VAIN_MAX = 100 };
enum { RUN_WORDS = 128 }; /* a bitmap of what one call moves: 2 MiB of pages of 4 KiB, 512 MiB of 64 KiB */
#ifdef TIERD_MODEL
enum { CALLS_MAX = 8, LOOKS_MAX = 4, LARGE_LOOKS = 1 };
#else
enum { CALLS_MAX = SYS_INSIDE_MAX, LOOKS_MAX = 8192 /* at pages, in a call: some 2 us each */, LARGE_LOOKS = 32 };
#endif
enum { MOVES_MAX = CALLS_MAX / 2 }; /* each is two calls */

struct sys_inside inside_of(struct tierd_guest *g)
{
	struct tierd_serving *s = &g->header->serving;

	return (struct sys_inside){
		.pid = g->header->identity.pid,
		.tid = g->inject_tid,
		.mem = g->mem,
		.uffd_in_vmm = s->uffd_moved ? s->uffd_moved - 1 : g->header->identity.uffd_in_vmm,
		.area = s->calls,
	};
}

struct sys_inside_call drop_of(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	return (struct sys_inside_call){
		.what = SYS_INSIDE_DROP,
		.from = staging_of(region_of_page(g, page), page),
		.bytes = count * g->page_bytes,
	};
}

static struct sys_inside_call move_of(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	return (struct sys_inside_call){
		.what = SYS_INSIDE_MOVE,
		.from = address_of(g, page),
		.to = staging_of(region_of_page(g, page), page),
		.bytes = count * g->page_bytes,
	};
}

/* One stop of the VMM. Whatever is returned, nothing of it is under way any more, or the VMM is gone. */
static int run_once(struct tierd_guest *g, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
		    uint64_t *stopped_ns)
{
	struct sys_inside in = inside_of(g);
	uint64_t ns = 0;
	int error = may_enter(g);

	*done = 0;
	if (error)
		return error;
	error = sys_inside_run(&in, calls, count, done, &ns);
	count_add(&g->count.inject_stops, 1);
	count_add(&g->count.inject_stopped_ns, ns);
	count_add(&g->count.stop_buckets[bucket_of(ns)], 1);
	*stopped_ns += ns;
	if (error != -EINPROGRESS)
		return error;
	do {
		sys_pause_us(SETTLE_PAUSE_US);
		error = sys_inside_settle(&in);
	} while (error && error != -ESRCH && error != -EFAULT);
	return error;
}

int inside_run(struct tierd_guest *g, struct sys_inside_call *calls, uint32_t count, uint32_t *done,
	       uint64_t *stopped_ns)
{
	uint32_t in_vain = 0;
	int error = 0;

	for (*done = 0; !error && *done < count;) {
		uint32_t n = count - *done < CALLS_MAX ? count - *done : CALLS_MAX, made;

		error = run_once(g, calls + *done, n, &made, stopped_ns);
		*done += made;
		in_vain = made ? 0 : in_vain + 1; /* it got no CPU in that time */
		if (!error && in_vain == IN_VAIN_MAX)
			error = -ETIMEDOUT;
	}
	return error;
}

int staged_register(struct tierd_guest *g)
{
	for (uint32_t i = 0; i < g->region_count; i++) {
		struct region *r = &g->regions[i];
		/* so that nobody ever makes a page of zeros there */
		int error = sys_uffd_register(g->uffd, r->staging, r->bytes, UFFDIO_REGISTER_MODE_MISSING);

		if (error)
			return error;
	}
	return 0;
}

int staged_read(struct tierd_guest *g, uint64_t page, uint32_t count, void *to)
{
	uint64_t address = staging_of(region_of_page(g, page), page);
	size_t bytes = (size_t)count * g->page_bytes, done = 0;

	while (done < bytes) {
		ssize_t n = sys_vmm_read(g->mem, (char *)to + done, bytes - done, address + done);

		if (n == -EINTR)
			continue;
		if (n <= 0)
			return n ? (int)n : -ESRCH;
		done += (size_t)n;
	}
	return 0;
}

int staged_copy(struct tierd_guest *g, uint64_t page, uint32_t count, void *to)
{
	uint64_t address = staging_of(region_of_page(g, page), page);
	size_t bytes = (size_t)count * g->page_bytes;

	if (sys_vmm_copy(g->header->identity.pid, to, bytes, address) == (ssize_t)bytes)
		return 0;
	return staged_read(g, page, count, to);
}

/* What is to be there, by its page's word, the VMM has dropped. What is not, somebody else looks for: it has left, or is leaving. */
static bool must_be_staged(page_word w)
{
	return word_tier(w) == TIER_STAGING &&
	       (word_state(w) == STORED || word_state(w) == MOVING || word_state(w) == ARRIVING);
}

static bool poison_there(struct tierd_guest *g, uint64_t page, uint64_t address)
{
	uint64_t waits = waits_now(g);
	page_word w = page_load(g, page), ours = w;
	int error;

	if (word_state(w) == RESIDENT)
		ours = word_with_state(w, RESOLVING);
	else if (word_state(w) == STORED || word_state(w) == MOVING)
		ours = word_with_state(w, ARRIVING);
	/* owned, so that no page comes there, or leaves from there, meanwhile: poison in its place would look like the page */
	if (ours == w ? !must_be_staged(w) && word_state(w) != LOST : !page_move(g, page, w, ours))
		return false;
	error = sys_uffd_poison(g->uffd, address, g->page_bytes);
	if (ours != w && !page_move(g, page, ours, w))
		abort();
	wake_waiters(g, page, 1, waits);
	return !error;
}

bool staged_poison(struct tierd_guest *g, uint64_t address)
{
	for (uint32_t i = 0; i < g->region_count; i++) {
		struct region *r = &g->regions[i];

		if (g->anon && address - r->staging < r->bytes)
			return poison_there(g, r->first_page + (address - r->staging) / g->page_bytes,
					    address & ~((uint64_t)g->page_bytes - 1));
	}
	return false;
}

/* A page that is owned must be decided: only the VMM's end is an excuse. */
static int look_until_seen(struct tierd_guest *g, uint64_t address, uint64_t count, uint64_t *there)
{
	int error;

	while ((error = scan_there(g, address, count, there)) && error != -ESRCH) {
		count_error(g, &g->count.kernel_errors, error);
		sys_pause_us(SETTLE_PAUSE_US);
	}
	return error;
}

int staged_look(struct tierd_guest *g, uint64_t page, uint64_t count, uint64_t *there)
{
	return look_until_seen(g, staging_of(region_of_page(g, page), page), count, there);
}

/* --- how soon to try again ---------------------------------------------------------------------------------------------- */

/* None of these figures decides about a byte: one that is lost to another thread's does no harm. */
static void count_up(_Atomic uint8_t *figure, uint64_t n, uint8_t most)
{
	uint8_t now = atomic_load_explicit(figure, memory_order_relaxed);

	if (now < most)
		atomic_store_explicit(figure, n < (uint64_t)(most - now) ? (uint8_t)(now + n) : most,
				      memory_order_relaxed);
}

void staged_refault(struct tierd_guest *g, uint64_t page, uint64_t count)
{
	count_up(&g->heat[page / GROUP_PAGES], 1, HEAT_MAX);
	count_up(&g->refaults[page / GROUP_PAGES], count, UINT8_MAX);
}

uint64_t tierd_guest_refaults(struct tierd_guest *g, uint64_t first_page, uint64_t pages)
{
	uint64_t found = 0;

	for (uint64_t p = first_page; g->anon && p < first_page + pages && p < g->pages;
	     p += GROUP_PAGES - p % GROUP_PAGES)
		if (atomic_load_explicit(&g->refaults[p / GROUP_PAGES], memory_order_relaxed))
			found += atomic_exchange_explicit(&g->refaults[p / GROUP_PAGES], 0, memory_order_relaxed);
	return found;
}

void heat_down(struct tierd_guest *g, uint64_t page)
{
	_Atomic uint8_t *heat = &g->heat[page / GROUP_PAGES];
	uint8_t now = atomic_load_explicit(heat, memory_order_relaxed);

	if (now)
		atomic_store_explicit(heat, now - 1, memory_order_relaxed);
}

static uint32_t age_needed(struct tierd_guest *g, uint64_t page, uint32_t min_age)
{
	uint64_t age = (uint64_t)min_age << atomic_load_explicit(&g->heat[page / GROUP_PAGES], memory_order_relaxed);

	return age < 0xf000 ? (uint32_t)age : 0xf000;
}

/* --- into the staging area ---------------------------------------------------------------------------------------------- */

/* Whether a large entry maps it. One that the kernel has split, so that it sees writes to its parts, is none any more. */
static bool is_large(struct tierd_guest *g, uint64_t page)
{
	const struct sys_scan huge = {.all_of = SYS_PAGE_HUGE, .any_of = SYS_PAGE_HUGE};
	struct sys_page_region found;
	uint64_t address = address_of(g, page), end;

	return sys_pagemap_scan(g->pagemap, address, address + g->page_bytes, huge, &found, 1, &end) > 0;
}

/*
 * Where the kernel has idle page tracking: whether the page may be moved, as far as is known. The kernel is asked to watch it, and
 * after the next pass it says whether somebody
 * has touched the page since. If so, its age begins anew. Where the kernel does not track it (not mapped, or on no list of its
 * reclaim), only the staging area shows who reads it.
 */
static bool may_be_staged(struct tierd_guest *g, uint64_t page, page_word w)
{
	uint8_t asked;
	uint64_t entry;
	int idle;

	if (g->idle_fd < 0)
		return true;
	g->looks++;
	asked = g->idle_asked[page];
	if (asked == g->idle_round) /* a cycle may look twice, and nothing is known yet */
		return false;
	/* of a large page the kernel does not track the parts */
	if (is_large(g, page) || sys_pagemap_read(g->pagemap, &entry, 1, address_of(g, page)) != sizeof(entry))
		return true;
	idle = sys_idle_get(g->idle_fd, entry);
	if (idle < 0 || (asked && idle))
		return true;
	if (sys_idle_set(g->idle_fd, entry) || sys_idle_get(g->idle_fd, entry) != 1)
		return true;
	g->idle_asked[page] = g->idle_round;
	if (asked)
		page_move(g, page, w, word_with_epoch(w, epoch_next(g)));
	return false;
}

struct batch {
	struct sys_inside_call calls[CALLS_MAX];     /* moves, or drops */
	uint64_t first[CALLS_MAX], pages[CALLS_MAX]; /* of each */
	struct tierd_span *of[CALLS_MAX];            /* moves */
	uint32_t count, done;
	uint64_t total;
};

/* RESIDENT -> STAGING. A page with room in a tier's file waits for the discard of it: a word has one tier only. */
static bool claim(struct tierd_guest *g, uint64_t page, uint32_t min_age)
{
	page_word w = page_load(g, page);
	int error;

	if (word_state(w) != RESIDENT || word_untouched(w) || word_copy(w) || quarantined(g, page) ||
	    page_age(g, page, epoch_now(g), w) < age_needed(g, page, min_age) || !may_be_staged(g, page, w))
		return false;
	error = missing_register(g, page); /* before the page can leave */
	if (error) {
		count_error(g, &g->count.kernel_errors, error);
		return false;
	}
	return page_move(g, page, w, word_with_tier(word_with_state(w, STAGING), TIER_STAGING));
}

/* A call moves or drops what one large entry would map: as such where there is one, and a stop can be cut between calls. */
static bool call_ends(struct tierd_guest *g, uint64_t page)
{
	return !(address_of(g, page) % (large_pages(g) * g->page_bytes));
}

static void batch_add(struct batch *b, uint64_t page, const struct sys_inside_call *call, uint64_t page_bytes,
		      struct tierd_span *of)
{
	b->first[b->count] = page;
	b->of[b->count] = of;
	b->pages[b->count] = call->bytes / page_bytes;
	b->calls[b->count++] = *call;
}

/* A claimed page that is not moved: `to` is its word now. */
static void turn_back(struct tierd_guest *g, uint64_t page, page_word to)
{
	if (!page_move(g, page, page_load(g, page), word_with_state(to, RESIDENT)))
		abort();
}

/* Of the claimed pages [first, first + count): bits of those that are seen to be untouched, and of holes. Not concluded from an
 * absence: nothing is seen of a mapping that the VMM has made anew and that is not registered, and a move would take pages out of it. */
static int look_at_claimed(struct tierd_guest *g, uint64_t first, uint64_t count, uint64_t *cold, uint64_t *hole)
{
	const struct sys_scan untouched = {.all_of = SYS_PAGE_PRESENT, .any_of = g->engine->scan.inverted};
	uint64_t bare[RUN_WORDS], there[RUN_WORDS];
	int error = untouched.any_of ? scan_for(g, address_of(g, first), count, untouched, cold)
				     : scan_protected(g, first, count, bare, cold);

	if (!error)
		error = scan_there(g, address_of(g, first), count, there);
	for (uint64_t i = 0; i < bitmap_bytes(count) / 8; i++)
		hole[i] = ~there[i];
	return error;
}

/* The claimed run [first, first + count) becomes calls, if it may; where there is no room for more, the rest goes back as it was.
 * Returns where to look next. */
static uint64_t add_cold(struct tierd_guest *g, struct batch *b, struct tierd_span *of, uint64_t first, uint64_t count,
			 const uint64_t *cold, const uint64_t *hole, bool may)
{
	uint64_t next = first + count;

	for (uint64_t i = 0, n; i < count; i += n) {
		page_word w = page_load(g, first + i);

		for (n = 1; bit_get(cold, i) && i + n < count && bit_get(cold, i + n);)
			n++;
		if (bit_get(cold, i) && may && b->count < MOVES_MAX) {
			struct sys_inside_call call = move_of(g, first + i, n);

			batch_add(b, first + i, &call, g->page_bytes, of);
			b->total += n;
			continue;
		}
		if (bit_get(cold, i) && may && first + i < next)
			next = first + i;
		for (uint64_t k = 0; bit_get(cold, i) && k < n; k++)
			turn_back(g, first + i + k, word_with_tier(page_load(g, first + i + k), TIER_ZERO));
		if (!bit_get(cold, i))
			turn_back(g, first + i,
				  bit_get(hole, i) ? word_with_tier(w, TIER_UNTOUCHED)
						   : word_with_epoch(word_with_tier(w, TIER_ZERO), epoch_next(g)));
	}
	return next;
}

static bool all_set(const uint64_t *bits, uint64_t count)
{
	for (uint64_t i = 0; i < count; i++)
		if (!bit_get(bits, i))
			return false;
	return true;
}

/* Claims runs of pages of the span and makes calls of them. A claimed page is decided, also after an error. */
static int collect_cold(struct tierd_guest *g, struct batch *b, struct tierd_span *span, uint32_t min_age)
{
	uint64_t cold[RUN_WORDS], hole[RUN_WORDS], end = span->end_page < g->pages ? span->end_page : g->pages;
	int error = 0;

	while (!error && b->count < MOVES_MAX && span->selected_pages < span->max_pages && b->total < PAGES_MAX) {
		uint64_t first, n = 0, most, left = span->max_pages - span->selected_pages, before = b->total,
				waits = waits_now(g);
		struct region *r;
		bool claimed = false, large, fits, may;

		while (span->next_page < end && g->looks < LOOKS_MAX && !(claimed = claim(g, span->next_page, min_age)))
			span->next_page++;
		if (!claimed)
			break;
		first = span->next_page;
		r = region_of_page(g, first);
		large = !atomic_load_explicit(&g->split_large, memory_order_relaxed) && is_large(g, first);
		most = left < PAGES_MAX - b->total ? left : PAGES_MAX - b->total;
		most = large ? large_pages(g) : end - first < most ? end - first : most;
		do
			n++;
		while (first + n < r->first_page + r->pages && n < most && !call_ends(g, first + n) &&
		       claim(g, first + n, min_age));
		error = look_at_claimed(g, first, n, cold, hole);
		if (error) {
			memset(cold, 0, sizeof(cold));
			memset(hole, 0, sizeof(hole));
		}
		fits = !large || g->engine->reads_unseen || large_pages(g) <= left;
		may = !large || (fits && n == large_pages(g) && all_set(cold, n));
		span->next_page = add_cold(g, b, span, first, n, cold, hole, may);
		while (!may && span->next_page < r->first_page + r->pages && !call_ends(g, span->next_page))
			span->next_page++;
		wake_waiters(g, first, n, waits);
		if (!may)
			g->looks += LARGE_LOOKS;
		if (!fits && span->selected_pages) { /* the next batch may have room for it */
			span->next_page = first;
			break;
		}
		span->selected_pages += b->total - before;
	}
	return error;
}

/*
 * A claimed page is where the kernel says, whatever the call has answered: a move may not count what it has moved (since 6.18 an
 * EAGAIN is remembered over the next success: "moved nothing", EEXIST). Its room in the staging area was empty when it was claimed.
 * `refused`: it is not tried again at once.
 */
static void settle_staged(struct tierd_guest *g, uint64_t page, bool with_guest, bool staged, bool refused,
			  struct tierd_staged *ret)
{
	page_word w = page_load(g, page), to;

	if (staged && !with_guest) {
		to = word_with_epoch(word_with_copy(word_with_state(w, STORED), true), epoch_next(g));
		ret->staged_pages++;
	} else if (staged) { /* not by us, so what is there is of no worth */
		to = word_with_copy(word_with_state(w, RESIDENT), true);
		atomic_fetch_add(&g->spent_pages, 1);
		count_error(g, &g->count.kernel_errors, -EEXIST);
	} else {
		to = word_with_tier(word_with_state(w, RESIDENT), with_guest ? TIER_ZERO : TIER_UNTOUCHED /* a hole */);
	}
	if (refused && with_guest) {
		to = word_with_epoch(to, epoch_next(g));
		ret->unmovable_pages++;
	}
	if (!page_move(g, page, w, to))
		abort();
}

static bool still_cold(struct tierd_guest *g, uint64_t first, uint64_t count)
{
	uint64_t cold[RUN_WORDS], hole[RUN_WORDS];

	return !look_at_claimed(g, first, count, cold, hole) && all_set(cold, count);
}

/*
 * A call that was wrong as a whole may lie in two mappings, which cannot be seen from outside: the VMM's advice for a part makes two
 * of one. Its halves are tried, and theirs; so a border takes as many stops more as the call has bits, and what is wrong in itself
 * no more than fits into a batch. What was touched meanwhile is left alone, and what lies around it.
 */
static bool halve(struct tierd_guest *g, const struct batch *b, uint32_t i, struct batch *halves)
{
	uint64_t first = b->first[i], n = b->pages[i];
	struct sys_inside_call low, high;

	if (i >= b->done || b->calls[i].result != -EINVAL || n == 1 || halves->count + 2 > MOVES_MAX ||
	    !still_cold(g, first, n))
		return false;
	low = move_of(g, first, n / 2);
	high = move_of(g, first + n / 2, n - n / 2);
	batch_add(halves, first, &low, g->page_bytes, b->of[i]);
	batch_add(halves, first + n / 2, &high, g->page_bytes, b->of[i]);
	return true;
}

/* Page `at` of the run of call i stopped it; or the call as a whole was wrong. */
static bool was_refused(const struct batch *b, uint32_t i, uint64_t at, uint64_t page_bytes)
{
	int64_t result = b->calls[i].result;

	return i < b->done && (result == -EINVAL || at == (result > 0 ? (uint64_t)result / page_bytes : 0));
}

static int settle_run(struct tierd_guest *g, const struct batch *b, uint32_t i, struct tierd_staged *ret)
{
	uint64_t with_guest[RUN_WORDS], staged[RUN_WORDS];
	int error = look_until_seen(g, staging_of(region_of_page(g, b->first[i]), b->first[i]), b->pages[i], staged);

	if (!error)
		error = look_until_seen(g, address_of(g, b->first[i]), b->pages[i], with_guest);
	b->of[i]->staged_pages -= ret->staged_pages;
	for (uint64_t k = 0; !error && k < b->pages[i]; k++)
		settle_staged(g, b->first[i] + k, bit_get(with_guest, k), bit_get(staged, k),
			      was_refused(b, i, k, g->page_bytes), ret);
	b->of[i]->staged_pages += ret->staged_pages;
	return error;
}

/*
 * A move takes pages out of a mapping that is not registered, too: one that the VMM has made anew since it was looked at, and what the
 * guest has written there. So the range is registered in the same stop, by the call before. Where it is already, that changes
 * nothing; else what is moved from there is waited for as elsewhere. All of its pages are claimed: nobody's hole becomes a page of ours.
 */
static struct sys_inside_call registration_of(const struct tierd_guest *g, const struct sys_inside_call *move)
{
	return (struct sys_inside_call){
		.what = SYS_INSIDE_REGISTER,
		.mode = g->engine->mode_missing,
		.from = move->from,
		.bytes = move->bytes,
	};
}

static int run_moves(struct tierd_guest *g, struct batch *b, uint64_t *stopped_ns)
{
	struct sys_inside_call calls[CALLS_MAX];
	uint32_t done;
	int error;

	for (uint32_t i = 0; i < b->count; i++) {
		calls[2 * i] = registration_of(g, &b->calls[i]);
		calls[2 * i + 1] = b->calls[i];
	}
	error = run_once(g, calls, 2 * b->count, &done, stopped_ns);
	b->done = done / 2;
	for (uint32_t i = 0; i < b->done; i++)
		b->calls[i].result = calls[2 * i + 1].result;
	return error;
}

/* For calls that were not made it was too late: from there on their spans are to be looked at again. */
static void not_made(struct batch *b)
{
	for (uint32_t i = b->done; i < b->count; i++) {
		struct tierd_span *span = b->of[i];

		if (b->first[i] < span->next_page)
			span->next_page = b->first[i];
		span->selected_pages -= b->pages[i];
	}
}

/* Makes the calls; each page of theirs is settled, also after an error. */
static int move_and_settle(struct tierd_guest *g, struct batch *b, uint64_t waits, struct tierd_staged *ret)
{
	struct batch halves;
	int error = 0, failed;

	for (; b->count; *b = halves) {
		failed = run_moves(g, b, &ret->stopped_ns);
		if (!error)
			error = failed;
		not_made(b);
		halves.count = 0;
		for (uint32_t i = 0; i < b->count; i++) {
			if (!error && halve(g, b, i, &halves))
				continue;
			failed = settle_run(g, b, i, ret);
			if (!error)
				error = failed;
			wake_waiters(g, b->first[i], b->pages[i], waits);
		}
	}
	return error;
}

void tierd_guest_set_split_large(struct tierd_guest *g, uint32_t split)
{
	atomic_store_explicit(&g->split_large, split, memory_order_relaxed);
}

int tierd_guest_stage(struct tierd_guest *g, struct tierd_span *spans, uint32_t count, double min_idle_s,
		      struct tierd_staged *ret)
{
	uint64_t began_ns = sys_now_ns(), waits = waits_now(g);
	double min_age = min_idle_s * 1e9 / (double)g->epoch_ns;
	struct batch b = {0};
	uint32_t age;
	int error = guest_enter(g), failed;

	memset(ret, 0, sizeof(*ret));
	if (error)
		return error;
	age = min_age < 0xf000 ? (uint32_t)min_age : 0xf000;
	age += age < min_age;
	for (uint32_t i = 0; i < count; i++)
		spans[i].selected_pages = spans[i].staged_pages = 0;
	g->looks = 0;
	if (!g->anon)
		error = -EINVAL;
	for (uint32_t i = 0; i < count && !error; i++)
		error = collect_cold(g, &b, &spans[i], age);
	ret->selected_pages = b.total;
	failed = move_and_settle(g, &b, waits, ret);
	if (!error)
		error = failed;
	count_add(&g->count.pages_staged, ret->staged_pages);
	count_add(&g->count.pages_unmovable, ret->unmovable_pages);
	if (error)
		count_error(g, &g->count.kernel_errors, error);
	ret->ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

/* --- and room in it back ------------------------------------------------------------------------------------------------ */

/* The mark of the word says to a successor that a write of the page may be in flight. */
static bool spent(struct tierd_guest *g, uint64_t page)
{
	return word_spent(page_load(g, page)) && !quarantined(g, page);
}

static void collect_spent(struct tierd_guest *g, struct batch *b, uint64_t *page)
{
	while (b->count < CALLS_MAX && b->total < PAGES_MAX) {
		struct sys_inside_call call;
		struct region *r;
		uint64_t n = 0;

		while (*page < g->pages && !spent(g, *page))
			(*page)++;
		if (*page == g->pages)
			return;
		r = region_of_page(g, *page);
		do
			n++;
		while (*page + n < r->first_page + r->pages && b->total + n < PAGES_MAX && !call_ends(g, *page + n) &&
		       spent(g, *page + n));
		call = drop_of(g, *page, n);
		batch_add(b, *page, &call, g->page_bytes, NULL);
		b->total += n;
		*page += n;
	}
}

static int clear_run(struct tierd_guest *g, uint64_t first, uint64_t count)
{
	uint64_t staged[RUN_WORDS];
	int error = staged_look(g, first, count, staged);

	for (uint64_t k = 0; !error && k < count; k++) {
		page_word w = page_load(g, first + k);

		/* one that a fault resolves just now keeps its mark, and is dropped again, later */
		if (word_spent(w) && !bit_get(staged, k) &&
		    page_move(g, first + k, w, word_with_tier(word_with_copy(w, false), TIER_ZERO)))
			atomic_fetch_sub(&g->spent_pages, 1);
	}
	return error;
}

int tierd_guest_unstage(struct tierd_guest *g, uint64_t first_page, struct tierd_staged *ret)
{
	uint64_t began_ns = sys_now_ns();
	struct batch b = {0};
	int error = guest_enter(g);

	memset(ret, 0, sizeof(*ret));
	if (error)
		return error;
	ret->next_page = first_page;
	if (g->anon)
		collect_spent(g, &b, &ret->next_page);
	ret->selected_pages = b.total;
	if (b.count)
		error = run_once(g, b.calls, b.count, &b.done, &ret->stopped_ns);
	if (b.done < b.count)
		ret->next_page = b.first[b.done];
	for (uint32_t i = 0; i < b.done && !error; i++)
		error = clear_run(g, b.first[i], b.pages[i]);
	if (error)
		count_error(g, &g->count.kernel_errors, error);
	ret->ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}
