# SPDX-License-Identifier: Apache-2.0
"""tierd against the limit: a bare C program that makes only the system calls, in the same run, as a ratio.

python -m tests.bench.bench [--rows a,b] [--quick] [--json]       (`make bench`; writes build/bench.json)

Machines are noisy: pairs of (tierd, bare) are interleaved, figures are medians of the pairs. Exit status 0 whatever the
figures are; a bound that is missed is told, in the table and as "ok": false.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import click
from rich.console import Console
from rich.table import Table

from tests.bench import asked
from tests.kernel.vmm import MIB, PAGE, wait_for
from tierd import cycle
from tierd.attach.procfs import boot_id, read_spec
from tierd.engine import choose
from tierd.native import Codec, KernelError, Span
from tierd.serve import Served, Tuning, adopt, attach, prepare_runtime_dir
from tierd.show import quantile_us
from tierd.store import Store
from tierd.store.file import FileStore
from tierd.store.memory import MemoryStore

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
LOAD_CPU, OTHER_CPU = 0, 1
CHANGED = 20  # of so many pages one is written to
Style = Literal["spin", "sleep", "follow"]
# how the fault thread of tierd waits, and where the bare handler is put: (spin_us_max, follow, CPU of the bare handler)
STYLES: dict[Style, tuple[int, bool, int]] = {
    "spin": (1_000_000, False, OTHER_CPU),
    "sleep": (0, False, OTHER_CPU),
    "follow": (0, True, LOAD_CPU),
}


@dataclass
class Row:
    row: str
    unit: str
    measured: float
    limit: float
    ratio: float
    bound: str
    ok: bool


class Load:
    """A running load.c."""

    def __init__(self, binary: Path, size: int, cpu: int = LOAD_CPU, anonymous: bool = False) -> None:
        self.size = size
        kind = ["anonymous", "-m", f"{size >> 20}M"] if anonymous else []  # as QEMU would say it
        self.process = subprocess.Popen(
            [binary, str(size), str(cpu), *kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self._answer()[0]

    def _answer(self) -> list[int]:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if words[:1] != ["ok"]:
            raise RuntimeError(f"the load said {' '.join(words)!r}")
        return [int(word) for word in words[1:]]

    def ask(self, *words: object) -> list[int]:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Bench:
    """Programs, directories, and what was measured so far."""

    def __init__(
        self, directory: Path, shm: Path, disk: Path, quick: bool, console: Console, tell: Callable[[str], None]
    ) -> None:
        self.shm, self.disk, self.quick, self.console, self.tell = shm, disk, quick, console, tell
        self.rows: list[Row] = []
        self.pairs = 3 if quick else 7
        self.fault_mib = 32 if quick else 128
        native = ROOT / "tierd" / "native"
        sources = [
            *(str(native / name) for name in ("sys.c", "calls.c", "codec.c", "crypto.c", "records.c")),
            *map(str, native.glob("inject*.c")),
        ]
        flags = [
            "gcc",
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{native}",
            f"-I{ROOT / 'tests' / 'native'}",
        ]
        self.load_binary, self.bare_binary = directory / "load", directory / "bare"
        subprocess.run([*flags, str(HERE / "load.c"), "-o", str(self.load_binary), "-pthread"], check=True)
        only_what_is_used = ["-ffunction-sections", "-Wl,--gc-sections"]
        libraries = ["-ldl", "-pthread"]
        subprocess.run(
            [*flags, *only_what_is_used, str(HERE / "bare.c"), *sources, "-o", str(self.bare_binary), *libraries],
            check=True,
        )
        self._number = 0

    def bare(self, *words: object) -> list[int]:
        done = subprocess.run([self.bare_binary, *map(str, words)], capture_output=True, text=True)
        if done.returncode or not done.stdout.startswith("ok"):
            raise RuntimeError(f"the bare program said {done.stdout + done.stderr!r}")
        return [int(word) for word in done.stdout.split()[1:]]

    def load(self, size: int, cpu: int = LOAD_CPU, anonymous: bool = False) -> Load:
        return Load(self.load_binary, size, cpu, anonymous)

    @contextlib.contextmanager
    def served(
        self,
        load: Load,
        style: Style = "sleep",
        readahead: int = 1,
        direct: Literal["on", "off"] = "off",
        store: Store | None = None,
    ) -> Iterator[Served]:
        """The load's guest, attached as the daemon does it, with the fault thread waiting in `style`. `store`: its only tier;
        None: `file`."""
        self._number += 1
        spin_us, follow, _ = STYLES[style]
        served = attach(
            read_spec(load.process.pid, "bench"),
            engine=choose(),
            stores=[store or FileStore(self.disk / "store", None, direct)],
            guests_dir=prepare_runtime_dir(self.shm),
            tuning=Tuning(1.0, readahead, fault_spin_us_max=spin_us, follow=follow),
            swap_can_receive=False,
            capacity_bytes=1 << 50,
        )
        with served:
            yield served

    def pool(self) -> MemoryStore:
        return MemoryStore(self.shm / "pool", None, Codec.LZ4)

    def add(self, name: str, unit: str, measured: float, limit: float, bound: float, at_least: bool = False) -> None:
        ratio = measured / limit
        sign = ">=" if at_least else "<="
        ok = ratio >= bound if at_least else ratio <= bound
        self.rows.append(Row(name, unit, round(measured, 3), round(limit, 3), round(ratio, 3), f"{sign} {bound:g}", ok))
        self.console.print(f"{name}: {measured:.4g} {unit}, limit {limit:.4g}: {ratio:.3g}, {sign} {bound:g} is asked")


def evict(served: Served, keep: Sequence[int] = ()) -> int:
    """One pass over what was not touched since the last scan. Bytes. `keep`: tiers whose copies of clean pages are relied on."""
    return cycle.evict(
        served.native,
        min_idle_s=0,
        max_bytes=1 << 50,
        tiers=[1],
        keep=keep,
        hold_ms_max=20,
        phases=cycle.Phases(),
        check=lambda: None,
    )


def evict_all(served: Served, keep: Sequence[int] = ()) -> None:
    phases = cycle.Phases()

    def done() -> bool:
        for cpu in (OTHER_CPU, LOAD_CPU):  # a new page waits in a batch of the CPU that made it (tests/kernel/vmm.py)
            with on_cpu(cpu):
                cycle.scan_and_deactivate(served.native, phases, lambda: None)
        with contextlib.suppress(KernelError):
            evict(served, keep)
        c = served.native.counters()
        return bool(c["state_pages"][0] <= c["untouched_pages"])

    wait_for(done, "everything evicted", 120)


def warm(served: Served) -> None:
    """The store's file into the page cache, which eviction keeps it out of: what is measured is not the disk."""
    with open(served.tiers["file"].space.path, "rb", buffering=0) as file:
        while file.read(4 * MIB):
            pass


@contextlib.contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """This thread, and those that it starts, on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def median(values: list[float]) -> float:
    return statistics.median(values)


def tierd_faults(bench: Bench, load: Load, served: Served, count: int) -> tuple[float, float]:
    evict_all(served)
    warm(served)
    p50, p99 = load.ask("random", count)
    return p50 / 1000, p99 / 1000


def bare_faults(bench: Bench, style: Style, pages: int, count: int) -> tuple[float, float]:
    waiting = "spin" if style == "spin" else "sleep"
    p50, p99 = bench.bare("fault", waiting, pages, count, LOAD_CPU, STYLES[style][2], bench.disk / "bare")
    return p50 / 1000, p99 / 1000


def fault_pairs(bench: Bench, style: Style) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    pages = bench.fault_mib * MIB // PAGE
    count, ours, bare = pages // 4, [], []
    with bench.load(bench.fault_mib * MIB) as load, on_cpu(OTHER_CPU):
        load.ask("fill")
        with bench.served(load, style) as served:
            for i in range(bench.pairs):
                bench.tell(f"a: {style}, pair {i + 1} of {bench.pairs}")
                ours.append(tierd_faults(bench, load, served, count))
                bare.append(bare_faults(bench, style, pages, count))
    return ours, bare


def row_a(bench: Bench) -> None:
    for style in STYLES:
        ours, bare = fault_pairs(bench, style)
        for i, name in ((0, "p50"), (1, "p99")):
            bench.add(f"a fault {style} {name}", "us", median([x[i] for x in ours]), median([x[i] for x in bare]), 1.15)
    disturbed(bench, "an eviction runs", eviction_beside)
    disturbed(bench, "Python is busy", python_beside)


def disturbed(bench: Bench, what: str, beside: Callable[[Bench], contextlib.AbstractContextManager[None]]) -> None:
    """p99 while something else goes on in the daemon, against its quiet value."""
    quiet, busy = [], []
    pages = bench.fault_mib * MIB // PAGE
    with bench.load(bench.fault_mib * MIB) as load, on_cpu(OTHER_CPU):
        load.ask("fill")
        with bench.served(load, "follow") as served:
            for i in range(bench.pairs):
                bench.tell(f"a: while {what}, pair {i + 1} of {bench.pairs}")
                quiet.append(tierd_faults(bench, load, served, pages // 4)[1])
                evict_all(served)
                warm(served)
                with beside(bench):
                    busy.append(load.ask("random", pages // 4)[1] / 1000)
    bench.add(f"a fault p99 while {what}", "us", median(busy), median(quiet), 2.0)


@contextlib.contextmanager
def eviction_beside(bench: Bench) -> Iterator[None]:
    """Another guest of the same daemon is evicted again and again."""
    stop = threading.Event()
    with bench.load(64 * MIB, OTHER_CPU) as other:
        other.ask("fill")
        with bench.served(other, direct="on") as served:

            def work() -> None:
                while not stop.is_set():
                    evict_all(served)
                    other.ask("walk")

            thread = threading.Thread(target=work)
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()


@contextlib.contextmanager
def python_beside(bench: Bench) -> Iterator[None]:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def row_b(bench: Bench) -> None:
    pages, ours, bare = bench.fault_mib * MIB // PAGE, [], []
    with bench.load(bench.fault_mib * MIB) as load, on_cpu(OTHER_CPU):
        load.ask("fill")
        with bench.served(load, "follow", readahead=16) as served:
            for i in range(bench.pairs):
                bench.tell(f"b: pair {i + 1} of {bench.pairs}")
                evict_all(served)
                warm(served)
                ours.append(load.ask("walk", pages)[0] / pages / 1000)
                bare.append(bare_faults(bench, "follow", pages, pages // 4)[0])
    bench.add("b sequential fault, per page", "us", median(ours), median(bare), 0.35)


def row_c(bench: Bench) -> None:
    size, ours, bare = (256 if bench.quick else 1024) * MIB, [], []
    with bench.load(size) as load:
        load.ask("fill")
        with bench.served(load) as served:
            phases = cycle.Phases()
            for i in range(min(bench.pairs, 5)):
                bench.tell(f"c: pair {i + 1}")
                load.ask("touch")
                began = time.monotonic_ns()
                cycle.scan_and_deactivate(served.native, phases, lambda: None)
                served.native.idle_pages((0.0, 60.0, 120.0))
                ours.append((time.monotonic_ns() - began) / 1e6 * (1024 * MIB / size))
                load.ask("touch")
                took = bench.bare("deactivate", load.process.pid, load.address, size)[0]
                bare.append(took / 1e6 * (1024 * MIB / size))
    bench.add("c deactivate + scan + ages, per GiB", "ms", median(ours), median(bare), 1.15)


def row_d(bench: Bench) -> None:
    bare = evictions(bench, "d eviction")
    keys = bench.shm / "keys"
    keys.mkdir(exist_ok=True)
    evictions(bench, "d eviction, encrypted", FileStore(bench.disk / "store", None, "on", keys), bare)


def evictions(bench: Bench, row: str, store: Store | None = None, limits: Sequence[float] = ()) -> list[float]:
    """Of a whole guest; with the bare program between them, unless its `limits` are known. Returns them. MiB/s."""
    size, ours, bare = (256 if bench.quick else 1024) * MIB, [], list(limits)
    with bench.load(size) as load:
        load.ask("fill")
        with bench.served(load, readahead=64, direct="on", store=store) as served:
            for i in range(3):
                bench.tell(f"{row}: {i + 1} of 3")
                phases = cycle.Phases()
                cycle.scan_and_deactivate(served.native, phases, lambda: None)
                began = time.monotonic_ns()
                moved = evict(served)
                ours.append(moved / MIB / ((time.monotonic_ns() - began) / 1e9))
                if not limits:
                    took = bench.bare("evict", size, bench.disk / "bare")[0]
                    bare.append(size / MIB / (took / 1e9))
                load.ask("walk")
                cycle.discard_fetched(served.native, phases, lambda: None)
    bench.add(row, "MiB/s", median(ours), median(bare), 0.8, at_least=True)
    return bare


def row_j(bench: Bench) -> None:
    """Private anonymous memory: into the staging area, and out of it."""
    size, ours, bare = (256 if bench.quick else 1024) * MIB, [], []
    with bench.load(size, anonymous=True) as load, patch.object(cycle, "STOPS_SHARE", 1.0):  # no pauses between stops
        load.ask("fill")
        with bench.served(load, readahead=64, direct="on") as served:
            for i in range(3):
                bench.tell(f"j: pair {i + 1} of 3")
                phases = cycle.Phases()
                cycle.scan_and_deactivate(served.native, phases, lambda: None)
                began = time.monotonic_ns()
                span = Span(0, served.native.pages, served.native.pages)
                while span.next_page < span.end_page:
                    span = served.native.stage([span], 0.0).spans[0]
                moved = evict(served)
                ours.append(moved / MIB / ((time.monotonic_ns() - began) / 1e9))
                took = bench.bare("anonymous", size, bench.disk / "bare")[0]
                bare.append(size / MIB / (took / 1e9))
                load.ask("walk")
                cycle.discard_fetched(served.native, phases, lambda: None)
            stops = served.native.counters()["stop_buckets"]
            served.leave()
    bench.add("j eviction of anonymous memory", "MiB/s", median(ours), median(bare), 0.8, at_least=True)
    for q in (0.5, 0.99):
        bench.add(f"j a stop of the VMM's thread p{q * 100:g}", "ms", (quantile_us(stops, q) or 0.0) / 1000, 2.0, 1.0)


@dataclass
class Worked:
    """What a guest at work has paid, in us a second, and what it has given back."""

    stall_us: float
    stops_us: float
    given_back_mib: float


def worked(bench: Bench, anonymous: bool, seconds: int, directory: str) -> Worked:
    """The real daemon with its defaults, but times are a twentieth, and so is the part of the guest that is hot."""
    from tests.daemon.process import Daemon

    policy = {"interval_s": 0.5, "idle_intervals": 30, "min_idle_s": 6, "unsafe_min_idle": True}
    shm, disk = bench.shm / directory, bench.disk / directory
    shm.mkdir()
    disk.mkdir()
    with bench.load(256 * MIB, anonymous=anonymous) as load, Daemon(shm, disk) as daemon:
        load.ask("fill")
        daemon.write(guests=[{"pid": load.process.pid, **policy}])
        daemon.start()
        daemon.tierd("attach", str(load.process.pid))
        stalled_ns, _ = load.ask("work", seconds)
        (guest,) = daemon.guests().values()
        stopped_ns = guest["counters"]["inject_stopped_ns"]
    return Worked(stalled_ns / 1000 / seconds, stopped_ns / 1000 / seconds, sum(guest["stored_bytes"].values()) / MIB)


def row_k(bench: Bench) -> None:
    """The same guest at work, with either kind of memory, from its attach until all that is cold has left and a while longer."""
    seconds = 30 if bench.quick else 45
    shared, anonymous = [], []
    for i in range(1 if bench.quick else 3):
        bench.tell(f"k: pair {i + 1}, of {2 * seconds} s")
        shared.append(worked(bench, False, seconds, f"k-shared-{i}"))
        anonymous.append(worked(bench, True, seconds, f"k-anonymous-{i}"))
    given = [median([w.given_back_mib for w in runs]) for runs in (anonymous, shared)]
    stall = [median([w.stall_us for w in runs]) for runs in (anonymous, shared)]
    bench.add("k given back, anonymous beside shared", "MiB", given[0], given[1], 0.95, at_least=True)
    bench.add("k stall of the guest, anonymous beside shared", "us/s", stall[0], stall[1], 1.0)
    bench.add("k stops of the VMM's thread", "us/s", median([w.stops_us for w in anonymous]), 1000, 1.0)


def row_e(bench: Bench) -> None:
    size, ours, bare = (256 if bench.quick else 1024) * MIB, [], []
    for i in range(min(bench.pairs, 5)):
        bench.tell(f"e: pair {i + 1}")
        for times, tiered in ((ours, True), (bare, False)):
            with bench.load(size) as load, contextlib.ExitStack() as stack:
                if tiered:
                    stack.enter_context(bench.served(load))
                times.append(load.ask("fresh", size // PAGE)[0] / 1e6)
    bench.add("e first touch of fresh memory", "ms", median(ours), median(bare), 1.1)


def row_f(bench: Bench) -> None:
    """The real daemon, with an idle guest at the default interval of 10 s."""
    from tests.daemon.process import Daemon

    size = 1024 * MIB
    seconds = 12 if bench.quick else 40
    with bench.load(size, -1) as load, Daemon(bench.shm / "f", bench.disk) as daemon:
        load.ask("fill")
        daemon.write(guests=[{"pid": load.process.pid}])
        daemon.start()
        daemon.tierd("attach", str(load.process.pid))
        assert daemon.process is not None
        ticks = os.sysconf("SC_CLK_TCK")

        def cpu_s() -> float:
            fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()  # type: ignore[union-attr]
            return (int(fields[11]) + int(fields[12])) / ticks

        time.sleep(3)  # the first cycle deactivates everything; what is measured is an idle guest
        before = cpu_s()
        bench.tell(f"f: {seconds} s of an idle guest")
        time.sleep(seconds)
        used = cpu_s() - before
        status = Path(f"/proc/{daemon.process.pid}/status").read_text()
        rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    bench.add("f own memory", "MiB", rss, 64 + size / MIB / 1000, 1.0)
    bench.add("f CPU with an idle 1 GiB guest", "% of a core", 100 * used / seconds, 1.0, 1.0)


def row_g(bench: Bench) -> None:
    """One daemon with 64 guests of 8 MiB; faults of one of them."""
    guests, ours, bare = 16 if bench.quick else 64, [], []
    pages = bench.fault_mib * MIB // PAGE
    with contextlib.ExitStack() as stack, on_cpu(OTHER_CPU):
        for i in range(guests - 1):
            bench.tell(f"g: guest {i + 1} of {guests}")
            small = stack.enter_context(bench.load(8 * MIB, -1))
            small.ask("fill")
            stack.enter_context(bench.served(small))
        load = stack.enter_context(bench.load(bench.fault_mib * MIB))
        load.ask("fill")
        served = stack.enter_context(bench.served(load, "follow"))
        for i in range(bench.pairs):
            bench.tell(f"g: pair {i + 1} of {bench.pairs}")
            ours.append(tierd_faults(bench, load, served, pages // 4))
            bare.append(bare_faults(bench, "follow", pages, pages // 4))
    for i, name in ((0, "p50"), (1, "p99")):
        bench.add(
            f"g {guests} guests, fault {name}", "us", median([x[i] for x in ours]), median([x[i] for x in bare]), 1.5
        )


def row_h(bench: Bench) -> None:
    """From the SIGKILL of the real daemon to the first fault that its successor serves; systemd's RestartSec= comes on top."""
    from tests.daemon.process import Daemon

    took = []
    with bench.load(64 * MIB, -1) as load, Daemon(bench.shm / "h", bench.disk / "h") as daemon:
        load.ask("fill")
        everything = {"min_idle_s": 0.2, "unsafe_min_idle": True, "interval_s": 0.1}
        daemon.write(guests=[{"pid": load.process.pid, **everything}])
        daemon.start()
        daemon.tierd("attach", str(load.process.pid))
        for i in range(bench.pairs):
            bench.tell(f"h: kill {i + 1} of {bench.pairs}")
            wait_for(lambda: daemon.guests() and _stored_bytes(daemon) > 60 * MIB, "the guest is evicted")
            assert daemon.process is not None
            daemon.process.kill()
            began = time.monotonic()
            thread = threading.Thread(target=load.ask, args=("random", i + 1))  # the last of them is stored
            thread.start()
            daemon.process.wait()
            daemon.spawn()
            thread.join()
            took.append(time.monotonic() - began)
            daemon.wait_told("READY=1")
    bench.add("h kill -9 to the first fault served", "ms", 1000 * median(took), 300, 1.0)


def _stored_bytes(daemon: Any) -> int:
    (guest,) = daemon.guests().values()
    return sum(guest["stored_bytes"].values())


def row_i(bench: Bench) -> None:
    """Every fourth page was used; of these every other one is stored, so that all must be asked of the kernel by itself."""
    size, took = (1 if bench.quick else 16) * 1024 * MIB, []
    with bench.load(size, -1) as load:
        bench.tell(f"i: a guest of {size >> 30} GiB")
        load.ask("stride", 4)
        with bench.served(load, direct="on") as served:
            evict_all(served)
            load.ask("stride", 8)
            path, engine = served.state_path, choose()
        for _ in range(3):
            began = time.monotonic()
            served = adopt(path, engine=engine, swap_can_receive=False, boot_id=boot_id())
            took.append((time.monotonic() - began) * (16 * 1024 * MIB / size))
            stored = served.native.counters()["state_pages"][4]
            assert stored > 0.9 * size / PAGE / 8, f"only {stored} pages are stored"
            served.close()
    bench.add("i adoption of 16 GiB", "ms", 1000 * median(took), 1000, 1.0)


def row_l(bench: Bench) -> None:
    """Faults from compressed memory."""
    pages = bench.fault_mib * MIB // PAGE
    for style in STYLES:
        waiting, ours, bare = "spin" if style == "spin" else "sleep", [], []
        with bench.load(bench.fault_mib * MIB) as load, on_cpu(OTHER_CPU):
            load.ask("fill-half")
            with bench.served(load, style, store=bench.pool()) as served:
                for i in range(bench.pairs):
                    bench.tell(f"l: {style}, pair {i + 1} of {bench.pairs}")
                    evict_all(served)
                    ours.append(load.ask("random", pages // 4)[0] / 1000)
                    bare.append(
                        bench.bare("fault-lz4", waiting, pages, pages // 4, LOAD_CPU, STYLES[style][2])[0] / 1000
                    )
        bench.add(f"l fault from memory, {style} p50", "us", median(ours), median(bare), 1.15)


def row_m(bench: Bench) -> None:
    """Into compressed memory, on the guest's one worker thread. Of a size that the machine has at hand: the bare program
    takes its memory from the system anew each time. By CPU time: neither waits for anything but the CPU. Beside bare LZ4, and
    beside a bare program that also reads the pages out of the memory and drops them."""
    size, ours, bare, out = 256 * MIB, [], [], []
    with bench.load(size) as load, on_cpu(OTHER_CPU):
        load.ask("fill-half")
        with bench.served(load, readahead=64, store=bench.pool()) as served:
            for i in range(bench.pairs):
                bench.tell(f"m: pair {i + 1} of {bench.pairs}")
                cycle.scan_and_deactivate(served.native, cycle.Phases(), lambda: None)
                began = time.thread_time_ns()
                moved = evict(served)
                ours.append(moved / MIB / ((time.thread_time_ns() - began) / 1e9))
                bare.append(size / MIB / (bench.bare("compress", size)[0] / 1e9))
                out.append(size / MIB / (bench.bare("compress-out", size)[0] / 1e9))
                load.ask("walk")
                cycle.discard_fetched(served.native, cycle.Phases(), lambda: None)
    bench.add("m eviction into memory", "MiB/s of CPU", median(ours), median(bare), 0.8, at_least=True)
    bench.add("m the same, beside read and drop", "MiB/s of CPU", median(ours), median(out), 0.8, at_least=True)


@dataclass
class Zram:
    """What zram makes of private anonymous memory of the same bytes. Times are a page's, in us."""

    saved_per_byte: float
    in_order_us: float
    at_random_us: float


ZRAM = Path("/sys/block/zram0")


@contextlib.contextmanager
def zram_swap(size: int) -> Iterator[None]:
    """The host's only swap, LZ4. It is the whole machine's: what else pages out meanwhile goes there, too."""
    (ZRAM / "comp_algorithm").write_text("lz4")
    (ZRAM / "disksize").write_text(str(size))
    try:
        subprocess.run(["mkswap", "/dev/zram0"], check=True, capture_output=True)
        subprocess.run(["swapon", "/dev/zram0"], check=True)
        try:
            yield
        finally:
            subprocess.run(["swapoff", "/dev/zram0"], check=True)
    finally:
        (ZRAM / "reset").write_text("1")


def zram_usable() -> bool:
    """Whether there is one that nobody uses, and no other swap that would be in its way."""
    return (
        ZRAM.exists()
        and "lz4" in (ZRAM / "comp_algorithm").read_text()
        and (ZRAM / "disksize").read_text().strip() == "0"
        and len(Path("/proc/swaps").read_text().splitlines()) == 1
    )


def zram(bench: Bench, size: int) -> Zram:
    with zram_swap(2 * size):
        stored, taken, in_order_ns, at_random_ns = bench.bare("swap", size, ZRAM / "mm_stat", LOAD_CPU)
    return Zram((stored - taken) / taken, in_order_ns / (size // PAGE) / 1000, at_random_ns / 1000)


def row_n(bench: Bench) -> None:
    """Compressed memory beside zram; where there is none, beside what its allocator would take by its own rules."""
    size, usable = bench.fault_mib * MIB, zram_usable() and not bench.quick
    in_order, at_random, found = [], [], []
    with bench.load(size) as load, on_cpu(OTHER_CPU):
        load.ask("fill-half")
        with bench.served(load, "follow", readahead=16, store=bench.pool()) as served:
            for i in range(bench.pairs if usable else 1):
                bench.tell(f"n: pair {i + 1} of {bench.pairs}")
                evict_all(served)
                pool, pages = served.native.tier_counters(1), served.native.counters()["tier_pages"][1]
                in_order.append(load.ask("walk")[0] / (size // PAGE) / 1000)
                evict_all(served)
                at_random.append(load.ask("random", size // PAGE // 4)[0] / 1000)
                if usable:
                    found.append(zram(bench, size))
    used = pool["used_bytes"]
    beside = f"zram{'' if usable else ', by its rules: none here'}"
    by_rules = (size - (taken := bench.bare("compress", size)[2])) / taken
    saved = median([z.saved_per_byte for z in found]) if usable else by_rules
    bench.add(
        f"n saved per byte of pool, beside {beside}", "B", (pages * PAGE - used) / used, saved, 0.95, at_least=True
    )
    bench.add("n metadata, a stored page", "B", pool["metadata_bytes"] / pages, 16, 1.0)
    if usable:
        for name, ours, theirs, bound in (
            ("in order", in_order, [z.in_order_us for z in found], 1.0),
            ("at random, p50", at_random, [z.at_random_us for z in found], 3.0),
        ):
            bench.add(f"n refault {name}, beside zram", "us", median(ours), median(theirs), bound)


def row_q(bench: Bench) -> None:
    """A guest that reads all of its memory and writes to a twentieth of its pages, three times, and leaves each time: what is
    written of it, beside what would be if no copy were relied on."""
    size = (32 if bench.quick else 256) * MIB
    written = {}
    for keep in ([1], []):
        with bench.load(size) as load, bench.served(load, readahead=64, direct="on") as served:
            load.ask("fill")
            evict_all(served)
            before = served.native.tier_counters(1)["written_pages"]
            for i in range(3):
                bench.tell(f"q: {i + 1} of 3, {'with' if keep else 'without'} copies")
                load.ask("walk")
                load.ask("change", CHANGED)
                cycle.discard_fetched(served.native, cycle.Phases(), lambda: None, keep)
                evict_all(served, keep)
            written[bool(keep)] = (served.native.tier_counters(1)["written_pages"] - before) * PAGE / MIB
    bench.add("q written of a read-mostly guest", "MiB", written[True], written[False], 0.1)


ROWS: dict[str, Callable[[Bench], None]] = {
    "a": row_a, "b": row_b, "c": row_c, "d": row_d, "e": row_e, "f": row_f, "g": row_g, "h": row_h, "i": row_i,
    "j": row_j, "k": row_k, "l": row_l, "m": row_m, "n": row_n, "o": asked.row_o, "p": asked.row_p, "q": row_q,
}  # fmt: skip


def show(rows: list[Row], console: Console) -> None:
    table = Table("row", "measured", "limit", "unit", "ratio", "bound", "")
    for row in rows:
        table.add_row(
            row.row, f"{row.measured:g}", f"{row.limit:g}", row.unit, f"{row.ratio:g}", row.bound,
            "[green]ok" if row.ok else "[red]missed",
        )  # fmt: skip
    console.print(table)


@click.command()
@click.option("--rows", default="a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q", show_default=True)
@click.option("--quick", is_flag=True, help="Smaller and fewer: for a look, not for a figure.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON instead of a table.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "build" / "bench.json")
def main(rows: str, quick: bool, as_json: bool, output: Path) -> None:
    """Measure tierd against the limit."""
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="tierd-bench-") as directory,
        tempfile.TemporaryDirectory(prefix="tierd-bench-", dir="/dev/shm") as shm,
        tempfile.TemporaryDirectory(prefix="tierd-bench-", dir="/var/tmp") as disk,
        console.status("") as status,
    ):
        for name in ("f", "h"):
            (Path(shm) / name).mkdir()
            (Path(disk) / name).mkdir()
        bench = Bench(Path(directory), Path(shm), Path(disk), quick, console, status.update)
        for name in rows.split(","):
            ROWS[name](bench)
    output.parent.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = [asdict(row) for row in bench.rows]
    output.write_text(json.dumps(found, indent=2) + "\n")
    if as_json:
        print(json.dumps(found))
    else:
        show(bench.rows, Console(file=sys.stdout))


if __name__ == "__main__":
    main()
