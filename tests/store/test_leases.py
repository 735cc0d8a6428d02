# SPDX-License-Identifier: Apache-2.0
"""For how long a lease stands still, as whoever would sweep sees it."""

from __future__ import annotations

from tierd.store.leases import GAP_S, LEASE_RENEW_S, Stillness


def test_only_time_that_was_looked_through_counts() -> None:
    leases = Stillness()
    assert [leases.seconds("a", "x", n * LEASE_RENEW_S) for n in range(3)] == [0, LEASE_RENEW_S, 2 * LEASE_RENEW_S]
    assert leases.seconds("b", "x", 2 * LEASE_RENEW_S) == 0, "of each by itself"
    one_missed = 4 * LEASE_RENEW_S
    assert leases.seconds("a", "x", one_missed) == one_missed
    assert leases.seconds("a", "x", one_missed + GAP_S + 1) == 0, "nobody looked"
    assert leases.seconds("a", "y", one_missed + GAP_S + 2) == 0, "renewed"
    assert leases.seconds("a", "y", one_missed + GAP_S + 3) == 1
