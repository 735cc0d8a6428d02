# SPDX-License-Identifier: Apache-2.0
"""What a tierd leaves behind, however it ends, and what its successor makes of it."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.disks import frozen_at_will, in_the_kernel
from tests.kernel.forced import ForcedEngine, Options
from tests.kernel.host_memory import huge_pages
from tests.kernel.vmm import MIB, PAGE, Host, Tiered, Vmm, userfaultfds, wait_for
from tests.need import need
from tierd.attach import Refused
from tierd.attach.procfs import maps_of, still_mapped
from tierd.attach.ptrace import NUMBER, close_in_vmm, pick_thread
from tierd.native import STATES, Zap, probe
from tierd.native.inject import inject
from tierd.serve import Served, Stale, StateError, read_state

Start = Callable[..., Vmm]
RESIDENT, STORED = STATES.index("resident"), STATES.index("stored")


def state_files(host: Host) -> list[Path]:
    return list((host.tmpfs_dir / "guests").iterdir())


# --- who else holds the userfaultfd -----------------------------------------------------------------------------------------


def closed_in_vmm(vmm: Vmm, tiered: Tiered) -> None:
    assert tiered.served.vmm_holds_uffd()
    close_in_vmm(vmm.pid, tiered.served.uffd_in_vmm)
    assert not tiered.served.vmm_holds_uffd()


def test_another_userfaultfd_by_the_number_of_ours(start_vmm: Start, host: Host) -> None:
    """The VMM closes our copy and makes one for itself: that one keeps no stored page from reading as zeros when we die."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        ours = tiered.served.uffd_in_vmm
        closed_in_vmm(vmm, tiered)
        assert inject(pick_thread(vmm.pid), "userfaultfd", NUMBER["userfaultfd"], os.O_CLOEXEC).result == ours
        assert not tiered.served.vmm_holds_uffd()
        tiered.served.give_uffd_back()
        assert tiered.served.vmm_holds_uffd()
        close_in_vmm(vmm.pid, ours)
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.leave()


def test_a_vmm_that_closed_its_copy_gets_it_back(start_vmm: Start, host: Host) -> None:
    """Under another number, which the state file says to a successor."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        closed_in_vmm(vmm, tiered)
        tiered.served.give_uffd_back()
        assert tiered.served.vmm_holds_uffd()
        assert len(userfaultfds(vmm.pid)) == 1
        moved = tiered.served.uffd_in_vmm
    with host.adopted(vmm) as tiered:
        assert tiered.served.uffd_in_vmm == moved
        vmm.verify()
        tiered.leave()
    assert not userfaultfds(vmm.pid)
    vmm.verify()


def test_a_copy_that_the_manager_kept_is_enough(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        kept = os.dup(tiered.served.uffd)
        closed_in_vmm(vmm, tiered)
    try:
        with host.adopted(vmm, kept_uffd=kept) as tiered:
            vmm.verify()
            tiered.served.give_uffd_back()
        os.close(kept)
        kept = -1
        with host.adopted(vmm):
            vmm.verify()
    finally:
        if kept >= 0:
            os.close(kept)


def test_without_any_copy_it_is_told_and_nothing_is_touched(start_vmm: Start, host: Host) -> None:
    """Rule 10's other side. The kernel has unregistered everything: what was stored reads as zeros already."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        closed_in_vmm(vmm, tiered)
    (path,) = state_files(host)
    before = path.read_bytes()
    says = f"{vmm.pages} pages that are stored read as zeros there now; restart"
    with pytest.raises(StateError, match=says), host.adopted(vmm):
        pass
    assert path.read_bytes() == before


def test_without_any_copy_and_nothing_stored_there_is_nothing_to_adopt(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        tiered.restore_all()
        closed_in_vmm(vmm, tiered)
        store = tiered.served.tiers["file"].space.path
    with pytest.raises(Stale, match="every page is with it") as caught, host.adopted(vmm):
        pass
    caught.value.sweep()
    assert not state_files(host)
    assert not store.exists()
    vmm.verify()
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.verify()


def test_a_strange_filter_of_a_vmm_that_connected_is_not_entered(start_vmm: Start) -> None:
    """Its filter was of no interest while nothing was to be called inside; then swap came."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("filter")
    served = Served(replace(vmm.spec(), handshake=True), Path("not used"), ForcedEngine(Options(zap=Zap.INJECT)))
    with pytest.raises(Refused, match="swap is on by now"):
        served.adapt(True)


def test_a_strange_filter_is_not_entered(start_vmm: Start, host: Host) -> None:
    """A seccomp filter that came after the attach may kill the VMM for a call of ours: its copy is not put back, and it is
    left with its descriptor."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("filter")
        with pytest.raises(PermissionError, match="seccomp filter"):
            tiered.served.give_uffd_back()
        tiered.restore_all()
        assert tiered.served.leave() is False
    assert len(userfaultfds(vmm.pid)) == 1
    assert not state_files(host)
    vmm.verify()


# --- a detach that is interrupted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["restore", "disarm", "forget"])
def test_a_death_in_the_middle_of_a_detach(start_vmm: Start, host: Host, step: str) -> None:
    """After each step of `leave`: the guest has every byte, and goes on to be served or is left."""
    vmm = start_vmm(f"bytes={4 * MIB}", "threads=2")
    vmm.ask("fill")
    vmm.ask("run", 2000, 50)
    with host.attached(vmm) as tiered:
        tiered.scan()
        tiered.evict()
        tiered.restore_all()
        if step != "restore":
            tiered.served._disarm()
        if step == "forget":
            tiered.served.forget()
    if step == "forget":
        assert not state_files(host)
    else:
        with host.adopted(vmm) as tiered:
            tiered.scan()
            tiered.evict()
            tiered.restore_all()
            assert tiered.served.leave()
        assert not userfaultfds(vmm.pid)
    vmm.ask("stop")
    vmm.verify()


# --- I/O that outlives its process ------------------------------------------------------------------------------------------


def test_a_predecessor_that_hangs_in_its_store_is_waited_for(vmm_binary: Path, disk_dir: Path, tmpfs_dir: Path) -> None:
    """Rules 9 and 11: killed in the middle of a write that does not end, its threads hold the lock until it has ended, so
    nobody uses the space again before it lands. Who holds the lock is said."""
    with frozen_at_will(disk_dir) as disk, Vmm(vmm_binary, f"bytes={16 * MIB}", "threads=2") as vmm:
        vmm.ask("fill")
        vmm.ask("run", 2000, 50)
        host = Host(tmpfs_dir, disk.mount)
        command = [
            sys.executable,
            "-m",
            "tests.kernel.worker",
            str(vmm.pid),
            str(tmpfs_dir),
            str(disk.mount),
            "1",
            "honest",
        ]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert worker.stdout is not None
            while not worker.stdout.readline().startswith(b"counters"):
                pass  # attaching, ready
            disk.hang()
            wait_for(lambda: in_the_kernel(worker.pid, "percpu_rwsem_wait"), "a thread hangs in its store")
            worker.kill()
            says = f"still locked by process {worker.pid}"
            with pytest.raises(StateError, match=says), host.adopted(vmm, lock_s_max=0.5):
                pass
            disk.go_on()
            with host.adopted(vmm) as tiered:
                vmm.ask("stop")
                vmm.verify()
                assert tiered.counters()["pages_lost"] == 0
                tiered.leave()
            vmm.verify()
        finally:
            disk.go_on()
            worker.kill()
            worker.communicate()


def test_space_that_a_late_write_may_hit_is_not_used_again(
    start_vmm: Start, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 11: on file systems where a killed process's requests may land later. Also by the successor's successor."""
    monkeypatch.setattr("tierd.store.file.LOCAL_FILE_SYSTEMS", frozenset())
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    touched = sorted(random.Random(1).sample(range(vmm.pages), 100))
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        for page in touched:
            vmm.ask("verify", page, 1)
    for _ in range(2):
        with host.adopted(vmm) as tiered:
            assert tiered.served.adoption is not None
            assert tiered.served.adoption.quarantined_pages == len(touched)
            tiered.discard()
            tiered.evict_all(but_pages=len(touched))
            assert tiered.stored_pages == vmm.pages - len(touched)
            blocks = {page: _has_data(tiered, page) for page in touched}
            assert all(blocks.values()), "nothing of it was discarded"
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.leave()
    vmm.verify()


@pytest.mark.parametrize("kind", ["memfd", "huge"])
def test_a_retry_that_was_killed_half_way_leaves_the_page_lost(start_vmm: Start, host: Host, kind: str) -> None:
    """Its poison is there still: were it called stored, the guest would get a memory error at a page that can be had."""
    need("poison", not probe().poison, "UFFDIO_POISON is from Linux 6.6 on")
    page, pages, state_words = 5, 8, 65536
    lost, arriving = STATES.index("lost"), STATES.index("arriving")
    page_bytes = 2 * MIB if kind == "huge" else PAGE
    with huge_pages(pages) if kind == "huge" else contextlib.nullcontext():
        vmm = start_vmm(f"bytes={max(pages * page_bytes, MIB)}", "survive", f"kind={kind}")
        vmm.ask("fill")
        with host.attached(vmm, direct="off") as tiered:
            tiered.evict_all()
            store, state = tiered.served.tiers["file"].space.path, tiered.served.state_path
            good = store.read_bytes()
            with store.open("r+b") as file:
                file.seek(page * page_bytes)
                file.write(bytes(page_bytes))
            vmm.send("verify", page, 1)
            wait_for(vmm.answered, "the guest is told of a memory error")
            assert tiered.counters()["state_pages"][lost] == 1
        store.write_bytes(good)
        with state.open("r+b") as file:
            file.seek(state_words + 4 * page)
            (word,) = struct.unpack("I", file.read(4))
            file.seek(state_words + 4 * page)
            file.write(struct.pack("I", word & ~0xF | arriving))
        with host.adopted(vmm) as tiered:
            assert tiered.counters()["state_pages"][lost] == 1
            assert tiered.native.retry()[1:] == (1, 0)
            assert tiered.counters()["state_pages"][lost] == 0
            vmm.ask("verify", 0, page)
            vmm.ask("verify", page + 1)
        vmm.kill()


def _has_data(tiered: Tiered, page: int) -> bool:
    try:
        return os.lseek(tiered.served.tiers["file"].space.fd, page * PAGE, os.SEEK_DATA) == page * PAGE
    except OSError:
        return False


def test_local_disks_need_no_quarantine(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        assert not tiered.served.tiers["file"].space.late, "this test runs on a local disk"
        tiered.evict_all()
        vmm.verify()
    with host.adopted(vmm) as tiered:
        assert tiered.served.adoption is not None
        assert tiered.served.adoption.quarantined_pages == 0


# --- the state file ---------------------------------------------------------------------------------------------------------


def test_a_successor_goes_on_as_the_policy_said(start_vmm: Start, host: Host) -> None:
    """Before it has read a configuration: the first fault that it serves may be the one that cannot be read."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", readahead_pages=4, read_deadline_s=7.0, hold_lost=True) as tiered:
        tiered.native.set_readahead(8)
    with host.adopted(vmm) as tiered:
        assert not tiered.served.tiers["file"].space.direct
        serving = read_state(tiered.served.state_path, tiered.served.spec.boot_id).serving
        assert (serving.read_deadline_s, serving.hold_lost, serving.readahead_pages) == (7.0, True, 8)


def test_a_state_file_without_the_policy_is_served_with_defaults(start_vmm: Start, host: Host) -> None:
    """Killed before it was ever said: zeros there."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
    (path,) = state_files(host)
    from tierd.native._native import ffi  # the layout's offset, which only C knows

    size = ffi.sizeof("struct tierd_serving")
    data = path.read_bytes()
    at = data.rfind(b"\x01\0\0\0", 0, 65536)
    while at >= 0 and int.from_bytes(data[at + 8 : at + 16], "little") != 0:
        at = data.rfind(b"\x01\0\0\0", 0, at)
    path.write_bytes(data[:at] + bytes(size) + data[at + size :])
    with host.adopted(vmm) as tiered:
        vmm.verify()


def test_a_guest_in_many_mappings_is_one_range(start_vmm: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that are registered MISSING and others that are not are mappings of their own, thousands in a large guest."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    spec = vmm.spec()
    (region,) = spec.regions
    (mapping,) = [m for m in maps_of(vmm.pid) if m.inode == region.inode]
    pieces = [
        replace(mapping, start=at, end=at + PAGE, offset=at - mapping.start + mapping.offset)
        for at in range(mapping.start, mapping.end, PAGE)
    ]
    monkeypatch.setattr("tierd.attach.procfs.maps_of", lambda pid: pieces)
    assert still_mapped(spec) == [(region.address, region.bytes)]
    del pieces[5]
    assert still_mapped(spec) == [(region.address, 5 * PAGE), (region.address + 6 * PAGE, region.bytes - 6 * PAGE)]
