# SPDX-License-Identifier: Apache-2.0
"""The guest under a real libvirtd: that it runs, is what libvirt makes of it by default, and is tiered as it is."""

from __future__ import annotations

from pathlib import Path

from tests.daemon.process import Daemon
from tests.kernel.vmm import wait_for
from tests.vm import tiered
from tests.vm.libvirtd import LibvirtGuest


def status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, value in (line.split(":", 1) for line in lines)}


def test_runs_and_verifies(libvirt_guest: LibvirtGuest) -> None:
    assert libvirt_guest.virsh("domstate", libvirt_guest.name).strip() == "running"
    assert libvirt_guest.verify() == (libvirt_guest.used_bytes, 0)
    assert libvirt_guest.resident_bytes() > libvirt_guest.used_bytes


def test_is_confined_as_libvirt_does_it(libvirt_guest: LibvirtGuest) -> None:
    found = status(libvirt_guest.pid)
    assert len(set(found["Uid"])) == 1
    assert found["Uid"][0] != "0"
    assert found["Seccomp"] == ["2"]
    assert b"guest=test-libvirt" in Path(f"/proc/{libvirt_guest.pid}/cmdline").read_bytes()


def test_suspended_and_resumed_while_it_is_tiered(daemon: Daemon, libvirt_guest: LibvirtGuest) -> None:
    tiered.tier(daemon, libvirt_guest)
    libvirt_guest.virsh("suspend", libvirt_guest.name)
    libvirt_guest.virsh("resume", libvirt_guest.name)
    assert libvirt_guest.verify() == (libvirt_guest.used_bytes, 0)


def test_survives_kills_of_the_daemon(daemon: Daemon, libvirt_guest: LibvirtGuest) -> None:
    tiered.survives_kills_of_the_daemon(daemon, libvirt_guest)


def test_detached_it_is_as_before(daemon: Daemon, libvirt_guest: LibvirtGuest) -> None:
    tiered.detached_it_is_as_before(daemon, libvirt_guest)
    assert libvirt_guest.virsh("domstate", libvirt_guest.name).strip() == "running"


def test_destroyed_while_it_is_tiered(daemon: Daemon, libvirt_guest: LibvirtGuest) -> None:
    """Comes last: the guest is gone. libvirt sees it end as always, and nothing of it is kept."""
    tiered.tier(daemon, libvirt_guest)
    libvirt_guest.virsh("destroy", libvirt_guest.name)
    assert libvirt_guest.virsh("domstate", libvirt_guest.name).strip() == "shut off"
    wait_for(lambda: not daemon.guests(), "the guest is gone")
    assert not list(daemon.store_dir.iterdir())
    assert not list((daemon.runtime_dir / "guests").iterdir())
