# SPDX-License-Identifier: Apache-2.0
"""What the native interfaces cost and save: `python -m tests.kernels.bench [--json]`, in the kernels that have them.

Under emulation nothing is as quick as it says; the ratios of one run mean something.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.kernel.vmm import VMM_SOURCES, compile_child
from tests.kernels.boot import boot
from tests.kernels.build import HERE, PATCHED, build, install_tools

RATIO_MAX = 1.15  # of a pass to its bare calls
ROOT = HERE.parents[1]
NATIVE = ROOT / "tierd" / "native"


def compile_programs(to: Path) -> None:
    compile_child(to / "vmm", *VMM_SOURCES)
    sources = [HERE / "bare.c", NATIVE / "sys.c", NATIVE / "calls.c", *NATIVE.glob("inject*.c")]
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{NATIVE}", *sources]
    subprocess.run([*command, "-o", to / "bare"], check=True)


def measured(name: str, programs: Path) -> list[dict[str, Any]]:
    """One for each engine that this kernel has."""
    command = (
        f"cd {ROOT} && PYTHONDONTWRITEBYTECODE=1 TIERD_TEST_PROGRAMS={programs} "
        f"{sys.executable} -m tests.kernels.measure {programs}/bare"
    )
    done = boot(build(name), command, timeout_s=1800)
    if done.status != 0:
        raise SystemExit(f"{name}: {done.said}")
    found: list[dict[str, Any]] = json.loads(done.output.splitlines()[-1])
    return found


def main(as_json: bool) -> None:
    install_tools()
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=ROOT / "build") as programs:
        compile_programs(Path(programs))
        columns = [column for name in PATCHED for column in measured(name, Path(programs))]
    for column in columns:
        column["ok"] = column["ratio"] <= RATIO_MAX
    if as_json:
        print(json.dumps(columns))
        return
    print("| | " + " | ".join(column["engine"] for column in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for key in list(columns[0])[1:]:
        print(f"| {key} | " + " | ".join(str(column.get(key, "")) for column in columns) + " |")


if __name__ == "__main__":
    main("--json" in sys.argv[1:])
