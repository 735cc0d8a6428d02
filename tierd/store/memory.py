# SPDX-License-Identifier: Apache-2.0
"""Compressed memory: one pool a guest (pool.c), in a file on tmpfs, so that it outlives a tierd that is killed, and not a reboot.

What a pool takes is the host's memory: it gives back what compression saves. Everything here blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tierd.native import Codec, TierKind
from tierd.store import StoreError
from tierd.store.directory import GuestFiles, file_system_of, open_ours

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
RESERVE_BYTES = 16 << 20  # of the file system, where the page tables of guests to come are, too
RESERVE_SHARE = 0.1


class PoolSpace:
    """One guest's pool. Implements store.Space. `codec`: the file is empty, and a pool is to be made in it."""

    kind = TierKind.MEMORY
    direct = drop_cache = late = False

    def __init__(self, fd: int, path: Path, codec: Codec | None) -> None:
        self.fd, self.path, self.codec = fd, path, codec

    def used_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        os.close(self.fd)

    def delete(self) -> None:
        """Remove the file, open or closed. It may be gone already."""
        self.path.unlink(missing_ok=True)


class MemoryStore:
    """Implements store.Store in directory `path`. `capacity_bytes`: of all guests' pools together, None: what the file system
    has."""

    name = "memory"
    trouble = ""

    def __init__(self, path: Path, capacity_bytes: int | None, codec: Codec) -> None:
        """StoreError: the directory cannot hold pools; the text says why and what to do."""
        self._files = GuestFiles(path, ".pool", "memory.path")
        self.path = path
        self._capacity_bytes, self._codec = capacity_bytes, codec
        kind = file_system_of(path)
        if kind != "tmpfs":
            raise StoreError(
                f"{path} is on {kind or 'an unknown file system'}: compressed memory must be on a tmpfs; set memory.path to a "
                "directory on one, /dev/shm/tierd for example"
            )

    def takes(self, page_bytes: int) -> bool:
        return page_bytes == PAGE_BYTES

    def create(self, key: str, pages: int, page_bytes: int) -> PoolSpace:
        return PoolSpace(*self._files.create(key), self._codec)

    def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        return self._files.sweep(may_be_needed)

    def used_bytes(self) -> int:
        return self._files.used_bytes()

    def free_bytes(self) -> int:
        disk = os.statvfs(self.path)
        reserve = max(RESERVE_BYTES, int(disk.f_blocks * disk.f_frsize * RESERVE_SHARE))
        free = max(disk.f_bavail * disk.f_frsize - reserve, 0)
        if self._capacity_bytes is not None:
            free = min(free, max(self._capacity_bytes - self.used_bytes(), 0))
        return free


def reopen(path: Path) -> PoolSpace:
    """The pool that a predecessor made. StoreError: it is not there."""
    try:
        return PoolSpace(open_ours(path, os.O_RDWR), path, None)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; nothing was touched") from error
