# SPDX-License-Identifier: Apache-2.0
"""The service manager's side of the daemon: sd_notify(3), the watchdog, the fd store. No dependency, no blocking.

Every function is a no-op where no manager listens (NOTIFY_SOCKET unset), so callers never ask.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

LISTEN_FDS_START = 3
STATUS_CHARS_MAX = 400  # systemctl shows one line


@dataclass(frozen=True)
class Notifier:
    """Messages to the manager at `address` (a path, or @name for an abstract socket). "" sends nothing."""

    address: str
    fds_max: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notifier:
        places = environment.get("FDSTORE", "")
        return cls(environment.get("NOTIFY_SOCKET", ""), int(places) if places.isdecimal() else 0)

    @property
    def keeps_fds(self) -> bool:
        """Whether the manager has a place for descriptors. systemd 254 and newer say so in $FDSTORE; for older ones the unit
        does, beside its FileDescriptorStoreMax=."""
        return bool(self.address) and self.fds_max > 0

    def send(self, *assignments: str, fds: Sequence[int] = ()) -> bool:
        """One datagram. True if the manager got it; False without a manager. OSError: the manager's socket is broken or
        full, which the caller logs: it never stops a daemon that serves guests."""
        if not self.address:
            return False
        if self.address[0] not in "/@":
            raise OSError(
                errno.EAFNOSUPPORT, f"NOTIFY_SOCKET is {self.address[:100]!r}; only a path or @abstract is known"
            )
        address = "\0" + self.address[1:] if self.address[0] == "@" else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as channel:
            channel.connect(address)  # socket.send_fds ignores its address
            message = "\n".join(assignments).encode(errors="replace")
            if fds:
                socket.send_fds(channel, [message], list(fds))
            else:
                channel.send(message)
        return True

    def ready(self, status: str) -> bool:
        """Start or reload is complete. Ends what `reloading` began."""
        return self.send("READY=1", f"MAINPID={os.getpid()}", _status(status))

    def reloading(self) -> bool:
        """A reload begins. systemd 253 and newer want the time; 252 ignores it."""
        return self.send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> bool:
        return self.send("STOPPING=1", _status(status))

    def status(self, text: str) -> bool:
        return self.send(_status(text))

    def watchdog(self) -> bool:
        """We are alive; at least every `watchdog_interval_s`."""
        return self.send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for `seconds` more, from now, for the start or the stop that is under way."""
        return self.send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def store_fds(self, name: str, fds: Sequence[int]) -> bool:
        """Let the manager keep duplicates over a restart; they come back from `listen_fds` under `name`. Kept until
        `remove_fds`: by default it polls them and drops what is in error, which a userfaultfd may be for whoever polls it
        (before UFFDIO_API, or where it blocks)."""
        if not name or len(name) > 255 or ":" in name or not name.isascii() or not name.isprintable():
            raise ValueError(f"{name!r} is no FDNAME (see sd_pid_notify_with_fds(3))")
        return self.send("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=fds)

    def remove_fds(self, name: str) -> bool:
        return self.send("FDSTOREREMOVE=1", f"FDNAME={name}")


def _status(text: str) -> str:
    return "STATUS=" + " ".join(text.split())[:STATUS_CHARS_MAX]


def watchdog_interval_s(environment: Mapping[str, str] = os.environ, pid: int | None = None) -> float | None:
    """How often to call `watchdog`: half of what the manager allows. None: nobody watches us."""
    usec, wanted_pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not _is_number(usec) or int(usec) == 0:
        return None
    if wanted_pid and wanted_pid != str(pid if pid is not None else os.getpid()):
        return None  # meant for a parent of ours
    return int(usec) / 2e6


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 20


def listen_fds(environment: MutableMapping[str, str] = os.environ, pid: int | None = None) -> list[tuple[str, int]]:
    """Take over the descriptors that the manager passed: (name, fd), close-on-exec from now on. Removes the variables,
    so that a child does not take them for its own; a second call gives nothing."""
    count, names = environment.pop("LISTEN_FDS", ""), environment.pop("LISTEN_FDNAMES", "")
    if environment.pop("LISTEN_PID", "") != str(pid if pid is not None else os.getpid()) or not _is_number(count):
        return []
    fds = range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))
    try:
        for fd in fds:
            os.set_inheritable(fd, False)
    except (OSError, OverflowError):  # more than there are: as sd_listen_fds(3), none is taken for what it may not be
        return []
    named = names.split(":") if names else []
    return [(named[i] if i < len(named) else "unknown", fd) for i, fd in enumerate(fds)]
