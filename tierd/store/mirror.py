# SPDX-License-Identifier: Apache-2.0
"""Two stores that hold every page until it is fetched (`copies: 2`): what one loses, the other gives."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import trio

from tierd.store import PageSpace, StoreError

SILENT_S = 10.0


class MirroredSpace:
    """Implements store.PageSpace over two of them. A write or discard is done when both have done it. A page is read from the
    first; if that fails, does not have it, has something else (a seal tells, or `is_right`), or takes `patience_s`, from the
    second. One that did not answer or has something else is asked last for a while. Where only one has a page, or has it right,
    that is told."""

    def __init__(
        self,
        first: PageSpace,
        second: PageSpace,
        patience_s: float,
        is_right: Callable[[int, bytes], bool],
        tell_wrong: Callable[[int], None],
        tell_missing: Callable[[int, bool, str], None],
    ) -> None:
        """`tell_wrong`: of a page, that one of the two has it wrong. `tell_missing`: of a page, that one does not give it and the
        other does; whether it is the second one that does not, and what it says."""
        self._first, self._second, self._patience_s = first, second, patience_s
        self._is_right, self._tell_wrong, self._tell_missing = is_right, tell_wrong, tell_missing
        self._silent_until = {first: -math.inf, second: -math.inf}

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self._both(lambda space: space.write(first_page, records))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        records: list[bytes | None] = [None] * count
        errors: list[Exception] = []
        wrong: set[int] = set()
        why = "it does not have it"  # the one that is asked before; "": it was only slow
        now = trio.current_time()
        spaces = sorted((self._first, self._second), key=lambda space: max(self._silent_until[space], now))
        for space in spaces:
            last = space is spaces[-1]  # that one has as long as the caller has
            try:
                with trio.fail_after(math.inf if last else self._patience_s):
                    found = await space.read(first_page, count)
            except Exception as error:  # a plug-in's may be any
                errors.append(error)
                why = "" if isinstance(error, trio.TooSlowError) else str(error) or repr(error)
                if not isinstance(error, StoreError):
                    self._silent_until[space] = trio.current_time() + SILENT_S
                continue
            for page, record in enumerate(found, first_page):
                if record is not None and not self._is_right(page, record):
                    wrong.add(page)
                    self._silent_until[space] = trio.current_time() + SILENT_S
                    self._tell_wrong(page)
                elif record is not None and records[page - first_page] is None:
                    records[page - first_page] = record
                    if last and why and page not in wrong:
                        self._tell_missing(page, space is self._first, why)
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
