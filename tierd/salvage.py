# SPDX-License-Identifier: Apache-2.0
"""`tierd detach --pid`: a guest whose tierd is gone for good is put right, without a daemon.

What the daemon does to adopt a guest and to leave it, in one go: its faults are served meanwhile, every page is brought back,
and its VMM is as if tierd had never been there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from tierd.attach.preflight import swap_can_receive
from tierd.attach.procfs import boot_id, start_ticks
from tierd.config import with_seconds
from tierd.engine import choose
from tierd.load import load
from tierd.native import STATES
from tierd.parking import Parking, Turns
from tierd.restore import restore_all
from tierd.serve import SUFFIX, Served, StateError, adopt, lock_runtime_dir, memory_available_bytes, prepare_runtime_dir
from tierd.store import Store
from tierd.stores import open_asked
from tierd.threads import in_thread
from tierd.view import Progress

STORED, LOST = STATES.index("stored"), STATES.index("lost")


def put_right(config_path: Path, runtime_dir: Path, pid: int, progress: Progress) -> int:
    """Bytes that were brought back. Blocks for as long as that takes. The configuration is read only where the guest has
    tiers that are asked. AlreadyRunning: a daemon serves this directory, ask it. ConfigErrors, StateError, Stale, StoreError,
    EngineUnavailable, OSError: why it cannot be done; whatever is still stored stays so, and the next tierd serves it."""
    guests_dir = prepare_runtime_dir(runtime_dir)
    lock = lock_runtime_dir(runtime_dir)
    try:
        key = f"{pid}-{start_ticks(pid)}"
        path = guests_dir / f"{key}{SUFFIX}"
        if not path.exists():
            raise StateError(
                f"there is no page table of process {pid} in {guests_dir}: no tierd serves it, or served it last"
            )
        with adopt(path, engine=choose(), swap_can_receive=swap_can_receive(pid), boot_id=boot_id()) as served:
            _must_fit(served)
            return trio.run(_put_right, served, key, config_path, runtime_dir, progress)
    finally:
        os.close(lock)


def _must_fit(served: Served) -> None:
    total = served.native.counters()["state_pages"][STORED] * served.page_bytes
    if total > (available := memory_available_bytes(served.page_bytes)):
        raise StateError(
            f"bringing back {total >> 20} MiB of process {served.spec.pid} does not fit into the {available >> 20} MiB of memory "
            "that the host has left; free memory on the host"
        )


async def _put_right(served: Served, key: str, config_path: Path, runtime_dir: Path, progress: Progress) -> int:
    if not served.native.asked_tiers:
        return await _bring_back_and_leave(served, None, progress)
    restored, failure = 0, None
    async with _asked_stores(served, config_path, runtime_dir) as stores:
        turns: dict[str, Turns] = {}
        parking = Parking(served, key, stores, lambda store: turns.setdefault(store.name, Turns(store.concurrency)))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(parking.run)
                try:
                    restored = await _bring_back_and_leave(served, parking, progress)
                except BaseException as error:
                    failure = error  # by itself, and not as one of a nursery's
                nursery.cancel_scope.cancel()
        finally:
            await parking.close(delete=not served.state_path.exists())  # else they are the next tierd's
    if failure is not None:
        raise failure
    return restored


async def _bring_back_and_leave(served: Served, parking: Parking | None, progress: Progress) -> int:
    pid = served.spec.pid
    restored = await restore_all(served, parking, in_thread, progress)
    lost = served.native.counters()["state_pages"][LOST]
    if lost:
        raise StateError(
            f"{lost} pages of process {pid} are lost: without tierd they would read as zeros; repair "
            "the store, start tierd and `tierd retry`, or end the VM"
        )
    if not await in_thread(served.leave):
        raise StateError(
            f"every page of process {pid} is back; what we kept in it stays, which hurts nobody: it could not be entered"
        )
    return restored


@contextlib.asynccontextmanager
async def _asked_stores(served: Served, config_path: Path, runtime_dir: Path) -> AsyncIterator[dict[str, Store]]:
    """Those that its pages may be in, opened as the daemon opens them."""
    config = await in_thread(load, config_path)
    names = {tier.name for tier in served.tiers.values() if tier.number in served.native.asked_tiers}
    stores: dict[str, Store] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name in sorted(with_seconds(config, names) & config.asked.keys()):
            store = await open_asked(name, config.asked[name], runtime_dir, needed=True)
            stack.push_async_callback(store.pages.aclose)
            stores[name] = store
        yield stores
