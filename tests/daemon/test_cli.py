# SPDX-License-Identifier: Apache-2.0
"""The command line against the real API on a real socket: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml

from tests.daemon.fake import GIB, FakeDaemon, FakeGuest, counters
from tests.daemon.live import Live, live
from tierd import cli
from tierd.check import Finding

BUCKETS = tuple(1000 if i == 14 else 0 for i in range(40))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Live]:
    daemon = FakeDaemon(
        FakeGuest("web", 10, "10-1", counters=counters(latency_buckets=BUCKETS)),
        FakeGuest("db", 11, "11-1"),
        FakeGuest("db", 12, "12-1"),
        FakeGuest("..", 13, "13-1"),
        FakeGuest("[red]a/b\x1b[2J", 14, "14-1"),
    )
    daemon.refuse("nested guests are not allowed")
    with live(daemon, tmp_path / "tierd.sock") as server:
        for guest in daemon.guests.values():
            server.in_trio(guest.go_on.set)
        yield server


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tierd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command against the socket of `server`: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["--socket", str(tmp_path / "tierd.sock"), *arguments])
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


# --- looking ----------------------------------------------------------------------------------------------------------


def test_status(server: Live, tierd: Run) -> None:
    code, out, err = tierd("status")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[1].split()[:3] == ["web", "active", "10"]
    assert "256 MiB" in lines[1]
    assert "12 us" in lines[1]  # p50 of the bucket from 8.2 to 16.4 us
    assert any("nested guests are not allowed" in line and "refused" in line for line in lines)
    assert any("[red]a/b?[2J" in line for line in lines)  # neither markup nor escape sequences
    assert lines[-1] == "tierd 0.1.0, engine stock, 6 guests, store file 1.0 GiB of 10.0 GiB"


def test_status_as_json(server: Live, tierd: Run) -> None:
    code, out, _ = tierd("status", "--json")
    assert code == 0
    assert json.loads(out)["guests"][0]["stored_bytes"] == {"zero": 0, "file": GIB // 4}


def test_top_once(server: Live, tierd: Run) -> None:
    code, out, _ = tierd("top", "--once", "--interval", "0.1")
    assert code == 0
    assert "512 MiB / 1.0 GiB" in out.splitlines()[1]
    assert "▅▅" in out.splitlines()[1]
    code, out, _ = tierd("top", "--once", "--interval", "0.1", "--json")
    row = json.loads(out)["guests"][0]
    assert (row["name"], row["resident_bytes"], row["faults_per_s"], row["history"]) == (
        "web",
        GIB // 2,
        0.0,
        [GIB // 2] * 2,
    )


def test_top_live_ends_on_an_interrupt(server: Live) -> None:
    import pty
    import signal

    control, terminal = pty.openpty()
    command = [sys.executable, "-m", "tierd", "--socket", str(server.socket_path), "top", "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "20"}
    child = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    watchdog = threading.Timer(30, child.kill)
    watchdog.start()
    try:
        while seen.count(b"faults/s") < 3:  # the first table, and two refreshes
            seen += os.read(control, 65536)
        child.send_signal(signal.SIGINT)
        while True:
            seen += os.read(control, 65536)
    except OSError:  # EIO: the child has closed the terminal
        pass
    finally:
        watchdog.cancel()
        os.close(control)
    assert child.wait(30) == 0
    assert b"web" in seen
    assert b"Traceback" not in seen


# --- orders -----------------------------------------------------------------------------------------------------------


def test_pause_and_resume(server: Live, tierd: Run) -> None:
    assert tierd("pause", "web") == (0, "web is paused\n", "")
    assert tierd("resume", "10-1") == (0, "web is active\n", "")
    assert json.loads(tierd("pause", "web", "--json")[1])["state"] == "paused"


def test_evict_with_sizes_and_times(server: Live, tierd: Run) -> None:
    assert tierd("evict", "web", "--max", "512MiB", "--min-idle", "5min") == (0, "evicted 1.0 MiB of web\n", "")
    assert json.loads(tierd("evict", "web", "--json")[1]) == {"evicted_bytes": 1 << 20}
    assert server.daemon.guests["10-1"].calls == [("evict", 512 << 20, 300.0), ("evict", None, None)]


def test_restore_attach_detach(server: Live, tierd: Run) -> None:
    assert tierd("restore", "web") == (0, "restored 256 MiB of web; it is paused (`tierd resume`)\n", "")
    assert tierd("attach", "77", "--name", "new") == (0, "attached new (77-1)\n", "")
    server.in_trio(server.daemon.guests["77-1"].go_on.set)
    assert tierd("detach", "new") == (0, "detached new; `tierd attach` takes it up again\n", "")
    assert tierd("detach", "new")[0] == cli.NO_GUEST


@pytest.mark.parametrize(("name", "key"), [("..", "13-1"), ("[red]a/b\x1b[2J", "14-1")])
def test_any_name_reaches_its_guest(server: Live, tierd: Run, name: str, key: str) -> None:
    assert json.loads(tierd("pause", "--json", name)[1])["key"] == key


# --- errors: one line, and a status -----------------------------------------------------------------------------------


def one_line(result: tuple[int, str, str]) -> tuple[int, str]:
    code, out, err = result
    assert out == ""
    assert err.startswith("tierd: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return code, err


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pause", "nobody"], cli.NO_GUEST, "see `tierd status`"),
        (["pause", "db"], cli.NO_GUEST, "11-1, 12-1; name one by its key"),
        (["evict", "nested"], cli.FAILED, "nested guests are not allowed"),
        (["attach", "10"], cli.FAILED, "guest already; see `tierd status`"),
        (["attach", "404"], cli.NO_GUEST, "no such process"),
        (["attach", "x"], cli.USAGE, "tierd attach --help"),
        (["evict", "web", "--max", "5Q"], cli.USAGE, "write for example 512MiB"),
        (["evict", "web", "--min-idle", "soon"], cli.USAGE, "write for example 30s"),
        (["explode"], cli.USAGE, "tierd --help"),
    ],
)
def test_errors(server: Live, tierd: Run, arguments: list[str], status: int, words: str) -> None:
    code, said = one_line(tierd(*arguments))
    assert code == status
    assert words in said


def test_a_failure_in_the_daemon_is_one_line(server: Live, tierd: Run) -> None:
    server.daemon.guests["10-1"].fails = OSError(5, "Input/output\nerror")
    with structlog.testing.capture_logs() as logged:
        code, said = one_line(tierd("evict", "web"))
    assert [event["event"] for event in logged] == ["api_request_failed"]
    assert (code, "Input/output?error" in said) == (cli.FAILED, True)


@pytest.mark.parametrize("command", ["status", "top", "pause x", "evict x", "detach x", "attach 5"])
def test_no_daemon(tierd: Run, command: str) -> None:
    code, said = one_line(tierd(*command.split()))
    assert code == cli.UNREACHABLE
    assert "is tierd.service running?" in said
    assert "tierd.sock" in said


def test_a_socket_that_nobody_answers_on(tierd: Run, tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "tierd.sock"))
        code, said = one_line(tierd("status"))
    assert code == cli.UNREACHABLE
    assert "Connection refused; is tierd.service running?" in said


def test_another_server_on_the_socket(tierd: Run, tmp_path: Path) -> None:
    import socket

    def answer(listener: socket.socket) -> None:
        listener.accept()[0].close()  # the client tries whether anybody is there
        peer, _ = listener.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "tierd.sock"))
        listener.listen()
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        code, said = one_line(tierd("status"))
        thread.join(timeout=30)
    assert (code, "is not tierd" in said) == (cli.UNREACHABLE, True)


def test_the_daemon_dies_under_an_order(tierd: Run, tmp_path: Path) -> None:
    with live(FakeDaemon(FakeGuest("web", 10, "10-1")), tmp_path / "tierd.sock") as server:
        guest = server.daemon.guests["10-1"]

        def stop() -> None:
            while not guest.calls:
                threading.Event().wait(0.02)
            server.in_trio(server.scope.cancel)

        thread = threading.Thread(target=stop)
        thread.start()
        code, said = one_line(tierd("restore", "web"))
        thread.join(timeout=30)
    assert code == cli.UNREACHABLE
    assert said


def test_a_bug_of_ours_is_one_line_and_a_traceback_with_debug(tierd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(findings: Any) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("tierd.check.passed", broken)
    monkeypatch.setattr(cli, "_check_host", lambda: [])
    code, said = one_line(tierd("check"))
    assert code == cli.FAILED
    assert "ZeroDivisionError: a bug" in said
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "check"])


# --- configuration and check ------------------------------------------------------------------------------------------


def test_the_socket_of_the_configuration(server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tierd.yaml"
    file.write_text(yaml.safe_dump({"api": {"socket": str(server.socket_path)}}))
    with pytest.raises(SystemExit) as end:
        cli.main(["--config", str(file), "status"])
    assert end.value.code == 0
    assert "web" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["api: [", "api: {socket: 5}", "\x00"])
def test_a_broken_configuration_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    file = tmp_path / "tierd.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["--config", str(file), "status"])
    assert end.value.code == cli.CONFIG_WRONG
    said = capsys.readouterr().err
    assert "config check" in said
    assert said.count("\n") == 1


def test_config_check(tierd: Run, tmp_path: Path) -> None:
    file = tmp_path / "tierd.yaml"
    file.write_text("defaults: {interval_s: 30s}\nguests: [{name: 'web-*'}]\n")
    assert tierd("config", "check", "--config", str(file)) == (0, f"{file}: all right, 1 guest rule\n", "")
    file.write_text("defalts: {}\nstop_timeout_s: never\n")
    code, out, err = tierd("config", "check", "--config", str(file))
    assert (code, out) == (cli.CONFIG_WRONG, "")
    assert all(line.startswith(f"tierd: {file}:") for line in err.splitlines())
    assert len(err.splitlines()) == 2
    code, out, _ = tierd("config", "check", "--json", "--config", str(file))
    assert code == cli.CONFIG_WRONG
    assert {error["line"] for error in json.loads(out)["errors"]} == {1, 2}


def test_config_check_where_keys_cannot_be_kept(tierd: Run, tmp_path: Path, disk_dir: Path) -> None:
    (tmp_path / "a file").touch()
    file = tmp_path / "tierd.yaml"
    settings = {"runtime_dir": str(tmp_path / "a file" / "run"), "store": {"path": str(disk_dir), "encrypt": True}}
    file.write_text(yaml.safe_dump(settings))
    code, said = one_line(tierd("config", "check", "--probe", "--config", str(file)))
    assert code == cli.CONFIG_WRONG
    assert "keys of guests, cannot be made: Not a directory; make it, or set runtime_dir" in said


def test_run_with_a_wrong_configuration(tierd: Run, tmp_path: Path) -> None:
    code, _, err = tierd("run", "--config", str(tmp_path / "missing.yaml"))
    assert code == cli.CONFIG_WRONG
    assert "missing.yaml" in err
    assert "Traceback" not in err


GOOD = Finding("pageout", True, False, "works")
LACKS = Finding("poison", False, False, "does not work", "a newer kernel")
FAILS = Finding("userfaultfd", False, True, "is [not] there", "run as root")


def test_check_in_words(tierd: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_check_host", lambda: [GOOD, LACKS])
    code, out, _ = tierd("check")
    assert code == 0
    assert "-> a newer kernel" in out
    monkeypatch.setattr(cli, "_check_host", lambda: [GOOD, FAILS])
    code, out, _ = tierd("check")
    assert code == 1
    assert "is [not] there" in out
    assert "-> run as root" in out
    code, out, _ = tierd("check", "--json")
    assert (code, json.loads(out)["passed"]) == (1, False)


def test_check_of_a_process_that_is_not_there(tierd: Run) -> None:
    code, said = one_line(tierd("check", "4194303"))
    assert (code, "pgrep" in said) == (cli.NO_GUEST, True)


# --- weight -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "without"),
    [
        (["run", "--config", "/nonexistent"], ["rich", "httpx", "starlette", "hypercorn", "prometheus_client"]),
        (["status"], ["pydantic", "starlette", "structlog", "prometheus_client", "tierd.native"]),
    ],
)
def test_a_command_imports_only_what_it_needs(tmp_path: Path, arguments: list[str], without: list[str]) -> None:
    script = (
        "import sys\nfrom tierd.cli import main\n"
        f"try:\n    main(['--socket', {str(tmp_path / 'none')!r}, *{arguments!r}])\n"
        f"except SystemExit:\n    print([name for name in {without!r} if name in sys.modules])\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "[]\n"), ran.stderr


def test_every_table_has_json_and_help_names_every_status(tierd: Run) -> None:
    commands = {**cli.cli.commands, **cli.config.commands}
    silent = {"run", "config"}
    assert {
        name for name, command in commands.items() if not any(p.name == "as_json" for p in command.params)
    } == silent
    _, out, _ = tierd("--help")
    for status in (cli.FAILED, cli.USAGE, cli.UNREACHABLE, cli.NO_GUEST, cli.CONFIG_WRONG, cli.INTERRUPTED):
        assert f"\n   {status:>3}  " in out
