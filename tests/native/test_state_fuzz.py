# SPDX-License-Identifier: Apache-2.0
"""State files that are not what tierd wrote, under the sanitizers: refused, or all of it can be used."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.fuzz import EXAMPLES
from tests.native.build import HERE, NATIVE, run_driver


@pytest.mark.timeout(3600)
def test_damaged_state_files(tmp_path: Path) -> None:
    binary = tmp_path / "state_fuzz"
    sources = [str(NATIVE / "table.c"), str(HERE / "state_fuzz.c")]
    flags = ["-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    built = subprocess.run(
        ["gcc", *flags, *sanitizers, f"-I{NATIVE}", *sources, "-o", str(binary)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    done = run_driver(binary, "--seeds", str(EXAMPLES * 100), timeout_s=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    _, accepted, refused = (int(word) for word in done.stdout.split() if word.isdecimal())
    assert accepted > EXAMPLES, "the fields behind the checksum are reached"
    assert refused > EXAMPLES
