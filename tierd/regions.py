# SPDX-License-Identifier: Apache-2.0
"""Where a cycle samples private anonymous memory whose readers are not seen, and how much of it. Pure: no calls, no clock.

Regions as in DAMON (Documentation/mm/damon/design.rst, "Adaptive Regions Adjustment"): each cycle moves a sample of every region
into the staging area, and what is fetched from there again says how warm the region is. Where the sample is cold the next one is
twice as large, where it is warm half as large; and so it is wherever something is fetched while that costs the guest more than
its budget. In between it stays. Neighbours that are like each other become one, and all are cut in two at random, so that borders
find their way to where warm memory ends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

REGIONS_MIN, REGIONS_MAX = 10, 100
UNIT_PAGES = 512  # borders lie at multiples: of most guests, what a large entry maps is in one region
SAMPLE = 64  # one page in so many goes into the staging area in the first cycle
COLD_SHARE, WARM_SHARE = 0.02, 0.25  # of a sample at most, or at least, so much was fetched again: it is cold, or warm
ALIKE_WARMTH, ALIKE_DENSITY = 0.1, 4.0  # two regions are alike: at most so different, at most so many times as dense
MEMORY = 7 / 8  # so much of what was moved, and fetched, counts still in the next cycle


def _most_pages(pages: int) -> int:
    """Of a region, in a guest of so many."""
    return -(-pages // (REGIONS_MIN * UNIT_PAGES)) * UNIT_PAGES


@dataclass
class Region:
    first_page: int
    pages: int
    sample_pages: int  # of it that may be moved in a cycle
    page: int  # where to look next
    credit_pages: int = 0  # of the sample, not moved yet. A large page moves whole: below 0 the next cycles pay for it
    moved_pages: int = 0  # in the last cycle
    moved: float = 0.0  # pages, in the last cycles
    fetched: float = 0.0  # and again by the guest

    @property
    def end_page(self) -> int:
        return self.first_page + self.pages

    @property
    def warmth(self) -> float:
        """Of what was moved, the share that was fetched again: 0 to 1."""
        return min(1.0, self.fetched / max(self.moved, 1.0))

    def look_on(self, next_page: int, tried_pages: int, moved_pages: int) -> None:
        """It was looked at up to `next_page`."""
        self.page = next_page if next_page < self.end_page else self.first_page
        self.credit_pages -= tried_pages
        self.moved_pages += moved_pages

    def adapt(self, refaults: int, stall_share: float) -> None:
        """`refaults`: pages of it that were fetched from the staging area since the last time. `stall_share`: what those of the
        whole guest have cost, of what they may cost."""
        self.moved = self.moved * MEMORY + self.moved_pages
        self.fetched = self.fetched * MEMORY + refaults
        if refaults and (stall_share > 1 or self.warmth >= WARM_SHARE):
            self.sample_pages = max(self.sample_pages // 2, 1)
        elif (
            self.warmth <= COLD_SHARE
            and stall_share <= (1.0 if self.fetched < 1 else 0.5)
            # of what could not be moved nothing is known
            and (self.moved_pages > self.sample_pages // 2 or self.credit_pages < 0)
        ):
            self.sample_pages = min(self.sample_pages * 2, self.pages)

    def begin_cycle(self) -> None:
        self.credit_pages = min(self.credit_pages + self.sample_pages, self.sample_pages)
        self.moved_pages = 0

    def is_like(self, other: Region) -> bool:
        density, others = self.sample_pages / self.pages, other.sample_pages / other.pages
        alike = max(density, others) <= ALIKE_DENSITY * min(density, others)
        return alike and abs(self.warmth - other.warmth) <= ALIKE_WARMTH


@dataclass
class Regions:
    """All of a guest, in order and without gaps. The worker's own."""

    pages: int
    regions: list[Region]
    random: random.Random = field(default_factory=random.Random)

    @classmethod
    def first(cls, pages: int) -> Regions:
        """A few regions, of each a small sample."""
        firsts = range(0, pages, size := _most_pages(pages))
        return cls(
            pages,
            [Region(first, n := min(size, pages - first), max(n // SAMPLE, 1), first) for first in firsts],
        )

    @classmethod
    def whole(cls, pages: int) -> Regions:
        """All of the guest at once, however many readers that costs."""
        return cls(pages, [Region(0, pages, pages, 0)])

    @property
    def sample_pages(self) -> int:
        return sum(region.sample_pages for region in self.regions)

    def adapt(self, refaults: list[int], stall_share: float) -> None:
        """`refaults`: of each region; see Region.adapt."""
        for region, count in zip(self.regions, refaults, strict=True):
            region.adapt(count, stall_share)
        self._merge()
        if 2 * len(self.regions) <= REGIONS_MAX:
            self._split()

    def begin_cycle(self) -> list[Region]:
        """Those of which something may be moved."""
        for region in self.regions:
            region.begin_cycle()
        return [region for region in self.regions if region.credit_pages > 0]

    def _merge(self) -> None:
        kept: list[Region] = []
        for region in self.regions:
            last = kept[-1] if kept else None
            if last is None or not last.is_like(region) or last.pages + region.pages > _most_pages(self.pages):
                kept.append(region)
                continue
            last.pages += region.pages
            last.sample_pages += region.sample_pages
            last.credit_pages += region.credit_pages
            last.moved += region.moved
            last.fetched += region.fetched
        self.regions = kept

    def _split(self) -> None:
        self.regions = [part for region in self.regions for part in self._two_of(region)]

    def _two_of(self, region: Region) -> list[Region]:
        units = region.pages // UNIT_PAGES
        if units < 2 or region.sample_pages < 2:
            return [region]
        border = region.first_page + self.random.randrange(1, units) * UNIT_PAGES
        low = border - region.first_page
        share = low / region.pages
        sample = min(max(int(region.sample_pages * share), 1), region.sample_pages - 1)
        credit = int(region.credit_pages * share)
        rest = Region(
            border,
            region.pages - low,
            region.sample_pages - sample,
            border + self.random.randrange(units - low // UNIT_PAGES) * UNIT_PAGES,
            region.credit_pages - credit,
            moved=region.moved * (1 - share),
            fetched=region.fetched * (1 - share),
        )
        region.pages, region.sample_pages, region.credit_pages = low, sample, credit
        region.moved, region.fetched = region.moved * share, region.fetched * share
        if region.page >= border:
            rest.page, region.page = region.page, region.first_page
        return [region, rest]
