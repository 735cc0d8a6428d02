# SPDX-License-Identifier: Apache-2.0
"""Real Redis servers for tests: on loopback, at ports that were free, in a directory of their own, ended by their pid."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError, RedisError, TimeoutError

# Debian has one binary that is server, sentinel and checker, by the name it is called; package redis-tools starts no service
BINARY = shutil.which("redis-check-rdb") or "redis-server"
READY_IN_S = 120.0
FIRST_PORT = 10000


def free_ports(count: int) -> list[int]:
    """None of those that the kernel gives to connections: a server that was killed comes back to its port."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: set[int] = set()
    while len(found) < count:
        port = FIRST_PORT + secrets.randbelow(end - FIRST_PORT)
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)


def wait_for(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    until = time.monotonic() + READY_IN_S
    while not condition():
        assert time.monotonic() < until, otherwise()
        time.sleep(0.02)


class Server:
    """One redis-server, with an append-only file unless `settings` say otherwise. Leaving the block ends it.

    Those that watch each other are not on a disk: each vote is synced, and while a busy disk takes seconds for that, none of them
    is elected."""

    program = "redis-server"

    def __init__(self, *settings: str, on_disk: bool = True) -> None:
        self.port = free_ports(1)[0]
        self._tls = "--tls-cert-file" in settings
        disk = os.environ.get("TIERD_TEST_DISK", "/var/tmp")
        self.directory = Path(tempfile.mkdtemp(prefix="tierd-redis-", dir=disk if on_disk else "/dev/shm"))
        self.settings = list(settings)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

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
        """It ends with the thread that calls this, however that ends: call it from the test's own. At the usual priority,
        whatever that of the tests is (beside.sh): a sentinel whose timer is late decides nothing for half a minute."""
        named = ["bash", "-c", 'exec -a "$0" "$@"', self.program, BINARY, *self.arguments()]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "nice", "-n", str(-os.nice(0)), *named],
            cwd=self.directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(self._answers, lambda: f"{self.program} does not start:\n{self.log()}")

    def arguments(self) -> list[str]:
        own = ["--logfile", "server.log", "--dir", str(self.directory), "--bind", "127.0.0.1", "--save", ""]
        port = ["--port", "0", "--tls-port", str(self.port)] if self._tls else ["--port", str(self.port)]
        own += ["--repl-diskless-sync-delay", "0"]  # it waits five seconds for more replicas
        return [*port, *own, "--appendonly", "yes", "--appendfsync", "always", *self.settings]

    def log(self) -> str:
        path = self.directory / "server.log"
        return path.read_text() if path.exists() else ""

    def ask(self, *command: str | int | bytes) -> Any:
        """One command, by a connection of the test's own."""
        with Redis(port=self.port, socket_timeout=10, protocol=2) as client:
            return client.execute_command(*command)

    def kill(self) -> None:
        """SIGKILL, as a crash. Of who rewrites its file, too, which would go on in a directory that is being removed."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        assert self._process
        self._process.send_signal(number)

    def _answers(self) -> bool:
        assert self._process
        assert self._process.poll() is None, f"{self.program} ended:\n{self.log()}"
        if self._tls:
            return "Ready to accept connections" in self.log()
        try:
            return bool(self.ask("PING"))
        except (ConnectionError, TimeoutError):  # not there yet, or still loading
            return False


class Sentinel(Server):
    """Watches `primary` as `main`; two of them decide."""

    program = "redis-sentinel"

    def __init__(self, primary: Server, *settings: str) -> None:
        super().__init__(*settings, on_disk=False)
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            "logfile server.log",
            f"dir {self.directory}",
            f"sentinel monitor main 127.0.0.1 {primary.port} 2",
            "sentinel down-after-milliseconds main 1000",
            "sentinel failover-timeout main 5000",
            *settings,
        ]
        (self.directory / "sentinel.conf").write_text("\n".join(lines) + "\n")

    def arguments(self) -> list[str]:
        return ["sentinel.conf"]


class Watched:
    """A primary, a replica, and three sentinels. Patient: as Cluster."""

    def __init__(self, patient: bool = False) -> None:
        self._patient = patient

    def __enter__(self) -> Watched:
        self._stack = ExitStack()
        with self._stack as stack:
            self.primary = stack.enter_context(Server(on_disk=False))
            replica_of = ("--replicaof", f"127.0.0.1 {self.primary.port}")
            self.replica = stack.enter_context(Server(*replica_of, on_disk=False))
            self.sentinels = [stack.enter_context(Sentinel(self.primary)) for _ in range(3)]
            wait_for(self._ready, self.log)
            if self._patient:
                for sentinel in self.sentinels:
                    sentinel.ask("SENTINEL SET", "main", "down-after-milliseconds", 60000)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def addresses(self) -> list[str]:
        return [sentinel.address for sentinel in self.sentinels]

    def log(self) -> str:
        return "\n".join(server.log() for server in (self.primary, self.replica, *self.sentinels))

    def _ready(self) -> bool:
        def knows_all(sentinel: Sentinel) -> bool:
            seen = sentinel.ask("SENTINEL MASTER", "main")
            return bool(seen["num-other-sentinels"] == 2 and seen["num-slaves"] == 1)

        synced = self.replica.ask("INFO")["master_link_status"] == "up"
        return synced and all(map(knows_all, self.sentinels))


def cluster_node() -> Server:
    """One that knows no other yet."""
    bus = str(free_ports(1)[0])
    return Server("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", bus, on_disk=False)


class Cluster:
    """Three primaries, each with `replicas`. Patient: on a machine that is full a node, or its disk, may say nothing for seconds,
    and none is to be given up."""

    def __init__(self, replicas: int = 0, size: int = 3, patient: bool = False) -> None:
        self._replicas, self._size, self._patient = replicas, size, patient

    def __enter__(self) -> Cluster:
        self._stack = ExitStack()
        with self._stack as stack:
            self.servers = [stack.enter_context(cluster_node()) for _ in range(self._size * (1 + self._replicas))]
            self.cli("--cluster", "create", *self.addresses, "--cluster-replicas", str(self._replicas))
            wait_for(self._ready, self.log)
            if self._patient:
                for server in self.servers:
                    server.ask("CONFIG SET", "cluster-node-timeout", "60000")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def cli(self, *arguments: str) -> str:
        command = ["redis-cli", *arguments, "--cluster-yes"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_IN_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def primaries(self) -> list[Server]:
        """As they see themselves, of those that answer."""
        return [server for server in self.servers if self._info(server).get("role") == "master"]

    def log(self) -> str:
        return "\n".join(server.log() for server in self.servers)

    def _ready(self) -> bool:
        def ready(server: Server) -> bool:
            state, info = server.ask("CLUSTER INFO"), self._info(server)
            whole = state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == len(self.servers)
            return whole and (info["connected_slaves"] == self._replicas or info.get("master_link_status") == "up")

        return all(map(ready, self.servers))

    @staticmethod
    def _info(server: Server) -> dict[str, Any]:
        try:
            return dict(server.ask("INFO"))
        except RedisError:
            return {}


class Wire:
    """A way to `server` that holds back what contains `marker`, and what its connection sends after that, as a network may
    do: also when the client has hung up. Other connections are not disturbed."""

    def __init__(self, server: Server, marker: bytes) -> None:
        self._to, self._marker = server.port, marker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.holds, self._go_on = threading.Event(), threading.Event()
        self._held: list[threading.Thread] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._sockets = [self._listener]

    def __enter__(self) -> Wire:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._go_on.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for sock in self._sockets[1:]:
            _hang_up(sock)
        for thread in self._threads[1:]:
            thread.join()
        for sock in self._sockets:
            sock.close()

    def release(self) -> None:
        """What was held arrives after all. Returns when the server has done with that connection."""
        self._go_on.set()
        for thread in self._held:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:  # closed
                return
            server = socket.create_connection(("127.0.0.1", self._to))
            self._sockets += [client, server]
            back = threading.Thread(target=self._carry, args=(server, client, None))
            forth = threading.Thread(target=self._carry, args=(client, server, back))
            self._threads += [back, forth]
            back.start()
            forth.start()

    def _carry(self, source: socket.socket, sink: socket.socket, back: threading.Thread | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if back and self._marker in data:
                    self._held += [threading.current_thread(), back]
                    self.holds.set()
                    self._go_on.wait()
                sink.sendall(data)
        except OSError:  # reset: the other side hears of it below
            pass
        _hang_up(sink, socket.SHUT_WR)


def _hang_up(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with suppress(OSError):  # it has ended by itself
        sock.shutdown(how)
