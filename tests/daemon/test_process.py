# SPDX-License-Identifier: Apache-2.0
"""The whole daemon as a process, with guests that check every byte: signals, restarts, reloads, orders, metrics."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, userfaultfds, vm_flags, wait_for
from tests.need import need
from tests.store.servers import free_ports
from tierd.client import Client, Declined, guest_path
from tierd.config import Config
from tierd.guest import no_progress


def test_a_guests_whole_life(daemon: Daemon, boot: Boot) -> None:
    daemon.start()
    vmm = boot("web-1")
    daemon.wait_active("web-1")
    evicted(daemon, "web-1", vmm)
    vmm.verify()
    assert daemon.guests()["web-1"]["counters"]["faults_fetch"] > 0
    assert "WATCHDOG=1" in daemon.wait_told("WATCHDOG=1")
    assert "1 guests served" in daemon.wait_told("1 guests served")
    vmm.process.kill()
    vmm.process.wait()
    wait_for(lambda: not daemon.guests(), "the guest is gone")
    wait_for(lambda: not list(daemon.store_dir.iterdir()), "its store space is freed")
    assert not list((daemon.runtime_dir / "guests").iterdir())
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.socket))) as client:
        metrics = client.get("http://tierd/metrics").text
    assert "tierd_build_info" in metrics
    assert "web-1" not in metrics
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "STOPPING=1" in daemon.wait_told("STOPPING=1")
    assert [e["how"] for e in daemon.logged("guest_ended")] == ["the VMM exited"]


def test_sigterm_brings_everything_back(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not userfaultfds(vmm.pid)
    assert not vm_flags(vmm.pid, vmm.addresses[0]) & {"um", "uw"}
    assert not list((daemon.runtime_dir / "guests").iterdir())
    vmm.verify()


@pytest.mark.parametrize("how", ["keep", "kill", "second signal", "restart"])
def test_a_successor_adopts(daemon: Daemon, boot: Boot, how: str) -> None:
    vmm = boot("web", 128 * MIB if how == "second signal" else 16 * MIB)
    daemon.write(on_stop="keep" if how == "keep" else "restore")
    daemon.start()
    evicted(daemon, "web", vmm)
    if how == "kill":
        daemon.kill()
    else:
        daemon.signal(signal.SIGUSR1 if how == "restart" else signal.SIGTERM)
        if how == "second signal":
            daemon.wait_told("STOPPING=1")
            daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert userfaultfds(vmm.pid), "the VMM's own descriptor keeps its memory registered"
    assert len(list((daemon.runtime_dir / "guests").iterdir())) == 1
    daemon.write(on_stop="restore")  # nobody adopts what this one would keep
    daemon.start()
    (adopted,) = daemon.logged("guest_adopted")
    assert adopted["lost_pages"] == 0
    vmm.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    vmm.verify()


def test_a_broken_reload_changes_nothing(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    good = daemon.config.read_text()
    daemon.config.write_text(good + "\nstor: {}\n")
    daemon.signal(signal.SIGHUP)
    daemon.wait_told("RELOADING=1")
    daemon.wait_told("READY=1")
    assert daemon.logged("reload_failed")
    assert daemon.status()["reload_failed"]
    assert "refused at the last reload" in daemon.tierd("status").stdout
    assert daemon.guests()["web"]["state"] == "active"
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "dry_run": True}])
    daemon.signal(signal.SIGHUP)
    daemon.wait_told("RELOADING=1")
    wait_for(lambda: daemon.guests()["web"]["policy"]["dry_run"], "the new policy is in force")
    daemon.write(guests=[])
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: not daemon.guests(), "a guest that no rule names is left")
    assert not userfaultfds(vmm.pid)
    assert not daemon.status()["reload_failed"]
    daemon.config.write_text(good + "\nstor: {}\n")
    with Client(daemon.socket) as client, pytest.raises(Declined):
        client.post("/reload")
    assert daemon.status()["reload_failed"], "also when it was asked for over the API"
    daemon.write()
    daemon.signal(signal.SIGHUP)
    evicted(daemon, "web", vmm)  # a rule for a VM that runs already
    vmm.verify()


def test_a_vm_that_is_tried_again_has_the_rule_of_now(daemon: Daemon, boot: Boot) -> None:
    """It was refused; then its rule goes, and the cause."""
    vmm = boot("web")
    vmm.ask("lock")
    daemon.start()
    wait_for(lambda: daemon.guests().get("web", {}).get("state") == "refused", "locked memory is refused")
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "enabled": False}])
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: not daemon.guests(), "nobody tries any more")
    vmm.ask("unlock")
    assert not daemon.logged("guest_attached")
    daemon.write()
    daemon.signal(signal.SIGHUP)
    evicted(daemon, "web", vmm)
    vmm.verify()


def test_a_killed_vmm_does_not_touch_another_guest(daemon: Daemon, boot: Boot) -> None:
    doomed, other = boot("doomed", 64 * MIB), boot("other", 32 * MIB)
    daemon.start()
    other.ask("run", 2000, 50)
    wait_for(lambda: daemon.stored_bytes("doomed"), "evictions have begun")
    doomed.process.kill()
    doomed.process.wait()
    wait_for(lambda: "doomed" not in daemon.guests(), "the dead guest is gone")
    before = other.stats()["operations"]
    wait_for(lambda: other.stats()["operations"] > before + 500, "the other guest goes on")
    assert other.ask("stop")[1] == 0
    other.verify()
    assert daemon.guests()["other"]["state"] == "active"


def test_orders(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    patient = {**POLICY, "interval_s": 3600, "idle_intervals": 1}  # nothing but our orders evicts
    daemon.write(guests=[{"name": f"*{OURS}", **patient}])
    daemon.start()
    daemon.wait_active("web")

    def reload(**changes: object) -> None:
        daemon.write(guests=[{"name": f"*{OURS}", **patient, **changes}])
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: changes.items() <= daemon.guests()["web"]["policy"].items(), "the new policy is in force")

    def order(*arguments: str) -> dict[str, object]:
        done = daemon.tierd(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    reload(min_idle_s=120.0)
    order("evict", f"web{OURS}", "--min-idle", "0s")
    assert daemon.stored_bytes("web") == 0, "the floor binds an operator, too"
    reload(min_idle_s=0.2)
    wait_for(lambda: order("evict", f"web{OURS}") and daemon.stored_bytes("web") > 0, "evicted by order")
    order("pause", f"web{OURS}")
    assert daemon.guests()["web"]["state"] == "paused"
    order("restore", f"web{OURS}")
    assert daemon.stored_bytes("web") == 0
    order("resume", f"web{OURS}")
    order("detach", f"web{OURS}")
    assert not daemon.guests()
    assert not userfaultfds(vmm.pid)
    order("attach", str(vmm.pid))
    assert daemon.guests()["web"]["state"] == "active"
    done = daemon.tierd("pause", "nobody")
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1
    vmm.verify()


def test_an_order_to_evict_does_not_hold_up_a_stop(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web", 96 * MIB)
    patient = {**POLICY, "interval_s": 3600, "idle_intervals": 1, "evict_rate_max": "1MiB/s"}
    daemon.write(guests=[{"name": f"*{OURS}", **patient}])
    daemon.start()
    daemon.wait_active("web")
    told: list[subprocess.CompletedProcess[str]] = []
    order = threading.Thread(target=lambda: told.append(daemon.tierd("evict", f"web{OURS}")))
    wait_for(lambda: daemon.tierd("evict", f"web{OURS}", "--max", "1MiB") and daemon.stored_bytes("web"), "it is idle")
    before = daemon.stored_bytes("web")
    order.start()
    wait_for(lambda: daemon.stored_bytes("web") > before, "it evicts, for most of a minute")
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert time.monotonic() - began < 15
    order.join()
    assert told[0].returncode != 0
    assert not daemon.logged("restore_failed")
    assert not userfaultfds(vmm.pid)
    vmm.verify()


def test_metrics_over_tcp(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    (port,) = free_ports(1)
    daemon.write(metrics={"listen": f"127.0.0.1:{port}"})
    daemon.start()
    evicted(daemon, "web", vmm)
    vmm.verify()
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert f'tierd_guest_size_bytes{{guest="web{OURS}",pid="{vmm.pid}"}}' in text
    need("promtool", subprocess.run(["which", "promtool"], capture_output=True).returncode == 0, "no promtool")
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_second_daemon_refuses(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    done = daemon.tierd("run", "--config", str(daemon.config))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert daemon.process is not None
    assert f"another tierd (process {daemon.process.pid})" in line


def test_a_state_file_that_is_refused_keeps_its_store(daemon: Daemon, boot: Boot) -> None:
    """A tierd of another version was here: this one touches nothing of that guest, the stored pages least of all."""
    vmm = boot("web")
    daemon.write(on_stop="keep")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    (state,) = (daemon.runtime_dir / "guests").iterdir()
    good = state.read_bytes()
    state.write_bytes(good[:8] + b"\x63" + good[9:])
    daemon.start()
    assert "another version" in daemon.logged("state_refused")[0]["error"]
    assert len(list(daemon.store_dir.iterdir())) == 1
    assert len(list((daemon.runtime_dir / "guests").iterdir())) == 1
    daemon.kill()
    state.write_bytes(good)
    daemon.start()
    vmm.verify()


def test_what_is_left_of_a_dead_guest_is_swept(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.write(on_stop="keep")
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    vmm.process.kill()
    vmm.process.wait()
    daemon.start()
    assert not list(daemon.store_dir.iterdir())
    assert not list((daemon.runtime_dir / "guests").iterdir())


@pytest.mark.parametrize(
    ("settings", "status", "says"),
    [
        ({"defaults": {"interval_s": "soon"}}, 78, "defaults.interval_s"),
        ({"runtime_dir": "/var/tmp/tierd-test-not-tmpfs"}, 1, "is not on tmpfs"),
        ({"store": {"path": "/dev/shm/tierd-test-store"}}, 1, "nothing would be given back"),
        ({"engine": "rfk"}, 78, "engine"),
    ],
)
def test_what_keeps_it_from_starting(daemon: Daemon, settings: dict[str, object], status: int, says: str) -> None:
    daemon.write(**settings)
    try:
        done = daemon.tierd("run", "--config", str(daemon.config))
        assert done.returncode == status, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        for key in ("runtime_dir", "store"):
            value = settings.get(key)
            path = Path(str(value["path"] if isinstance(value, dict) else value)) if value else None
            if path is not None and path.exists():
                for inner in sorted(path.rglob("*"), reverse=True):
                    inner.rmdir() if inner.is_dir() else inner.unlink()
                path.rmdir()


def held(pid: int) -> list[str]:
    """What its descriptors are. Sockets aside: the API's connections are closed when Python collects them. And what is open for a
    moment only: tierd looks at something in /proc all the time."""

    def now() -> Counter[str]:
        links = []
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(path))
        return Counter(link for link in links if not link.startswith("socket:"))

    found = now()
    for _ in range(4):
        time.sleep(0.02)
        found &= now()
    return sorted(found.elements())


def test_nothing_leaks(daemon: Daemon, boot: Boot) -> None:
    """Attach and detach again and again: descriptors and threads of the daemon stay what they were."""
    vmm = boot("web", 2 * MIB)
    daemon.write(guests=[])
    daemon.start()
    assert daemon.process is not None
    pids = daemon.process.pid, vmm.pid

    def rounds(count: int) -> None:
        with Client(daemon.socket) as client:
            for _ in range(count):
                client.run("POST", "/guests", {"pid": vmm.pid}, no_progress)
                client.run("DELETE", guest_path(f"web{OURS}"), None, no_progress)

    def threads() -> int:
        return len(os.listdir(f"/proc/{pids[0]}/task"))

    rounds(2)
    held_before, threads_before = [held(pid) for pid in pids], threads()
    rounds(20)
    wait_for(lambda: [held(pid) for pid in pids] == held_before, "the same descriptors as before")
    assert threads() < threads_before + 10, "trio keeps some for a while"


def test_a_guest_is_found_within_two_seconds(daemon: Daemon, boot: Boot) -> None:
    daemon.write(discover_interval_s=Config().discover_interval_s)
    daemon.start()

    def found_in_s(name: str) -> float:
        began = time.time()
        boot(name, 2 * MIB)
        daemon.wait_active(name)
        attached = next(entry for entry in daemon.logged("guest_attached") if entry["guest"] == f"{name}{OURS}")
        return datetime.fromisoformat(attached["timestamp"]).timestamp() - began

    assert any(found_in_s(name) < 2 for name in "abc"), "not even once, on a machine that may be busy"


def test_top_on_a_terminal(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    command = [sys.executable, "-m", "tierd", "--socket", str(daemon.socket), "top", "--interval", "0.2"]
    terminal, theirs = os.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    shown = b""

    def frames() -> bool:
        nonlocal shown
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536)
        return shown.count(f"web{OURS}".encode()) >= 3

    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as top:
        os.close(theirs)
        try:
            wait_for(frames, "three frames with the guest")
            top.send_signal(signal.SIGINT)
            assert top.wait(20) == 0
        finally:
            top.kill()
            os.close(terminal)
    assert b"\x1b[?1049h" in shown, "on a screen of its own"
    assert b"16.0 MiB" in shown
