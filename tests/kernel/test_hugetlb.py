# SPDX-License-Identifier: Apache-2.0
"""Guest memory on hugetlbfs, tiered by pages of 2 MiB. Its files call every offset data and have no write(2)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.host_memory import huge_pages
from tests.kernel.test_kill import check
from tests.kernel.torture import torture
from tests.kernel.vmm import MIB, SAFE, SLOWNESS, Host, Vmm, userfaultfds, wait_for
from tierd.attach import Refused
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import Subject, backing
from tierd.engine.stock import StockEngine
from tierd.native import KernelError, probe

Start = Callable[..., Vmm]
PAGE = 2 * MIB
KILLS = int(os.environ.get("TIERD_KILLS", "0"))
F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10
POOL = 32


@pytest.fixture(scope="module", autouse=True)
def pool(kernel: None) -> Iterator[None]:
    with huge_pages(POOL):
        yield


@pytest.fixture
def vmm(start_vmm: Start) -> Vmm:
    """Two regions of 8 pages; one page is zeros."""
    vmm = start_vmm(f"bytes={8 * PAGE}", "regions=2", "kind=huge")
    vmm.ask("fill")
    vmm.ask("zero", 5, 1)
    return vmm


def free_pages() -> int:
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())


@contextlib.contextmanager
def no_page_free() -> Iterator[None]:
    """Somebody else has all that was in the pool."""
    taken = os.memfd_create("other", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    try:
        os.ftruncate(taken, 2 * POOL * PAGE)
        os.posix_fallocate(taken, 0, free_pages() * PAGE)
        yield
    finally:
        os.close(taken)


def test_everything_leaves_and_comes_back(vmm: Vmm, host: Host) -> None:
    free = free_pages()
    with host.attached(vmm) as tiered:
        assert tiered.native.page_bytes == vmm.page_bytes == PAGE
        assert tiered.served.resident_bytes() == vmm.pages * PAGE
        tiered.evict_all()
        c = tiered.counters()
        assert tiered.served.resident_bytes() == 0
        assert free_pages() == free + vmm.pages, "the pages are in the host's pool again"
        assert c["state_pages"][4] == vmm.pages
        assert c["tier_pages"][0] == 1
        assert tiered.served.tiers["file"].space.used_bytes() >= (vmm.pages - 1) * PAGE
        vmm.verify()
        wait_for(lambda: tiered.counters()["pages_fetched"] >= vmm.pages, "every page was fetched")
        c = tiered.counters()
        assert c["kernel_errors"] == c["checksum_errors"] == c["pages_lost"] == 0
        assert c["latency_count"] == sum(c["latency_buckets"]) == vmm.pages
        tiered.discard()
        assert tiered.served.tiers["file"].space.used_bytes() == 0
        tiered.leave()
    vmm.verify()
    assert not userfaultfds(vmm.pid)
    assert free_pages() == free


def test_a_page_of_1_gib_where_that_is_asked_for(start_vmm: Start, host: Host) -> None:
    with huge_pages(1, kb=1 << 20):
        vmm = start_vmm(f"bytes={1 << 30}", "kind=gigantic")
        vmm.ask("fill")
        with pytest.raises(Refused, match="allow_gigantic: true"), host.attached(vmm):
            pass
        with host.attached(vmm, SAFE.model_copy(update={"allow_gigantic": True})) as tiered:
            assert tiered.native.page_bytes == 1 << 30
            tiered.evict_all()
            assert tiered.served.resident_bytes() == 0
            assert tiered.stored_pages == 1
        with host.adopted(vmm) as tiered:
            vmm.verify()
            tiered.leave()
        vmm.verify()
        vmm.kill()


def test_a_busy_guest_reads_what_it_wrote(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        vmm.ask("run", max(int(50 / SLOWNESS), 1), 50)
        tiered.cycle_until(vmm.pages, vmm.pages)
        _, wrong = vmm.ask("stop")
        c = tiered.counters()
        assert wrong == 0
        assert c["pages_lost"] == c["checksum_errors"] == c["kernel_errors"] == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_only_touched_pages_stay(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.scan().touched_pages == 0
        vmm.ask("touch", 7, 2)
        vmm.ask("fill", 12, 1)
        assert tiered.scan().touched_pages == 3
        vmm.verify()


def test_what_was_never_used_is_not_moved(start_vmm: Start, host: Host) -> None:
    """And a page that is in the file counts as used, mapped or not."""
    vmm = start_vmm(f"bytes={16 * PAGE}", "kind=huge")
    vmm.ask("fill", 0, 6)
    vmm.ask("zap", 0, 3)
    with host.attached(vmm) as tiered:
        assert tiered.counters()["untouched_pages"] == vmm.pages - 6
        tiered.evict_all()
        assert tiered.stored_pages == 6
        vmm.ask("fill", 8, 2)
        vmm.verify()


def test_adoption(vmm: Vmm, host: Host) -> None:
    """Of stored pages, of pages that came back, of one that the VMM gave back meanwhile."""
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("verify", 0, 4)
        wait_for(lambda: tiered.stored_pages == vmm.pages - 4, "they are back")
    with host.adopted(vmm) as tiered:
        assert tiered.native.page_bytes == PAGE
        assert tiered.served.adoption is not None
        assert tiered.served.adoption.stored_pages == vmm.pages - 4
        vmm.verify()
        tiered.evict_all()
        tiered.leave()
    vmm.verify()


def test_what_the_vmm_has_unmapped_goes_back_into_its_file(start_vmm: Start, host: Host) -> None:
    """There is nothing to map it into; whoever maps the file again must find it."""
    vmm = start_vmm(f"bytes={12 * PAGE}", "kind=huge")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        vmm.ask("unmap", 6, 6)
        tiered.native.restore(0, 6)
        with no_page_free(), pytest.raises(KernelError):
            tiered.native.restore(0, 1 << 40)
        assert tiered.stored_pages == 6
        tiered.restore_all()
        tiered.served.leave()
    vmm.ask("map-again", 6, 6, 0, 0)
    vmm.verify()


def test_a_page_that_cannot_be_punched_stays(vmm: Vmm, host: Host) -> None:
    """hugetlbfs punches a page as a whole or not at all: there is nothing to write back."""
    with host.attached(vmm) as tiered:
        for memfd in tiered.served.memfds:
            fcntl.fcntl(memfd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        tiered.scan()
        with pytest.raises(KernelError) as caught:
            tiered.evict()
        assert caught.value.errno == errno.EPERM
        assert tiered.counters()["state_pages"][0] == vmm.pages
        assert tiered.counters()["pages_repaired"] == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_fetch_waits_until_the_pool_has_a_page(vmm: Vmm, host: Host) -> None:
    """It has given those that left to somebody else."""
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        with no_page_free():
            vmm.send("verify", 0, 1)
            time.sleep(0.3)
            assert not vmm.answered()
            c = tiered.counters()
            assert c["state_pages"][0] == c["pages_lost"] == 0
        wait_for(vmm.answered, "there is a page for it again")
        vmm.verify()


def test_pages_of_1_gib_and_mixed_ones_are_refused(vmm: Vmm) -> None:
    """What smaps says of them: a host has none to spare."""
    spec = vmm.spec()
    smaps = Path(f"/proc/{vmm.pid}/smaps").read_text()
    backing(Subject(spec, SAFE, HolderScan(), smaps=smaps))
    first = f"{spec.regions[0].address:x}-"
    before, _, after = smaps.partition(first)
    for size_kib, said in ((1 << 20, "1024 MiB"), (4, "different sizes")):
        changed = (
            before + first + re.sub(r"KernelPageSize:( +)2048 kB", f"KernelPageSize: {size_kib} kB", after, count=1)
        )
        with pytest.raises(Refused, match=said):
            backing(Subject(spec, SAFE, HolderScan(), smaps=changed))
    without_scan = StockEngine(replace(probe(), pagemap_scan=errno.ENOTTY), tried=False)
    with pytest.raises(Refused, match=r"Linux 6\.7"):
        backing(Subject(spec, SAFE, HolderScan(), smaps=smaps, engine=without_scan))


@pytest.mark.timeout(900)
def test_torture(vmm_binary: Path) -> None:
    result = torture(
        vmm_binary, kills=KILLS // 2 or 25, seed=int(os.environ.get("TIERD_SEED", "3")), guests=1, memory="hugetlb"
    )
    check(result)
