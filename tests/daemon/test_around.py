# SPDX-License-Identifier: Apache-2.0
"""The files around the real daemon: directories that are full, read-only, somebody else's, or full of other things. What
cannot be used is told and not touched, nothing is waited for, and guests whose pages can be had are served."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.process import OURS, Boot, Daemon, evicted
from tests.kernel.conftest import kernel  # noqa: F401  (a fixture)
from tests.kernel.disks import loop_disk, sparse
from tests.kernel.vmm import MIB, Vmm, userfaultfds, wait_for

NOBODY = 65534


def evicted_and_killed(daemon: Daemon, boot: Boot) -> tuple[Vmm, Path]:
    """A guest whose pages are stored and whose daemon is gone, and its state file."""
    vmm = boot("web", 4 * MIB)
    daemon.start()
    evicted(daemon, "web", vmm)
    daemon.kill()
    (state,) = (daemon.runtime_dir / "guests").iterdir()
    return vmm, state


def looks(directory: Path) -> list[tuple[str, int, int, int]]:
    """Name, mode, owner, and of files the size."""
    found = [(path.name, path.lstat()) for path in directory.iterdir()]
    return sorted((name, s.st_mode, s.st_uid, s.st_size if stat.S_ISREG(s.st_mode) else 0) for name, s in found)


def test_a_directory_of_state_files_that_is_full_of_other_things(daemon: Daemon, boot: Boot, disk_dir: Path) -> None:
    vmm, state = evicted_and_killed(daemon, boot)
    guests = state.parent
    (guests / "10-10.state").mkdir()
    os.mkfifo(guests / "11-11.state")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(guests / "12-12.state"))
    os.mknod(guests / "13-13.state", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    (guests / "14-14.state").symlink_to(state)
    (guests / "15-15.state").symlink_to("nowhere")
    (guests / "16-16.state").touch()
    os.link(state, guests / "17-17.state")
    shutil.copy(state, guests / "18-18.state")
    (guests / "19-19.state").write_bytes(state.read_bytes())
    os.chown(guests / "19-19.state", NOBODY, NOBODY)
    (guests / "20-20.state").write_bytes(os.urandom(100_000))
    (guests / "21-21.new").mkdir()
    (guests / "somebody's").write_text("precious")
    (guests / "²-٣.state").write_bytes(b"")
    before = looks(guests)
    daemon.start()
    refused = {Path(entry["path"]).name: entry["error"] for entry in daemon.logged("state_refused")}
    assert sorted(refused) == sorted([f"{i}-{i}.state" for i in range(10, 21)] + ["²-٣.state"])
    for name, says in {10: "a directory", 11: "a FIFO", 12: "a socket", 13: "a device", 14: "a symbolic link"}.items():
        assert says in refused[f"{name}-{name}.state"]
    assert "belongs to user" in refused["19-19.state"]
    for name in (17, 18):
        assert "a copy perhaps" in refused[f"{name}-{name}.state"]
    assert all("nothing was touched" in error for error in refused.values())
    assert len(daemon.logged("guest_adopted")) == 1
    vmm.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    vmm.verify()
    assert looks(guests) == [entry for entry in before if entry[0] != state.name]


def in_the_way_of_guests(run: Path) -> None:
    run.mkdir()
    (run / "guests").symlink_to(run.parent)


def file_as_runtime_dir(run: Path) -> None:
    run.write_text("precious")


def of_another_user(run: Path) -> None:
    run.mkdir()
    os.chown(run, NOBODY, NOBODY)


def for_everybody(run: Path) -> None:
    run.mkdir()
    run.chmod(0o777)


def lock_is_a_directory(run: Path) -> None:
    (run / "tierd.lock").mkdir(parents=True)


def lock_is_a_fifo(run: Path) -> None:
    run.mkdir()
    os.mkfifo(run / "tierd.lock")


def lock_is_a_link(run: Path) -> None:
    run.mkdir()
    (run.parent / "precious").write_text("precious")
    (run / "tierd.lock").symlink_to(run.parent / "precious")


def lock_of_another_user(run: Path) -> None:
    run.mkdir()
    (run / "tierd.lock").touch()
    os.chown(run / "tierd.lock", NOBODY, NOBODY)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (in_the_way_of_guests, "guests must be a directory"),
        (file_as_runtime_dir, "File exists"),
        (of_another_user, "nobody else may write"),
        (for_everybody, "nobody else may write"),
        (lock_is_a_directory, "it is a directory"),
        (lock_is_a_fifo, "it is a FIFO"),
        (lock_is_a_link, "it is a symbolic link"),
        (lock_of_another_user, f"belongs to user {NOBODY}"),
    ],
)
def test_a_runtime_directory_that_cannot_be_used(daemon: Daemon, make: Callable[[Path], None], says: str) -> None:
    make(daemon.runtime_dir)
    before = looks(daemon.runtime_dir.parent)
    done = daemon.tierd("run", "--config", str(daemon.config))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert says in line
    assert looks(daemon.runtime_dir.parent) == before
    if make is lock_is_a_link:
        assert (daemon.runtime_dir.parent / "precious").read_text() == "precious"


def test_a_runtime_directory_that_is_read_only(daemon: Daemon) -> None:
    daemon.runtime_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,mode=0755", "tmpfs", daemon.runtime_dir], check=True)
    try:
        done = daemon.tierd("run", "--config", str(daemon.config))
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert "Read-only file system" in line
    finally:
        subprocess.run(["umount", daemon.runtime_dir], check=True)


def test_a_runtime_directory_that_is_full(daemon: Daemon, boot: Boot) -> None:
    """Guests that were there are served; a new one is refused until there is room for its page table."""
    daemon.runtime_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0755", "tmpfs", daemon.runtime_dir], check=True)
    try:
        vmm, _ = evicted_and_killed(daemon, boot)
        filler = daemon.runtime_dir / "filler"
        with filler.open("wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(file.fileno(), bytes(4096))
        daemon.start()
        assert daemon.logged("guest_adopted")
        vmm.verify()
        other = boot("other", 2 * MIB)
        wait_for(lambda: daemon.guests().get("other", {}).get("state") == "refused", "the new guest is refused")
        assert "more space" in daemon.guests()["other"]["reason"]
        assert not userfaultfds(other.pid)
        assert len(list((daemon.runtime_dir / "guests").iterdir())) == 1
        filler.unlink()
        daemon.wait_active("other")
        evicted(daemon, "other", other)
        other.verify()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        vmm.verify()
        other.verify()
    finally:
        if daemon.process is not None:
            daemon.kill()
        subprocess.run(["umount", daemon.runtime_dir], check=True)


def test_something_in_the_way_of_a_guests_page_table(daemon: Daemon, boot: Boot) -> None:
    """It is not replaced; that guest waits, another does not."""
    daemon.start()
    guests = daemon.runtime_dir / "guests"
    daemon.signal(signal.SIGSTOP)  # so that it does not see the VMM before the directory is there
    vmm = boot("web", 2 * MIB)
    in_the_way = guests / f"{vmm.pid}-{vmm.spec().start_ticks}.state"
    os.mkfifo(in_the_way)
    daemon.signal(signal.SIGCONT)
    wait_for(lambda: "in the way" in daemon.guests().get("web", {}).get("reason", ""), "the guest is refused")
    assert stat.S_ISFIFO(in_the_way.lstat().st_mode)
    other = boot("other", 2 * MIB)
    evicted(daemon, "other", other)
    other.verify()
    in_the_way.unlink()
    daemon.wait_active("web")
    vmm.verify()


def test_something_in_the_way_of_the_socket(daemon: Daemon, boot: Boot) -> None:
    """A tierd that serves nobody says so and ends; one with guests serves them, and has its API when there is room."""
    vmm, _ = evicted_and_killed(daemon, boot)
    daemon.socket.unlink(missing_ok=True)
    daemon.socket.write_text("precious")
    daemon.start()
    assert "is not a socket" in daemon.logged("api_unusable")[0]["error"]
    vmm.verify()
    assert daemon.socket.read_text() == "precious"
    daemon.socket.unlink()
    wait_for(lambda: daemon.logged("api_works_again"), "the API is there")
    daemon.wait_active("web")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    daemon.socket.write_text("precious")
    done = daemon.tierd("run", "--config", str(daemon.config))
    assert done.returncode == 1
    assert "is not a socket" in done.stderr


# --- the store -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["full", "read-only"])
@pytest.mark.parametrize("direct", ["auto", "on", "off"])
def test_a_restart_on_a_store_that_cannot_be_written(
    daemon: Daemon, boot: Boot, disk_dir: Path, trouble: str, direct: str
) -> None:
    """What is in it comes back all the same."""
    image = sparse(disk_dir / "image", 400 * MIB)  # tierd leaves 256 MiB to others
    with loop_disk(disk_dir, image) as mount:
        daemon.store_dir = mount / "store"
        daemon.write(store={"path": str(daemon.store_dir), "direct": direct})
        try:
            vmm, _ = evicted_and_killed(daemon, boot)
            if trouble == "read-only":
                subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
            else:
                subprocess.run(["dd", "if=/dev/zero", f"of={mount}/filler", "bs=1M"], stderr=subprocess.DEVNULL)
                subprocess.run(["sync", "-f", mount], check=True)
                assert os.statvfs(mount).f_bavail == 0
            daemon.start()
            assert daemon.logged("guest_adopted")
            if direct != "off" and trouble == "read-only":  # a full one may still take the trial's page
                assert daemon.logged("store_cannot_be_written")
            vmm.verify()
            assert daemon.guests()["web"]["counters"]["pages_lost"] == 0
            if trouble == "read-only":
                subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            vmm.verify()
        finally:
            if daemon.process is not None:
                daemon.kill()


def test_a_store_directory_that_is_full_of_other_things(daemon: Daemon, boot: Boot) -> None:
    """Nothing of it is taken for a guest's, swept or waited for."""
    store = daemon.store_dir
    store.mkdir(mode=0o700)
    os.mkfifo(store / "guest-10-10.pages")
    (store / "guest-11-11.pages").mkdir()
    (store / "guest-12-12.pages").symlink_to("/etc/passwd")
    (store / "guest-x-y.pages").write_text("precious")
    (store / "guest-²-٣.pages").write_text("precious")
    (store / ("guest-" + "9" * 200 + "-1.pages")).write_text("precious")
    (store / "somebody's").write_text("precious")
    before = looks(store)
    vmm, state = evicted_and_killed(daemon, boot)
    pages = store / f"guest-{state.stem}.pages"
    pages.rename(store / "moved")
    os.mkfifo(pages)
    daemon.start()
    (failed,) = [entry for entry in daemon.logged("guest_not_served") if "it is a FIFO" in entry["error"]]
    assert failed["guest"] == f"web{OURS}"
    pages.unlink()
    (store / "moved").rename(pages)
    daemon.wait_active("web")
    vmm.verify()
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert looks(store) == before
