# SPDX-License-Identifier: Apache-2.0
"""Whose call of a store comes next: tierd.parking.Turns; that none does any more; and what is told of one that failed."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog.testing
import trio
import trio.testing

from tierd.native import Request
from tierd.parking import LOSS_TOLD_S, READ_TOLD_S, Asked, Parking, Rank, Turns
from tierd.store import StoreError


def in_trio(check: Callable[[], Awaitable[None]]) -> None:
    trio.run(check)


async def _call(turns: Turns, rank: Rank, log: list[str], name: str, gate: trio.Event) -> None:
    async with turns.of(rank):
        log.append(name)
        await gate.wait()


def test_who_waits_for_a_page_comes_first() -> None:
    async def check() -> None:
        turns, log, gate = Turns(1), list[str](), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_call, turns, Rank.READ_AHEAD, log, "first", gate)
            await trio.testing.wait_all_tasks_blocked()
            for rank in (Rank.BACKGROUND, Rank.READ_AHEAD, Rank.DEMAND):
                nursery.start_soon(_call, turns, rank, log, rank.name, gate)
                await trio.testing.wait_all_tasks_blocked()
            assert log == ["first"]
            assert turns.demand_waits
            gate.set()
        assert log == ["first", "DEMAND", "READ_AHEAD", "BACKGROUND"]
        assert not turns.demand_waits

    in_trio(check)


def test_the_background_leaves_turns_to_the_others() -> None:
    async def check() -> None:
        turns, log, gate = Turns(8), list[str](), trio.Event()
        async with trio.open_nursery() as nursery:
            for i in range(20):
                nursery.start_soon(_call, turns, Rank.BACKGROUND, log, f"background {i}", gate)
            await trio.testing.wait_all_tasks_blocked()
            assert len(log) == 6
            for i in range(3):
                nursery.start_soon(_call, turns, Rank.DEMAND, log, f"demand {i}", gate)
            await trio.testing.wait_all_tasks_blocked()
            assert len(log) == 8, "two of the three at once"
            gate.set()
        assert len(log) == 23

    in_trio(check)


@pytest.mark.parametrize("seed", range(20))
def test_no_turn_is_lost_or_made(seed: int) -> None:
    """Calls of all ranks that end, fail and are cancelled at any time; never more than there are turns, and all are back."""

    async def check() -> None:
        rng, turns, inside = random.Random(seed), Turns(3), [0]

        async def call() -> None:
            with trio.move_on_after(rng.choice([0, 0.01, 0.02, 1])):
                async with turns.of(rng.choice(list(Rank))):
                    inside[0] += 1
                    assert inside[0] <= 3
                    try:
                        await trio.sleep(rng.choice([0, 0.005, 0.02]))
                    finally:
                        inside[0] -= 1

        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(call)
                await trio.sleep(rng.choice([0, 0, 0.002]))
        log, gate = list[str](), trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(_call, turns, Rank.DEMAND, log, "", gate)
            await trio.testing.wait_all_tasks_blocked()
            assert len(log) == 3
            gate.set()

    in_trio(check)


def test_no_call_begins_after_a_guest_was_cut_off() -> None:
    """Its worker may just have been on the way."""

    async def check() -> None:
        guest = cast("Any", SimpleNamespace(spec=SimpleNamespace(name="web", pid=1), tiers={}))
        parking = Parking(guest, "1-1", {}, lambda store: Turns(1))
        parking.cut()
        with pytest.raises(OSError, match="nobody stores its pages"):
            await trio.to_thread.run_sync(parking.each, 1, None, [(0, [])])

    in_trio(check)


def test_why_pages_do_not_come_is_told_once_until_some_do() -> None:
    refuses, other = StoreError("redis1:6379 refuses the credentials"), StoreError("page 7 is not what was sealed")
    begins: list[tuple[float, Exception | None, str]] = [  # seconds later; what a read says; what is told
        (0, refuses, str(refuses)),
        (1, refuses, ""),
        (READ_TOLD_S, refuses, ""),
        (1, other, str(other)),
        (1, refuses, ""),  # a text that is another one each time
        (READ_TOLD_S, refuses, str(refuses)),
        (1, None, ""),
        (1, refuses, ""),  # some pages come, others do not
        (READ_TOLD_S, refuses, str(refuses)),
        (READ_TOLD_S, trio.TooSlowError(), "it did not answer within 5 s"),
        (READ_TOLD_S, KeyError("of a plug-in"), ""),
    ]

    async def check() -> None:
        guest = cast("Any", SimpleNamespace(spec=SimpleNamespace(name="web", pid=1), tiers={}, native=native))
        parking = cast("Any", Parking(guest, "1-1", {}, lambda store: Turns(1)))
        parking._opened, parking._tiers = {1: trio.Event()}, {1: SimpleNamespace(name="redis")}
        parking._opened[1].set()
        parking._store = lambda tier: SimpleNamespace(name="redis", deadline_s=5.0, second=None)
        for later_s, says, tells in begins:

            async def fetch(request: Request, says: Exception | None = says) -> list[bytes]:
                if says:
                    raise says
                return [b"page"]

            await trio.sleep(later_s)
            parking._fetch = fetch
            with structlog.testing.capture_logs() as told:
                parking._log = structlog.get_logger()
                await parking._serve(SimpleNamespace(tier=1, number=3))
            assert [entry["error"] for entry in told if entry["event"] == "store_read_failed"] == (
                [tells] if tells else []
            )

    native = SimpleNamespace(answer=lambda *answer: None)
    trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_copy_that_is_lost_is_told_again_when_the_store_has_given_pages_since() -> None:
    """Failures in between are told as such: they are no loss, and no store is told in place of the other."""
    both = [SimpleNamespace(name="redis"), SimpleNamespace(name="objects")]
    fails, gives, lacks = OSError(5, "it refuses"), None, "it does not have it"
    begins: list[tuple[float, bool, Any, str]] = [  # seconds later; whether the second; what it does; what is told
        (0, False, fails, "store_read_failed"),
        (1, False, lacks, "copy_is_missing"),
        (LOSS_TOLD_S, False, lacks, ""),
        (1, True, gives, ""),
        (1, False, lacks, ""),
        (1, True, lacks, "copy_is_missing"),
        (1, False, gives, ""),
        (1, False, lacks, "copy_is_missing"),
        (1, False, gives, ""),
        (1, False, lacks, ""),  # it has lost a part
        (1, False, fails, "store_read_failed"),
        (LOSS_TOLD_S, False, lacks, "copy_is_missing"),
    ]

    async def check() -> None:
        guest = cast("Any", SimpleNamespace(spec=SimpleNamespace(name="web", pid=1), tiers={}))
        parking = cast("Any", Parking(guest, "1-1", {}, lambda store: Turns(1)))
        for later_s, is_second, does, tells in begins:
            await trio.sleep(later_s)
            with structlog.testing.capture_logs() as told:
                parking._log = structlog.get_logger()
                if does is lacks:
                    parking._tell_missing(both, 7, is_second, lacks)
                else:
                    parking._copy_read(both, is_second, does)
            assert [(entry["event"], entry["store"]) for entry in told] == (
                [(tells, both[is_second].name)] if tells else []
            )

    trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_store_that_is_given_nothing_is_not_asked() -> None:
    """Of a batch that another tier has taken whole: it would wait for its turn there, and for what a slow store does beside."""
    parking = SimpleNamespace(
        pieces=lambda tier, runs: list(runs),
        takes_runs=lambda tier: True,
        each=lambda *_: pytest.fail("nothing is to be written"),
    )
    Asked(cast(Parking, parking)).write(2, [])


@pytest.mark.parametrize(("deadline_s", "seconds"), [(0.5, 60), (10, 60), (100, 600)])
def test_how_long_a_write_may_take(deadline_s: float, seconds: float) -> None:
    """A store whose reads may take long is given as much more for its writes."""

    async def check() -> None:
        guest = cast("Any", SimpleNamespace(spec=SimpleNamespace(name="web", pid=1), tiers={}))
        parking = cast("Any", Parking(guest, "1-1", {}, lambda store: Turns(8)))
        parking._spaces = {1: None}
        parking._store = lambda tier: SimpleNamespace(name="redis", deadline_s=deadline_s, concurrency=8)

        async def write(space: None) -> None:
            await trio.sleep_forever()

        began = trio.current_time()
        with pytest.raises(trio.TooSlowError):
            await parking._until_over(1, write, [()])
        assert trio.current_time() - began == pytest.approx(seconds)

    trio.run(check, clock=trio.testing.MockClock(autojump_threshold=0))
