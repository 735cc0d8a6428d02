# SPDX-License-Identifier: Apache-2.0
"""The tiers of one guest: which may take pages now, what leaves for which, what sinks from one to the next.

Page words speak of a guest's tiers by number, so what it has is decided when it is attached; a policy that is reloaded says how
they are used. `evict` and `sink` run in the guest's worker thread and block; what changes here is changed in the trio thread.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tierd import cycle
from tierd import policy as policies
from tierd.config import Policy, Tier
from tierd.native import KernelError, TierKind
from tierd.serve import Served, ServedTier
from tierd.store import Space, Store
from tierd.view import TierStatus

POOL_BYTES = 1 << 20  # what a pool may take beside the pages that it is given: its slots and its index grow in steps
CLAIM_BYTES = 256 << 20  # at most, at a time: what a guest whose other store hangs keeps from others


class Shares:
    """What guests that write at the same time may take of the stores that they share: together never more than there is.

    Who is going to write claims room first, as much as it may write; nobody else is given that until it is let go. Any thread."""

    def __init__(self) -> None:
        self.guests = 0  # that share the stores
        self._claims: dict[str, dict[object, tuple[Space, int]]] = {}  # by store and owner: so far its space may grow
        self._locks: dict[str, threading.Lock] = {}  # by store: one that hangs holds up no other

    def claim(self, store: Store, owner: object, space: Space, size: Callable[[int], int]) -> int:
        """So far the space of `owner`, who writes nothing just now, may grow: what `size` says to the bytes that others have
        claimed and not written yet. Blocks as the store does."""
        claims = self._claims.setdefault(store.name, {})
        with self._locks.setdefault(store.name, threading.Lock()):
            # before the store is looked at: what is written in between counts twice, and not never
            others = sum(max(most - of.used_bytes(), 0) for who, (of, most) in list(claims.items()) if who is not owner)
            granted = size(others)
            claims[owner] = space, granted
            return granted

    def let_go(self, owner: object) -> None:
        """Then nobody looks into its spaces any more: they may be gone soon."""
        for name, claims in list(self._claims.items()):
            if owner in claims:
                with self._locks[name]:
                    del claims[owner]


class Tiers:
    """Of a guest that is served. `stores`: by name. `shares`: of them, with other guests."""

    def __init__(
        self, served: Served, stores: Mapping[str, Store], shares: Shares, asked: cycle.Asked | None
    ) -> None:
        self._served, self._stores, self._shares, self._asked = served, stores, shares, asked
        self._failures: dict[str, tuple[int, float]] = {}  # by name: how often in a row, and when it is tried again
        self._errors: dict[str, int] = {}  # by name: of its reads and writes, when its copies were relied on last

    def usable(self, policy: Policy) -> Sequence[ServedTier]:
        """Those that the policy still names and that are not to be left alone for a while."""
        named = {tier.name for tier in policy.tiers}
        return [tier for tier in self._served.tiers.values() if tier.name in named and self._may_be_written(tier)]

    def _may_be_written(self, tier: ServedTier) -> bool:
        now = time.monotonic()
        return tier.space.ready and self._failures.get(tier.name, (0, now))[1] <= now

    def capacity(self, tier: ServedTier, policy: Policy, claimed_bytes: int | None = None) -> int:
        """What the tier may hold of this guest, by the policy, by its store and by the host. Bytes. `claimed_bytes`: right now,
        so much of what is free is other guests' already."""
        used, (of_all, free) = tier.space.used_bytes(), self._figures(tier, now=claimed_bytes is not None)
        capacity = used + max(free - (claimed_bytes or 0), 0)
        if tier.space.kind is TierKind.MEMORY:
            guests = max(self._shares.guests, 1)  # who is first must not take all of it, nor is it kept for who has no use
            capacity = min(capacity, max((of_all + free) // guests, used + free // guests))
        own = next(
            (t.capacity for t in policy.tiers if t.name == tier.name), 0
        )  # 0: the policy has no such tier any more
        return capacity if own is None else min(capacity, own)

    def _figures(self, tier: ServedTier, *, now: bool = False) -> tuple[int, int]:
        """What its store holds of all guests, and what is free there. Bytes. None is where that cannot be found out: daemon.py,
        which asks every store again and again, tells why."""
        store = self._stores.get(tier.name)
        if store is None:
            return 0, 0
        try:
            free = store.free_bytes(now=now)  # first: `now` is of both
            return store.used_bytes(), free
        except OSError:
            return 0, 0

    def room(self, tier: ServedTier, policy: Policy) -> int:
        """Bytes that the tier may still take of this guest."""
        return max(self.capacity(tier, policy) - tier.space.used_bytes(), 0)

    def _may_take(self, policy: Policy, min_idle_s: float) -> list[ServedTier]:
        """Where pages that are idle for so long may go now, as far as there is room."""
        old_enough = {tier.name for tier in policies.tiers_for(policy, min_idle_s)}
        return [tier for tier in self.usable(policy) if tier.name in old_enough and self.room(tier, policy)]

    @contextmanager
    def _claimed(self, tiers: Sequence[ServedTier], policy: Policy, most: int) -> Iterator[list[int]]:
        """Room in each of these for `most` bytes of guest memory, or as much as there is, and for nobody else meanwhile: the data
        plane is told. The numbers of those where there is any."""
        native, numbers = self._served.native, []
        try:
            for tier in tiers:
                more = most + (POOL_BYTES if tier.space.kind is TierKind.MEMORY else 0)

                def size(claimed_bytes: int, tier: ServedTier = tier, more: int = more) -> int:
                    return min(self.capacity(tier, policy, claimed_bytes), tier.space.used_bytes() + more)

                room = self._shares.claim(self._stores[tier.name], self, tier.space, size) - tier.space.used_bytes()
                # it counts pages that have space there, which may take more than their bytes
                used = native.tier_counters(tier.number)["used_bytes"]
                native.set_capacity(tier.number, max(used + room, 0))
                numbers += [tier.number] if room > 0 else []
            yield numbers
        finally:
            self._shares.let_go(self)

    def _in_claims(
        self, tiers: Sequence[ServedTier], policy: Policy, most: int, move: Callable[[list[int], int], int]
    ) -> int:
        """`move` so many bytes to these, piece by piece, as long as there is room and anything to move. Bytes."""
        done = 0
        while done < most:
            piece = min(most - done, CLAIM_BYTES)
            with self._claimed(tiers, policy, piece) as numbers:
                try:
                    moved = move(numbers, piece) if numbers else 0
                except KernelError as error:
                    if error.errno != errno.ENOSPC or error.tier:
                        raise
                    moved = error.moved_bytes  # there was less room than it seemed: by policy, not an error
            done += moved
            if moved < piece:
                break
        return done

    # --- worker -----------------------------------------------------------------------------------------------------------

    def evict(
        self, policy: Policy, min_idle_s: float, max_bytes: int, phases: cycle.Phases, check: Callable[[], None]
    ) -> tuple[int, set[str]]:
        """The oldest pages first, which more tiers may take. Bytes, and the tiers that took some. KernelError, whose `tier`
        did not take pages: they stay with the guest."""
        evicted, before = 0, self._written()
        self._look_at_errors()
        for age_s in policies.classes(policy, min_idle_s):
            tiers = self._may_take(policy, age_s)
            if not tiers or evicted >= max_bytes:
                continue

            def move(numbers: list[int], most: int, age_s: float = age_s) -> int:
                return cycle.evict(
                    self._served.native,
                    min_idle_s=age_s,
                    max_bytes=most,
                    tiers=numbers,
                    keep=set(numbers).intersection(self._relied_on(policy)),
                    hold_ms_max=policy.hold_ms_max,
                    phases=phases,
                    check=check,
                    bytes_per_s=policy.evict_rate_max,
                    asked=self._asked,
                )

            evicted += self._in_claims(tiers, policy, max_bytes - evicted, move)
        return evicted, self._took(before)

    def _took(self, before: Mapping[str, int]) -> set[str]:
        return {name for name, pages in self._written().items() if pages > before[name]}

    def _written(self) -> dict[str, int]:
        """Pages that each tier has taken, by name."""
        tiers = self._served.tiers.values()
        return {tier.name: self._served.native.tier_counters(tier.number)["written_pages"] for tier in tiers}

    def sink(
        self, policy: Policy, phases: cycle.Phases, check: Callable[[], None]
    ) -> tuple[list[tuple[str, int]], set[str]]:
        """From each tier to those below it: what has become old enough for them, and the oldest of what is too much. By tier,
        bytes of guest memory that went; and the tiers that took some. KernelError as in `evict`: pages stay where they are."""
        before = self._written()
        self._look_at_errors()
        named: dict[str, Tier] = {tier.name: tier for tier in policy.tiers}
        moved = []
        for above in self._served.tiers.values():
            below = [tier for tier in self.usable(policy) if tier.number > above.number]
            if below and above.space.opened:
                demotion = policies.sink(policy, named[below[0].name], self._sample(above, policy))
                moved.append((above.name, self._demote(above, demotion, policy, phases, check)))
        return [(name, size) for name, size in moved if size], self._took(before)

    def _look_at_errors(self) -> None:
        """Whatever a tier that failed says later, it may have lost what it had: no copy there is relied on any more."""
        for tier in self._served.tiers.values():
            counters = self._served.native.tier_counters(tier.number)
            errors = sum(counters[name] for name in ("read_errors", "checksum_errors", "write_errors"))
            if tier.name in self._failures or errors != self._errors.get(tier.name, 0):
                self._served.native.unclean(tier.number)
                self._errors[tier.name] = errors

    def _relied_on(self, policy: Policy) -> list[int]:
        """Tiers where what was fetched and not written since is kept, as long as there is room, and need not be written again.
        Not in compressed memory: that is the host's; nor where writes may land late: to a successor it would look like one that
        was on its way; nor where something failed: it must take a page first; nor where a copy may be all that is left of two."""
        return [
            tier.number
            for tier in self.usable(policy)
            if tier.space.kind is not TierKind.MEMORY
            and not tier.space.late
            and tier.name not in self._failures
            and getattr(self._stores.get(tier.name), "second", None) is None
            and tier.space.used_bytes() < policies.HIGH_WATER * self.capacity(tier, policy)
        ]

    def tidy(self, policy: Policy, phases: cycle.Phases, check: Callable[[], None]) -> None:
        """What came back takes no room in its tier any more; but what was not written since is kept where that is relied on.
        KernelError, whose `tier` gave no room back: the others did."""
        native, failed = self._served.native, None
        self._look_at_errors()
        try:
            cycle.discard_fetched(native, phases, check, self._relied_on(policy))
        except KernelError as error:
            failed = error
        cycle.compact(native, check)
        for tier in self._served.tiers.values():
            if tier.number in native.asked_tiers and self._asked is not None and self._may_be_written(tier):
                cycle.discard_asked(native, tier.number, self._asked, check)
        if failed is not None:
            raise failed

    def _demote(
        self,
        above: ServedTier,
        demotion: policies.Demotion,
        policy: Policy,
        phases: cycle.Phases,
        check: Callable[[], None],
    ) -> int:
        to = [tier for tier in self._may_take(policy, demotion.min_idle_s) if tier.number > above.number]
        most = min(demotion.bytes_max, sum(self.room(tier, policy) for tier in to))

        def move(numbers: list[int], most: int) -> int:
            return cycle.demote(
                self._served.native,
                above.number,
                numbers,
                min_idle_s=demotion.min_idle_s,
                max_bytes=most,
                phases=phases,
                check=check,
                bytes_per_s=policy.demote_rate_max,
                asked=self._asked,
            )

        return self._in_claims(to, policy, most, move)

    def _sample(self, tier: ServedTier, policy: Policy) -> policies.TierSample:
        store_used_bytes, store_free_bytes = self._figures(tier)
        edges, page_bytes = policies.idle_edges(policy), self._served.page_bytes
        idle = self._served.native.idle_pages(edges, tier.number)
        return policies.TierSample(
            stored_bytes=sum(idle) * page_bytes,
            used_bytes=tier.space.used_bytes(),
            capacity_bytes=self.capacity(tier, policy),
            store_used_bytes=store_used_bytes,
            store_free_bytes=store_free_bytes,
            idle=tuple((edge, pages * page_bytes) for edge, pages in zip(edges, idle, strict=True)),
            elapsed_s=policy.interval_s,
        )

    # --- trio -------------------------------------------------------------------------------------------------------------

    def failed(self, number: int, pause_s: Callable[[int], float]) -> tuple[str, bool]:
        """This tier did not take pages, or gave no room back: it is left alone for `pause_s(how often in a row)`. Its name, and
        whether others go on meanwhile."""
        name = next(tier.name for tier in self._served.tiers.values() if tier.number == number)
        failures = self._failures.get(name, (0, 0.0))[0] + 1
        self._failures[name] = failures, time.monotonic() + pause_s(failures)
        return name, any(tier.name not in self._failures for tier in self._served.tiers.values())

    def well_again(self, name: str) -> None:
        self._failures.pop(name, None)

    def status(self, tier: ServedTier, pages: int, healthy: bool, compressed_to: float) -> TierStatus:
        """`pages`: that are stored in it. `compressed_to`: what became of a byte that was written there, where it is asked."""
        counters, stored_bytes = self._served.native.tier_counters(tier.number), pages * self._served.page_bytes
        if tier.space.kind is TierKind.ASKED:
            counters["compressed_bytes"] = round(stored_bytes * compressed_to)
        return TierStatus(tier.name, stored_bytes, counters["used_bytes"], healthy, counters)
