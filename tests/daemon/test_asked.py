# SPDX-License-Identifier: Apache-2.0
"""Stores that Python asks, under the real daemon: a real Redis, objects in a directory, a plug-in."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import http.client
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted, tiers, with_tiers
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.disks import hanging_disk
from tests.kernel.vmm import MIB, Vmm, wait_for
from tests.store.servers import Server
from tierd.serve import key_of
from tierd.store.seal import SealKey

pytestmark = pytest.mark.usefixtures("kernel")
# of the 12.1 MiB of a guest `web` that need a store; `evicted` waits for 10.5
MOST = 10_900_000
PLUGIN = Path(__file__).parents[1] / "store" / "plugin"


@pytest.fixture
def redis() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def web(boot: Boot) -> Vmm:
    return boot("web", 16 * MIB, "compressible")


def test_pages_leave_for_redis_and_come_back(daemon: Daemon, web: Vmm, redis: Server) -> None:
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    assert tiers(daemon)["redis"]["stored_bytes"] > MOST
    assert 0.2 < tiers(daemon)["redis"]["counters"]["compressed_bytes"] / tiers(daemon)["redis"]["stored_bytes"] < 0.8
    (key,) = (daemon.runtime_dir / "keys").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    daemon.kill()
    daemon.start()
    web.verify()
    evicted(daemon, "web", web)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    web.verify()
    assert not list((daemon.runtime_dir / "keys").iterdir()), "the key is destroyed"
    assert not [name for name in redis.ask("KEYS", "*") if b"spaces" not in name and b"lease" not in name]


def test_a_ladder_of_four(daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path) -> None:
    """Pages sink through all of them, while tierd is killed, and Redis, too."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    steps = [
        {"name": "memory", "capacity": "3MiB"},
        {"name": "redis", "capacity": "3MiB"},
        {"name": "objects", "capacity": "3MiB"},
        "file",
    ]
    with_tiers(daemon, *steps, stores={"redis": {"addresses": [redis.address]}, "objects": objects})
    daemon.start()
    evicted(daemon, "web", web)
    wait_for(lambda: all(tier["stored_bytes"] for tier in tiers(daemon).values()), "pages are everywhere")
    for _ in range(3):
        redis.kill()
        daemon.kill()
        redis.start()
        daemon.start()
        web.verify()
        evicted(daemon, "web", web)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    web.verify()
    assert not list((disk_dir / "bucket").rglob(f"{web.pid}-*.*")), "nothing of the guest is left"


def install(disk_dir: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> Path:
    """A plug-in, by its metadata; where its modules may be, beside those of the example."""
    place = disk_dir / "plugin"
    info = place / "tierd_plain-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tierd-plain\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[tierd.stores]\nplain = {factory}\n")
    monkeypatch.setenv("PYTHONPATH", f"{place}:{PLUGIN}")
    (disk_dir / "pages").mkdir()
    return place


BROKEN = """
from tierd_plain import PlainStore

class BrokenStore(PlainStore):
    async def sweep(self, may_be_needed):
        raise KeyError("nobody may raise that")

    async def open(self, key, pages, page_bytes):
        space = await super().open(key, pages, page_bytes)
        read = space.read

        async def broken(first_page, count):
            if not (self.path / "whole").exists():
                raise RuntimeError("nor that")
            return await read(first_page, count)

        space.read = broken
        return space
"""


def test_a_plug_in_that_is_broken(daemon: Daemon, web: Vmm, disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages in it wait; neither the guest nor tierd ends of it."""
    (install(disk_dir, monkeypatch, "broken:BrokenStore") / "broken.py").write_text(BROKEN)
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    daemon.start()
    evicted(daemon, "web", web)
    web.send("verify")
    wait_for(lambda: daemon.logged("store_is_broken") and daemon.logged("store_not_swept"), "it is told")
    (disk_dir / "pages" / "whole").touch()
    wait_for(web.answered, "its pages have come", 60)
    assert not daemon.logged("guest_not_served")


HANGING = """
import trio
from tierd_plain import PlainStore

class HangingStore(PlainStore):
    async def open(self, key, pages, page_bytes):
        space = await super().open(key, pages, page_bytes)

        async def hangs(first_page, records):
            (self.path / "asked").touch()
            await trio.sleep_forever()

        space.write = hangs
        return space
"""


TROUBLED = """
from tierd_plain import PlainSpace, PlainStore

PlainSpace.trouble = property(lambda self: "no room for rubbish" if (self.path.parent / "full").exists() else "")
"""


def test_a_store_that_is_in_trouble_and_gives_and_takes_pages(
    daemon: Daemon, web: Vmm, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told once, and in the status until it is over."""

    def troubles() -> list[str]:
        assert all(store["healthy"] for store in daemon.status()["stores"])
        return [store["trouble"] for store in daemon.status()["stores"] if store["trouble"]]

    (install(disk_dir, monkeypatch, "troubled:PlainStore") / "troubled.py").write_text(TROUBLED)
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    daemon.start()
    evicted(daemon, "web", web)
    assert not troubles()
    (disk_dir / "pages" / "full").touch()
    wait_for(lambda: troubles() == ["no room for rubbish"], "it is in the status")
    assert "(no room for rubbish)" in daemon.tierd("status").stdout
    assert tiers(daemon)["plain"]["healthy"], "it takes pages"
    web.verify()
    evicted(daemon, "web", web)
    assert [told["error"] for told in daemon.logged("store_space_trouble")] == ["no room for rubbish"]
    (disk_dir / "pages" / "full").unlink()
    wait_for(lambda: not troubles(), "it is over")


def test_a_guest_that_ends_while_it_is_evicted_into_a_store_that_hangs(
    daemon: Daemon, boot: Boot, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its worker waits for is called off: the end does not wait for the call's own limit, a minute."""
    (install(disk_dir, monkeypatch, "hanging:HangingStore") / "hanging.py").write_text(HANGING)
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    web = boot("web", 16 * MIB, "compressible")
    daemon.start()
    wait_for((disk_dir / "pages" / "asked").exists, "pages are on their way there")
    web.verify()
    web.kill()
    wait_for(lambda: daemon.logged("guest_ended"), "the guest is over")


def test_a_plug_in(daemon: Daemon, web: Vmm, disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(disk_dir, monkeypatch, "tierd_plain:PlainStore")
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    daemon.start()
    evicted(daemon, "web", web)
    assert list((disk_dir / "pages").iterdir())
    web.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not list((disk_dir / "pages").iterdir())


def test_a_store_that_hangs_delays_nobody_else(daemon: Daemon, boot: Boot, web: Vmm, redis: Server) -> None:
    """Pages that are in it wait, and it is told; others come. When it answers again, so do they."""
    other = boot("other", 8 * MIB, "compressible")
    rules = [
        {"name": f"web{OURS}", **POLICY, "tiers": ["memory", "redis"]},
        {"name": f"other{OURS}", **POLICY, "tiers": ["file"]},
    ]
    daemon.write(guests=rules, stores={"redis": {"addresses": [redis.address], "deadline_s": 3}})
    daemon.start()
    evicted(daemon, "web", web)
    evicted(daemon, "other", other)
    redis.signal(signal.SIGSTOP)
    try:
        web.send("verify")
        (told,) = wait_for(lambda: daemon.logged("store_hangs"), "it is told")
        assert told["stores"] == ["redis"]
        other.verify()
        healthy = {store["name"]: store["healthy"] for store in daemon.status()["stores"]}
        assert healthy == {"redis": False, "memory": True, "file": True}
        time.sleep(4)
        assert not daemon.logged("store_answers_again"), "a request that was given up is no answer"
    finally:
        redis.signal(signal.SIGCONT)
    wait_for(web.answered, "its pages have come")
    wait_for(lambda: daemon.logged("store_answers_again"), "it is well again")
    web.verify()


def touch(pid: int, address: int) -> None:
    """Read a byte of a process's memory. Returns when its page is there."""
    libc, byte = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(1)
    ours, theirs = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1), (ctypes.c_size_t * 2)(address, 1)
    if libc.process_vm_readv(pid, ours, ctypes.c_ulong(1), theirs, ctypes.c_ulong(1), ctypes.c_ulong(0)) != 1:
        raise OSError(ctypes.get_errno(), "process_vm_readv")


def test_of_two_stores_of_one_guest_the_one_that_hangs_does_not_delay_the_other(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path
) -> None:
    """Both are asked by Python. Of pages at random those in the store that answers come, also when many wait for the other."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    stores = {"redis": {"addresses": [redis.address], "deadline_s": 60}, "objects": objects}
    with_tiers(daemon, {"name": "redis", "capacity": "6MiB"}, "objects", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    wait_for(lambda: tiers(daemon)["objects"]["stored_bytes"] > 6 * MIB, "the first one is full")
    assert tiers(daemon)["redis"]["stored_bytes"] > 4 * MIB
    pages = random.Random(1).sample(range(web.pages), 96)
    readers, came = list[threading.Thread](), list[int]()

    def read(page: int) -> None:
        touch(web.pid, web.addresses[0] + page * web.page_bytes)
        came.append(page)

    def begin(pages: Sequence[int]) -> None:
        for page in pages:
            readers.append(threading.Thread(target=read, args=(page,)))
            readers[-1].start()

    redis.signal(signal.SIGSTOP)
    try:
        begin(pages[:48])
        wait_for(lambda: daemon.logged("store_hangs"), "the other one hangs")
        before = len(came)
        assert before < 48
        begin(pages[48:])
        wait_for(lambda: len(came) > before + 12, "those of the store that answers have come", 30)
        assert daemon.logged("store_hangs")[0]["stores"] == ["redis"], "only that one"
        assert {name: tier["healthy"] for name, tier in tiers(daemon).items()} == {"redis": False, "objects": True}
    finally:
        redis.signal(signal.SIGCONT)
    for reader in readers:
        reader.join()
    web.verify()
    (told,) = wait_for(lambda: daemon.logged("store_answers_again"), "it is well again")
    assert told["stores"] == ["redis"]
    wait_for(lambda: tiers(daemon)["redis"]["healthy"], "it is shown")


def test_what_a_store_says_instead_of_pages_is_told(daemon: Daemon, web: Vmm, redis: Server) -> None:
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    redis.ask("ACL SETUSER", "default", "-hmget")
    web.send("verify")
    wait_for(lambda: daemon.logged("store_read_failed"), "it is told")
    time.sleep(1)
    redis.ask("ACL SETUSER", "default", "+hmget")
    wait_for(web.answered, "its pages have come")
    (told,) = daemon.logged("store_read_failed")
    assert told["store"] == "redis"
    assert "no permissions to run the 'hmget' command" in told["error"]
    assert "tierd's ACL user needs" in told["error"]


def test_a_store_that_the_configuration_has_no_more(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """Its pages wait, and it is told; they come when it is there again."""
    stores = {"redis": {"addresses": [redis.address]}}
    with_tiers(daemon, "redis", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "file")
    daemon.start()
    web.send("verify")
    (told, *_) = wait_for(lambda: daemon.logged("store_not_opened"), "it is told")
    assert "the configuration has no store redis: add it under stores" in told["error"]
    assert not {tier["name"]: tier["healthy"] for tier in daemon.guests()["web"]["tiers"]}["redis"]
    assert not web.answered()
    refused = daemon.tierd("detach", "--pid", str(web.pid))
    assert refused.returncode == 1
    with_tiers(daemon, "file", stores=stores)
    daemon.signal(signal.SIGHUP)
    wait_for(web.answered, "its pages come", 60)
    web.verify()


def test_encryption_turned_on_later(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """What is there in clear is read as it is, and nothing is added to it; once it is gone, pages are sealed."""
    clear = {"redis": {"addresses": [redis.address], "encrypt": False}}
    with_tiers(daemon, "redis", stores=clear)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    wait_for(lambda: daemon.logged("store_only_read"), "it is told")
    web.verify()
    assert not list((daemon.runtime_dir / "keys").iterdir())
    daemon.kill()
    with_tiers(daemon, "redis", stores=clear)
    daemon.start()
    evicted(daemon, "web", web)


def test_two_copies(daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path) -> None:
    """Redis loses all it has; every page comes from the second store, and leaves for both again."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    with_tiers(
        daemon, "redis", stores={"redis": {"addresses": [redis.address], "second": "objects"}, "objects": objects}
    )
    daemon.start()
    evicted(daemon, "web", web)
    assert not daemon.logged("copy_is_missing")
    redis.ask("FLUSHALL")
    web.verify()
    assert not daemon.guests()["web"]["counters"]["pages_lost"]
    (told,) = daemon.logged("copy_is_missing")
    assert (told["store"], told["other"], told["error"]) == ("redis", "objects", "it does not have it")
    evicted(daemon, "web", web)
    copies = sum(redis.ask("HLEN", key) for key in redis.ask("KEYS", "*/*"))
    stored = daemon.guests()["web"]["stored_bytes"]
    assert copies * 4096 >= stored["redis"] - MIB > 8 * MIB, "there are two copies again"
    redis.kill()
    web.verify()
    redis.start()
    wait_for(lambda: daemon.stored_bytes("web") > 15 * MIB, "it is tried again", 60)
    daemon.kill()
    daemon.start()
    web.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    web.verify()
    assert not list((disk_dir / "bucket").rglob(f"{web.pid}-*.*")), "nothing of the guest is left"
    assert not list((daemon.runtime_dir / "keys").iterdir())


def test_a_second_copy_for_what_the_first_store_has_wrong(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path
) -> None:
    """No seal tells: these are records of tierd, of other pages."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    first = {"addresses": [redis.address], "second": "objects", "encrypt": False}
    with_tiers(daemon, "redis", stores={"redis": first, "objects": objects})
    daemon.start()
    evicted(daemon, "web", web)
    swapped = 0
    for key in redis.ask("KEYS", "*/*"):
        pages = sorted(redis.ask("HGETALL", key).items())
        swapped += len(pages)
        redis.ask("HSET", key, *(word for n, (page, _) in enumerate(pages) for word in (page, pages[n - 1][1])))
    assert swapped > MOST // 4096
    web.verify()
    assert not daemon.guests()["web"]["counters"]["pages_lost"]


def test_a_store_that_is_empty_is_not_relied_on(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """All that leaves is clean, so nothing would be written: nobody would ask the store anything."""
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    wait_for(lambda: daemon.stored_bytes("web") == 16 * MIB, "all of it has left")
    assert daemon.tierd("pause", f"web{OURS}").returncode == 0
    web.verify()
    wait_for(lambda: not daemon.guests()["web"]["stored_bytes"].get("redis"), "everything is with the guest")

    def held() -> int:
        return sum(redis.ask("HLEN", key) for key in redis.ask("KEYS", "*/*"))

    once, unwritten = held(), daemon.guests()["web"]["counters"]["pages_unwritten"]
    assert once > MOST // 4096, "the copies stay"
    redis.ask("FLUSHALL")
    assert daemon.tierd("resume", f"web{OURS}").returncode == 0
    wait_for(lambda: daemon.stored_bytes("web") == 16 * MIB, "all of it has left again")
    assert held() == once, "all of it is written again"
    assert daemon.guests()["web"]["counters"]["pages_unwritten"] == unwritten, "no copy was relied on"
    web.verify()
    assert not daemon.guests()["web"]["counters"]["pages_lost"]


def test_a_key_that_was_left_behind(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """By a tierd that was killed after it had left the guest, and before it destroyed the key: who attaches the guest anew,
    without encryption, has pages there that are not sealed, and so has its successor."""
    keys = daemon.runtime_dir / "keys"
    keys.mkdir(parents=True, mode=0o700)
    daemon.runtime_dir.chmod(0o700)
    SealKey.create(keys, "redis", key_of(web.spec()), web.pages).close()
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address], "encrypt": False}})
    daemon.start()
    evicted(daemon, "web", web)
    assert not list(keys.iterdir())
    daemon.kill()
    daemon.start()
    web.verify()
    assert daemon.guests()["web"]["counters"]["pages_lost"] == 0


@pytest.mark.parametrize("what", [b"", bytes(4096)], ids=["begun", "destroyed"])
def test_a_key_that_somebody_died_at(daemon: Daemon, web: Vmm, redis: Server, what: bytes) -> None:
    """While it was made, or destroyed: nothing was stored with it, and another one is made."""
    stores = {"redis": {"addresses": [redis.address]}}
    nothing_leaves = {**POLICY, "min_idle_s": 3600}
    daemon.write(guests=[{"name": f"*{OURS}", **nothing_leaves, "tiers": ["redis"]}], stores=stores)
    daemon.start()
    (key,) = wait_for(lambda: list((daemon.runtime_dir / "keys").iterdir()), "the store is open")
    daemon.kill()
    key.write_bytes(what)
    with_tiers(daemon, "redis", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    web.verify()


def test_encryption_turned_off_later(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """What was sealed is read with its key, and what is added is sealed as well."""
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address], "encrypt": False}})
    daemon.start()
    web.verify()
    evicted(daemon, "web", web)
    web.verify()


def test_a_full_store_is_no_loss(daemon: Daemon, web: Vmm, redis: Server) -> None:
    with_tiers(daemon, "redis", "file", stores={"redis": {"addresses": [redis.address]}})
    used = int(redis.ask("INFO", "memory")["used_memory"])
    redis.ask("CONFIG", "SET", "maxmemory", used + 2 * MIB)
    daemon.start()
    evicted(daemon, "web", web)
    assert tiers(daemon)["file"]["stored_bytes"], "the others take what it does not"
    assert tiers(daemon)["redis"]["counters"]["write_errors"], "it is counted"
    web.verify()


def test_what_a_store_takes_of_all_guests(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """Its capacity; the next tier has the rest."""
    stores = {"redis": {"addresses": [redis.address], "capacity": "4MiB"}}
    with_tiers(daemon, "redis", "file", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    found = {name: tier["stored_bytes"] for name, tier in tiers(daemon).items()}
    assert 3 * MIB < found["redis"] <= 4 * MIB < found["file"]
    assert sum(redis.ask("HLEN", key) for key in redis.ask("KEYS", "*/*")) * 4096 <= 4 * MIB

    def figures() -> tuple[int, int]:
        (store,) = (store for store in daemon.status()["stores"] if store["name"] == "redis")
        return store["capacity_bytes"], store["used_bytes"]

    wait_for(lambda: figures()[1], "it is told")
    assert figures()[0] == 4 * MIB >= figures()[1]
    web.verify()


@pytest.mark.parametrize("second", [False, True])
def test_pages_that_are_far_apart_are_few_objects(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path, second: bool
) -> None:
    """What compressed memory does not take is one page here and one there: an object each would be a request each. As second
    copies, too."""
    bucket = disk_dir / "bucket"
    bucket.mkdir(mode=0o700)
    stores: dict[str, dict[str, object]] = {"objects": {"scheme": "fs", "options": {"root": str(bucket)}}}
    if second:
        stores["redis"] = {"addresses": [redis.address], "second": "objects"}
    with_tiers(daemon, "memory", "redis" if second else "objects", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    pages = tiers(daemon)["redis" if second else "objects"]["stored_bytes"] // 4096
    assert pages > 500
    assert 0 < len(list(bucket.rglob(f"{web.pid}-*.*"))) < pages / 20
    web.verify()


def test_a_reload_that_is_refused_leaves_no_store_behind(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path
) -> None:
    """Of two that are new the second cannot be used: the first one's keys may be others by the next try."""
    with_tiers(daemon, "file")
    daemon.start()
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    redis.kill()
    with_tiers(daemon, "file", "objects", "redis", stores={"objects": objects, "redis": {"addresses": [redis.address]}})
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.logged("reload_failed"), "it is refused")
    assert {store["name"] for store in daemon.status()["stores"]} == {"file"}
    redis.start()
    daemon.signal(signal.SIGHUP)
    wait_for(
        lambda: {store["name"] for store in daemon.status()["stores"]} == {"file", "objects", "redis"}, "it is taken"
    )


def test_what_cannot_be_used_is_told_at_the_start(daemon: Daemon, redis: Server) -> None:
    redis.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.spawn()
    assert daemon.wait() == 1
    assert "evicts keys when it is full" in daemon.log_path.read_text()
    redis.kill()
    probed = daemon.tierd("config", "check", "--probe")
    assert probed.returncode == 78
    assert "store redis cannot be used" in probed.stdout + probed.stderr


def test_a_store_that_loses_pages_by_now_is_given_none(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """Guests have pages in it, so tierd starts, and brings them back. But whoever evicts keys must get no more of them."""
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    redis.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    daemon.start()
    assert daemon.logged("store_cannot_be_written")
    web.verify()
    stored = daemon.stored_bytes("web")
    time.sleep(30 * POLICY["interval_s"])
    assert daemon.stored_bytes("web") <= stored
    assert not {store["name"]: store["healthy"] for store in daemon.status()["stores"]}["redis"]
    redis.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    evicted(daemon, "web", web)
    assert daemon.logged("store_can_be_written")
    web.verify()


def test_a_store_that_cannot_even_be_made_keeps_no_guest_waiting(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """A file that its keys name is gone. Whoever has no page there is served; when it is put right, all are."""
    good = {"redis": {"addresses": [redis.address]}}
    bad = {"redis": {"addresses": [redis.address], "tls": {"ca_file": "/nonexistent/ca.pem"}}}
    with_tiers(daemon, "redis", stores=good)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "redis", stores=bad)
    daemon.start()
    daemon.wait_active("web")
    (store,) = (store for store in daemon.status()["stores"] if store["name"] == "redis")
    assert "/nonexistent/ca.pem" in store["reason"]
    assert daemon.stored_bytes("web") > MOST
    daemon.kill()
    with_tiers(daemon, "redis", stores=good)
    daemon.start()
    web.verify()
    evicted(daemon, "web", web)
    with_tiers(daemon, "redis", stores=bad)
    daemon.signal(signal.SIGUSR1)  # a restart: nobody would bring these pages
    assert daemon.wait() == 0
    assert daemon.logged("restart_restores")
    web.verify()


def test_an_order_does_not_wait_for_a_store_that_is_not_there(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """Nor does it keep the guest from anything else."""
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "file")  # the store was taken out of the configuration
    daemon.start()
    daemon.wait_active("web")
    for order in ("restore", "detach", "retry"):
        done = daemon.tierd(order, f"web{OURS}")
        assert done.returncode != 0 or order == "retry", done.stdout
        assert order == "retry" or "the configuration has no store redis" in done.stdout + done.stderr
    assert daemon.stored_bytes("web") > 0
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    web.verify()


def test_a_page_that_is_gone_keeps_no_other_from_coming_back(daemon: Daemon, web: Vmm, redis: Server) -> None:
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    daemon.tierd("pause", f"web{OURS}")
    for run in redis.ask("KEYS", "*/[0-9]*}"):
        for field in redis.ask("HKEYS", run)[::20]:
            redis.ask("HDEL", run, field)
            destroyed = run, field
    assert destroyed
    gone = web.pages - sum(redis.ask("HLEN", run) for run in redis.ask("KEYS", "*/[0-9]*}"))
    assert daemon.tierd("restore", f"web{OURS}").returncode != 0
    assert 0 < daemon.stored_bytes("web") <= gone * web.page_bytes


def test_guests_are_served_though_a_store_of_others_is_not_there(daemon: Daemon, web: Vmm, redis: Server) -> None:
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    rules = [{"name": f"*{OURS}", **POLICY}, {"name": "nobody", "tiers": ["redis"]}]
    daemon.write(guests=rules, stores={"redis": {"addresses": [redis.address]}})
    redis.kill()
    daemon.start()
    assert daemon.logged("store_cannot_be_written")
    web.verify()
    redis.start()
    wait_for(lambda: daemon.logged("store_can_be_written"), "it is tried again")


@pytest.mark.parametrize("second", [False, True])
def test_a_store_that_no_policy_names_any_more(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path, second: bool
) -> None:
    """It is in the configuration, and a guest that was not adopted at once has pages there. There may be second copies."""
    stores: dict[str, dict[str, object]] = {"redis": {"addresses": [redis.address]}}
    if second:
        (disk_dir / "bucket").mkdir(mode=0o700)
        stores["redis"]["second"] = "objects"
        stores["objects"] = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    with_tiers(daemon, "redis", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    with_tiers(daemon, "file", stores=stores)
    (state,) = (daemon.runtime_dir / "guests").glob("*.state")
    with state.open("rb") as held:  # as the last thread of a predecessor, which hangs for a while
        fcntl.flock(held, fcntl.LOCK_EX)
        daemon.spawn()
        daemon.wait_told("READY=1")
    web.verify()


def test_a_damaged_page_keeps_no_other_from_sinking(daemon: Daemon, web: Vmm, redis: Server) -> None:
    stores = {"redis": {"addresses": [redis.address]}}
    with_tiers(daemon, "redis", {"name": "file", "min_age_s": 3600}, stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    for run in redis.ask("KEYS", "*/[0-9]*}")[:3]:
        redis.ask("HSET", run, redis.ask("HKEYS", run)[7], b"\x07 is no record of ours")
    with_tiers(daemon, "redis", {"name": "file", "min_age_s": 0.5}, stores=stores)
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: tiers(daemon)["redis"]["stored_bytes"] <= 3 * web.page_bytes, "all others have sunk", 60)
    assert tiers(daemon)["file"]["stored_bytes"] > MOST
    counters = tiers(daemon)["redis"]["counters"]
    assert counters["checksum_errors"] >= 3 > counters["read_errors"], "it is told before a guest wants them"
    order = threading.Thread(target=daemon.tierd, args=("restore", f"web{OURS}"))
    order.start()
    before = counters["checksum_errors"]
    wait_for(lambda: tiers(daemon)["redis"]["counters"]["checksum_errors"] > before, "it is told again")
    assert not tiers(daemon)["redis"]["counters"]["read_errors"], "what is wrong is no mere read error"
    daemon.kill()
    order.join()


def test_reads_that_fail_while_pages_sink_are_counted(daemon: Daemon, web: Vmm, redis: Server) -> None:
    stores = {"redis": {"addresses": [redis.address]}}
    with_tiers(daemon, "redis", {"name": "file", "min_age_s": 3600}, stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    redis.ask("ACL SETUSER", "default", "-hmget")
    with_tiers(daemon, "redis", {"name": "file", "min_age_s": 0.5}, stores=stores)
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: tiers(daemon)["redis"]["counters"]["read_errors"], "they are counted")
    assert not tiers(daemon)["file"]["stored_bytes"]
    redis.ask("ACL SETUSER", "default", "+hmget")
    wait_for(lambda: not tiers(daemon)["redis"]["stored_bytes"], "all have sunk", 60)
    web.verify()


def test_a_store_that_is_another_place_by_now_loses_nothing(daemon: Daemon, web: Vmm, redis: Server) -> None:
    there, elsewhere = ({"redis": {"addresses": [redis.address], "namespace": name}} for name in ("there", "elsewhere"))
    with_tiers(daemon, "redis", stores=there)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    brief = [{"name": f"*{OURS}", **POLICY, "tiers": ["redis"], "read_deadline_s": 0.1}]
    daemon.write(guests=brief, stores=elsewhere)
    daemon.start()
    web.send("verify")
    wait_for(lambda: daemon.logged("store_not_opened"), "it is told")
    time.sleep(1)
    assert daemon.guests()["web"]["counters"]["pages_lost"] == 0
    daemon.kill()
    daemon.write(guests=brief, stores=there)
    daemon.start()
    wait_for(web.answered, "its pages have come")


def test_a_restart_that_would_lose_sight_of_a_store_restores(daemon: Daemon, web: Vmm, redis: Server) -> None:
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}}, on_restart="keep")
    daemon.start()
    evicted(daemon, "web", web)
    with_tiers(daemon, "file", on_restart="keep")
    daemon.signal(signal.SIGUSR1)
    assert daemon.wait() == 0
    assert "will not have the store redis" in daemon.logged("restart_restores")[0]["why"]
    web.verify()


def test_a_guest_that_ends_while_an_order_waits_for_its_store(daemon: Daemon, boot: Boot, redis: Server) -> None:
    """Nobody brings pages any more then; who waited for them must not keep the guest from its end."""
    web = boot("web", 16 * MIB, "compressible")
    with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
    daemon.start()
    evicted(daemon, "web", web)
    redis.signal(signal.SIGSTOP)
    try:
        order = threading.Thread(target=daemon.tierd, args=("restore", f"web{OURS}"))
        order.start()
        wait_for(lambda: daemon.guests()["web"]["counters"]["parked_pages"], "pages are asked for")
        web.kill()
        wait_for(lambda: daemon.logged("guest_ended") or "web" not in daemon.guests(), "the guest is over")
    finally:
        redis.signal(signal.SIGCONT)
    order.join()


@pytest.mark.parametrize(
    ("stores", "told"),
    [
        ({}, "names a store 'redis', and there is none; there are file, memory"),
        ({"redis": {"adresses": ["127.0.0.1:1"]}}, "adresses: there is no such key; did you mean addresses?"),
        ({"redis": {"concurrency": 0}}, "concurrency"),
        ({"nothing": {}, "redis": {"addresses": ["x"]}}, "addresses"),
        ({"redis": {"addresses": ["a:1"], "second": "other"}}, "names a store 'other'"),
        ({"redis": {"addresses": ["a:1"]}, "b": {"second": "redis"}}, "redis is a tier of a policy as well"),
        (
            {"redis": {"addresses": ["a:1"], "second": "b"}, "b": {"capacity": "1GiB"}},
            "it holds what redis holds, and takes as much (give the capacity to redis)",
        ),
    ],
)
def test_what_is_wrong_in_the_configuration(daemon: Daemon, stores: dict[str, Any], told: str) -> None:
    with_tiers(daemon, "redis", stores=stores)
    checked = daemon.tierd("config", "check")
    assert checked.returncode == 78
    assert told in checked.stdout + checked.stderr


def test_a_plug_in_whose_trial_is_broken_is_told(
    daemon: Daemon, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises: one line that names it, and no traceback."""
    place = disk_dir / "plugin"
    info = place / "tierd_broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tierd-broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tierd.stores]\nbroken = tierd_broken:Store\n")
    code = "class Store:\n    def __init__(self, *_): pass\n    async def probe(self): raise KeyError('nothing')\n"
    (place / "tierd_broken.py").write_text(code + "    async def aclose(self): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(place))
    with_tiers(daemon, "broken", stores={"broken": {}})
    daemon.spawn()
    assert daemon.wait() == 1
    said = daemon.log_path.read_text()
    assert "the store broken cannot be used: 'nothing'" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_start_while_one_of_two_stores_is_away(
    daemon: Daemon, web: Vmm, redis: Server, disk_dir: Path, which: str
) -> None:
    """Every page is in the other one. When it is back, pages leave again."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    bucket: dict[str, Any] = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    server: dict[str, Any] = {"addresses": [redis.address]}
    if which == "first":
        stores = {"redis": {**server, "second": "objects"}, "objects": bucket}
    else:
        stores = {"objects": {**bucket, "second": "redis"}, "redis": server}
    with_tiers(daemon, "redis" if which == "first" else "objects", stores=stores)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    redis.kill()
    daemon.start()
    web.verify()
    assert daemon.logged("copy_not_opened")[0]["store"] == "redis"
    redis.start()
    evicted(daemon, "web", web)
    web.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    web.verify()


def test_a_bucket_that_hangs_at_the_start_holds_up_nobody_else(
    daemon: Daemon, boot: Boot, redis: Server, disk_dir: Path
) -> None:
    with hanging_disk(disk_dir, 512 * MIB) as disk:
        root = disk.mount / "bucket"
        root.mkdir(mode=0o700)
        daemon.write(
            guests=[
                {"name": f"web{OURS}", **POLICY, "tiers": ["redis"]},
                {"name": f"other{OURS}", **POLICY, "tiers": ["objects"]},
            ],
            stores={
                "redis": {"addresses": [redis.address]},
                "objects": {"scheme": "fs", "options": {"root": str(root)}},
            },
        )
        web, other = (boot(name, 16 * MIB, "compressible") for name in ("web", "other"))
        daemon.start()
        for name, vmm in ("web", web), ("other", other):
            evicted(daemon, name, vmm)
        daemon.kill()
        disk.hang()
        try:
            daemon.start()
            web.verify()
            other.send("verify")
            disk.go_on()
            wait_for(other.answered, "its pages have come", 60)
        finally:
            disk.go_on()
            daemon.kill()


SLOW = """
import trio
from tierd_plain import PlainStore

class SlowStore(PlainStore):
    async def probe(self):
        await super().probe()
        await trio.sleep(2)
"""


def test_two_reloads_at_once(daemon: Daemon, web: Vmm, disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, and by the API: a store that is new is made once."""
    (install(disk_dir, monkeypatch, "slow:SlowStore") / "slow.py").write_text(SLOW)
    daemon.write(guests=[{"name": "nobody", **POLICY}])
    daemon.start()
    with_tiers(
        daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False, "capacity": "4MiB"}}
    )
    daemon.signal(signal.SIGHUP)
    daemon.wait_told("RELOADING=1")
    with contextlib.closing(http.client.HTTPConnection("tierd")) as connection:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(daemon.socket))
        connection.request("POST", "/reload")
        assert connection.getresponse().status == 200
    wait_for(lambda: daemon.logged("reloaded"), "reloaded")
    wait_for(lambda: daemon.stored_bytes("web") > 2 * MIB, "some pages have left", 60)
    assert tiers(daemon)["plain"]["stored_bytes"] <= 4 * MIB
    done = daemon.tierd("detach", f"web{OURS}")
    assert done.returncode == 0, done.stderr
    web.verify()
    assert daemon.status()["version"]
    assert len(daemon.logged("guest_attached")) == 1, "an operator has left it"


def test_a_tierd_that_stood_still_asks_once_more(daemon: Daemon, web: Vmm, redis: Server) -> None:
    """In an outage that ended meanwhile: that the deadline has passed says nothing."""
    rules = [{"name": f"*{OURS}", **POLICY, "tiers": ["redis"], "read_deadline_s": 5}]
    daemon.write(guests=rules, stores={"redis": {"addresses": [redis.address], "deadline_s": 2, "timeout_s": 1}})
    daemon.start()
    evicted(daemon, "web", web)
    assert daemon.tierd("pause", f"web{OURS}").returncode == 0
    redis.signal(signal.SIGSTOP)
    try:
        web.send("verify")
        wait_for(lambda: daemon.guests()["web"]["counters"]["store_read_errors"], "a read has failed", 30)
        time.sleep(0.5)  # the next one is under way: between them are milliseconds, and each takes a second
        daemon.signal(signal.SIGSTOP)
    finally:
        redis.signal(signal.SIGCONT)
    time.sleep(7)
    daemon.signal(signal.SIGCONT)
    wait_for(web.answered, "its pages have come", 60)
    assert daemon.guests()["web"]["counters"]["pages_lost"] == 0
    web.verify()
