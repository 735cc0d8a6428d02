# SPDX-License-Identifier: Apache-2.0
"""Ways to come by a guest's memory and its userfaultfd: what is known of a guest, and why one is refused."""

from __future__ import annotations

from dataclasses import dataclass

EVIDENCE_CHARS_MAX = 1000


@dataclass(frozen=True)
class Region:
    """A stretch of guest RAM: `bytes` at `address` in the VMM, backed by the file (device, inode) from `offset` on."""

    address: int
    bytes: int
    offset: int
    device: int
    inode: int


@dataclass(frozen=True)
class GuestSpec:
    """A VMM on this host, and its guest's memory. (pid, start_ticks, boot_id) is unique for ever."""

    name: str
    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    boot_id: str
    cmdline: tuple[str, ...]
    regions: tuple[Region, ...]


class Refused(Exception):
    """A guest that tierd will not touch: which check, the cause, the evidence, and what the operator can do."""

    def __init__(self, check: str, cause: str, evidence: str, remedy: str) -> None:
        # names and arguments that a VMM chose are in there: not on somebody's terminal as they are
        evidence = "".join(c if c.isprintable() else "\ufffd" for c in evidence[:EVIDENCE_CHARS_MAX])
        super().__init__(f"{cause} [{check}: {evidence}]; {remedy}")
        self.check, self.cause, self.evidence, self.remedy = check, cause, evidence, remedy
