# SPDX-License-Identifier: Apache-2.0
"""The root nursery: guests, discovery, API, signals, watchdog, and the order in which all of it stops.

One task a guest; a guest's failure never touches another. Start: adopt what a predecessor left, sweep what is dead, then
look for new guests. Stop: the first SIGTERM or SIGINT restores (or keeps) every guest within `stop_timeout_s`, the second
keeps at once. SIGUSR1 is a stop that a start follows (RestartKillSignal= of the unit): `on_restart` says what then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import structlog.tracebacks
import trio

from tierd import __version__
from tierd.attach import GuestSpec, Handed, Refused
from tierd.attach.holders import HolderScan
from tierd.attach.procfs import Discovery, boot_id, read_spec, start_ticks
from tierd.check import engine_findings
from tierd.config import Config, Policy, changes, named_stores, with_seconds
from tierd.document import ConfigError, ConfigErrors
from tierd.engine import EngineUnavailable, choose
from tierd.guest import Ending, Guest, Host
from tierd.load import load
from tierd.resume import Resumed
from tierd.serve import (
    SUFFIX,
    AlreadyRunning,
    AwaitsHandshake,
    Stale,
    StateError,
    key_of,
    lock_runtime_dir,
    prepare_runtime_dir,
    read_state,
)
from tierd.store import Store, StoreError
from tierd.stores import (
    asked_or_errors,
    keep_keys_swept,
    memory_or_errors,
    open_stores,
    sweep_keys,
)
from tierd.successor import why_nobody_adopts, without_their_files
from tierd.systemd import Notifier, watchdog_interval_s
from tierd.threads import in_thread
from tierd.view import DaemonStatus, GuestView, Progress, RequestRefused
from tierd.watch import StoreWatch, tell_trouble

if TYPE_CHECKING:
    from tierd.vmms import Hand

# A VMM that was just started has no memory yet: look again soon, then rarely
RETRY_S = (0.2, 0.3, 0.5, 1, 2, 5, 10)
RETRY_S_MAX = 60.0
READY_TRIES = 50
READOPT_S, READOPT_S_MAX = 0.5, 10.0
OF_THE_MACHINE = {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # errors that pass
STOP_GRACE_S = 5.0
SOCKET_RETRY_S = 2.0
WATCH_S = 0.25  # between looks at the fault threads
ADOPT_S_MAX = 5.0  # for the start to wait for a guest
HAND_OVER_S_MAX = 60.0  # for an adoption with what a VMM brought
END_S_MAX = 5.0  # for calls that are under way when everything else has ended
UNSEEN_WHY = "tierd has no right to, so whether one of them holds a guest's memory is not known"
UNSEEN_ACTION = "let no VMM share its memory with a process of another user; tierd as root sees them"
STOP, RESTART = (signal.SIGTERM, signal.SIGINT), signal.SIGUSR1

log = structlog.get_logger()


class _Offer:
    """What a VMM brought, for the task that adopts its guest; and that task's answer."""

    def __init__(self, hand: Hand) -> None:
        self.hand = hand
        self.taken = trio.Event()
        self.guest: Guest | None = None  # when taken, unless the guest ended before

    def take(self, guest: Guest | None) -> None:
        self.guest = guest
        self.taken.set()


class Daemon:
    """All state lives in the trio thread."""

    def __init__(self, config: Config, config_path: Path, host: Host, resumed: Resumed) -> None:
        self.config, self.config_path, self.host = config, config_path, host
        self.notifier, self._resumed = host.notifier, resumed
        self._guests: dict[str, Guest] = {}
        self._running: set[str] = set()  # by key: a task attaches, adopts, serves or leaves it; there is one at most
        self._welcoming: set[str] = set()  # by key: a connection is being answered
        self._waiting: dict[str, trio.Event] = {}  # refused or not ready: set to try again now
        self._hands: dict[str, Hand] = {}  # by key: VMMs that are connected and served
        self._kept: set[str] = set()  # by key: what a VMM brought and the service manager has, too
        self._offers: dict[str, _Offer] = {}  # by key: for the next try at an adoption
        self._left: set[str] = set()  # detached by an operator: not picked up again
        self._discovery = Discovery()
        self._reloading = trio.Lock()
        self._picked: set[int] = set()  # by pid: VMMs that are to be attached
        self._began = trio.current_time()
        self._engine_notes = [finding.says for finding in engine_findings(host.engine.found, config.engine)]
        self._nursery: trio.Nursery
        self._stores: StoreWatch
        self._stopping = self._manager_deaf = self._reload_failed = False
        self._unseen_told = False
        self._survived: dict[str, str] = {}  # what could not be done -> why, as it was told
        self._fds_to_remove: set[str] = set()  # by key: of the manager's, of guests that are gone or were left

    @property
    def guests(self) -> Mapping[str, GuestView]:
        return self._guests

    # --- running ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop."""
        with trio.open_signal_receiver(*STOP, RESTART, signal.SIGHUP) as signals:
            async with trio.open_nursery() as self._nursery:
                self._stores = StoreWatch(self.host, self.config, self._nursery, self._may_be_needed, self._survives)
                await self._adopt_all()
                await self._start_socket("handshake", self._start_handshake)  # soon: VMMs may wait to come again
                self._nursery.start_soon(keep_keys_swept, self.host.guests_dir.parent, self._may_be_needed)
                await self._stores.begin()
                await self._start_socket("api", self._start_api)
                self._nursery.start_soon(self._watch_guests)
                self._stores.watch(self._try_all_again)
                self._nursery.start_soon(self._discover)
                self._nursery.start_soon(self._feed_watchdog)
                await self._tell_ready()
                log.info(
                    "ready",
                    engine=self.host.engine.name,
                    why=self._engine_notes,
                    guests=len(self._guests),
                    version=__version__,
                )
                await self._obey(signals)
                self._end_at_last()
                self._nursery.cancel_scope.cancel()

    async def _start_socket(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        """SocketUnusable ends a tierd that serves nobody. One that has adopted guests goes on without it: their faults are
        worth more."""
        from tierd.api import SocketUnusable  # only now: faults come first

        try:
            await start()
        except SocketUnusable as error:
            if not self._guests:
                raise
            log.error(
                f"{name}_unusable",
                error=str(error),
                action=f"serving guests without it; trying every {SOCKET_RETRY_S:g} s",
            )
            self._nursery.start_soon(self._start_socket_later, name, start)

    async def _start_socket_later(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        from tierd.api import SocketUnusable

        while True:
            await trio.sleep(SOCKET_RETRY_S)
            with contextlib.suppress(SocketUnusable):
                await start()
                log.info(f"{name}_works_again")
                return

    async def _start_api(self) -> None:
        from tierd.api import serve

        api, listen = self.config.api, self.config.metrics.listen
        await self._nursery.start(
            partial(serve, self, socket_path=api.socket, mode=api.mode, group=api.group, metrics_listen=listen)
        )

    async def _start_handshake(self) -> None:
        from tierd.vmms import serve

        handshake = self.config.handshake
        if handshake.socket is not None:
            await self._nursery.start(
                partial(serve, self, socket_path=handshake.socket, mode=handshake.mode, group=handshake.group)
            )

    async def _obey(self, signals: Any) -> None:
        """Handle signals until it is time to go."""
        async for number in signals:
            if number == signal.SIGHUP:
                await self._reload_and_tell()
                continue
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._second_signal, signals, nursery.cancel_scope)
                await self._stop(signal.Signals(number))
                nursery.cancel_scope.cancel()
            return

    async def _second_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for number in signals:
            if number in (*STOP, RESTART):
                log.warning("second_signal", signal=signal.Signals(number).name, action="keep what is stored, stop now")
                self._end_at_last()
                scope.cancel()
                return

    async def _stop(self, order: signal.Signals) -> None:
        self._stopping = True
        key, timeout_s = "on_restart" if order is RESTART else "on_stop", self.config.stop_timeout_s
        what = self.config.on_restart if order is RESTART else self.config.on_stop
        log.info("stopping", signal=order.name, **{key: what}, stop_timeout_s=timeout_s)
        self._tell(self.notifier.stopping, f"{key}: {what}")
        if order is RESTART and what == "keep":
            why = await why_nobody_adopts(self.config, self.config_path, self.host, list(self._guests.values()))
            if why:
                log.warning("restart_restores", why=why, action="bringing every guest back first, in spite of on_restart")
                what = "restore"
        self._keep_of_unserved()
        served = [guest for guest in self._guests.values() if guest.served]
        lacking = await without_their_files(served) if what == "keep" else set()
        guests = [
            guest
            for guest in served
            if what == "restore" or guest.key in lacking or guest.ends_with_us(order is RESTART)
        ]
        if not guests:
            return
        self._tell(self.notifier.extend_timeout, timeout_s + STOP_GRACE_S)
        self._end_at_last(timeout_s + END_S_MAX)
        with trio.move_on_after(timeout_s) as limit:
            async with trio.open_nursery() as nursery:
                for guest in guests:
                    nursery.start_soon(self._restore_for_stop, guest)
        if limit.cancelled_caught:
            log.error(
                "stop_timeout", stop_timeout_s=timeout_s, action="what is still stored is kept for the next tierd"
            )

    async def _restore_for_stop(self, guest: Guest) -> None:
        told_at = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal told_at
            if trio.current_time() - told_at > 1:
                told_at = trio.current_time()
                log.info("restoring", guest=guest.name, done_bytes=done, total_bytes=total)
                self._tell(self.notifier.status, f"restoring {guest.name}: {done >> 20} of {total >> 20} MiB")

        try:
            await guest.detach(progress)
        except (OSError, RequestRefused, StoreError) as error:
            log.error(
                "restore_failed",
                guest=guest.name,
                pid=guest.pid,
                error=str(error),
                action="its stored pages are kept for the next tierd",
            )

    async def _watch_guests(self) -> None:
        while True:
            for guest in list(self._guests.values()):
                guest.watch()
            self._tell_unseen()
            await trio.sleep(WATCH_S)

    @contextlib.contextmanager
    def _survives(self, what: str) -> Iterator[None]:
        """An error of the machine, too many open files say, never ends a daemon that serves guests. It is told once."""
        try:
            yield
        except OSError as error:
            self._not_done(what, error)
        else:
            self._survived.pop(what, None)

    def _not_done(self, what: str, error: OSError) -> None:
        if self._survived.get(what) != str(error):
            log.error("not_done", what=what, error=str(error), action="trying again")
        self._survived[what] = str(error)

    def _tell_unseen(self) -> None:
        unseen = self.host.holders.unseen
        if unseen and not self._unseen_told:
            log.warning("holders_unseen", processes=unseen, why=UNSEEN_WHY, action=UNSEEN_ACTION)
        self._unseen_told = self._unseen_told or bool(unseen)

    def _end_at_last(self, seconds: float = END_S_MAX) -> None:
        """By then every guest is left or kept. A call of the store that hangs is not waited for: to be kept, a guest needs
        nothing of us, and its successor waits for the lock that our last thread holds."""

        def end() -> None:
            log.warning("ended_in_a_call", action="a call of the store hangs; the next tierd waits for its end")
            os._exit(0)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

    async def _feed_watchdog(self) -> None:
        interval_s = watchdog_interval_s()
        while True:
            if interval_s:
                self._tell(self.notifier.watchdog)
            with self._survives("looking for VMMs that have ended"):
                self._forget_dead()
            # again for as long as the manager is busy: it keeps what it is not told to give up
            self._fds_to_remove = {key for key in self._fds_to_remove if not self._told_to_remove(key)}
            self._tell(self.notifier.status, self._summary())
            await trio.sleep(interval_s or 10)

    def _tell(self, send: Callable[..., bool], *args: Any) -> bool:
        """A message to the service manager. That its socket is full or gone never stops a daemon that serves guests."""
        try:
            send(*args)
        except OSError as error:
            if not self._manager_deaf:
                log.warning("notify_failed", error=str(error), action="trying again with the next message")
            self._manager_deaf = True
            return False
        self._manager_deaf = False
        return True

    async def _tell_ready(self) -> None:
        """The manager waits for this one: tried again for as long as it is busy."""
        for _ in range(READY_TRIES):
            if self._tell(self.notifier.ready, self._summary()):
                return
            await trio.sleep(0.1)

    def _summary(self) -> str:
        active = sum(1 for guest in self._guests.values() if guest.served)
        return f"engine {self.host.engine.name}: {active} guests served, {len(self._guests) - active} not"

    def _may_be_needed(self, key: str) -> bool:
        """Whether the stored pages of guest `key` may be the only copy of something: its VMM lives, served by us or not (a
        state file that was refused, another tierd on the same store), or its state file is there."""
        pid, _, ticks = key.partition("-")
        return _lives(int(pid), int(ticks)) or (self.host.guests_dir / (key + SUFFIX)).exists()

    # --- guests -------------------------------------------------------------------------------------------------------------

    async def _adopt_all(self) -> None:
        """Every guest whose state file a predecessor left. Faults of all of them are served before anything else starts."""
        async with trio.open_nursery() as nursery:
            for path in sorted(self.host.guests_dir.glob(f"*{SUFFIX}")):
                nursery.start_soon(self._adopt, path)
        for unfinished in self.host.guests_dir.glob("*.new"):
            with contextlib.suppress(OSError):  # what is no file is in the way of its guest only, which is told then
                unfinished.unlink()  # an attach that died; its state file, if it has one, has its own name
        self._forget_dead()

    def _forget_dead(self) -> None:
        """Descriptors of guests that are not served and gone by now. What VMMs brought holds their memory."""
        for key in (self.host.kept_uffds.keys() | self.host.kept_handed.keys()) - self._guests.keys():
            pid, _, ticks = key.partition("-")
            # a guest that lives may have been refused, or be of another runtime_dir: its pages hang on this descriptor
            if pid.isdecimal() and f"{start_ticks(int(pid))}" != ticks:
                self._forget_kept(key)

    def _told_to_remove(self, key: str) -> bool:
        return not self.notifier.address or self._tell(self.notifier.remove_fds, key)

    def _forget_kept(self, key: str) -> None:
        """Descriptors that the service manager kept for a guest that is gone or was left."""
        fd, handed = self.host.kept_uffds.pop(key, None), self.host.kept_handed.pop(key, None)
        if fd is not None:
            os.close(fd)
        if handed is not None:
            handed.close()
        if key in self._kept or key in self.host.at_manager:
            self._fds_to_remove.add(key)
            self._kept.discard(key)
            self.host.at_manager.discard(key)

    def _keep_of_unserved(self) -> None:
        """Guests that wait to be adopted again cannot be brought back: whatever their VMMs do, somebody has to have the
        userfaultfd that their pages hang on."""
        if not self.notifier.keeps_fds:
            return
        for key, fd in list(self.host.kept_uffds.items()):
            guest, told = self._guests.get(key), key in self.host.at_manager
            if guest and not guest.served and not told and self._tell(self.notifier.store_fds, key, [fd]):
                self.host.at_manager.add(key)

    async def _adopt(self, path: Path) -> None:
        self._running.add(key := path.name.removesuffix(SUFFIX))  # nobody attaches its VMM meanwhile
        try:
            guest = await in_thread(self._guest_of_state, path)
        except Stale as stale:
            swept = trio.Event()
            self._nursery.start_soon(self._sweep_at_start, key, stale, swept)
            with trio.move_on_after(ADOPT_S_MAX):
                await swept.wait()
            return
        except (StateError, Refused, OSError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                self._nursery.start_soon(self._adopt_later, path, error)
            else:
                self._running.discard(key)
                log.error("state_refused", path=str(path), error=str(error))
            return
        self._running.discard(key)
        self._begin(guest)
        self._nursery.start_soon(self._run_guest, guest)
        with trio.move_on_after(ADOPT_S_MAX):  # one whose store or predecessor hangs does not hold up the others
            await guest.begun.wait()

    async def _adopt_later(self, path: Path, error: OSError) -> None:
        self._not_done(f"adopting the guest of {path}", error)
        await trio.sleep(READOPT_S_MAX)
        if not self._stopping:
            await self._adopt(path)

    async def _sweep_at_start(self, key: str, stale: Stale, swept: trio.Event) -> None:
        await self._sweep_stale(stale)
        self._running.discard(key)
        swept.set()

    async def _sweep_stale(self, stale: Stale) -> None:
        """In a thread, because a store may hang, but to its end: a VMM that was left may be attached anew, and what that makes
        has the same names. Until then its key is taken."""
        log.info("state_swept", why=str(stale))
        with contextlib.suppress(OSError):  # the next start tries again
            await in_thread(stale.sweep)

    def _guest_of_state(self, path: Path) -> Guest:
        left = read_state(path, self.host.boot_id)
        spec = left.spec
        policy = self.config.match(spec.name, spec.pid, " ".join(spec.cmdline)) or self.config.defaults
        key = key_of(spec)
        return Guest(
            spec,
            policy,
            self.host,
            state_path=path,
            resumed=self._resumed.served.pop(key, None),
            kept_uffd=self.host.kept_uffds.get(key),
        )

    async def _discover(self) -> None:
        """Look for new VMMs. One pass over /proc reads only the processes that are new; after a reload, all."""
        while True:
            found: list[tuple[int, str, str]] = []
            with self._survives("looking for new VMMs"):
                found = await in_thread(lambda: list(self._discovery.new()))
            for pid, name, cmdline in found:
                policy = self.config.match(name, pid, cmdline)
                known = pid in self._picked or any(guest.pid == pid for guest in self._guests.values())
                if policy is not None and policy.enabled and not known and not self._stopping:
                    self._picked.add(pid)
                    self._nursery.start_soon(self._pick_up, pid, name, cmdline)
            await trio.sleep(self.config.discover_interval_s)

    async def _pick_up(self, pid: int, name: str, cmdline: str) -> None:
        try:
            await self._attach_in_time(pid, name, cmdline)
        except OSError as error:
            self._not_done(f"attaching process {pid}", error)
            self._discovery.forget()
        except Exception:  # a process may be made to mislead; a daemon that serves others goes on
            log.exception("attach_failed", guest=name, pid=pid, action="it is left alone until the next reload or start")
        finally:
            self._picked.discard(pid)

    async def _attach_in_time(self, pid: int, name: str, cmdline: str) -> None:
        """Attach a guest that the configuration names; try again while it does, its VMM lives and no operator has left it."""
        told = ""
        for delay_s in (*RETRY_S, *[RETRY_S_MAX] * 1_000_000):
            ticks = start_ticks(pid)
            policy = self.config.match(name, pid, cmdline)
            if ticks is None or self._stopping or f"{pid}-{ticks}" in self._left or not (policy and policy.enabled):
                break
            reason = await self._try_attach(pid, name, policy)
            if reason is None:
                return
            if reason != told and delay_s >= 1:
                told = reason
                log.warning("guest_refused", guest=name, pid=pid, reason=reason)
            await self._wait_to_try_again(pid, delay_s)
        self._forget_refused(pid)

    def _forget_refused(self, pid: int) -> None:
        for key in [key for key, guest in self._guests.items() if guest.pid == pid and key not in self._running]:
            del self._guests[key]

    def _is_served(self, key: str) -> bool:
        return key in self._guests and self._guests[key].served

    def _begin(self, guest: Guest) -> None:
        """Its key is this guest's alone, until the task that runs it ends. To be called without an await after the look at
        whether that is free."""
        assert guest.key not in self._running
        self._running.add(guest.key)
        self._guests[guest.key] = guest

    async def _try_attach(self, pid: int, name: str, policy: Any) -> str | None:
        """None when the guest was served (and is over), or is, because its VMM connected; else why not."""
        try:
            spec = await in_thread(read_spec, pid, name)
        except (Refused, OSError) as error:
            return str(error)
        key = key_of(spec)
        if key in self._running:
            return None if self._is_served(key) else f"guest {spec.name} is being attached or left just now"
        guest = Guest(spec, policy, self.host)
        self._begin(guest)
        return await self._run_guest(guest)

    async def _run_guest(self, guest: Guest) -> str | None:
        """Of a guest that _begin has noted. None: served and ended; else why it could not be served."""
        try:
            return await self._run_noted(guest)
        finally:
            self._running.discard(guest.key)
            if guest.key in self._offers:
                self._offers.pop(guest.key).take(None)

    async def _run_noted(self, guest: Guest) -> str | None:
        """The one frame that survives a guest's failure. None: served and ended; else why it could not be served.

        While there is a state file, pages may have left the guest, and adoption is what recovers from anything: a bug of
        ours, a store that is not mounted yet, a lock that is held too long. It is tried for as long as the VMM lives.
        """
        path, told, tries = self.host.guests_dir / (guest.key + SUFFIX), "", 0
        while True:
            try:
                ending = await guest.run()
            except Stale as stale:  # between the look at its state file and the adoption
                await self._sweep_stale(stale)
                with self._survives("removing keys of VMMs that have ended"):
                    await sweep_keys(self.host.guests_dir.parent, self._may_be_needed)
                self._guests.pop(guest.key, None)
                self._forget_kept(guest.key)
                return str(stale)
            except Exception as raised:
                error = _cause(raised)
                guest.refuse(error)
                expected = isinstance(error, Refused | StateError | StoreError | OSError)
                if not path.exists():
                    if not expected:
                        log.exception(
                            "attach_failed", guest=guest.name, pid=guest.pid, action="nothing of it was changed"
                        )
                    return guest.status().reason
                if not _lives(guest.pid, guest.spec.start_ticks):
                    await self._bury(guest, path)
                    return guest.status().reason
                delay_s = min(READOPT_S * 2**tries, READOPT_S_MAX)
                if told != str(error) and isinstance(error, AwaitsHandshake):
                    log.warning(
                        "guest_awaits_handshake",
                        guest=guest.name,
                        pid=guest.pid,
                        socket=str(self.config.handshake.socket),
                        action="its evicted pages wait until its VMM connects again"
                        if self.config.handshake.socket
                        else "set handshake.socket to the path that its VMM connects to, and restart tierd",
                    )
                elif told != str(error):
                    tell = log.error if expected else log.exception
                    tell(
                        "guest_not_served",
                        guest=guest.name,
                        pid=guest.pid,
                        error=str(error),
                        action=f"its evicted pages wait; adopting it again, every {READOPT_S_MAX:g} s at the latest",
                    )
                told, tries = str(error), tries + 1
                if guest.key not in self._offers:
                    await self._wait_to_try_again(guest.pid, delay_s)
                offer = self._offers.pop(guest.key, None)
                try:
                    handed = offer.hand.brought.handed.dup() if offer else self._handed_of(guest.key)
                except OSError as error:  # too many descriptors: the next try may have them
                    log.error("handed_not_taken", guest=guest.name, pid=guest.pid, error=str(error))
                    handed = None
                paused = guest.paused or self._stopping  # what stopping has brought back stays there
                guest = self._guests[guest.key] = Guest(
                    guest.spec,
                    guest.policy,
                    self.host,
                    path,
                    paused,
                    kept_uffd=self.host.kept_uffds.get(guest.key),
                    handed=handed,
                )
                if offer:
                    offer.take(guest)
                continue
            if ending is Ending.DETACHED:
                self._left.add(guest.key)
                if guest.key in self._hands:
                    self._hands[guest.key].left()
            if ending is not Ending.KEPT:
                self._forget_kept(guest.key)
            self._guests.pop(guest.key, None)
            return None

    async def _bury(self, guest: Guest, path: Path) -> None:
        """The VMM ended while its guest was not served: remove what was stored of it."""
        with contextlib.suppress(OSError):  # the next start tries again
            path.unlink(missing_ok=True)
            await sweep_keys(self.host.guests_dir.parent, self._may_be_needed)
            await self._stores.sweep()
        self._guests.pop(guest.key, None)
        self._forget_kept(guest.key)
        log.info("guest_ended", guest=guest.name, pid=guest.pid, how="the VMM ended while it was not served")

    # --- orders -------------------------------------------------------------------------------------------------------------

    async def attach(self, pid: int, name: str | None) -> GuestView:
        """Preflight and attach, whatever the rules say about names. Refused, OSError, RequestRefused."""
        return await self._attach(await in_thread(read_spec, pid, name), None)

    async def _attach(self, spec: GuestSpec, handed: Handed | None) -> Guest:
        """`handed` is the caller's."""
        key = key_of(spec)
        if key in self._running:
            now = "served already" if self._is_served(key) else "being attached, adopted or left"
            raise RequestRefused(f"guest {spec.name} (pid {spec.pid}) is {now}", "see `tierd status`")
        policy = self.config.match(spec.name, spec.pid, " ".join(spec.cmdline)) or self.config.defaults
        guest = Guest(spec, policy, self.host, handed=handed.dup() if handed else None)
        self._left.discard(key)
        self._begin(guest)
        self._nursery.start_soon(self._run_guest, guest)
        await guest.begun.wait()
        if not guest.served:
            raise RequestRefused(
                f"guest {spec.name} (pid {spec.pid}) was refused: {guest.status().reason}",
                "remove the cause and attach again",
            )
        return guest

    async def welcome(self, hand: Hand) -> str:
        """A VMM brought its descriptors: for a guest that is new, that waits for them, or that is served already (its old
        connection broke). Its key. Refused, RequestRefused, StateError, OSError: nothing was changed."""
        key = f"{hand.pid}-{start_ticks(hand.pid)}"
        if key in self._welcoming:
            raise RequestRefused(f"another connection of process {hand.pid} is being answered", "connect again")
        self._welcoming.add(key)
        try:
            return await self._welcome(key, hand)
        finally:
            self._welcoming.discard(key)

    async def _welcome(self, key: str, hand: Hand) -> str:
        if self._stopping:
            raise RequestRefused("tierd is stopping", "connect again when one runs")
        if key in self._guests:
            with trio.move_on_after(HAND_OVER_S_MAX):  # a try without these descriptors may be under way
                await self._guests[key].begun.wait()
        guest = self._guests.get(key)
        if guest is not None and guest.served:
            if not guest.spec.handshake:
                raise RequestRefused(f"guest {guest.name} was attached by its pid", "`tierd detach` it first")
            if not guest.came_again(hand.brought.handed):
                raise RequestRefused(f"guest {guest.name} is served with another userfaultfd", "send that one")
        elif guest is not None and not guest.begun.is_set():
            raise RequestRefused(f"a try to serve guest {guest.name} hangs", "see tierd's log; connect again")
        elif (self.host.guests_dir / (key + SUFFIX)).exists():
            guest = await self._hand_over(key, hand)
        else:
            spec = await in_thread(hand.spec)
            try:
                guest = await self._attach(spec, hand.brought.handed)
            except RequestRefused:  # the VMM is told; it may come again
                if key in self._guests and key not in self._running:
                    del self._guests[key]
                raise
        if key in self._hands:
            self._hands[key].replaced()
        self._hands[key] = hand
        if self.notifier.keeps_fds and self._tell(self.notifier.store_fds, key, hand.brought.handed.fds()):
            self._kept.add(key)  # a successor need not wait until the VMM comes again
        return guest.key

    async def _hand_over(self, key: str, hand: Hand) -> Guest:
        """To the task of a guest that is to be adopted, for its next try."""
        if key not in self._running:
            raise StateError(f"the state file of process {hand.pid} was refused; see tierd's log")
        offer = self._offers[key] = _Offer(hand)
        self._try_again(hand.pid)
        with trio.move_on_after(HAND_OVER_S_MAX):
            await offer.taken.wait()
            if offer.guest is None:
                raise StateError(f"process {hand.pid} was left, or its guest is over; connect again")
            await offer.guest.begun.wait()
            if offer.guest.served:
                return offer.guest
            raise StateError(offer.guest.status().reason)
        if self._offers.get(key) is offer:
            del self._offers[key]
        raise StateError(
            f"guest {self._guests[key].name} is being adopted: its store, or what is left of a predecessor, hangs"
            if key in self._guests
            else f"process {hand.pid} is no guest any more"
        )

    def _handed_of(self, key: str) -> Handed | None:
        """For another try at a guest: what its VMM's connection holds, or the service manager kept. The caller closes it."""
        if key in self._hands:
            return self._hands[key].brought.handed.dup()
        return self.host.kept_handed[key].dup() if key in self.host.kept_handed else None

    def gone(self, hand: Hand) -> None:
        """A VMM closed its connection. It is served on: whether it lives, its pidfd says."""
        for key in [key for key, other in self._hands.items() if other is hand]:
            del self._hands[key]

    async def detach(self, key: str, progress: Progress) -> None:
        guest = self._guests[key]
        if guest.served:
            await guest.detach(progress)
        elif (self.host.guests_dir / (key + SUFFIX)).exists():
            raise RequestRefused(
                f"guest {guest.name} is not served ({guest.status().reason}), but pages of it may be in the store",
                "remove the cause; tierd goes on trying to adopt it, and then it can be detached",
            )
        elif key in self._running:  # it must not be served and known to nobody
            raise RequestRefused(f"guest {guest.name} is being attached or left just now", "try again")
        else:
            self._left.add(key)
            self._guests.pop(key, None)
            self._try_again(guest.pid)

    async def _wait_to_try_again(self, pid: int, delay_s: float) -> None:
        again = self._waiting.setdefault(f"{pid}", trio.Event())
        with trio.move_on_after(delay_s):
            await again.wait()
        self._waiting.pop(f"{pid}", None)

    def _try_all_again(self) -> None:
        for event in self._waiting.values():
            event.set()

    def _try_again(self, pid: int) -> None:
        event = self._waiting.get(f"{pid}")
        if event is not None:
            event.set()

    async def reload(self) -> Sequence[str]:
        """Read the configuration again: whole, or ConfigErrors and nothing. OSError, and nothing: of the machine."""
        try:
            async with self._reloading:  # SIGHUP and the API: a store that is new must be made once
                told = await self._reload()
        except (ConfigErrors, OSError):
            self._reload_failed = True
            raise
        self._reload_failed = False
        return told

    async def _reload(self) -> Sequence[str]:
        new = await in_thread(load, self.config_path)
        self._must_keep_its_tiers(self._policies(new))
        opened: list[Store] = []
        if "memory" in named_stores(new) and "memory" not in self.host.stores:
            opened.append(memory_or_errors(self.config, self.config_path))
        had = {name for guest in self._guests.values() for name in guest.tier_names}
        async with contextlib.AsyncExitStack() as undone:
            for name in sorted(with_seconds(new, named_stores(new) | had) & new.asked.keys() - self.host.stores.keys()):
                asked = await asked_or_errors(name, new.asked[name], new.runtime_dir, self.config_path)
                undone.push_async_callback(asked.pages.aclose)
                opened.append(asked)
            policies = self._policies(new)  # that took a while
            self._must_keep_its_tiers(policies)
            undone.pop_all()
        for store in opened:
            self._stores.add(store)
        told = changes(self.config, new)
        self.config = new
        for key, policy in policies.items():
            guest = self._guests[key]
            if policy is not None:
                guest.set_policy(policy)
            elif guest.served:
                self._nursery.start_soon(self._detach_unmatched, guest)
        self._try_all_again()
        self._discovery.forget()  # a rule may be for a VM that none was for
        return told

    def _policies(self, config: Config) -> dict[str, Policy | None]:
        return {key: _policy_of(guest, config) for key, guest in self._guests.items()}

    def _must_keep_its_tiers(self, policies: Mapping[str, Policy | None]) -> None:
        """ConfigErrors: a tier would be taken from a guest that has pages in it."""
        errors = []
        for key, policy in policies.items():
            guest = self._guests[key]
            gone = (
                {tier.name for tier in guest.policy.tiers} - {tier.name for tier in policy.tiers} if policy else set()
            )
            errors += [
                ConfigError(
                    self.config_path,
                    0,
                    "tiers",
                    f"guest {guest.name} has {pages} pages in tier {name}, which its policy would have no more",
                    f"restore it first (`tierd restore {guest.name}`), or leave the tier with capacity: 0",
                )
                for name in sorted(gone)
                if (pages := guest.pages_in(name))
            ]
        if errors:
            raise ConfigErrors(errors)

    async def _detach_unmatched(self, guest: Guest) -> None:
        log.info("guest_unmatched", guest=guest.name, pid=guest.pid, action="bringing it back and leaving it")
        await self._restore_for_stop(guest)
        self._left.discard(guest.key)
        self._discovery.forget()  # its rule may be back

    async def _reload_and_tell(self) -> None:
        self._tell(self.notifier.reloading)
        try:
            told = await self.reload()
        except ConfigErrors as errors:
            for error in errors.errors:
                log.error("config_error", error=str(error))
            log.error("reload_failed", action="the old configuration stays in force")
        except OSError as error:  # no thread can be started
            log.error("reload_failed", error=str(error), action="the old configuration stays in force; try again")
        else:
            log.info("reloaded", changes=list(told))
        await self._tell_ready()

    def _unseen_notes(self) -> Sequence[str]:
        unseen = self.host.holders.unseen
        return [f"{unseen} processes were not looked at: {UNSEEN_WHY}; {UNSEEN_ACTION}"] if unseen else []

    def status(self) -> DaemonStatus:
        return DaemonStatus(
            version=__version__,
            engine=self.host.engine.name,
            engine_notes=[*self._engine_notes, *self._unseen_notes()],
            pid=os.getpid(),
            uptime_s=trio.current_time() - self._began,
            guests=[guest.status() for guest in self._guests.values()],
            stores=self._stores.status(),
            unserved=self._unserved(),
            reload_failed=self._reload_failed,
        )

    def _unserved(self) -> list[str]:
        served = {guest.key for guest in self._guests.values() if guest.served}
        tables = self.host.guests_dir.glob(f"*{SUFFIX}")
        return sorted(str(path) for path in tables if path.name.removesuffix(SUFFIX) not in served)


def _policy_of(guest: Guest, config: Config) -> Policy | None:
    """None: no rule is for it."""
    policy = config.match(guest.name, guest.pid, " ".join(guest.spec.cmdline))
    if policy is None and guest.spec.handshake:  # it came by itself: no rule need name it
        return config.defaults
    return policy


# without the values of local variables: they may hold guests' bytes
_TRACEBACKS = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)


def configure_logging(level: str, format: str) -> None:
    """structlog to stderr: for people on a terminal, JSON elsewhere (systemd, pipes)."""
    for_people = format == "console" or (format == "auto" and sys.stderr.isatty())
    numbers = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if for_people else [structlog.processors.ExceptionRenderer(_TRACEBACKS)]),
            structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numbers[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
    )


async def _run(config: Config, config_path: Path, resumed: Resumed) -> None:
    notifier = Notifier.from_environment()
    if resumed.runtime_dir != config.runtime_dir:
        resumed.close()
        resumed.lock = None
    guests_dir = prepare_runtime_dir(config.runtime_dir)
    lock = resumed.lock if resumed.lock is not None else lock_runtime_dir(config.runtime_dir)
    try:
        stores: dict[str, Store] = await open_stores(config, notifier)
        for store in stores.values():
            tell_trouble(store)
        kept = resumed.kept_uffds, set(resumed.kept_uffds), resumed.kept_handed
        host = Host(choose(config.engine), stores, guests_dir, boot_id(), HolderScan(), notifier, *kept)
        await Daemon(config, config_path, host, resumed).run()
    finally:
        resumed.close()
        os.close(lock)


def _cause(error: BaseException) -> BaseException:
    """What a nursery has wrapped."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _lives(pid: int, ticks: int) -> bool:
    """As far as that can be seen: with too many open files it cannot."""
    try:
        return start_ticks(pid) == ticks
    except OSError:
        return True


def main(config_path: Path, resumed: Resumed) -> int:
    """Run the daemon until it is told to stop; the exit status. One line on stderr says what keeps it from starting.
    `resumed` is taken over, and closed at the end."""
    config = load(config_path)  # ConfigErrors: the CLI prints them all
    configure_logging(config.log.level, config.log.format)
    try:
        trio.run(_run, config, config_path, resumed)
    except (StateError, StoreError, EngineUnavailable, AlreadyRunning, BaseExceptionGroup) as error:
        cause = _cause(error)
        from tierd.api import SocketUnusable  # only now: faults come first

        if not isinstance(
            cause, StateError | StoreError | EngineUnavailable | AlreadyRunning | SocketUnusable | OSError
        ):
            raise
        print(f"tierd: {cause}", file=sys.stderr)
        return 1
    return 0
