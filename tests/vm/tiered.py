# SPDX-License-Identifier: Apache-2.0
"""What is done to every kind of real guest under the real daemon. The guest itself says whether a byte was wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Protocol

from tests.daemon.process import POLICY, Daemon
from tests.kernel.vmm import userfaultfds, wait_for
from tierd.demo.guest import Console, numbers

FALL_S_MAX = 60.0
VERIFY_S_MAX = 60.0


class RealGuest(Protocol):
    """DemoGuest or LibvirtGuest."""

    name: str
    used_bytes: int

    @property
    def pid(self) -> int: ...

    @property
    def console(self) -> Console: ...

    def verify(self) -> tuple[int, int]: ...

    def resident_bytes(self) -> int: ...


def descriptors(pid: int) -> list[str]:
    return sorted(os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir())


def tier(daemon: Daemon, guest: RealGuest) -> None:
    """Starts the daemon, which finds the guest, and waits until most of it is stored."""
    # by pid as well: another run on this host has a guest of the same name
    daemon.write(guests=[{"name": guest.name, "pid": guest.pid, **POLICY}])
    daemon.start()
    daemon.wait_active(guest.name)
    wait_low(daemon, guest)


def wait_low(daemon: Daemon, guest: RealGuest) -> None:
    wait_for(lambda: guest.resident_bytes() < guest.used_bytes // 2, f"half of {guest.name} is stored", FALL_S_MAX)


def survives_kills_of_the_daemon(daemon: Daemon, guest: RealGuest) -> None:
    """Killed before the guest wants its pages, while they are fetched, and while the successor fetches them."""
    verified: list[str] = []

    def fetches() -> bool:
        verified.extend(line for line in guest.console.poll() if line.startswith("VERIFIED"))
        now = daemon.guests()[guest.name]
        return bool(verified) or now["counters"]["pages_fetched"] * now["page_bytes"] > 400 << 10

    tier(daemon, guest)
    daemon.kill()
    guest.console.send("verify")
    for _ in range(2):
        daemon.start()
        wait_for(fetches, "the guest fetches what is stored", VERIFY_S_MAX)
        daemon.kill()
    daemon.start()
    said = numbers(verified[0]) if verified else guest.console.expect("VERIFIED", VERIFY_S_MAX)
    assert (said["bytes"], said["wrong"]) == (guest.used_bytes, 0)
    assert [entry["lost_pages"] for entry in daemon.logged("guest_adopted")] == [0, 0, 0]
    wait_low(daemon, guest)
    assert guest.verify() == (guest.used_bytes, 0)
    counters = daemon.guests()[guest.name]["counters"]
    assert counters["faults_fetch"] > 0
    assert counters["faults_failed"] == counters["pages_lost"] == counters["checksum_errors"] == 0
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not userfaultfds(guest.pid)
    assert guest.verify() == (guest.used_bytes, 0)


def detached_it_is_as_before(daemon: Daemon, guest: RealGuest) -> None:
    before = descriptors(guest.pid)
    tier(daemon, guest)
    done = daemon.tierd("detach", guest.name, "--json")
    assert done.returncode == 0, done.stderr
    assert "detached" in json.loads(done.stdout)
    assert not userfaultfds(guest.pid)
    assert descriptors(guest.pid) == before
    assert not daemon.guests()
    assert not list(daemon.store_dir.iterdir())
    assert guest.verify() == (guest.used_bytes, 0)
    assert guest.console.expect("TICK", VERIFY_S_MAX)["wrong"] == 0
