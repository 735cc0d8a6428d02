# SPDX-License-Identifier: Apache-2.0
"""An S3 server on loopback, moto's, with faults: `python -m tests.store.s3_server`.

Tells its port in one line, and serves until its standard input ends: with whoever started it, however that one ends. Each line
of the input is a fault that all later requests meet until the next line: `none`, `slow SECONDS`, `hang`, `503`, `cut`
(half of a body, then the connection is closed), `flip` (a bit of what is read), or of the next N only: `503 N`. It is in
force when `ok` comes back.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

StartResponse = Callable[..., Any]
HANG_S = 3600.0


class Faulty:
    """A WSGI application that does to the one behind it what the input says."""

    def __init__(self, app: Callable[[dict[str, Any], StartResponse], Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._fault: list[str] = ["none"]
        self._left = 0
        self._release = threading.Event()
        self._landed = 0

    def set(self, line: str) -> None:
        words = line.split()
        if words[0] == "release":
            self._release.set()
            while not self._landed:
                time.sleep(0.01)
            return
        with self._lock:
            self._fault = words
            self._left = int(words[1]) if words[0] == "503" and len(words) > 1 else 1 << 60

    def _next(self) -> list[str]:
        with self._lock:
            self._left -= 1
            return self._fault if self._left >= 0 else ["none"]

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        fault, *arguments = self._next()
        if fault == "slow":
            time.sleep(float(arguments[0]))
        elif fault == "hang":
            time.sleep(HANG_S)
        elif fault == "503":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Length", "0")])
            return []
        if fault == "late" and environ["REQUEST_METHOD"] == "PUT":
            data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            environ["wsgi.input"] = io.BytesIO(data)
            self._release.wait()
            body = self._app(environ, start_response)
            self._landed += 1
            return body
        body = self._app(environ, start_response)
        if fault in ("cut", "flip") and environ["REQUEST_METHOD"] == "GET" and environ.get("HTTP_RANGE"):
            data = b"".join(body)
            return [data[: len(data) // 2] if fault == "cut" else data[:-64] + bytes(64)]
        return body


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: object) -> None: ...


def main() -> None:
    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    for line in sys.stdin:
        app.set(line)
        print("ok", flush=True)
    os._exit(0)  # threads that hang do not


if __name__ == "__main__":
    main()
