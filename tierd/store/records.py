# SPDX-License-Identifier: Apache-2.0
"""What a page becomes on its way to a store that trio asks: compressed where that pays, then perhaps sealed (seal.py).

Here and not in the stores: what is sealed does not compress any more. A record is one byte that says which, and the page as it
is or a zstd frame of it, so one page is still one record that can be read alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import trio
import zstandard

from tierd.store import IntegrityError, PageSpace

LEVEL = 1  # of zstd
KEPT_SHARE_MAX = 15 / 16  # less than that is saved: kept as it is, and no time is spent when it is read
INLINE_BYTES = 64 << 10  # more is computed in a thread: 20 us of it are less than the way there
AS_IT_IS, ZSTD = b"\0", b"\1"

T = TypeVar("T")


class PassedOn:
    """A PageSpace of which another one is the store: what does not look at the records."""

    def __init__(self, space: PageSpace) -> None:
        self._space = space

    async def stored(self, first_page: int, count: int) -> list[bytes | None]:
        """As it is stored. IntegrityError: those are not as many as were asked for."""
        records = await self._space.read(first_page, count)
        if len(records) != count:
            raise IntegrityError(f"the store has {len(records)} records for {count} pages from page {first_page} on")
        return records

    async def discard(self, first_page: int, count: int) -> None:
        await self._space.discard(first_page, count)

    async def used_bytes(self) -> int:
        return await self._space.used_bytes()

    async def delete(self) -> None:
        await self._space.delete()

    async def aclose(self) -> None:
        await self._space.aclose()


class CompressedSpace(PassedOn):
    """Implements store.PageSpace: pages of `page_bytes` are compressed on their way to `space`.

    read raises IntegrityError if a record is not one of these. Whether it is the page that was written last, only the seal can
    say, or the caller's checksum.
    """

    def __init__(self, space: PageSpace, page_bytes: int) -> None:
        super().__init__(space)
        self._bytes_max = 2 * page_bytes  # of a record: more is not unpacked

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self._space.write(first_page, await computed(partial(_pack, records), sum(map(len, records))))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        packed = await self.stored(first_page, count)
        work = partial(_unpack, list(enumerate(packed, first_page)), self._bytes_max)
        return await computed(work, sum(len(record or b"") for record in packed))


class _Local(threading.local):
    """These take longer to make than to use, and serve one thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_local = _Local()


def _pack(records: Sequence[bytes]) -> list[bytes]:
    """All in one call, without the interpreter's lock: to wait for it after each page takes longer than the page."""
    if not records:
        return []
    frames = _local.compressor.multi_compress_to_buffer([record or b"\0" for record in records])
    return [_packed(record, frames[n]) for n, record in enumerate(records)]


def _packed(record: bytes, frame: zstandard.BufferSegment) -> bytes:
    return ZSTD + frame.tobytes() if len(frame) <= KEPT_SHARE_MAX * len(record) else AS_IT_IS + record


def _unpack(jobs: Iterable[tuple[int, bytes | None]], bytes_max: int) -> list[bytes | None]:
    return [None if record is None else _unpacked(page, record, bytes_max) for page, record in jobs]


def _unpacked(page: int, record: bytes, bytes_max: int) -> bytes:
    how, content = record[:1], record[1:]
    if how == AS_IT_IS:
        return content
    try:
        if how == ZSTD and zstandard.frame_content_size(content) <= bytes_max:
            return _local.decompressor.decompress(content, max_output_size=bytes_max, allow_extra_data=False)
    except zstandard.ZstdError:
        pass
    raise IntegrityError(f"the store's record of page {page} ({len(record)} bytes) is not one that tierd has written")


async def computed(function: Callable[[], list[T]], size: int) -> list[T]:
    """What `function` makes of `size` bytes, in a thread if these are many."""
    return function() if size <= INLINE_BYTES else await trio.to_thread.run_sync(function)
