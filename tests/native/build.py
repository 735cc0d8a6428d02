# SPDX-License-Identifier: Apache-2.0
"""Compiles the data plane together with the model kernel and the seeded driver."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tierd" / "native"
HERE = ROOT / "tests" / "native"
DATA_PLANE = (
    "table.c",
    "guest.c",
    "engine.c",
    "fault.c",
    "scan.c",
    "evict.c",
    "stage.c",
    "store.c",
    "park.c",
    "ask.c",
    "crypto.c",
)
POOL = ("pool*.c", "codec.c", "table.c", "sys.c", "calls.c", "inject*.c")
# swapcontext is a longjmp in gcc's eyes
FLAGS = ("-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered", "-DTIERD_MODEL")


INCLUDES = (f"-I{NATIVE}", f"-I{HERE}")
DRIVER = (
    *(NATIVE / name for name in DATA_PLANE),
    *(HERE / name for name in ("model.c", "model_pool.c", "script.c", "driver.c")),
)


def build_driver(output: Path, flags: Sequence[str], parts: Sequence[Path] = DRIVER) -> Path:
    """The driver of `parts`: sources, and objects that compile_parts made with the same flags."""
    command = ["gcc", *FLAGS, *flags, *INCLUDES, *map(str, parts), "-o", str(output), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def compile_parts(directory: Path, flags: Sequence[str]) -> list[Path]:
    """An object for each source of the driver."""
    command = ["gcc", *FLAGS, *flags, *INCLUDES, "-c", *map(str, DRIVER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    return [directory / f"{source.stem}.o" for source in DRIVER]


def build_real(output: Path, flags: Sequence[str]) -> Path:
    """The same script with the whole data plane, for the real kernel. TIERD_TEST_PROGRAMS: as in tests/kernel/vmm.py."""
    ready = Path(os.environ.get("TIERD_TEST_PROGRAMS") or "/nonexistent") / output.name
    if ready.exists() and list(flags) == ["-O2"]:
        return ready
    flags = [flag for flag in (*FLAGS, *flags) if flag != "-DTIERD_MODEL"]
    sources = [str(path) for path in NATIVE.glob("*.c") if path.name != "_native.c"]
    sources += [str(HERE / name) for name in ("script.c", "real.c")]
    command = ["gcc", *flags, f"-I{NATIVE}", f"-I{HERE}", *sources, "-o", str(output), "-pthread", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def build_pool(output: Path, flags: Sequence[str], native: Path = NATIVE) -> Path:
    """The compressed pool with its own driver, on the real kernel; the driver can make two of its calls fail."""
    sources = [str(path) for pattern in POOL for path in native.glob(pattern)]
    wrapped = ["-Wl,--wrap=sys_pool_reserve,--wrap=sys_pool_punch", "-pthread", "-ldl"]
    flags = [*(flag for flag in FLAGS if flag != "-DTIERD_MODEL"), *flags, f"-I{native}", f"-I{HERE}"]
    command = ["gcc", *flags, *sources, str(HERE / "pool_test.c"), "-o", str(output), *wrapped]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def build_threads(output: Path, native: Path = NATIVE) -> Path:
    """The data plane with real threads under the thread sanitizer. The model kernel is not instrumented: its lock would
    order what a real kernel does not."""
    model = output.with_suffix(".model.o")
    includes = [f"-I{native}", f"-I{HERE}"]
    unseen = ["-Dmemcpy=model_copy", "-Dmemset=model_set"]
    sources = [str(native / name) for name in DATA_PLANE] + [str(HERE / "threads.c"), str(HERE / "model_pool.c")]
    sanitized = [
        *FLAGS,
        "-O1",
        "-fsanitize=thread",
        "-Wno-tsan",
    ]  # -Wno-tsan: fences are not modelled, words are atomic
    for command in (
        ["gcc", *FLAGS, "-O1", *unseen, *includes, "-c", str(HERE / "model.c"), "-o", str(model)],
        ["gcc", *sanitized, *includes, *sources, str(model), "-o", str(output), "-pthread"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return output


def run_seeds(
    binary: Path, seeds: int, *options: str, first: int = 1, wrapper: Sequence[str] = (), timeout_s: float = 1700
) -> dict[str, int]:
    """The seeds from `first` on, in one process a CPU; what all of them did together. AssertionError names a failing seed."""
    parts = min(len(os.sched_getaffinity(0)), seeds)
    ranges = [(first + seeds * i // parts, first + seeds * (i + 1) // parts) for i in range(parts)]
    with ThreadPoolExecutor(parts) as pool:
        runs = pool.map(
            lambda r: run_driver(
                *wrapper, binary, "--from", str(r[0]), "--seeds", str(r[1] - r[0]), *options, timeout_s=timeout_s
            ),
            ranges,
        )
    figures: Counter[str] = Counter()
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
        figures.update({name: int(count) for count, name in re.findall(r"[:,] (\d+) ([a-z ]+)", done.stdout)})
    return dict(figures)


def run_driver(*command: str | Path, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "PATH": "/usr/bin:/bin"},
    )
