# SPDX-License-Identifier: Apache-2.0
"""The configuration: YAML, parsed once into frozen types. Every error names file, line and key, and all come at once.

Sizes are bytes or strings like `512MiB`; times are seconds or strings like `30s`, `2min`, `500ms`; rates like `100MiB/s`.
No clock and no log here; the only I/O is reading the files.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

SAFE_MIN_IDLE_S = 120.0

_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
               "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TIME_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: object) -> int:
    """Bytes of `512MiB`, `10GB`, 4096. ValueError says what is expected."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        unit = _SIZE_UNITS.get(match[2].upper() or "B")
        if unit is not None:
            return int(float(match[1]) * unit)
    raise ValueError(f"{value!r} is not a size; write for example 512MiB, 10GiB or a number of bytes")


def parse_time(value: object) -> float:
    """Seconds of `30s`, `2min`, `500ms`, 1.5. ValueError says what is expected."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (match := _QUANTITY.fullmatch(value)):
        unit = _TIME_UNITS.get(match[2] or "s")
        if unit is not None:
            return float(match[1]) * unit
    raise ValueError(f"{value!r} is not a time; write for example 30s, 2min, 500ms or a number of seconds")


def parse_rate(value: object) -> float:
    """Bytes per second of `100MiB/s`."""
    if isinstance(value, str) and value.strip().endswith("/s"):
        return float(parse_size(value.strip()[:-2]))
    try:
        return float(parse_size(value))
    except ValueError:
        raise ValueError(f"{value!r} is not a rate; write for example 100MiB/s") from None


def _parse_switch(value: object) -> object:
    """YAML reads bare `on` and `off` as booleans."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(parse_time), Field(ge=0, le=10 * 365 * 86400)]
FilePath = Annotated[Path, BeforeValidator(lambda value: Path(value) if isinstance(value, str) else value)]
Rate = Annotated[float, BeforeValidator(parse_rate), Field(gt=0)]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Policy(Frozen):
    """How one guest is treated. Defaults stand here and nowhere else."""

    enabled: bool = True
    dry_run: bool = False  # track and report, move nothing
    interval_s: Annotated[Seconds, Field(gt=0)] = 10.0
    idle_intervals: Annotated[int, Field(ge=1, le=100_000)] = 30  # untouched for so many intervals: cold
    min_idle_s: Seconds = SAFE_MIN_IDLE_S  # never evict anything younger: it must outlast any I/O in flight
    unsafe_min_idle: bool = False  # allows min_idle_s below 120 s; for tests
    resident_min: Size = 0
    resident_max: Size | None = None
    evict_rate_max: Rate | None = None  # bytes/s
    readahead_pages: Annotated[int, Field(ge=1, le=512)] = 16
    allow_nested: bool = False  # tier guests that may run guests of their own

    @model_validator(mode="after")
    def _possible(self) -> Policy:
        if self.resident_max is not None and self.resident_min > self.resident_max:
            raise ValueError(f"resident_min ({self.resident_min}) is above resident_max ({self.resident_max})")
        if self.min_idle_s < SAFE_MIN_IDLE_S and not self.unsafe_min_idle:
            raise ValueError(
                f"min_idle_s is {self.min_idle_s:g} s; below {SAFE_MIN_IDLE_S:g} s a disk or network transfer that is still "
                "in flight into an idle page could be lost. For a test, say `unsafe_min_idle: true` beside it"
            )
        return self

    @property
    def cold_s(self) -> float:
        """Idle for so long is cold: the intervals, and never less than the safety floor."""
        return max(self.min_idle_s, self.interval_s * self.idle_intervals)


class Api(Frozen):
    socket: FilePath = Path("/run/tierd/tierd.sock")
    mode: Annotated[int, Field(ge=0, le=0o777)] = 0o660
    group: str | None = None  # None: that of the process


class Metrics(Frozen):
    listen: str | None = None  # "127.0.0.1:9464"; None: only on the API's socket

    @model_validator(mode="after")
    def _address(self) -> Metrics:
        if self.listen is not None and not re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[^:\s]*):\d{1,5}", self.listen):
            raise ValueError(f"listen is {self.listen!r}; write an address and a port, 127.0.0.1:9464 for example")
        return self


class FileStoreConfig(Frozen):
    path: FilePath = Path("/var/lib/tierd")
    capacity: Size | None = None  # of all guests together; None: what the file system has
    direct: Annotated[Literal["auto", "on", "off"], BeforeValidator(_parse_switch)] = "auto"


class Log(Frozen):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Rule(Frozen):
    """Which guests a policy is for; all that is given must match."""

    name: str | None = None  # a glob
    pid: Annotated[int, Field(gt=0)] | None = None
    cmdline: str | None = None  # a regular expression, searched in the command line
    policy: Policy

    @model_validator(mode="after")
    def _says_whom(self) -> Rule:
        if self.name is None and self.pid is None and self.cmdline is None:
            raise ValueError("a guest rule needs name, pid or cmdline; name: '*' means every guest")
        if self.cmdline is not None:
            try:
                re.compile(self.cmdline)
            except re.error as error:
                raise ValueError(f"cmdline is not a regular expression: {error}") from None
        return self

    def matches(self, name: str, pid: int, cmdline: str) -> bool:
        return (
            (self.name is None or fnmatch.fnmatchcase(name, self.name))
            and (self.pid is None or self.pid == pid)
            and (self.cmdline is None or re.search(self.cmdline, cmdline) is not None)
        )


class Config(Frozen):
    runtime_dir: FilePath = Path("/run/tierd")
    api: Api = Api()
    metrics: Metrics = Metrics()
    store: FileStoreConfig = FileStoreConfig()
    log: Log = Log()
    engine: Literal["auto", "stock"] = "auto"
    discover_interval_s: Annotated[Seconds, Field(gt=0)] = 1.0
    on_stop: Literal["restore", "keep"] = "restore"
    stop_timeout_s: Seconds = 300.0
    guests_dir: FilePath = Path("guests.d")  # relative to the main file
    defaults: Policy = Policy()
    guests: tuple[Rule, ...] = ()

    def match(self, name: str, pid: int, cmdline: str) -> Policy | None:
        """The policy of the first rule that matches; None: the guest is left alone."""
        for rule in self.guests:
            if rule.matches(name, pid, cmdline):
                return rule.policy
        return None


NEED_RESTART = ("runtime_dir", "api", "metrics", "store", "engine", "log")


def changes(old: Config, new: Config) -> list[str]:
    """What a reload changes, one line each; some of it only after a restart."""
    told = []
    for key in Config.model_fields:
        if getattr(old, key) != getattr(new, key):
            told.append(f"{key} changed" + (" (takes effect after a restart)" if key in NEED_RESTART else ""))
    return told


# --- errors -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConfigError:
    """One thing that is wrong, for the person who wrote it."""

    file: Path
    line: int  # from 1; 0: no line
    key: str  # dotted
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else str(self.file)
        key = f" {self.key}:" if self.key else ""
        return f"{place}:{key} {self.message}" + (f" ({self.suggestion})" if self.suggestion else "")


class ConfigErrors(Exception):
    """All that is wrong with a configuration; nothing of it is in force."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)


# --- reading ----------------------------------------------------------------------------------------------------------------

KeyPath = tuple[str | int, ...]


@dataclass
class _Document:
    """A parsed file and the line of every key in it."""

    file: Path
    value: Any
    lines: dict[KeyPath, int]

    def error(self, path: KeyPath, message: str, suggestion: str = "") -> ConfigError:
        at = path
        while at and at not in self.lines:
            at = at[:-1]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        return ConfigError(self.file, self.lines.get(at, 0), key, message, suggestion)


def _plain(node: yaml.Node, path: KeyPath, document: _Document, errors: list[ConfigError]) -> Any:
    """The Python value of a node; notes lines, and finds keys given twice."""
    document.lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            document.lines[(*path, key)] = key_node.start_mark.line + 1
            if key in found:
                errors.append(document.error((*path, key), "the key is given twice", "remove one"))
            value = _plain(value_node, (*path, key), document, errors)
            document.lines[(*path, key)] = key_node.start_mark.line + 1
            found[key] = value
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), document, errors) for i, item in enumerate(node.value)]
    constructor = yaml.constructor.SafeConstructor()
    return constructor.construct_object(node)


def _read(file: Path, errors: list[ConfigError]) -> _Document | None:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        errors.append(ConfigError(file, 0, "", f"cannot be read: {reason}", "check its path and mode"))
        return None
    document = _Document(file, {}, {})
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _plain(node, (), document, errors)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        errors.append(ConfigError(file, mark.line + 1 if mark else 0, "", f"is not YAML: {problem}", "check the indentation"))
        return None
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        errors.append(document.error((), "must be a mapping of keys to values"))
        return None
    return document


def _model_at(path: Iterable[str | int]) -> type[BaseModel] | None:
    """The model whose keys may stand at `path` of the main file, for suggestions."""
    at: Any = Config
    for part in path:
        if part == "guests":
            at = Rule
        elif isinstance(part, int):
            continue
        elif isinstance(at, type) and issubclass(at, BaseModel) and part in at.model_fields:
            at = at.model_fields[part].annotation
    return at if isinstance(at, type) and issubclass(at, BaseModel) else None


def _suggest(model: type[BaseModel] | None, key: str) -> str:
    if model is None:
        return ""
    known = set(model.model_fields)
    if model is Rule:
        known = (known - {"policy"}) | set(Policy.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(sorted(known))}"


def _explain(document: _Document, base: KeyPath, error: ValidationError) -> Iterator[ConfigError]:
    for item in error.errors(include_url=False):
        path: KeyPath = (*base, *(part for part in item["loc"] if part != "policy" or "policy" in document.value))
        if item["type"] == "extra_forbidden":
            parent = _model_at(path[:-1])
            yield document.error(path, "is not a known key", _suggest(parent, str(path[-1])))
        else:
            message = item["msg"].removeprefix("Value error, ")
            yield document.error(path, message[0].lower() + message[1:] if message[:5] == "Input" else message)


def _rule(document: _Document, path: KeyPath, raw: object, defaults: Mapping[str, Any], errors: list[ConfigError]) -> Rule | None:
    """One guest rule: whom it is for, and the defaults with its own keys over them."""
    if not isinstance(raw, dict):
        errors.append(document.error(path, "must be a mapping with name, pid or cmdline", "for example `- name: 'web-*'`"))
        return None
    whom = {key: raw[key] for key in ("name", "pid", "cmdline") if key in raw}
    own = {key: value for key, value in raw.items() if key not in whom}
    unknown = [key for key in own if key not in Policy.model_fields]
    for key in unknown:
        errors.append(document.error((*path, key), "is not a known key", _suggest(Rule, key)))
    if "min_idle_s" in own and "unsafe_min_idle" not in own and "unsafe_min_idle" in defaults:
        own["unsafe_min_idle"] = defaults["unsafe_min_idle"]
    try:
        policy = Policy(**{**defaults, **{key: value for key, value in own.items() if key not in unknown}})
        return Rule(**whom, policy=policy)
    except ValidationError as error:
        errors.extend(_explain(document, path, error))
        return None


_Found = tuple[_Document, KeyPath, Rule | None]


def load(path: Path) -> Config:
    """A whole new configuration from `path` and its guests_dir. ConfigErrors tells everything that is wrong at once."""
    errors: list[ConfigError] = []
    main = _read(path, errors)
    if main is None:
        raise ConfigErrors(errors)
    raw = dict(main.value)
    raw_guests = raw.pop("guests", None) or []
    raw_defaults = raw.get("defaults") or {}
    try:
        config = Config(**{key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        errors.extend(_explain(main, (), error))
        config = Config()
    if not isinstance(raw_guests, list):
        errors.append(main.error(("guests",), "must be a list of rules", "begin each with `- name:`"))
        raw_guests = []
    defaults = raw_defaults if isinstance(raw_defaults, dict) else {}
    defaults = {key: value for key, value in defaults.items() if key in Policy.model_fields}
    try:
        Policy(**defaults)
    except ValidationError:  # reported above; the rules are judged without them
        defaults = {}
    rules: list[_Found] = [(main, ("guests", i), _rule(main, ("guests", i), item, defaults, errors)) for i, item in enumerate(raw_guests)]
    rules += _rules_of_directory(path.parent / config.guests_dir, defaults, errors)
    _find_doubles(rules, errors)
    if errors:
        raise ConfigErrors(errors)
    return config.model_copy(update={"guests": tuple(rule for _, _, rule in rules if rule is not None)})


def _rules_of_directory(directory: Path, defaults: Mapping[str, Any], errors: list[ConfigError]) -> list[_Found]:
    """*.yaml in order of their names; each holds one rule, or a list of them under `guests:`."""
    found: list[_Found] = []
    for file in sorted(directory.glob("*.yaml")):
        document = _read(file, errors)
        if document is None or not document.value:
            continue
        if "guests" in document.value:
            for key in document.value:
                if key != "guests":
                    errors.append(document.error((key,), "cannot stand beside guests:", "move it into a rule, or into the main file"))
            items = document.value["guests"]
            if not isinstance(items, list):
                errors.append(document.error(("guests",), "must be a list of rules", "begin each with `- name:`"))
                continue
            for i, item in enumerate(items):
                found.append((document, ("guests", i), _rule(document, ("guests", i), item, defaults, errors)))
        else:
            found.append((document, (), _rule(document, (), document.value, defaults, errors)))
    return found


def _find_doubles(rules: list[_Found], errors: list[ConfigError]) -> None:
    seen: dict[tuple[object, ...], _Document] = {}
    for document, path, rule in rules:
        if rule is None:
            continue
        whom = (rule.name, rule.pid, rule.cmdline)
        if whom in seen:
            errors.append(document.error(path, f"the same guests have a rule in {seen[whom].file} already: this one would "
                                               "never be used", "remove one, or make the first narrower"))
        seen.setdefault(whom, document)
