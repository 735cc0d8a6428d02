# SPDX-License-Identifier: Apache-2.0
"""The C data plane's typed face: the only importer of the extension.

No cffi object leaves this package. Every call that fails raises `KernelError` with the errno and a noun. Calls marked
"worker" belong to a guest's one worker thread at a time and block; the others may be made from any thread and do not.
"""

from __future__ import annotations

import enum
import errno
import os
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from tierd.native._native import ffi, lib
from tierd.native.errors import KernelError as KernelError
from tierd.native.errors import check
from tierd.native.records import Records

TIERS = int(lib.TIERD_TIERS)
REGIONS_MAX = int(lib.TIERD_REGIONS_MAX)
READAHEAD_PAGES_MAX = 512
# locked in memory for a guest: two batches of 2 MiB, buffers, stacks of fault threads; its page table and bitmaps; where its
# pages are huge, instead two batches of 4, one to compare, one of zeros, and one for each of 3 threads
GUEST_LOCKED_BYTES, TABLE_BYTES_A_PAGE, HUGE_BUFFER_PAGES = 5 << 20, 13, 13
GIGANTIC_BYTES, GIGANTIC_BUFFER_PAGES = 1 << 30, 6  # of such pages one batch of one
SEALED_LOCKED_BYTES, HUGE_SEALED_PAGES = 4 << 20, 8  # more, where a file is encrypted: two batches as they are there
NO_PAGE = (1 << 64) - 1
CAP_IPC_LOCK = 14  # who has it may lock any amount
READ_DEADLINE_S_MAX = 366 * 86400.0
# of tierd_trial_step
TRIAL_STEPS = (
    "",
    "api",
    "registration",
    "deactivation",
    "the scan for untouched pages",
    "a touch in async mode",
    "the scan after it",
    "the change to sync mode",
    "a touch in sync mode",
    "the answer to it",
    "the change to async mode",
)
TRIALS = (
    *("userfaultfd", "write_protect", "missing", "pageout", "pagemap_scan", "poison", "self_zap", "anonymous"),
    *("rwp", "rfc", "rwp_anonymous", "rfc_anonymous"),
)
STATES = ("resident", "resolving", "leaving", "dropping", "stored", "moving", "arriving", "lost", "staging")
STAGING_TIER, GUEST_TIER = int(lib.TIERD_TIER_STAGING), int(lib.TIERD_TIER_GUEST)
LADDER_MAX = int(lib.TIERD_LADDER_MAX)


STORE_WRITE = "store write"  # the noun of a KernelError when a store did not take a batch


class EngineNumber(enum.IntEnum):
    """What is asked of the kernel to track and hold pages: tierd.engine, engine.c."""

    STOCK = lib.TIERD_ENGINE_STOCK
    RWP = lib.TIERD_ENGINE_RWP
    RFC = lib.TIERD_ENGINE_RFC


class Zap(enum.IntEnum):
    """How pages are deactivated: the first two on a stock kernel."""

    PAGEOUT = lib.TIERD_ZAP_PAGEOUT  # process_madvise from outside; only where swap cannot receive the pages
    INJECT = lib.TIERD_ZAP_INJECT  # madvise(MADV_DONTNEED) executed inside the VMM
    USERFAULTFD = 0  # the engine's own call


@dataclass(frozen=True)
class TableRegion:
    """A stretch of guest memory: `bytes` at `address` in the VMM, from `offset` of a file on; or private and anonymous, with its
    staging area at `staging`."""

    address: int
    bytes: int
    offset: int
    device: int
    inode: int
    staging: int = 0


class TierKind(enum.IntEnum):
    """What a tier is for the data plane."""

    FILE = lib.TIERD_KIND_FILE  # sparse, addressed by page number
    MEMORY = lib.TIERD_KIND_MEMORY  # a pool of compressed pages, in a file on tmpfs
    ASKED = lib.TIERD_KIND_ASKED  # a store that Python asks


class Codec(enum.IntEnum):
    """How a pool compresses."""

    LZ4 = lib.TIERD_CODEC_LZ4
    ZSTD = lib.TIERD_CODEC_ZSTD


@dataclass(frozen=True)
class Place:
    """Where a tier's pages are, for a successor."""

    kind: TierKind
    name: str  # of the store
    path: str
    direct: bool = False
    sealed: bool = False  # encrypted: a successor needs the key


@dataclass(frozen=True)
class Identity:
    """What a state file says about its VMM; adoption compares all of it."""

    pid: int
    start_ticks: int
    boot_id: str
    name: str
    uffd_in_vmm: int
    epoch_ns: int
    places: tuple[Place, ...]  # of tier 1, 2, ...
    page_bytes: int = 0  # 0: the system's


@dataclass(frozen=True)
class Serving:
    """What a successor must know before it has read its configuration: kept in the state file while the guest is served."""

    read_deadline_s: float = 30.0
    hold_lost: bool = False
    readahead_pages: int = 16
    uffd_in_vmm: int | None = None  # the VMM has it under this number now; None: as Identity says
    engine: EngineNumber = EngineNumber.STOCK
    handshake: bool = False  # the VMM brought its descriptors, and must bring them again
    calls: int = 0  # where in the VMM batches of calls are run from


@dataclass(frozen=True)
class Tier:
    """An open space of a store."""

    fd: int
    capacity_bytes: int
    kind: TierKind = TierKind.FILE
    direct: bool = False
    drop_cache: bool = False
    late: bool = False  # what a killed process had in flight may still land
    codec: Codec | None = None  # a new pool's: `fd` is an empty file
    secret: bytes = b""  # a file's that is encrypted: the key, of AES-256-XTS


@dataclass(frozen=True)
class Pass:
    """One stretch looked at: see struct tierd_pass."""

    pages: int
    touched_pages: int
    zapped_pages: int
    scan_ns: int
    zap_ns: int
    zap_calls: int
    next_page: int


@dataclass(frozen=True)
class BatchResult:
    """What one step of a batch did: see struct tierd_batch_result."""

    selected_pages: int
    held_pages: int
    written_pages: int
    zero_pages: int
    evicted_pages: int
    cancelled_pages: int
    next_page: int
    left_pages: int
    refused_pages: int
    failed_tier: int
    offered_pages: int
    select_ns: int
    hold_ns: int
    copy_ns: int
    write_ns: int
    drop_ns: int
    release_ns: int
    stopped_ns: int


@dataclass(frozen=True)
class Span:
    """Pages that may be moved into the staging area; see struct tierd_span."""

    next_page: int
    end_page: int
    max_pages: int
    selected_pages: int = 0  # these are set by the call
    staged_pages: int = 0


@dataclass(frozen=True)
class Staged:
    """What one batch of moves into the staging area, or of drops there, did: see struct tierd_staged."""

    selected_pages: int
    staged_pages: int
    unmovable_pages: int
    next_page: int
    stopped_ns: int
    ns: int
    spans: tuple[Span, ...] = ()  # of moves: as they are after them


@dataclass(frozen=True)
class Request:
    """A run of stored pages that Python is asked for; see struct tierd_request."""

    number: int  # for NativeGuest.answer
    tier: int
    page: int
    count: int
    demand: bool  # a thread of the guest waits for the first page


@dataclass(frozen=True)
class Run:
    """Neighbours in a batch."""

    slot: int
    page: int
    count: int


@dataclass(frozen=True)
class Adoption:
    resident_pages: int
    stored_pages: int
    corrected_pages: int
    lost_pages: int
    quarantined_pages: int
    ns: int


@dataclass(frozen=True)
class Health:
    """What a watchdog looks at; see struct tierd_health."""

    fault_threads: int
    hung_threads: int
    parked_pages: int
    asked_pages: int
    oldest_busy_ns: int
    overdue_ns: int
    asked_ns: tuple[int, ...]  # by tier
    worker_io_ns: int
    pages_lost: int
    spent_pages: int


@dataclass(frozen=True)
class Probe:
    """Trials on scratch pages: 0, or the errno (positive) that the trial ended with."""

    features: int
    page_bytes: int
    userfaultfd: int
    write_protect: int
    missing: int
    pageout: int
    pagemap_scan: int
    poison: int
    self_zap: int
    anonymous: int
    rwp: int
    rfc: int
    rwp_anonymous: int
    rfc_anonymous: int
    rwp_step: int
    rfc_step: int


def _by_name(struct: Any, c_type: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, field in ffi.typeof(c_type).fields:
        value = getattr(struct, name)
        result[name] = tuple(value) if field.type.kind == "array" else value
    return result


def _fields(struct: Any, cls: type[Any], **others: Any) -> Any:
    return cls(**others, **{name: getattr(struct, name) for name in cls.__dataclass_fields__ if name not in others})


def probe() -> Probe:
    """Try on a few pages of our own what this kernel can do. Blocks for some milliseconds; leaves nothing behind."""
    out = ffi.new("struct tierd_probe *")
    check(lib.tierd_probe(out), "trial pages")
    trials = {name: -getattr(out, name) for name in TRIALS}
    steps = {name: getattr(out, name) for name in ("rwp_step", "rfc_step")}
    return Probe(features=out.features, page_bytes=out.page_bytes, **trials, **steps)


def _c_regions(regions: Sequence[TableRegion], memfds: Sequence[int]) -> Any:
    out = ffi.new("struct tierd_region[]", len(regions))
    for c, region, memfd in zip(out, regions, memfds, strict=True):
        c.address, c.bytes, c.offset = region.address, region.bytes, region.offset
        c.device, c.inode, c.memfd, c.staging = region.device, region.inode, memfd, region.staging
    return out


def _guest_args(regions: Sequence[TableRegion], memfds: Sequence[int], **fields: int) -> Any:
    """Without tiers, and without what is not given."""
    none = {"mem_fd": -1, "asked_fd": -1, "idle_fd": -1, "tiers": [{"fd": -1}] * lib.TIERD_TIERS}
    args = ffi.new("struct tierd_guest_args *", {**none, **fields, "region_count": len(regions)})
    c_regions = _c_regions(regions, memfds)
    ffi.memmove(args.regions, c_regions, ffi.sizeof(c_regions))
    return args


def table_create(fd: int, identity: Identity, regions: Sequence[TableRegion]) -> None:
    """Lay out a new state file in the empty file `fd` (on tmpfs): its space is reserved now. Blocks. On KernelError
    (ENOSPC) the caller unlinks the file."""
    c = ffi.new("struct tierd_identity *")
    c.pid, c.start_ticks, c.uffd_in_vmm = identity.pid, identity.start_ticks, identity.uffd_in_vmm
    c.epoch_ns, c.page_bytes = identity.epoch_ns, identity.page_bytes
    c.boot_id = identity.boot_id.encode()[: lib.TIERD_BOOT_ID_BYTES - 1]
    c.name = identity.name.encode(errors="replace")[: lib.TIERD_NAME_BYTES - 1]
    for place, c_place in zip(identity.places, c.places, strict=False):
        path = os.fsencode(place.path)
        if len(path) >= lib.TIERD_PATH_BYTES:
            raise KernelError(errno.ENAMETOOLONG, f"store path {place.path}")
        c_place.kind, c_place.name, c_place.path = int(place.kind), place.name.encode(), path
        c_place.flags = (lib.TIERD_SPACE_DIRECT if place.direct else 0) | (
            lib.TIERD_SPACE_SEALED if place.sealed else 0
        )
    check(lib.tierd_table_create(fd, c, _c_regions(regions, [-1] * len(regions)), len(regions)), "state file")


def table_read(fd: int) -> tuple[Identity, tuple[TableRegion, ...], Serving]:
    """Read a state file's header. KernelError EBADMSG: broken or not ours; EPROTONOSUPPORT: of another version."""
    c = ffi.new("struct tierd_identity *")
    regions = ffi.new("struct tierd_region[]", REGIONS_MAX)
    count = ffi.new("uint32_t *")
    serving = ffi.new("struct tierd_serving *")
    check(lib.tierd_table_read(fd, c, regions, count, serving), "state file")
    identity = Identity(
        pid=c.pid,
        start_ticks=c.start_ticks,
        boot_id=ffi.string(c.boot_id).decode(errors="replace"),
        name=ffi.string(c.name).decode(errors="replace"),
        uffd_in_vmm=c.uffd_in_vmm,
        epoch_ns=c.epoch_ns,
        places=_places(c),
        page_bytes=c.page_bytes,
    )
    found = tuple(
        TableRegion(r.address, r.bytes, r.offset, r.device, r.inode, r.staging) for r in regions[0 : count[0]]
    )
    return identity, found, _serving(serving)


def _places(c: Any) -> tuple[Place, ...]:
    return tuple(
        Place(
            TierKind(place.kind),
            ffi.string(place.name).decode(errors="replace"),
            os.fsdecode(ffi.string(place.path)),
            bool(place.flags & lib.TIERD_SPACE_DIRECT),
            bool(place.flags & lib.TIERD_SPACE_SEALED),
        )
        for place in c.places
        if place.kind
    )


def _serving(c: Any) -> Serving:
    """Outside of the checksum, so no value is trusted beyond its bounds. KernelError EBADMSG: an engine that there is not."""
    if not c.known:
        return Serving()
    if c.engine not in list(EngineNumber):
        raise KernelError(errno.EBADMSG, "state file")
    return Serving(
        read_deadline_s=min(c.read_deadline_ns / 1e9, READ_DEADLINE_S_MAX),
        hold_lost=c.on_lost == lib.TIERD_LOST_HOLD,
        readahead_pages=min(max(c.readahead_pages, 1), READAHEAD_PAGES_MAX),
        uffd_in_vmm=c.uffd_moved - 1 if c.uffd_moved > 0 else None,
        engine=EngineNumber(c.engine),
        handshake=c.handshake == 1,
        calls=c.calls,
    )


def calls_destroy(tid: int, calls: int) -> None:
    """Give back to the VMM, by its thread `tid`, where batches of calls were run from (`Serving.calls`). Blocks, a few seconds at
    most."""
    check(lib.tierd_calls_destroy(tid, calls), "removal of the place of our calls")


def page_bytes_of(memfd: int) -> int:
    """Size of the pages of a memory file: of hugetlbfs, or the system's."""
    out = ffi.new("uint64_t *")
    check(lib.tierd_page_bytes_of(memfd, out), "look at a memory file")
    return int(out[0])


def table_away(fd: int) -> int:
    """Pages that are not with the guest, by a table that `table_read` has accepted. With the lock held."""
    out = ffi.new("uint64_t *")
    check(lib.tierd_table_away(fd, out), "state file")
    return int(out[0])


def leave_window(
    *,
    engine: EngineNumber,
    table_fd: int,
    uffd: int,
    pidfd: int,
    pagemap_fd: int,
    regions: Sequence[TableRegion],
    memfds: Sequence[int],
    page_bytes: int,
) -> None:
    """The first part of an adoption, which needs no store: back to async mode, where the predecessor was killed in a window.
    Wakes whoever waits; they fault again. With the lock held. Nothing where the engine has no modes."""
    descriptors = {"table_fd": table_fd, "uffd": uffd, "pidfd": pidfd, "pagemap_fd": pagemap_fd}
    args = _guest_args(regions, memfds, engine=engine, page_bytes=page_bytes, **descriptors)
    check(lib.tierd_leave_window(args), "return to async mode")


def table_lock(fd: int) -> bool:
    """Take the state file's lock; False while a predecessor's last thread still holds it."""
    result = lib.tierd_table_lock(fd)
    if result == -11:  # EWOULDBLOCK
        return False
    check(result, "lock of the state file")
    return True


class NativeBatch:
    """One batch of pages on its way out (evict.c). Worker. `with` cancels what is not finished.

    The steps come in the order in which they stand here; any KernelError leaves a batch that can only be cancelled, and
    then nothing has left the guest but what `drop` already reported.
    """

    def __init__(self, guest: NativeGuest, max_pages: int) -> None:
        out = ffi.new("struct tierd_batch **")
        check(
            lib.tierd_batch_create(guest._g, max_pages, out),
            "memory for an eviction batch (is RLIMIT_MEMLOCK high enough?)",
        )
        self._b = out[0]
        self.guest, self.max_pages = guest, max_pages
        self._result = ffi.new("struct tierd_batch_result *")

    def __enter__(self) -> NativeBatch:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.tierd_batch_destroy(self._b)
        self._b = ffi.NULL

    def _done(self, error: int, noun: str) -> BatchResult:
        check(error, noun, self._result.failed_tier)
        result: BatchResult = _fields(self._result, BatchResult)
        return result

    def select(
        self, from_tier: int, first_page: int, min_idle_s: float, max_pages: int, tiers: Sequence[int]
    ) -> BatchResult:
        """From GUEST_TIER: RESIDENT -> LEAVING for touched pages idle at least `min_idle_s`, from `first_page` on. From another
        tier: what is STORED there and as idle (of STAGING_TIER: there for as long) -> MOVING. Pages that none of `tiers` would
        take, because there is only a pool that has refused them already, are passed over."""
        pool_only = all(tier == self.guest.pool_tier for tier in tiers)
        error = lib.tierd_batch_select(self._b, from_tier, pool_only, first_page, min_idle_s, max_pages, self._result)
        return self._done(error, "select")

    def hold(self) -> BatchResult:
        """Write-protect, scan again, give back what was touched meanwhile."""
        return self._done(lib.tierd_batch_hold(self._b, self._result), "hold")

    def copy(self) -> BatchResult:
        """Read the bytes; find pages that are one word again and again; take checksums."""
        return self._done(lib.tierd_batch_copy(self._b, self._result), "copy out")

    def write(self, tiers: Sequence[int], keep: Collection[int] = ()) -> BatchResult:
        """Give each page to the first of `tiers` that takes it; a page that none takes stays where it is. A pool has it then; for
        what is only offered there are `store` and `stored`. In tiers of `keep` the copies of clean pages are relied on: these are
        not written, when one of them could be read (in tiers that are asked the caller has done that). KernelError ENOSPC: all
        are at capacity; others: its `tier` says which one failed."""
        kept = sum(1 << tier for tier in keep)
        return self._done(lib.tierd_batch_write(self._b, list(tiers), len(tiers), kept, self._result), STORE_WRITE)

    def unchanged(self, tier: int) -> int | None:
        """After copy: one of the pages whose copy in `tier` would be relied on, another one each time; None: there is none."""
        page = int(lib.tierd_batch_unchanged(self._b, tier))
        return None if page == NO_PAGE else page

    def store(self) -> BatchResult:
        """Write what is offered to files, durably; must be called also if all is for tiers that are asked. In any thread: the
        worker may be busy with another batch. KernelError: its `tier` says which one failed."""
        return self._done(lib.tierd_batch_store(self._b, self._result), STORE_WRITE)

    def runs(self, tier: int = 0) -> Iterator[Run]:
        """After select out of a tier that is asked: all of the batch. After write: what is offered to `tier`, which is asked."""
        run, slot = ffi.new("struct tierd_run *"), 0
        while True:
            check(lib.tierd_batch_run(self._b, tier, slot, run), "run of a batch")
            if not run.count:
                return
            yield Run(run.slot, run.page, run.count)
            slot = run.slot + run.count

    def pages_of(self, run: Run, tier: int) -> Records:
        """A run that is offered: its bytes where they are, until `stored` or `cancel`."""
        out = ffi.new("struct tierd_run *")
        check(lib.tierd_batch_run(self._b, tier, run.slot, out), "run of a batch")
        size = self.guest.page_bytes
        bounds = array("I", range(0, (run.count + 1) * size, size))
        return Records(ffi.buffer(out.bytes, run.count * size), bounds)

    def supply(self, slot: int, pages: Sequence[bytes]) -> None:
        """Bytes of what sinks out of a tier that is asked, before copy. What is not supplied stays there."""
        check(lib.tierd_batch_supply(self._b, slot, len(pages), b"".join(pages)), "supply of a batch")

    def stored(self) -> BatchResult:
        """All that write has offered is stored durably."""
        return self._done(lib.tierd_batch_stored(self._b, self._result), STORE_WRITE)

    def drop(self) -> BatchResult:
        """LEAVING -> DROPPING, punch exactly those runs, see the hole, STORED. Of anonymous memory: in its staging area. From
        another tier: STORED in the new one, and space in the old one back."""
        noun = "drop in the staging area" if self.guest.anonymous else "punch"
        return self._done(lib.tierd_batch_drop(self._b, self._result), noun)

    def release(self) -> BatchResult:
        """Lift the hold and wake whoever waited. The batch is empty afterwards."""
        return self._done(lib.tierd_batch_release(self._b, self._result), "release of a hold")

    def window(self, hold_ms_max: float) -> BatchResult:
        """With a sync mode: hold, scan again, drop and release in one go, for about so long. What it had no time for
        (`left_pages`) is left to another window."""
        return self._done(lib.tierd_batch_window(self._b, int(hold_ms_max * 1e6), self._result), "sync window")

    def cancel(self) -> BatchResult:
        """Everything that is still LEAVING goes back; the hold is lifted. Legal after any step."""
        return self._done(lib.tierd_batch_cancel(self._b, self._result), "cancel")


class NativeGuest:
    """One guest's page table, fault threads and registrations (guest.c). Descriptors are duplicated except `table_fd`,
    which stays the caller's and must outlive this object. `with` stops the fault threads; it unregisters nothing."""

    def __init__(
        self,
        *,
        table_fd: int,
        uffd: int,
        pidfd: int,
        pagemap_fd: int,
        regions: Sequence[TableRegion],
        memfds: Sequence[int],
        tiers: Sequence[Tier],
        engine: EngineNumber = EngineNumber.STOCK,
        page_bytes: int = 0,
        zap: Zap = Zap.PAGEOUT,
        inject_tid: int = 0,
        mem_fd: int = -1,
        asked_fd: int = -1,
        idle_fd: int = -1,
        use_pagemap: bool = False,
        chunk_bytes: int = 0,
        readahead_pages: int = 16,
        spin_us_max: int = 50,
        follow: bool = True,
    ) -> None:
        args = _guest_args(
            regions,
            memfds,
            table_fd=table_fd,
            uffd=uffd,
            pidfd=pidfd,
            pagemap_fd=pagemap_fd,
            mem_fd=mem_fd,
            asked_fd=asked_fd,
            idle_fd=idle_fd,
            engine=engine,
            page_bytes=page_bytes,
            zap=zap,
            inject_tid=inject_tid,
            use_pagemap=use_pagemap,
            chunk_bytes=chunk_bytes,
            readahead_pages=readahead_pages,
            spin_us_max=spin_us_max,
            follow=follow,
        )
        for c, tier in zip(args.tiers[1 : 1 + LADDER_MAX], tiers, strict=False):
            c.fd, c.kind, c.capacity_bytes = tier.fd, int(tier.kind), tier.capacity_bytes
            c.codec = int(tier.codec or 0)
            c.flags = (
                (lib.TIERD_SPACE_DIRECT if tier.direct else 0)
                | (lib.TIERD_SPACE_DROP_CACHE if tier.drop_cache else 0)
                | (lib.TIERD_SPACE_LATE if tier.late else 0)
                | (lib.TIERD_SPACE_NEW if tier.codec else 0)
                | (lib.TIERD_SPACE_SEALED if tier.secret else 0)
            )
            ffi.memmove(c.key, tier.secret, len(tier.secret))
        out = ffi.new("struct tierd_guest **")
        error = lib.tierd_guest_create(args, out)
        if -error in (errno.ELIBACC, errno.ELIBBAD):
            raise KernelError(
                -error,
                "compressed memory needs liblz4.so.1 or libzstd.so.1, encryption libcrypto.so.3 (Debian: liblz4-1, libzstd1, "
                "libssl3)",
            )
        check(error, "guest tables (is RLIMIT_MEMLOCK high enough?)")
        self._g = out[0]
        self._answers: dict[int, bytes] = {}  # by request: read by fault threads until its number is given out again
        self.asked_tiers = frozenset(n for n, tier in enumerate(tiers, 1) if tier.kind is TierKind.ASKED)
        self.anonymous = any(region.staging for region in regions)
        self.has_sync_mode = engine is not EngineNumber.STOCK and not self.anonymous
        self.waits_for_readers = (
            engine is EngineNumber.STOCK and self.anonymous
        )  # in the staging area: no other way to see them
        self.pool_tier = next((n for n, tier in enumerate(tiers, 1) if tier.kind is TierKind.MEMORY), 0)
        self.page_bytes = page_bytes or os.sysconf("SC_PAGESIZE")
        self.pages = sum(region.bytes for region in regions) // self.page_bytes

    def __enter__(self) -> NativeGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        lib.tierd_guest_destroy(self._g)
        self._g = ffi.NULL

    def arm(self) -> None:
        """First attach: register every region. Worker."""
        check(lib.tierd_guest_arm(self._g), "registration of guest memory with userfaultfd")

    def adopt(self, mapped: Sequence[tuple[int, int]]) -> Adoption:
        """After a predecessor: reconcile with the kernel, clear holds, wake everybody. `mapped`: (address, bytes) of what the
        VMM maps of its regions still. Worker; before `start`."""
        out = ffi.new("struct tierd_adoption *")
        ranges = ffi.new("struct tierd_range[]", [{"address": a, "bytes": n} for a, n in mapped])
        check(lib.tierd_guest_adopt(self._g, ranges, len(mapped), out), "adoption")
        result: Adoption = _fields(out, Adoption)
        return result

    def gone(self) -> bool:
        """Whether the VMM's memory is gone: it exited, or executed another program. Worker, between batches."""
        out = ffi.new("int32_t *")
        check(lib.tierd_guest_gone(self._g, out), "look at the VMM's memory")
        return bool(out[0])

    def disarm(self) -> None:
        """Unregister. KernelError EBUSY while a page is not resident. Worker."""
        check(lib.tierd_guest_disarm(self._g), "unregistration of guest memory")

    def start(self) -> None:
        """Start one more fault thread."""
        check(lib.tierd_guest_start(self._g), "fault thread")

    def stop(self) -> None:
        """End all fault threads. Blocks until the faults in service are done."""
        lib.tierd_guest_stop(self._g)

    def keep_nonblocking(self) -> None:
        """Of the userfaultfd, which the VMM shares: it may have made the fault threads' reads block. Cheap."""
        check(lib.tierd_guest_keep_nonblocking(self._g), "O_NONBLOCK of the userfaultfd")

    def set_readahead(self, pages: int) -> None:
        lib.tierd_guest_set_readahead(self._g, pages)

    def set_capacity(self, tier: int, size: int) -> None:
        """Bytes that `tier` may hold of this guest."""
        lib.tierd_guest_set_capacity(self._g, tier, size)

    def set_reads(self, read_deadline_s: float, hold: bool) -> None:
        """A read that fails is tried again for so long; then the guest gets a memory error, or with `hold` its thread
        stays blocked until `retry`. At once, also for pages that are lost already."""
        on_lost = lib.TIERD_LOST_HOLD if hold else lib.TIERD_LOST_POISON
        lib.tierd_guest_set_reads(self._g, int(read_deadline_s * 1e9), on_lost)

    def health(self, hung_s: float) -> Health:
        """Cheap: no look at the page table. hung: busy with one fault for longer than `hung_s`."""
        out = ffi.new("struct tierd_health *")
        lib.tierd_guest_health(self._g, int(hung_s * 1e9), out)
        result: Health = _fields(out, Health, asked_ns=tuple(out.asked_ns))
        return result

    def set_uffd_in_vmm(self, uffd_in_vmm: int) -> None:
        """The VMM has the userfaultfd under this number now: a successor looks for it there."""
        lib.tierd_guest_set_uffd_in_vmm(self._g, uffd_in_vmm)

    def set_handshake(self) -> None:
        """The VMM brought its descriptors: a successor waits until it brings them again."""
        lib.tierd_guest_set_handshake(self._g)

    def lost_addresses(self, addresses_max: int) -> list[int]:
        """Addresses in the VMM of pages that are LOST, ascending. Reads the table: 0.1 ms per GiB."""
        next_page, count = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        out = ffi.new("uint64_t[]", addresses_max)
        check(lib.tierd_guest_lost(self._g, next_page, out, addresses_max, count), "lost pages")
        return list(out[0 : count[0]])

    def set_store_faults(self, **faults: int) -> None:
        """For tests: the store misbehaves as struct tierd_store_faults says."""
        lib.tierd_guest_set_store_faults(self._g, ffi.new("struct tierd_store_faults *", faults))

    def asked(self, requests_max: int) -> list[Request]:
        """What is wanted of tiers that Python asks, those first that somebody waits for. Each is to be answered. Any thread."""
        out, count = ffi.new("struct tierd_request[]", requests_max), ffi.new("uint32_t *")
        check(lib.tierd_guest_asked(self._g, out, requests_max, count), "requests")
        requests = [Request(r.number, r.tier, r.page, r.count, bool(r.demand)) for r in out[0 : count[0]]]
        for request in requests:
            self._answers.pop(request.number, None)
        return requests

    def is_right(self, page: int, record: bytes) -> bool:
        """Whether this is what was stored of a page, which is stored or on its way back. Any thread."""
        return len(record) == self.page_bytes and bool(lib.tierd_guest_is_right(self._g, page, record))

    def answer(self, number: int, content: bytes, pages: int, error: int) -> None:
        """The first `pages` pages of a request, or an errno (positive) that says why there are none. Any thread; cheap."""
        self._answers[number] = content
        check(lib.tierd_guest_answer(self._g, number, ffi.from_buffer(content), pages, -error), "answer")

    def forget_answers(self) -> None:
        """When nothing is asked for: nobody reads the bytes that were brought any more. In the thread that answers."""
        self._answers.clear()

    def garbage(self, tier: int, first_page: int, pages_max: int) -> tuple[int, int]:
        """(page, count) of the first run from `first_page` on that a tier that is asked need not keep; count 0: none. Worker."""
        page, count = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.tierd_guest_garbage(self._g, tier, first_page, pages_max, page, count), "garbage")
        return page[0], count[0]

    def garbage_gone(self, tier: int, page: int, count: int) -> None:
        """The store has discarded them. Worker."""
        check(lib.tierd_guest_garbage_gone(self._g, tier, page, count), "garbage")

    def retry(self, first_page: int = 0) -> tuple[int, int, int]:
        """After a repair of the store, read the lost pages from `first_page` on again: (next page, pages recovered, still lost).
        Those of tiers that are asked are asked for, as many as there is room for, and not counted. Worker."""
        next_page = ffi.new("uint64_t *", first_page)
        recovered, still_lost = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        check(lib.tierd_guest_retry(self._g, next_page, recovered, still_lost), "retry of lost pages")
        return next_page[0], recovered[0], still_lost[0]

    def counters(self) -> dict[str, Any]:
        """A snapshot of struct tierd_counters by field name; arrays as tuples. Reads the table: 0.1 ms per GiB."""
        out = ffi.new("struct tierd_counters *")
        lib.tierd_guest_counters(self._g, out)
        return _by_name(out, "struct tierd_counters")

    def tier_counters(self, tier: int) -> dict[str, Any]:
        """A snapshot of struct tierd_tier_counters by field name."""
        out = ffi.new("struct tierd_tier_counters *")
        check(lib.tierd_guest_tier_counters(self._g, tier, out), "counters of a tier")
        return _by_name(out, "struct tierd_tier_counters")

    def idle_pages(self, edges_s: Sequence[float], tier: int = GUEST_TIER) -> tuple[int, ...]:
        """Resident touched pages, or those stored in `tier`, by idle time: item i counts those idle in [edges_s[i], edges_s[i +
        1])."""
        out = ffi.new("uint64_t[]", len(edges_s))
        check(lib.tierd_guest_idle(self._g, tier, ffi.new("double[]", list(edges_s)), len(edges_s), out), "ages")
        return tuple(out)

    def set_zap(self, zap: Zap, inject_tid: int) -> None:
        """How pages are deactivated from the next pass on; `inject_tid` is a thread of the VMM, for Zap.INJECT. Worker."""
        check(lib.tierd_guest_set_zap(self._g, int(zap), inject_tid), "choice of the deactivation")

    def run_pass(self, first_page: int) -> Pass:
        """From `first_page` on, chunk by chunk for some milliseconds: scan, stamp what was touched, deactivate it. Worker."""
        out = ffi.new("struct tierd_pass *")
        check(lib.tierd_guest_pass(self._g, first_page, out), "scan")
        result: Pass = _fields(out, Pass)
        return result

    def stage(self, spans: Sequence[Span], min_idle_s: float) -> Staged:
        """Move pages of `spans` idle at least `min_idle_s` into the staging area: one stop of a thread of the VMM at most. In the
        spans of the result what the stop had no time for is not counted. Worker."""
        out = ffi.new("struct tierd_staged *")
        inside = ffi.new("struct tierd_span[]", [astuple(span) for span in spans])
        check(lib.tierd_guest_stage(self._g, inside, len(spans), min_idle_s, out), "move into the staging area")
        result: Staged = _fields(out, Staged, spans=tuple(_fields(span, Span) for span in inside))
        return result

    def refaults(self, first_page: int, pages: int) -> int:
        """Pages of these that faults took out of the staging area since this was asked last, roughly. Worker."""
        return int(lib.tierd_guest_refaults(self._g, first_page, pages))

    def set_split_large(self, split: bool) -> None:
        """Whether a part of what one large entry maps may be moved into the staging area by itself. From any thread."""
        lib.tierd_guest_set_split_large(self._g, split)

    def unstage(self, first_page: int) -> Staged:
        """Give back room in the staging area whose pages were fetched: one stop at most. Worker."""
        out = ffi.new("struct tierd_staged *")
        check(lib.tierd_guest_unstage(self._g, first_page, out), "drop in the staging area")
        result: Staged = _fields(out, Staged, spans=())
        return result

    def restore(self, first_page: int, max_pages: int) -> tuple[int, int]:
        """Bring up to `max_pages` stored pages back from `first_page` on: (next page, pages restored). Worker."""
        next_page, restored = ffi.new("uint64_t *", first_page), ffi.new("uint64_t *")
        check(lib.tierd_guest_restore(self._g, next_page, max_pages, restored), "restore")
        return next_page[0], restored[0]

    def unclean(self, tier: int) -> None:
        """The copies that a tier has of clean pages are not relied on any more. Takes 0.1 ms a GiB. Worker."""
        check(lib.tierd_guest_unclean(self._g, tier), "look at clean pages")

    def read_failed(self, tier: int, error: int) -> None:
        """A worker's read of a store that is asked failed, with this errno (EBADMSG: something else was read than was written):
        it is counted. Any thread."""
        check(lib.tierd_guest_read_failed(self._g, tier, -error), "count an error")

    def write_failed(self, tier: int, error: int) -> None:
        """As read_failed."""
        check(lib.tierd_guest_write_failed(self._g, tier, -error), "count an error")

    def discard(self, max_pages: int, keep: Collection[int] = ()) -> int:
        """Give back store space of pages that were fetched since; how many. In tiers of `keep` not of those that nobody has
        written to: they need not be written again. KernelError: its `tier` gave none back, the others did. Worker."""
        out, failed_tier = ffi.new("uint64_t *"), ffi.new("uint32_t *")
        kept = sum(1 << tier for tier in keep)
        error = lib.tierd_guest_discard(self._g, max_pages, kept, out, failed_tier)
        check(error, "store discard", failed_tier[0])
        return int(out[0])

    def compact(self, max_pages: int) -> int:
        """Move at most so many pages of the pool closer together; how many were. 0: there is nothing to gain. Worker."""
        out = ffi.new("uint32_t *")
        check(lib.tierd_guest_compact(self._g, max_pages, out), "compaction of the pool")
        return int(out[0])

    def batch(self, max_pages: int) -> NativeBatch:
        return NativeBatch(self, max_pages)
