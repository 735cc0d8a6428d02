# SPDX-License-Identifier: Apache-2.0
"""What `tierd check` finds out about this kernel, this host and a guest, in words with remedies. Changes nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd.attach import Refused
    from tierd.native import Probe

# number of the capability: name, and what needs it (systemd/tierd.service says more)
CAP_SYS_ADMIN = 21  # not needed: it shows page frames
_CAPABILITIES = {
    19: ("CAP_SYS_PTRACE", "enter a VMM"),
    23: ("CAP_SYS_NICE", "deactivate from outside"),
    2: ("CAP_DAC_READ_SEARCH", "read another user's pagemap"),
}


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
    "anonymous": (
        False,
        "private anonymous memory, a VMM's default, can be tiered (UFFDIO_MOVE)",
        "private anonymous memory cannot be tiered: give VMs shared memory (memfd)",
        "Linux 6.8 or newer has it",
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


def tracks_by_itself(found: Probe) -> bool:
    """Whether there is an engine that does to a VMM nothing but what the VMM's userfaultfd can: then a VMM that brings it needs
    no privilege of ours."""
    return not found.rwp or not found.rfc


def kernel_findings(found: Probe) -> list[Finding]:
    """The trials on scratch pages, in words."""
    findings = []
    for trial, (needed, with_it, without_it, remedy) in _TRIALS.items():
        error = getattr(found, trial)
        if trial == "userfaultfd" and error == errno.EPERM and tracks_by_itself(found):
            needed, without_it = (
                False,
                "tierd may not make one for faults taken inside the kernel (KVM): a VMM must bring it",
            )
        says = with_it if not error else f"{without_it} (the trial said: {os.strerror(error)})"
        findings.append(Finding(trial.replace("_", " "), not error, needed, says, remedy))
    return findings


# engine: what it is, for people
_ENGINES = {
    "rwp": "Linux's own working set tracking (userfaultfd RWP, 7.3): reads are seen and held, nothing runs inside a VMM",
    "rfc": "the working set tracking of April 2026 (UFFDIO_DEACTIVATE): reads are seen and held, nothing runs inside a VMM",
    "stock": "what every kernel from 5.19 on has; Linux 7.3 (RWP) tracks without unmapping",
}
# engine: what becomes of NUMA balancing where it is on
_NUMA = {
    "rwp": "NUMA balancing is on and goes on: its hints and the protection of untouched pages know of each other",
    "rfc": "NUMA balancing is on and goes on in shared memory, where a hint may reach tierd as a fault while pages leave, and "
    "is answered; anonymous memory of guests gets none, so it stays on the node where it is",
    "stock": "NUMA balancing is on: its hints make no difference, an untouched page is not mapped",
}


def engine_findings(found: Probe, wanted: str = "auto", root: Path = Path("/")) -> list[Finding]:
    """Which engine it is and why not another; what it does to NUMA balancing."""
    from tierd.engine import EngineUnavailable, choose, trial_failed

    try:
        name = choose(wanted, found).name
    except EngineUnavailable as error:
        return [Finding("engine", False, True, str(error), "set engine: auto, or boot another kernel")]
    broken = [
        trial_failed(other, error, step)
        for other, error, step in (("rwp", found.rwp, found.rwp_step), ("rfc", found.rfc, found.rfc_step))
        # offered, so it should work; but the two kernels offer each other's feature bits
        if name == "stock" and error and step > 1
    ]
    says = "; ".join([f"{name}: {_ENGINES[name]}", *broken])
    findings = [Finding("engine", not broken, False, says, "report this to whoever made the kernel")]
    if _read(root / "proc/sys/kernel/numa_balancing").strip() not in ("", "0"):
        findings.append(Finding("NUMA balancing", True, False, _NUMA[name]))
    return findings


def _idle_page_tracking(root: Path) -> list[Finding]:
    """Of use to the stock engine, which does not see otherwise who reads anonymous memory. Few kernels have it."""
    from tierd.engine.stock import IDLE_BITMAP

    if not (root / IDLE_BITMAP.lstrip("/")).exists():
        return []
    allowed = bool(_held(root) >> CAP_SYS_ADMIN & 1)
    says = (
        "anonymous memory that is only read is left where it is"
        if allowed
        else "not used: page frames are shown with CAP_SYS_ADMIN only; who reads anonymous memory is seen by moving it"
    )
    return [Finding("idle page tracking", allowed, False, says, "give tierd CAP_SYS_ADMIN; nothing is lost without it")]


def host_findings(found: Probe, root: Path = Path("/")) -> list[Finding]:
    """What the host is set to, from /proc and /sys below `root`."""
    handshake = tracks_by_itself(found)  # then a VMM that brings its descriptors can be served without a privilege
    return [
        _capabilities(root, handshake),
        _locked_memory(root),
        _ptrace_scope(root, handshake),
        _large_folios(found, root),
        _swap(root),
        *([] if handshake or found.anonymous else _idle_page_tracking(root)),
    ]


def _read(path: Path) -> str:
    """ "" where this kernel has no such file."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _held(root: Path) -> int:
    match = re.search(r"^CapEff:\s+([0-9a-f]+)", _read(root / "proc/self/status"), re.MULTILINE)
    return int(match[1], 16) if match else 0


def _capabilities(root: Path, handshake: bool) -> Finding:
    held = _held(root)
    missing = [f"{name} ({why})" for number, (name, why) in _CAPABILITIES.items() if not held >> number & 1]
    if missing and handshake:
        says = (
            f"a VMM must bring its descriptors (handshake.socket), of its own this process has not {', '.join(missing)}"
        )
        return Finding("privileges", False, False, says, "run this as root to attach to VMMs by their pid")
    says = f"missing: {', '.join(missing)}" if missing else "this process may do to a VMM what tierd does"
    return Finding("privileges", not missing, True, says, "run this as root")


def _locked_memory(root: Path) -> Finding:
    """Page tables and buffers of the fault path are locked."""
    from tierd.native import CAP_IPC_LOCK, GUEST_LOCKED_BYTES, TABLE_BYTES_A_PAGE

    match = re.search(r"^Max locked memory\s+(\w+)", _read(root / "proc/self/limits"), re.MULTILINE)
    if not match or match[1] == "unlimited" or _held(root) >> CAP_IPC_LOCK & 1:
        return Finding("locked memory", True, False, "as much memory as tierd needs may be locked")
    limit = int(match[1])
    pages = max(limit - GUEST_LOCKED_BYTES, 0) // TABLE_BYTES_A_PAGE
    room_gib = pages * os.sysconf("SC_PAGESIZE") / (1 << 30)
    return Finding(
        "locked memory",
        False,
        False,
        f"RLIMIT_MEMLOCK is {limit >> 10} KiB: enough for one guest of {room_gib:.1f} GiB",
        "raise LimitMEMLOCK= of tierd's unit; for a user unit that of user@.service, which is its hard limit, too",
    )


def _ptrace_scope(root: Path, handshake: bool) -> Finding:
    scope = _read(root / "proc/sys/kernel/yama/ptrace_scope").strip()
    says = (
        "nobody may trace a process (kernel.yama.ptrace_scope is 3)"
        if scope == "3"
        else "a VMM can be entered by ptrace"
    )
    remedy = "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d; it takes a reboot"
    return Finding("ptrace", scope != "3", not handshake, says, remedy)


def _large_folios(found: Probe, root: Path) -> Finding:
    base = root / "sys/kernel/mm/transparent_hugepage"
    top = _chosen(base / "shmem_enabled")
    risky = []
    for path in [base / "shmem_enabled", *sorted(base.glob("hugepages-*/shmem_enabled"))]:
        chosen = _chosen(path)
        if (top if chosen == "inherit" else chosen) not in ("", "never", "deny"):
            risky.append(f"/{path.relative_to(root)} is {chosen}")
    if risky and not (found.rwp and found.rfc):
        says = f"one of which a part leaves is split: {', '.join(risky)}"
        return Finding("large folios", True, False, says)
    says = "shared memory is made of single pages" if not risky else f"guests are refused: {', '.join(risky)}"
    remedy = "echo never into each of these files (see tmpfiles.d(5) to keep it so), then restart the VMs"
    return Finding("large folios", not risky, True, says, remedy)


def _chosen(path: Path) -> str:
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else ""


def _swap(root: Path) -> Finding:
    match = re.search(r"^SwapTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    on = bool(match and int(match[1]))
    says = (
        "swap is on: untouched pages are found by a call inside the VMM, at the price of short stops"
        if on
        else "swap is off: untouched pages are found from outside the VMM"
    )
    return Finding("swap", not on, False, says, "swapoff -a, or memory.swap.max=0 in the VMs' control groups")


def guest_findings(checks: Iterable[tuple[str, Refused | None]]) -> list[Finding]:
    """What preflight says about one guest."""
    return [
        Finding(name.replace("_", " "), True, True, "nothing found")
        if refused is None
        else Finding(name.replace("_", " "), False, True, f"{refused.cause} ({refused.evidence})", refused.remedy)
        for name, refused in checks
    ]


def passed(findings: Iterable[Finding]) -> bool:
    """Whether tierd can work here."""
    return all(finding.ok or not finding.needed for finding in findings)
