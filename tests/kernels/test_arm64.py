# SPDX-License-Identifier: Apache-2.0
"""Calls inside a VMM on arm64: the cases of tests/kernel/test_inject.py in Debian's own kernels, booted in QEMU.

With 6.1 the call is made by an instruction of the program, in which one of its threads sleeps, too; with 6.12 by one of the
vdso. The processor has SVE and SME. What is run in there is built out here, and the C code as a whole with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels import build
from tests.kernels.build import run
from tests.kernels.machine import HERE, ROOT
from tests.need import need

NATIVE, KERNEL = ROOT / "tierd" / "native", ROOT / "tests" / "kernel"
COMPILE = ("aarch64-linux-gnu-gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
KILLS = int(os.environ.get("TIERD_ARM64_KILLS", "10"))
CALLS = max(5, KILLS // 10)
BOOT_S_MAX = 600.0
CPU = "max,pauth-impdef=on"  # signed pointers as the architecture would have them take most of the emulator's time


@pytest.fixture(scope="module")
def initramfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("arm64", shutil.which(COMPILE[0]) is not None, f"no {COMPILE[0]}: make soak installs it")
    directory = tmp_path_factory.mktemp("arm64")
    root = directory / "root"
    root.mkdir()
    hooked = ("-include", KERNEL / "inject_step.h", f"-I{NATIVE}", KERNEL / "inject_killer.c")
    sources = [NATIVE / name for name in ("inject.c", "inject_aarch64.c", "calls.c", "sys.c")]
    run([*COMPILE, "-static", HERE / "inject_init.c", "-o", root / "init"])
    run([*COMPILE, "-static", KERNEL / "inject_victim.c", "-o", root / "victim"])
    wrapped = "-Wl,--wrap=process_vm_readv,--wrap=process_vm_writev"
    run([*COMPILE, "-static", *hooked, wrapped, *sources, "-o", root / "killer"])
    image = directory / "initramfs.cpio"
    run(["cpio", "--quiet", "-o", "-H", "newc", "-F", image], cwd=root, input="init\nvictim\nkiller\n")
    return image


@pytest.mark.timeout(BOOT_S_MAX + 60)
@pytest.mark.parametrize("name", ["arm64-6.1", "arm64-6.12"])
def test_calls_leave_no_trace_and_a_death_does_no_harm(name: str, initramfs: Path, tmp_path: Path) -> None:
    kernel = build.get(name)
    need("arm64", kernel is not None, f"no kernel {name} in {build.cache_dir()}: make soak unpacks it")
    assert kernel is not None
    said = tmp_path / "said"
    machine = [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", CPU, "-smp", "2", "-m", "512", "-accel", "tcg,thread=multi"),
        *("-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", f"file:{said}"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", f"console=ttyAMA0 quiet panic=-1 oops=panic calls={CALLS} kills={KILLS}"),
    ]
    subprocess.run(machine, stdin=subprocess.DEVNULL, timeout=BOOT_S_MAX)
    lines = said.read_text(errors="replace").splitlines()
    print("\n".join(lines))
    assert "exit 0" in lines


def test_the_c_code_compiles(tmp_path: Path) -> None:
    need("arm64", shutil.which(COMPILE[0]) is not None, f"no {COMPILE[0]}: make soak installs it")
    for source in sorted(NATIVE.glob("*.c")):
        if source.name != "_native.c":
            run([*COMPILE, f"-I{NATIVE}", "-c", source, "-o", tmp_path / "object"])
