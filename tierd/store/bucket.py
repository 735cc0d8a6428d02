# SPDX-License-Identifier: Apache-2.0
"""Apache OpenDAL as this project uses it: whole objects written, ranges read, errors as OSError. Everything here but `get_now`
blocks, for as long as its deadline and retries say; any thread may call it."""

from __future__ import annotations

import asyncio
import difflib
import errno
import os
import re
import stat
import threading
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import opendal
import opendal.config
from opendal import exceptions as dal
from opendal.layers import RetryLayer, TimeoutLayer

from tierd.store import StoreError
from tierd.store.directory import open_ours, private_directory, refuse_memory

RETRY_DELAY_S_MIN, RETRY_DELAY_S_MAX = 0.05, 2.0
CREDENTIALS_BYTES_MAX = 64 << 10
FILES_MAX = 64  # of a directory, that are kept open
PARTIAL = ".tierd-partial/"  # in a directory: objects that are being written, by writer
# services that live in this process or drop what they like: a page is there only once
VOLATILE = frozenset({"memory", "moka", "mini-moka", "dashmap", "memcached", "ghac"})
# OpenDAL's options that are secrets, of all of its services
_SECRET = re.compile(
    r"secret|password|passphrase|token|account_key|sas|encryption_key|customer_key$|^credential$|^key$"
)

_ERRNOS: dict[type[Exception], int] = {
    dal.NotFound: errno.ENOENT,
    dal.PermissionDenied: errno.EACCES,
    dal.ConfigInvalid: errno.EINVAL,
    dal.Unsupported: errno.EOPNOTSUPP,
    dal.RateLimited: errno.EBUSY,
    dal.AlreadyExists: errno.EEXIST,
    dal.ConditionNotMatch: errno.EEXIST,
    dal.IsADirectory: errno.EISDIR,
    dal.NotADirectory: errno.ENOTDIR,
    dal.RangeNotSatisfied: errno.EBADMSG,
    dal.Conflict: errno.EIO,
    dal.IsSameFile: errno.EIO,
    dal.Unexpected: errno.EIO,
}
_TOLD_BY_WORDS = {  # where OpenDAL has no kind of its own
    "timeout reached": errno.ETIMEDOUT,
    "load signing credential": errno.EACCES,
    "NoSuchBucket": errno.ENOENT,
}
_TOLD_CHARACTERS = 300

P = ParamSpec("P")
T = TypeVar("T")


class Listed(NamedTuple):
    path: str  # a directory's ends with a slash
    size_bytes: int


class _File:
    """Open until nobody uses it any more, in whichever thread."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Bucket:
    """A place for objects, of any service that OpenDAL has."""

    def __init__(
        self,
        scheme: str,
        options: Mapping[str, str],
        credentials: Path | None = None,
        *,
        writer: str,
        deadline_s: float,
        retries: int,
    ) -> None:
        """`options` are OpenDAL's own of that service; those that are secrets stand in the file `credentials` (or where the
        service looks by itself: environment, ~/.aws). `writer`: nobody else's; ends with a slash. `deadline_s` bounds each of
        1 + `retries` tries. StoreError."""
        self.scheme = scheme
        self._partial = PARTIAL + writer
        self._files: dict[str, _File] = {}  # of a directory: objects that were read lately
        self._keeping = threading.Lock()
        given = {**_without_secrets(options), **(read_credentials(credentials) if credentials else {})}
        _check_names(scheme, given)
        if scheme in VOLATILE:
            raise StoreError(
                f"the store `{scheme}` may lose what it holds, and it would be guests' memory; choose another"
            )
        if scheme == "fs":
            given = _directory(given, self._partial)
            self._root = Path(given["root"])
        elif scheme == "s3":
            given.setdefault(
                "disable_ec2_metadata", "true"
            )  # elsewhere it would be waited for: "false" for instance roles
        try:
            plain = opendal.Operator(scheme, **given)
            limited = plain.layer(TimeoutLayer(timeout=deadline_s, io_timeout=deadline_s))
            self._operator = limited.layer(
                RetryLayer(max_times=retries, jitter=True, min_delay=RETRY_DELAY_S_MIN, max_delay=RETRY_DELAY_S_MAX)
            )
        except tuple(_ERRNOS) as error:
            raise StoreError(
                f"the store `{scheme}` cannot be made: {told(error)}; see its options in OpenDAL's documentation"
            ) from None
        can = plain.capability()
        if not (can.write and can.read and can.list and can.delete):
            raise StoreError(f"the store `{scheme}` cannot write, read, list and delete; choose another")

    def put(self, path: str, data: bytes) -> None:
        """Durable when it returns; as a whole or not at all. OSError."""
        _call(f"write {path}", self._operator.write, path, data)

    def get(self, path: str, offset: int, size_bytes: int) -> bytes:
        """A range that must be there. FileNotFoundError, OSError."""
        data = _call(f"read {path}", self._operator.read, path, offset=offset, size=size_bytes)
        if len(data) != size_bytes:
            raise OSError(errno.EBADMSG, f"read {path}: {len(data)} bytes came, {size_bytes} were asked for")
        if self.scheme == "fs" and path not in self._files:
            self._keep_open(path)
        return data

    def get_now(self, path: str, offset: int, size_bytes: int) -> bytes | None:
        """What `get` gives if nobody has to wait for it, else None: of a directory, of an object that was read lately, what the
        kernel has in memory. What is in a thread's way there is longer than that (RWF_NOWAIT in preadv2(2))."""
        file = self._files.get(path)
        if file is None:
            return None
        data = bytearray(size_bytes)
        try:
            done = os.preadv(file.fd, [data], offset, os.RWF_NOWAIT)
        except OSError:  # EAGAIN, or a file system that cannot say; whatever is wrong, get says it
            return None
        return bytes(data) if done == size_bytes else None

    def _keep_open(self, path: str) -> None:
        try:
            file = _File(os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
        except OSError:
            return  # it has just been read: nothing depends on this
        with self._keeping:
            self._files[path] = file
            while len(self._files) > FILES_MAX:
                del self._files[next(iter(self._files))]

    def forget(self, prefix: str) -> None:
        """What is kept open of objects whose paths begin so."""
        with self._keeping:
            for path in [path for path in self._files if path.startswith(prefix)]:
                del self._files[path]

    def entries(self, path: str) -> list[Listed]:
        """What is in a directory (its path ends with a slash), but for itself. Nothing, if there is none. OSError."""

        async def listed() -> list[Listed]:
            entries = await self._operator.to_async_operator().list(path)
            return [Listed(e.path, e.metadata.content_length) async for e in entries if e.path != path]

        # not its own blocking one: that keeps Python's lock, and so all other threads, until the service has answered
        return _call(f"list {path}", lambda: asyncio.run(listed()))

    def delete(self, path: str) -> None:
        """It may be gone already. OSError."""
        self.forget(path)  # on NFS a file that is open is there still
        _call(f"delete {path}", self._operator.delete, path)
        self.forget(path)  # or somebody has just read it

    def remove(self, path: str) -> None:
        """A directory and all in it, which may be nothing. OSError: some of it is left."""
        self.forget(path)
        _call(f"delete {path}", self._operator.remove_all, path)
        self.forget(path)

    def partial(self) -> list[Listed]:
        """Of a directory: what we are writing, or a predecessor was when it was killed; names start with the object's."""
        return self.entries(self._partial) if self.scheme == "fs" else []

    def drop_partial(self, writer: str) -> None:
        """Of a directory: what a writer that is no more was writing."""
        if self.scheme == "fs":
            self.remove(PARTIAL + writer)


def _call(what: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return call(*args, **kwargs)
    except tuple(_ERRNOS) as error:
        failed = OSError(_errno_of(error), f"{what}: {told(error)}")
    raise failed  # without the cause: its traceback holds a lister, which only this thread may drop


def _errno_of(error: Exception) -> int:
    text = str(error)
    if match := re.search(r"\(os error ([0-9]+)\)", text):
        number = int(match[1])
        return number if number != errno.ENOENT or isinstance(error, dal.NotFound) else errno.EIO
    for words, number in _TOLD_BY_WORDS.items():
        if words in text:
            return number
    return _ERRNOS[type(error)]


def told(error: Exception) -> str:
    """What OpenDAL says, on one line: what happened, and why."""
    lines = [line.strip() for line in str(error).partition("Backtrace:")[0].splitlines() if line.strip()]
    cause = lines[lines.index("Source:") + 1 :] if "Source:" in lines else []
    return " ".join([lines[0] if lines else type(error).__name__, *(f"({line})" for line in cause)])[:_TOLD_CHARACTERS]


def _without_secrets(options: Mapping[str, str]) -> dict[str, str]:
    for name in options:
        if _SECRET.search(name):
            raise StoreError(
                f"option {name} is a secret, and everybody who reads the configuration would see it: write `{name} = ...` "
                "into a file of mode 0600, and its path to `credentials`"
            )
    return dict(options)


def _check_names(scheme: str, given: Mapping[str, str]) -> None:
    """OpenDAL passes over what it does not know."""
    known = _known_options()
    if scheme not in known:
        raise StoreError(f"there is no store `{scheme}`{_suggestion(scheme, known)}")
    for name in given:
        if name not in known[scheme]:
            raise StoreError(f"the store `{scheme}` has no option {name}{_suggestion(name, known[scheme])}")


def _known_options() -> dict[str, list[str]]:
    """Of each service, as OpenDAL's typed configurations list them."""
    names = {**vars(typing), "os": os}  # which that module imports for type checkers only
    kinds = [kind for kind in vars(opendal.config).values() if typing.is_typeddict(kind)]
    hints = [typing.get_type_hints(kind, localns=names) for kind in kinds]
    return {typing.get_args(hint.pop("scheme"))[0]: list(hint) for hint in hints}


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else "; see OpenDAL's documentation of its services"


def read_credentials(path: Path) -> dict[str, str]:
    """Options of OpenDAL, one `name = value` a line; `#` starts a comment. StoreError: others can read it, or it is not such a
    file. No line is told."""
    try:
        fd = open_ours(path, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"credentials {path} cannot be read: {error.strerror}") from error
    with open(fd, encoding="utf-8") as file:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & 0o077:
            raise StoreError(f"credentials {path} have mode {mode:04o}: others could read them; chmod 0600 {path}")
        try:
            text = file.read(CREDENTIALS_BYTES_MAX)
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"credentials {path} cannot be read: {type(error).__name__}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    given = {}
    for number, line in lines:
        if line and not line.startswith("#"):
            name, equals, value = (word.strip() for word in line.partition("="))
            if not name or not equals or not value:
                raise StoreError(f"credentials {path}, line {number}: not `option = value`")
            given[name] = value
    return given


def _directory(options: dict[str, str], partial: str) -> dict[str, str]:
    """OpenDAL writes a file in place unless it is told where it may put it meanwhile."""
    if not options.get("root"):
        raise StoreError("the store `fs` needs a directory: set its option root")
    root = Path(options["root"])
    private_directory(root, "root")
    refuse_memory(root, "root")
    return {**options, "atomic_write_dir": str(root / partial)}
