# SPDX-License-Identifier: Apache-2.0
"""Status for people: sizes, latencies and rates as text, and the tables of `status`, `top` and `check`.

Everything but the tables is pure. rich is imported by what draws.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from tierd.check import Finding

HISTORY_MAX = 40
_BARS = "▁▂▃▄▅▆▇█"
_STATE_STYLES = {"active": "green", "paused": "yellow", "refused": "red"}


def size_text(size: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, units = float(size), ["TiB", "GiB", "MiB", "KiB", "B"]
    unit = units.pop()
    while value >= 1024 and units:
        value, unit = value / 1024, units.pop()
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def latency_text(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.1f} s"


def safe_text(text: str) -> str:
    """A name as a terminal may have it: a guest can call itself an escape sequence."""
    return "".join(c if c.isprintable() else "?" for c in text)


def quantile_us(buckets: Sequence[int], q: float) -> float | None:
    """A quantile of log2 buckets (bucket i: below 2^i ns and not below 2^(i-1)), linear inside one. None: empty."""
    total = sum(buckets)
    if total <= 0:
        return None
    rank, seen = q * total, 0
    for i, count in enumerate(buckets):
        if count and seen + count >= rank:
            low = 2 ** (i - 1) if i else 0
            return float(low + (2**i - low) * (rank - seen) / count) / 1000
        seen += count
    return float(2 ** len(buckets)) / 1000


def sparkline(values: Iterable[float], top: float) -> str:
    """Each value as a bar out of eight; `top` is a full one."""
    return "".join(_BARS[min(7, max(0, int(value / top * 8)))] if top > 0 else _BARS[0] for value in values)


@dataclass(frozen=True)
class Row:
    """One guest in `top`: what it is now, and what it did since the sample before."""

    name: str
    pid: int
    key: str
    state: str
    total_bytes: int
    resident_bytes: int
    stored_bytes: int
    faults_per_s: float
    p50_us: float | None
    p99_us: float | None
    history: tuple[int, ...]  # resident bytes, oldest first


@dataclass
class Top:
    """Turns samples of GET /guests into rows. A guest that is gone is forgotten."""

    _last: dict[str, tuple[float, Mapping[str, Any]]] = field(default_factory=dict)
    _history: dict[str, deque[int]] = field(default_factory=dict)

    def rows(self, now_s: float, guests: Sequence[Mapping[str, Any]]) -> list[Row]:
        """`now_s`: a monotonic clock at the sample. The first sample of a guest counts from its attach."""
        keys = {guest["key"] for guest in guests}
        for gone in self._history.keys() - keys:
            del self._history[gone]
            self._last.pop(gone, None)
        return [self._row(now_s, guest) for guest in guests]

    def _row(self, now_s: float, guest: Mapping[str, Any]) -> Row:
        key, counters = guest["key"], guest["counters"]
        history = self._history.setdefault(key, deque(maxlen=HISTORY_MAX))
        history.append(guest["resident_bytes"])
        buckets = counters.get("latency_buckets", [])
        then_s, before = self._last.get(key, (None, {}))
        then = before.get("latency_buckets") or [0] * len(buckets)
        new = [max(0, b - a) for a, b in zip(then, buckets, strict=True)]
        elapsed_s = now_s - then_s if then_s is not None else 0.0
        # a quiet second says nothing about latency: then the figure since the attach stands
        shown = new if sum(new) else buckets
        self._last[key] = (now_s, counters)
        return Row(
            name=guest["name"],
            pid=guest["pid"],
            key=key,
            state=guest["state"],
            total_bytes=guest["total_bytes"],
            resident_bytes=guest["resident_bytes"],
            stored_bytes=sum(guest["stored_bytes"].values()),
            faults_per_s=sum(new) / elapsed_s if elapsed_s > 0 else 0.0,
            p50_us=quantile_us(shown, 0.5),
            p99_us=quantile_us(shown, 0.99),
            history=tuple(history),
        )


def row_json(row: Row) -> dict[str, Any]:
    return asdict(row)


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(*columns: str, left: int = 2) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=True)
    return table


def _state(state: str) -> str:
    style = _STATE_STYLES.get(state, "cyan")
    return f"[{style}]{state}[/{style}]"


def _name(name: str) -> str:
    from rich.markup import escape

    return escape(safe_text(name))


def status_table(status: Mapping[str, Any]) -> Table:
    """GET /status as a table."""
    table = _table("guest", "state", "pid", "size", "resident", "stored", "unused", "faults", "p50", "p99", "note")
    table.columns[-1].justify = "left"
    for guest in status["guests"]:
        counters = guest["counters"]
        buckets = counters.get("latency_buckets", [])
        table.add_row(
            _name(guest["name"]),
            _state(guest["state"]),
            str(guest["pid"]),
            size_text(guest["total_bytes"]),
            size_text(guest["resident_bytes"]),
            size_text(sum(guest["stored_bytes"].values())),
            size_text(guest["hole_bytes"]),
            str(sum(buckets)),
            latency_text(quantile_us(buckets, 0.5)),
            latency_text(quantile_us(buckets, 0.99)),
            _name(guest["reason"]),
        )
    return table


def tiers_table(status: Mapping[str, Any]) -> Table | None:
    """Every tier of the guests of GET /status; None: no guest is served."""
    table = _table(
        "guest", "tier", "holds", "takes", "ratio", "written", "read", "refused", "errors", "p50", "p99", "", left=2
    )
    for guest in status["guests"]:
        for tier in guest["tiers"]:
            c = tier["counters"]
            compressed = c["compressed_bytes"]
            table.add_row(
                _name(guest["name"]),
                tier["name"],
                size_text(tier["stored_bytes"]),
                size_text(tier["used_bytes"]),
                f"{tier['stored_bytes'] / compressed:.1f}" if compressed else "",
                *(str(c[f"{what}_pages"]) for what in ("written", "read", "refused")),
                str(c["write_errors"] + c["read_errors"] + c["checksum_errors"]),
                latency_text(quantile_us(c["read_buckets"], 0.5)),
                latency_text(quantile_us(c["read_buckets"], 0.99)),
                "" if tier["healthy"] else "[red]ILL[/red]",
            )
    return table if table.rows else None


def summary_text(status: Mapping[str, Any]) -> str:
    """The line under the table."""
    stores = ", ".join(
        f"store {store['name']} {size_text(store['used_bytes'])} of {size_text(store['capacity_bytes'])}"
        + ("" if store["healthy"] else f" ILL: {safe_text(store['reason'])}")
        + (f" ({safe_text(store['trouble'])})" if store.get("trouble") else "")
        for store in status["stores"]
    )
    guests = len(status["guests"])
    notes = [
        *(
            f"nobody serves the guest of {path}: it waits where it touches a stored page"
            for path in status.get("unserved", ())
        ),
        *(["the configuration was refused at the last reload; see the log"] if status.get("reload_failed") else []),
        *status.get("engine_notes", ()),
    ]  # a daemon that was started before an upgrade does not say all of them
    return (
        f"tierd {status['version']}, engine {status['engine']}, {guests} guest{'' if guests == 1 else 's'}"
        f"{', ' if stores else ''}{stores}" + "".join(f"\n{safe_text(note)}" for note in notes)
    )


def top_table(rows: Sequence[Row]) -> Table:
    table = _table("guest", "state", "resident", "stored", "faults/s", "p50", "p99", "resident over time")
    table.columns[-1].justify = "left"
    for row in rows:
        table.add_row(
            _name(row.name),
            _state(row.state),
            f"{size_text(row.resident_bytes)} / {size_text(row.total_bytes)}",
            size_text(row.stored_bytes),
            f"{row.faults_per_s:.0f}",
            latency_text(row.p50_us),
            latency_text(row.p99_us),
            sparkline(row.history, row.total_bytes),
        )
    return table


def check_table(findings: Sequence[Finding]) -> Table:
    """Each finding in words; under one that fails, what to do."""
    from rich.markup import escape

    table = _table("", "what", "finding", left=3)
    table.columns[2].no_wrap = False
    for finding in findings:
        mark = "[green]ok[/green]" if finding.ok else "[red]no[/red]" if finding.needed else "[yellow]--[/yellow]"
        table.add_row(mark, escape(finding.name), escape(finding.says))
        if finding.remedy and not finding.ok:
            table.add_row("", "", f"[bold]->[/bold] {escape(finding.remedy)}")
    return table
