/* SPDX-License-Identifier: Apache-2.0 */
/* script.c: see script.h. */
#include <string.h>

#include "content.h"
#include "script.h"
#include "internal.h"

struct script S;
_Thread_local uint64_t script_random;

uint32_t below(uint32_t n)
{
	script_random ^= script_random << 13;
	script_random ^= script_random >> 7;
	script_random ^= script_random << 17;
	return (uint32_t)((script_random * 0x2545f4914f6cdd1dull >> 16) % n);
}

bool script_engine(const char *name, uint32_t *ret)
{
	static const char *const names[] = {
		[TIERD_ENGINE_STOCK] = "stock", [TIERD_ENGINE_RWP] = "rwp", [TIERD_ENGINE_RFC] = "rfc"};

	for (*ret = 0; *ret < sizeof(names) / sizeof(names[0]); (*ret)++)
		if (!strcmp(names[*ret], name))
			return true;
	return false;
}

static bool chance(uint32_t thousandths)
{
	return below(1000) < thousandths;
}

/* --- the guest ---------------------------------------------------------------------------------------------------------- */

/* A page of a VMM that got a memory error there: it may zap the page, which takes the poison away, and touch it again. */
static void memory_error(uint32_t page)
{
	S.memory_errors++;
	if (!world_may_fail(page))
		script_fail("a memory error at page %u, and nothing destroyed its stored copy", page);
	if (chance(500)) {
		S.maybe_zero[page] |= S.anon;
		world_zap(page);
	}
}

static void check(uint32_t page, uint64_t value)
{
	if (!value && world_zeroed(page))
		return; /* what it reads next is what it wrote, or, given back meanwhile, zeros: nothing is known by this */
	if (value == S.last[page] || (S.maybe_zero[page] && (!value || world_may_be_older(page, value)))) {
		S.last[page] = value;
		if (!S.giving_back[page])
			S.maybe_zero[page] = false;
		world_settled(page);
	} else {
		script_fail("page %u reads %#lx, the guest last wrote %#lx", page, value, S.last[page]);
	}
}

void script_read(uint32_t thread, uint32_t page)
{
	enum outcome outcome;
	uint64_t value;

	world_lock(page);
	outcome = world_access(thread, page, false, &value);
	S.accesses++;
	if (outcome == MADE)
		check(page, value);
	else if (outcome == MEMORY_ERROR)
		memory_error(page);
	world_unlock(page);
}

enum writing { ZEROS, FILLED, BYTES };

static uint64_t filling(uint32_t page, uint32_t count)
{
	return ONE_WORD | (page + 1ull) << 32 | count;
}

static uint64_t content(uint32_t page, uint32_t count)
{
	return (page + 1ull) << 32 | count;
}

bool script_may_have_written(uint32_t page, uint64_t value)
{
	uint32_t count = (uint32_t)value;

	return (value == filling(page, count) || value == content(page, count)) && count <= S.writes[page];
}

static void write_page(uint32_t thread, uint32_t page, enum writing what)
{
	uint64_t value = 0;

	world_lock(page);
	if (what != ZEROS)
		value = (what == FILLED ? filling : content)(page, ++S.writes[page]);
	S.accesses++;
	if (world_access(thread, page, true, &value) == MADE) {
		S.last[page] = value;
		S.maybe_zero[page] = S.giving_back[page] != 0;
		world_settled(page);
	} else {
		memory_error(page);
	}
	world_unlock(page);
}

/* From here on it reads as zeros or, had it left the guest, as what it held. */
static void give_back(uint32_t page)
{
	world_lock(page);
	S.giving_back[page]++;
	S.maybe_zero[page] = true;
	world_give_back(page);
	S.giving_back[page]--;
	world_unlock(page);
}

void script_guest(uint32_t thread)
{
	uint32_t hot = below(S.pages);

	while (!world_stopped()) {
		uint32_t page = below(3) ? (hot + below(4)) % S.pages : below(S.pages), what = below(100);

		if (what < 40)
			script_read(thread, page);
		else if (what < 50) /* a walk, for the read-ahead */
			for (uint32_t i = 0; i < 6; i++)
				script_read(thread, (page + i) % S.pages);
		else if (what < 86)
			write_page(thread, page, BYTES);
		else if (what < 92)
			write_page(thread, page, what % 2 ? FILLED : ZEROS);
		else if (what < 94 && !S.anon) /* of anonymous memory it is the other thing */
			world_zap(page);
		else
			give_back(page);
		world_rest(below(12));
		if (!below(40))
			hot = below(S.pages);
	}
}

void script_read_all(uint32_t thread)
{
	for (uint32_t page = 0; page < S.pages; page++)
		script_read(thread, page);
}

/* --- the daemon's worker ------------------------------------------------------------------------------------------------ */

/* Where nothing is destroyed, what is read wrong now is read right some day, and no page may be LOST. */
void script_set_reads(struct tierd_guest *g)
{
	uint64_t deadline_ns = S.losses ? below(3) * 2000000ull : UINT64_MAX;

	tierd_guest_set_reads(g, deadline_ns, below(2) ? TIERD_LOST_POISON : TIERD_LOST_HOLD);
}

static bool failed(int error, const char *what)
{
	if (error && !S.failures)
		script_fail("%s failed: error %d, and nothing was made to fail", what, -error);
	return error;
}

/* --- the daemon's part that is Python: tiers that are asked ------------------------------------------------------------- */

enum { ANSWER_BYTES_MAX = 1 << 16 };

/* An answer's bytes are read until its number is given out again. */
static uint8_t answers[256][ANSWER_BYTES_MAX];

static void answer(struct tierd_guest *g, const struct tierd_request *r)
{
	uint32_t good = r->count > 1 && chance(200) ? 1 : r->count;
	int error = world_store_read(r->tier, r->page, good, answers[r->number]);

	if (tierd_guest_answer(g, r->number, answers[r->number], error ? 0 : good, error))
		script_fail("a request was not taken");
}

bool script_answer(struct tierd_guest *g, struct script_requests *held)
{
	struct tierd_request r;
	uint32_t n, i;

	if (tierd_guest_asked(g, held->taken + held->count, SCRIPT_TAKEN_MAX - held->count, &n))
		script_fail("nothing is asked here");
	held->count += n;
	if (!held->count)
		return false;
	i = below(held->count);
	r = held->taken[i];
	held->taken[i] = held->taken[--held->count];
	answer(g, &r);
	return true;
}

static int store_in_files(struct tierd_batch *b)
{
	struct tierd_batch_result ignored;

	return tierd_batch_store(b, &ignored);
}

/* What is in its files already goes where Python stores it, too; the batch is WRITTEN then. */
static int store_elsewhere(struct tierd_batch *b, struct tierd_batch_result *r)
{
	struct tierd_run run;

	for (uint32_t tier = 1; tier <= S.tiers; tier++)
		for (uint32_t slot = 0; S.asked >> tier & 1; slot = run.slot + run.count) {
			int error = tierd_batch_run(b, tier, slot, &run);

			if (!error && !run.count)
				break;
			if (!error)
				error = world_store_write(tier, run.page, run.count, run.bytes);
			if (error)
				return error;
		}
	return tierd_batch_stored(b, r);
}

static int store_offered(struct tierd_batch *b, struct tierd_batch_result *r)
{
	int error = store_in_files(b);

	return error ? error : store_elsewhere(b, r);
}

static uint32_t mask_of(const uint32_t *tiers, uint32_t count)
{
	uint32_t mask = 0;

	while (count--)
		mask |= 1u << tiers[count];
	return mask;
}

/* Each page to the first of some tiers; the batch is WRITTEN then. */
static int write_batch(struct tierd_batch *b, const uint32_t *tiers, uint32_t count, struct tierd_batch_result *r)
{
	int error = tierd_batch_write(b, tiers, count, mask_of(tiers, count), r);

	return error || !r->offered_pages ? error : store_offered(b, r);
}

/* What sinks out of a tier that is asked: its bytes, or of some pages not. */
static void supply(struct tierd_batch *b, uint32_t from)
{
	static uint8_t bytes[ANSWER_BYTES_MAX];
	struct tierd_run run;

	for (uint32_t slot = 0; !tierd_batch_run(b, 0, slot, &run) && run.count; slot = run.slot + run.count) {
		if (chance(100))
			continue;
		if (!world_store_read(from, run.page, run.count, bytes) &&
		    tierd_batch_supply(b, run.slot, run.count, bytes))
			script_fail("bytes were not taken");
	}
}

static void tell_garbage(struct tierd_guest *g)
{
	uint64_t page, count;

	for (uint32_t tier = 1; tier <= S.tiers; tier++)
		for (page = 0; S.asked >> tier & 1; page += count) {
			if (tierd_guest_garbage(g, tier, page, 1 + below(8), &page, &count))
				script_fail("no garbage here");
			if (!count)
				break;
			if (!world_store_discard(tier, page, count) && tierd_guest_garbage_gone(g, tier, page, count))
				script_fail("garbage was not taken");
		}
}

static bool cancelled_at_will(struct tierd_batch *b, struct tierd_batch_result *r)
{
	if (!chance(40))
		return false;
	tierd_batch_cancel(b, r);
	return true;
}

/* The engine's windows: all of them, or as many as the daemon likes. */
static void drop_in_windows(struct tierd_batch *b, struct tierd_batch_result *r)
{
	uint64_t window_ns_max = below(2) ? 0 : below(1000000); /* 0: a run a window */

	do {
		int error = tierd_batch_window(b, window_ns_max, r);

		S.evicted += r->evicted_pages;
		if (failed(error, "window") || (r->left_pages && chance(40))) {
			tierd_batch_cancel(b, r);
			return;
		}
		if (r->left_pages && below(2))
			world_rest(below(20));
	} while (r->left_pages);
}

/* Those below `above`, in their order, or some of them; at least one. Returns how many. */
static uint32_t ladder(uint32_t above, uint32_t *tiers)
{
	uint32_t n = 0;

	if (S.tiers == 1) {
		tiers[0] = 1;
		return 1;
	}
	for (uint32_t tier = above + 1; tier <= S.tiers; tier++)
		if (tier == S.tiers ? !n || below(2) : below(3))
			tiers[n++] = tier;
	return n;
}

/* Select, hold and copy: whether there is anything to write. */
static bool take_batch(struct tierd_guest *g, struct tierd_batch *b, uint64_t *page)
{
	struct tierd_batch_result r;
	double min_idle_s = below(2) ? 0 : 0.002;
	uint32_t from = S.anon ? TIER_STAGING : TIER_GUEST;

	world_before_select();
	if (tierd_batch_select(b, from, S.tiers > 1 && !below(4), *page, min_idle_s, 1 + below(BATCH_PAGES_MAX), &r))
		script_fail("select failed");
	*page = r.next_page;
	if (!r.selected_pages)
		return false;
	world_selected(min_idle_s, false);
	if (cancelled_at_will(b, &r))
		return false;
	if (!g->engine->set_async && !S.anon && (failed(tierd_batch_hold(b, &r), "hold") || cancelled_at_will(b, &r))) {
		tierd_batch_cancel(b, &r);
		return false;
	}
	if (failed(tierd_batch_copy(b, &r), "copy") || cancelled_at_will(b, &r)) {
		tierd_batch_cancel(b, &r);
		return false;
	}
	return true;
}

static void drop_batch(struct tierd_guest *g, struct tierd_batch *b, int error, struct tierd_batch_result *r)
{
	if (!error && g->engine->set_async) {
		drop_in_windows(b, r);
		return;
	}
	if ((error != -ENOSPC && failed(error, "write")) || error || cancelled_at_will(b, r) ||
	    failed(tierd_batch_drop(b, r), "drop")) {
		tierd_batch_cancel(b, r);
		return;
	}
	S.evicted += r->evicted_pages;
	failed(tierd_batch_release(b, r), "release");
}

/* While one batch is stored, the other one may be on its way there: of the pages behind it, or of any. */
static void evict(struct tierd_guest *g, struct tierd_batch *one, struct tierd_batch *other)
{
	uint32_t tiers[TIERD_LADDER_MAX], count;
	struct tierd_batch_result r, others;
	int error, failure;

	for (uint64_t page = 0, any; page < g->pages;) {
		if (!take_batch(g, one, &page))
			continue;
		count = ladder(0, tiers);
		error = tierd_batch_write(one, tiers, count, mask_of(tiers, count), &r);
		any = below(g->pages);
		if (error || !r.offered_pages || below(2) || !take_batch(g, other, below(2) ? &page : &any)) {
			drop_batch(g, one, error || !r.offered_pages ? error : store_offered(one, &r), &r);
			continue;
		}
		count = ladder(0, tiers);
		failure = tierd_batch_write(other, tiers, count, mask_of(tiers, count), &others);
		if (failure || !others.offered_pages) {
			error = store_offered(one, &r);
		} else if (below(2)) { /* each by a thread of its own */
			world_begin_beside(store_in_files, other);
			error = store_in_files(one);
			failure = world_end_beside();
			error = error ? error : store_elsewhere(one, &r);
			failure = failure ? failure : store_elsewhere(other, &others);
		} else {
			failure = store_offered(other, &others);
			error = store_offered(one, &r);
		}
		drop_batch(g, one, error, &r);
		drop_batch(g, other, failure, &others);
	}
}

/* From one tier to those below it. */
static void demote(struct tierd_guest *g, struct tierd_batch *b)
{
	uint32_t from = 1 + below(S.tiers - 1), tiers[TIERD_LADDER_MAX], moved;
	double min_idle_s = below(2) ? 0 : 0.002;
	struct tierd_batch_result r = {0};
	int error;

	for (uint64_t page = 0; page < g->pages;) {
		world_before_select();
		if (tierd_batch_select(b, from, !below(4), page, min_idle_s, 1 + below(BATCH_PAGES_MAX), &r))
			script_fail("select from tier %u failed", from);
		page = r.next_page;
		world_selected(min_idle_s, true);
		if (!r.selected_pages || cancelled_at_will(b, &r))
			continue;
		if (S.asked >> from & 1)
			supply(b, from);
		error = failed(tierd_batch_copy(b, &r), "copy") || cancelled_at_will(b, &r);
		if (error) {
			tierd_batch_cancel(b, &r);
			continue;
		}
		error = write_batch(b, tiers, ladder(from, tiers), &r);
		if ((error != -ENOSPC && failed(error, "write")) || error || cancelled_at_will(b, &r) ||
		    failed(tierd_batch_drop(b, &r), "drop")) {
			tierd_batch_cancel(b, &r);
			continue;
		}
		S.demoted += r.evicted_pages;
		failed(tierd_batch_release(b, &r), "release");
	}
	if (chance(300) && tierd_guest_compact(g, 1 + below(SCRIPT_PAGES_MAX), &moved))
		script_fail("compaction failed");
}

/* Of anonymous memory: room in the staging area back, and new pages into it. */
static void stage(struct tierd_guest *g)
{
	double min_idle_s = below(2) ? 0 : 0.002;
	uint64_t half = g->pages / 2;
	struct tierd_span spans[2];
	struct tierd_staged r;

	for (uint64_t page = 0; page < g->pages; page = r.next_page)
		if (failed(tierd_guest_unstage(g, page, &r), "unstage"))
			break;
	/* two spans of which one may reach into the other: by a large page, or from the beginning */
	spans[0] = (struct tierd_span){.end_page = below(2) ? g->pages : half + below(4)};
	spans[1] = (struct tierd_span){.next_page = half, .end_page = g->pages};
	while (spans[0].next_page < spans[0].end_page || spans[1].next_page < spans[1].end_page) {
		spans[0].max_pages = 1 + below(BATCH_PAGES_MAX);
		spans[1].max_pages = 1 + below(BATCH_PAGES_MAX);
		tierd_guest_set_split_large(g, below(2));
		if (failed(tierd_guest_stage(g, spans, 2, min_idle_s, &r), "stage") || chance(100))
			break;
		if (chance(500))
			tierd_guest_refaults(g, below(half + 1), half + 1);
	}
}

void script_cycle(struct tierd_guest *g)
{
	struct tierd_pass pass;
	struct tierd_batch *b, *other;
	uint64_t page = 0, n, lost;
	uint32_t failed_tier;

	while (page < g->pages) {
		world_before_pass();
		if (failed(tierd_guest_pass(g, page, &pass), "pass"))
			break;
		page = pass.next_page;
	}
	world_rest(below(80));
	if (S.anon) {
		stage(g);
		world_rest(below(80));
	}
	if (tierd_batch_create(g, BATCH_PAGES_MAX, &b) || tierd_batch_create(g, BATCH_PAGES_MAX, &other))
		script_fail("no batch");
	evict(g, b, other);
	tierd_batch_destroy(other);
	if (S.tiers > 1 && (S.often || chance(500)))
		demote(g, b);
	tierd_batch_destroy(b);
	page = 0;
	if (chance(100))
		tierd_guest_restore(g, &page, below(SCRIPT_PAGES_MAX), &n);
	if (S.asked && chance(400))
		tell_garbage(g);
	if (chance(400) &&
	    tierd_guest_discard(g, below(SCRIPT_PAGES_MAX) + 1, below(4) ? UINT32_MAX : 0, &n, &failed_tier) == -EIO &&
	    !failed_tier)
		script_fail("a tier does not give back space, and nobody knows which");
	page = 0;
	if (chance(S.losses ? 300 : 20)) /* an order that finds nothing to do hurts nobody */
		if (tierd_guest_retry(g, &page, &n, &lost) || (lost && !S.losses))
			script_fail("retry: %lu pages are lost", lost);
	if (chance(100))
		script_set_reads(g);
}

void script_select_all(struct tierd_guest *g)
{
	struct tierd_batch_result r;
	struct tierd_batch *b;

	if (tierd_batch_create(g, BATCH_PAGES_MAX, &b))
		script_fail("no batch");
	for (uint32_t tier = 1; tier <= TIER_STAGING; tier++)
		for (uint64_t page = 0; (tier <= S.tiers || (S.anon && tier == TIER_STAGING)) && page < g->pages;) {
			if (tierd_batch_select(b, tier, 0, page, 0, BATCH_PAGES_MAX, &r))
				script_fail("select from tier %u failed", tier);
			page = r.next_page;
			if (r.selected_pages)
				tierd_batch_cancel(b, &r);
		}
	tierd_batch_destroy(b);
}

uint64_t script_bring_back(struct tierd_guest *g, bool repaired)
{
	struct tierd_counters c;
	uint64_t page = 0, n, lost = 0;

	tierd_guest_restore(g, &page, UINT64_MAX, &n);
	page = 0;
	if (repaired && tierd_guest_retry(g, &page, &n, &lost))
		script_fail("retry failed");
	tierd_guest_counters(g, &c);
	return c.state_pages[STORED] + c.state_pages[ARRIVING] + c.state_pages[DROPPING] + c.state_pages[LEAVING] +
	       c.state_pages[STAGING] + c.state_pages[MOVING] + (repaired ? c.state_pages[LOST] : 0);
}
