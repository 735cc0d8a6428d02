# SPDX-License-Identifier: Apache-2.0
"""The metrics: values as a parser reads them, and promtool's opinion of the names."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.fake import GIB, FakeDaemon, FakeGuest, counters
from tests.need import need
from tierd.metrics import create_registry, exposition
from tierd.native import STATES

LATENCIES = tuple(1 if i in (3, 14, 15, 39) else 0 for i in range(40))


def two_guests() -> FakeDaemon:
    busy = counters(
        faults_fetch=5,
        faults_failed=2,
        pages_evicted=100,
        pages_evicted_zero=40,
        checksum_errors=1,
        latency_count=4,
        latency_sum_ns=3_000_000,
        latency_buckets=LATENCIES,
        faults_window=7,
        large_folios_split=3,
        state_pages=tuple(3 * (name == "lost") for name in STATES),
        window_sum_ns=2_000_000,
        window_buckets=(*(0,) * 20, 3, *(0,) * 19),
    )
    daemon = FakeDaemon(FakeGuest("web", 10, "10-1", counters=busy), FakeGuest("db", 11, "11-1", state="paused"))
    daemon.refuse("nested guests")
    return daemon


def scrape(daemon: FakeDaemon) -> str:
    return exposition(create_registry(daemon.status), "text/plain")[0].decode()


Sample = tuple[str, tuple[tuple[str, str], ...]]


def samples(text: str) -> dict[Sample, float]:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def of(name: str, guest: str, pid: int, **labels: str) -> Sample:
    return (f"tierd_guest_{name}", tuple(sorted({"guest": guest, "pid": str(pid), **labels}.items())))


def test_every_name_that_is_promised() -> None:
    found = {line.split("{")[0].split(" ")[0] for line in scrape(two_guests()).splitlines() if line[0] != "#"}
    guest = (
        "page_bytes size_bytes resident_bytes stored_bytes hole_bytes idle_bytes faults_total fault_latency_seconds_bucket "
        "fault_latency_seconds_count fault_latency_seconds_sum pages_evicted_total pages_cancelled_total "
        "pages_fetched_total pages_zero_total pages_lost_total cycle_seconds_total cycles_total errors_total state "
        "inject_stops_total parked_pages fault_threads window_faults_total sync_window_seconds_bucket "
        "large_folios_split_total sync_window_seconds_count sync_window_seconds_sum staged_bytes pages_staged_total "
        "pages_refaulted_total "
        "pages_unmovable_total stop_seconds_bucket stop_seconds_count stop_seconds_sum tier_used_bytes tier_compressed_bytes "
        "tier_healthy tier_pages_total tier_errors_total pages_demoted_total pages_refused_total tier_read_seconds_bucket "
        "pages_unwritten_total lost_bytes "
        "tier_read_seconds_count tier_read_seconds_sum"
    )
    promised = {f"tierd_guest_{name}" for name in guest.split()} | {
        "tierd_build_info",
        "tierd_unserved_guests",
        "tierd_reload_failed",
        "tierd_store_capacity_bytes",
        "tierd_store_used_bytes",
        "tierd_store_healthy",
        "tierd_store_trouble",
    }
    assert {name for name in found if name.startswith("tierd_")} == promised
    assert "process_resident_memory_bytes" in found


def test_values_and_labels() -> None:
    found = samples(scrape(two_guests()))
    assert found[("tierd_build_info", (("engine", "stock"), ("version", "0.1.0")))] == 1
    assert found[of("stored_bytes", "web", 10, tier="file")] == GIB // 4
    assert found[of("tier_used_bytes", "web", 10, tier="file")] == GIB // 4
    assert found[of("tier_pages_total", "web", 10, tier="memory", what="refused")] == 1
    assert found[of("tier_errors_total", "web", 10, tier="file", kind="read")] == 1
    assert found[of("tier_read_seconds_count", "web", 10, tier="file")] == 3
    assert found[of("tier_healthy", "web", 10, tier="file")] == 1
    assert found[of("lost_bytes", "web", 10)] == 3 * 4096
    assert found[of("idle_bytes", "web", 10, age_s="120")] == GIB // 4
    assert found[of("faults_total", "web", 10, kind="fetch", outcome="served")] == 5
    assert found[of("faults_total", "web", 10, kind="any", outcome="failed")] == 2
    assert found[of("pages_zero_total", "web", 10)] == 40
    assert found[of("errors_total", "web", 10, kind="checksum")] == 1
    assert found[of("cycle_seconds_total", "web", 10, phase="write")] == 1.25
    assert found[of("window_faults_total", "web", 10)] == 7
    assert found[of("large_folios_split_total", "web", 10)] == 3
    assert found[of("sync_window_seconds_count", "web", 10)] == 3
    assert found[of("sync_window_seconds_sum", "web", 10)] == pytest.approx(0.002)
    assert found[of("page_bytes", "web", 10)] == 4096
    assert found[of("state", "db", 11, state="paused")] == 1
    assert found[of("state", "db", 11, state="active")] == 0
    assert found[("tierd_store_used_bytes", (("store", "file"),))] == GIB


def test_a_store_in_which_rubbish_stays_is_not_ill() -> None:
    daemon = two_guests()
    daemon.store = replace(daemon.store, trouble="no room for rubbish")
    found, which = samples(scrape(daemon)), (("store", "file"),)
    assert (found["tierd_store_healthy", which], found["tierd_store_trouble", which]) == (1, 1)
    found = samples(scrape(two_guests()))
    assert (found["tierd_store_healthy", which], found["tierd_store_trouble", which]) == (1, 0)


def test_latency_histogram_is_cumulative_and_complete() -> None:
    found = samples(scrape(two_guests()))
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in found.items()
        if name == "tierd_guest_fault_latency_seconds_bucket" and dict(labels)["guest"] == "web"
    }
    assert buckets["1.024e-06"] == 1  # the 8 ns one, below every bucket that is shown
    assert buckets["1.6384e-05"] == 2
    assert buckets["3.2768e-05"] == 3
    assert buckets["17.179869184"] == 3
    assert buckets["+Inf"] == 4  # the 500 s one
    assert found[of("fault_latency_seconds_count", "web", 10)] == 4
    assert found[of("fault_latency_seconds_sum", "web", 10)] == pytest.approx(0.003)


def test_a_guest_without_counters_has_a_state_and_no_invented_zeros() -> None:
    found = samples(scrape(two_guests()))
    assert found[of("state", "nested", 99, state="refused")] == 1
    assert of("pages_evicted_total", "nested", 99) not in found


def test_a_guest_that_is_gone_is_gone() -> None:
    daemon = two_guests()
    registry = create_registry(daemon.status)
    assert 'guest="web"' in exposition(registry, "")[0].decode()
    daemon.guests = {}
    assert 'guest="web"' not in exposition(registry, "")[0].decode()


@pytest.mark.parametrize("name", ['a"b\\c\nd', "name-\udcff", "x" * 300, "ü/..", ""])
def test_any_name_survives(name: str) -> None:
    found = samples(scrape(FakeDaemon(FakeGuest(name, 10, "10-1"))))
    shown = name.encode(errors="replace").decode()
    assert found[of("size_bytes", shown, 10)] == GIB


def test_openmetrics_on_request() -> None:
    body, content_type = exposition(create_registry(two_guests().status), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = list(parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]
    assert any(family.name == "tierd_guest_faults" for family in families)


def test_promtool_finds_nothing() -> None:
    promtool = shutil.which("promtool")
    need("promtool", promtool is not None, "promtool is missing: apt-get install --no-install-recommends prometheus")
    assert promtool is not None
    ran = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(two_guests()), capture_output=True, text=True, timeout=60
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
