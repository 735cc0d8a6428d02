# SPDX-License-Identifier: Apache-2.0
"""What an engine with a sync mode costs beside its bare system calls: in a kernel that has one. `python3 -m tests.kernels.bench`
boots it and runs this.

    python -m tests.kernels.measure BARE     BARE: the program of bare.c

Prints JSON. Ratios only are worth something: this runs under emulation.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kernel.vmm import VMM_SOURCES, Host, Vmm, compile_child
from tierd.engine import choose

MIB, ROUNDS = 256, 7


def bare(program: str) -> dict[str, float]:
    done = subprocess.run([program, choose().name, str(MIB), "5"], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def quantile_ms(buckets: tuple[int, ...], q: float) -> float:
    """Upper edge of the bucket that holds it."""
    wanted, seen = q * sum(buckets), 0
    for i, count in enumerate(buckets):
        seen += count
        if seen >= wanted:
            return float(2**i / 1e6)
    raise AssertionError("no windows")


def measure(program: str, scratch: Path) -> dict[str, Any]:
    binary = compile_child(scratch / "vmm", *VMM_SOURCES)
    host = Host(Path(tempfile.mkdtemp(dir="/dev/shm")), Path(tempfile.mkdtemp(dir="/var/tmp")))
    ours: list[float] = []
    limits: list[dict[str, float]] = []
    with Vmm(binary, f"bytes={MIB << 20}") as vmm, host.attached(vmm) as tiered:
        vmm.ask("fill")
        tiered.scan()
        for _ in range(ROUNDS):
            limits.append(bare(program))
            vmm.ask("touch")
            began = time.monotonic()
            tiered.scan()
            ours.append((time.monotonic() - began) * 1e3)
        for _ in range(3):
            tiered.evict()
            vmm.ask("touch")
            tiered.scan()
            tiered.scan()
        counters = tiered.counters()
        tiered.leave()
    middle = {key: statistics.median(one[key] for one in limits) for key in limits[0]}
    limit_ms = statistics.median(one["deactivate_ms"] + one["scan_ms"] for one in limits)
    return {
        "engine": choose().name,
        "scan_and_deactivate_ms": round(statistics.median(ours), 3),
        "limit_ms": round(limit_ms, 3),
        "ratio": round(statistics.median(ours) / limit_ms, 2),
        "window_p50_ms": quantile_ms(counters["window_buckets"], 0.5),
        "window_p99_ms": quantile_ms(counters["window_buckets"], 0.99),
        "windows": counters["windows"],
        **middle,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(sys.argv[1], Path(scratch))))
