# SPDX-License-Identifier: Apache-2.0
"""What the service manager and the shell see of `tierd run`: notifications, descriptors, a second tierd on the host."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.process import Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import userfaultfds, wait_for


@pytest.fixture
def other_daemon() -> Iterator[Daemon]:
    """A second tierd, with a runtime directory and a store of its own."""
    tmpfs = Path(tempfile.mkdtemp(prefix="tierd-test-", dir="/dev/shm"))
    disk = Path(tempfile.mkdtemp(prefix="tierd-test-", dir=os.environ.get("TIERD_TEST_DISK", "/var/tmp")))
    try:
        with Daemon(tmpfs, disk) as other:
            yield other
    finally:
        shutil.rmtree(tmpfs)
        shutil.rmtree(disk)


def words(told: list[str]) -> list[str]:
    """The first assignment of each notification, without those that come on a timer."""
    firsts = [text.splitlines()[0] for text in told]
    return [first for first in firsts if first != "WATCHDOG=1" and not first.startswith("STATUS=")]


def test_a_life_as_the_manager_sees_it(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.signal(signal.SIGHUP)
    reloading = daemon.wait_told("RELOADING=1")
    ready = daemon.wait_told("READY=1")
    daemon.signal(signal.SIGTERM)
    stopping = daemon.wait_told("STOPPING=1")
    extended = daemon.wait_told("EXTEND_TIMEOUT_USEC=")
    assert daemon.wait() == 0
    assert [word.partition("=")[0] for word in words(daemon.told)] == [
        "READY",
        "RELOADING",
        "READY",
        "STOPPING",
        "EXTEND_TIMEOUT_USEC",
    ]
    assert "MONOTONIC_USEC=" in reloading  # systemd 253 and newer want it
    assert daemon.process is not None
    assert f"MAINPID={daemon.process.pid}" in ready
    assert "STATUS=engine stock: 1 guests served, 0 not" in ready
    assert "STATUS=on_stop: restore" in stopping
    assert int(extended.partition("=")[2]) > 300e6  # stop_timeout_s, and some time for the rest
    vmm.verify()


@pytest.mark.parametrize("why", ["on_restart", "configuration is wrong", "another runtime_dir"])
def test_a_restart_that_nobody_could_adopt_after_restores(daemon: Daemon, boot: Boot, disk_dir: Path, why: str) -> None:
    """RestartKillSignal= of the unit. What the next tierd would be is in the configuration file, which is read again."""
    vmm = boot("web")
    daemon.write(on_restart="restore" if why == "on_restart" else "keep", on_stop="keep")
    daemon.start()
    evicted(daemon, "web", vmm)
    if why == "configuration is wrong":
        daemon.config.write_text("on_stop: kep")
    elif why == "another runtime_dir":
        daemon.write(runtime_dir=str(disk_dir / "other"))
    daemon.signal(signal.SIGUSR1)
    stopping = daemon.wait_told("STOPPING=1")
    assert daemon.wait() == 0
    assert "STATUS=on_restart: " in stopping
    if why != "on_restart":
        (told,) = daemon.logged("restart_restores")
        assert ("did you mean keep?" if why == "configuration is wrong" else f"{disk_dir}/other") in told["why"]
    assert not list((daemon.runtime_dir / "guests").iterdir())
    assert not userfaultfds(vmm.pid)
    vmm.verify()


def test_a_manager_that_does_not_listen_stops_nothing(daemon: Daemon, boot: Boot) -> None:
    """Its socket takes a few messages and then no more. The guest must not notice."""
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    wait_for(lambda: daemon.logged("notify_failed"), "the manager's socket is full")
    vmm.verify()
    evicted(daemon, "web", vmm)
    vmm.verify()
    assert len(daemon.logged("notify_failed")) == 1, "said once, not ten times a second"
    seen = len(daemon.told)
    while len(daemon.told) < seen + 15:  # more than the socket holds: it is told again
        daemon.wait_told("")
    daemon.signal(signal.SIGTERM)
    daemon.wait_told("STOPPING=1")
    assert daemon.wait() == 0


def test_runs_without_standard_descriptors(daemon: Daemon, boot: Boot) -> None:
    """Closed, their numbers would be given to a guest's memory next, and whatever is printed would land in it."""
    vmm = boot("web")
    daemon.start(through=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])
    evicted(daemon, "web", vmm)
    assert daemon.process is not None
    for number in range(3):
        assert os.readlink(f"/proc/{daemon.process.pid}/fd/{number}") == "/dev/null"
    vmm.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    vmm.verify()


def test_another_tierd_leaves_a_guest_to_the_first(
    daemon: Daemon,
    other_daemon: Daemon,
    boot: Boot,
) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    other_daemon.start()
    refused = wait_for(
        lambda: (guest := other_daemon.guests().get("web")) and guest["state"] == "refused" and guest,
        "the other one has found it",
    )
    assert daemon.process is not None
    assert f"pid {daemon.process.pid}" in refused["reason"]
    assert daemon.guests()["web"]["state"] == "active"
    other_daemon.signal(signal.SIGTERM)
    assert other_daemon.wait() == 0
    vmm.verify()
    evicted(daemon, "web", vmm)
    vmm.verify()


def test_a_restart_with_another_store_keeps(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """What is stored stays where it is, as its state file says; what leaves from now on goes to the new store."""
    vmm, new = boot("web"), disk_dir / "other"
    daemon.write(on_restart="keep")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.write(on_restart="keep", store={"path": str(new)})
    daemon.signal(signal.SIGUSR1)
    assert daemon.wait() == 0
    daemon.start()
    assert daemon.logged("guest_adopted")
    vmm.verify()
    later = boot("later")
    evicted(daemon, "later", later)
    assert [path.name.partition("-")[2].partition("-")[0] for path in new.iterdir()] == [str(later.pid)]
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not list(new.iterdir())
    assert not list(daemon.store_dir.iterdir())
    vmm.verify()
    later.verify()
