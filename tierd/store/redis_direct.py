# SPDX-License-Identifier: Apache-2.0
"""Reads that trio waits for itself: the way to a thread and back takes several times as long as Redis does.

redis-py makes the connections, with TLS and credentials, in a thread; here is only the way of a question and its answers.
Whatever is not as it should be is nobody's trouble here: reads can be repeated, and the long way (redis_link, redis_nodes)
says what it is.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import defaultdict
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import hiredis
import trio

from tierd.store.redis_link import Address, Link, RedisOptions

RECEIVED_BYTES = 256 << 10  # at a time
# The answer to a read that is the only one is looked for again and again for so long: a round of trio's loop would take more of
# its thread's time. Where one came later, so many others wait for trio.
SPIN_S, NOT_SPUN = 50e-6, 32
IN_A_ROW = 16  # reads, before others get trio's thread in any case
NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Direct:
    """Connections for reads, at most `concurrency` to each node."""

    def __init__(self, options: RedisOptions, name: str) -> None:
        self._timeout_s = options.timeout_s
        self._link = Link(options, name, options.concurrency)
        self._idle: dict[Address, list[tuple[Any, socket.socket]]] = defaultdict(list)
        self._possible = True  # redis-py lets us have its sockets
        self._under_way = self._in_a_row = 0
        self._not_spun: dict[Address, int] = defaultdict(int)  # how many more

    def prepare(self, address: Address) -> None:
        """One more connection, for the next read, if there is none. Blocks; OSError, StoreError."""
        if not self._idle[address] and self._possible:
            connection = self._link.connect(address)
            sock = _socket(connection)
            if sock is None:
                self._possible = False
                self._link.give_up(address, connection)
            else:
                sock.setblocking(False)
                self._idle[address].append((connection, sock))

    async def ask(self, address: Address, commands: Sequence[Sequence[bytes | str | int]]) -> list[Any] | None:
        """The answers; None: there is no connection, or it did not work. A cancellation is over at once."""
        idle, answers = self._idle[address], None
        if not idle:
            return None
        connection, sock = idle.pop()
        self._under_way += 1
        try:
            with trio.move_on_after(self._timeout_s):
                answers = await self._exchange(address, sock, _packed(commands), len(commands))
        except (OSError, hiredis.HiredisError):
            pass
        finally:
            self._under_way -= 1
            if answers is None:  # an answer may still come
                self._link.give_up(address, connection)
            else:
                idle.append((connection, sock))
        self._in_a_row = (self._in_a_row + 1) % IN_A_ROW
        if not self._in_a_row:
            await trio.lowlevel.checkpoint()
        return None if answers is None or any(isinstance(answer, hiredis.ReplyError) for answer in answers) else answers

    async def _exchange(self, address: Address, sock: socket.socket, question: bytes, count: int) -> list[Any]:
        while question:
            try:
                question = question[sock.send(question) :]
            except NOT_YET:
                await trio.lowlevel.wait_writable(sock)
        reader = hiredis.Reader()
        answers: list[Any] = []
        received = self._received_soon(address, sock)
        while True:
            if received is not None:
                if not received:
                    raise ConnectionResetError
                reader.feed(received)
                while (answer := reader.gets()) is not False:  # RESP2 has no such value
                    answers.append(answer)
                if len(answers) >= count:
                    return answers
            received = await _received(sock)

    def _received_soon(self, address: Address, sock: socket.socket) -> bytes | None:
        """None: nothing yet."""
        if self._under_way > 1 or self._not_spun[address]:
            self._not_spun[address] = max(self._not_spun[address] - 1, 0)
            return None
        until = perf_counter() + SPIN_S
        while perf_counter() < until:
            with contextlib.suppress(*NOT_YET):
                return sock.recv(RECEIVED_BYTES)
        self._not_spun[address] = NOT_SPUN
        return None

    def close(self) -> None:
        self._idle.clear()
        self._link.close()


def _packed(commands: Sequence[Sequence[bytes | str | int]]) -> bytes:
    return b"".join([hiredis.pack_command(tuple(command)) for command in commands])  # type: ignore[arg-type]


def _socket(connection: Any) -> socket.socket | None:
    """None: not any more. redis-py has no other name for it, and may take this one away."""
    return getattr(connection, "_sock", None)


async def _received(sock: socket.socket) -> bytes:
    while True:
        with contextlib.suppress(*NOT_YET):
            return sock.recv(RECEIVED_BYTES)
        await trio.lowlevel.wait_readable(sock)
