# SPDX-License-Identifier: Apache-2.0
"""A real libvirtd of our own, and a guest of it.

libvirtd has its paths compiled in, so it runs in a mount namespace where they lead into a directory of ours: a libvirt
that the host may have is not touched. It would leave its QEMU running when it ends: reaper.py does not.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tierd.demo.guest import BOOT_S_MAX, Console, GuestError, build, memory_bytes, this_platform

LIBVIRT_S_MAX = 90.0
GUEST_LIFE_S = 600
# where Debian's libvirtd keeps things, and what that is in our directory
PLACES = {
    "/etc/libvirt": "etc",
    "/run/libvirt": "run",
    "/var/lib/libvirt": "lib",
    "/var/log/libvirt": "log",
    "/var/cache/libvirt": "cache",
}

# libvirtd does not start without the user that Debian's libvirt-daemon-system creates. That package
# would start a libvirtd on the host; so the user exists in our namespace only, with the number that Debian gives it.
QEMU_USER, QEMU_UID = "libvirt-qemu", 64055
ACCOUNTS = {
    "passwd": f"{QEMU_USER}:x:{QEMU_UID}:{QEMU_UID}::/nonexistent:/usr/sbin/nologin\n",
    "group": f"{QEMU_USER}:x:{QEMU_UID}:\n",
}

# User, seccomp sandbox and namespaces stay at their defaults.
QEMU_CONF = """\
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
remember_owner = 0
"""

LIBVIRTD_CONF = """\
unix_sock_dir = "{directory}"
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:{directory}/libvirtd.log"
"""

DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{bytes}</memory>
  {backing}
  <vcpu>1</vcpu>
  <os>
    <type arch='{arch}' machine='{machine}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{append}</cmdline>
  </os>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <serial type='unix'><source mode='bind' path='{serial}'/><target port='0'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>
"""


MEMFD = "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"


class LibvirtGuest:
    """`with LibvirtGuest(directory, name, size_bytes) as guest:` starts libvirtd, defines and starts a domain; both
    are gone afterwards. backing: of its memory, in libvirt's words; "": its default, private and anonymous."""

    def __init__(self, directory: Path, name: str, size_bytes: int, backing: str = MEMFD) -> None:
        self.name = name
        self.used_bytes = 0
        self._size_bytes = size_bytes
        self._backing = backing
        self._boot = build(directory, LIFE_S=GUEST_LIFE_S)
        self._libvirtd: subprocess.Popen[bytes] | None = None
        self._console: Console | None = None
        self._cleanup = contextlib.ExitStack()

    @property
    def console(self) -> Console:
        assert self._console is not None
        return self._console

    @property
    def pid(self) -> int:
        """QEMU's."""
        return int(self._pid_file.read_text())

    @property
    def _pid_file(self) -> Path:
        return self._directory / "run" / "qemu" / f"{self.name}.pid"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # not pytest's directory: a socket's path is at most 107 bytes, and QEMU's user has to get at it
            self._directory = Path(tempfile.mkdtemp(prefix="tierd-libvirt-"))
            stack.callback(shutil.rmtree, self._directory)
            self._directory.chmod(0o755)
            stack.callback(self._end_libvirtd)
            self._start_libvirtd()
            stack.callback(self._end_domain)
            self._start_domain()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def virsh(self, *words: str) -> str:
        uri = f"qemu:///system?socket={self._directory}/libvirt-sock"
        done = subprocess.run(["virsh", "-c", uri, *words], capture_output=True, text=True, timeout=LIBVIRT_S_MAX)
        if done.returncode:
            raise GuestError(f"virsh {' '.join(words)}: {done.stderr.strip()}\n{self._log()}")
        return done.stdout

    def wait_ready(self) -> None:
        self.used_bytes = self.console.expect("READY", BOOT_S_MAX)["used"]

    def verify(self) -> tuple[int, int]:
        return self.console.verify()

    def resident_bytes(self) -> int:
        return memory_bytes(self.pid)

    def _start_libvirtd(self) -> None:
        for place in PLACES.values():
            (self._directory / place).mkdir()
        (self._directory / "etc" / "qemu.conf").write_text(QEMU_CONF)
        config = self._directory / "etc" / "libvirtd.conf"
        config.write_text(LIBVIRTD_CONF.format(directory=self._directory))
        steps = []
        for there, here in PLACES.items():
            steps += [f"mkdir -p {there}", f"mount --bind {self._directory}/{here} {there}"]
        for name, line in ACCOUNTS.items():
            accounts = Path("/etc", name).read_text()
            if f"\n{QEMU_USER}:" not in accounts:
                (self._directory / name).write_text(accounts + line)
                steps.append(f"mount --bind {self._directory}/{name} /etc/{name}")
        # TCG is what we want; on a nested host, libvirtd's trials of KVM take it ten seconds and may hang
        steps.append("if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi")
        script = " && ".join([*steps, f"exec libvirtd --config {config}"])
        command = [sys.executable, str(Path(__file__).with_name("reaper.py")), "unshare", "--mount", "sh", "-c", script]
        self._libvirtd = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._wait_for(self._answers, "libvirtd does not answer")

    def _answers(self) -> bool:
        assert self._libvirtd is not None
        if self._libvirtd.poll() is not None:
            raise GuestError(f"libvirtd ended with status {self._libvirtd.returncode}\n{self._log()}")
        if not (self._directory / "libvirt-sock").exists():
            return False
        with contextlib.suppress(GuestError):
            self.virsh("version")
            return True
        return False

    def _start_domain(self) -> None:
        kernel, initramfs = (shutil.copy(path, self._directory) for path in (self._boot.kernel, self._boot.initramfs))
        target = this_platform()
        serial = self._directory / "lib" / "serial"
        domain = self._directory / "domain.xml"
        domain.write_text(
            DOMAIN.format(
                name=self.name,
                bytes=self._size_bytes,
                backing=self._backing,
                arch=target.qemu.removeprefix("qemu-system-"),
                machine=target.machine,
                emulator=shutil.which(target.qemu),
                kernel=kernel,
                initramfs=initramfs,
                append=self._boot.append,
                serial=serial,
            )
        )
        self.virsh("define", str(domain))
        self.virsh("start", self.name, "--paused")  # what the guest says before we listen would be lost
        line = socket.socket(socket.AF_UNIX)
        self._cleanup.callback(line.close)
        line.connect(str(serial))
        self._console = Console(self.name, line)
        self.virsh("resume", self.name)

    def _end_domain(self) -> None:
        if self._console is not None:
            self._console.socket.close()
        if self._pid_file.exists():
            self.virsh("destroy", self.name)

    def _end_libvirtd(self) -> None:
        if self._libvirtd is None:
            return
        self._libvirtd.terminate()
        try:
            self._libvirtd.wait(LIBVIRT_S_MAX)
        except subprocess.TimeoutExpired:
            self._libvirtd.kill()
            self._libvirtd.wait()

    def _log(self) -> str:
        log = self._directory / "libvirtd.log"
        return log.read_text()[-2000:] if log.exists() else "(it logged nothing)"

    @staticmethod
    def _wait_for(condition: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + LIBVIRT_S_MAX
        while not condition():
            if time.monotonic() > deadline:
                raise GuestError(otherwise)
            time.sleep(0.05)
