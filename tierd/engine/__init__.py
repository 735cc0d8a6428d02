# SPDX-License-Identifier: Apache-2.0
"""What the running kernel can do for us: one file an engine, chosen once, by trial.

An engine's calls on pages are in C; here is what Python has to know about it. Policy and cycle read capabilities, never an
engine's name.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from tierd.native import TRIAL_STEPS, EngineNumber, Probe, Zap, probe


class Engine(Protocol):
    """What the cycle and the attach code ask an engine."""

    @property
    def name(self) -> str:
        """As in `engine:` of the configuration, in `tierd check` and in the build-info metric."""
        ...

    @property
    def number(self) -> EngineNumber:
        """As the data plane and the state files call it."""
        ...

    @property
    def found(self) -> Probe:
        """The trials that it was chosen by."""
        ...

    @property
    def features(self) -> int:
        """UFFD_FEATURE_* that a guest's userfaultfd must have, beyond those that every engine needs."""
        ...

    @property
    def anonymous_features(self) -> int:
        """Those that the userfaultfd of a guest with private anonymous memory must have besides."""
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
        """Whether readers wait, too, while a page is being evicted: there is a sync mode, and windows of it."""
        ...

    @property
    def use_pagemap(self) -> bool:
        """Read /proc/PID/pagemap because PAGEMAP_SCAN is missing."""
        ...

    def zap(self, inside: bool) -> Zap:
        """How pages of a VMM are deactivated. `inside`: not by MADV_PAGEOUT, which would send them to swap where there is one,
        and passes over hugetlbfs."""
        ...


FEATURE_WP_ASYNC, FEATURE_MOVE = 1 << 15, 1 << 16  # UFFD_FEATURE_*: Linux 6.7, 6.8
FEATURE_ASYNC = 1 << 18  # of rwp and rfc: off in a sync window


class EngineUnavailable(Exception):
    """This kernel lacks something; the text says what and which kernel has it."""


ENGINES = ("rwp", "rfc", "stock")  # in the order in which they are tried


def trial_failed(engine: str, error: int, step: int) -> str:
    """What was wrong, for people. `error`: errno of the trial."""
    if step == TRIAL_STEPS.index("api"):
        return f"this kernel does not offer the interface of engine {engine}"
    what = "did something else than it should" if error == errno.EILSEQ else f"said: {os.strerror(error)}"
    return f"this kernel offers the interface of engine {engine}, but in its trial {TRIAL_STEPS[step].replace('_', ' ')} {what}"


def engine_of(number: EngineNumber, found: Probe) -> Engine:
    """The engine that a state file names. It has worked since this boot, so a trial that fails now (on a busy host, without a
    free descriptor) must not keep a guest waiting."""
    return _make(number.name.lower(), found, tried=False)


def _make(name: str, found: Probe, tried: bool = True) -> Engine:
    from tierd.engine.rfc import RfcEngine
    from tierd.engine.rwp import RwpEngine
    from tierd.engine.stock import StockEngine

    engines: dict[str, type[Engine]] = {"rwp": RwpEngine, "rfc": RfcEngine, "stock": StockEngine}
    return engines[name](found, tried)  # type: ignore[call-arg]


def fitting(engine: Engine, anonymous: bool) -> Engine:
    """The engine for a guest: the host's, unless it cannot tier private anonymous memory and the stock one can."""
    if anonymous and "anonymous" not in engine.backings:
        stock = _make("stock", engine.found, tried=False)
        if "anonymous" in stock.backings:
            return stock
    return engine


def choose(wanted: str = "auto", found: Probe | None = None) -> Engine:
    """The engine for this kernel, by trial on scratch pages (some milliseconds). EngineUnavailable: none, or not the one
    that the configuration forces."""
    found = found or probe()
    if wanted not in ("auto", *ENGINES):
        raise EngineUnavailable(f"engine {wanted!r} is not known; use auto, {' or '.join(ENGINES)}")
    if wanted != "auto":
        return _make(wanted, found)
    for name in ENGINES[:-1]:
        try:
            return _make(name, found)
        except EngineUnavailable:
            continue  # `tierd check` says what was wrong
    return _make("stock", found)
