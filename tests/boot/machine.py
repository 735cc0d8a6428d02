# SPDX-License-Identifier: Apache-2.0
"""A machine in which a real systemd starts the unit of this repository: systemd-nspawn over build/boot/root.

Everything that it writes is on an overlay or in directories of the test. It has namespaces of its own, the one for pids
among them, whose first process is killed with us: whatever happens to the test, nothing of the machine goes on running.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from tests.daemon.process import POLICY, guests_at
from tests.kernel.vmm import Vmm, wait_for

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_THERE = "/opt/tierd/lib/python3.11/site-packages/tierd"
BOOT_S_MAX = END_S_MAX = 60.0
UNITS = "/usr/local/lib/systemd/system"
BINARIES = "/usr/local/lib/tierd-test"
_numbers = itertools.count()

# The host may have cgroup v1, v2 or both, and systemd inside shall have v2; what nspawn writes to /run/systemd goes
# with the namespace. Its filter of system calls is off: tierd rightly refuses a VMM that has a filter it does not know.
START = """
set -e
umount --recursive /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup/$1"
echo $$ > "/sys/fs/cgroup/$1/cgroup.procs"
mkdir -p /run/systemd
mount -t tmpfs none /run/systemd
shift
export SYSTEMD_SECCOMP=0 SYSTEMD_NSPAWN_LOCK=0
exec systemd-nspawn "$@"
"""


class MachineError(Exception):
    """It did not start; the text says why."""


class Machine:
    """`with Machine(root, tmpfs_dir, disk_dir, vmm_binary) as machine:` boots it; leaving the block ends it."""

    def __init__(self, root: Path, tmpfs_dir: Path, disk_dir: Path, vmm_binary: Path) -> None:
        self.name = f"tierd-boot-{os.getpid()}-{next(_numbers)}"
        self.leader = 0  # its process 1, as we see it
        self.process: subprocess.Popen[bytes] | None = None
        self._notify = tmpfs_dir / "notify"
        self._log = disk_dir / "nspawn.log"
        self._root, self._disk_dir = root, disk_dir
        self.etc, self.store, self.units, self.binaries, self.journal_dir = (
            disk_dir / name for name in ("etc", "store", "units", "bin", "journal")
        )
        for directory in (self.etc, self.store, self.units, self.binaries, self.journal_dir):
            directory.mkdir(0o700 if directory is self.store else 0o755)
        disk_dir.chmod(0o755)
        shutil.copy(ROOT / "systemd" / "tierd.service", self.units)
        shutil.copy(vmm_binary, self.binaries / "qemu-system-test")
        self.configure()

    # --- from boot to end ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        places = {
            f"{ROOT}/tierd": PACKAGE_THERE,
            f"{ROOT}/systemd/tierd.sysusers.conf": "/etc/sysusers.d/tierd.conf",
            str(self.units): UNITS,
            str(self.binaries): BINARIES,
            str(self.etc): "/etc/tierd",
        }
        options = ["--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe"]
        options += [f"--machine={self.name}", f"--directory={self._root}", "--volatile=overlay", "--boot"]
        options += [f"--bind-ro={here}:{there}" for here, there in places.items()]
        options += [f"--bind={self.store}:/var/lib/tierd", f"--bind={self.journal_dir}:/var/log/journal"]
        options += ["--bind=/dev/userfaultfd", "--notify-ready=yes"]
        namespaces = ["--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sh", "-c", START, "sh"]
        command += [self.name, *options]
        environment = {**os.environ, "NOTIFY_SOCKET": str(self._notify)}
        with contextlib.ExitStack() as undo:
            ready = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            ready.bind(str(self._notify))
            ready.settimeout(0.1)
            with self._log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
                )
            failed = contextlib.ExitStack()
            undo.enter_context(failed)
            failed.callback(self._end)
            wait_for(lambda: self._is_ready(ready), "the machine has booted", BOOT_S_MAX)
            (nspawn,) = _children(self.process.pid)
            (self.leader,) = _children(nspawn)
            failed.pop_all()
        return self

    def _is_ready(self, channel: socket.socket) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise MachineError(f"systemd-nspawn ended: {self._log.read_text(errors='replace').strip()[-2000:]}")
        with contextlib.suppress(TimeoutError):
            return "READY=1" in channel.recv(4096).decode().split("\n")
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:  # seen where the test failed
            print(self._log.read_text(errors="replace")[-2000:], self.journal()[-8000:], sep="\n")
        self._end()

    def _end(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        for top in cgroups():
            wait_for(partial(_removed, top / self.name), f"the last process of {self.name} has ended", END_S_MAX)

    def wait_end(self) -> None:
        """Until it has shut down."""
        assert self.process is not None
        self.process.wait(END_S_MAX)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # --- inside -------------------------------------------------------------------------------------------------------------

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` in the machine."""
        return ["nsenter", f"--target={self.leader}", "--all", "--wdns=/", *command]

    def run(self, *command: str, expect: int | None = 0) -> str:
        """What it prints. Fails where it ends with another status than `expect` (None: any)."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=END_S_MAX)
        assert expect is None or done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def systemctl(self, *arguments: str, expect: int | None = 0) -> str:
        return self.run("systemctl", *arguments, expect=expect).strip()

    def show(self, name: str, unit: str = "tierd") -> str:
        """A property of a unit."""
        return self.systemctl("show", f"--property={name}", "--value", unit)

    def path(self, path: str) -> Path:
        """Where we see what the machine has at `path`."""
        return Path(f"/proc/{self.leader}/root") / path.lstrip("/")

    def pids(self, unit: str) -> list[int]:
        """Processes of a unit of system.slice or machine.slice, as we number them."""
        (top, *_) = [top for top in cgroups() if (top / self.name).is_dir()]
        pids: list[int] = []
        for path in (top / self.name).glob(f"payload/*.slice/{unit}"):
            with contextlib.suppress(OSError):  # systemd has just removed it, with the last process
                pids += map(int, (path / "cgroup.procs").read_text().split())
        return pids

    # --- tierd --------------------------------------------------------------------------------------------------------------

    def configure(self, **settings: Any) -> None:
        usual = {"discover_interval_s": 0.2, "log": {"level": "info"}, "guests": [{"name": "*", **POLICY}]}
        (self.etc / "tierd.yaml").write_text(yaml.safe_dump(usual | settings))

    def drop_in(self, text: str, unit: str = "tierd.service") -> None:
        """More lines for a unit; in force after this."""
        directory = self.units / f"{unit}.d"
        directory.mkdir(exist_ok=True)
        (directory / "test.conf").write_text(text)
        self.systemctl("daemon-reload")

    def main_pid(self, unit: str = "tierd") -> int:
        """As the machine numbers it; 0: there is none."""
        return int(self.show("MainPID", unit))

    def kill(self, name: str, unit: str = "tierd") -> None:
        self.systemctl("kill", "--kill-whom=main", f"--signal={name}", unit)

    def state_files(self) -> list[Path]:
        return sorted(self.path("/run/tierd/guests").glob("*.state"))

    def stored_bytes(self, name: str) -> int:
        guest = guests_at(self.path("/run/tierd/tierd.sock")).get(name)
        return sum(guest["stored_bytes"].values()) if guest else 0

    def wait_evicted(self, vm: Vm) -> None:
        wait_for(lambda: self.stored_bytes(vm.name) > 0.9 * vm.pages * vm.page_bytes, f"{vm.name} is evicted", 60)

    def journal(self, *arguments: str) -> str:
        """Oldest first, whole; also after the machine has ended."""
        if self.running:
            self.run("journalctl", "--sync", expect=None)  # a service may be ready before what it said is written
        command = ["journalctl", f"--directory={self.journal_dir}", "--no-pager", "--output=cat", "--quiet", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout

    def logged(self, event: str) -> list[dict[str, Any]]:
        """What tierd logged."""
        lines = self.journal("--unit=tierd").splitlines()
        entries = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in entries if entry["event"] == event]


class Vm(Vmm):
    """The child that plays a VMM, in the machine: a scope in machine.slice as libvirt makes it, or a service."""

    def __init__(
        self,
        machine: Machine,
        name: str,
        size_bytes: int,
        kind: Literal["scope", "service"],
        user: str,
        memory: Literal["shared", "anonymous"] = "shared",
    ) -> None:
        self.name, self.unit = name, f"vm-{name}.{kind}"
        program = f"{BINARIES}/qemu-system-test"
        how = ["--scope"] if kind == "scope" else ["--pipe", "--wait", "--property=After=tierd.service"]
        # as a QEMU whose guest takes its time to shut down, it does not end at once where systemd tells it to
        vmm = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", program, f"bytes={size_bytes}", "-name", f"guest={name}"]
        vmm += ["kind=anonymous"] if memory == "anonymous" else []
        command = machine.inside(
            "systemd-run", "--quiet", f"--unit={self.unit}", f"--uid={user}", "--slice=machine.slice", *how, *vmm
        )
        # its group: a Ctrl-C is for the test
        super().__init__(Path(shutil.which(command[0]) or command[0]), *command[1:], process_group=0)
        (self.vmm_pid,) = machine.pids(self.unit)

    def end(self) -> None:
        """By itself, as a VMM whose guest has shut down."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(END_S_MAX)

    def kill(self) -> None:
        for pid in (self.vmm_pid, self.pid):  # nsenter waits for its child, which does not end with it
            with contextlib.suppress(ProcessLookupError):
                if self.process.returncode is None:
                    os.kill(pid, signal.SIGKILL)
        if self.process.returncode is None:
            self.process.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cgroups() -> list[Path]:
    """Where cgroup v2 is mounted on this host."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"]


def _removed(cgroup: Path) -> bool:
    """A cgroup and those below it, once they are empty."""
    try:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            os.rmdir(directory)
    except OSError:
        return not cgroup.exists()
    return True


def sweep() -> None:
    """Cgroups of machines that died with their test run."""
    for top in cgroups():
        for cgroup in top.glob("tierd-boot-*"):
            if not Path(f"/proc/{cgroup.name.split('-')[2]}").exists():
                _removed(cgroup)
