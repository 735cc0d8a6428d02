# SPDX-License-Identifier: Apache-2.0
"""The policy, as tables of numbers and as properties that hold for every policy and every sample."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.config import Policy, Tier
from tierd.policy import Demotion, Sample, TierSample, clamp_min_idle, classes, decide, idle_edges, sink, tiers_for

MIB = 1 << 20


def policy(**changes: Any) -> Policy:
    return Policy(**({"interval_s": 30, "idle_intervals": 10, "min_idle_s": 120} | changes))


def sample(**changes: Any) -> Sample:
    """1 GiB resident: 600 MiB touched in the last minute, 300 MiB idle for 3 minutes, 124 MiB for 10."""
    usual: dict[str, Any] = {
        "resident_bytes": 1024 * MIB,
        "stored_bytes": 0,
        "store_free_bytes": 10240 * MIB,
        "idle": ((0.0, 600 * MIB), (60.0, 0), (120.0, 0), (180.0, 300 * MIB), (300.0, 0), (600.0, 124 * MIB)),
        "elapsed_s": 30.0,
    }
    return Sample(**(usual | changes))


TABLE = [
    # (policy, sample, bytes out, not younger than, words of the reason)
    ({}, {}, 124, 300, "untouched for 300 s"),
    ({"idle_intervals": 5}, {}, 424, 150, "untouched for 150 s"),
    ({"idle_intervals": 1}, {}, 424, 120, "untouched for"),  # the floor binds the cold age
    ({"enabled": False}, {}, 0, 0, "disabled"),
    ({"dry_run": True}, {}, 0, 0, "dry run: would evict 124 MiB"),
    ({"resident_max": 800 * MIB}, {}, 224, 120, "above resident_max"),
    ({"resident_max": 100 * MIB}, {}, 424, 120, "but only 424 MiB untouched for min_idle_s"),
    ({"resident_max": 1000 * MIB}, {}, 124, 300, "untouched for 300 s"),
    ({"resident_min": 1000 * MIB}, {}, 24, 300, "down to resident_min"),
    ({"resident_min": 2048 * MIB}, {}, 0, 0, "down to resident_min"),
    ({"evict_rate_max": MIB}, {}, 30, 300, "evict_rate_max"),
    ({}, {"store_free_bytes": 10 * MIB}, 10, 300, "as much as the store takes"),
    ({}, {"store_free_bytes": 0}, 0, 0, "the store is full"),
    ({}, {"idle": ((0.0, 1024 * MIB),)}, 0, 0, "nothing is untouched"),
]


@pytest.mark.parametrize(("changes", "seen", "evict_mib", "not_younger_s", "reason"), TABLE)
def test_table(
    changes: dict[str, Any], seen: dict[str, Any], evict_mib: int, not_younger_s: float, reason: str
) -> None:
    decision = decide(policy(**changes), sample(**seen))
    assert decision.evict_bytes_max == evict_mib * MIB
    assert decision.min_idle_s >= not_younger_s
    assert reason in decision.reason


def test_the_oldest_go_first() -> None:
    """Where only a part may go, the cut-off is as old as it can be."""
    decision = decide(policy(idle_intervals=5, evict_rate_max=4 * MIB), sample())
    assert decision.min_idle_s == 600
    assert decision.evict_bytes_max == 120 * MIB


def test_an_operators_order_is_bound_by_the_floor() -> None:
    assert clamp_min_idle(policy(), None) == 120
    assert clamp_min_idle(policy(), 1) == 120
    assert clamp_min_idle(policy(), 500) == 500


sizes = st.integers(0, 1 << 44)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    resident_min, resident_max = sorted([draw(sizes), draw(sizes)])
    return policy(
        interval_s=draw(st.floats(1, 3600)),
        idle_intervals=draw(st.integers(1, 100)),
        min_idle_s=draw(st.floats(120, 86400)),
        resident_min=resident_min,
        resident_max=draw(st.sampled_from([None, resident_max])),
        evict_rate_max=draw(st.none() | st.integers(1, 1 << 40)),
        enabled=draw(st.booleans()),
        dry_run=draw(st.booleans()),
    )


@given(policies(), sizes, sizes, st.lists(sizes, min_size=40, max_size=40), st.floats(1, 86400))
def test_what_holds_for_every_policy(p: Policy, resident: int, free: int, ages: list[int], elapsed_s: float) -> None:
    idle = tuple(zip(idle_edges(p), ages, strict=False))
    decision = decide(p, Sample(resident, 0, free, idle, elapsed_s))
    assert decision.min_idle_s >= p.min_idle_s or not decision.evict_bytes_max, "nothing younger than the floor leaves"
    assert 0 <= decision.evict_bytes_max <= max(free, 0)
    assert decision.evict_bytes_max <= max(resident - p.resident_min, 0), "never below resident_min"
    assert decision.evict_bytes_max == 0 or (p.enabled and not p.dry_run)
    if p.evict_rate_max is not None:
        assert decision.evict_bytes_max <= p.evict_rate_max * elapsed_s
    old_enough = sum(size for edge, size in idle if edge >= decision.min_idle_s)
    assert decision.evict_bytes_max <= old_enough, "the cut-off leaves enough pages to reach what was decided"
    if p.resident_max is None and decision.evict_bytes_max:
        assert decision.min_idle_s >= p.cold_s, "only above resident_max do pages leave that are not cold"


@given(policies())
def test_edges(p: Policy) -> None:
    edges = idle_edges(p)
    assert edges[0] == 0
    assert list(edges) == sorted(set(edges))
    assert {p.min_idle_s, p.cold_s} <= set(edges)


# --- from tier to tier ------------------------------------------------------------------------------------------------


def tier_sample(**changes: Any) -> TierSample:
    """400 MiB of guest memory in 200 MiB of a tier of 1 GiB: half of it idle for 5 minutes, half for an hour."""
    usual: dict[str, Any] = {
        "stored_bytes": 400 * MIB,
        "used_bytes": 200 * MIB,
        "capacity_bytes": 1024 * MIB,
        "store_used_bytes": 2048 * MIB,
        "store_free_bytes": 8192 * MIB,
        "idle": ((0.0, 0), (300.0, 200 * MIB), (3600.0, 200 * MIB)),
        "elapsed_s": 30.0,
    }
    return TierSample(**(usual | changes))


@pytest.mark.parametrize(
    ("changes", "below", "sampled", "wanted"),
    [
        ({}, {}, {}, Demotion(0.0, 0)),  # there is room
        ({}, {"min_age_s": 3600.0}, {}, Demotion(3600.0, 200 * MIB)),  # old enough
        ({}, {"min_age_s": 7200.0}, {}, Demotion(7200.0, 0)),
        (
            {},
            {},
            {"capacity_bytes": 210 * MIB},
            Demotion(3600.0, 64 * MIB),
        ),  # to four fifths of 210 MiB: 16 % of what is there
        ({}, {}, {"capacity_bytes": 225 * MIB}, Demotion(0.0, 0)),  # not above nine tenths
        ({}, {}, {"capacity_bytes": 0}, Demotion(300.0, 400 * MIB)),  # everything
        ({}, {"min_age_s": 3600.0}, {"capacity_bytes": 0}, Demotion(3600.0, 200 * MIB)),  # but nothing too young for it
        ({"demote_rate_max": MIB}, {}, {"capacity_bytes": 0}, Demotion(300.0, 30 * MIB)),
        ({}, {"min_age_s": 0.0}, {}, Demotion(300.0, 400 * MIB)),
        ({}, {}, {"store_free_bytes": 0}, Demotion(3600.0, 80 * MIB - 1)),  # a fifth of what all guests have there
    ],
)
def test_what_sinks(changes: dict[str, Any], below: dict[str, Any], sampled: dict[str, Any], wanted: Demotion) -> None:
    assert sink(policy(**changes), Tier(name="file", **below), tier_sample(**sampled)) == wanted


def test_a_page_enters_where_it_is_old_enough() -> None:
    ladder = policy(tiers=[Tier(name="memory"), Tier(name="file", min_age_s=3600.0)])
    assert [tier.name for tier in tiers_for(ladder, 3599.0)] == ["memory"]
    assert [tier.name for tier in tiers_for(ladder, 3600.0)] == ["memory", "file"]
    assert 3600.0 in idle_edges(ladder)
    assert classes(ladder, 300.0) == (3600.0, 300.0), "the oldest first: they may go to the file at once"
    assert classes(ladder, 7200.0) == (7200.0,)


def test_stored_max() -> None:
    decision = decide(policy(stored_max=100 * MIB), sample(stored_bytes=90 * MIB))
    assert (decision.evict_bytes_max, decision.reason) == (10 * MIB, "up to stored_max")
    assert decide(policy(stored_max=100 * MIB), sample(stored_bytes=190 * MIB)).evict_bytes_max == 0
