# SPDX-License-Identifier: Apache-2.0
"""A call made inside the VMM leaves no trace, and killing us at any step of it leaves the VMM unharmed (rule 16)."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.vmm import HERE, wait_for

NATIVE = HERE.parents[1] / "tierd" / "native"
THREADS = ("compute", "read", "sleep", "futex", "epoll", "signals", "poll", "rseq")
STEPS = range(1, 11)
RANDOM_KILLS = int(os.environ.get("TIERD_INJECT_KILLS", "1000"))
ALIVE_S_MAX = 0.01


def _compile(output: Path, *arguments: str) -> Path:
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *arguments, "-o", str(output), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("inject")
    sources = [str(NATIVE / name) for name in ("inject.c", "inject_x86_64.c", "sys.c")]
    hooked = ["-include", str(HERE / "inject_step.h"), f"-I{NATIVE}"]
    return (
        _compile(directory / "victim", "-mavx", str(HERE / "inject_victim.c")),
        _compile(directory / "killer", *hooked, str(HERE / "inject_killer.c"), *sources),
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
    if platform.machine() != "x86_64":
        pytest.skip("the victim knows the registers of x86-64 only")
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


@pytest.mark.timeout(600)
def test_deaths_at_random_moments(binaries: tuple[Path, Path], victim: Victim) -> None:
    chance = random.Random(16)
    for i in range(RANDOM_KILLS):
        name = chance.choice(THREADS)
        with subprocess.Popen([binaries[1], str(victim.tids[name]), "for-ever"], stderr=subprocess.PIPE) as killer:
            try:
                time.sleep(chance.random() * ALIVE_S_MAX)
            finally:
                killer.kill()
            assert killer.stderr is not None
            assert killer.wait() == -9, f"kill {i} in {name}: {killer.stderr.read().decode()}"
        if i % 50 == 49:
            victim.assert_unharmed()
    victim.assert_unharmed()


def test_a_naive_tracer_would_harm(binaries: tuple[Path, Path]) -> None:
    """The same victim notices the ordinary way of doing it: so it would notice ours."""
    harmed = 0
    for _ in range(5):
        victim = Victim(binaries[0])
        try:
            done = subprocess.run([binaries[1], str(victim.tids["compute"]), "naive"], capture_output=True)
            assert done.returncode == -9
            try:
                victim.assert_unharmed()
            except AssertionError:
                harmed += 1
        finally:
            victim.process.kill()
            victim.process.communicate()
    assert harmed
