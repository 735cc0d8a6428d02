# SPDX-License-Identifier: Apache-2.0
"""Segments: their format, what is noticed when they are damaged, and what cleaning them costs."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd.native.records import ROW_BYTES, Records
from tierd.store import segments
from tierd.store.segments import DamagedError, Place, Usage, build, choose, read_table, record_at, records_of

NAME = "host/boot/1-1/1-1.0000007"


def segment(records: list[bytes], name: str = NAME) -> bytes:
    pages, generations = array("I", range(100, 100 + len(records))), array("I", [7]) * len(records)
    return build(name, pages, generations, Records.of(records))[0]


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=20))
def test_records_come_back(records: list[bytes]) -> None:
    data = segment(records)
    found = [record_at(NAME, row.page, stored) for row, stored in records_of(NAME, data)]
    assert found == [(100 + n, 7, record) for n, record in enumerate(records)]
    assert all(row.offset % segments.UNIT_BYTES == 0 for row in read_table(NAME, len(data), data))


@given(
    st.integers(1, segments.NUMBER_MAX),
    st.integers(0, segments.SEGMENT_BYTES_MAX // segments.UNIT_BYTES - 1),
    st.integers(1, segments.RECORD_BYTES_MAX // segments.UNIT_BYTES),
)
def test_a_place_is_a_word(number: int, offset: int, length: int) -> None:
    place = Place(number, offset * segments.UNIT_BYTES, length * segments.UNIT_BYTES)
    assert 0 < place.word < 1 << 64
    assert segments.place_of(place.word) == place


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 7))
@settings(max_examples=300)
def test_a_bit_that_flips_is_noticed(position: int, bit: int) -> None:
    """Or it does not matter: padding."""
    rng = random.Random(1)
    records = [rng.randbytes(200), rng.randbytes(100) + bytes(400)]
    data = bytearray(segment(records))
    rows = read_table(NAME, len(data), bytes(data))
    data[position % len(data)] ^= 1 << bit
    for row, wanted in zip(rows, records, strict=True):
        try:
            assert record_at(NAME, row.page, bytes(data[row.offset : row.offset + row.length])).data == wanted
        except DamagedError:
            continue
    try:
        assert read_table(NAME, len(data), bytes(data)) == rows
    except DamagedError:
        assert position % len(data) >= rows[-1].offset + rows[-1].length


def test_a_record_of_another_segment_or_page_is_refused() -> None:
    data = segment([b"a" * 100, b"b" * 100])
    first = data[: read_table(NAME, len(data), data)[0].length]
    with pytest.raises(DamagedError, match="page 101 was expected, page 100 is there"):
        record_at(NAME, 101, first)
    with pytest.raises(DamagedError, match="checksum of page 100 is wrong"):
        record_at(NAME.replace("7", "8"), 100, first)
    with pytest.raises(DamagedError, match="checksum of its table"):
        read_table(NAME.replace("7", "8"), len(data), data)


@pytest.mark.parametrize("left", [0, 1, 20, -1])
def test_a_segment_that_was_cut_short_is_refused(left: int) -> None:
    data = segment([b"a" * 100, b"b" * 100])[:left]
    with pytest.raises(DamagedError, match="cut short"):
        read_table(NAME, len(data), data)


def test_neighbours_are_one_read() -> None:
    words = [Place(3, 0, 128).word, Place(3, 128, 64).word, 0, Place(2, 0, 64).word, Place(3, 1 << 20, 64).word]
    runs = segments.runs_of(10, words)
    assert runs == [
        (2, 0, 64, [(13, 0, 64)]),
        (3, 0, 192, [(10, 0, 128), (11, 128, 64)]),
        (3, 1 << 20, 64, [(14, 0, 64)]),
    ]


# --- what cleaning costs, in a model: no objects, only their sizes ----------------------------------------------------

FULL = 64 << 10
RECORD, OVERHEAD = 1024, ROW_BYTES


class Model:
    def __init__(self) -> None:
        self.usages: dict[int, Usage] = {}
        self.at: dict[int, int] = {}  # page -> segment
        self.asked = self.copied = self.asked_small = 0

    def put(self, pages: list[int]) -> int:
        number = len(self.usages) + 1 + max(self.usages, default=0)
        size = len(pages) * (RECORD + OVERHEAD)
        self.usages[number] = Usage(size + segments.TRAILER_BYTES)
        for page in pages:
            self.forget(page)
            self.at[page] = number
            self.usages[number].live_bytes += RECORD + OVERHEAD
        return size

    def forget(self, page: int) -> None:
        if number := self.at.pop(page, 0):
            self.usages[number].live_bytes -= RECORD + OVERHEAD

    def write(self, pages: list[int]) -> None:
        size = self.put(pages)
        self.asked += size
        self.asked_small += size if size < FULL * segments.SMALL_FRACTION else 0

    def clean(self) -> Iterator[segments.Round]:
        while any(chosen := choose(self.usages, FULL)):
            for number in chosen.dead:
                del self.usages[number]
            if chosen.moved:
                self.copied += self.put([page for page, number in self.at.items() if number in chosen.moved])
            yield chosen


@given(
    st.randoms(use_true_random=False), st.sampled_from([(1,), (1, 3, 40), (40, 64), (16, 64)]), st.integers(100, 1000)
)
@settings(max_examples=30)
def test_cleaning_costs_and_frees_what_it_says(rng: random.Random, batches: tuple[int, ...], pages: int) -> None:
    model = Model()
    for _ in range(150):
        first, count = rng.randrange(pages), rng.choice(batches)
        if rng.random() < 0.8:
            model.write([(first + n) % pages for n in range(count)])
        else:
            for n in range(rng.choice((1, 20, pages))):
                model.forget((first + n) % pages)
        rounds = sum(1 for _ in model.clean())
        assert rounds < 50
        live = len(model.at) * (RECORD + OVERHEAD)
        stored = sum(usage.total_bytes for usage in model.usages.values())
        assert stored <= 2 * live + 3 * FULL
        assert model.copied <= model.asked + model.asked_small
    for page in range(pages):
        model.forget(page)
    for _ in model.clean():
        pass
    assert not model.usages, "what is dead is freed"


def test_what_is_busy_or_damaged_is_left_alone() -> None:
    usages = {n: Usage(FULL, 2048, busy=n < 50, damaged=n >= 50) for n in range(100)}
    assert choose(usages, FULL) == ([], [])
    for usage in usages.values():
        usage.live_bytes = 0
    assert choose(usages, FULL) == (list(range(50, 100)), [])
