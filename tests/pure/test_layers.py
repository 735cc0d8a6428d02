# SPDX-License-Identifier: Apache-2.0
"""Imports point down, and the boundaries of the design hold."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tierd"

# What each module may import of the package at module level, besides what stands left of it in the order.
ORDER = [
    "native",
    "engine",
    "quantities",
    "config",
    "document",
    "load",
    "systemd",
    "threads",
    "view",
    "attach",
    "check",
    "client",
    "show",
    "store",
    "testing",
    "policy",
    "regions",
    "cycle",
    "serve",
    "tiers",
    "resume",
    "parking",
    "restore",
    "stores",
    "salvage",
    "guest",
    "successor",
    "watch",
    "metrics",
    "routes",
    "api",
    "vmms",
    "daemon",
    "demo",
    "cli",
    "__main__",
]


def _layer(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tierd."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "tierd":
            found.update(name.name for name in node.names if name.name != "__version__")
        elif isinstance(node, ast.Import):
            found.update(name.name.split(".")[1] for name in node.names if name.name.startswith("tierd."))
    return found


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        layer = _layer(path)
        if layer == "__init__" or path.name == "build.py":
            continue
        assert layer in ORDER, f"{path}: a new layer: put it into ORDER"
        for imported in _imports(path) - {layer}:
            if ORDER.index(imported) > ORDER.index(layer):
                wrong.append(f"{path.relative_to(ROOT)} imports tierd.{imported}")
    assert not wrong


def test_only_native_touches_the_extension() -> None:
    for path in PACKAGE.rglob("*.py"):
        if _layer(path) != "native":
            assert "_native" not in path.read_text(), f"{path}: cffi stays behind tierd.native"


def test_policy_is_pure() -> None:
    """No clock, no log, no await, no I/O: (Policy, Sample) -> Decision."""
    tree = ast.parse((PACKAGE / "policy.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not modules & {"time", "os", "trio", "structlog", "logging"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Await | ast.AsyncFunctionDef)]


def test_the_data_plane_calls_the_kernel_through_one_seam() -> None:
    """Model and real kernel are exchanged at sys.h, so nothing else may make a system call about a guest."""
    forbidden = re.compile(r"\b(ioctl|pread|pwrite|pwritev|fallocate|lseek|process_madvise|fdatasync)\s*\(")
    for name in ("guest.c", "fault.c", "scan.c", "evict.c", "store.c"):
        assert not forbidden.search((PACKAGE / "native" / name).read_text()), name


def test_nothing_reads_the_wall_clock() -> None:
    """It can be stepped, by years. Ages, pauses and deadlines are counted by CLOCK_MONOTONIC, which also counts on across a
    restart; only log lines carry a date, which structlog gives them."""
    wall = re.compile(r"\btime\.(time|time_ns|localtime|gmtime)\(|\bdatetime\b|CLOCK_REALTIME|\bgettimeofday\b")
    for path in [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.[ch]")]:
        if path.name != "_native.c":
            assert not wall.search(path.read_text()), path
