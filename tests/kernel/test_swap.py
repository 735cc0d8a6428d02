# SPDX-License-Identifier: Apache-2.0
"""A host that swaps guest memory out by itself, under engines that have a sync mode (tests/kernels)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.host_memory import scratch_swap
from tests.kernel.vmm import MIB, PAGE, Host, Vmm
from tests.need import need
from tierd.engine import choose
from tierd.native import GUEST_TIER

Start = Callable[..., Vmm]


@pytest.fixture(autouse=True)
def swap(kernel: None, disk_dir: Path) -> Iterator[None]:
    name = choose().name
    need(
        "sync-mode", choose().holds_reads, f"engine {name} has no sync mode; tests/kernels runs this where there is one"
    )
    with scratch_swap(disk_dir):
        yield


def swapped_pages(vmm: Vmm) -> int:
    rows = Path(f"/proc/{vmm.pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Swap:")) * 1024 // PAGE


def page_out(vmm: Vmm, first: int, count: int) -> int:
    """Pages that are in swap now; some the kernel may not be able to let go at once."""
    vmm.ask("touch", first, count)  # what is not mapped is passed over
    assert vmm.ask("page-out", first, count) == [0]
    pages = swapped_pages(vmm)
    assert 0 < pages <= count
    return pages


def test_what_was_swapped_out_leaves_all_the_same(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.evict(max_bytes=8 * PAGE) == 8  # the chunk is registered now
        page_out(vmm, 64, 256)
        tiered.evict_all()
        assert tiered.stored_pages == vmm.pages
        assert swapped_pages(vmm) == 0
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_it_is_read_back_before_any_window(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        pages = page_out(vmm, 64, 64)
        with tiered.native.batch(512) as batch:
            assert batch.select(GUEST_TIER, 0, 0.0, 512, [1]).selected_pages == 512
            copied = batch.copy()
            assert swapped_pages(vmm) == 0
            # rwp: mapped only now, they are not yet protected; they leave when they were idle since
            assert copied.cancelled_pages == (pages if choose().name == "rwp" else 0)
            batch.write([1])
            batch.store()
            batch.stored()
            assert batch.window(1000).evicted_pages == 512 - copied.cancelled_pages
        vmm.verify()
        tiered.leave()
    vmm.verify()


def test_a_window_leaves_alone_what_is_in_swap(start_vmm: Start, host: Host) -> None:
    need(
        "rwp",
        choose().name == "rwp",
        "rfc compares a page with its copy in the window, and so reads it from swap there",
    )
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch:
            batch.select(GUEST_TIER, 0, 0.0, 512, [1])
            batch.copy()
            batch.write([1])
            batch.store()
            batch.stored()
            pages = page_out(vmm, 64, 64)
            result = batch.window(1000)
        assert (result.evicted_pages, result.cancelled_pages) == (512 - pages, pages)
        assert swapped_pages(vmm) == pages
        vmm.verify()
        tiered.evict_all()
        vmm.verify()
        tiered.leave()
    vmm.verify()
