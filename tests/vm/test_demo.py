# SPDX-License-Identifier: Apache-2.0
"""The whole of it: `tierd demo` on a real guest, with the real daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.need import need
from tests.store.conftest import redis_there  # noqa: F401  (a fixture)
from tierd.demo.script import filesystem

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "config" / "tierd.yaml"


def start(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    need("root", os.geteuid() == 0, "the demo needs root")
    command = [sys.executable, "-m", "tierd", "--config", str(SHIPPED), "demo", "--json", "--directory", str(directory)]
    command += arguments
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(directory: Path) -> list[Path]:
    tmpfs = Path("/run") if filesystem(Path("/run")) == "tmpfs" else Path("/dev/shm")
    return [*directory.glob("demo-*"), *tmpfs.glob("tierd-demo-*")]


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("arguments", "tiers"),
    [((), {"memory", "file"}), (("--tiers", "redis", "--backing", "anonymous"), {"redis"})],
    ids=["default tiers", "QEMU's default memory into redis"],
)
def test_gives_memory_back_and_every_byte(
    vm_directory: Path, request: pytest.FixtureRequest, arguments: Sequence[str], tiers: set[str]
) -> None:
    if "redis" in tiers:
        request.getfixturevalue("redis_there")
    before = leftovers(vm_directory)
    with start(vm_directory, *arguments) as demo:
        out, progress = demo.communicate()
    assert demo.returncode == 0, progress
    result = json.loads(out.splitlines()[-1])
    assert result["wrong_bytes"] == 0
    assert result["guest_used_bytes"] > result["verified_bytes"] > 256 << 20
    assert result["given_back_ratio"] >= 0.4
    assert result["given_back_bytes"] >= 0.4 * result["guest_used_bytes"]
    assert result["faults"] > 0
    assert 0 < result["fault_p50_us"] <= result["fault_p99_us"]
    assert result["engine"] == "stock"
    assert result["tiers"].keys() == {"zero", *tiers}, "what is told are those with pages in them"
    if "--backing" in arguments:
        assert result["staged_read_ratio"] <= 0.02
    assert result["seconds"] < 120
    assert leftovers(vm_directory) == before


def test_told_to_stop_it_leaves_nothing(vm_directory: Path) -> None:
    """SIGTERM while tierd holds a good part of the guest."""
    before = leftovers(vm_directory)
    with start(vm_directory) as demo:
        assert demo.stderr is not None
        for line in demo.stderr:
            if "file " in line:
                break
        children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()
        assert len(children) == 2, "QEMU and tierd"
        demo.send_signal(signal.SIGTERM)
        out, progress = demo.communicate(timeout=60)
    assert demo.returncode == 128 + signal.SIGTERM, progress
    assert out == ""
    assert leftovers(vm_directory) == before
    assert not [pid for pid in children if Path("/proc", pid).exists()]
