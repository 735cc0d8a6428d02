# SPDX-License-Identifier: Apache-2.0
"""The compressed pool on the real kernel: under the sanitizers, killed, full, and what it wastes."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import EXAMPLES
from tests.native.build import build_pool, run_driver
from tests.need import need

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
    return build_pool(tmp_path_factory.mktemp("pool") / "checked", flags)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pool(tmp_path_factory.mktemp("pool") / "quick", ["-O2"])


def figures(binary: Path, *arguments: str | int | Path) -> dict[str, int]:
    """What a run says it did: a number for each word."""
    done = run_driver(binary, *map(str, arguments), timeout_s=3500)
    assert done.returncode == 0, done.stdout + done.stderr
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", done.stdout)}


def test_what_was_stored_is_there(checked: Path) -> None:
    did = figures(checked, "seeds", 1, EXAMPLES)
    assert min(did["refused"], did["full"], did["moves"], did["adoptions"]) > EXAMPLES


def test_flipped_bits_crash_nothing(checked: Path) -> None:
    assert figures(checked, "flips", 1, EXAMPLES)["damaged"] > EXAMPLES // 10


def test_killed_at_any_moment(quick: Path) -> None:
    did = figures(quick, "kills", 1, 10 * EXAMPLES)
    assert did["verified"] > 3 * EXAMPLES, "most children live long enough to look at every page"
    assert did["moves"] > EXAMPLES


def test_dead_at_any_step(tmp_path: Path) -> None:
    binary = build_pool(tmp_path / "deaths", ["-O1", "-DTIERD_MODEL"])
    did = figures(binary, "deaths", 1, 20 * EXAMPLES)
    assert min(did["verified"], did["moves"]) > 3 * EXAMPLES


def test_files_that_are_no_pool_are_refused(checked: Path) -> None:
    assert figures(checked, "headers", 1, EXAMPLES)["files"] == EXAMPLES


@pytest.mark.parametrize("seed", [1, 2], ids=["lz4", "zstd"])
def test_readers_beside_the_worker(tmp_path: Path, seed: int) -> None:
    binary = build_pool(tmp_path / "threads", ["-O1", "-fsanitize=thread", "-Wno-tsan"])
    did = figures(binary, "threads", seed, 100 * EXAMPLES)
    assert min(did["writes"], did["moves"], did["reads"]) > EXAMPLES


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    need("root", os.geteuid() == 0, "mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tierd-test", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_file_system_is_an_error_and_no_signal(checked: Path, small_tmpfs: Path) -> None:
    did = figures(checked, "full", 1, 200 * EXAMPLES, small_tmpfs / "pool")
    assert min(did["full"], did["adoptions"]) > EXAMPLES // 10


LINE = re.compile(r"(\d) (\w+) (\d+) pages (\d+) payload (\d+) used (\d+) zsmalloc ([\d.]+) metadata")


def test_waste_is_under_a_tenth(quick: Path) -> None:
    done = run_driver(quick, "waste", "1", "50000")
    assert done.returncode == 0, done.stderr
    lines = LINE.findall(done.stdout)
    assert len(lines) == 14
    for mix, when, _, payload, used, zsmalloc, metadata in lines:
        what = f"mix {mix} {when}"
        assert 1 - int(payload) / int(used) < 0.1 or (mix, when) == ("4", "compacted"), what
        if when == "full":
            assert float(metadata) <= 16, what
            assert int(used) <= 1.05 * int(zsmalloc), what


def test_a_missing_library_is_told_from_a_useless_one(quick: Path, tmp_path: Path) -> None:
    (tmp_path / "liblz4.so.1").write_text("no library")
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", tmp_path / "libzstd.so.1"], check=True)
    plain = subprocess.run([quick, "codecs"], capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    other = subprocess.run([quick, "codecs"], capture_output=True, text=True, check=True, env=environment).stdout
    assert "codec 1 level 1 liblz4.so.1: fine" in plain
    assert "codec 1 level -1 liblz4.so.1: EINVAL" in plain
    assert "codec 2 level -1 libzstd.so.1: fine" in plain
    assert "codec 3 level 1 (null): EINVAL" in plain
    assert "codec 1 level 1 liblz4.so.1: ELIBACC" in other
    assert "codec 2 level 1 libzstd.so.1: ELIBBAD" in other
