# SPDX-License-Identifier: Apache-2.0
"""Compressed memory: one pool a guest (pool.c), in a file on tmpfs, so that it outlives a tierd that is killed, and not a reboot.

What a pool takes is the host's memory: it gives back what compression saves. Everything here blocks.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from tierd.native import Codec, TierKind
from tierd.store import StoreError
from tierd.store.directory import DirectoryStore, GuestFile, file_system_of, open_held

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
RESERVE_BYTES = 16 << 20  # of the file system, where the page tables of guests to come are, too
RESERVE_SHARE = 0.1


class PoolSpace(GuestFile):
    """One guest's pool. Implements store.Space. `codec`: the file is empty, and a pool is to be made in it."""

    kind = TierKind.MEMORY
    direct = drop_cache = late = False

    def __init__(self, fd: int, path: Path, codec: Codec | None) -> None:
        super().__init__(fd, path)
        self.codec = codec


_LIBRARIES = {Codec.LZ4: ("liblz4.so.1", "liblz4-1"), Codec.ZSTD: ("libzstd.so.1", "libzstd1")}  # and Debian's packages


class MemoryStore(DirectoryStore):
    """Implements store.Store in directory `path`. `capacity_bytes`: of all guests' pools together; None: what the file system
    has."""

    name, suffix, setting = "memory", ".pool", "memory"

    def __init__(self, path: Path, capacity_bytes: int | None, codec: Codec) -> None:
        """StoreError: the directory cannot hold pools; the text says why and what to do."""
        super().__init__(path, capacity_bytes)
        self._codec = codec
        kind = file_system_of(path)
        if kind != "tmpfs":
            raise StoreError(
                f"{path} is on {kind or 'an unknown file system'}: compressed memory must be on a tmpfs; set memory.path to a "
                "directory on one, /dev/shm/tierd for example"
            )

    def must_have_library(self) -> None:
        """StoreError: what compresses new pages is not installed."""
        library, package = _LIBRARIES[self._codec]
        try:
            ctypes.CDLL(library)
        except OSError as error:
            raise StoreError(f"compressed memory needs {library}: {error}; install it (Debian: {package})") from error

    def takes(self, page_bytes: int) -> bool:
        return page_bytes == PAGE_BYTES

    def create(self, key: str, pages: int, page_bytes: int) -> PoolSpace:
        return PoolSpace(*self.create_file(key), self._codec)

    def reserve_bytes(self, size: int) -> int:
        return max(RESERVE_BYTES, int(size * RESERVE_SHARE))


def reopen(path: Path) -> PoolSpace:
    """The pool that a predecessor made. StoreError: it is not there."""
    try:
        return PoolSpace(open_held(path, os.O_RDWR), path, None)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; nothing was touched") from error
