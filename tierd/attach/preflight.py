# SPDX-License-Identifier: Apache-2.0
"""Is it safe to tier this guest? One named check a hazard; each refusal names the cause, the evidence and the remedy.

The hazards are those of a stock kernel on which bytes would be lost, or a VMM killed, without a word. All checks run before
the attach; those whose answer may change later run again before every cycle (`recheck`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tierd.attach import GuestSpec, Refused, Region
from tierd.attach.holders import HolderScan
from tierd.attach.procfs import (
    MEMFD_REMEDY,
    Mapping,
    comm_of,
    filtered,
    first_unmapped,
    maps_of,
    option_values,
    read_proc,
    split_options,
    start_ticks,
)

if TYPE_CHECKING:  # adoption comes before the configuration
    from tierd.config import Policy
    from tierd.engine import Engine

MEMCG_HEADROOM_BYTES = 64 << 20
HUGE_PAGE_BYTES_MAX, GIGANTIC_PAGE_BYTES = 32 << 20, 1 << 30  # the second: PAGE_BYTES_MAX of table.c


def status_field(pid: int, key: str) -> int:
    """A number of /proc/PID/status; 0 where it is missing."""
    match = re.search(rf"^{key}:\s+(\d+)", read_proc(f"/proc/{pid}/status"), re.M)
    return int(match[1]) if match else 0


# --- the checks -------------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """What the checks look at, read once."""

    spec: GuestSpec
    policy: Policy
    holders: HolderScan
    maps: list[Mapping] = field(default_factory=list)
    smaps: str = ""
    engine: Engine | None = None  # None: it is not known, and may take the least

    @property
    def on_hugetlbfs(self) -> bool:
        """All of the guest's memory is."""
        return not self.spec.anonymous and all(
            _page_bytes(self, region) != os.sysconf("SC_PAGESIZE") for region in self.spec.regions
        )

    @property
    def files(self) -> set[tuple[int, int]]:
        return {(region.device, region.inode) for region in self.spec.regions if not region.anonymous}


Check = Callable[[Subject], None]


def alive(s: Subject) -> None:
    if start_ticks(s.spec.pid) != s.spec.start_ticks:
        raise Refused(
            "alive",
            "the VMM is gone",
            f"pid {s.spec.pid} does not run, or is another process now",
            "start the VM again",
        )


def tracer(s: Subject) -> None:
    pid = status_field(s.spec.pid, "TracerPid")
    # it may be a thread of ours that cannot let go yet: inject.c
    if pid and not os.path.exists(f"/proc/self/task/{pid}"):
        raise Refused(
            "tracer", "the VMM is being traced", f"TracerPid {pid} ({comm_of(pid)})", "end the debugger, then attach"
        )


def seccomp(s: Subject) -> None:
    if not filtered(s.spec.pid, s.spec.cmdline):
        return
    raise Refused(
        "seccomp",
        "the VMM runs under a seccomp filter that may kill it for a call of ours",
        f"pid {s.spec.pid}: Seccomp 2, not QEMU's -sandbox alone",
        "run the VMM without the filter (cloud-hypervisor --seccomp false, firecracker --no-seccomp), which is a line of "
        "defence less, or let it connect to handshake.socket",
    )


def second_mapping(s: Subject) -> None:
    """Any other mapping of a guest's file, in the VMM too, would fill punched pages with zeros without a fault."""
    ram = [(r.address, r.address + r.bytes) for r in s.spec.regions]
    for m in s.maps:
        if (m.device, m.inode) in s.files and not any(start <= m.start and m.end <= end for start, end in ram):
            raise Refused(
                "second-mapping",
                "the VMM maps the guest's memory twice",
                f"pid {s.spec.pid}: {m.start:#x}-{m.end:#x} {m.mode} {m.path}",
                "use a VM without devices that do that",
            )
    offsets = sorted((r.device, r.inode, r.offset, r.offset + r.bytes) for r in s.spec.regions if not r.anonymous)
    for a, b in itertools.pairwise(offsets):
        if a[:2] == b[:2] and b[2] < a[3]:
            raise Refused(
                "second-mapping",
                "two of the guest's regions are the same memory",
                f"inode {a[1]}: offsets {a[2]:#x} and {b[2]:#x} overlap",
                "use a VM without aliased RAM",
            )


def private_mapping(s: Subject) -> None:
    for m in s.maps:
        if (m.device, m.inode) in s.files and m.mode[3] == "p":
            raise Refused(
                "private-mapping",
                "the guest's file is mapped privately, its pages would be lost",
                f"pid {s.spec.pid}: {m.start:#x}-{m.end:#x} {m.mode}",
                "use share=on",
            )


def other_holders(s: Subject) -> None:
    """Not only mappers: a holder can map later."""
    others = s.holders.holders(s.files, {s.spec.pid})
    if others:
        told = ", ".join(f"pid {h.pid} ({h.comm}) {h.how}" for h in others[:5])
        raise Refused(
            "second-mapper",
            "another process holds the guest's memory; its touch of an evicted page would read and leave zeros",
            told,
            "stop that process (vhost-user back ends and virtiofsd cannot be tiered)",
        )


def vhost_user(s: Subject) -> None:
    """Devices that hand the memory to another process, maybe later."""
    for flag in ("netdev", "device", "chardev", "object"):
        for value in option_values(s.spec.cmdline, flag):
            if re.search(r"vhost-user|vhost-vdpa|x-vfio-user", value):
                raise Refused(
                    "vhost-user",
                    "a vhost-user device shares the guest's memory with another process",
                    f"-{flag} {value}",
                    "use the in-process device instead",
                )


def confidential(s: Subject) -> None:
    """SEV and its like: what is read of a page is encrypted for where it lies, and the guest could not read it anywhere else."""
    flags = [value for flag in ("object", "machine", "M", "platform") for value in option_values(s.spec.cmdline, flag)]
    for said in [*flags, *(_readlink(f"/proc/{s.spec.pid}/fd/{fd}") for fd in _fds(s.spec.pid))]:
        if re.search(
            r"^(sev|sev-snp|tdx)-guest\b|confidential-guest-support=|memory-encryption=|(sev_snp|tdx)=on|^/dev/sev$", said
        ):
            raise Refused(
                "confidential",
                "the guest's memory is encrypted by the CPU, with a key that the host has not got",
                f"pid {s.spec.pid}: {said}",
                "leave it out: enabled: false for its name",
            )


def vfio(s: Subject) -> None:
    """Its pins are counted as locked memory (type 1), not as pinned; and it may be plugged in later."""
    for name in os.listdir(f"/proc/{s.spec.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/{s.spec.pid}/fd/{name}")
            if target.startswith("/dev/vfio/") or "anon_inode:[vfio" in target or "anon_inode:kvm-vfio" in target:
                raise Refused(
                    "vfio",
                    "a device is passed through: it reaches guest memory by DMA, which cannot fault",
                    f"pid {s.spec.pid}: descriptor {name} is {target}",
                    "remove the passed-through device",
                )


def pins(s: Subject) -> None:
    pinned = status_field(s.spec.pid, "VmPin")
    if pinned:
        raise Refused(
            "pinned",
            "memory of the VMM is pinned for DMA (VFIO, io_uring fixed buffers)",
            f"pid {s.spec.pid}: VmPin {pinned} kB",
            "use devices and I/O without registered buffers",
        )


def mlocked(s: Subject) -> None:
    locked = status_field(s.spec.pid, "VmLck")
    if locked and re.search(r"^VmFlags:.* lo\b", s.smaps, re.M):
        raise Refused(
            "mlock",
            "the guest's memory is locked, it cannot be deactivated",
            f"pid {s.spec.pid}: VmLck {locked} kB",
            "start the VM without -overcommit mem-lock=on and <locked/>",
        )


def large_folios(s: Subject) -> None:
    """Those that are there, and those that may come."""
    if _takes_large_folios(s):
        return
    large_folios_allowed(s)
    for key in ("ShmemPmdMapped", "FilePmdMapped"):
        for match in re.finditer(rf"^{key}:\s+(\d+) kB", s.smaps, re.M):
            if int(match[1]):
                raise Refused(
                    "large-folios",
                    "the guest's memory holds large folios, made before they were switched off",
                    f"pid {s.spec.pid}: {key} {match[1]} kB",
                    "restart the VM",
                )


def _takes_large_folios(s: Subject) -> bool:
    return bool(s.engine and s.engine.holds_reads) or s.on_hugetlbfs or s.spec.anonymous


def large_folios_allowed(s: Subject) -> None:
    """A punch inside a shmem large folio with another reference leaves zeros, until their bytes are written back: the guest
    must wait meanwhile, readers too. An administrator may allow them at any time."""
    if _takes_large_folios(s):
        return
    base = Path("/sys/kernel/mm/transparent_hugepage")
    for path in [base / "shmem_enabled", *sorted(base.glob("hugepages-*/shmem_enabled"))]:
        chosen = re.search(r"\[(\w+)\]", read_proc(path))
        if not chosen or chosen[1] in ("never", "deny"):
            continue
        inherits = chosen[1] == "inherit"
        if inherits:
            top = re.search(r"\[(\w+)\]", read_proc(base / "shmem_enabled"))
            if not top or top[1] in ("never", "deny"):
                continue
        raise Refused(
            "large-folios",
            "shared memory may get large folios, of which single pages cannot be given back safely",
            f"{path} is {chosen[1]}",
            f"echo never > {base}/shmem_enabled (and each hugepages-*/shmem_enabled), then restart the VM",
        )
    _tmpfs_huge(s)


def _tmpfs_huge(s: Subject) -> None:
    for line in read_proc("/proc/self/mountinfo").split("\n")[:-1]:
        fields = line.split()
        major, minor = fields[2].split(":")
        if os.makedev(int(major), int(minor)) not in {device for device, _ in s.files}:
            continue
        huge = re.search(r"\bhuge=(\w+)", line)
        if huge and huge[1] != "never":
            raise Refused(
                "large-folios",
                "the tmpfs that backs the guest makes large folios",
                f"{fields[4]} has huge={huge[1]}",
                "mount it with huge=never, then restart the VM",
            )


def backing(s: Subject) -> None:
    """A punch in a file on a disk means something else, and tierd's buffers hold whole pages, several of them."""
    if s.spec.anonymous:
        return _anonymous(s)
    kinds = {}
    sizes: set[int] = set()
    for line in read_proc("/proc/self/mountinfo").split("\n")[:-1]:
        fields = line.split()
        major, minor = fields[2].split(":")
        kinds[os.makedev(int(major), int(minor))] = fields[fields.index("-") + 1]
    for region in s.spec.regions:
        kind = kinds.get(region.device, "shmem")  # memfds are on a mount of the kernel's own
        size = _page_bytes(s, region)
        if size != os.sysconf("SC_PAGESIZE"):
            kind = "hugetlbfs"
        evidence = f"pid {s.spec.pid}: {region.address:#x}, inode {region.inode}"
        if kind not in ("shmem", "tmpfs", "devtmpfs", "hugetlbfs"):
            raise Refused(
                "backing",
                f"the guest's memory is on {kind}",
                evidence,
                "use memory-backend-memfd,share=on, or a file on tmpfs or hugetlbfs",
            )
        if kind == "hugetlbfs" and s.engine and "hugetlbfs" not in s.engine.backings:
            raise Refused(
                "backing",
                f"the guest's memory is on hugetlbfs, which engine {s.engine.name} cannot tier on this kernel",
                evidence,
                "use Linux 6.7 or newer (PAGEMAP_SCAN), or memory without hugetlb",
            )
        if size > (GIGANTIC_PAGE_BYTES if s.policy.allow_gigantic else HUGE_PAGE_BYTES_MAX):
            raise Refused(
                "backing",
                f"the guest's memory is in pages of {size >> 20} MiB: each would come back as a whole, while the guest waits",
                evidence,
                "use pages of 2 MiB (hugetlbsize=2M)"
                + (", or set allow_gigantic: true" if size == GIGANTIC_PAGE_BYTES else ""),
            )
        sizes.add(size)
    if len(sizes) > 1:
        raise Refused(
            "backing",
            "the guest's memory is in pages of different sizes",
            f"pid {s.spec.pid}: {', '.join(f'{size >> 10} KiB' for size in sorted(sizes))}",
            "use one kind of memory for all of its RAM",
        )


def _anonymous(s: Subject) -> None:
    if s.engine and "anonymous" not in s.engine.backings:
        raise Refused(
            "backing",
            f"the guest's memory is private and anonymous, which engine {s.engine.name} cannot tier on this kernel",
            f"pid {s.spec.pid}: {s.spec.regions[0].address:#x}, {sum(r.bytes for r in s.spec.regions) >> 20} MiB",
            f"use Linux 6.8 or newer (UFFDIO_MOVE), or {MEMFD_REMEDY}",
        )


def _page_bytes(s: Subject, region: Region) -> int:
    page = re.search(r"^KernelPageSize:\s+(\d+) kB", _smaps_of(s.smaps, region.address), re.M)
    return int(page[1]) * 1024 if page else os.sysconf("SC_PAGESIZE")


def _smaps_of(smaps: str, address: int) -> str:
    match = re.search(rf"^{address:x}-[0-9a-f]+ .*?(?=^[0-9a-f]+-[0-9a-f]+ |\Z)", smaps, re.M | re.S)
    return match[0] if match else ""


def registered(s: Subject) -> None:
    """MISSING ranges of somebody else: their holes are not ours to serve. Without a state file of ours, never as zeros."""
    for region in s.spec.regions:
        if flags := _registration(s.smaps, region.address):
            raise Refused(
                "registered",
                "the guest's memory is registered with a userfaultfd already (postcopy, a background "
                "snapshot, or a tierd whose state file is gone)",
                f"pid {s.spec.pid}: {region.address:#x} VmFlags{flags}",
                "wait until that is over; if a state file was lost, restart the VM",
            )


def _registration(smaps: str, address: int) -> str:
    """VmFlags of the mapping there, if one of them is a userfaultfd's; else ""."""
    flags = re.search(r"^VmFlags:(.*)$", _smaps_of(smaps, address), re.M)
    return flags[1] if flags and {"um", "uw", "ui", "ur"} & set(flags[1].split()) else ""


def registered_regions(spec: GuestSpec) -> int:
    """How many of the regions begin with memory that is registered with a userfaultfd now, whoever's."""
    smaps = read_proc(f"/proc/{spec.pid}/smaps")
    return sum(bool(_registration(smaps, region.address)) for region in spec.regions)


def memory_cgroup(s: Subject) -> None:
    """A fetch in a memory cgroup at its limit gets the VMM killed. hugetlbfs is not charged to it."""
    if s.on_hugetlbfs:
        return
    # what is fetched from a staging area is there twice for a while
    headroom = MEMCG_HEADROOM_BYTES * (3 if s.spec.anonymous else 1)
    size = sum(region.bytes for region in s.spec.regions) + (headroom if s.spec.anonymous else 0)
    for path, limit, used in _cgroup_limits(s.spec.pid):
        if limit < size and limit - used < headroom:
            raise Refused(
                "memory-cgroup",
                "the VMM's memory cgroup is at its limit, a fetched page would get it killed",
                f"{path}: limit {limit >> 20} MiB, used {used >> 20} MiB, guest {size >> 20} MiB",
                "raise the limit to the guest's size and some overhead",
            )


def _cgroup_limits(pid: int) -> list[tuple[Path, int, int]]:
    """(cgroup, limit, used) in bytes for every level that has a limit; version 1 and 2."""
    found = []
    for line in read_proc(f"/proc/{pid}/cgroup").split("\n")[:-1]:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            base, limit_file, used_file = _cgroup2_root(), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = (
                Path("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        path = base / name.lstrip("/")
        while path != base.parent:
            limit = read_proc(path / limit_file).strip()
            if limit.isdecimal() and int(limit) < 1 << 60:
                found.append((path, int(limit), int(read_proc(path / used_file, "0"))))
            path = path.parent
    return found


def _cgroup2_root() -> Path:
    return Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").is_dir() else Path("/sys/fs/cgroup")


def nested(s: Subject) -> None:
    """KVM keeps pages of a nested guest referenced: they look idle and are not."""
    if s.policy.allow_nested:
        return
    uses_kvm = any(_readlink(f"/proc/{s.spec.pid}/fd/{fd}").startswith("anon_inode:kvm-vm") for fd in _fds(s.spec.pid))
    enabled = [
        name
        for name in ("kvm_intel", "kvm_amd")
        if read_proc(f"/sys/module/{name}/parameters/nested").strip() in ("Y", "1")
    ]
    cpus = option_values(s.spec.cmdline, "cpu")
    exposed = [
        cpu
        for cpu in cpus
        if (split_options(cpu)[0] in ("host", "max") or re.search(r"\+(vmx|svm)|(vmx|svm)=on", cpu))
        and not re.search(r"-(vmx|svm)\b|(vmx|svm)=off", cpu)
    ]
    if uses_kvm and enabled and exposed:
        raise Refused(
            "nested",
            "the guest may run guests of its own, whose pages KVM keeps referenced",
            f"{enabled[0]} nested=Y, -cpu {exposed[0]}",
            "start it with -cpu ...,vmx=off (svm=off), or set allow_nested: true",
        )


def _fds(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        return []


def _readlink(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""


def regions_unchanged(s: Subject) -> None:
    """Regions are read again every cycle; the VMM may unmap or hot-add memory."""
    if region := first_unmapped(s.maps, s.spec.regions):
        raise Refused(
            "regions",
            "the VMM changed its guest's memory mappings",
            f"pid {s.spec.pid}: {region.address:#x}",
            "detach and attach the guest again",
        )


CHECKS: tuple[Check, ...] = (
    alive,
    tracer,
    seccomp,
    backing,
    private_mapping,
    second_mapping,
    other_holders,
    vhost_user,
    confidential,
    vfio,
    pins,
    mlocked,
    large_folios,
    registered,
    memory_cgroup,
    nested,
)
# about calls that are made inside the VMM
CHECKS_OF_ENTERING: tuple[Check, ...] = (tracer, seccomp)
CHECKS_EVERY_CYCLE: tuple[Check, ...] = (
    alive,
    regions_unchanged,
    private_mapping,
    second_mapping,
    other_holders,
    vfio,
    pins,
    large_folios_allowed,
)


def _subject(spec: GuestSpec, policy: Policy, holders: HolderScan, engine: Engine) -> Subject:
    if start_ticks(spec.pid) != spec.start_ticks:
        return Subject(spec, policy, holders, engine=engine)
    smaps = read_proc(f"/proc/{spec.pid}/smaps")
    return Subject(spec, policy, holders, maps_of(spec.pid), smaps, engine)


def preflight(spec: GuestSpec, policy: Policy, holders: HolderScan, engine: Engine, *, entered: bool = True) -> None:
    """Refused by the first check that fails. `entered`: calls will be made inside the VMM. Blocks for some milliseconds;
    changes nothing."""
    subject = _subject(spec, policy, holders, engine)
    for check in CHECKS:
        if entered or check not in CHECKS_OF_ENTERING:
            check(subject)


def findings(spec: GuestSpec, policy: Policy, holders: HolderScan, engine: Engine) -> list[tuple[str, Refused | None]]:
    """Every check by name and what it found, for `tierd check PID`."""
    subject = _subject(spec, policy, holders, engine)
    result: list[tuple[str, Refused | None]] = []
    for check in CHECKS:
        try:
            check(subject)
        except Refused as refused:
            result.append((check.__name__, refused))
        else:
            result.append((check.__name__, None))
    return result


def recheck(spec: GuestSpec, policy: Policy, holders: HolderScan, engine: Engine | None = None) -> None:
    """What may have changed since: before every cycle. `engine`: that serves it, None for one that takes the least. Refused, or
    ProcessLookupError when the VMM is gone."""
    if start_ticks(spec.pid) != spec.start_ticks:
        raise ProcessLookupError(3, f"process {spec.pid} is gone")
    subject = Subject(spec, policy, holders, maps_of(spec.pid), engine=engine)
    for check in CHECKS_EVERY_CYCLE:
        check(subject)


def swap_can_receive(pid: int) -> bool:
    """Whether a page of the VMM that is paged out could go to swap: then deactivation must not be MADV_PAGEOUT."""
    total = re.search(r"^SwapTotal:\s+(\d+) kB", read_proc("/proc/meminfo"), re.M)
    if not total or int(total[1]) == 0:
        return False
    for line in read_proc(f"/proc/{pid}/cgroup").split("\n")[:-1]:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            path = _cgroup2_root() / name.lstrip("/")
            while path != _cgroup2_root().parent:
                if read_proc(path / "memory.swap.max").strip() == "0":
                    return False
                path = path.parent
    return True
