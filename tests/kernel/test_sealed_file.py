# SPDX-License-Identifier: Apache-2.0
"""Files that are encrypted: what stands in them, what somebody who can write there can do, and what becomes of the key."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel.vmm import MIB, PAGE, Host, Tiered, Vmm
from tierd.serve import KEYS
from tierd.store import StoreError

Start = Callable[..., Vmm]
PAGES = 4 * MIB // PAGE


@pytest.fixture(params=["memfd", "anonymous"])
def vmm(start_vmm: Start, request: pytest.FixtureRequest) -> Vmm:
    vmm = start_vmm(f"bytes={4 * MIB}", f"kind={request.param}")
    vmm.ask("fill")
    return vmm


def _file(tiered: Tiered) -> Path:
    return tiered.served.tiers["file"].space.path


def _keys(host: Host) -> list[Path]:
    return list((host.tmpfs_dir / KEYS).glob("*.key"))


def _memory(vmm: Vmm) -> list[bytes]:
    with open(f"/proc/{vmm.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(vmm.addresses[0])
        return [memory.read(PAGE) for _ in range(PAGES)]


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_the_file_has_nothing_of_the_guest(vmm: Vmm, host: Host, direct: str) -> None:
    plain = _memory(vmm)
    with host.attached(vmm, encrypt=True, direct=direct) as tiered:
        tiered.evict_all()
        assert tiered.pages_in("file") == PAGES
        stored = _file(tiered).read_bytes()
        assert len(stored) == PAGES * PAGE, "a page takes no more than before"
        for page in plain:
            assert page[:16] not in stored
        (key,) = _keys(host)
        assert key.stat().st_mode & 0o777 == 0o600
        secret = tiered.served.tiers["file"].space.secret
        vmm.verify()
        tiered.evict_all()
        tiered.leave()
    vmm.verify()
    assert not _keys(host), "with the guest its key is gone"
    assert len(set(secret)) > 16


def test_a_successor_reads_what_was_written(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm, encrypt=True) as tiered:
        tiered.evict_all()
    with host.adopted(vmm) as tiered:
        vmm.verify()
        tiered.evict_all()
        vmm.verify()


def test_without_its_key_nothing_is_touched(vmm: Vmm, host: Host) -> None:
    with host.attached(vmm, encrypt=True) as tiered:
        tiered.evict_all()
    (key,) = _keys(host)
    hidden = key.with_suffix(".hidden")
    key.rename(hidden)
    with pytest.raises(StoreError, match="what is sealed with it cannot be read"), host.adopted(vmm):
        pass
    hidden.rename(key)
    with host.adopted(vmm):
        vmm.verify()


def _flip(content: bytearray) -> None:
    content[9 * PAGE + 99] ^= 4


def _swap(content: bytearray) -> None:
    content[9 * PAGE : 10 * PAGE], content[8 * PAGE : 9 * PAGE] = (
        content[8 * PAGE : 9 * PAGE],
        content[9 * PAGE : 10 * PAGE],
    )


def _cut_off(content: bytearray) -> None:
    del content[9 * PAGE :]


@pytest.mark.parametrize("harm", [_flip, _swap, _cut_off])
def test_what_somebody_did_to_the_file_is_a_memory_error(
    start_vmm: Start, host: Host, harm: Callable[[bytearray], None]
) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, encrypt=True, direct="off") as tiered:
        tiered.evict_all()
        content = bytearray(_file(tiered).read_bytes())
        harm(content)
        with open(_file(tiered), "r+b") as file:
            file.write(content)
            file.truncate(len(content))
        vmm.send("verify", 9, 1)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS


def test_an_older_page_is_a_memory_error(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, encrypt=True, direct="off") as tiered:
        tiered.evict_all()
        before = _file(tiered).read_bytes()
        vmm.ask("fill")
        tiered.evict_all()
        with open(_file(tiered), "r+b") as file:
            os.pwrite(file.fileno(), before[9 * PAGE : 10 * PAGE], 9 * PAGE)
        vmm.send("verify", 9, 1)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS
