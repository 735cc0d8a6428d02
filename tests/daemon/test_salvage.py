# SPDX-License-Identifier: Apache-2.0
"""`tierd detach --pid`: a guest whose tierd is gone for good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.process import Boot, Daemon, evicted, tiers, with_tiers
from tests.kernel.vmm import MIB, Vmm, need_anonymous, userfaultfds, wait_for
from tests.store.servers import Server
from tierd.attach.procfs import maps_of
from tierd.guest import no_progress
from tierd.salvage import put_right
from tierd.serve import StateError


@pytest.mark.parametrize("kind", ["shared", "anonymous"])
def test_a_guest_whose_tierd_is_gone_for_good(daemon: Daemon, boot: Boot, kind: str) -> None:
    """Of anonymous memory some is in its staging area, and some in the store."""
    if kind == "anonymous":
        need_anonymous()
        with_tiers(daemon, {"name": "file", "capacity": "8MiB"})
    vmm = boot("web", 16 * MIB, f"kind={kind}")
    before = mappings(vmm)
    daemon.start()
    if kind == "anonymous":
        wait_for(lambda: is_everywhere(daemon), "pages are everywhere")
    else:
        evicted(daemon, "web", vmm)
    refused = daemon.tierd("detach", "--pid", str(vmm.pid))
    assert refused.returncode == 1
    assert "another tierd" in refused.stderr
    daemon.kill()
    done = daemon.tierd("detach", "--pid", str(vmm.pid), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restored_bytes"] > 0.9 * vmm.pages * vmm.page_bytes
    assert not userfaultfds(vmm.pid)
    assert mappings(vmm) == before, "no staging area, no place for calls"
    assert not list(Path(daemon.runtime_dir, "guests").iterdir())
    vmm.verify()


def is_everywhere(daemon: Daemon) -> bool:
    guest = daemon.guests().get("web")
    return bool(guest and guest["staged_bytes"] > 4 * MIB and guest["stored_bytes"]["file"] > 4 * MIB)


def mappings(vmm: Vmm) -> int:
    """Bytes of address space, but for what its own memory takes."""
    return sum(m.end - m.start for m in maps_of(vmm.pid) if m.path not in ("[heap]", "[stack]"))


def test_its_pages_are_in_stores_that_are_asked(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    """They come back from there, too; where a store cannot be had, nothing is changed."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    objects = {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}
    vmm = boot("web", 16 * MIB, "compressible")
    with Server() as redis:
        steps = [{"name": "memory", "capacity": "3MiB"}, {"name": "redis", "capacity": "3MiB"}, "objects"]
        with_tiers(daemon, *steps, stores={"redis": {"addresses": [redis.address]}, "objects": objects})
        daemon.start()
        evicted(daemon, "web", vmm)
        wait_for(lambda: all(tier["stored_bytes"] for tier in tiers(daemon).values()), "pages are everywhere")
        daemon.kill()
        redis.kill()
        refused = daemon.tierd("detach", "--pid", str(vmm.pid))
        assert refused.returncode == 1
        assert "store redis" in refused.stderr
        assert userfaultfds(vmm.pid), "what is stored is served by the next one"
        redis.start()
        done = daemon.tierd("detach", "--pid", str(vmm.pid), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["restored_bytes"] > 0
        assert not userfaultfds(vmm.pid)
        vmm.verify()
        assert not [name for name in redis.ask("KEYS", "*") if b"spaces" not in name and b"lease" not in name]
    assert not list((disk_dir / "bucket").rglob("[0-9]*-[0-9]*.???????")), "nothing of the guest is left"
    assert not list((daemon.runtime_dir / "keys").iterdir()), "nor its keys"


def objects_in(disk_dir: Path) -> dict[str, Any]:
    return {"scheme": "fs", "options": {"root": str(disk_dir / "bucket")}}


def left_in_objects(daemon: Daemon, boot: Boot, disk_dir: Path) -> Vmm:
    """Its daemon was killed."""
    (disk_dir / "bucket").mkdir(mode=0o700)
    vmm = boot("web", 8 * MIB, "compressible")
    with_tiers(daemon, "objects", stores={"objects": objects_in(disk_dir)})
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.kill()
    return vmm


def test_the_configuration_has_no_such_store_any_more(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    vmm = left_in_objects(daemon, boot, disk_dir)
    with_tiers(daemon, "file")
    refused = daemon.tierd("detach", "--pid", str(vmm.pid))
    assert refused.returncode == 1
    assert "no store objects" in refused.stderr
    with_tiers(daemon, "objects", stores={"objects": objects_in(disk_dir)})
    assert daemon.tierd("detach", "--pid", str(vmm.pid)).returncode == 0
    vmm.verify()


def test_its_vmm_cannot_be_entered(daemon: Daemon, boot: Boot, disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A userfaultfd is left in it; no page is left in a store, nor the key to one, because nobody would look for them."""
    vmm = left_in_objects(daemon, boot, disk_dir)

    def refused(pid: int, number: int) -> None:
        raise PermissionError(f"process {pid} is traced")

    monkeypatch.setattr("tierd.serve.close_in_vmm", refused)
    with pytest.raises(StateError, match=r"is back; .* could not be entered"):
        put_right(daemon.config, daemon.runtime_dir, vmm.pid, no_progress)
    vmm.verify()
    assert not list((disk_dir / "bucket").rglob("[0-9]*-[0-9]*.???????"))
    assert not list((daemon.runtime_dir / "keys").iterdir())


def test_nothing_of_it_is_there(daemon: Daemon, boot: Boot) -> None:
    vmm = boot("web")
    done = daemon.tierd("detach", "--pid", str(vmm.pid))
    assert done.returncode == 1
    assert f"no page table of process {vmm.pid}" in done.stderr


def test_either_a_guest_or_a_process(daemon: Daemon) -> None:
    assert daemon.tierd("detach").returncode == 2
    assert daemon.tierd("detach", "web", "--pid", "1").returncode == 2
