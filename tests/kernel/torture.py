# SPDX-License-Identifier: Apache-2.0
"""The torture run: guests whose threads read and write checked memory, and a tierd that is killed again and again.

python -m tests.kernel.torture [--kills N] [--seed S] [--guests N]      (`make torture KILLS=n SEED=s`)

Each guest has a worker (worker.py) that attaches or adopts it and evicts without a pause; it is killed with SIGKILL at a
random moment: while it starts, attaches, adopts, evicts, fetches. At the end everything is read back. Prints a line a second
and writes build/torture.json.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tests.kernel.vmm import MIB, Vmm, compile_child, wait_for

ROOT = Path(__file__).resolve().parents[2]
ALIVE_S_MAX = 0.4  # after it is ready
START_S_MAX = 1.2  # of those that are killed before they are
READY_S_MAX = 60.0


@dataclass
class Tally:
    kills: int = 0
    kills_before_ready: int = 0
    faults: int = 0
    evicted: int = 0
    poisoned: int = 0


@dataclass
class Tortured:
    """A guest, its directories, and the worker that serves it just now."""

    vmm: Vmm
    tmpfs_dir: Path
    disk_dir: Path
    tally: Tally
    worker: subprocess.Popen[bytes] | None = None
    last: list[int] = field(default_factory=lambda: [0, 0, 0])

    def start(self, chance: random.Random) -> None:
        arguments = [str(self.vmm.pid), str(self.tmpfs_dir), str(self.disk_dir), str(chance.randrange(1 << 30))]
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "tests.kernel.worker", *arguments], cwd=ROOT, stdout=subprocess.PIPE, bufsize=0
        )
        self._text, self.last = b"", [0, 0, 0]

    def listen(self, seconds: float, until: bytes = b"\0") -> bool:
        """Take in what the worker says for so long, or until it says `until`. Fails if it ended by itself."""
        assert self.worker is not None
        assert self.worker.stdout is not None
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and until not in self._text:
            if not select.select([self.worker.stdout], [], [], left)[0]:
                break
            more = os.read(self.worker.stdout.fileno(), 65536)
            assert more, f"the worker of pid {self.vmm.pid} ended by itself: status {self.worker.wait()}"
            self._text += more
            self._count()
        return until in self._text

    def _count(self) -> None:
        lines = [line.split() for line in self._text.decode().split("\n")[:-1]]
        for line in lines:
            if line[0] == "counters":
                self.last = [int(word) for word in line[1:]]

    def kill(self) -> None:
        assert self.worker is not None
        self.worker.kill()
        self.worker.wait()
        if self.worker.stdout is not None:
            self.worker.stdout.close()
        self.worker = None
        self.tally.kills += 1
        self.tally.faults += self.last[0]
        self.tally.evicted += self.last[1]
        self.tally.poisoned += self.last[2]

    def state(self) -> str:
        """Of the VMM's process: a letter as in proc_pid_stat(5)."""
        return Path(f"/proc/{self.vmm.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def round(self, chance: random.Random) -> None:
        """One daemon's life and death; then its successor must get the guest going again."""
        self.start(chance)
        if chance.random() < 0.4:
            if not self.listen(chance.random() * START_S_MAX, b"ready"):
                self.tally.kills_before_ready += 1
        else:
            assert self.listen(READY_S_MAX, b"ready"), "the worker did not get ready"
            self.listen(chance.random() * ALIVE_S_MAX)
        self.kill()
        assert self.state() not in "Tt", "the VMM was left stopped"


def torture(
    binary: Path, *, kills: int, seed: int, guests: int, tell: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Kill `kills` times, then verify everything. AssertionError: a byte was wrong, or somebody hangs."""
    chance, tally = random.Random(seed), Tally()
    with ExitStack() as cleanup:
        tortured = []
        for i in range(guests):
            vmm = cleanup.enter_context(Vmm(binary, f"bytes={8 * MIB}", f"regions={1 + i % 2}", "threads=3"))
            shm, disk = (Path(tempfile.mkdtemp(prefix="tierd-torture-", dir=at)) for at in ("/dev/shm", "/var/tmp"))
            cleanup.callback(shutil.rmtree, shm)
            cleanup.callback(shutil.rmtree, disk)
            tortured.append(Tortured(vmm, shm, disk, tally))
            vmm.ask("fill")
            vmm.ask("run", 2000, 50)
        cleanup.callback(lambda: [one.kill() for one in tortured if one.worker is not None])
        began = time.monotonic()
        while tally.kills < kills:
            for one in tortured:
                one.round(chance)
            wrong = sum(one.vmm.stats()["wrong"] for one in tortured)
            assert not wrong, [line for one in tortured for line in one.vmm.wrong][:5]
            tell(f"{time.monotonic() - began:5.0f} s: {tally.kills} kills, {tally.faults} faults, 0 wrong")
        operations = verified = wrong = 0
        for one in tortured:
            one.start(chance)
            assert one.listen(READY_S_MAX, b"ready")
            before = one.vmm.stats()["operations"]
            wait_for(lambda one=one, n=before: one.vmm.stats()["operations"] > n + 1000, "the guest goes on")
            operations += one.vmm.ask("stop")[0]
            one.vmm.verify()
            wrong += one.vmm.stats()["wrong"]
            verified += one.vmm.pages * one.vmm.page_bytes
            one.kill()
            tally.kills -= 1
    return {
        "kills": tally.kills,
        "kills_before_ready": tally.kills_before_ready,
        "faults": tally.faults,
        "evicted_pages": tally.evicted,
        "operations": operations,
        "verified_bytes": verified,
        "wrong_bytes": wrong * 8,
        "poisoned_pages": tally.poisoned,
        "seed": seed,
        "engine": "stock",
        "seconds": round(time.monotonic() - began, 1),
    }


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--guests", default=3, show_default=True)
def main(kills: int, seed: int, guests: int) -> None:
    """Kill tierd many times and verify every byte."""
    with tempfile.TemporaryDirectory() as directory:
        binary = compile_child(Path(directory) / "vmm", "vmm.c", "vmm_hazards.c", "child.c")
        result = torture(binary, kills=kills, seed=seed, guests=guests, tell=lambda line: print(line, flush=True))
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "torture.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
