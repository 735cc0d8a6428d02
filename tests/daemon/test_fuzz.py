# SPDX-License-Identifier: Apache-2.0
"""What comes from outside the process: state files a predecessor may have left, and bytes that clients send to the API."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from tests.daemon.fake import FakeDaemon, FakeGuest
from tests.daemon.live import Live, live
from tests.daemon.test_api import connect, read_to_the_end
from tests.fuzz import fuzz
from tierd.api import Limits
from tierd.attach.procfs import boot_id, start_ticks
from tierd.native import Identity, Place, TableRegion, TierKind, table_create
from tierd.serve import Stale, StateError, prepare_runtime_dir, read_state

# --- state files ----------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("8sIIQ iiQQQQ40s256s" + 8 * "II64s1024s")  # struct table_header, up to its regions
REGION = struct.Struct("QQQQQQii")
CHECKED_BYTES = HEADER.size + 32 * REGION.size
# offset and format of each field of the header that a reader uses
FIELDS = [(8, "I"), (12, "I"), (16, "Q"), (24, "i"), (28, "i"), (32, "Q"), (40, "Q"), (48, "Q"), (56, "Q")]
FIELDS += [(HEADER.size + at, "Q") for at in range(0, 3 * REGION.size, 8)]
TEXTS = [(64, 40), (104, 256), (368, 64), (432, 1024)]


def sealed(data: bytes) -> bytes:
    """With a checksum that is right again (FNV-1a, table.c)."""
    total = 2166136261
    for byte in data[8:CHECKED_BYTES]:
        total = (total ^ byte) * 16777619 & 0xFFFFFFFF
    return data[:CHECKED_BYTES] + total.to_bytes(4, "little") + data[CHECKED_BYTES + 4 :]


@pytest.fixture(scope="module")
def vmm() -> Iterator[int]:
    """The pid of a process that lives and has no guest memory."""
    process = subprocess.Popen(["sleep", "600"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def valid(vmm: int, tmpfs_dir: Path) -> Path:
    ticks = start_ticks(vmm)
    assert ticks is not None
    path = prepare_runtime_dir(tmpfs_dir / "run") / f"{vmm}-{ticks}.state"
    identity = Identity(
        vmm, ticks, boot_id(), "guest", 7, 8_000_000_000, (Place(TierKind.FILE, "file", "/store/guest"),)
    )
    with path.open("w+b") as file:
        table_create(
            file.fileno(), identity, [TableRegion(1 << 40, 1 << 20, 0, 1, 2), TableRegion(1 << 41, 1 << 16, 0, 1, 3)]
        )
    return path


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, CHECKED_BYTES + 3), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 17), st.just(0)),
    st.tuples(st.just("add"), st.integers(1, 1 << 16), st.just(0)),
    st.tuples(st.just("splice"), st.integers(0, CHECKED_BYTES - 64), st.integers(0, CHECKED_BYTES - 64)),
    st.tuples(
        st.just("field"),
        st.sampled_from(FIELDS),
        st.sampled_from(
            [0, 1, 32, 33, 4095, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 57, (1 << 63) - 1, (1 << 64) - 1]
        )
        | st.integers(0, (1 << 64) - 1),
    ),
    st.tuples(st.just("text"), st.sampled_from(TEXTS), st.binary(min_size=1, max_size=3)),
)


def damaged(data: bytes, how: tuple[str, Any, Any]) -> bytes:
    kind, where, what = how
    if kind == "flip" and where < len(data):
        return data[:where] + bytes([data[where] ^ 1 << what]) + data[where + 1 :]
    if kind == "cut":
        return data[:where]
    if kind == "add":
        return data + bytes(where)
    if kind == "splice":
        return data[:where] + data[what : what + 64] + data[where + 64 :]
    if kind == "field":
        at, form = where
        value = (what % (1 << 8 * struct.calcsize(form))).to_bytes(struct.calcsize(form), "little")
        return data[:at] + value + data[at + len(value) :]
    if kind == "text":
        at, size = where
        return data[:at] + (what * size)[:size] + data[at + size :]
    return data


@fuzz
@given(st.lists(DAMAGE, min_size=1, max_size=4), st.booleans())
@example([], True)
@example([("field", (12, "I"), 33)], True)
@example([("field", (24, "i"), (1 << 32) - 1)], True)
@example([("text", (360, 1024), b"\xff")], True)
@example([("text", (104, 256), b"\xff")], True)
def test_any_state_file_is_refused_or_can_be_used(valid: Path, changes: list[tuple[str, Any, Any]], seal: bool) -> None:
    """And reading it changes nothing."""
    data = valid.read_bytes()
    for change in changes:
        data = damaged(data, change)
    named = valid.parent / "damaged" / valid.name
    named.parent.mkdir(exist_ok=True)
    named.write_bytes(sealed(data) if seal and len(data) > CHECKED_BYTES + 4 else data)
    before = named.read_bytes()
    with contextlib.suppress(StateError, Stale):
        left = read_state(named, boot_id())
        assert f"{left.spec.pid}-{left.spec.start_ticks}" in named.name
        assert left.spec.regions
        assert 1 <= left.serving.readahead_pages <= 512
    assert named.read_bytes() == before


# --- the API --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    # short limits: a client that says nothing more is closed soon
    limits = Limits(header_s=0.2, body_s=0.2, send_s=0.5)
    with live(FakeDaemon(FakeGuest("web", 10, "10-1")), tmp_path_factory.mktemp("api") / "s", limits=limits) as server:
        yield server


def answered(server: Live, data: bytes) -> bytes:
    """What the server says to raw bytes, after which the client says no more."""
    with connect(server.socket_path) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        return read_to_the_end(client)


def is_well(server: Live) -> None:
    assert answered(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 200 "
    )


METHODS = st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PUT", "PRI", "CONNECT", "get", "", "\0"])
TARGETS = st.sampled_from(
    [
        "/status",
        "/guests",
        "/guests/web/evict",
        "/guests/11-1",  # not one of the fake: its detach waits until it is told to end
        "/metrics",
        "*",
        "//",
        "/%",
        "/%00",
        "/guests/%ff",
        "x:y",
        "",
    ]
) | st.text(max_size=12)
HEADERS = st.lists(
    st.sampled_from(
        [
            "Host: x",
            "Host:",
            "Content-Length: 5",
            "Content-Length: -1",
            "Content-Length: 99999999999999999999",
            "Transfer-Encoding: chunked",
            "Connection: close",
            "Connection: Upgrade",
            "Upgrade: h2c",
            "HTTP2-Settings: AAMAAABkAAQAAP__",
            "HTTP2-Settings: \x00",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Expect: 100-continue",
            "Accept: */*;q=x",
            ": x",
            "X",
        ]
    )
    | st.text(max_size=20),
    max_size=6,
)
BODIES = st.binary(max_size=40) | st.sampled_from(
    [b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffff\r\n", b"{}", b'{"pid": 10}', b"[" * 3000]
)
REQUESTS = st.builds(
    lambda method, target, version, headers, body: (
        f"{method} {target} {version}\r\n".encode(errors="replace")
        + "".join(f"{header}\r\n" for header in headers).encode(errors="replace")
        + b"\r\n"
        + body
    ),
    METHODS,
    TARGETS,
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "HTTP/9.9", ""]),
    HEADERS,
    BODIES,
)


@fuzz
@given(st.binary(max_size=200) | REQUESTS)
@example(b"E / HTTP/0.1\nUpgrade:h2c\n\n")
@example(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAQAAAAA\r\n\r\n")
def test_any_bytes_are_answered_or_closed(server: Live, data: bytes) -> None:
    with structlog.testing.capture_logs() as logged:
        answer = answered(server, data)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 ", b"\0\0"))  # or a frame of HTTP/2
    assert not answer.startswith(b"HTTP/1.1 500"), answer
    assert [event for event in logged if event["log_level"] in ("error", "critical")] == []
    is_well(server)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(
    st.sampled_from(
        ["/guests", "/guests/web/evict", "/guests/web/pause", "/guests/web/retry", "/reload", "/guests/x/evict"]
    ),
    JSON
    | st.dictionaries(
        st.sampled_from(["pid", "name", "max_bytes", "min_idle_s"]), st.integers(-5, 1 << 65) | JSON, max_size=4
    ),
)
@example("/guests", {"pid": 77, "name": "\ud800"})
@example("/guests", {"pid": 77, "name": "a\0b\n"})
def test_any_json_is_answered(server: Live, path: str, body: Any) -> None:
    server.daemon.guests = {key: guest for key, guest in server.daemon.guests.items() if key == "10-1"}
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    answer = answered(server, head.encode() + data)
    assert answer.startswith(b"HTTP/1.1 "), "a request that is HTTP has an answer"
    assert not answer.startswith(b"HTTP/1.1 500"), answer
    is_well(server)
