# SPDX-License-Identifier: Apache-2.0
"""Stores, directories and plug-ins that fail in odd ways, most at the ends of a guest's life: no byte is lost, what is told is
true, and who has nothing to do with it notices nothing."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted, tiers, with_tiers
from tests.daemon.test_asked import install
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.disks import damaged, hanging_disk, loop_disk, repaired, sparse
from tests.kernel.vmm import MIB, Vmm, wait_for
from tests.need import need
from tests.store.servers import Server
from tierd import guest as guests


@pytest.fixture
def disk(daemon: Daemon, disk_dir: Path) -> Iterator[Path]:
    """A file system that turns read-only when it is damaged. The daemon ends before it."""
    with loop_disk(disk_dir, sparse(disk_dir / "image", 512 * MIB), errors="remount-ro") as mount:
        yield mount
        if daemon.running:
            daemon.kill()


def detached(daemon: Daemon, name: str) -> None:
    done = daemon.tierd("detach", f"{name}{OURS}")
    assert done.returncode == 0, done.stderr


def somebody_has(daemon: Daemon, size: int) -> bool:
    """A guest whose name is of its pid, since it was attached by that."""
    return any(sum(guest["stored_bytes"].values()) > size for guest in daemon.guests().values())


# --- directories ----------------------------------------------------------------------------------------------------------------


def test_a_store_directory_that_is_gone_stops_no_other_tier(daemon: Daemon, boot: Boot) -> None:
    """Nobody can say how full that store is."""
    with_tiers(daemon, "memory", "file")
    daemon.start()
    web = boot("web", 16 * MIB, "compressible")
    daemon.wait_active("web")
    daemon.store_dir.rename(daemon.store_dir.with_name("moved"))
    web.ask("fill")
    wait_for(lambda: tiers(daemon)["memory"]["stored_bytes"] > 8 * MIB, "memory takes pages")


def test_pages_in_a_directory_that_was_moved(daemon: Daemon, boot: Boot) -> None:
    """They come back, and it is told that a guest's memory is left there."""
    web = boot("web")
    daemon.start()
    evicted(daemon, "web", web)
    daemon.store_dir.rename(daemon.store_dir.with_name("moved"))
    detached(daemon, "web")
    web.verify()
    (told,) = daemon.logged("pages_not_deleted")
    assert "it was moved" in told["error"]


def test_who_deletes_what_could_not_be_deleted(daemon: Daemon, boot: Boot, disk: Path) -> None:
    daemon.store_dir = disk / "store"
    daemon.write(store={"path": str(daemon.store_dir)})
    web = boot("web")
    daemon.start()
    evicted(daemon, "web", web)
    subprocess.run(["sync", "-f", disk], check=True)  # else the file is not there after the repair
    damaged(disk)
    detached(daemon, "web")
    (told,) = daemon.logged("pages_not_deleted")
    assert told["action"] == "that happens when tierd starts after its VMM has ended"
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    repaired(disk, disk.with_name("image"))
    assert list(daemon.store_dir.iterdir())
    web.kill()
    daemon.start()
    assert not list(daemon.store_dir.iterdir())


def test_a_bucket_that_is_read_only_at_the_end(daemon: Daemon, boot: Boot, disk: Path) -> None:
    """The guest is left, no descriptor stays, and attached again it finds a store that works."""
    bucket = disk / "bucket"
    bucket.mkdir(mode=0o700)
    with_tiers(daemon, "objects", stores={"objects": {"scheme": "fs", "options": {"root": str(bucket)}, "retries": 0}})
    web = boot("web", 16 * MIB, "compressible")
    daemon.start()
    evicted(daemon, "web", web)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    detached(daemon, "web")
    web.verify()
    assert daemon.logged("pages_not_deleted")
    assert daemon.process is not None
    open_files = [
        str(entry.readlink()) for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir() if entry.is_symlink()
    ]
    assert not [name for name in open_files if ".segments" in name]
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    done = daemon.tierd("attach", str(web.pid))
    assert done.returncode == 0, done.stderr
    wait_for(lambda: somebody_has(daemon, 8 * MIB), "evicted again")
    web.verify()
    detached(daemon, "web")
    web.verify()


def test_a_start_with_a_directory_that_others_may_read(daemon: Daemon, boot: Boot) -> None:
    """Guests of a predecessor who have nothing in there are served; who needs it is not attached until it is put right."""
    daemon.write(guests=[{"name": f"web{OURS}", **POLICY, "tiers": ["memory"]}, {"name": f"*{OURS}", **POLICY}])
    web = boot("web", 16 * MIB, "compressible")
    daemon.start()
    wait_for(lambda: daemon.stored_bytes("web") > 8 * MIB, "evicted")
    daemon.kill()
    daemon.store_dir.chmod(0o755)
    boot("other")
    daemon.start()
    (told,) = daemon.logged("store_unusable")
    assert "chmod 0700" in told["error"]
    web.verify()
    wait_for(lambda: daemon.stored_bytes("web") > 8 * MIB, "evicted again")
    wait_for(lambda: "chmod 0700" in daemon.guests().get("other", {}).get("reason", ""), "the other one is refused")
    assert "chmod 0700" in str(daemon.status()["stores"])
    daemon.store_dir.chmod(0o700)
    wait_for(lambda: daemon.logged("store_can_be_used"), "it is tried again")
    wait_for(lambda: daemon.stored_bytes("other") > 8 * MIB, "the other one is attached")
    assert all(store["healthy"] for store in daemon.status()["stores"])


def test_a_vmm_that_ends_unserved_while_its_store_hangs(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """What is left of it is removed by a thread that nobody waits for."""
    with hanging_disk(disk_dir, 512 * MIB) as disk:
        daemon.store_dir = disk.mount / "store"
        daemon.write(store={"path": str(daemon.store_dir)})
        web = boot("web")
        daemon.start()
        evicted(daemon, "web", web)
        daemon.kill()
        (pages,) = daemon.store_dir.glob(f"guest-{web.pid}-*")
        pages.rename(pages.with_name("moved"))
        try:
            daemon.start()
            wait_for(lambda: daemon.logged("guest_not_served"), "it is not served")
            disk.hang()
            web.kill()
            wait_for(lambda: daemon.logged("state_swept") or daemon.logged("guest_ended"), "it is over")
            assert daemon.status()["version"]
        finally:
            disk.go_on()
            daemon.kill()


def test_a_guest_that_has_grown_since_its_pages_could_not_be_deleted(
    daemon: Daemon, vmm_binary: Path, tmp_path: Path
) -> None:
    """Detached and attached again, as `guest_grew` says, while the server was down."""
    qemu = tmp_path / "qemu-system-test"
    qemu.symlink_to(vmm_binary)
    name = f"guest=web{OURS},debug-threads=on"
    with Server() as redis:
        with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
        with Vmm(vmm_binary, f"bytes={8 * MIB}", "compressible", "-name", name, arg0=str(qemu)) as web:
            web.ask("fill")
            daemon.start()
            evicted(daemon, "web", web)
            assert daemon.tierd("restore", f"web{OURS}").returncode == 0
            web.ask("add", 8 * MIB)
            redis.kill()
            detached(daemon, "web")
            assert daemon.logged("pages_not_deleted")
            redis.start()
            done = daemon.tierd("attach", str(web.pid))
            assert done.returncode == 0, done.stderr
            wait_for(lambda: somebody_has(daemon, 4 * MIB), "evicted again")
            web.verify()


# --- keys, and what a successor needs -------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_destroyed(daemon: Daemon, boot: Boot) -> None:
    """The detach ends, and the guest is not attached again."""
    with Server() as redis:
        with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}})
        web = boot("web", 16 * MIB, "compressible")
        daemon.start()
        evicted(daemon, "web", web)
        (key,) = (daemon.runtime_dir / "keys").iterdir()
        key.unlink()
        key.mkdir()
        detached(daemon, "web")
        assert daemon.logged("key_not_destroyed")
        web.verify()
        assert "web" not in daemon.guests()
        assert len(daemon.logged("guest_attached")) == 1


@pytest.mark.parametrize("what", ["store", "state", "key"])
@pytest.mark.parametrize("order", [signal.SIGUSR1, signal.SIGTERM])
def test_a_guest_whom_nobody_could_adopt_is_brought_back(
    daemon: Daemon, boot: Boot, what: str, order: signal.Signals
) -> None:
    """Somebody has removed files that this tierd has open. `keep` is for guests that can be kept."""
    store = {"path": str(daemon.store_dir), "encrypt": what == "key"}
    daemon.write(store=store, on_restart="keep", on_stop="keep")
    web, other = boot("web"), boot("other")
    daemon.start()
    evicted(daemon, "web", web)
    evicted(daemon, "other", other)
    (path,) = {
        "store": daemon.store_dir.glob(f"guest-{web.pid}-*"),
        "state": (daemon.runtime_dir / "guests").glob(f"{web.pid}-*"),
        "key": (daemon.runtime_dir / "keys").glob(f"{web.pid}-*"),
    }[what]
    path.unlink()
    daemon.signal(order)
    assert daemon.wait() == 0
    (told,) = daemon.logged("guest_not_kept")
    assert told["guest"] == f"web{OURS}"
    web.verify()
    daemon.start()
    assert len(daemon.logged("guest_adopted")) == 1, "the other one was kept"
    other.verify()


# --- what escapes ---------------------------------------------------------------------------------------------------------------

TROUBLE = """
from tierd_plain import PlainSpace, PlainStore

def trouble(self):
    raise OSError(5, "it cannot say")

PlainSpace.trouble = property(trouble)
"""


def test_a_plug_in_that_cannot_say_how_it_is(
    daemon: Daemon, boot: Boot, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (install(disk_dir, monkeypatch, "troubled:PlainStore") / "troubled.py").write_text(TROUBLE)
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    web = boot("web", 16 * MIB, "compressible")
    daemon.start()
    evicted(daemon, "web", web)
    (told,) = wait_for(lambda: daemon.logged("store_space_trouble"), "it is told")
    assert "it cannot say" in told["error"]
    web.verify()


@pytest.mark.parametrize("name", ["piece_bytes", "takes_runs"])
def test_a_plug_in_whose_attributes_fail(
    daemon: Daemon, boot: Boot, disk_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Like a write that fails: the guest is served on."""
    (install(disk_dir, monkeypatch, "odd:Odd") / "odd.py").write_text(
        f"from tierd_plain import PlainStore\n\nclass Odd(PlainStore):\n    {name} = property(lambda self: 1 // 0)\n"
    )
    with_tiers(daemon, "plain", stores={"plain": {"path": str(disk_dir / "pages"), "encrypt": False}})
    web = boot("web", 16 * MIB, "compressible")
    daemon.start()
    (told, *_) = wait_for(lambda: daemon.logged("eviction_failed"), "it is told")
    assert told["store"] == "plain"
    assert "division" in told["error"]
    assert not daemon.logged("guest_not_served")
    web.verify()


def test_no_descriptors_are_left(daemon: Daemon, boot: Boot) -> None:
    """Guests that are served are served on."""
    web = boot("web")
    daemon.start()
    evicted(daemon, "web", web)
    assert daemon.process is not None
    pid = daemon.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    wait_for(lambda: "looking for new VMMs" in [entry["what"] for entry in daemon.logged("not_done")], "it is told")
    web.verify()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    evicted(daemon, "web", web)
    web.verify()


@pytest.mark.parametrize("order", [signal.SIGUSR1, signal.SIGTERM])
def test_a_key_of_a_store_that_is_asked_is_gone(daemon: Daemon, boot: Boot, order: signal.Signals) -> None:
    """Its guest is brought back before the end, though the others are kept: who comes next could not read its pages."""
    with Server() as redis:
        with_tiers(daemon, "redis", stores={"redis": {"addresses": [redis.address]}}, on_restart="keep", on_stop="keep")
        web = boot("web", 16 * MIB, "compressible")
        daemon.start()
        evicted(daemon, "web", web)
        (path,) = (daemon.runtime_dir / "keys").glob(f"{web.pid}-*")
        path.unlink()
        daemon.signal(order)
        assert daemon.wait() == 0
        (told,) = daemon.logged("guest_not_kept")
        assert str(path) in told["why"]
        web.verify()


def test_a_guest_ends_when_there_is_a_thread_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not ended has the lock of its page table: nobody could serve it again."""
    monkeypatch.setattr(guests, "END_AGAIN_S", 0.01)
    guest: Any = object.__new__(guests.Guest)
    guest._teardown_began, guest._log, tries = False, structlog.get_logger(), []

    async def in_worker(end: Callable[[object], object], served: object) -> object:
        tries.append(served)
        if len(tries) < 3:
            raise OSError(errno.EAGAIN, "no thread can be started")
        return end(served)

    def end(served: object) -> None:
        guest._teardown_began = True
        raise OSError(errno.EIO, "of the end itself")

    guest._in_worker, guest._end = in_worker, end
    with pytest.raises(OSError, match="of the end itself"):
        trio.run(guest._end_in_worker, "it")
    assert tries == ["it"] * 3


def test_no_thread_is_left(daemon: Daemon, boot: Boot) -> None:
    """TasksMax=, pids.max, threads-max. As with descriptors: guests that are served are served on."""
    pids = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids/cgroup.procs").exists() else Path("/sys/fs/cgroup")
    group = pids / f"tierd-test-{os.getpid()}"
    controllers = pids / "cgroup.subtree_control"
    here = pids.name == "pids" or (controllers.exists() and "pids" in controllers.read_text().split())
    need("kernel", os.geteuid() == 0 and here, "no control group for the number of threads")
    web, other = boot("web"), boot("other")
    with_tiers(daemon, "memory", "file")
    daemon.start()
    evicted(daemon, "web", web)
    daemon.wait_active("other")
    assert daemon.process is not None
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(daemon.process.pid))
        (group / "pids.max").write_text("1")
        wait_for(lambda: "no thread can be started" in daemon.log_path.read_text(), "none is left", 60)
        assert daemon.running
        web.verify()
        other.kill()
        (group / "pids.max").write_text("max")
        wait_for(lambda: daemon.logged("guest_ended"), "it has ended")
        assert not list((daemon.runtime_dir / "guests").glob(f"{other.pid}-*"))
        evicted(daemon, "web", web)
        web.verify()
    finally:
        (group / "pids.max").write_text("max")
        daemon.kill()
        group.rmdir()
