# SPDX-License-Identifier: Apache-2.0
"""`tierd detach --pid`: a guest whose tierd is gone for good is put right, without a daemon.

What the daemon does to adopt a guest and to leave it, in one go: its faults are served meanwhile, every page is brought back,
and its VMM is as if tierd had never been there.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tierd import cycle
from tierd.attach.preflight import swap_can_receive
from tierd.attach.procfs import boot_id, start_ticks
from tierd.engine import choose
from tierd.native import STATES
from tierd.serve import SUFFIX, Served, StateError, adopt, lock_runtime_dir, memory_available_bytes, prepare_runtime_dir
from tierd.view import Progress

STEP_BYTES = 16 << 20
STORED, LOST = STATES.index("stored"), STATES.index("lost")


def put_right(runtime_dir: Path, pid: int, progress: Progress) -> int:
    """Bytes that were brought back. Blocks for as long as that takes. AlreadyRunning: a daemon serves this directory, ask it.
    StateError, Stale, StoreError, EngineUnavailable, OSError: why it cannot be done; whatever is still stored stays so, and the
    next tierd serves it."""
    guests_dir = prepare_runtime_dir(runtime_dir)
    lock = lock_runtime_dir(runtime_dir)
    try:
        path = guests_dir / f"{pid}-{start_ticks(pid)}{SUFFIX}"
        if not path.exists():
            raise StateError(
                f"there is no page table of process {pid} in {guests_dir}: no tierd serves it, or served it last"
            )
        with adopt(path, engine=choose(), swap_can_receive=swap_can_receive(pid), boot_id=boot_id()) as served:
            restored = _bring_back(served, progress)
            if not served.leave():
                raise StateError(
                    f"every page of process {pid} is back; what we kept in it stays: it could not be entered"
                )
        return restored
    finally:
        os.close(lock)


def _must_be_ours_to_read(served: Served) -> None:
    """Stores that trio asks are a daemon's to ask."""
    pages = served.native.counters()["tier_pages"]
    for tier in served.tiers.values():
        if tier.number in served.native.asked_tiers and pages[tier.number]:
            raise StateError(
                f"{pages[tier.number]} pages of process {served.spec.pid} are in the store {tier.name}, which only a daemon "
                "asks: start tierd, then `tierd detach` the guest"
            )


def _bring_back(served: Served, progress: Progress) -> int:
    _must_be_ours_to_read(served)
    stored_pages = served.native.counters()["state_pages"][STORED]
    total, done = stored_pages * served.page_bytes, 0
    if total > (available := memory_available_bytes(served.page_bytes)):
        raise StateError(
            f"bringing back {total >> 20} MiB of process {served.spec.pid} does not fit into the {available >> 20} MiB of memory "
            "that the host has left; free memory on the host"
        )
    while stored_pages:
        page = 0
        while page < served.native.pages:
            page, restored = served.native.restore(page, STEP_BYTES // served.page_bytes)
            done += restored * served.page_bytes
            progress(min(done, total), total)
            if served.native.anonymous:
                cycle.unstage(served.native, lambda: None)
        before, stored_pages = stored_pages, served.native.counters()["state_pages"][STORED]
        if stored_pages >= before:
            raise OSError(errno.EIO, f"{stored_pages} pages of process {served.spec.pid} cannot be read from the store")
    lost = served.native.counters()["state_pages"][LOST]
    if lost:
        raise StateError(
            f"{lost} pages of process {served.spec.pid} are lost: without tierd they would read as zeros; repair "
            "the store, start tierd and `tierd retry`, or end the VM"
        )
    return done
