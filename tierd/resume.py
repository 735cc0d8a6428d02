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
import time
from dataclasses import dataclass, field
from pathlib import Path

from tierd.attach.preflight import swap_can_receive
from tierd.attach.procfs import boot_id
from tierd.engine import Engine, EngineUnavailable, choose
from tierd.serve import (
    SUFFIX,
    AlreadyRunning,
    Served,
    Stale,
    StateError,
    adopt,
    lock_runtime_dir,
    prepare_runtime_dir,
)
from tierd.store import StoreError
from tierd.systemd import listen_fds

LOCK_S_MAX = 0.5  # for the threads of a predecessor that was just killed; a thread that hangs in its store takes longer


@dataclass
class Resumed:
    """What the daemon takes over."""

    runtime_dir: Path
    lock: int | None = None  # of the runtime directory
    served: dict[str, Served] = field(default_factory=dict)  # by key
    kept_fds: dict[str, int] = field(default_factory=dict)  # by key: userfaultfds that the service manager kept

    def close(self) -> None:
        """Of the guests: those that nobody took out of `served`. What is stored of them stays stored."""
        while self.served:
            self.served.popitem()[1].close()


def resume(runtime_dir: Path) -> Resumed:
    """Adopt what can be adopted at once, on `runtime_dir` if that is a usable one and no other tierd works on it. Blocks:
    some milliseconds a guest, and LOCK_S_MAX at most for all that is still held by a dying predecessor."""
    fill_standard_descriptors()
    resumed = Resumed(runtime_dir, kept_fds=dict(listen_fds()))
    try:
        guests_dir = prepare_runtime_dir(runtime_dir)
        resumed.lock = lock_runtime_dir(runtime_dir)
        paths = sorted(guests_dir.glob(f"*{SUFFIX}"))
        engine = choose() if paths else None
    except (StateError, AlreadyRunning, EngineUnavailable, OSError):
        return resumed
    until = time.monotonic()
    for wait_s in (0.0, LOCK_S_MAX):  # nobody waits for the lock of another guest
        until += wait_s
        for path in paths:
            if engine is not None and path.name.removesuffix(SUFFIX) not in resumed.served:
                _try(path, engine, until, resumed)
    return resumed


def _try(path: Path, engine: Engine, until: float, resumed: Resumed) -> None:
    key = path.name.removesuffix(SUFFIX)
    with contextlib.suppress(Stale, StateError, StoreError, OSError, ValueError):
        resumed.served[key] = adopt(
            path,
            engine=engine,
            swap_can_receive=swap_can_receive(int(key.partition("-")[0])),
            boot_id=boot_id(),
            kept_uffd=resumed.kept_fds.get(key),
            lock_s_max=max(until - time.monotonic(), 0.0),
        )


def fill_standard_descriptors() -> None:
    """One that was closed would be given to the next file that is opened, a guest's memory perhaps; and whoever prints to
    it (the C library when it aborts) would print there."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    # None where Python found them closed
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
