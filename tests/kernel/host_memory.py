# SPDX-License-Identifier: Apache-2.0
"""What the host does with memory: large folios, swap, huge pages, for as long as a test wants it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.need import need

THP = Path("/sys/kernel/mm/transparent_hugepage")
SWAP_BYTES = 64 << 20


@contextlib.contextmanager
def large_shmem(value: str, path: Path = THP / "shmem_enabled") -> Iterator[None]:
    """A setting of the whole host."""
    before = path.read_text().partition("[")[2].partition("]")[0]
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


@contextlib.contextmanager
def huge_pages(count: int, kb: int = 2048) -> Iterator[None]:
    """So many more pages of that size in their pool, where the host has memory in such pieces."""
    name, pool = (
        "hugetlbfs" if kb == 2048 else "gigantic",
        Path(f"/sys/kernel/mm/hugepages/hugepages-{kb}kB/nr_hugepages"),
    )
    need(name, pool.exists(), f"this CPU has no pages of {kb} KiB")
    before = int(pool.read_text())
    pool.write_text(str(before + count))
    try:
        got = int(pool.read_text()) - before
        need(
            name,
            got >= count,
            f"the host has no memory for {count} pages of {kb} KiB in one piece each, only for {got}",
        )
        yield
    finally:
        pool.write_text(str(before))


def large_folios_kb(pid: int) -> int:
    """File memory that the process maps by large entries."""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("ShmemPmdMapped:", "FilePmdMapped:")))


def large_shmem_kb() -> int:
    """In large folios, of the whole machine."""
    rows = Path("/proc/meminfo").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("ShmemHugePages:"))


@contextlib.contextmanager
def scratch_swap(disk_dir: Path) -> Iterator[None]:
    """A swap file of 64 MiB."""
    file = disk_dir / "swap"
    with file.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, SWAP_BYTES)
    file.chmod(0o600)
    subprocess.run(["mkswap", str(file)], check=True, capture_output=True)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.swapon(str(file).encode(), 0):
        need("kernel", False, f"no swap can be made here: swapon says {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        assert not libc.swapoff(str(file).encode())


def swapped_kb(pid: int) -> int:
    """Of the process. (Of others the kernel may swap out what it likes, and so may DAMON.)"""
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Swap:"))
