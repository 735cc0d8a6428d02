# SPDX-License-Identifier: Apache-2.0
"""A store that fails, lies or hangs: only the faults that need it wait, and no page is given up that can still be had."""

from __future__ import annotations

import errno
import platform
import signal
from collections.abc import Callable

import pytest

from tests.kernel.test_kill import blocked
from tests.kernel.vmm import MIB, PAGE, Host, Tiered, Vmm, wait_for
from tierd.native.inject import inject

Start = Callable[..., Vmm]
HANG_S = 6.0  # all that is to happen meanwhile takes half of that on a machine that is not busy
GETPID = {"x86_64": 39, "aarch64": 172}[platform.machine()]


def _destroy(tiered: Tiered, page: int) -> bytes:
    """One byte of a stored page is wrong; what it was."""
    with open(tiered.served.tiers["file"].space.path, "r+b") as store:
        store.seek(page * PAGE + 99)
        byte = store.read(1)
        store.seek(page * PAGE + 99)
        store.write(bytes([byte[0] ^ 4]))
    return byte


def _repair(tiered: Tiered, page: int, byte: bytes) -> None:
    with open(tiered.served.tiers["file"].space.path, "r+b") as store:
        store.seek(page * PAGE + 99)
        store.write(byte)


@pytest.mark.parametrize("fault", ["read_error", "read_flip", "read_short"])
def test_reads_that_fail_now_and_then_lose_nothing(start_vmm: Start, host: Host, fault: str) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, read_deadline_s=60.0, readahead_pages=4) as tiered:
        tiered.evict_all()
        tiered.native.set_store_faults(seed=5, **{fault: 300})
        vmm.verify()
        c = tiered.counters()
        assert c["pages_lost"] == 0
        if fault != "read_short":
            assert c["store_read_errors"] + c["checksum_errors"] > 10


def test_while_one_read_is_tried_again_others_are_served(start_vmm: Start, host: Host) -> None:
    """The page is parked, the one fault thread goes on; after the deadline it is a memory error, and only there."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", read_deadline_s=60.0, readahead_pages=1) as tiered:
        tiered.evict_all()
        _destroy(tiered, 700)
        vmm.send("verify", 700, 1)
        wait_for(lambda: tiered.counters()["parked_pages"] == 1, "the page is parked")
        tiered.native.restore(0, 512)  # a store that cannot give one page gives the others
        assert tiered.counters()["state_pages"][0] >= 512
        assert tiered.counters()["pages_lost"] == 0
        tiered.native.set_reads(0.0, hold=False)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS
        assert tiered.counters()["pages_lost"] == 1


def test_hold_waits_for_the_operator(start_vmm: Start, host: Host) -> None:
    """on_lost: hold. The guest's thread is blocked, not killed; after the repair, `retry` lets it go on with its bytes."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", hold_lost=True) as tiered:
        tiered.evict_all()
        byte = _destroy(tiered, 517)
        vmm.send("verify")
        wait_for(lambda: tiered.counters()["state_pages"][7] == 1, "the page is lost")
        assert tiered.native.retry()[1:] == (0, 1), "nothing was repaired yet"
        assert not vmm.answered()
        _repair(tiered, 517, byte)
        assert tiered.native.retry()[1:] == (1, 0)
        wait_for(vmm.answered, "the guest has verified everything")
        assert tiered.counters()["state_pages"][7] == 0
        vmm.verify()


def test_a_successor_holds_what_was_held(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", hold_lost=True) as tiered:
        tiered.evict_all()
        byte = _destroy(tiered, 9)
        vmm.send("verify")
        wait_for(lambda: tiered.counters()["state_pages"][7] == 1, "the page is lost")
    with host.adopted(vmm, direct="off", hold_lost=True) as tiered:
        assert tiered.counters()["state_pages"][7] == 1
        _repair(tiered, 9, byte)
        assert tiered.native.retry()[1:] == (1, 0)
        wait_for(vmm.answered, "the guest has verified everything")


def test_poison_after_hold_tells_who_was_blocked(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", hold_lost=True) as tiered:
        tiered.evict_all()
        _destroy(tiered, 9)
        vmm.send("verify")
        wait_for(lambda: tiered.counters()["state_pages"][7] == 1, "the page is lost")
        tiered.native.set_reads(0.0, hold=False)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS


def test_a_store_that_hangs_stops_only_who_needs_it(start_vmm: Start, host: Host) -> None:
    """One thread is inside a read for long; another one takes over, keeps out of reads, and serves what needs none."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    half = vmm.pages // 2
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        vmm.ask("verify", 0, half)
        tiered.native.set_store_faults(seed=1, read_hang=1000, hang_us=int(HANG_S * 1e6))
        vmm.send("verify", half, 1)
        wait_for(lambda: tiered.native.health(0.05).hung_threads == 1, "the thread hangs")
        tiered.native.start()
        tiered.scan()  # the resident half is deactivated and held: its faults need no store
        tiered.native.set_store_faults(seed=0)
        tiered.evict(max_bytes=64 * PAGE)
        assert tiered.native.health(0.05).fault_threads == 2
        assert tiered.native.health(0.05).hung_threads == 1, "the read hung no longer than all of this took"
        wait_for(vmm.answered, "the read came back")
        assert tiered.native.health(0.05).hung_threads == 0
        vmm.verify()
        assert tiered.counters()["pages_lost"] == 0


def test_a_fault_that_came_together_with_one_that_hangs(start_vmm: Start, host: Host) -> None:
    """Two threads of the guest fault at the same time: one needs the store, which hangs, the other one a page of zeros. Whoever
    waits for the store must not have the other's message in hand."""
    vmm = start_vmm(f"bytes={4 * MIB}", "threads=1")
    vmm.ask("fill")
    vmm.ask("zero", 7, 1)
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        vmm.ask("hot", vmm.pages // 2, 1)
        tiered.native.set_store_faults(seed=1, read_hang=1000, hang_us=int(HANG_S * 1e6))
        tiered.native.stop()  # until both wait
        vmm.send("run", 0, 0)
        wait_for(vmm.answered, "it runs")
        wait_for(lambda: blocked(vmm) == 1, "one waits for a page that is in the store")
        vmm.send("splice", 7)
        wait_for(lambda: blocked(vmm) == 2, "another one waits for zeros")
        tiered.native.start()
        wait_for(lambda: tiered.native.health(0.05).hung_threads == 1, "the thread hangs")
        tiered.native.start()  # as the watchdog does
        wait_for(vmm.answered, "the other one goes on")
        assert tiered.native.health(0.05).hung_threads == 1, "the read hung no longer than all of this took"
        tiered.native.set_store_faults(seed=0)
        wait_for(lambda: not tiered.native.health(0.05).hung_threads, "the store answers")
        vmm.ask("unsplice")
        vmm.ask("stop")
        vmm.verify()


def test_a_thread_that_cannot_be_stopped_now_is_let_go_when_it_can(start_vmm: Start, host: Host) -> None:
    """The kernel waits in it for a page (vmsplice), longer than we wait for the thread: once the page is there it must go on,
    though the process that wanted to enter it lives."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        tiered.native.set_store_faults(seed=1, read_hang=1000, hang_us=int(HANG_S * 1e6))
        vmm.send("splice", 7)
        wait_for(lambda: tiered.native.health(0.05).hung_threads == 1, "the thread waits in the kernel")
        with pytest.raises(OSError, match="inside the VMM") as caught:
            inject(vmm.pid, "getpid", GETPID)
        assert caught.value.errno == errno.ETIMEDOUT
        assert not vmm.answered()
        wait_for(vmm.answered, "the thread goes on", 30)
        tiered.native.set_store_faults(seed=0)
        assert inject(vmm.pid, "getpid", GETPID).result == vmm.pid
        vmm.ask("unsplice")
        vmm.verify()
