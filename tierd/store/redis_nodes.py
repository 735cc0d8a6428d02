# SPDX-License-Identifier: Apache-2.0
"""Which node of a Redis or Valkey has a key, and commands sent there: one server, a set watched by sentinels, a cluster.

redis-py has the connections, TLS, credentials and the protocol. What is here is what it cannot know: that a command which
may still be carried out after its error (a write of guest memory) must never be repeated by itself, and which connection it
was on. Everything here blocks, for at most a few times `timeout_s`, and may be called from any thread.
"""

from __future__ import annotations

import errno
import ssl
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.credentials import CredentialProvider
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from tierd.store import StoreError

SLOTS = 16384
REDIRECTS_MAX = 5
REPLICA_WAIT_SHARE = 0.8  # of timeout_s: WAIT answers before we give up on the connection
# what an ACL user of tierd needs, besides ~NAMESPACE:* and, of sentinels, what they say by themselves
ACL = (
    "+hset +hsetnx +hget +hmget +hgetall +hdel +hlen +unlink +set +get +pexpire +wait +waitaof +info +ping +select "
    "+client|setname +client|list +client|kill +cluster|slots +cluster|info +asking"
)


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _parse_address(value: object) -> object:
    """`redis1:6379`, `10.0.0.1:6379`, `[::1]:6379`."""
    host, colon, port = str(value).rpartition(":")
    if isinstance(value, str) and colon and host and port.isdecimal() and 0 < int(port) < 65536:
        return Address(host.removeprefix("[").removesuffix("]"), int(port))
    raise ValueError(f"{value!r} is not an address; write HOST:PORT, redis1:6379 for example")


class Tls(BaseModel):
    """Certificates in PEM files. ca_file: None: those that the system trusts. cert_file, key_file: if the server wants ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None


class RedisOptions(BaseModel):
    """The keys of a tier `redis`. Passwords are in files, which are read at every connection: they can be changed there."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    mode: Literal["single", "sentinel", "cluster"] = "single"
    addresses: Annotated[
        tuple[Annotated[Address, BeforeValidator(_parse_address)], ...], Field(min_length=1, max_length=64)
    ]  # of the server, of the sentinels, of some nodes of the cluster
    service: str | None = None  # what the sentinels call the server
    username: str | None = None
    password_file: Path | None = None
    sentinel_username: str | None = None
    sentinel_password_file: Path | None = None
    tls: Tls | None = None
    namespace: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "tierd"
    host_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None  # None: by machine-id and hardware
    replicas: Annotated[int, Field(ge=0, le=16)] = 0  # that must have a page before it counts as stored (WAIT)
    fsync: bool = False  # and on whose disk it must be (WAITAOF, from Redis 7.2 on)
    allow_volatile: bool = False  # a server that keeps nothing across its restart
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0  # of one answer
    deadline_s: Annotated[float, Field(gt=0, le=600)] = 10.0  # of a read, with its repetitions
    connections: Annotated[int, Field(ge=1, le=64)] = 8  # for reads, to each node; a guest has one more for writes

    @model_validator(mode="after")
    def _fits(self) -> RedisOptions:
        if (self.mode == "sentinel") != (self.service is not None):
            raise ValueError(
                "`service` is the server's name at its sentinels: give it with mode: sentinel, and only there"
            )
        if self.username is not None and self.password_file is None:
            raise ValueError("`username` needs a `password_file`")
        if self.tls and (self.tls.cert_file is None) != (self.tls.key_file is None):
            raise ValueError("`cert_file` and `key_file` go together")
        return self


class _Password(CredentialProvider):
    def __init__(self, username: str | None, path: Path) -> None:
        self._username, self._path = username, path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            mode = stat.S_IMODE(self._path.stat().st_mode)
            password = self._path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not text"
            raise StoreError(f"password_file {self._path} cannot be read: {why}; put the password there") from error
        if mode & 0o007:
            raise StoreError(f"password_file {self._path} has mode {mode:04o}, everybody can read it; chmod 0600 it")
        return (self._username, password) if self._username is not None else (password,)


def _connection_options(options: RedisOptions, username: str | None, password_file: Path | None) -> dict[str, Any]:
    """What redis-py wants to know of every connection. It repeats nothing: see the module."""
    given: dict[str, Any] = {
        "socket_timeout": options.timeout_s,
        "socket_connect_timeout": options.timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }
    if password_file is not None:
        given["credential_provider"] = _Password(username, password_file)
    return given | _tls_options(options.tls) if options.tls else given


def _tls_options(tls: Tls) -> dict[str, Any]:
    given: dict[str, Any] = {"ssl": True, "ssl_check_hostname": True, "ssl_min_version": ssl.TLSVersion.TLSv1_2}
    files = {"ca_certs": tls.ca_file, "certfile": tls.cert_file, "keyfile": tls.key_file}
    for name, path in files.items():
        if path is not None:
            try:
                path.open("rb").close()  # redis-py would say that it could not connect
            except OSError as error:
                raise StoreError(f"{path} cannot be read: {error.strerror}; see tls") from error
            given[f"ssl_{name}"] = str(path)
    return given


ERRORS = (exceptions.RedisError, exceptions.RedisClusterException, OSError)


def told(error: BaseException, where: str) -> OSError | StoreError:
    """What went wrong at `where`, in the terms of PageSpace and for the operator."""
    match error:
        case StoreError():
            return error
        case exceptions.AuthenticationError() | exceptions.AuthorizationError():
            return StoreError(f"{where} refuses the credentials ({error}); see username and password_file")
        case exceptions.NoPermissionError():
            return StoreError(f"{where}: {error}; tierd's ACL user needs ~NAMESPACE:* {ACL}")
        case exceptions.OutOfMemoryError():
            return OSError(errno.ENOSPC, f"{where} is full ({error}); raise its maxmemory")
        case exceptions.TimeoutError():
            return OSError(errno.ETIMEDOUT, f"{where} does not answer: {error}")
        case exceptions.ReadOnlyError():
            return OSError(errno.EROFS, f"{where} is a replica: {error}")
        case exceptions.ConnectionError():
            return OSError(errno.ENOTCONN, f"{where} cannot be reached: {error}")
        case OSError():
            return OSError(error.errno or errno.EIO, f"{where}: {error.strerror or error}")
    return OSError(errno.EIO, f"{where}: {error}")


class Link:
    """Connections to any node, at most `connections` to each, that are called `name` there (CLIENT LIST)."""

    def __init__(self, options: RedisOptions, name: str, connections: int) -> None:
        self._given = _connection_options(options, options.username, options.password_file)
        self._given |= {"client_name": name, "max_connections": connections}
        self._clients: dict[Address, Redis] = {}
        self._lock = threading.Lock()

    def client(self, address: Address) -> Redis:
        """Of one node. It connects when it is asked something."""
        with self._lock:
            if address not in self._clients:
                self._clients[address] = Redis(host=address.host, port=address.port, **self._given)
            return self._clients[address]

    def call(self, address: Address, *command: bytes | str | int) -> Any:
        """One command; its answer. OSError, StoreError."""
        try:
            return self.client(address).execute_command(*command)  # type: ignore[no-untyped-call]
        except ERRORS as error:
            raise told(error, str(address)) from error

    def pipeline(self, address: Address, commands: Sequence[Sequence[bytes | str | int]]) -> list[Any]:
        """All commands in one go on one connection; answers, of which each may be an exception. OSError, StoreError: the
        connection failed, and the commands may or may not be carried out, now or later."""
        try:
            with self.client(address).pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
                return pipeline.execute(raise_on_error=False)
        except ERRORS as error:
            raise told(error, str(address)) from error

    def close(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()


class Nodes(Protocol):
    """Who has which key. `of` and `all` look it up once; `refresh` anew. OSError, StoreError."""

    def of(self, key: str) -> Address: ...
    def all(self) -> list[Address]:
        """Every node that may be written."""
        ...

    def refresh(self) -> None: ...


class _Single:
    def __init__(self, address: Address) -> None:
        self._address = address

    def of(self, key: str) -> Address:
        return self._address

    def all(self) -> list[Address]:
        return [self._address]

    def refresh(self) -> None:
        """It is where it is."""


class _Watched:
    """Where the sentinels say that the server is."""

    def __init__(self, options: RedisOptions) -> None:
        given = _connection_options(options, options.sentinel_username, options.sentinel_password_file)
        self._service = options.service
        self._sentinels = Sentinel(list(options.addresses), sentinel_kwargs=given)  # type: ignore[no-untyped-call]
        self._addresses = options.addresses
        self._found: Address | None = None

    def of(self, key: str) -> Address:
        return self.all()[0]

    def all(self) -> list[Address]:
        if self._found is None:
            self.refresh()
        assert self._found is not None
        return [self._found]

    def refresh(self) -> None:
        where = "sentinels " + ", ".join(map(str, self._addresses))
        try:
            host, port = self._sentinels.discover_master(self._service)  # type: ignore[no-untyped-call]
            self._found = Address(host, port)
        except MasterNotFoundError as error:
            raise OSError(
                errno.ENOTCONN,
                f"{where} know no server {self._service!r} that is up ({error}); "
                f"see `redis-cli -p PORT sentinel master {self._service}`",
            ) from error
        except ERRORS as error:
            raise told(error, where) from error


class _Cluster:
    """By the map of slots that some node gives, another one each time."""

    def __init__(self, options: RedisOptions, link: Link) -> None:
        self._link = link
        self._known = list(options.addresses)
        self._slots: list[Address] = []

    def of(self, key: str) -> Address:
        if not self._slots:
            self.refresh()
        return self._slots[key_slot(key.encode())]

    def all(self) -> list[Address]:
        if not self._slots:
            self.refresh()
        return sorted(set(self._slots))

    def refresh(self) -> None:
        troubles: list[OSError | StoreError] = []
        for address in list(self._known):
            self._known.append(self._known.pop(0))
            try:
                self._slots = self._ask(address)
                break
            except (OSError, StoreError) as error:
                troubles.append(error)
        else:
            text = "no node of the cluster can be used: " + "; ".join(str(error) for error in troubles)
            if any(isinstance(error, StoreError) for error in troubles):
                raise StoreError(text)
            raise OSError(errno.ENOTCONN, text)
        self._known += [node for node in self.all() if node not in self._known]

    def _ask(self, address: Address) -> list[Address]:
        answer = self._link.call(address, "CLUSTER SLOTS")
        slots: dict[int, Address] = {}
        for (first, last), nodes in answer.items():
            host, port = nodes["primary"][:2]
            slots |= dict.fromkeys(range(first, last + 1), Address(host or address.host, port))
        if len(slots) < SLOTS:
            raise StoreError(
                f"at {address} the cluster has {len(slots)} of {SLOTS} slots; see `redis-cli --cluster check {address}`"
            )
        return [slots[slot] for slot in range(SLOTS)]


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
    key: str
    rest: tuple[bytes | str | int, ...] = ()

    @property
    def words(self) -> tuple[bytes | str | int, ...]:
        return (self.verb, self.key, *self.rest)


Confirm = Sequence[Sequence[str | int]]  # sent after the commands on the same connection: WAIT


class Run:
    """Commands sent to the nodes that have their keys, following the cluster when it moves slots.

    `doubtful` are the nodes where a connection failed with commands on it: these may be carried out later."""

    def __init__(self, nodes: Nodes, link: Link) -> None:
        self._nodes, self._link = nodes, link
        self.doubtful: set[Address] = set()

    def __call__(self, commands: Sequence[Command], confirm: Confirm = ()) -> list[Any]:
        """The answers, in order. OSError, StoreError: others of the commands may have been carried out."""
        answers: list[Any] = [None] * len(commands)
        for address, indexes in self._by_node(commands).items():
            for index, answer in zip(
                indexes, self._send(address, [commands[i] for i in indexes], confirm), strict=True
            ):
                answers[index] = self._follow(commands[index], confirm, address, answer)
        return answers

    def _by_node(self, commands: Sequence[Command]) -> dict[Address, list[int]]:
        found: dict[Address, list[int]] = {}
        for index, command in enumerate(commands):
            found.setdefault(self._nodes.of(command.key), []).append(index)
        return found

    def _send(
        self, address: Address, commands: Sequence[Command], confirm: Confirm, *, asking: bool = False
    ) -> list[Any]:
        """Answers of the commands; those that are errors are in there. What was done is confirmed."""
        before = [("ASKING",)] if asking else []
        try:
            answers = self._link.pipeline(address, [*before, *(command.words for command in commands), *confirm])
        except (OSError, StoreError):
            self.doubtful.add(address)
            raise
        done = len(before) + len(commands)
        _check(address, confirm, answers[done:])
        return answers[len(before) : done]

    def _follow(self, command: Command, confirm: Confirm, address: Address, answer: Any) -> Any:
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


def _check(address: Address, confirm: Confirm, answers: Sequence[Any]) -> None:
    """OSError, StoreError: fewer than wanted have it. A node that has become a replica has none: the commands say that."""
    for (verb, *wanted, _), answer in zip(confirm, answers, strict=True):
        if isinstance(answer, exceptions.ResponseError) and "replica" not in str(answer):
            raise told(answer, str(address)) from answer
        got = answer if isinstance(answer, list) else [answer]
        if not isinstance(answer, Exception) and any(have < want for have, want in zip(got, wanted, strict=True)):
            raise OSError(errno.EIO, f"{address}: {verb} {wanted} was confirmed by {got} only; see its replicas")


def batches(commands: Sequence[Command], count: int) -> Iterator[Sequence[Command]]:
    for start in range(0, len(commands), count):
        yield commands[start : start + count]
