# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and says what it should. No figure is judged here: machines are noisy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.need import need

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_measured_with_their_limits(tmp_path: Path) -> None:
    need("root", os.geteuid() == 0, "attaching to another process needs root")
    output = tmp_path / "bench.json"
    command = [
        sys.executable,
        "-m",
        "tests.bench.bench",
        "--quick",
        "--rows",
        "c,d,e,j,l,m,n,o,p,q",
        "--json",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(output.read_text())
    assert rows == json.loads(done.stdout)
    assert [row["row"][0] for row in rows] == [*"cdde", *"jjj", *"lll", *"mm", *"nn", *"oo", *"pppp", "q"]
    for row in rows:
        assert set(row) == {"row", "unit", "measured", "limit", "ratio", "bound", "ok"}
        assert row["measured"] > 0
        assert row["limit"] > 0
