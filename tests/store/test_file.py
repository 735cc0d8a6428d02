# SPDX-License-Identifier: Apache-2.0
"""The file store: what it refuses, what it leaves behind, what it sweeps."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.need import need
from tierd.native import Codec
from tierd.store import StoreError, memory
from tierd.store.directory import file_system_of
from tierd.store.file import FileStore, reopen

PAGE = os.sysconf("SC_PAGESIZE")
KEY = "4711-123456"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if file_system_of(tmp_path) == "tmpfs":
        pytest.skip("the temporary directory is on tmpfs; set TMPDIR to a directory on a disk")
    return tmp_path


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tierd-test-") as path:
        yield Path(path)


@pytest.mark.parametrize("direct", ["auto", "on", "off"])
def test_a_page_is_at_its_number(disk: Path, direct: str) -> None:
    store = FileStore(disk / "store", None, direct)  # type: ignore[arg-type]
    assert store.direct == (direct != "off"), "this file system should take O_DIRECT"
    space = store.create(KEY, 64, PAGE)
    try:
        info = os.fstat(space.fd)
        assert (info.st_size, info.st_blocks) == (64 * PAGE, 0), "sparse"
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert stat.S_IMODE((disk / "store").stat().st_mode) == 0o700
        assert space.drop_cache == (not space.direct)
    finally:
        space.close()
    again = reopen(disk / "store" / f"guest-{KEY}.pages", 64, PAGE, direct=store.direct)
    assert os.fstat(again.fd).st_ino == info.st_ino
    again.close()
    again.delete()
    again.delete()  # gone already: fine
    assert not list((disk / "store").iterdir())


def test_a_store_in_memory_is_refused(shm: Path) -> None:
    with pytest.raises(StoreError, match=r"on tmpfs: .*nothing would be given back.*store.path"):
        FileStore(shm, None, "auto")


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o707])
def test_a_directory_that_others_can_read_is_refused(disk: Path, mode: int) -> None:
    (disk / "open").mkdir()
    (disk / "open").chmod(mode)
    with pytest.raises(StoreError, match="others could read guests' memory; chmod 0700"):
        FileStore(disk / "open", None, "auto")


def test_a_directory_of_somebody_else_is_refused(disk: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    (disk / "theirs").mkdir(mode=0o700)
    os.chown(disk / "theirs", 65534, 65534)
    with pytest.raises(StoreError, match="belongs to user 65534"):
        FileStore(disk / "theirs", None, "auto")


def test_what_is_not_a_directory_is_refused(disk: Path) -> None:
    (disk / "file").touch()
    with pytest.raises(StoreError, match=r"store\.path"):
        FileStore(disk / "file", None, "auto")
    (disk / "real").mkdir(mode=0o700)
    (disk / "link").symlink_to(disk / "real")
    with pytest.raises(StoreError, match="is not a directory"):
        FileStore(disk / "link", None, "auto")


def test_adoption_takes_only_a_file_of_the_right_size(disk: Path) -> None:
    store = FileStore(disk / "store", None, "off")
    with pytest.raises(StoreError, match="cannot be opened"):
        reopen(disk / "store" / f"guest-{KEY}.pages", 64, PAGE, direct=store.direct)
    store.create(KEY, 64, PAGE).close()
    with pytest.raises(StoreError, match="nothing was touched"):
        reopen(disk / "store" / f"guest-{KEY}.pages", 65, PAGE, direct=store.direct)
    assert os.stat(disk / "store" / f"guest-{KEY}.pages").st_size == 64 * PAGE


def test_a_link_in_place_of_the_file_is_not_followed(disk: Path) -> None:
    store = FileStore(disk / "store", None, "off")
    victim = disk / "victim"
    victim.write_bytes(b"x" * 64 * PAGE)
    (disk / "store" / f"guest-{KEY}.pages").symlink_to(victim)
    with pytest.raises(StoreError):
        reopen(disk / "store" / f"guest-{KEY}.pages", 64, PAGE, direct=store.direct)
    space = store.create(KEY, 64, PAGE)  # a leftover is replaced, not written through
    space.close()
    assert victim.read_bytes() == b"x" * 64 * PAGE


def test_two_tierds_with_one_directory(disk: Path) -> None:
    """Both find the same VMM in the same second: one of them serves it, and what that one stores keeps its name."""
    first, second = (FileStore(disk / "store", None, "off") for _ in range(2))
    space = first.create(KEY, 64, PAGE)
    with pytest.raises(StoreError, match=r"another tierd's.*store.path"):
        second.create(KEY, 64, PAGE)
    assert space.missing() is None
    adopted = reopen(space.path, 64, PAGE, direct=False)
    space.close()
    with pytest.raises(StoreError, match="another tierd's"):
        second.create(KEY, 64, PAGE)
    assert adopted.missing() is None
    adopted.close()
    again = second.create(KEY, 64, PAGE)  # nobody's any more
    assert again.missing() is None
    again.close()


def test_no_descriptor_is_left_at_an_attach(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the other tierd's file is taken for a leftover then, nor is one of ours left locked."""
    store = FileStore(disk / "store", None, "off")

    def none(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr("tierd.store.file.file_system_of", none)
        with pytest.raises(StoreError, match="Too many open files"):
            store.create(KEY, 64, PAGE)
    space = store.create(KEY, 64, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr("tierd.store.directory.open_ours", none)
        with pytest.raises(StoreError, match="Too many open files"):
            store.create(KEY, 64, PAGE)
    assert space.missing() is None
    space.close()


IN_A_NAMESPACE = """
import os, subprocess, sys
from pathlib import Path
from tierd.store.directory import file_system_of
for name in b"\\xfc", b"a\\x0cb", b"a\\rb c", b"a - b":
    place = os.path.join(os.fsencode(sys.argv[1]), name)
    os.mkdir(place)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    assert file_system_of(Path(os.fsdecode(place))) == "tmpfs", name
assert file_system_of(Path("/proc")) == "proc"
"""


def test_mount_points_may_have_any_name(tmp_path: Path) -> None:
    """Anybody's, anywhere on the host: a tierd that starts looks through them for its own directories."""
    need("root", os.geteuid() == 0, "mounting needs root")
    subprocess.run(["unshare", "--mount", sys.executable, "-c", IN_A_NAMESPACE, tmp_path], check=True)


def test_sweep_asks_before_it_removes(disk: Path) -> None:
    """The store's file of a VMM that lives is the only copy of its evicted pages, whoever serves it or nobody."""
    store = FileStore(disk / "store", None, "off")
    for key in ("1-1", "2-2", "3-3"):
        store.create(key, 4, PAGE).close()
    (disk / "store" / "guest-notes.pages").touch()
    (disk / "store" / "something else").touch()
    (disk / "store" / "guest-9-9.pages").symlink_to(disk / "nowhere")
    asked: list[str] = []

    def may_be_needed(key: str) -> bool:
        asked.append(key)
        return key == "2-2"

    assert store.sweep(may_be_needed) == ["1-1", "3-3"]
    assert sorted(asked) == ["1-1", "2-2", "3-3"]
    left = {path.name for path in (disk / "store").iterdir()}
    assert left == {"guest-2-2.pages", "guest-notes.pages", "something else", "guest-9-9.pages"}


def test_capacity_counts_all_guests(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.store.directory.USED_CACHE_S", 0.0)
    store = FileStore(disk / "store", 64 * PAGE, "off")
    a, b = (store.create(key, 64, PAGE) for key in ("1-1", "2-2"))
    try:
        assert (store.used_bytes(), store.free_bytes()) == (0, 64 * PAGE)
        os.pwrite(a.fd, b"a" * 16 * PAGE, 8 * PAGE)
        os.pwrite(b.fd, b"b" * 40 * PAGE, 0)
        os.fsync(a.fd)
        os.fsync(b.fd)
        assert a.used_bytes() >= 16 * PAGE
        assert store.used_bytes() >= 56 * PAGE
        assert store.free_bytes() <= 8 * PAGE
        os.pwrite(b.fd, b"b" * 24 * PAGE, 40 * PAGE)
        os.fsync(b.fd)
        assert store.free_bytes() == 0, "never negative"
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_store_that_cannot_be_written_is_used_if_guests_wait_for_it(
    disk: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An empty one is refused: its operator is there to see it."""
    FileStore(disk / "store", None, "off").create(KEY, 4, PAGE).close()
    (disk / "empty").mkdir(mode=0o700)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", fail)
    with pytest.raises(StoreError, match=os.strerror(number)):
        FileStore(disk / "empty", None, "auto")
    store = FileStore(disk / "store", None, "auto")
    assert os.strerror(number) in store.trouble
    assert not store.direct, "reading through the page cache works everywhere"
    assert FileStore(disk / "store", None, "on").direct


def test_compressed_memory_without_its_library(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(memory._LIBRARIES, Codec.LZ4, ("libnowhere.so.1", "liblz4-1"))
    with pytest.raises(StoreError, match=r"needs libnowhere\.so\.1: .*install it \(Debian: liblz4-1\)"):
        memory.MemoryStore(shm, None, Codec.LZ4).must_have_library()
