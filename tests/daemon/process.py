# SPDX-License-Identifier: Apache-2.0
"""The real `tierd run`, as systemd would start it: a process, a configuration, a notify socket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.kernel.vmm import SLOWNESS, Vmm, wait_for

OURS = f".{os.getpid()}"  # ends the names of guests of this run: another run on this host has its own
POLICY = {"min_idle_s": 0.2, "unsafe_min_idle": True, "interval_s": 0.1, "idle_intervals": 2}
Boot = Callable[..., Vmm]
TOLD_S_MAX = 90.0 * SLOWNESS


def guests_at(path: Path) -> dict[str, dict[str, Any]]:
    """By name, of the tierd whose API is there."""
    # not the CLI's client, which takes 20 times the CPU: this is called until something has happened
    connection = http.client.HTTPConnection("tierd")
    with contextlib.closing(connection):
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(20 * SLOWNESS)
        connection.sock.connect(str(path))
        connection.request("GET", "/guests")
        guests = json.load(connection.getresponse())["guests"]
    return {guest["name"]: guest for guest in guests}


class Daemon:
    """`with` ends it (by its pid), however the test went."""

    def __init__(self, tmpfs_dir: Path, disk_dir: Path, **settings: Any) -> None:
        self.runtime_dir, self.store_dir = tmpfs_dir / "run", disk_dir / "store"
        self.config = disk_dir / "tierd.yaml"
        self.socket = tmpfs_dir / "tierd.sock"
        self.log_path = disk_dir / "log"
        self.write(**settings)
        self.process: subprocess.Popen[bytes] | None = None
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify_path = tmpfs_dir / "notify"
        self.notify.bind(str(self.notify_path))
        self.notify.settimeout(20 * SLOWNESS)
        self.told: list[str] = []

    def write(self, **settings: Any) -> None:
        usual: dict[str, Any] = {
            "runtime_dir": str(self.runtime_dir),
            "api": {"socket": str(self.socket)},
            "store": {"path": str(self.store_dir)},
            "on_stop": "restore",
            "discover_interval_s": 0.2,
            "log": {"level": "debug", "format": "json"},
            "guests": [{"name": f"*{OURS}", **POLICY}],
        }
        self.config.write_text(yaml.safe_dump(usual | settings))

    def start(self, through: Sequence[str] = ()) -> None:
        """Returns when it is ready. `through`: a command that executes the one it is given."""
        self.spawn(through)
        self.wait_told("READY=1")

    def spawn(self, through: Sequence[str] = ()) -> None:
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.notify_path), "WATCHDOG_USEC": "400000"}
        daemon = [sys.executable, "-m", "tierd", "run", "--config", str(self.config)]
        command = ["setpriv", "--pdeathsig", "KILL", *through, *daemon]  # it ends with us, however we end
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def wait_told(self, wanted: str) -> str:
        """The next notification with `wanted` in it."""
        until = time.monotonic() + TOLD_S_MAX
        while True:
            assert time.monotonic() < until, f"not told within {TOLD_S_MAX:g} s: {wanted}"
            text = self.notify.recv(4096).decode()
            self.told.append(text)
            if wanted in text:
                return text

    def log(self) -> list[dict[str, Any]]:
        """Whole lines: the last one may be half written where a page of the file ends."""
        lines = self.log_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.log() if entry["event"] == event]

    def guests(self) -> dict[str, dict[str, Any]]:
        """By name, without what ends all of them."""
        return {guest["name"].removesuffix(OURS): guest for guest in self._get("/guests")["guests"]}

    def status(self) -> dict[str, Any]:
        return self._get("/status")

    def uptime_s(self) -> float:
        return float(self.status()["uptime_s"])

    def _get(self, path: str) -> dict[str, Any]:
        # not the CLI's client, which takes 20 times the CPU: this is called until something has happened
        connection = http.client.HTTPConnection("tierd")
        with contextlib.closing(connection):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(20 * SLOWNESS)
            connection.sock.connect(str(self.socket))
            connection.request("GET", path)
            answer: dict[str, Any] = json.load(connection.getresponse())
        return answer

    def stored_bytes(self, name: str) -> int:
        guest = self.guests().get(name)
        return sum(guest["stored_bytes"].values()) if guest else 0

    def wait_active(self, name: str) -> None:
        wait_for(lambda: self.guests().get(name, {}).get("state") == "active", f"guest {name} is served")

    def tierd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "tierd",
            "--socket",
            str(self.socket),
            "--config",
            str(self.config),
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOWNESS)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=60 * SLOWNESS)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.notify.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.log_path.exists():
            print(self.log_path.read_text()[-4000:])  # seen where the test failed


def evicted(daemon: Daemon, name: str, vmm: Vmm) -> None:
    wait_for(lambda: daemon.stored_bytes(name) > 0.9 * vmm.pages * vmm.page_bytes, f"guest {name} is evicted", 60)


def with_tiers(daemon: Daemon, *tiers: object, **settings: Any) -> None:
    """The configuration: all guests of this run have these tiers."""
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "tiers": list(tiers)}], **settings)


def tiers(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """What is said of the tiers of guest web, by name."""
    return {tier["name"]: tier for tier in daemon.guests()["web"]["tiers"]}
