# SPDX-License-Identifier: Apache-2.0
"""The first thing that a new tierd does: guests whose pages a predecessor stored are served again.

It needs nothing but the state files (what the configuration said is in them), so it runs before the configuration is read
and before anything is imported that only the rest of the daemon needs: trio, pydantic, the API. It decides nothing and tells
nobody: whatever does not go through here at once is left to the daemon, which tries again and says why.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tierd.attach import Handed
from tierd.attach.preflight import swap_can_receive
from tierd.attach.procfs import UFFD_LINK, boot_id, file_of, on_shared_memory
from tierd.engine import Engine, EngineUnavailable, choose
from tierd.serve import (
    SUFFIX,
    AlreadyRunning,
    Served,
    StateError,
    adopt,
    lock_runtime_dir,
    prepare_runtime_dir,
    read_state,
)
from tierd.systemd import listen_fds

LOCK_S_MAX = 1.0  # for the threads of a predecessor that was just killed; a thread that hangs in its store takes longer
RESUME_S_MAX = 2.0  # then the rest of the daemon starts, whatever still hangs


@dataclass
class Resumed:
    """What the daemon takes over."""

    runtime_dir: Path
    lock: int | None = None  # of the runtime directory
    served: dict[str, Future[Served]] = field(default_factory=dict)  # by key; some may not be done yet
    kept_uffds: dict[str, int] = field(default_factory=dict)  # by key: that the service manager kept
    kept_handed: dict[str, Handed] = field(default_factory=dict)  # by key: what VMMs brought, and it kept

    def close(self) -> None:
        """Of the guests: those that nobody took out of `served`. What is stored of them stays stored."""
        while self.served:
            _, future = self.served.popitem()
            if future.done() and not future.exception():
                future.result().close()


def resume(runtime_dir: Path) -> Resumed:
    """Adopt what can be adopted, on `runtime_dir` if that is a usable one and no other tierd works on it. Blocks: some
    milliseconds a guest, RESUME_S_MAX at most."""
    fill_standard_descriptors()
    resumed = Resumed(runtime_dir)
    _sort_out(listen_fds(), resumed)
    try:
        guests_dir = prepare_runtime_dir(runtime_dir)
        resumed.lock = lock_runtime_dir(runtime_dir)
        paths = sorted(guests_dir.glob(f"*{SUFFIX}"))
        engine = choose() if paths else None
    except (StateError, AlreadyRunning, EngineUnavailable, OSError):
        return resumed
    if engine is not None:
        for path in paths:
            key = path.name.removesuffix(SUFFIX)
            kept = resumed.kept_uffds.get(key), resumed.kept_handed.get(key)
            resumed.served[key] = _in_thread(partial(_adopt, path, engine, *kept))
        wait(resumed.served.values(), RESUME_S_MAX)
    return resumed


def _sort_out(named: Sequence[tuple[str, int]], resumed: Resumed) -> None:
    """Under a guest's key there is a userfaultfd and, of a VMM that brought its descriptors, all the others, in no order."""
    for key in {name for name, _ in named}:
        memfds: dict[tuple[int, int], int] = {}
        uffd = pagemap = -1
        for fd in (fd for name, fd in named if name == key):
            if os.readlink(f"/proc/self/fd/{fd}") == UFFD_LINK:
                uffd = fd
            elif on_shared_memory(fd):  # whatever its name is
                memfds[file_of(fd)] = fd
            else:
                pagemap = fd
        if uffd >= 0:
            resumed.kept_uffds[key] = uffd
        pid = key.partition("-")[0]
        if min(uffd, pagemap) >= 0 and memfds and pid.isdecimal():
            with contextlib.suppress(OSError):  # its process is gone: nobody needs them
                resumed.kept_handed[key] = Handed(os.pidfd_open(int(pid)), os.dup(uffd), None, pagemap, memfds)
                continue
        for fd in (pagemap, *memfds.values()):
            if fd >= 0:
                os.close(fd)


def _adopt(path: Path, engine: Engine, kept_uffd: int | None, handed: Handed | None) -> Served:
    left = read_state(path, boot_id())
    return adopt(
        path,
        engine=engine,
        swap_can_receive=swap_can_receive(left.spec.pid),
        boot_id=left.spec.boot_id,
        kept_uffd=kept_uffd,
        handed=handed,
        lock_s_max=LOCK_S_MAX,
    )


def _in_thread(function: Callable[[], Served]) -> Future[Served]:
    """A thread for each guest: one whose store or predecessor hangs holds up nobody, the end of the process neither."""
    future: Future[Served] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def fill_standard_descriptors() -> None:
    """One that was closed would be given to the next file that is opened, a guest's memory perhaps; and whoever prints to
    it (the C library when it aborts) would print there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # None where Python found them closed
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
