# SPDX-License-Identifier: Apache-2.0
"""The torture run's workers with an extension that was built under a sanitizer, in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kernel.torture import ROOT, Python

# What is compiled in, the libraries that must be there before Python is, and what starts it.
SANITIZERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "address_and_undefined": (
        "-fsanitize=address,undefined -fno-sanitize-recover=all",
        ("libasan.so", "libubsan.so"),
        (),
    ),
    # without address randomization, which some kernels do more of than the sanitizer can take
    "thread": ("-fsanitize=thread -Wno-tsan", ("libtsan.so",), ("setarch", "-R")),
}


def _library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def sanitized_python(directory: Path, sanitizer: str) -> tuple[Python, Path]:
    """A copy of the package and the tests with that extension, and where the sanitizer writes its reports."""
    flags, libraries, wrapper = SANITIZERS[sanitizer]
    ignore = shutil.ignore_patterns("*.so", "*.o", "_native.c", "__pycache__")
    for package in ("tierd", "tests"):
        shutil.copytree(ROOT / package, directory / package, ignore=ignore)
    logs = directory / "logs"
    logs.mkdir()
    script = "import runpy; runpy.run_path('tierd/native/build.py')['ffi'].compile(tmpdir='.')"
    build = {**os.environ, "CFLAGS": f"-O1 -fno-omit-frame-pointer {flags}", "LDFLAGS": flags}
    done = subprocess.run([sys.executable, "-c", script], cwd=directory, env=build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = f"halt_on_error=1:exitcode=66:detect_leaks=0:log_path={logs}/report"
    environment = {
        "LD_PRELOAD": " ".join(map(_library, libraries)),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(directory),
        "ASAN_OPTIONS": f"{options}:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": options,
        "TSAN_OPTIONS": options,
    }
    return Python((*wrapper, sys.executable), directory, environment), logs
