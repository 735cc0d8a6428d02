# SPDX-License-Identifier: Apache-2.0
"""Every page of a guest, back from wherever it is: before its VMM is left, by the daemon or by `tierd detach --pid`."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import trio

from tierd import cycle
from tierd.native import STATES
from tierd.serve import Served
from tierd.view import Progress

if TYPE_CHECKING:
    from tierd.parking import Parking  # it imports what only stores need that are asked

STEP_BYTES = 16 << 20
PAUSE_S = 0.005  # between looks at what is asked of stores
STORED = STATES.index("stored")
InWorker = Callable[..., Awaitable[Any]]  # a function of the guest's, and its arguments, in a thread


async def restore_all(served: Served, parking: Parking | None, in_worker: InWorker, progress: Progress) -> int:
    """Bytes that were brought back: all that is stored, in steps, until nothing is left (a fault thread may give a page back
    meanwhile). Trio; the guest's worker is ours. OSError: some cannot be read, or not be asked for now; they stay stored."""
    stored_pages = served.native.counters()["state_pages"][STORED]
    total, done = stored_pages * served.page_bytes, 0
    step_pages = STEP_BYTES // served.page_bytes
    while stored_pages:
        page = 0
        while page < served.native.pages:
            asked_from = page
            page, restored = await in_worker(served.native.restore, page, step_pages)
            if page == asked_from:  # as much is asked for as can be
                await _pause(parking)
            done += restored * served.page_bytes
            progress(min(done, total), total)
            if served.native.anonymous:
                await in_worker(cycle.unstage, served.native, trio.from_thread.check_cancelled)
        await answered(served, parking)
        before, stored_pages = stored_pages, served.native.counters()["state_pages"][STORED]
        done = max(done, total - stored_pages * served.page_bytes)
        if stored_pages >= before and served.native.asked_tiers and step_pages > 1:
            step_pages = 1  # each alone: one that cannot be read must not keep its neighbours
        elif stored_pages >= before:
            raise OSError(
                errno.EIO,
                f"{stored_pages} pages of guest {served.spec.name} (process {served.spec.pid}) cannot be read from the store: "
                "see to it (tierd's log has its errors), and try again",
            )
    return done


async def answered(served: Served, parking: Parking | None) -> None:
    """Until all that is asked for has come, or could not be read. OSError: it cannot be asked for now."""
    while served.native.health(0).asked_pages:
        await _pause(parking)


async def _pause(parking: Parking | None) -> None:
    assert parking is not None
    parking.must_bring()  # we have the worker, and who ends the guest waits for us
    await trio.sleep(PAUSE_S)
