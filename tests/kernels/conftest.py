# SPDX-License-Identifier: Apache-2.0
"""Programs for the kernels under test, compiled out here: in there a compiler takes minutes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.vmm import VMM_SOURCES, compile_child
from tests.kernels.machine import HERE, ROOT
from tests.native.build import build_real


@pytest.fixture(scope="session")
def programs() -> Iterator[Path]:
    """A directory that a booted kernel sees too: there /tmp is its own."""
    (ROOT / "build").mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="kernels-", dir=ROOT / "build"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def bytecode() -> None:
    """Of the project and its tests, pytest's own, too: in there nothing can be written, and each process would compile again."""
    for command in (
        ["compileall", "-q", "tierd", "tests"],
        ["pytest", "-q", "--collect-only", "tests/kernel", "tests/daemon"],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def selftest(programs: Path) -> Path:
    output = programs / "selftest"
    sources = sorted(HERE.glob("selftest*.c"))
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread"]
    done = subprocess.run(["gcc", *flags, *sources, "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def children(programs: Path, bytecode: None) -> Path:
    """A directory for TIERD_TEST_PROGRAMS: the VMM of the tests, the vCPU, the real driver."""
    compile_child(programs / "vmm", *VMM_SOURCES)
    compile_child(programs / "kvm_vcpu", "kvm_vcpu.c", "child.c")
    build_real(programs / "real", ["-O2"])
    return programs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured on the way, and is no test's to judge."""
    for report in terminalreporter.stats.get("passed", []):
        for name, text in report.user_properties:
            if name == "told":
                terminalreporter.write_line(f"{report.nodeid}: {text}")
