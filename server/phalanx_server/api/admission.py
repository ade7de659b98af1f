"""How many requests are worked on at once, and who goes first when there are more.

Owns the gates, one for each kind of request, so that none waits behind another kind: what nodes and agents report is
never behind users' reads. Who cannot be let in soon is told at once to come back (503 `overloaded`), and who alone
fills half a gate is told to slow down (429 `rate_limited`). Probes pass. Refuses to know who a caller is: an
Authorization header is only compared.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phalanx_server.api.errors import Problem, respond, unavailable

PATIENCE_S = 5.0
LARGE_BODY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """`running` requests at once, `waiting` more for at most `patience_s`; one caller has at most `share` of both."""

    running: int
    waiting: int
    share: float = 1.0
    patience_s: float = PATIENCE_S

    @property
    def per_caller(self) -> int:
        return max(1, int((self.running + self.waiting) * self.share))


class Gate:
    """First come, first served, within its bounds."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.name, self.bounds = name, bounds
        self.running = 0
        self.refused: Counter[str] = Counter()
        """By the code of the answer."""
        self._queue: deque[asyncio.Future[None]] = deque()
        self._of_caller: Counter[bytes] = Counter()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, caller: bytes) -> None:
        """Raises Problem `overloaded` or `rate_limited`. Who got in must `leave`."""
        if self._of_caller[caller] >= self.bounds.per_caller:
            raise self._refuse("rate_limited", "Too many requests of this token are under way. Wait for some to end.")
        self._of_caller[caller] += 1
        try:
            if self.running < self.bounds.running:
                self.running += 1
            else:
                await self._wait()
        except BaseException:
            self._forget(caller)
            raise

    def leave(self, caller: bytes) -> None:
        self._forget(caller)
        self._pass_on()

    async def _wait(self) -> None:
        if len(self._queue) >= self.bounds.waiting:
            raise self._overloaded()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(self.bounds.patience_s):
                await turn
        except TimeoutError:
            self._give_up(turn)
            raise self._overloaded() from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled():
            self._pass_on()  # its turn came in the same moment
        elif turn in self._queue:
            self._queue.remove(turn)

    def _pass_on(self) -> None:
        """The place of one who is through, to the next who still waits."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def _forget(self, caller: bytes) -> None:
        self._of_caller[caller] -= 1
        if not self._of_caller[caller]:
            del self._of_caller[caller]

    def _overloaded(self) -> Problem:
        return self._refuse("overloaded", "The server has more to do than it can at the moment. Try again shortly.")

    def _refuse(self, code: str, detail: str) -> Problem:
        self.refused[code] += 1
        return unavailable(detail, code=code)


class Gates:
    """Which gate a request goes through."""

    def __init__(self, *, connections: int, waiting: int) -> None:
        """`connections` to the database may be used by users' requests, of which so many may be `waiting`."""
        few, many = 4 * connections, 1000
        self.users = Gate("users", Bounds(running=few, waiting=waiting, share=0.5))
        self.submits = Gate("submits", Bounds(running=many, waiting=waiting, share=0.75))  # they share transactions
        self.transfers = Gate("transfers", Bounds(running=16, waiting=100, share=0.1))
        self.downloads = Gate("downloads", Bounds(running=16, waiting=100, share=0.1))
        self.node_transfers = Gate("node_transfers", Bounds(running=32, waiting=many))
        # Patience: who is refused with a large body under way hears nothing but that the connection is cut.
        self.node_outputs = Gate("node_outputs", Bounds(running=32, waiting=many, patience_s=30.0))
        self.reports = Gate("reports", Bounds(running=few, waiting=2 * many))
        self.polls = Gate("polls", Bounds(running=many, waiting=0))

    @property
    def all(self) -> tuple[Gate, ...]:
        transfers = self.transfers, self.downloads, self.node_transfers, self.node_outputs
        return self.users, self.submits, *transfers, self.reports, self.polls

    def of(self, method: str, path: str) -> Gate | None:
        """None for a probe, which must be answered whatever happens."""
        if path in ("/healthz", "/readyz"):
            return None
        if path == "/v1/agent/desired":
            return self.polls
        if path.startswith("/v1/node/bundles/"):
            return self.node_transfers
        if path.startswith("/v1/node/attempts/"):
            return self.node_outputs  # of a large job that has ended: no other's start waits for those
        if path.startswith("/v1/bundles/"):
            return self.transfers
        if path.startswith("/v1/jobs/") and ("/outputs/" in path or "/ranks/" in path):
            return self.downloads
        if path.startswith(("/v1/agent/", "/v1/node/")) or path == "/metrics":
            return self.reports
        if method == "POST" and path in ("/v1/jobs", "/v1/jobs/batch"):
            return self.submits
        return self.users


class AdmissionMiddleware:
    """A plain ASGI middleware. A stream of events leaves its gate when it begins: `api.sse` bounds those."""

    def __init__(self, app: ASGIApp, *, gates: Gates) -> None:
        self.app = app
        self.gates = gates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gate = self.gates.of(scope["method"], scope["path"]) if scope["type"] == "http" else None
        if gate is None:
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        caller = headers.get(b"authorization", b"")
        try:
            await gate.enter(caller)
        except Problem as problem:
            response = respond(problem, scope.get("phalanx.request_id", ""))
            if _is_large(headers):
                response.headers["connection"] = "close"  # nobody reads the body
            return await response(scope, receive, send)
        inside = True

        async def watched(message: Message) -> None:
            nonlocal inside
            if inside and _begins_stream(message):
                inside = False
                gate.leave(caller)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if inside:
                gate.leave(caller)


def _is_large(headers: Mapping[bytes, bytes]) -> bool:
    length = headers.get(b"content-length", b"0")
    return not length.isdigit() or int(length) > LARGE_BODY_BYTES


def _begins_stream(message: Message) -> bool:
    if message["type"] != "http.response.start":
        return False
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"])
