# SPDX-License-Identifier: Apache-2.0
"""The Redis server of `tierd demo --tiers redis`: a process of the demo's own, on loopback, as a store must be set."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

READY_S_MAX = 20.0


class RedisMissing(Exception):
    """There is no server; the text says what to install."""


def binary() -> str:
    """Debian's packages have one binary that is the server or a checker, by the name it is called."""
    found = shutil.which("redis-server") or shutil.which("redis-check-rdb") or shutil.which("valkey-server")
    if found is None:
        raise RedisMissing("the demo with redis needs a Redis or Valkey server; on Debian: apt-get install redis-tools")
    return found


class RedisServer:
    """`with` starts it and ends it. Its file is in `directory`, synced at every write: a server that may forget is refused."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._binary = directory.absolute(), binary()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the section `stores`."""
        return {"redis": {"addresses": [f"127.0.0.1:{self.port}"]}}

    def __enter__(self) -> Self:
        keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        place = [
            "--bind",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--dir",
            str(self._directory),
            "--logfile",
            "redis.log",
        ]
        named = ["bash", "-c", 'exec -a "$0" "$@"', "redis-server", self._binary, *place, *keep]
        self._process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *named])
        until = time.monotonic() + READY_S_MAX
        while not self._answers():
            if time.monotonic() > until or self._process.poll() is not None:
                self.__exit__(None, None, None)
                raise RedisMissing(f"{self._binary} does not start; see redis.log of the demo's directory")
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:  # not yet
            return False
