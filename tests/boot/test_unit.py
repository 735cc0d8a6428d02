# SPDX-License-Identifier: Apache-2.0
"""The life of the service under a real systemd, in the sandbox of its unit, with guests that check every byte."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.boot.conftest import StartVm
from tests.boot.machine import ROOT, Machine, Vm, cgroups, sweep
from tests.kernel.vmm import MIB, userfaultfds, vm_flags, wait_for

EXPOSURE_TENTHS_MAX = 40
KILLS = 12
# systemd's DefaultStartLimitBurst= and DefaultStartLimitIntervalSec=
STARTS_MAX, STARTS_S = 5, 10.0


def started(machine: Machine, vm: Vm) -> None:
    """tierd runs, and the guest is stored."""
    machine.systemctl("start", "tierd")
    machine.wait_evicted(vm)


def wait_adopted(machine: Machine) -> None:
    wait_for(lambda: machine.logged("guest_adopted"), "the guest is adopted", 60)
    assert not any(entry["lost_pages"] for entry in machine.logged("guest_adopted"))


def is_left(vm: Vm) -> bool:
    """As if tierd had never been there."""
    return not userfaultfds(vm.vmm_pid) and not vm_flags(vm.vmm_pid, vm.addresses[0]) & {"um", "uw"}


@pytest.mark.parametrize(
    ("kind", "user", "memory"),
    [
        ("scope", "root", "shared"),
        ("service", "root", "shared"),
        ("scope", "nobody", "shared"),
        ("scope", "nobody", "anonymous"),
    ],
)
def test_start_returns_when_ready_and_the_sandbox_lets_it_work(
    machine: Machine, start_vm: StartVm, kind: str, user: str, memory: str
) -> None:
    """A VMM of an ordinary user takes all that the sandbox allows: every capability, and /dev/userfaultfd."""
    vm = start_vm("web", kind=kind, user=user, memory=memory)
    machine.systemctl("start", "tierd")
    assert machine.path("/run/tierd/tierd.sock").exists()
    assert machine.show("ActiveState") == "active"
    assert machine.show("StatusText").startswith("engine stock: ")
    assert "\nSeccomp:\t2\n" in machine.path(f"/proc/{machine.main_pid()}/status").read_text()
    machine.wait_evicted(vm)
    vm.verify()
    machine.wait_evicted(vm)
    machine.systemctl("reload", "tierd")
    wait_for(lambda: machine.logged("reloaded"), "the reload is logged")  # systemctl reload only sends a signal
    assert machine.run("systemd-analyze", "verify", "tierd.service") == ""
    machine.run("systemd-analyze", "security", f"--threshold={EXPOSURE_TENTHS_MAX}", "tierd.service")
    vm.verify()


def test_the_watchdog_replaces_a_tierd_that_hangs(machine: Machine, start_vm: StartVm) -> None:
    """systemd sends SIGABRT and SIGCONT, and does not wait for TimeoutStopSec=."""
    machine.drop_in("[Service]\nWatchdogSec=3s\n")
    vm = start_vm("web")
    started(machine, vm)
    vm.ask("run", 500, 50)
    hung = machine.main_pid()
    machine.kill("STOP")
    wait_for(lambda: machine.show("NRestarts") != "0", "systemd starts it again", 60)
    wait_adopted(machine)
    assert machine.main_pid() not in (0, hung)
    assert "Watchdog timeout" in machine.journal("--unit=tierd")
    vm.ask("stop")
    vm.verify()


def test_killed_more_often_than_a_start_limit_allows(machine: Machine, start_vm: StartVm) -> None:
    """Each time as soon as it runs, ready or not. Its page table stays where it is."""
    vm = start_vm("web", 32 * MIB)
    started(machine, vm)
    (state,) = machine.state_files()
    inode = state.stat().st_ino
    killed = []
    for _ in range(KILLS):
        # not by systemctl, which takes its time on a machine that is busy
        (pid, *_) = wait_for(lambda: machine.pids("tierd.service"), "systemd starts it again")
        os.kill(pid, signal.SIGKILL)
        killed.append(time.monotonic())
        wait_for(lambda: pid not in machine.pids("tierd.service"), "it is gone")  # noqa: B023
        assert state.stat().st_ino == inode
    assert min(b - a for a, b in zip(killed, killed[STARTS_MAX:], strict=False)) < STARTS_S, "too slow to show anything"
    wait_for(lambda: machine.show("NRestarts") == str(KILLS), "systemd starts it again", 60)
    wait_for(lambda: machine.show("ActiveState") == "active", "it is ready", 60)
    wait_adopted(machine)
    assert machine.state_files() == [state]
    vm.verify()
    machine.wait_evicted(vm)
    vm.verify()


def test_restart_keeps_what_is_stored(machine: Machine, start_vm: StartVm) -> None:
    """on_stop is restore: systemd tells the restart from a stop."""
    vm = start_vm("web", 64 * MIB)
    started(machine, vm)
    machine.systemctl("restart", "tierd")
    (stopping,) = machine.logged("stopping")
    assert (stopping["signal"], stopping["on_restart"]) == ("SIGUSR1", "keep")
    (adopted,) = machine.logged("guest_adopted")  # before it was ready
    assert adopted["stored_pages"] > 0.9 * vm.pages
    assert machine.show("Result") == "success"
    machine.systemctl("try-restart", "tierd")
    assert [entry["signal"] for entry in machine.logged("stopping")] == ["SIGUSR1", "SIGUSR1"]
    vm.verify()


def test_restart_restores_where_the_next_tierd_would_not_start(machine: Machine, start_vm: StartVm) -> None:
    vm = start_vm("web")
    started(machine, vm)
    (machine.etc / "tierd.yaml").write_text("on_stop: kep")
    machine.systemctl("restart", "tierd", expect=1)
    assert machine.show("ExecMainStatus") == "78"
    assert machine.logged("restart_restores")
    assert is_left(vm)
    vm.verify()


def test_stop_restores(machine: Machine, start_vm: StartVm) -> None:
    vm = start_vm("web", 64 * MIB)
    started(machine, vm)
    machine.systemctl("stop", "tierd")
    (stopping,) = machine.logged("stopping")
    assert (stopping["signal"], stopping["on_stop"]) == ("SIGTERM", "restore")
    assert (machine.show("ActiveState"), machine.show("Result")) == ("inactive", "success")
    assert not machine.state_files()
    assert not list(machine.store.iterdir())
    assert is_left(vm)
    vm.verify()


def test_stop_with_on_stop_keep_and_start_again(machine: Machine, start_vm: StartVm) -> None:
    """RuntimeDirectoryPreserve=yes: a stop does not take the page table away under a guest that lives."""
    machine.configure(on_stop="keep")
    vm = start_vm("web")
    started(machine, vm)
    machine.systemctl("stop", "tierd")
    assert machine.show("ActiveState") == "inactive"
    assert len(machine.state_files()) == len(list(machine.store.iterdir())) == 1
    machine.systemctl("start", "tierd")
    wait_adopted(machine)
    vm.verify()


def test_a_wrong_configuration_is_not_tried_again_and_deletes_nothing(machine: Machine, start_vm: StartVm) -> None:
    """The worst time for it: pages are stored, and tierd is killed."""
    vm = start_vm("web")
    started(machine, vm)
    before = machine.state_files()
    (machine.etc / "tierd.yaml").write_text("on_stop: kep")
    machine.kill("KILL")
    wait_for(lambda: machine.show("SubState") == "failed", "systemd gives up")  # a restart would be "auto-restart"
    assert (machine.show("ExecMainStatus"), machine.show("NRestarts")) == ("78", "1")
    assert machine.state_files() == before
    assert "did you mean keep?" in machine.journal("--unit=tierd")
    machine.systemctl("start", "tierd", expect=1)
    assert machine.state_files() == before
    machine.configure()
    machine.systemctl("start", "tierd")
    wait_adopted(machine)
    vm.verify()


@pytest.mark.parametrize("on_stop", ["restore", "keep"])
@pytest.mark.parametrize("kind", ["scope", "service"])
def test_shutdown_ends_vms_before_tierd(machine: Machine, start_vm: StartVm, kind: str, on_stop: str) -> None:
    """While a VM shuts down, however long it takes, its stored pages are in reach."""
    machine.configure(on_stop=on_stop)
    vm = start_vm("web", kind=kind)
    started(machine, vm)
    (state,) = machine.state_files()
    machine.systemctl("poweroff", "--no-block")
    wait_for(lambda: machine.show("ActiveState", vm.unit) == "deactivating", "the VM is told to end")
    assert machine.show("ActiveState") == "active"
    vm.verify()
    machine.wait_evicted(vm)  # served as ever
    vm.verify()
    assert state.exists()
    vm.end()
    machine.wait_end()
    lines = machine.journal("_PID=1").splitlines()
    ended = re.compile(re.escape(vm.unit) + ": (Deactivated successfully|Failed with result)")
    (vm_ended,) = (i for i, line in enumerate(lines) if ended.match(line))
    (stopping,) = (i for i, line in enumerate(lines) if line.startswith("Stopping tierd.service"))
    assert vm_ended < stopping
    assert [entry["signal"] for entry in machine.logged("stopping")] == ["SIGTERM"]
    if on_stop == "restore":  # keep may leave what the next boot sweeps
        assert not list(machine.store.iterdir())


TEST_RUN = """
import sys
from pathlib import Path
from tests.boot.machine import Machine
with Machine(*map(Path, sys.argv[1:])) as machine:
    print(machine.name, flush=True)
    sys.stdin.read()
"""


def test_a_machine_ends_with_its_test_run(
    machine: Machine, root: Path, static_vmm: Path, tmpfs_dir: Path, disk_dir: Path
) -> None:
    """Also where that is killed and nobody cleans up."""
    del machine  # one can be started here
    directories = [tmpfs_dir / "other", disk_dir / "other"]
    for directory in directories:
        directory.mkdir()
    run = subprocess.Popen(
        [sys.executable, "-c", TEST_RUN, root, *directories, static_vmm],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdin is not None
    with run.stdin, run.stdout:
        name = run.stdout.readline().strip()
        assert name
        run.kill()
        run.wait()
    events = [top / name / "cgroup.events" for top in cgroups()]
    wait_for(lambda: all("populated 0" in path.read_text() for path in events if path.exists()), "the machine is gone")
    sweep()
    assert not any(path.exists() for path in events)
