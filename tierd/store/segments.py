# SPDX-License-Identifier: Apache-2.0
"""Segments: objects of some MiB that hold pages, written once and never changed. Pure: bytes in, bytes out.

    record, record, ..., table, trailer

A record is a header and the bytes of a page as they were given (records.py has compressed and sealed them), so one page is one
range read. Every checksum starts from the object's name: what belongs elsewhere does not verify. The table says what the records
are, for a rebuild of the index. A record's generation is the number of the segment that it was first written to:
cleaning copies records and keeps it, so of two records of a page the one with the higher generation is the newer one.
"""

from __future__ import annotations

import errno
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from tierd.native.records import HEADER_BYTES, ROW_BYTES, UNIT_BYTES, Records, segment, segment_record

SEGMENT_BYTES_MAX = 64 << 20
RECORD_BYTES_MAX = (1 << 16) * UNIT_BYTES - UNIT_BYTES
NUMBER_MAX = (1 << 28) - 1  # of segments that one guest may ever write: some 500 TiB in batches of 2 MiB
SEAL_BYTES_MAX = 256  # that a record may be longer than its page
GAP_BYTES_MAX = 64 << 10  # between two records that one read fetches: less than a round trip costs
LIVE_FRACTION_MIN = 0.5  # a segment of which less is live is sparse
SMALL_FRACTION = 1 / 16  # a segment smaller than this part of a full one is merged with others

_HEADER = struct.Struct("<IIII")  # checksum of the rest, the data and padding; page, generation, bytes of data
_ROW = struct.Struct("<IIII")  # page, generation, offset, length
_TRAILER = struct.Struct("<8sIIQ")  # magic, crc of the table, rows, bytes of the whole segment
TRAILER_BYTES = _TRAILER.size
assert (_HEADER.size, _ROW.size) == (HEADER_BYTES, ROW_BYTES), "as native code writes them"
_MAGIC = b"tierdSG2"


class DamagedError(OSError):
    """What is stored is not what was written."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(errno.EBADMSG, f"{name} is damaged: {why}")


class Place(NamedTuple):
    """Where a page's record is: the number of its segment (0: nowhere), offset and length in bytes."""

    number: int
    offset: int
    length: int

    @property
    def word(self) -> int:
        """In 64 bits; 0 is nowhere."""
        return self.number << 36 | self.offset // UNIT_BYTES << 16 | self.length // UNIT_BYTES


def place_of(word: int) -> Place:
    return Place(word >> 36, (word >> 16 & 0xFFFFF) * UNIT_BYTES, (word & 0xFFFF) * UNIT_BYTES)


class Record(NamedTuple):
    """What is kept of a page."""

    page: int
    generation: int
    data: bytes


class Row(NamedTuple):
    """Of a segment's table."""

    page: int
    generation: int
    offset: int
    length: int


def size_of(word: int) -> tuple[int, int]:
    """Segment and bytes of the record that a word points to."""
    return word >> 36, (word & 0xFFFF) * UNIT_BYTES


def words_of(number: int, bounds: Sequence[int]) -> array[int]:
    """Index words of a segment whose records have these bounds."""
    top = number << 36
    return array("Q", [top | at // UNIT_BYTES << 16 | (end - at) // UNIT_BYTES for at, end in pairwise(bounds)])


def build(name: str, pages: array[int], generations: array[int], records: Records) -> tuple[bytes, Sequence[int]]:
    """The segment that object `name` will be, and the bounds of its records, of these pages and generations ("I")."""
    seed = _seed(name)
    content, bounds = segment(seed, pages, generations, records)
    total, table_crc = len(content) + _TRAILER.size, zlib.crc32(content[bounds[-1] :], seed)
    return b"".join((content, _TRAILER.pack(_MAGIC, table_crc, len(records), total))), bounds


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def record_at(name: str, page: int, stored: bytes | memoryview) -> Record:
    """The record that is stored in these bytes, which must be of `page`. DamagedError: they are not what was written."""
    view = memoryview(stored)
    data_bytes = segment_record(_seed(name), view)
    if data_bytes is None:
        raise DamagedError(name, f"the checksum of page {page} is wrong")
    _, at, generation, _ = _HEADER.unpack_from(view)
    if at != page:
        raise DamagedError(name, f"page {page} was expected, page {at} is there")
    return Record(page, generation, bytes(view[_HEADER.size : _HEADER.size + data_bytes]))


def table_bytes(name: str, segment_bytes: int, trailer: bytes) -> int:
    """Length of table and trailer, as the trailer says it. DamagedError: it is none, or of another segment."""
    magic, _, rows, total = _TRAILER.unpack(trailer) if len(trailer) == _TRAILER.size else (b"", 0, 0, 0)
    length = int(rows) * ROW_BYTES + TRAILER_BYTES
    if magic != _MAGIC or total != segment_bytes or length > segment_bytes:
        raise DamagedError(name, "it does not end as a segment does; was it cut short?")
    return length


def read_table(name: str, segment_bytes: int, tail: bytes | memoryview) -> list[Row]:
    """The rows in a segment's last bytes, at least as many as `table_bytes` says. DamagedError."""
    trailer = bytes(tail[-_TRAILER.size :])
    table = tail[-table_bytes(name, segment_bytes, trailer) : -_TRAILER.size]
    if zlib.crc32(table, _seed(name)) != _TRAILER.unpack(trailer)[1]:
        raise DamagedError(name, "the checksum of its table is wrong")
    return [Row(*row) for row in _ROW.iter_unpack(table)]


def records_of(name: str, segment: bytes) -> Iterator[tuple[Row, memoryview]]:
    """The records of a whole segment, unread. DamagedError."""
    view = memoryview(segment)
    for row in read_table(name, len(segment), view):
        yield row, view[row.offset : row.offset + row.length]


class Run(NamedTuple):
    """Records of one segment that one read fetches."""

    number: int
    offset: int
    length: int
    rows: list[tuple[int, int, int]]  # page, offset in the run, length


def runs_of(first_page: int, words: Sequence[int]) -> list[Run]:
    """What to read for a run of pages, whose index words these are."""
    runs: list[Run] = []
    for word, page in sorted((word, page) for page, word in enumerate(words, first_page) if word):
        place, run = place_of(word), runs[-1] if runs else None
        if run and run.number == place.number and place.offset - run.offset - run.length <= GAP_BYTES_MAX:
            run.rows.append((page, place.offset - run.offset, place.length))
            runs[-1] = run._replace(length=place.offset + place.length - run.offset)
        else:
            runs.append(Run(*place, [(page, 0, place.length)]))
    return runs


# --- what is worth cleaning -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Usage:
    """Of one segment."""

    total_bytes: int
    live_bytes: int = 0  # of records that the index points to, with their rows of the table
    busy: bool = False  # being written
    damaged: bool = False  # cannot be cleaned: stays as long as a page is in it

    @property
    def dead_bytes(self) -> int:
        return self.total_bytes - self.live_bytes


class Round(NamedTuple):
    """Segments to be deleted, and segments whose live records are to be copied into a new one first."""

    dead: list[int]
    moved: list[int]


def choose(usages: Mapping[int, Usage], segment_bytes: int) -> Round:
    """The next round of cleaning; nothing in it: nothing is worth it.

    A segment is moved if it is sparse (less than half of it is live) or small, the emptiest first, and only in rounds that fill
    half of a full segment or free a full one. What that costs:
    - What is copied out of sparse segments is less than what dies in them, and a byte that was asked to be written dies once.
    - What is copied out of small ones fills at least half a segment, which is not small, so that happens to a byte once; or it is
      copied along in a round that frees twice as much.
    So bytes written are at most twice what was asked for, three times what was asked for in small batches; and bytes stored at
    most twice what is live and the size of a few segments.
    """
    idle = {number: usage for number, usage in usages.items() if not usage.busy}
    dead = [number for number, usage in idle.items() if not usage.live_bytes]
    candidates = sorted(
        (usage.live_bytes / usage.total_bytes, number)
        for number, usage in idle.items()
        if usage.live_bytes and not usage.damaged and _worth_moving(usage, segment_bytes)
    )
    moved, live, freed = [], 0, 0
    for _, number in candidates:
        if live + idle[number].live_bytes > segment_bytes:
            break
        moved.append(number)
        live += idle[number].live_bytes
        freed += idle[number].dead_bytes
    return Round(dead, moved if live >= segment_bytes / 2 or freed >= segment_bytes else [])


def _worth_moving(usage: Usage, segment_bytes: int) -> bool:
    sparse = usage.live_bytes < LIVE_FRACTION_MIN * usage.total_bytes
    return sparse or usage.total_bytes < SMALL_FRACTION * segment_bytes
