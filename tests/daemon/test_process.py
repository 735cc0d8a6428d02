# SPDX-License-Identifier: Apache-2.0
"""The whole daemon as a process, with guests that check every byte: signals, restarts, reloads, orders, metrics."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, userfaultfds, vm_flags, wait_for
from tests.need import need


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


@pytest.mark.parametrize("how", ["keep", "kill", "second signal"])
def test_a_successor_adopts(daemon: Daemon, boot: Boot, how: str) -> None:
    vmm = boot("web", 128 * MIB if how == "second signal" else 16 * MIB)
    daemon.write(on_stop="keep" if how == "keep" else "restore")
    daemon.start()
    evicted(daemon, "web", vmm)
    if how == "kill":
        daemon.kill()
    else:
        daemon.signal(signal.SIGTERM)
        if how == "second signal":
            daemon.wait_told("STOPPING=1")
            daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
    assert userfaultfds(vmm.pid), "the VMM's own descriptor keeps its memory registered"
    assert len(list((daemon.runtime_dir / "guests").iterdir())) == 1
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
    assert daemon.guests()["web"]["state"] == "active"
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "dry_run": True}])
    daemon.signal(signal.SIGHUP)
    daemon.wait_told("RELOADING=1")
    wait_for(lambda: daemon.guests()["web"]["policy"]["dry_run"], "the new policy is in force")
    daemon.write(guests=[])
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: not daemon.guests(), "a guest that no rule names is left")
    assert not userfaultfds(vmm.pid)
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


def test_metrics_over_tcp(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.write(metrics={"listen": f"127.0.0.1:{20000 + os.getpid() % 20000}"})
    daemon.start()
    evicted(daemon, "web", vmm)
    vmm.verify()
    text = httpx.get(f"http://127.0.0.1:{20000 + os.getpid() % 20000}/metrics").text
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
    """A newer tierd was here: this one touches nothing of that guest, the stored pages least of all."""
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
    assert "newer" in daemon.logged("state_refused")[0]["error"]
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
        ({"engine": "rwp"}, 78, "engine"),
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


def held(process: Path) -> list[str]:
    """What its descriptors are. Sockets aside: the API's connections are closed when Python collects them."""
    return sorted(link for path in (process / "fd").iterdir() if not (link := os.readlink(path)).startswith("socket:"))


def test_nothing_leaks(daemon: Daemon, boot: Boot) -> None:
    """Attach and detach again and again: descriptors and threads of the daemon stay what they were."""
    vmm = boot("web", 2 * MIB)
    daemon.write(guests=[])
    daemon.start()
    assert daemon.process is not None
    proc = Path(f"/proc/{daemon.process.pid}")

    def once() -> None:
        for verb, what in (("attach", str(vmm.pid)), ("detach", f"web{OURS}")):
            done = daemon.tierd(verb, what)
            assert done.returncode == 0, done.stderr

    once()
    before = held(proc), held(Path(f"/proc/{vmm.pid}"))
    for _ in range(5):
        once()
    assert (held(proc), held(Path(f"/proc/{vmm.pid}"))) == before


def store_healthy(daemon: Daemon) -> float:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(daemon.socket)), base_url="http://tierd") as client:
        text = client.get("/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("tierd_store_healthy{")))


def test_a_store_that_does_not_take_pages(daemon: Daemon, boot: Boot) -> None:
    """Writes fail (the file may not grow): the pages stay, it is said once, and goes on when the store does."""
    vmm = boot("web")
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "dry_run": True}])
    daemon.start()
    daemon.wait_active("web")
    assert daemon.process is not None
    limit = ["prlimit", "--pid", str(daemon.process.pid)]
    subprocess.run([*limit, "--fsize=1048576:unlimited"], check=True)
    daemon.write()
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: store_healthy(daemon) == 0, "the store is said to be unhealthy")
    wait_for(lambda: daemon.guests()["web"]["counters"]["store_write_errors"] >= 3, "it is tried again")
    assert len(daemon.logged("eviction_failed")) == 1, "once per change, not once per try"
    vmm.verify()
    subprocess.run([*limit, "--fsize=unlimited:unlimited"], check=True)
    evicted(daemon, "web", vmm)
    assert store_healthy(daemon) == 1
    assert daemon.logged("eviction_works_again")
    vmm.verify()
