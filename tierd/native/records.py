# SPDX-License-Identifier: Apache-2.0
"""Records: what pages become on their way to a store that Python asks. Runs of them, which native code (records.c) compresses,
seals and lays out as segments without the interpreter's lock: a fault waits for that lock, too.

Any thread; nothing here does I/O.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, overload

from tierd.native._native import ffi, lib
from tierd.native.errors import check

TAG_BYTES, UNIT_BYTES = int(lib.TIERD_TAG_BYTES), int(lib.TIERD_UNIT_BYTES)
HEADER_BYTES, ROW_BYTES = int(lib.TIERD_HEADER_BYTES), int(lib.TIERD_ROW_BYTES)
AS_IT_IS, ZSTD = bytes([lib.TIERD_AS_IT_IS]), bytes([lib.TIERD_ZSTD])


class _Buffers:
    """Memory that is used again: to get 2 MiB from the system takes longer than to encrypt them. What is larger (a segment
    that is cleaned) is seldom, and too much to keep."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def take(self, bytes_min: int) -> Any:
        """uint8_t[], given back when nobody looks at it any more."""
        if not _SMALL_BYTES < bytes_min <= _KEPT_BYTES_MAX:
            return _new("uint8_t[]", bytes_min)
        try:
            buffer = self._free.pop()
        except IndexError:  # not asked before: other threads take some, too
            buffer = b""
        if len(buffer) < bytes_min:
            buffer = _new("uint8_t[]", -(-bytes_min // _STEP_BYTES) * _STEP_BYTES)
        return ffi.gc(buffer, self._give_back)

    def _give_back(self, buffer: Any) -> None:
        if len(self._free) < _KEPT_MAX:
            self._free.append(buffer)


_SMALL_BYTES, _STEP_BYTES, _KEPT_BYTES_MAX, _KEPT_MAX = 64 << 10, 256 << 10, 4 << 20, 12
_new = ffi.new_allocator(should_clear_after_alloc=False)
_buffers = _Buffers()


class Records(Sequence[bytes]):
    """Some that lie one behind the other in `buffer`: record n from bounds[n] to bounds[n + 1] ("I"). Who looks at one gets bytes
    of its own, and at a slice other Records of the same buffer."""

    __slots__ = ("bounds", "buffer")

    def __init__(self, buffer: Any, bounds: array[int]) -> None:
        self.buffer, self.bounds = memoryview(buffer), bounds

    @classmethod
    def of(cls, records: Sequence[bytes]) -> Records:
        """Themselves, or a copy of them."""
        if isinstance(records, Records):
            return records
        return cls(b"".join(records), array("I", accumulate(map(len, records), initial=0)))

    @classmethod
    def joined(cls, parts: Sequence[Records]) -> Records:
        """All of them, copied where there are several."""
        if len(parts) == 1:
            return parts[0]
        lengths = (length for part in parts for length in map(int.__sub__, part.bounds[1:], part.bounds))
        content = b"".join(part.buffer[part.bounds[0] : part.bounds[-1]] for part in parts)
        return cls(content, array("I", accumulate(lengths, initial=0)))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def total_bytes(self) -> int:
        return self.bounds[-1] - self.bounds[0]

    @property
    def longest_bytes(self) -> int:
        return max(map(int.__sub__, self.bounds[1:], self.bounds), default=0)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Records: ...
    def __getitem__(self, at: int | slice) -> bytes | Records:
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            assert step == 1, "a run of records"
            return Records(self.buffer, self.bounds[first : max(last, first) + 1])
        n = range(len(self))[at]
        return bytes(self.buffer[self.bounds[n] : self.bounds[n + 1]])

    def _args(self) -> tuple[Any, Any, int]:
        return ffi.from_buffer(self.buffer), ffi.from_buffer("uint32_t[]", self.bounds), len(self)


class _Made:
    """Room for records that native code makes."""

    def __init__(self, count: int, bytes_max: int) -> None:
        assert bytes_max < 1 << 32, "bounds have 32 bits"
        self.buffer = _buffers.take(max(bytes_max, 1))
        self.bounds = array("I", bytes(4 * (count + 1)))

    def args(self) -> tuple[Any, Any]:
        return self.buffer, ffi.from_buffer("uint32_t[]", self.bounds)

    def records(self) -> Records:
        return Records(ffi.buffer(self.buffer, max(self.bounds[-1], 1)), self.bounds)


class Packer:
    """Compresses records of at most `bytes_max`, in any thread: each has its own work space."""

    def __init__(self, bytes_max: int, level: int) -> None:
        """KernelError: there is no memory, or Zstandard is not installed."""
        self._bytes_max, self._level = bytes_max, level
        self._of_thread = threading.local()
        self._mine()

    def _mine(self) -> Any:
        if not hasattr(self._of_thread, "packer"):
            out = ffi.new("struct tierd_packer **")
            check(lib.tierd_packer_create(self._bytes_max, self._level, out), "Zstandard (is libzstd1 installed?)")
            self._of_thread.packer = ffi.gc(out[0], lib.tierd_packer_destroy)
        return self._of_thread.packer

    def pack(self, records: Records) -> Records:
        """KernelError: one is too long, or there is no memory."""
        made = _Made(len(records), records.total_bytes + len(records))
        check(lib.tierd_pack(self._mine(), *records._args(), *made.args()), "compressing records")
        return made.records()


def seal(key: bytes, nonces: array[int], first_page: int, records: Records) -> Records:
    """AES-256-GCM of each, with its page's number. `nonces`: "Q", one each, none that this key had. KernelError."""
    assert len(nonces) == len(records)
    made = _Made(len(records), records.total_bytes + TAG_BYTES * len(records))
    nonces_of = ffi.from_buffer("uint64_t[]", nonces)
    check(lib.tierd_seal(key, nonces_of, first_page, *records._args(), *made.args()), "AES-GCM (is libssl3 installed?)")
    return made.records()


def segment(seed: int, pages: array[int], generations: array[int], records: Records) -> tuple[memoryview, array[int]]:
    """Records with headers, and their table, as segments.py says; where each record is. `pages`, `generations`: "I"."""
    assert len(pages) == len(generations) == len(records)
    made = _Made(len(records), records.total_bytes + (HEADER_BYTES + UNIT_BYTES + ROW_BYTES) * len(records))
    of = (ffi.from_buffer("uint32_t[]", pages), ffi.from_buffer("uint32_t[]", generations))
    length = lib.tierd_segment(seed, *of, *records._args(), *made.args())
    return memoryview(ffi.buffer(made.buffer, length)) if length else memoryview(b""), made.bounds


def segment_record(seed: int, record: memoryview) -> int | None:
    """Length of the data of a record in a segment; None: it is not as it was written."""
    length = int(lib.tierd_segment_record(seed, ffi.from_buffer(record), len(record)))
    return None if length < 0 else length
