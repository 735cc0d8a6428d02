# SPDX-License-Identifier: Apache-2.0
"""Two stores that hold every page: who is asked, for how long, and what is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import pytest
import trio
import trio.testing

from tests.store.test_contract import Place, Store
from tests.store.test_seal import Dictionary
from tierd.store import IntegrityError, PageSpace, PageStore, StoreError
from tierd.store.mirror import SILENT_S, MirroredSpace
from tierd.testing import PageStoreContract

PATIENCE_S = 1.0


class Mirrored:
    """Implements PageStore over two."""

    def __init__(self, first: Store, second: Store) -> None:
        self.both = first, second

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:
        first, second = [await store.open(key, pages, page_bytes) for store in self.both]
        return MirroredSpace(first, second, PATIENCE_S, lambda page, record: True, never, never, all_is_well)

    async def probe(self) -> None:
        for store in self.both:
            await store.probe()

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        first, second = [await store.sweep(may_be_needed) for store in self.both]
        return sorted({*first, *second})

    async def aclose(self) -> None:
        for store in self.both:
            await store.aclose()


def never(*told: object) -> None:
    raise AssertionError(told)


def all_is_well(is_second: bool, error: Exception | None) -> None:
    assert error is None


class OneIsEnough(Store):
    """Tells half of what it uses: the suite counts pages once."""

    class space(Store.space):
        async def used_bytes(self) -> int:
            return await super().used_bytes() // 2


class TestMirrored(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _places(self) -> None:
        self.places = Place(), Place()

    def make_store(self) -> PageStore:
        first, second = map(OneIsEnough, self.places)
        return Mirrored(first, second)


class Copy(Dictionary):
    """One of two, that takes its time, or fails."""

    def __init__(self, *pages: int) -> None:
        super().__init__()
        self.records = {page: b"page %d" % page for page in pages}
        self.reads, self.takes_s = 0, 0.0
        self.fails: Exception | None = None

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        self.reads += 1
        await trio.sleep(self.takes_s)
        if self.fails:
            raise self.fails
        return await super().read(first_page, count)


class Two:
    """And what they tell."""

    def __init__(self) -> None:
        self.first, self.second = Copy(*range(4)), Copy(*range(4))
        self.wrong: list[int] = []
        self.missing: list[tuple[int, bool, str]] = []
        self.ended: list[tuple[bool, Exception | None]] = []

        def is_right(page: int, record: bytes) -> bool:
            return record == b"page %d" % page

        self.space = MirroredSpace(
            self.first,
            self.second,
            PATIENCE_S,
            is_right,
            self.wrong.append,
            lambda *told: self.missing.append(told),
            lambda *told: self.ended.append(told),
        )

    async def read(self, first_page: int, count: int) -> None:
        wanted: Sequence[bytes | None] = [b"page %d" % page for page in range(first_page, first_page + count)]
        assert await self.space.read(first_page, count) == wanted

    @property
    def reads(self) -> tuple[int, int]:
        return self.first.reads, self.second.reads


def in_trio(check: Callable[[Two], Awaitable[None]]) -> Two:
    two = Two()
    trio.run(check, two, clock=trio.testing.MockClock(autojump_threshold=0))
    return two


def test_the_first_is_asked_and_nothing_is_told() -> None:
    async def check(two: Two) -> None:
        await two.read(0, 4)
        assert two.reads == (1, 0)

    two = in_trio(check)
    assert not two.wrong
    assert not two.missing
    assert two.ended == [(False, None)]


def test_one_that_takes_too_long_is_asked_last_for_a_while_and_then_first_again() -> None:
    async def check(two: Two) -> None:
        two.first.takes_s = 5.0
        began = trio.current_time()
        await two.read(0, 1)
        assert trio.current_time() - began == pytest.approx(PATIENCE_S)
        two.first.takes_s = 0.0
        await two.read(1, 1)
        assert two.reads == (1, 2), "it is not asked"
        await trio.sleep(SILENT_S)
        await two.read(2, 1)
        assert two.reads == (2, 2), "it is asked first again, and the second not at all"

    two = in_trio(check)
    assert not two.missing, "it is only slow"
    assert two.ended == [(True, None), (True, None), (False, None)]


def test_of_two_that_are_silent_the_last_one_has_all_the_time() -> None:
    async def check(two: Two) -> None:
        two.first.takes_s, two.second.takes_s = 100.0, 5.0
        await two.read(0, 1)
        assert two.reads == (1, 1)

    in_trio(check)


def test_one_that_has_something_else_instead_of_a_page_has_lost_it() -> None:
    async def check(two: Two) -> None:
        two.first.fails = IntegrityError("page 0 is not what was sealed")
        await two.read(0, 1)

    two = in_trio(check)
    assert two.missing == [(0, False, "page 0 is not what was sealed")]
    assert two.ended == [(True, None)]
    assert not two.wrong


@pytest.mark.parametrize(
    "error", [OSError(5, "broken"), StoreError("refuses the credentials"), KeyError("a plug-in's")]
)
def test_one_that_fails_has_lost_nothing(error: Exception) -> None:
    async def check(two: Two) -> None:
        two.first.fails = error
        await two.read(0, 1)
        two.second.fails = error
        with pytest.raises(type(error)):
            await two.read(1, 1)

    two = in_trio(check)
    assert not two.missing
    assert not two.wrong
    assert two.ended[:2] == [(False, error), (True, None)]
    assert sorted(two.ended[2:], key=str) == [(False, error), (True, error)]


def test_a_page_that_one_does_not_have_is_told_and_the_others_are_not() -> None:
    async def check(two: Two) -> None:
        del two.first.records[1]
        await two.read(0, 4)
        assert two.missing == [(1, False, "it does not have it")]
        two.first.takes_s = 5.0
        await two.read(0, 1)  # the second one comes first now
        two.first.takes_s = 0.0
        del two.second.records[2]
        await two.read(2, 1)
        assert two.missing[1:] == [(2, True, "it does not have it")]
        del two.first.records[2]
        assert await two.space.read(2, 1) == [None]
        assert len(two.missing) == 2, "that neither has it is told by whoever wants it"

    in_trio(check)


def test_a_page_that_one_has_wrong_is_told_as_that() -> None:
    async def check(two: Two) -> None:
        two.first.records[1] = b"page 2"
        await two.read(0, 4)

    two = in_trio(check)
    assert (two.wrong, two.missing) == ([1], [])
