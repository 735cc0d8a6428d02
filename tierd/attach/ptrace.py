# SPDX-License-Identifier: Apache-2.0
"""Taking a userfaultfd out of a running, unmodified VMM.

The descriptor must be made inside the VMM (its memory is fixed at creation), and the VMM keeps its own copy, so that the
context outlives us. Everything here blocks for at most some milliseconds; each call made inside the VMM stops one of its
threads for well under one.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from tierd.native.inject import At, inject

# system call numbers: <asm/unistd.h>; those above 424 are the same everywhere
_NUMBERS = {
    "x86_64": {
        **{"userfaultfd": 323, "close": 3, "socketpair": 53, "recvmsg": 47, "ioctl": 16, "kcmp": 312},
        **{"mmap": 9, "mprotect": 10, "munmap": 11, "madvise": 28},
    },
    "aarch64": {
        **{"userfaultfd": 282, "close": 57, "socketpair": 199, "recvmsg": 212, "ioctl": 29, "kcmp": 272},
        **{"mmap": 222, "mprotect": 226, "munmap": 215, "madvise": 233},
    },
}
NUMBER = _NUMBERS[platform.machine()]
SYS_PIDFD_GETFD, SYS_PROCESS_MADVISE = 438, 440
MADV_COLD = 20
MADV_RANDOM, MADV_DONTFORK, MADV_DONTDUMP = 1, 10, 16
PROT_NONE, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, MAP_NORESERVE = 0, 3, 0x22, 0x4000
LARGE_PAGE_BYTES = 2 << 20
KCMP_FILE = 0

UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
USERFAULTFD_IOC_NEW = 0xAA00
MSG_CMSG_CLOEXEC = 0x40000000
FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
FEATURE_MISSING_HUGETLBFS = 1 << 4
FEATURE_MISSING_SHMEM = 1 << 5
FEATURE_THREAD_ID = 1 << 8
FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
FEATURE_POISON = 1 << 14
FEATURES_NEEDED = (
    FEATURE_PAGEFAULT_FLAG_WP
    | FEATURE_MISSING_HUGETLBFS
    | FEATURE_MISSING_SHMEM
    | FEATURE_THREAD_ID
    | FEATURE_WP_HUGETLBFS_SHMEM
)
FEATURE_INITIALIZED = 1 << 31  # the kernel's own mark, which fdinfo shows: UFFDIO_API was called
# What a VMM may have agreed on besides: MINOR_HUGETLBFS, MINOR_SHMEM, EXACT_ADDRESS, WP_UNPOPULATED (of anonymous memory),
# MOVE (of anonymous memory). Nothing else: an EVENT_* blocks the VMM's own madvise until somebody reads it, with SIGBUS
# nobody waits for a page, with WP_ASYNC the kernel lifts a hold by itself and what is written then is lost. What does not
# exist yet may do anything.
FEATURES_HARMLESS = FEATURE_POISON | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Taken:
    """A userfaultfd of a VMM. The caller closes `uffd` and `pidfd`; `uffd_in_vmm` stays open in the VMM."""

    uffd: int
    uffd_in_vmm: int
    features: int
    pidfd: int


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): a duplicate of descriptor `fd` of that process, close-on-exec."""
    result = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"pidfd_getfd of descriptor {fd}: {os.strerror(error)}")
    return result


def same_open_file(a: int, b: int) -> bool:
    """Whether two descriptors of ours are of one open file: kcmp(2), or, where the kernel has none, the inode, which is one
    userfaultfd's alone (from 5.12 on)."""
    result = int(_libc.syscall(NUMBER["kcmp"], os.getpid(), os.getpid(), KCMP_FILE, a, b))
    return result == 0 if result >= 0 else os.path.sameopenfile(a, b)


def pick_thread(pid: int) -> int:
    """The thread that makes our calls: not a vCPU if there is another (QEMU names them "CPU n/KVM")."""
    tids = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    for tid in [pid, *tids]:
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            comm = Path(f"/proc/{pid}/task/{tid}/comm").read_bytes()
            if not comm.startswith((b"CPU ", b"vcpu", b"fc_vcpu")):
                return tid
    return pid


def close_in_vmm(pid: int, fd: int) -> None:
    """Close a descriptor of ours in the VMM."""
    inject(pick_thread(pid), "close", NUMBER["close"], fd)


def take_userfaultfd(pid: int, features: int = 0) -> Taken:
    """Make a userfaultfd in the VMM and duplicate it. On OSError no descriptor of ours stays in the VMM.

    `features`: what the engine needs beyond what all of them need."""
    tid = pick_thread(pid)
    pidfd = os.pidfd_open(pid)
    try:
        in_vmm = _make(tid, pidfd)
        try:
            uffd = pidfd_getfd(pidfd, in_vmm)
            try:
                agreed = agree(uffd, features)
            except BaseException:
                os.close(uffd)
                raise
        except BaseException:
            close_in_vmm(pid, in_vmm)
            raise
    except BaseException:
        os.close(pidfd)
        raise
    return Taken(uffd, in_vmm, agreed, pidfd)


def _make(tid: int, pidfd: int) -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return inject(tid, "userfaultfd", NUMBER["userfaultfd"], flags).result
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    # an ordinary user may not trap kernel faults; but a /dev/userfaultfd that was opened by root may be used by anyone
    return _make_from_device(tid, pidfd, flags)


def _make_from_device(tid: int, pidfd: int, flags: int) -> int:
    device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    try:
        received = _hand_over(tid, pidfd, device)
    finally:
        os.close(device)
    try:
        return inject(tid, "USERFAULTFD_IOC_NEW", NUMBER["ioctl"], received, USERFAULTFD_IOC_NEW, flags).result
    finally:
        inject(tid, "close", NUMBER["close"], received)


def put_into_vmm(pid: int, pidfd: int, fd: int) -> int:
    """Give the VMM a duplicate of our descriptor `fd`; its number there. On OSError nothing of ours stays in the VMM."""
    return _hand_over(pick_thread(pid), pidfd, fd)


def _hand_over(tid: int, pidfd: int, fd: int) -> int:
    with contextlib.ExitStack() as in_vmm:
        pair = inject(
            tid,
            "socketpair",
            NUMBER["socketpair"],
            socket.AF_UNIX,
            socket.SOCK_DGRAM | socket.SOCK_CLOEXEC,
            0,
            At(0),
            scratch=bytes(8),
        )
        ours, theirs = struct.unpack("ii", pair.scratch)
        for end in (ours, theirs):
            in_vmm.callback(inject, tid, "close", NUMBER["close"], end)
        with socket.socket(fileno=pidfd_getfd(pidfd, ours)) as channel:
            channel.sendmsg([b"u"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        return _receive(tid, theirs)


def _receive(tid: int, fd: int) -> int:
    """recvmsg inside the VMM. struct msghdr at 0 (56 bytes), iovec at 64, one byte of data at 80, control at 96."""
    header = struct.pack("PIxxxxPNPNi", 0, 0, 64, 1, 96, socket.CMSG_LEN(4), 0)
    area = bytearray(96 + socket.CMSG_SPACE(4))
    area[: len(header)] = header
    area[64:80] = struct.pack("PN", 80, 1)
    got = inject(
        tid, "recvmsg", NUMBER["recvmsg"], fd, At(0), MSG_CMSG_CLOEXEC, scratch=bytes(area), pointers=(16, 32, 64)
    )
    level, kind, received = struct.unpack_from("iii", got.scratch, 96 + 8)
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        raise OSError(errno.EPROTO, "recvmsg inside the VMM brought no descriptor")
    return int(received)


def agree(uffd: int, features: int) -> int:
    """UFFDIO_API on the VMM's context. It works from any process: the context belongs to the one that made it."""
    needed = FEATURES_NEEDED | features
    for features in (needed | FEATURE_POISON, needed):  # POISON is from 6.6 on
        buffer = bytearray(struct.pack("QQQ", UFFD_API, features, 0))
        try:
            fcntl.ioctl(uffd, UFFDIO_API, buffer)
        except OSError as error:
            if error.errno != errno.EINVAL or features == needed:
                raise OSError(
                    error.errno,
                    f"UFFDIO_API: the kernel lacks a feature of {needed:#x} (all engines need Linux 5.19 or newer)",
                ) from error
        else:
            return features
    raise AssertionError("unreachable")


def features_of(uffd: int) -> int:
    """What was agreed on by UFFDIO_API; 0: it was not called yet (userfaultfd_show_fdinfo in fs/userfaultfd.c)."""
    text = Path(f"/proc/self/fdinfo/{uffd}").read_text()
    match = re.search(r"^API:\s+[0-9a-f]+:([0-9a-f]+):", text, re.M)
    if not match:
        raise OSError(errno.EPROTO, f"/proc/self/fdinfo/{uffd} says nothing of a userfaultfd's features")
    return int(match[1], 16)


def agree_once(uffd: int, features: int) -> None:
    """Of a userfaultfd that a VMM brought: UFFDIO_API, or a look at what was agreed on before (by it, or by a tierd). OSError
    EINVAL: something else than tierd needs."""
    if features_of(uffd):
        must_be_agreed(uffd, features)
    else:
        agree(uffd, features)


def must_be_agreed(uffd: int, features: int, switched: int = 0) -> None:
    """OSError EINVAL: UFFDIO_API agreed on something else than what tierd needs and can live with. `switched`: of what it needs,
    those that come and go while it serves: a predecessor that was killed in a sync window has left async mode off."""
    found, needed = features_of(uffd) | switched, FEATURES_NEEDED | features
    missing, more = needed & ~found, found & ~(needed | FEATURES_HARMLESS | FEATURE_INITIALIZED)
    if missing or more:
        raise OSError(
            errno.EINVAL,
            f"the userfaultfd was given features {found:#x} by UFFDIO_API: {missing:#x} is missing, {more:#x} is too much; "
            "make a new one and send it as it is",
        )


def map_staging(pid: int, address: int, size: int) -> int:
    """A staging area in the VMM for the `size` bytes at `address`: address space only. Its address, which lies in a large page
    as `address` does, so that large pages are moved as such. On OSError nothing of it stays.

    It is marked by an advice that means nothing there and that nobody else gives to anonymous memory, and no memory before
    that: if we die and leave it behind, procfs.py must tell it from RAM."""
    tid, flags = pick_thread(pid), MAP_PRIVATE_ANONYMOUS | MAP_NORESERVE
    spare = LARGE_PAGE_BYTES
    base = inject(tid, "mmap", NUMBER["mmap"], 0, size + spare, PROT_NONE, flags, -1, 0).result
    start = base + (address - base) % spare
    low, high = base, base + size + spare  # what is ours still: what was given up may be somebody else's by now
    try:
        if start > low:
            inject(tid, "munmap", NUMBER["munmap"], low, start - low)
        low = start
        inject(tid, "munmap", NUMBER["munmap"], start + size, high - start - size)
        high = start + size
        for advice in (MADV_RANDOM, MADV_DONTFORK, MADV_DONTDUMP):
            inject(tid, "madvise", NUMBER["madvise"], start, size, advice)
        inject(tid, "mprotect", NUMBER["mprotect"], start, size, PROT_READ_WRITE)
    except BaseException:
        inject(tid, "munmap", NUMBER["munmap"], low, high - low)
        raise
    return start


def unmap_staging(pid: int, address: int, size: int) -> None:
    """OSError: the VMM cannot be entered now."""
    inject(pick_thread(pid), "munmap", NUMBER["munmap"], address, size)


def may_enter(pidfd: int, fd: int) -> bool:
    """Whether we have the right to enter that process: pidfd_getfd asks for the same as ptrace."""
    try:
        os.close(pidfd_getfd(pidfd, fd))
    except PermissionError:
        return False
    return True


def may_page_out(pidfd: int, address: int) -> bool:
    """Whether process_madvise lets us: tried with an advice that changes next to nothing, on a page of the guest."""
    page = struct.pack("PN", address, os.sysconf("SC_PAGESIZE"))
    result = _libc.syscall(SYS_PROCESS_MADVISE, pidfd, page, 1, MADV_COLD, 0)
    if result >= 0:
        return True
    error = ctypes.get_errno()
    if error == errno.EPERM:
        return False
    raise OSError(error, f"process_madvise: {os.strerror(error)}")
