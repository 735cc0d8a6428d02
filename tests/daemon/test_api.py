# SPDX-License-Identifier: Apache-2.0
"""The API over a real Unix socket: what it answers, and what a bad client cannot do to it."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
import trio

from tests.daemon.fake import GIB, PAGE_BYTES, FakeDaemon, FakeGuest
from tests.daemon.live import Live, live
from tierd.api import Limits, SocketUnusable, bind_tcp, bind_unix
from tierd.document import ConfigError, ConfigErrors
from tierd.view import StoreStatus

QUICK = Limits(connections_max=4, header_s=0.5, body_s=0.5, send_s=0.5)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    daemon = FakeDaemon(
        FakeGuest("web", 10, "10-1"),
        FakeGuest("db", 11, "11-1"),
        FakeGuest("db", 12, "12-1"),
        FakeGuest("a/b?c", 13, "13-1"),
        FakeGuest("10", 14, "14-1"),
    )
    daemon.refuse("nested guests are not allowed")
    with live(daemon, tmp_path / "tierd.sock") as server:
        yield server


@pytest.fixture
def client(server: Live) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def problem(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    body = answer.json()
    assert body["error"]
    assert body["remedy"]
    return answer.status_code, body


# --- answers ----------------------------------------------------------------------------------------------------------


def test_status_guests_and_one_guest(client: httpx.Client) -> None:
    status = client.get("/status").json()
    assert (status["version"], status["engine"], len(status["guests"])) == ("0.1.0", "stock", 6)
    assert status["stores"][0]["used_bytes"] == GIB
    guests = client.get("/guests").json()["guests"]
    assert guests == status["guests"]
    web = client.get("/guests/web").json()
    assert web == guests[0]
    assert (web["stored_bytes"]["file"], web["idle"][1]) == (GIB // 4, [120.0, GIB // 4])
    assert web["counters"]["latency_buckets"] == [0] * 40


@pytest.mark.parametrize("key", ["11-1", "11", "a%2Fb%3Fc", "13", "nested"])
def test_a_guest_by_key_pid_or_any_name(client: httpx.Client, key: str) -> None:
    assert client.get(f"/guests/{key}").status_code == 200


@pytest.mark.parametrize(("wanted", "keys"), [("db", ["11-1", "12-1"]), ("10", ["10-1", "14-1"])])
def test_an_ambiguous_name_is_refused_with_the_keys(client: httpx.Client, wanted: str, keys: list[str]) -> None:
    for answer in (client.get(f"/guests/{wanted}"), client.post(f"/guests/{wanted}/pause")):
        status, body = problem(answer)
        assert (status, body["keys"]) == (409, keys)
        assert all(key in body["error"] for key in keys)


def test_pause_and_resume(client: httpx.Client) -> None:
    assert client.post("/guests/web/pause").json()["state"] == "paused"
    assert client.post("/guests/web/resume").json()["state"] == "active"
    assert client.post("/guests/a%2Fb%3Fc/pause").json()["key"] == "13-1"


def test_evict_passes_its_bounds_on(server: Live, client: httpx.Client) -> None:
    answer = client.post("/guests/web/evict", json={"max_bytes": 1 << 20, "min_idle_s": 5})
    assert answer.json() == {"evicted_bytes": 256 * PAGE_BYTES}
    assert client.post("/guests/web/evict").status_code == 200
    assert server.daemon.guests["10-1"].calls == [("evict", 1 << 20, 5), ("evict", None, None)]


def test_attach_and_detach(server: Live, client: httpx.Client) -> None:
    assert client.post("/guests", json={"pid": 77, "name": "new"}).json()["key"] == "77-1"
    server.in_trio(server.daemon.guests["77-1"].go_on.set)
    assert client.delete("/guests/new").json() == {"detached": "77-1"}
    assert client.get("/guests/new").status_code == 404


def test_reload_tells_what_changed(client: httpx.Client) -> None:
    assert client.post("/reload").json() == {"changes": ["defaults.interval_s: 10 -> 20"]}


def test_health_names_the_ill_store(server: Live, client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"healthy": True, "reasons": []}
    server.daemon.store = StoreStatus("file", "/x", 1, 1, healthy=False, reason="EIO")
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["store file: EIO"])


def test_metrics_in_the_format_that_was_asked_for(client: httpx.Client) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert 'tierd_guest_size_bytes{guest="web",pid="10"} 1.073741824e+09' in plain.text
    openmetrics = client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")


# --- progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_streamed_while_it_runs(server: Live, client: httpx.Client) -> None:
    with client.stream("POST", "/guests/web/restore?progress=1") as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = (json.loads(line) for line in answer.iter_lines())
        seen = next(lines)
        while seen["done_bytes"] == 0:
            seen = next(lines)
        assert seen == {"done_bytes": GIB // 8, "total_bytes": GIB // 4}
        assert problem(client.post("/guests/web/evict"))[0] == 409  # one at a time
        assert client.post("/guests/web/pause").status_code == 200  # but never in the way of a pause
        server.in_trio(server.daemon.guests["10-1"].go_on.set)
        assert list(lines)[-1] == {"result": {"restored_bytes": GIB // 4}}
    assert client.post("/guests/web/evict").status_code == 200


def test_a_failure_ends_the_stream_with_what_to_do(server: Live, client: httpx.Client) -> None:
    server.daemon.guests["10-1"].fails = OSError(5, "Input/output error")
    with (
        structlog.testing.capture_logs() as logged,
        client.stream("POST", "/guests/web/evict?progress=1") as answer,
    ):
        last = json.loads(list(answer.iter_lines())[-1])
    assert [event["event"] for event in logged] == ["api_request_failed"]
    assert last["status"] == 500
    assert "Input/output error" in last["error"]
    assert last["remedy"]


def test_an_operation_outlives_its_client(server: Live) -> None:
    guest = server.daemon.guests["10-1"]
    with server.client() as client, client.stream("DELETE", "/guests/web?progress=1") as answer:
        next(answer.iter_lines())
    server.in_trio(guest.go_on.set)
    with server.client() as client:
        wait_until(lambda: client.get("/guests/web").status_code == 404)


def test_eviction_progress_comes_from_the_counters(server: Live, client: httpx.Client) -> None:
    with client.stream("POST", "/guests/web/evict?progress=1", json={"min_idle_s": 100}) as answer:
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert lines[-1] == {"result": {"evicted_bytes": 256 * PAGE_BYTES}}
    assert all(line["total_bytes"] == GIB // 4 for line in lines[:-1])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "pid"),
        (b"{}", 400, "pid"),
        (b"[]", 400, "object"),
        (b"{", 400, "JSON"),
        (b"\xff\xfe", 400, "JSON"),
        (b"[" * 30000, 400, "JSON"),
        (b'{"pid": "77"}', 400, "pid"),
        (b'{"pid": true}', 400, "pid"),
        (b'{"pid": -1}', 400, "pid"),
        (b'{"pid": 1.5}', 400, "pid"),
        (b'{"pid": 99999999}', 400, "pid"),
        (b'{"pid": ' + b"9" * 5000 + b"}", 400, "JSON"),
        (b'{"pid": 77, "nmae": "x"}', 400, "nmae"),
        (b'{"pid": 77, "name": 5}', 400, "name"),
        (b'{"pid": 404}', 404, "process"),
        (b'{"pid": 10}', 409, "guest already"),
        (b" " * (65 << 10), 413, "larger"),
    ],
)
def test_bad_attach(client: httpx.Client, body: bytes, status: int, word: str) -> None:
    found, said = problem(client.post("/guests", content=body))
    assert found == status
    assert word in said["error"]


@pytest.mark.parametrize(
    "body", [b'{"min_idle_s": NaN}', b'{"max_bytes": 1e9}', b'{"min_idle_s": -1}', b'{"all": true}']
)
def test_bad_evict(client: httpx.Client, body: bytes) -> None:
    assert problem(client.post("/guests/web/evict", content=body))[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/guests/nobody", 404),
        ("DELETE", "/guests/nobody", 404),
        ("POST", "/guests/web/explode", 405),
        ("POST", "/status", 405),
        ("DELETE", "/guests", 405),
        ("POST", "/guests/nested/pause", 409),
    ],
)
def test_bad_address(client: httpx.Client, method: str, path: str, status: int) -> None:
    assert problem(client.request(method, path))[0] == status


def test_a_refused_guest_says_why(client: httpx.Client) -> None:
    assert "nested guests are not allowed" in problem(client.post("/guests/nested/evict"))[1]["error"]


def test_a_wrong_configuration_is_told_with_file_and_line(server: Live, client: httpx.Client) -> None:
    wrong = [ConfigError(Path("tierd.yaml"), n, f"key{n}", "is not a known key") for n in (3, 9)]
    server.daemon.reload_fails = ConfigErrors(wrong)
    status, body = problem(client.post("/reload"))
    assert (status, body["errors"]) == (422, [str(error) for error in wrong])


def test_a_bug_is_a_500_and_the_next_request_is_answered(server: Live, client: httpx.Client) -> None:
    server.daemon.reload_fails = RuntimeError("our bug")
    with structlog.testing.capture_logs() as logged:
        assert problem(client.post("/reload"))[0] == 500
    assert [event["event"] for event in logged] == ["api_request_failed"]
    assert client.get("/status").status_code == 200


# --- bad clients ------------------------------------------------------------------------------------------------------


def wait_until(condition: Any, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(15)
    client.connect(str(path))
    return client


def read_to_the_end(client: socket.socket) -> bytes:
    got = b""
    try:
        while piece := client.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /status HTTP/1.1\r\nHost: x\r\n",
        b"POST /guests HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
        b"\x16\x03\x01garbage\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    ],
    ids=["nothing", "half-a-header", "half-a-body", "not-http", "huge-header", "h2", "h2c-upgrade", "websocket"],
)
def test_a_silent_client_is_closed_in_time(tmp_path: Path, sent: bytes) -> None:
    with live(FakeDaemon(), tmp_path / "s", limits=QUICK) as server, connect(server.socket_path) as client:
        began = time.monotonic()
        try:
            client.sendall(sent)
            read_to_the_end(client)
        except BrokenPipeError:
            pass  # closed while we were still sending
        assert time.monotonic() - began < 10


def test_a_client_that_drips_its_header_is_closed_in_time(tmp_path: Path) -> None:
    with live(FakeDaemon(), tmp_path / "s", limits=QUICK) as server, connect(server.socket_path) as client:
        client.settimeout(0.1)
        began = time.monotonic()
        closed = False
        while not closed:
            assert time.monotonic() - began < 10, "still open"
            try:
                client.sendall(b"G")
                closed = client.recv(1) == b""
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                closed = True


def test_ten_mebibytes_are_refused_and_do_not_stay(tmp_path: Path) -> None:
    with live(FakeDaemon(), tmp_path / "s", limits=QUICK) as server:
        for path in ("/guests", "/nowhere"):
            with connect(server.socket_path) as client:
                request = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {10 << 20}\r\n\r\n".encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(request + bytes(10 << 20))
                answer = read_to_the_end(client)
            assert answer == b"" or answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 404"))
        with server.client() as good:
            for _ in range(QUICK.connections_max + 1):  # no connection is left behind
                assert good.get("/status", headers={"connection": "close"}).status_code == 200


def test_more_connections_than_allowed_only_wait(tmp_path: Path) -> None:
    with live(FakeDaemon(), tmp_path / "s", limits=QUICK) as server:
        idle = [connect(server.socket_path) for _ in range(3 * QUICK.connections_max)]
        try:
            with server.client() as good:
                assert good.get("/status").status_code == 200
        finally:
            for client in idle:
                client.close()


def test_a_client_that_is_gone_gives_its_place_back_at_once(tmp_path: Path) -> None:
    with live(FakeDaemon(), tmp_path / "s", limits=Limits(connections_max=1, header_s=30)) as server:
        began = time.monotonic()
        for _ in range(5):
            with server.client() as client:
                assert client.get("/status").status_code == 200
        assert time.monotonic() - began < 15


def test_a_client_that_does_not_read_holds_neither_its_place_nor_the_end(tmp_path: Path) -> None:
    daemon = FakeDaemon(*(FakeGuest(f"{i}" * 1000, 1000 + i, f"{1000 + i}-1") for i in range(20)))
    limits = Limits(connections_max=1, header_s=5, send_s=0.5)
    with live(daemon, tmp_path / "s", limits=limits) as server:
        with connect(server.socket_path) as deaf:
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            with server.client() as good:
                assert good.get("/healthz").status_code == 200
        with connect(server.socket_path) as deaf:
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            assert deaf.recv(1)  # it is being answered
            began = time.monotonic()
            server.in_trio(server.scope.cancel)
            wait_until(lambda: not server.socket_path.exists())
            assert time.monotonic() - began < limits.send_s + 5


def test_stopping_ends_a_running_operation(tmp_path: Path) -> None:
    with (
        live(FakeDaemon(FakeGuest("web", 10, "10-1")), tmp_path / "s") as server,
        connect(server.socket_path) as client,
    ):
        client.sendall(b"POST /guests/web/restore?progress=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1)
        server.in_trio(server.scope.cancel)
        read_to_the_end(client)


# --- addresses --------------------------------------------------------------------------------------------------------


def test_the_socket_has_its_mode_and_group_and_goes_away(tmp_path: Path) -> None:
    group = grp.getgrgid(os.getegid())
    with live(FakeDaemon(), tmp_path / "s", group=group.gr_name) as server:
        info = server.socket_path.stat()
        assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o660, group.gr_gid)
    assert not (tmp_path / "s").exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    with live(FakeDaemon(), tmp_path / "s") as server, server.client() as client:
        assert client.get("/healthz").status_code == 200


def test_a_socket_that_is_answered_is_left_alone(tmp_path: Path) -> None:
    with live(FakeDaemon(), tmp_path / "s") as server:
        with pytest.raises(SocketUnusable, match="running already"), live(FakeDaemon(), tmp_path / "s"):
            pass
        with server.client() as client:
            assert client.get("/healthz").status_code == 200


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(SocketUnusable, match="is not a socket"):
        bind_unix(tmp_path / "s", 0o660, None)
    assert (tmp_path / "s").read_text() == "precious"


def test_a_group_that_is_not_ours_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    with pytest.raises(SocketUnusable, match=r"SupplementaryGroups=.* or remove api.group"):
        bind_unix(tmp_path / "s", 0o660, grp.getgrgid(os.getegid()).gr_name)
    assert not (tmp_path / "s").exists()


def test_an_unknown_group_or_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SocketUnusable, match="groupadd --system no-such-group"):
        bind_unix(tmp_path / "s", 0o660, "no-such-group")
    assert not (tmp_path / "s").exists()
    with pytest.raises(SocketUnusable, match=r"No such file or directory; set api\.socket"):
        bind_unix(tmp_path / "missing" / "s", 0o660, None)


def test_tcp_serves_metrics_and_nothing_else(tmp_path: Path) -> None:
    with bind_tcp("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    with (
        live(FakeDaemon(FakeGuest("web", 10, "10-1")), tmp_path / "s", metrics_listen=f"localhost:{port}"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert "tierd_guest_size_bytes" in client.get("/metrics").text
        assert client.head("/metrics").status_code == 200
        for method, path in (
            ("GET", "/status"),
            ("GET", "/guests"),
            ("POST", "/reload"),
            ("POST", "/guests/web/evict"),
        ):
            assert client.request(method, path).status_code == 404


@pytest.mark.parametrize("address", ["9178x", "host:", "::1", "127.0.0.1:http", "127.0.0.1:99999", "no.such.host:1"])
def test_bad_tcp_addresses(address: str) -> None:
    with pytest.raises(SocketUnusable, match=r"metrics\.listen"):
        bind_tcp(address)


def test_tcp_addresses_that_are_fine_or_taken() -> None:
    with bind_tcp("127.0.0.1:0") as sock:
        sock.listen()
        with pytest.raises(SocketUnusable, match="in use"):
            bind_tcp(f"localhost:{sock.getsockname()[1]}")
    for address in (":0", "[::1]:0", "192.0.2.1:0"):  # the last is not ours, not yet
        bind_tcp(address).close()


def test_serving_imports_come_late() -> None:
    late = ("starlette", "hypercorn", "prometheus_client")
    script = f"import sys, tierd.api, tierd.view, tierd.systemd; print([m for m in {late} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"


def test_the_fake_satisfies_the_protocol() -> None:
    from tierd.view import DaemonView

    daemon: DaemonView = FakeDaemon()
    assert trio.run(daemon.reload)
