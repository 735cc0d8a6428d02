# SPDX-License-Identifier: Apache-2.0
"""A worker's tier that is asked: a directory that misbehaves as its other stores do, and Parking in a thread of its own.

Imported where there is such a tier, and then after the adoption, as in the daemon: meanwhile pages of other tiers are fetched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import trio

from tests.kernel.damage import flipped
from tests.kernel.forced import Options
from tests.store.plugin.tierd_plain import PlainStore
from tierd.parking import Asked, Parking, Turns
from tierd.restore import restore_all
from tierd.serve import KEYS, Served, key_of
from tierd.store import PageSpace, PageStore
from tierd.store.asked import AskedStore

CONCURRENCY, DEADLINE_S = 8, 10.0  # the defaults of stores
SLOW_S, HANG_S = 0.002, 0.2
WATCH_S = 0.05


def asked_store(options: Options, tmpfs_dir: Path, disk_dir: Path) -> AskedStore:
    """The project's example of a plug-in: a directory a guest, a file a page. It outlives whom it serves."""
    place, keys_dir = disk_dir / "asked", tmpfs_dir / KEYS
    place.mkdir(mode=0o700, exist_ok=True)
    keys_dir.mkdir(mode=0o700, exist_ok=True)
    return AskedStore(
        "asked",
        PlainStore({"path": str(place)}, None),
        keys_dir,
        capacity_bytes=None,
        encrypt=options.encrypt,
        second=None,
        concurrency=CONCURRENCY,
        deadline_s=DEADLINE_S,
    )


# --- a store that misbehaves ----------------------------------------------------------------------------------------------


def misbehaviour(chance: random.Random, misread: bool) -> dict[str, int]:
    """Of the store, in this life: thousandths of the calls. Nothing that destroys what it holds."""
    if chance.random() < 0.3:
        return {}
    kinds = ["open_error", "read_slow", "write_error", "write_slow", "discard_error", "delete_error"]
    if misread:
        kinds += ["read_error", "read_short", "read_flip"]
    hangs = {"read_hang": chance.randrange(10), "write_hang": chance.randrange(10)}
    return {**hangs, **{kind: chance.randrange(150) for kind in kinds if chance.random() < 0.5}}


class Moods:
    """When it misbehaves."""

    def __init__(self, chance: random.Random, thousandths: Mapping[str, int]) -> None:
        self.chance, self._thousandths = chance, thousandths

    def has(self, kind: str) -> bool:
        return self.chance.randrange(1000) < self._thousandths.get(kind, 0)

    async def dawdle(self, call: str) -> None:
        if self.has(f"{call}_slow"):
            await trio.sleep(SLOW_S)
        if self.has(f"{call}_hang"):
            await trio.sleep(HANG_S)

    def fail(self, call: str) -> None:
        if self.has(f"{call}_error"):
            raise OSError(errno.EIO, f"the {call} failed, as the test wants it")


class MoodySpace:
    """Implements store.PageSpace: what `space` does, but late, in part, or not at all."""

    def __init__(self, space: PageSpace, moods: Moods) -> None:
        self._space, self._moods = space, moods

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        """One that fails has stored some of them, all, or none."""
        await self._moods.dawdle("write")
        try:
            self._moods.fail("write")
        except OSError:
            await self._space.write(first_page, records[: self._moods.chance.randrange(len(records) + 1)])
            raise
        await self._space.write(first_page, records)

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        await self._moods.dawdle("read")
        self._moods.fail("read")
        records = await self._space.read(first_page, count)
        if self._moods.has("read_short"):
            records.pop()
        elif self._moods.has("read_flip") and (record := records[-1]):
            records[-1] = flipped(record, self._moods.chance.randrange(8 * len(record)))
        return records

    async def discard(self, first_page: int, count: int) -> None:
        await self._moods.dawdle("write")
        try:
            self._moods.fail("discard")
        except OSError:
            await self._space.discard(first_page, self._moods.chance.randrange(count + 1))
            raise
        await self._space.discard(first_page, count)

    async def delete(self) -> None:
        self._moods.fail("delete")
        await self._space.delete()


class MoodyStore:
    """Implements store.PageStore, with such spaces."""

    def __init__(self, store: PageStore, moods: Moods) -> None:
        self._store, self._moods = store, moods

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def open(self, key: str, pages: int, page_bytes: int) -> MoodySpace:
        self._moods.fail("open")
        return MoodySpace(await self._store.open(key, pages, page_bytes), self._moods)


# --- Parking --------------------------------------------------------------------------------------------------------------


def _only_bugs(_logger: object, _method: str, event: Mapping[str, Any]) -> Any:
    """Of what Parking logs: a store does fail here. But not by an error that no store may raise."""
    if event["event"] == "store_is_broken":
        _end(event["exc_info"])
    raise structlog.DropEvent


def _end(error: BaseException) -> None:
    """Whoever waits for this thread must not wait for ever."""
    traceback.print_exception(error)
    os._exit(1)


@dataclass
class _Loop:
    """What runs in the thread."""

    parking: Parking
    token: trio.lowlevel.TrioToken
    scope: trio.CancelScope
    leaving: bool = False


@contextlib.contextmanager
def parked(served: Served, store: AskedStore) -> Iterator[Asked]:
    """The guest's pages in the store are brought, and taken of the worker, by a thread that has trio's loop. At the end the guest
    is left, as tierd detach does it: everything back, nobody asks any more, out of the VMM, and the store forgets it."""
    structlog.configure(processors=[_only_bugs])
    began: Future[_Loop] = Future()
    thread = threading.Thread(target=_run, args=(served, store, began), daemon=True)
    thread.start()
    loop = began.result()
    try:
        yield Asked(loop.parking)
        while not _brought_back(served, loop):
            time.sleep(0.01)
        loop.leaving = True
    finally:
        loop.token.run_sync_soon(loop.scope.cancel)
        thread.join()


def _brought_back(served: Served, loop: _Loop) -> bool:
    arguments = (served, loop.parking, trio.to_thread.run_sync, lambda *_: None)
    with contextlib.suppress(OSError):  # a read that failed, or the store is not open yet
        trio.from_thread.run(restore_all, *arguments, trio_token=loop.token)
        return True
    return False


def _run(served: Served, store: AskedStore, began: Future[_Loop]) -> None:
    try:
        trio.run(_park, served, store, began)
    except BaseException as error:
        _end(error)


async def _park(served: Served, store: AskedStore, began: Future[_Loop]) -> None:
    turns = Turns(CONCURRENCY)
    parking = Parking(served, key_of(served.spec), {store.name: store}, lambda _: turns)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parking.run)
        nursery.start_soon(_forget_answers, served)
        loop = _Loop(parking, trio.lowlevel.current_trio_token(), nursery.cancel_scope)
        began.set_result(loop)
    if loop.leaving:
        await trio.to_thread.run_sync(served.leave)
    await parking.close(delete=loop.leaving)


async def _forget_answers(served: Served) -> None:
    """As the daemon's watchdog."""
    while True:
        await trio.sleep(WATCH_S)
        if not served.native.health(0.1).asked_pages:
            served.native.forget_answers()
