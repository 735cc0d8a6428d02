# SPDX-License-Identifier: Apache-2.0
"""Guests whose memory is in large folios, with the engines that let readers wait while a page leaves (tests/kernels)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.kernel.host_memory import large_folios_kb, large_shmem, large_shmem_kb
from tests.kernel.vmm import MIB, PAGE, SLOWNESS, Host, Vmm, wait_for
from tests.need import need
from tierd.engine import choose

Start = Callable[..., Vmm]
BUSY_S = 2.0


@pytest.fixture(autouse=True)
def large(kernel: None) -> Iterator[None]:
    name = choose().name
    need("sync-mode", choose().holds_reads, f"engine {name} refuses large folios; tests/kernels runs this with others")
    with large_shmem("always"):
        yield


@pytest.fixture
def start(start_vmm: Start) -> Start:
    """Starts a guest that has filled its memory, all of it in large folios."""

    def filled(*arguments: str) -> Vmm:
        vmm = start_vmm(*arguments)
        vmm.ask("fill")
        assert large_folios_kb(vmm.pid) == vmm.pages * PAGE // 1024
        return vmm

    return filled


def test_whole_folios(start: Start, host: Host) -> None:
    vmm = start(f"bytes={8 * MIB}")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        assert tiered.stored_pages == vmm.pages
        assert tiered.counters()["large_folios_split"] == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_single_pages(start: Start, host: Host) -> None:
    """A part of a folio is in use, the rest of it leaves."""
    vmm = start(f"bytes={4 * MIB}")
    vmm.ask("hot", 64, 100)
    with host.attached(vmm) as tiered:
        vmm.ask("run", 2000, 50)

        def cold_left() -> bool:
            tiered.scan()
            tiered.evict()
            return tiered.stored_pages >= vmm.pages - 100

        wait_for(cold_left, "all that nobody uses has left")
        vmm.ask("stop")
        # the other one, too, if a batch ended in it
        assert 1 <= tiered.counters()["large_folios_split"] <= 2
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_folio_that_is_made_after_the_copy(start_vmm: Start, host: Host) -> None:
    """The kernel maps it by pages still (and says EINVAL for that). rfc: their marks say who was touched; rwp: the protection
    is gone, and no page leaves before it has been seen to be idle again."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    with large_shmem("never"):
        vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch:
            tiered.store_copies(batch, 512)
            with pytest.raises(AssertionError, match="error 22 "):
                vmm.ask("collapse", 0, 512)
            assert large_shmem_kb() == 2048
            vmm.ask("verify", 0, 128)
            assert batch.window(1000).evicted_pages == (0 if choose().name == "rwp" else 512 - 128)
        vmm.verify()


def test_a_folio_that_cannot_be_split(start: Start, host: Host) -> None:
    """A pipe refers to one page of it. A punch of another one then zeroes it and leaves it cached, while threads read and write
    just there: nobody sees these zeros."""
    vmm = start(f"bytes={2 * MIB}", "threads=4")
    vmm.ask("splice", 77)
    with host.attached(vmm) as tiered:
        vmm.ask("run", 1000, 30)
        until = time.monotonic() + BUSY_S * SLOWNESS
        while time.monotonic() < until:
            tiered.scan()
            tiered.evict(max_bytes=64 * PAGE)
        vmm.ask("stop")
        c = tiered.counters()
        assert c["pages_repaired"] > 100, "a punch that did not punch"
        assert c["large_folios_split"] == 0
        vmm.verify()
        vmm.ask("unsplice")
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_one_chunk_ends_inside_of_a_folio(start_vmm: Start, host: Host) -> None:
    """A hole is filled by a large folio where nobody asked to be told of holes: not over what is stored beside it."""
    vmm = start_vmm(f"bytes={65 * MIB}", "regions=2")
    end = 128 * MIB // PAGE  # of the second chunk: at an odd number of MiB in the second region
    with large_shmem("never"):
        vmm.ask("fill", end - 16, 16)
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        assert tiered.stored_pages == 16
        vmm.ask("fill", end, 16)
        assert tiered.stored_pages == 16
        vmm.verify()
        tiered.leave()


def test_memory_that_is_not_mapped_any_more(start: Start, host: Host) -> None:
    """What is stored goes back into the file, page by page: the file makes no large folio there, whose other pages are zeros."""
    vmm = start(f"bytes={4 * MIB}")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        assert vmm.ask("unmap", 0, vmm.pages) == [0]
        tiered.restore_all()
        assert vmm.ask("map-again", 0, vmm.pages, 0, 0) == [0]
        vmm.verify()
