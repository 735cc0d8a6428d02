# SPDX-License-Identifier: Apache-2.0
"""A guest that is being served: descriptors, state file, store space and the native guest, made by attach or by adoption.

No trio here, and nothing that only the API or the CLI needs: adoption runs before those are imported. Every function blocks.
A crash at any point leaves either no state file (then no page ever left the guest) or one that adoption can use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tierd.attach import GuestSpec, Handed, Refused, Region
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import registered_regions, status_field
from tierd.attach.procfs import (
    UFFD_LINK,
    Mapping,
    cmdline_of,
    filtered,
    maps_of,
    open_memfd,
    start_ticks,
    still_mapped,
)
from tierd.attach.ptrace import (
    Taken,
    agree_once,
    close_in_vmm,
    features_of,
    map_staging,
    may_enter,
    may_page_out,
    must_be_agreed,
    pick_thread,
    pidfd_getfd,
    put_into_vmm,
    take_userfaultfd,
    unmap_staging,
)
from tierd.engine import FEATURE_ASYNC, Engine, engine_of
from tierd.engine.stock import open_idle_bitmap
from tierd.native import (
    CAP_IPC_LOCK,
    GIGANTIC_BUFFER_PAGES,
    GIGANTIC_BYTES,
    GUEST_LOCKED_BYTES,
    HUGE_BUFFER_PAGES,
    HUGE_SEALED_PAGES,
    SEALED_LOCKED_BYTES,
    STAGING_TIER,
    STATES,
    TABLE_BYTES_A_PAGE,
    Adoption,
    EngineNumber,
    Identity,
    KernelError,
    NativeGuest,
    Place,
    Serving,
    TableRegion,
    Tier,
    TierKind,
    Zap,
    calls_destroy,
    leave_window,
    page_bytes_of,
    table_away,
    table_create,
    table_lock,
    table_read,
)
from tierd.store import Space, Store, StoreError, memory
from tierd.store.asked import AskedSpace
from tierd.store.directory import GuestFile, file_system_of, is_at, open_ours
from tierd.store.file import FileStore, reopen
from tierd.store.keys import FileKey

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
SUFFIX = ".state"
KEYS = "keys"  # in runtime_dir: a directory
EPOCH_S_MAX, EPOCH_S_MIN = 8.0, 0.05
LEAVE_S_MAX = 10.0


class StateError(Exception):
    """The runtime directory or a state file cannot be used; the text says why and what to do."""


class AwaitsHandshake(StateError):
    """The guest's VMM brought its descriptors to a predecessor, and must bring them to us, too. Nothing was touched."""

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(
            f"waiting for its VMM's handshake: process {pid} ({name}) connected to a tierd before, and has not to this one"
        )


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


@dataclass(frozen=True)
class ServedTier:
    """Where a guest's pages are stored: `number` is the tier's in page words, in the order in which pages sink."""

    number: int
    name: str  # of the store
    space: Space


class Served:
    """Everything tierd holds of one guest. `close` leaves the guest's pages where they are; `leave` and `forget` end it."""

    def __init__(self, spec: GuestSpec, state_path: Path, engine: Engine) -> None:
        self.spec = spec
        self.engine = engine
        self.state_path = state_path
        self.zap, self._inject_tid = Zap.PAGEOUT, 0
        self.adoption: Adoption | None = None
        self._undo = contextlib.ExitStack()
        self.native: NativeGuest
        self.tiers: dict[str, ServedTier] = {}  # by name, in their order
        self.undeleted: dict[str, OSError] = {}  # by name: what `forget` could not remove
        self.pidfd = self.uffd = self.uffd_in_vmm = self.pagemap = self.mem = self.table_fd = -1
        self.asked_fd = -1  # an eventfd: somebody wants pages of a tier that is asked
        self.memfds: list[int] = []
        self.page_bytes = PAGE_BYTES

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

    @property
    def pages(self) -> int:
        """Of `page_bytes` each."""
        return sum(region.bytes for region in self.spec.regions) // self.page_bytes

    def resident_bytes(self) -> int:
        """Memory that the guest's files occupy now (blocks, not RSS: deactivation alone empties RSS). Of anonymous memory: what
        is with the guest or in its staging area, by the page table."""
        if self.spec.anonymous:
            counters = self.native.counters()
            away = sum(counters["tier_pages"]) - counters["tier_pages"][STAGING_TIER] + counters["untouched_pages"]
            return int(counters["pages"] - away + counters["spent_pages"]) * self.page_bytes
        return sum(os.fstat(fd).st_blocks * 512 for fd in self.memfds if fd >= 0)

    def adapt(self, swap_can_receive: bool) -> None:
        """Before every pass: swap may have come, or gone, since the last one; the VMM may have installed a seccomp filter.
        Worker."""
        zap = self._zap(swap_can_receive)
        gone = self._inject_tid and not os.path.exists(f"/proc/{self.spec.pid}/task/{self._inject_tid}")
        if zap is not self.zap or gone:
            self._inject_tid = self._pick_thread(zap)
            self.zap = zap
        self._refuse_filter()
        self.native.set_zap(zap, self._inject_tid)  # enters from now on while the thread has so many filters as it has now
        self._refuse_filter()  # that came just then

    def _refuse_filter(self) -> None:
        if not self._inject_tid or not filtered(self.spec.pid, self.spec.cmdline, self._inject_tid):
            return
        raise Refused(
            "seccomp",
            "swap is on by now, and the VMM runs under a seccomp filter that may kill it for a call of ours"
            if self.spec.handshake  # preflight asks only where calls inside the VMM are to be expected
            else "the VMM has installed a seccomp filter that may kill it for a call of ours",
            f"pid {self.spec.pid}: Seccomp 2, not QEMU's -sandbox alone",
            "swapoff -a, or memory.swap.max=0 in the VM's control group, then detach and let it connect again"
            if self.spec.handshake
            else "detach the guest; run the VMM without the filter, or with shared memory and no swap",
        )

    def _pick_thread(self, zap: Zap) -> int:
        """The thread of the VMM that makes our calls; 0: none has to."""
        return pick_thread(self.spec.pid) if zap is Zap.INJECT or self.spec.anonymous else 0

    def _zap(self, swap_can_receive: bool) -> Zap:
        if self.spec.anonymous:
            return Zap.USERFAULTFD
        return self.engine.zap(inside=swap_can_receive or self.page_bytes != PAGE_BYTES)

    def vmm_holds_uffd(self) -> bool:
        """Whether the VMM's own copy of the userfaultfd is still open. Without it our death is the end of the context, and
        then evicted pages read as zeros."""
        pid, fd = self.spec.pid, self.uffd_in_vmm
        return _is_userfaultfd(pid, fd) and _same_file(pid, fd, self.uffd)

    def give_uffd_back(self) -> None:
        """Put a copy into the VMM again. OSError: it cannot be entered now. Worker."""
        if self.spec.handshake:
            raise PermissionError(
                errno.EPERM,
                f"process {self.spec.pid} came by handshake and is not entered; it must keep the descriptor",
            )
        if filtered(self.spec.pid, self.spec.cmdline):
            raise PermissionError(
                errno.EPERM, f"process {self.spec.pid} has a seccomp filter that may kill it for our call"
            )
        self.set_uffd_in_vmm(put_into_vmm(self.spec.pid, self.pidfd, self.uffd))

    def set_uffd_in_vmm(self, number: int) -> None:
        """The VMM has its copy under this number now."""
        self.uffd_in_vmm = number
        self.native.set_uffd_in_vmm(number)

    def leave(self) -> bool:
        """Give the guest back to its VMM: unregister, remove what we kept of it, close the VMM's userfaultfd. KernelError
        EBUSY while a page is not with the guest: restore first. Blocks while faults are in service, at most LEAVE_S_MAX.

        A death before the state file is gone: a successor finds every page with the guest and serves it on. After that, or
        when the VMM cannot be entered (False), a userfaultfd stays open in it that nothing is registered with.
        """
        self._disarm()
        serving = table_read(self.table_fd)[2]
        self.forget()
        self.native.stop()
        if self.spec.handshake:  # it made its userfaultfd, it closes it
            return True
        try:
            if filtered(self.spec.pid, self.spec.cmdline):
                return False
            self._unmap_ours(serving)
            close_in_vmm(self.spec.pid, self.uffd_in_vmm)
        except OSError:
            return False
        return True

    def _unmap_ours(self, serving: Serving) -> None:
        for region in self.spec.regions:
            if region.staging:
                unmap_staging(self.spec.pid, region.staging, region.bytes)
        if serving.calls:
            calls_destroy(pick_thread(self.spec.pid), serving.calls)

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

    def missing(self) -> Path | None:
        """What a successor would not find of this guest, because somebody has removed or moved it: we have it open. Blocks as
        the stores do."""
        if not is_at(self.table_fd, self.state_path):
            return self.state_path
        spaces = [tier.space for tier in self.tiers.values() if isinstance(tier.space, GuestFile | AskedSpace)]
        return next((path for space in spaces if (path := space.missing()) is not None), None)

    def forget(self) -> None:
        """Remove the state file and the stored pages. Only for a guest that is gone or needs none of them. What cannot be
        removed (a file system that is read-only now) is in `undeleted`: nobody looks for it any more, the next start sweeps."""
        self.state_path.unlink(missing_ok=True)
        for tier in self.tiers.values():
            try:
                tier.space.delete()
            except OSError as error:
                self.undeleted[tier.name] = error


class AlreadyRunning(Exception):
    """Another tierd works on this runtime directory."""


def lock_runtime_dir(path: Path) -> int:
    """One daemon a runtime directory. Returns the locked descriptor; AlreadyRunning names the holder."""
    lock = path / "tierd.lock"
    try:
        if not os.path.lexists(lock):
            os.close(os.open(lock, os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        fd = open_ours(lock, os.O_RDWR)
    except OSError as error:
        raise StateError(f"{lock} cannot be used: {error.strerror}; move it away, or set runtime_dir") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise AlreadyRunning(
            f"another tierd (process {holder}) works on {path}; stop it, or give this one its own runtime_dir"
        ) from None
    with contextlib.suppress(OSError):  # a full file system must not keep us from the guests: it is only for people
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def prepare_runtime_dir(path: Path) -> Path:
    """Make `path` and its guests/ usable: ours, 0700, on tmpfs. StateError says what to do."""
    guests = path / "guests"
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
        above = path.stat()
        if above.st_uid != os.geteuid() or above.st_mode & 0o022:
            raise StateError(
                f"{path} must be a directory of user {os.geteuid()} that nobody else may write to: who can, could put other "
                "page tables there; chown and chmod it, or set runtime_dir"
            )
        guests.mkdir(mode=0o700, exist_ok=True)
        info = guests.lstat()
    except OSError as error:
        raise StateError(
            f"{error.filename or guests} cannot be a directory of tierd's: {error.strerror}; make it one, or set runtime_dir"
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise StateError(f"{guests} must be a directory of user {os.geteuid()} with mode 0700; fix or remove it")
    if file_system_of(guests) not in ("tmpfs", "ramfs"):
        raise StateError(
            f"{path} is not on tmpfs: the page tables must survive tierd but not a reboot, and must never wait for a disk; "
            "set runtime_dir to a directory on tmpfs, /dev/shm/tierd for example"
        )
    return guests


def _table_regions(regions: tuple[Region, ...]) -> list[TableRegion]:
    return [TableRegion(r.address, r.bytes, r.offset, r.device, r.inode, r.staging) for r in regions]


def _tier_of(space: Space, capacity_bytes: int) -> Tier:
    return Tier(
        space.fd,
        capacity_bytes,
        space.kind,
        space.direct,
        space.drop_cache,
        space.late,
        space.codec,
        space.secret,
    )


def _add_tier(served: Served, name: str, space: Space) -> None:
    served._undo.callback(space.close)
    served.tiers[name] = ServedTier(len(served.tiers) + 1, name, space)


def _open_guest(
    served: Served, engine: Engine, tuning: Tuning, swap_can_receive: bool, capacities: Sequence[int]
) -> None:
    """The native guest over what `served` holds so far. `capacities`: bytes, of each tier."""
    spec, spaces = served.spec, [tier.space for tier in served.tiers.values()]
    if any(space.kind is TierKind.ASKED for space in spaces):
        served.asked_fd = served._own(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    idle_bitmap = open_idle_bitmap() if spec.anonymous and engine.number is EngineNumber.STOCK else -1
    if idle_bitmap >= 0:
        served._own(idle_bitmap)
    served.zap = served._zap(swap_can_receive)
    served._inject_tid = served._pick_thread(served.zap)
    served.native = NativeGuest(
        table_fd=served.table_fd,
        uffd=served.uffd,
        pidfd=served.pidfd,
        pagemap_fd=served.pagemap,
        regions=_table_regions(spec.regions),
        memfds=served.memfds,
        tiers=[_tier_of(space, capacity) for space, capacity in zip(spaces, capacities, strict=True)],
        engine=engine.number,
        page_bytes=served.page_bytes,
        zap=served.zap,
        inject_tid=served._inject_tid,
        mem_fd=served.mem,
        asked_fd=served.asked_fd,
        idle_fd=idle_bitmap,
        use_pagemap=engine.use_pagemap,
        readahead_pages=tuning.readahead_pages_max,
        spin_us_max=tuning.fault_spin_us_max,
        follow=tuning.follow,
    )
    served._undo.push(served.native)
    if spec.handshake:
        served.native.set_handshake()
    served.native.set_reads(tuning.read_deadline_s, tuning.hold_lost)


def _must_be_lockable(served: Served, *, sealed: bool) -> None:
    """A guest that was served must be adopted as long as it can be; a new one must also have room for what comes later. `sealed`:
    it has a file that is encrypted."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    held = Path("/proc/self/status").read_text().partition("CapEff:")[2].split(None, 1)[0]
    if limit == resource.RLIM_INFINITY or int(held, 16) >> CAP_IPC_LOCK & 1:
        return
    needed = GUEST_LOCKED_BYTES + TABLE_BYTES_A_PAGE * served.pages
    if served.page_bytes != PAGE_BYTES:
        buffers = HUGE_BUFFER_PAGES if served.page_bytes < GIGANTIC_BYTES else GIGANTIC_BUFFER_PAGES
        needed += buffers * served.page_bytes
    if sealed:
        needed += max(
            SEALED_LOCKED_BYTES, HUGE_SEALED_PAGES * served.page_bytes if served.page_bytes != PAGE_BYTES else 0
        )
    locked = status_field(os.getpid(), "VmLck") << 10
    if locked + needed > limit:
        raise StateError(
            f"the page table and the buffers of {served.spec.name} ({needed >> 10} KiB) cannot be locked in memory: "
            f"RLIMIT_MEMLOCK is {limit >> 10} KiB, {locked >> 10} KiB are used; raise LimitMEMLOCK= of tierd's unit, for a user "
            "unit also that of user@.service"
        )


def _still_has(maps: Sequence[Mapping], region: Region) -> bool:
    return any((m.device, m.inode) == (region.device, region.inode) for m in maps)


def _open_memory(pid: int) -> int:
    """To write as well, should the right to trace be taken from us; CAP_DAC_READ_SEARCH reads another user's VMM only."""
    try:
        return os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)


def _take_descriptors(served: Served, handed: Handed | None, maps: Sequence[Mapping] = ()) -> None:
    """But for the userfaultfd. `maps`: in an adoption, by which memory that the VMM has given up since is told from what cannot
    be had."""
    spec = served.spec
    served.pidfd = served._own(os.dup(handed.pidfd) if handed else os.pidfd_open(spec.pid))
    if start_ticks(spec.pid) != spec.start_ticks:
        raise ProcessLookupError(errno.ESRCH, f"process {spec.pid} is not the VMM of {spec.name} any more")
    path = f"/proc/{spec.pid}/pagemap"
    served.pagemap = served._own(os.dup(handed.pagemap) if handed else os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    if spec.anonymous:
        served.mem = served._own(_open_memory(spec.pid))
        served.memfds = [-1] * len(spec.regions)
        return
    for region in spec.regions:
        try:
            fd = _handed_memfd(handed, region, spec) if handed else open_memfd(spec.pid, region)
            served.memfds.append(served._own(fd))
        except OSError as error:
            if error.errno != errno.ESTALE or not maps or _still_has(maps, region):
                raise
            served.memfds.append(-1)  # the VMM has neither the mapping nor the file: nobody can read it again


def _page_bytes(served: Served) -> int:
    """Of the guest's memory files, which preflight has seen to be of one kind."""
    if served.spec.anonymous:
        return PAGE_BYTES
    sizes = {page_bytes_of(fd) for fd in served.memfds}
    if len(sizes) > 1:
        raise OSError(
            errno.EINVAL, f"the memory of {served.spec.name} has pages of several sizes: {sorted(sizes)} bytes"
        )
    return sizes.pop()


def _handed_memfd(handed: Handed, region: Region, spec: GuestSpec) -> int:
    fd = handed.memfds.get((region.device, region.inode))
    if fd is None:
        raise OSError(
            errno.ESTALE,
            f"process {spec.pid} brought no descriptor of the memory at {region.address:#x} (inode {region.inode})",
        )
    return os.dup(fd)


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
    stores: Sequence[Store],
    guests_dir: Path,
    tuning: Tuning,
    swap_can_receive: bool,
    capacity_bytes: int | None = None,
    handed: Handed | None = None,
) -> Served:
    """Begin to serve a guest that passed preflight. On any error nothing of it stays, in the VMM neither (of a userfaultfd
    that it brought, UFFDIO_API does). `handed`: what its VMM brought; duplicated.

    `stores`: its tiers, in the order in which pages sink; those that do not take pages of its size are left out.
    `capacity_bytes`: of each; None: what it has free. StoreError also where none is left, or one cannot have another below it."""
    served = Served(spec, guests_dir / (key_of(spec) + SUFFIX), engine)
    if os.path.lexists(served.state_path):  # pages of it may be stored: before anything of that is replaced
        raise StateError(
            f"{served.state_path} is in the way; nothing was touched, move it away if it is not a page table"
        )
    with _undone_on_error(served), contextlib.ExitStack() as on_error:
        unfinished = _take_state(served)  # from here on nobody else attaches it
        on_error.callback(unfinished.unlink, missing_ok=True)
        _take_descriptors(served, handed)
        served.page_bytes = _page_bytes(served)
        _must_be_lockable(served, sealed=any(isinstance(store, FileStore) and store.keys_dir for store in stores))
        if handed is not None:
            assert handed.uffd_in_vmm is not None
            served.uffd, served.uffd_in_vmm = served._own(os.dup(handed.uffd)), handed.uffd_in_vmm
            _must_be_allowed(served, served._zap(swap_can_receive))
            agree_once(served.uffd, engine.features)
        else:
            taken = _taken(spec, engine)
            served.uffd, served.uffd_in_vmm = served._own(taken.uffd), taken.uffd_in_vmm
            os.close(taken.pidfd)
            on_error.callback(_close_in_vmm_quietly, spec.pid, taken.uffd_in_vmm)
            if spec.anonymous:
                spec = served.spec = _with_staging(spec, on_error)
        fitting = _fitting(stores, served.page_bytes)
        for store in fitting:
            space = store.create(key_of(spec), served.pages, served.page_bytes)
            on_error.callback(space.delete)
            _add_tier(served, store.name, space)
        _last_only_may_be_late(served)
        _fill_state(served, tuning)
        capacities = [store.free_bytes() if capacity_bytes is None else capacity_bytes for store in fitting]
        _open_guest(served, engine, tuning, swap_can_receive, capacities)
        _publish_state(served, unfinished)  # complete: whoever adopts from now on finds also how the guest came
        on_error.callback(served.state_path.unlink, missing_ok=True)
        served.native.start()  # a fault thread before the first registration
        if handed is not None:
            on_error.callback(_disarm_quietly, served)  # the VMM's copy of the userfaultfd stays open
        served.native.arm()
        if handed is not None and registered_regions(spec) != len(spec.regions):
            raise Refused(
                "handshake",
                "the userfaultfd is another process's",
                f"pid {spec.pid}: its memory is not registered by a registration",
                "send a userfaultfd that was made in the process that maps the memory (not in its parent or a child)",
            )
        unfinished.unlink()  # the last of all: on the way out of an error, too, nobody else begins before
        on_error.pop_all()
    return served


def _fitting(stores: Sequence[Store], page_bytes: int) -> Sequence[Store]:
    fitting = [store for store in stores if store.takes(page_bytes)]
    if not fitting:
        names = ", ".join(store.name for store in stores)
        raise StoreError(f"none of its tiers ({names}) takes pages of {page_bytes >> 10} KiB; add `file` to its tiers")
    return fitting


def _last_only_may_be_late(served: Served) -> None:
    """What sinks from a tier is discarded there, and nothing would say so of a page that has sunk (guest.c)."""
    for tier in list(served.tiers.values())[:-1]:
        if tier.space.late:
            raise StoreError(
                f"tier {tier.name} is on a file system ({tier.space.path.parent}) where what a killed tierd had in flight may "
                "still land: it must be the last of the tiers"
            )


def _with_staging(spec: GuestSpec, on_error: contextlib.ExitStack) -> GuestSpec:
    """Killed here, we leave address space behind in the VMM, and nothing else."""
    regions = []
    for region in spec.regions:
        staging = map_staging(spec.pid, region.address, region.bytes)
        on_error.callback(_unmap_quietly, spec.pid, staging, region.bytes)
        regions.append(replace(region, staging=staging))
    return replace(spec, regions=tuple(regions))


def _unmap_quietly(pid: int, address: int, size: int) -> None:
    """On the way out of a failed attach, like _close_in_vmm_quietly."""
    with contextlib.suppress(OSError):
        unmap_staging(pid, address, size)


def _taken(spec: GuestSpec, engine: Engine) -> Taken:
    try:
        return take_userfaultfd(spec.pid, engine.features | (engine.anonymous_features if spec.anonymous else 0))
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"{error.strerror}: tierd may not enter process {spec.pid}; run tierd as root, or use a VMM that connects to "
            "handshake.socket",
        ) from error


def _must_be_allowed(served: Served, zap: Zap) -> None:
    """An engine that does not track by the userfaultfd needs a privilege that no descriptor gives."""
    pid = served.spec.pid
    if zap is Zap.INJECT and not may_enter(served.pidfd, served.uffd_in_vmm):
        raise Refused(
            "privileges",
            f"engine {served.engine.name} finds untouched pages by calls inside the VMM where swap is on, which is not allowed",
            f"pid {pid}, tierd runs as user {os.geteuid()}",
            "run tierd as root, or on Linux 7.3 (engine rwp), which needs no privilege",
        )
    if zap is Zap.PAGEOUT and not may_page_out(served.pidfd, served.spec.regions[0].address):
        raise Refused(
            "privileges",
            f"engine {served.engine.name} finds untouched pages by process_madvise, which is not allowed",
            f"pid {pid}, tierd runs as user {os.geteuid()}",
            "give tierd CAP_SYS_NICE, or run it on Linux 7.3 (engine rwp), which needs no privilege",
        )


def _disarm_quietly(served: Served) -> None:
    """On the way out of a failed attach: the failure itself is what is reported. No page has left."""
    with contextlib.suppress(OSError):
        served.native.disarm()


def _close_in_vmm_quietly(pid: int, fd: int) -> None:
    """On the way out of a failed attach: the failure itself is what is reported; a VMM that is gone needs no closing."""
    with contextlib.suppress(OSError):
        close_in_vmm(pid, fd)


def _take_state(served: Served) -> Path:
    """A new state file that has no name yet that adoption looks for, and its lock: one attach of a guest at a time, whoever
    makes it. Its preliminary name."""
    unfinished = served.state_path.with_suffix(".new")
    try:
        try:
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            _remove_stale(unfinished)
            fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"{unfinished} cannot be made: {error.strerror}; see to the file system of runtime_dir, remove what is in the way"
        ) from error
    served.table_fd = served._own(fd)
    if not table_lock(fd) or not _names(unfinished, fd):  # somebody took it for a stale one in between: it is his
        raise _being_attached(unfinished)
    if os.path.lexists(served.state_path):  # only now: whoever had the lock before us has put it there
        unfinished.unlink()
        raise StateError(f"{served.state_path} was made by another attach just now; nothing was touched")
    return unfinished


def _remove_stale(unfinished: Path) -> None:
    """Of an attach that died before its first registration. StateError: it has not died."""
    fd = open_ours(unfinished, os.O_RDWR)
    try:
        if not table_lock(fd) or not _names(unfinished, fd):
            raise _being_attached(unfinished)
        unfinished.unlink()
    finally:
        os.close(fd)


def _being_attached(unfinished: Path) -> StateError:
    return StateError(f"{unfinished} is locked: its guest is being attached just now; nothing was touched")


def _names(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _fill_state(served: Served, tuning: Tuning) -> None:
    spec = served.spec
    identity = Identity(
        pid=spec.pid,
        start_ticks=spec.start_ticks,
        boot_id=spec.boot_id,
        name=spec.name,
        uffd_in_vmm=served.uffd_in_vmm,
        epoch_ns=tuning.epoch_ns,
        places=tuple(
            Place(tier.space.kind, tier.name, str(tier.space.path), tier.space.direct, bool(tier.space.secret))
            for tier in served.tiers.values()
        ),
        page_bytes=served.page_bytes,
    )
    try:
        table_create(served.table_fd, identity, _table_regions(spec.regions))
    except KernelError as error:
        raise StateError(
            f"the page table of {spec.name} does not fit: {error}; give the file system of {served.state_path.parent} more "
            "space (0.3 % of guest memory)"
        ) from error


def _publish_state(served: Served, unfinished: Path) -> None:
    """Complete, or not there at all; and never in the place of another."""
    try:
        os.link(unfinished, served.state_path)
    except OSError as error:  # not ours: pids and start times do not come back
        raise StateError(
            f"{served.state_path} cannot be made: {error.strerror}; look at what it is, then move it away"
        ) from error


def open_state(path: Path, flags: int) -> int:
    """StateError: what has this name is no state file of ours. It was not touched, and not even opened."""
    try:
        return open_ours(path, flags)
    except OSError as error:
        raise StateError(f"{path} cannot be used: {error.strerror}; nothing was touched, move it away") from error


def check_name(path: Path, identity: Identity) -> None:
    """A copy of a state file under another name would be a second page table of the same memory, with a lock of its own."""
    if path.name != f"{identity.pid}-{identity.start_ticks}{SUFFIX}":
        raise StateError(
            f"{path} is the page table of {identity.pid}-{identity.start_ticks}, a copy perhaps; nothing was touched, move "
            "it away"
        )


class Stale(Exception):
    """A state file that nobody needs: its VMM (or the boot) is gone, or nothing of the guest is left in our hands."""

    def __init__(self, text: str, state_path: Path, places: Sequence[Place]) -> None:
        super().__init__(text)
        self._state_path, self._store_paths = state_path, [Path(place.path) for place in places]

    def sweep(self) -> None:
        """Remove the state file and the stored pages that belong to it."""
        self._state_path.unlink(missing_ok=True)
        for path in self._store_paths:
            if self._state_path.stem in path.name:
                path.unlink(missing_ok=True)


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


@dataclass(frozen=True)
class Left:
    """What a state file says about a guest that a predecessor left."""

    spec: GuestSpec
    identity: Identity
    serving: Serving


def read_state(path: Path, boot_id: str) -> Left:
    """Changes nothing. Stale: the VMM is gone. StateError: broken, or of a newer tierd. Blocks for a moment."""
    fd = open_state(path, os.O_RDONLY)
    try:
        return _read_state(fd, path, boot_id)
    finally:
        os.close(fd)


def _read_state(fd: int, path: Path, boot_id: str) -> Left:
    try:
        identity, regions, serving = table_read(fd)
        check_name(path, identity)
    except KernelError as error:
        other = error.errno == errno.EPROTONOSUPPORT
        broken = f"is broken ({error}), so its guest waits: end that VM, then remove the file"
        why = "was written by another version of tierd: start that one" if other else broken
        raise StateError(f"{path} {why}; nothing was touched") from error
    if identity.boot_id != boot_id or start_ticks(identity.pid) != identity.start_ticks:
        text = f"{path}: its VMM, process {identity.pid} ({identity.name}), is gone"
        raise Stale(text, path, identity.places)
    spec = GuestSpec(
        name=identity.name,
        pid=identity.pid,
        start_ticks=identity.start_ticks,
        boot_id=boot_id,
        cmdline=cmdline_of(identity.pid),
        regions=tuple(Region(r.address, r.bytes, r.offset, r.device, r.inode, r.staging) for r in regions),
        handshake=serving.handshake,
    )
    return Left(spec, identity, serving)


def adopt(
    state_path: Path,
    *,
    engine: Engine,
    swap_can_receive: bool,
    boot_id: str,
    capacity_bytes: int = 0,
    kept_uffd: int | None = None,
    handed: Handed | None = None,
    lock_s_max: float = 60.0,
    pause: Callable[[float], None] = time.sleep,
) -> Served:
    """Go on with what a predecessor left, as it did: what the configuration says now comes later. Stale: nobody needs the
    file. StateError, StoreError, OSError: not touched, an operator must look; AwaitsHandshake: its VMM must.

    `handed`: what its VMM brought again; duplicated.
    `kept_uffd`: a userfaultfd of this guest that the service manager kept, used (duplicated) where the VMM has none.
    `capacity_bytes`: what each tier may hold before set_capacity says otherwise. `lock_s_max`: how long the predecessor's last
    thread is waited for.
    """
    fd = open_state(state_path, os.O_RDWR)
    try:
        left = _read_state(fd, state_path, boot_id)
        if left.spec.handshake and handed is None:
            raise AwaitsHandshake(left.spec.name, left.spec.pid)
        wait_for_lock(fd, state_path, pause, lock_s_max)
    except BaseException:
        os.close(fd)
        raise
    spec, serving = replace(left.spec, handshake=left.spec.handshake or handed is not None), left.serving
    tuning = Tuning(0.0, serving.readahead_pages, read_deadline_s=serving.read_deadline_s, hold_lost=serving.hold_lost)
    if serving.engine is not engine.number:  # the configuration may name another one by now
        engine = engine_of(serving.engine, engine.found)
    served = Served(spec, state_path, engine)
    served.table_fd = served._own(fd)
    with _undone_on_error(served):
        _take_descriptors(served, handed, maps_of(spec.pid))
        if _memory_gone(served):
            text = f"{state_path}: process {spec.pid} executed another program, the memory of {spec.name} is gone"
            raise Stale(text, state_path, left.identity.places)
        served.uffd_in_vmm = left.identity.uffd_in_vmm if serving.uffd_in_vmm is None else serving.uffd_in_vmm
        if handed is not None and handed.uffd_in_vmm is not None:
            served.uffd_in_vmm = handed.uffd_in_vmm
        served.uffd = served._own(_userfaultfd_again(served, left.identity, kept_uffd, handed))
        served.page_bytes = left.identity.page_bytes
        # before the stores are looked for, which may take long: killed in a sync window, the predecessor left the guest waiting
        if engine.holds_reads and not spec.anonymous:
            leave_window(
                engine=engine.number,
                table_fd=fd,
                uffd=served.uffd,
                pidfd=served.pidfd,
                pagemap_fd=served.pagemap,
                regions=_table_regions(spec.regions),
                memfds=served.memfds,
                page_bytes=served.page_bytes,
            )
        for place in left.identity.places:
            _add_tier(served, place.name, _reopened(served, place))
        _open_guest(served, engine, tuning, swap_can_receive, [capacity_bytes] * len(served.tiers))
        served.adoption = _adopted(served, handed)
        if handed is not None:
            served.native.set_uffd_in_vmm(served.uffd_in_vmm)
        served.native.start()
    return served


def _reopened(served: Served, place: Place) -> Space:
    if place.kind is TierKind.MEMORY:
        return memory.reopen(Path(place.path))
    if place.kind is TierKind.ASKED:
        return AskedSpace(place.name)
    keys_dir = served.state_path.parent.parent / KEYS
    key = FileKey.reopen(keys_dir, place.name, key_of(served.spec)) if place.sealed else None
    return reopen(Path(place.path), served.pages, served.page_bytes, direct=place.direct, key=key)


def _memory_gone(served: Served) -> bool:
    """Neither the VMM nor anybody else has it any more."""
    if served.spec.anonymous:
        return not still_mapped(served.spec)
    return all(fd < 0 for fd in served.memfds) and not holders_of(served.spec.regions)


def _is_userfaultfd(pid: int, fd: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == UFFD_LINK
    except FileNotFoundError:
        return False


def _same_file(pid: int, fd: int, ours: int) -> bool:
    """Not another userfaultfd, that the VMM has made since and that has the number now: each has its inode (since Linux 5.12)."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), os.fstat(ours))
    except FileNotFoundError:
        return False


def holders_of(regions: Sequence[Region]) -> bool:
    """Whether any process but us has one of these files."""
    files = {(region.device, region.inode) for region in regions if not region.anonymous}
    return bool(files and HolderScan().holders(files, set()))


def _adopted(served: Served, handed: Handed | None) -> Adoption:
    try:
        return served.native.adopt(still_mapped(served.spec))
    except KernelError as error:
        if handed is None or error.errno != errno.EBUSY:
            raise
        raise _another_userfaultfd(served.spec) from error


def _another_userfaultfd(spec: GuestSpec) -> StateError:
    return StateError(
        f"process {spec.pid} ({spec.name}) brought another userfaultfd than the one that its memory is registered with; it must "
        "send that one"
    )


def _userfaultfd_again(served: Served, identity: Identity, kept_uffd: int | None, handed: Handed | None) -> int:
    in_vmm = handed is None and _is_userfaultfd(identity.pid, served.uffd_in_vmm)
    if in_vmm and (kept_uffd is None or _same_file(identity.pid, served.uffd_in_vmm, kept_uffd)):
        return pidfd_getfd(served.pidfd, served.uffd_in_vmm)
    if handed is None and kept_uffd is not None:
        return fcntl.fcntl(kept_uffd, fcntl.F_DUPFD_CLOEXEC, 0)
    if handed is not None and registered_regions(served.spec):  # else nothing is, with whatever it brought
        if not features_of(handed.uffd):
            raise _another_userfaultfd(served.spec)
        must_be_agreed(handed.uffd, served.engine.features, FEATURE_ASYNC if served.engine.holds_reads else 0)
        return os.dup(handed.uffd)
    away = table_away(served.table_fd)
    if not os.listdir(f"/proc/{identity.pid}/fd"):  # its first thread has ended, and with it what can be seen of it
        raise StateError(f"nothing can be seen of process {identity.pid} ({identity.name}): did its main thread end?")
    if not away:
        text = f"{served.state_path}: {identity.name} was left, every page is with it"
        raise Stale(text, served.state_path, identity.places)
    raise StateError(
        f"the userfaultfd that tierd made in process {identity.pid} ({identity.name}) as descriptor {served.uffd_in_vmm} is "
        f"closed: {away} pages that are stored read as zeros there now; restart that VM"
    )


def memory_available_bytes(page_bytes: int) -> int:
    """What the host can still give to pages of that size without trouble."""
    if page_bytes != os.sysconf("SC_PAGESIZE"):
        return _huge_available_bytes(page_bytes)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * page_bytes


def _huge_available_bytes(page_bytes: int) -> int:
    """Of the pool of hugetlbfs: free and nobody's by reservation, and what the kernel may add."""

    def pages(name: str) -> int:
        return int(Path(f"/sys/kernel/mm/hugepages/hugepages-{page_bytes >> 10}kB/{name}").read_text())

    more = max(pages("nr_overcommit_hugepages") - pages("surplus_hugepages"), 0)
    return (max(pages("free_hugepages") - pages("resv_hugepages"), 0) + more) * page_bytes
