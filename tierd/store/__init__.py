# SPDX-License-Identifier: Apache-2.0
"""Where cold pages live. A space belongs to one guest and is addressed by page number: no slots, no map to lose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class StoreError(Exception):
    """A store cannot be used; the text says why and what to do."""


class Space(Protocol):
    """One guest's pages in a store: page n is at byte n * page_bytes of `fd`. The data plane reads and writes it there."""

    @property
    def fd(self) -> int: ...
    @property
    def path(self) -> Path: ...
    @property
    def direct(self) -> bool:
        """Opened with O_DIRECT: a write that returned went to the device. Else fdatasync is needed per batch."""
        ...

    @property
    def late(self) -> bool:
        """What a process that was killed had in flight may still land: such pages are not evicted again (quarantine)."""
        ...

    @property
    def drop_cache(self) -> bool:
        """Written pages stay in the page cache, which would give nothing back: to be dropped after a sync."""
        ...

    def used_bytes(self) -> int:
        """Space that the guest's pages take."""
        ...

    def close(self) -> None: ...
    def delete(self) -> None:
        """Remove the pages for good. Blocks: a large file takes its file system a while."""
        ...


class Store(Protocol):
    """A place for the spaces of many guests."""

    def create(self, key: str, pages: int, page_bytes: int) -> Space:
        """A new space for guest `key` (PID-STARTTICKS). StoreError. Blocks."""
        ...

    def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """Remove the spaces of guests that are gone, which `may_be_needed` says by key; the keys removed. Blocks."""
        ...

    def used_bytes(self) -> int: ...
    def free_bytes(self) -> int:
        """What may still be written, by capacity and by the file system."""
        ...
