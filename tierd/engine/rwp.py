# SPDX-License-Identifier: Apache-2.0
"""Engine `rwp`: Linux 7.3 and newer (userfaultfd read-write protection).

Deactivation protects a page where it is mapped; an access lifts the protection by itself (async mode), and the scan lists the
pages that lost it. While pages leave, the context is in sync mode: any access to a page that is still protected waits. Anonymous
memory leaves by way of a staging area, without a sync mode.
"""

from __future__ import annotations

from tierd.engine import FEATURE_MOVE, EngineUnavailable, trial_failed
from tierd.native import EngineNumber, Probe, Zap

# UFFD_FEATURE_RWP, UFFD_FEATURE_RWP_ASYNC, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MINOR_HUGETLBFS
_FEATURES = 1 << 17 | 1 << 18 | 1 << 10 | 1 << 9


class RwpEngine:
    name = "rwp"
    number = EngineNumber.RWP
    features = _FEATURES
    anonymous_features = FEATURE_MOVE
    sees_reads = True
    holds_reads = True
    use_pagemap = False

    def __init__(self, found: Probe, tried: bool = True) -> None:
        """EngineUnavailable when the trial failed, unless it need not have been `tried`."""
        if tried and found.rwp:
            raise EngineUnavailable(trial_failed("rwp", found.rwp, found.rwp_step))
        self.found = found

    @property
    def backings(self) -> frozenset[str]:
        movable = not (self.found.anonymous or self.found.rwp_anonymous)
        return frozenset({"shmem", "hugetlbfs", "anonymous"} if movable else {"shmem", "hugetlbfs"})

    def zap(self, inside: bool) -> Zap:
        return Zap.USERFAULTFD
