# SPDX-License-Identifier: Apache-2.0
"""A guest's life on the real kernel: what leaves comes back, and nothing of us stays behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.vmm import MIB, PAGE, SLOWNESS, Host, Vmm, need_anonymous, userfaultfds, vm_flags, wait_for
from tests.need import need
from tierd import cycle
from tierd.attach import Refused
from tierd.native import KernelError, Zap

Start = Callable[..., Vmm]
REGISTERED = {"um", "uw", "ui"}

VARIANTS: list[dict[str, Any]] = [
    {},
    {"use_pagemap": True},
    {"zap": Zap.INJECT},
    {"direct": "off"},
    {"readahead_pages": 1},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) or "default")
def test_everything_leaves_and_comes_back(start_vmm: Start, host: Host, variant: dict[str, Any]) -> None:
    vmm = start_vmm(f"bytes={16 * MIB}", "regions=2")
    vmm.ask("fill")
    vmm.ask("zero", 100, 50)
    with host.attached(vmm, **variant) as tiered:
        before = tiered.served.resident_bytes()
        tiered.evict_all()
        c = tiered.counters()
        assert tiered.served.resident_bytes() == 0 < before, "memory is given back, not only unmapped"
        assert c["state_pages"][4] == vmm.pages
        assert c["pages_evicted_zero"] == c["tier_pages"][0] == 50
        assert tiered.served.tiers["file"].space.used_bytes() >= (vmm.pages - 50) * PAGE
        vmm.verify()
        # the last page is counted after its waiter was woken
        wait_for(lambda: tiered.counters()["pages_fetched"] >= vmm.pages, "every page was fetched")
        c = tiered.counters()
        assert c["state_pages"][4] == 0
        assert c["faults_fetch"] > 0
        if variant.get("readahead_pages") == 1:
            assert c["pages_readahead"] == 0
        else:
            assert c["faults_fetch"] < vmm.pages / 4, "a walk is read ahead"
        assert c["latency_count"] == sum(c["latency_buckets"]) > 0
        assert c["kernel_errors"] == c["store_read_errors"] == c["checksum_errors"] == c["pages_lost"] == 0
        tiered.discard()
        assert tiered.served.tiers["file"].space.used_bytes() == 0, "store space is given back"
        tiered.leave()
        tiered.served.forget()
    vmm.verify()
    assert not userfaultfds(vmm.pid)
    assert all(not vm_flags(vmm.pid, address) & REGISTERED for address in vmm.addresses)
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) or "default")
def test_a_busy_guest_reads_what_it_wrote(start_vmm: Start, host: Host, variant: dict[str, Any]) -> None:
    """Readers and writers on every page while everything that is not touched at once is evicted again and again."""
    vmm = start_vmm(f"bytes={8 * MIB}", "regions=2", "threads=3")
    vmm.ask("fill")
    with host.attached(vmm, **variant) as tiered:
        vmm.ask("run", 4000, 50)
        tiered.cycle_until(int(vmm.pages * max(1, 2 / SLOWNESS)), 1000)
        _, wrong = vmm.ask("stop")
        c = tiered.counters()
        assert wrong == 0
        assert c["pages_lost"] == c["checksum_errors"] == c["kernel_errors"] == 0
        vmm.verify()
        tiered.leave()
        tiered.served.forget()
    vmm.verify()


def test_only_idle_pages_leave(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={16 * MIB}")
    vmm.ask("fill")
    hot = 256
    vmm.ask("hot", 0, hot)
    with host.attached(vmm) as tiered:
        vmm.ask("run", 20000, 50)

        def cold_gone() -> bool:
            tiered.scan()
            tiered.evict(min_idle_s=0.6)
            return tiered.stored_pages >= vmm.pages - hot

        wait_for(cold_gone, "the cold part evicted")
        fetched = tiered.counters()["faults_fetch"]
        assert fetched < hot / 4, "the hot part stays"
        vmm.ask("stop")
        vmm.verify()


def test_a_page_younger_than_min_idle_stays(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.evict(min_idle_s=3600) == 0
        vmm.verify()


def test_first_touch_is_not_registered(start_vmm: Start, host: Host) -> None:
    """Memory that the guest never used costs no round trip: MISSING comes with the first eviction of a chunk."""
    vmm = start_vmm(f"bytes={256 * MIB}")
    with host.attached(vmm) as tiered:
        vmm.ask("fill", 0, 1024)
        tiered.scan()
        c = tiered.counters()
        assert c["missing_chunks"] == 0
        assert c["faults_zero"] == 0
        assert c["untouched_pages"] == vmm.pages - 1024
        tiered.evict_all()
        assert tiered.counters()["missing_chunks"] == 1
        vmm.ask("fill", 1024, 1024)  # in the same chunk, never used: served as runs of zero pages
        c = tiered.counters()
        assert 0 < c["faults_zero"] < 1024
        vmm.ask("fill", vmm.pages - 16, 16)  # another chunk
        assert tiered.counters()["missing_chunks"] == 1
        vmm.verify()


def test_a_full_store_stops_evictions_and_loses_nothing(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={16 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, capacity_bytes=1024 * PAGE) as tiered:
        tiered.scan()

        def full() -> bool:
            try:
                tiered.evict()
            except KernelError as error:
                assert error.errno == 28
                return True
            return False

        wait_for(full, "the store is full")
        assert tiered.stored_pages == 1024, "what was under way to it when it was full has left"
        assert tiered.counters()["store_write_errors"] == 0, "our own limit is not an error of the store"
        vmm.verify()
        tiered.discard()
        tiered.leave()


def test_no_thread_to_be_had(start_vmm: Start, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """At pids.max: an error of this eviction, and the next one goes on."""
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with host.attached(vmm) as tiered:
        tiered.scan()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refused)
            with pytest.raises(OSError, match=r"no thread .* pids\.max"):
                tiered.evict()
        assert not any(tiered.counters()["state_pages"][1:])
        vmm.verify()
        tiered.evict_all()
        vmm.verify()


def test_a_vmm_that_is_killed_in_mid_eviction(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={64 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        pages = 0

        def kill_soon() -> None:
            nonlocal pages
            pages += 1
            if pages == 8:
                vmm.kill()

        with pytest.raises(OSError) as caught:
            for _ in range(1000):
                cycle.evict(
                    tiered.native,
                    min_idle_s=0,
                    max_bytes=1 << 40,
                    tiers=[1],
                    hold_ms_max=20,
                    phases=tiered.options.phases,
                    check=kill_soon,
                )
                tiered.scan()
        assert caught.value.errno in (3, 14), "ESRCH, or no memory there any more"
        tiered.served.forget()
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())


def test_a_balloon_reads_zeros_or_what_was_there(start_vmm: Start, host: Host) -> None:
    """The VMM gives pages back itself, also stored ones. What it then writes is kept as anything else."""
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        vmm.ask("give-back", 0, 512)
        tiered.scan()
        vmm.verify()
        vmm.ask("give-back", 512, 64)
        vmm.ask("fill", 512, 64)
        tiered.evict_all()
        vmm.verify()


def test_guest_memory_in_a_file_on_tmpfs(start_vmm: Start, host: Host) -> None:
    path = host.tmpfs_dir / "guest-ram"
    vmm = start_vmm(
        f"bytes={8 * MIB}", f"kind=file:{path}", "-object", f"memory-backend-file,id=ram,mem-path={path},share=on"
    )
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        assert path.stat().st_blocks == 0
        vmm.verify()
        tiered.leave()


def test_a_vmm_that_closed_its_memfd(start_vmm: Start, host: Host) -> None:
    """Then the file is opened through its mapping."""
    vmm = start_vmm(f"bytes={4 * MIB}", "close")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.verify()


def test_an_orderly_keep_and_an_adoption(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={8 * MIB}", "regions=2")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
    with host.adopted(vmm) as tiered:
        assert tiered.served.adoption is not None
        assert tiered.served.adoption.stored_pages == vmm.pages
        vmm.verify()
        tiered.leave()
        tiered.served.forget()
    vmm.verify()
    assert not userfaultfds(vmm.pid)


def test_two_daemons_cannot_serve_one_guest(start_vmm: Start, host: Host, tmp_path: Path) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm), pytest.raises(Refused) as caught, host.attached(vmm):
        pass
    assert caught.value.check == "registered"
    assert str(vmm.pid) in caught.value.evidence


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("arguments", "variant"),
    [((), {}), ((), {"zap": Zap.INJECT, "use_pagemap": True}), (("kind=anonymous", f"bytes={MIB}"), {})],
    ids=["default", "inside", "anonymous"],
)
def test_a_real_vcpu(vcpu_binary: Path, host: Host, arguments: tuple[str, ...], variant: dict[str, Any]) -> None:
    """Faults of a vCPU are taken in the kernel, through KVM's own page tables."""
    if arguments:
        need_anonymous()
    with Vmm(vcpu_binary, *arguments, arg0="qemu-system-x86_64") as vmm:
        vmm.ask("fill")
        with host.attached(vmm, **variant) as tiered:
            # laps a second: where the copy comes before the hold, what is touched again within a millisecond never leaves;
            # nor does anonymous memory that is written between a scan and the move
            vmm.ask("run", 10 if tiered.native.has_sync_mode or tiered.native.anonymous else 2000)

            def much_happened() -> bool:
                tiered.scan()
                tiered.evict()
                tiered.discard()
                return bool(tiered.counters()["pages_evicted"] > 1000 and vmm.stats()["operations"] > 20)

            wait_for(much_happened, "20 laps over memory that leaves", seconds=200)  # KVM may be emulated
            laps, wrong = vmm.ask("stop")
            assert wrong == 0
            vmm.verify()
            tiered.evict_all(but_pages=8)  # KVM itself holds one or two
            vmm.ask("run")
            wait_for(lambda: vmm.stats()["operations"] > laps + 5, "laps over evicted memory", seconds=60)
            tiered.restore_all()  # under the running vCPU
            assert tiered.counters()["pages_lost"] == tiered.counters()["kernel_errors"] == 0
            tiered.leave()
        before = vmm.stats()["operations"]
        wait_for(lambda: vmm.stats()["operations"] > before + 5, "laps without us", seconds=60)
        vmm.ask("stop")
        vmm.verify()
        assert not userfaultfds(vmm.pid)


def pinned_threads() -> list[int]:
    """Of ours: those that may run on one CPU only."""
    return [tid for tid in map(int, os.listdir("/proc/self/task")) if len(os.sched_getaffinity(tid)) == 1]


def test_a_real_time_vcpu_is_not_followed(start_vmm: Start, host: Host) -> None:
    """It may poll: a fault thread on its CPU would get no time, and no other vCPU of that guest its pages."""
    need("kernel", len(os.sched_getaffinity(0)) > 1, "one CPU")
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        os.sched_setaffinity(vmm.pid, {max(os.sched_getaffinity(0))})
        vmm.ask("verify", 0, 100)
        assert len(pinned_threads()) == 1, "others are followed"
        try:
            os.sched_setscheduler(vmm.pid, os.SCHED_FIFO, os.sched_param(1))
        except PermissionError as error:
            need("kernel", False, f"no real-time scheduling: {error}")
        vmm.ask("verify", 100, 200)
        assert not pinned_threads()
        os.sched_setscheduler(vmm.pid, os.SCHED_OTHER, os.sched_param(0))
        tiered.leave()
    vmm.verify()
