# SPDX-License-Identifier: Apache-2.0
"""The configuration: frozen types, their keys, defaults and what each value may be. load.py makes them of YAML files.

Sizes are bytes or strings like `512MiB`; times are seconds or strings like `30s`, `2min`, `500ms`; rates `100MiB/s`.
No clock, no log and no I/O here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tierd.quantities import parse_rate, parse_size, parse_time, shown

SAFE_MIN_IDLE_S = 120.0
AGE_S_MAX = 5 * 86400.0  # a page's age is counted in 61,440 steps of 8 s: somewhat more than this
SOCKET_PATH_BYTES_MAX = 107  # sun_path, unix(7)
OWN_STORES = ("memory", "file")  # without a section in stores
NAME = r"^[a-z][a-z0-9_-]{0,40}$"  # of a store


def _parse_switch(value: object) -> object:
    """YAML reads bare `on` and `off` as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _parse_mode(value: object) -> int:
    """`0660`: octal, as everybody means it. 660 and 432 could be either, so they are refused."""
    if isinstance(value, str) and re.fullmatch(r"0o?[0-7]{3}", value):
        return int(value.removeprefix("0o"), 8)
    raise ValueError(f"{shown(value)} is not a file mode; write four octal digits, 0660 for example")


def _parse_path(value: object) -> Path:
    with contextlib.suppress(UnicodeEncodeError):  # a lone surrogate: YAML can write it, a file system cannot
        if isinstance(value, str) and os.fsencode(value) and "\0" not in value:
            return Path(value)
    raise ValueError(f"{shown(value)} is not a path")


def _socket_fits(path: Path) -> Path:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ValueError(f"the path of a socket has at most {SOCKET_PATH_BYTES_MAX} bytes; choose a shorter one")
    return path


def _parse_address(listen: object) -> object:
    """`127.0.0.1:9464`, `[::1]:9464`, `localhost:9464`, `:9464` for all addresses."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):([0-9]{1,5})", str(listen))
    try:
        if not match or not 0 < int(match[2]) < 65536:
            raise ValueError
        if match[1] not in ("", "localhost"):
            ipaddress.IPv6Address(match[1][1:-1]) if match[1][0] == "[" else ipaddress.IPv4Address(match[1])
    except ValueError:
        what = f"{shown(listen)} is not a numeric address and a port"
        raise ValueError(f"{what}; write 127.0.0.1:9464 for example") from None
    return listen


def _is_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{shown(pattern)} is not a regular expression: {error}") from None
    return pattern


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0, le=1 << 60)]
Seconds = Annotated[float, BeforeValidator(parse_time), Field(ge=0, le=366 * 86400)]
Interval = Annotated[float, BeforeValidator(parse_time), Field(ge=0.1, le=86400)]
Rate = Annotated[int, BeforeValidator(parse_rate), Field(gt=0, le=1 << 60)]
SomePath = Annotated[Path, BeforeValidator(_parse_path)]


def _impossible(message: str, *keys: str) -> PydanticCustomError:
    """Keys that are right one by one, but not together."""
    return PydanticCustomError("impossible", "{message}", {"message": message, "keys": keys})


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Tier(Frozen):
    """A step of a policy's ladder: a store by its name, `memory`, `file` or one of `stores`."""

    name: Annotated[str, Field(pattern=NAME)]
    capacity: Size | None = None  # of this guest's pages there; None: what the store has
    min_age_s: Seconds | None = (
        None  # pages idle for so long sink there, younger ones never; None: what the tier above has no room for
    )

    def __str__(self) -> str:
        given = ((key, getattr(self, key)) for key in ("capacity", "min_age_s") if getattr(self, key) is not None)
        more = ", ".join(f"{key}: {_told(value)}" for key, value in given)
        return f"{self.name} ({more})" if more else self.name


def _parse_tiers(value: object) -> object:
    """`[memory, {name: file, min_age_s: 1h}]`: names, or mappings with a name. ValueError says which is wrong."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{shown(value)} is not a list of tiers; write [memory, file] for example")
    return tuple(_parse_tier(i, item) for i, item in enumerate(value, 1))


def _parse_tier(number: int, item: object) -> Tier:
    if isinstance(item, Tier):
        return item
    given = {"name": item} if isinstance(item, str) else item
    try:
        return Tier.model_validate(given)
    except ValidationError as error:
        told = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in told["loc"])
        message = told["msg"].removeprefix("Value error, ")
        known = ": known keys are name, capacity, min_age_s" if told["type"] == "extra_forbidden" else ""
        raise ValueError(
            f"tier {number}{f', {key}' if key else ''}: {shown(told['input'])}: {message}{known}"
        ) from None


class Policy(Frozen):
    """How one guest is treated. Defaults stand here and nowhere else."""

    enabled: bool = True
    dry_run: bool = False  # track and report, move nothing
    interval_s: Interval = 10.0
    idle_intervals: Annotated[int, Field(ge=1, le=100_000)] = 30  # untouched for so many intervals: cold
    min_idle_s: Seconds = SAFE_MIN_IDLE_S  # never evict anything younger: it must outlast any I/O in flight
    unsafe_min_idle: bool = False  # allows min_idle_s below 120 s; for tests
    resident_min: Size = 0
    resident_max: Size | None = None
    # where cold pages go, in the order in which they sink
    tiers: Annotated[tuple[Tier, ...], BeforeValidator(_parse_tiers), Field(max_length=8)] = (Tier(name="file"),)
    stored_max: Size | None = None  # of guest memory, in all tiers together
    evict_rate_max: Rate | None = None  # bytes/s
    demote_rate_max: Rate | None = None  # bytes/s of guest memory, from tier to tier
    readahead_pages: Annotated[int, Field(ge=1, le=512)] = 16
    read_deadline_s: Seconds = 30.0  # a stored page that cannot be read is tried again for so long; then on_lost
    on_lost: Literal["poison", "hold"] = "poison"  # a memory error for the guest; or it waits for `tierd retry`
    # rwp and rfc: while pages leave, an access to any untouched page costs the guest a round trip; for so long at a time
    hold_ms_max: Annotated[int, Field(ge=1, le=1000)] = 20
    # of private anonymous memory, whose readers are only found out by moving it: so much of the guest's time may that cost
    stall_budget: Annotated[float, Field(gt=0, le=1)] = 0.001
    # of private anonymous memory: large pages of which only a part is cold leave in part
    split_large_pages: bool = False
    fault_threads_max: Annotated[int, Field(ge=2, le=64)] = 4  # where the store hangs, others take over
    allow_nested: bool = False  # tier guests that may run guests of their own
    allow_fragile: bool = False  # serve guests whose stored pages would be gone with tierd
    allow_gigantic: bool = False  # tier memory in pages of 1 GiB

    @model_validator(mode="after")
    def _possible(self) -> Policy:
        if self.resident_max is not None and self.resident_min > self.resident_max:
            raise _impossible(
                f"resident_min ({self.resident_min}) is above resident_max ({self.resident_max})",
                "resident_min",
                "resident_max",
            )
        if self.min_idle_s < SAFE_MIN_IDLE_S and not self.unsafe_min_idle:
            raise _impossible(
                f"min_idle_s is {self.min_idle_s:g} s; below {SAFE_MIN_IDLE_S:g} s a transfer by direct I/O that is "
                "still in flight into an idle page could be lost. For a test, say `unsafe_min_idle: true` beside it",
                "min_idle_s",
            )
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise _impossible(f"a tier stands twice in tiers ({', '.join(names)})", "tiers")
        ages = [tier.min_age_s for tier in self.tiers if tier.min_age_s is not None]
        if ages != sorted(ages) or max(ages, default=0) > AGE_S_MAX:
            raise _impossible(
                f"min_age_s of the tiers ({', '.join(f'{age:g}' for age in ages)} s) must grow from each to the next, up to "
                f"{AGE_S_MAX:g} s",
                "tiers",
            )
        if self.cold_s > AGE_S_MAX:
            raise _impossible(
                f"a page would be cold after {self.cold_s:g} s, but ages are only counted up to {AGE_S_MAX:g} s "
                "(5 days): nothing would ever be evicted; lower it, or say `enabled: false`",
                *(["min_idle_s"] if self.min_idle_s > AGE_S_MAX else ["idle_intervals", "interval_s"]),
            )
        return self

    @property
    def cold_s(self) -> float:
        """Idle for so long is cold: the intervals, and never less than the safety floor."""
        return max(self.min_idle_s, self.interval_s * self.idle_intervals)


class Api(Frozen):
    socket: Annotated[SomePath, AfterValidator(_socket_fits)] = Path("/run/tierd/tierd.sock")
    mode: Annotated[int, BeforeValidator(_parse_mode)] = 0o660
    group: Annotated[str, Field(min_length=1)] | None = None  # None: that of the process


class Metrics(Frozen):
    listen: Annotated[str, BeforeValidator(_parse_address)] | None = None  # None: only on the API's socket


class Handshake(Frozen):
    """For VMMs that bring their descriptors: they are served without a privilege (engine rwp)."""

    socket: Annotated[SomePath, AfterValidator(_socket_fits)] | None = None  # None: nobody can connect
    mode: Annotated[int, BeforeValidator(_parse_mode)] = 0o600
    group: Annotated[str, Field(min_length=1)] | None = None  # None: that of the process


class FileStoreConfig(Frozen):
    path: SomePath = Path("/var/lib/tierd")
    capacity: Size | None = None  # of all guests together; None: what the file system has
    direct: Annotated[Literal["auto", "on", "off"], BeforeValidator(_parse_switch)] = "auto"
    encrypt: bool = False  # files of guests that are attached from then on


class MemoryStoreConfig(Frozen):
    path: SomePath | None = None  # on a tmpfs; None: pools/ in runtime_dir
    capacity: Size | None = None  # of all guests' pools together; None: what the tmpfs has
    codec: Literal["lz4", "zstd"] = "lz4"


class AskedStoreConfig(Frozen):
    """A store that is asked: what tierd wants to know of each. All other keys are the store's own."""

    model_config = ConfigDict(extra="allow")

    name: str  # the key under `stores`
    capacity: Size | None = None  # of guest memory, of all guests together; None: what the store takes
    encrypt: bool = True
    second: Annotated[str, Field(pattern=NAME)] | None = None  # a store that holds every page of this one, too
    concurrency: Annotated[int, Field(ge=1, le=64)] = 8  # reads and writes at a time
    deadline_s: Annotated[float, BeforeValidator(parse_time), Field(gt=0, le=600)] = 10.0  # of one read

    @property
    def options(self) -> Mapping[str, object]:
        """The store's own keys."""
        return self.model_extra or {}


class Log(Frozen):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Rule(Frozen):
    """Which guests a policy is for; all that is given must match."""

    name: Annotated[str, Field(min_length=1)] | None = None  # a glob
    pid: Annotated[int, Field(gt=0, le=1 << 22)] | None = None
    # a regular expression, searched in the command line
    cmdline: Annotated[str, Field(min_length=1), AfterValidator(_is_pattern)] | None = None
    policy: Policy

    @model_validator(mode="after")
    def _says_whom(self) -> Rule:
        if self.name is None and self.pid is None and self.cmdline is None:
            raise _impossible("a guest rule needs name, pid or cmdline; name: '*' means every guest")
        return self

    @property
    def whom(self) -> str:
        given = ((key, getattr(self, key)) for key in WHOM if getattr(self, key) is not None)
        return ", ".join(f"{key}: {value}" for key, value in given)

    def matches(self, name: str, pid: int, cmdline: str) -> bool:
        return (
            (self.name is None or fnmatch.fnmatchcase(name, self.name))
            and (self.pid is None or self.pid == pid)
            and (self.cmdline is None or re.search(self.cmdline, cmdline) is not None)
        )

    @property
    def is_glob(self) -> bool:
        return self.name is not None and any(c in self.name for c in "*?[")


WHOM = ("name", "pid", "cmdline")


class Config(Frozen):
    runtime_dir: SomePath = Path("/run/tierd")
    api: Api = Api()
    handshake: Handshake = Handshake()
    metrics: Metrics = Metrics()
    store: FileStoreConfig = FileStoreConfig()
    memory: MemoryStoreConfig = MemoryStoreConfig()
    stores: tuple[AskedStoreConfig, ...] = ()  # those that are asked
    log: Log = Log()
    engine: Literal["auto", "rwp", "rfc", "stock"] = "auto"
    discover_interval_s: Interval = 1.0
    on_stop: Literal["restore", "keep"] = "restore"
    on_restart: Literal["keep", "restore"] = "keep"  # SIGUSR1: a tierd starts as soon as we are gone
    stop_timeout_s: Seconds = 300.0
    guests_dir: SomePath = Path("guests.d")  # relative to the main file
    defaults: Policy = Policy()
    guests: tuple[Rule, ...] = ()  # those of guests_dir first: they override

    @property
    def asked(self) -> Mapping[str, AskedStoreConfig]:
        """`stores` by name."""
        return {store.name: store for store in self.stores}

    def match(self, name: str, pid: int, cmdline: str) -> Policy | None:
        """The policy of the first rule that matches; None: the guest is left alone."""
        for rule in self.guests:
            if rule.matches(name, pid, cmdline):
                return rule.policy
        return None


NEED_RESTART = ("runtime_dir", "api", "handshake", "metrics", "store", "memory", "engine", "log")


def named_stores(config: Config) -> set[str]:
    """Tiers that some policy has, and those that hold second copies for them."""
    policies = (config.defaults, *(rule.policy for rule in config.guests))
    return with_seconds(config, {tier.name for policy in policies for tier in policy.tiers})


def with_seconds(config: Config, names: set[str]) -> set[str]:
    """These stores, and those that hold second copies for them."""
    return names | {store.second for store in config.stores if store.second and store.name in names}


def changes(old: Config, new: Config) -> list[str]:
    """What a reload changes, one line each, `store.path: /a -> /b`; and what of it waits for a restart."""
    told: list[str] = []
    for key in Config.model_fields:
        before, after = getattr(old, key), getattr(new, key)
        later = " (takes effect after a restart)" if key in NEED_RESTART else ""
        if key == "guests":
            told += _rule_changes(before, after)
        elif key == "stores":  # their keys may be secrets
            a, b = old.asked, new.asked
            told += [f"stores.{name}: added" for name in b if name not in a]
            told += [f"stores.{name}: removed (takes effect after a restart)" for name in a if name not in b]
            told += [f"stores.{n}: changed (takes effect after a restart)" for n in b if n in a and a[n] != b[n]]
        elif isinstance(before, Frozen):
            told += [line + later for line in _differences(f"{key}.", before, after)]
        elif before != after:
            told.append(f"{key}: {_told(before)} -> {_told(after)}{later}")
    return told


def _differences(prefix: str, before: BaseModel, after: BaseModel) -> Iterator[str]:
    for key in type(before).model_fields:
        a, b = getattr(before, key), getattr(after, key)
        if a != b:
            yield f"{prefix}{key}: {_told(a)} -> {_told(b)}"


def _told(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _rule_changes(before: Sequence[Rule], after: Sequence[Rule]) -> Iterator[str]:
    old, new = ({rule.whom: rule for rule in rules} for rules in (before, after))
    yield from (f"guests: rule for {whom} removed" for whom in old if whom not in new)
    yield from (f"guests: rule for {whom} added" for whom in new if whom not in old)
    both = [whom for whom in new if whom in old]
    for whom in both:
        yield from _differences(f"guests: rule for {whom}: ", old[whom].policy, new[whom].policy)
    if both != [whom for whom in old if whom in new]:
        yield "guests: the rules stand in another order"
