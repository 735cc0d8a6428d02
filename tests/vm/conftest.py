# SPDX-License-Identifier: Apache-2.0
"""Real guests to test on. Each boots once a module (3 to 6 s under TCG) and is gone before the next one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.process import Daemon
from tests.kernel.host_memory import huge_pages
from tests.kernel.vmm import need_anonymous
from tests.need import need
from tests.vm.libvirtd import MEMFD, LibvirtGuest
from tierd.demo.guest import MIB, DemoGuest, GuestError, find_kernel, this_platform
from tierd.native import probe

GUEST_BYTES = 192 * MIB
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
KINDS: dict[str, dict[str, Any]] = {
    "root": {},  # its QEMU runs as us
    "user": {"user": "nobody"},
    "huge": {"backing": "hugetlb"},
    "anonymous": {"backing": "anonymous"},  # what QEMU takes if it is told nothing
    # in QEMU's own seccomp sandbox, as libvirt starts it
    "sandboxed": {"backing": "anonymous", "user": "nobody", "arguments": ("-sandbox", SANDBOX)},
}


@pytest.fixture(scope="session")
def vm_directory() -> Path:
    """Where guests are built, and where tests/setup.sh puts their kernel."""
    directory = Path(__file__).parents[2] / "build" / "vm"
    try:
        qemu = this_platform().qemu
        find_kernel(directory)
    except GuestError as error:
        need("vm", False, str(error))
    need("vm", shutil.which(qemu) is not None, f"{qemu} is not installed: run `tests/setup.sh vm`")
    return directory


@pytest.fixture(scope="module", params=KINDS)
def guest(vm_directory: Path, request: pytest.FixtureRequest) -> Iterator[DemoGuest]:
    """A guest whose memory is filled. One after the other: pytest runs all tests of a kind before it boots the next, and an
    emulated guest computes all the time."""
    kind: str = request.param
    if KINDS[kind].get("backing") == "anonymous":
        need_anonymous()
    with (
        huge_pages(GUEST_BYTES // (2 * MIB)) if kind == "huge" else nullcontext(),
        DemoGuest(vm_directory, f"test-{kind}", memory_bytes=GUEST_BYTES, **KINDS[kind]) as guest,
    ):
        guest.wait_ready()
        yield guest


@pytest.fixture(scope="module", params=["memfd", "anonymous"])
def libvirt_guest(vm_directory: Path, request: pytest.FixtureRequest) -> Iterator[LibvirtGuest]:
    """A guest that a real libvirtd started, as its ordinary user and in its usual sandbox, its memory filled."""
    for program in ("libvirtd", "virsh", "unshare"):
        need("libvirt", shutil.which(program) is not None, f"{program} is not installed: run `tests/setup.sh libvirt`")
    if request.param == "anonymous":
        need_anonymous()
    backing = MEMFD if request.param == "memfd" else ""
    with LibvirtGuest(vm_directory, "test-libvirt", GUEST_BYTES, backing) as guest:
        guest.wait_ready()
        yield guest


@pytest.fixture
def daemon(tmpfs_dir: Path, disk_dir: Path) -> Iterator[Daemon]:
    """A tierd that is not started yet. However the test went, it brings its guests back: they are tested further."""
    need("root", os.geteuid() == 0, "attaching to another process needs root")
    found = probe()
    lacking = found.userfaultfd or found.write_protect or found.missing
    need("kernel", not lacking, f"this kernel cannot tier ({os.strerror(lacking)}); see `tierd check`")
    with Daemon(tmpfs_dir, disk_dir) as daemon:
        yield daemon
        if not daemon.running and list(daemon.runtime_dir.glob("guests/*.state")):
            daemon.start()
        if daemon.running:
            daemon.signal(signal.SIGTERM)
            daemon.wait()
