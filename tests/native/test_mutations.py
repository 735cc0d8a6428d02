# SPDX-License-Identifier: Apache-2.0
"""Every rule of byte safety, broken on purpose: the driver must notice. What it would not notice, it does not test."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.native.build import DRIVER, ROOT, build_driver, compile_parts, run_driver

pytestmark = pytest.mark.timeout(1800)  # it computes beside other tests, and gives way to them

SEEDS_MAX = 20000
FLAGS = ("-O1", "-Wno-error")


@dataclass(frozen=True)
class Mutation:
    """`old` occurs exactly once in `file` and becomes `new`."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    Mutation(
        "hold_that_cannot_be_lifted_wakes_nobody",
        "evict.c",
        "		if (error) /* a part of it is not mapped any more",
        "		if (error > 0) /* a part of it is not mapped any more",
    ),
    Mutation(
        "copy_whose_discard_failed_is_relied_on",
        "evict.c",
        "		unclean(g, page, n);\n",
        "",
    ),
    Mutation(
        "page_that_is_somebodys_is_deactivated",  # rule 8: nobody dates it
        "scan.c",
        "	else\n		bit_clear(g->touched, i);\n",
        "",
    ),
    Mutation(
        "page_that_is_somebodys_is_not_dated_again",  # rule 8, by a step
        "scan.c",
        "	if (deactivated)\n		atomic_store",
        "	if (deactivated && g->pages > UINT32_MAX)\n		atomic_store",
    ),
    Mutation(
        "page_claimed_by_the_last_look_is_forgotten",
        "stage.c",
        "		if (!claimed)\n",
        "		if (!claimed || g->looks >= LOOKS_MAX)\n",
    ),
    Mutation(
        "large_page_that_may_not_be_split_stays_claimed",
        "stage.c",
        "		for (uint64_t k = 0; bit_get(cold, i) && k < n; k++)\n			turn_back",
        "		for (uint64_t k = 0; may && bit_get(cold, i) && k < n; k++)\n			turn_back",
    ),
    Mutation(
        "two_batches_write_to_a_file_at_once",  # rule 5: the descriptor tells an error to one of them
        "store.c",
        "	while (!(g->tiers[tier].flags & TIERD_SPACE_DIRECT) && atomic_exchange(&g->filing[tier], true))",
        "	while (atomic_exchange(&g->filing[tier], true) && g->pages > UINT32_MAX)",
    ),
    Mutation(
        "file_left_to_the_other_batch_before_the_sync",  # rule 5
        "evict.c",
        "	if (!error)\n		error = store_settle(",
        "	store_leave(b->g, tier);\n	if (!error)\n		error = store_settle(",
    ),
    Mutation(
        "page_of_the_other_batch_is_taken",
        "evict.c",
        "			return other->end_page;",
        "			return 0;",
    ),
    Mutation(
        "leaving_after_the_hold_is_not_leaving",  # rule 1: a fault between scan and LEAVING must cancel
        "evict.c",
        "		if (!page_move(b->g, b->pages[i], b->words[i], to))\n			continue;\n		b->words",
        "		if (!page_move(b->g, b->pages[i], b->words[i], to) && !b->g->anon)\n"
        "			atomic_store(&b->g->words[b->pages[i]], to);\n"
        "		else if (word_state(page_load(b->g, b->pages[i])) != DROPPING)\n			continue;\n		b->words",
    ),
    Mutation(
        "resolver_does_not_own_its_page",  # rule 2
        "fault.c",
        "		if (!page_move(g, page, word, word_resolving(word)))\n			return -EALREADY;",
        "		if (word_state(word) == RESIDENT && flags & UFFD_PAGEFAULT_FLAG_WP)\n"
        "			return sys_uffd_unprotect(g->uffd, address_of(g, page), g->page_bytes);\n"
        "		if (!page_move(g, page, word, word_resolving(word)))\n			return -EALREADY;",
    ),
    Mutation(
        "tier_forgotten_in_arriving",  # rule 4
        "fault.c",
        "		if (!page_move(g, page + n, word, word_with_state(word, ARRIVING)))\n			break;\n		if (!n)\n"
        "			w->was_moving = word_state(word) == MOVING;\n"
        "		w->claimed[n++] = word_with_state(word, ARRIVING);",
        "		if (!page_move(g, page + n, word, word_with_tier(word_with_state(word, ARRIVING), 0)))\n			break;\n"
        "		w->claimed[n++] = word_with_state(word, ARRIVING);\n"
        "		if (n == 1 && word_tier(word) == 0) continue;\n"
        "		if (!page_move(g, page + n - 1, word_with_tier(word_with_state(word, ARRIVING), 0), w->claimed[n - 1]))\n"
        "			break;",
    ),
    Mutation(
        "written_is_taken_for_stored",  # rule 5: no sync before DROPPING
        "store.c",
        "		error = sys_store_sync(t->fd);",
        "		error = 0;",
    ),
    Mutation(
        "checksum_not_verified_and_no_sync",  # rule 5: only the checksum turns stale into an error
        "fault.c",
        "!= g->sums[page + i]) {",
        "!= g->sums[page + i] && page > 1000000) {",
    ),
    Mutation(
        "punch_rounded_to_pieces",  # rule 7
        "evict.c",
        "	int punched = sys_mem_punch(r->memfd, offset, end - offset), error = punched, failed;",
        "	uint64_t piece = 4 * b->page_bytes, low = r->offset + (offset - r->offset) / piece * piece;\n"
        "	uint64_t high = r->offset + ((end - r->offset) + piece - 1) / piece * piece;\n"
        "	int punched = sys_mem_punch(r->memfd, low, (high < r->offset + r->bytes ? high : r->offset + r->bytes) - low);\n"
        "	int error = punched, failed;",
    ),
    Mutation(
        "missing_not_registered_before_the_punch",
        "evict.c",
        "		error = missing_register(g, page);",
        "		error = 0;",
    ),
    Mutation(
        "nobody_woken_after_the_punch",
        "evict.c",
        "		int error = g->engine->release(g, b->held[i].page, b->held[i].count);",
        "		int error = 0;",
    ),
    Mutation(
        "dropping_served_early",  # a page fetched into a range that is being punched
        "fault.c",
        "	default: /* RESOLVING, DROPPING, ARRIVING, STAGING: whoever owns the page wakes its waiters */",
        "	case DROPPING:\n		atomic_store(&g->words[page], word_with_state(word, STORED));\n"
        "		return fetch(w, page, false, began_ns);\n"
        "	default: /* RESOLVING, DROPPING, ARRIVING, STAGING: whoever owns the page wakes its waiters */",
    ),
    Mutation(
        "late_discard",  # rule 11: the store space of a page that has left again
        "evict.c",
        "	return word_state(w) == RESIDENT && word_takes_space(w) && !quarantined(g, page) &&",
        "	return (word_state(w) == RESIDENT || word_state(w) == STORED) && word_copy(w) && !quarantined(g, page) &&",
    ),
    Mutation(
        "hold_error_ignored",  # rule 14: a prefix may be held, the rest is not; together with the second scan's test gone
        "evict.c",
        "		error = hold_run(b, b->pages[i], n);",
        "		hold_run(b, b->pages[i], n);",
    ),
    Mutation(
        "short_write_ignored",
        "store.c",
        "		done += (size_t)n;\n	}\n	return 0;\n}\n\n/*\n * An error of the device",
        "		done = bytes;\n	}\n	return 0;\n}\n\n/*\n * An error of the device",
    ),
    Mutation(
        "copy_that_said_enomem_is_resident",  # rule 12
        "fault.c",
        "		*error = err;\n		break;",
        "		*error = err;\n		placed = n;\n		break;",
    ),
    Mutation(
        "adoption_takes_dropping_for_resident",
        "guest.c",
        "	case LEAVING:   /* not in the cache, the VMM gave it back itself */",
        "	case LEAVING:   /* not in the cache, the VMM gave it back itself */\n	case DROPPING:",
    ),
    Mutation(
        "adoption_does_not_believe_the_kernel",
        "guest.c",
        "		return word_with_state(w, cached ? RESIDENT : STORED);",
        "		return word_with_state(w, word_state(w) == DROPPING ? STORED : cached ? RESIDENT : STORED);",
    ),
    Mutation(
        "adoption_wakes_nobody",  # neither by lifting holds nor by itself
        "guest.c",
        "		error = sys_uffd_wake(g->uffd, mapped[i].address, mapped[i].bytes);",
        "		error = 0;",
    ),
    Mutation(
        "owner_does_not_look_for_waiters",
        "fault.c",
        "	if (waits_now(g) != waits_before)\n		wake(g, page, count);",
        "	if (waits_now(g) == ~waits_before)\n		wake(g, page, count);",
    ),
    Mutation(
        "page_claimed_whatever_its_tier",  # it may have become another one since the look at it
        "fault.c",
        "(n || word_state(word) != MOVING)) || word_tier(word) != tier)",
        "(n || word_state(word) != MOVING)) || (n && word_tier(word) != word_tier(w->claimed[0])))",
    ),
    Mutation(
        "page_that_fails_again_is_forgotten",
        "fault.c",
        "	if (schedule_retry(w->g, p, sys_now_ns()))\n		return fetch_later(w, p);",
        "	if (schedule_retry(w->g, p, sys_now_ns()))\n		return p->pause_us > 1000 ? 0 : fetch_later(w, p);",
    ),
    Mutation(
        "late_write_lands_in_used_space",  # rule 11: of a dead predecessor
        "evict.c",
        "quarantined(g, page) || (b->pool_only && word_refused(w)))\n			continue;",
        "(b->pool_only && word_refused(w)))\n			continue;",
    ),
    Mutation(
        "claimed_neighbours_not_woken",
        "fault.c",
        "	wake(w->g, page + from, to - from);",
        "	(void)to;",
    ),
    Mutation(
        "leaving_set_after_hold_and_scan",  # rule 1, to the letter: select leaves the word alone (ALSO: the scan sets it)
        "evict.c",
        "		if (!page_move(g, page, w, leaving))\n			continue;\n",
        "",
    ),
    Mutation(
        "hole_not_looked_at_after_the_punch",  # rule 6
        "evict.c",
        "failed = settle_dropped(b, first + i, data == (int64_t)offset, ret);",
        "failed = settle_dropped(b, first + i, false, ret);",
    ),
    Mutation(
        "adoption_takes_zeros_left_by_a_punch",  # rule 6, and killed before the bytes are written back
        "guest.c",
        "	if (!all_zero(bytes, g->page_bytes))",
        "	if (bytes)",
    ),
    Mutation(
        "adoption_takes_zeros_left_by_a_punch_of_a_filled_page",  # the same of a page that no tier holds
        "guest.c",
        "(word_tier(w) != TIER_ZERO || g->sums[page])",
        "word_tier(w) != TIER_ZERO",
    ),
    Mutation(
        "filled_page_comes_back_as_zeros",
        "fault.c",
        "	return any ? w->buffer : NULL;",
        "	return any && !w->buffer ? w->buffer : NULL;",
    ),
    Mutation(
        "page_that_begins_as_if_filled_is_filled",
        "evict.c",
        "	return !memcmp(page, page + sizeof(uint64_t), bytes - sizeof(uint64_t));",
        "	return !memcmp(page, page + sizeof(uint64_t), bytes - 2 * sizeof(uint64_t));",
    ),
    Mutation(
        "younger_than_min_idle_leaves",  # rule 8
        "evict.c",
        "word_untouched(w) || page_age(g, page, now, w) < min_age ||",
        "word_untouched(w) || page_age(g, page, now, w) + 2 < min_age ||",
    ),
    Mutation(
        "owned_page_is_deactivated",  # rule 8: its owner may have read the clock before the guest's last access
        "scan.c",
        "	else\n		bit_clear(g->touched, i);\n",
        "",
    ),
    Mutation(
        "copy_passes_over_a_lost_page",  # rule 13: COPY overwrites poison, so a run ends before a LOST page
        "fault.c",
        "	placed = place(g, page, n, from, &clean, &error);\n	if (error == -ENOENT",
        "	bool over = n < g->readahead_max && region_of_page(g, page + n) == region_of_page(g, page) &&\n"
        "		    word_state(page_load(g, page + n)) == LOST;\n\n"
        "	placed = place(g, page, n + over, from, &clean, &error);\n	if (placed > n)\n		placed = n;\n"
        "	if (error == -ENOENT",
    ),
    Mutation(
        "zeros_pass_over_a_lost_page",  # rule 13, read-ahead of zeros
        "fault.c",
        "	placed = place(g, page, n, NULL, &protect, &error);\n",
        "	placed = place(g, page, n + (page + n < g->pages && word_state(page_load(g, page + n)) == LOST), NULL, &protect,\n"
        "		       &error);\n"
        "	if (placed > n)\n		placed = n;\n",
    ),
    Mutation(
        "zeros_instead_of_poison",  # rule 13
        "fault.c",
        "		error = sys_uffd_poison(g->uffd, address, g->page_bytes);\n		if (error == -EEXIST) {",
        "		uint64_t done;\n\n		error = sys_uffd_copy(g->uffd, address, zeros, g->page_bytes, false, &done);\n"
        "		if (error == -EEXIST) {",
    ),
    Mutation(
        "poison_overtakes_the_retry",  # rules 2 and 13
        "fault.c",
        "	while (atomic_load(&g->poisoning))",
        "	while (g->poisoning > 1000)",
    ),
    Mutation(
        "missing_registered_alone",  # rule 14
        "engine.c",
        "	.mode_missing = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING,\n	.scan = {.any_of",
        "	.mode_missing = UFFDIO_REGISTER_MODE_MISSING,\n	.scan = {.any_of",
    ),
]
# Of the engines that have a sync mode; the name begins with the engine's.
NATIVE_ENGINES = [
    Mutation(
        "rwp_window_not_in_sync_mode",
        "evict.c",
        "	error = g->engine->set_async(g->uffd, false);",
        "	error = 0;",
    ),
    Mutation(
        "rwp_sync_mode_left_before_the_punch",  # rule 3
        "evict.c",
        "		int failed = drop_slots(b, first, claim_dropping(b, first, kept - first), ret);\n",
        "		uint32_t dropping = claim_dropping(b, first, kept - first);\n"
        "		int failed = g->engine->set_async(g->uffd, true) + drop_slots(b, first, dropping, ret);\n",
    ),
    Mutation(
        "rwp_window_does_not_look_again",  # rule 1 of sync mode: a page touched since the copy
        "evict.c",
        "	*ret = bit_get(b->other, bit);",
        "	*ret = bit_get(b->other, bit) || bit_get(b->touched, bit);",
    ),
    Mutation(
        "rwp_unmapped_page_leaves",  # touched and unmapped again since the copy
        "evict.c",
        "	if (*ret || !bit_get(b->touched, bit))\n		return 0;",
        "	*ret |= !bit_get(b->touched, bit);\n	if (*ret)\n		return 0;",
    ),
    Mutation(
        "rwp_window_reads_from_swap",  # for as long as the disk likes, with the guest held
        "evict.c",
        "	if (*ret || !bit_get(b->touched, bit))\n		return 0;",
        "	if (!*ret && !bit_get(b->touched, bit))\n"
        "		sys_uffd_continue(g->uffd, address_of(g, b->pages[slot]), g->page_bytes);\n"
        "	if (*ret || !bit_get(b->touched, bit))\n		return 0;",
    ),
    Mutation(
        "rwp_absence_is_taken_for_protection",  # of a mapping made anew nothing is seen
        "evict.c",
        "	return g->engine->holds_mapped ? scan_protected(g, b->pages[first], n, b->touched, b->other)",
        "	return g->engine->holds_mapped ? scan_range(g, b->pages[first], n, b->touched, SYS_PAGE_PRESENT, b->other)",
    ),
    Mutation(
        "rwp_minor_not_registered",
        "engine.c",
        "	.mode_missing = SYS_RWP_REGISTER_MODE | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_MISSING,",
        "	.mode_missing = SYS_RWP_REGISTER_MODE | UFFDIO_REGISTER_MODE_MISSING,",
    ),
    Mutation(
        "rwp_whole_stretch_protected",  # rule 8: an access between the scan and the protection leaves no trace
        "scan.c",
        "		end = next_bit(g->touched, i, pages, false);",
        "		end = pages;",
    ),
    Mutation(
        "rwp_window_left_before_it_is_decided",  # a successor: zeros that the guest writes look like a punch that failed
        "guest.c",
        "		if (word_state(page_load(g, page)) != DROPPING)\n			continue;\n		r = ",
        "		if (word_state(page_load(g, page)) != DROPPING || page < g->pages)\n			continue;\n		r = ",
    ),
    Mutation(
        "rwp_window_left_with_its_store_only",  # whoever touches what does not leave waits for that store, too
        "guest.c",
        "	if (punch_again(g, page))",
        "	if (page < g->pages || punch_again(g, page))",
    ),
    Mutation(
        "rfc_window_left_with_a_page_undecided",  # zeros that a punch has left are mapped then
        "guest.c",
        "	return undecided ? -EBUSY : g->engine->set_async(g->uffd, true);",
        "	return g->engine->set_async(g->uffd, true);",
    ),
    Mutation(
        "rwp_window_left_after_its_registrations",  # which may fail, for as long as the VMM has too many mappings
        "guest.c",
        "		if (error && error != -EBUSY)\n			return error;\n		undecided |= error != 0;",
        "		if (!error)\n			error = register_away(g, page);\n"
        "		if (error && error != -EBUSY)\n			return error;\n		undecided |= error == -EBUSY;",
    ),
    Mutation(
        "rwp_sync_mode_that_was_not_left_is_forgotten",
        "guest.c",
        "	if (!error)\n		atomic_store(&g->in_window, false);",
        "	atomic_store(&g->in_window, false);",
    ),
    Mutation(
        "second_punch_is_believed",  # rule 6, of a successor
        "guest.c",
        "	return data < 0 ? (int)data : data == (int64_t)offset ? -EBUSY : 0;",
        "	return data < 0 ? (int)data : 0;",
    ),
    Mutation(
        "rwp_minor_fault_not_resolved",
        "engine.c",
        "	if (flags & UFFD_PAGEFAULT_FLAG_MINOR) /* in the cache",
        "	if (flags & UFFD_PAGEFAULT_FLAG_MINOR && !g) /* in the cache",
    ),
    Mutation(
        "rfc_no_marker",  # SET_MODE does not wait for faults that have seen async mode
        "evict.c",
        "	if (bit_get(b->before, slot) || bit_get(b->touched, bit) || !bit_get(b->other, bit))\n		return 0;",
        "	if (bit_get(b->before, slot) || bit_get(b->touched, bit))\n		return 0;",
    ),
    Mutation(
        "rfc_touched_beside_what_leaves",  # in what is mapped large, and unmapped as a whole by the hold
        "evict.c",
        "	bool dated = !g->engine->holds_mapped && was_mapped_large(g, b->pages[first]);",
        "	bool dated = false;",
    ),
    Mutation(
        "rfc_unmapped_for_a_hint_and_not_dated",
        "engine.c",
        "		date_large(g, page); /* before it, as a kill may come between; and from its end on */\n"
        "		error = sys_rfc_deactivate(g->uffd, address_of(g, page), g->page_bytes);\n		date_large(g, page);",
        "		error = sys_rfc_deactivate(g->uffd, address_of(g, page), g->page_bytes);",
    ),
    Mutation(
        "rfc_unmapped_page_not_compared",
        "evict.c",
        "	*ret = !error && !memcmp(b->again,",
        "	*ret = !error || !memcmp(b->again,",
    ),
    Mutation(
        "rwp_nobody_woken_when_there_is_nothing_to_map",
        "engine.c",
        "		error = sys_uffd_wake(g->uffd, address_of(g, page), g->page_bytes);\n	return error;",
        "		error = 0;\n	return error;",
    ),
]
MUTATIONS += NATIVE_ENGINES
# What the driver must be told, for a mutation that shows only then.
MUTATIONS.append(
    Mutation(
        "poison_of_a_retry_that_was_cut_off_is_forgotten",
        "guest.c",
        "	return word_state(w) == ARRIVING ? look_for_poison(g, address_of(g, page), ret) : 0;",
        "	return word_state(w) == MOVING ? look_for_poison(g, address_of(g, page), ret) : 0;",
    )
)
MUTATIONS.append(
    Mutation(
        "date_of_the_group_ignored",  # rule 8: a page that is touched in company looks idle
        "table.c",
        "	return group < age ? group : age;",
        "	return age + 0 * group;",
    )
)
HUGETLBFS = [
    Mutation(
        "huge_hold_taken_for_poison",
        "guest.c",
        "	const uint64_t poison = SYS_PAGE_SWAPPED | (g->engine->holds_mapped ? 0 : SYS_PAGE_WRITTEN);",
        "	const uint64_t poison = SYS_PAGE_SWAPPED;",
    ),
    Mutation(
        "huge_poison_is_called_written_by_every_kernel",  # with rwp nothing is
        "guest.c",
        "	const uint64_t poison = SYS_PAGE_SWAPPED | (g->engine->holds_mapped ? 0 : SYS_PAGE_WRITTEN);",
        "	const uint64_t poison = SYS_PAGE_SWAPPED | SYS_PAGE_WRITTEN;",
    ),
    Mutation(
        "huge_page_that_cannot_be_seen_is_cached",
        "evict.c",
        "				data = (int64_t)offset + (b->g->huge && !punched);",
        "				data = (int64_t)offset;",
    ),
    Mutation(
        "huge_page_that_cannot_be_seen_is_a_hole",  # and the VMM gives it back when it has written to it
        "evict.c",
        "				data = (int64_t)offset + (b->g->huge && !punched);",
        "				data = (int64_t)offset + b->g->huge;",
    ),
    Mutation(
        "huge_exists_is_believed",  # also said when there is no page for it
        "fault.c",
        "			err = mem_exists(g, page + placed);",
        "			err = 0;",
    ),
    Mutation(
        "huge_hole_by_seek",  # SEEK_DATA calls it data, so a page that has left is taken for one that has not
        "guest.c",
        "	if (g->huge) {\n		data = sys_huge_cached(",
        "	if (g->huge && r->memfd == -2) {\n		data = sys_huge_cached(",
    ),
    Mutation(
        "huge_next_page_not_asked",
        "guest.c",
        "		return data < 0 ? data : (int64_t)offset + !data;",
        "		return data < 0 ? data : (int64_t)offset + (data ? 0 : g->page_bytes);",
    ),
    Mutation(
        "huge_page_that_was_not_punched_is_stored",
        "evict.c",
        "		failed = settle_dropped(b, first + i, data == (int64_t)offset, ret);",
        "		failed = settle_dropped(b, first + i, !b->g->huge && data == (int64_t)offset, ret);",
    ),
    Mutation(
        "huge_page_described_by_its_neighbours_entries",
        "scan.c",
        "	uint64_t want = g->huge ? 1 : pages < ENTRIES ? pages : ENTRIES;",
        "	uint64_t want = pages < ENTRIES ? pages : ENTRIES;",
    ),
]
MUTATIONS += HUGETLBFS
# Of private anonymous memory (stage.c), which goes through a staging area.
ANONYMOUS = [
    Mutation(
        "anon_successor_does_not_wait_for_the_batch",  # the VMM goes on making calls when we die
        "guest.c",
        "	if (g->anon)\n		error = settle_inside(g);\n",
        "	if (g->anon)\n		(void)settle_inside;\n",
    ),
    Mutation(
        "anon_successor_does_not_wait_for_the_last_call",  # a batch that is cancelled still ends the call that it is in
        "guest.c",
        "	if (g->anon)\n		error = settle_inside(g);\n",
        "	if (g->anon)\n		(void)settle_inside(g);\n",
    ),
    Mutation(
        "anon_adoption_forgets_a_staged_page",
        "guest.c",
        "	if (staged && (state == STAGING || state == DROPPING))",
        "	if (staged && state == DROPPING)",
    ),
    Mutation(
        "anon_adoption_forgets_a_page_that_was_not_dropped",  # it is in the staging area still, and in the way of its next life
        "guest.c",
        "	if (staged && (state == STAGING || state == DROPPING))",
        "	if (staged && state == STAGING)",
    ),
    Mutation(
        "anon_hole_is_taken_for_moved",
        "stage.c",
        "	if (staged && !with_guest) {",
        "	if (!refused && !with_guest) {",
    ),
    Mutation(
        "anon_answer_is_believed",  # which may not count what was moved
        "stage.c",
        "	if (staged && !with_guest) {",
        "	if (staged && !refused) {",
    ),
    Mutation(
        "anon_staged_into_room_that_is_taken",  # the rest of an older life of the page is there
        "stage.c",
        "word_untouched(w) || word_copy(w) || quarantined",
        "word_untouched(w) || quarantined",
    ),
    Mutation(
        "anon_nobody_woken_after_the_move",
        "stage.c",
        "			wake_waiters(g, b->first[i], b->pages[i], waits);\n",
        "			(void)waits;\n",
    ),
    Mutation(
        "anon_missing_not_registered_before_the_move",
        "stage.c",
        "	error = missing_register(g, page); /* before the page can leave */",
        "	error = 0;",
    ),
    Mutation(
        "anon_source_not_registered_before_the_move",  # it may be a mapping that the VMM has made anew
        "stage.c",
        "		calls[2 * i] = registration_of(g, &b->calls[i]);\n",
        "		calls[2 * i] = b->calls[i];\n		(void)registration_of;\n",
    ),
    Mutation(
        "anon_batch_under_way_is_not_waited_for",  # it got no CPU in its time, and is made later
        "stage.c",
        "	if (error != -EINPROGRESS)\n		return error;\n",
        "	if (error != -EINPROGRESS)\n		return error;\n	return 0;\n",
    ),
    Mutation(
        "anon_batch_that_cannot_be_seen_is_taken_for_over",
        "stage.c",
        "	} while (error && error != -ESRCH && error != -EFAULT);\n",
        "	} while (error == -ETIMEDOUT || error == -EINTR);\n",
    ),
    Mutation(
        "anon_drop_is_believed",
        "evict.c",
        "		failed = staged_look(g, b->pages[i], n, b->touched);\n",
        "		failed = 0;\n		memset(b->touched, 0, bitmap_bytes(n));\n",
    ),
    Mutation(
        "anon_nobody_woken_after_the_drop",
        "evict.c",
        "		wake_waiters(g, b->pages[i], n, waits);\n",
        "		(void)waits;\n",
    ),
    Mutation(
        "anon_page_that_was_not_dropped_is_of_the_tier",
        "evict.c",
        "		to = word_with_copy(word_with_tier(to, TIER_STAGING), true);",
        "		to = word_with_copy(to, true);",
    ),
    Mutation(
        "anon_staged_page_leaves_at_once",  # rule 8
        "evict.c",
        "stored_age(g, page, epoch_now(g), w) < min_age ||",
        "",
    ),
    Mutation(
        "anon_time_in_the_staging_area_not_measured",  # rule 8
        "stage.c",
        "word_with_epoch(word_with_copy(word_with_state(w, STORED), true), epoch_next(g))",
        "word_with_copy(word_with_state(w, STORED), true)",
    ),
]
MUTATIONS += ANONYMOUS
# From tier to tier.
LADDER = [
    Mutation(
        "page_that_could_not_come_back_is_left_to_nobody",  # its batch has ended meanwhile
        "evict.c",
        "		if ((word_state(w) != STORED && word_state(w) != MOVING) || word_tier(w) != b->from ||",
        "		if (word_state(w) != STORED || word_tier(w) != b->from ||",
    ),
    Mutation(
        "sinking_page_passed_on_unverified",  # rule 5: what a tier gives may not be what it was given
        "evict.c",
        "		return checksum(page, b->page_bytes) == *sum ? 0 : -EBADMSG;",
        "		return 0;",
    ),
    Mutation(
        "old_copy_given_back_before_the_word_moves",
        "evict.c",
        "		if (!page_move(g, b->pages[i], b->words[i], arrived_word(b, i, STORED))) {\n",
        "		tier_discard(b->g, b->from, b->pages[i], 1);\n"
        "		if (!page_move(g, b->pages[i], b->words[i], arrived_word(b, i, STORED))) {\n",
    ),
    Mutation(
        "page_that_was_taken_back_has_sunk_all_the_same",
        "evict.c",
        "			forget_written(b, i);\n			continue;\n		}\n		g->copies[b->from]--;",
        "			atomic_store(&g->words[b->pages[i]], arrived_word(b, i, STORED));\n		}\n		g->copies[b->from]--;",
    ),
    Mutation(
        "sunk_page_keeps_its_old_tier",  # rule 4
        "evict.c",
        "	page_word w = word_with_clean(word_with_tier(word_with_state(b->words[slot], state), b->to[slot]), false);",
        "	page_word w = word_with_tier(word_with_state(b->words[slot], state), moving(b) ? b->from : b->to[slot]);",
    ),
    Mutation(
        "compaction_does_not_own_its_page",  # rule 2
        "evict.c",
        "	       page_move(c->g, page, w, word_with_state(w, ARRIVING));",
        "	       page_move(c->g, page, w, w);",
    ),
    Mutation(
        "nobody_woken_after_compaction",
        "evict.c",
        "	wake_waiters(c->g, page, 1, c->waits);",
        "	(void)c->waits;",
    ),
    Mutation(
        "refused_page_leaves",
        "evict.c",
        "		if (placed(b, i))\n			keep(b, kept++, i);",
        "		if (placed(b, i) || !b->g->anon)\n			keep(b, kept++, i);",
    ),
    Mutation(
        "young_page_sinks",  # rule 8, of a tier
        "evict.c",
        "stored_age(g, page, epoch_now(g), w) < min_age ||",
        "",
    ),
    Mutation(
        "page_that_sinks_is_not_in_flight",  # rule 11
        "guest.c",
        "(word_state(w) == MOVING || word_state(w) == ARRIVING || word_state(w) == LOST))",
        "false)",
    ),
    Mutation(
        "quarantine_forgotten_by_the_second_successor",  # rule 11
        "guest.c",
        "	return word_state(to) == STORED ? word_with_state(to, MOVING) : to;",
        "	return to;",
    ),
    Mutation(
        "page_that_could_not_come_back_is_not_in_flight_any_more",  # rule 11
        "fault.c",
        "!i && w->was_moving ? MOVING : STORED",
        "STORED",
    ),
    Mutation(
        "pool_adopted_after_a_page_was_read_from_it",
        "guest.c",
        "		error = adopt_pool(g);",
        "		error = 0;",
    ),
]
MUTATIONS += LADDER
# Tiers that Python asks.
ASKED = [
    Mutation(
        "asked_garbage_bit_stays_when_the_page_is_there_again",  # rule 11
        "evict.c",
        "				bit_clear(garbage, b->pages[i]);",
        "				(void)garbage;",
    ),
    Mutation(
        "asked_garbage_of_a_predecessor_forgotten",
        "guest.c",
        "				bit_set(g->garbage[tier], page);",
        "				(void)page;",
    ),
    Mutation(
        "asked_discard_forgotten",
        "store.c",
        "			bit_set(g->garbage[tier], i); /* Python says so to the store: ask.c */",
        "			(void)i;",
    ),
    Mutation(
        "asked_adoption_takes_live_pages_for_garbage",
        "guest.c",
        "			if (!word_copy(w) || word_tier(w) != tier)",
        "			if (!word_copy(w) || word_tier(w) != tier || word_state(w) == STORED)",
    ),
    Mutation(
        "asked_space_given_back_before_the_page_has_sunk",
        "evict.c",
        "		if (!page_move(g, b->pages[i], b->words[i], arrived_word(b, i, STORED))) {",
        "		tier_discard(g, b->from, b->pages[i], 1);\n"
        "		if (!page_move(g, b->pages[i], b->words[i], arrived_word(b, i, STORED))) {",
    ),
    Mutation(
        "asked_answer_not_verified",  # rule 5
        "fault.c",
        "	good = verified(w, page, r->good, r->bytes);",
        "	good = r->good;",
    ),
    Mutation(
        "asked_neighbours_fail_the_page_that_is_waited_for",
        "fault.c",
        "		   r->count > 1) { /* its",
        "		   r->count > 1000) { /* its",
    ),
    Mutation(
        "asked_page_that_is_still_lost_is_stored",  # rule 13
        "fault.c",
        "	if (!page_move(w->g, page, w->claimed[0], word_with_state(w->claimed[0], LOST)))",
        "	if (!page_move(w->g, page, w->claimed[0], word_with_state(w->claimed[0], STORED)))",
    ),
    Mutation(
        "asked_slot_that_was_not_supplied_is_taken",
        "evict.c",
        "		int error = bit_get(b->touched, i) ? 0 : -ENODATA;",
        "		int error = 0;",
    ),
    Mutation(
        "asked_sunk_bytes_not_moved_up_with_their_page",
        "evict.c",
        "		if (kept != i && !error)",
        "		if (kept != i && !error && b->count > 1000)",
    ),
    Mutation(
        "asked_neighbours_given_back_twice",
        "fault.c",
        "	give_back(w, page, good ? good : 1, r->count);",
        "	give_back(w, page, good ? good : 1, r->count);\n	give_back(w, page, good ? good : 1, r->count);",
    ),
    Mutation(
        "asked_neighbours_not_given_back",
        "fault.c",
        "	give_back(w, page, good ? good : 1, r->count);",
        "	if (!good)\n		give_back(w, page, 1, r->count);",
    ),
    Mutation(
        "asked_pages_that_could_not_be_placed_not_given_back",  # rule 12
        "fault.c",
        "	give_back(w, page, placed, good);",
        "",
    ),
    Mutation(
        "asked_nobody_woken_after_the_answer",
        "fault.c",
        "	wake(g, page, placed); /* whoever came meanwhile was left to us */\n	if (placed) {",
        "	if (placed) {",
    ),
    Mutation(
        "asked_pages_without_room_not_given_back",
        "fault.c",
        "	give_back(w, r->first.page, 0, r->count); /* no room: the guest faults again */",
        "",
    ),
    Mutation(
        "asked_request_never_ends",
        "fault.c",
        "		request_end(g, &r);",
        "",
    ),
    Mutation(
        "asked_request_ends_before_it_is_placed",
        "fault.c",
        "		place_answer(w, &r);\n		request_end(g, &r);",
        "		request_end(g, &r);\n		place_answer(w, &r);",
    ),
    Mutation(
        "asked_answer_taken_twice",
        "ask.c",
        "		enter_state(a, s, PLACING);",
        "		enter_state(a, s, s->request.count > 2 && a->order % 8 == 0 ? ANSWERED : PLACING);",
    ),
]
MUTATIONS += ASKED
MORE = {
    "page_claimed_by_the_last_look_is_forgotten": ("--anon",),
    "large_page_that_may_not_be_split_stays_claimed": ("--anon",),
    "hold_that_cannot_be_lifted_wakes_nobody": ("--odd",),
    "page_of_the_other_batch_is_taken": ("--anon", "--ladder"),
    "resolver_does_not_own_its_page": ("--from", "12001"),  # it stalls for a whole cycle
    "late_write_lands_in_used_space": ("--late-io", "--from", "4001"),
    "copy_whose_discard_failed_is_relied_on": ("--from", "26401"),
    "fetched_under_a_hold_is_taken_for_clean": ("--from", "3601"),
    "adopted_page_is_clean_still": ("--from", "4001"),
    "page_claimed_whatever_its_tier": ("--ladder",),
    **{mutation.name: ("--ladder",) for mutation in LADDER},
    **{mutation.name: ("--asked", "--ladder") for mutation in ASKED},
    "asked_answer_taken_twice": ("--asked", "--late-io"),
    "two_holds_end_with_the_first_release": ("--from", "50001"),
    "page_that_is_somebodys_is_not_dated_again": ("--ladder", "--often", "--from", "18001"),
    "quarantine_forgotten_by_the_second_successor": ("--ladder", "--late-io", "--often"),
    "page_that_could_not_come_back_is_not_in_flight_any_more": ("--ladder", "--late-io", "--often"),
    "page_that_sinks_is_not_in_flight": ("--ladder", "--late-io", "--from", "2401"),
    **{mutation.name: ("--engine", mutation.name[:3]) for mutation in NATIVE_ENGINES},
    **{mutation.name: ("--engine", "rwp", "--hugetlb") for mutation in HUGETLBFS},
    **{mutation.name: ("--anon",) for mutation in ANONYMOUS},
    "anon_missing_not_registered_before_the_move": ("--anon", "--engine", "rfc"),
    "anon_source_not_registered_before_the_move": ("--anon", "--remap"),
    # the kernel must refuse the drop
    "anon_adoption_forgets_a_page_that_was_not_dropped": ("--anon", "--from", "3501"),
    "huge_hold_taken_for_poison": ("--engine", "rfc", "--hugetlb"),
    "rfc_touched_beside_what_leaves": ("--engine", "rfc", "--large"),
    "rfc_unmapped_for_a_hint_and_not_dated": ("--engine", "rfc", "--large", "--from", "19401"),
    "rwp_window_left_with_its_store_only": ("--engine", "rwp", "--from", "12501"),
    "asked_nobody_woken_after_the_answer": ("--asked", "--ladder", "--from", "3601"),
    "rwp_window_left_before_it_is_decided": ("--engine", "rwp", "--often", "--from", "20001"),
    "rfc_window_left_with_a_page_undecided": ("--engine", "rfc", "--often"),
    "rwp_absence_is_taken_for_protection": ("--engine", "rwp", "--remap"),
}
# Two walls stand behind each other here: one alone holds, so both are broken.
_CHECKSUM_NOT_COMPARED = Mutation(
    "checksum_not_compared",
    "evict.c",
    "		if (!moving(b) && word_clean(b->words[slot]) && *sum == was)",
    "		if (!moving(b) && word_clean(b->words[slot]))",
)
# of pages that were fetched and not written since; two things say so, and each must hold by itself
CLEAN = [
    Mutation(
        "two_holds_end_with_the_first_release",
        "evict.c",
        "		atomic_fetch_sub(&g->holding, 1);",
        "		atomic_store(&g->holding, 0);",
    ),
    Mutation(
        "fetched_under_a_hold_is_taken_for_clean",
        "fault.c",
        "!tier_is_pool(g, tier) && !atomic_load(&g->holding);",
        "!tier_is_pool(g, tier);",
    ),
    Mutation(
        "clean_page_is_not_protected",
        "fault.c",
        "bytes, want, *protect, &done);",
        "bytes, want, false, &done);",
    ),
    Mutation(
        "adopted_page_is_clean_still",
        "guest.c",
        "	page_word w = page_load(g, page), to = word_with_clean(adopted_word(w, cached), false);",
        "	page_word w = page_load(g, page), to = adopted_word(w, cached);",
    ),
]
MUTATIONS += CLEAN

ALSO = {
    **{mutation.name: _CHECKSUM_NOT_COMPARED for mutation in CLEAN},
    "asked_slot_that_was_not_supplied_is_taken": Mutation(
        "sinks_unverified",
        "evict.c",
        "		return checksum(page, b->page_bytes) == *sum ? 0 : -EBADMSG;",
        "		return 0;",
    ),
    "asked_sunk_bytes_not_moved_up_with_their_page": Mutation(
        "sinks_unverified",
        "evict.c",
        "		return checksum(page, b->page_bytes) == *sum ? 0 : -EBADMSG;",
        "		return 0;",
    ),
    "hold_error_ignored": Mutation(
        "second_scan_skipped",
        "evict.c",
        "		if (bit_get(b->other, i) && !bit_get(b->touched, i))",
        "		if (first + i < UINT32_MAX)",
    ),
    "leaving_set_after_hold_and_scan": Mutation(
        "scan_sets_leaving",
        "evict.c",
        "		if (bit_get(b->other, i) && !bit_get(b->touched, i))\n",
        "		page_word w = page_load(b->g, b->pages[first + i]);\n\n"
        "		if (bit_get(b->other, i) && !bit_get(b->touched, i) && word_state(w) == RESIDENT &&\n"
        "		    page_move(b->g, b->pages[first + i], w, b->words[first + i]))\n",
    ),
    "huge_page_described_by_its_neighbours_entries": Mutation(
        "window_looks_at_several_huge_pages",
        "evict.c",
        "(g->huge ? 1 : GROUP_PAGES - ",
        "(g->huge ? run : GROUP_PAGES - ",
    ),
    "checksum_not_verified_and_no_sync": Mutation(
        "no_sync", "store.c", "		error = sys_store_sync(t->fd);", "		error = 0;"
    ),
    "rwp_absence_is_taken_for_protection": Mutation(
        "not_touched_is_enough",
        "evict.c",
        "	*ret = bit_get(b->other, bit);",
        "	*ret = bit_get(b->other, bit) && !bit_get(b->touched, bit);",
    ),
    "rfc_no_marker": Mutation(
        "marker_not_set",
        "engine.c",
        "	return again(sys_uffd_protect, g, page, count);",
        "	(void)page, (void)count;\n	return g->engine->set_async ? 0 : again(sys_uffd_protect, g, page, count);",
    ),
    "adoption_wakes_nobody": Mutation(
        "adoption_does_not_clear_holds",
        "guest.c",
        "		error = sys_uffd_unprotect(g->uffd, at, next - at);",
        "		error = 0;",
    ),
}
# Breaks that stand outside of the data plane, in the driver's own steps.
DRIVER_MUTATIONS = [
    Mutation(
        "adoption_by_pid_instead_of_by_lock",  # rule 9
        "driver.c",
        "		if (dying)\n			schedule();",
        "		dying = false;",
    ),
    Mutation(
        "fault_workers_before_adoption",
        "driver.c",
        "	spawn(DAEMON, run_worker, adopted);",
        "	spawn(DAEMON, run_fault_worker, 7);\n	spawn(DAEMON, run_worker, adopted);",
    ),
]


def test_the_protection_says_by_itself_what_is_clean(tmp_path: Path) -> None:
    """Not a page is taken for clean that was written to, also where no checksum is compared."""
    objects = compile_parts(tmp_path, FLAGS)
    changed = _write(_CHECKSUM_NOT_COMPARED, tmp_path)
    others = [path for path in objects if path.stem != changed.stem]
    binary = build_driver(tmp_path / "driver", FLAGS, [changed, *others])
    for more in ((), ("--ladder",), ("--remap",)):
        done = run_driver(binary, "--seeds", str(SEEDS_MAX // 10), *more)
        assert done.returncode == 0, done.stdout


def test_the_table_of_rules_names_what_is_there() -> None:
    """README.md: each of the sixteen rules, and for each but the third a mutation or a test that exists."""
    rows = re.findall(r"^\| (\d+) .*$", (ROOT / "README.md").read_text(), re.M)
    assert rows == [str(rule) for rule in range(1, 17)]
    there = {mutation.name for mutation in MUTATIONS + DRIVER_MUTATIONS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        there.update(re.findall(r"^def (test_\w+)", path.read_text(), re.M))
    for row in re.findall(r"^\| \d+ .*$", (ROOT / "README.md").read_text(), re.M):
        names = re.findall(r"`(\w+)`", row.split("|", 2)[2])
        assert set(names) <= there, row
        assert names or row.startswith("| 3 "), row


def _write(mutation: Mutation, directory: Path) -> Path:
    """Into a copy of the source, or into one that has a mutation already."""
    changed = directory / mutation.file
    if not changed.exists():
        shutil.copy(next(source for source in DRIVER if source.name == mutation.file), changed)
    text = changed.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.name}: the code has changed, write the mutation anew"
    changed.write_text(text.replace(mutation.old, mutation.new))
    return changed


def _caught(mutation: Mutation, directory: Path, objects: list[Path]) -> str:
    """What the driver said of the mutant; empty when it noticed nothing. `objects`: of what is not changed."""
    directory.mkdir()
    changed = {_write(one, directory) for one in (mutation, ALSO.get(mutation.name)) if one}
    others = [path for path in objects if path.stem not in {source.stem for source in changed}]
    binary = build_driver(directory / "driver", FLAGS, [*changed, *others])
    done = run_driver(binary, "--seeds", str(SEEDS_MAX), *MORE.get(mutation.name, ()), timeout_s=1700)
    return "" if done.returncode == 0 else done.stdout or f"aborted ({done.returncode})"


@pytest.fixture(scope="module")
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[str]]]:
    """Of the mutations that are to be tested, each CPU busy with one: most are caught in a second, some take a while."""
    at = tmp_path_factory.mktemp("mutants")
    wanted = [
        item.callspec.params["mutation"]
        for item in request.session.items
        if hasattr(item, "callspec") and "mutation" in item.callspec.params
    ]
    objects = compile_parts(at, FLAGS)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {mutation.name: pool.submit(_caught, mutation, at / mutation.name, objects) for mutation in wanted}


@pytest.mark.parametrize("mutation", MUTATIONS + DRIVER_MUTATIONS, ids=lambda m: m.name)
def test_the_driver_catches(mutation: Mutation, verdicts: dict[str, Future[str]]) -> None:
    assert verdicts[mutation.name].result()
