# SPDX-License-Identifier: Apache-2.0
"""What the tests do with a kernel under test, and what they make of the C self-test's answer."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernels import build
from tests.kernels.boot import Done, boot
from tests.need import need

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "kernels"


@dataclass(frozen=True)
class Section:
    status: int
    output: str


def pytest_in_there(tests: Sequence[str], python: str = sys.executable, *, plugin: str = "pytest_timeout") -> str:
    """The command. Only the plugins that are needed: there the import of the others takes ten seconds."""
    options = f"-q --color=no -p no:cacheprovider -p pytest_timeout -p {plugin} --durations=8"
    return f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 {shlex.quote(python)} -m pytest {options} {shlex.join(tests)}"


def on_one_cpu(command: str) -> str:
    """The second CPU of the emulated machine is off meanwhile. Machines with more CPUs than there are here wait: a flush of
    another CPU's TLB takes until that one has its turn."""
    online = "/sys/devices/system/cpu/cpu1/online"
    return f"echo 0 >{online}; {command}; status=$?; echo 1 >{online}; (exit $status)"


def booted(name: str, command: str, timeout_s: float, append: str = "", cpus: int = 2) -> Done:
    """Runs it in a kernel from the cache; skips where `make kernels` has not been run."""
    kernel = build.get(name)
    need("kernels", kernel is not None, f"no kernel {name} in {build.cache_dir()}: make kernels builds them")
    assert kernel is not None
    done = boot(kernel, command, timeout_s=timeout_s, memory_mib=3072, append=append, cpus=cpus)
    assert done.status is not None, f"{name} did not come to the end of it in {timeout_s:g} s\n{done.said}"
    return done


def sections_of(
    name: str, first: Sequence[str], commands: Mapping[str, str], timeout_s: float, append: str = "", cpus: int = 2
) -> tuple[dict[str, Section], Done]:
    """Of one boot, in which `first` is done: what each command said, and its status."""
    script = list(first)
    for section, command in commands.items():
        script += [f"echo '=== {section}'", command, 'echo "=== status $? after $SECONDS s"']
    done = booted(name, "\n".join([*script, "true"]), timeout_s, append, cpus)
    found = re.findall(r"^=== (\w+)\n(.*?)^=== status (\d+) after (\d+) s$", done.output, re.M | re.S)
    assert [section for section, *_ in found] == list(commands), done.said
    print(f"{name}, seconds since the boot: " + ", ".join(f"{section} {after}" for section, _, _, after in found))
    return {section: Section(int(status), output) for section, output, status, _ in found}, done


def check_selftest(status: int, output: str, said: str, may_skip: tuple[str, ...] | None) -> None:
    """Everything passed or was skipped for a reason that is known of this kernel (of an unknown one: for any)."""
    lines = output.splitlines()
    failed = [line for line in lines if line.startswith("not ok ")]
    skipped = dict(line.removeprefix("skip ").split(": ", 1) for line in lines if line.startswith("skip "))
    print(
        f"{lines[-1] if lines else 'nothing'}\n" + "\n".join(f"skipped {name}: {why}" for name, why in skipped.items())
    )
    assert not failed, "\n".join([*failed, "", said])
    assert status == 0, said
    assert any(line.startswith("ok ") for line in lines), said
    if may_skip is not None:
        strange = {name: why for name, why in skipped.items() if not any(re.fullmatch(e, why) for e in may_skip)}
        assert not strange, f"skipped, and not known to be: {strange}\n\n{said}"
