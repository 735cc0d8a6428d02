# SPDX-License-Identifier: Apache-2.0
"""Connections to Redis or Valkey, and what their errors mean to an operator.

redis-py has the protocol, pools, TLS and credentials. It must repeat nothing by itself: a command whose connection failed
may still be carried out later. Everything here blocks, a few times `timeout_s` at most, and may be called from any thread.
"""

from __future__ import annotations

import errno
import ssl
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.retry import Retry

from tierd.store import StoreError
from tierd.store.options import HostId

# what an ACL user of tierd needs
ACL = (
    "+hset +hsetnx +hget +hmget +hgetall +hdel +hlen +unlink +set +pttl +pexpire +wait +waitaof +role +info +config|get "
    "+client|setname +client|list +client|kill +cluster|slots +cluster|info +asking +multi +exec"
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
    """The keys of the store `redis`. Passwords are in files, which are read at every connection: they can be changed there."""

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
    host_id: HostId | None = None  # None: by machine-id and hardware
    replicas: Annotated[int, Field(ge=0, le=16)] = 0  # that must have a page before it counts as stored (WAIT)
    fsync: bool = False  # and on whose disk it must be (WAITAOF, from Redis 7.2 on)
    allow_volatile: bool = False  # a server that may forget what a write had returned for when it is killed
    timeout_s: Annotated[float, Field(gt=0, le=60)] = 5.0  # of one answer
    deadline_s: Annotated[float, Field(gt=0, le=600)] = 10.0  # of a read, with its repetitions
    concurrency: Annotated[int, Field(ge=1, le=64)] = (
        8  # connections for reads, to each node; a guest has one more for writes
    )

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
    """What redis-py wants to know of every connection. It repeats nothing."""
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

    def __init__(self, options: RedisOptions, name: str, connections: int, *, sentinels: bool = False) -> None:
        login = (options.username, options.password_file)
        if sentinels:
            login = (options.sentinel_username, options.sentinel_password_file)
        self._given = _connection_options(options, *login)
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

    def connect(self, address: Address) -> Any:
        """A connection of the caller's own, until it gives it up. OSError, StoreError."""
        try:
            return self.client(address).connection_pool.get_connection()
        except ERRORS as error:
            raise told(error, str(address)) from error

    def give_up(self, address: Address, connection: Any) -> None:
        """Hang up. Does not block."""
        connection.disconnect()
        self.client(address).connection_pool.release(connection)

    def close(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()
