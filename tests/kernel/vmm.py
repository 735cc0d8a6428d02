# SPDX-License-Identifier: Apache-2.0
"""A child process that plays the VMM, and tierd attached to it as the daemon would: the real userfaultfd, the real store."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.kernel.forced import ForcedEngine, Options, stores_of
from tests.need import need
from tierd import cycle
from tierd.attach import GuestSpec
from tierd.attach.holders import HolderScan
from tierd.attach.preflight import preflight, swap_can_receive
from tierd.attach.procfs import boot_id, read_spec
from tierd.config import Policy
from tierd.engine import choose, fitting
from tierd.engine.stock import StockEngine
from tierd.native import GUEST_TIER, STAGING_TIER, STATES, NativeBatch, NativeGuest, probe
from tierd.serve import Served, adopt, attach, prepare_runtime_dir

HERE = Path(__file__).parent
PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20
VMM_SOURCES = ("vmm.c", "vmm_hazards.c", "vmm_handshake.c", "child.c")
SLOWNESS = float(os.environ.get("TIERD_SLOWNESS", "1"))
ANSWER_S_MAX = 60.0 * SLOWNESS
ARRIVING = STATES.index("arriving")
WNOTHREAD = 0x20000000  # wait(2): only children of the calling thread
SAFE = Policy(min_idle_s=0.1, unsafe_min_idle=True, interval_s=0.1)


def need_anonymous() -> None:
    need(
        "anonymous",
        "anonymous" in StockEngine(probe(), tried=False).backings,
        f"private anonymous memory cannot be tiered on this kernel: {os.strerror(probe().anonymous)}",
    )


def compile_child(output: Path, *sources: str, static: bool = False) -> Path:
    """Or the program of that name in the directory TIERD_TEST_PROGRAMS, for machines on which a compiler takes minutes."""
    if (ready := Path(os.environ.get("TIERD_TEST_PROGRAMS") or "/nonexistent") / output.name).exists():
        return ready
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *(str(HERE / name) for name in sources)]
    command += ["-static"] if static else []
    done = subprocess.run([*command, "-o", str(output), "-pthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """What `condition` says once it is true; fails after `seconds` (times TIERD_SLOWNESS, of an emulated machine)."""
    until = time.monotonic() + seconds * SLOWNESS
    while not (result := condition()):
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)
    return result


class Vmm:
    """A running child (vmm.c or kvm_vcpu.c). `with` ends it and fails if it ever read a wrong value."""

    def __init__(self, binary: Path, *arguments: str, arg0: str | None = None, **options: Any) -> None:
        size = next((argument[6:] for argument in arguments if argument.startswith("bytes=")), str(64 * MIB))
        self.anonymous = "kind=anonymous" in arguments
        if self.anonymous:  # by its size RAM is told from other memory of that kind
            arguments = (*arguments, "-m", f"{size}B")
        self.process = subprocess.Popen(
            [arg0 or str(binary), *arguments],
            executable=binary,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            **options,
        )
        self._unread = b""
        self.wrong: list[str] = []
        first = self._answer()
        self.pages, self.page_bytes = int(first[1]), int(first[2])
        self.addresses = [int(address, 16) for address in first[3:]]

    @property
    def pid(self) -> int:
        return self.process.pid

    def _line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_S_MAX)
            assert ready, f"the VMM said nothing for {ANSWER_S_MAX:g} s"
            more = os.read(self.process.stdout.fileno(), 65536)
            assert more, "the VMM ended"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def _answer(self) -> list[str]:
        while (line := self._line()).startswith("WRONG"):
            self.wrong.append(line)
        fields = line.split()
        assert fields[0] == "ok", line
        return fields

    def ask(self, command: str, *arguments: int) -> list[int]:
        """Numbers that the child answers with. Fails on an error of its."""
        self.send(command, *arguments)
        return [int(word, 0) for word in self._answer()[1:] if "=" not in word]

    def answered(self) -> bool:
        """Whether the answer to `send` is there, which is taken; never of a child that has ended."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], 0)[0]:
            self._unread += os.read(self.process.stdout.fileno(), 65536)
        if b"ok" not in self._unread:
            return False
        self._answer()
        return True

    def send(self, command: str, *arguments: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join([command, *map(str, arguments)]).encode() + b"\n")

    def stats(self) -> dict[str, int]:
        self.send("stats")
        return {key: int(value) for key, _, value in (word.partition("=") for word in self._answer()[1:])}

    def verify(self) -> None:
        """Every byte of the guest is what it must be."""
        checked, wrong = self.ask("verify")
        assert checked
        assert not wrong, self.wrong[:3]

    def spec(self) -> GuestSpec:
        return read_spec(self.pid, "test")

    def kill(self) -> None:
        """SIGKILL, and wait for the end. Not Popen's: a thread of ours may trace the child, and Popen takes any of its stops
        for the end, does not kill, and waits for ever."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # the tracer may have seen the end first
                os.kill(self.pid, signal.SIGKILL)
                os.waitid(os.P_PID, self.pid, os.WEXITED | WNOTHREAD)
            self.process.returncode = -signal.SIGKILL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.kill()
        rest = self._unread + (self.process.stdout.read() if self.process.stdout else b"")
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.wrong += [line for line in rest.decode().splitlines() if line.startswith("WRONG")]
        if kind is None:
            assert not self.wrong


@dataclass
class Tiered:
    """A served guest and the steps of its cycle, as tierd/guest.py takes them."""

    vmm: Vmm
    served: Served
    options: Options

    @property
    def native(self) -> NativeGuest:
        return self.served.native

    def counters(self) -> dict[str, Any]:
        return self.native.counters()

    @property
    def stored_pages(self) -> int:
        """In the staging area, too."""
        return int(self.counters()["state_pages"][4])

    @property
    def arriving_pages(self) -> int:
        """A page's word comes after its bytes, and so after whoever waited for them."""
        return int(self.counters()["state_pages"][ARRIVING])

    @property
    def staged_pages(self) -> int:
        return int(self.counters()["tier_pages"][STAGING_TIER])

    def scan(self) -> cycle.Touched:
        return cycle.scan_and_deactivate(self.native, self.options.phases, lambda: None)

    def stage(self, interval_s: float = 0.0, *, scan: bool = True) -> int:
        """Of anonymous memory: pages moved into the staging area, of all that were not written for so long (twice). Those that
        take space in the store leave again only when that is given back, and none that was written since the last scan."""
        if scan:
            self.scan()
        self.discard()
        cycle.unstage(self.native, lambda: None)
        return cycle.stage(
            self.native,
            cycle.Staging.whole(self.native),
            interval_s=interval_s,
            min_idle_s=0.0,
            stall_budget=1.0,
            phases=self.options.phases,
            check=lambda: None,
        )

    def evict(
        self,
        min_idle_s: float = 0.0,
        max_bytes: int = 1 << 50,
        *,
        stage: bool = True,
        bytes_per_s: float | None = None,
        tiers: Sequence[str] | None = None,
    ) -> int:
        """Pages evicted of those that are idle so long. Of anonymous memory: everything is staged before. `tiers`: None: all."""
        if self.native.anonymous and stage:
            self.stage()
        numbers = [tier.number for name, tier in self.served.tiers.items() if tiers is None or name in tiers]
        return (
            cycle.evict(
                self.native,
                min_idle_s=min_idle_s,
                max_bytes=max_bytes,
                tiers=numbers,
                hold_ms_max=20,
                phases=self.options.phases,
                check=lambda: None,
                keep=numbers,
                bytes_per_s=bytes_per_s,
            )
            // self.native.page_bytes
        )

    def store_copies(self, batch: NativeBatch, pages: int) -> None:
        """As far as a window: so many are selected, copied and stored in the file."""
        assert batch.select(GUEST_TIER, 0, 0.0, pages, [1]).selected_pages == pages
        batch.copy()
        batch.write([1])
        batch.store()
        batch.stored()

    def cycle_until(self, evicted_pages: int, fetches: int) -> None:
        """Without a pause, under a guest that works, until so much has happened."""

        def much_happened() -> bool:
            self.scan()
            self.evict()
            self.discard()
            c = self.counters()
            return bool(c["pages_evicted"] > evicted_pages and c["faults_fetch"] > fetches)

        wait_for(much_happened, f"{fetches} fetches", seconds=60)

    def evict_all(self, but_pages: int = 0) -> None:
        """Everything that was ever touched, but at most so many pages; the guest must be at rest."""

        cpus = os.sched_getaffinity(0)

        def done() -> bool:
            # a new page waits in a batch of the CPU that made it, and MADV_PAGEOUT passes over it unless called there
            for cpu in cpus:
                os.sched_setaffinity(0, {cpu})
                self.scan()  # each time: a page that the kernel could not unmap at once counts as touched
            self.evict()
            c = self.counters()
            staged = c["tier_pages"][STAGING_TIER]
            return bool(c["state_pages"][0] <= c["untouched_pages"] + but_pages and not staged)

        try:
            wait_for(done, "every touched page evicted")
        finally:
            os.sched_setaffinity(0, cpus)

    def demote(self, tier: str, min_idle_s: float = 0.0, max_bytes: int = 1 << 50) -> int:
        """Pages that sink from a tier to those below it."""
        above = self.served.tiers[tier].number
        moved = cycle.demote(
            self.native,
            above,
            [below.number for below in self.served.tiers.values() if below.number > above],
            min_idle_s=min_idle_s,
            max_bytes=max_bytes,
            phases=self.options.phases,
            check=lambda: None,
        )
        return moved // self.native.page_bytes

    def pages_in(self, tier: str) -> int:
        return int(self.counters()["tier_pages"][self.served.tiers[tier].number])

    def discard(self) -> int:
        return cycle.discard_fetched(self.native, self.options.phases, lambda: None)

    def restore_all(self) -> None:
        while self.stored_pages:
            self.native.restore(0, 1 << 40)

    def leave(self) -> None:
        self.restore_all()
        self.served.leave()


@dataclass
class Host:
    """What the daemon has: a directory for state files and a store."""

    tmpfs_dir: Path
    disk_dir: Path

    @contextlib.contextmanager
    def attached(
        self, vmm: Vmm, policy: Policy = SAFE, *, in_spite_of_preflight: bool = False, **changes: Any
    ) -> Iterator[Tiered]:
        options = Options(**changes)
        spec = vmm.spec()
        if not in_spite_of_preflight:
            preflight(spec, policy, HolderScan(), fitting(choose(), spec.anonymous))
        served = attach(
            spec,
            engine=ForcedEngine(options, spec.anonymous),
            stores=stores_of(options, self.tmpfs_dir, self.disk_dir),
            guests_dir=prepare_runtime_dir(self.tmpfs_dir),
            tuning=options.tuning(policy.min_idle_s),
            swap_can_receive=swap_can_receive(vmm.pid),
            capacity_bytes=options.capacity_bytes,
        )
        with served:
            yield Tiered(vmm, served, options)

    @contextlib.contextmanager
    def adopted(
        self, vmm: Vmm, *, kept_uffd: int | None = None, lock_s_max: float = 60.0, **changes: Any
    ) -> Iterator[Tiered]:
        """As the predecessor was, but for what is said here of the engine and the capacity."""
        options = Options(**changes)
        (path,) = (self.tmpfs_dir / "guests").glob("*.state")
        served = adopt(
            path,
            engine=ForcedEngine(options, vmm.anonymous),
            swap_can_receive=swap_can_receive(vmm.pid),
            capacity_bytes=options.capacity_bytes,
            boot_id=boot_id(),
            kept_uffd=kept_uffd,
            lock_s_max=lock_s_max,
        )
        with served:
            yield Tiered(vmm, served, options)


def vm_flags(pid: int, address: int) -> set[str]:
    """VmFlags of the mapping at `address`."""
    found = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            start, _, end = head.partition("-")
            found = int(start, 16) <= address < int(end, 16)
        elif found and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:#x}")


def userfaultfds(pid: int) -> Sequence[str]:
    """Descriptors of the process that are userfaultfds."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "userfaultfd" in os.readlink(entry):
                found.append(entry.name)
    return found
