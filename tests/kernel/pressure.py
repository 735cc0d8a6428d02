# SPDX-License-Identifier: Apache-2.0
"""Memory pressure on the torture run's workers: a memory cgroup of their own, and a process in it that fills it again and again.

The page cache of the store has to go, and workers that start get what the kernel's OOM killer takes from that process. Never on
the VMMs: one at its limit is killed by the kernel (rule 12). And never on the machine: the cgroup has a limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
STEP = 4 * MIB
PR_SET_PDEATHSIG = 1
HEADROOM = 16 * MIB  # what is left to the workers at the worst moment


def _make_cgroup(name: str, limit: int) -> Path | None:
    """Version 1 or 2, whichever has the memory controller here."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        group, file = v1 / name, "memory.limit_in_bytes"
    elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        group, file = v2 / name, "memory.max"
    else:
        return None
    group.mkdir()
    (group / file).write_text(str(limit))
    return group


@contextlib.contextmanager
def pressure(limit: int) -> Iterator[Path | None]:
    """The cgroup.procs that workers join, while memory in there is short; None where there is no memory cgroup, or no limit."""
    group = _make_cgroup(f"tierd-torture-{os.getpid()}-{time.monotonic_ns()}", limit) if limit else None
    if group is None:
        yield None
        return
    hog = None
    try:
        hog = subprocess.Popen([sys.executable, "-m", "tests.kernel.pressure", str(group), str(limit)])
        yield group / "cgroup.procs"
        assert hog.poll() is None, f"the process that makes the pressure ended: {hog.returncode}"
    finally:
        if hog is not None:
            hog.kill()
            hog.wait()
        _remove(group)


def _remove(group: Path) -> None:
    """Those who were in it are dead; the kernel may not be done with them."""
    until = time.monotonic() + 10
    while True:
        try:
            return group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fill(group: Path, limit: int) -> None:
    """Takes memory up to the limit and gives it back, for ever."""
    _die_with_parent()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    Path("/proc/self/oom_score_adj").write_text("1000")  # if somebody has to go
    in_use = next(group / name for name in ("memory.usage_in_bytes", "memory.current") if (group / name).exists())
    while True:
        taken = []
        for _ in range(limit // STEP):
            rows = [row.split() for row in (group / "memory.stat").read_text().splitlines()]
            cached = next(int(row[1]) for row in rows if row[0] in ("cache", "file"))  # gives way
            if int(in_use.read_text()) - cached > limit - HEADROOM - STEP:
                break
            area = mmap.mmap(-1, STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            area.write(b"\1" * STEP)
            taken.append(area)
            time.sleep(0.001)
        time.sleep(0.2)
        for area in taken:
            area.close()
        time.sleep(0.2)


def main() -> None:
    """Sees to it that one process fills the cgroup, whoever kills it."""
    _die_with_parent()
    while True:
        child = os.fork()
        if not child:
            _fill(Path(sys.argv[1]), int(sys.argv[2]))
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
