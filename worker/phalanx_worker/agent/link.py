"""The agent's side of the server's agent link: three HTTP calls, and the facts that wait for their acknowledgement.

Owns retries, backoff and the order of facts. The server may be away for as long as it likes: nothing is dropped, what
is told again is kept once, and nobody here waits for it but those who ask to. Knows nothing of Ray or of what the facts
mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import httpx
from phalanx import config
from phalanx.retry import retry_after_s

from phalanx_worker.agent.backoff import Backoff
from phalanx_worker.protocol import (
    AgentReport,
    AttemptFact,
    Backlog,
    Desired,
    DesiredAttempt,
    Inventory,
    InventoryAnswer,
    NodeFacts,
    ReportAnswer,
    decode,
    encode,
)

log = logging.getLogger("phalanx.agent")

CALL_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 5.0
DESIRED_WAIT_S = 20.0
FACTS_PER_REPORT = 1_000
REPORT_BYTES = 1 << 20  # about; the server takes four times as much
PROBLEM_TYPE = "application/problem+json"
LATER_STATUSES = frozenset({401, 403, 408, 425, 429})
COALESCE_S = 0.1  # how long a fact that nobody waits for may wait for another

T = TypeVar("T")


class Superseded(Exception):
    """Another agent has taken over this cluster."""


class ServerAway(Exception):
    """No answer, or one that says: later. `retry_after_s` is how much later, where it says so."""

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ServerRefused(Exception):
    """The server understood the request and will not take it. Only a problem document of its own says so: what a proxy
    answers, or something else that has the server's address for a while, is not the server's word."""


class ServerLink:
    """The calls. `token` is asked again after a 401: the token may have been replaced in its file."""

    def __init__(
        self, *, url: str, token: Callable[[], str], instance: str, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        timeout = httpx.Timeout(CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self.client = httpx.AsyncClient(
            base_url=url.rstrip("/"), timeout=timeout, trust_env=not config.is_local(url), transport=transport
        )
        self.instance = instance
        self._token = token
        self._bearer = token()
        self._desired: dict[str, tuple[Any, DesiredAttempt]] = {}  # the last answer's attempts: as they came, as read

    async def close(self) -> None:
        await self.client.aclose()

    async def put_nodes(self, nodes: list[NodeFacts], without_token: list[str], backlog: Backlog) -> InventoryAnswer:
        message = Inventory(
            instance=self.instance, sent_at=time.time(), nodes=nodes, without_token=without_token, backlog=backlog
        )
        read = partial(decode, InventoryAnswer)
        return await self._call(read, "PUT", "/v1/agent/nodes", json=encode(message))

    async def desired(self, version: str) -> Desired:
        query = {"version": version, "wait_s": str(DESIRED_WAIT_S), "instance": self.instance}
        timeout = httpx.Timeout(DESIRED_WAIT_S + CALL_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return await self._call(self._read_desired, "GET", "/v1/agent/desired", params=query, timeout=timeout)

    async def report(self, facts: list[AttemptFact]) -> ReportAnswer:
        message = AgentReport(instance=self.instance, sent_at=time.time(), facts=facts)
        return await self._call(partial(decode, ReportAnswer), "POST", "/v1/agent/reports", json=encode(message))

    def _read_desired(self, answer: Any) -> Desired:
        """Attempts that are as they were in the last answer are not read again: most are, however many run."""
        if not isinstance(answer, dict) or not isinstance(answer.get("attempts"), list):
            return decode(Desired, answer)  # says what is wrong with it
        before, self._desired = self._desired, {}
        for given in answer["attempts"]:
            told = before.get(str(given.get("attempt_id"))) if isinstance(given, dict) else None
            attempt = told[1] if told is not None and told[0] == given else decode(DesiredAttempt, given)
            self._desired[attempt.attempt_id] = given, attempt
        attempts = [attempt for _, attempt in self._desired.values()]
        return replace(decode(Desired, answer | {"attempts": []}), attempts=attempts)

    async def _call(self, read: Callable[[Any], T], method: str, path: str, **request: Any) -> T:
        """One call, its answer read by `read`. Raises Superseded, ServerAway or ServerRefused."""
        try:
            headers = {"Authorization": f"Bearer {self._bearer}"}
            response = await self.client.request(method, path, headers=headers, **request)
        except httpx.HTTPError as error:
            raise ServerAway(f"{method} {path}: {error or type(error).__name__}") from error
        if not response.is_success:
            raise self._refusal(response, f"{method} {path}")
        try:
            return read(response.json())
        except ValueError as error:
            raise ServerAway(f"{method} {path}: the answer is not understood: {error}") from error

    def _refusal(self, response: httpx.Response, what: str) -> Exception:
        status = response.status_code
        code, detail = _problem(response)
        if status == 409 and code == "superseded":
            return Superseded(detail)
        if status == 401:
            self._bearer = self._token()
        later = not code or status in LATER_STATUSES or status >= 500
        said = f"{what}: {status} {detail}"
        return ServerAway(said, retry_after_s=retry_after_s(response.headers)) if later else ServerRefused(said)


def _problem(response: httpx.Response) -> tuple[str, str]:
    """Code and detail of the server's problem document; of any other answer no code."""
    if response.headers.get("Content-Type", "").partition(";")[0].strip() != PROBLEM_TYPE:
        return "", response.text[:200]
    try:
        problem = response.json()
        return str(problem.get("code") or ""), str(problem.get("detail") or problem.get("title", ""))
    except (ValueError, AttributeError):
        return "", response.text[:200]


@dataclass(frozen=True, eq=False)
class _Waiting:
    fact: AttemptFact
    taken: asyncio.Future[bool]


@dataclass
class FactOutbox:
    """Facts in the order in which they first happened, each kept until the server has acknowledged it.

    What is told again takes the place of the same that still waits: of an attempt at most each kind once, and once for
    each node that it is gone from.
    """

    link: ServerLink
    _waiting: dict[tuple[Any, ...], _Waiting] = field(default_factory=dict)
    _some: asyncio.Event = field(default_factory=asyncio.Event)
    _urgent: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def deliver(self, fact: AttemptFact, *, urgent: bool = True) -> asyncio.Future[bool]:
        """Queue a fact. The future tells, once the server has answered, whether it took the fact or refused it."""
        before = self._waiting.get(_slot(fact))
        if before is not None and not before.taken.done():
            waiting = _Waiting(fact, before.taken)
        else:
            waiting = _Waiting(fact, asyncio.get_running_loop().create_future())
        self._waiting[_slot(fact)] = waiting
        self._some.set()
        if urgent:
            self._urgent.set()
        return waiting.taken

    async def run(self) -> None:
        """Send for ever. Raises Superseded.

        Less at a time after a failure: a proxy may let no large report through.
        """
        backoff = Backoff("reporting facts")
        most = FACTS_PER_REPORT
        while True:
            await self._some.wait()
            if not self._urgent.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(COALESCE_S):
                        await self._urgent.wait()
            try:
                await self._send(_first(self._waiting.values(), most))
                backoff.succeeded()
                most = min(2 * most, FACTS_PER_REPORT)
            except ServerAway as error:
                most = max(1, most // 2)
                await backoff.failed(error, at_least_s=error.retry_after_s)
            if not self._waiting:
                self._some.clear()
                self._urgent.clear()

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            answer = await self.link.report([waiting.fact for waiting in batch])
        except ServerRefused as error:
            if len(batch) > 1:  # find the one it cannot take
                await self._send(batch[: len(batch) // 2])
                await self._send(batch[len(batch) // 2 :])
                return
            log.error("the server refused a fact: %s (%s)", batch[0].fact, error)
            self._settle(batch, refused={_key(batch[0].fact)})
            return
        refused = {(refusal.attempt_id, refusal.epoch) for refusal in answer.refused}
        for refusal in answer.refused:
            log.warning(
                "the server refused facts of %s epoch %d: %s", refusal.attempt_id, refusal.epoch, refusal.reason
            )
        self._settle(batch, refused)

    def _settle(self, batch: list[_Waiting], refused: set[tuple[str, int]]) -> None:
        for waiting in batch:
            if self._waiting.get(_slot(waiting.fact)) is not waiting:
                continue  # what took its place meanwhile has to be sent in its turn
            del self._waiting[_slot(waiting.fact)]
            if not waiting.taken.done():
                waiting.taken.set_result(_key(waiting.fact) not in refused)


def _first(waiting: Iterable[_Waiting], most: int) -> list[_Waiting]:
    """At most so many, and only so many as make a report of a size that goes through."""
    batch: list[_Waiting] = []
    left_bytes = REPORT_BYTES
    for each in itertools.islice(waiting, most):
        left_bytes -= _bytes_of(each.fact)
        if left_bytes < 0 and batch:
            break
        batch.append(each)
    return batch


def _bytes_of(fact: AttemptFact) -> int:
    """About, as JSON."""
    tails = sum(len(end.tail) + len(end.reason) for end in fact.exits)
    return 400 + len(fact.message) + 2 * tails + 200 * (len(fact.ranks_started) + len(fact.exits))


def _key(fact: AttemptFact) -> tuple[str, int]:
    return fact.attempt_id, fact.epoch


def _slot(fact: AttemptFact) -> tuple[Any, ...]:
    """What is the same fact, told again. `node` is part of what `gone` says; elsewhere it is a detail."""
    return (*_key(fact), fact.kind, fact.node if fact.kind == "gone" else None)
