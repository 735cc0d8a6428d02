# SPDX-License-Identifier: Apache-2.0
"""A tierd that is not started yet, and guests for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.process import OURS, Boot, Daemon
from tests.kernel.conftest import vmm_binary  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, Vmm


@pytest.fixture
def boot(vmm_binary: Path, tmp_path: Path) -> Iterator[Boot]:  # noqa: F811
    """Starts a VMM that discovery takes for QEMU: by the name of its executable and its -name."""
    qemu = tmp_path / "qemu-system-test"
    qemu.symlink_to(vmm_binary)
    with ExitStack() as guests:

        def start(name: str, size: int = 16 * MIB, *more: str) -> Vmm:
            named = ("-name", f"guest={name}{OURS},debug-threads=on")
            vmm = guests.enter_context(Vmm(vmm_binary, f"bytes={size}", *more, *named, arg0=str(qemu)))
            vmm.ask("fill")
            return vmm

        yield start


@pytest.fixture
def daemon(tmpfs_dir: Path, disk_dir: Path) -> Iterator[Daemon]:
    with Daemon(tmpfs_dir, disk_dir) as daemon:
        yield daemon
