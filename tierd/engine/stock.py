# SPDX-License-Identifier: Apache-2.0
"""Engine `stock`: any kernel from 5.19 on, shared (memfd, tmpfs) guest memory; from 6.8 on private anonymous memory, too.

Deactivation unmaps (the page cache keeps the bytes), a re-access is an ordinary minor fault, the scan sees who is mapped
again, write-protection holds writers, and a punched page comes back as a MISSING fault. Of anonymous memory only writes are
seen; what is not written waits in a staging area for somebody to read it (stage.c).
"""

from __future__ import annotations

import os

from tierd.engine import FEATURE_MOVE, FEATURE_WP_ASYNC, EngineUnavailable
from tierd.native import EngineNumber, Probe, Zap

IDLE_BITMAP = "/sys/kernel/mm/page_idle/bitmap"


def open_idle_bitmap() -> int:
    """Idle page tracking, which sees readers of anonymous memory before it is moved; -1: the kernel has none (it needs
    CONFIG_IDLE_PAGE_TRACKING), or we may not use it. Where page frames are is shown with CAP_SYS_ADMIN only; without, it says
    nothing."""
    try:
        return os.open(IDLE_BITMAP, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


# trial -> what to tell the operator when it fails
_NEEDED = {
    "userfaultfd": "userfaultfd for kernel faults (run as root or with CAP_SYS_PTRACE; CONFIG_USERFAULTFD=y)",
    "write_protect": "userfaultfd write-protection of shared memory (Linux 5.19 or newer)",
    "missing": "userfaultfd MISSING faults on shared memory",
}


class StockEngine:
    name = "stock"
    number = EngineNumber.STOCK
    features = 0
    anonymous_features = FEATURE_WP_ASYNC | FEATURE_MOVE
    sees_reads = True
    holds_reads = False

    def __init__(self, found: Probe, tried: bool = True) -> None:
        """EngineUnavailable when a trial that this engine needs failed, unless it need not have been `tried`."""
        for trial, needs in _NEEDED.items():
            error = getattr(found, trial)
            if tried and error:
                raise EngineUnavailable(f"the stock engine needs {needs}; the trial said: {os.strerror(error)}")
        self.found = found

    @property
    def backings(self) -> frozenset[str]:
        # /proc/PID/pagemap does not show a hold's marker of a huge page
        kinds = {"shmem"} if self.use_pagemap else {"shmem", "hugetlbfs"}
        return frozenset(kinds if self.found.anonymous else {*kinds, "anonymous"})

    @property
    def use_pagemap(self) -> bool:
        return self.found.pagemap_scan != 0

    def zap(self, inside: bool) -> Zap:
        """MADV_PAGEOUT from outside; or inside the VMM, at the price of ptrace stops."""
        return Zap.INJECT if inside or self.found.pageout else Zap.PAGEOUT
