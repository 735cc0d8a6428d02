# SPDX-License-Identifier: Apache-2.0
"""What of the demo needs no guest: its verdict, the guest's serial line, the guest's files."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tierd.demo.guest import Console, GuestError, find_kernel
from tierd.demo.script import Result, filesystem, summary

GOOD = Result(
    guest_used_bytes=1000,
    given_back_bytes=400,
    given_back_ratio=0.4,
    faults=1,
    fault_p50_us=1.0,
    fault_p99_us=2.0,
    verified_bytes=900,
    wrong_bytes=0,
    engine="stock",
    tiers={"zero": 100, "file": 300},
    staged_read_ratio=0.004,
    accel="tcg",
    seconds=1.0,
)


@pytest.mark.parametrize(
    ("change", "good"),
    [({}, True), ({"wrong_bytes": 1}, False), ({"given_back_ratio": 0.399}, False), ({"verified_bytes": 0}, False)],
)
def test_verdict(change: dict[str, float], good: bool) -> None:
    assert dataclasses.replace(GOOD, **change).good is good  # type: ignore[arg-type]


def test_summary_shouts_about_wrong_bytes() -> None:
    assert "every byte was right" in summary(GOOD)
    assert "3 BYTES WERE WRONG" in summary(dataclasses.replace(GOOD, wrong_bytes=3, fault_p50_us=None))


@pytest.fixture
def line() -> Iterator[tuple[Console, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Console("vm", ours), theirs


def test_console_puts_lines_together(line: tuple[Console, socket.socket]) -> None:
    console, guest = line
    guest.sendall(b"BOO")
    assert console.poll() == []
    guest.sendall(b"TED\r\nREADY used=12 ze")
    assert console.poll() == ["BOOTED"]
    guest.sendall(b"ro=3\r\n")
    assert console.expect("READY", 5) == {"used": 12, "zero": 3}


def test_console_remembers_the_worst(line: tuple[Console, socket.socket]) -> None:
    """A wrong byte that any line told of is not forgotten by a later verification."""
    console, guest = line
    guest.sendall(b"TICK rounds=1 wrong=5\nVERIFIED bytes=10 wrong=0\n")
    assert console.verify(5) == (10, 0)
    assert console.wrong_bytes == 5
    assert guest.recv(100) == b"verify\n"


def test_console_tells_what_the_guest_said_last(line: tuple[Console, socket.socket]) -> None:
    console, guest = line
    guest.sendall(b"Kernel panic\n")
    with pytest.raises(GuestError, match=r"guest vm did not say READY within 0 s; it last said:\s+Kernel panic"):
        console.expect("READY", 0.2)
    guest.close()
    with pytest.raises(GuestError, match=r"guest vm has ended; it last said:\s+Kernel panic"):
        console.expect("READY", 5)


def test_the_newest_kernel_is_taken(tmp_path: Path) -> None:
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64", "5.10.0-80-cloud-amd64"):
        (tmp_path / f"vmlinuz-{version}").touch()
    assert find_kernel(tmp_path).name == "vmlinuz-6.1.0-56-cloud-amd64"


def test_filesystem_is_that_of_the_mount_point(tmp_path: Path) -> None:
    assert filesystem(Path("/proc")) == "proc"
    assert filesystem(tmp_path) == ""


def test_init_explains_its_settings() -> None:
    source = Path(__file__).parents[2].joinpath("tierd", "demo", "init.c").read_text()
    comment = source[source.index("/*\n") : source.index("#include")]
    settings = re.findall(r'setting\("(\w+)"', source)
    assert settings
    assert not [name for name in settings if name not in comment]
