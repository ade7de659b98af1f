"""A small server behind the transport seam of httpx: answers from a table, fails on request, remembers what came."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx

JOB_ID = "job_0197a1b2c3d47e5f8091a2b3c4d5e6f7"
AT = "2026-11-21T02:03:04.000000Z"

Answerer = Callable[[httpx.Request], httpx.Response]


def answer(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def problem(status: int, code: str, detail: str = "", errors: Iterable[dict] = (), **headers: str) -> httpx.Response:
    body = {
        "type": f"urn:{code}",
        "title": code,
        "status": status,
        "detail": detail,
        "code": code,
        "request_id": "req1",
    }
    sent = {"content-type": "application/problem+json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    return httpx.Response(status, content=json.dumps({**body, "errors": list(errors)}), headers=sent)


def stream(*events: tuple[str, str, Any], broken: bool = False) -> httpx.Response:
    """Server-sent events (event, id, data); `broken` cuts the connection after them."""
    text = "".join(f"event: {kind}\nid: {id}\ndata: {json.dumps(data)}\n\n" for kind, id, data in events)
    headers = {"content-type": "text/event-stream"}
    return httpx.Response(200, stream=_Broken(text.encode(), broken), headers=headers)


class _Broken(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, data: bytes, broken: bool) -> None:
        self.data, self.broken = data, broken

    def __iter__(self):
        yield self.data
        if self.broken:
            raise httpx.ReadError("connection reset")

    async def __aiter__(self):
        for chunk in self:
            yield chunk


def job(state: str = "queued", **fields: Any) -> dict[str, Any]:
    """A job as the API shows it."""
    return {
        "id": JOB_ID,
        "name": "lm",
        "tenant": "default",
        "state": state,
        "spec": {"resources": {"replicas": 2, "gpus_per_replica": 2}, "run": {"command": "python train.py"}},
        "received_at": AT,
        "submitted_at": AT,
        "created_by": "ada",
        "attempts": 0,
        "version": 1,
        **fields,
    }


@dataclass
class FakeServer:
    """Routes are `METHOD path` to an answer, or to several that are given in turn (the last one again and again)."""

    routes: dict[str, Any] = field(default_factory=dict)
    requests: list[httpx.Request] = field(default_factory=list)
    naps_s: list[float] = field(default_factory=list)

    def on(self, route: str, *answers: httpx.Response | Answerer | BaseException) -> FakeServer:
        self.routes[route] = list(answers)
        return self

    def handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self._answer(request)

    async def ahandle(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answers = self.routes.get(f"{request.method} {request.url.path}")
        if answers is None:
            return problem(404, "not_found", f"no {request.url.path}")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, BaseException):
            raise found
        return found(request) if callable(found) else found

    def seen(self, route: str) -> list[httpx.Request]:
        return [request for request in self.requests if f"{request.method} {request.url.path}" == route]

    def nap(self, seconds: float) -> None:
        self.naps_s.append(seconds)

    def clock(self) -> float:
        """Time passes in naps only."""
        return sum(self.naps_s)

    async def anap(self, seconds: float) -> None:
        self.naps_s.append(seconds)
