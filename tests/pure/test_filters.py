# SPDX-License-Identifier: Apache-2.0
"""Which seccomp filters of a VMM are known to let it live through a call of ours: QEMU's own, alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierd.attach import procfs

QEMU, OTHER = "/usr/bin/qemu-system-x86_64", "/usr/bin/cloud-hypervisor"


@pytest.mark.parametrize(
    ("mode", "filters", "cmdline", "filtered"),
    [
        (0, 0, (OTHER,), False),
        (2, 1, (OTHER,), True),
        (2, 1, (OTHER, "-sandbox", "on"), True),
        (2, 1, (QEMU, "-sandbox", "on"), False),
        (2, 1, (QEMU, "--sandbox", "enable=on,obsolete=deny"), False),
        (2, None, (QEMU, "-sandbox", "on"), False),  # before Linux 5.9
        (2, 2, (QEMU, "-sandbox", "on"), True),  # somebody else's around it
        (2, 1, (QEMU, "-sandbox", "off"), True),
        (2, 1, (QEMU, "-sandbox", "on", "-sandbox", "off"), True),
        (2, 1, (QEMU,), True),
    ],
)
def test_filters(
    monkeypatch: pytest.MonkeyPatch, mode: int, filters: int | None, cmdline: tuple[str, ...], filtered: bool
) -> None:
    status = f"Name:\tvmm\nNoNewPrivs:\t1\nSeccomp:\t{mode}\n"
    if filters is not None:
        status += f"Seccomp_filters:\t{filters}\n"

    def read(path: str | Path, default: str = "") -> str:
        return status if str(path) == "/proc/7/task/8/status" else default

    monkeypatch.setattr(procfs, "read_proc", read)
    assert procfs.filtered(7, cmdline, 8) is filtered
    assert not procfs.filtered(9, cmdline), "it is gone"
