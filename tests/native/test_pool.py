# SPDX-License-Identifier: Apache-2.0
"""The compressed pool on the real kernel: under the sanitizers, killed, full, and what it wastes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import EXAMPLES
from tests.native.build import NATIVE, build_pool, run_driver
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


MUTATIONS = {
    "moved_object_is_freed_before_the_entry_refers_to_its_copy": (
        "	index_store(p, page, to);\n	object_put(p, from);",
        "	object_put(p, from);\n	index_store(p, page, to);",
    ),
    "former_object_is_freed_before_the_entry_refers_to_the_new_one": (
        "	before = index_load(p, page);\n	index_store(p, page, entry);\n",
        "	before = index_load(p, page);\n	if (before)\n		object_put(p, before);\n	index_store(p, page, entry);\n",
    ),
    "entry_refers_to_an_object_that_is_not_complete": (
        "	*o = made;\n	memcpy(",
        "	index_store(p, page, entry);\n	*o = made;\n	memcpy(",
    ),
    "stale_objects_are_taken_for_stored": (
        "o->page < p->pages && index_load(p, o->page) == entry",
        "o->page < p->pages",
    ),
    "space_is_taken_before_the_directory_says_so": (
        "	directory_store(p, slot, number); /*",
        "	/*",
    ),
    "directory_forgets_a_slot_before_its_space_is_given_back": (
        "	int error = punch(p, slot_memory(p, slot), bytes);",
        "	int error;\n\n	directory_store(p, slot, 0);\n	error = punch(p, slot_memory(p, slot), bytes);",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_an_order_that_is_broken_is_noticed(tmp_path: Path, name: str) -> None:
    old, new = MUTATIONS[name]
    native = tmp_path / "native"
    shutil.copytree(NATIVE, native)
    sources = {path: path.read_text() for path in native.glob("pool*.c")}
    (path,) = (path for path, source in sources.items() if old in source)
    path.write_text(sources[path].replace(old, new, 1))
    binary = build_pool(tmp_path / "deaths", ["-O1", "-DTIERD_MODEL"], native)
    done = run_driver(binary, "deaths", "1", "20000")
    assert done.returncode == 1
    assert "seed 1: " in done.stderr


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
