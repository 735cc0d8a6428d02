# SPDX-License-Identifier: Apache-2.0
"""Encryption at rest: what leaves for a store is AES-256-GCM, and what comes back is what was sealed last, or an error.

Each guest has a random key for each store, in a file on tmpfs (keys.py):

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

import contextlib
import errno
import fcntl
import os
import struct
from array import array
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tierd.native.records import TAG_BYTES
from tierd.store import IntegrityError, StoreError, keys
from tierd.store.directory import is_at

KEY_BYTES = 32
FILE = struct.Struct("<8s32sQ")  # magic, key, the first nonce that is not taken
NONCE_AT, ARRAY_AT = 40, 4096
MAGIC = b"tierdk2\0"
NONCES = 1 << 20  # taken at once
NONCE = struct.Struct("<Q4x")
PAGE = struct.Struct("<Q")  # what is authenticated with a page


class SealKey:
    """A guest's key for one store, and the nonces of its pages there. Not for two threads at once. Blocks for some
    microseconds."""

    def __init__(self, fd: int, path: Path) -> None:
        """StoreError, OSError: the file is no key."""
        self._fd, self.path = fd, path
        magic, key, _ = FILE.unpack(os.pread(fd, FILE.size, 0))
        if magic != MAGIC or not any(key):
            raise StoreError(f"{path} is no key of a guest; what was stored of the guest cannot be read without it")
        self.secret, self._cipher = key, AESGCM(key)
        self._next = self._end = 0

    @classmethod
    def create(cls, directory: Path, store: str, guest: str, pages: int) -> SealKey:
        """A new key for what `store` will have of `guest` (PID-STARTTICKS), in `directory` and in place of a leftover.
        StoreError: the directory is not on a tmpfs, or cannot be written."""
        fd, path = keys.create(directory, store, guest, FILE.pack(MAGIC, os.urandom(KEY_BYTES), 1), _size(pages))
        return cls(fd, path)

    @staticmethod
    def exists(directory: Path, store: str, guest: str) -> bool:
        """Whether a predecessor has sealed what it stored there."""
        return os.path.lexists(keys.path_of(directory, store, guest))

    @staticmethod
    def forget(directory: Path, store: str, guest: str) -> None:
        """What an attach before this one left, if anything: whoever died while it left the guest. OSError: it is still there."""
        path = keys.path_of(directory, store, guest)
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            keys.destroy(file.fileno(), path)
        path.unlink(missing_ok=True)

    @classmethod
    def reopen(cls, directory: Path, store: str, guest: str, pages: int) -> SealKey:
        """The key that a predecessor made. StoreError: it is not there any more, or not one that only we can have made."""
        path = keys.path_of(directory, store, guest)
        fd = keys.reopen(path, _size(pages))
        try:
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

    def unseal(self, page: int, nonce: int, record: bytes) -> bytes:
        """What was sealed with this nonce for this page; no I/O, any thread. IntegrityError: it was not."""
        try:
            if nonce and len(record) >= TAG_BYTES:
                return self._cipher.decrypt(NONCE.pack(nonce), record, PAGE.pack(page))
        except InvalidTag:
            pass
        raise IntegrityError(
            f"the store's record of page {page} ({len(record)} bytes) is not what was sealed there last: changed, old, another "
            "page's, or cut off; see who else can write to the store"
        )

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
        keys.destroy(self._fd, self.path)

    def is_there(self) -> bool:
        """Whether a successor would find it."""
        return is_at(self._fd, self.path)

    def close(self) -> None:
        os.close(self._fd)


def _size(pages: int) -> int:
    return ARRAY_AT + 8 * pages


def _write(fd: int, content: bytes, at: int = 0) -> None:
    if os.pwrite(fd, content, at) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
