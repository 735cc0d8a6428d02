# SPDX-License-Identifier: Apache-2.0
"""Two stores that hold every page until it is fetched (`second:`): what one loses, the other gives."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from tierd.store import IntegrityError, PageSpace, StoreError
from tierd.store.records import write_runs

SILENT_S = 10.0


class MirroredSpace:
    """Implements store.PageSpace over two of them. A write or discard is done when both have done it. A page is read from the
    first; if that fails, does not have it, has something else (a seal tells, or `is_right`), or takes `patience_s`, from the
    second. One that did not answer or has something else is asked last for a while. Where only one has a page, or has it right,
    that is told; so is what each read of one ended with."""

    def __init__(
        self,
        first: PageSpace,
        second: PageSpace,
        patience_s: float,
        is_right: Callable[[int, bytes], bool],
        tell_wrong: Callable[[int], None],
        tell_missing: Callable[[int, bool, str], None],
        tell_read: Callable[[bool, Exception | None], None],
    ) -> None:
        """`tell_wrong`: of a page, that one of the two has it wrong. `tell_missing`: of a page, that one lost it and the other
        gives it; whether that is the second one, and what it says. `tell_read`: whether the second one was read, and what failed,
        None: it gave pages. A loss is no failure, nor is it to be slow."""
        self._first, self._second, self._patience_s = first, second, patience_s
        self._is_right, self._tell_wrong = is_right, tell_wrong
        self._tell_missing, self._tell_read = tell_missing, tell_read
        self._silent_until = {first: -math.inf, second: -math.inf}

    @property
    def compressed_to(self) -> float:
        return float(getattr(self._first, "compressed_to", 0.0))

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self.write_runs([(first_page, records)])

    async def write_runs(self, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        await self._both(lambda space: write_runs(space, runs))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        records: list[bytes | None] = [None] * count
        errors: list[Exception] = []
        wrong: set[int] = set()
        lost = "it does not have it"  # the one that is asked before; "": it may have it
        now = trio.current_time()
        spaces = sorted((self._first, self._second), key=lambda space: max(self._silent_until[space], now))
        for space in spaces:
            last, is_second = space is spaces[-1], space is self._second  # the last has as long as the caller has
            try:
                with trio.fail_after(math.inf if last else self._patience_s):
                    found = await space.read(first_page, count)
            except Exception as error:  # a plug-in's may be any
                errors.append(error)
                lost = str(error) or repr(error) if isinstance(error, IntegrityError) else ""
                if not isinstance(error, IntegrityError | trio.TooSlowError):
                    self._tell_read(is_second, error)
                if not isinstance(error, StoreError):
                    self._silent_until[space] = trio.current_time() + SILENT_S
                continue
            if any(record is not None for record in found):
                self._tell_read(is_second, None)
            for page, record in enumerate(found, first_page):
                if record is not None and not self._is_right(page, record):
                    wrong.add(page)
                    self._silent_until[space] = trio.current_time() + SILENT_S
                    self._tell_wrong(page)
                elif record is not None and records[page - first_page] is None:
                    records[page - first_page] = record
                    if last and lost and page not in wrong:
                        self._tell_missing(page, not is_second, lost)
            if None not in records:
                return records
        if errors and records[:1] in ([], [None]):
            raise errors[0]
        return records

    async def discard(self, first_page: int, count: int) -> None:
        await self._both(lambda space: space.discard(first_page, count))

    async def used_bytes(self) -> int:
        return await self._first.used_bytes() + await self._second.used_bytes()

    async def delete(self) -> None:
        await self._both(lambda space: space.delete())

    async def aclose(self) -> None:
        await self._both(lambda space: space.aclose())

    async def _both(self, call: Callable[[PageSpace], Awaitable[None]]) -> None:
        """At the same time; when both have ended, the error of one."""
        errors: list[OSError | StoreError] = []

        async def one(space: PageSpace) -> None:
            try:
                await call(space)
            except (OSError, StoreError) as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for space in (self._first, self._second):
                nursery.start_soon(partial(one, space))
        if errors:
            raise errors[0]
