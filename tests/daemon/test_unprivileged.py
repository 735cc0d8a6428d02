# SPDX-License-Identifier: Apache-2.0
"""tierd and a VMM as an ordinary user, on a kernel whose userfaultfd tracks by itself: attach by handshake needs nothing more.

The one thing that somebody else does is to open /dev/userfaultfd for the VMM, which must not be held to user faults.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.process import POLICY, Daemon, evicted
from tests.kernel.conftest import vmm_binary  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, Vmm, wait_for
from tests.need import need
from tierd.native import probe

NOBODY = 65534
NAME = "handshake"  # as vmm_handshake.c calls itself
AS_NOBODY = (
    *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"),
    *("--inh-caps=-all", "--bounding-set=-all", "--pdeathsig=KILL"),
)


@pytest.fixture(autouse=True)
def machine() -> None:
    need("root", os.geteuid() == 0, "to become an ordinary user takes root")
    found = probe()
    need(
        "sync-mode", not found.rwp or not found.rfc, "this kernel's userfaultfd does not track by itself (engine stock)"
    )


@pytest.fixture
def listening(daemon: Daemon, tmpfs_dir: Path, disk_dir: Path) -> Path:
    """Where `daemon` listens. All that it is given is the user's."""
    path = tmpfs_dir / "handshake.sock"
    daemon.write(handshake={"socket": str(path)}, guests=[], defaults=POLICY)
    for theirs in (tmpfs_dir, disk_dir, daemon.notify_path):
        os.chown(theirs, NOBODY, NOBODY)
    return path


@pytest.fixture
def vmm(listening: Path, disk_dir: Path, vmm_binary: Path) -> Iterator[Vmm]:  # noqa: F811
    binary = disk_dir / "vmm"
    shutil.copy(vmm_binary, binary)  # where the user can execute it
    device = os.open("/dev/userfaultfd", os.O_RDWR)
    try:
        with Vmm(
            *(binary, f"bytes={8 * MIB}", "regions=2", f"handshake={listening}", f"device={device}"),
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            pass_fds=[device],
        ) as vmm:
            vmm.ask("fill")
            yield vmm
    finally:
        os.close(device)


def test_everything_leaves_and_comes_back_without_a_privilege(daemon: Daemon, listening: Path, vmm: Vmm) -> None:
    """One test, because every start takes seconds on the emulated machines where it runs."""
    daemon.start(AS_NOBODY)
    assert daemon.process is not None
    for pid in (daemon.process.pid, vmm.pid):
        status = Path(f"/proc/{pid}/status").read_text()
        assert re.findall(r"^Cap(?:Prm|Eff):\s+(\w+)", status, re.M) == ["0" * 16] * 2
        assert re.search(rf"^Uid:(\s+{NOBODY}){{4}}$", status, re.M)
    vmm.ask("run", 200, 30)
    wait_for(lambda: daemon.stored_bytes(NAME) > 0, "pages leave while the guest works")
    vmm.ask("stop")
    evicted(daemon, NAME, vmm)
    daemon.kill()
    vmm.send("verify")  # what is stored waits for the successor
    daemon.start(AS_NOBODY)
    wait_for(lambda: daemon.logged("guest_adopted"), "it is adopted")
    wait_for(vmm.answered, "its pages come back")
    vmm.verify()
    evicted(daemon, NAME, vmm)
    vmm.verify()
    (guest,) = daemon.guests().values()
    assert guest["engine"] in ("rwp", "rfc")
    assert guest["counters"]["inject_stops"] == 0
    what_cannot_be_seen_is_told(daemon)
    a_vmm_of_another_user_is_refused(daemon, listening, vmm)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    wait_for(lambda: vmm.ask("handshake")[2] == 1, "it is told that it was left")
    vmm.verify()


def what_cannot_be_seen_is_told(daemon: Daemon) -> None:
    """Whether a process of another user holds the memory, an ordinary user cannot know: once in the log, and in the status."""
    told = daemon.logged("holders_unseen")
    assert len(told) == 2, "once by each tierd"
    assert all(entry["processes"] > 0 for entry in told)
    assert any("holds a guest's memory is not known" in note for note in daemon.status()["engine_notes"])


def a_vmm_of_another_user_is_refused(daemon: Daemon, listening: Path, vmm: Vmm) -> None:
    """Whose mappings cannot be read is not believed."""
    with Vmm(Path(f"/proc/{vmm.pid}/exe").resolve(), f"bytes={MIB}", f"handshake={listening}") as other:

        def told() -> list[str]:
            return [entry["error"] for entry in daemon.logged("handshake_refused") if entry["pid"] == other.pid]

        assert f"run tierd as the user of process {other.pid}" in wait_for(told, "it is refused")[0]
        assert other.ask("handshake")[0] == 0
    assert list(daemon.guests()) == [NAME]
