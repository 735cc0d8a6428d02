# SPDX-License-Identifier: Apache-2.0
"""What pages are compressed to, alone and before they are sealed, and what is no record."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import trio
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.store.test_seal import PAGES, Dictionary
from tests.store.writers import sealed
from tierd.native.records import _Buffers
from tierd.store import IntegrityError
from tierd.store.records import RecordSpace
from tierd.testing import PAGE, records


def write_and_read(inner: Dictionary, pages: list[bytes], first_page: int = 0) -> list[bytes | None]:
    space = RecordSpace(inner, PAGE)
    trio.run(space.write, first_page, pages)
    return trio.run(space.read, first_page, len(pages))


@given(st.lists(st.binary(max_size=300) | st.binary(max_size=20).map(lambda some: some * 100), max_size=20))
def test_records_come_back(pages: list[bytes]) -> None:
    inner = Dictionary()
    assert write_and_read(inner, pages) == pages
    assert all(len(inner.records[n]) <= len(page) + 1 for n, page in enumerate(pages))


@pytest.mark.parametrize("count", [1, 5, 512])
def test_what_compresses_shrinks_and_what_does_not_grows_by_a_byte(count: int) -> None:
    inner = Dictionary()
    noise = records(0, count, size=PAGE)
    assert write_and_read(inner, noise) == noise
    assert {len(record) for record in inner.records.values()} == {PAGE + 1}
    half = [page[: PAGE // 2] + bytes(PAGE // 2) for page in noise]
    assert write_and_read(inner, half) == half
    assert max(map(len, inner.records.values())) < 0.6 * PAGE


def test_what_is_sealed_was_compressed_before(tmpfs_dir: Path) -> None:
    inner = Dictionary()
    space = sealed(inner, tmpfs_dir, "1-1", PAGES)
    half = [page[: PAGE // 2] + bytes(PAGE // 2) for page in records(0, 100, size=PAGE)]
    trio.run(space.write, 0, half)
    assert max(map(len, inner.records.values())) < 0.6 * PAGE
    assert trio.run(space.read, 0, 101) == [*half, None]
    noise = records(0, 1, size=PAGE)
    trio.run(space.write, 0, noise)
    assert len(inner.records[0]) + 8 <= PAGE + 32


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"\2" + bytes(PAGE),
        b"\1" + random.Random(1).randbytes(PAGE),
        b"\1",
        b"\1" + zstandard.compress(bytes(PAGE))[:-1],
        b"\1" + zstandard.compress(bytes(PAGE)) + b"x",
        b"\1" + zstandard.compress(bytes(1 << 30)),  # it would fill memory
        b"\1" + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20)),
    ],
    ids=["empty", "unknown", "noise", "nothing", "cut off", "longer", "bomb", "bomb of unknown size"],
)
def test_what_is_no_record_of_ours_is_an_error(wrong: bytes) -> None:
    inner = Dictionary()
    inner.records[3] = wrong
    with pytest.raises(IntegrityError, match=r"page 3 .*not one that tierd has written"):
        trio.run(RecordSpace(inner, PAGE).read, 3, 1)


def test_buffers_are_used_again_but_for_large_ones() -> None:
    """Cleaning takes some of 8 MiB and more: they are not kept."""
    buffers = _Buffers()
    taken = [buffers.take(size) for size in (4 << 20, 2 << 20, 8 << 20, (4 << 20) + 1, 100)]
    del taken
    gc.collect()
    assert sorted(map(len, buffers._free)) == [2 << 20, 4 << 20]
    again = [buffers.take(1 << 20) for _ in range(3)]
    assert not buffers._free
    del again
    gc.collect()
    assert sorted(map(len, buffers._free)) == [1 << 20, 2 << 20, 4 << 20]
    many = [buffers.take(1 << 20) for _ in range(100)]
    del many
    gc.collect()
    assert len(buffers._free) == 12
