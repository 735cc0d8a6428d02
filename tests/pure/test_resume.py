# SPDX-License-Identifier: Apache-2.0
"""Adoption comes first: what it imports decides how long guests wait after a crash."""

from __future__ import annotations

import subprocess
import sys


def test_adoption_needs_nothing_that_only_the_daemon_needs() -> None:
    script = "import sys, tierd.resume; print(*sorted(name.partition('.')[0] for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"trio", "pydantic", "structlog", "starlette", "hypercorn", "yaml", "rich"} & set(done.stdout.split())
