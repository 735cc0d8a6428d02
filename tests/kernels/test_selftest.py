# SPDX-License-Identifier: Apache-2.0
"""What tierd relies on, asked of the kernels that it must run on: this machine's, and Debian's own, booted in QEMU.

Two suites: the C self-test (selftest.c; one small test for each promise of the interface) and, in the booted kernels, the
stock engine's kernel-layer tests. In there time passes ten times as slowly and only the scratch disk can be written: programs are
compiled out here, and what would only repeat itself is repeated less often.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.machine import ROOT, booted, check_selftest
from tests.need import need

DRIVER_SEEDS = 20
POOL = Path("/proc/sys/vm/nr_hugepages")
POOL_PAGES = 16
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

# The stock engine's tests that are not run in a booted kernel (how a name begins), and why.
NO_LOOP = "the loop driver is a module, and not among those that are loaded"
NO_POISON = (
    "this kernel has no POISON: a page that cannot be brought back leaves the guest waiting (tierd check says so)"
)
REPEATS = "what it adds to its siblings does not depend on the kernel, and it takes a minute"
NOT_BOOTED = {
    "test_driver.py::test_seeds": "run by itself, with lives that last longer",
    "test_inject.py": "a call may take a second, and a thread that is flooded with signals may not stop in that time under TCG",
    "test_kill.py::test_torture": "is a matter of how many kills there are in how long",
    "test_kill.py::test_a_torture_run_that_is_ended_leaves_nothing": "the same",
    "test_life.py::test_a_real_vcpu": "no KVM in there",
    "test_life.py::test_everything_leaves_and_comes_back[readahead_pages=1]": REPEATS,
    "test_life.py::test_everything_leaves_and_comes_back[direct=off]": REPEATS,
    "test_life.py::test_a_busy_guest_reads_what_it_wrote[use_pagemap=True]": REPEATS,
    "test_life.py::test_a_busy_guest_reads_what_it_wrote[direct=off]": REPEATS,
    "test_life.py::test_a_busy_guest_reads_what_it_wrote[zap=2]": "under TCG a call inside a busy guest may take over a second",
    "test_rules.py::test_a_busy_vmm_that_is_killed[inject]": "the same",
    "test_rules.py::test_a_file_system_that_is_full_loses_nothing": NO_LOOP,
    "test_rules.py::test_a_device_that_lies_is_a_memory_error": NO_LOOP,
    "test_successor.py::test_a_predecessor_that_hangs_in_its_store_is_waited_for": NO_LOOP,
    "test_hazards.py::test_a_memory_cgroup_at_its_limit": "it wants a cgroup of version 1: Debian 13 has none",
    "test_hazards.py::test_with_swap_nothing_is_swapped_out": "before 6.15 a CPU takes 64 slots of swap at once, and the trial of"
    " PAGEOUT on scratch pages makes it do so: the count that the test compares is not the guest's",
}
LACKS = {
    "debian-6.1": {
        "test_hazards.py::test_a_host_that_makes_large_folios_of_one_size": "this kernel has no setting for each size",
        "test_kill.py::test_a_page_that_does_not_verify_is_a_memory_error": NO_POISON,
        "test_kill.py::test_a_store_that_cannot_be_read_is_a_memory_error": NO_POISON,
        "test_store.py::test_while_one_read_is_tried_again_others_are_served": NO_POISON,
        "test_store.py::test_poison_after_hold_tells_who_was_blocked": NO_POISON,
    }
}


@pytest.fixture
def hugetlb_pool() -> Iterator[None]:
    """A few 2 MiB pages, so that hugetlbfs is not skipped. The machine's own setting comes back."""
    need("root", os.geteuid() == 0, "the pool of huge pages is root's")
    before = POOL.read_text() if POOL.exists() else ""
    if before and int(before) < POOL_PAGES:
        with contextlib.suppress(OSError):
            POOL.write_text(str(POOL_PAGES))
    yield
    if before and int(before) < POOL_PAGES:
        POOL.write_text(before)


def test_this_machine(selftest: Path, hugetlb_pool: None) -> None:
    done = subprocess.run([selftest, "stock"], capture_output=True, text=True, timeout=280)
    check_selftest(done.returncode, done.stdout, done.stdout + done.stderr, None)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", list(SKIPS))
def test_a_debian_kernel(selftest: Path, name: str) -> None:
    done = booted(name, f"{selftest} --system stock", 300)
    check_selftest(done.status or 0, done.output, done.said, SKIPS[name])


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", list(SKIPS))
def test_the_stock_engine_on_a_debian_kernel(children: Path, name: str) -> None:
    left_out = {**NOT_BOOTED, **LACKS.get(name, {})}
    variables = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "TIERD_REQUIRE": "root,kernel",
        "TIERD_TEST_DISK": "/var/tmp",
        "TIERD_SLOWNESS": "5",
        "TIERD_TEST_PROGRAMS": str(children),
    }
    there = ["env", *(f"{key}={value}" for key, value in variables.items()), sys.executable, "-m", "pytest"]
    there += ["-q", "--color=no", "-p", "no:cacheprovider", "--durations=10", "tests/kernel"]
    there += [f"--deselect=tests/kernel/{test}" for test in left_out]
    driver = f"{children}/real --slowness 10 --seeds {DRIVER_SEEDS} --store /var/tmp"
    done = booted(name, f"cd {shlex.quote(str(ROOT))} && {driver} && {shlex.join(there)}", 1200)
    print("\n".join(f"not run: {test}: {why}" for test, why in left_out.items()))
    print(done.output.partition("= slowest ")[2] or done.output)
    assert done.status == 0, done.said
