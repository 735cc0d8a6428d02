# SPDX-License-Identifier: Apache-2.0
"""The seeded driver's script on the real kernel: the real userfaultfd, a real store, a daemon that is a process and is killed.

A seed says what everybody wants to do and when; the kernel says who comes first. So a seed that failed may need several runs to
fail again: `real --from SEED --seeds 1`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.kernel.host_memory import huge_pages
from tests.kernel.vmm import need_anonymous
from tests.native.build import build_real, run_seeds

SEEDS = int(os.environ.get("TIERD_REAL_SEEDS", "700"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_real(tmp_path_factory.mktemp("real") / "real", ["-O2"])


@pytest.mark.timeout(3600)
def test_seeds(real: Path, disk_dir: Path) -> None:
    figures = run_seeds(real, SEEDS, "--store", str(disk_dir), timeout_s=3500)
    for moment in ("at the start", "in adoption", "in service", "while leaving"):
        assert figures[f"kills {moment}"] > 0
    assert figures["pages evicted"] > SEEDS
    assert figures["memory errors"] > 0, "no stored copy was destroyed and touched"


def test_seeds_on_hugetlbfs(real: Path, disk_dir: Path) -> None:
    with huge_pages(64 * len(os.sched_getaffinity(0))):
        figures = run_seeds(
            real,
            max(SEEDS // 14, 10),
            "--hugetlb",
            "--slowness",
            "10",
            "--store",
            str(disk_dir),
        )
    assert figures["kills in service"] > 0
    assert figures["pages evicted"] > SEEDS // 14


@pytest.mark.timeout(900)
def test_seeds_with_a_store_that_python_asks(real: Path, disk_dir: Path) -> None:
    """Its part is played by a thread that takes requests and answers them late, in another order, or with an error."""
    figures = run_seeds(real, max(SEEDS // 7, 20), "--asked", "--store", str(disk_dir))
    assert figures["pages evicted"] > 0
    assert figures["kills in service"] > 0


@pytest.mark.timeout(900)
def test_seeds_on_anonymous_memory(real: Path, disk_dir: Path) -> None:
    """The VMM's calls are really made inside of it, by a thread that is interrupted, and go on when the daemon is killed."""
    need_anonymous()
    seeds = max(SEEDS // 2, 10)
    figures = run_seeds(real, seeds, "--anon", "--store", str(disk_dir))
    assert figures["kills in service"] > 0
    assert figures["pages evicted"] > seeds
    assert figures["memory errors"] > 0, "no stored copy was destroyed and touched"


@pytest.mark.parametrize("more", [(), ("--anon",)], ids=["shared", "anonymous"])
@pytest.mark.parametrize(
    ("flags", "wrapper"),
    [
        (["-fsanitize=address,undefined", "-fno-sanitize-recover"], []),
        # without address randomization, which some kernels do more of than the sanitizer can take
        (["-fsanitize=thread", "-Wno-tsan"], ["setarch", "-R"]),
    ],
    ids=["address_and_undefined", "thread"],
)
def test_seeds_under_a_sanitizer(
    tmp_path: Path, disk_dir: Path, flags: list[str], wrapper: list[str], more: tuple[str, ...]
) -> None:
    if more:
        need_anonymous()
    binary = build_real(tmp_path / "real", ["-O1", *flags])
    figures = run_seeds(binary, SEEDS // 7, *more, "--store", str(disk_dir), first=1000000, wrapper=wrapper)
    assert figures["kills in service"] > 0
    assert figures["pages evicted"] > 0
