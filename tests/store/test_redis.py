# SPDX-License-Identifier: Apache-2.0
"""The store `redis` on one real server: what it refuses, and what becomes of pages when something happens to it."""

from __future__ import annotations

import errno
import random
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from tests.store.certificates import Authority
from tests.store.servers import Server, Wire, wait_for
from tests.store.writers import Writer
from tierd.store import PageStore, StoreContext, StoreError, redis
from tierd.store.options import host_id
from tierd.store.redis import RedisStore, make
from tierd.store.redis_link import ACL, Link, RedisOptions
from tierd.testing import PAGE, PAGES, PageStoreContract, new_key, records, space_of

pytestmark = pytest.mark.usefixtures("redis_there")
NO_CONTEXT = StoreContext(Path("/nowhere"))  # Redis keeps nothing on this host


def options(server: Server, **more: Any) -> dict[str, Any]:
    return {"addresses": [server.address], "host_id": "test", **more}


@asynccontextmanager
async def made(given: dict[str, Any]) -> AsyncIterator[RedisStore]:
    store = make(given, NO_CONTEXT)
    try:
        yield store
    finally:
        await store.aclose()


def probe(given: dict[str, Any]) -> None:
    async def run() -> None:
        async with made(given) as store:
            await store.probe()

    trio.run(run)


def refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(StoreError, match=why):
        probe(given)


async def use_everything(store: RedisStore) -> None:
    await store.probe()
    async with space_of(store) as space:
        await space.write(0, records(0, 70))
        await space.discard(0, 10)
        assert await space.read(0, 70) == [None] * 10 + records(10, 60)
        with mock.patch.object(store, "read", side_effect=AssertionError("the long way")):
            assert await space.read(8, 4) == [None] * 2 + records(10, 2)
        assert await space.used_bytes() == 60 * PAGE
    await store.sweep(lambda key: True)


class TestOneServer(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server

    def make_store(self) -> PageStore:
        return make({"addresses": [self.server.address]}, NO_CONTEXT)


# --- what is refused


@pytest.mark.parametrize(
    "policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-ttl", "volatile-random"]
)
def test_a_server_that_evicts_is_refused(server: Server, policy: str) -> None:
    server.ask("CONFIG SET", "maxmemory-policy", policy)
    try:
        refused(options(server), rf"{server.address} evicts keys .*{policy}.*set noeviction")
    finally:
        server.ask("CONFIG SET", "maxmemory-policy", "noeviction")
    probe(options(server))


def test_a_server_that_forgets_is_refused() -> None:
    with Server("--appendonly", "no") as server:
        refused(options(server), "keeps nothing when it is restarted.*set appendonly yes.*allow_volatile")
        probe(options(server, allow_volatile=True))
        server.ask("CONFIG SET", "appendonly", "yes")
        server.ask("CONFIG SET", "appendfsync", "everysec")
        refused(options(server), "loses up to two seconds .*appendfsync everysec.*set appendfsync always")
        probe(options(server, allow_volatile=True))
        server.ask("CONFIG SET", "appendfsync", "always")
        probe(options(server))


def test_replicas_that_are_not_there_are_missed(server: Server) -> None:
    refused(
        options(server, replicas=1), "has 0 replicas, 1 have to confirm each write; connect more, or set replicas: 0"
    )


def test_a_server_that_cannot_tell_of_its_disk_is_refused(server: Server) -> None:
    """WAITAOF is of Redis 7.2; Debian 12 has 7.0."""
    version = tuple(map(int, server.ask("INFO")["redis_version"].split(".")[:2]))
    if version >= (7, 2):
        trio.run(with_store(options(server, fsync=True), use_everything))
    else:
        refused(options(server, fsync=True), "has no WAITAOF.*set fsync: false, or upgrade to Redis 7.2")


def test_a_replica_is_refused_and_gives_its_errno(server: Server) -> None:
    with Server("--replicaof", f"127.0.0.1 {server.port}") as replica:
        wait_for(lambda: replica.ask("INFO")["master_link_status"] == "up", replica.log)  # until then it loads, and says so
        refused(options(replica), f"{replica.address} is a replica; name its primary")

        async def write() -> None:
            async with made(options(replica)) as store:
                await store.open(new_key(), PAGES, PAGE)

        with pytest.raises(OSError, match="is a replica") as caught:
            trio.run(write)
        assert caught.value.errno == errno.EROFS


def test_nobody_there() -> None:
    with Server() as server:
        pass
    refused(options(server), rf"{server.address} cannot be reached: .*refused")


def test_a_single_server_is_no_cluster(server: Server) -> None:
    refused(options(server, mode="cluster"), f"{server.address}.*cluster")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "addresses: Field required"),
        ({"addresses": []}, "addresses: .*at least 1"),
        ({"addresses": ["redis1"]}, "addresses.0: .*'redis1' is not an address; write HOST:PORT"),
        ({"addresses": ["redis1:0"]}, "HOST:PORT"),
        ({"addresses": [6379]}, "HOST:PORT"),
        ({"addresses": ["a:1"], "password": "secret"}, "password: there is no such key; did you mean password_file"),
        ({"addresses": ["a:1"], "mode": "sentinel"}, "`service` is the server's name"),
        ({"addresses": ["a:1"], "service": "main"}, "`service` is the server's name"),
        ({"addresses": ["a:1"], "username": "tierd"}, "needs a `password_file`"),
        ({"addresses": ["a:1"], "tls": {"cert_file": "/x"}}, "`cert_file` and `key_file` go together"),
        ({"addresses": ["a:1"], "namespace": "a{b}"}, "namespace: "),
        ({"addresses": ["a:1"], "host_id": "two words"}, "host_id: "),
        ({"addresses": ["a:1"], "timeout_s": 0}, "timeout_s: "),
    ],
)
def test_keys_that_are_wrong(given: dict[str, object], why: str) -> None:
    with pytest.raises(StoreError, match=f"^redis: .*{why}") as caught:
        make(given, NO_CONTEXT)
    assert "secret" not in str(caught.value)


def test_addresses() -> None:
    given = RedisOptions.model_validate({"addresses": ["redis1:6379", "[::1]:7000"]})
    assert given.addresses == (("redis1", 6379), ("::1", 7000))
    assert [str(address) for address in given.addresses] == ["redis1:6379", "[::1]:7000"]


def test_a_host_has_one_id_that_tells_nothing() -> None:
    assert re.fullmatch("[0-9a-f]{16}", host_id())
    assert host_id() == host_id()
    assert host_id() not in Path("/etc/machine-id").read_text()


# --- credentials and TLS


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("correct horse\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def locked(server: Server, password_file: Path) -> Iterator[Server]:
    """A server with a user `tierd` that may do what we say it needs, and no more."""
    server.ask("ACL SETUSER", "tierd", "on", ">correct horse", "~tierd:*", *_granted())
    yield server
    server.ask("ACL DELUSER", "tierd")


def _granted(without: str = "") -> list[str]:
    """ACL, but for what Redis 7.0 does not know yet, as its operator would."""
    return [word for word in ACL.split() if word not in (without, "+waitaof")]


def test_the_acl_in_our_error_suffices(locked: Server, password_file: Path) -> None:
    trio.run(with_store(options(locked, username="tierd", password_file=str(password_file)), use_everything))


# without a replica, a cluster, or other commands that are refused then, too
NOT_TRIED = {"+wait", "+waitaof", "+client|setname", "+cluster|slots", "+cluster|info", "+asking", "+multi", "+exec"}


@pytest.mark.parametrize("missing", sorted(set(ACL.split()) - NOT_TRIED))
def test_a_right_that_is_missing_is_found_at_start(locked: Server, password_file: Path, missing: str) -> None:
    locked.ask("ACL SETUSER", "tierd", "resetkeys", "-@all", "~tierd:*", *_granted(missing))
    given = options(locked, username="tierd", password_file=str(password_file))
    refused(given, rf"(?i){re.escape(missing[1:])}.*tierd's ACL user needs .*\+hset")


def test_keys_of_others_cannot_be_reached(locked: Server, password_file: Path) -> None:
    given = options(locked, username="tierd", password_file=str(password_file), namespace="other")
    refused(given, r"no permissions to access .* keys.*tierd's ACL user needs ~NAMESPACE:\*")


def test_wrong_credentials(locked: Server, password_file: Path) -> None:
    given = options(locked, username="tierd", password_file=str(password_file))
    password_file.write_text("wrong")
    refused(given, f"{locked.address} refuses the credentials.*see username and password_file")
    password_file.write_text("correct horse")
    refused(given | {"username": "nobody"}, "refuses the credentials")
    probe(given)


def test_a_password_that_is_missing(password_file: Path) -> None:
    with Server() as server:
        server.ask("CONFIG SET", "requirepass", "correct horse")
        refused(
            options(server), r"refuses the credentials \(Authentication required.\); see username and password_file"
        )
        probe(options(server, password_file=str(password_file)))


def test_a_password_file_that_is_no_use(server: Server, password_file: Path) -> None:
    given = options(server, password_file=str(password_file))
    password_file.chmod(0o644)
    refused(given, "has mode 0644, everybody can read it; chmod 0600 it")
    password_file.unlink()
    refused(given, "cannot be read: No such file or directory; put the password there")


def test_a_password_can_be_changed(locked: Server, password_file: Path) -> None:
    """New connections take what is in the file then."""

    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 1))
            locked.ask("ACL SETUSER", "tierd", "resetpass", ">new one")
            password_file.write_text("new one\n")
            locked.ask("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await space.read(0, 1) == records(0, 1)
            await space.write(0, records(0, 1, 1))

    trio.run(with_store(options(locked, username="tierd", password_file=str(password_file)), run))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls_server(redis_there: None, authority: Authority) -> Iterator[Server]:
    with Server(*authority.server_settings("127.0.0.1")) as server:
        yield server


def test_tls(tls_server: Server, authority: Authority) -> None:
    """The server wants a certificate of ours, and shows one of its own."""
    ours = authority.certificate("client")
    tls = {"ca_file": str(authority.file), "cert_file": str(ours.cert_file), "key_file": str(ours.key_file)}
    trio.run(with_store(options(tls_server, tls=tls), use_everything))
    refused(options(tls_server, tls={"ca_file": str(authority.file)}), f"{tls_server.address} cannot be reached")
    refused(options(tls_server), f"{tls_server.address} cannot be reached")
    refused(options(tls_server, tls=tls | {"ca_file": None}), "certificate verify failed")
    with pytest.raises(StoreError, match=r"/nowhere/ca\.pem cannot be read: No such file or directory; see tls"):
        make(options(tls_server, tls=tls | {"ca_file": "/nowhere/ca.pem"}), NO_CONTEXT)


def test_tls_of_another_authority_or_host(authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path)
    ours = {"ca_file": str(authority.file)}
    for settings, why in (
        (other.server_settings("127.0.0.1"), "certificate verify failed"),
        (authority.server_settings("10.1.2.3"), "certificate is not valid for '127.0.0.1'|IP address mismatch"),
    ):
        with Server(*settings, "--tls-auth-clients", "no") as server:
            refused(options(server, tls=ours), why)


# --- what happens to it


def with_store(given: dict[str, Any], use: Callable[[RedisStore], Any]) -> Callable[[], Any]:
    async def run() -> None:
        async with made(given) as store:
            await use(store)

    return run


def test_a_full_server_says_so_and_still_gives_pages_back() -> None:
    async def run(store: RedisStore) -> None:
        key, other = new_key(), new_key()
        left = await store.open(key, PAGES, PAGE)
        await left.write(0, records(0, 512))
        await (await store.open(other, PAGES, PAGE)).aclose()
        server.ask("CONFIG SET", "maxmemory", "1mb")
        with pytest.raises(OSError, match=r"is full .*raise its maxmemory") as caught:
            await left.write(512, records(512, 1))
        assert caught.value.errno == errno.ENOSPC
        await store.probe()  # it is no mistake of the operator's
        await left.aclose()
        (lease,) = server.ask("KEYS", "tierd:{test}:lease:*")
        server.ask("DEL", lease)
        async with made(options(server)) as successor:
            again = await successor.open(key, PAGES, PAGE)
            assert await again.read(0, 513) == [*records(0, 512), None]
            assert await successor.sweep(lambda known: known == key) == [other]
            await again.discard(0, 128)
            server.ask("CONFIG SET", "maxmemory", "0")
            await again.write(0, records(0, 64, 1))
            assert await again.read(0, 129) == records(0, 64, 1) + [None] * 64 + records(128, 1)
            await again.aclose()

    with Server() as server:
        trio.run(with_store(options(server), run))


def test_writes_that_wait_at_the_same_time_are_one() -> None:
    """And what goes wrong with one is told to all; one that is cancelled meanwhile is over when that comes back."""

    async def run(store: RedisStore) -> None:
        space = await store.open(new_key(), PAGES, PAGE)

        async def write(page: int, seed: int) -> None:
            await space.write(page, records(page, 1, seed))

        server.ask("CONFIG RESETSTAT")
        async with trio.open_nursery() as nursery:
            for page in range(64):
                nursery.start_soon(write, page, 1)
        assert await space.read(0, 64) == records(0, 64, 1)
        assert await space.used_bytes() == 64 * PAGE
        assert server.ask("INFO", "commandstats")["cmdstat_exec"]["calls"] <= 2
        async with trio.open_nursery() as nursery:
            for page in range(8):
                nursery.start_soon(write, page, 2)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        before = await space.read(0, 8)
        await trio.sleep(0.1)
        assert await space.read(0, 8) == before
        server.ask("CONFIG SET", "maxmemory", "1mb")
        failed = []

        async def fail(page: int) -> None:
            with pytest.raises(OSError) as caught:
                await space.write(page, records(page, 1, 3))
            failed.append(caught.value.errno)

        async with trio.open_nursery() as nursery:
            for page in range(8):
                nursery.start_soon(fail, page)
        assert failed == [errno.ENOSPC] * 8
        assert await space.read(0, 8) == before, "all or none"
        await space.delete()

    with Server() as server:
        trio.run(with_store(options(server), run))


def test_what_was_written_outlives_a_kill_of_the_server() -> None:
    """In mid-run: what a write had returned for is there, and of the others each page is old, new, or not there."""

    async def run(store: RedisStore) -> None:
        writers = [Writer(await store.open(new_key(), PAGES, PAGE), seed) for seed in range(3)]
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                for writer in writers:
                    nursery.start_soon(writer.run)
                await writers[0].has_written(40)
                await trio.to_thread.run_sync(server.kill)
                for writer in writers:
                    await writer.has_failed()
                nursery.cancel_scope.cancel()
            server.start()
            for writer in writers:
                await writer.verify()
        for writer in writers:
            await writer.space.delete()

    with Server() as server:
        trio.run(with_store(options(server, deadline_s=30), run))


def test_a_server_that_is_slow() -> None:
    """Beyond the timeout it is an error, and afterwards everything goes on."""

    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 3))
            server.ask("CLIENT PAUSE", 4000)
            with pytest.raises(OSError, match=f"{server.address} does not answer") as caught:
                await space.write(0, records(0, 2, 1))
            assert caught.value.errno == errno.ETIMEDOUT
            assert await space.read(2, 1) == records(2, 1), "a read has a longer deadline"
            await space.write(0, records(0, 1, 2))
            assert await space.read(0, 1) == records(0, 1, 2)

    with Server() as server:
        trio.run(with_store(options(server, timeout_s=1.5, deadline_s=60), run))


def test_a_server_that_hangs_ends_a_read_at_its_deadline() -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 1))
            server.signal(signal.SIGSTOP)
            try:
                with pytest.raises(OSError) as caught:
                    await space.read(0, 1)
                assert caught.value.errno == errno.ETIMEDOUT
                with trio.move_on_after(0.05) as scope:
                    await space.read(0, 1)
                assert scope.cancelled_caught
            finally:
                server.signal(signal.SIGCONT)
            assert await space.read(0, 1) == records(0, 1)

    with Server() as server:
        trio.run(with_store(options(server, timeout_s=1.5, deadline_s=2), run))


def test_connections_that_the_server_closed_when_idle(server: Server) -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 1))
            server.ask("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
            await space.write(0, records(0, 1, 1))
            server.ask("CLIENT KILL", "TYPE", "normal", "SKIPME", "yes")
            assert await space.read(0, 1) == records(0, 1, 1)

    trio.run(with_store(options(server), run))


def test_without_the_sockets_of_redis_py_reads_take_the_long_way(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of it may hide them."""
    connect, give_up = Link.connect, Link.give_up
    monkeypatch.setattr(Link, "connect", lambda *args: SimpleNamespace(itself=connect(*args)))
    monkeypatch.setattr(Link, "give_up", lambda link, address, hidden: give_up(link, address, hidden.itself))

    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 3))
            before = server.ask("INFO", "stats")["total_connections_received"]
            for _ in range(20):
                assert await space.read(0, 3) == records(0, 3)
            assert server.ask("INFO", "stats")["total_connections_received"] <= before + 3, "it is not tried each time"

    trio.run(with_store(options(server), run))


def test_a_server_that_another_has_replaced_gives_no_old_pages() -> None:
    """It comes back as a replica, at the same address: what it has may be old, or nothing."""

    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 1))
            old.ask("REPLICAOF", "127.0.0.1", new.port)
            with pytest.raises(OSError, match="is a replica now") as caught:
                await space.read(0, 1)
            assert caught.value.errno == errno.EROFS
            with pytest.raises(OSError, match="is a replica now"):
                await space.write(0, records(0, 1, 1))
            old.ask("REPLICAOF", "NO", "ONE")

    with Server() as old, Server() as new:
        trio.run(with_store(options(old, deadline_s=0.5), run))


# --- what is late

LATE = b"late" * (PAGE // 4)


def test_a_write_that_failed_does_not_land_after_a_newer_one(server: Server) -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 2))
            with pytest.raises(OSError, match="does not answer"):
                await space.write(1, [LATE])
            assert wire.holds.is_set()
            await space.write(1, records(1, 1, 2))
            await trio.to_thread.run_sync(wire.release)
            assert await space.read(0, 2) == [*records(0, 1), *records(1, 1, 2)]

    with Wire(server, LATE[:64]) as wire:
        trio.run(with_store(options(server, addresses=[wire.address], timeout_s=2), run))


def test_a_discard_that_failed_does_not_land_after_a_newer_write(server: Server) -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 2))
            with pytest.raises(OSError, match="does not answer"):
                await space.discard(1, 1)
            assert wire.holds.is_set()
            await space.write(1, records(1, 1, 2))
            await trio.to_thread.run_sync(wire.release)
            assert await space.read(0, 2) == [*records(0, 1), *records(1, 1, 2)]

    with Wire(server, b"HDEL") as wire:
        trio.run(with_store(options(server, addresses=[wire.address], timeout_s=2), run))


def test_a_predecessors_write_does_not_land_after_a_successors(server: Server) -> None:
    """The predecessor was killed; what it had sent was still on its way."""

    async def run(dead: RedisStore) -> None:
        key = new_key()
        left = await dead.open(key, PAGES, PAGE)
        with pytest.raises(OSError, match="does not answer"):
            await left.write(1, [LATE])
        assert wire.holds.is_set()
        async with made(options(server)) as store, space_of(store, key) as space:
            await space.write(1, records(1, 1, 2))
            await trio.to_thread.run_sync(wire.release)
            assert await space.read(1, 1) == records(1, 1, 2)

    with Wire(server, LATE[:64]) as wire:
        trio.run(with_store(options(server, addresses=[wire.address], timeout_s=2), run))


# --- sweep


def test_an_earlier_boot_is_swept_when_its_lease_is_over(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(store: RedisStore) -> None:
        key, ours = new_key(), new_key()
        before = RedisStore(store.options, "boot-before")
        space = await before.open(key, PAGES, PAGE)
        await space.write(0, records(0, 100))
        await space.aclose()
        await before.aclose()
        async with space_of(store, ours) as mine:
            await mine.write(0, records(0, 1))
            assert await store.sweep(lambda key: True) == [], "another machine of the same host_id may still live"
            lease = "tierd:{leased}:lease:bootbefore"
            server.ask("PEXPIRE", lease, redis.LEASE_KEPT_MS - redis.LEASE_MS - 1)  # as ten minutes later
            for minute in range(4):
                monkeypatch.setattr(redis.time, "monotonic", lambda minute=minute: 1e6 + 60 * minute)
                swept = await store.sweep(lambda key: True)
                assert swept == ([key] if minute == 3 else []), "it is looked at for a while"
            assert await mine.read(0, 1) == records(0, 1)
        assert server.ask("KEYS", "tierd:{leased/*") == server.ask("KEYS", lease) == []
        assert server.ask("HGETALL", "tierd:{leased}:spaces") == {}

    trio.run(with_store(options(server, host_id="leased"), run))


def test_two_machines_of_one_host_id_do_not_sweep_each_other(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long neither of them writes: whoever lives sweeps now and then, and both may be started again."""
    monkeypatch.setattr(redis, "LEASE_MS", 3000)
    monkeypatch.setattr(redis, "LEASE_OVER_S", 1.0)

    async def run(store: RedisStore) -> None:
        async with made(options(server, host_id="cloned")) as again, space_of(store) as mine:
            other = RedisStore(store.options, "the-copy")
            async with space_of(other) as theirs:
                await mine.write(0, records(0, 1))
                await theirs.write(0, records(0, 1, 1))
                for _ in range(12):
                    await trio.sleep(0.4)
                    for each in (store, other, again):
                        assert await each.sweep(lambda key: True) == []
                assert await mine.read(0, 1) == records(0, 1)
                assert await theirs.read(0, 1) == records(0, 1, 1)
            await other.aclose()

    trio.run(with_store(options(server, host_id="cloned"), run))


def test_a_server_that_was_away_or_is_full_is_nobodys_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all leases look old, and whoever comes first must not sweep the other; and a full server renews them."""

    async def run(store: RedisStore) -> None:
        other = RedisStore(store.options, "the-copy")
        async with space_of(other) as theirs:
            await theirs.write(0, records(0, 1))
            lease = "tierd:{away}:lease:thecopy"
            for minute in range(8):
                monkeypatch.setattr(redis.time, "monotonic", lambda minute=minute: 1e6 + 60 * minute)
                if minute == 2:
                    server.ask("PEXPIRE", lease, redis.LEASE_KEPT_MS - 2 * redis.LEASE_MS)
                    server.ask("CONFIG SET", "maxmemory", "1mb")
                assert await store.sweep(lambda key: True) == []
                await other.sweep(lambda key: True)
            assert server.ask("PTTL", lease) > redis.LEASE_KEPT_MS - redis.LEASE_MS
            assert await theirs.read(0, 1) == records(0, 1)
            server.ask("CONFIG SET", "maxmemory", "0")
        await other.aclose()

    trio.run(with_store(options(server, host_id="away"), run))


def test_a_boot_that_a_full_server_took_no_lease_of(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failover has lost it, and the server is full. Whoever lives is not swept; as little when there is room again. Were it
    dead, it would be over ten minutes later."""

    async def run(store: RedisStore) -> None:
        other, lease = RedisStore(store.options, "the-copy"), "tierd:{unleased}:lease:thecopy"

        async def minutes(count: int) -> list[str]:
            swept = []
            for _ in range(count):
                now[0] += 60
                swept += await store.sweep(lambda key: True)
            return swept

        now = [1e6]
        monkeypatch.setattr(redis.time, "monotonic", lambda: now[0])
        server.ask("CONFIG SET", "maxmemory", "1mb")
        with pytest.raises(OSError, match="is full"):
            await other.open(new_key(), PAGES, PAGE)
        server.ask("CONFIG SET", "maxmemory", "0")
        async with space_of(other) as theirs:
            await theirs.write(0, records(0, 1))
            assert server.ask("DEL", lease) == 1
            server.ask("CONFIG SET", "maxmemory", "1mb")
            assert await minutes(8) == []
            assert server.ask("PTTL", lease) == redis.LEASE_MISSING
            server.ask("CONFIG SET", "maxmemory", "0")
            assert await minutes(8) == []
            assert await theirs.read(0, 1) == records(0, 1)
            server.ask("PEXPIRE", lease, redis.LEASE_KEPT_MS - redis.LEASE_MS - 1)  # ten minutes later
            assert len(await minutes(8)) == 1
        await other.aclose()

    trio.run(with_store(options(server, host_id="unleased"), run))


def test_a_server_that_is_told_to_keep_nothing_any_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was fine when it was probed. What it has is read."""
    monkeypatch.setattr(redis, "KEEPS_S", 0.0)

    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 1))
            for name, wrong, right, why in (
                ("appendfsync", "everysec", "always", "loses up to two seconds"),
                ("maxmemory-policy", "allkeys-lru", "noeviction", "evicts keys"),
            ):
                server.ask("CONFIG SET", name, wrong)
                try:
                    with pytest.raises(StoreError, match=why):
                        await space.write(0, records(0, 1, 1))
                    assert await space.read(0, 1) == records(0, 1)
                    await space.discard(1, 1)
                finally:
                    server.ask("CONFIG SET", name, right)
            await space.write(0, records(0, 1, 2))
            assert await space.read(0, 1) == records(0, 1, 2)

    trio.run(with_store(options(server), run))


def test_a_server_that_is_a_replica_by_now_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a planned failover. Whatever it keeps is of no interest then: the write goes to another server."""
    monkeypatch.setattr(redis, "KEEPS_S", 0.0)

    async def run(store: RedisStore) -> None:
        space = await store.open(new_key(), PAGES, PAGE)
        await space.write(0, records(0, 1))
        store._keeps.clear()
        server.ask("REPLICAOF", "127.0.0.1", other.port)
        server.ask("CONFIG SET", "appendfsync", "everysec")
        with pytest.raises(OSError, match="is a replica now"):
            await space.write(0, records(0, 1, 1))
        monkeypatch.setattr(redis, "KEEPS_S", 60.0)
        server.ask("REPLICAOF", "NO", "ONE")
        with pytest.raises(StoreError, match="loses up to two seconds"):  # it was not looked at while it was one
            await space.write(0, records(0, 1, 1))
        server.ask("CONFIG SET", "appendfsync", "always")
        await space.write(0, records(0, 1, 2))
        assert await space.read(0, 1) == records(0, 1, 2)
        await space.aclose()

    with Server() as server, Server() as other:
        trio.run(with_store(options(server), run))


def test_guests_of_other_hosts_and_namespaces_are_not_swept(server: Server) -> None:
    async def run(store: RedisStore) -> None:
        for other in ({"host_id": "neighbour"}, {"namespace": "elsewhere"}):
            async with made(options(server, **other)) as theirs, space_of(theirs) as space:
                await space.write(0, records(0, 1))
                assert await store.sweep(lambda key: False) == []
                assert await space.read(0, 1) == records(0, 1)

    trio.run(with_store(options(server, host_id="sweeper"), run))


def test_nothing_of_a_guest_expires_and_nothing_stays(server: Server) -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            for page in random.Random(1).sample(range(PAGES), 200):
                await space.write(page, records(page, 1))
            keys = server.ask("KEYS", "clean:*")
            expiring = [key for key in keys if server.ask("PTTL", key) != -1]
            assert len(keys) > 50
            (lease,) = expiring
            assert lease.startswith(b"clean:{test}:lease:")
            assert 0 < server.ask("PTTL", lease) <= redis.LEASE_KEPT_MS
        assert server.ask("KEYS", "clean:*") == [lease]

    trio.run(with_store(options(server, namespace="clean"), run))
