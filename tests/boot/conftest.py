# SPDX-License-Identifier: Apache-2.0
"""A machine with a real systemd for each test (it boots in less than a second), and VMs in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest

from tests.boot.machine import ROOT, Machine, MachineError, Vm, cgroups, sweep
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, VMM_SOURCES, compile_child
from tests.need import need

StartVm = Callable[..., Vm]


@pytest.fixture(scope="session")
def root(kernel: None) -> Path:  # noqa: F811
    for program in ("systemd-nspawn", "nsenter", "unshare", "setpriv", "journalctl"):
        need("systemd", shutil.which(program) is not None, f"{program} is not installed: run `tests/setup.sh boot`")
    need("systemd", bool(cgroups()), "cgroup v2 is not mounted")
    made = (ROOT / "build" / "boot" / "made-from").exists()
    need("systemd", made, "build/boot is missing: run `tests/setup.sh boot`")
    sweep()
    return ROOT / "build" / "boot" / "root"


@pytest.fixture(scope="session")
def static_vmm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a machine whose C library is another one."""
    return compile_child(tmp_path_factory.mktemp("vmm") / "vmm", *VMM_SOURCES, static=True)


@pytest.fixture
def machine(root: Path, tmpfs_dir: Path, disk_dir: Path, static_vmm: Path) -> Iterator[Machine]:
    with ExitStack() as running:
        try:
            machine = running.enter_context(Machine(root, tmpfs_dir, disk_dir, static_vmm))
        except MachineError as error:
            need("systemd", False, f"no machine can be started here: {error}")
        yield machine


@pytest.fixture
def start_vm(machine: Machine) -> Iterator[StartVm]:
    """VMs whose memory is filled; they are gone, and were never wrong, at the end of the test."""
    with ExitStack() as vms:

        def start(
            name: str,
            size_bytes: int = 16 * MIB,
            kind: Literal["scope", "service"] = "scope",
            user: str = "root",
            memory: Literal["shared", "anonymous"] = "shared",
        ) -> Vm:
            vm = vms.enter_context(Vm(machine, name, size_bytes, kind, user, memory))
            vm.ask("fill")
            return vm

        yield start
