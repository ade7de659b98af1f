"""The outermost layer of the API: request ids, access log, request metrics, and the answer to unexpected errors.

A plain ASGI middleware. Refuses to know routes: it only reads which one was taken.
"""

from __future__ import annotations

import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx_server.api.errors import for_unexpected, respond
from phalanx_server.api.measures import Measures

log = structlog.get_logger("phalanx.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics", "/v1/agent/desired", "/v1/agent/nodes", "/v1/node/reports"})


class AccessMiddleware:
    """Gives every request an id (the caller's `X-Request-ID` if it is a sane one) and answers with it."""

    def __init__(self, app: ASGIApp, *, measures: Measures) -> None:
        self.app = app
        self.measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(scope, send)
        started = time.perf_counter()
        try:
            await self.app(scope, receive, exchange.send)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:
            with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
                problem = for_unexpected(error)
            if exchange.status is None:
                await respond(problem, exchange.request_id)(scope, receive, exchange.send)
            else:
                raise  # half an answer is out: the server must cut the connection, not pretend that it is whole
        finally:
            self._record(scope, exchange, time.perf_counter() - started)

    def _record(self, scope: Scope, exchange: _Exchange, elapsed_s: float) -> None:
        route = _route_template(scope)
        status = exchange.status or 499  # the client went away before an answer
        self.measures.observe_request(scope["method"], route, status, elapsed_s)
        write = log.debug if route in _QUIET and status < 400 else log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            ms=round(elapsed_s * 1000, 2),
            request_id=exchange.request_id,
            actor=scope.get("phalanx.actor"),
        )


class _Exchange:
    """One request on its way out: adds the id header, remembers the status."""

    __slots__ = ("_header", "_send", "request_id", "status")

    def __init__(self, scope: Scope, send: Send) -> None:
        self.request_id = _given_request_id(scope) or uuid.uuid4().hex
        scope["phalanx.request_id"] = self.request_id
        scope["phalanx.received_at"] = datetime.now(UTC)
        self._header = (b"x-request-id", self.request_id.encode())
        self._send = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        await self._send(message)


def _given_request_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return None


def _route_template(scope: Scope) -> str:
    """The path template of the route that was taken; one label for all that matched none, to bound the metrics."""
    route: Any = scope.get("route")
    return getattr(route, "path", None) or "unmatched"
