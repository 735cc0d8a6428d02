# SPDX-License-Identifier: Apache-2.0
"""Where a cycle samples private anonymous memory whose readers are not seen, and how much of it. Pure: no calls, no clock.

Regions as in DAMON (Documentation/mm/damon/design.rst, "Adaptive Regions Adjustment"): each cycle moves a sample of every region
into the staging area, and what is fetched from there again says how warm the region is. Where the sample is cold the next one is
twice as large, where it is warm half as large; and so it is wherever something is fetched while that costs the guest more than
its budget. Neighbours that are as warm as each other become one, and all are cut in two at random, so that borders find their way
to where warm memory ends.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

REGIONS_MIN, REGIONS_MAX = 10, 100
UNIT_PAGES = 512  # borders lie at multiples: what a large entry maps is in one region
SAMPLE = 64  # one page in so many goes into the staging area in the first cycle
COLD_SHARE, WARM_SHARE = 0.02, 0.25  # of a sample at most, or at least, so much was fetched again: it is cold, or warm
ALIKE = 0.1


def _most_pages(pages: int) -> int:
    """Of a region, in a guest of so many."""
    return -(-pages // (REGIONS_MIN * UNIT_PAGES)) * UNIT_PAGES


@dataclass
class Region:
    first_page: int
    pages: int
    sample_pages: int  # of it that may be moved in a cycle
    page: int  # where to look next
    credit_pages: int = (
        0  # of the sample, not yet moved. A large page is moved whole: below 0 the next cycles pay for it
    )
    moved_pages: int = 0  # in the last cycle
    warmth: float = 0.0  # of what is moved, the share that is fetched again: 0 to 1, the last cycles weigh most

    @property
    def end_page(self) -> int:
        return self.first_page + self.pages

    def look_on(self, next_page: int, moved_pages: int) -> None:
        """It was looked at up to `next_page`."""
        self.page = next_page if next_page < self.end_page else self.first_page
        self.credit_pages -= moved_pages
        self.moved_pages += moved_pages

    def adapt(self, refaults: int, stall_share: float) -> None:
        """`refaults`: of its pages in the staging area since the last time. `stall_share`: what those of the whole guest have
        cost, of what they may cost."""
        if refaults or self.moved_pages:
            self.warmth = (self.warmth + min(1.0, refaults / self.sample_pages)) / 2
        if refaults and (stall_share > 1 or refaults >= WARM_SHARE * self.sample_pages):
            self.sample_pages = max(self.sample_pages // 2, 1)
        elif (
            stall_share <= 1
            and refaults <= COLD_SHARE * self.sample_pages
            and (self.moved_pages or self.credit_pages < 0)  # of what could not be moved nothing is known
        ):
            self.sample_pages = min(self.sample_pages * 2, self.pages)

    def begin_cycle(self) -> None:
        self.credit_pages = min(self.credit_pages + self.sample_pages, self.sample_pages)
        self.moved_pages = 0


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
            if (
                last is None
                or abs(last.warmth - region.warmth) > ALIKE
                or last.pages + region.pages > _most_pages(self.pages)
            ):
                kept.append(region)
                continue
            pages = last.pages + region.pages
            last.warmth = (last.warmth * last.pages + region.warmth * region.pages) / pages
            last.pages = pages
            last.sample_pages += region.sample_pages
            last.credit_pages += region.credit_pages
        self.regions = kept

    def _split(self) -> None:
        self.regions = [part for region in self.regions for part in self._two_of(region)]

    def _two_of(self, region: Region) -> list[Region]:
        units = region.pages // UNIT_PAGES
        if units < 2 or region.sample_pages < 2:
            return [region]
        border = region.first_page + self.random.randrange(1, units) * UNIT_PAGES
        low = border - region.first_page
        sample = min(max(region.sample_pages * low // region.pages, 1), region.sample_pages - 1)
        credit = region.credit_pages * low // region.pages
        rest = Region(
            border, region.pages - low, region.sample_pages - sample, border,
            region.credit_pages - credit, warmth=region.warmth,
        )  # fmt: skip
        region.pages, region.sample_pages, region.credit_pages = low, sample, credit
        if region.page >= border:
            rest.page, region.page = region.page, region.first_page
        return [region, rest]
