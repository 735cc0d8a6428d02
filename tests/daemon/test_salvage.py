# SPDX-License-Identifier: Apache-2.0
"""`tierd detach --pid`: a guest whose tierd is gone for good."""

from __future__ import annotations

import json
from pathlib import Path

from tests.daemon.process import Boot, Daemon, evicted
from tests.kernel.vmm import userfaultfds


def test_a_guest_whose_tierd_is_gone_for_good(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    refused = daemon.tierd("detach", "--pid", str(vmm.pid))
    assert refused.returncode == 1
    assert "another tierd" in refused.stderr
    daemon.kill()
    done = daemon.tierd("detach", "--pid", str(vmm.pid), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restored_bytes"] > 0.9 * vmm.pages * vmm.page_bytes
    assert not userfaultfds(vmm.pid)
    assert not list(Path(daemon.runtime_dir, "guests").iterdir())
    vmm.verify()


def test_nothing_of_it_is_there(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    done = daemon.tierd("detach", "--pid", str(vmm.pid))
    assert done.returncode == 1
    assert f"no page table of process {vmm.pid}" in done.stderr


def test_either_a_guest_or_a_process(daemon: Daemon) -> None:
    assert daemon.tierd("detach").returncode == 2
    assert daemon.tierd("detach", "web", "--pid", "1").returncode == 2
