# SPDX-License-Identifier: Apache-2.0
"""The data plane against the model kernel: every byte that a guest reads is the last one it wrote, whatever dies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.native.build import NATIVE, build_driver, build_threads, run_driver, run_seeds

pytestmark = pytest.mark.timeout(1800)  # it computes beside other tests, and gives way to them

SEEDS = int(os.environ.get("TIERD_SEEDS", "20000"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver") / "driver", ["-O2"])


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    return build_driver(tmp_path_factory.mktemp("sanitized") / "driver", flags)


def test_seeds(driver: Path) -> None:
    """Every seed is a run of a guest, its faults, evictions, failing calls and kills; a failure prints its seed."""
    figures = run_seeds(driver, SEEDS)
    assert figures["kills"] > SEEDS / 2
    assert figures["unwritten"] > 0, "no page left that was read only"
    assert figures["pages evicted"] > SEEDS
    assert figures["repaired"] > 0, "no punch left its page in the cache"
    assert figures["memory errors"] > 0, "no stored copy was destroyed"


@pytest.mark.parametrize("engine", ["rwp", "rfc"])
def test_seeds_of_an_engine_with_a_sync_mode(driver: Path, engine: str) -> None:
    """The same on the model of a kernel that has the interface; the host swaps, and splits large folios."""
    figures = run_seeds(driver, max(SEEDS // 4, 100), "--engine", engine)
    assert figures["pages evicted"] > SEEDS / 8
    assert figures["repaired"] > 0, "no punch left its page in the cache"
    assert figures["memory errors"] > 0, "no stored copy was destroyed"


def test_seeds_in_large_folios(driver: Path) -> None:
    """Of the engine that unmaps all of one when it holds or deactivates a part: who was touched beside it is seen still."""
    figures = run_seeds(driver, max(SEEDS // 8, 100), "--engine", "rfc", "--large")
    assert figures["pages evicted"] > SEEDS / 16
    assert figures["memory errors"] > 0, "no stored copy was destroyed"


@pytest.mark.parametrize("engine", ["stock", "rwp", "rfc"])
def test_seeds_with_odd_answers(driver: Path, engine: str) -> None:
    """EAGAIN, EEXIST, EFAULT, ENOENT, EBUSY of any WRITEPROTECT, POISON, PAGEOUT, though nothing is wrong with the page."""
    figures = run_seeds(driver, max(SEEDS // 10, 100), "--engine", engine, "--odd")
    assert figures["pages evicted"] > 0


@pytest.mark.parametrize("engine", ["stock", "rwp", "rfc"])
def test_seeds_with_a_mapping_made_anew(driver: Path, engine: str) -> None:
    """By the VMM, at the same addresses: it is not registered, and no page of it may leave."""
    figures = run_seeds(driver, max(SEEDS // 10, 100), "--engine", engine, "--remap")
    assert figures["pages evicted"] > 0


@pytest.mark.parametrize("engine", ["stock", "rwp", "rfc"])
def test_seeds_on_hugetlbfs(driver: Path, engine: str) -> None:
    """A page is several of the system's, SEEK_DATA calls every one of them data, and there is no write(2)."""
    figures = run_seeds(driver, max(SEEDS // 10, 100), "--engine", engine, "--hugetlb")
    assert figures["pages evicted"] > SEEDS / 10
    assert figures["kills"] > 0


@pytest.mark.parametrize("engine", ["stock", "rwp", "rfc"])
def test_seeds_with_a_vmm_that_ends(driver: Path, engine: str) -> None:
    """At any step: every call about its memory says ESRCH from then on, and the daemon still comes to an end."""
    figures = run_seeds(driver, max(SEEDS // 10, 100), "--engine", engine, "--vmm-ends")
    assert figures["pages evicted"] > 0


def test_seeds_with_a_store_that_outlives_its_callers(driver: Path) -> None:
    """Rule 11: what a killed daemon had in flight lands at any later time, over the life of its successors."""
    figures = run_seeds(driver, max(SEEDS // 4, 100), "--late-io")
    assert figures["kills"] > 0


@pytest.mark.parametrize(
    "more",
    [
        *([], ["--late-io"], ["--vmm-ends"], ["--remap"]),
        *(["--engine", engine, *more] for engine in ("rwp", "rfc") for more in ([], ["--remap"])),
    ],
    ids=lambda more: " ".join(more) or "stock",
)
def test_seeds_on_anonymous_memory(driver: Path, more: list[str]) -> None:
    """It leaves by way of a staging area in the VMM, whose own thread makes the calls, and goes on with them when we die."""
    seeds = max(SEEDS // 4 if not more else SEEDS // 8, 100)
    figures = run_seeds(driver, seeds, "--anon", *more)
    assert figures["pages evicted"] > seeds / 2
    assert figures["kills"] > seeds / 2 or "--remap" in more
    if "--late-io" not in more:
        assert figures["memory errors"] > 0, "no stored copy was destroyed"


@pytest.mark.parametrize(
    "more",
    [
        *([], ["--late-io"], ["--vmm-ends"], ["--engine", "rwp"], ["--engine", "rfc"]),
        *(["--anon"], ["--anon", "--late-io"], ["--anon", "--engine", "rwp"]),
        *(["--late-io", "--often"], ["--anon", "--late-io", "--often"]),
    ],
    ids=lambda more: " ".join(more) or "stock",
)
def test_seeds_with_a_ladder(driver: Path, more: list[str]) -> None:
    """A pool and a file or two: pages enter at the first that takes them and sink, at any time, while they are wanted."""
    seeds = max(SEEDS // 8, 100)
    figures = run_seeds(driver, seeds, "--ladder", *more)
    assert figures["pages demoted"] > seeds / 4
    assert figures["kills"] > seeds / 2
    if "--late-io" not in more:
        assert figures["memory errors"] > 0, "no stored copy was destroyed"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "more",
    [
        *([], ["--ladder"], ["--ladder", "--often"], ["--anon", "--ladder"], ["--vmm-ends"], ["--hugetlb"]),
        *(["--ladder", "--engine", "rwp"], ["--engine", "rfc"]),
    ],
    ids=lambda more: " ".join(more) or "stock",
)
def test_seeds_with_a_tier_that_python_asks(driver: Path, more: list[str]) -> None:
    """Nobody who serves faults reads it: pages are asked for, and come at any time, in any order, or not."""
    seeds = max(SEEDS // 10, 100)
    figures = run_seeds(driver, seeds, "--asked", *more)
    assert figures["pages evicted"] > seeds / 2
    assert figures["kills"] > seeds / 2
    assert figures["memory errors"] > 0, "no stored copy was destroyed"


@pytest.mark.parametrize(
    "more", [(), ("--anon",), ("--ladder", "--asked")], ids=["shared", "anonymous", "ladder, asked"]
)
def test_seeds_under_address_and_undefined_behaviour_sanitizers(sanitized: Path, more: tuple[str, ...]) -> None:
    run_seeds(sanitized, max(SEEDS // 20, 100), *more, first=1000000)


def test_a_seed_reproduces_a_run(driver: Path) -> None:
    first, second = (run_driver(driver, "--seeds", "20", "--from", "77") for _ in range(2))
    assert first.returncode == 0
    assert first.stdout == second.stdout


def _run_threads(binary: Path, rounds: int, seed: int, *more: str) -> subprocess.CompletedProcess[str]:
    # without address randomization, which some kernels do more of than the sanitizer can take
    command = ["setarch", "-R", str(binary), "--rounds", str(rounds), "--seed", str(seed), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_threads_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """Guest threads, fault workers, the evictor and a reader of counters really at once; daemons that succeed each other."""
    binary = build_threads(tmp_path / "threads")
    for seed in range(1, 3):
        for more in ((), ("--anon", "1"), ("--asked", "1")):
            done = _run_threads(binary, max(SEEDS // 2500, 6), seed, *more)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_thread_sanitizer_sees_a_word_that_orders_nothing(tmp_path: Path) -> None:
    """The page's word is what hands a page from one thread to another: with relaxed moves that must show."""
    for source in NATIVE.glob("*.[ch]"):
        shutil.copy(source, tmp_path)
    for name in ("table.c", "internal.h"):
        text, count = re.subn(
            "memory_order_(acq_rel|acquire|release)", "memory_order_relaxed", (tmp_path / name).read_text()
        )
        assert count, "the code has changed, write the mutation anew"
        (tmp_path / name).write_text(text)
    binary = build_threads(tmp_path / "threads", native=tmp_path)
    assert any(_run_threads(binary, 10, seed).returncode != 0 for seed in range(1, 6))
