# SPDX-License-Identifier: Apache-2.0
"""Threads for calls that block."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


async def in_thread(
    function: Callable[[*Arguments], Result],
    *args: *Arguments,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> Result:
    """trio.to_thread.run_sync. OSError, EAGAIN: no thread can be started, which is the machine's trouble and ends no daemon."""
    try:
        return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        raise OSError(errno.EAGAIN, "no thread can be started: see to TasksMax, pids.max and threads-max") from error
