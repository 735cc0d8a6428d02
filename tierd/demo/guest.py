# SPDX-License-Identifier: Apache-2.0
"""A real QEMU guest that knows what its memory should hold (init.c), for the demo and for the tests.

Plain blocking code without threads. Everything here raises GuestError with a text for the operator.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

MIB = 1 << 20
Backing = Literal["memfd", "hugetlb", "anonymous"]
SLOWNESS = float(os.environ.get("TIERD_SLOWNESS", "1"))  # an emulated machine is given so many times as long
KVM_BOOT_S_MAX = 10.0 * SLOWNESS
BOOT_S_MAX = 60.0 * SLOWNESS
VERIFY_S_MAX = 60.0 * SLOWNESS
STOP_S_MAX = 10.0 * SLOWNESS
MEMORY_BYTES = 512 * MIB


class GuestError(Exception):
    """The guest cannot be built, does not boot, or does not answer."""


@dataclass(frozen=True)
class Platform:
    """What differs between the architectures that the guest is made for."""

    qemu: str
    machine: str
    cpu: str
    kvm_cpu: str  # without guests of its own: nested ones are refused
    console: str


PLATFORMS = {
    "x86_64": Platform("qemu-system-x86_64", "pc", "max", "host,vmx=off,svm=off", "ttyS0"),
    "aarch64": Platform("qemu-system-aarch64", "virt", "max", "host", "ttyAMA0"),
}


@dataclass(frozen=True)
class Boot:
    """A kernel, an initramfs with our init, and the kernel's command line."""

    kernel: Path
    initramfs: Path
    append: str


def this_platform() -> Platform:
    try:
        return PLATFORMS[platform.machine()]
    except KeyError:
        raise GuestError(f"the demo's guest is made for {' and '.join(PLATFORMS)}, not {platform.machine()}") from None


def find_kernel(directory: Path) -> Path:
    """The newest Debian cloud kernel in `directory` (tests/setup.sh unpacks one there), else in /boot."""
    for pattern in (directory.glob("vmlinuz-*"), Path("/boot").glob("vmlinuz-*cloud*")):
        if found := sorted(pattern, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]):
            return found[-1]
    raise GuestError(
        f"no kernel for the demo's guest: neither {directory}/vmlinuz-* nor /boot/vmlinuz-*cloud* exists; "
        "install linux-image-cloud-amd64 (or -arm64), or run `tests/setup.sh vm`"
    )


def _cpio_member(name: str, mode: int, data: bytes) -> bytes:
    """One file of an initramfs in the newc format (the kernel's early-userspace/buffer-format.rst)."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)


def build(directory: Path, **settings: int) -> Boot:
    """Compiles init.c into an initramfs in `directory`, where the kernel may lie as well. `settings` are init.c's:
    USED_PERCENT, ZERO_PERCENT, HOT_PERCENT, VERIFY_S, LIFE_S. Takes under a second; safe to run twice at once."""
    directory.mkdir(parents=True, exist_ok=True)
    kernel = find_kernel(directory)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise GuestError("no C compiler for the guest's init program: install gcc and libc6-dev")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        init, source = Path(scratch, "init"), Path(__file__).with_name("init.c")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-static", "-o", str(init), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise GuestError(f"the guest's init program does not compile (is libc6-dev installed?):\n{done.stderr}")
        archive = Path(scratch, "initramfs")
        archive.write_bytes(_cpio_member("init", 0o100755, init.read_bytes()) + _cpio_member("TRAILER!!!", 0, b""))
        archive.chmod(0o644)
        archive.replace(directory / "initramfs")
    words = [f"console={this_platform().console}", "quiet", "loglevel=1", "panic=-1"]
    words += [f"{name}={value}" for name, value in settings.items()]
    return Boot(kernel, directory / "initramfs", " ".join(words))


class Console:
    """The guest's serial line, from a socket whose other end is QEMU. Remembers the last lines for error messages."""

    LINES_MAX = 20

    def __init__(self, name: str, line: socket.socket) -> None:
        self.name = name
        self.socket = line
        self.wrong_bytes = 0  # the largest wrong= that any line said
        self.lines: list[str] = []
        self._partial = b""

    def send(self, command: str) -> None:
        try:
            self.socket.sendall(command.encode() + b"\n")
        except OSError as error:
            raise self._error(f"does not take {command!r} ({error.strerror})") from error

    def poll(self, timeout_s: float = 0.0) -> list[str]:
        """The lines that arrive within `timeout_s`, returning with the first ones. GuestError when QEMU is gone."""
        ready, _, _ = select.select([self.socket], [], [], max(0.0, timeout_s))
        if not ready:
            return []
        try:
            data = self.socket.recv(65536)
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._error("has ended")
        *complete, self._partial = (self._partial + data).split(b"\n")
        lines = [line.decode(errors="replace").strip() for line in complete]
        self.lines = (self.lines + lines)[-self.LINES_MAX :]
        for line in lines:
            self.wrong_bytes = max(self.wrong_bytes, numbers(line).get("wrong", 0))
        return lines

    def expect(self, word: str, timeout_s: float) -> dict[str, int]:
        """Waits for a line that begins with `word` and gives its NAME=NUMBER pairs. Lines before it are dropped,
        and so are later ones that came with it. GuestError after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            for line in self.poll(left_s):
                if line.startswith(word):
                    return numbers(line)
        raise self._error(f"did not say {word} within {timeout_s:.0f} s")

    def verify(self, timeout_s: float = VERIFY_S_MAX) -> tuple[int, int]:
        """Lets the guest compare all of its memory: bytes compared, and bytes found wrong since it started."""
        self.send("verify")
        said = self.expect("VERIFIED", timeout_s)
        return said["bytes"], said["wrong"]

    def _error(self, what: str) -> GuestError:
        said = "; it last said:\n  " + "\n  ".join(self.lines) if self.lines else "; it said nothing"
        return GuestError(f"guest {self.name} {what}{said}")


def numbers(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}


def memory_bytes(pid: int) -> int:
    """Host memory that the guest's RAM occupies: the blocks of QEMU's memfd, mapped or not, or else QEMU's anonymous memory, of
    which it has little of its own, but for the code that TCG makes. Needs the rights to look at `pid`'s descriptors."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if "/memfd:memory-backend-memfd" in os.readlink(entry):
                return os.stat(entry).st_blocks * 512
    smaps = Path(f"/proc/{pid}/smaps").read_text()
    if not smaps:
        raise GuestError(f"process {pid} has ended")
    anonymous = re.findall(r"^[0-9a-f]+-[0-9a-f]+ rw-p 00000000 00:00 0 *\n(?:[A-Z].*\n)*?Rss: +(\d+) kB", smaps, re.M)
    return sum(map(int, anonymous)) * 1024


class DemoGuest:
    """A running guest: `with DemoGuest(directory) as guest:`. Leaving the block ends QEMU, whatever happened.

    QEMU also dies with the *thread* that entered the block (PR_SET_PDEATHSIG), so that a killed demo or test leaves
    nothing behind: enter it in a thread that outlives the guest.

    accel: "kvm", "tcg", or "auto", which tries KVM for a bounded time, because on nested hosts a guest may hang in it.
    user: runs QEMU as this ordinary user, as libvirt does. backing: of its memory. "hugetlb": a memfd with pages of 2 MiB;
    "anonymous": private anonymous memory, QEMU's default.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "demo",
        *,
        memory_bytes: int = MEMORY_BYTES,
        accel: str = "auto",
        user: str | None = None,
        backing: Backing = "memfd",
        arguments: tuple[str, ...] = (),
        **settings: int,
    ) -> None:
        self.name = name
        self.memory_bytes = memory_bytes
        self.accel = accel
        self.used_bytes = 0  # memory that init fills and checks; known once the guest is ready
        self._boot = build(directory, **settings)
        self._user = user
        self._arguments = arguments
        self._backing = backing
        self._qemu: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None

    @property
    def pid(self) -> int:
        return self.qemu.pid

    @property
    def qemu(self) -> subprocess.Popen[bytes]:
        if self._qemu is None:
            raise GuestError(f"guest {self.name} was not started")
        return self._qemu

    @property
    def console(self) -> Console:
        if self._console is None:
            raise GuestError(f"guest {self.name} was not started")
        return self._console

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Boots until the guest's init runs. GuestError when it does not; QEMU may then still run, until stop()."""
        if self.accel == "auto":
            self.accel = "tcg"
            if os.access("/dev/kvm", os.R_OK | os.W_OK) and self._user is None:
                try:
                    self._launch("kvm")
                    self.console.expect("BOOTED", KVM_BOOT_S_MAX)
                    self.accel = "kvm"
                    return
                except GuestError:
                    self.stop()
        self._launch(self.accel)
        self.console.expect("BOOTED", BOOT_S_MAX)

    def _launch(self, accel: str) -> None:
        target = this_platform()
        qemu = shutil.which(target.qemu)
        if qemu is None:
            raise GuestError(f"{target.qemu} is not installed: install qemu-system-x86 (arm64: qemu-system-arm)")
        command = ["setpriv", "--pdeathsig", "KILL"]
        if self._user is not None:
            command += ["--reuid", self._user, "--regid", "nogroup", "--clear-groups"]
        with contextlib.ExitStack() as stack:
            # An ordinary user may not be able to reach the files by their paths.
            kernel = stack.enter_context(self._boot.kernel.open("rb")).fileno()
            initramfs = stack.enter_context(self._boot.initramfs.open("rb")).fileno()
            ours, theirs = socket.socketpair()
            stack.enter_context(theirs)
            command += [qemu, "-name", f"guest={self.name},debug-threads=on", "-nodefaults", "-no-user-config"]
            anonymous = self._backing == "anonymous"
            backend = "" if anonymous else ",memory-backend=ram"
            command += ["-machine", f"{target.machine}{backend}", "-accel", accel, "-smp", "1", "-no-reboot"]
            command += ["-cpu", target.kvm_cpu if accel == "kvm" else target.cpu, "-m", f"{self.memory_bytes}B"]
            huge = ",hugetlb=on,hugetlbsize=2M" if self._backing == "hugetlb" else ""
            if not anonymous:
                command += ["-object", f"memory-backend-memfd,id=ram,size={self.memory_bytes}B,share=on{huge}"]
            command += ["-kernel", f"/proc/self/fd/{kernel}", "-initrd", f"/proc/self/fd/{initramfs}"]
            command += ["-append", self._boot.append, "-display", "none", "-serial", "stdio", *self._arguments]
            self._console = Console(self.name, ours)
            line = theirs.fileno()
            self._qemu = subprocess.Popen(command, stdin=line, stdout=line, stderr=line, pass_fds=(kernel, initramfs))

    def wait_ready(self, timeout_s: float = BOOT_S_MAX) -> dict[str, int]:
        """Waits until the guest has filled its memory: the bytes `used`, of which `zero`, `cold`, `hot`."""
        said = self.console.expect("READY", timeout_s)
        self.used_bytes = said["used"]
        return said

    def resident_bytes(self) -> int:
        """GuestError: QEMU has ended; with the last that guest or QEMU said."""
        try:
            return memory_bytes(self.pid)
        except (GuestError, FileNotFoundError):
            for _ in range(Console.LINES_MAX):
                self.console.poll()  # its end says so, with what came before
            raise

    def verify(self, timeout_s: float = VERIFY_S_MAX) -> tuple[int, int]:
        """See Console.verify."""
        return self.console.verify(timeout_s)

    def stop(self) -> None:
        """Ends QEMU if it runs (SIGTERM, then SIGKILL if it has to be) and waits for its end. May be called again."""
        if self._console is not None:
            self._console.socket.close()
            self._console = None
        if self._qemu is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                self._qemu.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._qemu.wait(STOP_S_MAX)
                    break
            self._qemu = None

    def quit(self, timeout_s: float = STOP_S_MAX) -> int:
        """Lets the guest switch itself off; gives QEMU's exit status."""
        self.console.send("quit")
        self.console.expect("BYE", timeout_s)
        return self.qemu.wait(timeout_s)
