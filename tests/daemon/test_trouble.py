# SPDX-License-Identifier: Apache-2.0
"""Deaths and damage around the real daemon: whatever dies, and whenever, the guests that are left never lose a byte."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.process import OURS, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, userfaultfds, wait_for
from tierd.client import Client, Declined, guest_path

KILLS = 4


def state_file(daemon: Daemon, pid: int) -> Path:
    (path,) = (daemon.runtime_dir / "guests").glob(f"{pid}-*.state")
    return path


def test_killed_again_and_again_while_guests_work(daemon: Daemon, boot: Boot) -> None:
    """Their threads check everything they read, and wait where nobody serves them."""
    vmms = [boot("a", 32 * MIB), boot("b", 16 * MIB)]
    for vmm in vmms:
        vmm.ask("hot", 0, 1000)  # the rest is cold
        vmm.ask("run", 500, 50)
    daemon.start()
    for _ in range(KILLS):
        wait_for(lambda: all(daemon.stored_bytes(name) > MIB for name in "ab"), "pages of both are stored")
        daemon.kill()
        daemon.start()
    assert len(daemon.logged("guest_adopted")) == KILLS * len(vmms)
    assert not any(entry["lost_pages"] for entry in daemon.logged("guest_adopted"))
    for vmm in vmms:
        vmm.ask("stop")
        vmm.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    for vmm in vmms:
        vmm.verify()


NO_VMM = """
import mmap, os, sys
fd = os.memfd_create("x\\rzzz a b c:d e f")
os.ftruncate(fd, 1 << 24)
memory = mmap.mmap(fd, 1 << 24)
sys.stdin.read()
"""


def test_a_process_that_is_made_to_mislead(daemon: Daemon, boot: Boot) -> None:
    """It calls itself a VMM that a rule is for, and its mappings what no parser expects; who is it but any user's?"""
    web = boot("web")
    daemon.start()
    daemon.wait_active("web")
    command = ["qemu-system-x86_64", "-c", NO_VMM, "-name", f"web{OURS}"]
    with subprocess.Popen(command, executable=sys.executable, stdin=subprocess.PIPE) as process:
        wait_for(lambda: [e for e in daemon.logged("guest_refused") if e["pid"] == process.pid], "it is refused")
    evicted(daemon, "web", web)
    web.verify()


def test_a_broken_state_file_is_told_and_nothing_is_touched(daemon: Daemon, boot: Boot) -> None:
    """Its guest waits for an operator; the other guest does not."""
    broken, good = boot("broken"), boot("good")
    daemon.start()
    evicted(daemon, "broken", broken)
    evicted(daemon, "good", good)
    daemon.kill()
    path = state_file(daemon, broken.pid)
    before = path.read_bytes()
    damaged = before[:24] + bytes([before[24] ^ 1]) + before[25:]  # a bit of the VMM's pid
    path.write_bytes(damaged)
    daemon.start()
    (refused,) = daemon.logged("state_refused")
    assert f"{path} is broken" in refused["error"]
    good.verify()
    found = wait_for(
        lambda: (guest := daemon.guests().get("broken")) and guest["state"] == "refused" and guest,
        "it is found by its name, as any guest, and refused",
    )
    assert "registered with a userfaultfd already" in found["reason"]
    assert path.read_bytes() == damaged
    assert len(list(daemon.store_dir.iterdir())) == 2
    daemon.kill()
    path.write_bytes(before)
    daemon.start()
    broken.verify()


@pytest.mark.parametrize("order", ["detach", "SIGTERM"])
def test_the_vmm_dies_while_it_is_brought_back(daemon: Daemon, boot: Boot, order: str) -> None:
    doomed, other = boot("doomed", 256 * MIB), boot("other")
    daemon.start()
    evicted(daemon, "doomed", doomed)
    evicted(daemon, "other", other)

    def kill(done_bytes: int, total_bytes: int) -> None:
        doomed.process.kill()

    if order == "SIGTERM":
        daemon.signal(signal.SIGTERM)
        daemon.wait_told("EXTEND_TIMEOUT_USEC")
        kill(0, 0)
    else:
        with Client(daemon.socket) as client, contextlib.suppress(Declined):  # done already, or the VMM is gone
            client.run("DELETE", guest_path(f"doomed{OURS}"), None, kill)
        doomed.process.wait()
        wait_for(lambda: "doomed" not in daemon.guests(), "the dead guest is gone")
        assert daemon.guests()["other"]["state"] == "active"
        other.verify()
        daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not list(daemon.store_dir.iterdir())
    assert not list((daemon.runtime_dir / "guests").iterdir())
    assert not userfaultfds(other.pid)
    other.verify()


@pytest.mark.parametrize("order", ["detach", "SIGTERM"])
def test_a_vmm_that_is_stopped_is_left(daemon: Daemon, boot: Boot, order: str) -> None:
    """No call can be made inside it, so a descriptor of no use stays open there. Its pages are back."""
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    path = state_file(daemon, vmm.pid)
    vmm.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, vmm.pid, os.WSTOPPED)
    if order == "detach":
        done = daemon.tierd("detach", f"web{OURS}")
        assert done.returncode == 0, done.stderr
    else:
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert not path.exists()
    assert not list(daemon.store_dir.iterdir())
    (entry,) = daemon.logged("descriptor_left_behind")
    assert [str(entry["descriptor"])] == userfaultfds(vmm.pid)
    vmm.process.send_signal(signal.SIGCONT)
    vmm.verify()
