# SPDX-License-Identifier: Apache-2.0
"""System calls made by a thread of the VMM, which restores itself (inject.c)."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tierd.native._native import ffi, lib

TIMEOUT_MS = 1000


@dataclass(frozen=True)
class At:
    """An argument that points into the scratch area, `offset` bytes from its start."""

    offset: int


@dataclass(frozen=True)
class Called:
    """What the call returned in the VMM, the scratch area after it, and how long the thread was stopped."""

    result: int
    scratch: bytes
    stopped_ns: int


def inject(
    tid: int, noun: str, number: int, *arguments: int | At, scratch: bytes = b"", pointers: tuple[int, ...] = ()
) -> Called:
    """Run system call `number` in thread `tid`. `scratch` lies on its stack meanwhile; the 64-bit words at the byte offsets
    `pointers` of it are offsets into it that become pointers.

    Blocks, at most TIMEOUT_MS and half a second.

    OSError with `noun`: the call itself failed in the VMM, or could not be made (EBUSY: somebody else traces the thread;
    ENOTSUP: its state cannot be restored by a signal frame; ETIMEDOUT: it does not stop; EAGAIN: it is stopped by SIGSTOP).
    Whatever happens to us, the VMM's thread goes on unharmed.
    """
    call = ffi.new("struct tierd_call *")
    area = ffi.new("uint8_t[]", max(len(scratch), 1))
    ffi.memmove(area, scratch, len(scratch))
    call.number = number
    call.pointers = sum(1 << offset // 8 for offset in pointers)
    for i, argument in enumerate(arguments):
        if isinstance(argument, At):
            call.argument[i] = argument.offset
            call.in_scratch |= 1 << i
        else:
            call.argument[i] = argument & 0xFFFF_FFFF_FFFF_FFFF
    error = lib.tierd_inject(tid, call, area, len(scratch), TIMEOUT_MS)
    if error == 0 and -4095 <= call.result < 0:
        error = call.result
    if error:
        raise OSError(-error, f"{noun} inside the VMM (thread {tid}): {os.strerror(-error)}")
    return Called(call.result, bytes(ffi.buffer(area, len(scratch))), call.stopped_ns)
