# SPDX-License-Identifier: Apache-2.0
"""One cycle of one guest, as straight-line code: the order of the steps is visible here and nowhere else.

    scan -> deactivate what was touched -> (policy) -> per batch: select, hold, copy, write, drop, release
         -> (policy) -> per batch that sinks from one tier to the next: select, copy, write, drop -> discard

While one batch is written to a store, the next one is on its way there.

With an engine that has a sync mode the copy is made before the hold, so that the guest is held for the punches only: per
batch select, copy, write, and then windows, each of which holds (sync mode, and a look whether the copy is still right),
drops and releases.

Private anonymous memory goes through a staging area in the VMM: pages are moved there, and evicted from there: select, copy,
write, drop. Where the engine sees only writes, what was not written lately is moved and waits for somebody to read it; what
nobody fetches back for long enough is cold.

Seen from a page that is the loop of the design: deactivated, slept on for the interval, scanned, held, evicted, released.
Only pages found present are deactivated again, so no access falls between a scan and the next deactivation (scan.c).
Everything here runs in the guest's one worker thread and blocks (but an eviction has threads of its own for what it stores); a
call covers a bounded stretch, and between calls `check` may raise to cancel.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from tierd.native import (
    GIGANTIC_BYTES,
    GUEST_TIER,
    STAGING_TIER,
    BatchResult,
    KernelError,
    NativeBatch,
    NativeGuest,
    Span,
    Staged,
)
from tierd.regions import Regions

BATCH_BYTES = 2 << 20  # a large folio, which leaves whole; of anonymous memory, a stop of a thread of the VMM
BATCH_PAGES_MIN = 4  # huge ones
BATCHES = 2  # of an eviction, at a time: their memory is locked (GUEST_LOCKED_BYTES)
ASKED_BATCHES = 4  # to a store that may be far away, where as much more may be locked
PHASES = ("scan", "deactivate", "stage", "select", "hold", "copy", "write", "drop", "release", "demote", "discard")
GARBAGE_PAGES, GARBAGE_RUNS = 1 << 16, 256  # told to a store at a time
COMPACT_PAGES, COMPACT_CALLS = 4096, 16  # of a pool, at a time; and so often in a cycle
STAGE_AFTER_INTERVALS = 2  # not written for so many, and for min_idle_s: the page may be cold
STOPS_SHARE = 0.2  # of the time of the thread that is stopped
STOPS_IN_VAIN_MAX = 20

Done = TypeVar("Done", Staged, BatchResult)


class CutShort(Exception):
    """Raised by `check`: an order wants the worker. Nothing is left half done."""


class Asked(Protocol):
    """The stores that Python asks, for the worker: these calls block. Runs are (first page, their bytes or how many).
    KernelError, with the number of the tier that failed: others of the runs may be done."""

    def write(self, tier: int, runs: Sequence[tuple[int, Sequence[bytes]]]) -> None:
        """Durable when it returns."""
        ...

    def read(self, tier: int, runs: Sequence[tuple[int, int]]) -> list[list[bytes | None]]: ...
    def discard(self, tier: int, runs: Sequence[tuple[int, int]]) -> None: ...


@dataclass
class Phases:
    """Seconds spent in each phase since the guest was attached; written by the worker, read by anyone."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    def add_batch(self, r: BatchResult) -> None:
        for name in ("select", "hold", "copy", "write", "drop", "release"):
            self.seconds[name] += getattr(r, f"{name}_ns") / 1e9


@dataclass(frozen=True)
class Touched:
    """What a pass over the whole guest found."""

    pages: int
    touched_pages: int


def scan_and_deactivate(guest: NativeGuest, phases: Phases, check: Callable[[], None]) -> Touched:
    """One pass over the guest; its calls are of 64 MiB at most, so that the VMM's mmap_lock is never held for long."""
    page = touched = 0
    while page < guest.pages:
        check()
        seen = guest.run_pass(page)
        phases.seconds["scan"] += seen.scan_ns / 1e9
        phases.seconds["deactivate"] += seen.zap_ns / 1e9
        touched += seen.touched_pages
        page = seen.next_page
    return Touched(guest.pages, touched)


@dataclass
class Staging:
    """What a cycle moves into the staging area, and what the last ones have cost. The worker's own."""

    regions: Regions | None = None  # None: not begun
    faults: int = 0
    latency_count: int = 0
    latency_sum_ns: int = 0
    began: float | None = None  # the last cycle

    @classmethod
    def whole(cls, guest: NativeGuest) -> Staging:
        """Everything in one cycle, however many readers that costs."""
        c = guest.counters()
        guest.refaults(0, guest.pages)
        return cls(Regions.whole(guest.pages), c["faults_staged"], c["latency_count"], c["latency_sum_ns"])

    def adapt(self, guest: NativeGuest, stall_budget: float, elapsed_s: float) -> Regions:
        """After a cycle of `elapsed_s`, of which refaults may cost the guest `stall_budget` (a share)."""
        c = guest.counters()
        faults, count = c["faults_staged"] - self.faults, c["latency_count"] - self.latency_count
        mean_s = (c["latency_sum_ns"] - self.latency_sum_ns) / 1e9 / count if count else 0.0
        self.faults, self.latency_count, self.latency_sum_ns = (
            c[name] for name in ("faults_staged", "latency_count", "latency_sum_ns")
        )
        if self.regions is None:
            self.regions = Regions.first(guest.pages)
            guest.refaults(0, guest.pages)
        elif elapsed_s:
            refaults = [guest.refaults(region.first_page, region.pages) for region in self.regions.regions]
            self.regions.adapt(refaults, faults * mean_s / (stall_budget * elapsed_s))
        return self.regions


def stage(
    guest: NativeGuest,
    staging: Staging,
    *,
    interval_s: float,
    min_idle_s: float,
    stall_budget: float,
    phases: Phases,
    check: Callable[[], None],
) -> int:
    """Of anonymous memory whose readers are not seen otherwise: move pages into the staging area. Returns pages moved."""
    began = time.monotonic()
    elapsed_s = interval_s if staging.began is None else began - staging.began
    staging.began = began
    regions = staging.adapt(guest, stall_budget, elapsed_s).begin_cycle()
    # what reads it from there reads a copy: it must outlast any I/O that does not hold the page by a pin (rule 8)
    idle_s = max(STAGE_AFTER_INTERVALS * interval_s, min_idle_s)
    left = {region.first_page: region.pages for region in regions}  # to look at in this cycle
    moved = in_vain = 0
    while regions and in_vain < STOPS_IN_VAIN_MAX:
        check()
        spans = [Span(r.page, min(r.end_page, r.page + left[r.first_page]), r.credit_pages) for r in regions]
        done = _spaced(guest.stage(spans, idle_s))
        moved += done.staged_pages
        in_vain += 1  # the thread got no CPU in its time
        for region, span, seen in zip(regions, spans, done.spans, strict=True):
            if seen.next_page > span.next_page:
                in_vain = 0
            left[region.first_page] -= seen.next_page - span.next_page
            region.look_on(seen.next_page, seen.selected_pages, seen.staged_pages)
        regions = [r for r in regions if r.credit_pages > 0 and left[r.first_page] > 0]
    phases.seconds["stage"] += time.monotonic() - began
    return moved


def unstage(guest: NativeGuest, check: Callable[[], None]) -> None:
    """Give back room in the staging area whose pages were fetched."""
    page = 0
    while page < guest.pages:
        check()
        page = _spaced(guest.unstage(page)).next_page


def _spaced(done: Done) -> Done:
    """After a stop the thread has some time for itself."""
    if done.stopped_ns:
        time.sleep(done.stopped_ns / 1e9 * (1 / STOPS_SHARE - 1))
    return done


@dataclass(frozen=True)
class Moved:
    """What became of a batch."""

    pages: int
    next_page: int


def _take(
    batch: NativeBatch, first_page: int, min_idle_s: float, max_pages: int, tiers: Sequence[int], phases: Phases
) -> Moved:
    """The first half of a batch's way out: select, hold, copy. Pages that may be written."""
    guest, end = batch.guest, None
    if guest.anonymous and not guest.waits_for_readers:
        # out of the staging area. Where reads are seen, an idle page only passes through it
        began = time.monotonic()
        idle = Span(first_page, guest.pages, min(max_pages, batch.max_pages))
        end = _spaced(guest.stage([idle], min_idle_s)).spans[0].next_page
        phases.seconds["stage"] += time.monotonic() - began
        min_idle_s = 0.0
    selected = batch.select(STAGING_TIER if guest.anonymous else GUEST_TIER, first_page, min_idle_s, max_pages, tiers)
    phases.add_batch(selected)
    if selected.selected_pages:
        if not guest.anonymous and not guest.has_sync_mode:
            phases.add_batch(batch.hold())  # LEAVING came first: a fault in between takes the page back
        # with a sync mode the guest may touch these pages meanwhile: the window sees who was. In the staging area nobody
        # writes; who reads takes the page back
        phases.add_batch(batch.copy())
    # a large page may have brought more into the staging area than the batch takes
    return Moved(selected.selected_pages, selected.next_page if end is None else min(end, selected.next_page))


def _store(batch: NativeBatch, tiers: Sequence[int], asked: Asked | None) -> float:
    """What write has offered is stored durably. In any thread. Seconds."""
    began = time.monotonic()
    batch.store()
    for tier in tiers:
        if tier in batch.guest.asked_tiers:
            assert asked is not None
            try:
                asked.write(tier, [(run.page, batch.pages_of(run, tier)) for run in batch.runs(tier)])
            except KernelError as error:
                if error.errno != errno.ECANCELED:  # else it is the guest that ends
                    batch.guest.write_failed(tier, error.errno or errno.EIO)
                raise
    return time.monotonic() - began


@dataclass(frozen=True)
class _Storing:
    """A batch that a thread stores: at most so many pages."""

    batch: NativeBatch
    pages: int
    seconds: Future[float]

    def wait(self, phases: Phases) -> NativeBatch:
        """Until it is stored. KernelError: it is not."""
        phases.seconds["write"] += self.seconds.result()
        self.batch.stored()
        return self.batch


def _drop(batch: NativeBatch, hold_ms_max: float, phases: Phases) -> int:
    """The last steps of a batch that is stored. Pages evicted."""
    evicted_pages = 0
    while batch.guest.has_sync_mode:
        done = batch.window(hold_ms_max)
        phases.add_batch(done)
        evicted_pages += done.evicted_pages
        if not done.left_pages:
            return evicted_pages
    try:
        dropped = batch.drop()
        phases.add_batch(dropped)
    finally:
        phases.add_batch(batch.release())  # a punch wakes nobody, this does
    return _spaced(dropped).evicted_pages


def _batch(guest: NativeGuest) -> NativeBatch:
    fewest = BATCH_PAGES_MIN if guest.page_bytes < GIGANTIC_BYTES else 1
    return guest.batch(max(BATCH_BYTES // guest.page_bytes, fewest))


def evict(
    guest: NativeGuest,
    *,
    min_idle_s: float,
    max_bytes: int,
    tiers: Sequence[int],
    hold_ms_max: float,
    phases: Phases,
    check: Callable[[], None],
    keep: Collection[int] = (),
    bytes_per_s: float | None = None,
    asked: Asked | None = None,
) -> int:
    """Evict pages idle at least `min_idle_s`, at most `max_bytes` of them, at `bytes_per_s`, to the first of `tiers` that takes
    each, or to that of `keep` which has a copy of it that is right still. Returns bytes evicted. `hold_ms_max`: of a sync window,
    where the engine has any. On KernelError what was being stored has left, if it could; whatever else is raised: batches under
    way are cancelled, nothing that was not yet dropped leaves."""
    page_bytes = guest.page_bytes
    max_pages = max_bytes // page_bytes
    page = evicted_pages = 0
    began = time.monotonic()
    storing: deque[_Storing] = deque()
    with ExitStack() as stack:
        batches = [stack.enter_context(_batch(guest)) for _ in range(BATCHES if page_bytes < GIGANTIC_BYTES else 1)]
        with suppress(KernelError):  # no more may be locked
            while guest.asked_tiers.intersection(tiers) and len(batches) < ASKED_BATCHES:
                batches.append(stack.enter_context(_batch(guest)))
        free = list(batches)
        threads = stack.enter_context(ThreadPoolExecutor(len(batches)))
        try:
            while True:
                check()
                room = max_pages - evicted_pages - sum(each.pages for each in storing)
                if free and page < guest.pages and room > 0:
                    taken = _take(free[-1], page, min_idle_s, room, tiers, phases)
                    page = taken.next_page
                    if not taken.pages:
                        continue
                    batch = free.pop()
                    # each page to the first of `tiers` that takes it
                    keep = [tier for tier in keep if _still_has(batch, tier, asked)]
                    written = batch.write(tiers, keep)
                    phases.add_batch(written)
                    if written.offered_pages:
                        storing.append(_Storing(batch, taken.pages, _begin(threads, _store, batch, tiers, asked)))
                        continue
                elif storing:
                    batch = storing.popleft().wait(phases)
                else:
                    break
                evicted_pages += _drop(batch, hold_ms_max, phases)
                free.append(batch)
                _pace(evicted_pages * page_bytes, bytes_per_s, began)
        except KernelError as error:
            with suppress(KernelError):  # the first one is told
                for batch in batches:  # nobody is held any longer
                    if all(each.batch is not batch for each in storing):
                        batch.cancel()
                while storing:
                    evicted_pages += _drop(storing.popleft().wait(phases), hold_ms_max, phases)
            error.moved_bytes = evicted_pages * page_bytes
            raise
    return evicted_pages * page_bytes


def _still_has(batch: NativeBatch, tier: int, asked: Asked | None) -> bool:
    """Whoever only relies on a store that is asked would not notice that it is gone: so one page of it is read. If it does not
    have that one, it may have lost any."""
    page = batch.unchanged(tier) if tier in batch.guest.asked_tiers else None
    if page is None:
        return True
    assert asked is not None
    failed = errno.EBADMSG
    try:
        ((found,),) = asked.read(tier, [(page, 1)])
    except KernelError as error:
        found, failed = None, error.errno or errno.EIO
    if found is not None and batch.guest.is_right(page, found):
        return True
    if failed != errno.ECANCELED:  # else it is the guest that ends
        batch.guest.read_failed(tier, failed)
    batch.guest.unclean(tier)
    return False


def _begin(threads: ThreadPoolExecutor, call: Callable[..., float], *args: object) -> Future[float]:
    try:
        return threads.submit(call, *args)
    except RuntimeError as error:  # a thread that is there already may make the call all the same, before it is joined
        raise OSError(errno.EAGAIN, f"no thread to store pages with: {error}; see to TasksMax and pids.max") from error


def _pace(done_bytes: int, bytes_per_s: float | None, began: float) -> None:
    if bytes_per_s:
        ahead_s = done_bytes / bytes_per_s - (time.monotonic() - began)
        time.sleep(min(max(ahead_s, 0.0), 1.0))


def _supply(batch: NativeBatch, from_tier: int, asked: Asked | None) -> None:
    """Out of a tier that is asked, its bytes. What it does not have stays there, and is counted: a fault, or the next try, may
    say so, too."""
    assert asked is not None
    guest, runs = batch.guest, list(batch.runs())
    try:
        found = _readable(asked, from_tier, [(run.page, run.count) for run in runs])
    except KernelError as error:
        if error.errno != errno.ECANCELED:  # else it is the guest that ends
            guest.read_failed(from_tier, error.errno or errno.EIO)
        raise
    for run, pages in zip(runs, found, strict=True):
        for i, page in enumerate(pages):
            if page is not None and len(page) == guest.page_bytes:
                batch.supply(run.slot + i, [page])
            else:
                guest.read_failed(from_tier, errno.EBADMSG)


def _readable(asked: Asked, tier: int, runs: Sequence[tuple[int, int]]) -> list[list[bytes | None]]:
    """One page that is damaged must not keep the others from sinking: None stands for it."""
    try:
        return asked.read(tier, runs)
    except KernelError as error:
        if error.errno != errno.EBADMSG:
            raise
    if len(runs) > 1:
        return [_readable(asked, tier, [run])[0] for run in runs]
    page, count = runs[0]
    if count == 1:
        return [[None]]
    halves = [(page, count // 2), (page + count // 2, count - count // 2)]
    return [[found for half in halves for found in _readable(asked, tier, [half])[0]]]


def demote_batch(
    batch: NativeBatch,
    from_tier: int,
    first_page: int,
    min_idle_s: float,
    max_pages: int,
    tiers: Sequence[int],
    asked: Asked | None = None,
) -> Moved:
    """The way of a batch from one tier to the first of `tiers` that takes each page. A fault takes its page from wherever it
    is, at any step. On KernelError the batch is cancelled: its pages stay in `from_tier`."""
    try:
        selected = batch.select(from_tier, first_page, min_idle_s, max_pages, tiers)
        if not selected.selected_pages:
            return Moved(0, selected.next_page)
        if from_tier in batch.guest.asked_tiers:
            _supply(batch, from_tier, asked)
        batch.copy()  # verified: what the tier gives wrong is not passed on
        if batch.write(tiers).offered_pages:
            _store(batch, tiers, asked)
            batch.stored()
        dropped = batch.drop()  # the word says the new tier, then space in the old one is given back
        batch.release()
    except OSError:
        batch.cancel()
        raise
    return Moved(dropped.evicted_pages, selected.next_page)


def demote(
    guest: NativeGuest,
    from_tier: int,
    tiers: Sequence[int],
    *,
    min_idle_s: float,
    max_bytes: int,
    phases: Phases,
    check: Callable[[], None],
    bytes_per_s: float | None = None,
    asked: Asked | None = None,
) -> int:
    """Move pages idle at least `min_idle_s` from one tier to those below, at most `max_bytes` of guest memory, at
    `bytes_per_s`. Returns bytes of guest memory that were."""
    page, done_pages, began = 0, 0, time.monotonic()
    page_bytes = guest.page_bytes
    max_pages = max_bytes // page_bytes
    with _batch(guest) as batch:
        while page < guest.pages and done_pages < max_pages:
            check()
            try:
                done = demote_batch(batch, from_tier, page, min_idle_s, max_pages - done_pages, tiers, asked)
            except KernelError as error:
                error.moved_bytes = done_pages * page_bytes
                raise
            done_pages += done.pages
            page = done.next_page
            _pace(done_pages * page_bytes, bytes_per_s, began)
    phases.seconds["demote"] += time.monotonic() - began
    return done_pages * page_bytes


def compact(guest: NativeGuest, check: Callable[[], None]) -> None:
    """Of the guest's pool, until nothing is to be gained, or until the next cycle."""
    for _ in range(COMPACT_CALLS):
        check()
        if not guest.compact(COMPACT_PAGES):
            return


def discard_asked(guest: NativeGuest, tier: int, asked: Asked, check: Callable[[], None]) -> None:
    """Tell a tier that is asked what it need not keep any more."""
    page = 0
    while runs := _garbage_runs(guest, tier, page):
        check()
        asked.discard(tier, runs)
        for first_page, count in runs:
            guest.garbage_gone(tier, first_page, count)
            page = first_page + count


def _garbage_runs(guest: NativeGuest, tier: int, page: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    while len(runs) < GARBAGE_RUNS:
        page, count = guest.garbage(tier, page, GARBAGE_PAGES)
        if not count:
            break
        runs.append((page, count))
        page += count
    return runs


def discard_fetched(
    guest: NativeGuest,
    phases: Phases,
    check: Callable[[], None],
    keep: Collection[int] = (),
    max_pages: int = 1 << 18,
) -> int:
    """Give back store space of pages that were fetched since the last cycle; in tiers of `keep`, of those that were written to
    since. Returns pages."""
    check()
    began = time.monotonic()
    pages = guest.discard(max_pages, keep)
    phases.seconds["discard"] += time.monotonic() - began
    return pages
