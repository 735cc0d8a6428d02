# SPDX-License-Identifier: Apache-2.0
"""A store that is a directory of ours with one file a guest in it: mode 0700 and 0600, because what is in there is guests'
memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from tierd.attach.procfs import read_proc
from tierd.store import StoreError

PREFIX = "guest-"
KEY = re.compile(r"[0-9]{1,10}-[0-9]{1,20}")
USED_CACHE_S = 1.0
MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})


# where a thread that is killed in a read or write is gone only when the I/O is: on others (FUSE, NFS) a request that the
# kernel has given up may still land
LOCAL_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "jfs", "nilfs2"})


class GuestFile:
    """One guest's file: what all of store.Space's have in common."""

    opened = ready = True
    secret = b""

    def __init__(self, fd: int, path: Path) -> None:
        self.fd, self.path = fd, path

    def used_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        with contextlib.suppress(OSError):  # it is closed all the same, and what counts was synced
            os.close(fd)

    def delete(self) -> None:
        """Remove the file, open or closed. It may be gone already. OSError: it cannot be removed; or it is open, and somewhere
        else now."""
        moved = self.fd >= 0 and os.fstat(self.fd).st_nlink and not self.is_there()
        self.path.unlink(missing_ok=True)
        if moved:
            raise FileNotFoundError(errno.ENOENT, "it was moved, or something is mounted over it", str(self.path))

    def is_there(self) -> bool:
        """Whether who opens its path finds this file, which is open."""
        return is_at(self.fd, self.path)

    def missing(self) -> Path | None:
        """What a successor would not find."""
        return None if self.is_there() else self.path


class DirectoryStore:
    """The directory: what all of store.Store's have in common. Everything here blocks."""

    suffix = ""  # of the files' names
    setting = ""  # the configuration's section

    def __init__(self, path: Path, capacity_bytes: int | None) -> None:
        """Makes it where there is none. `capacity_bytes`: of all guests together; None: what the file system has. StoreError: it
        cannot hold guests' memory; the text says why and what to do."""
        self.path, self.trouble = path, ""
        self._capacity_bytes = capacity_bytes
        self._used_at, self._used = -1e9, 0
        private_directory(path, f"{self.setting}.path")

    def any(self) -> bool:
        """Whether some guest has a file in it."""
        return any(self.path.glob(f"{PREFIX}*{self.suffix}"))

    def reserve_bytes(self, size: int) -> int:
        """Of a file system of this size: what is left to others."""
        raise NotImplementedError

    def free_bytes(self, *, now: bool = False) -> int:
        disk = os.statvfs(self.path)
        free = max(disk.f_bavail * disk.f_frsize - self.reserve_bytes(disk.f_blocks * disk.f_frsize), 0)
        if self._capacity_bytes is not None:
            free = min(free, max(self._capacity_bytes - self.used_bytes(now=now), 0))
        return free

    def create_file(self, key: str, flags: int = 0) -> tuple[int, Path]:
        """A new, empty file, open for reading and writing. StoreError."""
        path = self.path / f"{PREFIX}{key}{self.suffix}"
        try:
            _remove_leftover(path)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
            _hold(fd, path)
        except (BlockingIOError, FileExistsError) as error:
            raise StoreError(
                f"{path} is another tierd's, which serves this guest or is about to; two of them need a {self.setting}.path each"
            ) from error
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}; see the directory's owner and mode") from error
        return fd, path

    def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """Remove the files of guests that are gone; their keys."""
        swept = []
        for path in sorted(self.path.glob(f"{PREFIX}*{self.suffix}")):
            key = path.name[len(PREFIX) : -len(self.suffix)]
            if left_over(path, key, may_be_needed):
                try:
                    path.unlink()
                except OSError:  # a file system that is read-only now: the next sweep tries again
                    continue
                swept.append(key)
        return swept

    def used_bytes(self, *, now: bool = False) -> int:
        """Blocks of all guests' files; looked up at most once a second, but for those of `now`."""
        if now or time.monotonic() - self._used_at > USED_CACHE_S:
            used = 0
            for path in self.path.glob(f"{PREFIX}*{self.suffix}"):
                with contextlib.suppress(FileNotFoundError):  # a guest that is being deleted
                    used += path.lstat().st_blocks * 512
            self._used, self._used_at = used, time.monotonic()
            return used
        return self._used


def open_held(path: Path, flags: int) -> int:
    """A guest's file, as open_ours does it; for as long as it is open, no other tierd takes it for a leftover."""
    fd = open_ours(path, flags)
    _hold(fd, path)
    return fd


def _hold(fd: int, path: Path) -> None:
    """BlockingIOError: another tierd is removing it, or has. Closes it on any error."""
    try:
        if not _locked(fd, fcntl.LOCK_SH, path) or not is_at(fd, path):
            raise BlockingIOError(errno.EWOULDBLOCK, "another tierd takes it for a leftover", str(path))
    except BaseException:
        os.close(fd)
        raise


def _remove_leftover(path: Path) -> None:
    """Of an earlier life: pids and start times do not come back. BlockingIOError: another tierd has it open, which has the same
    directory, and found the same VMM. OSError: who has it is not known."""
    try:
        fd = open_ours(path, os.O_RDWR)
    except FileNotFoundError:
        return
    except PermissionError:  # not one that a tierd makes
        path.unlink(missing_ok=True)
        return
    try:
        if not _locked(fd, fcntl.LOCK_EX, path) or not is_at(fd, path):
            raise BlockingIOError(errno.EWOULDBLOCK, "another tierd has it", str(path))
        path.unlink()
    finally:
        os.close(fd)


def _locked(fd: int, how: int, path: Path) -> bool:
    """True also where it is not locked, and two tierds are not told apart: on a network, where a lock that is lost in an outage
    (NFS) ends all reads of the file."""
    if file_system_of(path.parent) not in LOCAL_FILE_SYSTEMS | {"tmpfs", "overlay"}:
        return True
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(fd: int, path: Path) -> bool:
    """Whether who opens `path` finds the file that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def left_over(path: Path, key: str, may_be_needed: Callable[[str], bool]) -> bool:
    """Whether it is a file of ours, of guest `key`, which is gone."""
    return bool(KEY.fullmatch(key)) and path.is_file() and not path.is_symlink() and not may_be_needed(key)


def private_directory(path: Path, setting: str) -> None:
    """Make or check a directory that only we can read; `setting` is what the operator names it with. StoreError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise StoreError(
            f"the store's directory {path} cannot be made: {error.strerror}; create it, or set {setting}"
        ) from error
    if not stat.S_ISDIR(info.st_mode):
        raise StoreError(f"the store's path {path} is not a directory; remove it, or set {setting}")
    if info.st_uid != os.geteuid():
        raise StoreError(
            f"{path} belongs to user {info.st_uid}, tierd runs as {os.geteuid()}: guests' memory would "
            f"be theirs to read; chown it or set {setting}"
        )
    if info.st_mode & 0o077:
        raise StoreError(
            f"{path} has mode {stat.S_IMODE(info.st_mode):04o}: others could read guests' memory; chmod 0700 {path}"
        )


def refuse_memory(path: Path, setting: str) -> None:
    """StoreError: what is written there stays in memory."""
    kind = file_system_of(path)
    if kind in MEMORY_FILE_SYSTEMS:
        raise StoreError(
            f"{path} is on {kind}: evicted pages would stay in memory and nothing would be given back; "
            f"set {setting} to a directory on a disk"
        )


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
    for line in read_proc("/proc/self/mountinfo").split("\n"):  # the kernel escapes this and spaces, nothing else
        fields = line.split(" ")
        if len(fields) > 2 and fields[2] == wanted:
            kind = fields[fields.index("-") + 1]
    return kind
