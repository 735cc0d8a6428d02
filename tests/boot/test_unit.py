# SPDX-License-Identifier: Apache-2.0
"""The life of the service under a real systemd, in the sandbox of its unit, with guests that check every byte."""

from __future__ import annotations

import pytest

from tests.boot.conftest import StartVm
from tests.boot.machine import Machine

EXPOSURE_TENTHS_MAX = 40


@pytest.mark.parametrize("kind", ["scope", "service"])
def test_start_returns_when_ready_and_the_sandbox_lets_it_work(machine: Machine, start_vm: StartVm, kind: str) -> None:
    vm = start_vm("web", kind=kind)
    machine.systemctl("start", "tierd")
    assert machine.path("/run/tierd/tierd.sock").exists()
    assert machine.show("ActiveState") == "active"
    assert machine.show("StatusText").startswith("engine stock: ")
    machine.wait_evicted(vm)
    vm.verify()
    machine.wait_evicted(vm)
    assert machine.run("systemd-analyze", "verify", "tierd.service") == ""
    machine.run("systemd-analyze", "security", f"--threshold={EXPOSURE_TENTHS_MAX}", "tierd.service")
    vm.verify()
