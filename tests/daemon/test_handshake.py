# SPDX-License-Identifier: Apache-2.0
"""A VMM that connects and brings its descriptors: it is served as any other is, and what is not true is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.daemon.peer import BYTES, Peer, send, talk, userfaultfd
from tests.daemon.process import OURS, POLICY, Daemon, evicted
from tests.daemon.test_uffd_kept import all_received, start_with
from tests.kernel.conftest import kernel, vmm_binary  # noqa: F401  (fixtures)
from tests.kernel.disks import hanging_disk
from tests.kernel.vmm import MIB, Vmm, userfaultfds, vm_flags, wait_for
from tierd import daemon as daemons
from tierd import resume, serve, vmms
from tierd.attach import GuestSpec, Handed, Region, ptrace
from tierd.attach.procfs import boot_id, start_ticks
from tierd.attach.ptrace import FEATURES_HARMLESS, FEATURES_NEEDED, NUMBER, UFFD_API, UFFDIO_API, pidfd_getfd
from tierd.config import Config
from tierd.engine import FEATURE_ASYNC, choose
from tierd.guest import Ending
from tierd.native import NativeGuest
from tierd.store.file import FileStore
from tierd.systemd import Notifier
from tierd.vmms import SO_PEERPIDFD

NAME = "handshake"  # as vmm_handshake.c calls itself
UFFD_FLAGS = {"um", "uw", "ui", "ur"}


@pytest.fixture
def listening(daemon: Daemon, tmpfs_dir: Path) -> Path:
    """Where `daemon` listens, once it is started. No rule names a guest."""
    path = tmpfs_dir / "handshake.sock"
    daemon.write(handshake={"socket": str(path)}, guests=[], defaults=POLICY)
    return path


@pytest.fixture
def vmm(listening: Path, vmm_binary: Path) -> Iterator[Vmm]:  # noqa: F811
    with Vmm(vmm_binary, f"bytes={8 * MIB}", "regions=2", "name=mine", f"handshake={listening}") as vmm:
        vmm.ask("fill")
        yield vmm


def accepted(vmm: Vmm) -> int:
    return vmm.ask("handshake")[0]


# --- a life -----------------------------------------------------------------------------------------------------------


def test_it_is_served_killed_adopted_and_left(daemon: Daemon, vmm: Vmm) -> None:
    """In whatever order the two start. Nothing of ours is ever in the VMM."""
    daemon.start()
    wait_for(lambda: accepted(vmm) == 1, "it is accepted")
    evicted(daemon, NAME, vmm)
    assert len(userfaultfds(vmm.pid)) == 1
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.logged("reloaded"), "no rule names it, and a reload keeps it")
    assert daemon.guests()[NAME]["state"] == "active"
    for kills in (1, 2):
        daemon.kill()
        daemon.start()
        wait_for(lambda: len(daemon.logged("guest_adopted")) == kills, "it is adopted")  # noqa: B023
        wait_for(lambda: accepted(vmm) == 1 + kills, "it was told so")  # noqa: B023
        vmm.verify()
        evicted(daemon, NAME, vmm)
    done = daemon.tierd("detach", NAME)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: vmm.ask("handshake")[2] == 1, "it is told that it was left")
    vmm.verify()
    assert not any(UFFD_FLAGS & vm_flags(vmm.pid, address) for address in vmm.addresses)
    assert not list((daemon.runtime_dir / "guests").iterdir())
    assert not list(daemon.store_dir.glob("*.pages"))
    assert not daemon.logged("handshake_refused")


def test_until_it_comes_again_it_waits(daemon: Daemon, vmm: Vmm, listening: Path) -> None:
    """A successor that does not listen there (or a VMM that is slow): nothing of it is swept, and its touches wait."""
    daemon.start()
    evicted(daemon, NAME, vmm)
    daemon.kill()
    daemon.write(guests=[], defaults=POLICY)
    daemon.start()
    assert daemon.guests()[NAME]["state"] == "attaching"
    assert "waiting for its VMM's handshake" in daemon.guests()[NAME]["reason"]
    (told,) = daemon.logged("guest_awaits_handshake")
    assert "set handshake.socket" in told["action"]
    done = daemon.tierd("detach", NAME)
    assert done.returncode == 1
    assert "may be in the store" in done.stderr
    vmm.send("verify")
    daemon.kill()
    assert not vmm.answered()
    daemon.write(handshake={"socket": str(listening)}, guests=[], defaults=POLICY)
    daemon.start()
    wait_for(vmm.answered, "its pages are back")
    vmm.verify()


def test_one_that_ends_while_it_is_waited_for_is_forgotten(daemon: Daemon, vmm: Vmm) -> None:
    daemon.start()
    evicted(daemon, NAME, vmm)
    daemon.kill()
    daemon.write(guests=[], defaults=POLICY)
    daemon.start()
    vmm.kill()
    wait_for(lambda: not list((daemon.runtime_dir / "guests").iterdir()), "its state file is removed")
    assert not list(daemon.store_dir.glob("*.pages"))


def test_an_orderly_stop_leaves_it_and_it_comes_again(daemon: Daemon, listening: Path) -> None:
    """After {"event": "left"} it may come again, with the same userfaultfd."""
    with Peer() as peer:
        peer.memory[:] = bytes(range(256)) * (BYTES // 256)
        message = json.dumps(peer.message(name="peer")).encode()
        for _ in range(2):
            daemon.start()
            answer, sock = talk(listening, message, peer.fds)
            with sock:
                assert answer == {"ok": True, "guest": daemon.guests()["peer"]["key"]}
                wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
                daemon.signal(signal.SIGTERM)
                assert daemon.wait() == 0
                assert json.loads(sock.recv(4096)) == {"event": "left"}
                assert sock.recv(4096) == b""
            assert peer.memory[:] == bytes(range(256)) * (BYTES // 256)


@pytest.mark.parametrize("then", [{}, {"handshake": {"socket": "/dev/shm/tierd-elsewhere/handshake.sock"}}])
def test_a_restart_after_which_nobody_listens_there(daemon: Daemon, listening: Path, then: dict[str, Any]) -> None:
    """Kept, its touches would wait for a tierd that it can connect to."""
    with Peer() as peer:
        peer.memory[:] = b"\xa5" * BYTES
        daemon.write(handshake={"socket": str(listening)}, guests=[], defaults=POLICY, on_restart="keep")
        daemon.start()
        answer, sock = talk(listening, json.dumps(peer.message(name="peer")).encode(), peer.fds)
        with sock:
            assert answer["ok"], answer
            wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
            daemon.write(guests=[], defaults=POLICY, on_restart="keep", **then)
            daemon.signal(signal.SIGUSR1)
            assert daemon.wait() == 0
            (told,) = daemon.logged("restart_restores")
            assert "handshake.socket is" in told["why"]
            assert json.loads(sock.recv(4096)) == {"event": "left"}
        assert peer.memory[:] == b"\xa5" * BYTES
        assert not list((daemon.runtime_dir / "guests").iterdir())


def test_a_connection_that_breaks_changes_nothing(daemon: Daemon, listening: Path) -> None:
    with Peer() as peer:
        message = json.dumps(peer.message(name="peer")).encode()
        daemon.start()
        for _ in range(2):
            answer, sock = talk(listening, message, peer.fds)
            with sock:
                assert answer["ok"]
                sock.send(b"more")
                assert not json.loads(sock.recv(4096))["ok"]
                assert sock.recv(4096) == b""
        assert daemon.guests()["peer"]["state"] == "active"
        other = json.dumps(peer.message(uffd=(again := peer.own(userfaultfd())))).encode()
        answer, sock = talk(listening, other, [again, *peer.fds[1:]])
        sock.close()
        assert "another userfaultfd" in answer["error"]
        assert daemon.guests()["peer"]["state"] == "active"


def test_it_connects_again(daemon: Daemon, listening: Path) -> None:
    """Only with the userfaultfd that it is served with, perhaps under another number; its older connection is closed."""
    with Peer() as peer, ExitStack() as owned:
        peer.memory[:] = b"\xa5" * BYTES
        daemon.start()
        answer, first = talk(listening, json.dumps(peer.message(name="peer")).encode(), peer.fds)
        owned.enter_context(first)
        assert answer["ok"], answer
        other = agreed(peer, FEATURES_NEEDED | choose().features)
        answer, sock = talk(listening, json.dumps(peer.message(uffd=other)).encode(), [other, *peer.fds[1:]])
        sock.close()
        assert "another userfaultfd" in answer["error"]
        number = os.dup(peer.uffd)
        owned.callback(os.close, number)
        answer, second = talk(listening, json.dumps(peer.message(uffd=number)).encode(), peer.fds)
        owned.enter_context(second)
        assert answer["ok"], answer
        assert first.recv(4096) == b""
        devnull = os.open(os.devnull, os.O_RDONLY)
        os.dup2(devnull, peer.uffd, inheritable=False)  # it keeps the other number only
        os.close(devnull)
        before = daemon.guests()["peer"]["cycles"]
        wait_for(lambda: daemon.guests()["peer"]["cycles"] > before + 3, "cycles go on")
        assert daemon.guests()["peer"]["state"] == "active"
        assert not daemon.logged("guest_refused")
        assert peer.memory[:] == b"\xa5" * BYTES
        done = daemon.tierd("detach", "peer")
        assert done.returncode == 0, done.stderr
        assert json.loads(second.recv(4096)) == {"event": "left"}


@pytest.mark.parametrize("kcmp", [ptrace.NUMBER["kcmp"], 10_000])
def test_whether_two_descriptors_are_one(monkeypatch: pytest.MonkeyPatch, kcmp: int) -> None:
    """Also by a kernel without kcmp(2)."""
    monkeypatch.setitem(ptrace.NUMBER, "kcmp", kcmp)
    with Peer() as peer:
        again = peer.own(os.dup(peer.uffd))
        assert ptrace.same_open_file(peer.uffd, again)
        assert not ptrace.same_open_file(peer.uffd, peer.own(userfaultfd()))


def test_no_descriptor_for_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """EMFILE: what was copied is closed again."""
    with Peer() as peer:
        handed = Handed(peer.own(os.dup(peer.uffd)), peer.uffd, peer.uffd, peer.pagemap, {(0, 1): peer.memfd})
        fds, real, left = len(os.listdir("/proc/self/fd")), os.dup, iter((1, 1, 1))

        def dup(fd: int) -> int:
            if next(left, 0):
                return real(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(os, "dup", dup)
        with pytest.raises(OSError, match="Too many"):
            handed.dup()
        assert len(os.listdir("/proc/self/fd")) == fds


def test_one_that_closes_without_reading(daemon: Daemon, listening: Path) -> None:
    """Reset for us: that ends its connection and nothing else. Also with more said, which is answered."""
    daemon.start()
    with Peer() as peer:
        message = json.dumps(peer.message(name="peer")).encode()
        for more in (b"", b"more"):
            sock = send(listening, message, peer.fds)
            wait_for(lambda: select.select([sock], [], [], 0)[0], "it is answered")  # noqa: B023
            if more:
                daemon.signal(signal.SIGSTOP)  # so that it finds what was said, and nobody any more
                sock.send(more)
            sock.close()
            daemon.signal(signal.SIGCONT)
            answer, sock = talk(listening, message, peer.fds)
            sock.close()
            assert answer["ok"], answer
        assert daemon.running
        assert not daemon.logged("handshake_failed")


def test_a_userfaultfd_whose_reads_block(daemon: Daemon, listening: Path) -> None:
    """The flag is the open file's, which the VMM has, too: before, meanwhile, and while the fault threads are ended."""

    def block() -> None:
        fcntl.fcntl(peer.uffd, fcntl.F_SETFL, fcntl.fcntl(peer.uffd, fcntl.F_GETFL) & ~os.O_NONBLOCK)

    def always() -> None:
        while not over.is_set():
            block()
            time.sleep(0.0002)

    daemon.start()
    with Peer() as peer:
        peer.memory[:] = b"\xa5" * BYTES
        over, blocking = threading.Event(), threading.Thread(target=always)
        block()
        answer, sock = talk(listening, json.dumps(peer.message(name="peer")).encode(), peer.fds)
        with sock:
            assert answer["ok"], answer
            assert fcntl.fcntl(peer.uffd, fcntl.F_GETFL) & os.O_NONBLOCK
            wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
            block()
            wait_for(lambda: fcntl.fcntl(peer.uffd, fcntl.F_GETFL) & os.O_NONBLOCK, "it is set again")
            blocking.start()
            try:
                for page in range(0, BYTES, 1 << 16):  # a fault that is served: its thread reads again
                    assert peer.memory[page] == 0xA5
                done = daemon.tierd("detach", "peer")
            finally:
                over.set()
                blocking.join()
            assert done.returncode == 0, done.stderr
            assert json.loads(sock.recv(4096)) == {"event": "left"}
        assert peer.memory[:] == b"\xa5" * BYTES


def test_a_successor_wants_the_same_userfaultfd(daemon: Daemon, listening: Path) -> None:
    """With another one, nobody would see the faults; pages would read as zeros if it were believed."""
    with Peer() as peer:
        peer.memory[:] = b"\xa5" * BYTES
        message = json.dumps(peer.message(name="peer")).encode()
        daemon.start()
        _, sock = talk(listening, message, peer.fds)
        wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
        daemon.kill()
        sock.close()
        daemon.start()
        other = json.dumps(peer.message(uffd=(again := peer.own(userfaultfd())))).encode()
        answer, sock = talk(listening, other, [again, *peer.fds[1:]])
        sock.close()
        assert "it must send that one" in answer["error"]
        answer, sock = talk(listening, message, peer.fds)
        with sock:
            assert answer["ok"], answer
            assert peer.memory[:] == b"\xa5" * BYTES


def test_what_the_service_manager_keeps_is_enough(
    daemon: Daemon, listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor does not wait until the VMM comes again; in whatever order it gets the descriptors."""
    monkeypatch.setenv("FDSTORE", "64")
    with Peer() as peer, ExitStack() as owned:
        peer.memory[:] = b"\x5a" * BYTES
        message = json.dumps(peer.message(name="peer")).encode()
        daemon.start()
        _, sock = talk(listening, message, peer.fds)
        wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
        kept, name = all_received(daemon.notify)
        for fd in kept:
            owned.callback(os.close, fd)
        assert len(kept) == 3
        daemon.kill()
        sock.close()
        start_with(daemon, kept[::-1], name)
        assert daemon.logged("guest_adopted")
        assert not daemon.logged("guest_awaits_handshake")
        assert peer.memory[:] == b"\x5a" * BYTES
        answer, sock = talk(listening, message, peer.fds)
        with sock:
            assert answer["ok"], answer
            done = daemon.tierd("detach", "peer")
            assert done.returncode == 0, done.stderr
            assert json.loads(sock.recv(4096)) == {"event": "left"}
        daemon.wait_told(f"FDSTOREREMOVE=1\nFDNAME={name}")


def test_the_service_manager_is_no_stranger(daemon: Daemon, vmm: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the guest's memory (we are the parent of this tierd), and touches none of it."""
    monkeypatch.setenv("FDSTORE", "64")
    daemon.start()
    kept, _ = all_received(daemon.notify)
    try:
        evicted(daemon, NAME, vmm)
        # ten times a second, and at most once a second they look who holds the memory
        wait_for(lambda: daemon.guests()[NAME]["cycles"] > 25, "cycles go on")
        assert daemon.guests()[NAME]["state"] == "active"
        vmm.verify()
    finally:
        for fd in kept:
            os.close(fd)


def test_a_vmm_that_closes_its_copy(daemon: Daemon, vmm: Vmm) -> None:
    """It is not entered to put it back: where nobody else can hold it, everything comes back."""
    daemon.start()
    evicted(daemon, NAME, vmm)
    vmm.ask("close-userfaultfd")
    (told,) = wait_for(lambda: daemon.logged("guest_refused"), "it is told")
    assert "must keep the descriptor" in told["reason"]
    wait_for(lambda: not daemon.stored_bytes(NAME), "everything is brought back")
    vmm.verify()


def test_no_descriptor_for_another_try_ends_no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EMFILE where a guest is to be adopted once more: that try has nothing, and the task goes on."""
    tries: list[object] = []

    class Adopted:
        """A guest that waits for its VMM at the first try, and ends at the second."""

        def __init__(self, spec: GuestSpec, *_: object, handed: object = None, **__: object) -> None:
            self.spec, self.policy, self.key, self.name, self.pid, self.paused = (
                spec,
                None,
                "1-2",
                "web",
                spec.pid,
                False,
            )
            tries.append(handed)

        async def run(self) -> Ending:
            if len(tries) == 1:
                raise serve.AwaitsHandshake(self.name, self.pid)
            return Ending.EXITED

        def refuse(self, _: Exception) -> None:
            pass

    def no_descriptor(_: str) -> Handed:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    ticks = start_ticks(os.getpid())
    assert ticks is not None
    (tmp_path / "1-2.state").touch()
    host: Any = SimpleNamespace(
        notifier=Notifier(""),
        engine=choose(),
        stores={},
        guests_dir=tmp_path,
        kept_uffds={},
        at_manager=set(),
        kept_handed={},
    )
    monkeypatch.setattr(daemons, "Guest", Adopted)

    async def run() -> str | None:
        under_test = daemons.Daemon(Config(), tmp_path, host, resume.Resumed(tmp_path))
        monkeypatch.setattr(under_test, "_handed_of", no_descriptor)
        guest: Any = Adopted(GuestSpec("web", os.getpid(), ticks or 0, "", (), ()))
        return await under_test._run_guest(guest)

    assert trio.run(run) is None
    assert tries == [None, None]


def test_a_page_table_that_cannot_be_read_now_is_read_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """EMFILE at the start: nothing is wrong with it. What is wrong with another is told once, and left to the operator."""
    tried: list[str] = []
    adopted = trio.Event()

    def read(path: Path, _: str) -> None:
        tried.append(path.name)
        if path.name == "1-1.state":
            raise serve.StateError("damaged")
        if len(tried) < 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        trio.from_thread.run_sync(adopted.set)
        raise serve.StateError("damaged, too")

    monkeypatch.setattr(daemons, "read_state", read)
    monkeypatch.setattr(daemons, "READOPT_S_MAX", 0.01)
    paths = [tmp_path / name for name in ("1-1.state", "2-2.state")]
    for path in paths:
        path.touch()
    host: Any = SimpleNamespace(notifier=Notifier(""), engine=choose(), boot_id="", guests_dir=tmp_path)

    async def run() -> None:
        under_test = daemons.Daemon(Config(), tmp_path, host, resume.Resumed(tmp_path))
        async with trio.open_nursery() as under_test._nursery:
            for path in paths:
                await under_test._adopt(path)
            assert under_test._running == {"2-2"}, "nobody attaches it meanwhile"
            with trio.fail_after(20):
                await adopted.wait()

        assert not under_test._running

    trio.run(run)
    assert tried == ["1-1.state", *["2-2.state"] * 3]


# --- two at once ------------------------------------------------------------------------------------------------------


def deleted_stores(daemon: Daemon) -> list[str]:
    assert daemon.process is not None
    fds = Path(f"/proc/{daemon.process.pid}/fd")
    links = [os.readlink(fd) for fd in fds.iterdir() if os.path.lexists(fd)]
    return [link for link in links if link.endswith(".pages (deleted)")]


def test_two_connections_at_once_are_one_guest(daemon: Daemon, listening: Path) -> None:
    """A second attach would remove the first one's store file: stored pages would be lost with tierd's next death."""
    daemon.start()
    with Peer() as peer, ExitStack() as owned:
        peer.memory[:] = b"\xa5" * BYTES
        message = json.dumps(peer.message(name="peer")).encode()
        daemon.signal(signal.SIGSTOP)
        socks = [owned.enter_context(send(listening, message, peer.fds)) for _ in range(3)]
        daemon.signal(signal.SIGCONT)
        answers = [json.loads(sock.recv(8192)) for sock in socks]
        assert sum(answer["ok"] for answer in answers) == 1, answers
        assert all(answer["ok"] or "another connection" in answer["error"] for answer in answers)
        wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
        assert not deleted_stores(daemon)
        assert len(list(daemon.store_dir.glob("*.pages"))) == 1
        assert len(list((daemon.runtime_dir / "guests").iterdir())) == 1
        assert peer.memory[:] == b"\xa5" * BYTES


def test_a_rule_does_not_replace_one_that_came_by_itself(
    daemon: Daemon,
    listening: Path,
    vmm_binary: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Discovery was refused, and waits to try again; meanwhile the VMM connects. An orderly stop brings it back."""
    daemon.write(handshake={"socket": str(listening)}, guests=[{"name": f"*{OURS}", **POLICY}], defaults=POLICY)
    qemu, later = tmp_path / "qemu-system-test", tmp_path / "later"
    qemu.symlink_to(vmm_binary)
    arguments = (f"bytes={8 * MIB}", "regions=1", f"handshake={later}", "-name", f"guest=web{OURS},debug-threads=on")
    with Vmm(vmm_binary, *arguments, arg0=str(qemu)) as vmm, ExitStack() as owned:
        vmm.ask("fill")
        pidfd = os.pidfd_open(vmm.pid)
        owned.callback(os.close, pidfd)
        numbers = [fd.name for fd in Path(f"/proc/{vmm.pid}/fd").iterdir() if "memfd" in os.readlink(fd)]
        held = [pidfd_getfd(pidfd, int(number)) for number in numbers]  # a stranger, who has the guest's memory
        daemon.start()
        for count in (1, 2, 3):
            wait_for(
                lambda: len(daemon.logged("guest_refused")) == count,  # noqa: B023
                "discovery is refused; it tries again in 1 s, then 2, then 5",
            )
            before, held = held, [os.dup(fd) for fd in held]  # by other numbers: that is told, too
            for fd in before:
                os.close(fd)
        for fd in held:
            os.close(fd)
        later.symlink_to(listening)
        wait_for(lambda: accepted(vmm) == 1, "it is accepted")
        daemon.signal(signal.SIGHUP)  # discovery tries again now
        wait_for(lambda: daemon.logged("reloaded"), "it is reloaded")
        evicted(daemon, NAME, vmm)
        time.sleep(0.5)
        assert daemon.guests()[NAME]["state"] == "active"
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        vmm.verify()
        assert not list((daemon.runtime_dir / "guests").iterdir())


def test_one_attach_at_a_time_whoever_makes_it(tmpfs_dir: Path) -> None:
    """By the lock of the state file that has no name yet: one that an attach died over is removed, one that is held never."""
    spec = GuestSpec("web", 1, 2, "boot", (), ())
    path = tmpfs_dir / "1-2.state"

    def take() -> tuple[serve.Served, Path]:
        served = serve.Served(spec, path, choose())
        try:
            return served, serve._take_state(served)
        except BaseException:
            served.close()
            raise

    first, unfinished = take()
    inode = unfinished.stat().st_ino
    with pytest.raises(serve.StateError, match="being attached just now"):
        take()
    assert unfinished.stat().st_ino == inode
    first.close()  # as by a death: the name stays
    second, _ = take()
    serve._publish_state(second, unfinished)
    second.close()
    with pytest.raises(serve.StateError, match="made by another attach"):
        take()
    assert path.exists()
    assert not unfinished.exists()
    with pytest.raises(serve.StateError, match="File exists"):
        path.with_suffix(".new").touch()
        serve._publish_state(second, unfinished)  # never in the place of another


def test_a_state_file_says_from_its_first_moment_how_the_guest_came(
    tmpfs_dir: Path, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A death just after it has its name: a successor would look for a userfaultfd that it may not take."""
    seen: list[tuple[bool, bool]] = []

    def look(_: NativeGuest) -> None:  # what comes next
        (path,) = tmpfs_dir.glob("*.state")
        seen.append((serve.read_state(path, boot_id()).serving.handshake, path.with_suffix(".new").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(NativeGuest, "start", look)
    with Peer() as peer, pytest.raises(KeyboardInterrupt):
        pidfd = peer.own(os.pidfd_open(os.getpid()))
        info = os.fstat(peer.memfd)
        file, pid = (info.st_dev, info.st_ino), os.getpid()
        ticks = start_ticks(pid)
        assert ticks is not None
        spec = GuestSpec("peer", pid, ticks, boot_id(), (), (Region(peer.address, BYTES, 0, *file),), handshake=True)
        serve.attach(
            spec,
            engine=choose(),
            stores=[FileStore(disk_dir / "store", None, "auto")],
            guests_dir=tmpfs_dir,
            tuning=serve.Tuning(1.0, 8),
            swap_can_receive=False,
            capacity_bytes=BYTES,
            handed=Handed(pidfd, peer.uffd, peer.uffd, peer.pagemap, {file: peer.memfd}),
        )
    assert seen == [(True, True)]
    assert not list(tmpfs_dir.iterdir())  # and what this attach made is gone
    assert not list((disk_dir / "store").iterdir())


# --- what is not true -------------------------------------------------------------------------------------------------


def must_be_refused(daemon: Daemon, listening: Path, peer: Peer, message: bytes, fds: list[int]) -> str:
    """With an answer; nothing has changed, and the next one is served."""
    answer, sock = talk(listening, message, fds)
    with sock:
        assert answer["ok"] is False, answer
        assert sock.recv(1) == b""
    assert daemon.running
    assert not daemon.guests()
    assert not list((daemon.runtime_dir / "guests").iterdir())
    assert not list(daemon.store_dir.glob("*.pages"))
    assert peer.untouched()
    return str(answer["error"])


Lie = Callable[[Peer], tuple[dict[str, Any], list[int]]]


def sealed(peer: Peer) -> int:
    fd = peer.own(os.memfd_create("sealed", os.MFD_ALLOW_SEALING))
    os.ftruncate(fd, BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
    return fd


def another_memfd(peer: Peer) -> int:
    fd = peer.own(os.memfd_create("another"))
    os.ftruncate(fd, BYTES)
    return fd


LIES: dict[str, tuple[Lie, str]] = {
    "an unknown key": (lambda p: (p.message(more=1), p.fds), "more: Extra inputs"),
    "another version": (lambda p: (p.message(version=2), p.fds), "version: Input should be less than or equal to 1"),
    "no region": (lambda p: (p.message(regions=[]), p.fds), "regions: "),
    "a number that is text": (lambda p: (p.message(uffd="3"), p.fds), "uffd: Input should be a valid integer"),
    "an address within a page": (lambda p: (p.region(address=p.address + 8), p.fds), "regions.0.address: "),
    "no memory file": (lambda p: (p.message(), p.fds[:2]), "2 descriptors came"),
    "no descriptor": (lambda p: (p.message(), []), "0 descriptors came"),
    "a descriptor too many": (lambda p: (p.message(), [*p.fds, p.memfd]), "4 descriptors came"),
    "a file that did not come": (lambda p: (p.region(memfd=1), p.fds), "3 descriptors came"),
    "one region twice": (lambda p: (p.message(regions=p.message()["regions"] * 2), p.fds), "overlap"),
    "no userfaultfd": (lambda p: (p.message(), [p.memfd, *p.fds[1:]]), "no userfaultfd"),
    "another number": (lambda p: (p.message(uffd=p.pagemap), p.fds), "say its number"),
    "a closed number": (lambda p: (p.message(uffd=1 << 20), p.fds), "not open"),
    "another process's pagemap": (
        lambda p: (p.message(), [p.uffd, p.own(os.open(f"/proc/{os.getppid()}/pagemap", os.O_RDONLY)), p.memfd]),
        "not the VMM's pagemap",
    ),
    "no pagemap": (
        lambda p: (p.message(), [p.uffd, p.own(os.open("/proc/self/maps", os.O_RDONLY)), p.memfd]),
        "pagemap",
    ),
    "a foreign memfd": (lambda p: (p.message(), [*p.fds[:2], another_memfd(p)]), "not mapped as the VMM says"),
    "a sealed memfd": (lambda p: (p.message(), [*p.fds[:2], sealed(p)]), "sealed"),
    "a file that is no memory": (
        lambda p: (p.message(), [*p.fds[:2], p.own(os.open(__file__, os.O_RDONLY))]),
        "not on shared memory",
    ),
    "a file to read only": (
        lambda p: (p.message(), [*p.fds[:2], p.own(os.open(f"/proc/self/fd/{p.memfd}", os.O_RDONLY))]),
        "not open for reading and writing",
    ),
    "more than there is": (lambda p: (p.region(bytes=2 * BYTES), p.fds), "ends behind its memory file"),
    "another place": (lambda p: (p.region(address=p.address + BYTES), p.fds), "not mapped as the VMM says"),
    "another offset": (
        lambda p: (p.region(offset=BYTES // 2, bytes=BYTES // 2), p.fds),
        "not mapped as the VMM says",
    ),
    "a hazard": (lambda p: (p.region(bytes=BYTES // 2), p.fds), "maps the guest's memory twice"),
}


@pytest.fixture
def started(daemon: Daemon, listening: Path) -> Path:
    daemon.start()
    return listening


def test_each_lie_is_told_and_changes_nothing(daemon: Daemon, started: Path) -> None:
    for what, (lie, says) in LIES.items():
        with Peer() as peer:
            message, fds = lie(peer)
            error = must_be_refused(daemon, started, peer, json.dumps(message).encode(), fds)
            assert says in error, f"{what}: {error}"
    with Peer() as peer:
        answer, sock = talk(started, json.dumps(peer.message()).encode(), peer.fds)
        with sock:
            assert answer["ok"], answer


WP_ASYNC, SIGBUS, EVENT_REMOVE = 1 << 15, 1 << 7, 1 << 3


def agreed(peer: Peer, features: int) -> int:
    """Another userfaultfd, with these features."""
    fd = peer.own(userfaultfd())
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("QQQ", UFFD_API, features, 0)))
    return fd


def test_a_userfaultfd_that_would_not_hold(daemon: Daemon, started: Path) -> None:
    """With WP_ASYNC the kernel lets writes through while a page is on its way out: they would be lost. At an adoption, too."""
    needed = FEATURES_NEEDED | choose().features
    with Peer() as peer:
        peer.memory[:] = b"\x5a" * BYTES
        for feature in (WP_ASYNC, SIGBUS, EVENT_REMOVE):
            uffd = agreed(peer, needed | feature)
            message = json.dumps(peer.message(uffd=uffd)).encode()
            error = must_be_refused(daemon, started, peer, message, [uffd, *peer.fds[1:]])
            assert f"{feature:#x} is too much; make a new one" in error
        uffd = agreed(peer, needed | FEATURES_HARMLESS)
        message = json.dumps(peer.message(uffd=uffd, name="peer")).encode()
        answer, sock = talk(started, message, [uffd, *peer.fds[1:]])
        with sock:
            assert answer["ok"], answer
            wait_for(lambda: daemon.stored_bytes("peer") == BYTES, "it is evicted")
            daemon.kill()
        daemon.start()
        other = agreed(peer, needed | WP_ASYNC)
        message = json.dumps(peer.message(uffd=other, name="peer")).encode()
        answer, sock = talk(started, message, [other, *peer.fds[1:]])
        sock.close()
        assert "is too much" in answer["error"]
        message = json.dumps(peer.message(uffd=uffd, name="peer")).encode()
        answer, sock = talk(started, message, [uffd, *peer.fds[1:]])
        with sock:
            assert answer["ok"], answer
            assert peer.memory[:] == b"\x5a" * BYTES


def test_what_may_be_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, good in (
        (FEATURES_NEEDED, True),
        (FEATURES_NEEDED | FEATURES_HARMLESS, True),
        (FEATURES_NEEDED & ~1, False),
        *((FEATURES_NEEDED | 1 << bit, False) for bit in (1, 2, 3, 6, 7, 15, 17, 40)),
    ):
        monkeypatch.setattr(ptrace, "features_of", lambda _, found=found: found)
        with nullcontext() if good else pytest.raises(OSError, match="make a new one"):
            ptrace.agree_once(-1, 0)


def test_a_predecessor_that_was_killed_in_a_sync_window_left_async_mode_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel does not show the feature then; a VMM that brings such a userfaultfd again is not refused for it."""
    engine = 1 << 17 | FEATURE_ASYNC
    monkeypatch.setattr(ptrace, "features_of", lambda _: FEATURES_NEEDED | 1 << 17)
    ptrace.must_be_agreed(-1, engine, FEATURE_ASYNC)
    with pytest.raises(OSError, match="0x40000 is missing"):
        ptrace.must_be_agreed(-1, engine)


# A process that maps something else at the address of its parent's memory, and makes a userfaultfd; prints its number.
ELSEWHERE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
address, size = map(int, sys.argv[1:3])
fd = os.memfd_create("elsewhere")
os.ftruncate(fd, size)
assert libc.mmap(address, size, 3, 0x100001, fd, 0) == address, os.strerror(ctypes.get_errno())
print(libc.syscall(int(sys.argv[3]), os.O_CLOEXEC | os.O_NONBLOCK), flush=True)
sys.stdin.read()
"""


def test_another_process_s_userfaultfd(daemon: Daemon, started: Path) -> None:
    """It would register what that process has at these addresses: seen, and taken back."""
    with Peer() as peer, ExitStack() as owned:
        command = [sys.executable, "-c", ELSEWHERE, str(peer.address), str(BYTES), str(NUMBER["userfaultfd"])]
        other = owned.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert other.stdin is not None
        assert other.stdout is not None
        owned.callback(other.stdin.close)
        pidfd = peer.own(os.pidfd_open(other.pid))
        foreign = peer.own(pidfd_getfd(pidfd, int(other.stdout.readline())))
        error = must_be_refused(
            daemon, started, peer, json.dumps(peer.message()).encode(), [foreign, peer.pagemap, peer.memfd]
        )
        assert "another process's" in error
        assert not UFFD_FLAGS & vm_flags(other.pid, peer.address)


# A VMM in mounts of its own, with argv[2] (if any) bound on its pagemap; says that it is ready, connects, prints the answer.
IN_ITS_OWN_MOUNTS = """
import ctypes, json, os, sys
from pathlib import Path
from tests.daemon.peer import Peer, libc, talk
with Peer() as peer:
    pagemap = f"/proc/{os.getpid()}/pagemap"
    assert not libc.unshare(0x20000), "CLONE_NEWNS"
    assert not libc.mount(b"none", b"/", None, 0x44000, None), "MS_PRIVATE | MS_REC"
    if sys.argv[2:]:
        assert not libc.mount(sys.argv[2].encode(), pagemap.encode(), None, 0x1000, None), "MS_BIND"
    fd = os.open(pagemap, os.O_RDONLY)
    assert os.readlink(f"/proc/self/fd/{fd}") == pagemap
    print(flush=True)
    sys.stdin.readline()
    answer, sock = talk(Path(sys.argv[1]), json.dumps(peer.message(name="peer")).encode(), [peer.uffd, fd, peer.memfd])
    print(json.dumps(answer), flush=True)
    sys.stdin.readline()
    os._exit(0)
"""


@contextmanager
def in_its_own_mounts(*arguments: str) -> Iterator[tuple[Callable[[], None], Callable[[], dict[str, Any]]]]:
    """(wait until it is ready, its answer)"""
    command = [sys.executable, "-c", IN_ITS_OWN_MOUNTS, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = child.stdin, child.stdout

        def go() -> dict[str, Any]:
            stdin.write("\n")
            stdin.flush()
            answer: dict[str, Any] = json.loads(stdout.readline())
            return answer

        def ready() -> None:
            assert stdout.readline() == "\n"

        try:
            yield ready, go
        finally:
            stdin.write("\n")


def test_what_is_mounted_over_a_pagemap(daemon: Daemon, started: Path, disk_dir: Path, tmp_path: Path) -> None:
    """Its link says that it is the pagemap. Nothing of a file system that never answers is asked; and mounts of its own alone
    are no fault of a VMM."""
    (tmp_path / "file").write_bytes(bytes(4096))
    for fake in (tmp_path / "file", Path(f"/proc/{os.getpid()}/pagemap")):
        with in_its_own_mounts(str(started), str(fake)) as (ready, go):
            ready()
            assert "not the VMM's pagemap" in go()["error"]
    with in_its_own_mounts(str(started)) as (ready, go):
        ready()
        assert go()["ok"]
        assert daemon.guests()["peer"]["state"] == "active"
    wait_for(lambda: not daemon.guests(), "it ended")
    with hanging_disk(disk_dir) as disk:
        (disk.mount / "pagemap").write_bytes(bytes(4096))
        with in_its_own_mounts(str(started), str(disk.mount / "pagemap")) as (ready, go):
            try:
                ready()
                disk.hang()
                assert "not the VMM's pagemap" in go()["error"]
                assert not daemon.guests()
            finally:
                disk.go_on()


def test_the_manager_s_descriptors_are_told_apart(tmpfs_dir: Path) -> None:
    """Not by names: guest memory may be a file that is called pagemap."""
    with Peer() as peer:
        memory = os.open(tmpfs_dir / "pagemap", os.O_RDWR | os.O_CREAT)
        peer.own(memory)
        key, resumed = f"{os.getpid()}-1", resume.Resumed(tmpfs_dir)
        fds = [os.dup(fd) for fd in (memory, peer.uffd, peer.pagemap)]
        resume._sort_out([(key, fd) for fd in fds], resumed)
        handed, info = resumed.kept_handed[key], os.fstat(memory)
        assert (handed.pagemap, dict(handed.memfds)) == (fds[2], {(info.st_dev, info.st_ino): fds[0]})
        assert resumed.kept_uffds[key] == fds[1]
        handed.close()
        os.close(fds[1])


def test_a_file_that_hangs_holds_up_nobody(daemon: Daemon, started: Path, disk_dir: Path) -> None:
    """Whoever sent it decides how long its close takes."""
    with hanging_disk(disk_dir) as disk, Peer() as peer:
        peer.memory[:] = b"\x11" * BYTES
        fd = os.open(disk.mount / "file", os.O_RDWR | os.O_CREAT)
        try:
            disk.hang()
            for _ in range(2):
                error = must_be_refused(daemon, started, peer, json.dumps(peer.message()).encode(), [*peer.fds[:2], fd])
                assert "not on shared memory" in error
            answer, sock = talk(started, json.dumps(peer.message()).encode(), peer.fds)
            with sock:
                assert answer["ok"], answer
                wait_for(lambda: daemon.stored_bytes(f"pid-{os.getpid()}") == BYTES, "it is served")
        finally:
            disk.go_on()
            os.close(fd)


def test_nobody_is_waited_for(daemon: Daemon, started: Path) -> None:
    """One that says nothing is told so, and holds up nobody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent, Peer() as peer:
        silent.settimeout(20)
        silent.connect(str(started))
        answer, sock = talk(started, json.dumps(peer.message()).encode(), peer.fds)
        with sock:
            assert answer["ok"]
            assert "no message came within" in json.loads(silent.recv(4096))["error"]


# --- what tierd may not do ---------------------------------------------------------------------------------------------


def test_where_the_engine_needs_a_privilege_that_tierd_has_not(daemon: Daemon, listening: Path) -> None:
    """Stock: process_madvise of another process takes CAP_SYS_NICE, whatever its trial on our own pages said."""
    without = ("setpriv", "--bounding-set=-sys_nice")
    says = "from tierd.native import probe; print(probe().pageout)"
    pageout = subprocess.run([*without, sys.executable, "-c", says], capture_output=True, text=True, check=True).stdout
    daemon.start(without)
    with Peer() as peer:
        message = json.dumps(peer.message()).encode()
        if int(pageout):  # the trial failed: then by calls inside the VMM, which root without this capability may make
            answer, sock = talk(listening, message, peer.fds)
            sock.close()
            assert answer["ok"], answer
        else:
            error = must_be_refused(daemon, listening, peer, message, peer.fds)
            assert "give tierd CAP_SYS_NICE" in error


@pytest.mark.parametrize("kib", [2048, 8192])
def test_little_memory_may_be_locked(daemon: Daemon, vmm: Vmm, kib: int) -> None:
    """8 MiB are what an ordinary user has: enough for a small guest. With less it is told what to raise."""
    daemon.start(("prlimit", f"--memlock={kib << 10}", "setpriv", "--bounding-set=-ipc_lock"))
    if kib == 8192:
        evicted(daemon, NAME, vmm)
    else:
        (told, *_) = wait_for(lambda: daemon.logged("handshake_refused"), "it is told")
        assert "RLIMIT_MEMLOCK is 2048 KiB" in told["error"]
        assert accepted(vmm) == 0
        assert not any(UFFD_FLAGS & vm_flags(vmm.pid, address) for address in vmm.addresses)
    vmm.verify()


@pytest.mark.parametrize("option", [SO_PEERPIDFD, 0x7FFF])
def test_who_has_connected(monkeypatch: pytest.MonkeyPatch, option: int) -> None:
    """The kernel says it, also where it has no SO_PEERPIDFD (before 6.5)."""
    monkeypatch.setattr(vmms, "SO_PEERPIDFD", option)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid, pidfd = vmms.peer(ours)
    try:
        assert pid == os.getpid()
        assert re.search(rf"^Pid:\s+{pid}$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.M)
        assert not os.get_inheritable(pidfd)
    finally:
        os.close(pidfd)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = st.sampled_from(["version", "name", "uffd", "regions", "address", "bytes", "offset", "memfd", "more"])


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_told_and_changes_nothing(daemon: Daemon, started: Path, data: st.DataObject) -> None:
    """Bytes, any JSON, and a true message in which one value is another."""
    with Peer() as peer:
        message = peer.message()
        key = data.draw(KEYS)
        value = data.draw(JSON.filter(lambda value: value != message.get(key)))
        inside = key in message["regions"][0]
        (message["regions"][0] if inside else message)[key] = value
        if message == peer.message(name=value) and isinstance(value, str):
            return  # any name is a good one
        raw = data.draw(st.sampled_from([json.dumps(message).encode(), data.draw(st.binary(min_size=1, max_size=64))]))
        must_be_refused(daemon, started, peer, raw, data.draw(st.sampled_from([peer.fds, peer.fds[:1], []])))
