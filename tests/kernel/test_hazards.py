# SPDX-License-Identifier: Apache-2.0
"""Every row of the hazards table, provoked: the guest is refused with the cause, the evidence and a remedy, and is taken once
the hazard is gone. What this machine cannot really have (VFIO, nested KVM, a vhost-user device) is told by its traces."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.kernel.host_memory import THP, large_shmem, scratch_swap, swapped_kb
from tests.kernel.vmm import MIB, PAGE, SAFE, Host, Vmm, need_anonymous, wait_for
from tests.need import need
from tierd.attach import GuestSpec, Refused
from tierd.attach import preflight as checks
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import CHECKS, findings, preflight, recheck, swap_can_receive
from tierd.attach.procfs import maps_of, read_spec
from tierd.attach.ptrace import pick_thread
from tierd.engine import choose
from tierd.engine.stock import StockEngine
from tierd.native import KernelError, Zap, probe

Start = Callable[..., Vmm]


def refused(spec: GuestSpec) -> Refused:
    """With the stock engine, which takes less than the others."""
    with pytest.raises(Refused) as caught:
        preflight(spec, SAFE, HolderScan(), choose("stock"))
    assert caught.value.cause
    assert caught.value.remedy
    assert caught.value.check in str(caught.value)
    return caught.value


def accepted(spec: GuestSpec) -> None:
    preflight(spec, SAFE, HolderScan(), choose("stock"))
    assert [name for name, problem in findings(spec, SAFE, HolderScan(), choose("stock")) if problem] == []


@dataclass(frozen=True)
class Hazard:
    """`do` in the VMM makes it, `undo` ends it; `check` refuses, with `evidence` in the text."""

    check: str
    do: str
    undo: str | None
    evidence: str
    arguments: tuple[int, ...] = (0, 1)
    every_cycle: bool = False


HAZARDS = [
    Hazard("second-mapping", "map-second", "unmap-second", "rw-s", arguments=(0,), every_cycle=True),
    Hazard("private-mapping", "map-second", "unmap-second", "rw-p", arguments=(1,), every_cycle=True),
    Hazard("second-mapper", "fork", "end-child", "maps it", arguments=(), every_cycle=True),
    Hazard("mlock", "lock", "unlock", "VmLck"),
    Hazard("pinned", "pin", "unpin", "VmPin", every_cycle=True),
    Hazard("registered", "register", "unregister", "VmFlags"),
    Hazard("seccomp", "filter", None, "Seccomp 2", arguments=()),
    Hazard("large-folios", "collapse", None, "PmdMapped", arguments=(0, 512)),
]


@pytest.mark.parametrize("hazard", HAZARDS, ids=lambda h: h.check)
def test_made_by_the_vmm(start_vmm: Start, hazard: Hazard) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    spec = vmm.spec()
    accepted(spec)
    vmm.ask(hazard.do, *hazard.arguments)
    found = refused(spec)
    assert found.check == hazard.check
    assert hazard.evidence in found.evidence
    assert str(vmm.pid) in found.evidence or hazard.check == "second-mapper"
    if hazard.every_cycle:
        with pytest.raises(Refused) as caught:
            recheck(spec, SAFE, HolderScan())
        assert caught.value.check == hazard.check
    if hazard.undo:
        vmm.ask(hazard.undo, *hazard.arguments)
        accepted(spec)
        recheck(spec, SAFE, HolderScan())


def test_all_memory_mapped_twice(start_vmm: Start) -> None:
    """A second mapping of everything looks like a second region."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    spec = vmm.spec()
    vmm.ask("map-second", 0, vmm.pages)
    found = refused(vmm.spec())
    assert found.check == "second-mapping"
    assert "overlap" in found.evidence
    with pytest.raises(Refused) as caught:
        recheck(spec, SAFE, HolderScan())
    assert caught.value.check == "second-mapping"
    vmm.ask("unmap-second")
    accepted(vmm.spec())


def test_a_qemu_in_its_own_sandbox(start_vmm: Start, host: Host) -> None:
    """QEMU's filter is known to allow what we call; the same filter of somebody else is refused."""
    vmm = start_vmm(f"bytes={4 * MIB}", "-sandbox", "on", arg0="/usr/bin/qemu-system-x86_64")
    vmm.ask("fill")
    vmm.ask("filter")
    accepted(vmm.spec())
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    assert refused(replace(vmm.spec(), cmdline=("cloud-hypervisor", "-sandbox", "on"))).check == "seccomp"


def test_a_holder_that_does_not_map_yet(start_vmm: Start) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    link = next(e for e in Path(f"/proc/{vmm.pid}/fd").iterdir() if "memory-backend" in os.readlink(e))
    with link.open("rb") as ours:
        holder = subprocess.Popen(["sleep", "60"], pass_fds=[ours.fileno()])
    try:
        found = refused(vmm.spec())
        assert found.check == "second-mapper"
        assert f"pid {holder.pid} (sleep) descriptor" in found.evidence
    finally:
        holder.kill()
        holder.wait()
    accepted(vmm.spec())


def test_a_mapping_that_is_replaced(start_vmm: Start) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    spec = vmm.spec()
    vmm.ask("replace", 16)
    with pytest.raises(Refused) as caught:
        recheck(spec, SAFE, HolderScan())
    assert caught.value.check == "regions"


def test_who_holds_the_files_of_several_guests() -> None:
    """As the VMM of one guest may that maps another's memory: it is seen at each of them."""
    fds = [os.memfd_create(f"guest {i}") for i in range(2)]
    files = [(info.st_dev, info.st_ino) for info in map(os.fstat, fds)]
    with subprocess.Popen(["sleep", "60"], pass_fds=fds) as holder:
        try:
            scan = HolderScan()
            for file in files:
                assert [found.pid for found in scan.holders([file], set())] == [holder.pid]
            assert [found.pid for found in scan.holders(files, set())] == [holder.pid] * 2
        finally:
            holder.kill()
            for fd in fds:
                os.close(fd)


NAMED = """
import mmap, os, sys
fd = os.memfd_create(sys.argv[-1])
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
os.close(fd)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def mapping_named(name: str) -> Iterator[int]:
    """A process that maps a memfd of that name; its pid."""
    command = [sys.executable, "-c", NAMED, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid


@pytest.mark.parametrize("before", ["", "a\r7f0000000000-7f0000001000 rw-s 00000000 "])
def test_a_mapping_whose_name_looks_like_a_guests_memory(before: str) -> None:
    """Whoever may start a process may choose it: no guest is to be refused for that."""
    fd = os.memfd_create("guest")
    info = os.fstat(fd)
    file = (info.st_dev, info.st_ino)
    text = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x} {info.st_ino} "
    with mapping_named(f"{before}{text}x") as pid:
        assert text in Path(f"/proc/{pid}/maps").read_text()
        assert HolderScan().holders([file], set()) == []
    os.close(fd)


@pytest.mark.parametrize("name", ["x\rzzz a b c:d e f", "x\x0c1-2 a b c:d e f", "x\x85y", "x\udcfcy"])
def test_a_name_that_looks_like_a_line_of_maps(name: str) -> None:
    with mapping_named(name) as pid:
        lines = Path(f"/proc/{pid}/maps").read_bytes().split(b"\n")
        assert len(maps_of(pid)) == len([line for line in lines if line])
        assert [found for found in maps_of(pid) if found.path == f"/memfd:{name} (deleted)"]


def test_a_private_mapping_of_a_file_is_no_memory_to_tier(start_vmm: Start) -> None:
    """Its pages are neither the file's nor anonymous in the eyes of /proc; and rfc would destroy what it deactivates there."""
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=private")
    for engine in (choose("stock"), choose()):
        with pytest.raises(Refused) as caught:
            preflight(vmm.spec(), SAFE, HolderScan(), engine)
        assert caught.value.check == "memory"
        assert "rw-p" in caught.value.evidence
        assert "share" in caught.value.remedy


def test_anonymous_memory_where_it_cannot_be_moved(start_vmm: Start) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous")
    unable = StockEngine(replace(probe(), anonymous=errno.EOPNOTSUPP), tried=False)
    with pytest.raises(Refused) as caught:
        preflight(vmm.spec(), SAFE, HolderScan(), unable)
    assert caught.value.check == "backing"
    assert f"{vmm.addresses[0]:#x}, 4 MiB" in caught.value.evidence
    assert "UFFDIO_MOVE" in caught.value.remedy


def test_memory_in_a_file_on_a_disk(start_vmm: Start, disk_dir: Path) -> None:
    path = disk_dir / "ram"
    vmm = start_vmm(
        f"bytes={4 * MIB}", f"kind=file:{path}", "-object", f"memory-backend-file,id=r,mem-path={path},share=on"
    )
    assert refused(vmm.spec()).check == "backing"


def test_a_tmpfs_with_large_folios(start_vmm: Start, tmp_path: Path) -> None:
    mount = tmp_path / "huge"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always,size=64m", "tmpfs", str(mount)], check=True)
    try:
        path = mount / "ram"
        vmm = start_vmm(
            f"bytes={4 * MIB}", f"kind=file:{path}", "-object", f"memory-backend-file,id=r,mem-path={path},share=on"
        )
        found = refused(vmm.spec())
        assert found.check == "large-folios"
        assert "huge=always" in found.evidence
        vmm.kill()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("value", ["advise", "always", "within_size"])
def test_a_host_that_makes_large_folios(start_vmm: Start, value: str) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    with large_shmem(value):
        found = refused(vmm.spec())
        assert found.check == "large-folios"
        assert f"shmem_enabled is {value}" in found.evidence
        assert "echo never" in found.remedy
    accepted(vmm.spec())


def test_a_host_that_makes_large_folios_of_one_size(start_vmm: Start) -> None:
    path = THP / "hugepages-64kB" / "shmem_enabled"
    need("kernel", path.exists(), "this kernel has no setting for each size")
    vmm = start_vmm(f"bytes={4 * MIB}")
    with large_shmem("always", path):
        found = refused(vmm.spec())
        assert found.check == "large-folios"
        assert f"{path} is always" in found.evidence
        with pytest.raises(Refused, match="always"):
            recheck(vmm.spec(), SAFE, HolderScan(), choose("stock"))
    with large_shmem("inherit", path):
        accepted(vmm.spec())  # of the setting for all sizes, which is never
        with large_shmem("advise"):
            assert refused(vmm.spec()).check == "large-folios"
    accepted(vmm.spec())


def test_a_traced_vmm(start_vmm: Start) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    script = (
        "import ctypes, sys, time; libc = ctypes.CDLL(None, use_errno=True); "
        "assert not libc.ptrace(0x4206, int(sys.argv[1]), 0, 0); print('traced', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(vmm.pid)], stdout=subprocess.PIPE) as tracer:
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"traced\n"
            found = refused(vmm.spec())
            assert found.check == "tracer"
            assert f"TracerPid {tracer.pid}" in found.evidence
        finally:
            tracer.kill()
    accepted(vmm.spec())


def test_another_process_of_the_same_pid(start_vmm: Start) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    assert refused(replace(vmm.spec(), start_ticks=vmm.spec().start_ticks - 1)).check == "alive"


def test_no_such_process() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ProcessLookupError, match=f"no process {process.pid}"):
        read_spec(process.pid)


def test_anonymous_memory_that_is_locked(start_vmm: Start) -> None:
    need_anonymous()
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous")
    accepted(vmm.spec())
    vmm.ask("lock", 0, 1)
    found = refused(vmm.spec())
    assert (found.check, "VmLck" in found.evidence) == ("mlock", True)
    vmm.ask("unlock", 0, 1)
    accepted(vmm.spec())


@pytest.mark.parametrize("other", [True, False])
def test_calls_are_not_made_by_a_vcpu_if_another_thread_is_there(other: bool) -> None:
    """QEMU's first thread may bear such a name, too, and a vCPU that is stopped is the guest that stands."""
    name = "worker" if other else "CPU 1/KVM"
    script = (
        "import threading, time; from pathlib import Path\n"
        f"def run(): Path(f'/proc/self/task/{{threading.get_native_id()}}/comm').write_text('{name}'); "
        "print(threading.get_native_id(), flush=True); time.sleep(1000)\n"
        "Path('/proc/self/comm').write_text('CPU 0/KVM')\n"
        "threading.Thread(target=run).start()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            tid = int(child.stdout.readline())
            assert tid != child.pid
            assert pick_thread(child.pid) == (tid if other else child.pid)
        finally:
            child.kill()


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_a_memory_cgroup_at_its_limit(start_vmm: Start, kind: str) -> None:
    if kind == "anonymous":
        need_anonymous()
    root = Path("/sys/fs/cgroup/memory")
    need("kernel", (root / "memory.limit_in_bytes").exists(), "no memory cgroup (version 1) here")
    group = root / f"tierd-test-{os.getpid()}"
    group.mkdir()
    try:
        vmm = start_vmm(f"bytes={256 * MIB}", f"kind={kind}")
        (group / "memory.limit_in_bytes").write_text(str(128 * MIB))
        (group / "cgroup.procs").write_text(str(vmm.pid))
        vmm.ask("fill", 0, 80 * MIB // PAGE)
        found = refused(vmm.spec())
        assert found.check == "memory-cgroup"
        assert "limit 128 MiB" in found.evidence
        (group / "memory.limit_in_bytes").write_text(str(512 * MIB))
        accepted(vmm.spec())
        vmm.kill()
    finally:
        wait_for(lambda: not (group / "cgroup.procs").read_text(), "the cgroup is empty")
        group.rmdir()


def test_by_their_traces(start_vmm: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = start_vmm(f"bytes={4 * MIB}").spec()
    found = refused(replace(spec, cmdline=("qemu", "-device", "vhost-user-fs-pci,chardev=c,tag=t")))
    assert (found.check, "vhost-user-fs-pci" in found.evidence) == ("vhost-user", True)
    real = os.readlink

    def with_vfio(path: str, **kwargs: int) -> str:
        return "/dev/vfio/12" if str(path).startswith(f"/proc/{spec.pid}/fd/") else real(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checks.os, "readlink", with_vfio)
        assert refused(spec).check == "vfio"
        with pytest.raises(Refused, match="/dev/vfio/12"):  # plugged in later
            recheck(spec, SAFE, HolderScan())
    for words in (
        ("qemu-system-x86_64", "-object", "sev-guest,id=sev0,cbitpos=51"),
        ("qemu-system-x86_64", "-machine", "q35,confidential-guest-support=lsec0"),
        ("cloud-hypervisor", "--platform", "num_pci_segments=1,sev_snp=on"),
    ):
        found = refused(replace(spec, cmdline=words))
        assert (found.check, words[2] in found.evidence) == ("confidential", True)
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_readlink", lambda path: "/dev/sev")
        assert refused(spec).check == "confidential"
    text = checks.read_proc

    def nested_on(path: str | Path, default: str = "") -> str:
        return "Y" if str(path) == "/sys/module/kvm_intel/parameters/nested" else text(path, default)

    with monkeypatch.context() as patch:
        patch.setattr(checks, "read_proc", nested_on)
        patch.setattr(checks, "_readlink", lambda path: "anon_inode:kvm-vm")
        nested = replace(spec, cmdline=("qemu-system-x86_64", "-cpu", "host"))
        assert refused(nested).check == "nested"
        accepted(replace(spec, cmdline=("qemu-system-x86_64", "-cpu", "host,-vmx")))
        preflight(nested, SAFE.model_copy(update={"allow_nested": True}), HolderScan(), choose("stock"))


def test_every_check_is_provoked_here() -> None:
    """A new check needs a new test."""
    tested = {
        *("alive", "tracer", "seccomp", "backing", "private_mapping", "second_mapping", "other_holders", "vhost_user"),
        *("confidential", "vfio", "pins", "mlocked", "large_folios", "registered", "memory_cgroup", "nested"),
    }
    assert {check.__name__ for check in CHECKS} == tested


# --- swap -------------------------------------------------------------------------------------------------------------------


def test_with_swap_nothing_is_swapped_out(start_vmm: Start, host: Host, disk_dir: Path) -> None:
    """MADV_PAGEOUT from outside would write the guest's memory to swap: the call is made inside the VMM instead."""
    vmm = start_vmm(f"bytes={16 * MIB}")
    vmm.ask("fill")
    assert not swap_can_receive(vmm.pid)
    with scratch_swap(disk_dir):
        assert swap_can_receive(vmm.pid)
        with host.attached(vmm) as tiered:
            assert tiered.served.zap is Zap.INJECT
            tiered.scan()
            assert swapped_kb(vmm.pid) == 0
            tiered.evict_all()
            assert swapped_kb(vmm.pid) == 0
            vmm.verify()
            tiered.leave()
    vmm.verify()


def test_swap_that_comes_later_receives_nothing(start_vmm: Start, host: Host, disk_dir: Path) -> None:
    vmm = start_vmm(f"bytes={16 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered, scratch_swap(disk_dir):
        assert tiered.served.zap is Zap.PAGEOUT
        tiered.served.adapt(swap_can_receive(vmm.pid))  # as before every cycle
        assert tiered.served.zap is Zap.INJECT
        tiered.scan()
        assert swapped_kb(vmm.pid) == 0
        vmm.verify()


# --- hazards that come after the attach -------------------------------------------------------------------------------------


def test_a_page_with_an_extra_reference_is_not_lost(start_vmm: Start, host: Host) -> None:
    """A pipe holds a page (vmsplice): no counter shows it. Its bytes come back all the same."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        vmm.ask("splice", 77)
        tiered.scan()
        tiered.evict()
        vmm.verify()
        vmm.ask("unsplice")
        tiered.leave()


def test_a_stopped_vmm_stays_stopped(start_vmm: Start, host: Host) -> None:
    """SIGSTOP is not ours to end; an attach says so and leaves nothing."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    os.kill(vmm.pid, signal.SIGSTOP)
    state = lambda: Path(f"/proc/{vmm.pid}/stat").read_text().rpartition(")")[2].split()[0]  # noqa: E731
    wait_for(lambda: state() == "T", "stopped")
    with pytest.raises(OSError) as caught, host.attached(vmm):
        pass
    assert caught.value.errno == 11
    wait_for(lambda: state() == "T", "stopped again, as a tracer leaves it")
    os.kill(vmm.pid, signal.SIGCONT)
    with host.attached(vmm) as tiered:
        vmm.verify()
        tiered.leave()


def test_a_stopped_vmm_makes_nobody_wait_inside(start_vmm: Start, host: Host) -> None:
    """Where pages are deactivated by calls inside the VMM, its stop is an error of that pass, not a worker that spins."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, zap=Zap.INJECT) as tiered:
        os.kill(vmm.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, vmm.pid, os.WSTOPPED)
        with pytest.raises(KernelError) as caught:
            tiered.scan()
        assert caught.value.errno == errno.EAGAIN
        os.kill(vmm.pid, signal.SIGCONT)
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
