# SPDX-License-Identifier: Apache-2.0
"""The data plane against the model kernel: every byte that a guest reads is the last one it wrote, whatever dies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.native.build import build_driver, run_driver

SEEDS = int(os.environ.get("TIERD_SEEDS", "20000"))


@pytest.mark.timeout(1800)
def test_seeds(tmp_path: Path) -> None:
    """Every seed is a run of a guest, its faults, evictions, failing calls and kills; a failure prints its seed."""
    done = run_driver(build_driver(tmp_path / "driver", ["-O2"]), "--seeds", str(SEEDS), timeout_s=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = int(done.stdout.split(" kills")[0].split()[-1])
    assert kills > SEEDS / 2, "the driver did not kill"


@pytest.mark.timeout(900)
def test_seeds_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    done = run_driver(
        build_driver(tmp_path / "driver", flags), "--seeds", str(max(SEEDS // 20, 100)), "--from", "1000000"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_seed_reproduces_a_run(tmp_path: Path) -> None:
    driver = build_driver(tmp_path / "driver", ["-O1"])
    first, second = (run_driver(driver, "--seeds", "20", "--from", "77") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout
