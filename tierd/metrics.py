# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: one collector over one status snapshot a scrape. Names and meanings are in the README.

A guest that is gone is gone from the next scrape: nothing is kept between scrapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tierd.native import STATES as PAGE_STATES
from tierd.view import STATES, DaemonStatus, GuestStatus, TierStatus

LABELS = ("guest", "pid")
LOST = PAGE_STATES.index("lost")
# latency buckets of struct tierd_counters that are shown: below 1 us (2^10 ns) ... below 17 s (2^34 ns)
LATENCY_FIRST, LATENCY_LAST = 10, 34

# counter -> (kind, outcome)
_FAULTS = {
    "faults_fetch": ("fetch", "served"),
    "faults_staged": ("staged", "served"),
    "faults_zero": ("zero", "served"),
    "faults_cancel": ("cancel", "served"),
    "faults_resolve": ("resolve", "served"),
    "faults_wait": ("wait", "left"),
    "faults_failed": ("any", "failed"),
}
_ERRORS = {
    "store_read_errors": "store_read",
    "store_write_errors": "store_write",
    "checksum_errors": "checksum",
    "kernel_errors": "kernel",
}

Samples = Iterable[tuple[Sequence[str], float]]  # (values of the labels beyond LABELS, value)


def _nothing_more(value: float) -> Samples:
    return (((), value),)


def _counter(field: str) -> Callable[[GuestStatus], Samples]:
    return lambda guest: _nothing_more(guest.counters[field]) if guest.counters else ()


def _faults(guest: GuestStatus) -> Samples:
    return ((names, guest.counters[field]) for field, names in _FAULTS.items()) if guest.counters else ()


def _errors(guest: GuestStatus) -> Samples:
    native = {kind: guest.counters[field] for field, kind in _ERRORS.items()} if guest.counters else {}
    return (((kind,), count) for kind, count in {**native, **guest.errors}.items())


def _tiers(value: Callable[[TierStatus], float]) -> Callable[[GuestStatus], Samples]:
    return lambda guest: (((tier.name,), value(tier)) for tier in guest.tiers)


def _by_tier(fields: Mapping[str, str]) -> Callable[[GuestStatus], Samples]:
    """`fields`: counters of a tier, and the value of the second label."""
    return lambda guest: (
        ((tier.name, kind), tier.counters[field]) for tier in guest.tiers for field, kind in fields.items()
    )


def _idle(guest: GuestStatus) -> Samples:
    return (((f"{age_s:g}",), size) for age_s, size in guest.idle)


# name, help, labels beyond LABELS, samples of one guest
_Family = tuple[str, str, tuple[str, ...], Callable[[GuestStatus], Samples]]
_GAUGES: tuple[_Family, ...] = (
    (
        "page_bytes",
        "Size of the guest's pages: what the counters of pages count.",
        (),
        lambda g: _nothing_more(g.page_bytes),
    ),
    ("size_bytes", "Memory that the guest has.", (), lambda g: _nothing_more(g.total_bytes)),
    (
        "resident_bytes",
        "Host memory that the guest's memory files occupy.",
        (),
        lambda g: _nothing_more(g.resident_bytes),
    ),
    (
        "stored_bytes",
        "Guest memory that is out of the host's memory, by tier (zero: one 8-byte word again and again, stored nowhere).",
        ("tier",),
        lambda g: (((tier,), size) for tier, size in g.stored_bytes.items()),
    ),
    (
        "staged_bytes",
        "Private anonymous memory in the staging area: still in the host's memory, and cold if nobody reads it.",
        (),
        lambda g: _nothing_more(g.staged_bytes),
    ),
    (
        "tier_used_bytes",
        "What a tier has spent for the guest's pages in it: of compressed memory, all that its pool takes.",
        ("tier",),
        _tiers(lambda tier: tier.used_bytes),
    ),
    (
        "tier_compressed_bytes",
        "What the guest's pages in a tier were compressed to; in stores that are asked, by the mean of what was written.",
        ("tier",),
        lambda g: (
            ((tier.name,), tier.counters["compressed_bytes"])
            for tier in g.tiers
            if tier.name == "memory" or tier.counters["compressed_bytes"]
        ),
    ),
    ("tier_healthy", "1 if the tier takes pages of the guest, else 0.", ("tier",), _tiers(lambda tier: tier.healthy)),
    ("hole_bytes", "Guest memory that the guest has never used.", (), lambda g: _nothing_more(g.hole_bytes)),
    (
        "idle_bytes",
        "Resident guest memory untouched for at least age_s seconds, and less than the next larger age_s.",
        ("age_s",),
        _idle,
    ),
    (
        "state",
        "1 for the state that the guest is in, 0 for the others.",
        ("state",),
        lambda g: (((state,), float(state == g.state)) for state in STATES),
    ),
    (
        "lost_bytes",
        "Guest memory that could not be brought back: the guest gets memory errors there, or waits (on_lost: hold).",
        (),
        lambda g: _nothing_more(g.counters["state_pages"][LOST] * g.page_bytes) if g.counters else (),
    ),
    ("parked_pages", "Faults that wait for a read of the store.", (), _counter("parked_pages")),
    ("fault_threads", "Threads that serve faults; more than one where the store hangs.", (), _counter("fault_threads")),
)
_COUNTERS: tuple[_Family, ...] = (
    (
        "faults",
        "Faults by what they took: fetch, staged, zero, cancel (of an eviction), resolve (of a hold), wait; and by outcome.",
        ("kind", "outcome"),
        _faults,
    ),
    (
        "pages_evicted",
        "Pages moved out of the guest, those that need no store included.",
        (),
        _counter("pages_evicted"),
    ),
    ("pages_cancelled", "Pages whose eviction was called off: touched, or an error.", (), _counter("pages_cancelled")),
    ("pages_fetched", "Pages brought back by faults, read-ahead included.", (), _counter("pages_fetched")),
    (
        "pages_zero",
        "Evicted pages that were one 8-byte word again and again, zeros mostly, and need no store.",
        (),
        _counter("pages_evicted_zero"),
    ),
    ("pages_lost", "Pages that could not be brought back.", (), _counter("pages_lost")),
    (
        "window_faults",
        "Faults in sync windows on pages that did not leave: each cost the guest a round trip.",
        (),
        _counter("faults_window"),
    ),
    (
        "large_folios_split",
        "Large folios of which only a part left; of those seen mapped by one large entry of the page table.",
        (),
        _counter("large_folios_split"),
    ),
    ("pages_staged", "Pages moved into the staging area of anonymous memory.", (), _counter("pages_staged")),
    (
        "pages_refaulted",
        "Pages that the guest took back from there, those by read-ahead included.",
        (),
        _counter("pages_refaulted"),
    ),
    (
        "pages_unmovable",
        "Pages that could not be moved there: shared by fork or KSM, or pinned.",
        (),
        _counter("pages_unmovable"),
    ),
    (
        "tier_pages",
        "Pages of the guest that a tier was given (written), gave back (read), or did not take (refused: they do not compress).",
        ("tier", "what"),
        _by_tier({"written_pages": "written", "read_pages": "read", "refused_pages": "refused"}),
    ),
    (
        "tier_errors",
        "Errors of a tier, by kind.",
        ("tier", "kind"),
        _by_tier({"write_errors": "write", "read_errors": "read", "checksum_errors": "checksum"}),
    ),
    (
        "pages_unwritten",
        "Pages evicted that were not written to since they were fetched: their stored copy was right still.",
        (),
        _counter("pages_unwritten"),
    ),
    ("pages_demoted", "Pages that went from one tier to the next.", (), _counter("pages_demoted")),
    ("pages_refused", "Times that no tier took a page that was to leave.", (), _counter("pages_refused")),
    ("inject_stops", "Times that a thread of the VMM was stopped to run a call in it.", (), _counter("inject_stops")),
    ("cycles", "Cycles completed.", (), lambda g: _nothing_more(g.cycles)),
    (
        "cycle_seconds",
        "Seconds spent in each phase of the cycles.",
        ("phase",),
        lambda g: (((phase,), seconds) for phase, seconds in g.phase_s.items()),
    ),
    ("errors", "Errors by kind.", ("kind",), _errors),
)


def _histogram(
    guests: Sequence[GuestStatus], name: str, text: str, field: str, sum_field: str = ""
) -> HistogramMetricFamily:
    """`field`: the part before _buckets and _sum_ns of its counters."""
    family = HistogramMetricFamily(f"tierd_guest_{name}_seconds", text, labels=LABELS)
    for guest in guests:
        if not guest.counters:
            continue
        buckets = _cumulated(guest.counters[f"{field}_buckets"])
        family.add_metric(_labels(guest), buckets, guest.counters[sum_field or f"{field}_sum_ns"] / 1e9)
    return family


def _tier_reads(guests: Sequence[GuestStatus]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "tierd_guest_tier_read_seconds", "Reads of a tier, of one or several pages.", labels=(*LABELS, "tier")
    )
    for guest in guests:
        for tier in guest.tiers:
            counts = tier.counters["read_buckets"]
            family.add_metric((*_labels(guest), tier.name), _cumulated(counts), tier.counters["read_sum_ns"] / 1e9)
    return family


def _cumulated(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Bucket i holds times below 2^i ns and not those before it; Prometheus wants them with these. The count is taken from the
    buckets: one of its own would be read at another moment."""
    buckets = [(f"{2**i / 1e9!r}", float(sum(counts[: i + 1]))) for i in range(LATENCY_FIRST, LATENCY_LAST + 1)]
    return [*buckets, ("+Inf", float(sum(counts)))]


def _labels(guest: GuestStatus) -> list[str]:
    # a process can call itself anything; the text format is UTF-8
    return [guest.name.encode(errors="replace").decode(), str(guest.pid)]


class TierdCollector(Collector):
    """`status` is called once a scrape, in the scraping thread."""

    def __init__(self, status: Callable[[], DaemonStatus]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        build = GaugeMetricFamily("tierd_build_info", "1; the labels say what runs.", labels=("version", "engine"))
        build.add_metric((status.version, status.engine), 1)
        yield build
        yield GaugeMetricFamily(
            "tierd_unserved_guests",
            "VMs that a tierd has served and nobody serves now: they wait where they touch a stored page.",
            len(status.unserved),
        )
        yield GaugeMetricFamily(
            "tierd_reload_failed",
            "1 if the configuration was refused at the last reload: the old one is in force.",
            float(status.reload_failed),
        )
        yield from _guests(status.guests)
        yield from _stores(status)

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering does not take a snapshot


def _guests(guests: Sequence[GuestStatus]) -> Iterable[Metric]:
    kinds: tuple[tuple[Any, tuple[_Family, ...]], ...] = (
        (GaugeMetricFamily, _GAUGES),
        (CounterMetricFamily, _COUNTERS),
    )
    for kind, families in kinds:
        for name, text, labels, samples in families:
            family = kind(f"tierd_guest_{name}", text, labels=(*LABELS, *labels))
            for guest in guests:
                for values, value in samples(guest):
                    family.add_metric((*_labels(guest), *values), value)
            yield family
    yield _histogram(guests, "fault_latency", "From reading a fault to the page being in place.", "latency")
    yield _histogram(guests, "sync_window", "Sync windows of engines rwp and rfc: while pages leave.", "window")
    yield _tier_reads(guests)
    yield _histogram(guests, "stop", "Stops of a thread of the VMM for a batch of calls.", "stop", "inject_stopped_ns")


def _stores(status: DaemonStatus) -> Iterable[Metric]:
    capacity = GaugeMetricFamily("tierd_store_capacity_bytes", "What the store may use.", labels=("store",))
    used = GaugeMetricFamily("tierd_store_used_bytes", "What the store uses.", labels=("store",))
    healthy = GaugeMetricFamily("tierd_store_healthy", "1 if pages come and go there, else 0.", labels=("store",))
    trouble = GaugeMetricFamily(
        "tierd_store_trouble",
        "1 if something is wrong though they do: rubbish that stays, say; else 0.",
        labels=("store",),
    )
    for store in status.stores:
        capacity.add_metric((store.name,), store.capacity_bytes)
        used.add_metric((store.name,), store.used_bytes)
        healthy.add_metric((store.name,), store.healthy)
        trouble.add_metric((store.name,), bool(store.trouble))
    return capacity, used, healthy, trouble


def create_registry(status: Callable[[], DaemonStatus]) -> CollectorRegistry:
    """A registry of our own: tierd's metrics, and process_* about tierd itself."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(TierdCollector(status))
    ProcessCollector(registry=registry)
    return registry


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The scrape's answer in the format that the `Accept` header asks for: (body, content type)."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
