# SPDX-License-Identifier: Apache-2.0
"""Engines with a sync mode: what a guest notices of a window, and what a death in one leaves. In kernels that have such an
interface (tests/kernels)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.kernel.test_kill import blocked
from tests.kernel.vmm import PAGE, Host, Tiered, Vmm, wait_for
from tests.need import need
from tierd.check import engine_findings
from tierd.engine import choose
from tierd.native import GUEST_TIER, KernelError, probe
from tierd.store import StoreError

Start = Callable[..., Vmm]
MIB = 1 << 20
# UFFDIO_SET_MODE, struct uffdio_set_mode {enable, disable}; RWP_ASYNC and MINOR_ASYNC have the same number
SET_MODE, ASYNC = 0x4010AA0A, 1 << 18
DEACTIVATE = {"rwp": 0xC018AA09, "rfc": 0x8010AA09}  # UFFDIO_RWPROTECT, UFFDIO_DEACTIVATE
SYS_IOCTL = 16  # x86-64
PAGES = 8192  # of a guest that leaves in many windows
TABLE_HEADER_BYTES, RESIDENT, DROPPING, COPY = 65536, 0, 3, 1 << 8  # of a state file and its words: internal.h


@pytest.fixture(autouse=True)
def sync_mode(kernel: None) -> None:
    name = choose().name
    need(
        "sync-mode", choose().holds_reads, f"engine {name} has no sync mode; tests/kernels runs this where there is one"
    )


@pytest.fixture
def no_numa_hints() -> Iterator[None]:
    """With rfc a hint is a minor fault, too: where faults are counted, there must be none."""
    path = Path("/proc/sys/kernel/numa_balancing")
    before = path.read_text() if path.exists() else ""
    if before:
        path.write_text("0")
    yield
    if before:
        path.write_text(before)


def told_that_it_worked(request: int) -> None:
    """From now on, of every ioctl of that number in this process, which does nothing: SECCOMP_RET_ERRNO with no error."""
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
    steps = [
        (load, 0, 0, 0),  # struct seccomp_data: nr
        (equal, 0, 3, SYS_IOCTL),
        (load, 0, 0, 24),  # args[1]
        (equal, 0, 1, request),
        (answer, 0, 0, 0x50000),
        (answer, 0, 0, 0x7FFF0000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert prctl(22, 2, program, 0, 0) == 0, "PR_SET_SECCOMP, SECCOMP_MODE_FILTER"


@pytest.mark.parametrize(
    ("request_of", "what"),
    [
        ("deactivate", "the scan for untouched pages did something else"),
        ("set mode", "a touch in sync mode "),
    ],
)
def test_a_kernel_that_does_not_what_it_says(request_of: str, what: str) -> None:
    """It offers the interface, and one ioctl of it does nothing: another engine is taken, and check says what was wrong."""
    number = SET_MODE if request_of == "set mode" else DEACTIVATE[choose().name]
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            told_that_it_worked(number)
            os.write(writing, "\n".join(finding.says for finding in engine_findings(probe())).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    assert said.startswith("stock: ")
    assert f"offers the interface of engine {choose().name}, but in its trial {what}" in said


def set_async(tiered: Tiered, on: bool) -> None:
    fcntl.ioctl(tiered.served.uffd, SET_MODE, struct.pack("QQ", ASYNC if on else 0, 0 if on else ASYNC))


def test_a_touch_between_windows_costs_no_message(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        for _ in range(3):
            assert tiered.scan().touched_pages > 0
            assert tiered.scan().touched_pages == 0, "nobody touched anything"
            vmm.verify()
        assert tiered.counters()["latency_count"] == 0
        assert tiered.counters()["faults_wait"] == 0


def test_page_exact(start_vmm: Start, host: Host) -> None:
    """No neighbour of a touched page looks touched."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.scan().touched_pages == 0
        for page in (5, 300, 301, 900):
            vmm.ask("verify", page, 1)
        assert tiered.scan().touched_pages == 4


def test_only_what_nobody_touched_since_the_copy_leaves(start_vmm: Start, host: Host) -> None:
    """The guest works on while its pages are copied and written; the window sees on which."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch:
            assert batch.select(GUEST_TIER, 0, 0.0, 512, [1]).selected_pages == 512
            batch.copy()
            vmm.ask("verify", 0, 16)  # a read
            vmm.ask("fill", 100, 8)
            batch.write([1])
            batch.store()
            batch.stored()
            vmm.ask("fill", 200, 4)
            evicted = batch.window(1000).evicted_pages
            assert evicted == 512 - 16 - 8 - 4
        assert tiered.counters()["latency_count"] == 0, "nobody waited: async mode until the window"
        vmm.verify()


def test_a_page_that_was_unmapped_since_the_copy(start_vmm: Start, host: Host) -> None:
    """Written and unmapped again, it does not look touched. rfc compares it with its copy; rwp leaves every unmapped one."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch:
            batch.select(GUEST_TIER, 0, 0.0, 512, [1])
            batch.copy()
            vmm.ask("fill", 100, 8)
            assert vmm.ask("zap", 96, 16) == [0]
            batch.write([1])
            batch.store()
            batch.stored()
            result = batch.window(1000)
        assert result.evicted_pages == 512 - (16 if choose().name == "rwp" else 8)
        vmm.verify()
        tiered.evict_all()
        vmm.verify()


def test_a_mapping_made_anew_is_not_believed(start_vmm: Start, host: Host) -> None:
    """It is not registered: no page of it looks touched, and none may leave."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.evict(max_bytes=8 * PAGE) == 8
        vmm.verify()
        assert vmm.ask("map-again", 0, vmm.pages, 0, 0) == [0]
        for touched in (False, True):
            if touched:
                vmm.verify()
            with pytest.raises(KernelError) as caught:
                tiered.evict()
            assert caught.value.errno == errno.ENOENT
            assert tiered.stored_pages == 0
        vmm.verify()


def test_a_window_does_not_wait_for_the_store(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")

    async def main() -> None:
        with host.attached(vmm, direct="off") as tiered:
            tiered.scan()
            tiered.native.set_store_faults(seed=1, write_hang=1000, hang_us=5_000_000)  # the look below is in time
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, tiered.evict)
                with trio.fail_after(30):
                    while tiered.native.health(1.0).worker_io_ns == 0:
                        await trio.sleep(0.001)
                vmm.ask("verify", 0, 64)
                assert tiered.native.health(1.0).worker_io_ns > 0, "all of it while the write hung"
                assert tiered.counters()["latency_count"] == 0
            assert tiered.stored_pages == vmm.pages - 64
            vmm.verify()

    trio.run(main)


def test_windows_are_cut(start_vmm: Start, host: Host) -> None:
    """A look at the clock every 64 pages, where a window may last no time at all; the rest leaves in the next ones."""
    vmm = start_vmm(f"bytes={2 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        with tiered.native.batch(512) as batch:
            tiered.store_copies(batch, 512)
            for left in range(512 - 64, -1, -64):
                cut = batch.window(0)
                assert (cut.evicted_pages, cut.left_pages) == (64, left)
        vmm.verify()
        assert tiered.counters()["windows"] == 8


def test_faults_in_a_window_are_counted(start_vmm: Start, host: Host) -> None:
    """Of a guest that touches pages that stay while others leave; outside of windows nobody waits."""
    vmm = start_vmm(f"bytes={64 * MIB}")
    vmm.ask("fill")
    stay = vmm.pages // 2
    with host.attached(vmm) as tiered:

        def counted() -> bool:
            tiered.scan()
            with tiered.native.batch(512) as batch:
                tiered.store_copies(batch, 512)
                vmm.send("verify", stay, stay)
                batch.window(1000)
            wait_for(vmm.answered, "the guest goes on")
            return bool(tiered.counters()["faults_window"])

        wait_for(counted, "a fault in a window")
        c = tiered.counters()
        assert c["faults_window"] <= c["faults_resolve"] + c["faults_cancel"] + c["faults_zero"]
        vmm.verify()


def resolved(tiered: Tiered, faults: int) -> None:
    """The last one is counted after its waiter was woken."""
    wait_for(lambda: tiered.counters()["faults_resolve"] >= faults, f"{faults} faults are resolved")
    assert tiered.counters()["faults_resolve"] == faults


def test_in_sync_mode_a_page_that_stays_is_resolved_at_once(no_numa_hints: None, start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        set_async(tiered, False)
        vmm.ask("verify", 0, 100)
        resolved(tiered, 100)
        vmm.ask("fill", 200, 50)
        resolved(tiered, 150)
        set_async(tiered, True)
        vmm.verify()
        resolved(tiered, 150)


def test_a_page_in_the_cache_that_is_not_mapped(no_numa_hints: None, start_vmm: Start, host: Host) -> None:
    """It has no protection; where pages may leave, its first touch is a MINOR fault in sync mode."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.evict(max_bytes=8 * PAGE) == 8  # the chunk is registered now
        assert vmm.ask("zap", 64, 32) == [0]
        set_async(tiered, False)
        before = tiered.counters()["faults_resolve"]
        vmm.ask("verify", 64, 32)
        resolved(tiered, before + 32)
        set_async(tiered, True)
        vmm.verify()


STATES = bytes(byte & 15 for byte in range(256))


def states_of(host: Host) -> bytes:
    """Of each page, by the state file: the low bits of a word. Nothing before there is one."""
    for path in (host.tmpfs_dir / "guests").glob("*.state"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as table:
            return table[TABLE_HEADER_BYTES : TABLE_HEADER_BYTES + 4 * PAGES : 4].translate(STATES)
    return b""


def waits_at(vmm: Vmm, page: int) -> bool:
    """When it reads this page; nobody serves it."""
    vmm.send("verify", page, 1)
    while not vmm.answered():
        if blocked(vmm):
            return True
    return False


def stopped_in_a_window(worker: subprocess.Popen[bytes], vmm: Vmm, host: Host) -> bool:
    """The worker stands still while pages are DROPPING, and the guest waits at one that stays. False: all have left before."""
    while True:
        assert worker.poll() is None
        states = states_of(host)
        if states and not {RESIDENT, DROPPING}.intersection(states):
            return False
        if DROPPING not in states:
            continue
        worker.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
        states = states_of(host)
        if DROPPING in states and RESIDENT in states and waits_at(vmm, states.rindex(RESIDENT)):
            return True
        worker.send_signal(signal.SIGCONT)


def killed_in_a_window(vmm: Vmm, host: Host) -> bool:
    """A daemon of its own process evicts the guest, which is at rest, and is killed, within a window or after the last one. It is
    stopped first: what is DROPPING then is so when it dies."""
    command = [sys.executable, "-m", "tests.kernel.worker", str(vmm.pid), str(host.tmpfs_dir), str(host.disk_dir)]
    with subprocess.Popen([*command, "1", "honest"], stdout=subprocess.DEVNULL) as worker:
        try:
            return stopped_in_a_window(worker, vmm, host)
        finally:
            worker.kill()


def test_killed_in_a_window(start_vmm: Start, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """By SIGKILL. The guest waits at a page that it had not touched lately until the successor is back in async mode."""
    vmm = start_vmm(f"bytes={PAGES * PAGE}")
    vmm.ask("fill")
    tries = 1
    while not killed_in_a_window(vmm, host):
        assert tries < 20, "all had left, each time, before a window was met"
        tries += 1
        with host.adopted(vmm):
            vmm.verify()
    assert DROPPING in states_of(host)
    assert not vmm.answered()
    began = time.monotonic()
    with host.adopted(vmm) as tiered:
        took = time.monotonic() - began
        wait_for(vmm.answered, "the guest goes on")
        with capsys.disabled():
            print(f"\nkilled in a window: the guest goes on {took * 1e3:.0f} ms after its adoption began at most")
        vmm.verify()
        tiered.leave()


def as_if_dropping(tiered: Tiered, pages: range) -> None:
    """Their words, as a daemon leaves them that is killed between DROPPING and STORED; in the file's tier."""
    with tiered.served.state_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as table:
        for page in pages:
            struct.pack_into("I", table, TABLE_HEADER_BYTES + 4 * page, DROPPING | 1 << 4 | COPY)


def test_killed_in_a_window_and_the_store_is_away(start_vmm: Start, host: Host) -> None:
    """Who touches what is stored waits for its bytes, and nobody else: pages that were being dropped are decided without."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        assert tiered.evict(max_bytes=64 * PAGE) == 64
        store = tiered.served.tiers["file"].space.path
        assert store is not None
        away = store.with_suffix(".away")
        tiered.native.stop()
        set_async(tiered, False)
        as_if_dropping(tiered, range(64, 80))  # not punched yet
        as_if_dropping(tiered, range(16))  # punched
        as_if_dropping(tiered, range(16, 32))  # punched in vain
        os.pwrite(tiered.served.memfds[0], bytes(16 * PAGE), 16 * PAGE)
    store.rename(away)
    vmm.send("verify", 64, vmm.pages - 64)
    time.sleep(0.2)
    assert not vmm.answered()
    with pytest.raises(StoreError), host.adopted(vmm):
        pass
    wait_for(vmm.answered, "the guest goes on")
    vmm.send("verify", 0, 64)
    time.sleep(0.2)
    assert not vmm.answered()
    away.rename(store)
    with host.adopted(vmm) as tiered:
        wait_for(vmm.answered, "the guest has its pages")
        vmm.verify()
        tiered.leave()


def test_unregistered_by_the_end_of_everything(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        set_async(tiered, False)
        tiered.leave()
    vmm.verify()


@pytest.mark.parametrize("twice", [False, True])
def test_two_threads_wait_for_one_page(start_vmm: Start, host: Host, twice: bool) -> None:
    """Both go on, whether it is resolved for one of them or for both."""
    vmm = start_vmm(f"bytes={2 * MIB}", "threads=4")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.scan()
        if twice:
            tiered.native.start()
        for _ in range(20):
            set_async(tiered, False)
            vmm.ask("run")
            time.sleep(0.01)
            tiered.scan()
            set_async(tiered, True)
            tiered.evict()
            vmm.ask("stop")
        vmm.verify()
