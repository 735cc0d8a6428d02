# SPDX-License-Identifier: Apache-2.0
"""Sizes, quantiles and rates as people see them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.fake import tier_counters
from tierd.show import Top, latency_text, quantile_us, safe_text, size_text, sparkline, tiers_table


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (100 << 20, "100 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (5000 << 40, "5000 TiB"),
    ],
)
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("us", "text"), [(None, "-"), (9.6, "10 us"), (1500, "1.5 ms"), (2.5e6, "2.5 s")])
def test_latency_text(us: float | None, text: str) -> None:
    assert latency_text(us) == text


def test_safe_text() -> None:
    assert safe_text("a\x1b[31m\n\udcffü") == "a?[31m??ü"


def test_quantiles_of_known_buckets() -> None:
    assert quantile_us([], 0.5) is None
    assert quantile_us([0] * 40, 0.5) is None
    buckets = [0] * 40
    buckets[11] = 99  # 1.024 us ... 2.048 us
    buckets[21] = 1
    assert quantile_us(buckets, 0.5) == pytest.approx(1.024 + 1.024 * 50 / 99)
    assert quantile_us(buckets, 1.0) == pytest.approx(2**21 / 1000)


@given(st.lists(st.integers(0, 1000), min_size=40, max_size=40), st.floats(0.01, 1), st.floats(0.01, 1))
def test_quantiles_ascend_and_stay_in_their_bucket(buckets: list[int], a: float, b: float) -> None:
    low, high = quantile_us(buckets, min(a, b)), quantile_us(buckets, max(a, b))
    if low is None or high is None:
        assert sum(buckets) == 0
        return
    assert low <= high
    last = max(i for i, count in enumerate(buckets) if count)
    assert high <= 2**last / 1000 * (1 + 1e-9)


def test_sparkline() -> None:
    assert sparkline([0, 50, 100, 200], 100) == "▁▅██"
    assert sparkline([1, 2], 0) == "▁▁"


def test_every_tier_of_every_guest_is_shown() -> None:
    def tier(name: str, healthy: bool) -> dict[str, Any]:
        return {
            "name": name,
            "stored_bytes": 1 << 20,
            "used_bytes": 2 << 20,
            "healthy": healthy,
            "counters": tier_counters(),
        }

    guests = [
        {"name": "refused", "tiers": []},
        {"name": "one", "tiers": [tier("redis", False)]},
        {"name": "two", "tiers": [tier("memory", True), tier("file", True)]},
    ]
    table = tiers_table({"guests": guests})
    assert table is not None
    shown = [list(column.cells) for column in (table.columns[0], table.columns[1], table.columns[-1])]
    assert shown == [["one", "two", "two"], ["redis", "memory", "file"], ["[red]ILL[/red]", "", ""]]
    assert tiers_table({"guests": guests[:1]}) is None


def guest(faults: int, resident: int = 5, key: str = "1-1", empty: bool = False) -> dict[str, Any]:
    buckets = [0] * 40
    buckets[10] = faults
    return {
        "name": "g",
        "pid": 1,
        "key": key,
        "state": "active",
        "total_bytes": 10,
        "resident_bytes": resident,
        "stored_bytes": {"zero": 1, "file": 2},
        "counters": {} if empty else {"latency_buckets": buckets},
    }


def test_rates_are_between_samples() -> None:
    top = Top()
    first = top.rows(100.0, [guest(1000)])[0]
    assert (first.faults_per_s, first.stored_bytes) == (0.0, 3)
    assert first.p50_us is not None
    second = top.rows(102.0, [guest(1500, resident=7)])[0]
    assert (second.faults_per_s, second.history) == (250.0, (5, 7))


def test_a_guest_without_counters_and_one_that_starts_again() -> None:
    top = Top()
    assert top.rows(1.0, [guest(0, empty=True)])[0].p99_us is None
    assert top.rows(2.0, [guest(10)])[0].faults_per_s == 10
    assert top.rows(3.0, [guest(4)])[0].faults_per_s == 0  # counters began anew: no negative rate


def test_a_guest_that_is_gone_is_forgotten() -> None:
    top = Top()
    top.rows(1.0, [guest(10), guest(10, key="2-1")])
    top.rows(2.0, [guest(10)])
    assert top.rows(3.0, [guest(10), guest(500, key="2-1")])[1].faults_per_s == 0.0
    assert len(top.rows(4.0, [guest(10)] * 1)[0].history) == 4
    for second in range(100):
        rows = top.rows(5.0 + second, [guest(10)])
    assert len(rows[0].history) == 40
