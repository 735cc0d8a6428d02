# SPDX-License-Identifier: Apache-2.0
"""How many inputs the fuzzers try: few in `make test`; TIERD_EXAMPLES=20000 for hours of it (`make soak`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("TIERD_EXAMPLES", "200"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
