# SPDX-License-Identifier: Apache-2.0
"""The real API server on a real Unix socket, in a thread of its own, over a fake daemon."""

from __future__ import annotations

import contextlib
import gc
import queue
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.daemon.fake import FakeDaemon
from tierd.api import Limits, serve


@dataclass
class Live:
    daemon: FakeDaemon
    socket_path: Path
    token: trio.lowlevel.TrioToken
    scope: trio.CancelScope

    def client(self) -> httpx.Client:
        return httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self.socket_path)), base_url="http://tierd", timeout=30
        )

    def in_trio(self, function: Any, *args: Any) -> Any:
        return trio.from_thread.run_sync(function, *args, trio_token=self.token)


@contextlib.contextmanager
def live(daemon: FakeDaemon, socket_path: Path, *, limits: Limits | None = None, **options: Any) -> Iterator[Live]:
    """Raises what `serve` raises before it has started. Ends within 30 s or fails."""
    with warnings.catch_warnings():
        # hypercorn leaves its channels to the garbage collector: let it be here, not in the next test
        warnings.filterwarnings("ignore", "Unclosed <Memory", ResourceWarning)
        try:
            with _live(daemon, socket_path, limits, options) as server:
                yield server
        finally:
            gc.collect()


@contextlib.contextmanager
def _live(daemon: FakeDaemon, socket_path: Path, limits: Limits | None, options: dict[str, Any]) -> Iterator[Live]:
    begun: queue.SimpleQueue[Live | BaseException] = queue.SimpleQueue()
    call = partial(serve, daemon, socket_path=socket_path, limits=limits or Limits(), **options)

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(call)
                begun.put(Live(daemon, socket_path, trio.lowlevel.current_trio_token(), scope))

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            begun.put(error)

    thread = threading.Thread(target=run, name="api")
    thread.start()
    server = begun.get(timeout=30)
    if isinstance(server, BaseException):
        thread.join()
        while isinstance(server, BaseExceptionGroup):
            server = server.exceptions[0]
        raise server
    try:
        yield server
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            server.in_trio(server.scope.cancel)
        thread.join(timeout=30)
        assert not thread.is_alive(), "the API did not stop"
        if not begun.empty():
            raise AssertionError("the API ended with an error") from begun.get()  # type: ignore[misc]
