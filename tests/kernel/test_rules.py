# SPDX-License-Identifier: Apache-2.0
"""The design's rules that only the real kernel can prove: what it does when a punch fails, a device fills up, the VMM punches
its own memory or dies between two steps.

Rule 8, direct I/O in flight into an idle page, has no test: nothing in the stock interface shows it. `min_idle_s` stands for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.kernel.disks import damaged, loop_disk, sparse
from tests.kernel.host_memory import large_folios_kb
from tests.kernel.vmm import MIB, PAGE, SAFE, SLOWNESS, Host, Tiered, Vmm, userfaultfds, vm_flags, wait_for
from tests.need import need
from tierd.attach import Refused
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import recheck
from tierd.cycle import BATCHES
from tierd.engine import choose
from tierd.native import GUEST_TIER, KernelError, Zap

Start = Callable[..., Vmm]


@contextlib.contextmanager
def cycling(tiered: Tiered) -> Iterator[threading.Thread]:
    """Evicts everything that is not touched at once, again and again, in the guest's worker thread. Its error is ours."""
    end, failed = threading.Event(), []

    def work() -> None:
        try:
            while not end.is_set():
                tiered.scan()
                tiered.evict()
                tiered.discard()
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield worker
    finally:
        end.set()
        worker.join()
    if failed:
        raise failed[0]


# --- 6: a punch can fail silently --------------------------------------------------------------------------------------------


@pytest.fixture
def huge_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that makes large folios wherever it can. What uses it must have ended."""
    need("root", os.geteuid() == 0, "mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always,size=64m,mode=0700", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("zap", [Zap.PAGEOUT, Zap.INJECT], ids=lambda z: z.name.lower())
def test_a_punch_that_does_not_punch_is_repaired(huge_tmpfs: Path, vmm_binary: Path, host: Host, zap: Zap) -> None:
    """One page of a large folio is punched while something else (a pipe) refers to the folio: the kernel says 0, zeroes the
    bytes and leaves them cached. Preflight refuses such guests; here it is passed over, as a folio that came later would."""
    ram = huge_tmpfs / "ram"
    with Vmm(
        vmm_binary, f"bytes={4 * MIB}", f"kind=file:{ram}", "-object", f"memory-backend-file,id=r,mem-path={ram}"
    ) as vmm:
        vmm.ask("fill")
        need("kernel", large_folios_kb(vmm.pid) > 0, "this kernel makes no large folios of shared memory")
        vmm.ask("splice", 77)
        with host.attached(vmm, in_spite_of_preflight=True, zap=zap) as tiered:

            def punched() -> bool:
                tiered.scan()
                tiered.evict(max_bytes=16 * PAGE)  # not a whole folio: that could be punched whole
                return bool(tiered.counters()["pages_repaired"])

            wait_for(punched, "a punch that does not punch")
            vmm.verify()
            vmm.ask("unsplice")
            tiered.evict_all()
            vmm.verify()
            tiered.leave()
        vmm.verify()


# --- 5: a write that returned is not stored ----------------------------------------------------------------------------------


DIRECT = pytest.mark.parametrize("direct", ["on", "off"])


@DIRECT
def test_a_file_system_that_is_full_loses_nothing(
    vmm_binary: Path, disk_dir: Path, tmpfs_dir: Path, direct: Literal["on", "off"]
) -> None:
    """The pages that do not fit stay with the guest; the others come back."""
    image = disk_dir / "image"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 32 * MIB)
    with loop_disk(disk_dir, image) as mount, Vmm(vmm_binary, f"bytes={48 * MIB}") as vmm:
        vmm.ask("fill")
        with Host(tmpfs_dir, mount).attached(vmm, direct=direct) as tiered:
            assert tiered.served.tiers["file"].space.direct == (direct == "on")
            tiered.scan()
            with pytest.raises(KernelError) as caught:
                tiered.evict()
            assert caught.value.errno == errno.ENOSPC
            c = tiered.counters()
            assert 1 <= c["store_write_errors"] <= BATCHES
            assert 0 < c["state_pages"][4] < 32 * MIB // PAGE
            assert c["state_pages"][0] + c["state_pages"][4] == vmm.pages, "nothing stays half way"
            vmm.verify()
            assert tiered.counters()["pages_lost"] == 0
            tiered.discard()  # and there is room again
            tiered.scan()
            assert tiered.evict(max_bytes=8 * MIB) == 8 * MIB // PAGE
            vmm.verify()
            tiered.leave()
            tiered.served.forget()
        vmm.verify()


@DIRECT
def test_a_file_system_that_turns_read_only_loses_nothing(
    vmm_binary: Path, disk_dir: Path, tmpfs_dir: Path, direct: Literal["on", "off"]
) -> None:
    """What ext4 does when it finds itself damaged. What is stored comes back, the rest stays with the guest."""
    image = sparse(disk_dir / "image", 128 * MIB)
    with loop_disk(disk_dir, image, errors="remount-ro") as mount, Vmm(vmm_binary, f"bytes={16 * MIB}") as vmm:
        vmm.ask("fill")
        with Host(tmpfs_dir, mount).attached(vmm, direct=direct) as tiered:
            tiered.scan()
            stored = tiered.evict(max_bytes=8 * MIB)
            assert stored > 0
            damaged(mount)
            tiered.scan()
            with pytest.raises(KernelError) as caught:
                tiered.evict()
            assert caught.value.errno == errno.EROFS
            c = tiered.counters()
            assert c["state_pages"][4] == stored
            assert c["state_pages"][0] == vmm.pages - stored, "nothing stays half way"
            Path("/proc/sys/vm/drop_caches").write_text("1")
            vmm.verify()
            assert tiered.counters()["pages_lost"] == 0
            tiered.leave()
            assert tiered.served.undeleted["file"].errno == errno.EROFS
        assert not userfaultfds(vmm.pid)
        vmm.verify()


@DIRECT
def test_a_device_that_lies_is_a_memory_error(
    vmm_binary: Path, disk_dir: Path, tmpfs_dir: Path, direct: Literal["on", "off"]
) -> None:
    """A thinly provisioned device that has run out: a loop device calls a short write to its file a success, no sync says
    otherwise. Whatever that destroyed is a memory error in the guest, never zeros and never older bytes."""
    pool = disk_dir / "pool"
    pool.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", pool], check=True)
    try:
        image = sparse(pool / "image", 128 * MIB)
        with loop_disk(disk_dir, image) as mount, Vmm(vmm_binary, f"bytes={48 * MIB}") as vmm:
            vmm.ask("fill")
            with Host(tmpfs_dir, mount).attached(vmm, direct=direct) as tiered:
                tiered.scan()
                with pytest.raises(KernelError) as caught:
                    tiered.evict()
                # the file system may see what became of its own blocks, and let nobody write any more
                assert caught.value.errno in (errno.EIO, errno.ENOSPC, errno.EROFS)
                assert tiered.counters()["state_pages"][4] > 0
                Path("/proc/sys/vm/drop_caches").write_text("1")  # so that the device itself must answer
                vmm.send("verify")
                ended = wait_for(lambda: vmm.process.poll() or vmm.answered(), "every page read")
                assert not vmm.wrong
                lost = tiered.counters()["pages_lost"]
                assert (ended == -signal.SIGBUS) == (lost > 0)
    finally:
        subprocess.run(["umount", "--lazy", pool], check=True)  # another's copy of our mounts may have the disk still


# --- 14: registration --------------------------------------------------------------------------------------------------------


def test_missing_comes_with_write_protection_and_by_chunk(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={128 * MIB}")
    here, there = vmm.addresses[0], vmm.addresses[0] + 64 * MIB
    vmm.ask("fill", 0, 64)
    # VmFlags of proc_pid_smaps(5): at attach, and for a chunk from which pages may leave
    first, later = {"stock": ("uw", "um uw"), "rwp": ("ur", "um ui ur"), "rfc": ("ui uw", "um ui uw")}[choose().name]

    def modes(address: int) -> str:
        return " ".join(sorted(vm_flags(vmm.pid, address) & {"um", "uw", "ui", "ur"}, key="um ui uw ur".index))

    with host.attached(vmm) as tiered:
        assert modes(here) == first
        tiered.evict_all()
        if here % (64 * MIB) == 0:  # chunks count from the guest's first page
            assert tiered.counters()["missing_chunks"] == 1
        assert modes(here) == later, "REGISTER replaces the modes that it knows"
        assert modes(there) == first
        recheck(tiered.served.spec, SAFE, HolderScan())  # the mapping is in pieces now, and still the same
    with host.adopted(vmm) as tiered:
        assert modes(here) == later
        vmm.verify()


# --- coming back while the guest works ---------------------------------------------------------------------------------------


def test_a_busy_guest_is_restored_and_left(start_vmm: Start, host: Host) -> None:
    """What an operator's detach does: every page comes back and nothing of us stays, while the guest never stops working."""
    vmm = start_vmm(f"bytes={16 * MIB}", "regions=2", "threads=3")
    vmm.ask("fill")
    vmm.ask("zero", 64, 64)
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("run", 200, 50)  # else its faults bring most of it, where we have to wait for a CPU
        tiered.restore_all()
        c = tiered.counters()
        assert c["pages_restored"] > vmm.pages / 2
        assert c["state_pages"][4] == c["pages_lost"] == c["kernel_errors"] == 0
        tiered.served.leave()
        tiered.served.forget()
    before = vmm.stats()["operations"]
    wait_for(lambda: vmm.stats()["operations"] > before + 1000, "the guest goes on without us")
    vmm.ask("stop")
    vmm.verify()
    assert not userfaultfds(vmm.pid)
    assert all(not vm_flags(vmm.pid, address) & {"um", "uw", "ui"} for address in vmm.addresses)


def test_a_guest_is_left_while_it_faults(start_vmm: Start, host: Host) -> None:
    """A fault in service is no reason not to leave: a guest that stays registered with nobody to serve it hangs."""
    vmm = start_vmm(f"bytes={4 * MIB}", "threads=1")
    vmm.ask("fill")
    for _ in range(10):
        with host.attached(vmm) as tiered:
            tiered.evict_all()
            vmm.send("balloon", 512, 512, 10)  # a fault for each page
            tiered.restore_all()
            tiered.served.leave()
            tiered.served.forget()
        wait_for(vmm.answered, "the guest goes on")
        assert not userfaultfds(vmm.pid)
    vmm.verify()


# --- the VMM gives memory back itself ----------------------------------------------------------------------------------------


BALLOON_ROUNDS = int(20 / SLOWNESS)


def test_a_balloon_under_eviction(start_vmm: Start, host: Host) -> None:
    """Its pages are punched, read and written by the VMM at whatever point of an eviction they are just then."""
    vmm = start_vmm(f"bytes={4 * MIB}", "threads=2")
    vmm.ask("fill")
    vmm.ask("hot", 0, 512)
    rounds = zeros = kept = 0
    with host.attached(vmm) as tiered:
        vmm.ask("run", 2000, 50)
        with cycling(tiered):
            while not rounds or tiered.counters()["pages_evicted"] <= 512:
                found = vmm.ask("balloon", 512, 512, BALLOON_ROUNDS)
                rounds, zeros, kept = rounds + BALLOON_ROUNDS, zeros + found[0], kept + found[1]
        vmm.ask("stop")
        c = tiered.counters()
        assert zeros
        assert zeros + kept == rounds * 512
        assert c["pages_lost"] == c["checksum_errors"] == c["kernel_errors"] == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_what_was_given_back_is_not_what_the_store_remembers(start_vmm: Start, host: Host) -> None:
    """A page came back and the VMM gave it away: the store's copy of it is no longer the truth, after an adoption neither."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("touch", 0, 64)
        wait_for(lambda: tiered.counters()["stale_pages"] >= 64, "the last of them settled")
        vmm.ask("give-back", 0, 32)
        vmm.ask("verify", 0, 16)
        assert not vmm.wrong
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.leave()


# --- the VMM ends between two steps ------------------------------------------------------------------------------------------

STEPS = ("select", "hold", "copy", "write", "drop", "release")
STEPS_WITH_WINDOWS = ("select", "copy", "write", "window")


@pytest.mark.parametrize("last", [*STEPS, "window"])
def test_a_vmm_that_dies_after_a_step(start_vmm: Start, host: Host, last: str) -> None:
    """The steps that follow say so or do nothing; the batch can be cancelled, and no file stays."""
    steps = STEPS_WITH_WINDOWS if choose().holds_reads else STEPS
    if last not in steps:
        pytest.skip(f"no step of engine {choose().name}")
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch, contextlib.suppress(ProcessLookupError):
            for step in steps:
                try:
                    if step == "select":
                        assert batch.select(GUEST_TIER, 0, 0.0, 512, [1]).selected_pages
                    elif step == "write":
                        batch.write([1])
                        batch.store()
                        batch.stored()
                    elif step == "window":
                        batch.window(20)
                    else:
                        getattr(batch, step)()
                except KernelError as error:
                    assert error.errno in (errno.ESRCH, errno.EFAULT, errno.ENOENT), f"{step}: {error}"
                    with contextlib.suppress(KernelError):
                        batch.cancel()
                    break
                if step == last:
                    vmm.kill()
        tiered.served.forget()
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())


@pytest.mark.parametrize("zap", [Zap.PAGEOUT, Zap.INJECT], ids=lambda z: z.name.lower())
def test_a_busy_vmm_that_is_killed(start_vmm: Start, host: Host, zap: Zap) -> None:
    """With threads in the middle of faults, and our calls in the middle of it."""
    vmm = start_vmm(f"bytes={8 * MIB}", "threads=3")
    vmm.ask("fill")
    with host.attached(vmm, zap=zap) as tiered:
        vmm.ask("run", 0, 50)
        with pytest.raises(KernelError) as caught, cycling(tiered) as worker:
            wait_for(lambda: tiered.counters()["faults_fetch"] > 200, "faults")
            vmm.kill()
            wait_for(lambda: not worker.is_alive(), "the worker has seen it")
        assert caught.value.errno in (errno.ESRCH, errno.EFAULT, errno.ENOENT)
        tiered.served.forget()
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())


# --- a hazard that comes after the attach ------------------------------------------------------------------------------------


def test_a_second_mapper_that_comes_later(start_vmm: Start, host: Host) -> None:
    """The next cycle sees it; everything comes back; when it is gone the guest can be tiered again."""
    vmm = start_vmm(f"bytes={8 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        spec = tiered.served.spec
        tiered.evict_all()
        recheck(spec, SAFE, HolderScan())
        (child,) = vmm.ask("fork")
        with pytest.raises(Refused) as caught:
            recheck(spec, SAFE, HolderScan())
        assert caught.value.check == "second-mapper"
        assert f"pid {child}" in caught.value.evidence
        tiered.restore_all()
        vmm.verify()
        vmm.ask("end-child")
        recheck(spec, SAFE, HolderScan())
        tiered.evict_all()
        vmm.verify()
        tiered.leave()


@pytest.mark.parametrize("use_pagemap", [False, True])
def test_memory_of_the_vmm_s_own_where_the_guest_s_was(start_vmm: Start, host: Host, use_pagemap: bool) -> None:
    """Unmapped after the look at the mappings, which is one a cycle, and before the pass; the VMM's next mmap, a stack say, may
    be given these addresses. Where swap is on, or pages are huge, the pass has MADV_DONTNEED called in there."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, zap=Zap.INJECT, use_pagemap=use_pagemap) as tiered:
        tiered.scan()
        vmm.ask("map-other", 512, 256)
        vmm.ask("fill", 512, 256)
        tiered.scan()
        assert vmm.ask("verify", 512, 256)[1] == 0
