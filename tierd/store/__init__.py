# SPDX-License-Identifier: Apache-2.0
"""Where cold pages live. A space belongs to one guest and is addressed by page number: no slots, no map to lose.

Policies name stores as tiers, in the order in which pages sink: compressed memory (`memory`), a disk (`file`), and others by
name. So there are two kinds. Of a Store the data plane has a descriptor: it reads and writes there by itself, and no Python runs
on a fault. A PageStore is asked by trio (parking): anything that can be reached from Python, plug-ins among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tierd.native import Codec, TierKind


class StoreError(Exception):
    """A store cannot be used; the text says why and what to do."""


class IntegrityError(StoreError):
    """What a store gave back is not what was written there last: changed, swapped, cut off or old."""


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

    @property
    def secret(self) -> bytes:
        """The key of a file whose pages are encrypted; else empty."""
        ...

    @property
    def opened(self) -> bool:
        """Pages can be read from it."""
        ...

    @property
    def ready(self) -> bool:
        """Pages may be written to it."""
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
    def free_bytes(self, *, now: bool = False) -> int:
        """What may still be written, by capacity and by the file system. `now`: and not as of a moment ago."""
        ...


class PageSpace(Protocol):
    """One guest's pages in a PageStore. A record is what is stored of one page: opaque bytes, a page or a little more.

    Calls on one space may overlap, but never two that name the same page, unless both read. Run in trio. OSError: it did
    not work this time (ENOSPC: it is full). StoreError: it will not work until somebody sees to it; the text says what to
    do. A call that is cancelled may have been carried out, in part or whole, but is over when the cancellation comes
    back: nothing of it lands later. The same after an error, or the next write, discard or open makes sure of it.

    What is wrong though calls work (rubbish that cannot be removed, say) stands in `trouble`, if it has that: the operator is
    told.
    """

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        """Store records[i] as page first_page + i, durably: when this returns they survive what the store promises to
        survive. After an error each page has its old record, its new one, or none."""
        ...

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        """The records of `count` pages; None: none is there."""
        ...

    async def discard(self, first_page: int, count: int) -> None:
        """Forget these pages, whether they are there or not. After an error each may still be there."""
        ...

    async def used_bytes(self) -> int:
        """Space that the guest's pages take, as far as the store can tell."""
        ...

    async def delete(self) -> None:
        """Remove the space and its pages for good; it is closed then. After an error: again, or sweep does it."""
        ...

    async def aclose(self) -> None:
        """Let go of it; pages stay. May be called after delete."""
        ...


@runtime_checkable
class RunsSpace(Protocol):
    """A PageSpace that stores many runs at once for less than one by one."""

    async def write_runs(self, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        """As `write` of each: its first page and records. In ascending order."""
        ...


class PageStore(Protocol):
    """A place for the spaces of many guests that trio asks for pages. Nothing is done before the first call. One that has
    `piece_bytes` gets longer runs in pieces of so much guest memory, some at the same time; one that has `takes_runs` has spaces
    that are RunsSpaces, and gets all runs of a batch in one call."""

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:
        """The space of guest `key` (PID-STARTTICKS, unique on this host until it is booted again): a new one, or the one
        that a predecessor left, of which nothing that was under way lands any more. StoreError: it has another size; OSError."""
        ...

    async def probe(self) -> None:
        """StoreError: cannot be used as it is configured; the text says why and what to do. Changes nothing that stays."""
        ...

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """Remove the spaces of this host's guests that are gone: those of this boot whose key `may_be_needed` does not know, and
        those of other boots; the keys removed. `may_be_needed` is called in trio's thread. OSError, StoreError.

        Called at the start and every minute while tierd runs. A store that several hosts can reach takes that as the sign
        that this boot lives, and removes what another boot has only when there was none of it for some time: a machine that
        is a copy of this one has the same host_id."""
        ...

    async def aclose(self) -> None:
        """Let go of everything; pages stay."""
        ...


@dataclass(frozen=True)
class StoreContext:
    """What a store is told beside its own keys in the configuration."""

    # ours, on tmpfs: for what has to outlive tierd and not a boot, in a directory of the store's name
    runtime_dir: Path
    concurrency: int = 8  # how many calls are made at a time
    deadline_s: float = 10.0  # how long a read is waited for


# What the entry point of a store is (group `tierd.stores`): it makes the store of its keys in the configuration, without
# asking anybody or touching a file yet. StoreError: a key is wrong; the text names it.
PageStoreFactory = Callable[[Mapping[str, object], StoreContext], PageStore]
