# SPDX-License-Identifier: Apache-2.0
"""Engines `rwp` and `rfc` in kernels that have their interfaces: one boot each, in which everything below runs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels.machine import ROOT, Section, check_selftest, on_one_cpu, pytest_in_there, sections_of
from tests.kernels.suite import RACES, REST
from tests.need import need
from tierd.demo.guest import GuestError, find_kernel

HERE = "/run/tierd"  # the project, where an ordinary user gets to it whatever directory it is in
SEEDS = 24
LARGE_SEEDS = 10
ANONYMOUS_SEEDS = 10
HUGETLB_SEEDS, HUGETLB_PAGES = 4, 64
HUGETLB_POOL = "/proc/sys/vm/nr_hugepages"
LARGE = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
KILLS = 3
DEMO = "/var/tmp/demo"  # in there: the scratch disk


@pytest.fixture(scope="class")
def sections(request: pytest.FixtureRequest, children: Path, selftest: Path) -> dict[str, Section]:
    """Of one boot: what each command said, and its status."""
    name: str = request.cls.kernel
    python = shlex.quote(sys.executable)
    try:
        guest_kernel = find_kernel(ROOT / "build" / "vm")
    except GuestError as error:
        need("vm", False, str(error))
    interpreter = Path(sys.executable)
    theirs = interpreter.relative_to(ROOT) if interpreter.is_relative_to(ROOT) else interpreter
    # one tier: to compress takes an emulated CPU too long for the guest's own clock
    demo = f"{python} -m tierd --config config/tierd.yaml demo --json --directory {DEMO} --accel kvm --tiers file"

    tests = [*REST, *RACES] if request.cls.rest_first else [*RACES, *REST]
    suite = f"(cd {HERE}; {pytest_in_there(tests, str(theirs), plugin='tests.kernels.suite')})"
    races = {
        "driver": f"{children}/real --engine {name} --slowness 40 --seeds {SEEDS} --store /var/tmp",
        "large": f"echo always >{LARGE}; {children}/real --engine {name} --slowness 25 --seeds {LARGE_SEEDS} "
        f"--store /var/tmp --large; status=$?; echo never >{LARGE}; (exit $status)",
        "anonymous": f"{children}/real --engine {name} --slowness 60 --seeds {ANONYMOUS_SEEDS} --store /var/tmp --anon",
        # a page takes long to leave, so its daemons live longer
        "hugetlb": f"echo {HUGETLB_PAGES} >{HUGETLB_POOL}; {children}/real --engine {name} --slowness 250 --seeds "
        f"{HUGETLB_SEEDS} --store /var/tmp --hugetlb; status=$?; echo 0 >{HUGETLB_POOL}; (exit $status)",
    }
    rest = {
        "check": f"{python} -m tierd check --json",
        # KVM: the emulator emulates SVM, and so the guest is emulated once and not twice
        "demo": f"mkdir {DEMO} && ln -s {guest_kernel} {DEMO} && {demo} --memory 128MiB",
        "demo_anonymous": f"{demo} --memory 192MiB --backing anonymous",
    }
    rest = {section: on_one_cpu(command) for section, command in rest.items()}
    # the other kernel's machine runs beside this one, and has one CPU while this one has two
    commands = rest | {"suite": suite} | races if request.cls.rest_first else races | {"suite": suite} | rest
    commands["selftest"] = f"{selftest} --system {name}"  # the last one: it changes what the system is set to
    variables = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "TIERD_REQUIRE": f"root,kernel,sync-mode,kvm,hugetlbfs,idle-page-tracking,{name}",
        "TIERD_TEST_PROGRAMS": children,
        "TIERD_TEST_DISK": "/var/tmp",
        "TIERD_KILLS": KILLS,
        "TIERD_SLOWNESS": 5,
    }
    cgroups = "mount -t cgroup2 none /sys/fs/cgroup && echo +memory >/sys/fs/cgroup/cgroup.subtree_control"
    bind = f"mkdir {HERE} && mount --bind {shlex.quote(str(ROOT))} {HERE}"
    first = [
        cgroups,
        bind,
        f"cd {shlex.quote(str(ROOT))}",
        *(f"export {key}={value}" for key, value in variables.items()),
    ]
    found, done = sections_of(name, first, commands, 2400, append="numa=fake=2")
    bad = re.findall(r"(?:BUG|WARNING|Oops|general protection).*", done.console)
    assert not bad, f"the kernel itself complained: {bad}\n{done.said}"
    return found | {"name": Section(0, name)}


pytestmark = pytest.mark.timeout(2700)


class Engine:
    """All of one kernel's tests: one boot."""

    kernel: str
    rest_first: bool

    def test_the_interface_is_what_is_described(self, sections: dict[str, Section]) -> None:
        said = sections["selftest"]
        check_selftest(said.status, said.output, said.output, ())

    def test_check_names_the_engine_and_why(self, sections: dict[str, Section]) -> None:
        said = sections["check"]
        engine = next(f for f in json.loads(said.output)["findings"] if f["name"] == "engine")
        assert engine["ok"]
        assert engine["says"].startswith(f"{sections['name'].output}: ")

    def test_the_seeded_driver(self, sections: dict[str, Section]) -> None:
        said = sections["driver"]
        assert said.status == 0, said.output
        figures = {name: int(count) for count, name in re.findall(r"[:,] (\d+) ([a-z ]+)", said.output)}
        assert figures["pages evicted"] > SEEDS, said.output
        assert figures["kills in service"] > 0, said.output

    def test_the_seeded_driver_in_large_folios(self, sections: dict[str, Section]) -> None:
        """Which mostly cannot be split: a punch leaves zeros, and deaths come between it and the repair."""
        said = sections["large"]
        assert said.status == 0, said.output
        figures = {name: int(count) for count, name in re.findall(r"[:,] (\d+) ([a-z ]+)", said.output)}
        assert figures["rewritten"] > 0, said.output
        assert figures["kills in service"] > 0, said.output

    def test_the_seeded_driver_on_hugetlbfs(self, sections: dict[str, Section]) -> None:
        said = sections["hugetlb"]
        assert said.status == 0, said.output
        figures = {name: int(count) for count, name in re.findall(r"[:,] (\d+) ([a-z ]+)", said.output)}
        assert figures["pages evicted"] > 0, said.output
        assert figures["faults"] > 0, said.output
        assert figures["kills in service"] > 0, said.output

    def test_the_seeded_driver_on_anonymous_memory(self, sections: dict[str, Section]) -> None:
        said = sections["anonymous"]
        assert said.status == 0, said.output
        figures = {name: int(count) for count, name in re.findall(r"[:,] (\d+) ([a-z ]+)", said.output)}
        assert figures["pages evicted"] > 0, said.output
        assert figures["kills in service"] > 0, said.output

    @pytest.mark.parametrize("section", ["demo", "demo_anonymous"])
    def test_the_demo(self, sections: dict[str, Section], section: str) -> None:
        """A real QEMU guest, a KVM vCPU that faults in the kernel, the real daemon."""
        said = sections[section]
        print(said.output)
        assert said.status == 0, said.output
        result = json.loads(said.output.splitlines()[-1])
        assert result["engine"] == sections["name"].output
        assert result["accel"] == "kvm"
        assert result["wrong_bytes"] == 0
        assert result["verified_bytes"] > 32 << 20
        assert result["given_back_ratio"] >= 0.4, "pages left"
        assert result["tiers"]["file"] > 32 << 20, "of these not only zeros"
        assert result["faults"] > 100, "and came back"

    def test_the_kernel_layer_and_an_ordinary_user(
        self, sections: dict[str, Section], record_property: Callable[[str, object], None]
    ) -> None:
        said = sections["suite"]
        print(said.output)
        for line in re.findall("^killed in a window: .*", said.output, re.M):
            record_property("told", line)
        assert said.status == 0, said.output


class TestRwp(Engine):
    kernel = "rwp"
    rest_first = False


class TestRfc(Engine):
    kernel = "rfc"
    rest_first = True
