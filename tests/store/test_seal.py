# SPDX-License-Identifier: Apache-2.0
"""Encryption at rest: what a store that lies can do, and what becomes of keys."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio

from tests.store.servers import Server
from tests.store.writers import sealed as sealed_with
from tierd.native.records import TAG_BYTES
from tierd.store import IntegrityError, PageSpace, PageStore, StoreContext, StoreError
from tierd.store.keys import sweep
from tierd.store.plugins import make_store
from tierd.store.records import RecordSpace
from tierd.store.seal import ARRAY_AT, FILE, NONCES, SealKey
from tierd.testing import PAGE, PageStoreContract, records

GUEST, OTHER = "4711-123456", "4712-1"
PAGES = 1024


class Dictionary:
    """A PageSpace that the test reads and writes behind the seal's back."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}

    async def write(self, first_page: int, records: Sequence[bytes]) -> None:
        self.records |= dict(enumerate(records, first_page))

    async def read(self, first_page: int, count: int) -> list[bytes | None]:
        return [self.records.get(page) for page in range(first_page, first_page + count)]

    async def discard(self, first_page: int, count: int) -> None:
        for page in range(first_page, first_page + count):
            self.records.pop(page, None)

    async def used_bytes(self) -> int:
        return sum(map(len, self.records.values()))

    async def delete(self) -> None:
        self.records.clear()

    async def aclose(self) -> None:
        pass


class Sealed:
    """A sealed space and all that it rests on."""

    def __init__(self, directory: Path) -> None:
        self.key = SealKey.create(directory, "tape", GUEST, PAGES)
        self.inner = Dictionary()
        self.space: PageSpace = RecordSpace(self.inner, PAGE, self.key)

    def write(self, first_page: int, content: Sequence[bytes]) -> None:
        trio.run(self.space.write, first_page, content)

    def read(self, first_page: int, count: int) -> list[bytes | None]:
        return trio.run(self.space.read, first_page, count)


@pytest.fixture
def sealed(tmpfs_dir: Path) -> Iterator[Sealed]:
    sealed = Sealed(tmpfs_dir)
    yield sealed
    sealed.key.close()


class SealedStore:
    """Compresses and seals what a store keeps."""

    def __init__(self, inner: PageStore, directory: Path) -> None:
        self.inner, self.directory = inner, directory
        self.probe, self.sweep, self.aclose = inner.probe, inner.sweep, inner.aclose

    async def open(self, key: str, pages: int, page_bytes: int) -> PageSpace:
        space = await self.inner.open(key, pages, page_bytes)
        return sealed_with(space, self.directory, key, pages)


class TestSealed(PageStoreContract):
    @pytest.fixture(autouse=True)
    def _where(self, server: Server, tmpfs_dir: Path) -> None:
        self.options, self.directory = {"addresses": [server.address], "host_id": "sealed"}, tmpfs_dir

    def make_store(self) -> PageStore:
        return SealedStore(make_store("redis", self.options, StoreContext(self.directory)), self.directory)


def _with_one_bit_more(record: bytes, bit: int) -> bytes:
    return (int.from_bytes(record, "little") ^ 1 << bit).to_bytes(len(record), "little")


@pytest.mark.parametrize("count", [1, 3, 100])
def test_the_store_sees_nothing_and_the_guest_everything(sealed: Sealed, count: int) -> None:
    pages = records(10, count, size=PAGE)  # these do not compress: unsealed, the store would see them
    sealed.write(10, pages)
    assert sealed.read(10, count) == pages
    assert sealed.read(9, 1) == sealed.read(10 + count, 1) == [None]
    assert len(set(sealed.inner.records.values())) == count
    for record, page in zip(sealed.inner.records.values(), pages, strict=True):
        assert len(record) == 1 + PAGE + TAG_BYTES, "and 8 bytes a page in the key's file: 32 are allowed"
        assert not [at for at in range(0, PAGE, 16) if page[at : at + 16] in record]
    trio.run(sealed.space.discard, 10, 1)
    assert sealed.read(10, 1) == [None]
    trio.run(sealed.space.delete)
    assert trio.run(sealed.space.used_bytes) == 0


def test_the_same_page_never_looks_the_same(sealed: Sealed) -> None:
    seen = set()
    for _ in range(3):
        sealed.write(0, [bytes(PAGE)] * 2)
        seen |= set(sealed.inner.records.values())
    assert len(seen) == 6


def test_every_bit_counts(sealed: Sealed) -> None:
    sealed.write(3, records(3, 1))
    good = sealed.inner.records[3]
    rng = random.Random(1)
    for bit in [*range(8 * 40), *range(8 * len(good) - 8 * 40, 8 * len(good)), *rng.sample(range(8 * len(good)), 200)]:
        sealed.inner.records[3] = _with_one_bit_more(good, bit)
        with pytest.raises(IntegrityError, match="page 3 "):
            sealed.read(3, 1)
    sealed.inner.records[3] = good
    assert sealed.read(3, 1) == records(3, 1)


def test_a_record_that_is_cut_off_or_longer(sealed: Sealed) -> None:
    sealed.write(0, records(0, 1))
    good = sealed.inner.records[0]
    for wrong in (b"", good[:15], good[:16], good[:17], good[:-1], good[1:], good + b"\0", good * 2):
        sealed.inner.records[0] = wrong
        with pytest.raises(IntegrityError):
            sealed.read(0, 1)


def test_pages_that_are_swapped(sealed: Sealed) -> None:
    sealed.write(0, records(0, 3))
    stored = sealed.inner.records
    stored[0], stored[1] = stored[1], stored[0]
    assert sealed.read(2, 1) == records(2, 1)
    for page in (0, 1):
        with pytest.raises(IntegrityError, match=f"page {page} "):
            sealed.read(page, 1)
    with pytest.raises(IntegrityError):
        sealed.read(0, 3)


def test_an_older_record(sealed: Sealed) -> None:
    sealed.write(5, records(5, 1, 1))
    old = sealed.inner.records[5]
    sealed.write(5, records(5, 1, 2))
    assert sealed.read(5, 1) == records(5, 1, 2)
    sealed.inner.records[5] = old
    with pytest.raises(IntegrityError, match=r"old.*see who else can write"):
        sealed.read(5, 1)


def test_an_older_record_of_the_same_bytes(sealed: Sealed) -> None:
    """That the page has not changed is no reason to believe the store."""
    sealed.write(5, records(5, 1))
    old = sealed.inner.records[5]
    sealed.write(5, records(5, 1))
    sealed.inner.records[5] = old
    with pytest.raises(IntegrityError):
        sealed.read(5, 1)


def test_a_page_that_was_never_written(sealed: Sealed) -> None:
    sealed.write(0, records(0, 1))
    sealed.inner.records[7] = sealed.inner.records[0]
    with pytest.raises(IntegrityError, match="page 7 "):
        sealed.read(7, 1)
    assert sealed.read(0, 1) == records(0, 1)


@pytest.mark.parametrize("lands", [False, True])
def test_a_write_that_fails_or_is_cut_off_by_a_kill(
    sealed: Sealed, tmpfs_dir: Path, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    """The nonces are noted, the records are there or not. Other pages are not disturbed; the page is written again."""
    write = sealed.inner.write

    async def fails(first_page: int, records: Sequence[bytes]) -> None:
        if lands:
            await write(first_page, records)
        raise OSError(errno.EIO, "the answer was lost")

    sealed.write(0, records(0, 4))
    monkeypatch.setattr(sealed.inner, "write", fails)
    with pytest.raises(OSError, match="lost"):
        sealed.write(1, records(1, 2, 1))
    monkeypatch.undo()
    successor = RecordSpace(sealed.inner, PAGE, SealKey.reopen(tmpfs_dir, "tape", GUEST, PAGES))
    assert trio.run(successor.read, 0, 1) == records(0, 1)
    assert trio.run(successor.read, 3, 1) == records(3, 1)
    if lands:
        assert trio.run(successor.read, 1, 2) == records(1, 2, 1)
    else:
        with pytest.raises(IntegrityError, match="page 1 "):
            trio.run(successor.read, 1, 2)
    trio.run(successor.write, 1, records(1, 2, 2))
    assert trio.run(successor.read, 0, 4) == records(0, 1) + records(1, 2, 2) + records(3, 1)


def test_no_room_for_nonces_is_an_error_before_anything_is_sent(
    sealed: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.pwrite", lambda *_: 0)
    with pytest.raises(OSError) as caught:
        sealed.write(0, records(0, 4))
    assert caught.value.errno == errno.ENOSPC
    assert not sealed.inner.records


def test_pages_that_were_never_written_take_no_memory(tmpfs_dir: Path) -> None:
    key = SealKey.create(tmpfs_dir, "tape", GUEST, 1 << 28)  # 1 TiB
    key.take(1 << 27, 512)
    assert key.path.stat().st_blocks * 512 <= 3 * 4096
    key.close()


def test_another_guests_page(sealed: Sealed, tmpfs_dir: Path) -> None:
    """Of the same number and nonce."""
    sealed.write(0, records(0, 1))
    other = Sealed.__new__(Sealed)
    other.key, other.inner = SealKey.create(tmpfs_dir, "tape", OTHER, PAGES), Dictionary()
    other.space = RecordSpace(other.inner, PAGE, other.key)
    other.write(0, records(0, 1))
    assert other.key.nonces(0, 1) == sealed.key.nonces(0, 1)
    other.inner.records[0] = sealed.inner.records[0]
    with pytest.raises(IntegrityError):
        other.read(0, 1)
    other.key.close()


def test_a_guest_has_a_key_for_each_store(sealed: Sealed, tmpfs_dir: Path) -> None:
    """A page that moves from one to another is in both for a while."""
    sealed.write(0, records(0, 1))
    colder = SealKey.create(tmpfs_dir, "vault", GUEST, PAGES)
    space = RecordSpace(Dictionary(), PAGE, colder)
    trio.run(space.write, 0, sealed.read(0, 1))
    assert sealed.read(0, 1) == trio.run(space.read, 0, 1) == records(0, 1)
    colder.close()


def test_a_store_that_gives_fewer_records(sealed: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def one_less(first_page: int, count: int) -> list[bytes | None]:
        return [None] * (count - 1)

    monkeypatch.setattr(sealed.inner, "read", one_less)
    with pytest.raises(IntegrityError, match="2 records for 3 pages from page 7 on"):
        sealed.read(7, 3)


def test_a_successor_reads_on_and_uses_no_nonce_again(sealed: Sealed, tmpfs_dir: Path) -> None:
    sealed.write(0, records(0, 1))
    seen = list(sealed.key.nonces(0, 1))
    again = SealKey.reopen(tmpfs_dir, "tape", GUEST, PAGES)  # the first one still lives: even then
    assert trio.run(RecordSpace(sealed.inner, PAGE, again).read, 0, 1) == records(0, 1)
    for key in (sealed.key, again, sealed.key, SealKey.reopen(tmpfs_dir, "tape", GUEST, PAGES)):
        seen += key.take(0, 10)
    assert len(set(seen)) == len(seen)
    assert 0 not in seen


def test_two_processes_that_write_the_same_page(sealed: Sealed, tmpfs_dir: Path) -> None:
    """It must not happen, and if it does, only what was sealed last can be read."""
    other = RecordSpace(sealed.inner, PAGE, SealKey.reopen(tmpfs_dir, "tape", GUEST, PAGES))
    sealed.write(0, records(0, 1, 1))
    first = sealed.inner.records[0]
    trio.run(other.write, 0, records(0, 1, 2))
    assert sealed.read(0, 1) == records(0, 1, 2)
    sealed.inner.records[0] = first
    with pytest.raises(IntegrityError):
        trio.run(other.read, 0, 1)


def test_nonces_go_on_beyond_a_block(sealed: Sealed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierd.store.seal.NONCES", 4)
    other = SealKey.reopen(sealed.key.path.parent, "tape", GUEST, PAGES)
    nonces = [nonce for count in (1, 2, 3, 4, 5, 9) for key in (sealed.key, other) for nonce in key.take(0, count)]
    assert len(set(nonces)) == len(nonces) == 48


KILLED = """
import os, sys
from pathlib import Path
from tierd.store.seal import SealKey
key = SealKey.reopen(Path(sys.argv[1]), "tape", sys.argv[2], int(sys.argv[3]))
while True:
    os.write(1, key.take(0, 1).tobytes())
"""


def test_no_nonce_comes_back_after_a_kill(sealed: Sealed) -> None:
    seen: list[bytes] = []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(sealed.key.path.parent), GUEST, str(PAGES)], stdout=subprocess.PIPE
        )
        assert process.stdout
        with process.stdout as pipe:
            seen += [pipe.read(8) for _ in range(1000)]
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert len(set(seen)) == len(seen) == 3000
    assert FILE.unpack(sealed.key.path.read_bytes()[: FILE.size])[2] == 3 * NONCES + 1


def test_a_key_is_a_file_that_only_we_can_read(sealed: Sealed, tmpfs_dir: Path) -> None:
    assert sealed.key.path.parent == tmpfs_dir
    assert stat.S_IMODE(sealed.key.path.stat().st_mode) == 0o600
    first = sealed.key.path.read_bytes()
    assert SealKey.create(tmpfs_dir, "tape", GUEST, PAGES).path.read_bytes() != first, "a leftover is not used again"


def test_a_destroyed_key_is_gone_from_memory_too(sealed: Sealed, tmpfs_dir: Path) -> None:
    sealed.write(0, records(0, 1))
    with sealed.key.path.open("rb") as still_open:
        sealed.key.destroy()
        assert not any(still_open.read())
    with pytest.raises(IntegrityError):
        sealed.read(0, 1)
    with pytest.raises(StoreError, match=r"cannot be opened: No such file.*cannot be read"):
        SealKey.reopen(tmpfs_dir, "tape", GUEST, PAGES)


def test_nothing_is_sealed_with_a_key_that_another_process_destroyed(sealed: Sealed) -> None:
    sealed.key.path.write_bytes(bytes(ARRAY_AT + 8 * PAGES))
    with pytest.raises(StoreError, match="destroyed"):
        sealed.write(0, records(0, 1))


def test_a_key_on_a_disk_is_refused(disk_dir: Path) -> None:
    with pytest.raises(StoreError, match=r"keys would outlive a boot; set runtime_dir"):
        SealKey.create(disk_dir, "tape", GUEST, PAGES)
    assert not list(disk_dir.iterdir())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.chmod(0o640), "mode 0640"),
        (lambda path: path.write_bytes(b"short"), "5 bytes"),
        (lambda path: path.write_bytes(bytes(ARRAY_AT + 8 * PAGES)), "no key of a guest"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "a FIFO"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "a symbolic link"),
    ],
)
def test_what_is_no_key_of_ours_is_refused(sealed: Sealed, spoil: Callable[[Path], object], why: str) -> None:
    spoil(sealed.key.path)
    with pytest.raises(StoreError, match=why):
        SealKey.reopen(sealed.key.path.parent, "tape", GUEST, PAGES)


def test_keys_of_guests_that_are_gone_are_destroyed(sealed: Sealed, tmpfs_dir: Path) -> None:
    SealKey.create(tmpfs_dir, "tape", OTHER, PAGES).close()
    SealKey.create(tmpfs_dir, "vault", OTHER, PAGES).close()
    (tmpfs_dir / "notes.key").write_text("not ours")
    (tmpfs_dir / "9-9.key").symlink_to(tmpfs_dir / "notes.key")
    assert sweep(tmpfs_dir, lambda guest: guest == GUEST) == [OTHER]
    assert {path.name for path in tmpfs_dir.iterdir()} == {f"{GUEST}.tape.key", "notes.key", "9-9.key"}
    assert (tmpfs_dir / "notes.key").read_text() == "not ours"


def test_keys_that_somebody_else_destroys_meanwhile_are_none_of_a_sweeps(tmpfs_dir: Path) -> None:
    for store in "tape", "vault":
        SealKey.create(tmpfs_dir, store, GUEST, PAGES).close()
        SealKey.create(tmpfs_dir, store, OTHER, PAGES).close()

    def may_be_needed(guest: str) -> bool:
        for path in tmpfs_dir.glob(f"{GUEST}.*"):
            path.unlink()
        return False

    assert sweep(tmpfs_dir, may_be_needed) == [OTHER]
    assert not list(tmpfs_dir.iterdir())
    assert not sweep(tmpfs_dir / "none", may_be_needed)
