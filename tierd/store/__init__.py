# SPDX-License-Identifier: Apache-2.0
"""Where cold pages live. A space belongs to one guest and is addressed by page number: no slots, no map to lose.

Policies name stores as tiers, in the order in which pages sink: compressed memory (`memory`), a disk (`file`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tierd.native import Codec, TierKind


class StoreError(Exception):
    """A store cannot be used; the text says why and what to do."""


class Space(Protocol):
    """One guest's pages in a store, which the data plane reads and writes: a file in which page n is at byte n * page_bytes, or
    the file of a pool."""

    @property
    def kind(self) -> TierKind: ...
    @property
    def fd(self) -> int: ...
    @property
    def path(self) -> Path: ...
    @property
    def codec(self) -> Codec | None:
        """Of a pool that is to be made in an empty file."""
        ...

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

    @property
    def name(self) -> str:
        """By which policies speak of it."""
        ...

    @property
    def path(self) -> Path: ...
    @property
    def trouble(self) -> str:
        """Why it cannot be written now, where guests' pages are in it all the same; else empty."""
        ...

    def takes(self, page_bytes: int) -> bool:
        """Whether it stores pages of this size."""
        ...

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
