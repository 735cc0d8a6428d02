# SPDX-License-Identifier: Apache-2.0
"""Which node has a key: one server, the one that sentinels name, or a cluster; and commands sent there. Blocks."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from redis import exceptions
from redis.crc import key_slot

from tierd.store import StoreError
from tierd.store.redis_link import Address, Link, RedisOptions, told

SLOTS = 16384
REDIRECTS_MAX = 5

T = TypeVar("T")
Words = Sequence[Sequence[str | int]]  # commands without a key
ROLE: Words = (("ROLE",),)


class Nodes(Protocol):
    """Who has which key. `of` and `all` look it up once; `refresh` anew. OSError, StoreError."""

    def of(self, key: str) -> Address: ...
    def known(self, key: str) -> Address | None:
        """As `of`, asking nobody. Any thread; does not block."""
        ...

    def all(self) -> list[Address]:
        """Every node that may be written."""
        ...

    @property
    def together(self) -> bool:
        """Whether commands on any keys can be one transaction."""
        ...

    @property
    def guard(self) -> Words:
        """What is sent before commands, to know that the node may answer them."""
        ...

    def refresh(self) -> object: ...
    def close(self) -> None: ...


class _Single:
    guard, together = ROLE, True

    def __init__(self, address: Address) -> None:
        self._address = address

    def of(self, key: str) -> Address:
        return self._address

    def known(self, key: str) -> Address:
        return self._address

    def all(self) -> list[Address]:
        return [self._address]

    def refresh(self) -> None:
        """It is where it is."""

    def close(self) -> None:
        """It has nothing."""


class _Watched:
    """Where the sentinels say that the server is."""

    guard, together = ROLE, True

    def __init__(self, options: RedisOptions) -> None:
        self._link = Link(options, options.namespace, 1, sentinels=True)
        self._service = options.service or ""
        self._sentinels = list(options.addresses)
        self._found: Address | None = None
        self._lock = threading.Lock()

    def of(self, key: str) -> Address:
        return self._found or self.refresh()

    def known(self, key: str) -> Address | None:
        return self._found

    def all(self) -> list[Address]:
        return [self.of("")]

    def refresh(self) -> Address:
        with self._lock:
            self._found = _first_answer(self._sentinels, self._ask, f"no sentinel knows server {self._service!r}")
            return self._found

    def close(self) -> None:
        self._link.close()

    def _ask(self, sentinel: Address) -> Address:
        found = self._link.call(sentinel, "SENTINEL GET-MASTER-ADDR-BY-NAME", self._service)
        if not found:
            raise StoreError(f"{sentinel} has no server {self._service!r}; see service, and `SENTINEL MASTERS` there")
        host, port = found
        return Address(_text(host), int(port))


class _Cluster:
    """By the map of slots that some node gives, another one each time."""

    guard: Words = ()  # a replica of a cluster answers MOVED
    together = False

    def __init__(self, options: RedisOptions, link: Link) -> None:
        self._link = link
        self._known = list(options.addresses)
        self._slots: list[Address] = []
        self._lock = threading.Lock()

    def of(self, key: str) -> Address:
        return (self._slots or self.refresh())[key_slot(key.encode())]

    def known(self, key: str) -> Address | None:
        return self._slots[key_slot(key.encode())] if self._slots else None

    def all(self) -> list[Address]:
        return sorted(set(self._slots or self.refresh()))

    def refresh(self) -> list[Address]:
        with self._lock:
            slots = _first_answer(self._known, self._ask, "no node of the cluster can be used")
            self._known += sorted(set(slots) - set(self._known))
            self._slots = slots
            return slots

    def close(self) -> None:
        """The link is not ours."""

    def _ask(self, address: Address) -> list[Address]:
        slots: dict[int, Address] = {}
        for first, last, (host, port, *_), *_ in self._link.call(address, "CLUSTER SLOTS"):
            slots |= dict.fromkeys(range(first, last + 1), Address(_text(host) or address.host, port))
        if len(slots) < SLOTS:
            raise StoreError(
                f"at {address} the cluster has {len(slots)} of {SLOTS} slots; see `redis-cli --cluster check {address}`"
            )
        return [slots[slot] for slot in range(SLOTS)]


def _first_answer(addresses: list[Address], ask: Callable[[Address], T], nobody: str) -> T:
    """Of the first that has one; the next time begin with the one after it. OSError, StoreError: what all of them said."""
    troubles: list[OSError | StoreError] = []
    for address in tuple(addresses):
        addresses.append(addresses.pop(0))
        try:
            return ask(address)
        except (OSError, StoreError) as error:
            troubles.append(error)
    text = f"{nobody}: " + "; ".join(getattr(error, "strerror", None) or str(error) for error in troubles)
    if any(isinstance(error, StoreError) for error in troubles):
        raise StoreError(text)
    raise OSError(errno.ENOTCONN, text)


def _text(word: bytes | str) -> str:
    return word.decode() if isinstance(word, bytes) else word


def nodes_of(options: RedisOptions, link: Link) -> Nodes:
    """By options.mode. Asks nobody yet."""
    match options.mode:
        case "single":
            return _Single(options.addresses[0])
        case "sentinel":
            return _Watched(options)
        case "cluster":
            return _Cluster(options, link)


class Command(NamedTuple):
    """What to do with a key: HSET with fields and values, for example."""

    verb: str
    key: str = ""
    rest: tuple[bytes | str | int, ...] = ()

    @property
    def words(self) -> tuple[bytes | str | int, ...]:
        return (self.verb, self.key, *self.rest) if self.key else (self.verb,)


class Run:
    """Commands sent to the nodes that have their keys, following the cluster when it moves slots.

    A node where a connection failed with commands on it may carry them out later: before anything else is sent there, whoever
    sends it, `make_sure` is called. Blocks; OSError, StoreError: it is not sure yet."""

    def __init__(
        self,
        nodes: Nodes,
        link: Link,
        make_sure: Callable[[Address], None] | None = None,
        must_keep: Callable[[Address], None] | None = None,
    ) -> None:
        """`must_keep` is called before pages are written to a node, and raises OSError or StoreError if they must not be."""
        self._nodes, self._link = nodes, link
        self._make_sure, self._must_keep = make_sure, must_keep
        self._doubtful: set[Address] = set()

    def __call__(self, commands: Sequence[Command], confirm: Words = (), *, together: bool = False) -> list[Any]:
        """The answers, in order. OSError, StoreError: others of the commands may have been carried out. `together`: all or
        none, where nodes can do that, so a server that syncs does it once, and not for each command that it has read."""
        answers: list[Any] = [None] * len(commands)
        send = self._send_together if together and self._nodes.together else self._send
        for address, indexes in self._by_node(commands).items():
            for index, answer in zip(indexes, send(address, [commands[i] for i in indexes], confirm), strict=True):
                answers[index] = self._follow(commands[index], confirm, address, answer)
        return answers

    def _by_node(self, commands: Sequence[Command]) -> dict[Address, list[int]]:
        found: dict[Address, list[int]] = {}
        for index, command in enumerate(commands):
            found.setdefault(self._nodes.of(command.key), []).append(index)
        return found

    def _send(
        self, address: Address, commands: Sequence[Command], confirm: Words, *, asking: bool = False
    ) -> list[Any]:
        """Answers of the commands; those that are errors are in there. What was done is confirmed."""
        if self._must_keep is not None and any(command.verb == "HSET" for command in commands):
            self._must_keep(address)
        if address in self._doubtful and self._make_sure is not None:
            self._make_sure(address)
            self._doubtful.discard(address)
        before = [*self._nodes.guard, *([("ASKING",)] if asking else [])]
        try:
            answers = self._link.pipeline(address, [*before, *(command.words for command in commands), *confirm])
        except (OSError, StoreError):
            self._doubtful.add(address)
            raise
        if self._nodes.guard:
            _check_role(address, answers[0])
        done = len(before) + len(commands)
        _check_confirmed(address, confirm, answers[done:])
        return answers[len(before) : done]

    def _send_together(self, address: Address, commands: Sequence[Command], confirm: Words) -> list[Any]:
        *queued, done = self._send(address, [Command("MULTI"), *commands, Command("EXEC")], confirm)[1:]
        if isinstance(done, exceptions.RedisError):  # what could not be queued says why
            return [next((answer for answer in queued if isinstance(answer, exceptions.RedisError)), done)] * len(
                queued
            )
        return list(done)

    def _follow(self, command: Command, confirm: Words, address: Address, answer: Any) -> Any:
        for _ in range(REDIRECTS_MAX):
            if not isinstance(answer, exceptions.AskError):
                break
            moved = isinstance(answer, exceptions.MovedError)
            if moved:
                self._nodes.refresh()
            address = Address(answer.host or address.host, answer.port)
            (answer,) = self._send(address, [command], confirm, asking=not moved)
        if isinstance(answer, exceptions.RedisError):
            raise told(answer, str(address)) from answer
        return answer


def _check_role(address: Address, answer: Any) -> None:
    """A server that was replaced becomes a replica, which would give back old pages."""
    if isinstance(answer, exceptions.RedisError):
        raise told(answer, str(address)) from answer
    if _text(answer[0]) != "master":
        raise OSError(errno.EROFS, f"{address} is a replica now; another server has its place")


def guarded(guard: Words, answers: Sequence[Any]) -> bool:
    """Whether these answers, of which none is an error, are of a node that may give them."""
    return not guard or _text(answers[0][0]) == "master"


def _check_confirmed(address: Address, confirm: Words, answers: Sequence[Any]) -> None:
    """OSError, StoreError: fewer than wanted have it."""
    for (verb, *wanted, _), answer in zip(confirm, answers, strict=True):
        if isinstance(answer, exceptions.RedisError):
            raise told(answer, str(address)) from answer
        got = answer if isinstance(answer, list) else [answer]
        if any(have < want for have, want in zip(got, wanted, strict=True)):
            raise OSError(errno.EIO, f"{address}: {verb} {wanted} was confirmed by {got} only; see its replicas")


def batches(commands: Sequence[Command], count: int) -> Iterator[Sequence[Command]]:
    for start in range(0, len(commands), count):
        yield commands[start : start + count]


def batches_of_words(commands: Sequence[Command], most: int) -> Iterator[Sequence[Command]]:
    """Fields and values, of which each batch has `most`, or one command has more."""
    batch: list[Command] = []
    words = 0
    for command in commands:
        words += len(command.rest)
        if batch and words > most:
            yield batch
            batch, words = [], len(command.rest)
        batch.append(command)
    if batch:
        yield batch
