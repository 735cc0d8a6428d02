# SPDX-License-Identifier: Apache-2.0
"""Tiers under the real daemon: pages enter, sink by age and where there is no room, survive a kill; what a reload may change."""

from __future__ import annotations

import signal
import time

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon, evicted, tiers, with_tiers
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, Vmm, wait_for
from tierd.client import Client, guest_path
from tierd.guest import no_progress

pytestmark = pytest.mark.usefixtures("kernel")
SMALL = {"name": "memory", "capacity": "2MiB"}


@pytest.fixture
def web(boot: Boot) -> Vmm:
    return boot("web", 16 * MIB, "compressible")


def test_pages_enter_sink_and_come_back(daemon: Daemon, web: Vmm) -> None:
    with_tiers(daemon, SMALL, "file")
    daemon.start()
    evicted(daemon, "web", web)
    wait_for(lambda: daemon.guests()["web"]["counters"]["pages_demoted"], "what is too much has sunk")
    memory, file = tiers(daemon)["memory"], tiers(daemon)["file"]
    assert 0 < memory["used_bytes"] <= 2 * MIB < memory["stored_bytes"]
    assert file["stored_bytes"] == file["used_bytes"] > 4 * MIB
    shown = daemon.tierd("status").stdout
    assert [line.split()[1] for line in shown.splitlines() if line.startswith(f"web{OURS}")][1:] == ["memory", "file"]
    assert {store["name"] for store in daemon.status()["stores"]} == {"memory", "file"}
    daemon.kill()
    daemon.start()
    web.verify()
    evicted(daemon, "web", web)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    web.verify()
    assert not list((daemon.runtime_dir / "pools").iterdir())


def test_tiers_in_another_order_are_for_guests_to_come(daemon: Daemon, web: Vmm) -> None:
    with_tiers(daemon, "memory", "file")
    daemon.start()
    daemon.wait_active("web")
    with_tiers(daemon, "file", "memory")
    daemon.signal(signal.SIGHUP)
    (told,) = wait_for(lambda: daemon.logged("guest_keeps_its_tiers"), "it is told")
    assert (told["tiers"], told["not_used"]) == (["memory", "file"], [])


def test_what_compressed_memory_takes_of_all_guests(daemon: Daemon, boot: Boot) -> None:
    """Guests that get cold together must not each take all of it."""
    guests = {name: boot(name, 16 * MIB, "compressible") for name in ("web", "other")}
    pools = str(daemon.runtime_dir / "pools")
    with_tiers(daemon, "memory", "file", memory={"path": pools, "capacity": "3MiB"})
    daemon.start()
    for name, guest in guests.items():
        evicted(daemon, name, guest)
    used = [tier["used_bytes"] for name in guests for tier in daemon.guests()[name]["tiers"] if tier["name"] == "memory"]
    assert min(used) > MIB, "each has its share"
    assert sum(used) < 3.1 * MIB
    for guest in guests.values():
        guest.verify()


def test_what_a_disk_takes_of_all_guests(daemon: Daemon, boot: Boot) -> None:
    """At no time more than its capacity, though all guests get cold together."""
    guests = {name: boot(name, 16 * MIB) for name in ("web", "other", "third")}
    for guest in guests.values():  # a file of many extents takes more than its pages
        for page in range(0, guest.pages, 2):
            guest.ask("zero", page, 1)
    with_tiers(daemon, "file", store={"path": str(daemon.store_dir), "capacity": "6MiB"})
    daemon.start()
    most = 0

    def full() -> bool:
        nonlocal most
        used = sum(path.stat().st_blocks * 512 for path in daemon.store_dir.glob("*.pages"))
        most = max(most, used)
        return used > 5 * MIB

    wait_for(full, "it is used")
    end = time.monotonic() + 1.5  # some cycles more
    while time.monotonic() < end:
        full()
    assert most <= 6 * MIB + 16 * 4096, "but for what the file system itself writes to find them"
    for guest in guests.values():
        guest.verify()


@pytest.mark.parametrize("above", [(), (SMALL,)], ids=["file", "memory"])
def test_a_file_that_is_encrypted(daemon: Daemon, web: Vmm, above: tuple[object, ...]) -> None:
    """Pages go there at once, or sink to it out of compressed memory."""
    with open(f"/proc/{web.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(web.addresses[0])
        some = [page[:32] for page in (memory.read(4096) for _ in range(512)) if page[8:] != page[:-8]]
    store = {"path": str(daemon.store_dir), "encrypt": True}
    with_tiers(daemon, *above, "file", store=store)
    daemon.start()
    evicted(daemon, "web", web)
    wait_for(lambda: tiers(daemon)["file"]["stored_bytes"] > 4 * MIB, "the file has what is to be in it")
    (path,) = daemon.store_dir.glob("*.pages")
    stored = path.read_bytes()
    assert 350 < len(some) < 450, "the others are one word again and again, and stored nowhere"
    assert not [page for page in some if page in stored]
    daemon.kill()
    with_tiers(daemon, *above, "file", store={**store, "encrypt": False})
    daemon.start()
    web.verify()
    evicted(daemon, "web", web)
    assert daemon.tierd("detach", f"web{OURS}").returncode == 0
    web.verify()
    assert not list((daemon.runtime_dir / "keys").iterdir()), "the key is destroyed with what it is for"


@pytest.mark.parametrize("when", ["before", "while"])
def test_nothing_is_left_of_an_encrypted_guest_whose_vmm_ends_unserved(daemon: Daemon, web: Vmm, when: str) -> None:
    """Also where nothing is encrypted any more: before tierd starts again, or while it cannot serve the guest."""
    store = {"path": str(daemon.store_dir), "encrypt": True}
    with_tiers(daemon, "file", store=store)
    daemon.start()
    evicted(daemon, "web", web)
    daemon.kill()
    (key,) = (daemon.runtime_dir / "keys").iterdir()
    with_tiers(daemon, "file", store={**store, "encrypt": False})
    if when == "before":
        web.kill()
        daemon.start()
    else:
        key.chmod(0o640)
        daemon.start()
        wait_for(lambda: daemon.logged("guest_not_served"), "its key is refused")
        web.kill()
    wait_for(lambda: not key.exists(), "its key is destroyed")
    wait_for(lambda: not list(daemon.store_dir.iterdir()), "its file is removed")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0


def test_pages_sink_with_age(daemon: Daemon, web: Vmm) -> None:
    with_tiers(daemon, "memory", {"name": "file", "min_age_s": 4})
    daemon.start()

    def first() -> dict[str, int] | None:
        """What there was in each tier when something was in memory."""
        stored: dict[str, int] = daemon.guests().get("web", {}).get("stored_bytes", {})
        return stored if stored.get("memory") else None

    assert not wait_for(first, "pages leave").get("file"), "nothing is as old"
    evicted(daemon, "web", web)  # what does not compress has waited for that
    wait_for(lambda: not tiers(daemon)["memory"]["stored_bytes"], "everything has sunk")
    web.verify()


def test_a_tier_is_not_taken_from_its_pages(daemon: Daemon, web: Vmm) -> None:
    with_tiers(daemon, "memory", "file")
    daemon.start()
    evicted(daemon, "web", web)
    with_tiers(daemon, "file")
    refused = daemon.tierd("config", "check")
    assert refused.returncode == 0, "by itself it is right"
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.logged("reload_failed"), "it is refused")
    pages = tiers(daemon)["memory"]["stored_bytes"] // 4096
    (told,) = daemon.logged("config_error")
    assert f"guest web{OURS} has {pages} pages in tier memory" in told["error"]
    with_tiers(daemon, {"name": "memory", "capacity": 0}, "file")
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: not tiers(daemon)["memory"]["stored_bytes"], "the tier is emptied")
    with_tiers(daemon, "file")
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(daemon.logged("reloaded")) == 2, "nothing is in its way")
    web.verify()


def test_a_place_for_pools_that_is_none(daemon: Daemon) -> None:
    with_tiers(daemon, "memory", memory={"path": str(daemon.store_dir.parent / "pools")})
    daemon.spawn()
    assert daemon.wait() == 1
    assert "compressed memory must be on a tmpfs; set memory.path" in daemon.log_path.read_text()


def test_a_full_tier_below_holds_up_nothing(daemon: Daemon, web: Vmm) -> None:
    """What would sink stays; what comes back gives its room back all the same, and pages go on leaving."""
    with_tiers(daemon, "memory", {"name": "file", "capacity": 0, "min_age_s": 0})
    daemon.start()
    wait_for(lambda: daemon.stored_bytes("web") > 8 * MIB, "what compresses leaves")
    before = tiers(daemon)["memory"]["used_bytes"]
    assert daemon.tierd("restore", f"web{OURS}").returncode == 0
    wait_for(lambda: tiers(daemon)["memory"]["used_bytes"] < before / 4, "room is given back")
    assert daemon.tierd("resume", f"web{OURS}").returncode == 0
    wait_for(lambda: tiers(daemon)["memory"]["used_bytes"] > before / 2, "it leaves again")
    assert not tiers(daemon)["file"]["stored_bytes"]
    assert not daemon.logged("eviction_failed")
    web.verify()


def test_a_place_that_nobody_needs_is_not_looked_at(daemon: Daemon) -> None:
    with_tiers(daemon, "file", memory={"path": str(daemon.store_dir.parent / "pools")})
    daemon.start()
    assert [store["name"] for store in daemon.status()["stores"]] == ["file"]
    with_tiers(daemon, "memory", memory={"path": str(daemon.store_dir.parent / "pools")})
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.logged("reload_failed"), "it is by now")
    assert "must be on a tmpfs" in daemon.logged("config_error")[0]["error"]


def test_memory_is_named_later(daemon: Daemon, boot: Boot) -> None:
    with_tiers(daemon, "file")
    daemon.start()
    with_tiers(daemon, "memory", "file")
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: daemon.logged("reloaded"), "reloaded")
    late = boot("web", 16 * MIB, "compressible")
    evicted(daemon, "web", late)
    assert tiers(daemon)["memory"]["stored_bytes"]
    late.verify()


def test_an_order_does_not_wait_for_an_eviction(daemon: Daemon, web: Vmm) -> None:
    """Of 16 MiB in four seconds: the restore begins after the batch that is under way."""
    slow = {"evict_rate_max": "4MiB/s", "interval_s": 4, "idle_intervals": 1}
    daemon.write(guests=[{"name": f"*{OURS}", **POLICY, **slow}])
    daemon.start()
    with Client(daemon.socket) as client:  # a command would have to start first
        wait_for(lambda: daemon.stored_bytes("web"), "the first batch has left", 60)
        client.run("POST", f"{guest_path(f'web{OURS}')}/restore", None, no_progress)
    assert daemon.guests()["web"]["counters"]["pages_evicted"] < 0.8 * web.pages
    web.verify()
