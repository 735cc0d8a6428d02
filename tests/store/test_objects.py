# SPDX-License-Identifier: Apache-2.0
"""The object store in a directory: what comes back, what a successor finds, what is cleaned up, what is told."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tierd.store import PageStore, StoreContext, StoreError, objects, segments
from tierd.store.bucket import Bucket
from tierd.store.leases import LEASE_RENEW_S
from tierd.store.objects import LEASE, LEASE_S, ObjectOptions, ObjectSpace, ObjectStore, make
from tierd.store.options import parse
from tierd.testing import PageStoreContract

PAGE = 4096
PAGES = 2048
KEY = "4711-123456"
SEGMENT = 64 << 10
CONCURRENCY = ObjectOptions(scheme="fs").concurrency


@dataclass(frozen=True)
class Given:
    """What a store is made of."""

    scheme: str
    index_dir: Path
    options: dict[str, str]
    credentials: Path | None = None
    host: str = "host-a"
    boot: str = "boot-1"
    segment_bytes: int = SEGMENT
    deadline_s: float = 60.0  # whatever else the machine does
    retries: int = 3

    def store(self) -> ObjectStore:
        options = ObjectOptions(
            scheme=self.scheme,
            options=self.options,
            credentials=self.credentials,
            segment_bytes=self.segment_bytes,
            deadline_s=self.deadline_s,
            retries=self.retries,
        )
        return ObjectStore(options, self.index_dir, self.host, self.boot)


@pytest.fixture
def given(disk_dir: Path, tmpfs_dir: Path) -> Given:
    return Given("fs", tmpfs_dir, {"root": str(disk_dir / "objects")})


class TestDirectory(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _where(self, disk_dir: Path, tmpfs_dir: Path) -> None:
        self.keys, self.context = {"scheme": "fs", "options": {"root": str(disk_dir / "x")}}, StoreContext(tmpfs_dir)

    def make_store(self) -> PageStore:
        return make(self.keys, self.context)


def page(number: int, version: int = 0) -> bytes:
    """As it is compressed."""
    return random.Random(f"{number} {version}").randbytes(PAGE // 2)


def pages(first: int, count: int, version: int = 0) -> list[bytes]:
    return [page(number, version) for number in range(first, first + count)]


def run(test: Callable[..., Awaitable[Any]], *args: object) -> Any:
    async def bounded() -> Any:
        with trio.fail_after(240):  # it computes beside other tests, and gives way to them
            return await test(*args)

    return trio.run(bounded)


async def opened(given: Given, key: str = KEY) -> ObjectSpace:
    return await given.store().open(key, PAGES, PAGE)


def stored(given: Given) -> dict[str, int]:
    """But for leases."""
    root = Path(given.options["root"])
    files = (path for path in root.rglob("*") if path.is_file() and path.name != LEASE)
    return {str(path.relative_to(root)): path.stat().st_size for path in files}


def test_what_was_written_is_read_by_whoever_comes_next(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(10, pages(10, 40))
        await space.write(12, pages(12, 2, 1))
        await space.discard(20, 5)
        wanted = pages(10, 2) + pages(12, 2, 1) + pages(14, 6) + [None] * 5 + pages(25, 25) + [None]
        assert await space.read(10, 41) == wanted
        assert await space.read(0, 3) == [None] * 3
        assert await space.read(13, 1) == pages(13, 1, 1)
        await space.aclose()
        again = await opened(given)
        assert await again.read(10, 41) == wanted
        assert await again.used_bytes() == sum(stored(given).values())
        await again.aclose()

    run(test)


def test_an_index_that_is_gone_is_rebuilt_and_the_newest_copy_wins(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        for version in range(5):
            await space.write(0, pages(0, 16, version))
            await space.write(100 + version, pages(100 + version, 1))
        await space.aclose()
        os.unlink(given.index_dir / f"{KEY}.segments")
        again = await opened(given)
        assert await again.read(0, 16) == pages(0, 16, 4)
        assert await again.read(100, 6) == [*pages(100, 5), None]
        await again.write(0, pages(0, 16, 9))
        assert await again.read(0, 16) == pages(0, 16, 9)
        await again.aclose()

    run(test)


# --- cleaning ---


def test_what_is_discarded_is_freed_for_good(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 200))
        await space.discard(0, 190)
        live = stored(given)
        assert 0 < sum(live.values()) < 3 * SEGMENT
        await space.aclose()
        again = await opened(given)
        assert await again.read(0, 200) == [None] * 190 + pages(190, 10)
        await again.discard(0, PAGES)
        assert not stored(given)
        assert await again.used_bytes() == 0
        await again.aclose()

    run(test)


def test_what_a_rebuild_brings_back_is_freed_when_it_is_discarded_again(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        await space.discard(0, 4)
        await space.aclose()
        os.unlink(given.index_dir / f"{KEY}.segments")
        again = await opened(given)
        assert await again.read(0, 16) == pages(0, 16), "in a segment that is not sparse"
        await again.discard(0, 4)
        await again.discard(4, 12)
        assert not stored(given)
        await again.aclose()

    run(test)


def test_write_amplification_and_space_are_bounded(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random runs are written again and again, of half a segment and in small batches."""
    put, sizes = Bucket.put, []

    def counted(self: Bucket, path: str, data: bytes) -> None:
        sizes.append(len(data))
        put(self, path, data)

    monkeypatch.setattr(Bucket, "put", counted)

    async def test(batch: int, writes: int, bound: float) -> None:
        space, rng = await opened(given), random.Random(batch)
        sizes.clear()
        asked = 0
        for version in range(writes):
            first = rng.randrange(257 - batch)
            await space.write(first, pages(first, batch, version))
            asked += sizes[0] if version == 0 else 0
            assert await space.used_bytes() <= 2 * 256 * (PAGE // 2 + 128) + 3 * SEGMENT
        assert sum(stored(given).values()) == await space.used_bytes()
        assert len(sizes) > writes, "something was cleaned"
        assert sum(sizes) <= bound * asked * writes
        await space.delete()
        await space.aclose()

    run(test, 16, 150, 2.0)
    run(test, 1, 400, 3.1)  # the first page's segment is the measure, and they differ by some bytes


def test_pages_are_read_while_they_are_moved(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 256))
        done = trio.Event()

        async def read(number: int) -> None:
            while not done.is_set():
                assert await space.read(number, 1) == pages(number, 1)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(0, 256, 32):
                nursery.start_soon(read, number)
            for version in range(8):
                for first in range(0, 256, 32):
                    await space.write(first + 1, pages(first + 1, 31, version))
            done.set()
        await space.aclose()

    run(test)


def test_a_read_that_comes_too_late_for_a_segment_finds_the_next_one(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, begun, go_on = Bucket.get, threading.Event(), threading.Event()

    def waits(self: Bucket, path: str, offset: int, size_bytes: int) -> bytes:
        begun.set()
        go_on.wait()
        return get(self, path, offset, size_bytes)

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        monkeypatch.setattr(Bucket, "get", waits)

        async def read() -> None:
            assert await space.read(3, 1) == pages(3, 1, 1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.to_thread.run_sync(begun.wait)
            await space.write(0, pages(0, 16, 1))
            assert len(stored(given)) == 1
            go_on.set()
        await space.aclose()

    run(test)


def test_a_predecessors_leftovers_are_removed(given: Given) -> None:
    """A segment whose write was not told as done, and one that was cut off by a kill."""

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        await space.aclose()
        wanted = stored(given)
        root = Path(given.options["root"])
        (root / "host-a" / "boot-1" / KEY / f"{KEY}.0000fff").write_bytes(b"anything")
        partial = root / ".tierd-partial" / "host-a" / "boot-1"
        (partial / f"{KEY}.0001000.0815").write_bytes(b"half of it")
        (partial / "1-1.0001000.0815").write_bytes(b"of another guest")
        again = await opened(given)
        await again.discard(100, 1)
        assert stored(given) == wanted | {".tierd-partial/host-a/boot-1/1-1.0001000.0815": 16}
        assert await given.store().sweep(lambda key: key == KEY) == []
        assert stored(given) == wanted
        assert await again.read(0, 16) == pages(0, 16)
        await again.aclose()

    run(test)


def later(test: Callable[[Callable[[float], None]], Awaitable[None]]) -> None:
    """Run it on a clock of its own, which it sets forward."""
    clock = trio.testing.MockClock(rate=1.0)
    trio.run(test, clock.jump, clock=clock)


def test_sweep_asks_for_this_boot_and_leaves_other_hosts_alone(given: Given) -> None:
    """An earlier boot is swept once it has not been heard of for a while."""

    async def test(jump: Callable[[float], None]) -> None:
        for host, boot in (("host-a", "boot-1"), ("host-a", "boot-0"), ("host-b", "boot-1")):
            for key in ("1-1", "2-2"):
                space = await opened(replace(given, host=host, boot=boot), key)
                await space.write(0, pages(0, 4))
                await space.aclose()
        (given.index_dir / "3-3.segments").touch()
        asked: list[str] = []

        def may_be_needed(key: str) -> bool:
            asked.append(key)
            return key == "2-2"

        store = given.store()
        assert await store.sweep(may_be_needed) == ["1-1", "3-3"]
        assert set(asked) == {"1-1", "2-2", "3-3"}
        for _ in range(int(LEASE_S / LEASE_RENEW_S) - 1):
            jump(LEASE_RENEW_S)
            assert await store.sweep(may_be_needed) == []
        jump(LEASE_RENEW_S)
        assert await store.sweep(may_be_needed) == ["1-1", "2-2"]
        assert {path.rpartition("/")[0] for path in stored(given)} == {
            "host-a/boot-1/2-2",
            "host-b/boot-1/1-1",
            "host-b/boot-1/2-2",
        }
        assert [path.name for path in given.index_dir.iterdir()] == ["2-2.segments"]
        assert not list((Path(given.options["root"]) / "host-a" / "boot-0").iterdir())
        assert await store.sweep(may_be_needed) == []
        await store.aclose()

    later(test)


def test_two_machines_of_one_host_id_do_not_sweep_each_other(given: Given) -> None:
    """However long neither of them writes: whoever lives sweeps now and then."""
    copy = replace(given, boot="the-copy")

    async def test(jump: Callable[[float], None]) -> None:
        for each in (given, copy):
            space = await opened(each)
            await space.write(0, pages(0, 4))
            await space.aclose()
            (given.index_dir / f"{KEY}.segments").unlink()  # each machine has its own
        being_written = Path(given.options["root"]) / ".tierd-partial" / "host-a" / "boot-1" / "9-9.0000001.0815"
        being_written.write_bytes(b"a part")
        wanted, store, other = stored(given), given.store(), copy.store()
        for _ in range(30):
            jump(60)
            assert await store.sweep(lambda _: True) == await other.sweep(lambda key: key == KEY) == []
        assert stored(given) == wanted
        for _ in range(12):
            jump(60)
            await other.sweep(lambda _: True)
        assert {path.split("/")[1] for path in stored(given)} == {"the-copy"}, "the other one was seen no more"

    later(test)


def test_an_outage_of_the_service_is_nobodys_end(given: Given) -> None:
    """Whoever sweeps first after it has seen the other's lease before it, and could not renew its own any more than that one."""
    copy = replace(given, boot="the-copy")

    async def test(jump: Callable[[float], None]) -> None:
        space = await opened(given)
        await space.write(0, pages(0, 4))
        store, other = given.store(), copy.store()
        for _ in range(5):
            assert await store.sweep(lambda _: True) == await other.sweep(lambda _: True) == []
            jump(LEASE_RENEW_S)
        jump(2 * LEASE_S)
        assert await other.sweep(lambda _: True) == []
        jump(LEASE_RENEW_S)
        assert await store.sweep(lambda _: True) == await other.sweep(lambda _: True) == []
        assert await space.read(0, 4) == pages(0, 4)
        await space.aclose()

    later(test)


def test_a_service_that_takes_no_writes_is_nobodys_end(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is full, and lists and deletes: nobody's lease changes, and everybody lives."""
    copy, put = replace(given, boot="the-copy"), Bucket.put

    def full(self: Bucket, path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no room")

    async def test(jump: Callable[[float], None]) -> None:
        space = await opened(given)
        await space.write(0, pages(0, 4))
        store, other = given.store(), copy.store()
        for minute in range(30):
            monkeypatch.setattr(Bucket, "put", full if minute % 7 else put)  # there is room for a moment, now and then
            jump(60)
            assert await other.sweep(lambda _: True) == []
            monkeypatch.setattr(Bucket, "put", full)
            await store.sweep(lambda _: True)
        assert await space.read(0, 4) == pages(0, 4)
        await space.aclose()

    later(test)


def test_a_lease_that_is_cut_short(given: Given) -> None:
    """Its host has lost power. It is over as any other, and until then in nobody's way."""

    async def test(jump: Callable[[float], None]) -> None:
        for key, boot in (("1-1", "boot-0"), ("2-2", "boot-1")):
            space = await opened(replace(given, boot=boot), key)
            await space.write(0, pages(0, 4))
            await space.aclose()
        (given.index_dir / "1-1.segments").unlink()  # it was on the tmpfs of that boot
        os.truncate(Path(given.options["root"]) / "host-a" / "boot-0" / "lease", 0)
        store = given.store()
        assert await store.sweep(lambda _: False) == ["2-2"]
        swept = []
        for _ in range(11):
            jump(60)
            swept += await store.sweep(lambda _: False)
        assert swept == ["1-1"]

    later(test)


def test_a_sweep_that_takes_long_renews_the_lease(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "LEASE_RENEW_S", 0.05)
    remove, put, renewed = Bucket.remove, Bucket.put, []

    def slow(self: Bucket, path: str) -> None:
        until = time.monotonic() + 60
        while len(renewed) <= 3 and time.monotonic() < until:
            time.sleep(0.01)
        remove(self, path)

    def counted(self: Bucket, path: str, data: bytes) -> None:
        renewed.append(path)
        put(self, path, data)

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 4))
        await space.aclose()
        monkeypatch.setattr(Bucket, "remove", slow)
        monkeypatch.setattr(Bucket, "put", counted)
        assert await given.store().sweep(lambda _: False) == [KEY]
        assert len(renewed) > 3

    run(test)


def test_a_lease_that_cannot_be_written_keeps_nobody_from_its_pages(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Bucket, path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "no room")

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 4))
        await space.aclose()
        monkeypatch.setattr(Bucket, "put", full)
        store = given.store()
        again = await store.open(KEY, PAGES, PAGE)
        assert await again.read(0, 4) == pages(0, 4)
        await again.aclose()
        assert await store.sweep(lambda _: False) == [KEY]

    run(test)


def test_delete_leaves_nothing(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 40))
        await space.delete()
        await space.delete()
        await space.aclose()
        assert not stored(given)
        assert not list(given.index_dir.iterdir())

    run(test)


def test_pages_that_are_far_apart_are_one_object(given: Given) -> None:
    """An object a page would be a request each."""

    async def test() -> None:
        space = await opened(given)
        runs = [(page, pages(page, 1)) for page in range(0, 64, 2)] + [(100, pages(100, 5))]
        await space.write_runs(runs)
        assert len(stored(given)) == 3, "of 16 pages each, and the rest"
        for page, records in runs:
            assert await space.read(page, len(records)) == records
        assert await space.read(1, 1) == [None]
        await space.discard(4, 1)
        await space.write_runs([(2, pages(2, 1, 1)), (100, pages(100, 2, 1))])
        assert await space.read(0, 6) == [*pages(0, 1), None, *pages(2, 1, 1), None, None, None]
        assert await space.read(100, 5) == [*pages(100, 2, 1), *pages(102, 3)]
        with pytest.raises(ValueError, match="pages 1073741824 to"):
            await space.write_runs([(0, pages(0, 1)), (1 << 30, pages(0, 1))])
        await space.aclose()

    run(test)


# --- damage ---


def damage(given: Given, how: Callable[[bytes], bytes]) -> None:
    """Of the first segment."""
    path = Path(given.options["root"]) / sorted(stored(given))[0]
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("where", [5, 700])
def test_a_damaged_page_is_an_error_and_its_neighbours_are_read(given: Given, where: int) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        damage(given, lambda data: data[:where] + bytes([data[where] ^ 16]) + data[where + 1 :])
        with pytest.raises(OSError, match=r"is damaged: .*page 0") as caught:
            await space.read(0, 1)
        assert caught.value.errno == errno.EBADMSG
        assert await space.read(1, 15) == pages(1, 15)
        await space.aclose()

    run(test)


def test_a_segment_that_is_short_or_gone_is_an_error(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        damage(given, lambda data: data[: len(data) // 2])
        assert await space.read(0, 2) == pages(0, 2)
        with pytest.raises(OSError) as caught:
            await space.read(15, 1)
        assert caught.value.errno == errno.EBADMSG
        await space.aclose()
        again = await opened(given)
        (Path(given.options["root"]) / sorted(stored(given))[0]).unlink()
        with pytest.raises(OSError, match="a segment is gone") as caught:
            await again.read(0, 1)
        assert caught.value.errno == errno.EBADMSG
        await again.aclose()

    run(test)


def open_fds() -> set[str]:
    """But for that of the listing itself."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def test_what_the_kernel_has_in_memory_is_read_at_once(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a segment that was read before; what was deleted takes no space because of that."""
    get, waited = Bucket.get, 0

    def counted(self: Bucket, path: str, offset: int, size_bytes: int) -> bytes:
        nonlocal waited
        waited += 1
        return get(self, path, offset, size_bytes)

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 64))
        assert await space.read(0, 64) == pages(0, 64)
        with monkeypatch.context() as patched:
            patched.setattr(Bucket, "get", counted)
            for number in range(64):
                for _ in range(5):  # what the kernel has thrown out meanwhile is there the next time
                    so_far = waited
                    assert await space.read(number, 1) == pages(number, 1)
                    if waited == so_far:
                        break
                else:
                    pytest.fail("nobody has to wait for what was read just now")
        before = {Path(given.options["root"]) / name for name in stored(given)}
        await space.write(0, pages(0, 64, 1))
        await space.discard(0, 1)
        gone = {f"{path} (deleted)" for path in before if not path.exists()}
        assert gone
        assert not gone & {os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds()}
        assert await space.read(1, 1) == pages(1, 1, 1)
        await space.aclose()

    run(test)


def test_a_segment_that_was_put_right_is_read_again(given: Given) -> None:
    """By whoever had the damaged file open, too."""

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 64))
        assert await space.read(0, 64) == pages(0, 64)
        path = Path(given.options["root"]) / sorted(stored(given))[0]
        good = path.read_bytes()
        damage(given, lambda data: bytes(len(data)))
        with pytest.raises(OSError, match="is damaged"):
            await space.read(1, 1)
        path.unlink()
        path.write_bytes(good)
        assert await space.read(1, 1) == pages(1, 1)
        await space.aclose()

    run(test)


def test_damage_is_not_cleaned_away(given: Given) -> None:
    """The damaged segment stays for a repair, the other sparse ones go."""

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 160))
        original = (Path(given.options["root"]) / sorted(stored(given))[0]).read_bytes()
        damage(given, lambda data: data[:700] + b"x" + data[701:])
        for first in range(0, 160, 16):
            await space.discard(first + 4, 12)
        assert "is damaged" in space.trouble
        assert len(stored(given)) < 10
        with pytest.raises(OSError, match="is damaged"):
            await space.read(0, 4)
        damage(given, lambda _: original)
        assert await space.read(0, 4) == pages(0, 4)
        assert [await space.read(first, 4) for first in range(16, 160, 16)] == [
            pages(first, 4) for first in range(16, 160, 16)
        ]
        await space.discard(0, 4)
        assert not space.trouble, "nobody needs it any more"
        await space.aclose()

    run(test)


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_segment_that_is_gone_does_not_end_all_cleaning(given: Given, how: str) -> None:
    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 160))
        victim = Path(given.options["root"]) / sorted(stored(given))[0]
        if how == "gone":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        before = len(stored(given))
        for first in range(0, 160, 16):
            await space.discard(first + 4, 12)
            space._clean_again_at = -1.0  # half a minute later
        assert len(stored(given)) < before
        for first in range(16, 160, 16):
            assert await space.read(first, 4) == pages(first, 4)
        assert space.trouble
        await space.discard(0, 4)
        assert not space.trouble, "nobody needs it any more"
        await space.aclose()

    run(test)


def test_without_an_index_a_damaged_segment_is_not_passed_over(given: Given) -> None:
    """An older copy of a page would be taken for its newest."""

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        await space.write(0, pages(0, 8, 1))
        await space.aclose()
        (given.index_dir / f"{KEY}.segments").write_bytes(b"no index")
        newest = Path(given.options["root"]) / sorted(stored(given))[1]
        newest.write_bytes(newest.read_bytes()[:-1])
        before = stored(given)
        with pytest.raises(StoreError, match=r"segments is gone and .*[.][0-9a-f]{7} is damaged.*nothing was touched"):
            await opened(given)
        assert stored(given) == before

    run(test)


def test_an_index_of_other_pages_is_refused(given: Given) -> None:
    async def test() -> None:
        await (await opened(given)).aclose()
        with pytest.raises(
            StoreError, match=r"2048 pages of 4096 bytes, 4096 of 4096 were expected; nothing was touched"
        ):
            await given.store().open(KEY, 2 * PAGES, PAGE)

    run(test)


# --- failing calls ---


def test_no_room_for_the_index_is_an_error_before_anything_is_sent(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def test() -> None:
        space = await opened(given)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(OSError) as caught:
                await space.write(0, pages(0, 4))
        assert caught.value.errno == errno.ENOSPC
        assert not stored(given)
        await space.write(0, pages(0, 4))
        assert await space.read(0, 4) == pages(0, 4)
        await space.aclose()

    run(test)


def test_a_write_that_failed_changes_nothing_and_is_cleaned_up(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Bucket.put

    def lands_and_fails(self: Bucket, path: str, data: bytes) -> None:
        put(self, path, data)
        raise OSError(errno.EIO, "the answer was lost")

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "put", lands_and_fails)
            with pytest.raises(OSError, match="the answer was lost"):
                await space.write(0, pages(0, 16, 1))
        assert await space.read(0, 16) == pages(0, 16)
        assert len(stored(given)) == 2
        await space.write(100, pages(100, 16))
        assert len(stored(given)) == 2
        await space.aclose()

    run(test)


def test_what_cannot_be_cleaned_up_is_told_and_tried_again(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Bucket, path: str) -> None:
        raise OSError(errno.EACCES, f"delete {path}: no")

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 16))
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "delete", refuses)
            await space.write(0, pages(0, 16, 1))
            assert "cannot be cleaned up: delete host-a/boot-1" in space.trouble
        assert await space.read(0, 16) == pages(0, 16, 1)
        await space.discard(50, 1)
        assert len(stored(given)) == 2, "not at once"
        monkeypatch.setattr(space, "_clean_again_at", 0.0)
        await space.discard(50, 1)
        assert len(stored(given)) == 1
        assert not space.trouble
        await space.aclose()

    run(test)


def test_a_read_does_not_wait_for_writes_and_can_be_given_up(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    put, get, hang = Bucket.put, Bucket.get, threading.Event()

    def hangs(self: Bucket, path: str, data: bytes) -> None:
        hang.wait()
        put(self, path, data)

    def hangs_too(self: Bucket, path: str, offset: int, size_bytes: int) -> bytes:
        hang.wait()
        return get(self, path, offset, size_bytes)

    async def test() -> None:
        space = await opened(given)
        await space.write(0, pages(0, 64))
        monkeypatch.setattr(Bucket, "put", hangs)
        async with trio.open_nursery() as nursery:
            for n in range(2 * CONCURRENCY):
                nursery.start_soon(space.write, 100 + n, pages(100 + n, 1))
            await trio.testing.wait_all_tasks_blocked()
            try:
                assert await space.read(0, 64) == pages(0, 64)
                monkeypatch.setattr(Bucket, "get", hangs_too)
                monkeypatch.setattr(Bucket, "get_now", lambda *_: None)
                with trio.move_on_after(0.01) as scope:
                    await space.read(0, 1)
                assert scope.cancelled_caught
            finally:
                hang.set()
        assert await space.read(100, 2 * CONCURRENCY) == pages(100, 2 * CONCURRENCY)
        await space.aclose()

    run(test)


def test_a_write_that_is_given_up_is_made_all_the_same(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be stopped, so it is waited for."""
    put, begun, go_on = Bucket.put, threading.Event(), threading.Event()

    def waits(self: Bucket, path: str, data: bytes) -> None:
        begun.set()
        go_on.wait()
        put(self, path, data)

    async def test() -> None:
        space = await opened(given)
        monkeypatch.setattr(Bucket, "put", waits)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(space.write, 0, pages(0, 4))
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()
            go_on.set()
        assert await space.read(0, 4) == pages(0, 4)
        await space.aclose()

    run(test)


def test_more_than_a_page_or_the_guest_is_a_bug(given: Given) -> None:
    async def test() -> None:
        space = await opened(given)
        with pytest.raises(ValueError, match="a record of 4353 bytes"):
            await space.write(0, [bytes(PAGE + segments.SEAL_BYTES_MAX + 1)])
        for call in (space.write(PAGES - 1, pages(0, 2)), space.read(PAGES, 1), space.discard(-1, 2)):
            with pytest.raises(ValueError, match="of 2048"):
                await call
        await space.aclose()

    run(test)


# --- what is refused ---


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("s4", {}, r"there is no store `s4`"),
        ("gsc", {}, r"there is no store `gsc`; did you mean gcs\?"),
        ("s3", {"buket": "x"}, r"`s3` has no option buket; did you mean bucket\?"),
        ("s3", {}, r"bucket"),
        ("s3", {"bucket": "x", "secret_access_key": "y"}, r"secret_access_key is a secret.*mode 0600.*`credentials`"),
        ("webdav", {"endpoint": "http://x", "password": "y"}, r"password is a secret"),
        ("azblob", {"container": "x", "account_key": "y"}, r"account_key is a secret"),
        ("memory", {}, r"`memory` may lose what it holds"),
        ("http", {"endpoint": "http://x"}, r"cannot write, read, list and delete"),
        ("fs", {}, r"set its option root"),
        ("fs", {"root": "/dev/shm/tierd-objects-test"}, r"on tmpfs: .*nothing would be given back; set root"),
    ],
)
def test_wrong_options_are_told(given: Given, scheme: str, options: dict[str, str], message: str) -> None:
    try:
        with pytest.raises(StoreError, match=message):
            replace(given, scheme=scheme, options=options).store()
    finally:
        if options.get("root"):
            os.rmdir(options["root"])


def test_a_directory_that_others_can_read_is_refused(given: Given) -> None:
    Path(given.options["root"]).mkdir(mode=0o755)
    with pytest.raises(StoreError, match="mode 0755: others could read guests' memory"):
        given.store()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"segment_bytes": 1 << 10}, "segment_bytes: Input should be greater"),
        ({"segment_bytes": "64MiB"}, "segment_bytes: Input should be less"),
        ({"host_id": "a/b"}, "host_id: String should match"),
        ({"host_id": ".."}, "host_id: String should match"),
        ({"optoins": {}}, "optoins: there is no such key; did you mean options?"),
        ({"options": {"root": ["x"]}}, r"options.root: Input should be a valid string"),
        ({"scheme": None}, "scheme: Input should be a valid string"),
    ],
)
def test_keys_have_bounds(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(StoreError, match=f"^objects: {message}"):
        parse("objects", ObjectOptions, {"scheme": "fs", **wrong})


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        ("secret_access_key = hidden", 0o640, "mode 0640: others could read them"),
        ("# comment\n\nhidden", 0o600, "line 3: not `option = value`"),
        ("= hidden", 0o600, "line 1: not"),
        (None, 0o600, "cannot be read: No such file"),
        ("secret_acces_key = hidden", 0o600, "no option secret_acces_key; did you mean secret_access_key"),
    ],
)
def test_wrong_credentials_files_are_told_but_not_what_is_in_them(
    given: Given, tmp_path: Path, text: str | None, mode: int, message: str
) -> None:
    path = tmp_path / "credentials"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    with pytest.raises(StoreError, match=message) as caught:
        replace(given, scheme="s3", options={"bucket": "cold"}, credentials=path).store()
    assert "hidden" not in str(caught.value)


def test_probe_leaves_nothing_behind(given: Given) -> None:
    run(given.store().probe)
    assert not stored(given)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "is full; free space"), (errno.EIO, "see to the service")]
)
def test_probe_says_what_to_do(given: Given, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Bucket, "put", fail)
    with pytest.raises(StoreError, match=message):
        run(given.store().probe)


# --- kills ---


def test_a_successor_finds_everything_after_kills_at_random_moments(disk_dir: Path, tmpfs_dir: Path) -> None:
    kills = int(os.environ.get("TIERD_KILLS", "80"))
    command = [sys.executable, "-m", "tests.store.objects_crash", "--kills", str(kills), "--seed", "1"]
    done = subprocess.run([*command, disk_dir, tmpfs_dir], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == kills
    assert min(counts["lives"], counts["without_index"], counts["moved"]) > kills / 10
