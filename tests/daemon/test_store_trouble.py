# SPDX-License-Identifier: Apache-2.0
"""A store that hangs or lies, under the real daemon: who does not need it does not notice, and the operator is told."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.disks import damaged, frozen_at_will, hanging_disk, in_the_kernel, loop_disk, sparse
from tests.kernel.vmm import MIB, PAGE, userfaultfds, wait_for
from tests.store.servers import Server


def on_disk(daemon: Daemon, mount: Path, **settings: object) -> None:
    daemon.write(store={"path": str(mount / "store")}, **settings)


def healthy(daemon: Daemon) -> dict[str, object]:
    began = time.monotonic()
    done = daemon.tierd("status", "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20, "the answer does not wait for the store"
    store: dict[str, object] = json.loads(done.stdout)["stores"][0]
    return store


def test_a_disk_that_takes_no_writes(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """The eviction hangs in the kernel. That is told once; faults, API and watchdog go on; a stop does not wait, the lock of
    the thread that hangs makes the successor wait."""
    with frozen_at_will(disk_dir, 512 * MIB) as disk:
        on_disk(daemon, disk.mount, on_stop="keep")
        cold, busy = boot("cold", 64 * MIB), boot("busy")
        busy.ask("hot", 0, 1000)
        busy.ask("run", 1000, 50)
        daemon.start()
        assert daemon.process is not None
        evicted(daemon, "cold", cold)
        disk.hang()
        wait_for(lambda: in_the_kernel(daemon.process.pid, "percpu_rwsem_wait"), "an eviction hangs")
        wait_for(lambda: daemon.logged("store_hangs"), "it is told")
        assert daemon.logged("store_hangs")[0]["eviction_hangs"]
        cold.verify()  # reads go on
        store = healthy(daemon)
        assert not store["healthy"]
        assert "has waited for a call of the store" in str(store["reason"])
        while daemon.notify.recv(4096).decode() != "WATCHDOG=1":
            pass
        daemon.signal(signal.SIGTERM)
        wait_for(lambda: daemon.logged("ended_in_a_call"), "it does not wait for the call")
        disk.go_on()
        daemon.wait()
        daemon.start()
        busy.ask("stop")
        busy.verify()
        cold.verify()
        assert healthy(daemon)["healthy"]
        on_disk(daemon, disk.mount, on_stop="restore")
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: daemon.logged("reloaded"), "reloaded")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_store_that_does_not_answer_at_all(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """Reads hang, too, and so does every question about the file system. The daemon answers and says so, threads take over, a
    killed daemon is succeeded by one that waits for the store; when it answers again, everybody goes on."""
    with hanging_disk(disk_dir, 512 * MIB) as disk:
        on_disk(daemon, disk.mount, guests=[{"name": f"*{OURS}", **POLICY, "fault_threads_max": 3}])
        web = boot("web")
        daemon.start()
        evicted(daemon, "web", web)
        disk.hang()
        web.send("verify")
        wait_for(lambda: daemon.logged("store_hangs"), "it is told")
        wait_for(lambda: not healthy(daemon)["healthy"], "the store is ill")
        wait_for(lambda: "has not answered" in str(healthy(daemon)["reason"]), "nor does it say how full it is", 30)
        counters = daemon.guests()["web"]["counters"]
        assert counters["fault_threads"] > 1, "another one took over"
        daemon.signal(signal.SIGKILL)  # whose thread in the kernel ends with the call that hangs
        disk.go_on()
        daemon.wait()
        disk.hang()
        daemon.start()
        (lacking,) = daemon.status()["stores"]
        assert not lacking["healthy"]
        assert "does not answer" in str(lacking["reason"])
        disk.go_on()
        wait_for(lambda: daemon.logged("store_can_be_used"), "it is there again")
        wait_for(web.answered, "everything was verified", 60)
        web.verify()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_disk_that_does_not_answer_at_the_start(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """Guests whose pages are elsewhere are served, and go on as ever; who needs the disk waits for it, and for no restart; what
    a dead one has left there waits, too. Where there are no guests, tierd waits for it, and the service manager knows."""
    with Server() as redis, hanging_disk(disk_dir, 512 * MIB) as disk:
        far = {"name": f"far{OURS}", **POLICY, "tiers": ["redis"]}
        on_disk(
            daemon,
            disk.mount,
            stores={"redis": {"addresses": [redis.address]}},
            guests=[far, {"name": f"*{OURS}", **POLICY}],
        )
        try:
            disk.hang()
            daemon.spawn()
            daemon.wait_told("EXTEND_TIMEOUT_USEC")
            disk.go_on()
            daemon.wait_told("READY=1")
            guests = {name: boot(name) for name in ("far", "near", "dead")}
            for name, vmm in guests.items():
                evicted(daemon, name, vmm)
            daemon.kill()
            guests["dead"].kill()
            disk.hang()
            daemon.start()
            assert "has not answered" in daemon.logged("store_unusable")[0]["error"]
            guests["far"].verify()
            evicted(daemon, "far", guests["far"])
            guests["near"].send("verify")
            boot("late")
            wait_for(
                lambda: "does not answer" in daemon.guests().get("late", {}).get("reason", ""), "it is not attached"
            )
            (ill,) = [store for store in daemon.status()["stores"] if store["name"] == "file"]
            assert not ill["healthy"]
            assert "does not answer" in ill["reason"]
            disk.go_on()
            wait_for(guests["near"].answered, "everything was verified", 60)
            wait_for(lambda: daemon.logged("store_can_be_used"), "it is told")
            for name in ("near", "late"):
                wait_for(lambda name=name: daemon.stored_bytes(name) > 8 * MIB, f"{name} is evicted", 60)
            assert all(store["healthy"] for store in daemon.status()["stores"])
            left = f"guest-{guests['dead'].pid}-*"
            wait_for(lambda: not list((disk.mount / "store").glob(left)), "what the dead one left is gone")
            guests["near"].verify()
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
        finally:
            disk.go_on()
            daemon.kill()


def test_a_file_system_that_turns_read_only(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """What ext4 does when it finds itself damaged. That is told, what is stored comes back, and guests are left or end as if
    nothing were wrong; what cannot be removed is told, too."""
    with loop_disk(disk_dir, sparse(disk_dir / "image", 512 * MIB), errors="remount-ro") as mount:
        daemon.store_dir = mount / "store"
        on_disk(daemon, mount)
        try:
            left, ended, kept = boot("left"), boot("ended"), boot("kept")
            daemon.start()
            for name, vmm in ("left", left), ("ended", ended), ("kept", kept):
                evicted(daemon, name, vmm)
            damaged(mount)
            left.verify()
            left.ask("fill")  # what was only read leaves at no cost
            wait_for(lambda: daemon.logged("eviction_failed"), "it is told")
            assert "Read-only file system" in daemon.logged("eviction_failed")[0]["error"]
            wait_for(lambda: not healthy(daemon)["healthy"], "the store is ill")
            done = daemon.tierd("detach", f"left{OURS}")
            assert done.returncode == 0, done.stderr
            assert not userfaultfds(left.pid)
            left.verify()
            ended.kill()
            wait_for(lambda: len(daemon.logged("guest_ended")) == 2, "that guest is over")
            for entry in wait_for(lambda: daemon.logged("pages_not_deleted"), "it is told"):
                assert "Read-only file system" in entry["error"]
            assert len(daemon.logged("pages_not_deleted")) == 2
            kept.verify()
            daemon.signal(signal.SIGKILL)
            daemon.wait()
            daemon.start()
            assert len(daemon.logged("guest_adopted")) == 1
            kept.verify()
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            kept.verify()
        finally:
            if daemon.process is not None:
                daemon.kill()


def test_a_lost_page_is_told_with_its_address(daemon: Daemon, boot: Boot) -> None:
    """on_lost: hold. The guest waits, the operator repairs the store and says `retry`. A page that is lost is not left."""
    daemon.write(
        store={"path": str(daemon.store_dir), "direct": "off"},
        guests=[{"name": f"*{OURS}", **POLICY, "on_lost": "hold", "read_deadline_s": 0.2}],
    )
    web = boot("web")
    daemon.start()
    evicted(daemon, "web", web)
    page = 77
    wait_for(lambda: daemon.stored_bytes("web") == web.pages * PAGE, "all of it")
    (path,) = daemon.store_dir.iterdir()
    with path.open("r+b") as store:
        store.seek(page * PAGE)
        good = store.read(8)
        store.seek(page * PAGE)
        store.write(bytes(8))
    web.send("verify", page, 1)
    (entry,) = wait_for(lambda: daemon.logged("pages_lost"), "it is told")
    assert entry["addresses"] == [f"{web.addresses[0] + page * PAGE:#x}"]
    assert "stay blocked" in entry["guest_sees"]
    done = daemon.tierd("detach", f"web{OURS}")
    assert done.returncode == 1
    assert "1 pages" in done.stderr
    assert "tierd retry" in done.stderr
    with path.open("r+b") as store:
        store.seek(page * PAGE)
        store.write(good)
    done = daemon.tierd("retry", f"web{OURS}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recovered_bytes"] == PAGE
    wait_for(web.answered, "the guest goes on")
    web.verify()
    assert daemon.tierd("detach", f"web{OURS}").returncode == 0
    web.verify()
