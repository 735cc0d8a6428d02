# SPDX-License-Identifier: Apache-2.0
"""One guest from attach to teardown: the only file that knows the whole life.

    attach or adopt -> cycles, until the VMM exits, the guest is detached, or tierd stops -> teardown

The life is `Guest.run`, straight-line code in one trio task; where that task stands is the guest's state. Orders (evict,
restore, detach) come from API tasks; everything that touches pages runs in worker threads under `_worker`, one at a time.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from tierd import cycle
from tierd import policy as policies
from tierd.attach import GuestSpec, Handed, Refused
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import preflight, recheck, swap_can_receive
from tierd.attach.procfs import grown, start_ticks
from tierd.attach.ptrace import same_open_file
from tierd.config import Policy
from tierd.engine import Engine, fitting
from tierd.native import STAGING_TIER, STATES, Health, KernelError, NativeGuest, TierKind, Zap
from tierd.restore import answered, restore_all
from tierd.serve import (
    AwaitsHandshake,
    Served,
    Tuning,
    adopt,
    attach,
    holders_of,
    key_of,
    memory_available_bytes,
)
from tierd.store import Store, StoreError
from tierd.store.asked import AskedStore
from tierd.systemd import Notifier
from tierd.threads import in_thread
from tierd.tiers import Shares, Tiers
from tierd.view import GuestStatus, Progress, RequestRefused, State

if TYPE_CHECKING:  # it imports what encrypts and compresses, which few need
    from tierd.parking import Parking, Turns

HUNG_S = 0.25  # a fault in service for longer: another thread takes over
HUNG_TOLD_S = 2.0  # and for longer than this: an operator is told
LOST_TOLD_MAX = 32  # addresses in one line of the log
THREADS_MAX = 3  # of Python, a guest at once: a store that hangs holds the threads of its guests, not those of others
SPENT_BYTES_MAX = 64 << 20  # of anonymous memory, fetched and still in the staging area
BACK_OFF_S_MAX = 300.0
MISSING_S_MAX = 2.0
END_AGAIN_S = 0.5
MANAGER_S_MAX = 5.0  # for its socket to have room
STORED, LOST = STATES.index("stored"), STATES.index("lost")


@dataclass
class Host:
    """What all guests of this daemon share."""

    engine: Engine
    stores: dict[str, Store]  # by name; "file" comes later where it could not be used at the start
    guests_dir: Path
    boot_id: str
    holders: HolderScan
    notifier: Notifier
    kept_uffds: dict[str, int] = field(default_factory=dict)  # by key: a copy that outlives whatever befalls a Guest
    at_manager: set[str] = field(default_factory=set)  # by key: those of them that the service manager has, too
    kept_handed: dict[str, Handed] = field(default_factory=dict)  # by key: what the manager kept of VMMs that connected
    files_lack: str = ""  # why there is no "file" yet, which is tried again
    shares: Shares = field(default_factory=Shares)  # of the stores
    turns: dict[str, Turns] = field(default_factory=dict)  # of stores that trio asks, by name
    store_trouble: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # (store, guest's key) -> why it did not take its pages
    space_trouble: dict[tuple[str, str], str] = field(
        default_factory=dict
    )  # the same -> what is wrong there though its pages come and go

    def keep_uffd(self, key: str, uffd: int) -> None:
        """Should its VMM close its own and the Guest end by an error, stored pages hang on this copy. OSError: there are too
        many descriptors."""
        old = self.kept_uffds.get(key)
        if old is not None and same_open_file(old, uffd):
            return
        self.kept_uffds[key] = os.dup(uffd)
        if old is not None:  # its VMM has connected with another one
            os.close(old)
            self.at_manager.discard(key)

    def turns_of(self, store: AskedStore) -> Turns:
        """All guests' calls of a store share them."""
        from tierd.parking import Turns

        return self.turns.setdefault(store.name, Turns(store.concurrency))

    def store(self, name: str) -> Store:
        """StoreError: it could not be used when tierd started."""
        if name == "file" and self.files_lack:
            raise StoreError(f"the store file cannot be used: {self.files_lack}")
        if name not in self.stores:
            raise StoreError(f"the store {name} could not be used when tierd started: put it right, then restart tierd")
        return self.stores[name]

    def troubled(self, store: str, key: str) -> bool:
        """This store, for this guest."""
        return any(name == store and whose.partition(" ")[0] == key for name, whose in self.store_trouble)

    def forget_trouble(self, key: str) -> None:
        """Of a guest, with all stores."""
        for troubles in (self.store_trouble, self.space_trouble):
            for which in [which for which in troubles if which[1] == key]:
                del troubles[which]


class Ending(enum.Enum):
    EXITED = "the VMM exited"
    DETACHED = "detached"
    KEPT = "kept: evicted pages stay in the store until a tierd adopts the guest"


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """For whoever does not watch."""


class Guest:
    """A guest that tierd serves. All methods belong to the trio thread."""

    def __init__(
        self,
        spec: GuestSpec,
        policy: Policy,
        host: Host,
        state_path: Path | None = None,
        paused: bool = False,
        resumed: Future[Served] | None = None,
        kept_uffd: int | None = None,
        handed: Handed | None = None,
    ) -> None:
        """`state_path`: adopt what a predecessor left there, instead of attaching. `resumed`: that is under way.
        `kept_uffd`: a copy of the guest's userfaultfd; it stays the caller's. `handed`: what the VMM
        brought; closed by `run`."""
        self.spec, self.policy = spec, policy
        self.key = key_of(spec)
        self._host = host
        self._state_path, self._resumed, self._kept_uffd = state_path, resumed, kept_uffd
        self._handed = handed
        self._log = structlog.get_logger().bind(guest=spec.name, pid=spec.pid)
        self._state: State = "attaching"
        self._reason = ""
        self._paused = paused
        self._trouble: str | None = None
        self._failures = 0
        self._hanging: dict[str, int] = {}  # stores that were told, and how many pages they had given and taken then
        self._lost_told = self._grown_told = 0
        self._fragile = self._fragile_told = self._manager_is_deaf = False
        self._threads = trio.CapacityLimiter(THREADS_MAX)
        self._not_before = -1e9
        self._cycles = 0
        self._worker = trio.Lock()
        self._orders = 0  # that wait for it
        self._ending: Ending | None = None
        self._ended = trio.Event()
        self._teardown_began = False
        self._end_failure: Exception | None = None
        self._scope = trio.CancelScope()
        self._wake = trio.Event()
        self._served: Served | None = None
        self._parking: Parking | None = None  # it has tiers that are asked
        self._tiers: Tiers
        self.begun = trio.Event()  # attached, or not and over
        self.phases = cycle.Phases()
        self._staging = cycle.Staging()

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self.spec.pid

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def served(self) -> bool:
        """Attached, and its faults are ours to serve."""
        return self._served is not None

    def came_again(self, handed: Handed) -> bool:
        """It is served, and its VMM connected again. False: with another userfaultfd; nothing was changed."""
        served = self._served
        assert served is not None
        assert handed.uffd_in_vmm is not None
        if not same_open_file(served.uffd, handed.uffd):
            return False
        served.set_uffd_in_vmm(handed.uffd_in_vmm)
        return True

    # --- the life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> Ending:
        """Refused, StoreError, StateError or OSError: the guest is not served, and nothing of us is in its VMM. Cancelled:
        like KEPT. Returns when the guest is gone or left."""
        try:
            served = self._served = await self._in_worker(self._begin)
        except BaseException as error:
            self.refuse(error)
            raise
        finally:
            self.begun.set()
        self.spec = served.spec  # with what is ours in the VMM
        asked = None
        if served.native.asked_tiers:
            from tierd.parking import Asked, Parking

            self._parking = Parking(served, self.key, self._host.stores, self._host.turns_of)
            asked = Asked(self._parking)
        self._tiers = Tiers(served, self._host.stores, self._host.shares, asked)
        self._state = "paused" if self._paused else "active"
        self._host.shares.guests += 1
        self._apply_reads(served)
        self._log.info(
            "guest_adopted" if served.adoption else "guest_attached",
            engine=served.engine.name,
            bytes=served.native.pages * served.page_bytes,
            zap=served.zap.name.lower(),
            **self._adoption_facts(),
        )
        try:
            await self._live(served)
        finally:
            self._host.shares.guests -= 1
            with trio.CancelScope(shield=True):  # an order may still have a thread in the guest's tables: bounded
                async with self._worker:
                    self._served = None
                    try:
                        await self._end_in_worker(served)
                    except Exception as error:
                        self._end_failure = error
                        raise
                    finally:
                        try:
                            if self._parking is not None:  # after a failure the pages are whose who adopts the guest again
                                over = self._ending is not Ending.KEPT and self._end_failure is None
                                await self._parking.close(delete=over)
                        finally:
                            self._ended.set()
        assert self._ending is not None
        self._log.info("guest_ended", how=self._ending.value)
        return self._ending

    def _begin(self) -> Served:
        """Attach or adopt. Worker thread."""
        try:
            served = self._attach_or_adopt()
            try:
                self._host.keep_uffd(self.key, served.uffd)
            except OSError:  # its state file is there: it is adopted again
                served.close()
                raise
            return served
        finally:
            if self._handed is not None:
                self._handed.close()

    def _attach_or_adopt(self) -> Served:
        policy, host = self.policy, self._host
        tuning = Tuning(
            policy.min_idle_s,
            policy.readahead_pages,
            read_deadline_s=policy.read_deadline_s,
            hold_lost=policy.on_lost == "hold",
        )
        if self._resumed is not None:
            return self._resumed.result()
        swappable = swap_can_receive(self.spec.pid)
        if self._state_path is not None:
            return adopt(
                self._state_path,
                engine=host.engine,
                swap_can_receive=swappable,
                boot_id=host.boot_id,
                kept_uffd=self._kept_uffd,
                handed=self._handed,
            )
        engine = fitting(host.engine, self.spec.anonymous)
        entered = not self.spec.handshake or engine.zap(inside=swappable) is Zap.INJECT
        preflight(self.spec, policy, host.holders, engine, entered=entered)
        return attach(
            self.spec,
            engine=engine,
            stores=[host.store(tier.name) for tier in policy.tiers],
            guests_dir=host.guests_dir,
            tuning=tuning,
            swap_can_receive=swappable,
            handed=self._handed,
        )

    def _adoption_facts(self) -> dict[str, int]:
        assert self._served is not None
        adoption = self._served.adoption
        if adoption is None:
            return {}
        return {
            "stored_pages": adoption.stored_pages,
            "corrected_pages": adoption.corrected_pages,
            "lost_pages": adoption.lost_pages,
            "quarantined_pages": adoption.quarantined_pages,
            "adoption_us": adoption.ns // 1000,
        }

    async def _live(self, served: Served) -> None:
        """Cycle until `_scope` is cancelled by the VMM's exit or an order. A cancellation from outside is a KEPT."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_exit, served)
                if self._parking is not None:
                    nursery.start_soon(self._parking.run)
                with self._scope:
                    await self._cycle_for_ever(served)
                nursery.cancel_scope.cancel()
        finally:
            self._ending = self._ending or Ending.KEPT

    async def _end_in_worker(self, served: Served) -> Any:
        """Waits until there is a thread: what is not ended would keep the page table's lock."""
        told = False
        while True:
            try:
                return await self._in_worker(self._end, served)
            except OSError as error:
                if self._teardown_began:
                    raise
                if not told:
                    self._log.error("not_done", what="leaving this guest", error=str(error), action="trying again")
                told = True
            await trio.sleep(END_AGAIN_S)

    def _end(self, served: Served) -> None:
        """Teardown, backwards. Worker thread. KEPT leaves the state file and the store for the next tierd."""
        self._teardown_began = True
        with served:
            if self._ending is Ending.DETACHED and not served.leave():
                self._log.warning(
                    "descriptor_left_behind",
                    descriptor=served.uffd_in_vmm,
                    action="none: the VMM could not be entered to close it, and nothing is registered with it",
                )
            elif self._ending is Ending.EXITED:
                served.forget()
        when = "that happens when tierd starts" + (" after its VMM has ended" if self._ending is Ending.DETACHED else "")
        for name, error in served.undeleted.items():
            self._log.warning("pages_not_deleted", store=name, error=str(error), action=when)
        self._host.forget_trouble(self.key)
        self._host.forget_trouble(f"{self.key} hangs")
        self._host.forget_trouble(f"{self.key} not open")

    async def missing(self) -> Path | None:
        """What a successor would not find of it. None as well where a store does not say so at once."""
        served, path = self._served, None
        with trio.move_on_after(MISSING_S_MAX):
            if served is not None:
                path = await in_thread(served.missing, abandon_on_cancel=True)
        return path

    def _stop_cycle(self) -> None:
        """In trio's thread. What the worker has asked of a store is called off, too."""
        self._scope.cancel()
        if self._parking is not None:
            self._parking.cut()

    async def _watch_exit(self, served: Served) -> None:
        await trio.lowlevel.wait_readable(served.pidfd)
        self._ending = Ending.EXITED
        self._stop_cycle()

    @contextlib.asynccontextmanager
    async def _order(self, served: Served) -> AsyncIterator[None]:
        """An order's turn at the worker: a cycle that is under way ends after the batch that it is at. RequestRefused."""
        self._orders += 1
        try:
            await self._worker.acquire()
        finally:
            self._orders -= 1
        try:
            self._must_still_serve(served)
            yield
        finally:
            self._worker.release()

    def _check(self) -> None:
        """Between the batches of a cycle. CutShort. Worker."""
        trio.from_thread.check_cancelled()
        if self._orders:
            raise cycle.CutShort

    async def _cycle_for_ever(self, served: Served) -> None:
        while True:
            began = trio.current_time()
            async with self._worker:
                await self._cycle(served)
            with trio.move_on_at(began + self.policy.interval_s):
                await self._wake.wait()
            self._wake = trio.Event()

    # --- a cycle ----------------------------------------------------------------------------------------------------------

    async def _cycle(self, served: Served) -> None:
        """One cycle. The only frame that survives an error of the world: it is logged once, and eviction backs off."""
        if not await self._hold_uffd(served):
            return
        await self._unstage(served)
        await self._tidy(served)
        if self._state == "refused":
            await self._bring_back(served)
            return
        if not self.policy.enabled:
            return
        evicted = 0
        try:
            await self._in_worker(self._recheck)
            await self._in_worker(
                cycle.scan_and_deactivate, served.native, self.phases, trio.from_thread.check_cancelled
            )
            if served.native.waits_for_readers and not self._paused and not self.policy.dry_run:
                await self._in_worker(self._stage, served)
            decision = policies.decide(self.policy, await self._in_worker(self._sample, served))
            self._reason = decision.reason
            if decision.evict_bytes_max and not self._paused and trio.current_time() >= self._not_before:
                evicted = await self._evict(decision.min_idle_s, decision.evict_bytes_max, self._check)
            if not self._paused and not self.policy.dry_run:
                await self._sink()
        except Refused as refused:
            await self._give_up(served, refused)
        except cycle.CutShort:
            pass  # the next cycle goes on
        except (OSError, StoreError) as error:
            if not await self._is_over(served, error):
                self._failed(error)
        else:
            if evicted or not any(key == self.key for _, key in self._host.store_trouble):
                self._recovered()  # a store is well again once it has taken something
        self._cycles += 1

    def _recheck(self) -> None:
        """What may have changed since preflight: another mapper, a pin, swap, other regions. Refused says which."""
        recheck(self.spec, self.policy, self._host.holders, self._served.engine if self._served else None)
        if self._served is not None:
            self._served.adapt(swap_can_receive(self.spec.pid))
            self._tell_grown()

    def _tell_grown(self) -> None:
        if self.spec.handshake:  # it says itself what is guest memory
            return
        more = sum(region.bytes for region in grown(self.spec))
        if more and more != self._grown_told:
            self._log.warning(
                "guest_grew", bytes=more, action="detach and attach the guest: new memory is not tiered until then"
            )
        self._grown_told = more

    async def _hold_uffd(self, served: Served) -> bool:
        """Whatever the state and the policy: somebody besides us must hold the userfaultfd. False: refused for it just now."""

        def look() -> None:
            served.native.keep_nonblocking()
            if (
                not served.vmm_holds_uffd() and not served.native.gone()
            ):  # never into a program that the VMM has executed
                self._secure(served)

        try:
            await self._in_worker(look)
        except Refused as refused:
            if self._state != "refused":
                await self._give_up(served, refused)
                return False
        except OSError as error:
            if not await self._is_over(served, error):
                self._failed(error)
            return False
        return True

    def _secure(self, served: Served) -> None:
        """The VMM closed its copy of the userfaultfd: ours is the last, and with us every stored page would turn into zeros.
        Worker."""
        self._fragile = True
        if self.key in self._host.at_manager:
            return
        try:
            served.give_uffd_back()
        except OSError as error:
            trouble = str(error)
        else:
            self._fragile = False
            self._log.warning("userfaultfd_put_back", descriptor=served.uffd_in_vmm, why="the VMM had closed its copy")
            return
        if self._host.notifier.keeps_fds:
            try:
                self._give_to_manager(served.uffd)
            except OSError as error:
                trouble += f"; the service manager does not take it: {error}"
            else:
                self._log.warning(
                    "userfaultfd_kept", by="the service manager", why=f"the VMM closed its copy; {trouble}"
                )
                return
        if not self.policy.allow_fragile:
            raise Refused(
                "fragile",
                "the VMM closed its copy of the userfaultfd: if tierd died now, stored pages would read as zeros",
                f"pid {self.pid}: descriptor {served.uffd_in_vmm}; {trouble}",
                "run tierd as a systemd service with FileDescriptorStoreMax=, or set allow_fragile: true",
            )
        if not self._fragile_told:
            self._fragile_told = True
            self._log.error(
                "guest_is_fragile", why="the VMM closed its copy of the userfaultfd", action="do not stop tierd"
            )

    def _give_to_manager(self, uffd: int) -> None:
        """Its socket may be full for a moment. OSError: it is for longer, or gone; then it is tried once a cycle. Worker."""
        until = time.monotonic() + (0 if self._manager_is_deaf else MANAGER_S_MAX)
        while True:
            try:
                self._host.notifier.store_fds(self.key, [uffd])
            except OSError:
                if time.monotonic() >= until:
                    self._manager_is_deaf = True
                    raise
                time.sleep(0.05)
            else:
                self._host.at_manager.add(self.key)
                return

    def ends_with_us(self, restart: bool) -> bool:
        """Whether stored pages would turn into zeros if we ended now: ours is the last copy of the userfaultfd, or the service
        manager's is, which it drops when we do not start again at once."""
        if self._served is None or self._served.vmm_holds_uffd():
            return False
        return not (restart and self.key in self._host.at_manager)

    async def _unstage(self, served: Served) -> None:
        """Of anonymous memory, whatever the state and the policy: what was fetched is there twice until then."""
        if not served.native.anonymous:
            return

        def work() -> None:
            served.adapt(swap_can_receive=False)  # the thread that makes our calls may have ended
            cycle.unstage(served.native, trio.from_thread.check_cancelled)

        try:
            await self._in_worker(work)
        except Refused as refused:  # a filter that the VMM has installed
            if self._state != "refused":
                await self._give_up(served, refused)
        except OSError as error:
            if not await self._is_over(served, error):
                self._failed(error)

    async def _tidy(self, served: Served) -> None:
        """Whatever the state and the policy: what came back takes no room in its tier any more."""
        try:
            await self._in_worker(self._tiers.tidy, self.policy, self.phases, self._check)
        except cycle.CutShort:
            pass  # the next cycle goes on
        except OSError as error:
            if not await self._is_over(served, error):
                self._failed(error)

    def _stage(self, served: Served) -> None:
        served.native.set_split_large(self.policy.split_large_pages)
        cycle.stage(
            served.native,
            self._staging,
            interval_s=self.policy.interval_s,
            min_idle_s=self.policy.min_idle_s,
            stall_budget=self.policy.stall_budget,
            phases=self.phases,
            check=trio.from_thread.check_cancelled,
        )

    def _sample(self, served: Served) -> policies.Sample:
        policy = self.policy
        served.native.set_readahead(policy.readahead_pages)
        stored_pages = sum(served.native.counters()["tier_pages"][tier.number] for tier in served.tiers.values())
        return policies.Sample(
            resident_bytes=served.resident_bytes(),
            stored_bytes=stored_pages * served.page_bytes,
            store_free_bytes=sum(self._tiers.room(tier, policy) for tier in self._tiers.usable(policy)),
            idle=self._idle(served),
            elapsed_s=policy.interval_s,
        )

    async def _evict(self, min_idle_s: float, max_bytes: int, check: Callable[[], None]) -> int:
        if self._served is not None:
            self._served.native.set_split_large(self.policy.split_large_pages)
        evicted, took = await self._in_worker(self._tiers.evict, self.policy, min_idle_s, max_bytes, self.phases, check)
        self._well_again(took)
        if evicted:
            self._log.debug("evicted", bytes=evicted, min_idle_s=min_idle_s)
        return int(evicted)

    async def _sink(self) -> None:
        sunk, took = await self._in_worker(self._tiers.sink, self.policy, self.phases, self._check)
        self._well_again(took)
        for name, moved in sunk:
            self._log.debug("demoted", tier=name, bytes=moved)

    def _well_again(self, tiers: Collection[str]) -> None:
        """They took pages."""
        for name in tiers:
            self._tiers.well_again(name)
            self._host.store_trouble.pop((name, self.key), None)

    def _back_off_s(self, failures: int) -> float:
        """Guests that failed together do not try again together."""
        pause_s: float = min(self.policy.interval_s * 2 ** min(failures, 20), BACK_OFF_S_MAX)
        return pause_s * random.uniform(0.5, 1.0)

    def _failed(self, error: OSError | StoreError | RequestRefused) -> None:
        others, where, on_disk = False, {}, False
        if isinstance(error, KernelError) and error.tier and self._served is not None:
            name, others = self._tiers.failed(error.tier, self._back_off_s)
            self._host.store_trouble[name, self.key] = str(error)
            where, on_disk = {"store": name}, self._served.tiers[name].space.kind is TierKind.FILE
        if not others:
            self._failures += 1
            self._not_before = trio.current_time() + self._back_off_s(self._failures)
        if self._trouble != str(error):
            self._trouble = str(error)
            action = "none: tried again"
            if isinstance(error, KernelError) and error.errno == errno.ENOENT and not error.tier:
                action = "the VMM has mapped its memory anew: detach and attach the guest"
            elif on_disk and isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS):
                action = "see what the kernel's log says of the disk; tried again"
            self._log.warning("eviction_failed", **where, error=str(error), pages="stay with the guest", action=action)

    def _recovered(self) -> None:
        if self._trouble is not None and trio.current_time() >= self._not_before:
            self._log.info("eviction_works_again", after=self._trouble)
            self._trouble, self._failures = None, 0

    async def _is_over(self, served: Served, error: Exception) -> bool:
        """The VMM's memory is gone: it exits just now, or has executed another program under the same pid."""
        if not isinstance(error, OSError) or error.errno != errno.ESRCH:
            return False
        if start_ticks(self.pid) != self.spec.start_ticks:
            return True  # _watch_exit ends the guest
        if not await self._in_worker(served.native.gone):
            return False
        await self._memory_gone()
        return True

    async def _memory_gone(self) -> None:
        """What was stored is of no use to anybody, unless somebody still has the file of the memory."""
        self._ending = self._ending or Ending.EXITED
        if await self._in_worker(holders_of, self.spec.regions):
            self._ending = Ending.KEPT
            self._log.error(
                "guest_memory_held",
                why="the VMM executed another program, and somebody still has the file of its guest's memory",
                action="its stored pages are kept; remove the state file when nobody needs them",
            )
        self._stop_cycle()

    async def _give_up(self, served: Served, refused: Refused) -> None:
        """A hazard appeared after the attach: no more evictions, and everything comes back."""
        self._state, self._reason = "refused", str(refused)
        self._log.error("guest_refused", reason=str(refused), action="bringing every page back; detach it when done")
        await self._bring_back(served)

    async def _bring_back(self, served: Served) -> None:
        """Of a refused guest: everything that can be had now; the rest is tried again in the next cycle."""
        if not served.native.counters()["state_pages"][STORED]:
            if await self._in_worker(served.native.gone):
                await self._memory_gone()
            return
        try:
            await self._restore_all(served, no_progress)
        except (RequestRefused, OSError) as error:
            if not await self._is_over(served, error):
                self._failed(error)

    def watch(self) -> None:
        """The data plane's watchdog, some times a second: a fault thread that hangs in its store is told, and another one
        takes over what can be served. Trio; cheap."""
        if self._served is None:
            return
        served, native = self._served, self._served.native
        health, served_bytes = native.health(HUNG_S), served.page_bytes
        overdue = health.overdue_ns > HUNG_S * 1e9
        if health.fault_threads < self.policy.fault_threads_max and (
            overdue or health.hung_threads == health.fault_threads
        ):
            self._take_over(native)
        if not health.asked_pages:
            native.forget_answers()
        if health.spent_pages * served_bytes > SPENT_BYTES_MAX:
            self._wake.set()  # the next cycle gives them back
        if health.pages_lost > self._lost_told:
            self._tell_lost(native, health.pages_lost)
        self._tell_parking()
        in_files = max(health.oldest_busy_ns, health.overdue_ns, health.worker_io_ns) > HUNG_TOLD_S * 1e9
        hanging = {
            name
            for name, tier in served.tiers.items()
            if (in_files and tier.space.kind is TierKind.FILE) or health.asked_ns[tier.number] > HUNG_TOLD_S * 1e9
        }
        if in_files and not hanging:  # compressed memory that was swapped out, say
            in_memory = {name for name, tier in served.tiers.items() if tier.space.kind is TierKind.MEMORY}
            hanging = in_memory or set(served.tiers)
        self._tell_hanging(served, hanging, health)

    def _tell_hanging(self, served: Served, hanging: set[str], health: Health) -> None:
        """Each store by itself. One that is asked answers again when it gives or takes pages: that nobody waits any more may be
        since it was given up."""
        if not hanging and not self._hanging:
            return
        counters = {name: served.native.tier_counters(tier.number) for name, tier in served.tiers.items()}
        moved = {name: of["read_pages"] + of["written_pages"] for name, of in counters.items()}
        if begun := hanging - self._hanging.keys():
            call = "read" if health.worker_io_ns <= HUNG_TOLD_S * 1e9 else "call"
            trouble = f"guest {self.name} has waited for a {call} of the store for more than {HUNG_TOLD_S:g} s"
            for name in begun:
                self._host.store_trouble[name, f"{self.key} hangs"] = trouble
            self._log.error(
                "store_hangs",
                stores=sorted(begun),
                fault_threads=health.fault_threads,
                hung_threads=health.hung_threads,
                waiting_pages=health.parked_pages + health.asked_pages,
                eviction_hangs=health.worker_io_ns > HUNG_TOLD_S * 1e9,
                action="see to the store; faults that do not need it are served",
            )
            self._hanging.update({name: moved[name] for name in begun})
        over = {
            name
            for name, before in self._hanging.items()
            if name not in hanging
            and (served.tiers[name].space.kind is not TierKind.ASKED or moved[name] > before)
        }
        if over:
            for name in over:
                del self._hanging[name]
                self._host.store_trouble.pop((name, f"{self.key} hangs"), None)
            self._log.info("store_answers_again", stores=sorted(over), fault_threads=health.fault_threads)

    def _tell_parking(self) -> None:
        """Stores that are asked: what is wrong with this guest's space there, and those that cannot be had."""
        troubles = self._parking.troubles if self._parking is not None else {}
        spaces = self._parking.space_troubles if self._parking is not None else {}
        for name, trouble in spaces.items():
            which = name, self.key
            if trouble and trouble != self._host.space_trouble.get(which):
                action = "see to the store; pages come and go all the same"
                self._log.error("store_space_trouble", store=name, error=trouble, action=action)
            if trouble:
                self._host.space_trouble[which] = trouble
            else:
                self._host.space_trouble.pop(which, None)
        for name in self._served.tiers if self._served is not None else ():
            if name in troubles:
                self._host.store_trouble[name, f"{self.key} not open"] = troubles[name]
            else:
                self._host.store_trouble.pop((name, f"{self.key} not open"), None)

    def _tell_lost(self, native: NativeGuest, pages_lost: int) -> None:
        addresses = native.lost_addresses(LOST_TOLD_MAX)
        self._log.error(
            "pages_lost",
            new_pages=pages_lost - self._lost_told,
            addresses=[f"{address:#x}" for address in addresses],
            more=len(addresses) == LOST_TOLD_MAX,
            guest_sees="a memory error at these addresses of the VMM"
            if self.policy.on_lost == "poison"
            else "its threads that touch these addresses of the VMM stay blocked",
            action="repair the store, then `tierd retry`",
        )
        self._lost_told = pages_lost

    def _take_over(self, native: NativeGuest) -> None:
        try:
            native.start()
        except OSError as error:
            if not self._hanging:
                self._log.warning("fault_thread_failed", error=str(error), action="trying again")

    # --- orders -----------------------------------------------------------------------------------------------------------

    def _must_serve(self) -> Served:
        if self._served is None:
            raise RequestRefused(
                f"guest {self.name} is {self._state}: {self._reason or 'not served yet'}",
                "see `tierd status`; try again when it is active",
            )
        return self._served

    def _must_still_serve(self, served: Served) -> None:
        """After waiting for the worker: the guest may have ended meanwhile, and its tables with it; or it is about to be left,
        with every page back."""
        if self._served is not served or self._ending is not None:
            raise RequestRefused(f"guest {self.name} has ended", "see `tierd status`")

    def set_policy(self, policy: Policy) -> None:
        """From the next cycle on; what concerns faults, at once. A tier that the guest was attached without it does not get."""
        if self._served is not None and policy.tiers != self.policy.tiers:
            named, has = [tier.name for tier in policy.tiers], list(self._served.tiers)
            new = [name for name in named if name not in has]
            if new or [name for name in named if name in has] != [name for name in has if name in named]:
                self._log.warning(
                    "guest_keeps_its_tiers", tiers=has, not_used=new, action="detach and attach the guest"
                )
        self.policy = policy
        if self._served is not None:
            self._apply_reads(self._served)
        self._wake.set()

    def _apply_reads(self, served: Served) -> None:
        served.native.set_reads(self.policy.read_deadline_s, self.policy.on_lost == "hold")

    async def pause(self) -> None:
        self._paused, self._state = True, "paused" if self._state == "active" else self._state
        self._log.info("guest_paused")

    async def resume(self) -> None:
        self._paused, self._state = False, "active" if self._state == "paused" else self._state
        self._wake.set()
        self._log.info("guest_resumed")

    async def evict(
        self, max_bytes: int | None = None, min_idle_s: float | None = None, progress: Progress = no_progress
    ) -> int:
        """Evict now what is idle at least `min_idle_s` (never less than the policy's floor). Returns bytes."""
        served = self._must_serve()
        if self._state == "refused" or self.policy.dry_run or not self.policy.enabled:
            raise RequestRefused(
                f"guest {self.name} does not evict: {self._reason or 'dry_run or enabled: false'}",
                "change its policy and `systemctl reload tierd`, or see `tierd status` for why it is refused",
            )
        floor = policies.clamp_min_idle(self.policy, min_idle_s)

        def check() -> None:
            trio.from_thread.check_cancelled()
            if self._state == "detaching":
                raise RequestRefused(f"guest {self.name} is being left", "evict it after it was attached again")

        async with self._order(served):
            await self._in_worker(self._recheck)
            await self._in_worker(cycle.scan_and_deactivate, served.native, self.phases, check)
            wanted = sum(n for edge, n in self._idle(served) if edge >= floor)
            total = min(wanted, max_bytes) if max_bytes is not None else wanted
            evicted = await self._evict(floor, total, check)
            progress(evicted, max(total, evicted))
            return evicted

    def _idle(self, served: Served) -> tuple[tuple[float, int], ...]:
        """(idle at least this many s and less than the next, bytes)."""
        edges = policies.idle_edges(self.policy)
        idle = served.native.idle_pages(edges)
        return tuple((edge, pages * served.page_bytes) for edge, pages in zip(edges, idle, strict=True))

    async def restore(self, progress: Progress = no_progress) -> int:
        """Bring every page back and stay paused. Returns bytes."""
        served = self._must_serve()
        await self.pause()
        async with self._order(served):
            return await self._restore_all(served, progress)

    async def retry(self) -> tuple[int, int]:
        """After a repair of the store: read lost pages again. (recovered, still lost) bytes."""
        served = self._must_serve()
        async with self._order(served):
            before, page = served.native.counters()["state_pages"][LOST], 0
            while page < served.native.pages:
                page, _, _ = await self._in_worker(served.native.retry, page)
                await answered(served, self._parking)  # then there is room to ask for the next ones
            still_lost = served.native.counters()["state_pages"][LOST]
            recovered = max(before - still_lost, 0)
        self._log.info("lost_pages_retried", recovered_pages=recovered, lost_pages=still_lost)
        return recovered * served.page_bytes, still_lost * served.page_bytes

    async def detach(self, progress: Progress = no_progress) -> None:
        """Bring every page back, then leave the VMM as if we had never been there. RequestRefused: not enough memory, or
        the VMM cannot be left now; it is served on."""
        served, before = self._must_serve(), self._state
        self._state = "detaching"
        try:
            async with self._order(served):
                await self._restore_all(served, progress)
                self._must_not_be_lost(served)
                self._ending = self._ending or Ending.DETACHED
                self._stop_cycle()
        except BaseException:
            self._state = before
            raise
        await self._ended.wait()
        if self._end_failure is not None:
            raise RequestRefused(
                f"every page of guest {self.name} is back, but its VMM could not be left ({self._end_failure})",
                "if the VMM is stopped or frozen, let it run, and try again; tierd goes on serving it"
                if served.state_path.exists()
                else "a userfaultfd that nothing is registered with may be left in it; tierd does not serve it any more",
            ) from self._end_failure

    def _must_not_be_lost(self, served: Served) -> None:
        """Left, a page that could not be read would turn from a memory error into zeros."""
        lost = served.native.counters()["state_pages"][LOST]
        if lost:
            raise RequestRefused(
                f"{lost} pages of guest {self.name} are lost: without tierd they would read as zeros",
                "repair the store and `tierd retry` it, or end the VM",
            )

    def refuse(self, error: BaseException) -> None:
        """Not served, for a reason that an operator can see in `tierd status`; nothing is wrong when it only waits."""
        if not isinstance(error, AwaitsHandshake):
            self._state = "refused"
        self._reason = str(error) or type(error).__name__

    def keep(self) -> None:
        """End serving; what is stored stays stored for the next tierd."""
        self._ending = self._ending or Ending.KEPT
        self._stop_cycle()

    async def _restore_all(self, served: Served, progress: Progress) -> int:
        self._must_fit(served.native.counters()["state_pages"][STORED] * served.page_bytes, served.page_bytes)
        return await restore_all(served, self._parking, self._in_worker, progress)

    def _must_fit(self, needed_bytes: int, page_bytes: int) -> None:
        available = memory_available_bytes(page_bytes)
        if needed_bytes > available:
            raise RequestRefused(
                f"bringing back {needed_bytes >> 20} MiB of guest {self.name} does not fit into the {available >> 20} MiB of "
                "memory that the host has left",
                "free memory on the host, and try again; until then its pages stay stored and are served",
            )

    async def _in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run in a thread; a cancellation waits for it (each call covers a bounded stretch, unless the store hangs)."""
        return await in_thread(function, *args, limiter=self._threads)

    # --- what others see --------------------------------------------------------------------------------------------------

    def status(self) -> GuestStatus:
        """A snapshot; reads the page table (0.1 ms per GiB)."""
        served = self._served
        if served is None:
            return GuestStatus(
                name=self.name,
                pid=self.pid,
                key=self.key,
                state=self._state,
                engine=self._host.engine.name,
                reason=self._reason,
                policy=self.policy.model_dump(mode="json"),
            )
        counters: dict[str, Any] = served.native.counters()
        pages = counters["tier_pages"]
        return GuestStatus(
            name=self.name,
            pid=self.pid,
            key=self.key,
            state=self._state,
            engine=served.engine.name,
            reason=self._trouble or self._reason,
            page_bytes=served.page_bytes,
            total_bytes=counters["pages"] * served.page_bytes,
            resident_bytes=served.resident_bytes(),
            stored_bytes={
                "zero": pages[0] * served.page_bytes,
                **{tier.name: pages[tier.number] * served.page_bytes for tier in served.tiers.values()},
            },
            staged_bytes=pages[STAGING_TIER] * served.page_bytes,
            tiers=[
                self._tiers.status(
                    tier,
                    pages[tier.number],
                    not self._host.troubled(tier.name, self.key),
                    self._parking.compressed_to(tier.number) if self._parking is not None else 0.0,
                )
                for tier in served.tiers.values()
            ],
            hole_bytes=counters["untouched_pages"] * served.page_bytes,
            idle=self._idle(served),
            counters=counters,
            policy=self.policy.model_dump(mode="json"),
            phase_s=dict(self.phases.seconds),
            cycles=self._cycles,
        )

    @property
    def tier_names(self) -> Collection[str]:
        """Of the stores that it was attached with; none while it is not served."""
        return self._served.tiers if self._served is not None else ()

    def pages_in(self, name: str) -> int:
        """Pages of the guest that are stored in this tier."""
        served = self._served
        if served is None or name not in served.tiers:
            return 0
        return int(served.native.counters()["tier_pages"][served.tiers[name].number])
