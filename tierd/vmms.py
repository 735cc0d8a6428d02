# SPDX-License-Identifier: Apache-2.0
"""The socket on which VMMs bring their userfaultfd, their pagemap and their memory files (README, "Without privileges").

One message comes, one answer goes. An accepted VMM's connection stays open; that it ends changes nothing for the guest. What
is wrong with a peer closes its connection and touches nobody else.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from tierd.api import bind_unix, unlinked_at_the_end
from tierd.attach import GuestSpec, Refused
from tierd.attach.handshake import MESSAGE_BYTES_MAX, Brought, Malformed, look, parse, spec_of
from tierd.serve import StateError
from tierd.store import StoreError
from tierd.threads import in_thread
from tierd.view import RequestRefused

BACKLOG = 128
CONNECTIONS_MAX = 1024  # those beyond wait in the kernel
MESSAGE_S = 2.0  # for the message to come
CLOSE_S = 1.0  # for the close of a file that somebody sent
THREADS_MAX = 8
DESCRIPTORS_MAX = 253  # SCM_MAX_FD of the kernel
SO_PEERPIDFD = 77  # Linux 6.5
ANSWER_CHARS_MAX = 2000

log = structlog.get_logger()


@dataclass
class Hand:
    """A VMM that is connected. `brought` is the connection's: whoever needs it longer duplicates it."""

    pid: int
    brought: Brought
    sock: socket.socket
    over: trio.Event = field(default_factory=trio.Event)

    def spec(self) -> GuestSpec:
        """Blocks; see spec_of."""
        return spec_of(self.brought, self.pid)

    def left(self) -> None:
        """Its guest is with it again: it may close its userfaultfd."""
        with contextlib.suppress(OSError):  # it does not listen; nothing is registered, so it need not know
            _tell(self.sock, event="left")
        self.over.set()

    def replaced(self) -> None:
        """Its VMM has a newer connection."""
        self.over.set()


class Reception(Protocol):
    async def welcome(self, hand: Hand) -> str:
        """Serve the guest; its key. Refused, RequestRefused, StateError, StoreError, OSError: it is not, and why."""
        ...

    def gone(self, hand: Hand) -> None:
        """Its connection has ended."""
        ...


async def serve(
    reception: Reception,
    *,
    socket_path: Path,
    mode: int,
    group: str | None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until cancelled. SocketUnusable, before `started`: the address cannot be had."""
    with contextlib.ExitStack() as owned:
        listener = owned.enter_context(bind_unix(socket_path, mode, group, socket.SOCK_SEQPACKET, "handshake"))
        owned.enter_context(unlinked_at_the_end(socket_path))
        listener.setblocking(False)
        listener.listen(BACKLOG)
        door = _Door(reception)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await door.places.acquire()
                nursery.start_soon(door.connection, await _accept(listener))


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            continue
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.error("handshake_accept_failed", error=str(error), action="trying again")
            await trio.sleep(1.0)
            continue
        sock.setblocking(False)
        return sock


class _Door:
    """What all connections share."""

    def __init__(self, reception: Reception) -> None:
        self.places = trio.Semaphore(CONNECTIONS_MAX)
        self._reception = reception
        # of Python: calls on what somebody sent, a FUSE file perhaps, may hang; they hold up new VMMs at the most
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._told: dict[int, str] = {}  # by pid: what a VMM was refused for last

    async def connection(self, sock: socket.socket) -> None:
        """Nothing in a connection ends the daemon: not what its peer does, and no bug in what talks to it."""
        try:
            await self._connection(sock)
        except Exception:  # an ExceptionGroup is one, too
            log.exception("handshake_failed")

    async def _connection(self, sock: socket.socket) -> None:
        async with contextlib.AsyncExitStack() as owned:
            owned.callback(self.places.release)
            owned.enter_context(sock)
            try:
                hand = await self._message(sock, owned)
                owned.callback(self._reception.gone, hand)
                key = await self._reception.welcome(hand)
            except (Malformed, Refused, RequestRefused, StateError, StoreError, OSError) as error:
                self._refuse(sock, error)
                return
            with contextlib.suppress(OSError):  # it is gone already; the guest's own task sees that
                _tell(sock, ok=True, guest=key)
                await _stay(sock, hand)

    async def _message(self, sock: socket.socket, owned: contextlib.AsyncExitStack) -> Hand:
        """What the VMM says. Its descriptors are closed at the end of the connection."""
        with trio.move_on_after(MESSAGE_S) as limit:
            await trio.lowlevel.wait_readable(sock)
        if limit.cancelled_caught:
            raise Malformed(f"no message came within {MESSAGE_S:g} s")
        message, unknown, whole = _receive(sock)
        owned.push_async_callback(self._close_unknown, unknown)
        if not whole:
            raise Malformed(f"more than {MESSAGE_BYTES_MAX} bytes, or more descriptors than can be received, came")
        said = parse(message, len(unknown))
        pid, pidfd = peer(sock)
        owned.callback(os.close, pidfd)
        brought = await in_thread(
            look, said, list(unknown), pid, pidfd, limiter=self._threads, abandon_on_cancel=True
        )
        while unknown:  # what they are is known now
            owned.callback(os.close, unknown.pop())
        return Hand(pid, brought, sock)

    async def _close_unknown(self, fds: list[int]) -> None:
        """Whoever sent it decides how long the close of a file takes: on FUSE, for ever."""

        def close() -> None:
            for fd in fds:
                with contextlib.suppress(OSError):  # of a write that nobody here made
                    os.close(fd)

        if fds:
            with trio.move_on_after(CLOSE_S):
                await in_thread(close, limiter=self._threads, abandon_on_cancel=True)

    def _refuse(self, sock: socket.socket, error: Exception) -> None:
        """Told each time; logged when it is something new."""
        text = str(error)
        if isinstance(error, RequestRefused) and error.remedy:
            text += f"; {error.remedy}"
        with contextlib.suppress(OSError):  # it did not wait for the answer
            _tell(sock, ok=False, error=text[:ANSWER_CHARS_MAX])
        pid, uid = credentials(sock)
        if self._told.get(pid) != text:
            log.warning("handshake_refused", pid=pid, uid=uid, error=text)
        if len(self._told) >= CONNECTIONS_MAX:
            self._told.clear()
        self._told[pid] = text


def _receive(sock: socket.socket) -> tuple[bytes, list[int], bool]:
    """A packet, its descriptors, and whether that was all of it."""
    space = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
    message, ancillary, flags, _ = sock.recvmsg(MESSAGE_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds), not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def credentials(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process that connected."""
    pid, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))
    return pid, uid


def peer(sock: socket.socket) -> tuple[int, int]:
    """(pid, pidfd) of the process that connected, in our pid namespace. OSError: it is gone, or of another namespace."""
    pid, _ = credentials(sock)
    if not pid:
        raise OSError(errno.ESRCH, "the process that connected is in a pid namespace that tierd does not see")
    try:
        return pid, sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
    return pid, os.pidfd_open(pid)  # the number cannot be another process's yet: its connection is a moment old


async def _stay(sock: socket.socket, hand: Hand) -> None:
    """Until the VMM closes, or says anything more, or is left, or has another connection."""
    async with trio.open_nursery() as nursery:

        async def wait_left() -> None:
            await hand.over.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait_left)
        await trio.lowlevel.wait_readable(sock)
        with contextlib.suppress(OSError):  # ECONNRESET: it closed without a look at our answer
            if sock.recv(1):
                _tell(sock, ok=False, error="one message is all that is expected; connect again to send it again")
        nursery.cancel_scope.cancel()


def _tell(sock: socket.socket, **message: Any) -> None:
    """At once or not at all: a packet goes into the peer's queue whole, and it has room for one."""
    sock.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
