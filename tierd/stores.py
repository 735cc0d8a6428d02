# SPDX-License-Identifier: Apache-2.0
"""Opening the stores that a configuration names; trying them, which `tierd config check --probe` does, too; and sweeping
those that are asked, and keys."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import structlog
import trio

from tierd.attach.procfs import boot_id
from tierd.config import AskedStoreConfig, Config, named_stores, with_seconds
from tierd.document import ConfigError, ConfigErrors
from tierd.native import Codec
from tierd.serve import KEYS, SUFFIX, Stale, StateError, read_state
from tierd.store import PageSpace, PageStore, Store, StoreContext, StoreError, keys
from tierd.store.asked import UNLIMITED, AskedStore
from tierd.store.file import FileStore
from tierd.store.memory import MemoryStore
from tierd.systemd import Notifier
from tierd.threads import in_thread

ANSWERS_S = 5.0  # a store that is silent for longer hangs
PROBE_S_MAX = 20.0
SWEEP_EVERY_S = 60.0
PROBE_NEEDED_S_MAX = 2.0  # guests wait for the others; it is tried again

log = structlog.get_logger()


async def open_stores(config: Config, notifier: Notifier) -> dict[str, Store]:
    """By name. Where there are guests of a predecessor, one that cannot be used or hangs keeps tierd from none of them, whoever
    names it: "file" is not among them then, and is to be tried again. Else it is waited for, and the manager is told so."""

    async def tell() -> None:
        await trio.sleep(ANSWERS_S)
        log.error("store_hangs", path=str(config.store.path), action="see to the store; waiting for it to start")
        while True:
            with contextlib.suppress(OSError):  # told again in a moment
                notifier.extend_timeout(10 * ANSWERS_S)
                notifier.status(f"waiting for the store {config.store.path}, which does not answer")
            await trio.sleep(ANSWERS_S)

    named, stores = named_stores(config), dict[str, Store]()
    states = sorted((config.runtime_dir / "guests").glob(f"*{SUFFIX}"))
    if states:
        try:
            with trio.fail_after(ANSWERS_S):
                stores["file"] = await open_files(config)
        except (trio.TooSlowError, OSError, StoreError) as error:
            silent = isinstance(error, trio.TooSlowError)
            why = f"{config.store.path} has not answered for {ANSWERS_S:g} s" if silent else str(error)
            log.error("store_unusable", store="file", error=why, action="put it right; it is tried again")
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell)
            stores["file"] = await open_files(config)
            nursery.cancel_scope.cancel()
    if "memory" in named or _pools_of(config).exists():  # what is in there may have to be swept
        try:
            stores["memory"] = memory = _open_memory(config)
            memory.must_have_library()
        except StoreError as error:
            if "memory" in named and not (states and "memory" in stores):  # else guests wait who need other stores
                raise
            log.warning("memory_unusable", error=str(error), action="none for guests that do not have it")
    needed = await in_thread(_needed_stores, states)
    async with trio.open_nursery() as nursery:
        for name in sorted(with_seconds(config, named | needed) & config.asked.keys()):
            nursery.start_soon(_open_into, stores, name, config, bool(states))
    return stores


async def open_files(config: Config) -> FileStore:
    """OSError, StoreError: it cannot be used. Waits for as long as the disk hangs; cancelled, it leaves a thread there."""
    file = config.store
    make = partial(FileStore, file.path, file.capacity, file.direct, _keys_of_files(config))
    return await in_thread(make, abandon_on_cancel=True)


async def _open_into(stores: dict[str, Store], name: str, config: Config, needed: bool) -> None:
    stores[name] = await open_asked(name, config.asked[name], config.runtime_dir, needed=needed)


def _needed_stores(states: Sequence[Path]) -> set[str]:
    """Those that guests which a predecessor left may have pages in, whether they are served again by now or later."""
    names = set()
    for path in states:
        with contextlib.suppress(StateError, Stale, OSError):  # the daemon tells
            names |= {place.name for place in read_state(path, boot_id()).identity.places}
    return names


async def open_asked(name: str, config: AskedStoreConfig, runtime_dir: Path, *, needed: bool = False) -> AskedStore:
    """A store that is asked, tried once. StoreError: it cannot be used; with `needed`, because guests are served, that is its
    trouble: none is written there, and who has pages in it waits."""
    make = partial(made, name, config, runtime_dir)
    pages = _MadeLater(make) if needed else await make()
    store = AskedStore(
        name,
        pages,
        _keys_dir(runtime_dir),
        config.capacity,
        config.encrypt,
        config.second,
        config.concurrency,
        config.deadline_s,
    )
    await probe(store, PROBE_NEEDED_S_MAX if needed else PROBE_S_MAX)
    if store.trouble and not needed:
        await pages.aclose()
        raise StoreError(store.trouble)
    return store


async def probe(store: AskedStore, seconds: float = PROBE_S_MAX) -> None:
    """Its trouble, or none."""
    try:
        with trio.fail_after(seconds):
            await store.pages.probe()
    except Exception as error:  # a plug-in's may be any, and is tried again while guests are served
        why = (
            f"it did not answer within {seconds:g} s"
            if isinstance(error, trio.TooSlowError)
            else str(error) or repr(error)
        )
        store.trouble = f"the store {store.name} cannot be used: {why}"
    else:
        store.trouble = ""


async def keep_swept(store: AskedStore, may_be_needed: Callable[[str], bool]) -> None:
    """For as long as tierd runs: that is how the store knows that this boot of the host lives, also when no guest writes; and
    what another boot left can be removed only when that one has not been seen for a while."""
    told = ""
    while True:
        try:
            swept = await store.pages.sweep(may_be_needed)
        except Exception as error:  # a plug-in's may be any; what is in a store may be anybody's
            if repr(error) != told:
                log.warning("store_not_swept", store=store.name, error=repr(error), action="trying again in a while")
            told = repr(error)
        else:
            told = ""
            if swept:
                log.info("store_swept", store=store.name, guests=sorted(set(swept)))
        await trio.sleep(SWEEP_EVERY_S)


async def keep_keys_swept(runtime_dir: Path, may_be_needed: Callable[[str], bool]) -> None:
    """For as long as tierd runs, whatever stores there are and whatever they encrypt now."""
    while True:
        try:
            await sweep_keys(runtime_dir, may_be_needed)
        except OSError as error:  # too many open files, say
            log.warning("keys_not_swept", error=str(error), action="trying again in a while")
        await trio.sleep(SWEEP_EVERY_S)


async def sweep_keys(runtime_dir: Path, may_be_needed: Callable[[str], bool]) -> None:
    """Once, those of all stores: they are in one directory."""
    if swept := await in_thread(keys.sweep, runtime_dir / KEYS, may_be_needed):
        log.info("keys_swept", guests=swept)


class _MadeLater:
    """Implements store.PageStore: of one that must not keep tierd from starting. What is wrong with its keys or its files is told
    whenever it is asked, until that was put right."""

    def __init__(self, make: Callable[[trio.CapacityLimiter], Awaitable[PageStore]]) -> None:
        self._make, self._thread = make, trio.CapacityLimiter(1)  # whoever tries next waits for one that hangs
        self._made: PageStore | None = None
        self._making = trio.Lock()

    async def _store(self) -> PageStore:
        async with self._making:
            if self._made is None:
                self._made = await self._make(self._thread)
        return self._made

    @property
    def piece_bytes(self) -> int:
        return int(getattr(self._made, "piece_bytes", UNLIMITED))

    @property
    def takes_runs(self) -> bool:
        return bool(getattr(self._made, "takes_runs", False))

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:
        return await (await self._store()).open(key, pages, page_bytes)

    async def probe(self) -> None:
        await (await self._store()).probe()

    async def sweep(self, may_be_needed: Callable[[str], bool]) -> list[str]:
        return await (await self._store()).sweep(may_be_needed)

    async def aclose(self) -> None:
        if self._made is not None:
            await self._made.aclose()


async def made(
    name: str, config: AskedStoreConfig, runtime_dir: Path, limiter: trio.CapacityLimiter | None = None
) -> PageStore:
    """StoreError: its keys are wrong, or files that they name. Cancelled while one of those hangs, it leaves a thread there."""
    from tierd.store.plugins import make_store  # only where one is named: it imports what the store needs

    context = StoreContext(runtime_dir, config.concurrency, config.deadline_s)
    return await in_thread(make_store, name, config.options, context, abandon_on_cancel=True, limiter=limiter)


async def asked_or_errors(name: str, store: AskedStoreConfig, runtime_dir: Path, path: Path) -> AskedStore:
    try:
        return await open_asked(name, store, runtime_dir)
    except StoreError as error:
        raise ConfigErrors([ConfigError(path, 0, f"stores.{name}", str(error))]) from error


def memory_or_errors(config: Config, path: Path) -> MemoryStore:
    try:
        memory = _open_memory(config)
        memory.must_have_library()
        return memory
    except StoreError as error:
        raise ConfigErrors([ConfigError(path, 0, "memory", str(error))]) from error


def _keys_dir(runtime_dir: Path) -> Path:
    """Where keys of guests are; made if it is not there. StoreError: it cannot be."""
    path = runtime_dir / KEYS
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{path}, for keys of guests, cannot be made: {error.strerror}; make it, or set runtime_dir"
        ) from error
    return path


def _keys_of_files(config: Config) -> Path | None:
    return _keys_dir(config.runtime_dir) if config.store.encrypt else None


def _pools_of(config: Config) -> Path:
    return config.memory.path if config.memory.path is not None else config.runtime_dir / "pools"


def _open_memory(config: Config) -> MemoryStore:
    memory = config.memory
    return MemoryStore(_pools_of(config), memory.capacity, Codec[memory.codec.upper()])


def errors_of_stores(config: Config, path: Path, *, probe: bool) -> list[ConfigError]:
    """What stores say of their own keys; with `probe`, they are tried. Blocks; not in trio."""
    errors = []

    def tell(key: str, error: Exception) -> None:
        errors.append(ConfigError(path, 0, key, str(error)))

    named = named_stores(config)
    for name in sorted(named & config.asked.keys()):
        try:
            trio.run(_try_asked, name, config.asked[name], config.runtime_dir, probe)
        except (OSError, StoreError) as error:
            tell(f"stores.{name}", error)
    if probe:
        try:
            FileStore(config.store.path, config.store.capacity, config.store.direct, _keys_of_files(config))
        except (OSError, StoreError) as error:
            tell("store", error)
    if probe and "memory" in named:
        try:
            _open_memory(config).must_have_library()
        except StoreError as error:
            tell("memory", error)
    return errors


async def _try_asked(name: str, config: AskedStoreConfig, runtime_dir: Path, probe: bool) -> None:
    store = await (open_asked(name, config, runtime_dir) if probe else made(name, config, runtime_dir))
    await (store.pages if isinstance(store, AskedStore) else store).aclose()
