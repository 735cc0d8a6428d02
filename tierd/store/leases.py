# SPDX-License-Identifier: Apache-2.0
"""Whether another boot of the same host still lives. Machines that are copies of each other have one host id, and each sweeps
what the other seems to have left behind."""

from __future__ import annotations

LEASE_RENEW_S = 60.0
GAP_S = 2.5 * LEASE_RENEW_S  # one look may fail


class Stillness:
    """For how long each lease was seen to stand still. Only time in which it was looked at again and again counts: in an
    outage of the store its owner could not renew it either."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[object, float, float]] = {}  # what it said, since when, looked at last

    def seconds(self, lease: str, said: object, now: float) -> float:
        """It says that now; 0 when that is new."""
        before, since, last = self._seen.get(lease, (said, now, now))
        if said != before or now - last > GAP_S:
            since = now
        self._seen[lease] = said, since, now
        return now - since
