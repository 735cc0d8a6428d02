# SPDX-License-Identifier: Apache-2.0
"""How many pages a cycle moves into the staging area: by what their readers have cost."""

from __future__ import annotations

from typing import cast

from tierd.cycle import SAMPLE, SAMPLE_PAGES_MIN, Staging
from tierd.native import NativeGuest

PAGES = 1 << 20
BUDGET, INTERVAL_S = 0.001, 60.0  # 60 ms of a cycle
FAULT_NS = 100_000


class Guest:
    """What of a guest is asked."""

    def __init__(self, pages: int = PAGES) -> None:
        self.pages = pages
        self.staged = self.count = self.sum_ns = 0

    def counters(self) -> dict[str, int]:
        return {"faults_staged": self.staged, "latency_count": self.count, "latency_sum_ns": self.sum_ns}

    def reads(self, staged: int, others: int = 0) -> None:
        self.staged += staged
        self.count += staged + others
        self.sum_ns += (staged + others) * FAULT_NS


def adapted(staging: Staging, guest: Guest) -> int:
    staging.adapt(cast(NativeGuest, guest), BUDGET, INTERVAL_S)
    return staging.max_pages


def test_it_begins_with_a_sample_and_doubles_while_nobody_reads() -> None:
    staging, guest = Staging(), Guest()
    assert [adapted(staging, guest) for _ in range(4)] == [PAGES // SAMPLE << i for i in range(4)]
    for _ in range(10):
        adapted(staging, guest)
    assert staging.max_pages == PAGES, "not more than there are"


def test_readers_that_cost_more_than_the_budget_halve_it_down_to_the_sample() -> None:
    staging, guest = Staging(), Guest()
    for _ in range(4):
        adapted(staging, guest)
    for expected in (4, 2, 1, 1):
        guest.reads(601)
        assert adapted(staging, guest) == PAGES // SAMPLE * expected


def test_in_between_it_stays() -> None:
    staging, guest = Staging(), Guest()
    first = adapted(staging, guest)
    for _ in range(3):
        guest.reads(400)  # 40 of 60 ms
        assert adapted(staging, guest) == first
    guest.reads(299)
    assert adapted(staging, guest) == 2 * first


def test_faults_of_other_kinds_do_not_count() -> None:
    staging, guest = Staging(), Guest()
    first = adapted(staging, guest)
    guest.reads(100, others=100_000)
    assert adapted(staging, guest) == 2 * first


def test_a_small_guest_has_a_sample_too() -> None:
    guest = Guest(1024)
    staging = Staging()
    assert adapted(staging, guest) == SAMPLE_PAGES_MIN
    guest.reads(1000)
    assert adapted(staging, guest) == SAMPLE_PAGES_MIN
