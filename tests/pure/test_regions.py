# SPDX-License-Identifier: Apache-2.0
"""How many pages a cycle moves into the staging area, and of which parts of a guest: by what their readers have cost."""

from __future__ import annotations

import random
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.cycle import Staging
from tierd.native import NativeGuest
from tierd.regions import REGIONS_MAX, SAMPLE, UNIT_PAGES, Region, Regions

PAGES = 1 << 20
BUDGET, INTERVAL_S = 0.001, 60.0  # 60 ms of a cycle
FAULT_NS = 100_000


class Guest:
    """What of a guest is asked; its readers read evenly, or in one place."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pages = pages
        self.staged = self.count = self.sum_ns = 0
        self.read: dict[int, int] = {}

    def counters(self) -> dict[str, int]:
        return {"faults_staged": self.staged, "latency_count": self.count, "latency_sum_ns": self.sum_ns}

    def reads(self, page: int, staged: int, others: int = 0) -> None:
        self.read[page] = self.read.get(page, 0) + staged
        self.staged += staged
        self.count += staged + others
        self.sum_ns += (staged + others) * FAULT_NS

    def refaults(self, first_page: int, pages: int) -> int:
        return sum(self.read.pop(page) for page in list(self.read) if first_page <= page < first_page + pages)


def adapted(staging: Staging, guest: Guest) -> int:
    """Pages that a cycle may move; all of them are moved."""
    regions = staging.adapt(cast(NativeGuest, guest), BUDGET, INTERVAL_S)
    for region in regions.begin_cycle():
        region.look_on(region.page + region.sample_pages, region.sample_pages, region.sample_pages)
    return regions.sample_pages


def begun() -> tuple[Staging, Guest]:
    """Borders fall where they always do."""
    regions = Regions.first(PAGES)
    regions.random.seed(1)
    return Staging(regions), Guest()


def density(staging: Staging, first_page: int, end_page: int) -> float:
    """Of regions that lie in there: the share of their pages that a cycle may move."""
    assert staging.regions is not None
    within = [r for r in staging.regions.regions if first_page <= r.first_page and r.end_page <= end_page]
    return sum(region.sample_pages for region in within) / sum(region.pages for region in within)


def test_it_begins_with_a_sample_and_doubles_while_nobody_reads() -> None:
    staging, guest = Staging(), Guest()
    found = [adapted(staging, guest) for _ in range(4)]
    assert all(abs(pages - (PAGES // SAMPLE << i)) <= REGIONS_MAX << i for i, pages in enumerate(found))
    for _ in range(10):
        adapted(staging, guest)
    assert adapted(staging, guest) == PAGES, "not more than there are"


def test_readers_that_cost_more_than_the_budget_halve_it_where_they_read() -> None:
    staging, guest = begun()
    for _ in range(4):
        adapted(staging, guest)
    before = density(staging, 0, PAGES)
    for page in range(0, PAGES // 8, UNIT_PAGES):
        guest.reads(page, 30)  # 768 ms in all, and less than a quarter of the samples
    adapted(staging, guest)
    assert density(staging, 0, PAGES // 8) < 0.6 * before
    assert density(staging, PAGES // 4, PAGES) > 0.9 * before, (
        "what nobody reads is as it was, and waits for better times"
    )
    for _ in range(20):
        guest.reads(PAGES // 16, 601)
        adapted(staging, guest)
    assert staging.regions is not None
    hot = next(region for region in staging.regions.regions if region.first_page <= PAGES // 16 < region.end_page)
    assert hot.sample_pages == 1


def test_in_between_it_stays() -> None:
    staging, guest = begun()
    first = adapted(staging, guest)
    assert staging.regions is not None
    for _ in range(3):
        for region in staging.regions.regions:
            guest.reads(region.first_page, region.sample_pages * 3 // 100)
        assert abs(adapted(staging, guest) - first) <= first // 100, "but for parts too small to say so"


def test_a_sample_that_is_read_does_not_grow_though_the_budget_would_allow_it() -> None:
    staging, guest = begun()
    adapted(staging, guest)
    assert staging.regions is not None
    hot = staging.regions.regions[0].sample_pages
    for _ in range(6):
        guest.reads(0, hot // 4)
        adapted(staging, guest)
    first = staging.regions.regions[0]
    assert first.sample_pages <= hot
    assert staging.regions.sample_pages > 8 * PAGES // SAMPLE, "the others do"


def test_faults_of_other_kinds_do_not_count() -> None:
    staging, guest = begun()
    first = adapted(staging, guest)
    guest.reads(0, 1, others=100_000)
    assert adapted(staging, guest) >= 2 * first - REGIONS_MAX


def test_what_could_not_be_moved_tells_nothing() -> None:
    """All of it was written; the day it is not, the sample is as small as ever."""
    staging, guest = Staging(), cast(NativeGuest, Guest())
    first = staging.adapt(guest, BUDGET, INTERVAL_S).sample_pages
    for _ in range(5):
        regions = staging.adapt(guest, BUDGET, INTERVAL_S)
        for region in regions.begin_cycle():
            region.look_on(region.end_page, 0, 0)
    assert regions.sample_pages == first


def test_a_large_page_is_paid_for_by_the_cycles_after_it() -> None:
    region = Region(0, 100 * UNIT_PAGES, 100, 0)
    moved = 0
    for cycle in range(50):
        region.begin_cycle()
        if region.credit_pages > 0:
            region.look_on(region.page + UNIT_PAGES, UNIT_PAGES, UNIT_PAGES)
            moved += UNIT_PAGES
        region.adapt(5, 0.7)  # readers, so it does not grow
        assert moved <= (cycle + 1) * 100 + UNIT_PAGES
    assert moved >= 50 * 100 - UNIT_PAGES


def test_a_small_guest_is_one_region() -> None:
    regions = Regions.first(100)
    assert [(region.first_page, region.pages, region.sample_pages) for region in regions.regions] == [(0, 100, 1)]


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_borders_find_their_way_to_where_warm_memory_ends(share: float) -> None:
    """Two fifths of the guest, not where a region begins; of these so many pages are read when they are moved: little is moved of
    them after a while, and most of the rest in each cycle."""
    warm = range(PAGES * 33 // 100, PAGES * 73 // 100)
    staging, guest = begun()
    stalls_s = []
    for _ in range(200):
        regions = staging.adapt(cast(NativeGuest, guest), BUDGET, INTERVAL_S)
        before = guest.sum_ns
        for region in regions.begin_cycle():
            first, last = region.page, min(region.page + region.credit_pages, region.end_page)
            read = max(0, min(last, warm.stop) - max(first, warm.start)) * share
            guest.reads(first, int(read + regions.random.random()) if read else 0)
            region.look_on(last, last - first, last - first)
        stalls_s.append((guest.sum_ns - before) / 1e9)
    assert sum(stalls_s[100:]) < 100 * BUDGET * INTERVAL_S
    assert density(staging, 0, warm.start) > 0.5
    assert density(staging, warm.stop, PAGES) > 0.5
    assert density(staging, warm.start, warm.stop) < 0.05


@given(
    st.integers(1, 200_000),
    st.lists(st.tuples(st.lists(st.integers(0, 5000), max_size=20), st.floats(0, 3)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_they_cover_the_guest(pages: int, rounds: list[tuple[list[int], float]], dice: random.Random) -> None:
    regions = Regions.first(pages)
    regions.random = dice
    for refaults, stall_share in rounds:
        counts = [*refaults, *[0] * len(regions.regions)][: len(regions.regions)]
        regions.adapt(counts, stall_share)
        for region in regions.begin_cycle():
            region.look_on(region.page + dice.randrange(region.pages + 600), dice.randrange(600), dice.randrange(600))
        assert regions.regions[0].first_page == 0
        assert regions.regions[-1].end_page == pages
        assert len(regions.regions) <= REGIONS_MAX
        for region, following in zip(regions.regions, [*regions.regions[1:], None], strict=True):
            assert following is None or region.end_page == following.first_page
            assert region.first_page <= region.page < region.end_page
            assert 1 <= region.sample_pages <= region.pages
            assert region.credit_pages <= region.sample_pages
            assert 0 <= region.warmth <= 1
