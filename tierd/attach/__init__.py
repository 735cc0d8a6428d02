# SPDX-License-Identifier: Apache-2.0
"""Ways to come by a guest's memory and its userfaultfd: what is known of a guest, and why one is refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

EVIDENCE_CHARS_MAX = 1000


@dataclass(frozen=True)
class Region:
    """A stretch of guest RAM: `bytes` at `address` in the VMM, backed by the file (device, inode) from `offset` on; or private
    and anonymous (inode 0), and then its staging area is at `staging`, as large, once it is served."""

    address: int
    bytes: int
    offset: int
    device: int
    inode: int
    staging: int = 0

    @property
    def anonymous(self) -> bool:
        return self.inode == 0


@dataclass(frozen=True)
class GuestSpec:
    """A VMM on this host, and its guest's memory. (pid, start_ticks, boot_id) is unique for ever."""

    name: str
    pid: int
    start_ticks: int  # field 22 of /proc/PID/stat
    boot_id: str
    cmdline: tuple[str, ...]
    regions: tuple[Region, ...]
    handshake: bool = False  # its VMM connected and brought its descriptors: nothing is ever entered or taken

    @property
    def anonymous(self) -> bool:
        """All of its memory is private and anonymous: it goes through a staging area in the VMM."""
        return all(region.anonymous for region in self.regions)


@dataclass(frozen=True)
class Handed:
    """Descriptors that a VMM brought, to us or to a predecessor."""

    pidfd: int
    uffd: int
    uffd_in_vmm: int | None  # the number under which the VMM keeps its own copy; None: as before
    pagemap: int
    memfds: Mapping[tuple[int, int], int]  # by (device, inode)

    def dup(self) -> Handed:
        """The caller closes it. OSError: too many are open."""
        with contextlib.ExitStack() as on_error:

            def dup(fd: int) -> int:
                again = os.dup(fd)
                on_error.callback(os.close, again)
                return again

            memfds = {file: dup(fd) for file, fd in self.memfds.items()}
            copy = replace(self, pidfd=dup(self.pidfd), uffd=dup(self.uffd), pagemap=dup(self.pagemap), memfds=memfds)
            on_error.pop_all()
        return copy

    def fds(self) -> list[int]:
        """What cannot be had from anybody else."""
        return [self.uffd, self.pagemap, *self.memfds.values()]

    def close(self) -> None:
        for fd in (self.pidfd, self.uffd, self.pagemap, *self.memfds.values()):
            os.close(fd)


class Refused(Exception):
    """A guest that tierd will not touch: which check, the cause, the evidence, and what the operator can do."""

    def __init__(self, check: str, cause: str, evidence: str, remedy: str) -> None:
        # names and arguments that a VMM chose are in there: not on somebody's terminal as they are
        evidence = "".join(c if c.isprintable() else "\ufffd" for c in evidence[:EVIDENCE_CHARS_MAX])
        super().__init__(f"{cause} [{check}: {evidence}]; {remedy}")
        self.check, self.cause, self.evidence, self.remedy = check, cause, evidence, remedy
