# SPDX-License-Identifier: Apache-2.0
"""How the demo shows itself: live on a terminal, in plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tierd.show import sparkline

MIB = 1 << 20
PLAIN_S = 2.0  # between two plain lines
SPARK_SAMPLES = 40  # with the columns beside it, fits 80


@dataclass(frozen=True)
class Sample:
    """What the demo knows at one moment."""

    resident_bytes: int  # blocks of the guest's memory, and what its compressed pages take
    used_bytes: int  # the same before tierd began
    tiers: Mapping[str, int] = field(default_factory=dict)  # stored bytes by tier
    faults: int = 0
    staged_read_ratio: float | None = None  # of what was staged, the share that the guest wanted after all; None: nothing was

    @property
    def given_back_bytes(self) -> int:
        return max(0, self.used_bytes - self.resident_bytes)


class Display(Protocol):
    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None:
        """One step of the demo, for good."""
        ...

    def show(self, sample: Sample) -> None:
        """How things stand; replaces what was shown before where that can be done."""
        ...


def tiers_text(tiers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in tiers.items()) or "nothing"


class Plain:
    """Lines for a pipe or a log."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def say(self, text: str) -> None:
        self._next = 0.0
        print(f"* {text}", file=self._out, flush=True)

    def show(self, sample: Sample) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PLAIN_S
        print(
            f"  guest memory on the host {sample.resident_bytes / MIB:4.0f} of {sample.used_bytes / MIB:.0f} MiB, "
            f"stored: {tiers_text(sample.tiers)}, faults {sample.faults}",
            file=self._out,
            flush=True,
        )


class Terminal:
    """A table that is drawn anew in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)
        self._history: deque[float] = deque(maxlen=SPARK_SAMPLES)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(Text.assemble(("* ", "bold cyan"), text))

    def show(self, sample: Sample) -> None:
        share = sample.resident_bytes / sample.used_bytes if sample.used_bytes else 0.0
        self._history.append(min(1.0, share))
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=min(1.0, share), width=SPARK_SAMPLES)
        table.add_row("guest memory on the host", bar, f"{sample.resident_bytes / MIB:.0f} MiB")
        table.add_row("", Text(sparkline(self._history, 1.0), style="cyan"), f"of {sample.used_bytes / MIB:.0f} MiB")
        given_back = f"{sample.given_back_bytes / MIB:.0f} MiB ({1 - min(1.0, share):.0%})"
        table.add_row("given back", Text(given_back, style="bold green"), "")
        table.add_row("stored", tiers_text(sample.tiers), "")
        table.add_row("faults served", str(sample.faults), "")
        self._live.update(table)


def choose(json: bool) -> Display:
    """With `json`, standard output is left to the result."""
    if json:
        return Plain(sys.stderr)
    console = Console()
    return Terminal(console) if console.is_terminal else Plain(sys.stdout)
