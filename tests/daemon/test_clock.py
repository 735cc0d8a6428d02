# SPDX-License-Identifier: Apache-2.0
"""Time and pids are not what they seem: the clock jumps, a pid belongs to another process now."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted
from tests.daemon.test_fuzz import sealed
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, userfaultfds, wait_for
from tierd.attach.procfs import start_ticks

YEAR_S = 365 * 86400


def has_cycled(daemon: Daemon, name: str, cycles: int) -> bool:
    return bool(daemon.guests()[name]["cycles"] > cycles)


@pytest.fixture
def offset(tmp_path: Path) -> Path:
    """A file with what is added to the daemon's time of day, in seconds."""
    path = tmp_path / "offset"
    path.write_text("0")
    return path


@pytest.fixture
def through(tmp_path: Path, offset: Path) -> list[str]:
    """A command that executes another one with that clock."""
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", source, "-o", library]
    subprocess.run(command, check=True)
    return ["env", f"LD_PRELOAD={library}", f"CLOCK_OFFSET={offset}"]


def test_the_clock_jumps_by_years(daemon: Daemon, boot: Boot, offset: Path, through: list[str]) -> None:
    """Forwards and back, while tierd runs and across a restart: only the log's time stamps show it. What is young stays."""
    young = {**POLICY, "min_idle_s": 600.0, "unsafe_min_idle": False}
    daemon.write(guests=[{"name": f"young{OURS}", **young}, {"name": f"*{OURS}", **POLICY}])
    vmm, stays = boot("web", 4 * MIB), boot("young", 4 * MIB)
    daemon.start(through)
    evicted(daemon, "web", vmm)
    daemon.wait_active("young")
    for jump, restart in ((10, False), (-10, False), (20, True), (-10, True)):
        if restart:
            daemon.kill()
        offset.write_text(f"{jump * YEAR_S:<20}")
        if restart:
            daemon.start(through)
        cycles = daemon.guests()["young"]["cycles"]
        vmm.verify()  # back into memory ...
        evicted(daemon, "web", vmm)  # ... and out again, as quickly as ever
        wait_for(partial(has_cycled, daemon, "young", cycles + 2), "cycles go on")
        assert daemon.stored_bytes("young") == 0, "nothing leaves early"
        assert "WATCHDOG=1" in daemon.wait_told("WATCHDOG=1")
        assert 0 <= daemon.uptime_s() < 600
    years = {entry["timestamp"][:4] for entry in daemon.log()}
    assert len(years) >= 3, "the daemon's clock did jump"
    assert {e["event"] for e in daemon.log() if e["level"] in ("warning", "error")} <= {
        "notify_failed",  # we read slowly
        "holders_unseen",  # in a container even root may not look at every process
    }
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    vmm.verify()
    stays.verify()


def test_the_pid_of_a_state_file_is_another_process_now(daemon: Daemon, boot: Boot) -> None:
    """What is left of the VMM is swept, and the process that has its pid is not touched."""
    vmm, other = boot("web", 4 * MIB), boot("other", 4 * MIB)
    daemon.write(on_stop="keep", guests=[{"name": f"web{OURS}", **POLICY}])
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    (state,) = (daemon.runtime_dir / "guests").iterdir()
    (pages,) = daemon.store_dir.iterdir()
    # as if `other` had been given the pid of a VMM that ended
    ticks = start_ticks(other.pid)
    assert ticks is not None
    data = bytearray(state.read_bytes())
    data[24:28] = other.pid.to_bytes(4, "little")
    data[32:40] = (ticks - 500).to_bytes(8, "little")
    reused = state.with_name(f"{other.pid}-{ticks - 500}.state")
    reused.write_bytes(sealed(bytes(data)))
    (daemon.store_dir / f"guest-{reused.stem}.pages").write_bytes(bytes(4096))
    daemon.start()
    (swept,) = daemon.logged("state_swept")
    assert f"process {other.pid} " in swept["why"]
    assert [path.name for path in (daemon.runtime_dir / "guests").iterdir()] == [state.name]
    assert [path.name for path in daemon.store_dir.iterdir()] == [pages.name]
    assert not userfaultfds(other.pid)
    assert "TracerPid:\t0" in Path(f"/proc/{other.pid}/status").read_text()
    vmm.verify()
    other.verify()
