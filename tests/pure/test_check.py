# SPDX-License-Identifier: Apache-2.0
"""`tierd check` as a function of what was found."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tierd.attach import Refused
from tierd.attach.procfs import boot_id
from tierd.check import Finding, engine_findings, guest_findings, host_findings, kernel_findings, passed
from tierd.native import TABLE_BYTES_A_PAGE, Identity, TableRegion, table_create


@dataclass
class Probe:
    features: int = 0
    page_bytes: int = 4096
    userfaultfd: int = 0
    write_protect: int = 0
    missing: int = 0
    pageout: int = 0
    pagemap_scan: int = 0
    poison: int = 0
    self_zap: int = 0
    anonymous: int = 0
    rwp: int = errno.EINVAL
    rfc: int = errno.EINVAL
    rwp_anonymous: int = errno.EINVAL
    rfc_anonymous: int = errno.EINVAL
    rwp_step: int = 1
    rfc_step: int = 1


def failing(**trials: int) -> list[Finding]:
    return [finding for finding in kernel_findings(Probe(**trials)) if not finding.ok]  # type: ignore[arg-type]


def test_a_kernel_that_can_do_everything() -> None:
    assert failing() == []
    assert len(kernel_findings(Probe())) == 8  # type: ignore[arg-type]


@pytest.mark.parametrize("trial", ["userfaultfd", "write_protect", "missing"])
def test_what_tierd_cannot_do_without(trial: str) -> None:
    (finding,) = failing(**{trial: errno.EPERM})
    assert finding.needed
    assert "Operation not permitted" in finding.says
    assert finding.remedy
    assert not passed([finding])


@pytest.mark.parametrize("native", ["rwp", "rfc"])
def test_an_ordinary_user_serves_whoever_brings_a_userfaultfd(host: Path, native: str) -> None:
    """No privilege is missed where the kernel tracks by itself; on any other it is."""
    (finding,) = failing(userfaultfd=errno.EPERM, **{native: 0})
    assert passed([finding])
    assert "a VMM must bring it" in finding.says
    (host / "proc/self/status").write_text("CapEff:\t0000000000000000\n")
    (host / "proc/sys/kernel/yama/ptrace_scope").write_text("3\n")
    findings = [finding for finding in host_findings(Probe(**{native: 0}), host) if not finding.ok]
    assert [finding.name for finding in findings] == ["privileges", "ptrace"]
    assert passed(findings)
    assert "handshake.socket" in findings[0].says
    assert not passed(bad(host))


def test_a_kernel_that_tracks_idle_pages(host: Path) -> None:
    def findings() -> list[Finding]:
        return [found for found in host_findings(Probe(), host) if found.name == "idle page tracking"]  # type: ignore[arg-type]

    assert findings() == []
    bitmap = host / "sys/kernel/mm/page_idle/bitmap"
    bitmap.parent.mkdir(parents=True)
    bitmap.touch()
    assert findings()[0].ok
    (host / "proc/self/status").write_text(f"CapEff:\t{1 << 19 | 1 << 23 | 1 << 2:016x}\n")
    (finding,) = findings()
    assert passed([finding])
    assert "CAP_SYS_ADMIN" in finding.says


@pytest.mark.parametrize(
    ("limit", "capability", "ok"), [("8388608", 0, False), ("8388608", 1 << 14, True), ("unlimited", 0, True)]
)
def test_how_much_memory_may_be_locked(host: Path, limit: str, capability: int, ok: bool) -> None:
    (host / "proc/self/limits").write_text(
        f"Limit  Soft Limit  Hard Limit  Units\nMax locked memory         {limit:20} {limit:20} bytes     \n"
    )
    (host / "proc/self/status").write_text(f"CapEff:\t{1 << 19 | 1 << 23 | 1 << 2 | capability:016x}\n")
    assert passed(bad(host))
    assert ([finding.name for finding in bad(host)] == []) is ok
    assert ok or "8192 KiB: enough for one guest of 0.9 GiB" in bad(host)[0].says


def test_a_page_table_takes_no_more_than_is_reckoned_with() -> None:
    pages, me = 1 << 20, Identity(os.getpid(), 1, boot_id(), "guest", 7, 8_000_000_000, ())
    with open(os.memfd_create("table"), "r+b") as table:
        table_create(table.fileno(), me, [TableRegion(1 << 40, pages * os.sysconf("SC_PAGESIZE"), 0, 1, 2)])
        assert TABLE_BYTES_A_PAGE - 1 < os.fstat(table.fileno()).st_size / pages < TABLE_BYTES_A_PAGE, "and bitmaps"


@pytest.mark.parametrize("trial", ["pageout", "pagemap_scan", "poison", "self_zap", "anonymous"])
def test_what_is_only_nicer_to_have(trial: str) -> None:
    (finding,) = failing(**{trial: errno.ENOSYS})
    assert not finding.needed
    assert passed([finding])


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host that has everything."""
    files = {
        "proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
        "proc/sys/kernel/yama/ptrace_scope": "1\n",
        "proc/meminfo": "MemTotal: 100 kB\nSwapTotal:       0 kB\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
        "sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled": "always [inherit] advise never\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def bad(host: Path) -> list[Finding]:
    return [finding for finding in host_findings(Probe(), host) if not finding.ok]


def test_a_good_host(host: Path) -> None:
    assert bad(host) == []


def test_a_kernel_without_these_files_is_fine(host: Path, tmp_path: Path) -> None:
    (host / "proc/sys/kernel/yama/ptrace_scope").unlink()
    (host / "sys/kernel/mm/transparent_hugepage/shmem_enabled").unlink()
    assert bad(host) == []


@pytest.mark.parametrize(
    ("file", "text", "needed", "words"),
    [
        ("proc/self/status", "CapEff:\t0000000000000000\n", True, "CAP_SYS_NICE"),
        ("proc/self/status", "CapEff:\t0000000000080000\n", True, "CAP_DAC_READ_SEARCH"),
        ("proc/sys/kernel/yama/ptrace_scope", "3\n", True, "ptrace_scope is 3"),
        ("proc/meminfo", "SwapTotal:  8 kB\n", False, "swap is on"),
        (
            "sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "[always] within_size advise never deny force\n",
            True,
            "hugepages-64kB/shmem_enabled is inherit",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/hugepages-64kB/shmem_enabled",
            "always inherit within_size [advise] never\n",
            True,
            "shmem_enabled is advise",
        ),
    ],
)
def test_a_host_that_lacks_something(host: Path, file: str, text: str, needed: bool, words: str) -> None:
    (host / file).write_text(text)
    (finding,) = bad(host)
    assert finding.needed == needed
    assert words in finding.says
    assert finding.remedy


@pytest.mark.parametrize("engine", ["rwp", "rfc"])
def test_large_folios_are_fine_where_readers_wait_while_a_page_leaves(host: Path, engine: str) -> None:
    (host / "sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text("always within_size [advise] never deny\n")
    found = {finding.name: finding for finding in host_findings(Probe(**{engine: 0}), host)}  # type: ignore[arg-type]
    assert found["large folios"].ok
    assert "shmem_enabled is advise" in found["large folios"].says


def test_a_guest_in_words() -> None:
    refused = Refused("vfio", "a device", "pid 5: VmPin 8 kB", "remove it")
    fine, not_fine = guest_findings([("large_folios", None), ("vfio", refused)])
    assert (fine.name, fine.ok) == ("large folios", True)
    assert (not_fine.ok, not_fine.says, not_fine.remedy) == (False, "a device (pid 5: VmPin 8 kB)", "remove it")


def engine(host: Path, wanted: str = "auto", **trials: int) -> list[Finding]:
    return engine_findings(Probe(**trials), wanted, host)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("trials", "name"), [({}, "stock"), ({"rfc": 0}, "rfc"), ({"rwp": 0}, "rwp"), ({"rwp": 0, "rfc": 0}, "rwp")]
)
def test_the_engine_and_why(host: Path, trials: dict[str, int], name: str) -> None:
    (finding,) = engine(host, **trials)
    assert finding.ok
    assert finding.says.startswith(f"{name}: ")


def test_an_interface_that_misbehaves_is_told(host: Path) -> None:
    """The next engine is taken, and what was wrong is said."""
    (finding,) = engine(host, rwp=errno.EILSEQ, rwp_step=4)
    assert not finding.ok
    assert not finding.needed
    assert finding.says.startswith("stock: ")
    assert "the scan for untouched pages did something else than it should" in finding.says


def test_an_engine_that_is_forced_and_does_not_work(host: Path) -> None:
    (finding,) = engine(host, wanted="rfc")
    assert not finding.ok
    assert finding.needed
    assert "does not offer" in finding.says


@pytest.mark.parametrize(
    ("trials", "says"),
    [
        ({}, ("make no difference",)),
        ({"rfc": 0}, ("goes on", "shared memory", "is answered", "anonymous", "gets none")),
        ({"rwp": 0}, ("goes on", "know of each other")),
    ],
    ids=["stock", "rfc", "rwp"],
)
def test_what_becomes_of_numa_balancing(host: Path, trials: dict[str, int], says: tuple[str, ...]) -> None:
    (host / "proc/sys/kernel/numa_balancing").write_text("1\n")
    first, numa = engine(host, **trials)
    assert (first.name, numa.name) == ("engine", "NUMA balancing")
    assert [part for part in says if part not in numa.says] == []
