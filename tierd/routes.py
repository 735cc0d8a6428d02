# SPDX-License-Identifier: Apache-2.0
"""The HTTP API: what it answers. Imported only once faults are being served (see api.py).

Every error is JSON {"error": what happened, "remedy": what to do}. {key} is a guest's key ("PID-STARTTICKS"), name or
pid. A verb that moves pages goes on when its client goes away; ?progress=1 streams it as JSON lines, {"done_bytes",
"total_bytes"} and at the end {"result"} or the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import structlog
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tierd.attach import Refused
from tierd.document import ConfigErrors
from tierd.metrics import create_registry, exposition
from tierd.view import DaemonView, GuestStatus, GuestView, Progress, RequestRefused

PID_MAX = 1 << 22
PROGRESS_S = 0.25
Work = Callable[[Progress], Awaitable[Any]]
Measure = Callable[[], tuple[int, int]]  # (done_bytes, total_bytes)


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, error: str, remedy: str, **more: Any) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error, "remedy": remedy, **more}


def problem_of(error: Exception) -> Problem:
    """What the client is told about an exception out of the daemon. One that nobody foresaw is logged."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestRefused):
        return Problem(409, str(error), error.remedy)
    if isinstance(error, ConfigErrors):
        lines = [str(each) for each in error.errors]
        return Problem(422, f"the configuration is wrong: {lines[0]}", "see `tierd config check`", errors=lines)
    if isinstance(error, Refused):
        return Problem(409, f"{error.cause} ({error.evidence})", error.remedy, check=error.check)
    if isinstance(error, ProcessLookupError):
        return Problem(404, "there is no such process", "see `tierd status` for guests that tierd knows")
    if isinstance(error, OSError):  # the world; what it is about is in the text
        structlog.get_logger().warning("api_request_failed", error=str(error))
        return Problem(500, str(error), "tierd's log has more")
    structlog.get_logger().error("api_request_failed", exc_info=error)
    return Problem(500, f"{type(error).__name__}: {error}", "tierd's log has the details")


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # ASCII only: a guest's name may hold anything, lone surrogates too
        return json.dumps(content, separators=(",", ":"), default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} in a status")


# --- verbs that take time -------------------------------------------------------------------------------------------


class Operation:
    """A verb under way. It is the daemon's, not the client's: only the end of the daemon cancels it."""

    def __init__(self, what: str, measure: Measure | None) -> None:
        self.what = what
        self._last = (0, 0)
        self.measure: Measure = measure or (lambda: self._last)
        self.finished = trio.Event()
        self.answer: dict[str, Any] = {}
        self.problem: Problem | None = None

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        self._last = (done_bytes, total_bytes)


class Operations:
    """At most one on each guest. `nursery` is the API's."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._running: dict[str, Operation] = {}

    def begin(self, key: str, what: str, work: Work, measure: Measure | None = None) -> Operation:
        """Problem 409 while another one runs on `key`. `measure`: for work that does not report its progress."""
        if key in self._running:
            raise Problem(409, f"{self._running[key].what} is under way", "wait until it is done (`tierd status`)")
        operation = self._running[key] = Operation(what, measure)
        self._nursery.start_soon(self._run, key, operation, work)
        return operation

    async def _run(self, key: str, operation: Operation, work: Work) -> None:
        try:
            operation.answer = {"result": await work(operation.progress)}
        except Exception as error:  # the client's to know; the daemon goes on
            operation.problem = problem_of(error)
        finally:
            del self._running[key]
            operation.finished.set()


class ProgressLines(Response):
    """An operation as JSON lines, one at least every second so that the client knows that we live."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation, last, silent_s = self._operation, None, 0.0
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while not operation.finished.is_set():
            now = dict(zip(("done_bytes", "total_bytes"), operation.measure(), strict=True))
            if now != last or silent_s >= 1.0:
                await send(_line(now))
                last, silent_s = now, 0.0
            with trio.move_on_after(PROGRESS_S):
                await operation.finished.wait()
            silent_s += PROGRESS_S
        problem = operation.problem
        await send(_line({"status": problem.status, **problem.body} if problem else operation.answer, more=False))


def _line(content: Any, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": Json(content).body, "more_body": more}


async def _outcome(request: Request, operation: Operation) -> Response:
    if request.query_params.get("progress", "0") not in ("", "0"):
        return ProgressLines(operation)
    await operation.finished.wait()
    if operation.problem:
        raise operation.problem
    return Json(operation.answer["result"])


# --- what clients send ----------------------------------------------------------------------------------------------


async def _body(request: Request, within_s: float, bytes_max: int) -> dict[str, Any]:
    """The request's JSON object; {} for an empty body."""
    received = bytearray()
    try:
        with trio.fail_after(within_s):
            async with contextlib.aclosing(request.stream()) as chunks:
                async for chunk in chunks:
                    received += chunk
                    if len(received) > bytes_max:
                        raise Problem(413, f"the body is larger than {bytes_max} bytes", "send less")
    except trio.TooSlowError:
        raise Problem(408, f"the body did not arrive within {within_s:g} s", "send it at once") from None
    try:
        parsed = json.loads(received or b"{}", parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not JSON: {error}", 'send an object such as {"pid": 4711}') from error
    if not isinstance(parsed, dict):
        raise Problem(400, "the body is not a JSON object", 'send an object such as {"pid": 4711}')
    return parsed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _take(body: dict[str, Any], name: str, kind: type, what: str) -> Any:
    """Remove and check one key; None if absent or null. No negative numbers; an integer will do for a float."""
    value = body.pop(name, None)
    if value is None:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = 0 <= value < 1 << 63
    elif kind in (int, float):
        fits = type(value) is kind and math.isfinite(value) and 0 <= value < 1 << 63
    else:
        fits = type(value) is kind
    if not fits:
        raise Problem(400, f"{name} is not {what}", f"send {name} as {what}")
    return value


def _nothing_left(body: dict[str, Any], known: str) -> None:
    if body:
        raise Problem(400, f"unknown: {', '.join(sorted(body))}", f"known are {known}")


def _one(wanted: str, found: dict[str, Any]) -> Any:
    """The guest that `wanted` means, out of those that match it, by key."""
    if not found:
        raise Problem(404, f"there is no guest {wanted!r}", "see `tierd status`; `tierd attach PID` adds one")
    if len(found) > 1:
        keys = sorted(found)
        raise Problem(409, f"{wanted!r} may be any of {', '.join(keys)}", "name one by its key", keys=keys)
    return next(iter(found.values()))


def _is(wanted: str, guest: GuestView | GuestStatus) -> bool:
    return wanted in (guest.key, guest.name, str(guest.pid))


# --- routes ---------------------------------------------------------------------------------------------------------


class Api:
    """The endpoints. One object a daemon."""

    def __init__(self, daemon: DaemonView, nursery: trio.Nursery, body_s: float, body_bytes_max: int) -> None:
        self._daemon, self._body_s, self._body_bytes_max = daemon, body_s, body_bytes_max
        self._operations = Operations(nursery)

    def _guest(self, request: Request) -> GuestView:
        wanted = request.path_params["key"]
        served = {key: guest for key, guest in self._daemon.guests.items() if _is(wanted, guest)}
        if not served:
            for status in self._daemon.status().guests:
                if _is(wanted, status):
                    raise Problem(409, f"guest {status.name} is {status.state}: {status.reason}", "see `tierd status`")
        guest: GuestView = _one(wanted, served)
        return guest

    async def status(self, request: Request) -> Response:
        return Json(self._daemon.status())

    async def health(self, request: Request) -> Response:
        ill = [f"store {store.name}: {store.reason}" for store in self._daemon.status().stores if not store.healthy]
        return Json({"healthy": not ill, "reasons": ill}, 503 if ill else 200)

    async def guests(self, request: Request) -> Response:
        return Json({"guests": self._daemon.status().guests})

    async def guest(self, request: Request) -> Response:
        wanted = request.path_params["key"]
        return Json(_one(wanted, {g.key: g for g in self._daemon.status().guests if _is(wanted, g)}))

    async def attach(self, request: Request) -> Response:
        body = await _body(request, self._body_s, self._body_bytes_max)
        pid, name = _take(body, "pid", int, "a process id"), _take(body, "name", str, "a text")
        _nothing_left(body, "pid, name")
        if pid is None or not 0 < pid <= PID_MAX:
            raise Problem(400, "pid is missing or no process id", 'send {"pid": 4711}, the process id of the VMM')

        async def work(progress: Progress) -> Any:
            return (await self._daemon.attach(pid, name)).status()

        return await _outcome(request, self._operations.begin(f"pid {pid}", f"attach of process {pid}", work))

    async def detach(self, request: Request) -> Response:
        guest = self._guest(request)

        async def work(progress: Progress) -> Any:
            await self._daemon.detach(guest.key, progress)
            return {"detached": guest.key}

        return await _outcome(request, self._operations.begin(guest.key, f"detach of {guest.name}", work))

    async def pause(self, request: Request) -> Response:
        guest = self._guest(request)
        await guest.pause()
        return Json(guest.status())

    async def resume(self, request: Request) -> Response:
        guest = self._guest(request)
        await guest.resume()
        return Json(guest.status())

    async def evict(self, request: Request) -> Response:
        body = await _body(request, self._body_s, self._body_bytes_max)
        max_bytes = _take(body, "max_bytes", int, "a number of bytes")
        min_idle_s = _take(body, "min_idle_s", float, "a number of seconds")
        _nothing_left(body, "max_bytes, min_idle_s")
        guest = self._guest(request)

        async def work(progress: Progress) -> Any:
            return {"evicted_bytes": await guest.evict(max_bytes, min_idle_s)}

        measure = _eviction_measure(guest, max_bytes, min_idle_s)
        return await _outcome(request, self._operations.begin(guest.key, f"eviction of {guest.name}", work, measure))

    async def restore(self, request: Request) -> Response:
        guest = self._guest(request)

        async def work(progress: Progress) -> Any:
            return {"restored_bytes": await guest.restore(progress)}

        return await _outcome(request, self._operations.begin(guest.key, f"restore of {guest.name}", work))

    async def retry(self, request: Request) -> Response:
        guest = self._guest(request)

        async def work(progress: Progress) -> Any:
            recovered, lost = await guest.retry()
            return {"recovered_bytes": recovered, "lost_bytes": lost}

        return await _outcome(request, self._operations.begin(guest.key, f"retry of {guest.name}", work))

    async def reload(self, request: Request) -> Response:
        async def work(progress: Progress) -> Any:
            return {"changes": list(await self._daemon.reload())}

        return await _outcome(request, self._operations.begin("reload", "reload of the configuration", work))


def _eviction_measure(guest: GuestView, max_bytes: int | None, min_idle_s: float | None) -> Measure:
    """An eviction tells nobody how far it is; the counters do. The total is what is idle long enough at the start."""
    before = guest.status()
    began_pages = before.counters.get("pages_evicted", 0)
    idle_bytes = sum(size for age_s, size in before.idle if age_s >= (min_idle_s or 0.0))
    total_bytes = idle_bytes if max_bytes is None else min(max_bytes, idle_bytes)

    def measure() -> tuple[int, int]:
        done_bytes = (guest.status().counters.get("pages_evicted", began_pages) - began_pages) * before.page_bytes
        return done_bytes, max(done_bytes, total_bytes)

    return measure


def _metrics(daemon: DaemonView) -> Route:
    registry = create_registry(daemon.status)

    async def metrics(request: Request) -> Response:
        body, content_type = exposition(registry, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return Route("/metrics", metrics)


async def _say_problem(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    return Json(problem.body, problem.status)


async def _say_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ", ".join(sorted({getattr(route, "path", "") for route in request.app.routes}))
    remedy = f"known are {known}" if error.status_code == 404 else "see the README"
    return Json(
        {"error": f"{request.method} {request.url.path}: {error.detail}", "remedy": remedy},
        error.status_code,
        headers=error.headers,
    )


async def _say_nothing(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # ClientDisconnect: nobody reads this


def _starlette(routes: list[Route]) -> Starlette:
    handlers: dict[Any, Any] = {
        HTTPException: _say_http_error,
        ClientDisconnect: _say_nothing,
        Exception: _say_problem,
        Problem: _say_problem,
        RequestRefused: _say_problem,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


def create_app(daemon: DaemonView, nursery: trio.Nursery, *, body_s: float, body_bytes_max: int) -> Starlette:
    """The whole API. `nursery` runs the operations that outlive their requests; a body has `body_s` to arrive."""
    api = Api(daemon, nursery, body_s, body_bytes_max)
    guest = "/guests/{key:path}"  # a name may hold a slash
    return _starlette(
        [
            Route("/status", api.status),
            Route("/healthz", api.health),
            Route("/reload", api.reload, methods=["POST"]),
            Route("/guests", api.guests),
            Route("/guests", api.attach, methods=["POST"]),
            Route(f"{guest}/pause", api.pause, methods=["POST"]),
            Route(f"{guest}/resume", api.resume, methods=["POST"]),
            Route(f"{guest}/evict", api.evict, methods=["POST"]),
            Route(f"{guest}/restore", api.restore, methods=["POST"]),
            Route(f"{guest}/retry", api.retry, methods=["POST"]),
            Route(guest, api.guest),
            Route(guest, api.detach, methods=["DELETE"]),
            _metrics(daemon),
        ]
    )


def create_metrics_app(daemon: DaemonView) -> Starlette:
    """What the TCP address serves: /metrics, and nothing that changes or names anything else."""
    return _starlette([_metrics(daemon)])
