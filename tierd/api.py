# SPDX-License-Identifier: Apache-2.0
"""HTTP on a Unix socket, and /metrics on an optional TCP address: the sockets, and bounds on what a client can cost us.

The routes are in routes.py. It, starlette and hypercorn are imported by `serve` only: faults are served before that.

hypercorn's own accept loop has no limit on connections, and it sends without a time limit, shielded from cancellation:
a client that does not read would keep the daemon from stopping. So the loop here is ours, and so are the ends of a
stream; everything between is hypercorn's trio worker.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import math
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from tierd.view import DaemonView

if TYPE_CHECKING:
    from starlette.applications import Starlette

BACKLOG = 128
IP_FREEBIND = 15  # <linux/in.h>
CLOSE_S = 1.0  # for hypercorn to notice that its stream is closed
Talk = Callable[["Connection"], Awaitable[None]]


class SocketUnusable(Exception):
    """An address that the API cannot have; the text says why and what to do."""


@dataclass(frozen=True)
class Limits:
    """What clients may cost. Connections beyond the maximum wait in the kernel until one of the others ends."""

    connections_max: int = 64
    header_s: float = 5.0  # for a whole request header, and between two requests
    body_s: float = 10.0
    send_s: float = 5.0  # for the client to take one piece of an answer
    header_bytes_max: int = 16 << 10
    body_bytes_max: int = 64 << 10


DEFAULT_LIMITS = Limits()


async def serve(
    daemon: DaemonView,
    *,
    socket_path: Path,
    mode: int = 0o660,
    group: str | None = None,
    metrics_listen: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. SocketUnusable, before `started`: an address is taken or not allowed. Cancelled, it ends
    the operations that clients began, removes the socket and returns within `limits.send_s`."""
    from tierd.routes import create_app, create_metrics_app

    with contextlib.ExitStack() as owned:
        api = owned.enter_context(bind_unix(socket_path, mode, group))
        owned.enter_context(unlinked_at_the_end(socket_path))
        tcp = owned.enter_context(bind_tcp(metrics_listen)) if metrics_listen else None
        async with trio.open_nursery() as nursery:
            served = [(api, create_app(daemon, nursery, body_s=limits.body_s, body_bytes_max=limits.body_bytes_max))]
            if tcp:
                served.append((tcp, create_metrics_app(daemon)))
            for sock, app in served:
                sock.listen(BACKLOG)
                nursery.start_soon(_accept, sock, _hypercorn(app, limits), limits)
            task_status.started()


# --- addresses ------------------------------------------------------------------------------------------------------


def bind_unix(
    path: Path, mode: int, group: str | None, kind: int = socket.SOCK_STREAM, section: str = "api"
) -> socket.socket:
    """A socket bound to `path`, not listening yet. A socket file that nobody answers on is replaced; one that is
    answered, or a file of another kind, is SocketUnusable. `section`: of the configuration, where it stands."""
    _remove_stale(path, kind, section)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        sock.bind(str(path))
        if group is not None:
            _give_to_group(path, group, section)
        os.chmod(path, mode)  # nobody can have connected meanwhile: it does not listen yet
    except SocketUnusable:
        sock.close()
        raise
    except KeyError as error:
        sock.close()
        path.unlink()
        raise SocketUnusable(
            f"group {group} of {path} does not exist; create it (groupadd --system {group}) or set {section}.group"
        ) from error
    except OSError as error:
        sock.close()
        raise SocketUnusable(
            f"cannot listen on {path}: {error.strerror}; set {section}.socket to another path"
        ) from error
    return sock


def _give_to_group(path: Path, group: str, section: str) -> None:
    """KeyError: there is none of that name."""
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except PermissionError as error:
        path.unlink()
        raise SocketUnusable(
            f"{path} cannot be given to group {group}, of which tierd is no member: add SupplementaryGroups={group} to its "
            f"unit, or remove {section}.group"
        ) from error


def _remove_stale(path: Path, kind: int, section: str) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SocketUnusable(
                f"{path} is in the way and is not a socket; remove it or set {section}.socket to another path"
            )
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        error = probe.connect_ex(str(path))
    if error != errno.ECONNREFUSED:  # also EAGAIN: somebody listens and is busy
        raise SocketUnusable(
            f"another process listens on {path}; is a tierd running already? stop it or set {section}.socket to another path"
        )
    path.unlink()


@contextlib.contextmanager
def unlinked_at_the_end(path: Path) -> Iterator[None]:
    """Remove the socket, unless somebody has put another one there."""
    inode = path.lstat().st_ino
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_ino == inode:
                path.unlink()


def bind_tcp(address: str) -> socket.socket:
    """A socket bound to "HOST:PORT", not listening yet. HOST is a numeric address ([...] around IPv6), localhost, or
    nothing for all addresses. It need not be configured yet: at boot tierd is earlier than the network."""
    host, _, digits = address.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        port = range(65536)[int(digits)]
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
        )
        family, kind, _, _, where = found[0]
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC)
    except (OSError, ValueError, IndexError) as error:
        raise SocketUnusable(
            f"metrics.listen: {address!r} is not a numeric address and a port; write 127.0.0.1:9464 for example"
        ) from error
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)  # for IPv6, too (ip(7))
    try:
        sock.bind(where)
    except OSError as error:
        sock.close()
        raise SocketUnusable(f"cannot listen on {address}: {error}; set metrics.listen to a free port") from error
    return sock


# --- connections ----------------------------------------------------------------------------------------------------


class Connection:
    """A stream as hypercorn sees it (it looks at no type), with an end to everything: to a send that the client does
    not take, to the time between requests whatever protocol is spoken, and to what hypercorn does after the close."""

    def __init__(self, stream: trio.SocketStream, limits: Limits) -> None:
        self.socket = stream.socket
        self._stream, self._limits = stream, limits
        self._requests = 0
        self._closed = False
        # hypercorn's own timeout comes first and closes in order; this one holds for HTTP/2 and websockets, too
        self._idle_s = limits.header_s + CLOSE_S
        self.scope = trio.CancelScope(deadline=trio.current_time() + self._idle_s)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """While one is being answered there is no idle time."""
        self._requests += 1
        if not self._closed:
            self.scope.deadline = math.inf
        try:
            yield
        finally:
            self._requests -= 1
            if not self._closed and not self._requests:
                self.scope.deadline = trio.current_time() + self._idle_s

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        if not data:  # hypercorn would sit out its idle timeout, and keep the place that long
            self._idle_s = 0.0
            if not self._requests:
                self.scope.deadline = trio.current_time()
        return data

    async def send_all(self, data: bytes) -> None:
        with trio.move_on_after(self._limits.send_s):
            try:
                await self._stream.send_all(data)
            except trio.BusyResourceError:  # hypercorn closes at the same time
                raise trio.BrokenResourceError("the connection is being closed") from None
            return
        await self.aclose()
        raise trio.BrokenResourceError("the client does not read")

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        self._closed = True
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + CLOSE_S)
        await self._stream.aclose()


class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts a connection only when there is a place for it; whoever got it gives the place back."""

    def __init__(self, listener: trio.SocketListener, places: trio.Semaphore) -> None:
        self._listener, self.places = listener, places

    async def accept(self) -> trio.SocketStream:
        await self.places.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self.places.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()


async def _accept(sock: socket.socket, talk: Talk, limits: Limits) -> None:
    log = structlog.get_logger()
    places = trio.Semaphore(limits.connections_max)

    async def connection(stream: trio.SocketStream) -> None:
        try:
            bounded = Connection(stream, limits)
            with bounded.scope:
                await talk(bounded)
        except (
            Exception
        ):  # a bad peer, or a bug in what only answers questions: neither stops a daemon that serves faults
            log.exception("api_connection_failed")
        finally:
            await trio.aclose_forcefully(stream)
            places.release()

    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
    await trio.serve_listeners(connection, [_BoundedListener(listener, places)])


def _hypercorn(app: Starlette, limits: Limits) -> Talk:
    from hypercorn.config import Config
    from hypercorn.trio.tcp_server import TCPServer
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import ConnectionState

    config = Config()
    config.keep_alive_timeout = limits.header_s
    config.h11_max_incomplete_size = limits.header_bytes_max
    config.h2_max_concurrent_streams = 1
    config.accesslog = config.errorlog = None  # routes.py logs what went wrong, and nobody reads who asked for metrics
    config.include_server_header = False
    context = WorkerContext(None)

    async def talk(connection: Connection) -> None:
        async def counted(scope: Any, receive: Any, send: Any, *_: object) -> None:
            async def bounded_send(message: Any) -> None:  # HTTP/2 has a flow control of its own to wait for
                with trio.move_on_after(limits.send_s):
                    await send(message)
                    return
                connection.scope.cancel()
                await trio.lowlevel.checkpoint()

            with connection.request():
                await app(scope, receive, bounded_send)

        counted_app: Any = counted
        stream: Any = connection
        await TCPServer(counted_app, config, context, ConnectionState({}), stream)

    return talk
