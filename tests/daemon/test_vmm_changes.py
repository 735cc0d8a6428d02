# SPDX-License-Identifier: Apache-2.0
"""A VMM that changes under the real daemon: it executes another program, forks, pins, maps, unmaps and adds memory."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, Vmm, need_anonymous, userfaultfds, wait_for
from tierd.attach.procfs import start_ticks


def test_another_program_under_the_same_pid(daemon: Daemon, boot: Boot) -> None:
    """Pid and start time stay, the memory is gone: nothing of it is kept, and nothing of us gets into the new program."""
    vmm, other = boot("web"), boot("other")
    daemon.start()
    evicted(daemon, "web", vmm)
    evicted(daemon, "other", other)
    vmm.send("exec")
    wait_for(lambda: daemon.logged("guest_ended"), "it is over")
    assert daemon.logged("guest_ended")[0]["pid"] == vmm.pid
    assert "sleep" in Path(f"/proc/{vmm.pid}/comm").read_text()
    assert not userfaultfds(vmm.pid)
    assert not [path for path in daemon.store_dir.iterdir() if str(vmm.pid) in path.name]
    assert not [path for path in (daemon.runtime_dir / "guests").iterdir() if str(vmm.pid) in path.name]
    other.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_another_program_while_no_tierd_runs(daemon: Daemon, boot: Boot) -> None:
    vmm, other = boot("web"), boot("other")
    daemon.start()
    evicted(daemon, "web", vmm)
    evicted(daemon, "other", other)
    daemon.kill()
    vmm.send("exec")
    wait_for(lambda: "sleep" in Path(f"/proc/{vmm.pid}/comm").read_text(), "it is another program")
    daemon.start()
    assert any("executed another program" in entry["why"] for entry in daemon.logged("state_swept"))
    assert not [path for path in daemon.store_dir.iterdir() if str(vmm.pid) in path.name]
    assert not [path for path in (daemon.runtime_dir / "guests").iterdir() if str(vmm.pid) in path.name]
    other.verify()


def test_memory_whose_file_is_gone_too(daemon: Daemon, vmm_binary: Path, tmp_path: Path) -> None:
    """A DIMM was unplugged while no tierd ran: nobody has its bytes, nobody can want them. The rest is served."""
    with two_regions(daemon, vmm_binary, tmp_path, "close") as vmm:
        vmm.ask("fill")
        half = vmm.pages // 2
        daemon.start()
        wait_for(lambda: daemon.stored_bytes("web") == vmm.pages * vmm.page_bytes, "all of it")
        daemon.kill()
        vmm.ask("unmap", half, half)
        daemon.start()
        assert daemon.logged("guest_adopted")
        vmm.ask("verify", 0, half)
        assert not vmm.wrong
        wait_for(lambda: not daemon.stored_bytes("web"), "everything is back")
        assert daemon.tierd("detach", f"web{OURS}").returncode == 0
        assert not userfaultfds(vmm.pid)
        assert not list(daemon.store_dir.iterdir())
        vmm.ask("verify", 0, half)


def test_a_vmm_whose_first_thread_has_ended_lives(tmp_path: Path) -> None:
    """/proc/PID/stat says Z of it; to call it gone would be to delete its stored pages."""
    script = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); "
        f"print('ok', flush=True); ctypes.CDLL(None).syscall({60 if os.uname().machine == 'x86_64' else 93}, 0)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ok\n"
            stat = Path(f"/proc/{child.pid}/stat")
            wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", "its first thread has ended")
            assert start_ticks(child.pid) is not None
        finally:
            os.kill(child.pid, signal.SIGKILL)
    assert start_ticks(child.pid) is None


@pytest.mark.parametrize(
    ("hazard", "undo", "says"),
    [
        ("fork", "end-child", "another process holds"),
        ("pin", "unpin", "pinned"),
        ("map-second", "unmap-second", "twice"),
    ],
)
def test_a_hazard_that_appears(daemon: Daemon, boot: Boot, hazard: str, undo: str, says: str) -> None:
    """No more evictions, everything is brought back, and it is said why."""
    vmm = boot("web")
    vmm.ask("zero", 0, 1)  # what the second mapping may touch
    daemon.start()
    evicted(daemon, "web", vmm)
    vmm.ask(hazard)
    (entry,) = wait_for(lambda: daemon.logged("guest_refused"), "it is seen")
    assert says in entry["reason"]
    wait_for(lambda: not daemon.stored_bytes("web"), "everything is back")
    vmm.verify()
    vmm.ask(undo)
    assert daemon.tierd("detach", str(vmm.pid)).returncode == 0
    assert not userfaultfds(vmm.pid)
    vmm.verify()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_filter_that_comes_later(daemon: Daemon, boot: Boot, enabled: bool) -> None:
    """It may kill a VMM of anonymous memory for a call of ours: none is made any more."""
    need_anonymous()
    vmm = boot("web", 16 * MIB, "kind=anonymous")
    daemon.start()
    evicted(daemon, "web", vmm)
    if not enabled:
        daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "enabled": False}])
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: daemon.logged("reloaded"), "no page of it is to leave any more")
    vmm.ask("filter")
    (entry,) = wait_for(lambda: daemon.logged("guest_refused"), "it is seen")
    assert "seccomp filter" in entry["reason"]
    wait_for(lambda: not daemon.stored_bytes("web"), "everything is back")
    vmm.verify()
    assert daemon.tierd("detach", str(vmm.pid)).returncode == 0
    vmm.verify()


def two_regions(daemon: Daemon, vmm_binary: Path, tmp_path: Path, *more: str) -> Vmm:
    qemu = tmp_path / "qemu-system-test"
    qemu.symlink_to(vmm_binary)
    return Vmm(
        vmm_binary, f"bytes={8 * MIB}", "regions=2", *more, "-name", f"guest=web{OURS},debug-threads=on", arg0=str(qemu)
    )


@pytest.mark.parametrize("when", ["while it is served", "while no tierd runs"])
@pytest.mark.parametrize("part", [1, 2])
def test_memory_that_is_unmapped(
    daemon: Daemon,
    vmm_binary: Path,
    tmp_path: Path,
    part: int,
    when: str,
) -> None:
    """A whole region, or the half of it. The rest is served; the bytes of what was unmapped go back into its file, so that a
    mapping that comes later finds them; what is mapped there meanwhile is not touched."""
    with two_regions(daemon, vmm_binary, tmp_path) as vmm:
        vmm.ask("fill")
        half = vmm.pages // 2
        first, count = half, half // part
        daemon.start()
        evicted(daemon, "web", vmm)
        wait_for(lambda: daemon.stored_bytes("web") == vmm.pages * vmm.page_bytes, "all of it")
        if when == "while it is served":
            vmm.ask("unmap", first, count)
        else:
            daemon.kill()
            vmm.ask("map-other", first, count)
            daemon.start()
            assert daemon.logged("guest_adopted")
        (entry,) = wait_for(lambda: daemon.logged("guest_refused"), "it is seen")
        assert "changed its guest's memory mappings" in entry["reason"]
        wait_for(lambda: not daemon.stored_bytes("web"), "everything is back")
        vmm.ask("verify", 0, half)
        done = daemon.tierd("detach", f"web{OURS}")
        assert done.returncode == 0, done.stderr
        assert not userfaultfds(vmm.pid)
        if when != "while it is served":
            assert vmm.ask("verify", first, count)[1] == count, "what the VMM put there is its own: zeros"
            vmm.wrong.clear()
        vmm.ask("map-again", first, count, 1, half)
        vmm.verify()


def test_memory_that_is_added_is_told(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    vmm.ask("add", 8 * MIB)
    (entry,) = wait_for(lambda: daemon.logged("guest_grew"), "it is told")
    assert entry["bytes"] == 8 * MIB
    vmm.verify()
    evicted(daemon, "web", vmm)


def inherit(pid: int) -> subprocess.Popen[bytes]:
    """A process that has it, most likely: others that start just then may be quicker."""
    for _ in range(50):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        heir = subprocess.Popen(["sleep", "1000"])
        if heir.pid == pid:
            break
        heir.kill()
        heir.wait()
    return heir


def test_a_pid_that_is_another_process_now(daemon: Daemon, boot: Boot) -> None:
    """Its state file is swept, the process is left alone."""
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.kill()
    (state,) = (daemon.runtime_dir / "guests").iterdir()
    vmm.kill()
    libc = ctypes.CDLL(None)
    assert libc.kill(vmm.pid, 0) == -1
    with inherit(vmm.pid) as heir:
        try:
            if heir.pid != vmm.pid:
                pytest.skip("another process was quicker to take the pid")
            daemon.start()
            assert "is gone" in daemon.logged("state_swept")[0]["why"]
            assert not state.exists()
            assert not list(daemon.store_dir.iterdir())
            assert heir.poll() is None
        finally:
            heir.kill()
