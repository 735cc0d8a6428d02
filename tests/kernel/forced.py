# SPDX-License-Identifier: Apache-2.0
"""What a test may force upon a served guest. Imported by workers, which are started over and over: only what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tierd import cycle
from tierd.engine import choose, fitting
from tierd.native import Codec, Zap
from tierd.serve import KEYS, Tuning
from tierd.store import Store
from tierd.store.file import FileStore
from tierd.store.memory import MemoryStore


@dataclass
class Options:
    """What a test may force."""

    engine: str = "auto"  # as in the configuration
    use_pagemap: bool = False
    zap: Zap | None = None
    direct: Literal["auto", "on", "off"] = "auto"
    capacity_bytes: int = 1 << 50
    # memory; asked (asked.py); names of file stores: each in a directory of this name beside `store`
    tiers: Sequence[str] = ("file",)
    codec: Codec = Codec.LZ4
    encrypt: bool = False  # the files, and what is asked
    readahead_pages: int = 16
    read_deadline_s: float = 0.0  # no second chance for a page that cannot be read
    hold_lost: bool = False
    phases: cycle.Phases = field(default_factory=cycle.Phases)

    def tuning(self, min_idle_s: float) -> Tuning:
        return Tuning(min_idle_s, self.readahead_pages, read_deadline_s=self.read_deadline_s, hold_lost=self.hold_lost)


def stores_of(options: Options, tmpfs_dir: Path, disk_dir: Path) -> list[Store]:
    """What a guest with these options has, in their order."""
    stores: list[Store] = []
    for name in options.tiers:
        if name == "memory":
            stores.append(MemoryStore(tmpfs_dir / "pools", None, options.codec))
            continue
        if name == "asked":
            from tests.kernel.asked import asked_store  # it imports trio

            stores.append(asked_store(options, tmpfs_dir, disk_dir))
            continue
        keys_dir = tmpfs_dir / KEYS
        keys_dir.mkdir(mode=0o700, exist_ok=True)
        place = disk_dir / ("store" if name == "file" else name)
        store = FileStore(place, None, options.direct, keys_dir if options.encrypt else None)
        store.name = name
        stores.append(store)
    return stores


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
