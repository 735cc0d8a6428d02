# SPDX-License-Identifier: Apache-2.0
"""The store `redis`: pages in Redis or Valkey, on one server, a set watched by sentinels, or a cluster.

A run of neighbouring pages (256 KiB) is one hash, NAMESPACE:{HOST/BOOT/GUEST/RUN}, a field a page. So a run is one
command and one slot, a cluster moves it as a whole, and a guest's runs are spread over all nodes. Nothing of it expires.
NAMESPACE:{HOST}:spaces lists what there is, for the sweep; NAMESPACE:{HOST}:lease:BOOT is there while that boot lives, or until
ten minutes after: two machines of one HOST (copies) do not sweep each other.

What the loss of a node means. A write returns when the primary has it: on its disk with `appendfsync always` there, or with
`fsync` here; in the memory of that many replicas with `replicas`. So a server that is killed, or its machine, loses nothing of
that with `always` or `fsync`, and a replica that takes over has it with `replicas` (of several, the most advanced one is
chosen, if those that watch see it). With `appendfsync everysec` a server that is merely killed loses up to two seconds of
writes: it may put off writing its file, not only syncing it. That is refused, unless `allow_volatile` says that you mean it.
Pages that are lost read as None or as an older record, which the checksum of each page, or the seal, tells: a memory error
for the guest, never wrong bytes. Other pages are not affected.

A write that failed by its connection may still be on its way. So all that a guest writes is on connections that are
called after it, and before anything else is written there, also by a successor, the server is told to close those.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import trio

from tierd.attach.procfs import boot_id
from tierd.store import StoreContext, StoreError
from tierd.store.leases import LEASE_RENEW_S, Stillness
from tierd.store.options import host_id, parse
from tierd.store.redis_direct import Direct
from tierd.store.redis_link import Address, Link, RedisOptions
from tierd.store.redis_nodes import Command, Nodes, Run, Words, batches, batches_of_words, guarded, nodes_of
from tierd.store.redis_probe import must_keep, probe

RUN_BYTES = 256 << 10
PIECE_BYTES = 1 << 20  # of a long run: while the server takes one, the others are compressed and sealed
BATCH_BYTES = 4 << 20  # sent in one go
BATCH_KEYS = 1024  # looked at or removed in one go
WRITERS_MAX = 4  # guests at once
REPLICA_WAIT_SHARE = 0.8  # of timeout_s: WAIT answers before we give up on the connection
LEASE_MISSING = -2  # PTTL of what is not there
# of a boot: when it was not renewed for so long, and was seen so for a while, any other of the same HOST sweeps what it left.
# It is there for longer, because a full server renews a key and takes no new one.
LEASE_MS, LEASE_KEPT_MS, LEASE_OVER_S = 600_000, 30 * 86_400_000, 3 * LEASE_RENEW_S
KEEPS_S = 60.0  # a node that is written is asked so often whether it still keeps what it is given
BACKOFF_S, BACKOFF_S_MAX = 0.05, 1.0

T = TypeVar("T")


@dataclass(eq=False)
class _Change:
    """A write or a discard that waits for its turn. `added`: what each answer counts, 1 or -1."""

    commands: Sequence[Command]
    added: int
    confirm: Words
    over: trio.Event = field(default_factory=trio.Event)
    error: BaseException | None = None


class RedisSpace:
    """Implements store.PageSpace."""

    def __init__(self, store: RedisStore, boot: str, key: str, pages: int, page_bytes: int) -> None:
        self._store, self._boot, self._key = store, boot, key
        self._pages, self._page_bytes = pages, page_bytes
        self._run_pages = max(RUN_BYTES // page_bytes, 1)
        self._name = store.writer_name(boot, key)
        self._link = Link(store.options, self._name, 1)
        self._run = Run(store.nodes, self._link, partial(store.close_writers, name=self._name), store.must_keep)
        self._writing = trio.Lock()  # one connection, one group of calls at a time
        self._waiting: list[_Change] = []
        self._stored: int | None = None  # pages; None: not known, count them

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        commands = []
        for run, first, count in self._runs(first_page, len(records)):
            at = run * self._run_pages + first - first_page
            pairs = zip(range(first, first + count), records[at : at + count], strict=True)
            commands.append(Command("HSET", self._run_key(run), tuple(word for pair in pairs for word in pair)))
        await self._mutate(commands, 1, self._store.confirm)

    async def discard(self, first_page: int, count: int) -> None:
        runs = self._runs(first_page, count)
        fields = [Command("HDEL", self._run_key(run), tuple(range(first, first + n))) for run, first, n in runs]
        await self._mutate(fields, -1)

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        runs = self._runs(first_page, count)
        commands = [Command("HMGET", self._run_key(run), tuple(range(first, first + n))) for run, first, n in runs]
        records: list[bytes | None] = []
        for batch in batches(commands, self._batch_runs):
            for answer in await self._store.read_pages(batch):
                records += answer
        return records

    async def used_bytes(self) -> int:
        """Records, counted as a page each: what compression saves is not seen here."""
        async with self._writing:
            if self._stored is None:
                self._stored = 0
                try:
                    for batch in batches([Command("HLEN", key) for key in self._run_keys()], BATCH_KEYS):
                        self._stored += sum(await self._store.read(batch))
                except BaseException:
                    self._stored = None
                    raise
            return self._stored * self._page_bytes

    async def delete(self) -> None:
        async with self._writing:
            self._stored = None
            for batch in batches([Command("UNLINK", key) for key in self._run_keys()], BATCH_KEYS):
                await self._settled(batch)
            await self._settled([Command("HDEL", self._store.spaces_key, (f"{self._boot}/{self._key}",))])
        await self.aclose()

    async def aclose(self) -> None:
        self._link.close()

    async def begin(self) -> None:
        """Enter it into the list of spaces, from which a full server can still read. OSError, StoreError: a space of another
        size is there."""
        entry, size = f"{self._boot}/{self._key}", json.dumps([self._pages, self._page_bytes])
        look = Command("HGET", self._store.spaces_key, (entry,))
        async with self._writing:
            (found,) = await self._settled([look])
            if found is None:
                await self._store.blocking(self._store.must_have_lease)
                enter = Command("HSETNX", self._store.spaces_key, (entry, size))
                _, found = await self._settled([enter, look])
        if found.decode() != size:
            raise StoreError(
                f"the store has a space {entry} of {found.decode()} (pages, bytes), {size} was expected; nothing was touched"
            )

    async def close_writers(self) -> None:
        """Nothing that was under way to this space lands any more, whoever sent it. OSError, StoreError."""
        for address in await self._store.blocking(self._store.nodes.all):
            await self._store.blocking(partial(self._store.close_writers, address, self._name))

    @property
    def _batch_runs(self) -> int:
        return max(BATCH_BYTES // (self._run_pages * self._page_bytes), 1)

    def _run_key(self, run: int) -> str:
        return self._store.run_key(self._boot, self._key, run)

    def _run_keys(self) -> list[str]:
        return [self._run_key(run) for run in range(-(-self._pages // self._run_pages))]

    def _runs(self, first_page: int, count: int) -> list[tuple[int, int, int]]:
        """(run, its first page of these counted from its begin, how many)."""
        assert 0 <= first_page <= first_page + count <= self._pages, "pages outside of the guest"
        found = []
        while count:
            run, first = divmod(first_page, self._run_pages)
            n = min(count, self._run_pages - first)
            found.append((run, first, n))
            first_page, count = first_page + n, count - n
        return found

    async def _mutate(self, commands: Sequence[Command], added: int, confirm: Words = ()) -> None:
        """With whatever of its kind waits meanwhile: a round trip, a sync and a confirmation for all of them."""
        change = _Change(commands, added, confirm)
        self._waiting.append(change)
        try:
            await self._writing.acquire()
        except trio.Cancelled:
            if change in self._waiting:
                self._waiting.remove(change)
            else:  # somebody is at it
                with trio.CancelScope(shield=True):
                    await change.over.wait()
            raise
        try:
            if not change.over.is_set():
                with trio.CancelScope(shield=True):  # it is not only ours
                    await self._change_together(change)
        finally:
            self._writing.release()
        if change.error is not None:
            raise change.error

    async def _change_together(self, first: _Change) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()  # those who came with us are here then
        group = [change for change in self._waiting if change.added == first.added]
        self._waiting = [change for change in self._waiting if change.added != first.added]
        commands = [command for change in group for command in change.commands]
        stored, self._stored = self._stored, None
        try:
            for batch in batches_of_words(commands, 2 * BATCH_BYTES // self._page_bytes):
                answers = await self._settled(batch, first.confirm, together=first.added > 0)
                stored = None if stored is None else stored + first.added * sum(answers)
            self._stored = stored
        except BaseException as error:
            for change in group:
                change.error = error
            if not isinstance(error, OSError | StoreError):
                raise
        finally:
            for change in group:
                change.over.set()

    async def _settled(self, commands: Sequence[Command], confirm: Words = (), *, together: bool = False) -> list[Any]:
        """Carried out or an error; a cancellation waits. Before, what failed by its connection is made not to land. `together`:
        as a transaction, which a full server refuses, so for writes only."""
        return await self._store.blocking(partial(self._settle, commands, confirm, together and len(commands) > 1))

    def _settle(self, commands: Sequence[Command], confirm: Words, together: bool) -> list[Any]:
        self._store.renew_lease()
        try:
            return self._run(commands, confirm, together=together)
        except (OSError, StoreError):
            self._store.look_again()
            raise


class RedisStore:
    """Implements store.PageStore. `boot`: which boot of the host the guests live in."""

    piece_bytes = PIECE_BYTES

    def __init__(self, options: RedisOptions, boot: str) -> None:
        self.options = options
        self._boot = boot.replace("-", "")[:16]
        self._host = options.host_id or host_id()
        prefix = f"{options.namespace}:{{{self._host}}}"
        self.spaces_key, self._lease_key = f"{prefix}:spaces", f"{prefix}:lease:"
        self._link = Link(options, f"{options.namespace}:{self._host}", options.concurrency + WRITERS_MAX)
        self.nodes: Nodes = nodes_of(options, self._link)
        self.confirm = confirmation(options)
        self._run = Run(self.nodes, self._link)
        self._direct = Direct(options, f"{options.namespace}:{self._host}")
        self._readers = trio.CapacityLimiter(options.concurrency)
        self._writers = trio.CapacityLimiter(WRITERS_MAX)
        self._renewed_at = float("-inf")  # the lease; monotonic
        self._leases = Stillness()  # of other boots
        self._keeps: dict[Address, float] = {}  # when each node was seen to keep what is written; monotonic

    async def open(self, key: str, pages: int, page_bytes: int) -> RedisSpace:
        space = RedisSpace(self, self._boot, key, pages, page_bytes)
        try:
            await space.close_writers()
            await space.begin()
        except BaseException as error:
            await space.aclose()
            if isinstance(error, OSError):
                await self.blocking(self.look_again)
            raise
        return space

    async def probe(self) -> None:
        await self.blocking(
            partial(
                probe,
                self.options,
                self.nodes,
                self._link,
                self.run_key(self._boot, f"probe-{os.getpid()}", 0),
                self.confirm,
            )
        )

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        """Those of another boot only once its lease is over: another machine may have the same host_id. Renews ours."""
        try:
            await self.blocking(self._take_lease)
        except OSError:  # a replica has taken over, and nobody has read or written since
            await self.blocking(self.look_again)
            await self.blocking(self._take_lease)
        (found,) = await self.read([Command("HGETALL", self.spaces_key)])
        over = await self._over(sorted({entry.decode().partition("/")[0] for entry in found} - {self._boot}))
        swept = []
        for entry, size in sorted(found.items()):
            boot, _, key = entry.decode().partition("/")
            if may_be_needed(key) if boot == self._boot else boot not in over:
                continue
            space = RedisSpace(self, boot, key, *json.loads(size))
            try:
                await space.close_writers()
                await space.delete()
            finally:
                await space.aclose()
            swept.append(key)
        for boot in over:
            await self.blocking(partial(self._run, [Command("UNLINK", self._lease_key + boot)]))
        return swept

    async def _over(self, boots: Sequence[str]) -> list[str]:
        """Those whose lease is. The server says how long ago it was renewed, but one that was away says that of everybody's. One
        that is not there (a failover lost it, and the server is full) is made: it can be renewed on a full server, too, by a boot
        that lives, and is over ten minutes later if there is none. As long as there is no room for it, nobody is over."""
        left = await self.read([Command("PTTL", self._lease_key + boot) for boot in boots]) if boots else []
        for at, boot in enumerate(boots):
            if left[at] == LEASE_MISSING:
                left[at] = LEASE_KEPT_MS
                await self.blocking(partial(self._make_lease_if_room, boot))
        now = time.monotonic()
        old = {boot: left_ms < LEASE_KEPT_MS - LEASE_MS for boot, left_ms in zip(boots, left, strict=True)}
        stood = {boot: self._leases.seconds(boot, old[boot], now) for boot in boots}
        return [boot for boot in boots if old[boot] and stood[boot] >= LEASE_OVER_S]

    async def aclose(self) -> None:
        self._direct.close()
        self._link.close()
        self.nodes.close()

    def run_key(self, boot: str, key: str, run: int) -> str:
        return f"{self.options.namespace}:{{{self._host}/{boot}/{key}/{run}}}"

    def writer_name(self, boot: str, key: str) -> str:
        return f"{self.options.namespace}:{self._host}/{boot}/{key}"

    async def blocking(self, function: Callable[[], T]) -> T:
        """In a thread; a cancellation waits for it, so that nothing happens after it."""
        return await trio.to_thread.run_sync(function, limiter=self._writers)

    async def read_pages(self, commands: Sequence[Command]) -> list[list[bytes | None]]:
        """As `read`, of HMGET, and without a thread where all is well."""
        addresses = {self.nodes.known(command.key) for command in commands}
        if len(addresses) == 1 and (address := addresses.pop()):
            try:
                self._readers.acquire_nowait()  # to acquire in any case would be a round of trio's loop
            except trio.WouldBlock:
                await self._readers.acquire()
            try:
                answers = await self._direct.ask(address, [*self.nodes.guard, *(command.words for command in commands)])
            finally:
                self._readers.release()
            if answers is not None and guarded(self.nodes.guard, answers):
                return answers[len(self.nodes.guard) :]
        return await self.read(commands)

    async def read(self, commands: Sequence[Command]) -> list[Any]:
        """Tried again until `deadline_s`. A cancellation leaves it behind, at most so long. OSError, StoreError."""
        return await trio.to_thread.run_sync(self._read, commands, limiter=self._readers, abandon_on_cancel=True)

    def _read(self, commands: Sequence[Command]) -> list[Any]:
        deadline, pause_s = time.monotonic() + self.options.deadline_s, BACKOFF_S
        while True:
            try:
                answers = self._run(commands)
                with contextlib.suppress(OSError, StoreError):  # it is only for the next one
                    for address in {self.nodes.of(command.key) for command in commands}:
                        self._direct.prepare(address)
                return answers
            except OSError:
                if time.monotonic() + pause_s > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_S_MAX)
            self.look_again()

    def look_again(self) -> None:
        """After an error: a replica may have taken over. If nobody says so, what is known stays."""
        try:
            self.nodes.refresh()
        except (OSError, StoreError):
            return  # the next try says what is wrong

    def close_writers(self, address: Address, name: str) -> None:
        """What the connections called `name` sent to `address` is done when this returns, or never will be. Blocks; OSError."""
        for client in self._link.call(address, "CLIENT LIST"):
            if client["name"] == name:
                self._link.call(address, "CLIENT KILL", "ID", client["id"])

    def must_keep(self, address: Address) -> None:
        """A replica that has taken over, and a node that slots were moved to, were not there when the store was probed. Blocks;
        OSError, StoreError: nothing is to be written there."""
        due = time.monotonic() - self._keeps.get(address, float("-inf")) > KEEPS_S
        if due and must_keep(self.options, address, self._link):
            self._keeps[address] = time.monotonic()

    def renew_lease(self) -> None:
        """Before the first write, and now and then; the sweep renews it where nobody writes. Blocks. What goes wrong must not
        stop a write to another node."""
        if time.monotonic() - self._renewed_at > LEASE_RENEW_S:
            with contextlib.suppress(OSError):  # the next one is soon enough
                self._take_lease()

    def _take_lease(self) -> None:
        """This boot lives. A full server cannot take a new one. Blocks; OSError, StoreError."""
        self._renewed_at = time.monotonic()
        with _unless_full():
            self.must_have_lease()

    def must_have_lease(self) -> None:
        """Before a guest's first page: without one, another machine of this host_id could take the guest for gone. Blocks;
        OSError, StoreError."""
        if self._run([Command("PEXPIRE", self._lease_key + self._boot, (LEASE_KEPT_MS,))]) == [0]:
            self._make_lease(self._boot)

    def _make_lease(self, boot: str) -> None:
        self._run([Command("SET", self._lease_key + boot, (b"", "PX", LEASE_KEPT_MS, "NX"))])

    def _make_lease_if_room(self, boot: str) -> None:
        with _unless_full():
            self._make_lease(boot)


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def confirmation(options: RedisOptions) -> Words:
    """What has to be confirmed after a write before it counts."""
    wait_ms = int(options.timeout_s * REPLICA_WAIT_SHARE * 1000)
    if options.fsync:
        return [("WAITAOF", 1, options.replicas, wait_ms)]
    return [("WAIT", options.replicas, wait_ms)] if options.replicas else []


def make(given: Mapping[str, object], context: StoreContext) -> RedisStore:
    """Implements store.PageStoreFactory: the keys are redis_link.RedisOptions."""
    ours = {"concurrency": context.concurrency, "deadline_s": context.deadline_s}
    return RedisStore(parse("redis", RedisOptions, {**ours, **given}), boot_id())
