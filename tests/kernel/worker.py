# SPDX-License-Identifier: Apache-2.0
"""A tierd reduced to one guest and no pauses, to be killed: attach or adopt, then cycle as fast as it can.

python -m tests.kernel.worker PID TMPFS_DIR DISK_DIR SEED [calm]
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from pathlib import Path

from tests.kernel.vmm import SAFE, ForcedEngine, Options
from tierd import cycle
from tierd.attach.preflight import HolderScan, preflight, swap_can_receive
from tierd.attach.procfs import boot_id, read_spec
from tierd.native import KernelError, Zap
from tierd.serve import PAGE_BYTES, Served, Tuning, adopt, attach, prepare_runtime_dir
from tierd.store.file import FileStore


def serve(pid: int, tmpfs_dir: Path, disk_dir: Path, options: Options) -> Served:
    engine, store, tuning = ForcedEngine(options), FileStore(disk_dir / "store", None, options.direct), Tuning(0.1, 16)
    guests_dir, swap = prepare_runtime_dir(tmpfs_dir), swap_can_receive(pid)
    for path in guests_dir.glob("*.state"):
        return adopt(path, engine=engine, swap_can_receive=swap, capacity_pages=1 << 40, boot_id=boot_id())
    spec = read_spec(pid, "test")
    preflight(spec, SAFE, HolderScan())
    return attach(
        spec,
        engine=engine,
        store=store,
        guests_dir=guests_dir,
        tuning=tuning,
        swap_can_receive=swap,
        capacity_pages=1 << 40,
    )


def misbehaviour(chance: random.Random) -> dict[str, int]:
    """Of the store, in this life: nothing that destroys what it holds."""
    if chance.random() < 0.3:
        return {"seed": 0}
    kinds = ("read_error", "read_short", "read_flip", "read_slow", "write_error", "write_short", "write_slow")
    faults = {kind: chance.randrange(150) for kind in kinds if chance.random() < 0.5}
    hangs = {"read_hang": chance.randrange(10), "write_hang": chance.randrange(10), "hang_us": 200_000}
    return {"seed": chance.randrange(1, 1 << 30), "slow_us": 2000, **hangs, **faults}


def main() -> None:
    pid, tmpfs_dir, disk_dir = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    chance = random.Random(int(sys.argv[4]))
    options = Options(
        use_pagemap=chance.random() < 0.3,
        zap=Zap.INJECT if chance.random() < 0.3 else None,
        readahead_pages=chance.choice([1, 4, 16]),
    )
    with serve(pid, tmpfs_dir, disk_dir, options) as served:
        if sys.argv[5:] != ["calm"]:
            served.native.set_store_faults(**misbehaviour(chance))
        print("ready", served.adoption.stored_pages if served.adoption else 0, flush=True)
        reported = time.monotonic()
        while True:
            cycle.scan_and_deactivate(served.native, options.phases, lambda: None)
            with contextlib.suppress(KernelError):  # a write that failed: the pages stay
                cycle.evict(
                    served.native,
                    min_idle_s=0.0,
                    max_bytes=1 << 40,
                    page_bytes=PAGE_BYTES,
                    phases=options.phases,
                    check=lambda: None,
                )
            health = served.native.health(0.1)
            if health.fault_threads < 4 and (health.overdue_ns > 1e8 or health.hung_threads == health.fault_threads):
                served.native.start()
            cycle.discard_fetched(served.native, options.phases, lambda: None)
            if time.monotonic() - reported > 0.1:
                reported, c = time.monotonic(), served.native.counters()
                faults = c["faults_fetch"] + c["faults_zero"] + c["faults_cancel"] + c["faults_resolve"]
                print("counters", faults, c["pages_evicted"], c["pages_lost"], flush=True)


if __name__ == "__main__":
    main()
