# SPDX-License-Identifier: Apache-2.0
"""The unit as systemd reads it, and its capabilities as the kernel does: enough, and not one too many."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.need import need
from tierd.config import Config
from tierd.load import load
from tierd.quantities import parse_time

ROOT = Path(__file__).parent.parent.parent
UNIT = ROOT / "systemd" / "tierd.service"
USER_UNIT = ROOT / "systemd" / "tierd-user.service"
EXPOSURE_TENTHS_MAX = 40


def settings(name: str, unit: Path = UNIT) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", unit.read_text(), flags=re.MULTILINE)


def analyze(*arguments: str, unit_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    need("systemd-analyze", tool is not None, "systemd-analyze is missing: apt-get install systemd")
    assert tool is not None
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{unit_path}:"} if unit_path else None
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120, env=environment)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A unit directory with our unit in it, its program replaced by one that is on every machine."""
    text = UNIT.read_text()
    assert "/opt/tierd/bin/tierd" in text
    (tmp_path / "tierd.service").write_text(text.replace("/opt/tierd/bin/tierd", "/bin/true"))
    return tmp_path


def test_systemd_reads_every_line(units: Path) -> None:
    ran = analyze("verify", str(units / "tierd.service"), unit_path=units)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_systemd_reads_every_line_of_the_user_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    unit = tmp_path / USER_UNIT.name
    unit.write_text(USER_UNIT.read_text().replace("/opt/tierd/bin/tierd", "/bin/true"))
    ran = analyze("--user", "verify", str(unit))
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_user_unit_restarts_and_keeps_as_the_other_one() -> None:
    for name in (
        *("Type", "StartLimitIntervalSec", "RestartKillSignal", "ExecReload", "Restart", "RestartSec", "KillMode"),
        *("RestartPreventExitStatus", "RuntimeDirectory", "RuntimeDirectoryPreserve", "TimeoutStopSec", "WatchdogSec"),
        *("FileDescriptorStoreMax", "Environment", "LimitMEMLOCK", "LimitCORE", "NoNewPrivileges", "UMask"),
    ):
        assert settings(name, USER_UNIT) == settings(name) != [], name
    for name in ("User", "Group", "CapabilityBoundingSet", "OOMScoreAdjust"):
        assert not settings(name, USER_UNIT), f"{name} is not an ordinary user's to set"


def test_the_configuration_of_the_readme_is_one_for_an_ordinary_user(tmp_path: Path) -> None:
    """The shell lines that make it, as they stand there."""
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"^    (mkdir -p ~/\.config/tierd\n.*?^    EOF\n)", text, re.MULTILINE | re.DOTALL)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    subprocess.run(["sh", "-euc", lines.replace("\n    ", "\n")], env=environment, check=True, timeout=20)
    config = load(tmp_path / ".config" / "tierd" / "tierd.yaml")
    assert config.runtime_dir == tmp_path / "run" / "tierd"
    assert config.handshake.socket == config.runtime_dir / "handshake.sock"
    assert config.api.socket == config.runtime_dir / "tierd.sock"
    assert config.store.path == tmp_path / ".local" / "state" / "tierd"


def test_no_ordering_cycle_with_vms_that_start_at_boot(units: Path) -> None:
    (units / "vm.service").write_text("[Service]\nSlice=machine.slice\nExecStart=/bin/true\n")
    (units / "libvirtd.service").write_text(
        "[Unit]\nAfter=remote-fs.target network.target\n[Service]\nExecStart=/bin/true\n"
    )
    (units / "boot.target").write_text("[Unit]\nRequires=basic.target tierd.service vm.service libvirtd.service\n")
    ran = analyze("verify", str(units / "boot.target"), unit_path=units)
    assert "cycle" not in ran.stderr
    assert (ran.returncode, ran.stderr) == (0, "")


def test_exposure() -> None:
    ran = analyze("security", "--offline=yes", f"--threshold={EXPOSURE_TENTHS_MAX}", str(UNIT))
    assert ran.returncode == 0, ran.stdout


def calls_of(name: str) -> set[str]:
    """The system calls of a set, the sets in it included."""
    lines = [line.strip() for line in analyze("syscall-filter", name).stdout.splitlines()[1:]]
    found: set[str] = set()
    for line in lines:
        found |= calls_of(line) if line.startswith("@") else {line}
    return found


def test_the_system_call_filter_lets_the_data_plane_work() -> None:
    words = " ".join(settings("SystemCallFilter")).split()
    allowed = set().union(*(calls_of(word) if word.startswith("@") else {word} for word in words))
    needed = (
        "ptrace pidfd_open pidfd_getfd process_madvise process_vm_readv process_vm_writev userfaultfd ioctl fallocate "
        "pread64 pwritev pwritev2 preadv2 mlock flock memfd_create sched_setaffinity poll sendmsg clone3 "
        "kcmp statx link linkat tgkill"
    )
    assert set(needed.split()) <= allowed


def test_nothing_newer_than_systemd_252_and_no_start_limit() -> None:
    assert settings("Type") == ["notify"]
    assert settings("FileDescriptorStorePreserve") == []
    assert settings("StartLimitIntervalSec") == ["0"]
    assert settings("RuntimeDirectoryPreserve") == ["yes"]
    assert settings("RestartKillSignal") == ["SIGUSR1"]


def test_systemd_waits_longer_than_the_daemon() -> None:
    (timeout,) = settings("TimeoutStopSec")
    assert parse_time(timeout) > Config().stop_timeout_s + 10


def test_the_group_of_the_unit_is_the_one_that_is_made() -> None:
    (group,) = settings("Group")
    assert f"\ng {group} " in (ROOT / "systemd" / "tierd.sysusers.conf").read_text()


# --- capabilities -----------------------------------------------------------------------------------------------------

# What tierd does to a VMM of another user, one line each. Prints the names of those that fail.
DEEDS = """
import ctypes, os, platform, sys
pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
x86 = platform.machine() == "x86_64"
PTRACE, USERFAULTFD = (101, 323) if x86 else (117, 282)
PIDFD_GETFD, PROCESS_MADVISE = 438, 440
PTRACE_SEIZE, MADV_PAGEOUT = 0x4206, 21
pidfd = os.pidfd_open(pid)
def madvise():
    with open(f"/proc/{pid}/maps") as maps:
        start, end = next(line.split()[0].split("-") for line in maps if "[stack]" in line)
    class iovec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
    call(PROCESS_MADVISE, pidfd, ctypes.byref(iovec(int(start, 16), int(end, 16) - int(start, 16))), 1, MADV_PAGEOUT, 0)
deeds = {
    "pidfd_getfd": lambda: call(PIDFD_GETFD, pidfd, 0, 0),
    "fd": lambda: os.readlink(f"/proc/{pid}/fd/0"),
    "pagemap": lambda: os.open(f"/proc/{pid}/pagemap", os.O_RDONLY),
    "maps": lambda: open(f"/proc/{pid}/maps").readline(),
    "process_madvise": madvise,
    "userfaultfd": lambda: call(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK),
    "ptrace": lambda: call(PTRACE, PTRACE_SEIZE, pid, 0, 0),
}
for name, deed in deeds.items():
    try:
        deed()
    except PermissionError:
        print(name)
"""
CAPABILITIES = settings("CapabilityBoundingSet")[0].split()


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process of another user."""
    setpriv = shutil.which("setpriv")
    need("kernel", os.geteuid() == 0 and setpriv is not None, "needs root and setpriv (util-linux)")
    assert setpriv is not None
    child = subprocess.Popen(
        [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", "echo ready; read forever"],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        cwd="/",
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def denied(pid: int, capabilities: list[str]) -> set[str]:
    """Which deeds root may not do with these capabilities only."""
    allowed = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in capabilities)])
    ran = subprocess.run(
        [
            "setpriv",
            f"--bounding-set={allowed}",
            "--inh-caps=-all",
            "--no-new-privs",
            sys.executable,
            "-c",
            DEEDS,
            str(pid),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split())


def test_the_capabilities_are_enough(stranger: int) -> None:
    assert denied(stranger, CAPABILITIES) == set()


@pytest.mark.parametrize(
    ("without", "deed"),
    [("CAP_SYS_PTRACE", "pidfd_getfd"), ("CAP_SYS_NICE", "process_madvise"), ("CAP_DAC_READ_SEARCH", "pagemap")],
)
def test_each_capability_is_needed(stranger: int, without: str, deed: str) -> None:
    assert without in CAPABILITIES
    assert deed in denied(stranger, [name for name in CAPABILITIES if name != without])


def test_no_capability_is_left_untested() -> None:
    assert set(CAPABILITIES) == {"CAP_SYS_PTRACE", "CAP_SYS_NICE", "CAP_DAC_READ_SEARCH"}
