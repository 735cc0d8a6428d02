# SPDX-License-Identifier: Apache-2.0
"""Who else holds a guest's memory: processes that map its files or have them open."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tierd.attach.procfs import comm_of, file_of, read_proc
from tierd.systemd import Notifier

HOLDER_SCAN_S = 1.0
_BEFORE_FILE = rb"^[0-9a-f]+-[0-9a-f]+ \S{4} [0-9a-f]+ "  # a line of /proc/PID/maps up to its device
PF_KTHREAD = 0x00200000  # in field 9 of /proc/PID/stat


@dataclass(frozen=True)
class Holder:
    pid: int
    comm: str
    how: str  # "maps it" or "descriptor N"


class HolderScan:
    """Who holds which file: one pass over /proc for all guests, at most once a second. Any thread."""

    def __init__(self) -> None:
        self.unseen = 0  # processes that the last pass had no right to look at
        self._lock = threading.Lock()
        self._at = -1e9
        self._wanted: set[tuple[int, int]] = set()
        self._found: dict[tuple[int, int], list[Holder]] = {}

    def holders(self, files: Iterable[tuple[int, int]], except_pids: set[int]) -> list[Holder]:
        """Processes other than `except_pids`, ourselves and who keeps descriptors for us that map or have open one of `files`
        (device, inode)."""
        wanted = set(files)
        with self._lock:
            if not wanted <= self._wanted or time.monotonic() - self._at > HOLDER_SCAN_S:
                self._wanted |= wanted
                self._found, self.unseen = _scan_holders(self._wanted)
                self._at = time.monotonic()
            found = [holder for file in wanted for holder in self._found.get(file, [])]
        ours = {os.getpid(), os.getppid() if Notifier.from_environment().keeps_fds else 0}
        return [holder for holder in found if holder.pid not in except_pids | ours]

    def forget(self, files: Iterable[tuple[int, int]]) -> None:
        """A guest is gone: its files need not be looked for any more."""
        with self._lock:
            self._wanted -= set(files)


def _scan_holders(wanted: set[tuple[int, int]]) -> tuple[dict[tuple[int, int], list[Holder]], int]:
    found: dict[tuple[int, int], list[Holder]] = {}
    unseen = 0
    # the kernel prints device and inode of a mapping as text: look for the text, which is far quicker than parsing
    texts = {b"%02x:%02x %d " % (os.major(device), os.minor(device), inode): (device, inode) for device, inode in wanted}
    pattern = re.compile(b"|".join(map(re.escape, texts))) if texts else None
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        pid = int(name)
        held: dict[tuple[int, int], str] = {}  # a process may hold the files of several guests
        try:
            maps = Path(f"/proc/{pid}/maps").read_bytes()
            for text in set(pattern.findall(maps)) if pattern else ():
                if re.search(_BEFORE_FILE + re.escape(text), maps, re.M):  # or it is in a name that somebody chose
                    held[texts[text]] = "maps it"
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    file = file_of(-1, f"/proc/{pid}/fd/{fd}")  # of FUSE, perhaps, and hanging
                    if file in wanted:
                        held.setdefault(file, f"descriptor {fd}")
        except (FileNotFoundError, ProcessLookupError):
            continue
        except PermissionError:
            unseen += _has_memory(pid)
        for file, how in held.items():
            found.setdefault(file, []).append(Holder(pid, comm_of(pid), how))
    return found, unseen


def _has_memory(pid: int) -> bool:
    """Whether it could hold anything: a thread of the kernel and a zombie do not."""
    fields = read_proc(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return len(fields) > 6 and fields[0] not in ("Z", "X") and not int(fields[6]) & PF_KTHREAD
