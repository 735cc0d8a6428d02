/* SPDX-License-Identifier: Apache-2.0 */
/*
 * scan.c: which pages were touched, and their deactivation.
 *
 * Exactly the pages found touched are deactivated, with every engine. A page that was not and is touched between the scan and
 * the deactivation stays as it is, so the next pass sees it: there is no gap in which an access leaves no trace, and the age
 * of a page (min_idle_s, rule 8 of direct I/O in flight) counts from the deactivation after its last access. (One RWPROTECT
 * of the whole stretch would be a call less, and would wipe out those accesses.)
 */
#include <string.h>

#include "internal.h"

enum { VECTOR = 256, ENTRIES = 512, INSIDE_CALLS_MAX = 64 };
/* In epochs. Every so many a pass looks at all words of its chunk, for ages that would wrap. */
enum { PASS_NS = 20000000 }; /* of one call: Python asks in between whether to go on */
enum { AGE_KEPT = 0xf000, AGE_MAX = 0xf800, AGE_EVERY = 0x100 };

static void region_mark(uint64_t *bits, uint64_t base, uint64_t page_bytes, const struct sys_page_region *found)
{
	uint64_t i = (found->start - base) / page_bytes, end = (found->end - base) / page_bytes;

	for (; i < end && i % 64; i++)
		bit_set(bits, i);
	for (; i + 64 <= end; i += 64)
		bits[i / 64] = UINT64_MAX;
	for (; i < end; i++)
		bit_set(bits, i);
}

/* Entries of which a part lies in `found`. */
static void mark_large(struct tierd_guest *g, const struct sys_page_region *found)
{
	uint64_t bytes = large_pages(g) * g->page_bytes;

	for (uint64_t at = found->start; at < found->end; at = (at / bytes + 1) * bytes) {
		uint64_t head = large_head(g, (uint64_t)page_of_address(g, at));

		if (head != NO_PAGE)
			bit_set(g->large, head);
	}
}

static int scan_by_ioctl(struct tierd_guest *g, uint64_t start, uint64_t end, uint64_t *touched,
			 uint64_t other_category, uint64_t *other)
{
	struct sys_page_region found[VECTOR];
	struct sys_scan wanted = g->engine->scan;
	uint64_t at = start, touched_category = wanted.any_of;

	wanted.any_of |= other_category;

	while (at < end) {
		uint64_t walk_end = at;
		ssize_t n = sys_pagemap_scan(g->pagemap, at, end, wanted, found, VECTOR, &walk_end);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return (int)n;
		for (ssize_t i = 0; i < n; i++) {
			if ((found[i].categories ^ wanted.inverted) & touched_category)
				region_mark(touched, start, g->page_bytes, &found[i]);
			if (found[i].categories & other_category)
				region_mark(other, start, g->page_bytes, &found[i]);
			if (found[i].categories & SYS_PAGE_HUGE && !g->huge && !g->anon)
				mark_large(g, &found[i]);
		}
		if (walk_end <= at)
			return n ? -EIO : -ESRCH; /* the walk does not go on: the VMM's memory is gone */
		at = walk_end;
	}
	return 0;
}

int scan_there(struct tierd_guest *g, uint64_t address, uint64_t pages, uint64_t *there)
{
	return scan_for(g, address, pages, (struct sys_scan){.any_of = SYS_PAGE_PRESENT | SYS_PAGE_SWAPPED}, there);
}

int scan_for(struct tierd_guest *g, uint64_t address, uint64_t pages, struct sys_scan wanted, uint64_t *there)
{
	struct sys_page_region found[VECTOR];
	uint64_t at = address, end = address + pages * g->page_bytes;

	memset(there, 0, bitmap_bytes(pages));
	while (at < end) {
		uint64_t walk_end = at;
		ssize_t n = sys_pagemap_scan(g->pagemap, at, end, wanted, found, VECTOR, &walk_end);

		if (n == -EINTR)
			continue;
		if (n < 0)
			return (int)n;
		for (ssize_t i = 0; i < n; i++)
			region_mark(there, address, g->page_bytes, &found[i]);
		if (walk_end <= at)
			return n ? -EIO : -ESRCH;
		at = walk_end;
	}
	return 0;
}

/* Of the pages from `at` on, one at least; how many, or an error. Entries are of the system's pages; of a huge page the first one
 * speaks for all. */
static ssize_t read_entries(struct tierd_guest *g, uint64_t *entries, uint64_t at, uint64_t pages)
{
	uint64_t want = g->huge ? 1 : pages < ENTRIES ? pages : ENTRIES;
	ssize_t n;

	do
		n = sys_pagemap_read(g->pagemap, entries, want, at);
	while (n == -EINTR);
	return n < 0 ? n : n < (ssize_t)sizeof(*entries) ? -ESRCH : n / (ssize_t)sizeof(*entries);
}

/* Kernels before 6.7, so with the stock engine: the same answer from 64-bit entries. Bit 63 present, 62 swap entry (a marker
 * too), 57 uffd-wp. */
static int scan_by_reading(struct tierd_guest *g, uint64_t start, uint64_t end, uint64_t *touched, uint64_t *marked)
{
	uint64_t entries[ENTRIES];
	uint64_t at = start;

	while (at < end) {
		ssize_t n = read_entries(g, entries, at, (end - at) / g->page_bytes);

		if (n < 0)
			return (int)n;
		for (ssize_t i = 0; i < n; i++, at += g->page_bytes) {
			if (entries[i] >> 63)
				bit_set(touched, (at - start) / g->page_bytes);
			else if (marked && (entries[i] >> 62 & 1) && (entries[i] >> 57 & 1))
				bit_set(marked, (at - start) / g->page_bytes);
		}
	}
	return 0;
}

int scan_range(struct tierd_guest *g, uint64_t first_page, uint64_t pages, uint64_t *touched, uint64_t other_category,
	       uint64_t *other)
{
	uint64_t start = address_of(g, first_page), end = start + pages * g->page_bytes;

	memset(touched, 0, bitmap_bytes(pages));
	if (other)
		memset(other, 0, bitmap_bytes(pages));
	return g->use_pagemap ? scan_by_reading(g, start, end, touched, other)
			      : scan_by_ioctl(g, start, end, touched, other_category, other);
}

int scan_protected(struct tierd_guest *g, uint64_t first_page, uint64_t pages, uint64_t *bare, uint64_t *protected)
{
	uint64_t entries[ENTRIES], done = 0;

	memset(bare, 0, bitmap_bytes(pages));
	memset(protected, 0, bitmap_bytes(pages));
	while (done < pages) {
		ssize_t n = read_entries(g, entries, address_of(g, first_page + done), pages - done);

		if (n < 0)
			return (int)n;
		for (ssize_t i = 0; i < n; i++, done++)
			if (entries[i] >> 63)
				bit_set(entries[i] >> 57 & 1 ? protected : bare, done);
	}
	return 0;
}

/* A page that is somebody's cannot be dated: it stays mapped, so the next pass sees it. If it is unmapped already, its group is dated:
 * its owner may have read the clock before the guest's last access, or dates nothing. */
static void stamp_page(struct tierd_guest *g, uint64_t first_page, uint64_t i, uint16_t epoch, bool deactivated)
{
	page_word w = page_load(g, first_page + i), to = word_touched(w, epoch);

	if (word_tier(to) == TIER_UNTOUCHED)
		to = word_with_tier(to, TIER_ZERO);
	if (word_state(w) == RESIDENT && (to == w || page_move(g, first_page + i, w, to)))
		return;
	if (deactivated)
		atomic_store_explicit(&g->groups[(first_page + i) / GROUP_PAGES], epoch, memory_order_relaxed);
	else
		bit_clear(g->touched, i);
}

/* All of the group touched: one store dates it. A page that is somebody's is left to stamp_page, as is one that was never seen
 * touched, or refused; one that becomes somebody's meanwhile is the younger for it, which hurts nobody. Words are looked at
 * in pairs and all bits of them at once: tiers that together look like TIER_UNTOUCHED only send the group to stamp_page. */
static bool stamp_group(struct tierd_guest *g, uint64_t first, uint16_t epoch)
{
	const uint64_t states = 0x0000000f0000000full, ones = 0x0000000100000001ull, refused = ones << 15;
	uint64_t any = 0;

	_Static_assert(RESIDENT == 0 && TIER_UNTOUCHED == 0xf, "what is looked for");
	if (first % GROUP_PAGES)
		return false;
	for (uint64_t page = first; page < first + GROUP_PAGES; page += 2) {
		TIERD_YIELD();
		any |= __atomic_load_n((const uint64_t *)(const void *)&g->words[page], __ATOMIC_ACQUIRE);
	}
	if (any & (states | refused) || ((any >> 4 & states) + ones) & ones << 4)
		return false;
	atomic_store_explicit(&g->groups[first / GROUP_PAGES], epoch, memory_order_relaxed);
	return true;
}

/* Stamps touched pages. */
static void stamp(struct tierd_guest *g, uint64_t first_page, uint64_t pages, uint16_t epoch, bool deactivated)
{
	const uint64_t all = UINT64_MAX >> (64 - GROUP_PAGES);

	for (uint64_t i = 0; i < pages; i += GROUP_PAGES) {
		uint64_t bits = g->touched[i / 64] >> (i % 64) & all;

		if (bits == all && stamp_group(g, first_page + i, epoch))
			continue;
		for (; bits; bits &= bits - 1)
			stamp_page(g, first_page, i + (uint64_t)__builtin_ctzll(bits), epoch, deactivated);
	}
}

/* Keeps ages from wrapping, in a chunk: of pages that nobody touches, and of words whose group is dated in their place. */
static void age(struct tierd_guest *g, uint64_t chunk, uint16_t epoch)
{
	uint64_t first_page = chunk * g->chunk_pages;
	uint64_t pages = g->pages - first_page < g->chunk_pages ? g->pages - first_page : g->chunk_pages;

	if (g->aged[chunk] && epoch_age(epoch, g->aged[chunk]) < AGE_EVERY)
		return;
	g->aged[chunk] = epoch ? epoch : 1;
	for (uint64_t page = first_page; page < first_page + pages; page++) {
		page_word w = page_load(g, page);

		if ((word_state(w) == RESIDENT || word_state(w) == STORED) &&
		    epoch_age(epoch, word_epoch(w)) >= AGE_MAX)
			page_move(g, page, w, word_with_epoch(w, (uint16_t)(epoch - AGE_KEPT)));
	}
	for (uint64_t i = first_page / GROUP_PAGES; i <= (first_page + pages - 1) / GROUP_PAGES; i++)
		if (epoch_age(epoch, atomic_load_explicit(&g->groups[i], memory_order_relaxed)) >= AGE_MAX)
			atomic_store_explicit(&g->groups[i], (uint16_t)(epoch - AGE_KEPT), memory_order_relaxed);
}

/* The first bit from `from` on that is set, or that is not; `end` when there is none. */
static uint64_t next_bit(const uint64_t *bits, uint64_t from, uint64_t end, bool set)
{
	while (from < end) {
		uint64_t word = (bits[from / 64] ^ (set ? 0 : UINT64_MAX)) >> (from % 64);

		if (word) {
			from += (uint64_t)__builtin_ctzll(word);
			return from < end ? from : end;
		}
		from = (from / 64 + 1) * 64;
	}
	return end;
}

/* Deactivates exactly the runs of touched pages. Inside the VMM a call costs a stop of one of its threads, so there the
 * runs are limited; what is left stays mapped and counts as touched. */
static int deactivate_touched(struct tierd_guest *g, uint64_t first_page, uint64_t pages, struct tierd_pass *ret)
{
	struct iovec ranges[VECTOR];
	size_t count = 0, calls_left = g->zap == TIERD_ZAP_INJECT ? INSIDE_CALLS_MAX : SIZE_MAX;
	uint64_t base = address_of(g, first_page);

	for (uint64_t i, end = 0; calls_left && (i = next_bit(g->touched, end, pages, true)) < pages;) {
		int error;

		end = next_bit(g->touched, i, pages, false);
		ranges[count].iov_base = (void *)(uintptr_t)(base + i * g->page_bytes);
		ranges[count++].iov_len = (end - i) * g->page_bytes;
		calls_left--;
		if (count < VECTOR)
			continue;
		error = g->engine->deactivate(g, ranges, count, ret);
		if (error)
			return error;
		count = 0;
	}
	return count ? g->engine->deactivate(g, ranges, count, ret) : 0;
}

/* DONTNEED is harmless where a file has the bytes. What is private is memory of the VMM's own, where it had the guest's until a moment
 * ago (the mappings are looked at once a cycle): it stays as it is, and counts as touched. */
static int pass_over_private(struct tierd_guest *g, uint64_t first_page, uint64_t pages)
{
	const struct sys_scan shared = {.all_of = SYS_PAGE_PRESENT | SYS_PAGE_FILE, .any_of = SYS_PAGE_PRESENT};
	uint64_t entries[ENTRIES], done = 0;

	if (!g->use_pagemap) {
		int error = scan_for(g, address_of(g, first_page), pages, shared, g->other);

		for (uint64_t i = 0; !error && i < bitmap_bytes(pages) / 8; i++)
			g->touched[i] &= g->other[i];
		return error;
	}
	while (done < pages) {
		ssize_t n = read_entries(g, entries, address_of(g, first_page + done), pages - done);

		if (n < 0)
			return (int)n;
		for (ssize_t i = 0; i < n; i++, done++)
			if (!(entries[i] >> 61 & 1)) /* of a file, or shared anonymous */
				bit_clear(g->touched, done);
	}
	return 0;
}

/* The rest of the chunk in which `ret` says to go on. */
static int pass(struct tierd_guest *g, struct tierd_pass *ret)
{
	uint64_t first_page = ret->next_page, pages, end = (first_page / g->chunk_pages + 1) * g->chunk_pages;
	struct region *r = region_of_page(g, first_page);
	uint64_t began_ns, scanned_ns;
	uint16_t epoch;
	int error;

	if (!r)
		return -EINVAL;
	if (end > r->first_page + r->pages)
		end = r->first_page + r->pages;
	pages = end - first_page;
	ret->pages += pages;
	ret->next_page = end;
	began_ns = sys_now_ns();
	error = scan_range(g, first_page, pages, g->touched, 0, NULL);
	if (error)
		return error;
	for (uint64_t i = 0; i < pages; i += 64)
		ret->touched_pages += (uint64_t)__builtin_popcountll(g->touched[i / 64]);
	/* before the deactivation, so that a crash in between can't make a touched page look idle; and again when it took
	 * longer than a step, because idle time counts from its end */
	epoch = epoch_next(g);
	stamp(g, first_page, pages, epoch, false);
	age(g, first_page / g->chunk_pages, epoch);
	scanned_ns = sys_now_ns();
	if (g->zap == TIERD_ZAP_INJECT && !g->anon)
		error = pass_over_private(g, first_page, pages);
	if (!error)
		error = deactivate_touched(g, first_page, pages, ret);
	if (epoch_next(g) != epoch)
		stamp(g, first_page, pages, epoch_next(g), true);
	ret->scan_ns += scanned_ns - began_ns;
	ret->zap_ns += sys_now_ns() - scanned_ns;
	return error;
}

int tierd_guest_set_zap(struct tierd_guest *g, int32_t zap, int32_t inject_tid)
{
	int error = guest_enter(g);

	if (error)
		return error;
	g->zap = zap;
	use_thread(g, inject_tid);
	guest_leave(g);
	return 0;
}

int tierd_guest_pass(struct tierd_guest *g, uint64_t first_page, struct tierd_pass *ret)
{
	uint64_t began_ns = sys_now_ns();
	int error = guest_enter(g);

	if (error)
		return error;
	memset(ret, 0, sizeof(*ret));
	ret->next_page = first_page;
	if (!first_page)
		g->idle_round = g->idle_round % UINT8_MAX + 1;
	do
		error = pass(g, ret);
	while (!error && ret->next_page < g->pages && sys_now_ns() - began_ns < PASS_NS);
	if (error)
		count_error(g, &g->count.kernel_errors, error);
	guest_leave(g);
	return error;
}
