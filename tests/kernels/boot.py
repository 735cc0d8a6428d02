# SPDX-License-Identifier: Apache-2.0
"""Runs a command in a kernel under test: QEMU without KVM, the machine's own file system read-only as root, a scratch disk.

    python3 -m tests.kernels.boot rwp 'uname -r; ls /work'

In there /tmp, /run and /dev/shm are empty tmpfs (but for a checkout that lies there), /var/tmp is an ext4 (a disk for stores),
everything else is the host's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.build import HERE, BuildError, Kernel, build, install_tools, run

TREE = Path(__file__).resolve().parents[2]
DISK_BYTES = 1 << 30
# emulated code is kept by its address, and a string instruction is emulated byte by byte: a process starts in half of the time so
KERNEL_COMMAND_LINE = "console=ttyS0 quiet panic=-1 oops=panic norandmaps mitigations=off"
CPU = "max,-erms,-fsrm,-smap"


@dataclass(frozen=True)
class Done:
    """`status`: of the command, or None when it never came to its end; `console`: what the kernel said."""

    status: int | None
    output: str
    console: str

    @property
    def said(self) -> str:
        return f"{self.output}\n--- console ---\n{self.console[-6000:]}"


def make_initramfs(kernel: Kernel, command: str, scratch: Path) -> Path:
    root = scratch / "initramfs"
    for part in ("modules", "dev", "root"):
        (root / part).mkdir(parents=True)
    for module in kernel.modules:
        shutil.copy(module, root / "modules")
    (root / "command").write_text(command)
    run(["gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-static", HERE / "init.c", "-o", root / "init"])
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    image = scratch / "initramfs.cpio"
    run(["cpio", "--quiet", "-o", "-H", "newc", "-F", image], cwd=root, input=names)
    return image


def boot(
    kernel: Kernel,
    command: str,
    *,
    cpus: int = 2,
    memory_mib: int = 2048,
    timeout_s: float = 600.0,
    append: str = "",
    watch: Callable[[str], None] = lambda text: None,
) -> Done:
    """Boots `kernel`, runs `command` by bash as root, and gives back what came of it. Blocks. `watch` sees output as it comes."""
    with tempfile.TemporaryDirectory(prefix="tierd-boot-") as scratch_name:
        scratch = Path(scratch_name)
        disk, output, console = scratch / "disk", scratch / "output", scratch / "console"
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
        run(["mkfs.ext4", "-q", "-F", disk], env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
        arguments = [
            *(
                "qemu-system-x86_64",
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-no-reboot",
                "-accel",
                "tcg,thread=multi",
            ),
            *("-machine", "mem-merge=off"),  # the same guests run outside: KSM would merge them with these
            *("-cpu", CPU, "-smp", str(cpus), "-m", str(memory_mib)),
            *("-kernel", str(kernel.image), "-initrd", str(make_initramfs(kernel, command, scratch))),
            *("-append", f"{KERNEL_COMMAND_LINE} tree={TREE} {append}"),
            *("-serial", f"file:{console}", "-serial", f"file:{output}"),
            *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
            *("-drive", f"if=none,id=disk,file={disk},format=raw,cache=unsafe", "-device", "virtio-blk-pci,drive=disk"),
            *("-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"),
        ]
        with subprocess.Popen(arguments, stdin=subprocess.DEVNULL) as machine:
            _follow(machine, output, timeout_s, watch)
        return _done(output, console)


def _follow(machine: subprocess.Popen[bytes], output: Path, timeout_s: float, watch: Callable[[str], None]) -> None:
    until = time.monotonic() + timeout_s
    seen = 0
    try:
        while machine.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError), output.open("rb") as file:
                file.seek(seen)
                new = file.read()
                seen += len(new)
                watch(new.decode(errors="replace").replace("\r\n", "\n"))
    finally:
        machine.kill()


def _done(output: Path, console: Path) -> Done:
    def text_of(path: Path) -> str:
        return path.read_bytes().decode(errors="replace").replace("\r\n", "\n") if path.exists() else ""

    said = text_of(output)
    body, _, last = said.rstrip("\n").rpartition("\n")
    if last.startswith("exit "):
        return Done(int(last.removeprefix("exit ")), body, text_of(console))
    return Done(None, said, text_of(console))


def main(name: str, command: str) -> int:
    try:
        install_tools()
        done = boot(build(name), command, timeout_s=3600, watch=lambda text: print(text, end="", flush=True))
    except BuildError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    if done.status is None:
        print(f"kernels: the command did not end\n{done.console[-6000:]}", file=sys.stderr)
        return 1
    return done.status


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python3 -m tests.kernels.boot NAME COMMAND")
    sys.exit(main(*sys.argv[1:]))
