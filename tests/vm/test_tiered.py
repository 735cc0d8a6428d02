# SPDX-License-Identifier: Apache-2.0
"""Real virtual machines under the real daemon: QEMU as root, as an ordinary user, and as libvirt starts it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.process import POLICY, Daemon
from tests.kernel.vmm import userfaultfds, wait_for
from tests.vm.libvirtd import LibvirtGuest
from tierd.demo.guest import DemoGuest

KILLS = 20


@pytest.fixture
def daemon(tmpfs_dir: Path, disk_dir: Path) -> Iterator[Daemon]:
    with Daemon(tmpfs_dir, disk_dir) as daemon:
        yield daemon


def serve(daemon: Daemon, guest: DemoGuest | LibvirtGuest, name: str) -> None:
    """Only this VM, whatever else runs on the host: rules of name and pid together."""
    daemon.write(guests=[{"name": name, "pid": guest.pid, **POLICY, "min_idle_s": 0.5, "interval_s": 0.3}])
    daemon.start()


def tiered(daemon: Daemon, guest: DemoGuest | LibvirtGuest, name: str) -> None:
    """It gives most of its memory back, verifies every byte, and is left as it was."""
    before = guest.resident_bytes()
    serve(daemon, guest, name)
    wait_for(lambda: guest.resident_bytes() < 0.6 * before, "memory is given back", 60)
    assert guest.verify() == (guest.used_bytes, 0)
    served = daemon.guests()[name]
    assert served["counters"]["faults_fetch"] > 0
    assert served["counters"]["pages_lost"] == served["counters"]["checksum_errors"] == 0
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log_path.read_text()[-2000:]
    assert not userfaultfds(guest.pid)
    assert guest.verify() == (guest.used_bytes, 0)


@pytest.mark.timeout(180)
def test_qemu_as_root(daemon: Daemon, guest: DemoGuest) -> None:
    tiered(daemon, guest, guest.name)


@pytest.mark.timeout(180)
def test_qemu_as_an_ordinary_user(daemon: Daemon, user_guest: DemoGuest) -> None:
    """It cannot make a full userfaultfd itself: it is handed a /dev/userfaultfd that root has opened."""
    tiered(daemon, user_guest, user_guest.name)


@pytest.mark.timeout(180)
def test_qemu_under_libvirt(daemon: Daemon, libvirt_guest: LibvirtGuest) -> None:
    tiered(daemon, libvirt_guest, libvirt_guest.name)


@pytest.mark.timeout(240)
def test_twenty_kills(daemon: Daemon, guest: DemoGuest) -> None:
    """tierd is killed again and again while the guest works; the guest never reads a wrong byte."""
    serve(daemon, guest, guest.name)
    for _ in range(KILLS):
        wait_for(lambda: daemon.stored_bytes(guest.name) > 0, "something is stored", 30)
        daemon.kill()
        daemon.start()
    assert guest.verify() == (guest.used_bytes, 0)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert guest.verify() == (guest.used_bytes, 0)
