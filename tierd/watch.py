# SPDX-License-Identifier: Apache-2.0
"""The stores of a daemon that runs: how full they are, whether they answer, what is swept in them, those that come later.

In the trio thread; what may hang is asked in threads of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog
import trio

from tierd.config import Config
from tierd.guest import Host
from tierd.store import Store, StoreError
from tierd.store.asked import AskedStore
from tierd.stores import ANSWERS_S, keep_swept, open_files, probe
from tierd.threads import in_thread
from tierd.view import StoreStatus

STORE_ASK_S = 1.0
PROBE_AGAIN_S = 5.0

log = structlog.get_logger()


class StoreWatch:
    """`survives`: a context that an error of the machine does not leave; it is told by the name that is given."""

    def __init__(
        self,
        host: Host,
        config: Config,
        nursery: trio.Nursery,
        may_be_needed: Callable[[str], bool],
        survives: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._host, self._config, self._nursery = host, config, nursery
        self._may_be_needed, self._survives = may_be_needed, survives
        self._asked_at = dict.fromkeys(host.stores, trio.current_time())  # by store: when it answered last
        self._figures = dict.fromkeys(host.stores, (0, 0))  # by store: used, free; in bytes

    async def begin(self) -> None:
        """What is there is known, and what dead guests have left is removed, or soon will be."""
        for name, store in self._host.stores.items():
            with self._survives(f"asking the store {name} how full it is"):
                self._figures[name] = await in_thread(_ask, store)
            if isinstance(store, AskedStore):
                self._nursery.start_soon(keep_swept, store, self._may_be_needed)
            else:
                await self._sweep_once(store)

    def watch(self, files_there: Callable[[], None]) -> None:
        """From now on. `files_there` is called when the directory of stored pages can be used at last."""
        for store in self._host.stores.values():
            self._nursery.start_soon(self._watch, store)
            if store.trouble and isinstance(store, AskedStore):
                self._nursery.start_soon(self._probe_again, store)
        if "file" not in self._host.stores:
            self._nursery.start_soon(self._open_files_again, files_there)

    def add(self, store: Store) -> None:
        """One that was not there before."""
        self._host.stores[store.name] = store
        self._asked_at[store.name], self._figures[store.name] = trio.current_time(), (0, 0)
        self._nursery.start_soon(self._watch, store)
        if isinstance(store, AskedStore):
            self._nursery.start_soon(keep_swept, store, self._may_be_needed)

    async def sweep(self) -> None:
        """Pages of guests that are gone. Of stores that are asked: soon, `keep_swept` does it. OSError."""
        for store in list(self._host.stores.values()):
            await self._sweep(store)

    def status(self) -> list[StoreStatus]:
        lacking = self._host.files_lack
        path = str(self._config.store.path)
        files = [StoreStatus("file", path, capacity_bytes=0, used_bytes=0, healthy=False, reason=lacking)]
        return [*map(self._status, self._host.stores.values()), *(files if lacking else [])]

    async def _sweep(self, store: Store) -> None:
        if swept := await in_thread(store.sweep, self._may_be_needed):
            log.info("store_swept", store=store.name, guests=swept)

    async def _sweep_once(self, store: Store) -> None:
        with self._survives(f"sweeping the store {store.name}"):
            await self._sweep(store)

    async def _watch(self, store: Store) -> None:
        """Its figures are asked for in a thread: a store that hangs must not hold whoever asks us for a status."""
        trouble = self._host.store_trouble
        while True:
            await trio.sleep(STORE_ASK_S)
            try:
                self._figures[store.name] = await in_thread(_ask, store, abandon_on_cancel=True)
            except OSError as error:
                trouble[store.name, "figures"] = f"{store.path}: {error.strerror}"
            else:
                trouble.pop((store.name, "figures"), None)
            self._asked_at[store.name] = trio.current_time()

    async def _probe_again(self, store: AskedStore) -> None:
        """It could not be used at the start, and there were guests: until it can be, no page is written there."""
        while store.trouble:
            self._host.store_trouble[store.name, "probe"] = store.trouble
            await trio.sleep(PROBE_AGAIN_S)
            await probe(store)
        self._host.store_trouble.pop((store.name, "probe"), None)
        log.info("store_can_be_written", store=store.name)

    async def _open_files_again(self, files_there: Callable[[], None]) -> None:
        """The directory of stored pages could not be used at the start, or hung, and there were guests."""
        self._host.files_lack = f"{self._config.store.path} does not answer"
        while True:
            try:
                store = await open_files(self._config)
            except (OSError, StoreError) as error:
                self._host.files_lack = str(error)
                await trio.sleep(PROBE_AGAIN_S)
            else:
                break
        self._host.files_lack = ""
        self.add(store)
        log.info("store_can_be_used", store=store.name)
        tell_trouble(store)
        files_there()
        await self._sweep_once(store)

    def _status(self, store: Store) -> StoreStatus:
        reasons, troubles = (
            sorted({why for (name, _), why in told.items() if name == store.name})
            for told in (self._host.store_trouble, self._host.space_trouble)
        )
        silent_s = trio.current_time() - self._asked_at[store.name]
        if silent_s > ANSWERS_S:
            reasons.append(f"{store.path} has not answered for {silent_s:.0f} s")
        used_bytes, free_bytes = self._figures[store.name]
        return StoreStatus(
            name=store.name,
            path=str(store.path),
            capacity_bytes=used_bytes + free_bytes,
            used_bytes=used_bytes,
            healthy=not reasons,
            reason="; ".join(reasons),
            trouble="; ".join(troubles),
        )


def tell_trouble(store: Store) -> None:
    """Of one that was opened, and can be read only."""
    if store.trouble:
        later = "it is tried again" if isinstance(store, AskedStore) else "restart tierd when it can be written"
        action = f"what is in it is served; {later}"
        log.error("store_cannot_be_written", store=store.name, error=store.trouble, action=action)


def _ask(store: Store) -> tuple[int, int]:
    return store.used_bytes(), store.free_bytes()
