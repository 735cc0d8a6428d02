# SPDX-License-Identifier: Apache-2.0
"""Tests of the kernel layer that run in the engines' kernels: all that is about an engine, and the torture; the rest does not
differ from what runs outside. And a daemon that is an ordinary user. In one call of pytest: there its start takes half a minute.
Its plugin, too: where threads race the emulated machine has two CPUs, else one."""

from __future__ import annotations

from pathlib import Path

import pytest

SECOND_CPU = Path("/sys/devices/system/cpu/cpu1/online")
RACES = (
    "tests/kernel/test_windows.py",
    "tests/kernel/test_kill.py::test_torture",
    "tests/kernel/test_hugetlb.py::test_torture",
    "tests/kernel/test_life.py::test_a_busy_guest_reads_what_it_wrote[default]",
    "tests/kernel/test_rules.py::test_a_balloon_under_eviction",
)
REST = (
    "tests/kernel/test_large_folios.py",
    "tests/kernel/test_hugetlb.py::test_everything_leaves_and_comes_back",
    "tests/kernel/test_hugetlb.py::test_only_touched_pages_stay",
    "tests/kernel/test_hugetlb.py::test_adoption",
    "tests/kernel/test_hugetlb.py::test_what_the_vmm_has_unmapped_goes_back_into_its_file",
    "tests/kernel/test_hugetlb.py::test_a_page_that_cannot_be_punched_stays",
    "tests/kernel/test_swap.py",
    "tests/kernel/test_hazards.py::test_a_private_mapping_of_a_file_is_no_memory_to_tier",
    "tests/kernel/test_anonymous.py::test_what_is_only_read_stays_where_the_kernel_tracks_idle_pages",
    "tests/kernel/test_anonymous.py::test_no_more_is_staged_than_leaves",
    "tests/kernel/test_life.py::test_everything_leaves_and_comes_back[default]",
    "tests/kernel/test_life.py::test_only_idle_pages_leave",
    "tests/kernel/test_life.py::test_a_balloon_reads_zeros_or_what_was_there",
    "tests/kernel/test_life.py::test_an_orderly_keep_and_an_adoption",
    "tests/kernel/test_life.py::test_two_daemons_cannot_serve_one_guest",
    "tests/kernel/test_life.py::test_a_real_vcpu[default]",
    "tests/kernel/test_rules.py::test_missing_comes_with_write_protection_and_by_chunk",
    "tests/kernel/test_rules.py::test_a_vmm_that_dies_after_a_step",
    "tests/kernel/test_kill.py::test_a_page_that_does_not_verify_is_a_memory_error",
    "tests/kernel/test_kill.py::test_faults_wait_for_the_successor",
    "tests/kernel/test_kill.py::test_disarm_is_refused_while_a_page_is_stored",
    "tests/daemon/test_unprivileged.py",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = "1" if item.nodeid.startswith(RACES) else "0"
    if SECOND_CPU.read_text().strip() != wanted:
        SECOND_CPU.write_text(wanted)


def pytest_sessionfinish() -> None:
    SECOND_CPU.write_text("1")
