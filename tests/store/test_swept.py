# SPDX-License-Identifier: Apache-2.0
"""What tierd does with every store that is asked for as long as it runs: it is swept, and so knows that the host lives. And with
keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import structlog.testing
import trio
import trio.testing

from tests.store.servers import Server
from tierd import stores
from tierd.store import PageStore, redis
from tierd.store.asked import AskedStore
from tierd.store.redis import RedisStore
from tierd.store.redis_link import RedisOptions
from tierd.store.seal import SealKey
from tierd.stores import keep_keys_swept, keep_swept
from tierd.testing import PAGE, PAGES, closing, records, space_of

FAST = 300.0  # of a clock: seconds in one


def asked(pages: PageStore, tmp_path: Path) -> AskedStore:
    return AskedStore("redis", pages, tmp_path, None, True, None, 8, 10.0)


def test_a_guest_that_is_idle_for_longer_than_the_lease_is_not_swept_by_another_boot(
    redis_there: None, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(redis, "LEASE_MS", 4000)
    monkeypatch.setattr(redis, "LEASE_OVER_S", 0.5)
    monkeypatch.setattr(stores, "SWEEP_EVERY_S", 0.2)
    options = RedisOptions.model_validate({"addresses": [server.address], "host_id": "idle"})

    async def test() -> None:
        async with (
            closing(RedisStore(options, "boot-of-idle")) as idle,
            closing(RedisStore(options, "boot-of-copy")) as copy,
            space_of(idle) as space,
        ):
            await space.write(0, records(0, 1))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_swept, asked(idle, tmp_path), lambda key: True)
                await trio.sleep(6)
                assert await copy.sweep(lambda key: True) == []
                nursery.cancel_scope.cancel()
            assert await space.read(0, 2) == [*records(0, 1), None]
            left = await idle.open("1-1", PAGES, PAGE)
            await left.aclose()
            await trio.sleep(5)
            assert await copy.sweep(lambda key: True) == []
            await trio.sleep(1)
            assert "1-1" in await copy.sweep(lambda key: True), "with nobody there it is over"

    trio.run(test)


def test_a_store_that_cannot_be_swept_is_told_once_and_tried_again(tmp_path: Path) -> None:
    class Broken:
        tries = 0

        async def sweep(self, may_be_needed: object) -> list[str]:
            self.tries += 1
            if self.tries < 5:
                raise KeyError("a" if self.tries < 4 else "b")
            return ["1-1"] if self.tries == 5 else []

    async def test() -> None:
        broken = Broken()
        with trio.move_on_after(7.5 * stores.SWEEP_EVERY_S):
            await keep_swept(asked(cast("Any", broken), tmp_path), lambda key: True)
        assert broken.tries == 8

    with structlog.testing.capture_logs() as told:
        trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0.01))
    assert [(entry["event"], entry.get("error")) for entry in told] == [
        ("store_not_swept", "KeyError('a')"),
        ("store_not_swept", "KeyError('b')"),
        ("store_swept", None),
    ]


def test_keys_are_swept_once_whatever_stores_there_are(tmpfs_dir: Path) -> None:
    """Those of a guest that died later, too."""
    keys, needed = tmpfs_dir / "keys", {"1-1"}

    async def test() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_keys_swept, tmpfs_dir, needed.__contains__)
            await trio.sleep(1)
            made = tmpfs_dir / "made"
            made.mkdir()
            for guest in "1-1", "2-2":
                for store in "redis", "objects":
                    SealKey.create(made, store, guest, PAGES).close()
            made.rename(keys)  # all at once: each guest is told once
            await left({"1-1.redis.key", "1-1.objects.key"})
            needed.clear()
            await left(set())
            nursery.cancel_scope.cancel()

    async def left(names: set[str]) -> None:
        with trio.fail_after(FAST * 60):
            while {path.name for path in keys.iterdir()} != names:
                await trio.sleep(FAST * 0.01)

    with structlog.testing.capture_logs() as told:
        trio.run(test, clock=trio.testing.MockClock(rate=FAST))
    assert [(entry["event"], entry["guests"]) for entry in told] == [("keys_swept", ["2-2"]), ("keys_swept", ["1-1"])]
