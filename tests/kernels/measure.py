# SPDX-License-Identifier: Apache-2.0
"""What an engine costs beside its bare system calls, in a kernel that has more than the stock one. `python3 -m
tests.kernels.bench` boots it and runs this.

    python -m tests.kernels.measure BARE     BARE: the program of bare.c

Prints JSON: the kernel's own engine, and the stock engine on the same kernel. Ratios only are worth something: this runs under
emulation.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.kernel.vmm import PAGE, VMM_SOURCES, Host, Tiered, Vmm, compile_child
from tierd.config import Policy
from tierd.engine import choose

MIB, ROUNDS, REPEATS = 512, 7, 5  # the first of the repeats finds the emulator's caches cold, so each side has as many
SECOND_CPU = Path("/sys/devices/system/cpu/cpu1/online")
LEAVES_BYTES, LEAVES_BYTES_PER_S = 64 << 20, 32 << 20
STALLS, STALL_PAUSE_US, STALL_ROUNDS = 4096, 250, 5
ANONYMOUS_MIB, ANONYMOUS_READS = 64, 4096


def bare(program: str, engine: str) -> dict[str, float]:
    done = subprocess.run([program, engine, str(MIB), str(REPEATS)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def quantile_ms(buckets: tuple[int, ...], q: float) -> float | None:
    """Upper edge of the bucket that holds it; None when there is nothing in them."""
    wanted, seen = q * sum(buckets), 0
    for i, count in enumerate(buckets):
        seen += count
        if seen and seen >= wanted:
            return float(2**i / 1e6)
    return None


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """Whether a flush of the TLB has to wait for another emulated CPU depends on where the scheduler put the two processes."""
    SECOND_CPU.write_text("0")
    try:
        yield
    finally:
        SECOND_CPU.write_text("1")


def one_pass(tiered: Tiered, vmm: Vmm) -> float:
    """ms."""
    vmm.ask("touch")
    began = time.monotonic()
    tiered.scan()
    return (time.monotonic() - began) * 1e3


def passes(tiered: Tiered, vmm: Vmm, program: str, engine: str) -> dict[str, Any]:
    """Scan and deactivation of memory that was touched as a whole, in turns with the bare calls."""
    ours: list[float] = []
    limits: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        limits.append(bare(program, engine))
        ours.append(statistics.median(one_pass(tiered, vmm) for _ in range(REPEATS)))
    limits_ms = [one["deactivate_ms"] + one["scan_ms"] for one in limits]
    return {
        "scan_and_deactivate_ms": round(statistics.median(ours), 3),
        "limit_ms": round(statistics.median(limits_ms), 3),
        "ratio": round(statistics.median(a / b for a, b in zip(ours, limits_ms, strict=True)), 2),
        **{key: statistics.median(one[key] for one in limits) for key in limits[0]},
    }


def stalls(tiered: Tiered, vmm: Vmm) -> dict[str, float]:
    """What reads of untouched pages cost the guest: in peace, while others leave at a fixed rate, and of these the ones
    that wait in a window: as many as were resolved there, the longest."""
    first = LEAVES_BYTES // PAGE
    quiet: list[list[int]] = []
    beside: list[list[int]] = []
    in_windows: list[list[int]] = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(STALL_ROUNDS):
            tiered.scan()
            quiet.append(vmm.ask("stalls", first, STALLS, STALL_PAUSE_US))
            tiered.scan()
            before = tiered.counters()["faults_window"]
            leaving = pool.submit(tiered.evict, max_bytes=LEAVES_BYTES, bytes_per_s=LEAVES_BYTES_PER_S)
            beside.append(vmm.ask("stalls", first, STALLS, STALL_PAUSE_US))
            assert leaving.result(), "pages left"
            if waited := tiered.counters()["faults_window"] - before:
                in_windows.append(vmm.ask("longest", waited))
            tiered.restore_all()
            tiered.discard()
    return {
        f"{name}_{what}_us": round(statistics.median(one[i] for one in found) / 1e3, 1)
        for name, found in (("quiet", quiet), ("stall", beside), ("window_stall", in_windows))
        for i, what in enumerate(("p50", "p99", "max")[: len(found[0]) if found else 0])
    }


def anonymous(engine: str, binary: Path, host: Host) -> dict[str, Any]:
    """Of private anonymous memory: a pass over all of it, touched; its eviction, and what that stops; reads of what has left."""
    arguments = (f"bytes={ANONYMOUS_MIB << 20}", "kind=anonymous")
    with Vmm(binary, *arguments) as vmm, host.attached(vmm, Policy(), engine=engine) as tiered:
        vmm.ask("fill")
        tiered.scan()
        pass_ms = statistics.median(one_pass(tiered, vmm) for _ in range(REPEATS))
        began = time.monotonic()
        tiered.evict_all()
        took_ms = (time.monotonic() - began) * 1e3
        counters = tiered.counters()
        p50_ns, p99_ns, _ = vmm.ask("stalls", 0, ANONYMOUS_READS, 0)
        tiered.leave()
    return {
        "anonymous_pass_ms": round(pass_ms, 3),
        "anonymous_leave_ms_per_mib": round(took_ms / ANONYMOUS_MIB, 1),
        "anonymous_stops_per_mib": round(counters["inject_stops"] / ANONYMOUS_MIB, 2),
        "anonymous_stop_p50_ms": quantile_ms(counters["stop_buckets"], 0.5),
        "anonymous_stop_p99_ms": quantile_ms(counters["stop_buckets"], 0.99),
        "anonymous_read_p50_us": round(p50_ns / 1e3, 1),
        "anonymous_read_p99_us": round(p99_ns / 1e3, 1),
    }


def measure(engine: str, program: str, scratch: Path) -> dict[str, Any]:
    binary = compile_child(scratch / "vmm", *VMM_SOURCES)
    host = Host(Path(tempfile.mkdtemp(dir="/dev/shm")), Path(tempfile.mkdtemp(dir="/var/tmp")))
    of_anonymous = anonymous(engine, binary, host)
    with Vmm(binary, f"bytes={MIB << 20}") as vmm, host.attached(vmm, Policy(), engine=engine) as tiered:
        vmm.ask("fill")
        tiered.scan()
        with one_cpu():
            of_passes = passes(tiered, vmm, program, engine)
        of_stalls = stalls(tiered, vmm)
        counters = tiered.counters()
        tiered.leave()
    windows = counters["window_buckets"]
    return {
        "engine": engine,
        **of_passes,
        **of_stalls,
        "window_p50_ms": quantile_ms(windows, 0.5),
        "window_p99_ms": quantile_ms(windows, 0.99),
        "windows": counters["windows"],
        **of_anonymous,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(
            json.dumps([measure(name, sys.argv[1], Path(scratch)) for name in dict.fromkeys((choose().name, "stock"))])
        )
