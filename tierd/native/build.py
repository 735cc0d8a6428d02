# SPDX-License-Identifier: Apache-2.0
"""Builds the extension module `tierd.native._native` (cffi, API mode) when the package is installed."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in HERE.glob("*.c") if path.name != "_native.c")

ffi = FFI()
ffi.cdef((HERE / "tierd.h").read_text())
ffi.set_source(
    "tierd.native._native",
    '#include "tierd.h"',
    sources=SOURCES,
    include_dirs=["tierd/native"],
    depends=[
        f"tierd/native/{name}.h" for name in ("tierd", "internal", "sys", "pool", "pool_inside", "codec", "crypto")
    ],
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wno-missing-field-initializers",
        "-fvisibility=hidden",
    ],
    libraries=["pthread", "dl"],  # dl: before glibc 2.34
)
