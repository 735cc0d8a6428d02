# SPDX-License-Identifier: Apache-2.0
"""Private anonymous guest memory: it leaves by way of a staging area in the VMM, whose own thread makes the calls."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.host_memory import scratch_swap, swapped_kb
from tests.kernel.test_kill import check
from tests.kernel.torture import torture
from tests.kernel.vmm import MIB, PAGE, SAFE, Host, Tiered, Vmm, need_anonymous, userfaultfds, vm_flags, wait_for
from tests.need import need
from tierd import cycle
from tierd.attach import Refused
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import preflight, recheck
from tierd.attach.procfs import grown
from tierd.attach.ptrace import NUMBER, map_staging
from tierd.config import Policy
from tierd.engine.stock import IDLE_BITMAP, StockEngine
from tierd.native import STAGING_TIER, KernelError, Span, probe
from tierd.native.inject import inject
from tierd.serve import Stale

Start = Callable[..., Vmm]
KILLS = int(os.environ.get("TIERD_KILLS", "0"))
KSM = Path("/sys/kernel/mm/ksm")
LARGE_PAGE = 2 * MIB
PAGES = 1024  # of a region
SHORT_S = 0.05  # an interval
READ_S = 0.1  # after so long without a write it is looked whether a page is read


@pytest.fixture(scope="module", autouse=True)
def able(kernel: None) -> None:
    need_anonymous()


@pytest.fixture
def vmm(start_vmm: Start) -> Vmm:
    """Two regions of 1024 pages, filled; the pages from 100 on are zeros, 50 of them."""
    vmm = start_vmm(f"bytes={PAGES * PAGE}", "regions=2", "kind=anonymous")
    vmm.ask("fill")
    vmm.ask("zero", 100, 50)
    return vmm


def memory_map(pid: int) -> list[str]:
    """Mappings without what tells only how large they are in memory; two that touch and are alike are one."""
    found: list[list[str]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, mode, _offset, *rest = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        if found and found[-1][1:] == [start, mode, *rest] and rest[1] == "0":
            found[-1][1] = end
        else:
            found.append([start, end, mode, *rest])
    return [" ".join(each) for each in found]


def anon_rss_kb(vmm: Vmm) -> int:
    match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{vmm.pid}/status").read_text(), re.M)
    assert match
    return int(match[1])


def no_trouble(tiered: Tiered) -> None:
    c = tiered.counters()
    assert c["kernel_errors"] == c["store_read_errors"] == c["checksum_errors"] == c["pages_lost"] == 0


def large_kb(vmm: Vmm) -> int:
    """Of its anonymous memory, mapped by large entries."""
    rows = Path(f"/proc/{vmm.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("AnonHugePages:"))


# --- there and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readahead_pages", [1, 16])
def test_everything_leaves_and_comes_back(vmm: Vmm, host: Host, readahead_pages: int) -> None:
    before_kb = anon_rss_kb(vmm)
    with host.attached(vmm, readahead_pages=readahead_pages) as tiered:
        assert tiered.served.resident_bytes() == vmm.pages * PAGE
        tiered.evict_all()
        c = tiered.counters()
        assert c["state_pages"][4] == vmm.pages
        assert c["pages_evicted_zero"] == c["tier_pages"][0] == 50
        assert c["tier_pages"][1] == vmm.pages - 50
        assert c["pages_staged"] >= vmm.pages
        assert tiered.served.resident_bytes() == 0
        assert anon_rss_kb(vmm) <= before_kb - (vmm.pages * PAGE >> 10) + 256, "memory is given back, not only moved"
        vmm.verify()
        wait_for(lambda: tiered.counters()["pages_fetched"] >= vmm.pages, "every page was fetched")
        c = tiered.counters()
        assert c["state_pages"][0] == vmm.pages
        assert c["faults_staged"] == 0
        assert c["faults_fetch"] > 0
        tiered.discard()
        assert tiered.served.tiers["file"].space.used_bytes() == 0
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


def test_written_without_being_read_before(vmm: Vmm, host: Host) -> None:
    """To a staged page, to a stored one, to one of zeros, to one that was never used."""
    with host.attached(vmm) as tiered:
        for _ in range(3):
            tiered.evict_all()
            vmm.ask("fill", 0, PAGES // 2)
            vmm.ask("zero", 200, 20)
            vmm.verify()
            tiered.stage()
            vmm.ask("fill", PAGES // 3, PAGES)
            vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


def test_a_staged_page_that_is_read_comes_back_without_the_store(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        assert tiered.stage() == vmm.pages == tiered.staged_pages
        assert tiered.counters()["tier_pages"][STAGING_TIER] == tiered.stored_pages
        assert tiered.served.resident_bytes() == vmm.pages * PAGE, "it is the host's still"
        vmm.verify()
        wait_for(lambda: tiered.counters()["pages_fetched"] >= vmm.pages, "every page was fetched")
        c = tiered.counters()
        assert c["faults_staged"] > 0
        assert c["faults_fetch"] == c["tier_pages"][STAGING_TIER] == 0
        assert c["pages_evicted"] == 0
        assert c["spent_pages"] == vmm.pages, "their room there is not given back yet"
        assert tiered.served.tiers["file"].space.used_bytes() == 0
        tiered.stage()
        assert tiered.staged_pages == vmm.pages, "a second time, into the same room"
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


def test_what_is_read_again_and_again_is_left_alone_for_longer(vmm: Vmm, host: Host) -> None:
    """Each time twice as long; that its neighbours leave takes back one of these times, not one for each of them."""

    def until_staged(least: int) -> None:
        wait_for(lambda: tiered.stage(READ_S / 2) >= least, "it is staged")

    with host.attached(vmm) as tiered:
        until_staged(vmm.pages)
        waited_s = []
        for last in (False, False, False, True):
            began = time.monotonic()  # not later: it may be a while until we go on
            vmm.ask("verify", 0, 1)
            if last:
                assert tiered.evict(stage=False) == vmm.pages - 1
            until_staged(1)
            waited_s.append(time.monotonic() - began)
        assert waited_s[0] >= 2 * READ_S
        assert waited_s[1] >= 4 * READ_S
        assert waited_s[2] >= 8 * READ_S
        assert waited_s[3] >= 8 * READ_S, "of sixteen"
        vmm.verify()
        tiered.leave()


def test_room_in_the_staging_area_is_given_back(vmm: Vmm, host: Host) -> None:
    before_kb = anon_rss_kb(vmm)
    with host.attached(vmm) as tiered:
        tiered.stage()
        vmm.verify()
        wait_for(lambda: tiered.counters()["spent_pages"] == vmm.pages, "every page was fetched")
        page = 0
        while page < tiered.native.pages:
            page = tiered.native.unstage(page).next_page
        assert tiered.counters()["spent_pages"] == 0
        assert anon_rss_kb(vmm) <= before_kb + 256
        vmm.verify()
        tiered.leave()


def test_what_was_never_used_is_not_moved(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous")
    vmm.ask("fill", 0, 64)
    with host.attached(vmm) as tiered:
        assert tiered.counters()["untouched_pages"] == vmm.pages - 64
        tiered.evict_all()
        assert tiered.counters()["pages_staged"] == 64
        vmm.ask("fill", 512, 64)
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_what_is_written_again_and_again_stays(vmm: Vmm, host: Host) -> None:
    """By the page table, without anybody having to fetch it: the scan sees who wrote."""
    hot = 256
    vmm.ask("hot", 0, hot)
    with host.attached(vmm) as tiered:
        vmm.ask("run", 20000, 100)

        def cold_gone() -> bool:
            tiered.scan()
            tiered.stage(interval_s=0.3)
            return tiered.staged_pages >= vmm.pages - hot

        wait_for(cold_gone, "the cold part is staged")
        assert tiered.counters()["faults_staged"] < hot / 4
        vmm.ask("stop")
        vmm.verify()


def test_what_is_only_read_stays_where_the_kernel_tracks_idle_pages(vmm: Vmm, host: Host) -> None:
    need(
        "idle-page-tracking", os.path.exists(IDLE_BITMAP), "no idle page tracking; tests/kernels runs this where it is"
    )
    read = 256
    with host.attached(vmm, engine="stock", readahead_pages=1) as tiered:

        def cold_gone() -> bool:
            forget_translations()
            vmm.ask("verify", 0, read)
            tiered.scan()
            tiered.stage(interval_s=SHORT_S)
            return tiered.staged_pages >= vmm.pages - read

        tiered.stage()
        tiered.stage(scan=False)  # as after a stop in which the thread got no CPU
        assert tiered.staged_pages < read / 4, "but for pages that are on no list yet: nothing is known of the others"
        wait_for(cold_gone, "what is not read is staged", 60)
        vmm.ask("verify", 0, read)
        assert tiered.counters()["faults_staged"] < read / 4
        vmm.verify()


def forget_translations() -> None:
    """A CPU that knows a page already does not note in its entry that it was read. What it knows of a process it forgets when it
    has run some others."""
    for cpu in os.sched_getaffinity(0):
        for _ in range(8):
            subprocess.run(["taskset", "-c", str(cpu), "true"], check=True)


def test_a_busy_guest_reads_what_it_wrote(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}", "regions=2", "threads=3", "kind=anonymous")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        vmm.ask("run", 500, 50)
        tiered.cycle_until(vmm.pages, 300)
        _, wrong = vmm.ask("stop")
        assert wrong == 0
        assert tiered.counters()["faults_staged"] > 0
        no_trouble(tiered)
        vmm.verify()
        tiered.leave()
        tiered.served.forget()
    vmm.verify()


COMPACT = Path("/proc/sys/vm/compact_memory")


@contextlib.contextmanager
def compaction() -> Iterator[None]:
    """The kernel moves everybody's pages about meanwhile."""
    over = threading.Event()

    def compact() -> None:
        while not over.is_set():
            COMPACT.write_text("1")

    thread = threading.Thread(target=compact)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_move_that_does_not_count_what_it_moved(start_vmm: Start, host: Host) -> None:
    """Linux 6.18: a page that is being migrated makes the move say EAGAIN to itself, and it forgets to count the next ones."""
    if not COMPACT.exists():
        pytest.skip("this kernel has no compaction (CONFIG_COMPACTION)")
    vmm = start_vmm(f"bytes={32 * MIB}", "kind=anonymous")
    vmm.ask("fill")
    with host.attached(vmm) as tiered, compaction():
        for _ in range(100):
            assert tiered.stage() > 0
            vmm.verify()
        tiered.evict_all()
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_store_that_is_full(vmm: Vmm, host: Host) -> None:
    """What does not fit waits in the staging area, and nothing is lost."""
    with host.attached(vmm, capacity_bytes=512 * PAGE) as tiered:
        tiered.scan()
        with pytest.raises(KernelError) as caught:
            while True:
                tiered.evict()
        assert caught.value.errno == errno.ENOSPC
        assert tiered.staged_pages > 0
        assert tiered.counters()["state_pages"][5] == 0, "nobody stays on the way"
        vmm.verify()
        tiered.leave()
    vmm.verify()


# --- what cannot be moved ---------------------------------------------------------------------------------------------------


def unmovable(tiered: Tiered, pages: int) -> None:
    """So many stay with the guest, are counted, tried again later, and nothing else stays. (A move ends at the first such
    page; it is not tried again at once, and the next move begins behind it.)"""

    def once_more() -> int:
        tiered.scan()
        tiered.stage(interval_s=SHORT_S)
        tiered.evict(stage=False)
        return int(tiered.counters()["pages_unmovable"])

    def all_but_those() -> bool:
        once_more()
        return bool(tiered.counters()["state_pages"][0] == pages and not tiered.staged_pages)

    wait_for(all_but_those, f"all but {pages} pages left")
    before = once_more()
    wait_for(lambda: once_more() >= before + pages, "each of them was tried again")
    assert tiered.counters()["state_pages"][0] == pages


def test_pages_that_a_child_has_too(vmm: Vmm, host: Host) -> None:
    """Its own are gone with it; but the kernel knows that a page is the parent's alone again only when it is written."""
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        vmm.ask("verify", 0, 8)
        wait_for(lambda: tiered.counters()["state_pages"][0] == 8, "they are back")
        vmm.ask("fork")
        unmovable(tiered, 8)
        vmm.ask("verify", 0, 8)
        vmm.ask("end-child")
        unmovable(tiered, 8)
        vmm.ask("fill", 0, 8)
        tiered.evict_all()
        no_trouble(tiered)
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_pages_that_are_pinned(vmm: Vmm, host: Host) -> None:
    """As by VFIO or a registered buffer of io_uring: what begins after the attach is not asked about in mid-cycle."""
    with host.attached(vmm) as tiered:
        vmm.ask("pin", 300, 8)
        with pytest.raises(Refused, match="pinned"):
            recheck(tiered.served.spec, SAFE, HolderScan())
        unmovable(tiered, 8)
        vmm.ask("unpin")
        tiered.evict_all()
        no_trouble(tiered)
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_page_that_a_pipe_refers_to(vmm: Vmm, host: Host) -> None:
    """No pin: the page is moved, and what the pipe has is the page."""
    with host.attached(vmm) as tiered:
        vmm.ask("splice", 77)
        tiered.scan()
        tiered.evict()
        vmm.verify()
        vmm.ask("unsplice")
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


@contextlib.contextmanager
def merging() -> Iterator[None]:
    """KSM at work, on the whole host."""
    need("ksm", KSM.exists(), "this kernel has no KSM (CONFIG_KSM)")
    # smart_scan (since 6.7) passes over what was not merged before, for more and more scans
    wanted = {"pages_to_scan": "10000", "sleep_millisecs": "5", "smart_scan": "0", "run": "1"}
    names = [name for name in wanted if (KSM / name).exists()]
    before = {name: (KSM / name).read_text() for name in names}
    for name in names:
        (KSM / name).write_text(wanted[name])
    try:
        yield
    finally:
        (KSM / "run").write_text("2")  # unmerges what there is
        for name in names:
            (KSM / name).write_text(before[name])


def ksm_pages(vmm: Vmm) -> int:
    """Of the process, that are merged with others."""
    rows = Path(f"/proc/{vmm.pid}/ksm_stat")
    need("ksm", rows.exists(), "this kernel does not say what KSM has merged of a process (Linux 6.0)")
    match = re.search(r"^ksm_merging_pages (\d+)", rows.read_text(), re.M)
    assert match
    return int(match[1])


def test_pages_that_ksm_has_merged(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={PAGES * PAGE}", "kind=anonymous")
    vmm.ask("fill")
    vmm.ask("mergeable", 0, PAGES)
    with host.attached(vmm) as tiered, merging():
        vmm.ask("twin", 512, 8)
        wait_for(lambda: ksm_pages(vmm) >= 8, "KSM has merged them", 120)  # ksmd is a nice process
        unmovable(tiered, 8)
        vmm.verify()
        vmm.ask("fill", 512, 8)  # they are its own again
        vmm.verify()
        tiered.evict_all()
        no_trouble(tiered)
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_region_in_several_mappings(vmm: Vmm, host: Host) -> None:
    """As the VMM's madvise(2) of a part makes them: nothing of it is unmovable."""
    vmm.ask("mergeable", 512, 8)
    with host.attached(vmm) as tiered:
        tiered.scan()
        tiered.stage()
        assert tiered.counters()["pages_unmovable"] == 0
        assert tiered.staged_pages == vmm.pages


def test_across_what_is_registered_piece_by_piece(start_vmm: Start, host: Host) -> None:
    """MISSING comes with the first page of a chunk that leaves; the kernel makes one mapping of two that are alike."""
    chunk = 64 * MIB // PAGE
    vmm = start_vmm(f"bytes={3 * 64 * MIB}", "kind=anonymous")
    vmm.ask("fill", 2 * chunk - 16, 32)
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        assert tiered.counters()["missing_chunks"] == 2
        vmm.ask("fill", chunk - 16, 32)
        vmm.ask("fill", 2 * chunk - 32, 64)
        tiered.scan()
        tiered.evict_all()
        c = tiered.counters()
        assert c["missing_chunks"] == 3
        assert c["pages_unmovable"] == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


# --- large pages ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large_vmm(start_vmm: Start) -> Vmm:
    vmm = start_vmm(f"bytes={3 * LARGE_PAGE}", "kind=anonymous")
    vmm.ask("large")
    vmm.ask("fill")
    need("thp", large_kb(vmm) >= LARGE_PAGE >> 10, "the kernel made no transparent huge page for a madvise(2)")
    return vmm


def test_large_pages_leave_and_come_back(large_vmm: Vmm, host: Host) -> None:
    with host.attached(large_vmm) as tiered:
        for _ in range(2):
            tiered.stage()
            large_vmm.ask("verify", 0, 100)
            tiered.evict_all()
            large_vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    large_vmm.verify()


def test_a_large_page_of_which_a_part_is_cold(large_vmm: Vmm, host: Host) -> None:
    """The guest writes to some pages of each all the time."""
    hot = LARGE_PAGE // PAGE // 2
    large_vmm.ask("hot", 0, hot)
    with host.attached(large_vmm) as tiered:
        large_vmm.ask("run", 10000, 100)

        def cold_gone() -> bool:
            tiered.scan()
            tiered.stage(interval_s=0.3)
            return tiered.staged_pages >= large_vmm.pages - hot

        wait_for(cold_gone, "the cold half of the large page left without the other")
        large_vmm.ask("stop")
        large_vmm.verify()
        tiered.evict_all()
        large_vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    large_vmm.verify()


@pytest.mark.parametrize("split", [False, True])
def test_a_large_page_moves_whole_or_not_at_all_unless_it_may_be_split(large_vmm: Vmm, host: Host, split: bool) -> None:
    """Of 41 pages from the middle of a large page on, and of as many from the beginning of the next one."""
    pages, half, few = LARGE_PAGE // PAGE, LARGE_PAGE // PAGE // 2, 41
    first = -(large_vmm.addresses[0] // PAGE) % pages
    need("thp", large_kb(large_vmm) >= 2 * LARGE_PAGE >> 10, "the kernel made one transparent huge page only")
    with host.attached(large_vmm, Policy(), engine="stock") as tiered:
        tiered.scan()
        before = large_kb(large_vmm)
        tiered.native.set_split_large(split)
        spans = [Span(first + half, first + pages, few), Span(first + pages, large_vmm.pages, few)]
        done = tiered.native.stage(spans, 0.0)
        if split:
            assert [span.selected_pages for span in done.spans] == [few, few]
            assert tiered.staged_pages == 2 * few
            assert large_kb(large_vmm) < before
        else:
            assert [span.selected_pages for span in done.spans] == [0, pages]
            assert [span.next_page for span in done.spans] == [first + pages, first + 2 * pages]
            assert tiered.staged_pages == pages
            assert large_kb(large_vmm) == before, "in the staging area, too"
        large_vmm.verify()
        tiered.leave()
    large_vmm.verify()


def test_no_more_is_staged_than_leaves(large_vmm: Vmm, host: Host) -> None:
    """Where idle pages only pass through the staging area. A large page that is more than may leave stays as it is."""
    with host.attached(large_vmm) as tiered:
        need("sync-mode", not tiered.native.waits_for_readers, "engine stock has no sync mode")
        tiered.scan()
        for most in (600, 100, 600, 100):
            tiered.scan()
            assert tiered.evict(max_bytes=most * PAGE, stage=False) <= most
            assert tiered.staged_pages == 0
        tiered.stage()  # as an eviction that fails leaves it
        staged = tiered.staged_pages
        assert staged >= LARGE_PAGE // PAGE
        assert sum(tiered.native.idle_pages([0.0])) >= staged, "it may leave, still"
        large_vmm.verify()
        tiered.leave()
    large_vmm.verify()


def test_a_large_page_that_the_guest_gives_back_in_part(large_vmm: Vmm, host: Host) -> None:
    with host.attached(large_vmm) as tiered:
        large_vmm.ask("give-back", 10, 700)
        tiered.stage()
        large_vmm.ask("give-back", 1024, 256)
        large_vmm.ask("verify", 0, 512)
        large_vmm.ask("fill", 600, 300)
        tiered.evict_all()
        large_vmm.ask("fill", 1000, 400)
        large_vmm.verify()
        tiered.leave()
    large_vmm.verify()


# --- what the VMM does ------------------------------------------------------------------------------------------------------


def test_pages_that_the_vmm_gives_back(vmm: Vmm, host: Host) -> None:
    """By MADV_DONTNEED, as a balloon does: with the guest, staged, stored. They read as zeros or, if they had left, as what they
    held, and what is written then stays."""
    with host.attached(vmm) as tiered:
        zeros, kept = vmm.ask("balloon", 0, 32, 1)
        assert (zeros, kept) == (32, 0), "with the guest"
        tiered.stage()
        zeros, kept = vmm.ask("balloon", 300, 32, 1)
        assert zeros + kept == 32
        tiered.evict_all()
        zeros, kept = vmm.ask("balloon", 600, 32, 3)
        assert zeros + kept == 3 * 32
        vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


def test_staged_pages_that_the_vmm_drops(vmm: Vmm, host: Host) -> None:
    """Where it has no business. What it has lost so is lost; nobody waits for it for ever, and all else leaves and comes back."""
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.stage()
        (staging,) = (r.staging for r in tiered.served.spec.regions if r.address == vmm.addresses[0])
        inject(vmm.pid, "madvise", NUMBER["madvise"], staging + 20 * PAGE, 2 * PAGE, mmap.MADV_DONTNEED)
        tiered.evict(stage=False)
        assert tiered.staged_pages == 2
        assert tiered.counters()["kernel_errors"] > 0
        vmm.ask("verify", 0, 20)
        vmm.ask("verify", 22, vmm.pages - 22)


def test_the_vmm_touches_the_staging_area(vmm: Vmm, host: Host) -> None:
    """Where it has no business, and where nothing is: an error there, and the end of it. The page is the guest's as before."""
    with host.attached(vmm, readahead_pages=1) as tiered:
        (staging,) = (r.staging for r in tiered.served.spec.regions if r.address == vmm.addresses[0])
        for page in (20, 21):
            with pytest.raises(OSError, match="Bad address"):
                inject(vmm.pid, "socketpair", NUMBER["socketpair"], 1, 1, 0, staging + page * PAGE)
            tiered.evict_all()
        assert tiered.counters()["kernel_errors"] < 100
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_balloon_while_pages_leave(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        vmm.send("balloon", 0, 64, 40)

        def over() -> bool:
            tiered.scan()
            tiered.evict()
            return vmm.answered()

        wait_for(over, "the balloon is done", seconds=60)
        vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


@pytest.mark.parametrize("alone", [False, True], ids=["among others", "alone"])
@pytest.mark.parametrize("scanned", [False, True], ids=["before the scan", "after the scan"])
def test_memory_that_the_vmm_maps_anew(vmm: Vmm, host: Host, alone: bool, scanned: bool) -> None:
    """At the same addresses, as QEMU does after a memory error: nobody is told, nothing is registered there, and the kernel would
    move a page from there all the same. It must not leave: its hole would be filled with zeros."""
    with host.attached(vmm, readahead_pages=1) as tiered:
        tiered.evict_all()
        vmm.ask("touch", 40 if alone else 0, 1 if alone else 64)
        if scanned:
            tiered.scan()
        vmm.ask("replace", 40)
        vmm.ask("fill", 40, 1)
        if not scanned:
            with contextlib.suppress(KernelError):
                tiered.scan()
        for step in (lambda: tiered.stage(scan=False), lambda: tiered.evict(stage=False)):
            with contextlib.suppress(KernelError):
                step()
        _, wrong = vmm.ask("verify")
        vmm.wrong.clear()
        assert not wrong


def test_new_memory_is_seen_and_the_staging_area_is_not_taken_for_it(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        assert grown(tiered.served.spec) == []
        tiered.evict_all()
        assert grown(tiered.served.spec) == []
        vmm.ask("add", PAGES * PAGE)
        assert [region.bytes for region in grown(tiered.served.spec)] == [PAGES * PAGE]
        recheck(tiered.served.spec, SAFE, HolderScan())
        tiered.leave()
    vmm.verify()


def test_unmapped_by_the_vmm(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("unmap", PAGES, PAGES)
        with pytest.raises(Refused, match="mappings"):
            recheck(tiered.served.spec, SAFE, HolderScan())
        vmm.ask("verify", 0, PAGES)


@pytest.mark.parametrize("left", ["staged", "stored"])
def test_it_executes_another_program(vmm: Vmm, host: Host, left: str) -> None:
    """Nothing is called in that program, and an adoption finds that the guest is gone."""
    with host.attached(vmm) as tiered:
        tiered.stage() if left == "staged" else tiered.evict_all()
        vmm.send("exec")
        # sleep(1), which is loaded when it sleeps
        wait_for(lambda: "nanosleep" in Path(f"/proc/{vmm.pid}/wchan").read_text(), "it is another program")
        before = memory_map(vmm.pid)
        for step in (tiered.scan, tiered.stage, tiered.evict):
            with contextlib.suppress(OSError):
                step()
        assert memory_map(vmm.pid) == before
        assert vmm.process.poll() is None
    with pytest.raises(Stale), host.adopted(vmm):
        pass


@pytest.mark.parametrize("left", ["staged", "stored"])
def test_it_ends(vmm: Vmm, host: Host, left: str) -> None:
    with host.attached(vmm) as tiered:
        tiered.stage() if left == "staged" else tiered.evict_all()
        vmm.kill()
        for step in (tiered.scan, tiered.stage, tiered.evict):
            with contextlib.suppress(OSError):
                step()
        tiered.served.forget()
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())


def test_a_foreign_seccomp_filter(vmm: Vmm) -> None:
    engine = StockEngine(probe(), tried=False)
    preflight(vmm.spec(), SAFE, HolderScan(), engine)
    vmm.ask("filter")
    with pytest.raises(Refused) as caught:
        preflight(vmm.spec(), SAFE, HolderScan(), engine)
    assert caught.value.check == "seccomp"


def test_a_filter_that_comes_later(vmm: Vmm, host: Host) -> None:
    """From then on nothing is called inside; faults are served, and everything comes back."""
    with host.attached(vmm) as tiered:
        tiered.served.adapt(swap_can_receive=False)
        tiered.stage()
        assert tiered.staged_pages == vmm.pages
        vmm.ask("verify", 0, 64)
        vmm.ask("filter")
        stops = tiered.counters()["inject_stops"]
        for step in (tiered.stage, lambda: cycle.unstage(tiered.native, lambda: None)):
            with pytest.raises(KernelError) as caught:
                step()
            assert caught.value.errno == errno.EPERM
        with pytest.raises(Refused) as refused:
            tiered.served.adapt(swap_can_receive=False)
        assert refused.value.check == "seccomp"
        tiered.native.restore(0, 1 << 40)
        vmm.verify()
        assert tiered.counters()["inject_stops"] == stops
        assert not tiered.served.leave(), "its copy of the userfaultfd stays open there"
    vmm.verify()


def test_a_sandbox_that_comes_later(start_vmm: Start, host: Host) -> None:
    """QEMU's own one does no harm, and there is one; what somebody else has put around it may."""
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous", "-sandbox", "on", arg0="/usr/bin/qemu-system-x86_64")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        vmm.ask("filter")
        with pytest.raises(KernelError):  # it has not been looked at
            tiered.stage()
        tiered.served.adapt(swap_can_receive=False)
        tiered.evict_all()
        vmm.verify()
        vmm.ask("filter")
        with pytest.raises(Refused):
            tiered.served.adapt(swap_can_receive=False)
        tiered.native.restore(0, 1 << 40)
        assert not tiered.served.leave()
    vmm.verify()


def test_a_qemu_in_its_own_sandbox(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}", "kind=anonymous", "-sandbox", "on", arg0="/usr/bin/qemu-system-x86_64")
    vmm.ask("fill")
    vmm.ask("filter")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    script = (
        "import ctypes, sys, time; libc = ctypes.CDLL(None, use_errno=True); "
        "assert not libc.ptrace(0x4206, int(sys.argv[1]), 0, 0); print('traced', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(pid)], stdout=subprocess.PIPE) as tracer:
        try:
            assert tracer.stdout is not None
            assert tracer.stdout.readline() == b"traced\n"
            yield
        finally:
            tracer.kill()


def test_a_traced_vmm(vmm: Vmm) -> None:
    engine = StockEngine(probe(), tried=False)
    with traced(vmm.pid), pytest.raises(Refused) as caught:
        preflight(vmm.spec(), SAFE, HolderScan(), engine)
    assert caught.value.check == "tracer"
    preflight(vmm.spec(), SAFE, HolderScan(), engine)


def test_a_debugger_that_comes_later(vmm: Vmm, host: Host) -> None:
    """Nothing moves while it is there, nothing is lost, faults are served."""
    with host.attached(vmm) as tiered:
        tiered.stage()
        vmm.ask("verify", 0, 64)
        with traced(vmm.pid):
            for step in (tiered.stage, tiered.evict):
                with contextlib.suppress(KernelError):
                    step()
            vmm.verify()
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_stopped_vmm(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        os.kill(vmm.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, vmm.pid, os.WSTOPPED)
        tiered.scan()
        with pytest.raises(KernelError) as caught:
            tiered.stage()
        assert caught.value.errno == errno.EAGAIN
        os.kill(vmm.pid, signal.SIGCONT)
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_what_looks_like_ram_and_is_none(start_vmm: Start, host: Host) -> None:
    """Stacks of threads, of the very size of its RAM: they are tiered, too, and nobody minds."""
    bytes_of_a_stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    need(
        "stack",
        MIB <= bytes_of_a_stack <= 64 * MIB,
        "the stacks of threads are not of a size that a test could have as RAM",
    )
    vmm = start_vmm(f"bytes={bytes_of_a_stack}", "threads=3", "kind=anonymous")
    vmm.ask("fill", 0, 1024)
    with host.attached(vmm) as tiered:
        assert len(tiered.served.spec.regions) > 1
        vmm.ask("hot", 0, 1024)
        vmm.ask("run", 500, 50)
        tiered.cycle_until(1024, 300)
        vmm.ask("stop")
        no_trouble(tiered)
        vmm.verify()
        tiered.leave()
    vmm.verify()


# --- what it costs, what it leaves ------------------------------------------------------------------------------------------


def test_stops_leave_the_thread_time_for_itself(vmm: Vmm, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of its time at most, also those for drops."""
    slept_s: list[float] = []
    with host.attached(vmm) as tiered:
        for step in (tiered.stage, lambda: tiered.evict(stage=False)):
            before, slept_s[:] = tiered.counters(), []
            with monkeypatch.context() as patch:
                patch.setattr(time, "sleep", slept_s.append)
                step()
            after = tiered.counters()
            stopped_s = (after["inject_stopped_ns"] - before["inject_stopped_ns"]) / 1e9
            assert after["inject_stops"] > before["inject_stops"]
            assert sum(slept_s) > 3.9 * stopped_s
        vmm.verify()
        tiered.leave()


def test_a_guest_with_nothing_cold_is_not_stopped(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        tiered.scan()
        tiered.stage(interval_s=60)
        before = tiered.counters()["inject_stops"]
        for _ in range(5):
            tiered.scan()
            tiered.stage(interval_s=60)
            tiered.evict(min_idle_s=60, stage=False)
        assert tiered.counters()["inject_stops"] - before <= 5
        assert tiered.staged_pages == 0
        tiered.leave()


@pytest.mark.parametrize("adopted", [False, True], ids=["attached", "adopted"])
def test_nothing_stays_in_the_vmm(vmm: Vmm, host: Host, adopted: bool) -> None:
    """Neither a staging area, nor the area of our calls, nor a registration, nor a userfaultfd."""
    vmm.ask("verify")  # its own stacks and buffers are there
    before = memory_map(vmm.pid)
    with host.attached(vmm) as tiered:
        assert len(memory_map(vmm.pid)) > len(before)
        tiered.evict_all()
        vmm.ask("verify", 0, 500)
        tiered.stage()
        if not adopted:
            tiered.leave()
    if adopted:
        with host.adopted(vmm) as tiered:
            vmm.ask("verify", 900, 500)
            tiered.leave()
    assert memory_map(vmm.pid) == before
    assert not userfaultfds(vmm.pid)
    for address in vmm.addresses:
        assert not vm_flags(vmm.pid, address) & {"um", "uw", "ui"}
    assert not list((host.tmpfs_dir / "guests").iterdir())
    assert not list((host.disk_dir / "store").iterdir())
    vmm.verify()


def test_an_attach_that_fails_leaves_nothing(vmm: Vmm, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory_map(vmm.pid)

    def fails(_: object) -> None:
        raise OSError(errno.ENOMEM, "no")

    with monkeypatch.context() as patch:
        patch.setattr("tierd.native.NativeGuest.arm", fails)
        with pytest.raises(OSError, match="no"), host.attached(vmm):
            pass
    assert memory_map(vmm.pid) == before
    assert not userfaultfds(vmm.pid)
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        tiered.leave()
    vmm.verify()


def test_a_death_in_a_detach_leaves_nothing_that_is_registered(
    vmm: Vmm, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the state file and that of the staging area: the guest can be attached again."""

    def dies(_: object, __: object) -> None:
        raise OSError(errno.EAGAIN, "no")

    with host.attached(vmm) as tiered, monkeypatch.context() as patch:
        tiered.evict_all()
        staging = [region.staging for region in tiered.served.spec.regions]
        patch.setattr("tierd.serve.Served._unmap_ours", dies)
        tiered.leave()
    for address in (*vmm.addresses, *staging):
        assert not vm_flags(vmm.pid, address) & {"um", "uw", "ui"}
    with host.attached(vmm) as tiered:
        assert len(tiered.served.spec.regions) == 2, "the old staging area is not RAM"
        assert grown(tiered.served.spec) == []
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


@pytest.mark.parametrize("calls", range(1, 8))
def test_a_death_in_an_attach_leaves_nothing_that_looks_like_ram(
    vmm: Vmm, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """After each of the calls that make a staging area."""
    made = 0

    def until_then(*arguments: Any, **more: Any) -> Any:
        nonlocal made
        if made == calls:
            raise OSError(errno.EAGAIN, "dead")
        made += 1
        return inject(*arguments, **more)

    spec = vmm.spec()
    region = spec.regions[0]
    before = memory_map(vmm.pid)
    with monkeypatch.context() as patch, contextlib.suppress(OSError):
        patch.setattr("tierd.attach.ptrace.inject", until_then)
        map_staging(vmm.pid, region.address, region.bytes)
    assert memory_map(vmm.pid) != before, "it is there"
    assert vmm.spec().regions == spec.regions


# --- successors -------------------------------------------------------------------------------------------------------------


def test_adoption(vmm: Vmm, host: Host) -> None:
    """Of pages that are with the guest, fetched back from either tier, staged, stored, given back to the kernel meanwhile."""
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("verify", 0, 256)
        wait_for(lambda: tiered.counters()["pages_fetched"] >= 256, "they are back")
        tiered.stage()
        vmm.ask("verify", 0, 64)
        wait_for(
            lambda: tiered.staged_pages <= 256 - 64 and not tiered.arriving_pages,
            "some are back again, none on its way",
        )
        stored = tiered.stored_pages
    vmm.ask("give-back", 10, 5)
    vmm.ask("zap", 200, 5)  # what had left comes back as what it held
    vmm.ask("zap", 1500, 5)
    with host.adopted(vmm) as tiered:
        assert tiered.served.adoption is not None
        assert tiered.served.adoption.stored_pages == stored
        assert tiered.native.anonymous
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        no_trouble(tiered)
        tiered.leave()
    vmm.verify()


@pytest.mark.timeout(900)
def test_torture(vmm_binary: Path) -> None:
    result = torture(
        vmm_binary, kills=KILLS // 2 or 20, seed=int(os.environ.get("TIERD_SEED", "3")), guests=1, memory="anonymous"
    )
    check(result)


# --- swap -------------------------------------------------------------------------------------------------------------------


def test_with_swap(vmm: Vmm, host: Host, disk_dir: Path) -> None:
    """What the host has swapped out by itself stays where it is until it is wanted; then it leaves as everything does."""
    with scratch_swap(disk_dir), host.attached(vmm) as tiered:
        tiered.scan()
        vmm.ask("page-out", 0, 512)
        wait_for(lambda: swapped_kb(vmm.pid), "something is in swap")
        vmm.ask("verify", 0, 64)
        tiered.stage()
        tiered.evict(stage=False)
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        vmm.ask("page-out", 0, 512)
        tiered.leave()
        vmm.verify()
        vmm.kill()
