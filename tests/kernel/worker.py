# SPDX-License-Identifier: Apache-2.0
"""A tierd reduced to one guest and no pauses, to be killed: attach or adopt, then cycle as fast as it can, or leave again.

python -m tests.kernel.worker PID TMPFS_DIR DISK_DIR SEED ORDER [CGROUP_PROCS]

ORDER: `stay`, `leave` (bring everything back and go, after a while), `spoilt` (stay; what cannot be read is lost at once, so the
store misreads nothing by chance) or `honest` (the same, with a store that does what it is told).
Says on stdout how far it is: attaching or adopting, ready, leaving, left; and its counters now and then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.kernel.forced import ForcedEngine, Options, stores_of
from tierd import cycle
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import preflight, swap_can_receive
from tierd.attach.procfs import boot_id, cmdline_of, read_spec
from tierd.engine import choose, fitting
from tierd.native import KernelError, Zap
from tierd.serve import Served, Stale, Tuning, adopt, attach, prepare_runtime_dir

ANY: Any = SimpleNamespace(
    allow_nested=True, allow_gigantic=False
)  # a policy, without what it takes to import the configuration
READ_DEADLINE_S = 8.0  # fifteen tries: a page that is only misread now and then is never given up


def say(*words: object) -> None:
    print(*words, flush=True)


def serve(pid: int, tmpfs_dir: Path, disk_dir: Path, options: Options) -> Served:
    anonymous = "kind=anonymous" in cmdline_of(pid)
    engine, guests_dir = ForcedEngine(options, anonymous), prepare_runtime_dir(tmpfs_dir)
    swap = swap_can_receive(pid)
    for path in guests_dir.glob("*.state"):
        say("adopting")
        try:
            return adopt(path, engine=engine, swap_can_receive=swap, capacity_bytes=1 << 50, boot_id=boot_id())
        except Stale:
            path.unlink()
    spec = read_spec(pid, "test")
    preflight(spec, ANY, HolderScan(), fitting(choose(), anonymous))
    say("attaching")
    return attach(
        spec,
        engine=engine,
        stores=stores_of(options, tmpfs_dir, disk_dir),
        guests_dir=guests_dir,
        tuning=Tuning(0.1, 16),
        swap_can_receive=swap,
        capacity_bytes=1 << 50,
    )


def misbehaviour(chance: random.Random, misread: bool) -> dict[str, int]:
    """Of the store, in this life: nothing that destroys what it holds."""
    if chance.random() < 0.3:
        return {"seed": 0}
    kinds = ["read_short", "read_slow", "write_error", "write_short", "write_slow"]
    if misread:
        kinds += ["read_error", "read_flip"]
    faults = {kind: chance.randrange(150) for kind in kinds if chance.random() < 0.5}
    hangs = {"read_hang": chance.randrange(10), "write_hang": chance.randrange(10), "hang_us": 200_000}
    return {"seed": chance.randrange(1, 1 << 30), "slow_us": 2000, **hangs, **faults}


def reporter(served: Served) -> Callable[[], None]:
    """Says what was done so far, every 30 ms if it is called so often."""
    reported = time.monotonic()

    def report() -> None:
        nonlocal reported
        if time.monotonic() - reported > 0.03:
            reported, c = time.monotonic(), served.native.counters()
            say("counters", c["latency_count"], c["pages_evicted"], c["pages_lost"], c["pages_demoted"])

    return report


def stage_all(served: Served, options: Options) -> None:
    """However many readers that costs."""
    cycle.discard_fetched(served.native, options.phases, lambda: None)  # what takes space in the store cannot be staged
    cycle.unstage(served.native, lambda: None)
    cycle.stage(
        served.native,
        cycle.Staging.whole(served.native),
        interval_s=0.0,
        min_idle_s=0.0,
        stall_budget=1.0,
        phases=options.phases,
        check=lambda: None,
    )


def sink(served: Served, options: Options) -> None:
    """Some of what each tier has goes to those below, whatever its age."""
    numbers = [tier.number for tier in served.tiers.values()]
    for i, above in enumerate(numbers[:-1]):
        most = served.native.counters()["tier_pages"][above] * served.page_bytes // 3
        cycle.demote(
            served.native,
            above,
            numbers[i + 1 :],
            min_idle_s=0.0,
            max_bytes=most,
            phases=options.phases,
            check=lambda: None,
        )
    cycle.compact(served.native, lambda: None)


def one_cycle(served: Served, options: Options, report: Callable[[], None]) -> None:
    try:
        cycle.scan_and_deactivate(served.native, options.phases, lambda: None)
    except KernelError as error:
        if error.errno != errno.ETIMEDOUT:
            raise
        return  # the thread that is to run a call inside the VMM waits for a page, in the kernel: the next cycle may reach it
    with contextlib.suppress(KernelError):  # a write that failed: the pages stay
        if served.native.anonymous:
            stage_all(served, options)
        numbers = [tier.number for tier in served.tiers.values()]
        cycle.evict(
            served.native,
            min_idle_s=0.0,
            max_bytes=1 << 40,
            tiers=numbers,
            keep=numbers,
            hold_ms_max=20,
            phases=options.phases,
            check=report,
        )
    with contextlib.suppress(KernelError):
        sink(served, options)
    health = served.native.health(0.1)
    if health.fault_threads < 4 and (health.overdue_ns > 1e8 or health.hung_threads == health.fault_threads):
        served.native.start()
    cycle.discard_fetched(served.native, options.phases, lambda: None)


def leave(served: Served) -> None:
    """As tierd detach: everything back, then out of the VMM."""
    say("leaving")
    while served.native.counters()["state_pages"][4]:
        with contextlib.suppress(KernelError):  # a read that failed: tried again
            served.native.restore(0, 1 << 40)
    served.leave()
    say("left")


def main() -> None:
    pid, tmpfs_dir, disk_dir = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    chance, order = random.Random(int(sys.argv[4])), sys.argv[5]
    if len(sys.argv) > 6:
        Path(sys.argv[6]).write_text(str(os.getpid()))
    options = Options(
        use_pagemap=chance.random() < 0.3,
        zap=Zap.INJECT if chance.random() < 0.3 else None,
        readahead_pages=chance.choice([1, 4, 16]),
        tiers=("memory", "file", "slow") if "compressible" in cmdline_of(pid) else ("file",),
        encrypt=chance.random() < 0.5,
    )
    stay_s = chance.random() * 0.3 if order == "leave" else float("inf")
    with serve(pid, tmpfs_dir, disk_dir, options) as served:
        served.native.set_reads(0.0 if order in ("honest", "spoilt") else READ_DEADLINE_S, hold=False)
        if order != "honest":
            served.native.set_store_faults(**misbehaviour(chance, misread=order != "spoilt"))
        say("ready", served.adoption.stored_pages if served.adoption else 0)
        began, report = time.monotonic(), reporter(served)
        while time.monotonic() - began < stay_s:
            one_cycle(served, options, report)
            report()
        leave(served)


if __name__ == "__main__":
    main()
