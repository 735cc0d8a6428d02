/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.c: one batch of pages on its way out: select, hold, copy, write, drop, release. With an engine that has a sync mode:
 * select, copy, write, and windows, each of which holds, drops and releases.
 *
 * Private anonymous memory comes from the staging area (stage.c), where nobody writes: select, copy, write, drop. So does what sinks
 * from one tier to the next.
 *
 * Write only offers pages to files and to tiers that Python asks (ask.c): store writes the former, Python the latter, in whichever
 * thread. Then it says stored. Meanwhile the worker may be busy with another batch, which has none of the pages from the first to the
 * last one of this: a hold that is lifted is lifted for whoever holds, and a store gets a page twice in any order. Of what sinks out of
 * a tier that is asked, Python supplies the bytes before copy.
 *
 * The steps must come in this order (a batch in the wrong step answers -EINVAL), and a batch can be cancelled between any
 * two. Until a page is DROPPING its truth is where it was, so cancelling is free; from then on it is the tier's, durably.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum batch_step { EMPTY, SELECTED, HELD, COPIED, OFFERED, WRITTEN, DROPPED };
enum { NOWHERE = 0xff, NOT_THE_POOL = 0xfe }; /* no tier has taken it yet; and the pool does not */
enum { UNCHANGED = 0xfd };                    /* the tier that had it has it still */
enum { PIECE_BYTES = 64 << 10 };              /* read at once */

struct held_run {
	uint64_t page;
	uint32_t count;
};

struct tierd_batch {
	struct tierd_guest *g;
	struct tierd_batch *next;      /* of the guest's */
	uint64_t first_page, end_page; /* as selected: nobody else's until the step is EMPTY again */
	enum batch_step step;
	uint32_t max_pages, count, held_runs;
	uint32_t first;    /* of those that are still to leave in a window */
	unsigned int from; /* TIER_GUEST, or a tier */
	bool pool_only;    /* pages that the pool has refused are not tried again */
	uint32_t age_min;  /* of what was selected, in epochs */
	bool filed;        /* what goes to files is there */
	unsigned int lane; /* of the guest's, for the watchdog */
	_Atomic bool storing;
	uint64_t *pages;  /* ascending; all LEAVING or MOVING (or, in drop, DROPPING) unless a fault took them */
	page_word *words; /* what we expect the page's word to be */
	uint8_t *to;      /* the tier it goes to; TIER_ZERO: it needs no store */
	uint8_t *bytes;   /* the copy: slot i belongs to pages[i] */
	uint8_t *sealed;  /* the same as a file has it that is encrypted; NULL: the guest has no such tier */
	struct held_run *held;
	uint64_t *touched,
		*other;   /* bitmaps of a run; out of a tier that is asked, `touched` says whose bytes were supplied */
	uint64_t *before; /* rfc: touched before the batch's first hold; by slot */
	uint8_t *again;   /* a page, read once more */
	size_t page_bytes;
};

static bool tiers_are_sealed(const struct tierd_guest *g)
{
	bool any = false;

	for (int tier = 0; tier < TIERD_TIERS; tier++)
		any |= g->ciphers[tier] != NULL;
	return any;
}

int tierd_batch_create(struct tierd_guest *g, uint32_t max_pages, struct tierd_batch **ret)
{
	struct tierd_batch *b = sys_alloc(sizeof(*b));

	if (!b)
		return -ENOMEM;
	b->g = g;
	b->max_pages = max_pages;
	b->page_bytes = g->page_bytes;
	b->pages = sys_alloc(max_pages * sizeof(*b->pages));
	b->words = sys_alloc(max_pages * sizeof(*b->words));
	b->to = sys_alloc(max_pages);
	b->held = sys_alloc(max_pages * sizeof(*b->held));
	b->touched = sys_alloc(bitmap_bytes(max_pages));
	b->other = sys_alloc(bitmap_bytes(max_pages));
	b->before = sys_alloc(bitmap_bytes(max_pages));
	b->bytes = sys_alloc((size_t)max_pages * b->page_bytes);
	b->again = sys_alloc(b->page_bytes);
	if (tiers_are_sealed(g))
		b->sealed = sys_alloc((size_t)max_pages * b->page_bytes);
	if ((tiers_are_sealed(g) && !b->sealed) || !b->again || !b->pages || !b->words || !b->to || !b->held ||
	    !b->touched || !b->other || !b->before || !b->bytes) {
		tierd_batch_destroy(b);
		return -ENOMEM;
	}
	b->lane = g->batches ? (g->batches->lane + 1) % STORING_LANES : 0;
	b->next = g->batches;
	g->batches = b;
	*ret = b;
	return 0;
}

static void release_memory(void *memory, size_t bytes)
{
	if (memory)
		sys_free(memory, bytes);
}

void tierd_batch_destroy(struct tierd_batch *b)
{
	struct tierd_batch_result ignored; /* the guest's counters have it */

	if (!b)
		return;
	if (b->step != EMPTY)
		tierd_batch_cancel(b, &ignored);
	for (struct tierd_batch **at = &b->g->batches; *at; at = &(*at)->next)
		if (*at == b) { /* or it has never been one of them */
			*at = b->next;
			break;
		}
	release_memory(b->pages, b->max_pages * sizeof(*b->pages));
	release_memory(b->words, b->max_pages * sizeof(*b->words));
	release_memory(b->to, b->max_pages);
	release_memory(b->held, b->max_pages * sizeof(*b->held));
	release_memory(b->touched, bitmap_bytes(b->max_pages));
	release_memory(b->other, bitmap_bytes(b->max_pages));
	release_memory(b->before, bitmap_bytes(b->max_pages));
	release_memory(b->again, b->page_bytes);
	release_memory(b->sealed, (size_t)b->max_pages * b->page_bytes);
	release_memory(b->bytes, (size_t)b->max_pages * b->page_bytes);
	sys_free(b, sizeof(*b));
}

static int batch_enter(struct tierd_batch *b, enum batch_step wanted, struct tierd_batch_result *ret)
{
	memset(ret, 0, sizeof(*ret));
	if (b->step != wanted)
		return -EINVAL;
	return guest_enter(b->g);
}

static bool placed(const struct tierd_batch *b, uint32_t slot)
{
	return b->to[slot] < NOT_THE_POOL;
}

/* Its pages are MOVING, not LEAVING: the guest has nothing to do with it. */
static bool moving(const struct tierd_batch *b)
{
	return b->from != TIER_GUEST;
}

/* Takes slot `from` to slot `to` (to <= from) while a batch is being thinned out. */
static void keep(struct tierd_batch *b, uint32_t to, uint32_t from)
{
	if (to == from)
		return;
	b->pages[to] = b->pages[from];
	b->words[to] = b->words[from];
	b->to[to] = b->to[from];
	if (b->step >= HELD)
		memcpy(b->bytes + to * b->page_bytes, b->bytes + from * b->page_bytes, b->page_bytes);
}

/* --- select ------------------------------------------------------------------------------------------------------------- */

/* Where the pages of another batch end; 0: this is none of them. */
static uint64_t end_of_others(const struct tierd_batch *b, uint64_t page)
{
	for (const struct tierd_batch *other = b->g->batches; other; other = other->next)
		if (other != b && other->step != EMPTY && page >= other->first_page && page < other->end_page)
			return other->end_page;
	return 0;
}

static void select_pages(struct tierd_batch *b, uint64_t page, uint32_t min_age, uint32_t max, uint64_t *next_page)
{
	struct tierd_guest *g = b->g;

	for (; page < g->pages && b->count < max; page++) {
		uint16_t now = epoch_now(g);
		page_word w = page_load(g, page), leaving;
		uint64_t end = end_of_others(b, page);
		int error;

		if (end) {
			page = end - 1;
			continue;
		}
		if (word_state(w) != RESIDENT || word_untouched(w) || page_age(g, page, now, w) < min_age ||
		    quarantined(g, page) || (b->pool_only && word_refused(w)))
			continue;
		/* before the page can leave: a punched page without MISSING would silently read as zeros */
		error = missing_register(g, page);
		if (error) { /* vm.max_map_count, say: the rest of this chunk stays with the guest */
			count_error(g, &g->count.kernel_errors, error);
			page = (page / g->chunk_pages + 1) * g->chunk_pages - 1;
			continue;
		}
		leaving = word_with_state(word_next_generation(w), LEAVING);
		if (!page_move(g, page, w, leaving))
			continue;
		b->pages[b->count] = page;
		b->words[b->count++] = leaving;
	}
	*next_page = page < g->pages ? page : g->pages;
}

/* Out of a tier. Of the staging area: what has been there for long enough. A page that is MOVING, and in no batch, is nobody's: a fault
 * had it in hand when its batch ended, and could not bring it back. */
static void select_stored(struct tierd_batch *b, uint64_t page, uint32_t min_age, uint32_t max, uint64_t *next_page)
{
	struct tierd_guest *g = b->g;

	for (; page < g->pages && b->count < max; page++) {
		page_word w = page_load(g, page), to = word_with_state(w, MOVING);
		uint64_t end = end_of_others(b, page);

		if (end) {
			page = end - 1;
			continue;
		}
		if ((word_state(w) != STORED && word_state(w) != MOVING) || word_tier(w) != b->from ||
		    stored_age(g, page, epoch_now(g), w) < min_age || quarantined(g, page) ||
		    (b->pool_only && word_refused(w)) || (w != to && !page_move(g, page, w, to)))
			continue;
		b->pages[b->count] = page;
		b->words[b->count++] = to;
	}
	*next_page = page;
}

int tierd_batch_select(struct tierd_batch *b, uint32_t from, uint32_t pool_only, uint64_t first_page, double min_idle_s,
		       uint64_t max_pages, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	double min_age = min_idle_s * 1e9 / (double)g->epoch_ns;
	uint32_t age;
	int error = from == TIER_ZERO || from > TIER_GUEST || (from == TIER_GUEST && g->anon)
			    ? -EINVAL
			    : batch_enter(b, EMPTY, ret);

	if (error)
		return error;
	age = min_age < 0xf000 ? (uint32_t)min_age : 0xf000;
	age += age < min_age;
	b->age_min = age;
	b->count = b->held_runs = b->first = 0;
	b->from = from;
	memset(b->touched, 0, bitmap_bytes(b->max_pages));
	b->pool_only = pool_only;
	(moving(b) ? select_stored : select_pages)(
		b, first_page, age, max_pages < b->max_pages ? (uint32_t)max_pages : b->max_pages, &ret->next_page);
	b->step = b->count ? SELECTED : EMPTY;
	if (b->count) {
		b->first_page = b->pages[0];
		b->end_page = b->pages[b->count - 1] + 1;
	}
	ret->selected_pages = b->count;
	ret->select_ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return 0;
}

/* --- hold --------------------------------------------------------------------------------------------------------------- */

/* Afterwards b->held covers whatever may be held, also when only a prefix was. */
static int hold_run(struct tierd_batch *b, uint64_t page, uint32_t count)
{
	if (!b->held_runs)
		atomic_fetch_add(&b->g->holding, 1);
	b->held[b->held_runs++] = (struct held_run){page, count};
	return b->g->engine->hold(b->g, page, count);
}

/* A page that was touched, or does not carry the hold's marker, stays with the guest. */
static void turn_back(struct tierd_guest *g, uint64_t page, page_word leaving)
{
	page_word to = word_with_clean(word_touched(leaving, epoch_next(g)), false);

	page_move(g, page, leaving, to); /* or a fault has taken it already */
}

static int rescan_run(struct tierd_batch *b, uint32_t first, uint32_t n, uint32_t *kept)
{
	int error = scan_range(b->g, b->pages[first], n, b->touched, SYS_PAGE_SWAPPED, b->other);

	if (error)
		return error;
	for (uint32_t i = 0; i < n; i++) {
		if (bit_get(b->other, i) && !bit_get(b->touched, i))
			keep(b, (*kept)++, first + i);
		else
			turn_back(b->g, b->pages[first + i], b->words[first + i]);
	}
	return 0;
}

int tierd_batch_hold(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	uint32_t n, kept = 0, count = b->count;
	int error = moving(b) ? -EINVAL : batch_enter(b, SELECTED, ret);

	if (error)
		return error;
	for (uint32_t i = 0; !error && i < count; i += n) {
		n = run_length(g, b->pages + i, count - i);
		error = hold_run(b, b->pages[i], n);
	}
	for (uint32_t i = 0; !error && i < count; i += n) {
		n = run_length(g, b->pages + i, count - i);
		error = rescan_run(b, i, n, &kept);
		if (error) /* those already turned back stay so; the rest is cancelled by the caller */
			for (uint32_t k = i; k < count; k++)
				keep(b, kept++, k);
	}
	if (kept)
		b->count = kept;
	else if (!error)
		b->count = 0;
	if (error)
		count_error(g, &g->count.kernel_errors, error);
	else
		b->step = HELD;
	count_add(&g->count.pages_cancelled, count - b->count);
	ret->held_pages = b->count;
	ret->cancelled_pages = count - b->count;
	ret->hold_ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

/* --- copy --------------------------------------------------------------------------------------------------------------- */

static int read_pages(struct tierd_batch *b, uint64_t page, uint32_t n, uint8_t *to)
{
	struct region *r = region_of_page(b->g, page);
	size_t bytes = n * b->page_bytes, done = 0;

	if (moving(b))
		return b->from == TIER_STAGING ? staged_copy(b->g, page, n, to)
					       : tier_read(b->g, b->g->reader, b->from, page, n, to);
	while (done < bytes) {
		ssize_t got = sys_mem_read(r->memfd, to + done, bytes - done, mem_offset_of(r, page) + done);

		if (got == -EINTR)
			continue;
		if (got <= 0)
			return got ? (int)got : -EIO;
		done += (size_t)got;
	}
	return 0;
}

bool same_filled(const uint8_t *page, size_t bytes)
{
	return !memcmp(page, page + sizeof(uint64_t), bytes - sizeof(uint64_t));
}

void fill_with(uint8_t *page, size_t bytes, uint64_t word)
{
	memcpy(page, &word, sizeof(word));
	for (size_t n = sizeof(word); n < bytes; n *= 2) /* a page has a power of two */
		memcpy(page + n, page, n);
}

/*
 * A page that is not mapped carries no protection, so no window would let it go. It is mapped now, outside of any window, because
 * it may have to come from swap; looks touched from here, is protected by the next pass, and leaves when it was idle since.
 * Safe though a fault may have taken the page: CONTINUE maps only what the cache has, and that is the truth of a page that we did
 * not drop. The slots [first, first + n).
 */
static int map_unmapped(struct tierd_batch *b, uint32_t first, uint32_t n, uint32_t *kept)
{
	struct tierd_guest *g = b->g;
	int error = scan_protected(g, b->pages[first], n, b->touched, b->other);

	for (uint32_t i = first; i < first + n; i++) {
		if (error || bit_get(b->touched, i - first) || bit_get(b->other, i - first)) {
			keep(b, (*kept)++, i);
			continue;
		}
		error = sys_uffd_continue(g->uffd, address_of(g, b->pages[i]), g->page_bytes);
		if (error == -EEXIST || error == -EFAULT)
			error = 0;
		turn_back(g, b->pages[i], b->words[i]);
	}
	return error;
}

/* After an error the caller cancels what is kept. */
static int keep_mapped(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	uint32_t n, kept = 0, count = b->count;
	int error = 0;

	for (uint32_t i = 0; i < count; i += n) {
		n = run_length(b->g, b->pages + i, count - i);
		if (!error)
			error = map_unmapped(b, i, n, &kept);
		else
			for (uint32_t k = i; k < i + n; k++)
				keep(b, kept++, k);
	}
	b->count = kept;
	ret->cancelled_pages = count - kept;
	count_add(&b->g->count.pages_cancelled, count - kept);
	return error;
}

/* What the slot's bytes are: one word again and again, which then stands in the place of its checksum and is all that is kept of it; or
 * the checksum of its page. That is ours to write: a fetch reads it only after we made the page STORED. Of a page that sinks it is known:
 * -EBADMSG, the tier did not give what it was given. */
static int look_at_copy(struct tierd_batch *b, uint32_t slot)
{
	const uint8_t *page = b->bytes + slot * b->page_bytes;
	uint64_t *sum = &b->g->sums[b->pages[slot]];

	b->to[slot] = word_refused(b->words[slot]) ? NOT_THE_POOL : NOWHERE;
	if (moving(b) && b->from != TIER_STAGING)
		return checksum(page, b->page_bytes) == *sum ? 0 : -EBADMSG;
	if (same_filled(page, b->page_bytes)) {
		memcpy(sum, page, sizeof(*sum));
		b->to[slot] = TIER_ZERO;
	} else {
		uint64_t was = *sum;

		*sum = checksum(page, b->page_bytes);
		if (!moving(b) && word_clean(b->words[slot]) && *sum == was) /* the protection says so, too */
			b->to[slot] = UNCHANGED;
	}
	return 0;
}

/* The slots [first, first + n), neighbours, in pieces that the CPU's cache still has when they are looked at. */
static int copy_run(struct tierd_batch *b, uint32_t first, uint32_t n)
{
	uint32_t end = first + n, piece = b->page_bytes < PIECE_BYTES ? PIECE_BYTES / b->page_bytes : 1;

	for (uint32_t i = first; i < end; i += piece) {
		int error;

		if (piece > end - i)
			piece = end - i;
		error = read_pages(b, b->pages[i], piece, b->bytes + i * b->page_bytes);
		for (uint32_t k = i; !error && k < i + piece; k++)
			error = look_at_copy(b, k);
		if (error)
			return error;
	}
	return 0;
}

static int copy_runs(struct tierd_batch *b)
{
	uint32_t n;
	int error = 0;

	for (uint32_t i = 0; !error && i < b->count; i += n) {
		n = run_length(b->g, b->pages + i, b->count - i);
		error = copy_run(b, i, n);
	}
	return error;
}

/* The page of this slot stays in the tier where it is, for as long once more. */
static void stay(struct tierd_batch *b, uint32_t slot)
{
	page_move(b->g, b->pages[slot], b->words[slot],
		  word_with_epoch(word_with_state(b->words[slot], STORED), epoch_next(b->g)));
}

static void count_unreadable(struct tierd_batch *b, int error)
{
	struct counters *c = &b->g->count;

	if (b->from == TIER_STAGING)
		count_error(b->g, &c->kernel_errors, error);
	else
		count_error(b->g, error == -EBADMSG ? &c->checksum_errors : &c->store_read_errors, error);
	if (error == -EBADMSG)
		count_add(&b->g->tier_counts[b->from].checksum_errors, 1);
}

/* A page that cannot be read (a memory error, a read error of the store, or the VMM has dropped it in its staging area) stays where it
 * is, and the others go on. */
static void copy_stored(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint32_t n, kept = 0, count = b->count;

	for (uint32_t i = 0; i < count; i += n) {
		n = run_length(g, b->pages + i, count - i);
		if (kept == i && !copy_run(b, i, n)) {
			kept += n;
			continue;
		}
		for (uint32_t k = i; k < i + n; k++) {
			int error;

			keep(b, kept, k);
			error = copy_run(b, kept, 1);
			if (!error) {
				kept++;
				continue;
			}
			count_unreadable(b, error);
			stay(b, kept);
		}
	}
	b->count = kept;
	ret->cancelled_pages = count - kept;
	count_add(&g->count.pages_cancelled, count - kept);
}

static bool from_asked(const struct tierd_batch *b)
{
	return moving(b) && tier_is_asked(b->g, b->from);
}

int tierd_batch_supply(struct tierd_batch *b, uint32_t slot, uint32_t count, const void *bytes)
{
	if (b->step != SELECTED || !from_asked(b) || slot > b->count || count > b->count - slot)
		return -EINVAL;
	memcpy(b->bytes + slot * b->page_bytes, bytes, count * b->page_bytes);
	for (uint32_t i = slot; i < slot + count; i++)
		bit_set(b->touched, i);
	return 0;
}

/* What was not supplied (who supplies counts why: tierd_guest_read_failed), or is not what was stored, stays where it is. */
static void copy_supplied(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	uint32_t kept = 0, count = b->count;

	for (uint32_t i = 0; i < count; i++) {
		int error = bit_get(b->touched, i) ? 0 : -ENODATA;

		if (kept != i && !error)
			memcpy(b->bytes + kept * b->page_bytes, b->bytes + i * b->page_bytes, b->page_bytes);
		keep(b, kept, i);
		if (!error)
			error = look_at_copy(b, kept);
		if (!error) {
			kept++;
			continue;
		}
		if (error != -ENODATA)
			count_unreadable(b, error);
		stay(b, kept);
	}
	b->count = kept;
	ret->cancelled_pages = count - kept;
	count_add(&b->g->count.pages_cancelled, count - kept);
}

int tierd_batch_copy(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	int error = batch_enter(b, g->engine->set_async || moving(b) ? SELECTED : HELD, ret);

	if (error)
		return error;
	if (g->engine->holds_mapped && !moving(b))
		error = keep_mapped(b, ret);
	if (from_asked(b)) {
		copy_supplied(b, ret);
	} else if (moving(b)) {
		worker_io_begin(g);
		copy_stored(b, ret);
		worker_io_end(g);
	} else if (!error) {
		error = copy_runs(b);
	}
	for (uint32_t i = 0; !error && i < b->count; i++)
		ret->zero_pages += b->to[i] == TIER_ZERO;
	if (error)
		count_error(g, &g->count.kernel_errors, error);
	else
		b->step = COPIED;
	ret->copy_ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

/* --- write -------------------------------------------------------------------------------------------------------------- */

static void discard_failed(struct tierd_guest *g, unsigned int tier, int error)
{
	count_add(&g->tier_counts[tier].write_errors, 1);
	count_error(g, &g->count.store_write_errors, error);
}

/* How many of the slots could be given to `tier`, no pool, as far as its capacity goes. */
static uint64_t room_in(const struct tierd_batch *b, unsigned int tier)
{
	uint64_t pages = atomic_load(&b->g->capacity_bytes[tier]) / b->page_bytes, used = b->g->copies[tier];

	/* of a page that moves its word does not say yet where it will be */
	for (const struct tierd_batch *other = b->g->batches; other; other = other->next)
		for (uint32_t i = 0; other != b && other->step >= OFFERED && moving(other) && i < other->count; i++)
			used += other->to[i] == tier;
	return pages > used ? pages - used : 0;
}

static bool has_space_in(page_word w, unsigned int tier)
{
	return word_copy(w) && word_tier(w) == tier;
}

/* A page of the guest may still have space in another tier, from the last time: a word has one tier only. -ECANCELED: it was touched. */
static int give_back_elsewhere(struct tierd_batch *b, uint32_t slot, unsigned int tier)
{
	struct tierd_guest *g = b->g;
	page_word w = b->words[slot], to = word_with_clean(word_with_copy(w, false), false);
	int error;

	if (moving(b) || !word_copy(w) || word_tier(w) == tier)
		return 0;
	error = tier_discard(g, word_tier(w), b->pages[slot], 1);
	if (error || !page_move(g, b->pages[slot], w, to))
		return error ? error : -ECANCELED; /* touched: it is the guest's again */
	g->copies[word_tier(w)]--;
	b->words[slot] = to;
	return 0;
}

/* The word says that the tier holds space for the page before a file does, so that space is never forgotten. (But of a page that
 * moves: its word speaks of where it is. What a crash leaves in the new file then is written over when the page comes next.) */
static int mark(struct tierd_batch *b, uint32_t slot, unsigned int tier)
{
	struct tierd_guest *g = b->g;
	page_word w = b->words[slot], to = word_with_clean(word_with_tier(word_with_copy(w, true), tier), false);

	if (moving(b) || to == w)
		return 0;
	if (!page_move(g, b->pages[slot], w, to))
		return -ECANCELED;
	g->copies[tier] += !word_copy(w);
	b->words[slot] = to;
	return 0;
}

/* As old as it is; or a fault has taken it already. */
static void stay_with_guest(struct tierd_batch *b, uint32_t slot)
{
	page_move(b->g, b->pages[slot], b->words[slot],
		  word_with_clean(word_with_state(b->words[slot], RESIDENT), false));
}

/* Gives slots that no tier has taken yet to `tier`, no pool. How many. */
static uint32_t place_in(struct tierd_batch *b, unsigned int tier, bool *full)
{
	uint64_t room = room_in(b, tier), *garbage = b->g->garbage[tier];
	uint32_t kept = 0, given = 0;

	for (uint32_t i = 0; i < b->count; i++) {
		bool has_space = !moving(b) && has_space_in(b->words[i], tier);

		if (!placed(b, i) && (room || has_space)) {
			if (give_back_elsewhere(b, i, tier) || mark(b, i, tier)) {
				stay_with_guest(b, i);
				continue;
			}
			b->to[i] = (uint8_t)tier;
			room -= !has_space;
			given++;
			if (garbage) /* of the page as it was before */
				bit_clear(garbage, b->pages[i]);
		}
		*full |= !placed(b, i);
		keep(b, kept++, i);
	}
	count_add(&b->g->count.pages_cancelled, b->count - kept);
	b->count = kept;
	return given;
}

/* Length of the run from slot i whose pages are neighbours and go to the same tier. */
static uint32_t alike_run(struct tierd_batch *b, uint32_t i)
{
	uint32_t n = run_length(b->g, b->pages + i, b->count - i), k = 1;

	while (k < n && b->to[i + k] == b->to[i])
		k++;
	return k;
}

/*
 * A pool keeps what it was given whatever becomes of us, and what no word speaks of is nobody's: so first the page, then the word.
 * 0: it is in the pool; -E2BIG, -ENOSPC, -ENOMEM: it is not; -ECANCELED: it stays with the guest.
 */
static int give_to_pool(struct tierd_batch *b, uint32_t slot, unsigned int tier)
{
	struct pool *pool = b->g->pool;
	int error = !pool ? -EBADMSG : give_back_elsewhere(b, slot, tier) ? -ECANCELED : 0;

	while (!error && (error = pool_write(pool, b->pages[slot], b->bytes + slot * b->page_bytes)) == -EINTR)
		error = 0;
	if (!error && mark(b, slot, tier)) {
		pool_free(pool, b->pages[slot]);
		error = -ECANCELED;
	}
	return error;
}

static int write_to_pool(struct tierd_batch *b, unsigned int tier, uint64_t *written, bool *full)
{
	struct tierd_guest *g = b->g;
	uint32_t kept = 0;
	int error = 0;

	for (uint32_t i = 0; i < b->count; i++) {
		int refused = b->to[i] == NOWHERE && !error && !*full ? give_to_pool(b, i, tier) : -EALREADY;

		if (refused == -ECANCELED) {
			stay_with_guest(b, i);
			continue;
		}
		if (!refused) {
			b->to[i] = (uint8_t)tier;
			(*written)++;
		} else if (refused == -E2BIG) {
			b->to[i] = NOT_THE_POOL;
			count_add(&g->tier_counts[tier].refused_pages, 1);
		} else if (refused == -ENOSPC ||
			   refused == -ENOMEM) { /* by policy, or the host or our cgroup has no memory for it */
			*full = true;
		} else if (refused != -EALREADY) {
			error = refused;
		}
		keep(b, kept++, i);
	}
	count_add(&g->count.pages_cancelled, b->count - kept);
	b->count = kept;
	return error;
}

static int write_to(struct tierd_batch *b, unsigned int tier, struct tierd_batch_result *ret, bool *full)
{
	struct tierd_guest *g = b->g;
	uint64_t written = 0;
	bool no_room = false;
	int error;

	if (tier == TIER_ZERO || tier > TIERD_LADDER_MAX || tier == b->from || !tier_exists(g, tier))
		return -ENODEV;
	if (!tier_is_pool(g, tier)) {
		worker_io_begin(g); /* it may have to give space back in another tier */
		ret->offered_pages += place_in(b, tier, &no_room);
		worker_io_end(g);
		*full |= no_room;
		return 0;
	}
	worker_io_begin(g);
	error = write_to_pool(b, tier, &written, &no_room);
	worker_io_end(g);
	count_add(&g->tier_counts[tier].written_pages, written);
	ret->written_pages += written;
	*full |= no_room;
	if (error) {
		ret->failed_tier = tier;
		count_add(&g->tier_counts[tier].write_errors, 1);
		count_error(g, &g->count.store_write_errors, error);
	}
	return error;
}

/* Of what nobody has written since it was fetched, the copy in its tier is right: nothing of it was written again. */
static void stay_stored(struct tierd_batch *b)
{
	for (uint32_t i = 0; i < b->count; i++)
		if (b->to[i] == UNCHANGED) {
			b->to[i] = (uint8_t)word_tier(b->words[i]);
			count_add(&b->g->count.pages_unwritten, 1);
		}
}

/* What no tier took stays where it is, as old as it is: a tier for older pages may take it some day. */
static void leave_refused(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < b->count; i++) {
		page_word to = word_with_clean(word_with_state(b->words[i], moving(b) ? STORED : RESIDENT), false);

		if (placed(b, i))
			keep(b, kept++, i);
		else
			page_move(b->g, b->pages[i], b->words[i],
				  word_with_refused(to, b->to[i] == NOT_THE_POOL)); /* or a fault has taken it */
	}
	ret->refused_pages = b->count - kept;
	count_add(&b->g->count.pages_refused, ret->refused_pages);
	b->count = kept;
}

/* One of the pages whose copy in `tier` would be relied on, another one each time. NO_PAGE: there is none. */
static uint64_t some_unchanged(const struct tierd_batch *b, unsigned int tier)
{
	uint32_t start = b->count ? (uint32_t)(sys_now_ns() >> 10) % b->count : 0;

	for (uint32_t n = 0; n < b->count; n++) {
		uint32_t i = (start + n) % b->count;

		if (b->to[i] == UNCHANGED && word_tier(b->words[i]) == tier)
			return b->pages[i];
	}
	return NO_PAGE;
}

uint64_t tierd_batch_unchanged(struct tierd_batch *b, uint32_t tier)
{
	return b->step == COPIED ? some_unchanged(b, tier) : NO_PAGE;
}

/* Nobody must rely on these copies any more. */
static void unclean(struct tierd_guest *g, uint64_t page, uint64_t n)
{
	for (uint64_t i = page; i < page + n; i++) {
		page_word w = page_load(g, i);

		if (word_state(w) == RESIDENT && word_clean(w)) /* else a fault is at it, and has taken that away */
			page_move(g, i, w, word_with_clean(w, false));
	}
}

static void unclean_tier(struct tierd_guest *g, uint32_t tier)
{
	for (uint64_t page = 0; page < g->pages && g->copies[tier]; page++)
		if (word_tier(page_load(g, page)) == tier)
			unclean(g, page, 1);
}

/* Whoever only relies on a store would not notice that it is gone: so one page of it is read. (Where Python asks, it does that.) */
static bool still_has(struct tierd_batch *b, unsigned int tier)
{
	struct tierd_guest *g = b->g;
	uint64_t page = tier_is_asked(g, tier) || !tier_exists(g, tier) ? NO_PAGE : some_unchanged(b, tier);
	int error;

	if (page == NO_PAGE)
		return true;
	worker_io_begin(g);
	error = tier_read(g, g->reader, tier, page, 1, b->again);
	worker_io_end(g);
	if (!error && checksum(b->again, b->page_bytes) != g->sums[page]) {
		error = -EBADMSG;
		count_add(&g->tier_counts[tier].checksum_errors, 1);
	}
	if (error)
		count_error(g, error == -EBADMSG ? &g->count.checksum_errors : &g->count.store_read_errors, error);
	return !error;
}

/* What is clean and has its copy where that is not relied on, in a tier that fails, say, is written like the rest. Who has lost one
 * page may have lost any: no other batch relies on that tier either. */
static void rely_on(struct tierd_batch *b, uint32_t keep)
{
	for (unsigned int tier = 1; tier <= TIERD_LADDER_MAX; tier++)
		if (keep >> tier & 1 && !still_has(b, tier)) {
			keep &= ~(1u << tier);
			unclean_tier(b->g, tier);
		}
	for (uint32_t i = 0; i < b->count; i++)
		if (b->to[i] == UNCHANGED && !(keep >> word_tier(b->words[i]) & 1))
			b->to[i] = word_refused(b->words[i]) ? NOT_THE_POOL : NOWHERE;
}

int tierd_batch_write(struct tierd_batch *b, const uint32_t *tiers, uint32_t count, uint32_t keep,
		      struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	bool full = false;
	int error = batch_enter(b, COPIED, ret);

	if (error)
		return error;
	rely_on(b, keep);
	for (uint32_t i = 0; !error && i < count; i++)
		error = write_to(b, tiers[i], ret, &full);
	if (!error) {
		leave_refused(b, ret);
		if (full && !b->count)
			error = -ENOSPC; /* nothing is wrong with the store */
	}
	if (!error && ret->offered_pages) {
		b->step = OFFERED;
		b->filed = false;
	} else if (!error) {
		stay_stored(b);
		b->step = WRITTEN;
	}
	ret->write_ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

/* The slots [i, i + n), neighbours. */
static int store_run(struct tierd_batch *b, unsigned int tier, uint32_t i, uint32_t n)
{
	struct page_cipher *cipher = b->g->ciphers[tier];
	const uint8_t *from = b->bytes + i * b->page_bytes;
	int error = 0;

	if (cipher) {
		uint8_t *sealed = b->sealed + i * b->page_bytes;

		error = page_cipher_run(cipher, true, b->pages[i], n, (uint32_t)b->page_bytes, from, sealed);
		from = sealed;
	}
	return error ? error : store_write(b->g, tier, b->pages[i], n, from);
}

static int store_in_file(struct tierd_batch *b, unsigned int tier)
{
	uint32_t n, first = UINT32_MAX, end = 0;
	int error = 0;

	for (uint32_t i = 0; !error && i < b->count; i += n) {
		n = alike_run(b, i);
		if (b->to[i] != tier)
			continue;
		if (!end)
			store_enter(b->g, tier);
		first = first < i ? first : i;
		end = i + n;
		error = store_run(b, tier, i, n);
	}
	if (!end)
		return 0;
	if (!error)
		error = store_settle(b->g, tier, b->pages[first], b->pages[end - 1] + 1);
	store_leave(b->g, tier);
	return error;
}

/* Everything here is the batch's own, or atomic: the worker may be busy with another one. */
int tierd_batch_store(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	int error = 0;

	memset(ret, 0, sizeof(*ret));
	if (b->step != OFFERED || atomic_exchange(&b->storing, true))
		return -EINVAL;
	atomic_store_explicit(&g->storing_since_ns[b->lane], began_ns, memory_order_relaxed);
	for (unsigned int tier = 1; !error && tier <= TIERD_LADDER_MAX; tier++) {
		if (!tier_exists(g, tier) || tier_is_pool(g, tier) || tier_is_asked(g, tier))
			continue;
		error = store_in_file(b, tier);
		if (error) {
			ret->failed_tier = tier;
			count_add(&g->tier_counts[tier].write_errors, 1);
			count_error(g, &g->count.store_write_errors, error);
		}
	}
	atomic_store_explicit(&g->storing_since_ns[b->lane], 0, memory_order_relaxed);
	b->filed = !error;
	ret->write_ns = sys_now_ns() - began_ns;
	atomic_store(&b->storing, false);
	return error;
}

int tierd_batch_run(struct tierd_batch *b, uint32_t tier, uint32_t slot, struct tierd_run *ret)
{
	*ret = (struct tierd_run){0};
	if (b->step != (tier ? OFFERED : SELECTED) || (!tier && !from_asked(b)))
		return -EINVAL;
	while (tier && slot < b->count && b->to[slot] != tier)
		slot++;
	if (slot < b->count)
		*ret = (struct tierd_run){.page = b->pages[slot],
					  .slot = slot,
					  .count = tier ? alike_run(b, slot)
							: run_length(b->g, b->pages + slot, b->count - slot),
					  .bytes = b->bytes + slot * b->page_bytes};
	return 0;
}

int tierd_batch_stored(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	int error = batch_enter(b, OFFERED, ret);

	if (!error && !b->filed) {
		guest_leave(g);
		error = -EINVAL;
	}
	if (error)
		return error;
	for (uint32_t i = 0; i < b->count; i++) {
		bool offered = b->to[i] != TIER_ZERO && b->to[i] != UNCHANGED && !tier_is_pool(g, b->to[i]);

		ret->written_pages += offered;
		if (offered)
			count_add(&g->tier_counts[b->to[i]].written_pages, 1);
	}
	stay_stored(b);
	b->step = WRITTEN;
	guest_leave(g);
	return 0;
}

/* --- drop --------------------------------------------------------------------------------------------------------------- */

/* Of a page that stays in its tier: what was written of it to another one. Best effort: its space is written again when it comes next. */
static void forget_written(struct tierd_batch *b, uint32_t slot)
{
	int error;

	if (b->to[slot] == TIER_ZERO || !placed(b, slot))
		return;
	worker_io_begin(b->g);
	error = tier_discard(b->g, b->to[slot], b->pages[slot], 1);
	worker_io_end(b->g);
	if (error)
		discard_failed(b->g, b->to[slot], error);
}

/* The word of a page that its new tier has. */
static page_word arrived_word(struct tierd_batch *b, uint32_t slot, enum page_state state)
{
	page_word w = word_with_clean(word_with_tier(word_with_state(b->words[slot], state), b->to[slot]), false);

	return word_with_copy(w, b->to[slot] != TIER_ZERO);
}

/* Of the slots [first, first + n): those that are DROPPING now are the first ones, this many; then come those that a fault has taken,
 * with their page and tier. No I/O: guest threads wait for pages that are DROPPING. */
static uint32_t claim_dropping(struct tierd_batch *b, uint32_t first, uint32_t n)
{
	uint32_t kept = first;

	for (uint32_t i = first; i < first + n; i++) {
		page_word to = arrived_word(b, i, DROPPING);
		uint64_t taken = b->pages[kept];
		uint8_t tier = b->to[kept];

		if (!page_move(b->g, b->pages[i], b->words[i], to))
			continue;
		b->words[i] = to;
		keep(b, kept, i);
		if (kept++ == i)
			continue;
		b->pages[i] = taken;
		b->to[i] = tier;
	}
	count_add(&b->g->count.pages_cancelled, first + n - kept);
	return kept - first;
}

/* A punch can fail silently: in a large folio with an extra reference it zeroes the bytes and leaves them cached. Such a page
 * gets its bytes back and stays with the guest. hugetlbfs punches a page as a whole or not at all. */
static int settle_dropped(struct tierd_batch *b, uint32_t i, bool cached, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	struct region *r = region_of_page(g, b->pages[i]);
	page_word to = word_with_state(b->words[i], cached ? RESIDENT : STORED);

	if (cached && g->huge) {
		to = word_with_epoch(to, epoch_next(g));
		count_add(&g->count.pages_cancelled, 1);
	} else if (cached) {
		ssize_t n = sys_mem_write(r->memfd, b->bytes + i * b->page_bytes, b->page_bytes,
					  mem_offset_of(r, b->pages[i]));

		/* a file that was sealed meanwhile can neither be punched nor written: then the bytes are there still */
		if (n != (ssize_t)b->page_bytes && (read_pages(b, b->pages[i], 1, b->again) ||
						    memcmp(b->again, b->bytes + i * b->page_bytes, b->page_bytes)))
			return n < 0 ? (int)n : -EIO; /* stays DROPPING: adoption decides */
		to = word_with_epoch(to, epoch_next(g));
		count_add(&g->count.pages_repaired, 1);
	} else {
		ret->evicted_pages++;
		count_add(&g->count.pages_evicted, 1);
		count_add(&g->count.pages_evicted_zero, b->to[i] == TIER_ZERO);
	}
	if (!page_move(g, b->pages[i], b->words[i], to))
		abort();
	return 0;
}

/* `page` of the run [first, first + n) of pages is a hole now: whether that has split a large folio. */
static bool has_split(struct tierd_guest *g, uint64_t page, uint64_t first, uint64_t n)
{
	uint64_t head = large_head(g, page);

	if (!was_mapped_large(g, page))
		return false;
	bit_clear(g->large, head);
	return head < first || head + large_pages(g) > first + n;
}

/*
 * Punches exactly the run [first, first + n), all DROPPING, and looks whether it is a hole now. Where that cannot be seen, a page
 * counts as cached: its bytes are written back. On hugetlbfs, where they cannot be, the answer of the punch is believed: all of the
 * run is a hole, or it was refused and nothing was done (hugetlbfs_punch_hole in fs/hugetlbfs/inode.c knows no other end).
 */
static int drop_run(struct tierd_batch *b, uint32_t first, uint32_t n, struct tierd_batch_result *ret)
{
	struct region *r = region_of_page(b->g, b->pages[first]);
	uint64_t offset = mem_offset_of(r, b->pages[first]), end = offset + n * b->page_bytes;
	int64_t data = (int64_t)offset - 1;
	int punched = sys_mem_punch(r->memfd, offset, end - offset), error = punched, failed;

	for (uint32_t i = 0; i < n; i++, offset += b->page_bytes) {
		if (data < (int64_t)offset) {
			data = mem_next_data(b->g, r, b->pages[first + i]);
			if (data < 0)
				data = (int64_t)offset + (b->g->huge && !punched);
		}
		if (data != (int64_t)offset && has_split(b->g, b->pages[first + i], b->pages[first], n))
			count_add(&b->g->count.large_folios_split, 1);
		failed = settle_dropped(b, first + i, data == (int64_t)offset, ret);
		if (failed)
			error = failed;
	}
	return error;
}

/* Pages that were stored before and are of one word now: the tier's old bytes are of no use. The worker is the only one who
 * writes or discards, so nothing can land in that space meanwhile. */
static int discard_zeroed(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	int first = 0;

	for (uint32_t i = 0; i < b->count; i++) {
		page_word to = word_with_clean(word_with_copy(b->words[i], false), false);
		int error;

		if (b->to[i] != TIER_ZERO || !word_copy(b->words[i]))
			continue;
		error = tier_discard(b->g, word_tier(b->words[i]), b->pages[i], 1);
		if (error && !first) {
			first = error;
			discard_failed(b->g, word_tier(b->words[i]), error);
			ret->failed_tier = word_tier(b->words[i]);
		}
		if (page_move(b->g, b->pages[i], b->words[i], to)) {
			b->g->copies[word_tier(b->words[i])]--;
			b->words[i] = to;
		}
	}
	return first;
}

/* The slots [first, first + n), all DROPPING. Goes on after an error: a page that is DROPPING must not stay so. */
static int drop_slots(struct tierd_batch *b, uint32_t first, uint32_t n, struct tierd_batch_result *ret)
{
	int error = 0, failed;
	uint32_t run;

	for (uint32_t i = first; i < first + n; i += run) {
		run = run_length(b->g, b->pages + i, first + n - i);
		failed = drop_run(b, i, run, ret);
		if (failed && !error)
			error = failed;
	}
	return error;
}

/* --- out of the staging area ------------------------------------------------------------------------------------------ */

/* DROPPING -> STORED: of the tier when its room in the staging area is seen to be empty, else there again. */
static void settle_moved(struct tierd_batch *b, uint32_t i, bool there, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	page_word to = word_with_state(b->words[i], STORED);

	if (there) {
		forget_written(b, i);
		to = word_with_copy(word_with_tier(to, TIER_STAGING), true);
		count_add(&g->count.pages_cancelled, 1);
	} else {
		g->copies[b->to[i]] += b->to[i] != TIER_ZERO;
		ret->evicted_pages++;
		count_add(&g->count.pages_evicted, 1);
		count_add(&g->count.pages_evicted_zero, b->to[i] == TIER_ZERO);
	}
	if (!page_move(g, b->pages[i], b->words[i], to))
		abort();
}

static int drop_staged(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t waits = waits_now(g), cooled = UINT64_MAX;
	struct sys_inside_call calls[SYS_INSIDE_MAX];
	uint32_t n, count = 0, done, all = b->count;
	int error = 0, failed;

	b->count = claim_dropping(b, 0, all);
	for (uint32_t i = 0; i < b->count && !error; i += n) {
		n = run_length(g, b->pages + i, b->count - i);
		calls[count++] = drop_of(g, b->pages[i], n);
		if (count < SYS_INSIDE_MAX && i + n < b->count)
			continue;
		error = inside_run(g, calls, count, &done, &ret->stopped_ns);
		count = 0;
	}
	for (uint32_t i = 0; i < b->count; i += n) {
		n = run_length(g, b->pages + i, b->count - i);
		failed = staged_look(g, b->pages[i], n, b->touched);
		for (uint32_t k = 0; k < n; k++) {
			uint64_t group = b->pages[i + k] / GROUP_PAGES;

			settle_moved(b, i + k, bit_get(b->touched, k), ret);
			if (!bit_get(b->touched, k) && group != cooled) { /* once, however many of its pages leave */
				heat_down(g, b->pages[i + k]);
				cooled = group;
			}
		}
		wake_waiters(g, b->pages[i], n, waits);
		if (!error)
			error = failed;
	}
	for (uint32_t i = b->count; i < all; i++)
		forget_written(b, i);
	return error;
}

/* --- from one tier to the next ---------------------------------------------------------------------------------------- */

/* The pages that nobody has taken back meanwhile are the new tier's. */
static void hand_over(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint32_t kept = 0, count = b->count;

	for (uint32_t i = 0; i < count; i++) {
		if (!page_move(g, b->pages[i], b->words[i], arrived_word(b, i, STORED))) {
			forget_written(b, i);
			continue;
		}
		g->copies[b->from]--;
		g->copies[b->to[i]] += b->to[i] != TIER_ZERO;
		keep(b, kept++, i);
	}
	b->count = kept;
	ret->evicted_pages = kept;
	ret->cancelled_pages = count - kept;
	count_add(&g->count.pages_demoted, kept);
	count_add(&g->count.pages_cancelled, count - kept);
}

/* Their space in the old tier is given back after their words speak of the new one: who takes a page from then on reads there, and who
 * took it before has kept its word from changing. What a crash leaves in a pool is found by adoption, in a file it is written over. */
static int drop_demoted(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	int error = 0, failed;
	uint32_t n;

	worker_io_begin(b->g);
	hand_over(b, ret);
	for (uint32_t i = 0; i < b->count; i += n) {
		n = run_length(b->g, b->pages + i, b->count - i);
		failed = tier_discard(b->g, b->from, b->pages[i], n);
		if (failed && !error)
			error = failed;
	}
	worker_io_end(b->g);
	if (error) {
		discard_failed(b->g, b->from, error);
		ret->failed_tier = b->from;
	}
	return error;
}

static int drop(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	int first, error;

	if (b->from == TIER_STAGING)
		return drop_staged(b, ret);
	if (moving(b))
		return drop_demoted(b, ret);
	first = discard_zeroed(b, ret);
	b->count = claim_dropping(b, 0, b->count);
	error = drop_slots(b, 0, b->count, ret);
	if (error)
		ret->failed_tier = 0;
	return error ? error : first;
}

int tierd_batch_drop(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns = sys_now_ns();
	int error = batch_enter(b, WRITTEN, ret);

	if (error)
		return error;
	error = drop(b, ret);
	if (error && !ret->failed_tier)
		count_error(g, &g->count.kernel_errors, error);
	b->count = 0;
	b->step = DROPPED;
	ret->drop_ns = sys_now_ns() - began_ns;
	guest_leave(g);
	return error;
}

/* --- release and cancel ------------------------------------------------------------------------------------------------- */

/* Every run is tried, whatever happens to one: a range left held would block its writers for ever. */
static int release_runs(struct tierd_batch *b)
{
	struct tierd_guest *g = b->g;
	int first = 0;

	for (uint32_t i = 0; i < b->held_runs; i++) {
		int error = g->engine->release(g, b->held[i].page, b->held[i].count);

		if (error) /* a part of it is not mapped any more, say: whoever waits at the others comes again, and lifts it there */
			sys_uffd_wake(g->uffd, address_of(g, b->held[i].page),
				      (uint64_t)b->held[i].count * g->page_bytes);
		if (error && !first)
			first = error;
	}
	if (b->held_runs)
		atomic_fetch_sub(&g->holding, 1);
	b->held_runs = 0;
	if (first && first != -ESRCH)
		count_error(g, &g->count.kernel_errors, first);
	return first;
}

int tierd_batch_release(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	uint64_t began_ns = sys_now_ns();
	int error = batch_enter(b, DROPPED, ret);

	if (error)
		return error;
	error = release_runs(b);
	b->step = EMPTY;
	ret->release_ns = sys_now_ns() - began_ns;
	guest_leave(b->g);
	return error;
}

int tierd_batch_cancel(struct tierd_batch *b, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	int error = batch_enter(b, b->step, ret);

	if (!error && atomic_load(&b->storing)) {
		guest_leave(g);
		error = -EBUSY;
	}
	if (error)
		return error;
	for (uint32_t i = b->first; i < b->count; i++) {
		if (moving(b) && b->step >= COPIED)
			forget_written(b, i);
		page_move(g, b->pages[i], b->words[i],
			  word_with_clean(word_with_state(b->words[i], moving(b) ? STORED : RESIDENT), false));
	}
	ret->cancelled_pages = b->count - b->first;
	count_add(&g->count.pages_cancelled, b->count - b->first);
	b->count = b->first = 0;
	error = release_runs(b);
	b->step = EMPTY;
	guest_leave(g);
	return error;
}

/* --- a sync window ------------------------------------------------------------------------------------------------------ */

/*
 * What was copied before the window is what the page holds now, because nobody touched it since. That must be seen, not concluded
 * from an absence: a mapping that the VMM has made anew since is not registered, and nothing is ever seen of it.
 *
 *   rwp   the entry of the page table is there and carries the protection, which it had before the copy: only the worker protects.
 *   rfc   the entry carries the hold's marker. But the page may have been mapped, written and unmapped again (reclaim, the VMM
 *	   itself) between the copy and the hold, so the bytes are compared. A hold unmaps all of what is mapped large: who was
 *	   touched is asked before the first one, too, and what does not leave counts as touched.
 *
 * From here to the end of the window an access waits: at the protection, or as MINOR and at the marker.
 */
static int rwp_still_cold(struct tierd_batch *b, uint32_t slot, uint32_t bit, bool *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t touched, present;
	int error;

	*ret = bit_get(b->other, bit);
	/* not mapped: unmapped since the copy, by reclaim or the split of a large folio; it is mapped in the next batch */
	if (*ret || !bit_get(b->touched, bit))
		return 0;
	error = scan_range(g, b->pages[slot], 1, &touched, SYS_PAGE_PRESENT, &present);
	if (error || touched || !present || page_load(g, b->pages[slot]) != b->words[slot])
		return error;
	return -ENOENT; /* mapped, not protected, and not touched: not registered */
}

static int rfc_still_cold(struct tierd_batch *b, uint32_t slot, uint32_t bit, bool *ret)
{
	int error;

	*ret = false;
	if (bit_get(b->before, slot) || bit_get(b->touched, bit) || !bit_get(b->other, bit))
		return 0;
	error = read_pages(b, b->pages[slot], 1, b->again);
	*ret = !error && !memcmp(b->again, b->bytes + slot * b->page_bytes, b->page_bytes);
	return error;
}

/* rwp: `touched`: mapped without the protection; `other`: mapped with it. rfc: as in hold. */
static int look_at_run(struct tierd_batch *b, uint32_t first, uint32_t n)
{
	struct tierd_guest *g = b->g;

	return g->engine->holds_mapped ? scan_protected(g, b->pages[first], n, b->touched, b->other)
				       : scan_range(g, b->pages[first], n, b->touched, SYS_PAGE_SWAPPED, b->other);
}

/* rfc: who was touched before the batch's first hold, or counts as touched since it was selected (date_large); in the windows after
 * that, since. `before`: by slot. */
static int look_before_holds(struct tierd_batch *b)
{
	struct tierd_guest *g = b->g;
	uint16_t now = epoch_now(g);
	uint32_t n;

	if (!b->first)
		memset(b->before, 0, bitmap_bytes(b->count));
	for (uint32_t i = b->first; i < b->count; i += n) {
		int error;

		n = run_length(g, b->pages + i, b->count - i);
		error = scan_range(g, b->pages[i], n, b->touched, 0, NULL);
		if (error)
			return error;
		for (uint32_t slot = i; slot < i + n; slot++)
			if (bit_get(b->touched, slot - i) ||
			    (!b->first && page_age(g, b->pages[slot], now, b->words[slot]) < b->age_min))
				bit_set(b->before, slot);
	}
	return 0;
}

/* The run of slots [first, first + n): all of it has been decided when this returns. */
static int window_run(struct tierd_batch *b, uint32_t first, uint32_t n, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	bool dated = !g->engine->holds_mapped && was_mapped_large(g, b->pages[first]);
	uint32_t kept = first;
	int error;

	if (dated)
		date_large(g, b->pages[first]); /* before it, as a kill may come between; and from its end on */
	error = hold_run(b, b->pages[first], n);
	if (dated)
		date_large(g, b->pages[first]);
	if (!error)
		error = look_at_run(b, first, n);
	for (uint32_t i = first; i < first + n; i++) {
		bool cold = false;

		if (!error)
			error = g->engine->holds_mapped ? rwp_still_cold(b, i, i - first, &cold)
							: rfc_still_cold(b, i, i - first, &cold);
		if (cold)
			keep(b, kept++, i);
		else
			turn_back(g, b->pages[i], b->words[i]);
	}
	count_add(&g->count.pages_cancelled, first + n - kept);
	ret->cancelled_pages += first + n - kept;
	ret->held_pages += kept - first;
	if (kept > first) {
		int failed = drop_slots(b, first, claim_dropping(b, first, kept - first), ret);

		if (!error)
			error = failed;
	}
	return error;
}

/*
 * The one way out of sync mode. No page is DROPPING any more (but one whose bytes are gone from the cache and could not be written
 * back, for which there is no cause that we know), so nothing is punched after it; what is still LEAVING is looked at
 * again in the next window before anything is done to it. Where the kernel refuses, whatever the worker does next tries it
 * again.
 */
static int window_end(struct tierd_batch *b, uint64_t began_ns)
{
	struct tierd_guest *g = b->g;
	int first = release_runs(b), error;
	uint64_t ns;

	error = leave_sync(g);
	ns = sys_now_ns() - began_ns;
	count_add(&g->count.windows, 1);
	count_add(&g->count.window_sum_ns, ns);
	count_add(&g->count.window_buckets[bucket_of(ns)], 1);
	return first ? first : error;
}

/*
 * Slots from b->first on between two looks at the clock: of a run, pages up to the next multiple of GROUP_PAGES in their file, so that
 * no small folio is cut; of a large one that was seen, all that leaves; one huge page. A whole run may take several milliseconds.
 */
static uint32_t window_piece(struct tierd_batch *b)
{
	struct tierd_guest *g = b->g;
	const uint64_t *pages = b->pages + b->first;
	uint32_t run = run_length(g, pages, b->count - b->first), n;
	uint64_t in_file = mem_offset_of(region_of_page(g, pages[0]), pages[0]);
	uint64_t end = pages[0] + (g->huge ? 1 : GROUP_PAGES - in_file / g->page_bytes % GROUP_PAGES);

	if (was_mapped_large(g, pages[0]))
		end = large_head(g, pages[0]) + large_pages(g);
	n = (uint32_t)(end - pages[0]);
	return n < run ? n : run;
}

int tierd_batch_window(struct tierd_batch *b, uint64_t window_ns_max, struct tierd_batch_result *ret)
{
	struct tierd_guest *g = b->g;
	uint64_t began_ns;
	uint32_t n;
	int error = moving(b) ? -EINVAL : batch_enter(b, WRITTEN, ret), failed, discarded = 0;

	if (error)
		return error;
	if (!b->count) { /* no tier took any: nobody is held for that */
		b->step = EMPTY;
		guest_leave(g);
		return 0;
	}
	if (!b->first)
		discarded = discard_zeroed(b, ret); /* an I/O of the store: before the guest is held */
	began_ns = sys_now_ns();
	atomic_store(&g->in_window, true);
	error = g->engine->set_async(g->uffd, false);
	if (!error && !g->engine->holds_mapped)
		error = look_before_holds(b);
	for (; !error && b->first < b->count; b->first += n) {
		n = window_piece(b);
		error = window_run(b, b->first, n, ret);
		if (sys_now_ns() - began_ns >= window_ns_max) {
			b->first += n;
			break;
		}
	}
	ret->hold_ns = sys_now_ns() - began_ns;
	failed = window_end(b, began_ns);
	if (!error)
		error = failed;
	if (error) {
		ret->failed_tier = 0;
		count_error(g, &g->count.kernel_errors, error);
	} else {
		error = discarded;
	}
	ret->left_pages = b->count - b->first;
	if (!error && !ret->left_pages)
		b->step = EMPTY;
	guest_leave(g);
	return error;
}

/* --- store space of pages that were fetched since ----------------------------------------------------------------------- */

/* `keep`: bit i: of pages of tier i that are clean, the copy is kept: they need not be written again. */
static bool stale(struct tierd_guest *g, uint64_t page, page_word w, uint32_t keep)
{
	return word_state(w) == RESIDENT && word_takes_space(w) && !quarantined(g, page) &&
	       !(word_clean(w) && keep >> word_tier(w) & 1);
}

static bool anything_stored(const struct tierd_guest *g)
{
	uint64_t pages = 0;

	for (uint32_t tier = 1; tier <= TIERD_LADDER_MAX; tier++)
		pages += g->copies[tier];
	return pages;
}

/* Length of the stale run of one tier from `page` on. */
static uint64_t stale_run(struct tierd_guest *g, uint64_t page, uint64_t max_pages, uint32_t keep)
{
	unsigned int tier = word_tier(page_load(g, page));
	uint64_t n = 0;

	while (page + n < g->pages && n < max_pages) {
		page_word w = page_load(g, page + n);

		if (!stale(g, page + n, w, keep) || word_tier(w) != tier)
			break;
		n++;
	}
	return n;
}

int tierd_guest_unclean(struct tierd_guest *g, uint32_t tier)
{
	int error = tier < TIERD_TIERS && tier_exists(g, tier) ? guest_enter(g) : -EINVAL;

	if (error)
		return error;
	unclean_tier(g, tier);
	guest_leave(g);
	return 0;
}

int tierd_guest_read_failed(struct tierd_guest *g, uint32_t tier, int32_t error)
{
	bool wrong = error == -EBADMSG;

	if (tier >= TIERD_TIERS || !tier_is_asked(g, tier))
		return -EINVAL;
	count_add(wrong ? &g->tier_counts[tier].checksum_errors : &g->tier_counts[tier].read_errors, 1);
	count_error(g, wrong ? &g->count.checksum_errors : &g->count.store_read_errors, error);
	return 0;
}

int tierd_guest_write_failed(struct tierd_guest *g, uint32_t tier, int32_t error)
{
	if (tier >= TIERD_TIERS || !tier_is_asked(g, tier))
		return -EINVAL;
	count_add(&g->tier_counts[tier].write_errors, 1);
	count_error(g, &g->count.store_write_errors, error);
	return 0;
}

/* A tier that fails is passed over from then on: what is stale in the others takes room, of the pool the host's memory. */
int tierd_guest_discard(struct tierd_guest *g, uint64_t max_pages, uint32_t keep, uint64_t *discarded,
			uint32_t *failed_tier)
{
	uint32_t failed = 0; /* tiers */
	int error = guest_enter(g), first = 0;
	uint64_t n;

	*discarded = *failed_tier = 0;
	if (error)
		return error;
	for (uint64_t page = 0; page < g->pages && *discarded < max_pages && anything_stored(g); page += n ? n : 1) {
		unsigned int tier = word_tier(page_load(g, page));

		n = failed >> tier & 1 ? 0 : stale_run(g, page, max_pages - *discarded, keep);
		if (!n)
			continue;
		unclean(g, page, n);
		worker_io_begin(g);
		error = tier_discard(g, tier, page, n);
		worker_io_end(g);
		if (error) {
			failed |= 1u << tier;
			discard_failed(g, tier, error);
			*failed_tier = first ? *failed_tier : tier;
			first = first ? first : error;
			continue;
		}
		for (uint64_t i = page; i < page + n; i++) {
			page_word now = page_load(g, i);

			/* a page that a fault is resolving just now keeps its bit: its space is discarded again, later */
			if (stale(g, i, now, keep) &&
			    page_move(g, i, now, word_with_clean(word_with_copy(now, false), false))) {
				g->copies[word_tier(now)]--;
				(*discarded)++;
			}
		}
	}
	guest_leave(g);
	return first;
}

/* --- the pool: closer together ---------------------------------------------------------------------------------------------- */

struct compaction {
	struct tierd_guest *g;
	uint64_t waits;
};

/* A stored page is ours while it is moved within its pool: ARRIVING, so faults on it wait for us. */
static bool own_stored(void *argument, uint64_t page)
{
	struct compaction *c = argument;
	page_word w = page_load(c->g, page);

	c->waits = waits_now(c->g);
	return word_state(w) == STORED && tier_is_pool(c->g, word_tier(w)) &&
	       page_move(c->g, page, w, word_with_state(w, ARRIVING));
}

static void disown_stored(void *argument, uint64_t page)
{
	struct compaction *c = argument;
	page_word w = page_load(c->g, page);

	if (!page_move(c->g, page, w, word_with_state(w, STORED)))
		abort();
	wake_waiters(c->g, page, 1, c->waits);
}

int tierd_guest_compact(struct tierd_guest *g, uint32_t max_pages, uint32_t *moved)
{
	struct compaction c = {.g = g};
	int error = guest_enter(g);

	*moved = 0;
	if (error)
		return error;
	if (g->pool)
		error = pool_compact(g->pool, max_pages, own_stored, disown_stored, &c, moved);
	guest_leave(g);
	return error;
}
