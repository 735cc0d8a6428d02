# SPDX-License-Identifier: Apache-2.0
"""The guest by itself: it boots, it would see a wrong byte, and it leaves nothing running. Then under tierd, with each kind
of memory, QEMU as root and as an ordinary user."""

from __future__ import annotations

import mmap
import os
import pwd
import select
import signal
import subprocess
import sys
from pathlib import Path

from tests.daemon.process import Daemon
from tests.kernel.vmm import wait_for
from tests.vm import tiered
from tests.vm.conftest import GUEST_BYTES, KINDS
from tierd.demo.guest import DemoGuest, numbers

WORD_MASK = (1 << 64) - 1


def cold_page(page: int) -> bytes:
    """The first 64 bytes of a page as init.c fills it (seed() and next() there)."""
    x = ((page + 1) * 0x9E3779B97F4A7C15) & WORD_MASK
    x = ((x ^ (x >> 30)) * 0x94D049BB133111EB) & WORD_MASK
    x = (x ^ (x >> 31)) | 1
    words = []
    for _ in range(8):
        x ^= (x << 13) & WORD_MASK
        x ^= x >> 7
        x ^= (x << 17) & WORD_MASK
        words.append(x.to_bytes(8, "little"))
    return b"".join(words)


def test_verifies_what_it_uses(guest: DemoGuest) -> None:
    assert guest.used_bytes > GUEST_BYTES // 2
    assert guest.verify() == (guest.used_bytes, 0)
    assert guest.used_bytes < guest.resident_bytes()
    if KINDS[guest.name.removeprefix("test-")].get("backing") != "anonymous":  # else QEMU's own memory is counted, too
        assert guest.resident_bytes() <= GUEST_BYTES


def test_keeps_using_its_hot_part(guest: DemoGuest) -> None:
    first = guest.console.expect("TICK", tiered.VERIFY_S_MAX)
    second = guest.console.expect("TICK", tiered.VERIFY_S_MAX)
    assert second["rounds"] > first["rounds"]
    assert second["wrong"] == 0


def test_runs_as_the_user_it_should(guest: DemoGuest) -> None:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    uids = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    user = "nobody" if guest.name in ("test-user", "test-sandboxed") else "root"
    assert set(uids) == {str(pwd.getpwnam(user).pw_uid)}


def test_survives_kills_of_the_daemon(daemon: Daemon, guest: DemoGuest) -> None:
    tiered.survives_kills_of_the_daemon(daemon, guest)


def test_detached_it_is_as_before(daemon: Daemon, guest: DemoGuest) -> None:
    tiered.detached_it_is_as_before(daemon, guest)


def test_sees_wrong_bytes_and_quits(vm_directory: Path) -> None:
    with DemoGuest(vm_directory, "test-wrong", memory_bytes=GUEST_BYTES, USED_PERCENT=30) as guest:
        said = guest.wait_ready()
        memory = next(
            entry for entry in Path(f"/proc/{guest.pid}/fd").iterdir() if "/memfd:memory-backend" in os.readlink(entry)
        )
        with memory.open("r+b") as file, mmap.mmap(file.fileno(), GUEST_BYTES) as ram:
            wanted = cold_page(said["zero"] // 4096 + 7)
            # the guest's kernel may move it to where has been looked already
            page = wait_for(lambda: max(ram.find(wanted), 0), "it is in the guest's memory")
            ram[page + 17] ^= 0xFF
            ram[page + 4000] ^= 1
        assert guest.verify() == (guest.used_bytes, 2)
        assert guest.quit() == 0


def test_stop_ends_qemu(vm_directory: Path) -> None:
    with DemoGuest(vm_directory, "test-stop", memory_bytes=GUEST_BYTES, accel="tcg") as guest:
        qemu = guest.qemu
        assert qemu.poll() is None
    assert qemu.returncode == 0


def test_a_killed_owner_takes_qemu_along(vm_directory: Path) -> None:
    """Killed, nobody of ours is left to end QEMU: the kernel does."""
    script = (
        "import sys, pathlib; from tierd.demo.guest import DemoGuest\n"
        "with DemoGuest(pathlib.Path(sys.argv[1]), 'test-killed', accel='tcg') as guest:\n"
        "    print('pid=%d' % guest.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(vm_directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        pidfd = os.pidfd_open(numbers(owner.stdout.readline())["pid"])
        try:
            owner.send_signal(signal.SIGKILL)
            ended, _, _ = select.select([pidfd], [], [], 60)
        finally:
            os.close(pidfd)
    assert ended, "QEMU outlived the process that had started it"
