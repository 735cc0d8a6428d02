# SPDX-License-Identifier: Apache-2.0
"""The file store: one sparse file a guest, mode 0600 in a 0700 directory of ours.

A page's offset is its number times the page size, so neighbours stay neighbours and a run is one call. Reads and writes are
made by the data plane (store.c). Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import Literal

from tierd.native import TierKind
from tierd.store import StoreError
from tierd.store.directory import (
    LOCAL_FILE_SYSTEMS,
    DirectoryStore,
    GuestFile,
    file_system_of,
    open_held,
    refuse_memory,
)
from tierd.store.keys import FileKey

SEALED_PAGE_BYTES_MAX = 16 << 20  # of XTS in one unit, which a page is
RESERVE_BYTES = 256 << 20  # of the file system, for others; and so that a full disk is our decision, not an error


class FileSpace(GuestFile):
    """One guest's file. Implements store.Space."""

    kind, codec = TierKind.FILE, None

    def __init__(self, fd: int, path: Path, direct: bool, key: FileKey | None = None) -> None:
        """`key`: its pages are encrypted."""
        super().__init__(fd, path)
        self._key, self.secret = key, key.secret if key else b""
        self.direct, self.drop_cache = direct, not direct
        self.late = file_system_of(path.parent) not in LOCAL_FILE_SYSTEMS

    def missing(self) -> Path | None:
        return super().missing() or (self._key.path if self._key and not self._key.path.exists() else None)

    def delete(self) -> None:
        try:
            if self._key:
                self._key.destroy()  # first of all: whatever becomes of the file, nobody can read it
        finally:
            super().delete()


class FileStore(DirectoryStore):
    """Implements store.Store in directory `path`. `capacity_bytes`: of all guests together, None: what the disk has. `keys_dir`,
    on a tmpfs: new files are encrypted."""

    name, suffix, setting = "file", ".pages", "store"

    def __init__(
        self,
        path: Path,
        capacity_bytes: int | None,
        direct: Literal["auto", "on", "off"],
        keys_dir: Path | None = None,
    ) -> None:
        """StoreError: the directory cannot hold guests' pages; the text says why and what to do."""
        super().__init__(path, capacity_bytes)
        refuse_memory(path, "store.path")
        self.keys_dir = keys_dir
        self.direct = self._choose_direct(direct)

    def _choose_direct(self, wanted: Literal["auto", "on", "off"]) -> bool:
        if wanted == "off":
            return False
        try:
            problem = self._try_direct()
        except StoreError as error:
            if not self.any():
                raise
            # full, or read-only after an error: evicting must wait, but those who wait for their pages must not
            self.trouble = str(error)
            return wanted == "on"
        if problem and wanted == "on":
            raise StoreError(f"{self.path} does not take O_DIRECT ({problem}); set store.direct to auto or off")
        return problem is None

    def _try_direct(self) -> str | None:
        """None when one page written with O_DIRECT is read back; else why not."""
        scratch = self.path / f".tierd-direct-{os.getpid()}"
        try:
            scratch.unlink(missing_ok=True)  # of a tierd that died just here; in a container all have the same pid
            fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)  # some file systems create the file before they refuse the flag
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return "open(2) refuses it"
            raise StoreError(
                f"{self.path} cannot be written: {error.strerror}; make it writable or set store.path"
            ) from error
        try:
            # nested, because a mapping with a view of it left cannot be closed
            with (
                mmap.mmap(-1, 2 * mmap.PAGESIZE) as pages,
                memoryview(pages) as view,
                view[: mmap.PAGESIZE] as written,
                view[mmap.PAGESIZE :] as read,
            ):
                written[:] = b"\xa5" * mmap.PAGESIZE
                ok = os.pwritev(fd, [written], mmap.PAGESIZE) == mmap.PAGESIZE
                ok = ok and os.preadv(fd, [read], mmap.PAGESIZE) == mmap.PAGESIZE and read == written
            return None if ok else "a page came back different"
        except OSError as error:
            if error.errno == errno.EINVAL:
                return "blocks larger than a page"
            raise StoreError(f"{self.path} cannot be used: {error.strerror}; free space or set store.path") from error
        finally:
            os.close(fd)
            scratch.unlink(missing_ok=True)  # a try before this one may hang no more, and have removed it

    def takes(self, page_bytes: int) -> bool:
        return not self.keys_dir or page_bytes <= SEALED_PAGE_BYTES_MAX

    def create(self, key: str, pages: int, page_bytes: int) -> FileSpace:
        fd, path = self.create_file(key, os.O_DIRECT if self.direct else 0)
        try:
            os.ftruncate(fd, pages * page_bytes)
            file_key = FileKey.create(self.keys_dir, self.name, key) if self.keys_dir else None
            return FileSpace(fd, path, self.direct, file_key)
        except (OSError, StoreError) as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            if isinstance(error, StoreError):
                raise
            raise StoreError(
                f"{path} cannot be sized: {error.strerror}; does the file system take sparse files?"
            ) from error

    def reserve_bytes(self, size: int) -> int:
        return RESERVE_BYTES


def reopen(path: Path, pages: int, page_bytes: int, *, direct: bool, key: FileKey | None = None) -> FileSpace:
    """The space that a predecessor made at `path`, wherever new ones are made now, and encrypted with `key`. StoreError: it is
    not what was left there. Blocks."""
    o_direct = os.O_DIRECT if direct else 0
    try:
        try:
            fd = open_held(path, os.O_RDWR | o_direct)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            fd = open_held(path, os.O_RDONLY | o_direct)  # what is in there can still be read
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; nothing was touched") from error
    try:
        info = os.fstat(fd)
        if info.st_size != pages * page_bytes:
            raise StoreError(
                f"{path} has {info.st_size} bytes, {pages * page_bytes} were expected; nothing was touched"
            )
        return FileSpace(fd, path, direct, key)
    except BaseException:
        os.close(fd)
        raise
