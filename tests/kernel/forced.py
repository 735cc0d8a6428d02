# SPDX-License-Identifier: Apache-2.0
"""What a test may force upon a served guest. Imported by workers, which are started over and over: only what they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tierd import cycle
from tierd.engine import choose, fitting
from tierd.native import Zap
from tierd.serve import Tuning


@dataclass
class Options:
    """What a test may force."""

    engine: str = "auto"  # as in the configuration
    use_pagemap: bool = False
    zap: Zap | None = None
    direct: Literal["auto", "on", "off"] = "auto"
    capacity_bytes: int = 1 << 50
    readahead_pages: int = 16
    read_deadline_s: float = 0.0  # no second chance for a page that cannot be read
    hold_lost: bool = False
    phases: cycle.Phases = field(default_factory=cycle.Phases)

    def tuning(self, min_idle_s: float) -> Tuning:
        return Tuning(min_idle_s, self.readahead_pages, read_deadline_s=self.read_deadline_s, hold_lost=self.hold_lost)


class ForcedEngine:
    """The engine of this kernel (for such memory) unless a test forces another one, with the choices that it forces."""

    def __init__(self, options: Options, anonymous: bool = False) -> None:
        self._engine = fitting(choose(options.engine), anonymous)
        self._options, self._anonymous = options, anonymous

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def use_pagemap(self) -> bool:
        """Which does not say who wrote to anonymous memory."""
        return (self._options.use_pagemap and not self._anonymous) or self._engine.use_pagemap

    def zap(self, inside: bool) -> Zap:
        return self._options.zap or self._engine.zap(inside)
