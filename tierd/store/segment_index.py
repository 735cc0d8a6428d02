# SPDX-License-Identifier: Apache-2.0
"""The index of one guest's segments: a local file with a word of 64 bits a page, which says where the page's record is.

It belongs into the runtime directory (tmpfs): it must survive tierd, and is of no use after a reboot, as the guest. It is read
and written by pread and pwrite, not mapped: holes cost nothing, a full tmpfs is an error and not a signal, and the kernel
copies a word as a whole whenever tierd is killed. Not synced: a process that dies takes nothing with it that it has written.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

from tierd.store import StoreError
from tierd.store.segments import NUMBER_MAX

_HEADER = struct.Struct("<8sIIQI")  # magic, crc of the space's name, bytes of a page, pages, number of the next segment
_HEADER_BYTES = 4096
_NEXT = struct.Struct("<I")
_MAGIC = b"tierdIX1"
_SCAN_WORDS = 1 << 16


class Index:
    """Of `pages` pages. Calls take microseconds; one thread writes, any may read. OSError: the file cannot be read or written."""

    def __init__(self, fd: int, path: Path, pages: int, next_number: int) -> None:
        self.path, self.pages = path, pages
        self._fd, self._next_number = fd, next_number

    def words(self, first: int, count: int) -> array[int]:
        """Of a run of pages. 0: not there."""
        wanted = count * 8
        data = os.pread(self._fd, wanted, _HEADER_BYTES + first * 8)
        if len(data) != wanted:
            raise OSError(errno.EIO, f"{self.path} is too short")
        return array("Q", data)

    def put(self, first: int, words: array[int]) -> None:
        """Words of a run of pages that was reserved, or was there before."""
        data = words.tobytes()
        if os.pwrite(self._fd, data, _HEADER_BYTES + first * 8) != len(data):
            raise OSError(errno.EIO, f"{self.path} was not written as a whole")

    def reserve(self, first: int, count: int) -> None:
        """So that `put` finds room for these words. OSError: there is none, nothing was changed."""
        os.posix_fallocate(self._fd, _HEADER_BYTES + first * 8, count * 8)

    def take_number(self) -> int:
        """Of a new segment. It is never given again, not by a successor either: a write that is still under way when tierd
        is killed lands under a name that nobody else uses."""
        number = self._next_number
        if number > NUMBER_MAX:
            raise OSError(errno.EOVERFLOW, f"{self.path}: this guest has written {number} segments, that is all it may")
        os.pwrite(self._fd, _NEXT.pack(number + 1), _HEADER.size - _NEXT.size)
        self._next_number = number + 1
        return number

    def scan(self) -> Iterator[array[int]]:
        """All words that are not in holes, in pieces. Takes 0.1 s for some million pages that are there."""
        end = _HEADER_BYTES + self.pages * 8
        offset = _HEADER_BYTES
        while (data := _next_data(self._fd, offset)) is not None and data < end:
            count = min(_SCAN_WORDS, (end - data) // 8)
            yield self.words((data - _HEADER_BYTES) // 8, count)
            offset = data + count * 8

    def close(self) -> None:
        """Once or more often."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _next_data(fd: int, offset: int) -> int | None:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def create(
    path: Path, name: str, pages: int, page_bytes: int, next_number: int, words: array[int] | None = None
) -> Index:
    """A new index of space `name`, perhaps with the words of a rebuild. It is there as a whole or not at all. OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    scratch = path.with_name(path.name + ".new")
    scratch.unlink(missing_ok=True)
    fd = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    index = Index(fd, path, pages, next_number)
    try:
        os.ftruncate(fd, _HEADER_BYTES + pages * 8)
        os.pwrite(fd, _HEADER.pack(_MAGIC, zlib.crc32(name.encode()), page_bytes, pages, next_number), 0)
        for first in range(0, len(words or ()), _SCAN_WORDS):
            piece = words[first : first + _SCAN_WORDS] if words else array("Q")
            if any(piece):
                index.reserve(first, len(piece))
                index.put(first, piece)
        scratch.rename(path)
    except BaseException:
        index.close()
        scratch.unlink(missing_ok=True)
        raise
    return index


def reopen(path: Path, name: str, pages: int, page_bytes: int) -> Index | None:
    """What a predecessor left for space `name`; None: nothing, or nothing that is its index. StoreError: it has other pages.
    OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        next_number = _check(fd, path, name, pages, page_bytes)
    except BaseException:
        os.close(fd)
        raise
    if next_number is None:
        os.close(fd)
        return None
    return Index(fd, path, pages, next_number)


def _check(fd: int, path: Path, name: str, pages: int, page_bytes: int) -> int | None:
    """The next segment's number, if this is the index of `name`."""
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) != _HEADER.size:
        return None
    magic, its_name, its_page_bytes, its_pages, next_number = _HEADER.unpack(header)
    if magic != _MAGIC or its_name != zlib.crc32(name.encode()):
        return None
    if (its_pages, its_page_bytes) != (pages, page_bytes):
        raise StoreError(
            f"{path} is the index of {its_pages} pages of {its_page_bytes} bytes, {pages} of {page_bytes} were expected; "
            "nothing was touched"
        )
    return int(next_number) if os.fstat(fd).st_size == _HEADER_BYTES + pages * 8 else None
