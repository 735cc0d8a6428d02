# SPDX-License-Identifier: Apache-2.0
"""A store that trio asks, as guests see it: a tier of which the data plane has no descriptor.

What is read and written there goes through `tierd.parking`; this is what attach and adoption need to know, which run where there
is no trio yet. Nothing here does I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tierd.native import TierKind
from tierd.store import PageStore

PAGE_BYTES_MAX = 64 << 10  # a record is a page: 2 MiB are too much for one
UNLIMITED = 1 << 60


class AskedSpace:
    """One guest's pages there. Implements store.Space, without a file."""

    kind, fd, codec, secret = TierKind.ASKED, -1, None, b""
    direct = drop_cache = late = False  # what was in flight when tierd died is over when the space is opened again

    def __init__(self, name: str) -> None:
        self.path = Path()  # none: a page table says the store's name
        self.name = name
        self.opened = False  # by tierd.parking: pages can be read
        self.ready = False  # and be written
        self.counted: Callable[[], int] = int  # bytes of guest memory that are stored, by the data plane
        self.missing: Callable[[], Path | None] = lambda: None  # what a successor would not find: by tierd.parking

    def used_bytes(self) -> int:
        return self.counted()

    def close(self) -> None:
        """Who opened the pages closes them: tierd.parking."""

    def delete(self) -> None:
        """Tierd.parking does, or the store's sweep: the guest's state file is gone."""


@dataclass
class AskedStore:
    """The place of many spaces. Implements store.Store but for the sweep, which is `pages.sweep`."""

    name: str
    pages: PageStore
    keys_dir: Path  # on tmpfs
    capacity_bytes: int | None
    encrypt: bool
    second: str | None  # the store that holds every page, too
    concurrency: int  # reads and writes at a time
    deadline_s: float  # of one read
    trouble: str = ""  # as long as there is some, no page is written: it may be one that keeps none

    def __post_init__(self) -> None:
        self.path = Path(self.name)
        self._spaces: list[AskedSpace] = []
        self._counting = threading.Lock()  # workers of all guests count; nobody does any more in one that was forgotten

    def takes(self, page_bytes: int) -> bool:
        return page_bytes <= PAGE_BYTES_MAX

    def create(self, key: str, pages: int, page_bytes: int) -> AskedSpace:
        return AskedSpace(self.name)

    def note(self, space: AskedSpace) -> None:
        """A guest has pages there, or may have."""
        with self._counting:
            self._spaces.append(space)

    def forget(self, space: AskedSpace) -> None:
        with self._counting:
            self._spaces.remove(space)

    def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        return []

    def used_bytes(self) -> int:
        """Of guests that are served: guest memory, whatever the store makes of it."""
        with self._counting:
            return sum(space.used_bytes() for space in self._spaces)

    def free_bytes(self, *, now: bool = False) -> int:
        if self.trouble:
            return 0
        return UNLIMITED if self.capacity_bytes is None else max(self.capacity_bytes - self.used_bytes(), 0)
