# SPDX-License-Identifier: Apache-2.0
"""The CLI's side of the API: HTTP over the daemon's Unix socket. Blocks; imports httpx when it is used."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

if TYPE_CHECKING:
    import httpx

CONNECT_S = 5.0
ANSWER_S = 30.0  # between two pieces of an answer; a long operation sends a line every second
Progress = Callable[[int, int], None]


class Unreachable(Exception):
    """No daemon answers; the text says what to look at."""


class Declined(Exception):
    """The daemon said no: `error` is what happened, `remedy` what to do."""

    def __init__(self, status: int, error: str, remedy: str) -> None:
        super().__init__(f"{error}; {remedy}" if remedy else error)
        self.status = status


class Client:
    """One connection to the daemon at `socket_path`; `with` closes it. Every method raises Unreachable or Declined."""

    def __init__(self, socket_path: Path) -> None:
        import httpx

        _try_to_connect(socket_path)
        self._path = socket_path
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket_path)),
            base_url="http://tierd",
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON answer of a GET."""
        return self._simple("GET", path, None)

    def post(self, path: str) -> Any:
        """The JSON answer of a POST that does not take long."""
        return self._simple("POST", path, None)

    def run(self, method: str, path: str, body: Any, progress: Progress) -> Any:
        """Begin an operation and follow it to its end: its result. Interrupted, it goes on in the daemon."""
        import httpx

        try:
            with self._http.stream(method, path, params={"progress": "1"}, json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    self._decline(answer)
                return self._follow(answer.iter_lines(), progress)
        except httpx.HTTPError as error:
            self._unreachable(error)

    def _follow(self, lines: Iterator[str], progress: Progress) -> Any:
        for line in lines:
            said = json.loads(line)
            if "result" in said:
                return said["result"]
            if "error" in said:
                raise Declined(said["status"], said["error"], said["remedy"])
            progress(said["done_bytes"], said["total_bytes"])
        raise Unreachable("the daemon ended before the operation did; `journalctl -u tierd` says why")

    def _simple(self, method: str, path: str, body: Any) -> Any:
        import httpx

        try:
            answer = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            self._unreachable(error)
        if answer.status_code != 200:
            self._decline(answer)
        return self._json(answer)

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise Unreachable(f"what answers at {self._path} is not tierd; see --socket and api.socket") from error

    def _decline(self, answer: httpx.Response) -> NoReturn:
        said = self._json(answer)
        raise Declined(answer.status_code, said.get("error", answer.reason_phrase), said.get("remedy", ""))

    def _unreachable(self, error: Exception) -> NoReturn:
        raise Unreachable(
            f"{self._path}: {error or type(error).__name__}; `journalctl -u tierd` may say why"
        ) from error


def _try_to_connect(path: Path) -> None:
    """Says precisely why a daemon cannot be reached; httpx does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(path))
        except PermissionError as error:
            raise Unreachable(
                f"cannot reach the daemon at {path}: permission denied; run this as root or as a member of the "
                f"socket's group (ls -l {path})"
            ) from error
        except OSError as error:
            raise Unreachable(
                f"cannot reach the daemon at {path}: {error.strerror or error}; is tierd.service running? "
                "(systemctl status tierd)"
            ) from error


def guest_path(guest: str) -> str:
    """The address of a guest, whatever its name; dots too, or `..` would be taken for the directory above."""
    return "/guests/" + quote(guest, safe="", errors="surrogateescape").replace(".", "%2E")
