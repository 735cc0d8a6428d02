# SPDX-License-Identifier: Apache-2.0
"""tierd dies at any moment: a slice of the torture run, and the moments that it might not meet."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.forced import ForcedEngine, Options
from tests.kernel.sanitized import SANITIZERS, sanitized_python
from tests.kernel.torture import ROOT, torture
from tests.kernel.vmm import MIB, PAGE, Host, Vmm, wait_for
from tierd.attach import Refused
from tierd.attach.procfs import boot_id
from tierd.native import KernelError
from tierd.serve import StateError, adopt, wait_for_lock

Start = Callable[..., Vmm]
KILLS = int(os.environ.get("TIERD_KILLS", "0"))
SECONDS = 0.0 if KILLS else 30.0  # the slice in `make test`
SANITIZED_S = 10.0


def check(result: dict[str, Any]) -> None:
    """What must be true of every torture run. Where kills are few, whether a fault came between two is a matter of chance."""
    assert result["wrong_bytes"] == 0
    assert result["poisoned_pages"] == result["destroyed_pages"]
    few = 0 < KILLS < 100
    for figure in ("kills", "evicted_pages", "verified_bytes", "kills_in_service", *([] if few else ["faults"])):
        assert result[figure] > 0, figure


@pytest.mark.timeout(7200)
def test_torture(vmm_binary: Path) -> None:
    seed = int(os.environ.get("TIERD_SEED", "3"))
    result = torture(vmm_binary, kills=KILLS or 100, seconds=SECONDS, seed=seed, guests=3)
    check(result)
    assert result["kills"] >= (KILLS or 100)
    if 0 < KILLS < 100:
        return
    assert result["poisoned_pages"] > 0
    for moment in ("kills_at_start", "kills_in_attach", "kills_in_adoption", "kills_in_detach"):
        assert result[moment] > 0, moment


def test_a_torture_run_that_is_ended_leaves_nothing() -> None:
    """Neither processes nor a cgroup: another run may go on beside it, so only what bears its pid is looked at."""
    command = [sys.executable, "-m", "tests.kernel.torture", "--guests", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0) as run:
        assert run.stdout is not None
        assert b"kills" in run.stdout.readline()
        children = {int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()}
        groups = list(Path("/sys/fs/cgroup").glob(f"**/tierd-torture-{run.pid}-*"))
        run.terminate()
        assert run.wait(timeout=60) == 143
    assert children
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "its processes are gone")
    assert not [group for group in groups if group.exists()]


@pytest.mark.parametrize("sanitizer", list(SANITIZERS))
def test_torture_under_a_sanitizer(vmm_binary: Path, tmp_path: Path, sanitizer: str) -> None:
    """The extension that Python loads, built with the sanitizer; whatever that has to say ends the worker and is a file."""
    python, logs = sanitized_python(tmp_path, sanitizer)
    # the sanitizers' own memory would be the first to be short
    check(torture(vmm_binary, kills=10, seconds=SANITIZED_S, seed=5, guests=2, python=python, memory_limit=0))
    assert not [log.read_text() for log in logs.iterdir()]


def test_a_page_that_does_not_verify_is_a_memory_error(start_vmm: Start, host: Host) -> None:
    """One bit of the store is wrong: the guest gets SIGBUS at that page, never the wrong bytes, never zeros."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off", readahead_pages=16) as tiered:
        tiered.evict_all()
        page = 517
        with open(tiered.served.tiers["file"].space.path, "r+b") as store:
            store.seek(page * PAGE + 99)
            byte = store.read(1)[0]
            store.seek(page * PAGE + 99)
            store.write(bytes([byte ^ 4]))
        vmm.ask("verify", 0, page)  # its neighbours are not hurt, read-ahead or not
        vmm.ask("verify", page + 1)
        vmm.send("verify", page, 1)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS
        c = tiered.counters()
        assert c["pages_lost"] == c["state_pages"][7] == 1
        assert c["checksum_errors"] >= 1
        assert c["last_errno"] == 74, "EBADMSG"


def test_a_store_that_cannot_be_read_is_a_memory_error(start_vmm: Start, host: Host) -> None:
    """The file was cut: there is nothing to bring back, and zeros would be a lie."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        os.truncate(tiered.served.tiers["file"].space.path, 512 * PAGE)
        vmm.ask("verify", 0, 512)
        vmm.send("verify", 700, 1)
        assert vmm.process.wait(timeout=20) == -signal.SIGBUS
        assert tiered.counters()["store_read_errors"] >= 1


def test_a_state_file_of_another_version_is_not_touched(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        path = tiered.served.state_path
    good = path.read_bytes()
    other = "another version"
    for offset, value, says in ((8, b"\x63\0\0\0", other), (8, b"\1\0\0\0", other), (0, b"garbage!", "broken")):
        path.write_bytes(good[:offset] + value + good[offset + len(value) :])
        before = path.read_bytes()
        with pytest.raises(StateError, match=f"{says}.*nothing was touched"), host.adopted(vmm):
            pass
        assert path.read_bytes() == before
    path.write_bytes(good)
    with host.adopted(vmm):
        vmm.verify()


def test_a_successor_waits_for_the_last_thread_of_its_predecessor(start_vmm: Start, host: Host) -> None:
    """Rule 9: the lock, not the pid. The lock is held here by a process that is not tierd, so it must be named."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        path = tiered.served.state_path
    script = "import fcntl, sys, time; f = open(sys.argv[1], 'r+b'); fcntl.flock(f, 2); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            waited: list[float] = []

            def pause(seconds: float) -> None:
                waited.append(seconds)
                if len(waited) > 20:
                    holder.kill()
                    holder.wait()

            fd = os.open(path, os.O_RDWR)
            with pytest.raises(StateError, match=f"process {holder.pid}"):
                wait_for_lock(fd, path, lambda _: None, wait_s_max=0.1)
            os.close(fd)
            served = adopt(
                path,
                engine=ForcedEngine(Options()),
                swap_can_receive=False,
                boot_id=boot_id(),
                pause=pause,
            )
        finally:
            holder.kill()
    with served:
        assert len(waited) > 20
        vmm.verify()


def test_a_guest_whose_state_file_is_gone_is_left_blocked(start_vmm: Start, host: Host) -> None:
    """Rule 10: its holes may be pages that are stored. Attaching anew would serve them as zeros, so it is refused; the guest's
    thread waits, and goes on when the state file is found again."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        path = tiered.served.state_path
    kept = path.rename(path.with_suffix(".kept"))
    with pytest.raises(Refused, match="state file is gone"), host.attached(vmm):
        pass
    vmm.send("verify")
    wait_for(lambda: blocked(vmm), "the guest's thread waits in the kernel")
    kept.rename(path)
    with host.adopted(vmm):
        assert vmm._answer()[1:] == [str(vmm.pages), "0"]


def blocked(vmm: Vmm) -> int:
    """Threads of the VMM that wait for a page."""
    tasks = Path(f"/proc/{vmm.pid}/task")
    return sum("handle_userfault" in (tasks / tid / "wchan").read_text() for tid in os.listdir(tasks))


def test_faults_wait_for_the_successor(start_vmm: Start, host: Host) -> None:
    """While nobody serves, the guest's thread waits; it is never given zeros."""
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
    vmm.send("verify")
    wait_for(lambda: blocked(vmm), "the guest's thread waits in the kernel")
    began = time.monotonic()
    with host.adopted(vmm):
        assert vmm._answer()[1:] == [str(vmm.pages), "0"]
    assert time.monotonic() - began < 60


def test_disarm_is_refused_while_a_page_is_stored(start_vmm: Start, host: Host) -> None:
    vmm = start_vmm(f"bytes={4 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm) as tiered:
        tiered.evict_all()
        with pytest.raises(KernelError) as caught:
            tiered.served.leave()
        assert caught.value.errno == 16
        vmm.verify()


def test_killed_while_pages_go_back_into_an_unmapped_file(start_vmm: Start, host: Host) -> None:
    """The VMM has unmapped its memory; tierd brings the bytes back into the file and is killed, again and again. A page is in
    there with its bytes, or not at all: what is written by a mapping is zeros there for a moment."""
    vmm = start_vmm(f"bytes={32 * MIB}")
    vmm.ask("fill")
    with host.attached(vmm, direct="off") as tiered:
        tiered.evict_all()
    vmm.ask("unmap", 0, vmm.pages)
    chance, kills = random.Random(1), 0
    while killed(host, vmm, chance.random() * 0.003):
        kills += 1
    assert kills > 20
    with host.adopted(vmm, direct="off") as tiered:
        tiered.restore_all()
    vmm.ask("map-again", 0, vmm.pages, 0, 0)
    vmm.verify()


def killed(host: Host, vmm: Vmm, after_s: float) -> bool:
    """A tierd that adopts the guest and brings everything back, so long after it began; False: it had done so."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        with host.adopted(vmm, direct="off") as tiered:
            os.write(tell, b"adopted")
            tiered.restore_all()
            os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        assert select.select([pipe], [], [], 60)[0], "not adopted"
        assert pipe.read(1), "not adopted"
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
