# SPDX-License-Identifier: Apache-2.0
"""The contract suite: a store that keeps to it passes, each way to break it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from tests.store.writers import sealed
from tierd.store import PageSpace, StoreError
from tierd.store.records import RecordSpace
from tierd.testing import PAGE, check


class Place:
    """What outlives a store: spaces by key."""

    def __init__(self) -> None:
        self.spaces: dict[str, tuple[int, int, dict[int, bytes]]] = {}


class Space:
    def __init__(self, place: Place, key: str) -> None:
        self.place, self.key = place, key
        self.pages = place.spaces[key][2]

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        self.pages.update(enumerate(records, first_page))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        await trio.lowlevel.checkpoint()
        return [self.pages.get(page) for page in range(first_page, first_page + count)]

    async def discard(self, first_page: int, count: int) -> None:
        await trio.lowlevel.checkpoint()
        for page in range(first_page, first_page + count):
            self.pages.pop(page, None)

    async def used_bytes(self) -> int:
        return len(self.pages) * PAGE

    async def delete(self) -> None:
        self.place.spaces.pop(self.key, None)

    async def aclose(self) -> None:
        pass


class Store:
    space = Space

    def __init__(self, place: Place) -> None:
        self.place = place

    async def open(self, key: str, pages: int, page_bytes: int) -> Space:
        if self.place.spaces.setdefault(key, (pages, page_bytes, {}))[:2] != (pages, page_bytes):
            raise StoreError("it has another size")
        return self.space(self.place, key)

    async def probe(self) -> None:
        pass

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        gone = [key for key in self.place.spaces if not may_be_needed(key)]
        for key in gone:
            del self.place.spaces[key]
        return gone

    async def aclose(self) -> None:
        pass


class OnlyTheFirstOfARun(Space):
    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await super().write(first_page, records[:1])


class TheFirstWriteCounts(Space):
    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        for page, record in enumerate(records, first_page):
            self.pages.setdefault(page, record)


class CutsRecords(Space):
    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await super().write(first_page, [record[:PAGE] for record in records])


class StripsRecords(Space):
    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await super().write(first_page, [record.rstrip(b"\0\r\n") for record in records])


class ZerosForWhatIsMissing(Space):
    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        return [record or bytes(PAGE) for record in await super().read(first_page, count)]


class SkipsWhatIsMissing(Space):
    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        return [record for record in await super().read(first_page, count) if record is not None]


class DiscardsTooMuch(Space):
    async def discard(self, first_page: int, count: int) -> None:
        await super().discard(first_page & ~63, (count + 63 + first_page % 64) & ~63)


class DiscardsNothing(Space):
    async def discard(self, first_page: int, count: int) -> None:
        pass


class CountsWrites(Space):
    written = 0

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await super().write(first_page, records)
        self.written += len(records)

    async def used_bytes(self) -> int:
        return self.written * PAGE


class DeletesNothing(Space):
    async def delete(self) -> None:
        pass


class DeletesAtTheEnd(Space):
    async def aclose(self) -> None:
        await self.delete()


class WritesAtTheEnd(Space):
    """Durable only when it is closed."""

    def __init__(self, place: Place, key: str) -> None:
        super().__init__(place, key)
        self.pages = dict(self.pages)

    async def aclose(self) -> None:
        if self.key in self.place.spaces:
            self.place.spaces[self.key][2].update(self.pages)


class WritesLate(Space):
    """What is cancelled goes on behind."""

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        try:
            await trio.sleep(0.001)
        except trio.Cancelled:
            trio.lowlevel.spawn_system_task(self._later, first_page, records)
            raise
        await super().write(first_page, records)

    async def _later(self, first_page: int, records: Sequence[bytes]) -> None:
        await trio.sleep(0.003)
        self.pages.update(enumerate(records, first_page))


class OneSpaceForAll(Store):
    async def open(self, key: str, pages: int, page_bytes: int) -> Space:
        return await super().open("all", pages, page_bytes)


class TakesAnySize(Store):
    async def open(self, key: str, pages: int, page_bytes: int) -> Space:
        self.place.spaces.setdefault(key, (pages, page_bytes, {}))
        return self.space(self.place, key)


class SweepsEverything(Store):
    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        return await super().sweep(lambda key: False)


class SweepsNothing(Store):
    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        return [key for key in self.place.spaces if not may_be_needed(key)]


class StartsAnew(Store):
    async def open(self, key: str, pages: int, page_bytes: int) -> Space:
        self.place.spaces.pop(key, None)
        return await super().open(key, pages, page_bytes)


class Refuses(Store):
    async def probe(self) -> None:
        raise StoreError("never")


def test_a_store_that_keeps_to_it_passes() -> None:
    place = Place()
    check(lambda: Store(place))
    assert not place.spaces, "the suite removes what it made"


class WrappedStore(Store):
    """Pages are compressed, and sealed if there is a directory for keys."""

    def __init__(self, place: Place, keys: Path | None) -> None:
        super().__init__(place)
        self.keys = keys

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:  # type: ignore[override]
        space: PageSpace = await super().open(key, pages, page_bytes)
        return sealed(space, self.keys, key, pages) if self.keys else RecordSpace(space, page_bytes)


def test_a_store_of_compressed_pages_keeps_to_it() -> None:
    place = Place()
    check(lambda: WrappedStore(place, None))


def test_a_store_of_compressed_and_sealed_pages_keeps_to_it(tmpfs_dir: Path) -> None:
    place = Place()
    check(lambda: WrappedStore(place, tmpfs_dir))


@pytest.mark.parametrize(
    "broken",
    [
        OnlyTheFirstOfARun,
        TheFirstWriteCounts,
        CutsRecords,
        StripsRecords,
        ZerosForWhatIsMissing,
        SkipsWhatIsMissing,
        DiscardsTooMuch,
        DiscardsNothing,
        CountsWrites,
        DeletesNothing,
        DeletesAtTheEnd,
        WritesAtTheEnd,
        WritesLate,
        OneSpaceForAll,
        TakesAnySize,
        SweepsEverything,
        SweepsNothing,
        StartsAnew,
        Refuses,
    ],
)
def test_what_breaks_it_is_noticed(broken: type[Space] | type[Store]) -> None:
    place = Place()

    def make_store() -> Store:
        if issubclass(broken, Store):
            return broken(place)
        store = Store(place)
        store.space = broken  # type: ignore[misc]
        return store

    with pytest.raises((AssertionError, StoreError, ExceptionGroup)):
        check(make_store)
