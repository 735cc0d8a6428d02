# SPDX-License-Identifier: Apache-2.0
"""A VMM that closes its copy of the userfaultfd: the daemon's is the last one then, and must not be."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import Vmm, userfaultfds, wait_for
from tierd.attach.ptrace import close_in_vmm


def close_copy(vmm: Vmm) -> None:
    (number,) = userfaultfds(vmm.pid)
    close_in_vmm(vmm.pid, int(number))


def test_it_is_put_back(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    close_copy(vmm)
    wait_for(lambda: daemon.logged("userfaultfd_put_back"), "it is put back")
    daemon.kill()
    daemon.start()
    assert daemon.logged("guest_adopted")
    vmm.verify()


@pytest.mark.parametrize("fragile", [False, True])
def test_where_nobody_can_hold_it(daemon: Daemon, boot: Boot, fragile: bool) -> None:
    """A filter keeps us out of the VMM, and there is no service manager that keeps descriptors."""
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, "allow_fragile": fragile}])
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    close_copy_behind_a_filter(vmm)
    if fragile:
        wait_for(lambda: daemon.logged("guest_is_fragile"), "it is told")
        assert daemon.stored_bytes("web")
    else:
        (entry,) = wait_for(lambda: daemon.logged("guest_refused"), "it is told")
        assert "allow_fragile: true" in entry["reason"]
        wait_for(lambda: not daemon.stored_bytes("web"), "everything is brought back")
    vmm.verify()


def close_copy_behind_a_filter(vmm: Vmm) -> None:
    vmm.ask("filter")  # it allows what we call, but nobody knows
    close_copy(vmm)


def test_the_service_manager_keeps_it(daemon: Daemon, boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd does it: the descriptor comes with a notification, and with LISTEN_FDS to the successor."""
    monkeypatch.setenv("FDSTORE", "8")
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    close_copy_behind_a_filter(vmm)
    kept, name = received(daemon.notify)
    try:
        wait_for(lambda: daemon.logged("userfaultfd_kept"), "it is told")
        daemon.kill()
        (state,) = (daemon.runtime_dir / "guests").iterdir()
        good = state.read_bytes()
        state.write_bytes(good[:24] + bytes([good[24] ^ 1]) + good[25:])
        start_with(daemon, kept, name)
        assert daemon.logged("state_refused")
        daemon.kill()
        assert not [text for text in daemon.told if "FDSTOREREMOVE" in text], "the pages of a refused guest hang on it"
        state.write_bytes(good)
        start_with(daemon, kept, name)
        assert daemon.logged("guest_adopted")
        vmm.verify()
        done = daemon.tierd("detach", f"web{OURS}")
        assert done.returncode == 0, done.stderr
        daemon.wait_told(f"FDSTOREREMOVE=1\nFDNAME={name}")
    finally:
        os.close(kept)
    vmm.verify()


@pytest.mark.parametrize("order", [signal.SIGTERM, signal.SIGUSR1])
def test_an_orderly_end_brings_it_back_where_nobody_would_hold_it(
    daemon: Daemon, boot: Boot, monkeypatch: pytest.MonkeyPatch, order: signal.Signals
) -> None:
    """systemd 252 drops what it keeps at a stop, so `keep` must not be taken at its word; over a restart it does keep it."""
    monkeypatch.setenv("FDSTORE", "8")
    daemon.write(on_stop="keep", on_restart="keep")
    vmm, other = boot("web"), boot("other")
    daemon.start()
    evicted(daemon, "web", vmm)
    evicted(daemon, "other", other)
    close_copy_behind_a_filter(vmm)
    kept, _ = received(daemon.notify)
    os.close(kept)
    wait_for(lambda: daemon.logged("userfaultfd_kept"), "it is told")
    daemon.signal(order)
    assert daemon.wait() == 0
    left = {path.name.partition("-")[0] for path in (daemon.runtime_dir / "guests").glob("*.state")}
    assert left == ({str(other.pid)} if order is signal.SIGTERM else {str(vmm.pid), str(other.pid)})
    if order is signal.SIGTERM:
        vmm.verify()


@pytest.mark.parametrize("how", ["full", "gone"])
def test_a_service_manager_that_does_not_take_it(
    daemon: Daemon, boot: Boot, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Everything is brought back while that can be done, and a restart does not take `keep` at its word."""
    monkeypatch.setenv("FDSTORE", "8")
    daemon.write(on_restart="keep")
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    if how == "gone":
        daemon.notify_path.unlink()
    else:
        wait_for(lambda: daemon.logged("notify_failed"), "nobody reads, so the socket is full")
    close_copy_behind_a_filter(vmm)
    (entry,) = wait_for(lambda: daemon.logged("guest_refused"), "it is told")
    assert "the service manager does not take it" in entry["reason"]
    wait_for(lambda: not daemon.stored_bytes("web"), "everything is brought back")
    assert not daemon.logged("guest_not_served")
    daemon.signal(signal.SIGUSR1)
    assert daemon.wait() == 0
    vmm.verify()


def test_a_service_manager_that_is_busy_for_a_moment(
    daemon: Daemon, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FDSTORE", "8")
    vmm = boot("web")
    daemon.start()
    evicted(daemon, "web", vmm)
    wait_for(lambda: daemon.logged("notify_failed"), "nobody reads, so the socket is full")
    close_copy_behind_a_filter(vmm)
    kept, name = received(daemon.notify)
    try:
        wait_for(lambda: daemon.logged("userfaultfd_kept"), "it is told")
        daemon.kill()
        start_with(daemon, kept, name)
        assert daemon.logged("guest_adopted")
        vmm.verify()
    finally:
        os.close(kept)


def received(notify: socket.socket) -> tuple[int, str]:
    (fd,), name = all_received(notify)
    return fd, name


def all_received(notify: socket.socket) -> tuple[list[int], str]:
    while True:
        text, fds, _, _ = socket.recv_fds(notify, 4096, 40)
        if b"FDSTORE=1" in text:
            return list(fds), text.decode().partition("FDNAME=")[2].split("\n")[0]


def start_with(daemon: Daemon, fd: int | Sequence[int], name: str) -> None:
    """Descriptors from 3 on, and LISTEN_PID of the process itself, which only a program in between can know."""
    fds = [fd] if isinstance(fd, int) else list(fd)
    script = (
        "import fcntl, os, sys; fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(',')]; "
        "[os.dup2(fd, 3 + i) for i, fd in enumerate(fds)]; names = ':'.join([sys.argv[2]] * len(fds)); "
        "os.environ |= {'LISTEN_FDS': str(len(fds)), 'LISTEN_FDNAMES': names, 'LISTEN_PID': str(os.getpid())}; "
        "os.closerange(100, 200); os.execv(sys.argv[3], sys.argv[3:])"
    )
    through = [sys.executable, "-c", script, ",".join(map(str, fds)), name]
    popen: Any = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda *args, **options: popen(*args, **options, pass_fds=fds))
        daemon.start(through)
