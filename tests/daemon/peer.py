# SPDX-License-Identifier: Apache-2.0
"""This process as a VMM that connects: with what it brings, true or not."""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from tierd.attach.ptrace import NUMBER, features_of

BYTES = 1 << 20
ANSWER_S_MAX = 20.0

libc = ctypes.CDLL(None, use_errno=True)


def userfaultfd() -> int:
    fd = int(libc.syscall(NUMBER["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    return fd


def send(path: Path, message: bytes, fds: list[int]) -> socket.socket:
    """The connection; the answer is still in it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(ANSWER_S_MAX)
    sock.connect(str(path))
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
    return sock


def talk(path: Path, message: bytes, fds: list[int]) -> tuple[dict[str, Any], socket.socket]:
    """The answer, and the connection that it came by."""
    sock = send(path, message, fds)
    return json.loads(sock.recv(8192)), sock


class Peer:
    """A MiB of memory of this process, and the descriptors of it. `with` closes them."""

    def __init__(self) -> None:
        self._owned = ExitStack()
        self.memfd = self.own(os.memfd_create("peer"))
        os.ftruncate(self.memfd, BYTES)
        self.memory = self._owned.enter_context(mmap.mmap(self.memfd, BYTES))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.uffd = self.own(userfaultfd())
        self.pagemap = self.own(os.open("/proc/self/pagemap", os.O_RDONLY))

    def own(self, fd: int) -> int:
        self._owned.callback(os.close, fd)
        return fd

    def message(self, **changes: Any) -> dict[str, Any]:
        region = {"address": self.address, "bytes": BYTES, "offset": 0, "memfd": 0}
        return {"version": 1, "uffd": self.uffd, "regions": [region]} | changes

    def region(self, **changes: int) -> dict[str, Any]:
        message = self.message()
        message["regions"][0] |= changes
        return message

    @property
    def fds(self) -> list[int]:
        return [self.uffd, self.pagemap, self.memfd]

    def untouched(self) -> bool:
        """Nothing was agreed on with its userfaultfd, nothing is registered with it."""
        smaps = Path("/proc/self/smaps").read_text()
        block = smaps[smaps.index(f"{self.address:x}-") :]
        flags = block[block.index("VmFlags:") :].split("\n")[0].split()
        return not features_of(self.uffd) and not {"um", "uw", "ui", "ur"} & set(flags)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._owned.close()
