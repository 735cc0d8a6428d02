# SPDX-License-Identifier: Apache-2.0
"""Files with keys of guests, one for each guest and store, in a directory on tmpfs: a crash of tierd keeps a key, a detach or
a boot destroys it, and with it everything that the store has of the guest. (Where the host swaps, tmpfs does too: encrypt the
swap.)

Everything here blocks for some microseconds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from tierd.store import StoreError
from tierd.store.directory import file_system_of, left_over, open_ours

SUFFIX = ".key"
SECRET_BYTES = 512  # at the begin of each file, in which its key is
TMPFS = frozenset({"tmpfs", "ramfs"})
FILE_MAGIC, FILE_KEY_BYTES = b"tierdkf\0", 64


def path_of(directory: Path, store: str, guest: str) -> Path:
    return directory / f"{guest}.{store}{SUFFIX}"


def create(directory: Path, store: str, guest: str, content: bytes, size: int) -> tuple[int, Path]:
    """A new file of `size` bytes, in place of a leftover, open. StoreError: the directory is not on a tmpfs, or cannot be
    written."""
    kind = file_system_of(directory)
    if kind not in TMPFS:
        raise StoreError(
            f"{directory} is on {kind}: keys would outlive a boot; set runtime_dir to a directory on a tmpfs"
        )
    path = path_of(directory, store, guest)
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}; see the directory's owner and mode") from error
    try:
        os.ftruncate(fd, size)
        if os.pwrite(fd, content, 0) != len(content):
            raise StoreError(f"{path} cannot be written; make room in {directory}")
    except BaseException as error:
        os.close(fd)
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StoreError(f"{path} cannot be written: {error.strerror}; make room in {directory}") from error
        raise
    return fd, path


def reopen(path: Path, size: int) -> int:
    """One that a predecessor made. StoreError: it is not there any more, or not one that only we can have made."""
    try:
        fd = open_ours(path, os.O_RDWR)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}; what is sealed with it cannot be read") from error
    info = os.fstat(fd)
    if info.st_size != size or info.st_mode & 0o077:
        os.close(fd)
        raise StoreError(f"{path} has {info.st_size} bytes and mode {info.st_mode & 0o777:04o}: it is no key of ours")
    return fd


def destroy(fd: int, path: Path) -> None:
    """Nobody can read what was sealed with it any more: not even who has the file open."""
    size = os.fstat(fd).st_size
    os.pwrite(fd, bytes(min(SECRET_BYTES, size)), 0)  # in place: a page that is given back keeps its bytes for now
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)
    path.unlink(missing_ok=True)


def sweep(directory: Path, may_be_needed: Callable[[str], bool]) -> list[str]:
    """Destroy the keys of guests that are gone, which `may_be_needed` says by key; the guests. Others may destroy them,
    too."""
    swept = set()
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        guest = path.name.partition(".")[0]
        if left_over(path, guest, may_be_needed):
            with contextlib.suppress(OSError), path.open("r+b") as file:  # gone by now, or the next sweep tries again
                destroy(file.fileno(), path)
                swept.add(guest)
    return sorted(swept)


# --- of files -----------------------------------------------------------------------------------------------------------


class FileKey:
    """With which a guest's file is encrypted (crypto.c): AES-256-XTS."""

    def __init__(self, secret: bytes, path: Path) -> None:
        self.secret, self.path = secret, path

    @classmethod
    def create(cls, directory: Path, store: str, guest: str) -> FileKey:
        """StoreError, as `create`."""
        secret = os.urandom(FILE_KEY_BYTES)
        fd, path = create(directory, store, guest, FILE_MAGIC + secret, len(FILE_MAGIC) + len(secret))
        os.close(fd)
        return cls(secret, path)

    @classmethod
    def reopen(cls, directory: Path, store: str, guest: str) -> FileKey:
        """StoreError, as `reopen`; or it is no such key."""
        path = path_of(directory, store, guest)
        fd = reopen(path, len(FILE_MAGIC) + FILE_KEY_BYTES)
        try:
            content = os.pread(fd, len(FILE_MAGIC) + FILE_KEY_BYTES, 0)
        finally:
            os.close(fd)
        if not content.startswith(FILE_MAGIC) or not any(content[len(FILE_MAGIC) :]):
            raise StoreError(f"{path} is no key of a guest; what was stored of the guest cannot be read without it")
        return cls(content[len(FILE_MAGIC) :], path)

    def destroy(self) -> None:
        """It may be gone already."""
        try:
            fd = open_ours(self.path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            destroy(fd, self.path)
        finally:
            os.close(fd)
