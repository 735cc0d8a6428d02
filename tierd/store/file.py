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
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tierd.store import StoreError

PREFIX, SUFFIX = "guest-", ".pages"
KEY = re.compile(r"[0-9]{1,10}-[0-9]{1,20}")
RESERVE_BYTES = 256 << 20  # of the file system, for others; and so that a full disk is our decision, not an error
USED_CACHE_S = 1.0
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
# where a thread that is killed in a read or write is gone only when the I/O is: on others (FUSE, NFS) a request that the
# kernel has given up may still land
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "jfs", "nilfs2"})


class FileSpace:
    """One guest's file. Implements store.Space."""

    def __init__(self, fd: int, path: Path, direct: bool) -> None:
        self.fd, self.path, self.direct = fd, path, direct
        self.drop_cache = not direct
        self.late = file_system_of(path.parent) not in LOCAL_FILE_SYSTEMS

    def used_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        os.close(self.fd)

    def delete(self) -> None:
        """Remove the file, open or closed. It may be gone already."""
        self.path.unlink(missing_ok=True)


class FileStore:
    """Implements store.Store in directory `path`. `capacity_bytes`: of all guests together, None: what the disk has."""

    def __init__(self, path: Path, capacity_bytes: int | None, direct: Literal["auto", "on", "off"]) -> None:
        """StoreError: the directory cannot hold guests' pages; the text says why and what to do."""
        self.path = path
        self._capacity_bytes = capacity_bytes
        self._used_at, self._used = -1e9, 0
        self.trouble = ""  # why it cannot be written now, where guests' pages are in it all the same
        private_directory(path, "store.path")
        self.direct = self._choose_direct(direct)

    def _choose_direct(self, wanted: Literal["auto", "on", "off"]) -> bool:
        if wanted == "off":
            return False
        try:
            problem = self._try_direct()
        except StoreError as error:
            if not any(self.path.glob(f"{PREFIX}*{SUFFIX}")):
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
            scratch.unlink()

    def create(self, key: str, pages: int, page_bytes: int) -> FileSpace:
        path = self.path / f"{PREFIX}{key}{SUFFIX}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            path.unlink(missing_ok=True)  # it can only be a leftover: pids and start times do not come back
            fd = os.open(path, flags | (os.O_DIRECT if self.direct else 0), 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}; see the directory's owner and mode") from error
        try:
            os.ftruncate(fd, pages * page_bytes)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise StoreError(
                f"{path} cannot be sized: {error.strerror}; does the file system take sparse files?"
            ) from error
        return FileSpace(fd, path, self.direct)

    def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        swept = []
        for path in sorted(self.path.glob(f"{PREFIX}*{SUFFIX}")):
            key = path.name[len(PREFIX) : -len(SUFFIX)]
            if KEY.fullmatch(key) and path.is_file() and not path.is_symlink() and not may_be_needed(key):
                try:
                    path.unlink()
                except OSError:  # a file system that is read-only now: the next sweep tries again
                    continue
                swept.append(key)
        return swept

    def used_bytes(self) -> int:
        """Blocks of all guests' files; looked up at most once a second."""
        if time.monotonic() - self._used_at > USED_CACHE_S:
            used = 0
            for path in self.path.glob(f"{PREFIX}*{SUFFIX}"):
                with contextlib.suppress(FileNotFoundError):  # a guest that is being deleted
                    used += path.lstat().st_blocks * 512
            self._used, self._used_at = used, time.monotonic()
        return self._used

    def free_bytes(self) -> int:
        disk = os.statvfs(self.path)
        free = max(disk.f_bavail * disk.f_frsize - RESERVE_BYTES, 0)
        if self._capacity_bytes is not None:
            free = min(free, max(self._capacity_bytes - self.used_bytes(), 0))
        return free


def private_directory(path: Path, key: str) -> None:
    """Make or check a directory on a disk that only we can read; `key` is what the operator sets it with. StoreError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise StoreError(
            f"the store's directory {path} cannot be made: {error.strerror}; create it, or set {key}"
        ) from error
    if not stat.S_ISDIR(info.st_mode):
        raise StoreError(f"the store's path {path} is not a directory; remove it, or set {key}")
    if info.st_uid != os.geteuid():
        raise StoreError(
            f"{path} belongs to user {info.st_uid}, tierd runs as {os.geteuid()}: guests' memory would "
            f"be theirs to read; chown it or set {key}"
        )
    if info.st_mode & 0o077:
        raise StoreError(
            f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others could read guests' memory; chmod 0700 {path}"
        )
    kind = file_system_of(path)
    if kind in MEMORY_FILE_SYSTEMS:
        raise StoreError(
            f"{path} is on {kind}: evicted pages would stay in memory and nothing would be given back; "
            f"set {key} to a directory on a disk"
        )


def reopen(path: Path, pages: int, page_bytes: int, *, direct: bool) -> FileSpace:
    """The space that a predecessor made at `path`, wherever new ones are made now. StoreError: it is not what was left
    there. Blocks."""
    o_direct = os.O_DIRECT if direct else 0
    try:
        try:
            fd = open_ours(path, os.O_RDWR | o_direct)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            fd = open_ours(path, os.O_RDONLY | o_direct)  # what is in there can still be read
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; nothing was touched") from error
    try:
        info = os.fstat(fd)
        if info.st_size != pages * page_bytes:
            raise StoreError(
                f"{path} has {info.st_size} bytes, {pages * page_bytes} were expected; nothing was touched"
            )
    except BaseException:
        os.close(fd)
        raise
    return FileSpace(fd, path, direct)


def open_ours(path: Path, flags: int) -> int:
    """Open a file that exists and that only this user can have put there. Never waits: what is not a regular file (a FIFO
    waits for its other end, a device may do anything) is looked at, not opened. OSError says what it is."""
    looked_at = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(looked_at)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(
                errno.EPERM, f"it is {_KINDS.get(stat.S_IFMT(info.st_mode), 'not a file')}, not a regular file"
            )
        if info.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"it belongs to user {info.st_uid}, tierd runs as {os.geteuid()}")
        return os.open(f"/proc/self/fd/{looked_at}", flags | os.O_CLOEXEC)
    finally:
        os.close(looked_at)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def file_system_of(path: Path) -> str:
    """Type of the file system that holds `path`, by the kernel's mount table ("" when it does not say)."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kind = ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            kind = fields[fields.index("-") + 1]
    return kind
