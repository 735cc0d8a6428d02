# SPDX-License-Identifier: Apache-2.0
"""What to evict: (Policy, Sample) -> Decision. Pure: no clock, no log, no await."""

from __future__ import annotations

from dataclasses import dataclass

from tierd.config import Policy

EDGES = 24
EDGE_MAX_S = 6 * 86400.0


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
    geometric ladder between and beyond them, so that a cut-off close to "the oldest first" can be chosen."""
    first = max(policy.interval_s, 0.1)
    ratio = (EDGE_MAX_S / first) ** (1 / (EDGES - 1))
    ladder = {round(first * ratio**i, 3) for i in range(EDGES)}
    return tuple(sorted({0.0, policy.min_idle_s, policy.cold_s} | ladder))


def clamp_min_idle(policy: Policy, wanted_s: float | None) -> float:
    """The idle time that an operator's eviction uses: what was asked for, but never below the safety floor."""
    return max(policy.min_idle_s, wanted_s if wanted_s is not None else 0.0)


def decide(policy: Policy, sample: Sample) -> Decision:
    """Cold pages go; above `resident_max` the oldest go although they are not cold; below `resident_min` none goes.
    Nothing younger than `min_idle_s` ever goes."""
    cold_s = policy.cold_s
    if not policy.enabled:
        return Decision(cold_s, 0, "disabled by the policy")
    over = sample.resident_bytes - policy.resident_max if policy.resident_max is not None else 0
    cold = sum(size for edge, size in sample.idle if edge >= cold_s)
    min_idle_s, wanted, reason = cold_s, cold, f"idle for {cold_s:g} s"
    if over > cold:
        min_idle_s, wanted = _oldest(policy, sample, over)
        reason = f"resident is {over} bytes above resident_max: idle for {min_idle_s:g} s"
    limits = {
        "resident_min is reached": sample.resident_bytes - policy.resident_min,
        "the store is full": sample.store_free_bytes,
    }
    if policy.evict_rate_max is not None:
        limits["evict_rate_max is reached"] = int(policy.evict_rate_max * sample.elapsed_s)
    for text, limit in limits.items():
        if wanted > max(limit, 0):
            wanted, reason = max(limit, 0), text
    if policy.dry_run:
        return Decision(min_idle_s, 0, f"dry run: would evict {wanted} bytes ({reason})")
    return Decision(min_idle_s, wanted, reason if wanted else "nothing to evict" if reason.startswith("idle") else reason)


def _oldest(policy: Policy, sample: Sample, wanted: int) -> tuple[float, int]:
    """The greatest idle time whose pages suffice for `wanted` bytes, not below the floor; and how many to take."""
    found = 0
    cut_off = max(policy.cold_s, policy.min_idle_s)
    for edge, size in sorted(sample.idle, reverse=True):
        if edge < policy.min_idle_s:
            break
        found += size
        cut_off = edge
        if found >= wanted:
            break
    return cut_off, min(found, wanted)
