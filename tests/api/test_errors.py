"""Every refusal is a problem document: routes, methods, parameters, and trouble of the server's own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.api.errors import from_domain, from_outage, respond
from phalanx_server.domain.errors import StorageUnavailable
from phalanx_server.main import create_app
from phalanx_server.settings import Settings
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError


def expect_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["code"] == code and problem["status"] == status
    assert problem["type"] and problem["title"] and problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]
    return problem


async def test_trouble_of_the_storage_names_all_that_is_kept_there() -> None:
    title = json.loads(bytes(respond(from_domain(StorageUnavailable("No space left.")), "abc-1").body))["title"]
    assert title == "The storage of logs, code and outputs is not available right now"


async def test_an_unknown_route(calls: Any) -> None:
    expect_problem(await calls("").get("/v1/nothing"), 404, "not_found")


async def test_a_wrong_method(admin: httpx.AsyncClient) -> None:
    answer = await admin.delete("/v1/jobs")
    expect_problem(answer, 405, "method_not_allowed")
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ("/v1/jobs?limit=0", "limit"),
        ("/v1/jobs?limit=501", "limit"),
        ("/v1/jobs?cursor=%21", "cursor"),
        ("/v1/jobs?state=flying", "state"),
        ("/v1/jobs?label=x", "label"),
        ("/v1/jobs?submitted_after=yesterday", "submitted_after"),
        ("/v1/queue?cursor=WzFd", "cursor"),
    ],
)
async def test_a_bad_parameter_is_named(admin: httpx.AsyncClient, url: str, field: str) -> None:
    problem = expect_problem(await admin.get(url), 422, "invalid_request")
    assert problem["errors"][0]["field"].startswith(field)


async def test_the_callers_request_id_is_kept_if_it_is_sane(calls: Any) -> None:
    client = calls("")
    assert (await client.get("/healthz", headers={"X-Request-ID": "abc-1"})).headers["x-request-id"] == "abc-1"
    assert (await client.get("/healthz", headers={"X-Request-ID": "a b\x7f"})).headers["x-request-id"] != "a b\x7f"


async def test_an_unexpected_error_says_nothing_of_itself(
    app: FastAPI, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def explode(*_: object, **__: object) -> None:
        raise RuntimeError("the secret is xyzzy")

    monkeypatch.setattr("phalanx_server.api.nodes.list_nodes", explode)
    answer = await calls("admin").get("/v1/nodes")
    expect_problem(answer, 500, "internal")
    assert "xyzzy" not in answer.text and "Traceback" not in answer.text


class Passing(Exception):
    sqlstate = "53300"  # too_many_connections


def test_database_trouble_that_passes_is_unavailable() -> None:
    for error in (
        OperationalError("x", None, Exception()),
        ConnectionRefusedError(),
        DBAPIError("x", None, Passing()),
        Passing(),
    ):
        problem = from_outage(error)
        assert problem is not None and problem.status_code == 503 and problem.headers == {"Retry-After": "2"}
    assert from_outage(IntegrityError("x", None, Exception())) is None
    assert from_outage(RuntimeError()) is None


async def test_without_a_database_the_answer_is_503(tmp_path: Path) -> None:
    settings = Settings(database_url=f"postgresql://nobody@/x?host={tmp_path}", data_dir=tmp_path)  # type: ignore[arg-type]
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://phalanx") as client:
            token = f"phx_{'0' * 32}_{'x' * 43}"
            answer = await client.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"})
            expect_problem(answer, 503, "unavailable")
            assert answer.headers["retry-after"] == "2"
            expect_problem(await client.get("/readyz"), 503, "unavailable")
            assert (await client.get("/healthz")).status_code == 200


async def test_too_many_connections_is_503(admin: httpx.AsyncClient, world: Any, app: FastAPI) -> None:
    """The pool is held by somebody else: a caller is told to come back, and is not kept waiting for ever."""
    engine = app.state.services.engine
    engine.sync_engine.pool._timeout = 0.05
    held = [await engine.connect() for _ in range(engine.pool.size())]
    try:
        answers = await asyncio.gather(*(admin.get("/v1/jobs") for _ in range(3)))
    finally:
        for connection in held:
            await connection.close()
    for answer in answers:
        expect_problem(answer, 503, "unavailable")
