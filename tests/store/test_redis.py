# SPDX-License-Identifier: Apache-2.0
"""The store `redis` on a real server."""

from __future__ import annotations

import pytest

from tests.store.servers import Server
from tierd.store import PageStore
from tierd.store.redis import make
from tierd.testing import PageStoreContract


class TestOneServer(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.server = server

    def make_store(self) -> PageStore:
        return make({"addresses": [self.server.address]})
