# SPDX-License-Identifier: Apache-2.0
"""What tierd relies on, asked of Debian's own kernels, booted in QEMU. (Of this machine's: tests/kernel/test_selftest.py.)

Two suites: the C self-test (selftest.c; one small test for each promise of the interface) and, in the booted kernels, the
stock engine's kernel-layer tests. In there time passes ten times as slowly and only the scratch disk can be written: programs are
compiled out here, and what would only repeat itself is repeated less often.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.kernels.machine import ROOT, Section, check_selftest, pytest_in_there, sections_of

DRIVER_SEEDS = 20
# What may be skipped on a kernel, and for what reason: anything else that is skipped there has found no way to test at all.
SKIPS = {
    "debian-6.1": (
        r"(all but the scan: )?this kernel has no (PAGEMAP_SCAN|WP_UNPOPULATED|WP_ASYNC|POISON|MOVE)",
        r"no PAGEMAP_SCAN",
        r"all but CONTINUE_MODE_WP, which this kernel has not",
        r"all but that a close clears the protection: not before 6\.9",
        r"WRITEPROTECT takes one mapping at a time before 6\.4",
        r"refused before 6\.13, as it should be",
    ),
    "debian-6.12": (r"this kernel has no guard pages", r"refused before 6\.13, as it should be"),
}

# Of the kernel layer: what depends on the kernel. (A whole run on both found what these find, in ten minutes more.)
HUGETLB = (
    "test_hugetlb.py::test_everything_leaves_and_comes_back",
    "test_hugetlb.py::test_only_touched_pages_stay",
    "test_hugetlb.py::test_adoption",
)
SUITE = (
    "test_life.py::test_everything_leaves_and_comes_back[default]",
    "test_life.py::test_everything_leaves_and_comes_back[zap=2]",
    "test_life.py::test_everything_leaves_and_comes_back[use_pagemap=True]",
    "test_life.py::test_a_busy_guest_reads_what_it_wrote[default]",
    "test_life.py::test_only_idle_pages_leave",
    "test_life.py::test_first_touch_is_not_registered",
    "test_life.py::test_a_balloon_reads_zeros_or_what_was_there",
    "test_life.py::test_an_orderly_keep_and_an_adoption",
    "test_life.py::test_two_daemons_cannot_serve_one_guest",
    "test_rules.py::test_missing_comes_with_write_protection_and_by_chunk",
    "test_rules.py::test_a_vmm_that_dies_after_a_step",
    "test_kill.py::test_a_page_that_does_not_verify_is_a_memory_error",
    "test_kill.py::test_faults_wait_for_the_successor",
    "test_kill.py::test_disarm_is_refused_while_a_page_is_stored",
    "test_successor.py::test_a_vmm_that_closed_its_copy_gets_it_back",
    "test_hazards.py::test_made_by_the_vmm",
    *HUGETLB,
)
LACKS = {
    "debian-6.1": {
        "test_kill.py::test_a_page_that_does_not_verify_is_a_memory_error": "this kernel has no POISON: a page that cannot be "
        "brought back leaves the guest waiting (tierd check says so)",
        **dict.fromkeys(
            HUGETLB, "this kernel has no PAGEMAP_SCAN: memory on hugetlbfs is refused (tierd check says so)"
        ),
    }
}


pytestmark = pytest.mark.timeout(1600)


@pytest.fixture(scope="class")
def sections(request: pytest.FixtureRequest, children: Path, selftest: Path) -> dict[str, Section]:
    name: str = request.cls.kernel
    left_out = LACKS.get(name, {})
    variables = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "TIERD_REQUIRE": "root,kernel,hugetlbfs",
        "TIERD_TEST_DISK": "/var/tmp",
        "TIERD_SLOWNESS": "5",
        "TIERD_TEST_PROGRAMS": str(children),
    }
    first = [f"cd {shlex.quote(str(ROOT))}", *(f"export {key}={shlex.quote(to)}" for key, to in variables.items())]
    commands = {
        "driver": f"{children}/real --slowness 10 --seeds {DRIVER_SEEDS} --store /var/tmp",
        "suite": pytest_in_there([f"tests/kernel/{test}" for test in SUITE if test not in left_out]),
        "selftest": f"{selftest} --system stock",  # the last one: it changes what the system is set to
    }
    print("\n".join(f"not run: {test}: {why}" for test, why in left_out.items()))
    return sections_of(name, first, commands, 1500, cpus=1)[0]  # what needs two is tried on this machine's kernel


class Debian:
    """All of one kernel's tests: one boot."""

    kernel: str

    def test_what_is_relied_on(self, sections: dict[str, Section]) -> None:
        said = sections["selftest"]
        check_selftest(said.status, said.output, said.output, SKIPS[self.kernel])

    def test_the_seeded_driver(self, sections: dict[str, Section]) -> None:
        said = sections["driver"]
        assert said.status == 0, said.output

    def test_the_stock_engine(self, sections: dict[str, Section]) -> None:
        said = sections["suite"]
        print(said.output.partition("= slowest ")[2] or said.output)
        assert said.status == 0, said.output


class TestDebian61(Debian):
    kernel = "debian-6.1"


class TestDebian612(Debian):
    kernel = "debian-6.12"
