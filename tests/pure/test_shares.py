# SPDX-License-Identifier: Apache-2.0
"""Guests that write to one store at the same time: together never more than it may hold, whatever the order."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from tierd.store import Space, Store
from tierd.tiers import Shares

CAPACITY = 1000


class OneSpace:
    def __init__(self) -> None:
        self.used = 0

    def used_bytes(self) -> int:
        return self.used


class OneStore:
    name = "store"

    def __init__(self, spaces: list[OneSpace]) -> None:
        self.spaces = spaces

    def free_bytes(self) -> int:
        return CAPACITY - sum(space.used for space in self.spaces)


class Host:
    def __init__(self, guests: int) -> None:
        self.spaces = [OneSpace() for _ in range(guests)]
        self.store = OneStore(self.spaces)
        self.shares = Shares()

    def claim(self, guest: int, most: int) -> int:
        """So much may be written."""
        space = self.spaces[guest]

        def size(claimed: int) -> int:
            return space.used + min(max(self.store.free_bytes() - claimed, 0), most)

        return self.shares.claim(cast(Store, self.store), guest, cast(Space, space), size) - space.used


def test_what_one_has_claimed_nobody_else_gets() -> None:
    host = Host(2)
    assert host.claim(0, 700) == 700
    assert host.claim(1, 700) == 300
    host.spaces[0].used += 600
    assert host.claim(1, 700) == 300, "what was written and what is to be written do not count twice"
    host.shares.let_go(0)
    assert host.claim(1, 700) == 400
    assert host.claim(1, 100) == 100, "one's own claim is not in one's way"


@pytest.mark.parametrize("seed", range(50))
def test_any_order(seed: int) -> None:
    chance = random.Random(seed)
    host = Host(4)
    room = [0] * 4
    for _ in range(500):
        guest = chance.randrange(4)
        space = host.spaces[guest]
        what = chance.choice(["claim", "write", "write", "let go", "discard"])
        if what == "claim":
            room[guest] = host.claim(guest, chance.randrange(CAPACITY))
        elif what == "write":
            written = chance.randint(0, room[guest])
            space.used += written
            room[guest] -= written
        else:
            if what == "discard":
                space.used = chance.randint(0, space.used)
            host.shares.let_go(guest)
            room[guest] = 0
        assert sum(space.used for space in host.spaces) <= CAPACITY


def test_threads() -> None:
    """Each writes as much as it may, and lets go, while the others look."""
    host, most = Host(4), list[int]()
    began = threading.Barrier(4)

    def free_bytes() -> int:
        free = CAPACITY - sum(space.used for space in host.spaces)
        time.sleep(0.0005)  # others come in between
        return free

    host.store.free_bytes = free_bytes  # type: ignore[method-assign]

    def write(guest: int) -> None:
        chance, space = random.Random(guest), host.spaces[guest]
        for _ in range(100):
            began.wait()
            for _ in range(host.claim(guest, CAPACITY) // 10):
                space.used += 10
            most.append(sum(each.used for each in host.spaces))
            host.shares.let_go(guest)
            space.used -= chance.randint(0, space.used)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(write, guest) for guest in range(4)]:
            done.result()
    assert CAPACITY / 2 < max(most) <= CAPACITY
