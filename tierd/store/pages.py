# SPDX-License-Identifier: Apache-2.0
"""Stores that Python reads and writes: a guest's pages by number, as records. Their faults are parked until trio has the page.

A record is opaque: the bytes of a page, perhaps sealed and so somewhat longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class PageSpace(Protocol):
    """One guest's pages. All of it runs in trio's thread and may be called by several tasks at once, but no page is written
    by two of them."""

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        """Durable when it returns. OSError, StoreError: a part may have been written."""
        ...

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        """None: not there. OSError: not known, or what is there is not what was written."""
        ...

    async def discard(self, first_page: int, count: int) -> None:
        """Nobody needs these pages any more. What was not there stays so."""
        ...

    async def used_bytes(self) -> int: ...
    async def delete(self) -> None:
        """Remove the pages for good, open or closed. OSError: some are left, a sweep finds them."""
        ...

    async def aclose(self) -> None: ...


class PageStore(Protocol):
    """A place for the pages of many guests, perhaps of many hosts."""

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:
        """The space of guest `key` (PID-STARTTICKS: unique on this host until it reboots): a new one, or what a predecessor
        left, who may have been killed at any instruction. StoreError: nothing was touched."""
        ...

    async def probe(self) -> None:
        """Try it. StoreError: it cannot be used; says why and what to do."""
        ...

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """Remove the spaces of this host's guests that are gone, which `may_be_needed` says by key; the keys removed.
        OSError: some are left, for the next sweep."""
        ...

    async def aclose(self) -> None: ...
