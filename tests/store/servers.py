# SPDX-License-Identifier: Apache-2.0
"""Real Redis servers for tests: on loopback, at ports that were free, in a directory of their own, ended by their pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError, ResponseError

# Debian has one binary that is server, sentinel and checker, by the name it is called; package redis-tools starts no service
BINARY = shutil.which("redis-check-rdb") or "redis-server"
STARTS_IN_S = 30.0


def free_ports(count: int) -> list[int]:
    """A cluster's bus is 10,000 above the port, so these are low."""
    found: list[socket.socket] = []
    try:
        while len(found) < count:
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            if sock.getsockname()[1] < 55_000:
                found.append(sock)
            else:
                sock.close()
        return [sock.getsockname()[1] for sock in found]
    finally:
        for sock in found:
            sock.close()


class Server:
    """One redis-server, with an append-only file unless `settings` say otherwise. Leaving the block ends it."""

    program = "redis-server"

    def __init__(self, *settings: str, port: int | None = None, password: str | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self.directory = Path(
            tempfile.mkdtemp(prefix="tierd-redis-", dir=os.environ.get("TIERD_TEST_DISK", "/var/tmp"))
        )
        self.settings, self._password = list(settings), password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def start(self) -> None:
        command = ["redis-server", *self.command()]
        self._process = subprocess.Popen(
            command, cwd=self.directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._answers, lambda: f"redis-server does not start:\n{self.log()}")

    def command(self) -> list[str]:
        usual = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes"]
        own = ["--logfile", "server.log", "--dir", str(self.directory)]
        return [*usual, *own, *self.settings]

    def log(self) -> str:
        path = self.directory / "server.log"
        return path.read_text() if path.exists() else ""

    def client(self) -> Redis:
        return Redis(port=self.port, password=self._password, socket_timeout=5, protocol=2)

    def ask(self, *command: str | int | bytes) -> Any:
        """One command, by a connection of the test's own."""
        with self.client() as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"redis-server ended:\n{self.log()}"
        try:
            self.ask("PING")
        except ConnectionError:
            return False
        except ResponseError:  # it wants a password, or still loads
            return True
        return True


def wait_for(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    until = time.monotonic() + STARTS_IN_S
    while not condition():
        assert time.monotonic() < until, otherwise()
        time.sleep(0.02)
