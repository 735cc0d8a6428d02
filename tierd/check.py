# SPDX-License-Identifier: Apache-2.0
"""What `tierd check` finds out about this kernel, in words with remedies. Pure: the trials themselves are elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd.native import Probe


@dataclass(frozen=True)
class Finding:
    """One thing that tierd needs (`needed`) or profits from. `remedy` is for when it is not `ok`."""

    name: str
    ok: bool
    needed: bool
    says: str
    remedy: str = ""


# trial of tierd.native.Probe: needed, what it is for, what it means without it, what to do
_TRIALS: dict[str, tuple[bool, str, str, str]] = {
    "userfaultfd": (
        True,
        "faults of a guest can be served, those taken inside the kernel (KVM) too",
        "faults of a guest cannot be served",
        "run as root or with CAP_SYS_PTRACE, on a kernel with CONFIG_USERFAULTFD=y",
    ),
    "missing": (
        True,
        "a page that was evicted from shared memory comes back on a fault",
        "an evicted page would not come back on a fault",
        "use a kernel with userfaultfd for shared memory (CONFIG_USERFAULTFD=y, Linux 4.11 or newer)",
    ),
    "write_protect": (
        True,
        "writers to shared memory can be held while a page is evicted",
        "writers to shared memory cannot be held while a page is evicted",
        "use Linux 5.19 or newer with CONFIG_PTE_MARKER_UFFD_WP=y",
    ),
    "pageout": (
        False,
        "untouched pages are found from outside the VMM (process_madvise)",
        "untouched pages are found by a call inside the VMM, at the price of short stops",
        "give tierd CAP_SYS_NICE; nothing else is lost without it",
    ),
    "pagemap_scan": (
        False,
        "the kernel lists touched pages (PAGEMAP_SCAN)",
        "touched pages are read one by one from /proc/PID/pagemap: slower, otherwise the same",
        "Linux 6.7 or newer has it",
    ),
    "poison": (
        False,
        "a page that cannot be brought back becomes an honest memory error",
        "a page that cannot be brought back leaves the guest waiting, with an alarm",
        "Linux 6.6 or newer has it",
    ),
    "self_zap": (
        False,
        "one call inside the VMM finds untouched pages in many places",
        "calls inside the VMM cover one place each: more stops where swap is on",
        "newer kernels have it; with swap off it does not matter",
    ),
}


def kernel_findings(found: Probe) -> list[Finding]:
    """The trials on scratch pages, in words."""
    findings = []
    for trial, (needed, with_it, without_it, remedy) in _TRIALS.items():
        error = getattr(found, trial)
        says = with_it if not error else f"{without_it} (the trial said: {os.strerror(error)})"
        findings.append(Finding(trial.replace("_", " "), not error, needed, says, remedy))
    return findings


def passed(findings: Iterable[Finding]) -> bool:
    """Whether tierd can work here."""
    return all(finding.ok or not finding.needed for finding in findings)
