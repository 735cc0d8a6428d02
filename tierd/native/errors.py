# SPDX-License-Identifier: Apache-2.0
"""What a call of the data plane that fails raises."""

from __future__ import annotations

import os


class KernelError(OSError):
    """A call of the data plane failed: errno, and what was being done (to which guest is known to the caller). `tier`: the number
    of the one that did not take pages, or gave no room back; 0: it is not about one. `moved_bytes`: of an eviction or a
    demotion, what went before."""

    tier = moved_bytes = 0

    def __str__(self) -> str:
        return f"{self.strerror}: {os.strerror(self.errno or 0)} (errno {self.errno})"


def check(result: int, noun: str, tier: int = 0) -> None:
    """Raise KernelError, of `tier`, unless `result` is 0 or positive."""
    if result < 0:
        error = KernelError(-result, noun)
        error.tier = tier
        raise error
