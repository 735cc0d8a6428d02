# SPDX-License-Identifier: Apache-2.0
"""What the API, the metrics and the CLI see of the daemon: snapshots, and the verbs an operator has.

Nothing here imports more than the standard library: the daemon serves faults before it imports what only the API needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

State = Literal["attaching", "active", "paused", "refused", "restoring", "detaching"]
STATES: tuple[State, ...] = get_args(State)

# (done_bytes, total_bytes) of a long operation. Call it from any thread, as often as you like: only the last one counts
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TierStatus:
    """One tier of a guest: pages that are out of its memory, by the store that has them."""

    name: str
    stored_bytes: int  # of guest memory
    used_bytes: int  # what the store has spent for it: of `memory`, what is left of it after compression
    healthy: bool
    counters: Mapping[str, Any]  # struct tierd_tier_counters by field


@dataclass(frozen=True)
class GuestStatus:
    """One guest, at one moment. `reason` is empty, or one line for the operator about why `state` is what it is."""

    name: str
    pid: int
    key: str  # "PID-STARTTICKS": unique on this host until it reboots
    state: State
    engine: str
    reason: str = ""
    page_bytes: int = 0  # of the guest's memory: the system's, or of hugetlbfs
    total_bytes: int = 0
    resident_bytes: int = 0  # blocks that the guest's memory files occupy
    staged_bytes: int = 0  # of anonymous memory: with the host still, waiting for somebody to read it
    stored_bytes: Mapping[str, int] = field(default_factory=dict)  # by tier; tier "zero" needs no store
    tiers: Sequence[TierStatus] = ()  # in the order in which pages sink
    hole_bytes: int = 0  # never used by the guest
    idle: Sequence[tuple[float, int]] = ()  # (idle at least this many seconds and less than the next, bytes), ascending
    counters: Mapping[str, Any] = field(default_factory=dict)  # struct tierd_counters by field; empty until attached
    errors: Mapping[str, int] = field(default_factory=dict)  # by kind, beyond those in `counters`
    phase_s: Mapping[str, float] = field(default_factory=dict)  # seconds spent in each phase of the cycles so far
    cycles: int = 0
    policy: Mapping[str, Any] = field(default_factory=dict)  # as JSON would have it


@dataclass(frozen=True)
class StoreStatus:
    """One store. `reason` says what is wrong while it is not `healthy`: while pages do not come or go."""

    name: str
    path: str
    capacity_bytes: int
    used_bytes: int
    healthy: bool = True
    reason: str = ""
    trouble: str = ""  # what is wrong though they do: rubbish that cannot be removed, say


@dataclass(frozen=True)
class DaemonStatus:
    """The whole daemon, at one moment."""

    version: str
    engine: str
    pid: int
    uptime_s: float
    guests: Sequence[GuestStatus] = ()
    stores: Sequence[StoreStatus] = ()
    unserved: Sequence[str] = ()  # page tables of VMs that nobody serves: these wait where they touch a stored page
    reload_failed: bool = False  # the configuration was refused the last time, and the old one is in force
    engine_notes: Sequence[str] = ()  # what it is, why no other, what becomes of NUMA balancing; for people


class RequestRefused(Exception):
    """What was asked for cannot be done now. The texts are for the operator; nothing has changed."""

    def __init__(self, error: str, remedy: str = "") -> None:
        super().__init__(error)
        self.remedy = remedy


class GuestView(Protocol):
    """A guest that tierd serves or tries to. Every method runs in the trio thread and may raise RequestRefused (wrong
    state) or OSError. Cancelled, it leaves a guest that is served as before."""

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int: ...
    @property
    def key(self) -> str: ...

    def status(self) -> GuestStatus:
        """A snapshot; does not block (0.1 ms per GiB of guest)."""
        ...

    async def pause(self) -> None:
        """No more evictions until `resume`; faults are served. Already paused: nothing happens."""
        ...

    async def resume(self) -> None: ...

    async def evict(self, max_bytes: int | None, min_idle_s: float | None) -> int:
        """Evict now, whatever the policy's target; its `min_idle_s` is a floor. Bytes evicted."""
        ...

    async def restore(self, progress: Progress) -> int:
        """Bring every page back, and pause. Bytes restored."""
        ...

    async def retry(self) -> tuple[int, int]:
        """Read again what could not be read, after a repair of the store. Bytes: recovered, still lost."""
        ...


class DaemonView(Protocol):
    """The daemon's verbs. All run in the trio thread."""

    @property
    def guests(self) -> Mapping[str, GuestView]:
        """By key."""
        ...

    def status(self) -> DaemonStatus: ...

    async def attach(self, pid: int, name: str | None) -> GuestView:
        """Preflight and attach; returns once the guest is served. Raises attach.Refused, or ProcessLookupError."""
        ...

    async def detach(self, key: str, progress: Progress) -> None:
        """Restore, then leave the VMM as if tierd had never been there; not picked up again by itself."""
        ...

    async def reload(self) -> Sequence[str]:
        """Read the configuration again: whole, or ConfigErrors and nothing. What changed, one line each."""
        ...
