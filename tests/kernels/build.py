# SPDX-License-Identifier: Apache-2.0
"""Kernels for the tests: `python3 -m tests.kernels.build [NAME ...]`.

    rwp, rfc       Debian's linux-source-6.12 with rwp.patch or rfc.patch of this directory, and with its `config`
    debian-6.1     Debian 12's own kernel
    debian-6.12    Debian 13's own kernel
    arm64-6.1, arm64-6.12    the same for arm64, without modules; only where they are asked for

A kernel is built or unpacked once, into the cache (TIERD_KERNELS, else ~/.cache/tierd/kernels), under a key made of everything
that it comes from. As root on Debian; runs before the project's venv exists, so it imports nothing but the standard library.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATCHED = ("rwp", "rfc")
# name -> suite and package
ORIGIN = {
    **dict.fromkeys(PATCHED, ("trixie", "linux-source-6.12")),
    "debian-6.1": ("bookworm", "linux-image-amd64"),
    "debian-6.12": ("trixie", "linux-image-amd64"),
    "arm64-6.1": ("bookworm", "linux-image-cloud-arm64"),
    "arm64-6.12": ("trixie", "linux-image-cloud-arm64"),
}
# what init.c needs of a kernel that has it as modules
MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "ext4")
LISTS_S_MAX = 86400.0
TOOLS = {
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "make": "make",
    "gcc": "gcc",
    "patch": "patch",
    "xz": "xz-utils",
    "cpio": "cpio",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "qemu-system-x86_64": "qemu-system-x86",
    "/usr/include/libelf.h": "libelf-dev",
    "/usr/include/openssl/opensslv.h": "libssl-dev",
}
ARM64_TOOLS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "/usr/aarch64-linux-gnu/lib/libc.a": "libc6-dev-arm64-cross",
}


class BuildError(Exception):
    """Says what to do."""


@dataclass(frozen=True)
class Kernel:
    name: str
    image: Path
    modules: tuple[Path, ...]  # in the order in which they are loaded


def cache_dir() -> Path:
    return Path(os.environ.get("TIERD_KERNELS") or Path.home() / ".cache" / "tierd" / "kernels")


def run(command: Sequence[str | Path], **options: object) -> str:
    """Standard output; BuildError with the last lines of what it said, and with the command."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"{' '.join(map(str, command))}: status {done.returncode}\n{said}")
    return str(done.stdout)


def say(text: str) -> None:
    print(f"kernels: {text}", flush=True)


def install_tools(tools: Mapping[str, str] = TOOLS) -> None:
    missing = [
        package
        for tool, package in tools.items()
        if not (os.path.exists(tool) or shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin:/sbin"))
    ]
    if not missing:
        return
    if os.geteuid():
        raise BuildError(f"as root: apt-get install --no-install-recommends {' '.join(missing)}")
    say(f"apt-get install {' '.join(missing)}")
    install = ["apt-get", "-qy", "-oDPkg::Lock::Timeout=120", "install", "--no-install-recommends", *missing]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        run(install, env=environment)
    except BuildError:  # no package lists yet, or old ones
        run(["apt-get", "-qy", "update"])
        run(install, env=environment)


class Apt:
    """Debian's archive as this machine is configured to reach it, for a suite and an architecture (default: the machine's) of our
    choice and with lists of our own."""

    def __init__(self, suite: str, directory: Path, architecture: str | None = None) -> None:
        self._directory = directory / (f"apt-{suite}-{architecture}" if architecture else f"apt-{suite}")
        for part in ("lists/partial", "cache/archives/partial"):
            (self._directory / part).mkdir(parents=True, exist_ok=True)
        sources = self._directory / "sources.list"
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        sources.write_text(f"deb [signed-by={keyring}] {self._archive()} {suite} main\n")
        self._options = [
            f"-oDir::Etc::sourcelist={sources}",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={self._directory / 'lists'}",
            f"-oDir::Cache={self._directory / 'cache'}",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
        ]
        if architecture:
            self._options += [f"-oAPT::Architecture={architecture}", f"-oAPT::Architectures={architecture}"]
            self._options += ["-oDir::State::status=/dev/null"]  # what is installed here is of another one
        lists = list((self._directory / "lists").glob("*_Packages*"))
        if not lists or time.time() - max(path.stat().st_mtime for path in lists) > LISTS_S_MAX:
            run(["apt-get", *self._options, "-q", "update"])
            for path in (self._directory / "lists").glob("*_Packages*"):
                os.utime(path)

    @staticmethod
    def _archive() -> str:
        show = ["apt-get", "indextargets", "--format", "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)", "Created-By: Packages"]
        for update in (False, True):  # without package lists it is not known whose an archive is
            if update:
                run(["apt-get", "-qy", "update"])
            for line in run(show).splitlines():
                origin, label, uri = line.split("\t")
                if (origin, label) == ("Debian", "Debian"):
                    return uri
        raise BuildError("apt knows no Debian archive: run apt-get update, or see to /etc/apt/sources.list")

    def version(self, package: str) -> str:
        shown = run(["apt-cache", *self._options, "show", "--no-all-versions", package])
        return next(line.split()[1] for line in shown.splitlines() if line.startswith("Version: "))

    def image_of(self, package: str) -> str:
        """The kernel that a package like linux-image-amd64 stands for."""
        for line in run(["apt-cache", *self._options, "depends", package]).splitlines():
            if "Depends: linux-image-" in line:
                return line.split()[-1]
        raise BuildError(f"{package} depends on no kernel image")

    def download(self, package: str, to: Path) -> Path:
        run(["apt-get", *self._options, "-q", "download", package], cwd=to)
        (found,) = to.glob(f"{package}_*.deb")
        return found


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _unpack(deb: Path, member: str, to: Path) -> None:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as data:
        done = subprocess.run(["tar", "-x", "-C", to, "--wildcards", member], stdin=data.stdout)
    if done.returncode:
        raise BuildError(f"{deb.name} holds no {member}, or cannot be unpacked to {to}")


def _configure(source: Path) -> None:
    wanted = [line for line in (HERE / "config").read_text().splitlines() if line.startswith(("CONFIG_", "# CONFIG_"))]
    run(["make", "-s", "allnoconfig"], cwd=source)
    run(["scripts/kconfig/merge_config.sh", "-m", ".config", HERE / "config"], cwd=source)
    run(["make", "-s", "olddefconfig"], cwd=source)
    have = set((source / ".config").read_text().splitlines())
    lost = [line for line in wanted if line not in have]
    if lost:
        raise BuildError(f"the configuration did not take {', '.join(lost)}: see tests/kernels/config")


def build_patched(name: str, archive: Apt, work: Path, to: Path) -> None:
    deb = archive.download(ORIGIN[name][1], work)
    _unpack(deb, "./usr/src/linux-source-*.tar.xz", work)
    deb.unlink()
    (tarball,) = (work / "usr/src").glob("*.tar.xz")
    run(["tar", "-xf", tarball, "-C", work])
    tarball.unlink()
    (source,) = work.glob("linux-source-*")
    run(["patch", "-p1", "--no-backup-if-mismatch", "-F1", "-i", HERE / f"{name}.patch"], cwd=source)
    _configure(source)
    run(["make", "-s", f"-j{len(os.sched_getaffinity(0)) + 1}", "KCFLAGS=-Wno-error", "bzImage"], cwd=source)
    shutil.copy(source / "arch/x86/boot/bzImage", to / "bzImage")


def unpack_debian(name: str, archive: Apt, work: Path, to: Path) -> None:
    deb = archive.download(archive.image_of(ORIGIN[name][1]), work)
    run(["dpkg-deb", "-x", deb, work])
    (image,) = (work / "boot").glob("vmlinuz-*")
    shutil.copy(image, to / "bzImage")
    root = work if not (work / "usr/lib/modules").exists() else work / "usr"
    version = image.name.removeprefix("vmlinuz-")
    run(["/sbin/depmod", "-b", root, version])
    order: dict[str, None] = {}
    for module in MODULES:
        shown = run(["/sbin/modprobe", "-D", "-d", root, "-S", version, module])
        order |= dict.fromkeys(line.split()[1] for line in shown.splitlines() if line.startswith("insmod "))
    (to / "modules").mkdir()
    for number, path in enumerate(order):
        target = to / "modules" / f"{number:02}-{Path(path).name}"
        shutil.copy(path, target)
        if target.suffix == ".xz":
            run(["xz", "-d", target])


def unpack_arm64(name: str, archive: Apt, work: Path, to: Path) -> None:
    deb = archive.download(archive.image_of(ORIGIN[name][1]), work)
    _unpack(deb, "./boot/vmlinuz-*", work)
    (image,) = (work / "boot").glob("vmlinuz-*")
    shutil.copy(image, to / "bzImage")
    (to / "modules").mkdir()


def _is_arm64(name: str) -> bool:
    return ORIGIN[name][1].endswith("-arm64")


def _key_of(name: str) -> str:
    if _is_arm64(name):
        return _key(name, inspect.getsource(unpack_arm64))
    if name not in PATCHED:
        return _key(name, inspect.getsource(unpack_debian), *MODULES)
    recipe = inspect.getsource(build_patched) + inspect.getsource(_configure)
    return _key(name, recipe, (HERE / "config").read_bytes(), (HERE / f"{name}.patch").read_bytes())


def _at(directory: Path, name: str) -> Kernel:
    return Kernel(name, directory / "bzImage", tuple(sorted((directory / "modules").glob("*.ko"))))


def get(name: str) -> Kernel | None:
    """The kernel from the cache, whatever the version of Debian's package; None when it was not built yet."""
    found = sorted(cache_dir().glob(f"{name}-*-{_key_of(name)}"))
    return _at(found[-1], name) if found else None


def build(name: str) -> Kernel:
    """From the cache, or built now (minutes); waits while another process does. BuildError says what went wrong; then nothing of
    it stays in the cache."""
    began = time.monotonic()
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        suite, package = ORIGIN[name]
        archive = Apt(suite, cache_dir(), "arm64" if _is_arm64(name) else None)
        directory = cache_dir() / f"{name}-{archive.version(package)}-{_key_of(name)}"
        if directory.exists():
            return _at(directory, name)
        say(f"{name}: {'building, some minutes' if name in PATCHED else 'unpacking'}")
        with tempfile.TemporaryDirectory(prefix="work-", dir=cache_dir()) as work:
            to = Path(work) / "to"
            to.mkdir()
            make = build_patched if name in PATCHED else unpack_arm64 if _is_arm64(name) else unpack_debian
            make(name, archive, Path(work), to)
            for old in cache_dir().glob(f"{name}-*"):
                shutil.rmtree(old)
            to.rename(directory)
    say(f"{name}: done in {time.monotonic() - began:.0f} s")
    return _at(directory, name)


def main(names: Sequence[str]) -> int:
    unknown = set(names) - set(ORIGIN)
    if unknown:
        print(f"usage: python3 -m tests.kernels.build [{'] ['.join(ORIGIN)}]", file=sys.stderr)
        return 2
    try:
        names = names or [name for name in ORIGIN if not _is_arm64(name)]
        install_tools(TOOLS | (ARM64_TOOLS if any(map(_is_arm64, names)) else {}))
        for name in names:
            say(f"{name}: {build(name).image}")
    except BuildError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
