# SPDX-License-Identifier: Apache-2.0
"""Encryption at rest: what leaves for a store is AES-256-GCM, and what comes back is what was sealed last, or an error.

Each guest has a random key, in a file on tmpfs beside its state: a crash of tierd keeps it, a detach or a boot destroys
it, and with it everything that any store has of the guest. (Where the host swaps, tmpfs does too: encrypt the swap.)

A record is nonce (12 bytes), ciphertext, tag (16). The page's number and version are authenticated with it. The version is
not in the record: it comes from what the store cannot change, so an old record, another page's or another guest's is
refused like a forged one. A nonce is a number that was never used with this key: blocks of numbers are taken in the key's
file before they are used, so no crash and no second process brings one back. Random ones would be used up after 16 TiB.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tierd.store import IntegrityError, PageSpace, StoreError
from tierd.store.directory import file_system_of, open_ours

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES  # what sealing adds to a page
SUFFIX = ".key"
GUEST = re.compile(r"[0-9]{1,10}-[0-9]{1,20}")
FILE = struct.Struct("<8s32sQ")  # magic, key, the first nonce that is not taken
NONCE_AT = 40  # of it
MAGIC = b"tierdk1\0"
NONCES = 1 << 20  # taken at once
TMPFS = frozenset({"tmpfs", "ramfs"})
INLINE_BYTES = 64 << 10  # more is sealed in a thread: 20 us of AES are less than the way there

T = TypeVar("T")


class SealKey:
    """A guest's key. Not for two threads at once. Blocks, but for nonce()."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self.path = fd, path
        magic, key, _ = FILE.unpack(os.pread(fd, FILE.size, 0))
        if magic != MAGIC or not any(key):
            raise StoreError(f"{path} is no key of a guest; what was stored of the guest cannot be read without it")
        self.cipher = AESGCM(key)
        self._next = self._end = 0

    @classmethod
    def create(cls, directory: Path, guest: str) -> SealKey:
        """A new key for `guest` (PID-STARTTICKS) in `directory`, in place of a leftover. StoreError: the directory is not
        on a tmpfs, or cannot be written."""
        kind = file_system_of(directory)
        if kind not in TMPFS:
            raise StoreError(
                f"{directory} is on {kind}: keys would outlive a boot; set runtime_dir to a directory on a tmpfs"
            )
        path = directory / f"{guest}{SUFFIX}"
        path.unlink(missing_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}; see the directory's owner and mode") from error
        try:
            _write(fd, FILE.pack(MAGIC, os.urandom(KEY_BYTES), 0))
            return cls(fd, path)
        except BaseException as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StoreError(f"{path} cannot be written: {error.strerror}; make room in {directory}") from error
            raise

    @classmethod
    def reopen(cls, directory: Path, guest: str) -> SealKey:
        """The key that a predecessor made. StoreError: it is not there any more, or not one that only we can have made."""
        path = directory / f"{guest}{SUFFIX}"
        try:
            fd = open_ours(path, os.O_RDWR)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened: {error.strerror}; what is sealed with it cannot be read"
            ) from error
        try:
            info = os.fstat(fd)
            if info.st_size != FILE.size or info.st_mode & 0o077:
                raise StoreError(
                    f"{path} has {info.st_size} bytes and mode {info.st_mode & 0o777:04o}: it is no key of ours"
                )
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def nonce(self) -> bytes:
        """One that this key never had. OSError: the file cannot be written."""
        if self._next == self._end:
            self._take()
        self._next += 1
        return (self._next - 1).to_bytes(NONCE_BYTES, "little")

    def _take(self) -> None:
        """The next block of nonces; a process that ends early leaves the rest of it unused."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            magic, _, first = FILE.unpack(os.pread(self._fd, FILE.size, 0))
            if magic != MAGIC:
                raise StoreError(f"{self.path} was destroyed; nothing more can be sealed with it")
            _write(self._fd, (first + NONCES).to_bytes(8, "little"), NONCE_AT)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._next, self._end = first, first + NONCES

    def destroy(self) -> None:
        """Nobody can read what was sealed with it any more: not even who has the file's memory. Then close."""
        _write(self._fd, bytes(FILE.size))
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)


def sweep(directory: Path, may_be_needed: Callable[[str], bool]) -> list[str]:
    """Destroy the keys of guests that are gone, which `may_be_needed` says by key; the guests. Blocks."""
    swept = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        guest = path.name.removesuffix(SUFFIX)
        if GUEST.fullmatch(guest) and path.is_file() and not path.is_symlink() and not may_be_needed(guest):
            with path.open("r+b") as file:
                file.write(bytes(FILE.size))
            path.unlink()
            swept.append(guest)
    return swept


def _write(fd: int, content: bytes, at: int = 0) -> None:
    if os.pwrite(fd, content, at) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SealedSpace:
    """Implements store.PageSpace: what passes through it to `space` is sealed with `key`.

    `version_of(page)`: a number that is another one whenever the page's content is, from where the store cannot write; of
    what is being written it must be the new one already. The caller keeps the key, and closes or destroys it.
    read raises IntegrityError if one record is not what was sealed as that version of that page. None stays None: whether a
    page has to be there is known to who stored it.
    """

    def __init__(self, space: PageSpace, key: SealKey, version_of: Callable[[int], int]) -> None:
        self._space, self._key, self._version_of = space, key, version_of

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        jobs = [(self._key.nonce(), record, self._bound(first_page + i)) for i, record in enumerate(records)]
        sealed = await _computed(partial(_seal, self._key.cipher, jobs), sum(map(len, records)))
        await self._space.write(first_page, sealed)

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        sealed = await self._space.read(first_page, count)
        if len(sealed) != count:
            raise IntegrityError(f"the store has {len(sealed)} records for {count} pages from page {first_page} on")
        jobs = [(first_page + i, record, self._bound(first_page + i)) for i, record in enumerate(sealed)]
        size = sum(len(record) for record in sealed if record is not None)
        return await _computed(partial(_unseal, self._key.cipher, jobs), size)

    async def discard(self, first_page: int, count: int) -> None:
        await self._space.discard(first_page, count)

    async def used_bytes(self) -> int:
        return await self._space.used_bytes()

    async def delete(self) -> None:
        await self._space.delete()

    async def aclose(self) -> None:
        await self._space.aclose()

    def _bound(self, page: int) -> bytes:
        """What is authenticated with a page beside its bytes."""
        return struct.pack("<QQ", page, self._version_of(page))


def _seal(cipher: AESGCM, jobs: Iterable[tuple[bytes, bytes, bytes]]) -> list[bytes]:
    return [nonce + cipher.encrypt(nonce, record, bound) for nonce, record, bound in jobs]


def _unseal(cipher: AESGCM, jobs: Iterable[tuple[int, bytes | None, bytes]]) -> list[bytes | None]:
    return [None if record is None else _unsealed(cipher, page, record, bound) for page, record, bound in jobs]


def _unsealed(cipher: AESGCM, page: int, record: bytes, bound: bytes) -> bytes:
    try:
        if len(record) < SEAL_BYTES:
            raise InvalidTag
        return cipher.decrypt(record[:NONCE_BYTES], record[NONCE_BYTES:], bound)
    except InvalidTag as error:
        raise IntegrityError(
            f"the store's record of page {page} ({len(record)} bytes) is not what was sealed there last: changed, old, another "
            "page's, or cut off; see who else can write to the store"
        ) from error


async def _computed(function: Callable[[], list[T]], size: int) -> list[T]:
    return function() if size <= INLINE_BYTES else await trio.to_thread.run_sync(function)
