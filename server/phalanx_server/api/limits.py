"""What no request may be, whatever its route: too large, with a body that stops coming, or with NUL in its address.

A plain ASGI middleware. A body is refused by its Content-Length before a byte is read, and by count while it streams in
where there is none or it lied. NUL is refused because PostgreSQL stores none, so it can name nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx_server.api.errors import Problem, respond
from phalanx_server.api.stalls import not_for_ever


class LimitsMiddleware:
    """`limits_bytes` maps a path prefix to its own limit; the longest match wins, `default_bytes` is for the rest."""

    def __init__(self, app: ASGIApp, *, default_bytes: int, limits_bytes: Mapping[str, int]) -> None:
        self.app = app
        self.default_bytes = default_bytes
        self.limits = sorted(limits_bytes.items(), key=lambda item: -len(item[0]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:
            refusal = Problem("invalid_request", "The address holds a NUL character.")
            return await respond(refusal, scope.get("phalanx.request_id", ""))(scope, receive, send)
        if scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        limit_bytes = self._limit_bytes(scope["path"])
        if _content_length(scope) > limit_bytes:
            response = respond(_too_large(limit_bytes), scope.get("phalanx.request_id", ""))
            response.headers["connection"] = "close"  # the body is not read, so the connection cannot be used again
            return await response(scope, receive, send)
        received_bytes, receive_in_time = 0, not_for_ever(receive)

        async def counted() -> Message:
            nonlocal received_bytes
            message = await receive_in_time()
            if message["type"] == "http.request":
                received_bytes += len(message.get("body", b""))
                if received_bytes > limit_bytes:
                    raise _too_large(limit_bytes)
            return message

        await self.app(scope, counted, send)

    def _limit_bytes(self, path: str) -> int:
        return next((limit for prefix, limit in self.limits if path.startswith(prefix)), self.default_bytes)


def _too_large(limit_bytes: int) -> Problem:
    return Problem("body_too_large", f"The body is larger than the {limit_bytes:,} bytes that are accepted here.")


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
