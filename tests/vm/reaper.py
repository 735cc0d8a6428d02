# SPDX-License-Identifier: Apache-2.0
"""`python reaper.py COMMAND...`: runs a command, and is the parent of everything that it leaves behind.

libvirtd detaches its QEMUs and then waits until they are gone, which takes an init that collects zombies at once; that
of a container or of a CI machine may not. When the command ends, what it left is killed. SIGTERM is handed on to the
command, and the death of our own parent is a SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def main(command: list[str]) -> int:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda number, frame: child.send_signal(number))
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    while True:
        pid, status = os.wait()  # anyone's end, not only the command's
        if pid == child.pid:
            break
    for left in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(left), signal.SIGKILL)
        os.waitpid(int(left), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
