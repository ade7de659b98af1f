"""The agent's side of the link: what is asked, what an answer means, and the order in which facts get through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from link_server import attempt_of
from phalanx_worker.agent import backoff, link
from phalanx_worker.agent.link import FactOutbox, ServerAway, ServerLink, ServerRefused, Superseded
from phalanx_worker.protocol import AttemptFact, RankExit, encode

Answer = Callable[[httpx.Request], httpx.Response]


def server_link(answer: Answer, token: Callable[[], str] = lambda: "secret") -> ServerLink:
    return ServerLink(url="http://server/", token=token, instance="i1", transport=httpx.MockTransport(answer))


def problem(status: int, code: str) -> httpx.Response:
    headers = {"Content-Type": "application/problem+json"}
    return httpx.Response(status, json={"code": code, "detail": "why"}, headers=headers)


PROXY_404 = httpx.Response(404, text="<html>no such backend</html>")
PROXY_413 = httpx.Response(413, text="<html>too large</html>")


def fact(kind: str, attempt_id: str = "att_1") -> AttemptFact:
    return AttemptFact(attempt_id=attempt_id, epoch=1, kind=kind, at=1.0)


def gone(node: str) -> AttemptFact:
    return replace(fact("gone"), node=node)


def facts_of(request: httpx.Request) -> list[str]:
    return [f"{each['attempt_id']} {each['kind']}" for each in json.loads(request.content)["facts"]]


class Hearing:
    """A server that takes reports, except those that `answers` says otherwise about, first come first."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.reports: list[list[str]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.reports.append(facts_of(request))
        answer = self.answers.pop(0) if self.answers else httpx.Response(200, json={"server_time": 1.0, "refused": []})
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "BACKOFF_S", (0.001,))


async def delivered(hearing: Hearing, *facts: tuple[AttemptFact, bool]) -> list[bool]:
    """What became of facts that were queued in this order; each with whether it is urgent."""
    outbox = FactOutbox(server_link(hearing))
    taken = [outbox.deliver(each, urgent=urgent) for each, urgent in facts]
    running = asyncio.create_task(outbox.run())
    try:
        async with asyncio.timeout(5):
            return list(await asyncio.gather(*taken))
    finally:
        running.cancel()


async def test_calls_carry_the_token_and_the_instance() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"version": "7", "attempts": [], "server_time": 1.0, "newer": True})

    desired = await server_link(answer).desired("6")
    assert desired.version == "7"
    assert seen[0].headers["authorization"] == "Bearer secret"
    assert seen[0].url.path == "/v1/agent/desired"
    assert seen[0].url.params["version"] == "6"
    assert seen[0].url.params["instance"] == "i1"


async def test_an_attempt_that_is_told_again_is_read_once_and_one_that_changed_anew() -> None:
    run, other = encode(attempt_of("a", "true", nodes={"n0": [0]})), encode(attempt_of("b", "true", nodes={"n0": [1]}))
    answers = [[run], [run, other], [run | {"action": "stop"}, other], [other]]
    given = iter(answers)
    link = server_link(
        lambda _: httpx.Response(200, json={"version": "1", "attempts": next(given), "server_time": 1.0})
    )
    desired = [(await link.desired("")).attempts for _ in answers]
    assert [[encode(attempt) for attempt in attempts] for attempts in desired] == answers
    assert desired[1][0] is desired[0][0]
    assert desired[3][0] is desired[1][1]


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(200, json={"version": "7", "server_time": 1.0}), ServerAway),
        (httpx.Response(200, json=[]), ServerAway),
        (problem(409, "superseded"), Superseded),
        (problem(503, "unavailable"), ServerAway),
        (problem(429, "rate_limited"), ServerAway),
        (problem(401, "unauthorized"), ServerAway),
        (problem(422, "invalid_request"), ServerRefused),
        (problem(409, "conflict"), ServerRefused),
        (problem(404, "not_found"), ServerRefused),
        (httpx.Response(502, text="<html>bad gateway</html>"), ServerAway),
        (PROXY_404, ServerAway),
        (httpx.Response(301, headers={"Location": "https://login.example"}), ServerAway),
        (httpx.Response(405, text="POST is not allowed here"), ServerAway),
        (httpx.Response(404, json={"code": "no_such_route", "detail": "a gateway's own JSON"}), ServerAway),
        (httpx.Response(409, json={"code": "superseded"}), ServerAway),
        (httpx.Response(400, text="[]", headers={"Content-Type": "application/problem+json"}), ServerAway),
        (httpx.Response(200, text="<html>a captive portal</html>"), ServerAway),
        (httpx.Response(200, json={"version": 7}), ServerAway),
    ],
)
async def test_what_answers_mean(response: httpx.Response, error: type[Exception]) -> None:
    with pytest.raises(error):
        await server_link(lambda _: response).desired("")


async def test_no_connection_means_that_the_server_is_away() -> None:
    def refuse(request: httpx.Request) -> Any:
        raise httpx.ConnectError("connection refused", request=request)

    with pytest.raises(ServerAway, match="connection refused"):
        await server_link(refuse).desired("")


async def test_after_a_401_the_token_is_read_again() -> None:
    tokens = iter(["old", "new"])
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return problem(401, "token_expired")

    server = server_link(answer, token=lambda: next(tokens, "new"))
    for _ in range(2):
        with pytest.raises(ServerAway):
            await server.desired("")
    assert seen == ["Bearer old", "Bearer new"]


async def test_facts_that_happen_together_go_together() -> None:
    hearing = Hearing()
    assert await delivered(hearing, (fact("gang_ready"), False), (fact("started"), True)) == [True, True]
    assert hearing.reports == [["att_1 gang_ready", "att_1 started"]]


async def test_a_fact_that_is_not_urgent_goes_soon_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "COALESCE_S", 0.01)
    assert await delivered(Hearing(), (fact("gang_ready"), False)) == [True]


async def test_facts_are_sent_again_until_they_are_acknowledged() -> None:
    hearing = Hearing(httpx.ConnectError("no"), problem(503, "unavailable"))
    assert await delivered(hearing, (fact("started"), True), (fact("ended"), True)) == [True, True]
    assert hearing.reports == [["att_1 started", "att_1 ended"]] * 3


async def test_an_overloaded_server_is_given_the_time_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept_s: list[float] = []
    sleep = asyncio.sleep

    async def note(delay_s: float) -> None:
        slept_s.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(backoff.asyncio, "sleep", note)
    overloaded, rate_limited = problem(503, "overloaded"), problem(429, "rate_limited")
    overloaded.headers["Retry-After"], rate_limited.headers["Retry-After"] = "2", "86400"
    assert await delivered(Hearing(overloaded, rate_limited), (fact("ended"), True)) == [True]
    asked_s = [delay_s for delay_s in slept_s if delay_s >= 2]
    assert [int(delay_s) for delay_s in asked_s] == [2, int(backoff.LONGEST_ASKED_S)], "a day is too long"


async def test_a_proxy_that_lost_its_server_loses_no_fact() -> None:
    hearing = Hearing(PROXY_404, PROXY_404)
    assert await delivered(hearing, (fact("ended"), True)) == [True]


async def test_facts_that_are_too_many_for_a_proxy_go_in_smaller_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "FACTS_PER_REPORT", 200)
    hearing = Hearing(PROXY_413, PROXY_413)
    facts = [(fact("ended", f"att_{number}"), True) for number in range(200)]
    assert await delivered(hearing, *facts) == [True] * 200
    assert [len(report) for report in hearing.reports] == [200, 100, 50, 100, 50]


async def test_a_report_stays_far_below_what_the_server_takes() -> None:
    hearing = Hearing()
    exits = [RankExit(rank, exit_code=1, tail="x" * 2048) for rank in range(64)]
    facts = [(replace(fact("ended", f"att_{number}"), exits=exits), True) for number in range(20)]
    assert await delivered(hearing, *facts) == [True] * 20
    assert max(map(len, hearing.reports)) < 20
    assert sum(map(len, hearing.reports)) == 20


async def test_a_refused_fact_is_told_from_one_that_was_taken() -> None:
    refusal = {"attempt_id": "att_2", "epoch": 1, "reason": "stale_epoch"}
    hearing = Hearing(httpx.Response(200, json={"server_time": 1.0, "refused": [refusal]}))
    assert await delivered(hearing, (fact("ended"), True), (fact("ended", "att_2"), True)) == [True, False]


async def test_one_fact_that_the_server_cannot_take_does_not_block_the_others() -> None:
    hearing = Hearing(problem(422, "invalid_request"), problem(422, "invalid_request"))
    assert await delivered(hearing, (fact("ended"), True), (fact("ended", "att_2"), True)) == [False, True]
    assert hearing.reports == [["att_1 ended", "att_2 ended"], ["att_1 ended"], ["att_2 ended"]]


async def test_a_fact_that_is_told_again_takes_the_place_of_the_one_that_waits() -> None:
    """However long the server is away: what waits is bounded by the attempts and nodes that there is something of."""
    hearing = Hearing()
    outbox = FactOutbox(server_link(hearing))
    told = [fact("started"), fact("ended"), gone("a"), gone("b"), fact("ended", "att_2")]
    taken = [outbox.deliver(each) for _ in range(100) for each in told]
    assert outbox.waiting == len(told)
    running = asyncio.create_task(outbox.run())
    async with asyncio.timeout(5):
        assert all(await asyncio.gather(*taken))
    running.cancel()
    assert hearing.reports == [["att_1 started", "att_1 ended", "att_1 gone", "att_1 gone", "att_2 ended"]]
    assert outbox.waiting == 0


async def test_a_fact_that_is_told_anew_while_it_is_on_its_way_is_sent_again() -> None:
    """The answer is about what was sent, not about what took its place."""
    outbox: FactOutbox
    heard: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        heard.extend(each["at"] for each in json.loads(request.content)["facts"])
        if len(heard) == 1:
            outbox.deliver(replace(fact("started"), at=2.0))
        return httpx.Response(200, json={"server_time": 1.0})

    outbox = FactOutbox(server_link(answer))
    taken = outbox.deliver(fact("started"))
    running = asyncio.create_task(outbox.run())
    async with asyncio.timeout(5):
        assert await taken
    running.cancel()
    assert heard == [1.0, 2.0]


async def test_being_replaced_ends_the_sending() -> None:
    outbox = FactOutbox(server_link(Hearing(problem(409, "superseded"))))
    outbox.deliver(fact("ended"))
    with pytest.raises(Superseded):
        await outbox.run()
