# SPDX-License-Identifier: Apache-2.0
"""Descriptors that are left with systemd, by a service with the unit and the sandbox of tierd."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.boot.machine import Machine
from tests.kernel.vmm import wait_for

KEEPER = Path(__file__).with_name("keeper.py")
KEPT = "{'memfd': '/memfd:kept', 'userfaultfd': 'anon_inode:[userfaultfd]'}"


@pytest.fixture
def keeper(machine: Machine) -> Machine:
    """A machine whose tierd.service runs keeper.py."""
    shutil.copy(KEEPER, machine.etc)
    command = "/opt/tierd/bin/python3 /etc/tierd/keeper.py"
    machine.drop_in(f"[Service]\nExecStart=\nExecStart={command}\nWatchdogSec=0\n")
    machine.systemctl("start", "tierd")
    return machine


def lives(machine: Machine) -> list[tuple[str, ...]]:
    """(pid, pid of who wrote into the memfd, descriptors that came back) of each start."""
    found = re.findall(r"^pid=(\d+) writer=(\d*) found=(.*)$", machine.journal("--unit=tierd"), flags=re.MULTILINE)
    return [tuple(life) for life in found]


def wait_lives(machine: Machine, count: int) -> list[tuple[str, ...]]:
    wait_for(lambda: len(lives(machine)) == count, f"it has started {count} times", 60)
    return lives(machine)


def test_descriptors_survive_kills_and_restarts(keeper: Machine) -> None:
    for _ in range(2):
        before = len(lives(keeper))
        keeper.kill("KILL")
        wait_lives(keeper, before + 1)
        keeper.systemctl("restart", "tierd")
        wait_lives(keeper, before + 2)
    first, *later = lives(keeper)
    assert first[1:] == ("", "{}")
    assert [life[1:] for life in later] == [(first[0], KEPT)] * 4
    assert keeper.show("NFileDescriptorStore") == "2"


def test_a_stop_drops_them(keeper: Machine) -> None:
    """As the unit's comment says, of systemd 252."""
    keeper.systemctl("stop", "tierd")
    keeper.systemctl("start", "tierd")
    assert [life[1:] for life in wait_lives(keeper, 2)] == [("", "{}")] * 2


def test_a_wrong_configuration_drops_them(keeper: Machine) -> None:
    """As the unit's comment says: status 78 is not tried again, and the unit is then failed."""
    (keeper.etc / "wrong").touch()
    keeper.kill("KILL")
    wait_for(lambda: keeper.show("SubState") == "failed", "systemd gives up")
    (keeper.etc / "wrong").unlink()
    keeper.systemctl("start", "tierd")
    assert [life[1:] for life in wait_lives(keeper, 2)] == [("", "{}")] * 2
