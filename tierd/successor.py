# SPDX-License-Identifier: Apache-2.0
"""Before an end that keeps guests: whether the tierd that starts next can have them. What it can not have is brought back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog
import trio

from tierd.config import Config
from tierd.document import ConfigErrors
from tierd.guest import Guest, Host
from tierd.load import load
from tierd.store.asked import AskedStore
from tierd.stores import made
from tierd.threads import in_thread

MADE_S_MAX = 2.0

log = structlog.get_logger()


async def why_nobody_adopts(config: Config, config_path: Path, host: Host, guests: Sequence[Guest]) -> str:
    """What keeps a tierd that starts now, with what is in `config_path`, from adopting these guests, or from their pages, "" for
    nothing. `config`: what they are served with."""
    try:
        new = await in_thread(load, config_path)
    except ConfigErrors as errors:
        return f"the next tierd will not start: {errors.errors[0]}"
    except OSError as error:
        return f"whether the next tierd will start is not known: {error}"
    ours = host.guests_dir.parent
    if ours != new.runtime_dir:
        return f"the next tierd will not find them: runtime_dir is {ours} now, {new.runtime_dir} in {config_path}"
    listens = config.handshake.socket
    if listens != new.handshake.socket and any(guest.spec.handshake for guest in guests):
        return (
            f"the VMMs that connected will not find the next tierd: handshake.socket is {listens} now, "
            f"{new.handshake.socket} in {config_path}"
        )
    for name, store in list(host.stores.items()):
        pages = sum(guest.pages_in(name) for guest in guests)
        if pages and isinstance(store, AskedStore) and name not in new.asked:
            return f"the next tierd will not have the store {name}, in which are {pages} pages: see {config_path}"
        if pages and isinstance(store, AskedStore) and (why := await _why_not_made(name, new)):
            return f"the next tierd cannot use the store {name}, in which are {pages} pages: {why}"
    return ""


async def _why_not_made(name: str, config: Config) -> str:
    """By its keys and the files that they name, and those of its second; nobody is asked."""
    both = [each for each in (name, config.asked[name].second) if each is not None]
    for each in both:
        try:
            with trio.move_on_after(MADE_S_MAX):  # who hangs now is no reason, and must not hold up the end
                await (await made(each, config.asked[each], config.runtime_dir)).aclose()
        except Exception as error:  # a plug-in's may be any
            return str(error) or repr(error)
    return ""


async def without_their_files(guests: Sequence[Guest]) -> set[str]:
    """Those of which somebody has removed or moved what this tierd has open: state file, stored pages, key. By their keys."""
    found: set[str] = set()

    async def look(guest: Guest) -> None:
        try:
            missing = await guest.missing()
            why = f"{missing} was removed, moved or replaced" if missing is not None else ""
        except OSError as error:
            why = str(error)
        if why:
            log.warning("guest_not_kept", guest=guest.name, why=why, action="bringing it back first")
            found.add(guest.key)

    async with trio.open_nursery() as nursery:
        for guest in guests:
            nursery.start_soon(look, guest)
    return found
