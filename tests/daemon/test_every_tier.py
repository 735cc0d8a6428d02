# SPDX-License-Identifier: Apache-2.0
"""The contract of a tier, whatever it is, as it is seen from outside: a real daemon that has this one only, and real guests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest

from tests.daemon.process import OURS, POLICY, Boot, Daemon
from tests.daemon.process import tiers as tiers_of_web
from tests.daemon.test_asked import install
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.vmm import MIB, PAGE, Vmm, userfaultfds, wait_for
from tests.store.servers import Server
from tierd.client import Client, guest_path

pytestmark = pytest.mark.usefixtures("kernel")
SIZE = 4 * MIB  # of a guest: a quarter needs no store, and a quarter does not compress
CAPACITY = 512 << 10
NOTHING = 64 << 10  # a pool's first pages, a file system's own


@dataclass
class Tier:
    """What a test knows of its tier, beside what the daemon says."""

    daemon: Daemon
    name: str
    settings: dict[str, Any]
    sealed: int  # so many keys has a guest
    keeps: bool  # what came back stays there, too, until the guest writes to it
    inside: Callable[[], int]  # bytes: of guest memory, or what they have become
    names: Callable[[], Sequence[object]]  # of what is in it: with the guest's key in each
    waste: int = 1  # so many times what counts may be in it

    def start(self, **policy: Any) -> None:
        self.write(**policy)
        self.daemon.start()

    def write(self, capacity: int | None = None, **policy: Any) -> None:
        rule = {**POLICY, "name": f"*{OURS}", "tiers": [{"name": self.name, "capacity": capacity}], **policy}
        self.daemon.write(guests=[rule], **self.settings)

    def order(self, verb: str, name: str = "web") -> None:
        """`pause` or `resume`."""
        with Client(self.daemon.socket) as client:
            client.post(f"{guest_path(name + OURS)}/{verb}")

    def said(self) -> dict[str, Any]:
        """Of guest web, to an operator."""
        (guest,) = json.loads(self.daemon.tierd("status", "--json").stdout)["guests"]
        return dict(guest)

    def counters(self) -> dict[str, int]:
        """Of guest web."""
        return dict(tiers_of_web(self.daemon)[self.name]["counters"])

    def used_bytes(self) -> int:
        return self.counters()["used_bytes"]

    def wait_out(self, vmm: Vmm, name: str = "web", refused: int = 0) -> int:
        """Until all of a guest is out, but pages that the tier does not take: so many, with the `refused` ones of before."""

        def counts() -> dict[str, int] | None:
            guest = self.daemon.guests().get(name)
            if guest is None or not guest["tiers"]:
                return None
            pages: dict[str, int] = guest["tiers"][0]["counters"]
            out = sum(guest["stored_bytes"].values()) // PAGE + pages["refused_pages"] - refused
            return pages if out == vmm.pages else None

        found: dict[str, int] = wait_for(counts, f"all of {name} is out")
        return found["refused_pages"]

    def wait_mostly_out(self, vmm: Vmm, name: str) -> None:
        size = vmm.pages * vmm.page_bytes
        wait_for(lambda: self.daemon.stored_bytes(name) > 0.7 * size, f"most of {name} is out")

    def wait_cycles(self) -> None:
        """Some more."""
        before = self.daemon.guests()["web"]["cycles"]
        wait_for(lambda: self.daemon.guests()["web"]["cycles"] > before + 2, "cycles")

    def left(self, key: str) -> list[str]:
        """Whatever there is of a guest: in the tier, and of it on this host."""
        return [name for name in map(str, (*self.names(), *paths(self.daemon.runtime_dir))) if key in name]


@dataclass
class Parts:
    """What tiers are made of."""

    daemon: Daemon
    disk_dir: Path
    monkeypatch: pytest.MonkeyPatch
    stack: ExitStack


def memory(at: Parts) -> Tier:
    pools = at.daemon.runtime_dir / "pools"
    return Tier(at.daemon, "memory", {}, 0, False, partial(taken, pools), lambda: ())


def file(at: Parts) -> Tier:
    store = at.daemon.store_dir
    settings = {"store": {"path": str(store), "encrypt": True}}
    return Tier(at.daemon, "file", settings, 1, True, partial(taken, store), partial(paths, store))


def redis(at: Parts) -> Tier:
    server = at.stack.enter_context(Server())

    def inside() -> int:
        return PAGE * sum(int(server.ask("HLEN", key)) for key in server.ask("KEYS", "*/*"))

    def names() -> list[str]:
        (spaces,) = server.ask("KEYS", "*:spaces") or [""]
        entries = server.ask("HKEYS", spaces) if spaces else []
        return [name.decode() for name in (*server.ask("KEYS", "*"), *entries)]

    stores = {"redis": {"addresses": [server.address]}}
    return Tier(at.daemon, "redis", {"stores": stores}, 1, True, inside, names)


def objects(at: Parts) -> Tier:
    bucket = at.disk_dir / "bucket"
    bucket.mkdir(mode=0o700)
    stores = {"objects": {"scheme": "fs", "options": {"root": str(bucket)}}}
    return Tier(at.daemon, "objects", {"stores": stores}, 1, True, partial(taken, bucket), partial(paths, bucket), 2)


def redis_and_objects(at: Parts) -> Tier:
    """Two copies of each page."""
    first, second = redis(at), objects(at)
    stores = {**first.settings["stores"], **second.settings["stores"]}
    stores["redis"]["second"] = "objects"

    def inside() -> int:
        return max(first.inside(), second.inside())

    def names() -> list[object]:
        return [*first.names(), *second.names()]

    return Tier(at.daemon, "redis", {"stores": stores}, 2, False, inside, names, 2)


def plug_in(at: Parts) -> Tier:
    install(at.disk_dir, at.monkeypatch, "tierd_plain:PlainStore")
    pages = at.disk_dir / "pages"
    stores = {"plain": {"path": str(pages)}}

    def inside() -> int:
        return PAGE * sum(path.name.isdigit() for path in paths(pages))

    return Tier(at.daemon, "plain", {"stores": stores}, 1, True, inside, partial(paths, pages))


def paths(place: Path) -> list[Path]:
    """What is in there, while it changes."""
    return [Path(top, name) for top, folders, files in os.walk(place) for name in (*folders, *files)]


def taken(place: Path) -> int:
    """Bytes on its file system."""
    total = 0
    for path in paths(place):
        with suppress(FileNotFoundError):
            info = path.stat()
            total += info.st_blocks * 512 if S_ISREG(info.st_mode) and path.name != "lease" else 0
    return total


TIERS: dict[str, Callable[[Parts], Tier]] = {
    "memory": memory,
    "file": file,
    "redis": redis,
    "objects": objects,
    "plug-in": plug_in,
    "redis-and-objects": redis_and_objects,
}


@pytest.fixture(params=TIERS)
def tier(
    request: pytest.FixtureRequest, daemon: Daemon, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tier]:
    with ExitStack() as stack:
        yield TIERS[request.param](Parts(daemon, disk_dir, monkeypatch, stack))


def test_what_is_idle_leaves_and_comes_back(tier: Tier, boot: Boot) -> None:
    """By faults, and the figures say so. What came back takes no room any more after the next cycles: as soon as the guest has
    written to it, where it is kept until then."""
    web = boot("web", SIZE, "compressible")
    tier.start()
    tier.wait_out(web)
    tier.order("pause")
    left = tier.said()
    in_it, counters = left["tiers"][0], left["tiers"][0]["counters"]
    assert counters["written_pages"] * PAGE == in_it["stored_bytes"] == left["stored_bytes"][tier.name]
    assert counters["refused_pages"] == 0 or tier.name == "memory"
    assert left["resident_bytes"] == counters["refused_pages"] * PAGE
    assert tier.inside() > in_it["stored_bytes"] / 8
    assert counters["read_pages"] == left["counters"]["latency_count"] == 0, "nobody was asked for a page"
    web.verify()
    back = tier.said()
    assert (back["resident_bytes"], sum(back["stored_bytes"].values())) == (SIZE, 0)
    assert back["tiers"][0]["counters"]["read_pages"] >= counters["written_pages"], "each was read"
    assert sum(back["tiers"][0]["counters"]["read_buckets"]) > 0
    faults = back["counters"]
    assert sum(faults["latency_buckets"]) == faults["latency_count"] >= faults["faults_fetch"] > 0
    assert not faults["pages_lost"]
    if tier.keeps:
        tier.wait_cycles()
        assert tier.used_bytes() == in_it["stored_bytes"], "what was only read need not be written again"
        assert web.ask("fill") == [web.pages]
    wait_for(lambda: tier.used_bytes() <= NOTHING and tier.inside() <= NOTHING, "the room is given back")
    web.verify()


def test_the_last_write_counts(tier: Tier, boot: Boot) -> None:
    """Each time the guest writes to other pages that are out; the others come back as they were."""
    web = boot("web", SIZE, "compressible")
    tier.start()
    refused, step = 0, web.pages // 8
    for n in range(2):
        refused = tier.wait_out(web, refused=refused)
        tier.order("pause")
        web.ask("fill", n * step, 3 * step)
        web.ask("zero", (6 - n) * step, step)
        web.verify()
        web.ask("fill", (n + 1) * step, step)
        tier.order("resume")
    tier.wait_out(web, refused=refused)
    web.verify()


def test_a_successor_finds_everything(tier: Tier, boot: Boot) -> None:
    """Tierd is killed while pages leave, and when they have left; of a guest that ended meanwhile nothing stays."""
    web, doomed = boot("web", 2 * SIZE, "compressible"), boot("doomed", SIZE, "compressible")
    tier.start(evict_rate_max="2MiB/s")
    wait_for(lambda: tier.daemon.stored_bytes("web"), "pages leave")
    tier.daemon.kill()
    web.send("verify")
    tier.write()
    tier.daemon.start()
    wait_for(web.answered, "its pages come")
    assert not web.wrong
    doomed.verify()
    adopted = {told["guest"].removesuffix(OURS): told for told in tier.daemon.logged("guest_adopted")}
    assert 0 < adopted["web"]["stored_pages"] < 0.6 * web.pages, "not all of it had left"
    web.ask("fill", web.pages // 4, web.pages // 2)
    tier.wait_mostly_out(web, "web")
    tier.wait_mostly_out(doomed, "doomed")
    keys = {name: guest["key"] for name, guest in tier.daemon.guests().items()}
    assert tier.left(keys["doomed"])
    tier.daemon.kill()
    doomed.kill()
    tier.daemon.start()
    wait_for(lambda: not tier.left(keys["doomed"]), "it is swept")
    web.verify()
    assert [told["lost_pages"] for told in tier.daemon.logged("guest_adopted")] == [0, 0, 0]


def test_guests_do_not_see_each_other(tier: Tier, boot: Boot) -> None:
    """One is detached, the other one ends. Nothing is left of either, and nothing is lost with it."""
    web, other = boot("web", SIZE, "compressible"), boot("other", SIZE, "compressible")
    other.ask("fill")  # other bytes than in the same pages of web
    tier.start()
    tier.wait_out(web)
    tier.wait_out(other, "other")
    keys = {name: guest["key"] for name, guest in tier.daemon.guests().items()}
    assert len(list((tier.daemon.runtime_dir / "keys").glob("*"))) == 2 * tier.sealed
    assert all(map(tier.left, keys.values()))
    assert tier.daemon.tierd("detach", f"web{OURS}").returncode == 0
    assert not tier.left(keys["web"])
    assert not userfaultfds(web.pid)
    web.verify()
    tier.order("pause", "other")
    assert other.ask("verify", 0, other.pages // 2) == [other.pages // 2, 0]
    assert tier.daemon.stored_bytes("other") > SIZE / 4
    other.kill()
    wait_for(lambda: not tier.left(keys["other"]), "nothing is left of it either")
    web.verify()


def test_no_more_than_its_capacity(tier: Tier, boot: Boot) -> None:
    """While pages leave, come back and leave again, and others are in use; the rest stays with the guest."""
    web = boot("web", 2 * SIZE, "compressible")
    web.ask("hot", 0, web.pages // 4)
    tier.start(capacity=CAPACITY)
    tier.daemon.wait_active("web")
    for _ in range(2):
        before = tier.counters()["written_pages"]
        web.ask("fill")
        web.ask("run", 2000, 50)
        wait_nearly_full(tier, before)
        web.ask("stop")
    tier.order("pause")
    guest = tier.said()
    assert guest["resident_bytes"] + sum(guest["stored_bytes"].values()) == 2 * SIZE
    web.verify()


def wait_nearly_full(tier: Tier, before: int) -> None:
    """Until pages have left, so many `before`, and it is nearly full of them; at no time is there too much in it."""

    def nearly_full() -> bool:
        now = tier.counters()
        assert now["used_bytes"] <= CAPACITY
        assert tier.inside() <= tier.waste * CAPACITY + NOTHING
        return now["used_bytes"] > 0.7 * CAPACITY and now["written_pages"] - before > CAPACITY // PAGE // 2

    wait_for(nearly_full, f"{tier.name} is nearly full")
    tier.wait_cycles()
    wait_for(nearly_full, "it is so still, or again")
