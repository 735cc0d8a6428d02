# SPDX-License-Identifier: Apache-2.0
"""What to evict: (Policy, Sample) -> Decision. Pure: no clock, no log, no await."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tierd.config import AGE_S_MAX, Policy

# Round figures, the same for every guest, so that a dashboard can add guests up; at most a factor of two apart where
# cut-offs are chosen.
_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0
_LADDER_S = (
    *(0.0, 1.0, 3.0, 10.0, 30.0, _MINUTE, 2 * _MINUTE, 3 * _MINUTE, 5 * _MINUTE, 8 * _MINUTE, 10 * _MINUTE),
    *(15 * _MINUTE, 30 * _MINUTE, 45 * _MINUTE, _HOUR, 1.5 * _HOUR, 2 * _HOUR, 4 * _HOUR, 6 * _HOUR, 12 * _HOUR),
    *(18 * _HOUR, _DAY, 2 * _DAY, 3 * _DAY, AGE_S_MAX),
)


@dataclass(frozen=True)
class Sample:
    """A guest at the end of a scan. Bytes; `idle` holds (idle at least this many s and less than the next, bytes)."""

    resident_bytes: int
    stored_bytes: int
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
    return tuple(sorted({*_LADDER_S, policy.min_idle_s, policy.cold_s}))


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
    yield sample.store_free_bytes, "the store is full" if sample.store_free_bytes <= 0 else "as much as the store takes"
    if policy.evict_rate_max is not None:
        yield int(policy.evict_rate_max * sample.elapsed_s), "as much as evict_rate_max allows"


def _cut_off_s(policy: Policy, sample: Sample, wanted: int) -> float:
    """The greatest idle time with enough pages for `wanted` bytes. Never below the floor."""
    found, cut_off_s = 0, max((edge for edge, _ in sample.idle), default=policy.cold_s)
    for edge, size in sorted(sample.idle, reverse=True):
        if found >= wanted or edge < policy.min_idle_s:
            break
        found += size
        cut_off_s = edge
    return max(cut_off_s, policy.min_idle_s) if wanted else policy.cold_s


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.4g} MiB"
