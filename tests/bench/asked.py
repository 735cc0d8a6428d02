# SPDX-License-Identifier: Apache-2.0
"""Rows o and p: stores that trio asks, by the real way: a guest's fault, a request, Parking in a trio loop, the store, an
answer, a COPY."""

from __future__ import annotations

import csv
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING

import opendal
import trio

from tests.kernel.vmm import MIB, PAGE
from tests.store.servers import Server
from tierd import cycle
from tierd.parking import Asked, Parking, Turns
from tierd.serve import Served
from tierd.store import PageStore
from tierd.store.asked import AskedSpace, AskedStore
from tierd.store.objects import ObjectOptions, ObjectStore
from tierd.store.redis import RedisStore
from tierd.store.redis_link import RedisOptions

if TYPE_CHECKING:
    from tests.bench.bench import Bench, Load

ADDED_US = 150  # what parking may take, beside the store's own time
CONCURRENCY, DEADLINE_S = 8, 10.0  # the defaults of stores
CLIENTS, PIPELINED = 50, 16  # redis-benchmark's default, and what its manual pipelines


@asynccontextmanager
async def parked(served: Served, store: AskedStore) -> AsyncIterator[Parking]:
    """The guest's requests are answered, as the daemon does it."""
    turns = Turns(CONCURRENCY)
    parking = Parking(served, "1-1", {store.name: store}, lambda _: turns)
    (tier,) = served.tiers.values()
    assert isinstance(tier.space, AskedSpace)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parking.run)
        while not tier.space.ready:
            await trio.sleep(0.01)
        yield parking
        nursery.cancel_scope.cancel()
    await parking.close(delete=True)


@contextmanager
def asked_store(bench: Bench, name: str, pages: PageStore, encrypt: bool = True) -> Iterator[AskedStore]:
    keys = bench.shm / "keys"
    keys.mkdir(exist_ok=True)
    yield AskedStore(
        name,
        pages,
        keys,
        capacity_bytes=None,
        encrypt=encrypt,
        second=None,
        concurrency=CONCURRENCY,
        deadline_s=DEADLINE_S,
    )


def evict(served: Served, asked: Asked | None = None) -> float:
    """Everything that was not touched since a scan. MiB/s."""
    cycle.scan_and_deactivate(served.native, cycle.Phases(), lambda: None)
    began = monotonic()
    moved = cycle.evict(
        served.native,
        min_idle_s=0,
        max_bytes=1 << 50,
        tiers=[1],
        hold_ms_max=20,
        phases=cycle.Phases(),
        check=lambda: None,
        asked=asked,
    )
    return moved / MIB / (monotonic() - began)


def come_back(load: Load, served: Served, asked: Asked) -> None:
    """All pages to the guest, and out of the store."""
    load.ask("walk")
    cycle.discard_fetched(served.native, cycle.Phases(), lambda: None)
    cycle.discard_asked(served.native, 1, asked, lambda: None)


async def one_read(parking: Parking, pages: int, count: int) -> float:
    """p50 of a read of one page as a fault makes it, of the store, with what decrypts and decompresses. us."""
    took = []
    for n in range(count):
        page = n * 7919 % pages
        began = perf_counter_ns()
        (record,) = await parking._spaces[1].read(page, 1)
        took.append((perf_counter_ns() - began) / 1000)
        assert record
    return median(took)


async def rounds(
    bench: Bench,
    row: str,
    store: AskedStore,
    times: int,
    bare_read: Callable[[], float],
    bare_write: Callable[[], float],
) -> dict[str, list[float]]:
    """Interleaved: eviction and faults of the guest (MiB/s, us), beside what `bare_write` and `bare_read` say."""
    size = (32 if bench.quick else 64) * MIB
    count = size // PAGE // 16
    found: dict[str, list[float]] = {"evict": [], "bare write": [], "fault": [], "read": [], "bare read": []}
    in_thread = trio.to_thread.run_sync
    with bench.load(size) as load:
        load.ask("fill")
        with bench.served(load, "follow", store=store) as served:
            async with parked(served, store) as parking:
                asked = Asked(parking)
                for i in range(times):
                    bench.tell(f"{row}: pair {i + 1} of {times}")
                    found["evict"].append(await in_thread(evict, served, asked))
                    found["bare write"].append(await in_thread(bare_write))
                    found["read"].append(await one_read(parking, size // PAGE, count))
                    p50_ns, _ = await in_thread(load.ask, "random", count)
                    found["fault"].append(p50_ns / 1000)
                    found["bare read"].append(await in_thread(bare_read))
                    await in_thread(come_back, load, served, asked)
    return found


# --- o: Redis -----------------------------------------------------------------------------------------------------------


def redis_benchmark(server: Server, *words: object) -> float:
    """Requests a second."""
    command = ["redis-benchmark", "-p", server.port, "-d", PAGE, "--csv", *words]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    (figures,) = csv.DictReader(done.stdout.splitlines())
    return float(figures["rps"])


def row_o(bench: Bench) -> None:
    """The server syncs every write to its disk, also under redis-benchmark, and everything is encrypted."""
    pages = (32 if bench.quick else 64) * MIB // PAGE

    def bare_read() -> float:
        return bench.bare("get", server.port, pages, pages // 16)[0] / 1000

    def bare_write() -> float:
        words = ("-t", "set", "-c", CLIENTS, "-P", PIPELINED, "-n", pages, "-r", pages, "--dbnum", 1)
        rate = redis_benchmark(server, *words) * PAGE / MIB
        server.ask("EVAL", "redis.call('SELECT', 1) return redis.call('FLUSHDB')", 0)
        return rate

    with Server() as server:
        options = RedisOptions(addresses=(server.address,), concurrency=CONCURRENCY, deadline_s=DEADLINE_S)
        with asked_store(bench, "redis", RedisStore(options, "b" * 16)) as store:
            found = trio.run(rounds, bench, "o", store, bench.pairs, bare_read, bare_write)
    limit = median(found["bare read"]) + ADDED_US
    bench.add("o fault from redis p50", "us", median(found["fault"]), limit, 1.0)
    bench.add("o eviction into redis", "MiB/s", median(found["evict"]), median(found["bare write"]), 0.6, at_least=True)


# --- p: objects ---------------------------------------------------------------------------------------------------------


def bare_range_read(root: Path, count: int) -> float:
    """p50 of OpenDAL's reads of a page out of the segments, by the thread that wants it. us."""
    operator = opendal.Operator("fs", root=str(root))
    paths = [(path.relative_to(root), path.stat().st_size // PAGE) for path in root.rglob("1-1.*")]
    took = []
    for n in range(count):
        path, pages = paths[n % len(paths)]
        began = perf_counter_ns()
        operator.read(str(path), offset=n * 7919 % pages * PAGE, size=PAGE)
        took.append((perf_counter_ns() - began) / 1000)
    return median(took)


def row_p(bench: Bench) -> None:
    """In a directory, beside the file store and OpenDAL's own read of a range; from the page cache. Eviction also beside a bare
    program that reads out, compresses, encrypts, writes files and drops."""
    size, out = (32 if bench.quick else 64) * MIB, []
    root = bench.disk / "objects"
    root.mkdir(mode=0o700)
    objects = ObjectStore(
        ObjectOptions(scheme="fs", options={"root": str(root)}), bench.shm / "objects", "host", "boot"
    )
    with bench.load(size) as load, bench.served(load, readahead=64, direct="on") as plain:
        load.ask("fill")

        def bare_write() -> float:
            rate = evict(plain)
            load.ask("walk")
            cycle.discard_fetched(plain.native, cycle.Phases(), lambda: None)
            with tempfile.TemporaryDirectory(dir=bench.disk) as directory:
                out.append(size / MIB / (bench.bare("objects", size, directory)[0] / 1e9))
            return rate

        with asked_store(bench, "objects", objects) as store:
            found = trio.run(
                rounds, bench, "p", store, bench.pairs, lambda: bare_range_read(root, size // PAGE // 16), bare_write
            )
    read, fault = median(found["bare read"]), median(found["fault"])
    bench.add("p one-page read from objects p50", "us", median(found["read"]), read, 1.5)
    bench.add("p fault from objects p50", "us", fault, median(found["read"]) + ADDED_US, 1.0)
    rate = median(found["evict"])
    bench.add("p eviction into objects", "MiB/s", rate, median(found["bare write"]), 0.7, at_least=True)
    bench.add("p the same, beside libraries and files", "MiB/s", rate, median(out), 0.5, at_least=True)
