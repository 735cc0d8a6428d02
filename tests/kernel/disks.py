# SPDX-License-Identifier: Apache-2.0
"""File systems that a test can stop: a store that hangs as a real one does, in the kernel, where no signal reaches the caller."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.kernel.vmm import MIB, wait_for
from tests.need import need


def sparse(path: Path, size: int) -> Path:
    """A new file of so many bytes, all of it a hole."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextlib.contextmanager
def loop_disk(directory: Path, image: Path, errors: str = "continue") -> Iterator[Path]:
    """An ext4 on a loop device over `image`, at directory/disk; what it does at `errors` is in ext4(5). What uses it must have
    ended."""
    need("root", os.geteuid() == 0, "mounting needs root")
    for program in ("mkfs.ext4", "losetup"):
        need("kernel", shutil.which(program) is not None, f"{program} is missing")
    mount = directory / "disk"
    mount.mkdir()
    with contextlib.ExitStack() as undo:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        loop = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True)
        need("kernel", loop.returncode == 0, f"no loop device: {loop.stderr.strip()}")
        device = loop.stdout.strip()
        undo.callback(subprocess.run, ["losetup", "--detach", device], check=True)
        subprocess.run(["mount", "-o", f"errors={errors}", device, mount], check=True)
        undo.callback(subprocess.run, ["umount", mount], check=True)
        yield mount


def damaged(mount: Path) -> None:
    """ext4 believes to have found damage in itself, and does what its `errors` says."""
    device = os.stat(mount).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test")


def repaired(mount: Path, image: Path) -> None:
    """What an administrator does after that. A copy is repaired: while another has a copy of our mounts (a guest of libvirt, a
    machine of tests/boot), the file system stays in use after it was unmounted, as it is."""
    subprocess.run(["umount", mount], check=True)
    copy = image.with_suffix(".repaired")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    done = subprocess.run(["e2fsck", "-fy", copy], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # e2fsck(8): no errors, errors corrected
    subprocess.run(["mount", "-o", "loop", copy, mount], check=True)


@dataclass
class FrozenDisk:
    """Every write waits in the kernel, where no signal reaches its thread; reads go on."""

    mount: Path
    frozen: bool = False

    def hang(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.mount], check=True)
        self.frozen = True

    def go_on(self) -> None:
        if self.frozen:
            subprocess.run(["fsfreeze", "--unfreeze", self.mount], check=True)
        self.frozen = False


@contextlib.contextmanager
def frozen_at_will(directory: Path, size: int = 256 * MIB) -> Iterator[FrozenDisk]:
    """What uses it must have ended."""
    with loop_disk(directory, sparse(directory / "image", size)) as mount:
        disk = FrozenDisk(mount)
        try:
            yield disk
        finally:
            disk.go_on()


@dataclass
class HangingDisk:
    """An ext4 served by a process (fuse2fs) that can be stopped: then every call waits, reads and stat included."""

    mount: Path
    server: subprocess.Popen[bytes]

    def hang(self) -> None:
        self.server.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.server.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self.server.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def hanging_disk(directory: Path, size: int = 256 * MIB) -> Iterator[HangingDisk]:
    """What uses it must have ended."""
    need("root", os.geteuid() == 0, "mounting needs root")
    need("fuse2fs", shutil.which("fuse2fs") is not None, "fuse2fs is missing")
    need("fuse2fs", os.path.exists("/dev/fuse"), "the kernel has no FUSE")
    image, mount = sparse(directory / "fuse-image", size), directory / "fuse"
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    server = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "fuse2fs", "-f", image, mount], stderr=subprocess.DEVNULL, process_group=0
    )
    try:
        wait_for(lambda: server.poll() is not None or os.path.ismount(mount), "the file system is mounted")
        yield HangingDisk(mount, server)
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "--lazy", mount], check=True)
        server.kill()  # it would go on for who has copied our mounts meanwhile: a machine of tests/boot, a libvirtd
        server.wait()


def in_the_kernel(pid: int, *functions: str) -> list[int]:
    """Threads of the process that wait in a kernel function whose name holds one of these."""
    found = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            where = Path(f"/proc/{pid}/task/{tid}/wchan").read_text()
            if any(function in where for function in functions):
                found.append(int(tid))
    return found
