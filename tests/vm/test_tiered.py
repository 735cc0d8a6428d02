# SPDX-License-Identifier: Apache-2.0
"""A real virtual machine under a daemon that is killed twenty times."""

from __future__ import annotations

import signal

import pytest

from tests.daemon.process import POLICY, Daemon
from tests.kernel.vmm import wait_for
from tierd.demo.guest import DemoGuest

KILLS = 20


@pytest.mark.timeout(240)
@pytest.mark.parametrize("guest", ["root", "anonymous"], indirect=True)
def test_twenty_kills(daemon: Daemon, guest: DemoGuest) -> None:
    """tierd is killed again and again while the guest works; the guest never reads a wrong byte."""
    # by pid as well: another run on this host has a guest of the same name
    daemon.write(guests=[{"name": guest.name, "pid": guest.pid, **POLICY, "min_idle_s": 0.5, "interval_s": 0.3}])
    daemon.start()
    for _ in range(KILLS):
        wait_for(lambda: daemon.stored_bytes(guest.name) > 0, "something is stored", 30)
        daemon.kill()
        daemon.start()
    assert guest.verify() == (guest.used_bytes, 0)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert guest.verify() == (guest.used_bytes, 0)
