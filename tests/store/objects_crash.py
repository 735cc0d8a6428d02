# SPDX-License-Identifier: Apache-2.0
"""A process that writes, discards and cleans an object store is killed at a random moment; its successor must read every page
that was written as it was written. Again and again; ends with one JSON object.

python -m tests.store.objects_crash --kills 300 --seed 1 DIRECTORY-ON-A-DISK DIRECTORY

A third of the successors find no index. What was under way when the kill came may be there or not, and what was discarded may
be there again; but whatever is read is something that was once written to that page.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import trio

from tierd.store.objects import INDEX_SUFFIX, ObjectOptions, ObjectSpace, ObjectStore

PAGE = 4096
PAGES = 192
KEY = "4711-123456"
LIFE_S_MEAN = 0.06  # it takes half of that to open and read everything, or ten times as long where others want the CPU
OPEN_S_MAX = 60.0
DISCARDED = 1 << 40  # in place of a version
COUNTED = ("lives", "read", "written", "discarded", "moved")


class Truth:
    """What the successor has to find, in memory that outlives the process that is killed: for each page the version that is
    written (0: it need not be there) and the one that is being written."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, 8 * (2 * PAGES + 1 + len(COUNTED)))).cast("Q")
        self.written = self._words[:PAGES]
        self.under_way = self._words[PAGES : 2 * PAGES]
        self._rest = self._words[2 * PAGES :]

    def next_version(self) -> int:
        self._rest[0] += 1
        return self._rest[0]

    def count(self, what: str, by: int = 1) -> None:
        self._rest[1 + COUNTED.index(what)] += by

    def changed(self) -> int:
        return self.counts()["written"] + self.counts()["discarded"]

    def counts(self) -> dict[str, int]:
        return dict(zip(COUNTED, self._rest[1:], strict=True))


def content(page: int, version: int) -> bytes:
    head = page.to_bytes(8, "little") + version.to_bytes(8, "little")
    noise = random.Random(version << 32 | page).randbytes(PAGE // 4)
    return (head + noise).ljust(PAGE, b"\0")


def check(truth: Truth, page: int, record: bytes | None) -> None:
    written, under_way = truth.written[page], truth.under_way[page]
    version = int.from_bytes(record[8:16], "little") if record else 0
    if record is not None and record != content(page, version):
        raise AssertionError(f"page {page}: bytes that nobody wrote there, version {version}")
    if written and under_way != DISCARDED and version not in (written, under_way):
        raise AssertionError(f"page {page}: version {written} was written, {version} is there")


async def live(make: Callable[[], ObjectStore], truth: Truth, seed: int) -> None:
    """Read everything, then write and discard until killed."""
    rng = random.Random(seed)
    store = make()
    space = await store.open(KEY, PAGES, PAGE)
    for page, record in enumerate(await space.read(0, PAGES)):
        check(truth, page, record)
        truth.count("read")
        if truth.under_way[page]:  # the caller's own table says that it does not count
            truth.written[page] = truth.under_way[page] = 0
    truth.count("lives")
    async with (
        trio.open_nursery() as nursery
    ):  # the halves of the guest, so that one is cleaned while the other is written
        for first in (0, PAGES // 2):
            nursery.start_soon(change, space, truth, random.Random(rng.random()), range(first, first + PAGES // 2))


async def change(space: ObjectSpace, truth: Truth, rng: random.Random, whole: range) -> None:
    """Write and discard some of these pages, for ever."""
    while True:
        first = rng.choice(whole)
        pages = range(first, min(first + rng.choice((1, 4, 16, 40)), whole.stop))
        version = truth.next_version() if rng.random() < 0.75 else DISCARDED
        for page in pages:
            truth.under_way[page] = version
        if version == DISCARDED:
            await space.discard(first, len(pages))
            truth.count("discarded", len(pages))
        else:
            await space.write(first, [content(page, version) for page in pages])
            truth.count("written", len(pages))
        for page in pages:
            truth.written[page] = 0 if version == DISCARDED else version
            truth.under_way[page] = 0
        look = rng.choice(whole)
        check(truth, look, (await space.read(look, 1))[0])


def child(make: Callable[[], ObjectStore], truth: Truth, seed: int) -> None:
    moved = ObjectStore.in_thread

    async def counted(self: ObjectStore, call: object, *args: object) -> object:
        if getattr(call, "__name__", "") == "_live_in" and args[0]:
            truth.count("moved")
        return await moved(self, call, *args)  # type: ignore[arg-type]

    ObjectStore.in_thread = counted  # type: ignore[method-assign, assignment]
    try:
        trio.run(partial(live, make, truth, seed))
    except BaseException as error:
        print(f"seed {seed}: {error!r}", flush=True)
    os._exit(1)  # a life ends by a kill


def wait_changed(truth: Truth, pid: int) -> None:
    """Until the child has, or has ended."""
    before, until = truth.changed(), time.monotonic() + OPEN_S_MAX
    while truth.changed() == before and time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


@click.command()
@click.option("--kills", default=300)
@click.option("--seed", default=1)
@click.argument("disk", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
def main(kills: int, seed: int, disk: Path, directory: Path) -> None:
    rng = random.Random(seed)
    options = ObjectOptions(scheme="fs", options={"root": str(disk / "objects")}, segment_bytes=64 << 10)
    make = partial(ObjectStore, options, directory, "host", "boot")
    truth, rebuilt = Truth(), 0
    for kill in range(kills):
        if rng.random() < 1 / 3:
            (directory / f"{KEY}{INDEX_SUFFIX}").unlink(missing_ok=True)
            rebuilt += 1
        pid = os.fork()
        if pid == 0:
            child(make, truth, seed << 32 | kill)
        if kill % 2:  # it is let look at everything, and change something, however slow the machine is
            wait_changed(truth, pid)
        time.sleep(rng.expovariate(1 / LIFE_S_MEAN))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"kill {kill} of seed {seed}: the successor found something wrong")
    print(json.dumps({"kills": kills, "without_index": rebuilt, **truth.counts()}))


if __name__ == "__main__":
    main()
