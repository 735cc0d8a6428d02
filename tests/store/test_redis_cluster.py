# SPDX-License-Identifier: Apache-2.0
"""The store `redis` on a real cluster, and on a server watched by sentinels: nodes die, slots move."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from redis.crc import key_slot

from tests.store.servers import Cluster, Server, Watched, cluster_node, wait_for
from tests.store.test_redis import NO_CONTEXT, made, options, refused, use_everything, with_store
from tests.store.writers import Writer
from tierd.attach.procfs import boot_id
from tierd.store import PageStore, StoreError
from tierd.store.redis import RedisStore, make
from tierd.testing import PAGE, PAGES, PageStoreContract, new_key, records, space_of

pytestmark = pytest.mark.usefixtures("redis_there")


@pytest.fixture(scope="module")
def cluster(redis_there: None) -> Iterator[Cluster]:
    with Cluster(patient=True) as cluster:
        yield cluster


def of(cluster: Cluster, **more: Any) -> dict[str, Any]:
    return {"mode": "cluster", "addresses": cluster.addresses, "host_id": "test", **more}


class TestCluster(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: Cluster) -> None:
        self.given = of(cluster)

    def make_store(self) -> PageStore:
        return make(self.given, NO_CONTEXT)


def test_one_address_is_enough_and_runs_are_spread(cluster: Cluster) -> None:
    async def run(store: RedisStore) -> None:
        await use_everything(store)
        async with space_of(store) as space:
            await space.write(0, records(0, 2048, size=64))
            keys = [len(server.ask("KEYS", "spread:*")) for server in cluster.servers]
            assert min(keys) > 1
            assert sum(keys) == 2048 // 64 + 2, "runs, lease, list of spaces"

    trio.run(with_store(of(cluster, addresses=cluster.addresses[:1], namespace="spread"), run))


def test_a_cluster_is_no_single_server(cluster: Cluster) -> None:
    refused(options(cluster.servers[0]), "is a node of a cluster; set mode: cluster")


def test_every_node_is_looked_at(cluster: Cluster) -> None:
    cluster.servers[2].ask("CONFIG SET", "maxmemory-policy", "allkeys-lru")
    try:
        refused(of(cluster), f"{cluster.servers[2].address} evicts keys")
    finally:
        cluster.servers[2].ask("CONFIG SET", "maxmemory-policy", "noeviction")


def test_half_a_cluster_is_refused() -> None:
    with Cluster() as cluster:
        cluster.servers[0].kill()
        refused(of(cluster, timeout_s=2), "not whole|cannot be reached|CLUSTERDOWN|cluster is down")
        cluster.servers[1].kill()
        cluster.servers[2].kill()
        refused(of(cluster, timeout_s=2), "no node of the cluster can be used: .*cannot be reached")


def test_a_cluster_without_all_slots_is_refused() -> None:
    with cluster_node() as lonely:
        lonely.ask("CLUSTER ADDSLOTSRANGE", 0, 9999)
        refused(options(lonely, mode="cluster"), "has 10000 of 16384 slots; see `redis-cli --cluster check")


def test_a_slow_node_does_not_disturb_the_others(cluster: Cluster) -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, PAGES // 4))
            stopped = cluster.servers[1]
            stopped.signal(signal.SIGSTOP)
            try:
                failed, runs = set(), range(0, PAGES // 4, 64)
                for first in runs:
                    if str(store.nodes.of(store.run_key(store._boot, space._key, first // 64))) != stopped.address:  # type: ignore[attr-defined]
                        await space.write(first, records(first, 64, 1))
                        assert await space.read(first, 64) == records(first, 64, 1)
                    else:
                        failed.add(first)
                assert 0 < len(failed) < len(runs)
                with pytest.raises(OSError, match=f"{stopped.address} does not answer"):
                    await space.write(min(failed), records(min(failed), 64, 2))
            finally:
                stopped.signal(signal.SIGCONT)
            await space.write(min(failed), records(min(failed), 64, 3))
            assert await space.read(min(failed), 64) == records(min(failed), 64, 3)

    trio.run(with_store(of(cluster, timeout_s=1, deadline_s=30), run))


def test_a_slot_that_is_on_its_way(cluster: Cluster) -> None:
    """A run that is not there yet is made at the new node, which takes it only from who was sent there."""

    async def run(store: RedisStore) -> None:
        key = new_key()
        async with space_of(store, key) as space:
            run_key = store.run_key(boot_id().replace("-", "")[:16], key, 0)
            slot = key_slot(run_key.encode())
            source = next(server for server in cluster.servers if server.address == str(store.nodes.of(run_key)))
            target = next(server for server in cluster.servers if server is not source)
            ids = {server: server.ask("CLUSTER MYID").decode() for server in (source, target)}
            target.ask("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
            source.ask("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
            await space.write(0, records(0, 5))
            assert await space.read(0, 5) == records(0, 5)
            assert run_key in target.ask("CLUSTER GETKEYSINSLOT", slot, 10)
            assert str(store.nodes.of(run_key)) == source.address
            for server in (target, source, *cluster.servers):
                server.ask("CLUSTER SETSLOT", slot, "NODE", ids[target])
            assert await space.read(0, 5) == records(0, 5)
            assert str(store.nodes.of(run_key)) == target.address, "looked up anew"

    trio.run(with_store(of(cluster), run))


def test_a_late_write_to_where_a_slot_is_on_its_way_to(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The map of slots does not name that node yet; what may land there late must be over all the same."""
    told: list[str] = []
    close = RedisStore.close_writers
    monkeypatch.setattr(
        RedisStore, "close_writers", lambda self, at, name: (told.append(str(at)), close(self, at, name))[1]
    )

    async def run(store: RedisStore) -> None:
        key = new_key()
        space = await store.open(key, PAGES, PAGE)
        run_key = store.run_key(boot_id().replace("-", "")[:16], key, 0)
        slot = key_slot(run_key.encode())
        source = next(server for server in cluster.servers if server.address == str(store.nodes.of(run_key)))
        target = next(server for server in cluster.servers if server is not source)
        for address in store.nodes.all():
            store.must_keep(address)  # as each was written a moment ago
        ids = {server: server.ask("CLUSTER MYID") for server in (source, target)}
        target.ask("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        source.ask("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
        try:
            target.signal(signal.SIGSTOP)
            try:
                with pytest.raises(OSError):
                    await space.write(0, records(0, 1))
            finally:
                target.signal(signal.SIGCONT)
            told.clear()
            await space.write(0, records(0, 1, 1))
            assert target.address in told
            assert await space.read(0, 1) == records(0, 1, 1)
            await space.delete()
        finally:
            for server in (source, target):
                server.ask("CLUSTER SETSLOT", slot, "STABLE")

    trio.run(with_store(of(cluster, timeout_s=0.5), run))


def test_slots_that_move_in_mid_run() -> None:
    """Runs are written and read while a third of the slots goes to another node, and back."""

    async def run(store: RedisStore) -> None:
        writers = [Writer(await store.open(new_key(), PAGES, PAGE), seed) for seed in range(2)]
        first, second = (server.ask("CLUSTER MYID").decode() for server in cluster.servers[:2])
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.run)
            await writers[0].has_written(20)
            for source, target in ((first, second), (second, first)):
                await trio.to_thread.run_sync(reshard, source, target)
                await writers[0].has_written(5)
                for writer in writers:
                    await writer.space.read(0, PAGES)
            nursery.cancel_scope.cancel()
        for writer in writers:
            assert writer.failed == 0, "a move is no error"
            await writer.verify()
            await writer.space.delete()

    def reshard(source: str, target: str) -> None:
        where = ["--cluster-from", source, "--cluster-to", target, "--cluster-slots", "1000"]
        cluster.cli("--cluster", "reshard", cluster.addresses[0], *where)

    with Cluster(patient=True) as cluster:
        trio.run(with_store(of(cluster, addresses=cluster.addresses[2:], deadline_s=30), run))


def test_a_node_that_comes_in_mid_run_and_keeps_nothing() -> None:
    """With Redis's own defaults. Pages that an administrator moves there are read; no other is written there."""

    async def run(store: RedisStore) -> None:
        await store.probe()
        async with space_of(store) as space:
            await space.write(0, records(0, PAGES))
            await trio.to_thread.run_sync(reshard)
            refused = 0
            for first in range(0, PAGES, 64):
                try:
                    await space.write(first, records(first, 64, 1))
                except StoreError as error:
                    assert f"{late.address} keeps nothing when it is restarted" in str(error)
                    refused += 1
                    assert await space.read(first, 64) == records(first, 64)
            assert 0 < refused < PAGES // 64
            late.ask("CONFIG SET", "appendonly", "yes")
            await space.write(0, records(0, PAGES, 2))
            assert await space.read(0, PAGES) == records(0, PAGES, 2)

    def knows_all(server: Server) -> bool:
        info = server.ask("CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == 4

    def reshard() -> None:
        late.ask("CONFIG SET", "appendonly", "no")
        cluster.cli("--cluster", "add-node", late.address, cluster.addresses[0])
        wait_for(lambda: all(map(knows_all, (*cluster.servers, late))), cluster.log)
        source, target = (server.ask("CLUSTER MYID").decode() for server in (cluster.servers[0], late))
        where = ["--cluster-from", source, "--cluster-to", target, "--cluster-slots", "4000"]
        cluster.cli("--cluster", "reshard", cluster.addresses[0], *where)

    with Cluster(patient=True) as cluster, cluster_node() as late:
        trio.run(with_store(of(cluster), run))


def test_a_node_that_is_killed_in_mid_run_loses_nothing() -> None:
    """Its replica takes over. With `replicas: 1` that has every page which a write returned for."""

    async def run(store: RedisStore) -> None:
        await store.probe()
        writers = [Writer(await store.open(new_key(), PAGES, PAGE), seed) for seed in range(3)]
        victim = cluster.primaries()[0]
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.run)
            await writers[0].has_written(30)
            await trio.to_thread.run_sync(victim.kill)
            for writer in writers:
                await writer.has_failed()
            await trio.to_thread.run_sync(wait_for, lambda: len(cluster.primaries()) == 3, cluster.log)
            nursery.cancel_scope.cancel()
        for writer in writers:
            await writer.verify()
        victim.start()
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.run)
            for writer in writers:
                await writer.has_written(20)
            nursery.cancel_scope.cancel()
        for writer in writers:
            await writer.verify()

    with Cluster(replicas=1) as cluster:
        trio.run(with_store(of(cluster, replicas=1, timeout_s=2, deadline_s=60), run))


def test_a_write_that_a_replica_has_not_confirmed_is_an_error() -> None:
    async def run(store: RedisStore) -> None:
        async with space_of(store) as space:
            await space.write(0, records(0, 3))
            replica.signal(signal.SIGSTOP)
            try:
                with pytest.raises(OSError, match=r"WAIT \[1\] was confirmed by \[0\] only; see its replicas"):
                    await space.write(1, records(1, 1, 1))
                await space.discard(2, 1)  # needs none
                assert await space.read(0, 3) == [*records(0, 1), *records(1, 1, 1), None]
            finally:
                replica.signal(signal.SIGCONT)
            await space.write(1, records(1, 1, 2))

    with Server() as primary, Server("--replicaof", f"127.0.0.1 {primary.port}") as replica:
        wait_for(lambda: replica.ask("INFO")["master_link_status"] == "up", replica.log)
        trio.run(with_store(options(primary, replicas=1, timeout_s=2), run))


@pytest.fixture(scope="module")
def watched(redis_there: None) -> Iterator[Watched]:
    with Watched(patient=True) as watched:
        yield watched


def by_sentinels(watched: Watched, **more: Any) -> dict[str, Any]:
    return {"mode": "sentinel", "addresses": watched.addresses, "service": "main", "host_id": "test", **more}


def test_credentials_of_sentinels(watched: Watched, tmp_path: Path) -> None:
    """Theirs are others than those of the server."""
    for sentinel in watched.sentinels:
        sentinel.ask("ACL SETUSER", "looker", "on", ">battery staple", "+@all", "allchannels")
    password_file = tmp_path / "password"
    password_file.touch(mode=0o600)
    given = by_sentinels(watched, sentinel_username="looker", sentinel_password_file=str(password_file))
    password_file.write_text("wrong")
    refused(given, "refuses the credentials")
    password_file.write_text("battery staple")
    trio.run(with_store(given, use_everything))


class TestSentinel(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _watched(self, watched: Watched) -> None:
        self.given = by_sentinels(watched)

    def make_store(self) -> PageStore:
        return make(self.given, NO_CONTEXT)


def test_a_service_that_no_sentinel_knows(watched: Watched) -> None:
    refused(
        by_sentinels(watched, service="other"),
        "no sentinel knows server 'other': .*see service, and `SENTINEL MASTERS`",
    )


def test_sentinels_that_are_not_there() -> None:
    with Server() as gone:
        pass
    given = {"mode": "sentinel", "addresses": [gone.address], "service": "main", "host_id": "test"}
    refused(given, f"no sentinel knows server 'main': {gone.address} cannot be reached.*refused")


def test_a_primary_that_is_killed_in_mid_run_loses_nothing() -> None:
    async def run(store: RedisStore) -> None:
        await store.probe()
        writer = Writer(await store.open(new_key(), PAGES, PAGE), 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.run)
            await writer.has_written(30)
            await trio.to_thread.run_sync(watched.primary.kill)
            await writer.has_failed()
            await trio.to_thread.run_sync(
                wait_for, lambda: watched.replica.ask("INFO")["role"] == "master", watched.log
            )
            nursery.cancel_scope.cancel()
        await writer.verify()
        await writer.space.aclose()
        async with made(by_sentinels(watched, deadline_s=60)) as unconfirmed:
            again = None
            while again is None:
                # sentinels may still name the one that was killed: a guest tries again
                with contextlib.suppress(OSError):
                    again = await unconfirmed.open(new_key(), PAGES, PAGE)
                await trio.sleep(0.1)
            await again.write(0, records(0, 1))

    with Watched() as watched:
        trio.run(with_store(by_sentinels(watched, replicas=1, timeout_s=2, deadline_s=60), run))


def failed_over(watched: Watched) -> None:
    """And all sentinels name the other one."""
    watched.primary.kill()
    wait_for(lambda: watched.replica.ask("INFO")["role"] == "master", watched.log)
    port = watched.replica.port

    def named(sentinel: Server) -> bool:
        return int(sentinel.ask("SENTINEL GET-MASTER-ADDR-BY-NAME", "main")[1]) == port

    wait_for(lambda: all(map(named, watched.sentinels)), watched.log)


def test_a_host_that_is_idle_keeps_its_lease_over_a_failover() -> None:
    """Nobody reads or writes there, and nobody else would look for the new primary: who has the same host_id would sweep it. A
    guest can be attached, too."""

    async def run(store: RedisStore) -> None:
        await store.probe()
        assert await store.sweep(lambda key: True) == []
        await trio.to_thread.run_sync(failed_over, watched)
        with pytest.raises(OSError):
            await store.blocking(store._take_lease)
        assert await store.sweep(lambda key: True) == []
        assert watched.replica.ask("PTTL", store._lease_key + store._boot) > 0

    async def attach(store: RedisStore) -> None:
        await store.probe()
        await trio.to_thread.run_sync(failed_over, watched)
        with pytest.raises(OSError):
            await store.open(new_key(), PAGES, PAGE)
        space = await store.open(new_key(), PAGES, PAGE)
        await space.aclose()

    for test in run, attach:
        with Watched() as watched:
            trio.run(with_store(by_sentinels(watched, timeout_s=2, deadline_s=60), test))
