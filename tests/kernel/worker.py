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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.kernel.forced import ForcedEngine, Options, stores_of
from tierd import cycle
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import preflight, swap_can_receive
from tierd.attach.procfs import boot_id, cmdline_of, read_spec
from tierd.engine import choose, fitting
from tierd.native import KernelError, TierKind, Zap
from tierd.serve import Served, Stale, Tuning, adopt, attach, prepare_runtime_dir

ANY: Any = SimpleNamespace(
    allow_nested=True, allow_gigantic=False
)  # a policy, without what it takes to import the configuration
ASKED_PAGES_MAX = 256  # that leave for a store that is asked, or sink there, at a time: a life is short
READ_DEADLINE_S = 8.0  # fifteen tries: a page that is only misread now and then is never given up


def say(*words: object) -> None:
    print(*words, flush=True)


def serve(pid: int, tmpfs_dir: Path, disk_dir: Path, options: Options) -> Served:
    """As the daemon: tried again where the VMM got no CPU in time for a call inside of it."""
    while True:
        try:
            return serve_once(pid, tmpfs_dir, disk_dir, options)
        except OSError as error:
            if error.errno != errno.ETIMEDOUT:
                raise


def serve_once(pid: int, tmpfs_dir: Path, disk_dir: Path, options: Options) -> Served:
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
    stores = stores_of(options, tmpfs_dir, disk_dir)
    say("attaching")
    return attach(
        spec,
        engine=engine,
        stores=stores,
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
            asked = [served.native.tier_counters(number) for number in served.native.asked_tiers]
            into, out = (sum(tier[name] for tier in asked) for name in ("written_pages", "read_pages"))
            say("counters", c["latency_count"], c["pages_evicted"], c["pages_lost"], c["pages_demoted"], into, out)

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


def tiers_below(served: Served, above: int, chance: random.Random) -> tuple[Sequence[int], int]:
    """Where pages may go to now: to all, or not to the file, which would take whatever comes; and how many of them. (A tier that
    is asked is not ready before it is open, and where it is to be sealed and has pages that are not.)"""
    ready = [tier for tier in served.tiers.values() if tier.number > above and tier.space.ready]
    files = [tier for tier in ready if tier.space.kind is TierKind.FILE]
    asked = [tier for tier in ready if tier.space.kind is TierKind.ASKED]
    if files and (not asked or chance.random() < 0.7):
        return [tier.number for tier in ready], served.native.pages
    return [tier.number for tier in ready if tier not in files], ASKED_PAGES_MAX


def sink(served: Served, options: Options, asked: cycle.Asked | None, chance: random.Random) -> None:
    """Some of what each tier has goes to those below, whatever its age."""
    for above in served.tiers.values():
        below, most = tiers_below(served, above.number, chance)
        if below:
            cycle.demote(
                served.native,
                above.number,
                below,
                min_idle_s=0.0,
                max_bytes=min(served.native.counters()["tier_pages"][above.number] // 3, most) * served.page_bytes,
                phases=options.phases,
                check=lambda: None,
                asked=asked,
            )
    cycle.compact(served.native, lambda: None)


def one_cycle(
    served: Served, options: Options, asked: cycle.Asked | None, chance: random.Random, report: Callable[[], None]
) -> None:
    try:
        cycle.scan_and_deactivate(served.native, options.phases, lambda: None)
    except KernelError as error:
        if error.errno != errno.ETIMEDOUT:
            raise
        return  # the thread that is to run a call inside the VMM waits for a page, in the kernel: the next cycle may reach it
    with contextlib.suppress(KernelError):  # a write that failed: the pages stay
        if served.native.anonymous:
            stage_all(served, options)
        tiers, most = tiers_below(served, 0, chance)
        cycle.evict(
            served.native,
            min_idle_s=0.0,
            max_bytes=most * served.page_bytes,
            tiers=tiers,
            keep=[tier.number for tier in served.tiers.values() if tier.space.ready],
            hold_ms_max=20,
            phases=options.phases,
            check=report,
            asked=asked,
        )
    with contextlib.suppress(KernelError):
        sink(served, options, asked, chance)
    health = served.native.health(0.1)
    if health.fault_threads < 4 and (health.overdue_ns > 1e8 or health.hung_threads == health.fault_threads):
        served.native.start()
    cycle.discard_fetched(served.native, options.phases, lambda: None)
    for number in served.native.asked_tiers:
        assert asked is not None
        with contextlib.suppress(KernelError):  # it is told again
            cycle.discard_asked(served.native, number, asked, lambda: None)


@contextlib.contextmanager
def left_at_the_end(served: Served) -> Iterator[None]:
    """As tierd detach: everything back, then out of the VMM."""
    yield
    while served.native.counters()["state_pages"][4]:
        with contextlib.suppress(KernelError):  # a read that failed: tried again
            served.native.restore(0, 1 << 40)
    served.leave()


def to_be_left(
    served: Served, options: Options, tmpfs_dir: Path, disk_dir: Path, chance: random.Random, order: str
) -> AbstractContextManager[cycle.Asked | None]:
    """At its end. Gives what tiers are asked with, if any is."""
    if not served.native.asked_tiers:
        return left_at_the_end(served)
    from tests.kernel import asked

    store = asked.asked_store(options, tmpfs_dir, disk_dir)
    if order != "honest":
        moods = asked.misbehaviour(chance, misread=order != "spoilt")
        store.pages = asked.MoodyStore(store.pages, asked.Moods(random.Random(chance.random()), moods))
    return asked.parked(served, store)


def main() -> None:
    pid, tmpfs_dir, disk_dir = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    chance, order = random.Random(int(sys.argv[4])), sys.argv[5]
    if len(sys.argv) > 6:
        Path(sys.argv[6]).write_text(str(os.getpid()))
    ladder = "compressible" in cmdline_of(pid)
    # a guest's lives differ seldom: pages that are there in clear are only read in one that is to seal them
    encrypts = 0.5 if not ladder else 0.2 if pid % 2 else 0.8
    options = Options(
        use_pagemap=chance.random() < 0.3,
        zap=Zap.INJECT if chance.random() < 0.3 else None,
        readahead_pages=chance.choice([1, 4, 16]),
        tiers=("memory", "file", "asked") if ladder else ("file",),
        encrypt=chance.random() < encrypts,
    )
    stay_s = chance.random() * 0.3 if order == "leave" else float("inf")
    with serve(pid, tmpfs_dir, disk_dir, options) as served:
        served.native.set_reads(0.0 if order in ("honest", "spoilt") else READ_DEADLINE_S, hold=False)
        if order != "honest":
            served.native.set_store_faults(**misbehaviour(chance, misread=order != "spoilt"))
        with to_be_left(served, options, tmpfs_dir, disk_dir, chance, order) as asked:
            say("ready", served.adoption.stored_pages if served.adoption else 0)
            began, report = time.monotonic(), reporter(served)
            while time.monotonic() - began < stay_s:
                one_cycle(served, options, asked, chance, report)
                report()
            say("leaving")
        say("left")


if __name__ == "__main__":
    main()
