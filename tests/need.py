# SPDX-License-Identifier: Apache-2.0
"""What a test needs from the machine: missing, it skips and says why; named in TIERD_REQUIRE, it fails instead."""

from __future__ import annotations

import os

import pytest


def need(word: str, available: bool, reason: str) -> None:
    """Skip the calling test with `reason` unless `available`; fail it if TIERD_REQUIRE (comma separated) names `word`."""
    if available:
        return
    if word in os.environ.get("TIERD_REQUIRE", "").split(","):
        pytest.fail(f"TIERD_REQUIRE names {word!r}, but: {reason}")
    pytest.skip(reason)
