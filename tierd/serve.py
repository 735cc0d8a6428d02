# SPDX-License-Identifier: Apache-2.0
"""A guest that is being served: descriptors, state file, store space and the native guest, made by attach or by adoption.

No trio here, and nothing that only the API or the CLI needs: adoption runs before those are imported. Every function blocks.
A crash at any point leaves either no state file (then no page ever left the guest) or one that adoption can use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tierd.attach import GuestSpec, Region
from tierd.attach.procfs import open_memfd, start_ticks
from tierd.attach.ptrace import close_in_vmm, pick_thread, pidfd_getfd, take_userfaultfd
from tierd.engine import Engine
from tierd.native import (
    STATES,
    Adoption,
    Identity,
    KernelError,
    NativeGuest,
    TableRegion,
    Tier,
    Zap,
    table_create,
    table_lock,
    table_read,
)
from tierd.store.file import FileSpace, FileStore, file_system_of

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
SUFFIX = ".state"
EPOCH_S_MAX, EPOCH_S_MIN = 8.0, 0.05
LEAVE_S_MAX = 10.0


class StateError(Exception):
    """The runtime directory or a state file cannot be used; the text says why and what to do."""


@dataclass(frozen=True)
class Tuning:
    """What of the policy is fixed while a guest is served (a reload changes the rest)."""

    min_idle_s: float
    readahead_pages_max: int
    fault_spin_us_max: int = 50  # adaptive: only where faults come quickly enough for it to pay
    follow: bool = True  # a fault thread goes where a pinned vCPU is
    read_deadline_s: float = 30.0
    hold_lost: bool = False

    @property
    def epoch_ns(self) -> int:
        """Step of the last-access stamps: 8 s, or an eighth of the shortest idle time that matters."""
        return int(min(max(self.min_idle_s / 8, EPOCH_S_MIN), EPOCH_S_MAX) * 1e9)


class Served:
    """Everything tierd holds of one guest. `close` leaves the guest's pages where they are; `leave` and `forget` end it."""

    def __init__(self, spec: GuestSpec, state_path: Path, engine: Engine) -> None:
        self.spec = spec
        self._engine = engine
        self.state_path = state_path
        self.zap = Zap.PAGEOUT
        self.adoption: Adoption | None = None
        self._undo = contextlib.ExitStack()
        self.native: NativeGuest
        self.space: FileSpace
        self.pidfd = self.uffd = self.uffd_in_vmm = self.table_fd = -1
        self.memfds: list[int] = []

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the fault threads and close our descriptors. What is stored stays stored: another tierd can adopt it."""
        self._undo.close()

    def _own(self, fd: int) -> int:
        self._undo.callback(os.close, fd)
        return fd

    def resident_bytes(self) -> int:
        """Memory that the guest's files occupy now (blocks, not RSS: deactivation alone empties RSS)."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self.memfds)

    def adapt(self, swap_can_receive: bool) -> None:
        """Before every pass: swap may have come, or gone, since the last one. Worker."""
        zap = self._engine.zap(swap_can_receive)
        if zap is not self.zap:
            self.native.set_zap(zap, pick_thread(self.spec.pid) if zap is Zap.INJECT else 0)
            self.zap = zap

    def leave(self) -> None:
        """Give the guest back to its VMM: unregister, close the VMM's userfaultfd. KernelError EBUSY while a page is
        stored: restore first. Blocks for as long as faults are in service, at most LEAVE_S_MAX."""
        self._disarm()
        self.state_path.unlink(missing_ok=True)  # before its userfaultfd goes, without which nobody could adopt it
        self.native.stop()
        close_in_vmm(self.spec.pid, self.uffd_in_vmm)

    def _disarm(self) -> None:
        """A guest goes on faulting: a page that a fault thread owns just now is busy, too, but only for a moment. Nothing
        was unregistered when EBUSY is the answer."""
        until = time.monotonic() + LEAVE_S_MAX
        while True:
            try:
                return self.native.disarm()
            except KernelError as error:
                stored = self.native.counters()["state_pages"][STATES.index("stored")]
                if error.errno != errno.EBUSY or stored or time.monotonic() > until:
                    raise
                time.sleep(0.001)

    def forget(self) -> None:
        """Remove the state file and the stored pages. Only for a guest that is gone or was left."""
        self.state_path.unlink(missing_ok=True)
        self.space.delete()


def prepare_runtime_dir(path: Path) -> Path:
    """Make `path` and its guests/ usable: ours, 0700, on tmpfs. StateError says what to do."""
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    guests = path / "guests"
    guests.mkdir(mode=0o700, exist_ok=True)
    info = guests.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise StateError(f"{guests} must be a directory of user {os.geteuid()} with mode 0700; fix or remove it")
    if file_system_of(guests) not in ("tmpfs", "ramfs"):
        raise StateError(
            f"{path} is not on tmpfs: the page tables must survive tierd but not a reboot, and must never wait for a disk; "
            "set runtime_dir to a directory on tmpfs, /dev/shm/tierd for example"
        )
    return guests


def _table_regions(regions: tuple[Region, ...]) -> list[TableRegion]:
    return [TableRegion(r.address, r.bytes, r.offset, r.device, r.inode) for r in regions]


def _open_guest(served: Served, engine: Engine, tuning: Tuning, swap_can_receive: bool, capacity_pages: int) -> None:
    """The native guest over what `served` holds so far."""
    spec, space = served.spec, served.space
    pagemap = os.open(f"/proc/{spec.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    served.zap = engine.zap(swap_can_receive)
    try:
        served.native = NativeGuest(
            table_fd=served.table_fd,
            uffd=served.uffd,
            pidfd=served.pidfd,
            pagemap_fd=pagemap,
            regions=_table_regions(spec.regions),
            memfds=served.memfds,
            tier=Tier(space.fd, space.direct, space.drop_cache, capacity_pages),
            zap=served.zap,
            inject_tid=pick_thread(spec.pid) if served.zap is Zap.INJECT else 0,
            use_pagemap=engine.use_pagemap,
            readahead_pages=tuning.readahead_pages_max,
            spin_us_max=tuning.fault_spin_us_max,
            follow=tuning.follow,
        )
    finally:
        os.close(pagemap)
    served._undo.push(served.native)
    served.native.set_reads(tuning.read_deadline_s, tuning.hold_lost)


def _take_descriptors(served: Served) -> None:
    spec = served.spec
    served.pidfd = served._own(os.pidfd_open(spec.pid))
    if start_ticks(spec.pid) != spec.start_ticks:
        raise ProcessLookupError(errno.ESRCH, f"process {spec.pid} is not the VMM of {spec.name} any more")
    for region in spec.regions:
        served.memfds.append(served._own(open_memfd(spec.pid, region)))


@contextlib.contextmanager
def _undone_on_error(served: Served) -> Iterator[None]:
    try:
        yield
    except BaseException:
        served.close()
        raise


def key_of(spec: GuestSpec) -> str:
    """Names a guest's files: by pid and start time, never by its name (two may share one; it may hold a slash)."""
    return f"{spec.pid}-{spec.start_ticks}"


def attach(
    spec: GuestSpec,
    *,
    engine: Engine,
    store: FileStore,
    guests_dir: Path,
    tuning: Tuning,
    swap_can_receive: bool,
    capacity_pages: int,
) -> Served:
    """Begin to serve a guest that passed preflight. On any error nothing of it stays, in the VMM neither."""
    served = Served(spec, guests_dir / (key_of(spec) + SUFFIX), engine)
    with _undone_on_error(served), contextlib.ExitStack() as on_error:
        _take_descriptors(served)
        taken = take_userfaultfd(spec.pid)
        served.uffd, served.uffd_in_vmm = served._own(taken.uffd), taken.uffd_in_vmm
        os.close(taken.pidfd)
        on_error.callback(_close_in_vmm_quietly, spec.pid, taken.uffd_in_vmm)
        served.space = store.open(
            key_of(spec), sum(r.bytes for r in spec.regions) // PAGE_BYTES, PAGE_BYTES, create=True
        )
        served._undo.callback(served.space.close)
        on_error.callback(served.space.delete)
        served.table_fd = _create_state(served, tuning)
        on_error.callback(served.state_path.unlink, missing_ok=True)
        _open_guest(served, engine, tuning, swap_can_receive, capacity_pages)
        served.native.start()  # a fault thread before the first registration
        served.native.arm()
        on_error.pop_all()
    return served


def _close_in_vmm_quietly(pid: int, fd: int) -> None:
    """On the way out of a failed attach: the failure itself is what is reported; a VMM that is gone needs no closing."""
    with contextlib.suppress(OSError):
        close_in_vmm(pid, fd)


def _create_state(served: Served, tuning: Tuning) -> int:
    spec, path = served.spec, served.state_path
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    fd = served._own(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    identity = Identity(
        pid=spec.pid,
        start_ticks=spec.start_ticks,
        boot_id=spec.boot_id,
        name=spec.name,
        uffd_in_vmm=served.uffd_in_vmm,
        epoch_ns=tuning.epoch_ns,
        store_path=str(served.space.path),
    )
    try:
        if not table_lock(fd):
            raise StateError(f"{unfinished} is locked by another process, though it was made just now")
        table_create(fd, identity, _table_regions(spec.regions))
        os.rename(unfinished, path)  # complete, or not there at all
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return fd


class Stale(Exception):
    """A state file of a VMM (or a boot) that is gone: it can be removed."""


def wait_for_lock(fd: int, path: Path, pause: Callable[[float], None], wait_s_max: float = 60.0) -> None:
    """Wait until the last thread of a predecessor is gone: only then is the page table nobody's. StateError after
    `wait_s_max`, naming the holder."""
    waited = 0.0
    while not table_lock(fd):
        if waited >= wait_s_max:
            raise StateError(
                f"{path} is still locked by {_lock_holder(path)}; is another tierd running on this directory?"
            )
        pause(0.01)
        waited += 0.01


def _lock_holder(path: Path) -> str:
    inode = path.stat().st_ino
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
            return f"process {fields[4]}"
    return "a process that /proc/locks does not name"


def adopt(
    state_path: Path,
    *,
    engine: Engine,
    store: FileStore,
    tuning: Tuning,
    swap_can_receive: bool,
    capacity_pages: int,
    boot_id: str,
    pause: Callable[[float], None],
) -> Served:
    """Go on with what a predecessor left. Stale: the VMM is gone. StateError: not touched, an operator must look."""
    fd = os.open(state_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        identity, regions = table_read(fd)
        if identity.boot_id != boot_id or start_ticks(identity.pid) != identity.start_ticks:
            raise Stale(f"{state_path}: its VMM, process {identity.pid} ({identity.name}), is gone")
        wait_for_lock(fd, state_path, pause)
    except KernelError as error:
        os.close(fd)
        if error.errno == errno.EPROTONOSUPPORT:
            raise StateError(
                f"{state_path} was written by a newer tierd; start that one, this one touches nothing"
            ) from error
        raise StateError(f"{state_path} is broken ({error}); nothing was touched") from error
    except BaseException:
        os.close(fd)
        raise
    spec = GuestSpec(
        name=identity.name,
        pid=identity.pid,
        start_ticks=identity.start_ticks,
        boot_id=boot_id,
        cmdline=(),
        regions=tuple(Region(r.address, r.bytes, r.offset, r.device, r.inode) for r in regions),
    )
    served = Served(spec, state_path, engine)
    served.table_fd = served._own(fd)
    with _undone_on_error(served):
        _take_descriptors(served)
        served.uffd_in_vmm = identity.uffd_in_vmm
        served.uffd = served._own(_userfaultfd_again(served.pidfd, identity))
        served.space = store.open(key_of(spec), sum(r.bytes for r in regions) // PAGE_BYTES, PAGE_BYTES, create=False)
        served._undo.callback(served.space.close)
        _open_guest(served, engine, tuning, swap_can_receive, capacity_pages)
        served.adoption = served.native.adopt()
        served.native.start()
    return served


def _userfaultfd_again(pidfd: int, identity: Identity) -> int:
    link = os.readlink(f"/proc/{identity.pid}/fd/{identity.uffd_in_vmm}")
    if link != "anon_inode:[userfaultfd]":
        raise StateError(
            f"descriptor {identity.uffd_in_vmm} of process {identity.pid} ({identity.name}) is {link}, not the userfaultfd "
            "that tierd made there: its evicted pages cannot be served; do not stop tierd's store, restart the guest"
        )
    return pidfd_getfd(pidfd, identity.uffd_in_vmm)
