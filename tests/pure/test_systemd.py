# SPDX-License-Identifier: Apache-2.0
"""sd_notify against a real datagram socket, by path and abstract, with and without descriptors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierd.systemd import Notifier, listen_fds, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, Notifier]]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@tierd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if name[0] == "@" else name)
        listener.settimeout(5)
        yield listener, Notifier.from_environment({"NOTIFY_SOCKET": name})


def received(listener: socket.socket) -> list[str]:
    return listener.recv(4096).decode().split("\n")


def test_ready_and_stopping_carry_one_line_of_status(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    assert notifier.ready("2 guests\nall well")
    assert received(listener) == ["READY=1", f"MAINPID={os.getpid()}", "STATUS=2 guests all well"]
    notifier.stopping("restoring 1 GiB")
    assert received(listener) == ["STOPPING=1", "STATUS=restoring 1 GiB"]
    notifier.status("x" * 1000)
    assert received(listener) == ["STATUS=" + "x" * 400]


def test_reloading_carries_the_monotonic_time(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    before_us = time.monotonic_ns() // 1000
    notifier.reloading()
    word, stamp = received(listener)
    assert word == "RELOADING=1"
    assert before_us <= int(stamp.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_watchdog_and_timeout(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    notifier.watchdog()
    assert received(listener) == ["WATCHDOG=1"]
    notifier.extend_timeout(1.5)
    assert received(listener) == ["EXTEND_TIMEOUT_USEC=1500000"]


def test_fd_store_passes_the_descriptors(manager: tuple[socket.socket, Notifier]) -> None:
    listener, notifier = manager
    ours, theirs = os.pipe()
    try:
        notifier.store_fds("guest-1", [theirs])
        message, fds, _, _ = socket.recv_fds(listener, 4096, 4)
        assert message.decode().split("\n") == ["FDSTORE=1", "FDNAME=guest-1", "FDPOLL=0"]
        os.write(fds[0], b"same pipe")
        assert os.read(ours, 100) == b"same pipe"
        os.close(fds[0])
        notifier.remove_fds("guest-1")
        assert received(listener) == ["FDSTOREREMOVE=1", "FDNAME=guest-1"]
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("name", ["", "a:b", "a\nREADY=1", "x" * 256, "ä"])
def test_an_fd_name_cannot_smuggle_anything(name: str) -> None:
    with pytest.raises(ValueError, match="FDNAME"):
        Notifier("/nowhere").store_fds(name, [])


def test_without_a_manager_nothing_is_sent() -> None:
    assert Notifier.from_environment({}).ready("") is False


def test_a_dead_or_strange_manager_is_an_error_for_the_caller_to_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Notifier(str(tmp_path / "gone")).watchdog()
    with pytest.raises(OSError, match="vsock"):
        Notifier("vsock:2:1234").watchdog()


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
    ],
)
def test_watchdog_interval(environment: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(environment, pid=42) == interval_s


def test_descriptors_of_another_process_are_left_alone() -> None:
    environment = {"LISTEN_FDS": "2", "LISTEN_PID": "43"}
    assert listen_fds(environment, pid=42) == []
    assert listen_fds({}, pid=42) == []


def test_listen_fds_are_taken_once_and_not_inherited() -> None:
    script = (
        "import os; os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from tierd.systemd import listen_fds\n"
        "found = listen_fds(); print(found, [os.get_inheritable(fd) for _, fd in found], listen_fds(),"
        " [k for k in os.environ if k.startswith('LISTEN')])"
    )
    read_end, write_end = os.pipe()

    def place() -> None:
        os.dup2(read_end, 3)
        os.dup2(write_end, 4)

    try:
        ran = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "uffd"},
            pass_fds=(3, 4),
            preexec_fn=place,
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert ran.stdout.strip() == "[('uffd', 3), ('unknown', 4)] [False, False] [] []"
