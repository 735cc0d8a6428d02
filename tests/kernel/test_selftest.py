# SPDX-License-Identifier: Apache-2.0
"""What the stock engine relies on, asked of this machine's kernel by the C self-test of tests/kernels."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.conftest import programs, selftest  # noqa: F401  (fixtures)
from tests.kernels.machine import check_selftest

POOL = Path("/proc/sys/vm/nr_hugepages")
POOL_PAGES = 16


@pytest.fixture
def hugetlb_pool() -> Iterator[None]:
    """A few 2 MiB pages, so that hugetlbfs is not skipped where the machine can have them. Its own setting comes back."""
    before = POOL.read_text() if POOL.exists() else ""
    if before and int(before) < POOL_PAGES:
        with contextlib.suppress(OSError):
            POOL.write_text(str(POOL_PAGES))
    yield
    if before and int(before) < POOL_PAGES:
        POOL.write_text(before)


def test_this_machine(selftest: Path, hugetlb_pool: None) -> None:  # noqa: F811
    done = subprocess.run([selftest, "stock"], capture_output=True, text=True, timeout=280)
    check_selftest(done.returncode, done.stdout, done.stdout + done.stderr, None)
