# SPDX-License-Identifier: Apache-2.0
"""Parking: faults on pages of stores that trio asks, and everything else that is read and written there.

    fault thread: files a request, rings ---> here: read, unseal ---> fault thread: verify, place, wake

A guest's requests are taken in its own task. Each store has so many turns (`concurrency`): who waits for a page comes before
read-ahead, and that before eviction, demotion and discards, so a store that is busy is busy with what guests wait for. Each store
has its own, so a slow one delays nobody but its own pages. A request that fails, or is late (`deadline_s`), is asked again by the
data plane until the policy's read_deadline_s; where the store is not open yet, or nobody has configured it, the page waits.

Everything here runs in trio's thread, but `Asked`, which is the guest's worker's: it blocks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from tierd.native import STORE_WRITE, KernelError, Request
from tierd.serve import Served, ServedTier
from tierd.store import IntegrityError, PageSpace, Store, StoreError, keys
from tierd.store.asked import UNLIMITED, AskedSpace, AskedStore
from tierd.store.mirror import MirroredSpace
from tierd.store.records import RecordSpace, each, write_runs
from tierd.store.seal import SealKey
from tierd.threads import in_thread

TAKEN_MAX = 64  # requests at a time
REOPEN_S, REOPEN_S_MAX = 0.5, 10.0
PATIENCE_S = 1.0  # with the first of two copies
READ_TOLD_S = 10.0  # between two errors of reads that are told, of one store
LOSS_TOLD_S = 600.0  # between two losses: one that has lost a part gives pages meanwhile
CALL_S_MIN, CALL_DEADLINES = 60.0, 6  # what a call in the background may take: so many of its store's deadlines
Work = Callable[..., Awaitable[Any]]  # on a PageSpace and a run of pages
CLOSE_S_MAX = 5.0
DELETE_S_MAX = 10.0  # for the pages of a guest that is over; then the sweep has them


class Rank(enum.IntEnum):
    """Whose turn comes first."""

    DEMAND = 0
    READ_AHEAD = 1
    BACKGROUND = 2  # eviction, demotion, discards


class Turns:
    """So many calls of a store at a time; those in the background leave a quarter of them to the others."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._kept_free = max(count // 4, min(count - 1, 1))
        self._waiting: tuple[deque[trio.Event], ...] = tuple(deque() for _ in Rank)

    @property
    def demand_waits(self) -> bool:
        return bool(self._waiting[Rank.DEMAND])

    def of(self, rank: Rank) -> _Turn:
        """For `async with`: one turn."""
        return _Turn(self, rank)

    async def take(self, rank: Rank) -> None:
        if not self._may(rank) or any(self._waiting[: rank + 1]):
            await self._wait(rank)
        else:
            self._free -= 1

    def give_back(self) -> None:
        self._free += 1
        self._pass_on()

    def _may(self, rank: Rank) -> bool:
        return self._free > (self._kept_free if rank is Rank.BACKGROUND else 0)

    async def _wait(self, rank: Rank) -> None:
        turn = trio.Event()
        self._waiting[rank].append(turn)
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():  # it was given to us just now
                self.give_back()
            else:
                self._waiting[rank].remove(turn)
            raise

    def _pass_on(self) -> None:
        for rank in Rank:
            while self._waiting[rank] and self._may(rank):
                self._free -= 1
                self._waiting[rank].popleft().set()


class _Turn:
    """A class, since a guest waits: a generator would take some microseconds more."""

    def __init__(self, turns: Turns, rank: Rank) -> None:
        self._turns, self._rank = turns, rank

    async def __aenter__(self) -> None:
        await self._turns.take(self._rank)

    async def __aexit__(self, *_: object) -> None:
        self._turns.give_back()


@dataclass
class _Told:
    """What was told last, "" when it is over; and when."""

    text: str = ""
    at: float = -math.inf

    def is_new(self, text: str, seconds: float) -> bool:
        """Whether it is to be told: it is not what was told last, and that was so many seconds ago. Then it counts as told."""
        now = trio.current_time()
        if text == self.text or now - self.at < seconds:
            return False
        self.text, self.at = text, now
        return True


class Parking:
    """Of one guest that is served and has tiers that are asked. `stores`: of this daemon, by name; it may come to know more.
    `turns`: by store."""

    def __init__(
        self, served: Served, key: str, stores: Mapping[str, Store], turns: Callable[[AskedStore], Turns]
    ) -> None:
        self._served, self._key, self._stores, self._turns_of = served, key, stores, turns
        self._log = structlog.get_logger().bind(guest=served.spec.name, pid=served.spec.pid)
        self._tiers = {tier.number: tier for tier in served.tiers.values() if isinstance(tier.space, AskedSpace)}
        self._spaces: dict[int, PageSpace] = {}
        self._keys: dict[str, SealKey | None] = {}  # by store; None: it is not sealed
        self._opened = {number: trio.Event() for number in self._tiers}
        self._noted: dict[int, AskedStore] = {}
        self._troubles: dict[int, str] = {}
        self._broken: set[str] = set()  # stores
        self._wrong: set[int] = set()
        self._as_opened: dict[str, PageSpace] = {}  # by store
        self._unread: dict[str, _Told] = {}  # by store: reads that failed
        self._missing: dict[str, _Told] = {}  # by store: copies that it has lost
        self._over = self._is_cut = False
        self._token = trio.lowlevel.current_trio_token()
        self._calls: set[trio.CancelScope] = set()  # of workers
        self._takers = trio.lowlevel.ParkingLot()  # tasks that have served their request
        for number, tier in self._tiers.items():
            _space(tier).counted = partial(_stored_bytes, served, number)
            _space(tier).missing = self._missing_key

    @property
    def troubles(self) -> Mapping[str, str]:
        """By name of the store: why its pages cannot be had at all now."""
        return {self._tiers[number].name: why for number, why in self._troubles.items()}

    @property
    def space_troubles(self) -> Mapping[str, str]:
        """By name of the store, second ones included: what is wrong though pages come and go; "": nothing."""
        return {name: _trouble_of(space) for name, space in self._as_opened.items()}

    def compressed_to(self, tier: int) -> float:
        """What became of a byte that was written there; 0: none was."""
        return float(getattr(self._spaces.get(tier), "compressed_to", 0.0))

    def must_bring(self) -> None:
        """OSError: what is asked for does not come now: nobody brings it any more, or a store that has pages cannot be had."""
        if self._over:
            raise OSError(errno.ECANCELED, f"guest {self._served.spec.name} ends, nobody brings its pages any more")
        for number, why in self._troubles.items():
            if _stored_bytes(self._served, number):
                raise OSError(errno.EAGAIN, f"pages in store {self._tiers[number].name} cannot be had: {why}")

    def _missing_key(self) -> Path | None:
        """Of a key that we have open, and a successor would not find. Any thread, as long as the spaces are open."""
        return next((key.path for key in list(self._keys.values()) if key is not None and not key.is_there()), None)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Then requests stay open: their pages are a successor's."""
        try:
            async with trio.open_nursery() as nursery:
                for tier in self._tiers.values():
                    nursery.start_soon(self._open, tier)
                nursery.start_soon(self._take, nursery)
        finally:
            self._over = True
            self.cut()
            for number, tier in self._tiers.items():
                _space(tier).opened = _space(tier).ready = False
                if number in self._noted:  # there, whatever is called so by now
                    self._noted.pop(number).forget(_space(tier))
                _space(tier).counted = int  # the data plane may be gone soon

    def cut(self) -> None:
        """Calls that workers wait for end now, and none begins any more: OSError."""
        self._is_cut = True
        for call in self._calls:
            call.cancel()

    async def _open(self, tier: ServedTier) -> None:
        """Its space, as soon as the store can be had."""
        store = await self._open_once(tier)
        store.note(_space(tier))
        self._noted[tier.number] = store
        self._opened[tier.number].set()
        _space(tier).opened = True
        if not self._all_sealed(store):
            self._log.warning(
                "store_only_read",
                store=tier.name,
                why="pages of this guest are there that were not encrypted",
                action="none: they are read, and once none is left, new ones are encrypted",
            )
            while _stored_bytes(self._served, tier.number):
                await trio.sleep(REOPEN_S_MAX)
            await self._spaces.pop(tier.number).aclose()
            await self._open_once(tier)
        _space(tier).ready = self._all_sealed(store)

    async def _open_once(self, tier: ServedTier) -> AskedStore:
        pause_s = REOPEN_S
        while True:
            store = self._stores.get(tier.name)
            if isinstance(store, AskedStore):
                try:
                    self._spaces[tier.number] = await self._space_of(store, tier)
                except Exception as error:  # a plug-in's may be any
                    trouble = str(error) or repr(error)
                else:
                    break
            else:
                trouble = f"the configuration has no store {tier.name}: add it under stores, and reload"
            if self._troubles.get(tier.number) != trouble:
                self._troubles[tier.number] = trouble
                self._log.error(
                    "store_not_opened", store=tier.name, error=trouble, action="its pages wait; trying again"
                )
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, REOPEN_S_MAX)
        if self._troubles.pop(tier.number, None) is not None:
            self._log.info("store_opened", store=tier.name)
        return store

    async def _space_of(self, store: AskedStore, tier: ServedTier) -> PageSpace:
        """StoreError, OSError: it, or the store of its second copies, cannot be had."""
        space = await self._spaces_of(store, tier)
        try:
            await self._must_be_the_same(space, tier)
        except BaseException:
            with trio.CancelScope(shield=True):
                await space.aclose()
            raise
        return space

    async def _spaces_of(self, store: AskedStore, tier: ServedTier) -> PageSpace:
        if store.second is None:
            return await self._one_space_of(store, tier)
        second = self._stores.get(store.second)
        if not isinstance(second, AskedStore):
            raise StoreError(
                f"the configuration has no store {store.second}, which holds second copies of {store.name}"
            )
        both = store, second
        first = await self._one_of_two(both, tier, is_second=False)
        try:
            other = await self._one_of_two(both, tier, is_second=True)
            if isinstance(first, OpenedLater) and isinstance(other, OpenedLater):
                raise first.error
            patience_s = min(store.deadline_s / 2, PATIENCE_S)
            tell = partial(self._tell_wrong, tier), partial(self._tell_missing, both), partial(self._copy_read, both)
            return MirroredSpace(first, other, patience_s, self._served.native.is_right, *tell)
        except BaseException:
            with trio.CancelScope(shield=True):
                await first.aclose()
            raise

    async def _one_of_two(self, both: Sequence[AskedStore], tier: ServedTier, *, is_second: bool) -> PageSpace:
        """Where pages are stored already, one of two that cannot be had is waited for by nobody: the other one has them."""
        store = both[is_second]

        async def opened() -> PageSpace:
            space = await self._one_space_of(store, tier, is_second=is_second)
            if not self._all_sealed(both[0]) and _space(tier).ready:
                with trio.CancelScope(shield=True):
                    await space.aclose()
                raise StoreError(f"pages of this guest are in {store.name} that were not encrypted; restart tierd")
            return space

        try:
            return await opened()
        except (OSError, StoreError) as error:
            if self._served.adoption is None or not _stored_bytes(self._served, tier.number):
                raise
            self._log.error(
                "copy_not_opened",
                store=store.name,
                error=str(error),
                action="its pages are read from the other store, and none is written; trying again",
            )
            return OpenedLater(opened, error)

    def _tell_wrong(self, tier: ServedTier, page: int) -> None:
        """Once for each store: there may be many."""
        if tier.number not in self._wrong:
            self._wrong.add(tier.number)
            self._log.error(
                "copy_is_wrong",
                store=tier.name,
                second=self._store(tier.number).second,
                page=page,
                action="the other copy is taken; see who else can write to the two stores",
            )

    def _tell_missing(self, both: Sequence[AskedStore], page: int, is_second: bool, why: str) -> None:
        """Once until the store has given pages again, and not often: there may be many."""
        name, other = both[is_second].name, both[not is_second].name
        if self._missing.setdefault(name, _Told()).is_new(why, LOSS_TOLD_S):
            self._log.error(
                "copy_is_missing",
                store=name,
                other=other,
                page=page,
                error=why,
                action="the other copy is taken, and is the only one; see to this store before the other one fails, too. "
                "There are two again of what leaves from now on, of the rest after `tierd restore`",
            )

    async def _one_space_of(self, store: AskedStore, tier: ServedTier, *, is_second: bool = False) -> PageSpace:
        served = self._served
        open_space = partial(store.pages.open, self._key, served.native.pages, served.page_bytes)
        try:
            space = await open_space()
        except StoreError:
            if served.adoption is not None:
                raise
            # of another size, perhaps: what an attach before this one could not delete, and nobody needs
            await store.pages.sweep(lambda guest: guest != self._key)
            space = await open_space()
        try:
            if self._keys.get(store.name) is None:  # else of a try before
                new = served.adoption is None
                anything = not new and _stored_bytes(served, tier.number)  # else of what is there nothing counts
                if anything and is_second:
                    anything = await space.used_bytes()
                self._keys[store.name] = await in_thread(self._seal_key, store, bool(anything))
            key = self._keys[store.name]
            self._as_opened[store.name] = space
            return RecordSpace(space, served.page_bytes, key)
        except BaseException:
            with trio.CancelScope(shield=True):
                await space.aclose()
            raise

    async def _must_be_the_same(self, space: PageSpace, tier: ServedTier) -> None:
        """A place that knows nothing of the guest is another one than before: its pages wait for that, they are not lost."""
        pages = self._served.native.counters()["tier_pages"][tier.number]
        if self._served.adoption is not None and pages and not await space.used_bytes():
            raise StoreError(
                f"nothing of this guest is in the store {tier.name}, and {pages} of its pages should be: if its keys in the "
                "configuration name another place than before, put them back, and restart tierd"
            )

    def _seal_key(self, store: AskedStore, anything: bool) -> SealKey | None:
        """What is there was sealed if there is a key, whatever the configuration says now. Worker thread."""
        args = (store.keys_dir, store.name, self._key, self._served.native.pages)
        if self._served.adoption is None:
            SealKey.forget(*args[:3])  # else a successor would take what is stored now for sealed
        elif SealKey.exists(*args[:3]):
            try:
                return SealKey.reopen(*args)
            except StoreError:
                if anything:
                    raise
                SealKey.forget(*args[:3])  # whoever made it, or destroyed it, died at it
        return SealKey.create(*args) if store.encrypt and not anything else None

    def _all_sealed(self, store: AskedStore) -> bool:
        """Those that should be."""
        both = (store, self._stores[store.second]) if store.second else (store,)
        asked = [each for each in both if isinstance(each, AskedStore) and each.encrypt]
        return all(self._keys[each.name] is not None for each in asked if each.name in self._keys)

    async def close(self, *, delete: bool) -> None:
        """When nobody asks any more. `delete`: the guest is over, or every page is with it."""
        if delete:  # first of all: whatever becomes of the pages, nobody can read them
            self._destroy_keys()
        with trio.move_on_after(DELETE_S_MAX, shield=True):
            async with trio.open_nursery() as nursery:
                for number, space in self._spaces.items():
                    nursery.start_soon(self._let_go, self._tiers[number].name, space, delete)
        for key in self._keys.values():
            if key is not None:
                key.close()
        self._spaces.clear()
        self._keys.clear()

    def _destroy_keys(self) -> None:
        """Those for stores that the configuration has no more, or that could not be opened, as well."""
        for key in self._keys.values():
            try:
                if key is not None:
                    key.destroy()
            except OSError as error:
                self._log.warning(
                    "key_not_destroyed", error=str(error), action="the sweep does it, once the VMM has ended"
                )
        for directory in {store.keys_dir for store in self._stores.values() if isinstance(store, AskedStore)}:
            with contextlib.suppress(OSError):  # the directory cannot be listed: the sweep does it, too
                keys.sweep(directory, lambda guest: guest != self._key)

    async def _let_go(self, name: str, space: PageSpace, delete: bool) -> None:
        try:
            if delete:
                await space.delete()
        except Exception as error:  # a plug-in's may be any
            self._log.warning("pages_not_deleted", store=name, error=str(error), action="the sweep does it")
        finally:
            with trio.move_on_after(CLOSE_S_MAX, shield=True):
                try:
                    await space.aclose()
                except Exception as error:
                    self._log.warning("space_not_closed", store=name, error=str(error), action="none")

    # --- requests -----------------------------------------------------------------------------------------------------

    async def _take(self, nursery: trio.Nursery) -> None:
        """Requests, when there are some. The first one is served right here, and another task takes the next ones: a guest waits
        for it, and a task that is started has to wait for a round of trio's loop."""
        while True:
            await trio.lowlevel.wait_readable(self._served.asked_fd)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._served.asked_fd)
            requests = taken = self._served.native.asked(TAKEN_MAX)
            while len(taken) == TAKEN_MAX:
                taken = self._served.native.asked(TAKEN_MAX)
                requests += taken
            if not self._takers.unpark():
                nursery.start_soon(self._take, nursery)
            for request in requests[1:]:
                nursery.start_soon(self._serve, request)
            if requests:
                await self._serve(requests[0])
            await self._takers.park()

    async def _serve(self, request: Request) -> None:
        """One request, whatever the store does: it is answered, or it waits for a store that is not there."""
        if not self._opened[request.tier].is_set():  # to wait would be a round of trio's loop in any case
            await self._opened[request.tier].wait()
        try:
            pages = await self._fetch(request)
        except Exception as error:  # a plug-in's may be any: the page waits, and the guest has others
            action = "see to the store; the page is asked for again until the policy's read_deadline_s"
            self._tell_unread(self._store(request.tier), error, action)
            self._served.native.answer(request.number, b"", 0, _errno_of(error))
        else:
            self._served.native.answer(request.number, b"".join(pages), len(pages), 0)
            store = self._store(request.tier)
            if store.second is None:  # of two, the page does not say which one gave it
                self._note_given(store)

    def _tell_unread(self, store: AskedStore, error: Exception, action: str) -> None:
        """Why pages do not come, once until some do: the data plane learns an errno only. Of texts that differ in each try (the
        number of a page, of a request) one now and then. What no store may raise, once."""
        if not isinstance(error, OSError | StoreError | trio.TooSlowError):
            if store.name not in self._broken:
                self._broken.add(store.name)
                self._log.error("store_is_broken", store=store.name, error=repr(error), exc_info=error)
            return
        text = str(error) or f"it did not answer within {store.deadline_s:g} s"
        if self._unread.setdefault(store.name, _Told()).is_new(text, READ_TOLD_S):
            self._log.error("store_read_failed", store=store.name, error=text, action=action)

    def _copy_read(self, both: Sequence[AskedStore], is_second: bool, error: Exception | None) -> None:
        if error is None:
            self._note_given(both[is_second])
        else:
            self._tell_unread(both[is_second], error, "see to the store; the other copy is taken")

    def _note_given(self, store: AskedStore) -> None:
        """It has given pages: what goes wrong from now on is told again."""
        for told in (self._unread, self._missing):
            if store.name in told:
                told[store.name].text = ""

    async def _fetch(self, request: Request) -> list[bytes]:
        """Its first page, and as many of the others as there are and nobody has to wait for."""
        store = self._store(request.tier)
        turns = self._turns_of(store)
        async with turns.of(Rank.DEMAND if request.demand else Rank.READ_AHEAD):
            count = 1 if turns.demand_waits else request.count
            with trio.fail_after(store.deadline_s):
                return self._whole(await self._spaces[request.tier].read(request.page, count), request)

    def _whole(self, records: Sequence[bytes | None], request: Request) -> list[bytes]:
        page_bytes, pages = self._served.page_bytes, []
        for record in records:
            if record is None or len(record) != page_bytes:
                break
            pages.append(record)
        if not pages:
            raise IntegrityError(f"the store {self._tiers[request.tier].name} does not have page {request.page}")
        return pages

    def _store(self, tier: int) -> AskedStore:
        store = self._stores[self._tiers[tier].name]
        assert isinstance(store, AskedStore)
        return store

    # --- for the worker ---------------------------------------------------------------------------------------------------

    def takes_runs(self, tier: int) -> bool:
        """All runs of a batch are one call. Any thread."""
        store = self._store(tier)
        both = [self._stores[name] for name in (store.name, store.second) if name is not None]
        return any(getattr(each.pages, "takes_runs", False) for each in both if isinstance(each, AskedStore))

    def pieces(self, tier: int, runs: Sequence[tuple[int, Sequence[bytes]]]) -> list[tuple[int, Sequence[bytes]]]:
        """Runs as the store likes them. Any thread."""
        count = max(getattr(self._store(tier).pages, "piece_bytes", UNLIMITED) // self._served.page_bytes, 1)
        return [(page + n, pages[n : n + count]) for page, pages in runs for n in range(0, len(pages), count)]

    def each(self, tier: int, work: Work, runs: Sequence[tuple[Any, ...]]) -> list[Any]:
        """`work` on each run, when it is its turn: an eviction's, a demotion's or a discard's calls, so many at a time that a
        store can do several in one go. The first error, when all that had begun is over. Any thread but trio's; blocks until
        then, or until `cut`."""
        return trio.from_thread.run(self._until_over, tier, work, runs, trio_token=self._token)

    async def _until_over(self, tier: int, work: Work, runs: Sequence[tuple[Any, ...]]) -> list[Any]:
        with trio.CancelScope() as call:
            self._calls.add(call)
            try:
                if not self._is_cut:
                    return await self._each(tier, work, runs)
            finally:
                self._calls.remove(call)
        raise OSError(errno.ECANCELED, f"guest {self._served.spec.name} ends, nobody stores its pages any more")

    async def _each(self, tier: int, work: Work, runs: Sequence[tuple[Any, ...]]) -> list[Any]:
        if tier not in self._spaces:
            raise OSError(errno.EAGAIN, f"the store {self._tiers[tier].name} is not open")
        store, space = self._store(tier), self._spaces[tier]
        turns = self._turns_of(store)

        async def in_turn(*run: Any) -> Any:
            async with turns.of(Rank.BACKGROUND):
                with trio.fail_after(max(CALL_S_MIN, CALL_DEADLINES * store.deadline_s)):
                    return await work(space, *run)

        return await each(in_turn, runs, store.concurrency)


class OpenedLater:
    """Implements store.PageSpace: one of two, whose store could not be had. A call tries again now and then, else it fails."""

    def __init__(self, open_space: Callable[[], Awaitable[PageSpace]], error: OSError | StoreError) -> None:
        self._open, self.error = open_space, error
        self._space: PageSpace | None = None
        self._again_at = trio.current_time() + REOPEN_S_MAX
        self._opening = trio.Lock()

    async def _opened(self) -> PageSpace:
        async with self._opening:
            if self._space is None:
                if trio.current_time() < self._again_at:
                    raise self.error.with_traceback(None)  # each raise adds to it
                self._again_at = trio.current_time() + REOPEN_S_MAX
                try:
                    self._space = await self._open()
                except (OSError, StoreError) as error:
                    self.error = error
                    raise
            return self._space

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await (await self._opened()).write(first_page, records)

    async def write_runs(self, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        await write_runs(await self._opened(), runs)

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        return await (await self._opened()).read(first_page, count)

    async def discard(self, first_page: int, count: int) -> None:
        await (await self._opened()).discard(first_page, count)

    async def used_bytes(self) -> int:
        """As far as it can be told."""
        return await self._space.used_bytes() if self._space is not None else 0

    async def delete(self) -> None:
        await (await self._opened()).delete()

    async def aclose(self) -> None:
        if self._space is not None:
            await self._space.aclose()


class Asked:
    """Implements cycle.Asked for a guest's worker, which waits for trio. KernelError: with the number of the tier that failed."""

    def __init__(self, parking: Parking) -> None:
        self._parking = parking

    def write(self, tier: int, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        with _failures_of(tier, STORE_WRITE):
            pieces, takes_runs = self._parking.pieces(tier, runs), self._parking.takes_runs(tier)
        if not pieces:
            return  # a store that is given nothing is not asked
        if takes_runs:
            self._each(tier, STORE_WRITE, write_runs, [(pieces,)])
        else:
            self._each(tier, STORE_WRITE, lambda space, page, pages: space.write(page, pages), pieces)

    def read(self, tier: int, runs: Sequence[tuple[int, int]]) -> list[list[bytes | None]]:
        return self._each(tier, "store read", lambda space, page, count: space.read(page, count), runs)

    def discard(self, tier: int, runs: Sequence[tuple[int, int]]) -> None:
        self._each(tier, "store discard", lambda space, page, count: space.discard(page, count), runs)

    def _each(self, tier: int, noun: str, work: Work, runs: Sequence[tuple[Any, ...]]) -> list[Any]:
        with _failures_of(tier, noun):
            return self._parking.each(tier, work, runs)


@contextlib.contextmanager
def _failures_of(tier: int, noun: str) -> Iterator[None]:
    """KernelError of this tier, instead of whatever else: a plug-in's may be any."""
    try:
        yield
    except Exception as error:
        failure = KernelError(_errno_of(error), f"{noun} ({str(error) or repr(error)})")
        failure.tier = tier
        raise failure from error


def _trouble_of(space: PageSpace) -> str:
    try:
        return str(getattr(space, "trouble", ""))
    except Exception as error:  # a plug-in's may be any
        return str(error) or repr(error)


def _space(tier: ServedTier) -> AskedSpace:
    assert isinstance(tier.space, AskedSpace)
    return tier.space


def _stored_bytes(served: Served, number: int) -> int:
    return int(served.native.tier_counters(number)["used_bytes"])


def _errno_of(error: Exception) -> int:
    if isinstance(error, IntegrityError):
        return errno.EBADMSG
    if isinstance(error, trio.TooSlowError):
        return errno.ETIMEDOUT
    return (error.errno if isinstance(error, OSError) else None) or errno.EIO
