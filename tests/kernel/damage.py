# SPDX-License-Identifier: Apache-2.0
"""A bit is turned of what a tier has of a page, while nobody serves the guest: one without which it is another page, or none."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

from tierd.native import TierKind
from tierd.store import IntegrityError
from tierd.store.records import _unpacked

SLOT_PAGES, ORDINAL_BITS, STEP_BYTES = 8, 9, 16  # of a pool: pool_inside.h
OBJECT = struct.Struct("<IH")  # page, bytes
LITERALS_BYTES = 5


def flipped(content: bytes, bit: int) -> bytes:
    return (int.from_bytes(content, "little") ^ 1 << bit).to_bytes(len(content), "little")


def flip_in_file(path: Path, page: int, page_bytes: int, pages: int, chance: random.Random) -> None:
    """Any bit: the page is there as it is, or as a cipher that changes with each of its bits."""
    _flip_at(path, page * page_bytes, page_bytes, chance)


def flip_in_pool(path: Path, page: int, page_bytes: int, pages: int, chance: random.Random) -> None:
    """Of the last bytes of the object: the last five of a block of LZ4 are always the page's own."""
    with open(path, "rb") as pool:
        at, length = _object_in(pool.fileno(), page, page_bytes, pages)
    _flip_at(path, at + length - LITERALS_BYTES, LITERALS_BYTES, chance)


def flip_in_record(path: Path, page: int, page_bytes: int, pages: int, chance: random.Random) -> None:
    """Any bit where it is sealed. Else it is a page or a frame of Zstandard, of which some bits say nothing. `path`: of the
    directory that the store has of the guest (asked.py)."""
    file = path / str(page)
    record = file.read_bytes()
    while True:
        other = flipped(record, chance.randrange(8 * len(record)))
        if (was := _in_clear(record, page_bytes)) is None or _in_clear(other, page_bytes) != was:
            break
    file.write_bytes(other)


FLIPS: dict[TierKind, Callable[[Path, int, int, int, random.Random], None]] = {
    TierKind.FILE: flip_in_file,
    TierKind.MEMORY: flip_in_pool,
    TierKind.ASKED: flip_in_record,
}


def _flip_at(path: Path, at: int, size: int, chance: random.Random) -> None:
    with open(path, "r+b") as file:
        content = os.pread(file.fileno(), size, at)
        os.pwrite(file.fileno(), flipped(content, chance.randrange(8 * size)), at)
        os.fsync(file.fileno())


def _object_in(pool: int, page: int, page_bytes: int, pages: int) -> tuple[int, int]:
    """Where the bytes of the page's object are, and how many. An object's place in its slot is its ordinal times the size of all
    objects there, which is so many steps; we need not know how many: its header says its page."""

    def up(size: int) -> int:
        return -(-size // page_bytes) * page_bytes

    (entry,) = struct.unpack("<I", os.pread(pool, 4, page_bytes + 4 * page))
    slot, ordinal = entry >> ORDINAL_BITS, entry & (1 << ORDINAL_BITS) - 1
    slot_bytes = SLOT_PAGES * page_bytes
    first = page_bytes + up(4 * pages) + up(pages + 1) + slot * slot_bytes
    objects, found = os.pread(pool, slot_bytes, first), set()
    for size in range(STEP_BYTES, page_bytes, STEP_BYTES):
        at = ordinal * size
        if at + size <= slot_bytes:
            whose, length = OBJECT.unpack_from(objects, at)
            if whose == page and LITERALS_BYTES < length <= size - OBJECT.size:
                found.add((first + at + OBJECT.size, length))
    (result,) = found
    return result


def _in_clear(record: bytes, page_bytes: int) -> bytes | None:
    """The page, where the record is not sealed."""
    try:
        return _unpacked(0, record, 2 * page_bytes)
    except IntegrityError:
        return None
