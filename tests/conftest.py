# SPDX-License-Identifier: Apache-2.0
"""Shared by all layers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tierd", deadline=None)  # no timing asserts: machines are noisy
settings.load_profile("tierd")


@pytest.fixture
def tmpfs_dir() -> Iterator[Path]:
    """A directory on tmpfs, where state files may live; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="tierd-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A directory on a real file system (not tmpfs), where a store may live; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="tierd-test-", dir=os.environ.get("TIERD_TEST_DISK", "/var/tmp")))
    yield path
    shutil.rmtree(path)
