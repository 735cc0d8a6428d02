# SPDX-License-Identifier: Apache-2.0
"""The object store in a directory against the limit: the same data written to one file, and the bare range read.

python -m tests.bench.objects [--quick] [--json] [DIRECTORY-ON-A-DISK]

Pairs are interleaved, figures are medians. `read` has two limits: the call of a read (OpenDAL's range read) made by this
thread, and the same awaited from trio in another thread, which is what any store that blocks must do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import opendal
import trio

from tierd.store.objects import ObjectOptions, ObjectSpace, ObjectStore
from tierd.store.segments import place_of

PAGE = 4096
BATCH_PAGES = 512
PAGES = 1 << 18
KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "random (or sealed)": lambda rng: rng.randbytes(PAGE),
    "compressed to a half": lambda rng: rng.randbytes(PAGE // 2),
}


@dataclass(frozen=True)
class Row:
    row: str
    unit: str
    measured: float
    limit: float
    bound: str

    @property
    def ratio(self) -> float:
        return self.measured / self.limit

    def told(self) -> str:
        told = f"{self.measured:.4g} | {self.limit:.4g} | {self.unit} | {self.ratio:.2f} | {self.bound}"
        return f"| {self.row} | {told} |"


async def timed(call: Callable[[], Awaitable[object]]) -> float:
    start = time.perf_counter()
    await call()
    return time.perf_counter() - start


class Plain:
    """One file that grows, synced a batch."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    async def write(self, batch: list[bytes]) -> None:
        self._file.write(b"".join(batch))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


async def evict(space: ObjectSpace, plain: Plain, kind: str, at_once: int, times: int) -> Row:
    """`at_once` batches are written at the same time, as an evictor with so many under way does."""
    rng = random.Random(kind)
    batch = [KINDS[kind](rng) for _ in range(BATCH_PAGES)]
    firsts = iter(range(0, PAGES, BATCH_PAGES))

    async def batches() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(space.write, next(firsts), batch)

    async def files() -> None:
        for _ in range(at_once):
            await plain.write(batch)

    pairs = [(await timed(batches), await timed(files)) for _ in range(times)]
    mib = at_once * sum(map(len, batch)) / 2**20
    measured, limit = (mib / statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(f"evict, {kind}, {at_once} at once", "MiB/s", measured, limit, "at least 0.7")


async def read(space: ObjectSpace, root: Path, kind: str, cached: bool, times: int) -> Iterator[Row]:
    rng = random.Random(kind)
    await space.write(0, [KINDS[kind](rng) for _ in range(16 * BATCH_PAGES)])
    operator = opendal.Operator("fs", root=str(root))
    limiter = trio.CapacityLimiter(8)
    page = 0

    def bare() -> None:
        place = place_of(space._index.words(page, 1)[0])
        operator.read(space._name(place.number), offset=place.offset, size=place.length)

    async def here() -> None:
        bare()

    async def awaited() -> None:
        await trio.to_thread.run_sync(bare, limiter=limiter, abandon_on_cancel=True)

    async def measured() -> None:
        await space.read(page, 1)

    columns: list[list[float]] = [[], [], []]
    for _ in range(times):
        for column, call in zip(columns, (measured, here, awaited), strict=True):
            page = rng.randrange(16 * BATCH_PAGES)
            if not cached:
                drop(root / space._name(place_of(space._index.words(page, 1)[0]).number))
            column.append(await timed(call))
    us, bare_us, awaited_us = (statistics.median(column) * 1e6 for column in columns)
    what = f"read a page, {kind}, {'from the page cache' if cached else 'from the disk'}, p50"
    return iter(
        [
            Row(f"{what}; limit: awaited in a thread", "us", us, awaited_us, "at most 1.5"),
            Row(f"{what}; limit: bare calls", "us", us, bare_us, "at most 1.5"),
        ]
    )


def drop(path: Path) -> None:
    """Its pages from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


async def measure(disk: Path, shm: Path, quick: bool) -> list[Row]:
    rows = []
    root = disk / "objects"
    store = ObjectStore(ObjectOptions(scheme="fs", options={"root": str(root)}), shm, "bench", "boot")
    with contextlib.closing(Plain(disk / "plain")) as plain:
        for kind in KINDS:
            for at_once in (1, 2):
                space = await store.open("1-1", PAGES, PAGE)
                rows.append(await evict(space, plain, kind, at_once, 10 if quick else 40))
                await space.delete()
                await space.aclose()
    for cached in (True, False):
        space = await store.open("1-1", PAGES, PAGE)
        rows += await read(space, root, "compressed to a half", cached, 300 if quick else 2000)
        await space.delete()
        await space.aclose()
    return rows


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
@click.argument("directory", type=click.Path(path_type=Path), default=Path("/var/tmp"))
def main(quick: bool, as_json: bool, directory: Path) -> None:
    with (
        tempfile.TemporaryDirectory(dir=directory, prefix="tierd-bench-") as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tierd-bench-") as shm,
    ):
        rows = trio.run(measure, Path(disk), Path(shm), quick)
    if as_json:
        print(json.dumps([{**asdict(row), "ratio": round(row.ratio, 3)} for row in rows]))
    else:
        print(*(row.told() for row in rows), sep="\n")


if __name__ == "__main__":
    main()
