"""The OpenAPI document is true: requests made from it never break the server, and the answers are as it says."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from phalanx_server.main import Server, create_app, server_for
from phalanx_server.settings import Settings
from phalanx_server.store import ids
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = {
    operation["operationId"]: operation
    for path in create_app(Settings.model_validate({"database_url": "postgresql://-/-"})).openapi()["paths"].values()
    for operation in path.values()
}


@schemathesis.serializer("application/gzip")
def serialize_gzip(_context: Any, value: Any) -> bytes:
    """Any bytes will do: they are not the ones that the path says."""
    return value if isinstance(value, bytes) else str(value).encode()


class Served:
    """A server in a thread of its own, because Hypothesis drives the requests synchronously."""

    def __init__(self, settings: Settings) -> None:
        self.server: Server = server_for(settings)
        self._thread = threading.Thread(target=self.server.run, name="server")

    async def __aenter__(self) -> Served:
        self._thread.start()
        async with asyncio.timeout(20):
            while not self.server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.should_exit = True
        await asyncio.to_thread(self._thread.join, 20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
async def served(settings: Settings, world: Any, job_file: Any) -> AsyncIterator[tuple[Served, dict[str, str]]]:
    """The server, and what the path parameters of existing things are."""
    async with Served(settings) as served:
        headers = {"Authorization": f"Bearer {world.tokens['admin']}"}
        async with httpx.AsyncClient(base_url=served.url, headers=headers) as client:
            job = (await client.post("/v1/jobs", json=job_file())).json()["id"]
        token = ids.encode("token", world.token_ids["bob"])
        yield served, {"job_id": job, "node": "n0", "path": "research/nlp", "token_id": token}


def test_every_operation_has_its_own_stable_id() -> None:
    assert {"submit_job", "list_jobs", "get_job", "cancel_job", "make_plan", "get_desired"} <= OPERATIONS.keys()
    assert all(operation.get("description") or operation.get("summary") for operation in OPERATIONS.values())


def test_every_success_has_a_schema(app_document: dict[str, Any]) -> None:
    for path, operations in app_document["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                silent = method in ("head", "delete") or status == "404"
                assert silent or response.get("content"), f"{method} {path} {status}"
                for media in response.get("content", {}).values():
                    assert media["schema"] != {}, f"{method} {path} {status}"


@pytest.fixture
def app_document(settings: Settings) -> dict[str, Any]:
    app: FastAPI = create_app(settings)
    assert app.openapi()["openapi"].startswith("3.1")
    return app.openapi()


@pytest.mark.parametrize("examples", [2, pytest.param(10, marks=pytest.mark.slow)])
async def test_requests_made_from_the_document_never_break_the_server(
    served: tuple[Served, dict[str, str]], world: Any, examples: int
) -> None:
    """Valid and invalid requests of every operation, the same ones in every run."""
    server, existing = served
    await asyncio.to_thread(_try_everything, server.url, existing, world.tokens, examples)


def _try_everything(url: str, existing: dict[str, str], tokens: dict[str, str], examples: int) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()
        token = tokens[{"agent link": "agent", "node link": "n0"}.get(operation.tags[0], "admin")]
        for mode in GenerationMode:
            _try(operation.as_strategy(generation_mode=mode), mode, existing, token, examples)


def _try(strategy: Any, mode: GenerationMode, existing: dict[str, str], token: str, examples: int) -> None:
    @given(case=strategy)
    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def exchange(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.path_parameters.update({name: existing[name] for name in case.path_parameters if name in existing})
        for name, value in {"follow": "false", "wait_s": "0"}.items():  # no example is to wait for anything
            if name in (case.query or {}):
                case.query[name] = value
        case.call_and_validate(headers={"Authorization": f"Bearer {token}"}, checks=CHECKS, timeout=20)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
        exchange()
