# SPDX-License-Identifier: Apache-2.0
"""The guest under a real libvirtd, without tierd: that it runs, and is what libvirt makes of it by default."""

from __future__ import annotations

from pathlib import Path

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
