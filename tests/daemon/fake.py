# SPDX-License-Identifier: Apache-2.0
"""A small daemon without guests of flesh: what the API, the metrics and the CLI are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from tierd.native import STATES
from tierd.view import DaemonStatus, GuestStatus, Progress, RequestRefused, State, StoreStatus, TierStatus

GIB = 1 << 30
PAGE_BYTES = 4096


def counters(**given: int | tuple[int, ...]) -> dict[str, Any]:
    """Every field of struct tierd_counters that the outside reads."""
    names = (
        "faults_fetch faults_staged pages_staged pages_refaulted pages_unmovable inject_stopped_ns faults_zero faults_cancel "
        "faults_resolve faults_wait faults_failed pages_evicted pages_cancelled "
        "pages_fetched pages_evicted_zero pages_lost inject_stops store_read_errors store_write_errors checksum_errors "
        "kernel_errors latency_count latency_sum_ns parked_pages fault_threads faults_window window_sum_ns "
        "large_folios_split pages_unwritten pages_demoted pages_refused"
    )
    return {
        **dict.fromkeys(names.split(), 0),
        "latency_buckets": (0,) * 40,
        "window_buckets": (0,) * 40,
        "stop_buckets": (0,) * 40,
        "state_pages": (0,) * len(STATES),
        **given,
    }


def tier_counters(**changes: Any) -> dict[str, Any]:
    """struct tierd_tier_counters: 3 reads of 8 to 16 us."""
    names = ("used_bytes", "metadata_bytes", "compressed_bytes", "written_pages", "read_pages")
    names += ("refused_pages", "write_errors", "read_errors", "checksum_errors", "read_sum_ns")
    buckets = tuple(3 if i == 14 else 0 for i in range(40))
    return dict.fromkeys(names, 1) | {"read_buckets": buckets} | changes


@dataclass
class FakeGuest:
    name: str
    pid: int
    key: str
    state: State = "active"
    stored_bytes: int = GIB // 4
    counters: dict[str, Any] = field(default_factory=counters)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    go_on: trio.Event = field(default_factory=trio.Event)  # a restore stops half-way until this is set
    fails: Exception | None = None

    def status(self) -> GuestStatus:
        return GuestStatus(
            name=self.name,
            pid=self.pid,
            key=self.key,
            state=self.state,
            engine="stock",
            page_bytes=PAGE_BYTES,
            total_bytes=GIB,
            resident_bytes=GIB // 2,
            stored_bytes={"zero": 0, "file": self.stored_bytes},
            tiers=[
                TierStatus("memory", 0, 4096, True, tier_counters(compressed_bytes=0)),
                TierStatus("file", self.stored_bytes, self.stored_bytes, True, tier_counters()),
            ],
            hole_bytes=GIB // 4,
            idle=((0.0, GIB // 4), (120.0, GIB // 4)),
            counters=self.counters,
            phase_s={"scan": 0.5, "write": 1.25},
            cycles=7,
            policy={"min_idle_s": 120.0},
        )

    async def pause(self) -> None:
        self.state = "paused"

    async def resume(self) -> None:
        self.state = "active"

    async def evict(self, max_bytes: int | None, min_idle_s: float | None) -> int:
        if self.fails:
            raise self.fails
        self.calls.append(("evict", max_bytes, min_idle_s))
        self.counters = {**self.counters, "pages_evicted": self.counters["pages_evicted"] + 256}
        return 256 * PAGE_BYTES

    async def restore(self, progress: Progress) -> int:
        if self.fails:
            raise self.fails
        self.calls.append(("restore",))
        progress(self.stored_bytes // 2, self.stored_bytes)
        await self.go_on.wait()
        progress(self.stored_bytes, self.stored_bytes)
        done, self.stored_bytes = self.stored_bytes, 0
        return done

    async def retry(self) -> tuple[int, int]:
        self.calls.append(("retry",))
        return 2 * PAGE_BYTES, PAGE_BYTES


class FakeDaemon:
    def __init__(self, *guests: FakeGuest) -> None:
        self.guests: Mapping[str, FakeGuest] = {guest.key: guest for guest in guests}
        self.refused: tuple[GuestStatus, ...] = ()
        self.reload_fails: Exception | None = None
        self.store = StoreStatus("file", "/var/lib/tierd", 10 * GIB, GIB)

    def status(self) -> DaemonStatus:
        guests = (*(guest.status() for guest in self.guests.values()), *self.refused)
        return DaemonStatus("0.1.0", "stock", 1, 60.0, guests, (self.store,))

    async def attach(self, pid: int, name: str | None) -> FakeGuest:
        if pid == 404:
            raise ProcessLookupError(3, "No such process")
        if any(guest.pid == pid for guest in self.guests.values()):
            raise RequestRefused(f"process {pid} is a guest already", "see `tierd status`")
        guest = FakeGuest(name or f"guest-{pid}", pid, f"{pid}-1")
        self.guests = {**self.guests, guest.key: guest}
        return guest

    async def detach(self, key: str, progress: Progress) -> None:
        await self.guests[key].restore(progress)
        self.guests = {k: guest for k, guest in self.guests.items() if k != key}

    async def reload(self) -> Sequence[str]:
        if self.reload_fails:
            raise self.reload_fails
        return ["defaults.interval_s: 10 -> 20"]

    def refuse(self, reason: str) -> None:
        template = FakeGuest("nested", 99, "99-1").status()
        self.refused = (replace(template, state="refused", reason=reason, counters={}),)
