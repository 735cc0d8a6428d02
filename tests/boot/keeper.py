# SPDX-License-Identifier: Apache-2.0
"""What tests/boot/test_fd_store.py starts in the place of tierd: leaves descriptors with the manager, says which come back.

A memfd with our pid in it, and a userfaultfd before its UFFDIO_API: in error for whoever polls it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from pathlib import Path

from tierd.systemd import Notifier, listen_fds

USERFAULTFD = 323 if platform.machine() == "x86_64" else 282


def userfaultfd() -> int:
    fd = ctypes.CDLL(None, use_errno=True).syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    return int(fd)


def main() -> None:
    if Path("/etc/tierd/wrong").exists():
        sys.exit(78)
    notifier, found = Notifier.from_environment(), dict(listen_fds())
    if not found:
        memfd = os.memfd_create("kept")
        os.pwrite(memfd, str(os.getpid()).encode(), 0)
        notifier.store_fds("memfd", [memfd])
        notifier.store_fds("userfaultfd", [userfaultfd()])
    kinds = {name: os.readlink(f"/proc/self/fd/{fd}").split()[0] for name, fd in sorted(found.items())}
    writer = os.pread(found["memfd"], 32, 0).decode() if "memfd" in found else ""
    print(f"pid={os.getpid()} writer={writer} found={kinds}", flush=True)
    notifier.ready("keeping")
    signal.pause()  # SIGTERM and SIGUSR1 end it, as a crash would


main()
