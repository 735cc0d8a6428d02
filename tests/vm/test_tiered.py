# SPDX-License-Identifier: Apache-2.0
"""A real virtual machine under a daemon that is killed twenty times; and under one with the default settings, for minutes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.daemon.process import POLICY, Daemon
from tests.kernel.vmm import wait_for
from tests.need import need
from tierd.demo.guest import DemoGuest

KILLS = 20
SETTLED_S = float(os.environ.get("TIERD_DEFAULTS_S", "0"))  # make soak


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


@pytest.mark.timeout(SETTLED_S + 300)
@pytest.mark.parametrize("guest", ["anonymous"], indirect=True)
def test_what_is_read_after_all_at_the_default_settings(
    daemon: Daemon, guest: DemoGuest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what is moved into the staging area, while the guest works as in the demo."""
    need("soak", SETTLED_S > 0, "memory is cold after five minutes: make soak")
    daemon.write(guests=[{"name": guest.name, "pid": guest.pid}], defaults={})
    daemon.start()
    time.sleep(SETTLED_S)
    c = daemon.guests()[guest.name]["counters"]
    told = {name: c[name] for name in ("pages_staged", "faults_staged", "pages_refaulted", "pages_evicted")}
    with capsys.disabled():
        print(f"\n{SETTLED_S:g} s at the default settings: {told}")
    assert c["pages_evicted"] > 0
    assert c["pages_refaulted"] <= 0.02 * c["pages_staged"]
    assert guest.verify() == (guest.used_bytes, 0)
