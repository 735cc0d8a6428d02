# SPDX-License-Identifier: Apache-2.0
"""What every PageStore must keep to, for authors of plug-ins. With pytest:

    class TestMyStore(PageStoreContract):
        def make_store(self) -> PageStore:
            return MyStore(...)          # each call another object, all of the same place

or without it: check(make_store). Spaces that the suite makes are removed by it, unless a check fails. Set
`pytest.register_assert_rewrite("tierd.testing")` in conftest.py to see the values that differ.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from tierd.store import PageSpace, PageStore, StoreError

PAGE = 4096
PAGES = 4096  # of a guest: 16 MiB
SEAL_BYTES = 32  # what encryption may add to a page
_numbers = itertools.count(random.randrange(1 << 40))


def records(first_page: int, count: int, version: int = 0, size: int = PAGE + SEAL_BYTES) -> list[bytes]:
    """Of pages first_page ...: bytes that do not compress, another sequence for each page and version."""
    return [random.Random(page << 32 | version).randbytes(size) for page in range(first_page, first_page + count)]


async def _holds(space: PageSpace, first_page: int, wanted: Sequence[bytes | None]) -> None:
    """AssertionError: says which page differs, and how. (To explain that two lists of pages differ takes pytest minutes.)"""
    found = await space.read(first_page, len(wanted))
    if len(found) != len(wanted):
        raise AssertionError(f"{len(wanted)} pages from {first_page} on were asked for, {len(found)} came")
    for page, (record, right) in enumerate(zip(found, wanted, strict=True), first_page):
        if record != right:
            raise AssertionError(f"page {page}: {_shown(record)} was read, {_shown(right)} is right")


def _shown(record: bytes | None) -> str:
    return "nothing" if record is None else f"{len(record)} bytes ({record[:8].hex()}...)"


def new_key() -> str:
    """A guest that no store has seen."""
    return f"{random.randrange(1 << 22)}-{next(_numbers)}"


@asynccontextmanager
async def closing(store: PageStore) -> AsyncIterator[PageStore]:
    try:
        yield store
    finally:
        with trio.CancelScope(shield=True):
            await store.aclose()


@asynccontextmanager
async def space_of(store: PageStore, key: str | None = None) -> AsyncIterator[PageSpace]:
    """A space that is deleted in the end."""
    space = await store.open(key or new_key(), PAGES, PAGE)
    try:
        yield space
    except BaseException:
        await space.aclose()
        raise
    await space.delete()
    await space.aclose()


def _in_trio(check: Callable[[PageStoreContract], Awaitable[None]]) -> Callable[[PageStoreContract], None]:
    @functools.wraps(check)
    def test(self: PageStoreContract) -> None:
        trio.run(check, self)

    return test


class PageStoreContract:
    """The checks. A subclass says how its store is made."""

    def make_store(self) -> PageStore:
        """Each call makes another object of the same place: a successor sees what its predecessor wrote."""
        raise NotImplementedError

    @_in_trio
    async def test_a_store_that_works_is_accepted(self) -> None:
        async with closing(self.make_store()) as store:
            await store.probe()
            await store.probe()

    @_in_trio
    async def test_what_was_written_is_read(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            await space.write(7, records(7, 1))
            await _holds(space, 7, records(7, 1))
            await space.write(0, records(0, 1))
            await space.write(PAGES - 1, records(PAGES - 1, 1))
            await _holds(space, 0, records(0, 1))
            await _holds(space, PAGES - 1, records(PAGES - 1, 1))

    @_in_trio
    async def test_records_of_any_bytes_and_size_come_back(self) -> None:
        """Compression makes them shorter, sealing longer. They may look like text, like nothing, or like a number."""
        strange = [
            b"",
            b"0",
            b"\0" * PAGE,
            b"\xff\xfe",
            b"line\r\n\r\n",
            b"-1",
            bytes(range(256)) * 16,
            b"x" * (PAGE + 32),
        ]
        async with closing(self.make_store()) as store, space_of(store) as space:
            await space.write(60, strange)
            await _holds(space, 60, strange)

    @_in_trio
    async def test_what_is_not_there_is_none(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            await _holds(space, 0, [None] * 3)
            await space.write(70, records(70, 2))
            await _holds(space, 69, [None, *records(70, 2), None])

    @_in_trio
    async def test_runs_of_every_alignment(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            for first, count in ((0, 1), (63, 2), (100, 64), (191, 130), (1000, 65), (PAGES - 3, 3)):
                await space.write(first, records(first, count))
            for first, count in (
                (0, 1),
                (63, 2),
                (100, 64),
                (191, 130),
                (1000, 65),
                (PAGES - 3, 3),
                (110, 7),
                (200, 90),
            ):
                await _holds(space, first, records(first, count))
            await space.write(5, [])
            await _holds(space, 5, [])

    @_in_trio
    async def test_a_big_run(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            await space.write(33, records(33, 2048))
            await _holds(space, 33, records(33, 2048))
            await space.discard(0, PAGES)
            await _holds(space, 0, [None] * PAGES)

    @_in_trio
    async def test_the_last_write_counts(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            for version in range(4):
                await space.write(50, records(50, 100, version))
            await space.write(60, records(60, 2, 9))
            wanted = records(50, 10, 3) + records(60, 2, 9) + records(62, 88, 3)
            await _holds(space, 50, wanted)

    @_in_trio
    async def test_what_was_discarded_is_gone(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            await space.write(10, records(10, 100))
            await space.discard(20, 60)
            await space.discard(20, 60)
            await space.discard(2000, 64)
            await _holds(space, 10, [*records(10, 10), *[None] * 60, *records(80, 30)])
            await space.write(30, records(30, 1, 1))
            await _holds(space, 29, [None, *records(30, 1, 1), None])

    @_in_trio
    async def test_what_is_used_is_told(self) -> None:
        """To a factor of two: file systems and servers have their own sizes."""
        async with closing(self.make_store()) as store, space_of(store) as space:
            empty = await space.used_bytes()
            await space.write(0, records(0, 512))
            full = await space.used_bytes()
            assert 512 * PAGE <= full - empty <= 2 * 512 * PAGE
            await space.write(0, records(0, 512, 1))
            assert await space.used_bytes() <= full + 256 * PAGE, "the same pages again"
            await space.discard(0, 512)
            assert await space.used_bytes() - empty <= (full - empty) / 2

    @_in_trio
    async def test_guests_do_not_see_each_other(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as one, space_of(store) as other:
            await one.write(5, records(5, 3, 1))
            await other.write(6, records(6, 1, 2))
            await _holds(one, 5, records(5, 3, 1))
            await _holds(other, 5, [None, *records(6, 1, 2), None])
            await other.discard(0, PAGES)
            await _holds(one, 5, records(5, 3, 1))

    @_in_trio
    async def test_many_guests_at_once(self) -> None:
        async with closing(self.make_store()) as store, trio.open_nursery() as nursery:
            for seed in range(6):
                nursery.start_soon(_busy_guest, store, seed)

    @_in_trio
    async def test_a_successor_finds_everything(self) -> None:
        """The predecessor closed nothing: it may have been killed at any time after the write returned."""
        key = new_key()
        async with closing(self.make_store()) as dead:
            left = await dead.open(key, PAGES, PAGE)
            await left.write(100, records(100, 300))
            await left.discard(150, 10)
            async with closing(self.make_store()) as store, space_of(store, key) as space:
                await _holds(space, 100, [*records(100, 50), *[None] * 10, *records(160, 240)])
                await space.write(100, records(100, 1, 1))
                await _holds(space, 100, records(100, 1, 1))
                assert await space.used_bytes() > 0
            await left.aclose()

    @_in_trio
    async def test_a_space_of_another_size_is_refused(self) -> None:
        key = new_key()
        async with closing(self.make_store()) as store, space_of(store, key) as space:
            await space.write(1, records(1, 1))
            for pages, page_bytes in ((PAGES + 1, PAGE), (PAGES // 512, PAGE * 512)):
                try:
                    await store.open(key, pages, page_bytes)
                except StoreError as error:
                    assert str(error), "it has to say why"
                else:
                    raise AssertionError("a space of another size was opened")
            await _holds(space, 1, records(1, 1))

    @_in_trio
    async def test_closed_is_not_deleted(self) -> None:
        key = new_key()
        async with closing(self.make_store()) as store:
            space = await store.open(key, PAGES, PAGE)
            await space.write(1, records(1, 1))
            await space.aclose()
        async with closing(self.make_store()) as store, space_of(store, key) as again:
            await _holds(again, 1, records(1, 1))

    @_in_trio
    async def test_deleted_is_gone(self) -> None:
        key = new_key()
        async with closing(self.make_store()) as store:
            async with space_of(store, key) as space:
                await space.write(0, records(0, 200))
            async with space_of(store, key) as again:
                await _holds(again, 0, [None] * 200)

    @_in_trio
    async def test_sweep_removes_only_what_nobody_needs(self) -> None:
        keys = sorted(new_key() for _ in range(3))
        async with closing(self.make_store()) as store:
            for key in keys:
                space = await store.open(key, PAGES, PAGE)
                await space.write(0, records(0, 70))
                await space.aclose()
            swept = await store.sweep(lambda key: key != keys[0] and key != keys[2])
            assert sorted(key for key in swept if key in keys) == [keys[0], keys[2]]
            assert not {keys[0], keys[2]} & set(await store.sweep(lambda key: key == keys[1]))
            async with space_of(store, keys[1]) as kept:
                await _holds(kept, 0, records(0, 70))
            async with space_of(store, keys[0]) as anew:
                await _holds(anew, 0, [None] * 70)

    @_in_trio
    async def test_what_was_cancelled_does_not_land_later(self) -> None:
        async with closing(self.make_store()) as store, space_of(store) as space:
            for first, patience_s in _CANCELLED:
                old, new = (records(first, 512, version) for version in (0, 1))
                for call in (
                    functools.partial(space.write, first, old),
                    functools.partial(space.read, first, 512),
                    functools.partial(space.discard, first, 512),
                ):
                    with trio.move_on_after(patience_s):
                        await call()
                await space.write(first, new)
                await _holds(space, first, new)
            await trio.sleep(0.1)  # the time that something late has
            for first, _ in _CANCELLED:
                await _holds(space, first, records(first, 512, 1))


_CANCELLED = tuple(zip(range(0, PAGES, 512), (0, 0.0005, 0.001, 0.002, 0.005, 0.02, 0.05), strict=False))


async def _busy_guest(store: PageStore, seed: int) -> None:
    """Writes, discards and reads at random, and knows what must be there."""
    rng = random.Random(seed)
    wanted: list[bytes | None] = [None] * 512
    async with space_of(store) as space:
        for version in range(20):
            first = rng.randrange(500)
            count = rng.randint(1, min(100, 512 - first))
            fresh: Sequence[bytes | None]
            if rng.random() < 0.7:
                written = records(first, count, seed << 8 | version)
                await space.write(first, written)
                fresh = written
            else:
                await space.discard(first, count)
                fresh = [None] * count
            wanted[first : first + count] = fresh
            async with trio.open_nursery() as readers:
                for _ in range(3):
                    readers.start_soon(_reads, space, wanted, rng.randrange(512), rng.randint(1, 100))


async def _reads(space: PageSpace, wanted: Sequence[bytes | None], first: int, count: int) -> None:
    count = min(count, len(wanted) - first)
    await _holds(space, first, wanted[first : first + count])


def check(make_store: Callable[[], PageStore]) -> None:
    """All checks, without pytest. AssertionError: the store does not keep to one, whose name is in the traceback."""
    contract = PageStoreContract()
    contract.make_store = make_store  # type: ignore[method-assign]
    for name in sorted(dir(contract)):
        if name.startswith("test_"):
            getattr(contract, name)()
