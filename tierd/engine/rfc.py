# SPDX-License-Identifier: Apache-2.0
"""Engine `rfc`: the interface of the series of April 2026 (UFFDIO_DEACTIVATE).

Deactivation unmaps, a re-access is a minor fault that the kernel resolves by itself (async mode), the scan sees who is mapped
again. While pages leave, the context is in sync mode and the pages are write-protected, too: SET_MODE does not wait for faults
that have seen async mode, but such a fault finds the protection's marker. Anonymous memory stays mapped, without access, and
leaves by way of a staging area, without a sync mode.
"""

from __future__ import annotations

from tierd.engine import FEATURE_MOVE, EngineUnavailable, trial_failed
from tierd.native import EngineNumber, Probe, Zap

# UFFD_FEATURE_MINOR_ANON, UFFD_FEATURE_MINOR_ASYNC, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MINOR_HUGETLBFS
_FEATURES = 1 << 17 | 1 << 18 | 1 << 10 | 1 << 9


class RfcEngine:
    name = "rfc"
    number = EngineNumber.RFC
    features = _FEATURES
    anonymous_features = FEATURE_MOVE
    sees_reads = True
    holds_reads = True
    use_pagemap = False

    def __init__(self, found: Probe, tried: bool = True) -> None:
        """EngineUnavailable when the trial failed, unless it need not have been `tried`."""
        if tried and found.rfc:
            raise EngineUnavailable(trial_failed("rfc", found.rfc, found.rfc_step))
        self.found = found

    @property
    def backings(self) -> frozenset[str]:
        movable = not (self.found.anonymous or self.found.rfc_anonymous)
        return frozenset({"shmem", "hugetlbfs", "anonymous"} if movable else {"shmem", "hugetlbfs"})

    def zap(self, inside: bool) -> Zap:
        return Zap.USERFAULTFD
