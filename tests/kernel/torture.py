# SPDX-License-Identifier: Apache-2.0
"""The torture run: guests whose threads read and write checked memory, and a tierd that is killed again and again.

python -m tests.kernel.torture [--kills N] [--seed S] [--guests N] [--memory KIND] [--ladder]    (`make torture KILLS=n SEED=s`)

Each guest has a worker (worker.py) that attaches or adopts it and evicts without a pause; it is killed with SIGKILL at a
random moment: while it starts, attaches, adopts, evicts, fetches, brings everything back and leaves. Its stores fail, are slow
and hang; the workers' memory is short (pressure.py). In the last guest stored copies are destroyed while no worker runs, in each
of its tiers (damage.py): it gets memory errors there, and nowhere else. At the end everything is read back. Prints a line a
second and writes build/torture.json.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import click

from tests.kernel.damage import FLIPS
from tests.kernel.pressure import pressure
from tests.kernel.vmm import MIB, SLOWNESS, VMM_SOURCES, Vmm, compile_child, wait_for
from tierd.engine import choose
from tierd.native import STATES, Identity, TableRegion, TierKind, table_read
from tierd.serve import wait_for_lock

ROOT = Path(__file__).resolve().parents[2]
ALIVE_S_MAX = 0.4  # after it is ready
START_S_MAX = 1.2  # of those that are killed while they start
ADOPTION_S_MAX = 0.005
DETACH_S_MAX = 0.2
READY_S_MAX = 60.0 * SLOWNESS
DESTROYED_MAX = 24
IN_VAIN_MAX = 4  # times as many kills as wanted, and nothing happened in between
# once there were as many as wanted, each life may be so much longer than the one before: the machine may be slow
LONGER, SLOWEST = 1.2, 16.0
WORKERS_LIMIT = 320 * MIB
TABLE_HEADER_BYTES = 65536
STORED = STATES.index("stored")
Memory = Literal["memfd", "hugetlb", "anonymous"]


@dataclass(frozen=True)
class Python:
    """What runs the workers: another extension, built with a sanitizer, say."""

    command: tuple[str, ...] = (sys.executable,)
    root: Path = ROOT
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Tortured:
    """A guest, its directories, and the worker that serves it just now."""

    vmm: Vmm
    tmpfs_dir: Path
    disk_dir: Path
    chance: random.Random
    python: Python
    cgroup: Path | None
    to_be_destroyed: int  # stored copies
    destroys: float = 0.3  # so often, after a death
    slowness: float = 1.0  # lives last so much longer
    kills: Counter[str] = field(default_factory=Counter)
    detached: int = 0
    faults: int = 0
    evicted: int = 0
    demoted: int = 0
    into_asked: int = 0  # pages, by eviction and by demotion
    out_of_asked: int = 0  # by faults and read-ahead
    destroyed: dict[int, TierKind] = field(default_factory=dict)  # by page
    worker: subprocess.Popen[bytes] | None = None

    def start(self, order: str) -> None:
        arguments = [str(self.vmm.pid), str(self.tmpfs_dir), str(self.disk_dir), str(self.chance.randrange(1 << 30))]
        self.worker = subprocess.Popen(
            [
                *self.python.command,
                "-m",
                "tests.kernel.worker",
                *arguments,
                order,
                *([str(self.cgroup)] if self.cgroup else []),
            ],
            cwd=self.python.root,
            env={**os.environ, **self.python.environment},
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self._text = b""

    def said(self, word: bytes) -> bool:
        return b"\n" + word in b"\n" + self._text

    def listen(self, seconds: float, *until: bytes) -> bool:
        """Take in what the worker says for so long, or until it says one of `until`. Fails if it ended by itself."""
        assert self.worker is not None
        assert self.worker.stdout is not None
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not any(map(self.said, until)):
            if not select.select([self.worker.stdout], [], [], left)[0]:
                break
            more = os.read(self.worker.stdout.fileno(), 65536)
            if not more:
                status = self.worker.wait()  # of SIGKILL: the kernel's, whose memory was short; a death like any other
                assert status == -9 or self.said(b"left"), (
                    f"the worker of pid {self.vmm.pid} ended by itself: status {status}"
                )
                break
            self._text += more
        return any(map(self.said, until))

    def kill(self) -> None:
        """Wherever it is. Counts what it did."""
        assert self.worker is not None
        assert self.worker.stdout is not None
        self.worker.kill()
        status = self.worker.wait()
        self._text += self.worker.stdout.read() or b""
        self.worker.stdout.close()
        self.worker = None
        if status == 0 and self.said(b"left"):
            self.detached += 1
        else:
            assert status == -9, f"the worker of pid {self.vmm.pid} ended by itself: status {status}"
            self.kills[self._moment()] += 1
        counted = [line.split() for line in self._text.decode().split("\n")[:-1] if line.startswith("counters")]
        if counted:
            self.faults += int(counted[-1][1])
            self.evicted += int(counted[-1][2])
            self.demoted += int(counted[-1][4])
            self.into_asked += int(counted[-1][5])
            self.out_of_asked += int(counted[-1][6])

    def _moment(self) -> str:
        if self.said(b"left"):
            return "after_detach"
        if self.said(b"leaving"):
            return "in_detach"
        if self.said(b"ready"):
            return "in_service"
        return "in_adoption" if self.said(b"adopting") else "in_attach" if self.said(b"attaching") else "at_start"

    def state(self) -> str:
        """Of the VMM's process: a letter as in proc_pid_stat(5)."""
        return Path(f"/proc/{self.vmm.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def round(self) -> None:
        """One daemon's life and death; then its successor must get the guest going again."""
        chance = self.chance
        kind = chance.choice(["start", "adoption", "adoption", "service", "service", "detach", "detach"])
        if kind == "detach" and self.destroyed:
            kind = "service"  # a guest with lost pages cannot be left
        self.start("leave" if kind == "detach" else "spoilt" if self.to_be_destroyed else "stay")
        if kind == "start":
            self.listen(chance.random() * START_S_MAX, b"ready")
        else:
            words = {"adoption": (b"adopting", b"attaching"), "service": (b"ready",), "detach": (b"leaving",)}[kind]
            heard = self.listen(READY_S_MAX, *words) or self.worker.returncode == -9
            assert heard, f"the worker of pid {self.vmm.pid} hangs: {self._text[-200:]!r}"
            span_s = {"adoption": ADOPTION_S_MAX, "service": ALIVE_S_MAX, "detach": DETACH_S_MAX}[kind]
            self.listen(chance.random() * span_s * self.slowness)
        self.kill()
        assert self.state() not in "Tt", "the VMM was left stopped"
        if len(self.destroyed) < self.to_be_destroyed and chance.random() < self.destroys:
            self.destroy_copies(3)
        wrong = self.vmm.stats()["wrong"]
        assert not wrong, self.vmm.wrong[:5]
        assert self.failed_pages() <= self.destroyed.keys(), "a memory error where no stored copy was destroyed"

    def destroy_copies(self, most: int) -> None:
        """One bit of some stored pages, of as many in each tier, while nobody serves the guest: then the state file says which
        ones are stored."""
        paths = list((self.tmpfs_dir / "guests").glob("*.state"))
        if not paths:
            return
        fd = os.open(paths[0], os.O_RDWR)
        try:
            wait_for_lock(fd, paths[0], time.sleep)
            identity, regions, _ = table_read(fd)
            pages = sum(region.bytes for region in regions) // self.vmm.page_bytes
            words = struct.unpack(f"{pages}I", os.pread(fd, 4 * pages, TABLE_HEADER_BYTES))
        finally:
            os.close(fd)
        in_vmm = self._in_vmm(regions)
        for tier, place in enumerate(identity.places, 1):
            stored = [
                n
                for n, w in enumerate(words)
                if w & 15 == STORED and w >> 4 & 15 == tier and in_vmm.get(n, -1) not in {-1, *self.destroyed}
            ]
            left = self.to_be_destroyed // len(identity.places) - self.destroyed_in(place.kind)
            path = self._asked_path(identity) if place.kind is TierKind.ASKED else Path(place.path)
            for page in self.chance.sample(stored, min(most // len(identity.places), left, len(stored))):
                FLIPS[place.kind](path, page, self.vmm.page_bytes, pages, self.chance)
                self.destroyed[in_vmm[page]] = place.kind

    def destroyed_in(self, kind: TierKind) -> int:
        return list(self.destroyed.values()).count(kind)

    def _asked_path(self, identity: Identity) -> Path:
        """Where the guest's records are; there may be no place yet."""
        return next((self.disk_dir / "asked").glob(f"*.{identity.pid}-{identity.start_ticks}.*"), Path())

    def _in_vmm(self, regions: Sequence[TableRegion]) -> dict[int, int]:
        """What the VMM calls a page of the state file, by its number there. (There may be more regions of anonymous memory: what
        a death in an attach left behind in the VMM looks like RAM.)"""
        each, found, page = self.vmm.pages // len(self.vmm.addresses), {}, 0
        for region in regions:
            count = region.bytes // self.vmm.page_bytes
            if region.address in self.vmm.addresses:
                first = self.vmm.addresses.index(region.address) * each
                found.update({page + i: first + i for i in range(count)})
            page += count
        return found

    def failed_pages(self) -> set[int]:
        """Where the guest had a memory error."""
        pages, page = set(), -1
        while (page := self.vmm.ask("failed", page + 1)[0]) < self.vmm.pages:
            pages.add(page)
        return pages

    def finish(self) -> None:
        """The guest goes on under a last worker; then every byte of it is read back."""
        self.cgroup = None  # it is to live
        self.start("honest")
        assert self.listen(READY_S_MAX, b"ready")
        before = self.vmm.stats()["operations"]
        wait_for(lambda: self.vmm.stats()["operations"] > before + 100, "the guest goes on", seconds=60)
        self.vmm.ask("stop")
        self.vmm.verify()
        failed = self.failed_pages()
        destroyed = self.destroyed.keys()
        assert failed == destroyed, f"no memory error at {destroyed - failed}, one at {failed - destroyed}"
        self._text = b""
        assert self.listen(READY_S_MAX, b"counters"), "what was read back is counted"
        kills = self.kills.copy()
        self.kill()
        self.kills = kills


def torture(
    binary: Path,
    *,
    kills: int,
    seed: int,
    guests: int,
    memory: Memory = "memfd",
    ladder: bool = False,
    seconds: float = 0.0,
    python: Python = Python(),
    memory_limit: int = WORKERS_LIMIT,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Kill `kills` times at least, for so many seconds at least, and until pages have left and come back; then verify everything.
    AssertionError: a byte was wrong, a memory error where it must not be, or somebody hangs. memory: the guests'; of hugetlb: the
    pool has 32 pages for each. ladder: compressed memory, a file and a store that is asked, from one to the next of which pages
    sink, instead of one file. memory_limit: of all workers together; 0: none."""
    with ExitStack() as cleanup:
        huge, anonymous = memory == "hugetlb", memory == "anonymous"
        size = 32 * MIB if huge else 8 * MIB
        pools = guests * size // 2 if ladder else 0  # in tmpfs files, which are charged to who writes them
        cgroup = cleanup.enter_context(pressure(memory_limit and memory_limit + pools))
        # their pages take longer to leave than a life lasts: they are large, or the VMM has time for itself between stops, or
        # they leave twice
        slowness = SLOWNESS if huge else 2.0 if anonymous or ladder else 1.0
        tortured: list[Tortured] = []
        for i in range(guests):
            kind = {"memfd": "memfd", "hugetlb": "huge", "anonymous": "anonymous"}[memory]
            arguments = (f"bytes={size}", f"kind={kind}")
            more = ("threads=3", "survive", *(["compressible"] if ladder else []))
            vmm = cleanup.enter_context(Vmm(binary, *arguments, f"regions={1 + i % 2}", *more))
            shm, disk = (Path(tempfile.mkdtemp(prefix="tierd-torture-", dir=at)) for at in ("/dev/shm", "/var/tmp"))
            cleanup.callback(shutil.rmtree, shm)
            cleanup.callback(shutil.rmtree, disk)
            destroyed = (vmm.pages // 4 if huge else DESTROYED_MAX) if i == guests - 1 else 0
            how = (destroyed, 0.6 if ladder else 0.3, slowness)  # where one copy of each tier is destroyed: more often
            tortured.append(Tortured(vmm, shm, disk, random.Random(f"{seed} {i}"), python, cgroup, *how))
            vmm.ask("fill")
            vmm.ask("run", int((20 if huge else 500 if anonymous else 2000) / SLOWNESS), 50)
        cleanup.callback(lambda: [one.worker.kill() for one in tortured if one.worker is not None])
        began, failed = time.monotonic(), threading.Event()

        def so_far() -> int:
            return sum(one.kills.total() for one in tortured)

        def in_vain() -> bool:
            """Pages have not yet left and come back, from and to each tier: on a slow machine the first lives may be too short
            for that."""
            each = ((one.evicted, one.faults, one.kills["in_service"]) for one in tortured)
            ladders = ((one.demoted, one.out_of_asked, *map(one.destroyed_in, TierKind)) for one in tortured)
            met = [*zip(*each, strict=True), *(zip(*ladders, strict=True) if ladder else ())]
            return not all(map(sum, met))

        def enough() -> bool:
            wanted = IN_VAIN_MAX * kills if in_vain() else kills
            return so_far() >= wanted and time.monotonic() - began >= seconds

        def run(one: Tortured) -> None:
            try:
                while not enough() and not failed.is_set():
                    one.round()
                    if so_far() > kills and in_vain():
                        one.slowness = min(one.slowness * LONGER, SLOWEST * slowness)
                if not failed.is_set():
                    one.finish()
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(guests) as pool:
            running = [pool.submit(run, one) for one in tortured]
            try:
                while not all(one.done() for one in running):
                    time.sleep(1)
                    faults = sum(one.faults for one in tortured)
                    tell(f"{time.monotonic() - began:5.0f} s: {so_far()} kills, {faults} faults, 0 wrong")
            except BaseException:  # we are told to end: so are they, or they would be waited for
                failed.set()
                raise
            for one in running:
                one.result()
        stats = [one.vmm.stats() for one in tortured]
        moments = sum((one.kills for one in tortured), Counter[str]())
        return {
            "kills": so_far(),
            "faults": sum(one.faults for one in tortured),
            "verified_bytes": sum(each["verified"] for each in stats),
            "wrong_bytes": sum(each["wrong"] for each in stats) * 8,
            "poisoned_pages": sum(len(one.failed_pages()) for one in tortured),
            "seed": seed,
            "engine": choose().name,
            "destroyed_pages": sum(len(one.destroyed) for one in tortured),
            **{
                f"destroyed_in_{kind.name.lower()}": sum(one.destroyed_in(kind) for one in tortured)
                for kind in TierKind
            },
            **{f"kills_{moment}": moments[moment] for moment in ("at_start", "in_attach", "in_adoption", "in_service")},
            "kills_in_detach": moments["in_detach"] + moments["after_detach"],
            "detached": sum(one.detached for one in tortured),
            "evicted_pages": sum(one.evicted for one in tortured),
            "demoted_pages": sum(one.demoted for one in tortured),
            "pages_into_asked": sum(one.into_asked for one in tortured),
            "pages_out_of_asked": sum(one.out_of_asked for one in tortured),
            "operations": sum(each["operations"] for each in stats),
            "memory_pressure": cgroup is not None,
            "seconds": round(time.monotonic() - began, 1),
        }


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--guests", default=3, show_default=True)
@click.option(
    "--ladder", is_flag=True, help="Compressed memory, a file and a store that is asked, instead of one file."
)
@click.option("--memory", default="memfd", show_default=True, type=click.Choice(get_args(Memory)))
def main(kills: int, seed: int, guests: int, memory: Memory, ladder: bool) -> None:
    """Kill tierd many times and verify every byte."""
    if ladder and memory == "hugetlb":
        raise click.UsageError("huge pages are stored in files only: they have no ladder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through what cleans up
    with tempfile.TemporaryDirectory() as directory:
        binary = compile_child(Path(directory) / "vmm", *VMM_SOURCES)
        result = torture(
            binary,
            kills=kills,
            seed=seed,
            guests=guests,
            memory=memory,
            ladder=ladder,
            tell=lambda line: print(line, flush=True),
        )
    (ROOT / "build").mkdir(exist_ok=True)
    name = "torture-ladder.json" if ladder else "torture.json"
    (ROOT / "build" / name).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
