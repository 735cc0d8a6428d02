# SPDX-License-Identifier: Apache-2.0
"""What a page becomes on its way to a store that trio asks: compressed where that pays, then perhaps sealed (seal.py).

Here and not in the stores: what is sealed does not compress any more. A record is one byte that says which, and the page as it
is or a zstd frame of it, so one page is still one record that can be read alone.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache, partial
from itertools import accumulate, pairwise, repeat
from typing import Any, TypeVar

import trio
import zstandard

from tierd.native.records import AS_IT_IS, ZSTD, Packer, Records, seal
from tierd.store import IntegrityError, PageSpace, RunsSpace
from tierd.store.seal import SealKey

LEVEL = 1  # of zstd
WRITES_MAX = 8  # at a time, of runs that a space takes one by one
INLINE_BYTES = 64 << 10  # more is computed in a thread: 20 us of it are less than the way there

T = TypeVar("T")


async def write_runs(space: PageSpace, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
    """At once where the space can, else some at a time."""
    if isinstance(space, RunsSpace):
        await space.write_runs(runs)
    else:
        await each(space.write, runs, WRITES_MAX)


async def each(call: Callable[..., Awaitable[T]], items: Sequence[tuple[Any, ...]], most: int) -> list[T]:
    """What `call` says to the arguments in each, at most so many at a time. The first error, when all that had begun is over."""
    results: dict[int, T] = {}
    errors: list[Exception] = []
    waiting = iter(enumerate(items))

    async def one_after_the_other() -> None:
        for n, item in waiting:
            try:
                results[n] = await call(*item)
            except Exception as error:  # a plug-in's may be any
                errors.append(error)
            if errors:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(min(most, len(items))):
            nursery.start_soon(one_after_the_other)
    if errors:
        raise errors[0]
    return [results[n] for n in range(len(items))]


class RecordSpace:
    """Implements store.PageSpace: pages of `page_bytes` are compressed on their way to `space`, and sealed where there is a
    `key`, which the caller closes or destroys; both in one way to a thread and back.

    read raises IntegrityError if a record is not one of these; with a key, if it is not what was sealed last for that page. None
    stays None: whether a page has to be there is known to who stored it.
    """

    def __init__(self, space: PageSpace, page_bytes: int, key: SealKey | None = None) -> None:
        """KernelError: Zstandard, or OpenSSL's libcrypto, is not installed."""
        self._space, self._key = space, key
        self._bytes_max = 2 * page_bytes  # of a record: more is not unpacked
        self._packer = _packer(self._bytes_max)
        self._taken_bytes = self._made_bytes = 0
        if key is not None:
            seal(key.secret, array("Q"), 0, Records.of(()))

    @property
    def compressed_to(self) -> float:
        """What became of a byte, of all that was written; 0: nothing was."""
        return self._made_bytes / self._taken_bytes if self._taken_bytes else 0.0

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self.write_runs([(first_page, records)])

    async def write_runs(self, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        whole = Records.joined([Records.of(records) for _, records in runs])
        bounds = list(accumulate((len(records) for _, records in runs), initial=0))
        spans = [(page, first, end) for (page, _), (first, end) in zip(runs, pairwise(bounds), strict=True)]
        nonces = [self._key.take(page, end - first) for page, first, end in spans] if self._key is not None else []
        packed_bytes, made = await computed(partial(self._make, whole, spans, nonces), whole.total_bytes)
        self._taken_bytes += whole.total_bytes
        self._made_bytes += packed_bytes
        await write_runs(self._space, made)

    def _make(
        self, whole: Records, spans: Sequence[tuple[int, int, int]], nonces: Sequence[array[int]]
    ) -> tuple[int, list[tuple[int, Records]]]:
        packed = self._packer.pack(whole)
        runs = [(page, packed[first:end]) for page, first, end in spans]
        if self._key is not None:
            secret = self._key.secret
            runs = [(page, seal(secret, of, page, run)) for (page, run), of in zip(runs, nonces, strict=True)]
        return packed.total_bytes, runs

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        records = await self._space.read(first_page, count)
        if len(records) != count:
            raise IntegrityError(f"the store has {len(records)} records for {count} pages from page {first_page} on")
        nonces = self._key.nonces(first_page, count) if self._key is not None else repeat(0, count)
        work = partial(self._unmake, list(zip(range(first_page, first_page + count), nonces, records, strict=True)))
        return await computed(work, sum(len(record or b"") for record in records))

    def _unmake(self, jobs: Iterable[tuple[int, int, bytes | None]]) -> list[bytes | None]:
        pages: list[bytes | None] = []
        for page, nonce, record in jobs:
            if record is not None and self._key is not None:
                record = self._key.unseal(page, nonce, record)
            pages.append(None if record is None else _unpacked(page, record, self._bytes_max))
        return pages

    async def discard(self, first_page: int, count: int) -> None:
        await self._space.discard(first_page, count)

    async def used_bytes(self) -> int:
        return await self._space.used_bytes()

    async def delete(self) -> None:
        await self._space.delete()

    async def aclose(self) -> None:
        await self._space.aclose()


@cache
def _packer(bytes_max: int) -> Packer:
    return Packer(bytes_max, LEVEL)


class _Local(threading.local):
    """This takes longer to make than to use, and serves one thread."""

    def __init__(self) -> None:
        self.decompressor = zstandard.ZstdDecompressor()


_local = _Local()


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


async def computed(function: Callable[[], T], size: int) -> T:
    """What `function` makes of `size` bytes, in a thread if these are many."""
    return function() if size <= INLINE_BYTES else await trio.to_thread.run_sync(function)
