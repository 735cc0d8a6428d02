# SPDX-License-Identifier: Apache-2.0
"""A VMM that connects and brings its userfaultfd, its pagemap and its memory files: what it says, and whether that is so.

Nothing that it says is believed: regions are looked up in its mappings, descriptors are asked what they are. That takes the
right to read its /proc/PID (its own user's, if it is dumpable), and no privilege.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, NoReturn

from pydantic import Field, ValidationError

from tierd.attach import GuestSpec, Handed, Refused, Region
from tierd.attach.procfs import (
    NAME_BYTES_MAX,
    UFFD_LINK,
    boot_id,
    clean_name,
    cmdline_of,
    file_of,
    first_unmapped,
    maps_of,
    name_of,
    start_ticks,
)
from tierd.attach.ptrace import features_of
from tierd.config import Frozen
from tierd.native import REGIONS_MAX

VERSION = 1
MESSAGE_BYTES_MAX = 16 << 10
ERRORS_MAX = 5  # of a message, told at once
FIRST = ("userfaultfd", "pagemap")  # of the descriptors; the memory files follow
PAGE_BYTES = os.sysconf("SC_PAGESIZE")
F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 0x8, 0x10  # <linux/fcntl.h>

Address = Annotated[int, Field(ge=0, lt=1 << 63, multiple_of=PAGE_BYTES)]
Bytes = Annotated[int, Field(gt=0, lt=1 << 48, multiple_of=PAGE_BYTES)]


class AnnouncedRegion(Frozen):
    """`bytes` of guest memory at `address` of the VMM: from `offset` of the memory file number `memfd` on."""

    address: Address
    bytes: Bytes
    offset: Address
    memfd: Annotated[int, Field(ge=0, lt=REGIONS_MAX)]


class Announcement(Frozen):
    """The one message of a VMM."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)]
    name: Annotated[str, Field(max_length=NAME_BYTES_MAX)] = ""
    uffd: Annotated[int, Field(ge=0, lt=1 << 31)]  # the VMM's own number of it
    regions: Annotated[tuple[AnnouncedRegion, ...], Field(min_length=1, max_length=REGIONS_MAX)]


class Malformed(Exception):
    """No message of the protocol; the text says what is wrong with it."""


def parse(message: bytes, descriptors: int) -> Announcement:
    """Pure. Malformed: the text is for whoever writes the VMM's side."""
    try:
        said = Announcement.model_validate_json(message)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        told = [f"{'.'.join(map(str, item['loc'])) or 'message'}: {item['msg']}" for item in found[:ERRORS_MAX]]
        raise Malformed("; ".join(told)) from None
    files = {region.memfd for region in said.regions}
    if files != set(range(len(files))) or descriptors != len(FIRST) + len(files):
        raise Malformed(
            f"{descriptors} descriptors came; {len(FIRST)} ({', '.join(FIRST)}) and one for each memfd that a region names, "
            f"numbered from 0, are {len(FIRST) + len(files)}"
        )
    for a, b in pairwise(sorted(said.regions, key=lambda region: region.address)):
        if a.address + a.bytes > b.address:
            raise Malformed(f"regions: {a.address:#x} and {b.address:#x} overlap")
    return said


@dataclass(frozen=True)
class Brought:
    """What a VMM announced, and its descriptors, which are what they should be. `files`: (device, inode) by memfd's index."""

    said: Announcement
    handed: Handed
    files: tuple[tuple[int, int], ...]


def look(said: Announcement, fds: Sequence[int], pid: int, pidfd: int) -> Brought:
    """Whether the descriptors are process `pid`'s. They stay the caller's until this returns. Refused; blocks for as long as
    /proc takes."""
    uffd, pagemap, *memfds = fds
    try:
        _must_be_userfaultfds(uffd, pid, said.uffd)
        _must_be_pagemap(pagemap, pid, said.regions[0].address)
    except PermissionError as error:
        _not_seen(pid, error)
    files = tuple(_memory_file(fd, i) for i, fd in enumerate(memfds))
    if len(set(files)) < len(files):
        _refuse("a memory file came twice", f"inodes {[inode for _, inode in files]}", "send each file once")
    handed = Handed(pidfd, uffd, said.uffd, pagemap, dict(zip(files, memfds, strict=True)))
    return Brought(said, handed, files)


def spec_of(brought: Brought, pid: int) -> GuestSpec:
    """What is served of process `pid`: its mappings must be as it says. Refused; ProcessLookupError: it is gone."""
    said = brought.said
    ticks = start_ticks(pid)
    if ticks is None:
        raise ProcessLookupError(3, f"process {pid} ended")
    regions = tuple(Region(r.address, r.bytes, r.offset, *brought.files[r.memfd]) for r in said.regions)
    for region in regions:
        size = os.fstat(brought.handed.memfds[region.device, region.inode]).st_size
        if region.offset + region.bytes > size:
            _refuse(
                "a region ends behind its memory file",
                f"{region.address:#x}: {region.offset:#x} + {region.bytes:#x}, the file has {size:#x} bytes",
                "send the file that is mapped there",
            )
    try:
        unmapped = first_unmapped(maps_of(pid), regions)
    except PermissionError as error:
        _not_seen(pid, error)
    if unmapped is not None:
        _refuse(
            "a region is not mapped as the VMM says",
            f"pid {pid}: {unmapped.address:#x}, {unmapped.bytes:#x} bytes, offset {unmapped.offset:#x} of inode "
            f"{unmapped.inode}",
            "send regions that the process itself maps, read-write and MAP_SHARED, and the files that it maps there",
        )
    cmdline = cmdline_of(pid)
    name = clean_name(said.name) or name_of(pid, cmdline)
    return GuestSpec(name, pid, ticks, boot_id(), cmdline, regions, handshake=True)


def _refuse(cause: str, evidence: str, remedy: str) -> NoReturn:
    raise Refused("handshake", cause, evidence, remedy)


def _not_seen(pid: int, error: PermissionError) -> NoReturn:
    raise Refused(
        "handshake",
        "tierd may not look at the VMM's mappings and descriptors, and does not believe what it cannot see",
        f"{error.filename}, tierd runs as user {os.geteuid()}",
        f"run tierd as the user of process {pid} (which must be dumpable and have no capability that tierd has not), or as root",
    ) from error


def _must_be_userfaultfds(uffd: int, pid: int, uffd_in_vmm: int) -> None:
    for path, remedy in (
        (f"/proc/self/fd/{uffd}", "send the userfaultfd as the first descriptor"),
        (f"/proc/{pid}/fd/{uffd_in_vmm}", "keep it open as long as tierd serves the guest, and say its number in uffd"),
    ):
        try:
            target = os.readlink(path)
        except FileNotFoundError:
            target = "not open"
        if target != UFFD_LINK:
            _refuse("that is no userfaultfd", f"{path}: {target}", remedy)
    features_of(uffd)  # OSError: it only looks like one


def _file_at(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except (FileNotFoundError, ProcessLookupError):  # a thread that has ended
        return None
    return info.st_dev, info.st_ino


def _must_be_pagemap(pagemap: int, pid: int, address: int) -> None:
    """Of this process, and of the program that it runs now: of one that is no more there is nothing to read.

    What a link says is a path in the VMM's mounts, where anything may be mounted. That is asked for without a call into its
    file system (FUSE answers when it likes, or never): it must be the very file that we see under this path.
    """
    target = os.readlink(f"/proc/self/fd/{pagemap}")
    path = re.fullmatch(rf"/proc/{pid}(/task/\d+)?/pagemap", target)
    if not path or file_of(pagemap) != _file_at(target):
        _refuse(
            "the second descriptor is not the VMM's pagemap",
            f"pid {pid} sent {target}",
            "send /proc/self/pagemap, opened by the VMM itself in the /proc that tierd sees",
        )
    try:
        entry = os.pread(pagemap, 8, address // PAGE_BYTES * 8)
    except OSError as error:
        _refuse("the VMM's pagemap cannot be read", f"pid {pid}: {error.strerror}", "open it O_RDONLY")
    if len(entry) != 8:
        _refuse("the pagemap is of another program", f"pid {pid}: nothing at {address:#x}", "open it after the exec")


def _memory_file(fd: int, index: int) -> tuple[int, int]:
    evidence = f"memfd {index}: {os.readlink(f'/proc/self/fd/{fd}')}"
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only shmem (and hugetlbfs, which preflight judges) has any
    except OSError:
        _refuse("a memory file is not on shared memory", evidence, "use a memfd, or a file on tmpfs")
    if seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE):
        _refuse("a memory file is sealed against writing", evidence, "do not seal it: pages are punched out of it")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        _refuse("a memory file is not open for reading and writing", evidence, "open it O_RDWR")
    info = os.fstat(fd)
    return info.st_dev, info.st_ino
