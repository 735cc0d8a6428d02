# SPDX-License-Identifier: Apache-2.0
"""What the running kernel can do for us: one file an engine, chosen once, by trial.

An engine's calls on pages are in C; here is what Python has to know about it. Policy and cycle read capabilities, never an
engine's name.
"""

from __future__ import annotations

from typing import Protocol

from tierd.native import Probe, Zap, probe


class Engine(Protocol):
    """What the cycle and the attach code ask an engine."""

    @property
    def name(self) -> str:
        """As in `engine:` of the configuration, in `tierd check` and in the build-info metric."""
        ...

    @property
    def backings(self) -> frozenset[str]:
        """Kinds of guest memory that it can tier: a subset of {"shmem", "hugetlbfs", "anonymous"}."""
        ...

    @property
    def sees_reads(self) -> bool:
        """Whether a page that is only read counts as touched."""
        ...

    @property
    def holds_reads(self) -> bool:
        """Whether readers wait, too, while a page is being evicted."""
        ...

    @property
    def use_pagemap(self) -> bool:
        """Read /proc/PID/pagemap because PAGEMAP_SCAN is missing."""
        ...

    def zap(self, swap_can_receive: bool) -> Zap:
        """How pages of a VMM are deactivated, given whether the host could swap them out."""
        ...


class EngineUnavailable(Exception):
    """This kernel lacks something; the text says what and which kernel has it."""


def choose(wanted: str = "auto", found: Probe | None = None) -> Engine:
    """The engine for this kernel, by trial on scratch pages (some milliseconds). EngineUnavailable: none, or not the one
    that the configuration forces."""
    from tierd.engine.stock import StockEngine

    found = found or probe()
    if wanted not in ("auto", "stock"):
        raise EngineUnavailable(f"engine {wanted!r} is not known; use auto or stock")
    return StockEngine(found)
