# SPDX-License-Identifier: Apache-2.0
"""Reading the configuration: YAML files, parsed once into the types of config.py. Every error names file, line and key, and all
come at once. No clock and no log here; the only I/O is reading the files.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tierd.config import (
    NAME,
    OWN_STORES,
    WHOM,
    Api,
    AskedStoreConfig,
    Config,
    FileStoreConfig,
    Frozen,
    Handshake,
    Log,
    MemoryStoreConfig,
    Metrics,
    Policy,
    Rule,
)
from tierd.document import ConfigError, ConfigErrors, Document, KeyPath, read
from tierd.quantities import shown

RULES_MAX = 4096  # and files of guests_dir
ERRORS_MAX = 200  # nobody reads more at once

_SECTIONS: dict[str, type[Frozen]] = {
    "api": Api,
    "handshake": Handshake,
    "metrics": Metrics,
    "store": FileStoreConfig,
    "memory": MemoryStoreConfig,
    "log": Log,
    "defaults": Policy,
}

_Model = TypeVar("_Model", bound=Frozen)


def _section(model: type[_Model], document: Document, path: KeyPath, raw: object) -> _Model:
    """The model of a mapping. What is wrong goes to the errors and is left out, so that the rest is judged as well."""
    if not isinstance(raw, dict):
        if raw is not None:  # a section whose keys are all commented out
            document.wrong(path, "must be a mapping of keys to values", f"known keys: {_known(model)}")
        return model()
    good = dict(raw)
    while True:
        try:
            return model.model_validate(good)
        except ValidationError as error:
            before = len(good)
            for item in error.errors(include_url=False):
                for key in _tell(model, document, path, item):
                    good.pop(key, None)
            if len(good) == before:  # what is wrong was inherited, and is told already: judge the rest without it
                return model()


def _tell(model: type[Frozen], document: Document, path: KeyPath, item: ErrorDetails) -> Sequence[str]:
    """Adds what pydantic found to the errors; returns the keys that it is about."""
    if item["type"] == "impossible":
        keys: Sequence[str] = item["ctx"]["keys"]
        at = next((key for key in keys if (*path, key) in document.lines), None)
        document.wrong((*path, at) if at else path, item["msg"])
        return keys
    key, message, value = str(item["loc"][0]), item["msg"], item["input"]
    suggestion = ""
    if len(document.errors) >= ERRORS_MAX:  # a suggestion takes longer than all the rest
        document.wrong((*path, key), "is wrong as well")
        return [key]
    if item["type"] == "extra_forbidden":
        message, suggestion = "is not a known key", _suggest(model, key)
    elif message.startswith("Value error, "):
        message = message.removeprefix("Value error, ")
    else:
        message = f"is {shown(value)}; " + message.replace("Input should", "it must", 1)
        suggestion = _suggest_value(item)
    document.wrong((*path, key), message, suggestion)
    return [key]


def _known(model: type[Frozen]) -> str:
    return ", ".join(sorted(_keys(model)))


def _keys(model: type[Frozen]) -> set[str]:
    return {*WHOM, *Policy.model_fields} if model is Rule else set(model.model_fields)


def _suggest(model: type[Frozen], key: str) -> str:
    if model is Config and key in Policy.model_fields:
        return "it belongs under defaults: or into a guest rule"
    if model is Config and (section := next((s for s, m in _SECTIONS.items() if key in m.model_fields), None)):
        return f"it belongs under {section}:"
    if close := difflib.get_close_matches(key, _keys(model), n=1):
        return f"did you mean {close[0]}?"
    return f"known keys: {_known(model)}"


def _suggest_value(item: ErrorDetails) -> str:
    value = item["input"]
    if value is None:
        return "remove the key, or give it a value"
    if item["type"] == "literal_error" and isinstance(value, bool):
        return "YAML reads a bare on, off, yes or no as true or false"
    if item["type"] == "literal_error":
        close = difflib.get_close_matches(shown(value), re.findall(r"'(\w+)'", item["ctx"]["expected"]), n=1)
        return f"did you mean {close[0]}?" if close else ""
    if item["type"] == "string_type" and not isinstance(value, dict | list):
        return "put it in quotes"
    return "write true or false" if item["type"] == "bool_type" else ""


def _rule(document: Document, path: KeyPath, raw: object, defaults: Mapping[str, Any]) -> Rule | None:
    """One guest rule: whom it is for, and the defaults with its own keys over them."""
    if not isinstance(raw, dict):
        document.wrong(path, "must be a mapping with name, pid or cmdline", "for example `- name: 'web-*'`")
        return None
    own = {key: value for key, value in raw.items() if key in Policy.model_fields}
    if "min_idle_s" in own:
        own.setdefault("unsafe_min_idle", False)  # beside it means beside it
    policy = _section(Policy, document, path, {**defaults, **own})
    whom = {key: value for key, value in raw.items() if key not in own}
    if "policy" in whom:
        document.wrong((*path, "policy"), "is not a known key", "its keys stand directly in the rule")
    try:
        return Rule.model_validate({**whom, "policy": policy})
    except ValidationError as error:
        for item in error.errors(include_url=False):
            _tell(Rule, document, path, item)
        return None


@dataclass
class _Found:
    document: Document
    path: KeyPath
    rule: Rule


def load(path: Path) -> Config:
    """A whole new configuration from `path` and its guests_dir. ConfigErrors tells everything that is wrong at once."""
    errors: list[ConfigError] = []
    main = read(path, errors)
    if main is None:
        raise ConfigErrors(errors)
    raw = dict(main.value)
    raw_guests = raw.pop("guests", None)
    stores = _asked_stores(main, raw.pop("stores", None))
    sections = {key: _section(model, main, (key,), raw.pop(key, None)) for key, model in _SECTIONS.items()}
    config = _section(Config, main, (), raw)
    defaults = sections["defaults"].model_dump(exclude_unset=True)
    rules = _rules_of_directory(path.parent / config.guests_dir, "guests_dir" in raw, main, defaults)
    rules += _rules(main, raw_guests, defaults)
    _must_be_stores(main, sections["defaults"], rules, stores)
    _second_stores(main, stores, {tier.name for found in rules for tier in found.rule.policy.tiers})
    if len(rules) > RULES_MAX:
        main.wrong((), f"there are more than {RULES_MAX} guest rules", "let one rule be for many guests")
    else:
        _find_hidden(rules)
    if errors:
        errors.sort(key=lambda error: (error.file != path, error.file, error.line))
        if len(errors) > ERRORS_MAX:
            errors[ERRORS_MAX:] = [ConfigError(path, 0, "", f"{len(errors) - ERRORS_MAX} more things are wrong")]
        raise ConfigErrors(errors)
    return config.model_copy(update={**sections, "stores": stores, "guests": tuple(found.rule for found in rules)})


def _asked_stores(document: Document, raw: object) -> tuple[AskedStoreConfig, ...]:
    """The mapping under `stores:`. What a store makes of its own keys, it says when it is made."""
    if raw is not None and not isinstance(raw, dict):
        document.wrong(("stores",), "must be a mapping of stores", "for example `redis: {addresses: [127.0.0.1:6379]}`")
        return ()
    stores = []
    for name, keys in (raw or {}).items():
        if not re.match(NAME, str(name)) or name in OWN_STORES:
            document.wrong(("stores", name), "is no name for a store that is asked", "small letters, digits, - and _")
            continue
        if isinstance(keys, dict) and "name" in keys:
            document.wrong(("stores", name, "name"), "is not a known key", "the name of a store is the key above")
        keys = {} if keys is None else keys
        given = {**keys, "name": name} if isinstance(keys, dict) else keys
        if isinstance(given, dict):
            stores.append(_section(AskedStoreConfig, document, ("stores", name), given))
        else:
            document.wrong(("stores", name), "must be a mapping of keys to values", "see README.md for its keys")
    return tuple(stores)


def _second_stores(document: Document, stores: Sequence[AskedStoreConfig], named: set[str]) -> None:
    """A second store has the same pages under the same numbers: it can be no tier, nor have a second itself."""
    by_name = {store.name: store for store in stores}
    for store in stores:
        at: KeyPath = ("stores", store.name, "second")
        if store.second is None:
            continue
        if store.second not in by_name or store.second == store.name:
            document.wrong(at, f"names a store {store.second!r}", "it must be another one under stores")
        elif store.second in named:
            document.wrong(at, f"{store.second} is a tier of a policy as well", "give the copies a store of their own")
        elif by_name[store.second].second is not None or [s.second for s in stores].count(store.second) > 1:
            document.wrong(
                at, f"{store.second} has a second store itself, or is that of two", "let it be of one store only"
            )
        elif by_name[store.second].capacity is not None:
            document.wrong(
                ("stores", store.second, "capacity"),
                f"it holds what {store.name} holds, and takes as much",
                f"give the capacity to {store.name}",
            )


def _must_be_stores(
    main: Document, defaults: Frozen, rules: Sequence[_Found], stores: Sequence[AskedStoreConfig]
) -> None:
    assert isinstance(defaults, Policy)
    known = {*OWN_STORES, *(store.name for store in stores)}
    told = set()
    for document, path, policy in [
        (main, ("defaults",), defaults),
        *((r.document, r.path, r.rule.policy) for r in rules),
    ]:
        at: KeyPath = (*path, "tiers")
        for name in {tier.name for tier in policy.tiers} - known:
            if at in document.lines or name not in told:  # once where it is inherited
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"add {name} under stores:"
                document.wrong(
                    at, f"names a store {name!r}, and there is none; there are {', '.join(sorted(known))}", hint
                )
            told.add(name)


def _rules(document: Document, raw: object, defaults: Mapping[str, Any]) -> list[_Found]:
    """The list under `guests:`."""
    if raw is not None and not isinstance(raw, list):
        document.wrong(("guests",), "must be a list of rules", "begin each with `- name:`")
        return []
    found = []
    for i, item in enumerate(raw or ()):
        rule = _rule(document, ("guests", i), item, defaults)
        found += [_Found(document, ("guests", i), rule)] if rule is not None else []
    return found


def _rules_of_directory(directory: Path, required: bool, main: Document, defaults: Mapping[str, Any]) -> list[_Found]:
    """*.yaml in order of their names; each holds one rule, or a list of them under `guests:`."""
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        if required or not isinstance(error, FileNotFoundError):
            main.wrong(("guests_dir",), f"{directory} cannot be read: {error.strerror}", "create it, or remove the key")
        return []
    found: list[_Found] = []
    if sum(name.endswith((".yaml", ".yml")) for name in names) > RULES_MAX:
        main.wrong(("guests_dir",), f"{directory} has more than {RULES_MAX} files", "let one rule be for many guests")
        return []
    for name in names:
        if name.endswith(".yml"):
            main.errors.append(ConfigError(directory / name, 0, "", "is not read", "rename it to end with .yaml"))
        if not name.endswith(".yaml") or name.startswith("."):
            continue
        document = read(directory / name, main.errors)
        if document is None or not document.value:
            continue
        if "guests" not in document.value:
            rule = _rule(document, (), document.value, defaults)
            found += [_Found(document, (), rule)] if rule is not None else []
            continue
        for key in document.value:
            if key != "guests":
                document.wrong((key,), "cannot stand beside guests:", "move it into a rule, or into the main file")
        found += _rules(document, document.value["guests"], defaults)
    return found


def _find_hidden(rules: Sequence[_Found]) -> None:
    """Rules of which every guest is an earlier one's already. Not all are seen, only those that people write: the same
    again, a name that a pattern has, anything after '*'. Thousands of rules take no more than seconds."""
    before: dict[str, _Found] = {}
    globs: list[tuple[re.Pattern[str], _Found]] = []
    for later in rules:
        rule = later.rule
        first = before.get(rule.whom) or before.get("name: *")
        if first is None and rule.name is not None and not rule.is_glob:
            first = next((found for pattern, found in globs if pattern.match(rule.name)), None)
        before.setdefault(rule.whom, later)
        if rule.is_glob and rule.pid is None and rule.cmdline is None:
            globs.append((re.compile(fnmatch.translate(rule.name or "")), later))
        if first is not None:
            line = first.document.lines.get(first.path, 1)
            later.document.wrong(
                later.path,
                f"the rule for {first.rule.whom} ({first.document.file}:{line}) has all of these guests already",
                "remove one, or let the narrower one come first",
            )
