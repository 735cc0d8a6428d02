# SPDX-License-Identifier: Apache-2.0
"""Clean pages cost nothing twice: what was fetched and not written since is not written to the store again."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.kernel.vmm import MIB, Host, Tiered, Vmm, wait_for
from tierd.engine import choose
from tierd.tiers import Shares, Tiers

Start = Callable[..., Vmm]


def _written(tiered: Tiered) -> int:
    return int(tiered.native.tier_counters(1)["written_pages"])


def _wait_settled(tiered: Tiered) -> None:
    wait_for(lambda: not tiered.arriving_pages, "all have come")


@pytest.fixture(autouse=True)
def _protects() -> None:
    if choose().name != "stock":
        pytest.skip("only the stock engine write-protects what it fetches")


def test_a_guest_that_only_reads_is_written_once(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, readahead_pages=8) as tiered:
        tiered.evict_all()
        once = _written(tiered)
        assert once > 1800
        for _ in range(3):
            vmm.verify()
            _wait_settled(tiered)
            assert tiered.native.discard(1 << 20, keep=[1]) == 0, "the copies stay"
            tiered.evict_all()
        assert _written(tiered) == once
        assert tiered.counters()["pages_unwritten"] >= 3 * once
        vmm.verify()


def test_what_is_written_to_is_written_again(start_vmm: Start, host: Host) -> None:
    """By a fault that takes the protection; before the next eviction, or in the middle of it."""
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, readahead_pages=8) as tiered:
        tiered.evict_all()
        once = _written(tiered)
        vmm.verify()
        vmm.ask("fill", 256, 512)
        _wait_settled(tiered)
        assert tiered.native.discard(1 << 20, keep=[1]) >= 512, "their copies are of no use any more"
        tiered.evict_all()
        assert once + 512 <= _written(tiered) < once + 1024
        vmm.verify()
        vmm.ask("run", 2)
        for _ in range(20):
            tiered.scan()
            tiered.evict()
            tiered.native.discard(1 << 20, keep=[1])
        vmm.ask("stop")
        vmm.verify()


def test_a_copy_that_is_not_kept_is_made_again(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        once = _written(tiered)
        vmm.verify()
        _wait_settled(tiered)
        assert tiered.native.discard(1 << 20) == once
        tiered.evict_all()
        assert _written(tiered) == 2 * once
        vmm.verify()


def test_a_copy_that_is_not_relied_on_is_made_elsewhere(start_vmm: Start, host: Host) -> None:
    """Its tier fails, say, or is for older pages: what is right in the guest must not leave on the word of that copy."""
    vmm = start_vmm(f"bytes={4 * MIB}", "compressible")
    vmm.ask("fill")

    def leave(tier: str) -> int:
        tiered.scan()
        tiered.evict(tiers=[tier])
        return int(tiered.counters()["tier_pages"][tiered.served.tiers[tier].number])

    with host.attached(vmm, tiers=("memory", "file")) as tiered:
        wait_for(lambda: leave("file") > 700, "all is in the file that has to be stored")
        vmm.verify()
        wait_for(lambda: leave("memory") > 500, "what compresses is in memory")
        assert not tiered.counters()["pages_unwritten"]
        assert not tiered.counters()["tier_pages"][tiered.served.tiers["file"].number]
        vmm.verify()


def test_no_copy_is_relied_on_after_a_read_that_failed(start_vmm: Start, host: Host) -> None:
    """Whoever loses one page may have lost all; what is in the guest is right still."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, readahead_pages=1, read_deadline_s=60.0) as tiered:
        tiers = Tiers(tiered.served, {}, Shares(), None)
        tiered.evict_all()
        once = _written(tiered)
        vmm.verify()
        tiers._look_at_errors()
        tiered.evict_all()
        assert _written(tiered) == once, "nothing has failed"
        tiered.native.set_store_faults(seed=5, read_error=300)
        vmm.verify()
        tiered.native.set_store_faults(seed=0)
        _wait_settled(tiered)
        tiers._look_at_errors()
        tiered.evict_all()
        assert _written(tiered) == 2 * once
        vmm.verify()


@pytest.mark.parametrize("encrypt", [False, True])
def test_no_copy_is_relied_on_in_a_store_that_is_gone(start_vmm: Start, host: Host, encrypt: bool) -> None:
    """And nobody has asked it for anything since."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, encrypt=encrypt, direct="off") as tiered:
        tiered.evict_all()
        once = _written(tiered)
        vmm.verify()
        os.truncate(tiered.served.tiers["file"].space.path, 0)
        tiered.evict_all()
        assert _written(tiered) == 2 * once
        vmm.verify()
        with open(tiered.served.tiers["file"].space.path, "r+b") as file:
            file.write(bytes(4 * MIB))
        tiered.evict_all()
        assert _written(tiered) == 3 * once
        vmm.verify()


def test_no_copy_is_relied_on_in_a_store_that_has_lost_some(start_vmm: Start, host: Host) -> None:
    """Those that are there still are of no use for the others: the guest has them all."""
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off") as tiered:
        tiered.evict_all()
        once = _written(tiered)
        vmm.verify()
        path = tiered.served.tiers["file"].space.path
        with open(path, "r+b") as file:
            file.write(bytes(2 * MIB))  # of the first batch
        tiered.evict_all()
        assert _written(tiered) == 2 * once
        vmm.verify()


def test_nothing_is_clean_for_a_successor(start_vmm: Start, host: Host) -> None:
    """It lifts every protection, and so writes what it evicts."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.verify()
    with host.adopted(vmm) as tiered:
        tiered.evict_all()
        assert _written(tiered) > 900
        assert tiered.counters()["pages_unwritten"] == 0
        vmm.ask("fill")
        tiered.evict_all()
        vmm.verify()
