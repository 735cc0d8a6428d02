# SPDX-License-Identifier: Apache-2.0
"""The object store: cold pages in S3, GCS, Azure, WebDAV, a directory ... through Apache OpenDAL.

A batch that is written becomes a segment (segments.py) of its own, at once: an upload is durable only when it is complete, so
an open segment would have to be written again for every batch. Small ones are merged later. What says where a page is is the
index (segment_index.py): a record counts when its word is written, after its segment is durable. Whatever no word points to is
dead: overwritten, discarded, a write that failed, a predecessor's last one. It is cleaned up by whoever writes or discards
next, so a guest's own traffic pays for it and bounds it (segments.choose).

    HOST/BOOT/KEY/KEY.NUMBER    one segment; a guest's key comes back after a reboot, its space must not
    HOST/BOOT/lease             says something else every minute for as long as that boot lives. Another one of the same HOST
                                (a copy of the machine, or the next boot) removes what is in HOST/BOOT when it has seen this
                                stand still for ten minutes, looking every minute, by its own clock: that needs no conditional
                                write of the service

Durable is what outlives tierd: a directory is not synced when its host loses power, and its guests are gone then, too. Without
its index a space is rebuilt from its segments' tables: then a discarded page may be there again, for whoever opened the
space to discard once more. OpenDAL's calls block, so they run in threads, some for reads and some for all else: a fault does
not queue behind an eviction.
"""

from __future__ import annotations

import errno
import math
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from secrets import randbelow
from typing import Annotated, TypeVar

import trio
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from tierd.attach.procfs import boot_id
from tierd.native.records import ROW_BYTES, Records
from tierd.quantities import parse_size
from tierd.store import StoreContext, StoreError, segment_index, segments
from tierd.store.bucket import Bucket
from tierd.store.directory import KEY
from tierd.store.leases import LEASE_RENEW_S, Stillness
from tierd.store.options import HostId, host_id, parse
from tierd.store.segment_index import Index
from tierd.store.segments import NUMBER_MAX, DamagedError, Place, Record, Row, Run, Usage

INDEX_SUFFIX = ".segments"
READ_TRIES_MAX = 8  # a record that is read may be moved meanwhile
NOW_BYTES_MAX, NOW_IN_A_ROW = 64 << 10, 16  # read in trio's thread, if nobody has to wait for it
CLEAN_PAUSE_S = 30.0  # after cleaning failed
DISCARD_WORDS = 4096  # at a time, so that trio's loop goes on
# numbers that a rebuild leaves out: of writes that a predecessor had under way and that may still land
REBUILT_NUMBERS_SKIPPED = 1 << 20
LEASE, LEASE_BYTES, LEASE_S = "lease", 16, 600.0
TAIL_BYTES = 16 << 10  # of a segment, read first for its table

_WHAT_TO_DO = {
    errno.ENOENT: "the bucket or directory is not there; create it, or correct the store's options",
    errno.EACCES: "access is refused; are the credentials right, and may they write, read, list and delete?",
    errno.EINVAL: "the store's options are wrong, or the bucket is not there; correct them",
    errno.ECONNREFUSED: "nobody answers there; is the endpoint right, and the service up?",
    errno.ETIMEDOUT: "it does not answer in time; see to the network and the service, or raise deadline_s",
    errno.ENOSPC: "it is full; free space",
}

T = TypeVar("T")
R = TypeVar("R")


def _text(value: object) -> object:
    """OpenDAL takes all of its options as text."""
    return str(value).lower() if isinstance(value, bool | int) else value


class ObjectOptions(BaseModel):
    """The keys of the store `objects`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    scheme: str  # OpenDAL's name of the service: s3, gcs, azblob, webdav, fs ...
    options: dict[str, Annotated[str, BeforeValidator(_text)]] = Field(
        default_factory=dict
    )  # its, of OpenDAL; no secrets
    credentials: Path | None = None  # `option = value` lines, mode 0600
    host_id: HostId | None = None  # None: by machine-id and hardware
    segment_bytes: Annotated[
        int, BeforeValidator(parse_size), Field(ge=64 << 10, le=segments.SEGMENT_BYTES_MAX // 2)
    ] = 8 << 20
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8  # reads at a time, and half as many writes
    deadline_s: Annotated[float, Field(gt=0, le=600)] = 10.0  # of each try
    retries: Annotated[int, Field(ge=0, le=10)] = 3


class ObjectStore:
    """Implements store.PageStore; its spaces are RunsSpaces. `index_dir`: on tmpfs, made when it is needed. `boot`: of the host
    that guests live in."""

    takes_runs = True

    def __init__(self, options: ObjectOptions, index_dir: Path, host: str, boot: str) -> None:
        """StoreError: the options are wrong. Nothing is asked of the service yet. Blocks for a moment."""
        self.options, self.index_dir, self.host, self.boot = options, index_dir, host, boot
        self.directory = f"{host}/{boot}/"
        self.bucket = Bucket(
            options.scheme,
            options.options,
            options.credentials,
            writer=self.directory,
            deadline_s=options.deadline_s,
            retries=options.retries,
        )
        self.reads = trio.CapacityLimiter(options.concurrency)
        self.writes = trio.CapacityLimiter(max(options.concurrency // 2, 1))
        self._renewed_at = -math.inf  # our lease; trio's time
        self._renewing = trio.CapacityLimiter(1)  # it waits for no other write
        self._leases = Stillness()  # of other boots
        self._probing = trio.CapacityLimiter(1)  # it may be given up, and end later

    async def probe(self) -> None:
        try:
            await trio.to_thread.run_sync(self._try, limiter=self._probing, abandon_on_cancel=True)
        except OSError as error:
            what = _WHAT_TO_DO.get(error.errno or 0, "see to the service, the network and the store's options")
            raise StoreError(
                f"the store `{self.options.scheme}` cannot be used: {what}. It says: {error.strerror}"
            ) from error

    def _try(self) -> None:
        path = f"{self.host}/probe-{self.boot}-{os.getpid()}"
        self.bucket.put(path, b"tierd")
        try:
            if self.bucket.get(path, 1, 3) != b"ier":
                raise OSError(errno.EIO, f"{path}: a range came back different from what was written")
            if path not in [entry.path for entry in self.bucket.entries(f"{self.host}/")]:
                raise OSError(errno.EIO, f"{path} was written, and is not listed")
        finally:
            self.bucket.delete(path)

    async def open(self, key: str, pages: int, page_bytes: int) -> ObjectSpace:
        """As PageStore says. Lists the guest's objects once; without an index, reads the end of each."""
        if trio.current_time() - self._renewed_at >= LEASE_RENEW_S:
            await self._renew_lease()
        space = ObjectSpace(self, key, pages, page_bytes)
        await space.restore()
        return space

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """What another boot left, once its lease has not changed for LEASE_S. Renews ours, however long that takes."""
        renewed = await self._renew_lease()
        if not renewed:  # nor can another boot, perhaps
            self._leases = Stillness()
        swept: list[str] | OSError = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_renewing)
            try:
                swept = await self._sweep(may_be_needed, others_too=renewed)
            except OSError as error:
                swept = error
            nursery.cancel_scope.cancel()
        if isinstance(swept, OSError):
            raise swept
        return swept

    async def _sweep(self, may_be_needed: Callable[[str], bool], *, others_too: bool) -> list[str]:
        entries = await self.in_thread(self.bucket.entries, f"{self.host}/")
        others = [entry.path for entry in entries if entry.path.endswith("/") and entry.path != self.directory]
        over = await self._over(others) if others_too else []
        found = await self.each(self.bucket.entries, [self.directory, *over])
        gone = []
        for path in [entry.path for paths in found for entry in paths]:
            directory, _, key = path.removesuffix("/").rpartition("/")
            if KEY.fullmatch(key) and (f"{directory}/" != self.directory or not may_be_needed(key)):
                gone.append(path)
        await self.each(self.bucket.remove, gone)
        await self.each(self.bucket.drop_partial, over)
        await self.each(self.bucket.delete, [directory + LEASE for directory in over])
        await self.drop_partial(may_be_needed)
        swept = {path.split("/")[-2] for path in gone}
        for index in self.index_dir.glob(f"*{INDEX_SUFFIX}"):
            key = index.name.removesuffix(INDEX_SUFFIX)
            if KEY.fullmatch(key) and not may_be_needed(key):
                index.unlink(missing_ok=True)
                swept.add(key)
        return sorted(swept)

    async def _keep_renewing(self) -> None:
        while True:
            await trio.sleep(LEASE_RENEW_S)
            await self._renew_lease()

    async def _renew_lease(self) -> bool:
        """Anything that is another one each time. What keeps it from being written is told where pages are."""
        put = partial(self.bucket.put, self.directory + LEASE, os.urandom(LEASE_BYTES))
        try:
            await trio.to_thread.run_sync(put, limiter=self._renewing)
        except OSError:
            return False
        self._renewed_at = trio.current_time()
        return True

    async def _over(self, directories: Sequence[str]) -> list[str]:
        """Those of boots whose lease stands still."""
        said = await self.each(self._lease, directories)
        now = trio.current_time()
        stood = [self._leases.seconds(directory, what, now) for directory, what in zip(directories, said, strict=True)]
        return [directory for directory, seconds in zip(directories, stood, strict=True) if seconds >= LEASE_S]

    def _lease(self, directory: str) -> bytes:
        try:
            return self.bucket.get(directory + LEASE, 0, LEASE_BYTES)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADMSG):  # it is cut short: its host has lost power
                raise
            return b""

    async def drop_partial(self, may_be_needed: Callable[[str], bool]) -> None:
        """What predecessors were writing when they were killed."""
        for path, _ in await self.in_thread(self.bucket.partial):
            key = path.rpartition("/")[2].partition(".")[0]
            if KEY.fullmatch(key) and not may_be_needed(key):
                await self.in_thread(self.bucket.delete, path)

    async def aclose(self) -> None:
        self.bucket.forget("")

    async def in_thread(self, call: Callable[..., R], *args: object) -> R:
        """Anything but a read of a page. Not cancelled while it runs: its deadlines and retries bound it."""
        return await trio.to_thread.run_sync(partial(call, *args), limiter=self.writes)

    async def each(self, call: Callable[[T], R], items: Iterable[T], *, reading: bool = False) -> list[R]:
        """One call an item, some at a time, each in a thread; reads are left alone when cancelled. OSError: the first one,
        when all have ended."""
        wanted = list(items)
        results: dict[int, R] = {}
        errors: list[OSError] = []

        async def one(n: int) -> None:
            try:
                results[n] = await trio.to_thread.run_sync(
                    call, wanted[n], limiter=self.reads if reading else self.writes, abandon_on_cancel=reading
                )
            except OSError as error:
                errors.append(error)

        if len(wanted) == 1:
            await one(0)
        else:
            async with trio.open_nursery() as nursery:
                for n in range(len(wanted)):
                    nursery.start_soon(one, n)
        if errors:
            raise errors[0]
        return [results[n] for n in range(len(wanted))]


class ObjectSpace:
    """One guest's segments. Implements store.PageSpace."""

    _index: Index

    def __init__(self, store: ObjectStore, key: str, pages: int, page_bytes: int) -> None:
        self._store, self._key, self._pages, self._page_bytes = store, key, pages, page_bytes
        self._record_bytes_max = page_bytes + segments.SEAL_BYTES_MAX
        self._directory = f"{store.directory}{key}/"
        self._index_path = store.index_dir / f"{key}{INDEX_SUFFIX}"
        self._usages: dict[int, Usage] = {}
        self._read_now = 0
        self._cleaning = False
        self._clean_again_at = -1.0
        self._damage = ""
        self.trouble = ""  # why dead segments are not being cleaned up; they only take space

    def _name(self, number: int) -> str:
        return f"{self._directory}{self._key}.{number:07x}"

    # --- opening ---

    async def restore(self) -> None:
        """Find what a predecessor left. StoreError, OSError."""
        store = self._store
        await store.drop_partial(lambda key: key != self._key)
        name = re.compile(re.escape(f"{self._directory}{self._key}.") + r"([0-9a-f]{7})")
        for entry in await store.in_thread(store.bucket.entries, self._directory):
            if match := name.fullmatch(entry.path):
                self._usages[int(match[1], 16)] = Usage(entry.size_bytes)
        index = segment_index.reopen(self._index_path, self._directory, self._pages, self._page_bytes)
        if index is None:
            # not 1: an earlier life of this guest, before it was detached, may have writes under way by such names
            index = await self._rebuild() if self._usages else self._create(1 + randbelow(NUMBER_MAX // 2), None)
        self._index = index
        try:
            await store.in_thread(self._count)
        except BaseException:
            index.close()
            raise

    def _create(self, next_number: int, words: array[int] | None) -> Index:
        return segment_index.create(
            self._index_path, self._directory, self._pages, self._page_bytes, next_number, words
        )

    async def _rebuild(self) -> Index:
        """From the tables of all segments. One that cannot be read may have held the newest copy of any page."""
        try:
            tables = await self._store.each(self._read_table, self._usages)
        except DamagedError as error:
            raise StoreError(
                f"the index {self._index_path} is gone and {error.strerror}; older copies of its pages cannot be told from "
                "new ones; nothing was touched: put one of the two back"
            ) from error
        words, generations = array("Q", bytes(8 * self._pages)), array("I", bytes(4 * self._pages))
        for number, rows in sorted(zip(self._usages, tables, strict=True)):
            for page, generation, offset, length in rows:
                if page < self._pages and generation >= generations[page]:
                    words[page], generations[page] = Place(number, offset, length).word, generation
        return self._create(max(self._usages) + REBUILT_NUMBERS_SKIPPED, words)

    def _read_table(self, number: int) -> list[Row]:
        name, size_bytes = self._name(number), self._usages[number].total_bytes
        read = partial(self._store.bucket.get, name)
        tail = read(max(size_bytes - TAIL_BYTES, 0), min(size_bytes, TAIL_BYTES))
        table_bytes = segments.table_bytes(name, size_bytes, tail[-segments.TRAILER_BYTES :])
        if table_bytes > len(tail):
            tail = read(size_bytes - table_bytes, table_bytes)
        return segments.read_table(name, size_bytes, tail)

    def _count(self) -> None:
        """What is live in each segment."""
        for words in self._index.scan():
            self._add(words)

    # --- pages ---

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        await self.write_runs([(first_page, records)])

    async def write_runs(self, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        """One segment for each `segment_bytes`, however far apart the pages are; then a round of cleaning, if one is worth it."""
        pages = array("I")
        for first_page, records in runs:
            if first_page < 0 or first_page + len(records) > self._pages:
                raise ValueError(f"pages {first_page} to {first_page + len(records)} of {self._pages}")
            pages.extend(range(first_page, first_page + len(records)))
        whole = Records.joined([Records.of(records) for _, records in runs])
        if whole.longest_bytes > self._record_bytes_max:
            raise ValueError(f"a record of {whole.longest_bytes} bytes, pages have {self._page_bytes}")
        step = max(self._store.options.segment_bytes // self._page_bytes, 1)
        for n in range(0, len(pages), step):
            await self._write_segment(pages[n : n + step], whole[n : n + step])
        await self._clean()

    async def _write_segment(self, pages: array[int], records: Records) -> None:
        runs, number = list(_runs(pages)), self._index.take_number()
        words = await self._put(number, pages, array("I", [number]) * len(pages), records, runs)
        for first, end in runs:  # without an await: to who cleans, a segment is dead that nothing points to
            self._point(pages[first], words[first:end])

    async def _put(
        self,
        number: int,
        pages: array[int],
        generations: array[int],
        records: Records,
        new: Sequence[tuple[int, int]] = (),
    ) -> array[int]:
        """Make segment `number` durable; its index words. `new`: runs in `pages` for which the index may have no room yet. One
        that failed is dead, and deleted with the dead ones."""

        def put() -> array[int]:
            for first, end in new:
                self._index.reserve(pages[first], end - first)
            data, bounds = segments.build(self._name(number), pages, generations, records)
            usage.total_bytes = len(data)
            self._store.bucket.put(self._name(number), data)
            return segments.words_of(number, bounds)

        usage = self._usages[number] = Usage(0, busy=True)
        try:
            return await self._store.in_thread(put)
        finally:
            usage.busy = False

    def _point(self, first_page: int, words: array[int]) -> None:
        """Where a run of pages is from now on; 0: nowhere."""
        old = self._index.words(first_page, len(words))
        self._index.put(first_page, words)
        self._add(words)
        self._add(old, -1)

    def _add(self, words: array[int], sign: int = 1) -> None:
        if any(words):
            for number, length in map(segments.size_of, filter(None, words)):
                if usage := self._usages.get(number):  # an object that somebody deleted has none
                    usage.live_bytes += sign * (length + ROW_BYTES)

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        """One read a run of records."""
        if first_page < 0 or first_page + count > self._pages:
            raise ValueError(f"pages {first_page} to {first_page + count} of {self._pages}")
        for _ in range(READ_TRIES_MAX):
            words = self._index.words(first_page, count)
            try:
                runs = await self._read_runs(segments.runs_of(first_page, words))
            except FileNotFoundError as error:
                if self._index.words(first_page, count) == words:
                    raise OSError(errno.EBADMSG, f"a segment is gone: {error.strerror}") from error
            else:
                found = {page: record for run in runs for page, record in run}
                return [found.get(page) for page in range(first_page, first_page + count)]
        raise OSError(errno.EAGAIN, f"pages {first_page} to {first_page + count} are moved again and again")

    async def _read_runs(self, wanted: Sequence[Run]) -> list[list[tuple[int, bytes]]]:
        if len(wanted) == 1 and wanted[0].length <= NOW_BYTES_MAX:
            (run,) = wanted
            name = self._name(run.number)
            data = self._store.bucket.get_now(name, run.offset, run.length)
            if data is not None:
                self._read_now = (self._read_now + 1) % NOW_IN_A_ROW
                if not self._read_now:  # others want trio's thread, too; each time would be a round of its loop
                    await trio.lowlevel.checkpoint()
                try:
                    return [self._records(run, data)]
                except segments.DamagedError:  # the object has been put right since, maybe: another file by that name
                    self._store.bucket.forget(name)
        return await self._store.each(self._read_run, wanted, reading=True)

    def _read_run(self, run: Run) -> list[tuple[int, bytes]]:
        return self._records(run, self._store.bucket.get(self._name(run.number), run.offset, run.length))

    def _records(self, run: Run, read: bytes) -> list[tuple[int, bytes]]:
        name, data = self._name(run.number), memoryview(read)
        rows = [(page, data[offset : offset + length]) for page, offset, length in run.rows]
        return [(page, segments.record_at(name, page, stored).data) for page, stored in rows]

    async def discard(self, first_page: int, count: int) -> None:
        """Survives a crash of tierd; a rebuild may bring pages back. Deletes what is dead then, cleans what is sparse."""
        if first_page < 0 or first_page + count > self._pages:
            raise ValueError(f"pages {first_page} to {first_page + count} of {self._pages}")
        for first in range(first_page, first_page + count, DISCARD_WORDS):
            words = self._index.words(first, min(DISCARD_WORDS, first_page + count - first))
            if any(words):
                self._point(first, array("Q", bytes(8 * len(words))))
            await trio.lowlevel.checkpoint()
        await self._clean()

    async def used_bytes(self) -> int:
        return sum(usage.total_bytes for usage in self._usages.values())

    async def delete(self) -> None:
        """The index last: as long as there are segments, what they are is known."""
        await self._store.in_thread(self._store.bucket.remove, self._directory)
        self._index_path.unlink(missing_ok=True)
        self._usages.clear()
        self._index.close()

    async def aclose(self) -> None:
        self._index.close()

    # --- cleaning ---

    async def _clean(self) -> None:
        """Until nothing is worth it. What fails is told in `trouble` and tried again after a pause: what was written or
        discarded is so all the same."""
        if self._cleaning or trio.current_time() < self._clean_again_at:
            return
        self._cleaning = True
        segment_bytes = self._store.options.segment_bytes
        try:
            while any(chosen := segments.choose(self._usages, segment_bytes)):
                await self._delete(chosen.dead)
                await self._move(chosen.moved)
            self.trouble = self._damage if any(usage.damaged for usage in self._usages.values()) else ""
        except OSError as error:
            self.trouble = f"dead pages of {self._key} cannot be cleaned up: {error.strerror}"
            self._clean_again_at = trio.current_time() + CLEAN_PAUSE_S
        finally:
            self._cleaning = False

    async def _delete(self, numbers: list[int]) -> None:
        await self._store.each(self._store.bucket.delete, map(self._name, numbers))
        for number in numbers:
            del self._usages[number]

    async def _move(self, numbers: list[int]) -> None:
        """Copy what is live in these segments into a new one. A page that is written or discarded meanwhile stays so."""
        found = await self._store.in_thread(self._live_in, numbers)
        if found:
            number = self._index.take_number()
            pages = array("I", [record.page for _, record in found])
            generations = array("I", [record.generation for _, record in found])
            words = await self._put(number, pages, generations, Records.of([record.data for _, record in found]))
            for (old, _), page, new in zip(found, pages, words, strict=True):
                if self._index.words(page, 1)[0] == old:
                    self._point(page, array("Q", [new]))
        for number in numbers:
            self._usages[number].damaged = self._usages[number].live_bytes > 0

    def _live_in(self, numbers: list[int]) -> list[tuple[int, Record]]:
        """What can be read of these segments and is live, with its words."""
        found = []
        for number in numbers:
            try:
                found += self._live(number)
            except OSError as error:
                if error.errno not in (errno.EBADMSG, errno.ENOENT):
                    raise
                self._damage = str(error.strerror)  # or gone, or cut off: it must not keep the others
        return found

    def _live(self, number: int) -> list[tuple[int, Record]]:
        """Records of a segment that the index points to, with its words. DamagedError."""
        name = self._name(number)
        segment = self._store.bucket.get(name, 0, self._usages[number].total_bytes)
        found = []
        for row, stored in segments.records_of(name, segment):
            word = Place(number, row.offset, row.length).word
            if row.page < self._pages and self._index.words(row.page, 1)[0] == word:
                found.append((word, segments.record_at(name, row.page, stored)))  # no damage is copied
        return found


def _runs(pages: array[int]) -> Iterator[tuple[int, int]]:
    """Where neighbours begin and end in `pages`."""
    first = 0
    for n in range(1, len(pages) + 1):
        if n == len(pages) or pages[n] != pages[n - 1] + 1:
            yield first, n
            first = n


def make(given: Mapping[str, object], context: StoreContext) -> ObjectStore:
    """Implements store.PageStoreFactory."""
    ours = {"concurrency": context.concurrency, "deadline_s": context.deadline_s}
    options = parse("objects", ObjectOptions, {**ours, **given})
    return ObjectStore(options, context.runtime_dir / "objects", options.host_id or host_id(), boot_id())
