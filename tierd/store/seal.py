# SPDX-License-Identifier: Apache-2.0
"""Encryption at rest: what leaves for a store is AES-256-GCM, and what comes back is what was sealed last, or an error.

Each guest has a random key for each store, in a file on tmpfs: a crash of tierd keeps it, a detach or a boot destroys it, and
with it everything that the store has of the guest. (Where the host swaps, tmpfs does too: encrypt the swap.)

    magic, key, the first nonce that is not taken; from ARRAY_AT on, 8 bytes a page of the guest:
    the nonce of its newest record (0: none). What was never written is a hole.

A record is ciphertext and tag (16 bytes); its page's number is authenticated with it. The nonce is not in the record but
where the store cannot write, so an old record, another page's or another guest's is refused like a forged one: it was sealed
with another nonce. A page's nonce is noted before its record is sent. A write that fails, or a kill in between, leaves the
nonce of a record that is not there: such a page is still in the guest's memory, and nobody reads it.

A nonce is a number that was never used with this key: blocks of numbers are taken in the file before they are used, so no
crash and no second process brings one back. Random ones would be used up after 16 TiB. The file is read and written, not
mapped: a full tmpfs is an error then, and not a signal.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tierd.native.records import Records, seal
from tierd.store import IntegrityError, PageSpace, StoreError
from tierd.store.directory import KEY, file_system_of, open_ours
from tierd.store.records import PassedOn, computed

KEY_BYTES, TAG_BYTES = 32, 16
SUFFIX = ".key"
FILE = struct.Struct("<8s32sQ")  # magic, key, the first nonce that is not taken
NONCE_AT, ARRAY_AT = 40, 4096
MAGIC = b"tierdk2\0"
NONCES = 1 << 20  # taken at once
NONCE = struct.Struct("<Q4x")
PAGE = struct.Struct("<Q")  # what is authenticated with a page
TMPFS = frozenset({"tmpfs", "ramfs"})


class SealKey:
    """A guest's key for one store, and the nonces of its pages there. Not for two threads at once. Blocks for some
    microseconds."""

    def __init__(self, fd: int, path: Path) -> None:
        """StoreError, OSError: the file is no key."""
        self._fd, self.path = fd, path
        magic, key, _ = FILE.unpack(os.pread(fd, FILE.size, 0))
        if magic != MAGIC or not any(key):
            raise StoreError(f"{path} is no key of a guest; what was stored of the guest cannot be read without it")
        self.secret, self.cipher = key, AESGCM(key)
        self._next = self._end = 0

    @classmethod
    def create(cls, directory: Path, store: str, guest: str, pages: int) -> SealKey:
        """A new key for what `store` will have of `guest` (PID-STARTTICKS), in `directory` and in place of a leftover.
        StoreError: the directory is not on a tmpfs, or cannot be written."""
        kind = file_system_of(directory)
        if kind not in TMPFS:
            raise StoreError(
                f"{directory} is on {kind}: keys would outlive a boot; set runtime_dir to a directory on a tmpfs"
            )
        path = _path(directory, store, guest)
        path.unlink(missing_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(f"{path} cannot be made: {error.strerror}; see the directory's owner and mode") from error
        try:
            os.ftruncate(fd, _size(pages))
            _write(fd, FILE.pack(MAGIC, os.urandom(KEY_BYTES), 1))
            return cls(fd, path)
        except BaseException as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise StoreError(f"{path} cannot be written: {error.strerror}; make room in {directory}") from error
            raise

    @staticmethod
    def exists(directory: Path, store: str, guest: str) -> bool:
        """Whether a predecessor has sealed what it stored there."""
        return os.path.lexists(_path(directory, store, guest))

    @classmethod
    def reopen(cls, directory: Path, store: str, guest: str, pages: int) -> SealKey:
        """The key that a predecessor made. StoreError: it is not there any more, or not one that only we can have made."""
        path = _path(directory, store, guest)
        try:
            fd = open_ours(path, os.O_RDWR)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be opened: {error.strerror}; what is sealed with it cannot be read"
            ) from error
        try:
            info = os.fstat(fd)
            if info.st_size != _size(pages) or info.st_mode & 0o077:
                raise StoreError(
                    f"{path} has {info.st_size} bytes and mode {info.st_mode & 0o777:04o}: it is no key of ours"
                )
            return cls(fd, path)
        except BaseException:
            os.close(fd)
            raise

    def take(self, first_page: int, count: int) -> array[int]:
        """Nonces that this key never had, for new records of these pages; from now on no older record of them can be read.
        OSError: there is no room to note them. StoreError: the key was destroyed."""
        if count > self._end - self._next:
            self._take_block(count)
        taken = array("Q", range(self._next, self._next + count))
        self._next += count
        _write(self._fd, taken.tobytes(), ARRAY_AT + 8 * first_page)
        return taken

    def nonces(self, first_page: int, count: int) -> array[int]:
        """Of the newest records of these pages; 0: there is none."""
        return array("Q", os.pread(self._fd, 8 * count, ARRAY_AT + 8 * first_page))

    def _take_block(self, count: int) -> None:
        """A process that ends early leaves the rest of it unused."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            magic, _, first = FILE.unpack(os.pread(self._fd, FILE.size, 0))
            if magic != MAGIC:
                raise StoreError(f"{self.path} was destroyed; nothing more can be sealed with it")
            end = first + max(NONCES, count)
            _write(self._fd, end.to_bytes(8, "little"), NONCE_AT)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._next, self._end = first, end

    def destroy(self) -> None:
        """Nobody can read what was sealed with it any more: not even who has the file open. Then close."""
        _destroy(self._fd)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)


def sweep(directory: Path, may_be_needed: Callable[[str], bool]) -> list[str]:
    """Destroy the keys of guests that are gone, which `may_be_needed` says by key; the guests. Blocks."""
    swept = set()
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        guest = path.name.partition(".")[0]
        if KEY.fullmatch(guest) and path.is_file() and not path.is_symlink() and not may_be_needed(guest):
            with path.open("r+b") as file:
                _destroy(file.fileno())
            path.unlink()
            swept.add(guest)
    return sorted(swept)


def _path(directory: Path, store: str, guest: str) -> Path:
    return directory / f"{guest}.{store}{SUFFIX}"


def _size(pages: int) -> int:
    return ARRAY_AT + 8 * pages


def _destroy(fd: int) -> None:
    size = os.fstat(fd).st_size
    _write(fd, bytes(FILE.size))  # in place: a page that is given back keeps its bytes until somebody gets it
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)


def _write(fd: int, content: bytes, at: int = 0) -> None:
    if os.pwrite(fd, content, at) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SealedSpace(PassedOn):
    """Implements store.PageSpace: what passes through it to `space` is sealed with `key`, which the caller closes or destroys.

    read raises IntegrityError if one record is not what was sealed last for that page. None stays None: whether a page has to be
    there is known to who stored it.
    """

    def __init__(self, space: PageSpace, key: SealKey) -> None:
        """KernelError: OpenSSL's libcrypto is not installed."""
        super().__init__(space)
        self._key = key
        seal(key.secret, array("Q"), 0, Records.of(()))

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        run, nonces = Records.of(records), self._key.take(first_page, len(records))
        work = partial(seal, self._key.secret, nonces, first_page, run)
        await self._space.write(first_page, await computed(work, run.total_bytes))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        sealed = await self.stored(first_page, count)
        jobs = zip(range(first_page, first_page + count), self._key.nonces(first_page, count), sealed, strict=True)
        return await computed(partial(_unseal, self._key.cipher, jobs), sum(len(record or b"") for record in sealed))


def _unseal(cipher: AESGCM, jobs: Iterable[tuple[int, int, bytes | None]]) -> list[bytes | None]:
    return [None if record is None else _unsealed(cipher, page, nonce, record) for page, nonce, record in jobs]


def _unsealed(cipher: AESGCM, page: int, nonce: int, record: bytes) -> bytes:
    try:
        if nonce and len(record) >= TAG_BYTES:
            return cipher.decrypt(NONCE.pack(nonce), record, PAGE.pack(page))
    except InvalidTag:
        pass
    raise IntegrityError(
        f"the store's record of page {page} ({len(record)} bytes) is not what was sealed there last: changed, old, another "
        "page's, or cut off; see who else can write to the store"
    )
