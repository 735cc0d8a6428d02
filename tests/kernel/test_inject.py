# SPDX-License-Identifier: Apache-2.0
"""Calls made inside the VMM leave no trace, and killing us at any step of them leaves the VMM unharmed (rule 16)."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import random
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from mmap import PROT_READ, PROT_WRITE
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kernel.vmm import HERE, wait_for
from tierd.native.inject import inject

NATIVE = HERE.parents[1] / "tierd" / "native"
THREADS = ("compute", "read", "sleep", "futex", "epoll", "signals", "poll", "rseq")
STEPS = range(1, 11)
BATCH_STEPS = (1, 2, 3, 4, 5, 6, 11, 12, 13, 14, 15)
X86 = platform.machine() == "x86_64"
HEADER_OFFSET = 4096 if X86 else 65536  # CODE_BYTES of calls.c
HEADER_BYTES = 3 * HEADER_OFFSET if X86 else HEADER_OFFSET
MPROTECT = 10 if X86 else 226
RANDOM_KILLS = int(os.environ.get("TIERD_INJECT_KILLS", "1000"))
ALIVE_S_MAX = 0.01
WRAPPED = "-Wl,--wrap=process_vm_readv,--wrap=process_vm_writev"


def _compile(output: Path, *arguments: str) -> Path:
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *arguments, "-o", str(output), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inject")
    sources = [str(NATIVE / name) for name in ("inject.c", "inject_x86_64.c", "inject_aarch64.c", "calls.c", "sys.c")]
    vectors = ["-mavx"] if platform.machine() == "x86_64" else []
    hooked = ["-include", str(HERE / "inject_step.h"), f"-I{NATIVE}"]
    return (
        _compile(directory / "victim", *vectors, str(HERE / "inject_victim.c")),
        _compile(directory / "killer", *hooked, WRAPPED, str(HERE / "inject_killer.c"), *sources),
    )


class Victim:
    def __init__(self, binary: Path) -> None:
        self.process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.tids = wait_for(self._find_threads, "the victim's threads run")

    def _find_threads(self) -> dict[str, int]:
        found = {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found[(task / "comm").read_text().strip()] = int(task.name)
        return found if set(THREADS) <= set(found) else {}

    def rounds(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"?\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline().decode()
        assert line, self.complaint()
        return {name: int(n) for name, n in (word.split("=") for word in line.split())}

    def complaint(self) -> str:
        self.process.wait(timeout=20)
        assert self.process.stderr is not None
        return f"the victim ended with {self.process.returncode}: {self.process.stderr.read().decode()}"

    def assert_unharmed(self) -> None:
        """Nobody is stopped or traced, and every thread goes on."""
        before = self.rounds()
        wait_for(lambda: all(n > before[name] for name, n in self.rounds().items()), "every thread goes on")
        for tid in self.tids.values():
            status = Path(f"/proc/{self.process.pid}/task/{tid}/status").read_text()
            assert "TracerPid:\t0" in status
            assert "State:\tt" not in status
            assert "State:\tT" not in status


@pytest.fixture
def victim(binaries: tuple[Path, Path]) -> Iterator[Victim]:
    victim = Victim(binaries[0])
    yield victim
    victim.process.kill()
    victim.process.wait()
    for stream in (victim.process.stdin, victim.process.stdout, victim.process.stderr):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def test_calls_leave_no_trace(binaries: tuple[Path, Path], victim: Victim) -> None:
    for name in THREADS:
        for _ in range(20):
            done = subprocess.run([binaries[1], str(victim.tids[name]), "0"], capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stderr}"
    victim.assert_unharmed()


def test_a_death_at_every_step(binaries: tuple[Path, Path], victim: Victim) -> None:
    for name in THREADS:
        for step in STEPS:
            done = subprocess.run([binaries[1], str(victim.tids[name]), str(step)], capture_output=True, text=True)
            assert done.returncode == -9, f"{name}, step {step}: {done.returncode} {done.stderr}"
        victim.assert_unharmed()


def _kill_at_random(binary: Path, victim: Victim, *more: str) -> None:
    chance = random.Random(16)
    for i in range(RANDOM_KILLS):
        name = chance.choice(THREADS)
        command = [binary, str(victim.tids[name]), "for-ever", *more]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as killer:
            try:
                time.sleep(chance.random() * ALIVE_S_MAX)
            finally:
                killer.kill()
            assert killer.stderr is not None
            assert killer.wait() == -9, f"kill {i} in {name}: {killer.stderr.read().decode()}"
        if i % 50 == 49:
            victim.assert_unharmed()
    victim.assert_unharmed()


@pytest.mark.timeout(600)
def test_deaths_at_random_moments(binaries: tuple[Path, Path], victim: Victim) -> None:
    _kill_at_random(binaries[1], victim)


def test_a_naive_tracer_would_harm(binaries: tuple[Path, Path]) -> None:
    """The same victim notices the ordinary way of doing it: so it would notice ours."""
    harmed = False
    for _ in range(5):
        victim = Victim(binaries[0])
        try:
            done = subprocess.run([binaries[1], str(victim.tids["compute"]), "naive"], capture_output=True)
            assert done.returncode == -9
            try:
                victim.assert_unharmed()
            except AssertionError:
                harmed = True
                break
        finally:
            victim.process.kill()
            victim.process.communicate()
    assert harmed


class Header(NamedTuple):
    """struct inject_header, in its order."""

    magic: int
    batch: int
    count: int
    done: int
    running: int


class Area:
    """The area for batches in a victim, made in the thread `first`, and runs of the killer that use it."""

    def __init__(self, binary: Path, victim: Victim, first: str = "compute") -> None:
        self.binary, self.victim = binary, victim
        self.address = self._killer(first, "create").stdout.strip()

    def command(self, name: str, *words: object) -> list[str]:
        return [str(word) for word in (self.binary, self.victim.tids[name], *words)]

    def _killer(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        command = self.command(name, *words)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (0, -9), f"{command}: {done.stderr}"
        return done

    def run(self, name: str, kind: str) -> tuple[int, int, int]:
        """Error, calls made, microseconds stopped."""
        error, made, stopped_us = self._killer(name, 0, self.address, kind).stdout.split()
        return int(error), int(made), int(stopped_us)

    def die(self, name: str, step: int | str, kind: str) -> None:
        done = self._killer(name, step, self.address, kind)
        assert done.returncode == -9, f"{name}, step {step}: {done.stdout} {done.stderr}"

    def settle(self, timeout_ms: int = 2000) -> int:
        return int(self._killer("compute", "settle", self.address, timeout_ms).stdout)

    def destroy(self, name: str = "compute") -> int:
        return int(self._killer(name, "destroy", self.address).stdout)

    def blind(self, name: str, error: int) -> list[int]:
        """What run and settle say of a batch that cannot be seen by the victim's number from its commit on."""
        return [int(word) for word in self._killer(name, "blind", self.address, str(error)).stdout.split()]

    def stuck(self, name: str, area: str, ms: int) -> tuple[int, int]:
        """What a batch (or a single call: area 0) says that waits so long before its commit, and after how many ms."""
        error, took_ms = self._killer(name, "stuck", area, ms).stdout.split()
        return int(error), int(took_ms)

    def starve(self, name: str) -> int:
        """Bytes of stack that batches took which are cancelled at once."""
        return int(self._killer(name, "starve", self.address).stdout)

    def header(self) -> Header:
        with open(f"/proc/{self.victim.process.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(int(self.address) + HEADER_OFFSET)
            return Header(*struct.unpack("<5Q", memory.read(40)))

    def made(self) -> int:
        """As the header says it."""
        return self.header().done

    def write_header(self, word: int, value: int) -> None:
        with open(f"/proc/{self.victim.process.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(self.address) + HEADER_OFFSET + 8 * word)
            memory.write(struct.pack("<Q", value))

    def protect_header(self, protection: int) -> None:
        header = int(self.address) + HEADER_OFFSET
        inject(self.victim.tids["read"], "mprotect", MPROTECT, header, HEADER_BYTES, protection)

    def is_mapped(self) -> bool:
        start = f"{int(self.address):x}-"
        maps = Path(f"/proc/{self.victim.process.pid}/maps").read_text()
        return any(line.startswith(start) for line in maps.splitlines())

    def bytes_written(self) -> int:
        """By the batch, to the victim's stderr, since the last time."""
        assert self.victim.process.stderr is not None
        descriptor = self.victim.process.stderr.fileno()
        os.set_blocking(descriptor, False)
        try:
            return len(os.read(descriptor, 65536))
        except BlockingIOError:
            return 0
        finally:
            os.set_blocking(descriptor, True)


@pytest.fixture
def area(binaries: tuple[Path, Path], victim: Victim) -> Area:
    return Area(binaries[1], victim)


def test_batches_leave_no_trace(victim: Victim, area: Area) -> None:
    for name in THREADS:
        for _ in range(20):
            assert area.run(name, "quick")[:2] == (0, 40)
    victim.assert_unharmed()


def test_an_area_goes_when_nobody_is_in_it(binaries: tuple[Path, Path], victim: Victim) -> None:
    for name in THREADS:
        area = Area(binaries[1], victim, first=name)
        assert area.run(name, "quick")[0] == 0
        assert area.is_mapped()
        assert area.destroy(name) == 0
        assert not area.is_mapped()
        assert area.run(name, "quick")[0] == -errno.EFAULT
    victim.assert_unharmed()


def test_a_death_at_every_step_of_a_batch(victim: Victim, area: Area) -> None:
    for name in THREADS:
        for step in BATCH_STEPS:
            area.die(name, step, "sleeps")
            assert area.settle() == 0, f"{name}, step {step}"
        victim.assert_unharmed()
        assert area.run(name, "quick")[:2] == (0, 40)


@pytest.mark.timeout(600)
def test_deaths_at_random_moments_of_batches(binaries: tuple[Path, Path], victim: Victim, area: Area) -> None:
    _kill_at_random(binaries[1], victim, area.address)


@pytest.mark.parametrize("name", THREADS)
def test_batches_back_to_back(binaries: tuple[Path, Path], victim: Victim, area: Area, name: str) -> None:
    """The next one often interrupts the thread on its way out of the last."""
    command = [str(binaries[1]), str(victim.tids[name]), "for-ever", area.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as killer:
        time.sleep(0.5)
        assert killer.poll() is None, killer.stderr and killer.stderr.read()
        killer.kill()
    victim.assert_unharmed()


def test_batches_that_come_too_late_do_not_pile_up(victim: Victim, area: Area) -> None:
    for name in ("compute", "rseq"):
        assert area.starve(name) < 64 << 10
    victim.assert_unharmed()


def test_a_batch_ends_with_its_budget(victim: Victim, area: Area) -> None:
    total = 0
    for name in THREADS:
        error, made, _ = area.run(name, "sleeps")
        assert error == 0
        assert made < 64, "the budget is 2 ms, each sleeps for 1 ms"
        assert made == area.made(), "none that ended late is left out"
        total += made
    assert total
    victim.assert_unharmed()


def test_a_batch_that_does_not_end_is_settled_later(victim: Victim, area: Area) -> None:
    # (0, 0): it got no CPU in its time, so nothing of it was made
    wait_for(lambda: area.run("compute", "long")[:2] == (-errno.EINPROGRESS, 0), "the thread is in the call")
    assert area.run("read", "quick")[:2] == (-errno.EBUSY, 0)
    assert area.destroy() == -errno.EBUSY
    assert area.settle(10) == -errno.ETIMEDOUT
    assert area.settle() == 0
    assert (area.made(), area.bytes_written()) == (1, 0), "the sleep, not the write after it"
    assert area.run("read", "quick")[:2] == (0, 40)
    victim.assert_unharmed()


def test_a_successor_settles_a_batch_that_runs(victim: Victim, area: Area) -> None:
    def settled_in_time() -> bool:
        """Before the batch has come to its end by itself."""
        area.die(name, 12, "writes")
        wait_for(lambda: area.made() > 4, "the batch goes on without its tracer")
        assert area.settle() == 0
        if area.made() < 64:
            return True
        assert area.bytes_written() == 32
        return False

    for name in THREADS:
        wait_for(settled_in_time, f"a batch in {name} is settled while it runs")
        made = area.made()
        assert area.bytes_written() == made // 2
        time.sleep(0.02)
        assert (area.made(), area.bytes_written()) == (made, 0)
    victim.assert_unharmed()


def _send_to_the_stopped(area: Area, name: str) -> None:
    area.die(name, "stop", "writes")
    assert (area.made(), area.bytes_written()) == (0, 0)


def test_a_batch_that_was_sent_runs_without_its_tracer(victim: Victim, area: Area) -> None:
    for name in THREADS:
        _send_to_the_stopped(area, name)
        os.kill(victim.process.pid, signal.SIGCONT)
        wait_for(lambda: area.made() == 64, "the batch is made")
        assert area.bytes_written() == 32
    victim.assert_unharmed()


def test_a_batch_that_was_sent_and_settled_is_not_made(victim: Victim, area: Area) -> None:
    """A successor need not wait for a stopped thread: it will make no call when it goes on."""
    for name in THREADS:
        _send_to_the_stopped(area, name)
        assert area.settle(100) == 0
        os.kill(victim.process.pid, signal.SIGCONT)
        victim.assert_unharmed()
        assert (area.made(), area.bytes_written()) == (0, 0)


def test_a_settled_batch_is_not_made_with_the_next(victim: Victim, area: Area) -> None:
    for name in THREADS:
        _send_to_the_stopped(area, name)
        assert area.settle(100) == 0
        os.kill(victim.process.pid, signal.SIGCONT)
        assert area.run("read", "writes")[:2] == (0, 64)
        victim.assert_unharmed()
        assert (area.made(), area.bytes_written()) == (64, 32)


def test_a_stopped_victim_gets_no_batch_and_keeps_the_area(victim: Victim, area: Area) -> None:
    _send_to_the_stopped(area, "compute")
    assert area.settle(100) == 0
    assert area.destroy("read") == -errno.EBUSY, "a thread would wake up in unmapped memory"
    assert area.run("read", "quick")[:2] == (-errno.EAGAIN, 0)
    os.kill(victim.process.pid, signal.SIGCONT)
    victim.assert_unharmed()
    assert area.run("compute", "quick")[:2] == (0, 40)


def test_an_area_that_cannot_be_read_is_not_gone(victim: Victim, area: Area) -> None:
    """It is swapped out, say, and the VMM is at the limit of its memory: a batch may be running in it all the same."""
    area.protect_header(0)
    assert area.settle(50) == -errno.ETIMEDOUT
    assert area.run("compute", "quick")[:2] == (-errno.EBUSY, 0)
    assert area.destroy() == -errno.EBUSY
    area.protect_header(PROT_READ | PROT_WRITE)
    assert area.settle() == 0
    assert area.run("compute", "quick")[:2] == (0, 40)
    assert area.destroy() == 0
    assert area.settle() == -errno.EFAULT
    assert area.run("compute", "quick")[:2] == (-errno.EFAULT, 0)
    victim.assert_unharmed()


@pytest.mark.parametrize("error", [errno.EPERM, errno.ESRCH], ids=["forbidden", "the leader has ended"])
def test_a_batch_that_cannot_be_seen_is_not_over(victim: Victim, area: Area, error: int) -> None:
    """After the commit only its end, seen, is its end: ptrace may be forbidden meanwhile, and a process whose first thread has
    ended is not found by its number."""

    def blinded() -> bool:
        said = area.blind("compute", error)
        if said[0] == -errno.ETIMEDOUT:  # it did not stop in time: nothing was sent
            return False
        assert said[0] == -errno.EINPROGRESS
        assert set(said[1:-1]) <= {-errno.ETIMEDOUT}
        assert said[-1] == 0
        return len(said) > 3  # else the thread got no CPU before

    wait_for(blinded, "the thread is in the call")
    assert area.bytes_written() == 0, "a call was made after the end"
    assert area.run("compute", "quick")[:2] == (0, 40)
    victim.assert_unharmed()


@pytest.mark.parametrize("single", [False, True], ids=["batch", "single call"])
def test_a_stack_that_waits_for_us(victim: Victim, area: Area, single: bool) -> None:
    """It lies in memory that is taken for the guest's, and its page is just leaving: who makes it leave must not wait for it. And
    what was given up is not sent later."""
    error, took_ms = area.stuck("sleep", "0" if single else area.address, 3000)
    assert error == -errno.ETIMEDOUT
    assert took_ms < 2500
    assert (area.made(), area.header().running) == (0, 0)
    victim.assert_unharmed()
    assert area.run("sleep", "quick")[:2] == (0, 40)


def test_an_area_that_lies_is_not_believed(victim: Victim, area: Area) -> None:
    """The VMM can write what it likes there: no more is read for it than there were calls."""

    def lied_to() -> bool:
        with subprocess.Popen(
            area.command("sleep", 0, area.address, "long"), stdout=subprocess.PIPE, text=True
        ) as killer:
            wait_for(lambda: area.header().running or killer.poll() is not None, "the batch runs")
            area.write_header(Header._fields.index("done"), 90)
            said = killer.communicate(timeout=60)[0]
        assert killer.returncode == 0
        told = area.header().done == 90
        assert area.settle() == 0
        return told and said.split()[:2] == [str(-errno.EINPROGRESS), "0"]

    wait_for(lied_to, "it is told while it looks")
    assert area.run("read", "quick")[:2] == (0, 40)
    victim.assert_unharmed()
