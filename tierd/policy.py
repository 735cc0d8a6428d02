# SPDX-License-Identifier: Apache-2.0
"""What to evict: (Policy, Sample) -> Decision. Pure: no clock, no log, no await."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tierd.config import AGE_S_MAX, Policy, Tier

# Round figures, the same for every guest, so that a dashboard can add guests up; at most a factor of two apart where
# cut-offs are chosen.
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_LADDER_S = (
    *(0.0, 1.0, 3.0, 10.0, 30.0, _MINUTE, 2 * _MINUTE, 3 * _MINUTE, 5 * _MINUTE, 8 * _MINUTE, 10 * _MINUTE),
    *(15 * _MINUTE, 30 * _MINUTE, 45 * _MINUTE, _HOUR, 1.5 * _HOUR, 2 * _HOUR, 4 * _HOUR, 6 * _HOUR, 12 * _HOUR),
    *(18 * _HOUR, _DAY, 2 * _DAY, 3 * _DAY, AGE_S_MAX),
)


# a tier that is fuller than this is brought down to that
HIGH_WATER, LOW_WATER = 0.9, 0.8


@dataclass(frozen=True)
class Sample:
    """A guest at the end of a scan. Bytes; `idle` holds (idle at least this many s and less than the next, bytes)."""

    resident_bytes: int
    stored_bytes: int  # of guest memory, in all tiers
    store_free_bytes: int
    idle: tuple[tuple[float, int], ...]
    elapsed_s: float  # since the last decision


@dataclass(frozen=True)
class Decision:
    """Evict at most `evict_bytes_max` of what is idle at least `min_idle_s`. The reason is for people."""

    min_idle_s: float
    evict_bytes_max: int
    reason: str


def idle_edges(policy: Policy) -> tuple[float, ...]:
    """Edges of the age histogram that `decide` wants, in seconds, ascending from 0: the floor, the cold age, and a
    ladder below, between and beyond them, so that a cut-off close to "the oldest first" can be chosen."""
    ages = {tier.min_age_s for tier in policy.tiers if tier.min_age_s is not None}
    return tuple(sorted({*_LADDER_S, policy.min_idle_s, policy.cold_s, *ages}))


def clamp_min_idle(policy: Policy, wanted_s: float | None) -> float:
    """The idle time that an operator's eviction uses: what was asked for, but never below the safety floor."""
    return max(policy.min_idle_s, wanted_s if wanted_s is not None else 0.0)


def decide(policy: Policy, sample: Sample) -> Decision:
    """Cold pages go; above `resident_max` the oldest go although they are not cold; below `resident_min` none goes.
    Nothing younger than `min_idle_s` ever goes. Where a limit leaves only a part of it, the oldest part goes."""
    cold_s = policy.cold_s
    if not policy.enabled:
        return Decision(cold_s, 0, "disabled by the policy")
    wanted, reason = _wanted(policy, sample)
    for limit, text in _limits(policy, sample):
        if wanted > max(limit, 0):
            wanted, reason = max(limit, 0), text
    min_idle_s = _cut_off_s(policy, sample, wanted)
    if policy.dry_run:
        return Decision(min_idle_s, 0, f"dry run: would evict {_mib(wanted)} ({reason})")
    return Decision(min_idle_s, wanted, reason)


def _wanted(policy: Policy, sample: Sample) -> tuple[int, str]:
    """Bytes that the policy would have out of the guest, limits aside, and why."""
    over = sample.resident_bytes - policy.resident_max if policy.resident_max is not None else 0
    cold = sum(size for edge, size in sample.idle if edge >= policy.cold_s)
    if over <= cold:
        return cold, f"untouched for {policy.cold_s:g} s" if cold else f"nothing is untouched for {policy.cold_s:g} s"
    safe = sum(size for edge, size in sample.idle if edge >= policy.min_idle_s)
    reason = f"{_mib(over)} above resident_max"
    if safe < over:
        reason += f", but only {_mib(safe)} untouched for min_idle_s, {policy.min_idle_s:g} s"
    return min(over, safe), reason


def _limits(policy: Policy, sample: Sample) -> Iterable[tuple[int, str]]:
    """Bytes, and why no more than these."""
    yield sample.resident_bytes - policy.resident_min, "down to resident_min"
    if policy.stored_max is not None:
        yield policy.stored_max - sample.stored_bytes, "up to stored_max"
    yield sample.store_free_bytes, "the store is full" if sample.store_free_bytes <= 0 else "as much as the store takes"
    if policy.evict_rate_max is not None:
        yield int(policy.evict_rate_max * sample.elapsed_s), "as much as evict_rate_max allows"


def _cut_off_s(policy: Policy, sample: Sample, wanted: int) -> float:
    """The greatest idle time with enough pages for `wanted` bytes. Never below the floor."""
    return _oldest(sample.idle, wanted, policy.min_idle_s)[1] if wanted else policy.cold_s


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.4g} MiB"


# --- from tier to tier ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierSample:
    """One tier of a guest, seen for demotion. Bytes; `used` is what the store has spent for `stored_bytes` of guest memory."""

    stored_bytes: int
    used_bytes: int
    capacity_bytes: int  # what it may use
    store_used_bytes: int  # of all guests
    store_free_bytes: int
    idle: tuple[tuple[float, int], ...]  # (idle at least this many s and less than the next, bytes of guest memory)
    elapsed_s: float


@dataclass(frozen=True)
class Demotion:
    """Move at most `bytes_max` of guest memory that is idle at least `min_idle_s` to the tiers below."""

    min_idle_s: float
    bytes_max: int


def tiers_for(policy: Policy, min_idle_s: float) -> tuple[Tier, ...]:
    """Those that take pages that are idle for so long, in their order."""
    return tuple(tier for tier in policy.tiers if tier.min_age_s is None or tier.min_age_s <= min_idle_s)


def classes(policy: Policy, min_idle_s: float) -> tuple[float, ...]:
    """Ages in which to evict what is idle at least `min_idle_s`, the oldest first: each time, pages may go to the tiers that take
    pages of that age."""
    ages = {tier.min_age_s for tier in policy.tiers if tier.min_age_s is not None and tier.min_age_s > min_idle_s}
    return (*sorted(ages, reverse=True), min_idle_s)


def sink(policy: Policy, below: Tier, sample: TierSample) -> Demotion:
    """What of a tier goes down to `below`: everything that is old enough for it, where it says how old; and above the high-water
    mark, the guest's own or that of all guests, the oldest, down to the low one, but nothing that is too young for it."""
    floor_s = below.min_age_s or 0.0
    aged = sum(size for edge, size in sample.idle if edge >= floor_s) if below.min_age_s is not None else 0
    store_bytes = sample.store_used_bytes + sample.store_free_bytes
    share = max(_too_much(sample.used_bytes, sample.capacity_bytes), _too_much(sample.store_used_bytes, store_bytes))
    wanted, cut_off_s = _oldest(sample.idle, max(aged, int(share * sample.stored_bytes)), floor_s)
    if policy.demote_rate_max is not None:
        wanted = min(wanted, int(policy.demote_rate_max * sample.elapsed_s))
    return Demotion(cut_off_s, wanted)


def _too_much(used: int, capacity: int) -> float:
    """Above the high-water mark: the share of what is used that is above the low one."""
    return 1 - LOW_WATER * capacity / used if used > HIGH_WATER * capacity else 0.0


def _oldest(idle: Iterable[tuple[float, int]], wanted: int, floor_s: float) -> tuple[int, float]:
    """How much of `wanted` there is that is no younger than the floor, and the idle time from which on it is."""
    found, cut_off_s = 0, floor_s
    for edge, size in sorted(idle, reverse=True):
        if found >= wanted or edge < floor_s:
            break
        found += size
        cut_off_s = edge
    return min(found, wanted), cut_off_s
