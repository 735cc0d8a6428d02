# SPDX-License-Identifier: Apache-2.0
"""Stores by name. They are entry points of group `tierd.stores`, ours and those of other packages alike, and are imported
only when the configuration names one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from tierd.store import PageStore, PageStoreFactory, StoreContext, StoreError

GROUP = "tierd.stores"


def make_store(name: str, options: Mapping[str, object], context: StoreContext) -> PageStore:
    """The store `name` with its keys of the configuration; nobody is asked anything yet. StoreError: there is none of that
    name, it cannot be imported, or a key is wrong. Imports, so it may block for a moment."""
    found = _find(name)
    factory = _load(found)
    try:
        return factory(options, context)
    except StoreError:
        raise
    except Exception as error:  # somebody else's code: whatever it is must not end the daemon
        raise StoreError(f"{_shown(found)} cannot be made: {type(error).__name__}: {error}") from error


def _find(name: str) -> EntryPoint:
    found = entry_points(group=GROUP, name=name)
    if not found:
        there = ", ".join(sorted({point.name for point in entry_points(group=GROUP)}))
        raise StoreError(f"there is no store {name!r}, only {there}; a plug-in has to be installed where tierd is")
    if len({point.value for point in found}) > 1:
        raise StoreError(f"there is more than one store {name!r}: {', '.join(map(_shown, found))}; uninstall one")
    return next(iter(found))


def _load(found: EntryPoint) -> PageStoreFactory:
    try:
        factory: PageStoreFactory = found.load()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise StoreError(
            f"{_shown(found)} cannot be imported: {why}; repair or uninstall it, or do not name it"
        ) from error
    if not callable(factory):
        raise StoreError(
            f"{_shown(found)} is not a function that makes a store; its author has to correct the entry point"
        )
    return factory


def _shown(found: EntryPoint) -> str:
    package = f" of {found.dist.name} {found.dist.version}" if found.dist else ""
    return f"store {found.name!r}{package} ({found.value})"
