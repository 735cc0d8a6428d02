# SPDX-License-Identifier: Apache-2.0
"""`tierd demo`: boot a guest, let the real daemon tier it, let the guest verify every byte.

Plain blocking code: guest and daemon are processes, and the daemon is asked over its API as anybody else would.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import yaml

from tierd.attach.procfs import read_proc
from tierd.client import Client, Unreachable
from tierd.demo.display import MIB, Display, Sample, choose, tiers_text
from tierd.demo.guest import MEMORY_BYTES, SLOWNESS, Backing, DemoGuest, numbers
from tierd.demo.redis import RedisMissing, RedisServer
from tierd.show import latency_text, quantile_us

NAME = "demo"
DEMO_S_MAX = 115.0 * SLOWNESS
ACTIVE_S_MAX = 20.0 * SLOWNESS  # from the daemon's start to a served guest
FALL_S_MAX = 60.0 * SLOWNESS  # from there to the low point
STOP_S_MAX = 20.0 * SLOWNESS
SETTLED_S = 6.0  # at the low point: no 1 % was given back for this long
VERIFY_S = round(45 * SLOWNESS)  # the guest's own timer
POLL_S = 0.25
GIVEN_BACK_RATIO_MIN = 0.4

# Short times, so that there is something to see. A min_idle_s below 120 s is safe only where no direct I/O can be under
# way in guest memory: this guest has no disk.
POLICY = {
    "interval_s": 1,
    "idle_intervals": 3,
    "min_idle_s": 3,
    "unsafe_min_idle": True,
    "evict_rate_max": "64MiB/s",  # it would be over in a second
}
TIERS: dict[str, Any] = {"memory": {"name": "memory", "capacity": "24MiB"}}  # small, so that pages sink


class DemoError(Exception):
    """The demo cannot go on; the text is for the operator."""


@dataclass(frozen=True)
class Result:
    """What the demo found. `given_back` and `tiers` are those of the low point; memory is counted in blocks of the
    guest's memfd, mapped or not, and of its pool: what compressed memory takes was not given back."""

    guest_used_bytes: int
    given_back_bytes: int
    given_back_ratio: float
    faults: int
    fault_p50_us: float | None  # None: there were no faults
    fault_p99_us: float | None
    verified_bytes: int
    wrong_bytes: int
    engine: str
    tiers: dict[str, int]  # stored bytes by tier
    staged_read_ratio: float | None  # of private anonymous memory; see Sample
    accel: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.wrong_bytes == 0 and self.verified_bytes > 0 and self.given_back_ratio >= GIVEN_BACK_RATIO_MIN


def filesystem(path: Path) -> str:
    """The type of the file system mounted at `path`; "" where none is."""
    for line in read_proc("/proc/self/mountinfo").split("\n"):
        before, _, after = line.partition(" - ")
        if before and before.split(" ")[4] == str(path):
            return after.split(" ")[0]
    return ""


class Tierd:
    """The real daemon, with the shipped configuration but for places and short times: `with Tierd(...) as tierd:`.
    Leaving the block stops it as systemd would (SIGTERM: everything is brought back first)."""

    def __init__(
        self,
        shipped: Path | None,
        directory: Path,
        runtime_dir: Path,
        pid: int,
        tiers: Sequence[str],
        stores: Mapping[str, Any],
    ) -> None:
        self._log = directory / "tierd.log"
        self._config = directory / "tierd.yaml"
        self._pid = pid
        socket = runtime_dir / "tierd.sock"
        settings: dict[str, Any] = (yaml.safe_load(shipped.read_text()) if shipped else None) or {}
        settings |= {"runtime_dir": str(runtime_dir), "guests_dir": "guests.d", "guests": [], "metrics": {}}
        settings["api"] = {**(settings.get("api") or {}), "socket": str(socket)}
        settings["store"] = {**(settings.get("store") or {}), "path": str(directory / "store")}
        settings["stores"] = dict(stores)
        self._config.write_text(yaml.safe_dump(settings))
        guests = directory / "guests.d"
        guests.mkdir()
        # by pid as well: another demo's guest has the same name
        (guests / "demo.yaml").write_text(
            yaml.safe_dump({"name": NAME, "pid": pid, **POLICY, "tiers": [TIERS.get(tier, tier) for tier in tiers]})
        )
        self._daemon: subprocess.Popen[bytes] | None = None
        self._socket = socket

    def __enter__(self) -> Self:
        # it ends with us, too, in its own orderly way
        daemon = [sys.executable, "-m", "tierd", "run", "--config", str(self._config)]
        command = ["setpriv", "--pdeathsig", "TERM", *daemon]
        with self._log.open("wb") as log:
            self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._daemon is not None
        self._daemon.terminate()
        try:
            status = self._daemon.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
            raise DemoError(f"tierd did not stop within {STOP_S_MAX:.0f} s; its log ends:\n{self.log()}") from error
        if status and error is None:
            raise DemoError(f"tierd ended with status {status}; its log ends:\n{self.log()}")

    def guest(self) -> dict[str, Any] | None:
        """What tierd says of our guest, None while it knows of none. DemoError when the daemon has ended."""
        assert self._daemon is not None
        if self._daemon.poll() is not None:
            raise DemoError(f"tierd ended with status {self._daemon.returncode}; its log ends:\n{self.log()}")
        try:
            with Client(self._socket) as client:
                guests = client.get("/guests")["guests"]
        except Unreachable:  # not yet listening
            return None
        return next((guest for guest in guests if guest["pid"] == self._pid), None)

    def log(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])


class Demo:
    """A guest, perhaps a tierd that serves it, and what was seen of both so far."""

    def __init__(self, guest: DemoGuest, display: Display, deadline: float) -> None:
        self.tierd: Tierd | None = None
        self.used_bytes = guest.resident_bytes()
        self.low = Sample(self.used_bytes, self.used_bytes)
        self.status: dict[str, Any] = {}  # what tierd said last
        self._guest, self._display, self._deadline = guest, display, deadline

    def wait_served(self) -> None:
        limit = time.monotonic() + ACTIVE_S_MAX
        while time.monotonic() < limit:
            self._look()
            if self.status.get("state") == "active":
                return
            self._guest.console.poll(POLL_S)
        reason = f"{self.status['state']}: {self.status['reason']}" if self.status else "it does not see the guest"
        raise self._error(f"tierd does not serve the guest after {ACTIVE_S_MAX:.0f} s ({reason})")

    def wait_low(self) -> None:
        """Until memory has stopped falling for a while."""
        limit = min(time.monotonic() + FALL_S_MAX, self._deadline - 2 * STOP_S_MAX)
        mark, settled = self.used_bytes, limit
        while time.monotonic() < min(settled, limit):
            self._guest.console.poll(POLL_S)
            self._look()
            if self.low.resident_bytes < mark - self.used_bytes // 100:
                mark, settled = self.low.resident_bytes, time.monotonic() + SETTLED_S

    def verify(self) -> int:
        """The guest compares everything, while we go on looking. Bytes compared."""
        self._guest.console.send("verify")
        while (left_s := self._deadline - time.monotonic()) > 0:
            lines = self._guest.console.poll(min(POLL_S, left_s))
            self._look()
            for line in lines:
                if line.startswith("VERIFIED"):
                    return numbers(line)["bytes"]
        raise self._error("the guest did not finish its verification in time")

    def _look(self) -> None:
        stored: dict[str, int] = {}
        pool_bytes = 0
        if self.tierd is not None:
            self.status = self.tierd.guest() or self.status
            stored = self.status.get("stored_bytes", {})
            pool_bytes = sum(tier["used_bytes"] for tier in self.status.get("tiers", ()) if tier["name"] == "memory")
        counters = self.status.get("counters", {})
        staged = counters.get("pages_staged", 0)
        sample = Sample(
            resident_bytes=self._guest.resident_bytes() + pool_bytes,
            used_bytes=self.used_bytes,
            tiers={name: size for name, size in stored.items() if size},
            faults=counters.get("latency_count", 0),
            staged_read_ratio=round(counters["pages_refaulted"] / staged, 4) if staged else None,
        )
        if sample.resident_bytes < self.low.resident_bytes:
            self.low = sample
        self._display.show(sample)

    def _error(self, what: str) -> DemoError:
        return DemoError(f"{what}; its log ends:\n{self.tierd.log()}" if self.tierd else what)


def _show(
    guest: DemoGuest, config: Path | None, directory: Path, tiers: Sequence[str], display: Display, began: float
) -> Result:
    """The demo from a guest that was just started."""
    deadline = began + DEMO_S_MAX
    said = guest.wait_ready(deadline - time.monotonic())
    demo = Demo(guest, display, deadline)
    display.say(
        f"it uses {demo.used_bytes / MIB:.0f} MiB of host memory and can check {said['used'] / MIB:.0f} MiB of it: "
        f"{said['cold'] / MIB:.0f} cold, {said['hot'] / MIB:.0f} in use, {said['zero'] / MIB:.0f} zeros"
    )
    with (
        _places(directory) as (scratch, runtime_dir),
        _stores(scratch, tiers) as stores,
        Tierd(config, scratch, runtime_dir, guest.pid, tiers, stores) as demo.tierd,
    ):
        display.say("starting tierd")
        demo.wait_served()
        display.say(f"tierd serves it (engine {demo.status['engine']}): what the guest does not touch leaves memory")
        demo.wait_low()
        display.say(f"low point: {demo.low.given_back_bytes / MIB:.0f} MiB given back; the guest verifies every byte")
        verified_bytes = demo.verify()
        display.say(f"{verified_bytes / MIB:.0f} MiB verified, {guest.console.wrong_bytes} bytes wrong; stopping tierd")
    demo.tierd = None
    demo.verify()
    display.say(f"verified again without tierd: {guest.console.wrong_bytes} bytes wrong")
    counters = demo.status["counters"]
    return Result(
        guest_used_bytes=demo.used_bytes,
        given_back_bytes=demo.low.given_back_bytes,
        given_back_ratio=round(demo.low.given_back_bytes / demo.used_bytes, 4),
        faults=counters["latency_count"],
        fault_p50_us=quantile_us(counters["latency_buckets"], 0.50),
        fault_p99_us=quantile_us(counters["latency_buckets"], 0.99),
        verified_bytes=verified_bytes,
        wrong_bytes=guest.console.wrong_bytes,
        engine=demo.status["engine"],
        tiers=dict(demo.low.tiers),
        staged_read_ratio=demo.low.staged_read_ratio,
        accel=guest.accel,
        seconds=round(time.monotonic() - began, 1),
    )


@contextlib.contextmanager
def _places(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Directories of the demo's own: on a disk for the store, on a tmpfs for tierd's state."""
    tmpfs = next((path for path in (Path("/run"), Path("/dev/shm")) if filesystem(path) == "tmpfs"), None)
    if tmpfs is None:
        raise DemoError("neither /run nor /dev/shm is a tmpfs, and tierd's state must not be on a disk: mount one")
    with (
        tempfile.TemporaryDirectory(prefix="demo-", dir=directory) as scratch,
        tempfile.TemporaryDirectory(prefix="tierd-demo-", dir=tmpfs) as runtime_dir,
    ):
        yield Path(scratch), Path(runtime_dir)


@contextlib.contextmanager
def _stores(scratch: Path, tiers: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """What the tiers need beside memory and a disk: the section `stores`."""
    if "redis" not in tiers:
        yield {}
        return
    try:
        with RedisServer(scratch) as server:
            yield server.settings
    except RedisMissing as error:
        raise DemoError(str(error)) from error


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM leaves the blocks as Ctrl-C does, so that guest, tierd and directories go away."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def summary(result: Result) -> str:
    verdict = "every byte was right" if result.wrong_bytes == 0 else f"{result.wrong_bytes} BYTES WERE WRONG"
    staged = result.staged_read_ratio
    return "\n".join(
        [
            f"guest            {result.guest_used_bytes / MIB:.0f} MiB of host memory in use ({result.accel})",
            f"given back       {result.given_back_bytes / MIB:.0f} MiB at the low point, {result.given_back_ratio:.0%}",
            f"stored there     {tiers_text(result.tiers)}",
            *([] if staged is None else [f"read after all   {staged:.2%} of what was moved into the staging area until then"]),
            f"faults           {result.faults}, p50 {latency_text(result.fault_p50_us)}, "
            f"p99 {latency_text(result.fault_p99_us)}",
            f"verified         {result.verified_bytes / MIB:.0f} MiB: {verdict}",
            f"engine           {result.engine}",
            f"took             {result.seconds:.0f} s",
        ]
    )


def run_demo(
    json: bool,
    directory: Path,
    config: Path | None = None,
    accel: str = "auto",
    memory_bytes: int = MEMORY_BYTES,
    backing: Backing = "memfd",
    tiers: Sequence[str] = ("memory", "file"),
) -> int:
    """The whole demo, under two minutes; main thread only. The exit status: 0 if the guest verified every byte and at
    least 40 % of its memory was given back at the low point, else 1. DemoError or GuestError when it does not come that
    far; nothing of it is left running or on disk either way.

    json: the result as one JSON object on the last line of standard output; progress goes to standard error.
    directory: for the guest's files (its kernel is looked for there first) and the store; not on a tmpfs.
    config: the shipped tierd.yaml, of which places and times are changed. None: tierd's defaults.
    memory_bytes: of the guest; backing: see DemoGuest; tiers: its policy's.
    """
    if os.geteuid() != 0:
        raise DemoError("the demo needs root, as tierd does (ptrace, userfaultfd): run it with sudo")
    began = time.monotonic()
    with _terminated_in_order(), choose(json) as display:
        guest = DemoGuest(directory, NAME, memory_bytes=memory_bytes, accel=accel, backing=backing, VERIFY_S=VERIFY_S)
        display.say("booting a virtual machine under an unmodified QEMU")
        with guest:
            result = _show(guest, config, directory, tiers, display, began)
    if json:
        print(dumps(asdict(result)), flush=True)
    else:
        print(summary(result), flush=True)
    if result.given_back_ratio < GIVEN_BACK_RATIO_MIN:
        print(f"tierd: less than {GIVEN_BACK_RATIO_MIN:.0%} was given back", file=sys.stderr)
    return 0 if result.good else 1
