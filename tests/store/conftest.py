# SPDX-License-Identifier: Apache-2.0
"""Servers that several tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.need import need
from tests.store.servers import BINARY, Server

pytest.register_assert_rewrite("tierd.testing")


@pytest.fixture(scope="session")
def redis_there() -> None:
    need("redis", shutil.which(BINARY) is not None, "no Redis here: tests/setup.sh stores")


@pytest.fixture(scope="module")
def server(redis_there: None) -> Iterator[Server]:
    with Server() as server:
        yield server
