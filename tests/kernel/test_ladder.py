# SPDX-License-Identifier: Apache-2.0
"""A guest whose cold pages go to compressed memory, and sink from there to a disk."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.kernel.host_memory import huge_pages
from tests.kernel.torture import torture
from tests.kernel.vmm import MIB, PAGE, Host, Tiered, Vmm, wait_for
from tierd import cycle
from tierd.config import Policy, Tier
from tierd.native import Codec, KernelError
from tierd.store import Space, Store, StoreError
from tierd.tiers import Shares, Tiers

Start = Callable[..., Vmm]
LADDER = ("memory", "file")
ZEROS = 50  # pages


@pytest.fixture(params=["memfd", "anonymous"])
def vmm(start_vmm: Start, request: pytest.FixtureRequest) -> Vmm:
    vmm = start_vmm(f"bytes={16 * MIB}", "regions=2", f"kind={request.param}", "compressible")
    vmm.ask("fill")
    vmm.ask("zero", 100, ZEROS)
    return vmm


def pool_of(tiered: Tiered) -> dict[str, Any]:
    return tiered.native.tier_counters(tiered.served.tiers["memory"].number)


@pytest.mark.parametrize("codec", Codec)
def test_everything_leaves_and_comes_back(vmm: Vmm, host: Host, codec: Codec) -> None:
    with host.attached(vmm, tiers=LADDER, codec=codec) as tiered:
        tiered.evict_all()
        pool = pool_of(tiered)
        assert tiered.pages_in("memory") == pool["written_pages"] > vmm.pages / 2
        assert tiered.pages_in("file") == pool["refused_pages"] > vmm.pages / 8, "what does not compress well goes on"
        assert tiered.counters()["tier_pages"][0] > ZEROS + vmm.pages / 5, "a word again and again is stored nowhere"
        assert 0 < pool["compressed_bytes"] < pool["used_bytes"] < tiered.pages_in("memory") * PAGE * 0.75
        assert tiered.counters()["pages_refused"] == 0
        vmm.verify()
        wait_for(lambda: not tiered.stored_pages, "everything is fetched")
        pool = pool_of(tiered)
        assert pool["read_pages"] == pool["written_pages"] >= sum(pool["read_buckets"]) > 0
        tiered.discard()
        assert pool_of(tiered)["compressed_bytes"] == 0, "what came back takes no room"
        tiered.leave()
    vmm.verify()
    assert not list((host.tmpfs_dir / "pools").iterdir()), "no pool is left behind"


def test_pages_sink(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        before = tiered.pages_in("memory")
        assert tiered.demote("memory", max_bytes=1000 * PAGE) == 1000
        assert tiered.pages_in("memory") == before - 1000
        assert tiered.demote("memory") == before - 1000
        pool = pool_of(tiered)
        assert tiered.pages_in("memory") == pool["compressed_bytes"] == 0
        assert tiered.pages_in("file") == vmm.pages - tiered.counters()["tier_pages"][0]
        assert tiered.counters()["pages_demoted"] == before
        vmm.verify()
        tiered.leave()


def test_pages_sink_no_faster_than_they_may(vmm: Vmm, host: Host) -> None:
    """By demote_rate_max, over all of a demotion."""
    rate = 8 * MIB
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        memory, file = (tiered.served.tiers[name].number for name in LADDER)
        phases, began = cycle.Phases(), time.monotonic()
        sunk = cycle.demote(
            tiered.native,
            memory,
            [file],
            min_idle_s=0.0,
            max_bytes=1 << 40,
            phases=phases,
            check=lambda: None,
            bytes_per_s=rate,
        )
        assert time.monotonic() - began >= sunk / rate
        assert sunk > 4 * MIB
        assert not tiered.pages_in("memory")
        vmm.verify()
        tiered.leave()


def test_only_what_is_old_enough_sinks(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        assert tiered.demote("memory", min_idle_s=3600.0) == 0
        ages = tiered.native.idle_pages((0.0, 3600.0), tiered.served.tiers["memory"].number)
        assert ages == (tiered.pages_in("memory"), 0)


def test_a_tier_that_gets_pages_by_sinking_is_known_to_take_them(vmm: Vmm, host: Host) -> None:
    """After a failure nothing else would say that it is well again."""
    policy = Policy(tiers=(Tier(name="memory", capacity=0), Tier(name="file")))
    with host.attached(vmm, tiers=LADDER) as tiered:
        wide = cast(Store, SimpleNamespace(name="wide", free_bytes=lambda now=False: 1 << 40, used_bytes=lambda: 0))
        tiers = Tiers(tiered.served, dict.fromkeys(LADDER, wide), Shares(), None)
        tiered.evict_all()
        tiers.failed(tiered.served.tiers["file"].number, lambda _: 0.0)
        sunk, took = tiers.sink(policy, tiered.options.phases, lambda: None)
        assert sunk[0][0] == "memory"
        assert took == {"file"}
        vmm.verify()
        tiered.leave()


def test_room_that_another_guest_has_claimed(vmm: Vmm, host: Host) -> None:
    """Is none, and no error; it is there again when that one has let go."""
    with host.attached(vmm, tiers=("file",)) as tiered:
        space = tiered.served.tiers["file"].space
        free = SimpleNamespace(
            name="file",
            free_bytes=lambda now=False: 64 * MIB - space.used_bytes(),
            used_bytes=lambda now=False: space.used_bytes(),
        )
        shares, other = Shares(), cast(Space, SimpleNamespace(used_bytes=lambda: 0))
        tiers = Tiers(tiered.served, {"file": cast(Store, free)}, shares, None)
        shares.claim(cast(Store, free), "other", other, lambda _: 64 * MIB)
        tiered.scan()
        if tiered.native.anonymous:
            tiered.stage()
        assert tiers.evict(Policy(tiers=(Tier(name="file"),)), 0.0, 64 * MIB, tiered.options.phases, lambda: None) == (
            0,
            set(),
        )
        shares.let_go("other")
        evicted, took = tiers.evict(
            Policy(tiers=(Tier(name="file"),)), 0.0, 64 * MIB, tiered.options.phases, lambda: None
        )
        assert took == {"file"}
        assert evicted > vmm.pages * PAGE / 2
        vmm.verify()
        tiered.leave()


def test_what_left_before_there_was_no_room_counts(start_vmm: Start, host: Host) -> None:
    """Else more would leave than may."""
    vmm = start_vmm(f"bytes={16 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, tiers=("file",)) as tiered:
        wide = cast(Store, SimpleNamespace(name="file", free_bytes=lambda now=False: 1 << 40, used_bytes=lambda: 0))
        tiers = Tiers(tiered.served, {"file": wide}, Shares(), None)
        tiered.scan()
        policy = Policy(tiers=(Tier(name="file", capacity=2 * MIB),))
        evicted, took = tiers.evict(policy, 0.0, 64 * MIB, tiered.options.phases, lambda: None)
        assert took == {"file"}
        assert 2 * MIB - 16 * PAGE < tiered.pages_in("file") * PAGE <= 2 * MIB
        assert evicted == tiered.stored_pages * PAGE
        vmm.verify()
        tiered.leave()


def test_a_full_pool(vmm: Vmm, host: Host) -> None:
    """What it has no room for goes to the next tier, and so does what a page becomes that was in it before."""
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.native.set_capacity(1, 2 * MIB)
        tiered.evict_all()
        assert tiered.pages_in("memory") > 0
        assert tiered.served.tiers["memory"].space.used_bytes() <= 2 * MIB
        assert tiered.pages_in("memory") + tiered.pages_in("file") == vmm.pages - tiered.counters()["tier_pages"][0]
        vmm.verify()
        tiered.native.set_capacity(1, 0)
        tiered.evict_all()
        assert tiered.pages_in("memory") == 0
        vmm.verify()
        tiered.leave()


def test_nowhere_to_go(vmm: Vmm, host: Host) -> None:
    """Pages that do not compress stay with a guest that has compressed memory only; they are not tried again before somebody has
    touched them, and are as old as they are when there is another tier for them."""
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.scan()
        tiered.evict(tiers=["memory"])
        refused = tiered.counters()["pages_refused"]
        assert refused > vmm.pages / 8
        assert tiered.pages_in("file") == tiered.counters()["store_write_errors"] == 0
        assert not tiered.evict(tiers=["memory"], stage=False)
        assert tiered.counters()["pages_refused"] == refused
        assert tiered.evict(stage=False) == tiered.pages_in("file") == refused
        assert pool_of(tiered)["refused_pages"] == refused, "the pool is not asked again"
        vmm.verify()
        tiered.discard()
        tiered.native.set_capacity(1, 0)
        tiered.scan()
        tiered.evict(tiers=["memory"])
        assert not tiered.pages_in("memory")
        assert tiered.counters()["tier_pages"][0] > 0, "what needs no store leaves all the same"
        vmm.verify()
        tiered.leave()


def test_a_page_that_was_touched_is_tried_again(start_vmm: Start, host: Host) -> None:
    """What was touched may have become something that compresses, also where a whole group of pages was touched at once."""
    vmm = start_vmm(f"bytes={4 * MIB}", "compressible")
    vmm.ask("fill")
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.scan()
        tiered.evict(tiers=["memory"])
        refused = pool_of(tiered)["refused_pages"]
        vmm.verify()
        wait_for(lambda: not tiered.stored_pages, "everything is fetched")
        tiered.discard()
        tiered.scan()
        tiered.evict(tiers=["memory"])
        assert pool_of(tiered)["refused_pages"] >= 2 * refused
        tiered.leave()


def test_a_tier_that_discards_nothing_holds_up_no_other(start_vmm: Start, host: Host) -> None:
    """The pool's room is the host's memory."""
    vmm = start_vmm(f"bytes={4 * MIB}", "compressible")
    vmm.ask("fill")
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        vmm.verify()
        wait_for(lambda: not tiered.stored_pages, "everything is fetched")
        for fd in map(int, os.listdir("/proc/self/fd")):  # the data plane has one of its own
            with contextlib.suppress(OSError):
                if (path := os.readlink(f"/proc/self/fd/{fd}")).endswith(".pages"):
                    read_only = os.open(path, os.O_RDONLY)
                    os.dup2(read_only, fd)
                    os.close(read_only)
        with pytest.raises(KernelError, match="discard") as caught:
            tiered.discard()
        assert caught.value.tier == tiered.served.tiers["file"].number, "that one is told, and left alone for a while"

        def nothing_is_left() -> bool:
            with contextlib.suppress(KernelError):
                tiered.discard()  # again: the last page may have been counted after its waiter was woken
            return bool(pool_of(tiered)["compressed_bytes"] == 0)

        wait_for(nothing_is_left, "the pool's room is given back")
        tiered.leave()


def test_adoption(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        tiered.demote("memory", max_bytes=500 * PAGE)
        before = {name: tiered.pages_in(name) for name in LADDER}
    with host.adopted(vmm) as tiered:
        assert list(tiered.served.tiers) == list(LADDER)
        assert {name: tiered.pages_in(name) for name in LADDER} == before
        tiered.native.set_capacity(1, 1 << 30)
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        tiered.leave()


@pytest.mark.parametrize("kind", ["flipped", "overwritten", "cut"])
def test_a_damaged_pool(start_vmm: Start, host: Host, kind: str) -> None:
    """Memory errors at what was in it, whatever is wrong with it; never other bytes. What is elsewhere is not touched by that."""
    vmm = start_vmm(f"bytes={4 * MIB}", "compressible", "survive")
    vmm.ask("fill")
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        in_pool, path = tiered.pages_in("memory"), tiered.served.tiers["memory"].space.path
    with open(path, "r+b") as pool:
        size, at = os.fstat(pool.fileno()).st_size, 0
        if kind == "overwritten":
            pool.write(os.urandom(4096))
        elif kind == "cut":
            pool.truncate(size // 2)
        while kind == "flipped" and at < size:
            at = os.lseek(pool.fileno(), at, os.SEEK_DATA) if at == 0 else at
            if at >= 1 * MIB:
                byte = os.pread(pool.fileno(), 1, at)[0]
                os.pwrite(pool.fileno(), bytes([byte ^ 0x10]), at)
            at += 5000
    with host.adopted(vmm) as tiered:
        vmm.ask("verify")
        assert tiered.counters()["pages_lost"] <= in_pool
        if kind == "overwritten":
            assert tiered.counters()["pages_lost"] == in_pool
        wait_for(lambda: not tiered.stored_pages, "everything that can be had is fetched")
    assert not vmm.wrong


def test_a_pool_that_is_gone(start_vmm: Start, host: Host) -> None:
    """The guest is left as it is: its threads wait at pages that are nowhere to be had."""
    vmm = start_vmm(f"bytes={4 * MIB}", "compressible")
    vmm.ask("fill")
    with host.attached(vmm, tiers=LADDER) as tiered:
        tiered.evict_all()
        path: Path = tiered.served.tiers["memory"].space.path
        kept = path.rename(path.with_suffix(".kept"))
    with pytest.raises(StoreError, match="nothing was touched"), host.adopted(vmm):
        pass
    kept.rename(path)
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.leave()


def test_huge_pages_pass_compressed_memory_by(start_vmm: Start, host: Host) -> None:
    with huge_pages(16):
        vmm = start_vmm(f"bytes={16 * MIB}", "kind=huge", "compressible")
        vmm.ask("fill")
        with host.attached(vmm, tiers=LADDER) as tiered:
            assert list(tiered.served.tiers) == ["file"]
            tiered.evict_all()
            vmm.verify()
            tiered.leave()
        with pytest.raises(StoreError, match="none of its tiers"), host.attached(vmm, tiers=("memory",)):
            pass
        vmm.kill()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_torture(vmm_binary: Path, memory: Any) -> None:
    """Three tiers of three kinds; everything as in the other torture runs, while pages sink and the pool is compacted."""
    result = torture(vmm_binary, kills=20, seed=7, guests=2, memory=memory, ladder=True)
    assert result["wrong_bytes"] == 0
    assert result["evicted_pages"] > 0
    assert result["demoted_pages"] > 0
    assert result["pages_into_asked"] > 0
    assert result["pages_out_of_asked"] > 0, "by faults"
    assert result["poisoned_pages"] == result["destroyed_pages"]
    for kind in ("memory", "file", "asked"):
        assert result[f"destroyed_in_{kind}"] > 0, kind
