# SPDX-License-Identifier: Apache-2.0
"""Children that play the VMM, and a host for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kernel.vmm import VMM_SOURCES, Host, Vmm, compile_child
from tests.need import need
from tierd.native import probe


@pytest.fixture(scope="session", autouse=True)
def kernel() -> None:
    """A real userfaultfd that may serve kernel faults, write-protection of shared memory, and another process's memory."""
    need("root", os.geteuid() == 0, "attaching to another process needs root")
    found = probe()
    for name in ("userfaultfd", "write_protect", "missing"):
        error = getattr(found, name)
        need("kernel", not error, f"the trial of {name} said: {os.strerror(error)}")


@pytest.fixture(scope="session")
def vmm_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vmm")
    return compile_child(directory / "vmm", *VMM_SOURCES)


@pytest.fixture(scope="session")
def vcpu_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("kvm", os.access("/dev/kvm", os.R_OK | os.W_OK), "/dev/kvm cannot be opened")
    return compile_child(tmp_path_factory.mktemp("vcpu") / "kvm_vcpu", "kvm_vcpu.c", "child.c")


@pytest.fixture
def start_vmm(vmm_binary: Path) -> Iterator[Callable[..., Vmm]]:
    """Starts children that are gone, and were never wrong, at the end of the test."""
    with ExitStack() as children:
        yield lambda *arguments, **options: children.enter_context(Vmm(vmm_binary, *arguments, **options))


@pytest.fixture
def host(tmpfs_dir: Path, disk_dir: Path) -> Host:
    return Host(tmpfs_dir, disk_dir)
