# SPDX-License-Identifier: Apache-2.0
"""Those who write to a store: one that seals; a guest that evicts all the time, tries again when its store fails, and knows what
the store must have."""

from __future__ import annotations

import random
from pathlib import Path

import trio

from tierd.store import PageSpace
from tierd.store.records import RecordSpace
from tierd.store.seal import SealKey
from tierd.testing import PAGE, PAGES, records


def sealed(space: PageSpace, directory: Path, guest: str, pages: int) -> RecordSpace:
    """With the key in `directory`, or a new one."""
    there = (directory / f"{guest}.store.key").exists()
    make = SealKey.reopen if there else SealKey.create
    return RecordSpace(space, PAGE, make(directory, "store", guest, pages))


class Writer:
    """Runs of pages of rising versions. `sure` is what a write has returned for, `maybe` what one failed with."""

    def __init__(self, space: PageSpace, seed: int) -> None:
        self.space, self._rng = space, random.Random(seed)
        self._sure: dict[int, int] = {}
        self._maybe: dict[int, set[int]] = {}
        self._version = self.written = self.failed = 0
        self._news = trio.Event()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            first = self._rng.randrange(PAGES - 128)
            await self._write(range(first, first + self._rng.randint(1, 128)))

    async def _write(self, pages: range) -> None:
        self._version += 1
        for page in pages:
            self._maybe.setdefault(page, set()).add(self._version)
        try:
            await self.space.write(pages.start, records(pages.start, len(pages), self._version, 256))
        except OSError:
            self.failed += 1
            await trio.sleep(0.05)
        else:
            self.written += 1
            for page in pages:
                self._sure[page] = self._version
                self._maybe[page].clear()
        self._news.set()
        self._news = trio.Event()

    async def has_written(self, count: int) -> None:
        """So many more runs."""
        wanted = self.written + count
        while self.written < wanted:
            await self._news.wait()

    async def has_failed(self) -> None:
        wanted = self.failed + 1
        while self.failed < wanted:
            await self._news.wait()

    async def verify(self) -> None:
        """Each page is what a write returned for, or one that failed since."""
        for first in range(0, PAGES, 256):
            for page, record in enumerate(await self.space.read(first, 256), first):
                sure = {self._sure[page]} if page in self._sure else set()
                allowed: list[bytes | None] = [
                    records(page, 1, version, 256)[0] for version in sure | self._maybe.get(page, set())
                ]
                assert record in (allowed if sure else [*allowed, None]), f"page {page}"
