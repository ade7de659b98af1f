"""Registered environments over HTTP: who makes, sees and deletes them, and jobs that name them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

LINES = ["einops==0.8.1", "tiktoken>=0.9"]


@pytest.fixture
async def make(admin: httpx.AsyncClient) -> Any:
    async def make(tenant: str, name: str = "nlp", lines: Any = LINES) -> dict[str, Any]:
        answer = await admin.post("/v1/environments", json={"name": name, "tenant": tenant, "requirements": lines})
        assert answer.status_code == 201, answer.text
        return answer.json()

    return make


async def tenants_seen(client: httpx.AsyncClient, query: str = "") -> list[str]:
    answer = await client.get(f"/v1/environments{query}")
    assert answer.status_code == 200, answer.text
    return [item["tenant"] for item in answer.json()["items"]]


async def test_an_environment_is_registered_once_and_shown(calls: Any) -> None:
    manager = calls("manager")
    body, headers = {"name": "nlp", "requirements": [*LINES, "# the end"]}, {"Idempotency-Key": "e1"}
    made = await manager.post("/v1/environments", json=body, headers=headers)
    assert made.status_code == 201, made.text
    environment = made.json()
    assert environment["id"].startswith("env_") and environment["tenant"] == "research", "the caller's own"
    assert environment["requirements"] == LINES and environment["created_by"] == "manager (token)"
    again = await manager.post("/v1/environments", json=body, headers=headers)
    assert again.json() == environment and again.headers["idempotency-replayed"] == "true"
    other = await manager.post("/v1/environments", json=body | {"requirements": ["x"]}, headers=headers)
    assert other.status_code == 409 and other.json()["code"] == "idempotency_conflict"
    taken = await manager.post("/v1/environments", json=body)
    assert taken.status_code == 409 and taken.json()["code"] == "conflict" and "never change" in taken.text
    assert (await manager.get(f"/v1/environments/{environment['id']}")).json() == environment
    assert (await manager.get("/v1/environments")).json() == {"items": [environment], "next_cursor": None}


@pytest.mark.parametrize(
    ("changes", "code", "field"),
    [
        ({"name": "no spaces"}, "invalid_request", "name"),
        ({"name": None}, "invalid_request", "name"),
        ({"requirements": []}, "invalid_request", "requirements"),
        ({"requirements": "requirements.txt"}, "invalid_request", "requirements"),
        ({"requirements": ["-e ."]}, "invalid_request", "requirements"),
        ({"tenant": "nowhere"}, "invalid_request", "tenant"),
        ({"requirement": LINES}, "unknown_field", "requirement"),
    ],
)
async def test_a_wrong_environment_is_named(admin: httpx.AsyncClient, changes: Any, code: str, field: str) -> None:
    answer = await admin.post("/v1/environments", json={"name": "nlp", "requirements": LINES} | changes)
    assert answer.status_code == 422 and answer.json()["code"] == code, answer.text
    assert answer.json()["errors"][0]["field"] == field
    assert await tenants_seen(admin) == [], "nothing was registered"


async def test_a_tenant_sees_its_own_those_below_and_those_it_inherits(calls: Any, make: Any) -> None:
    made = {tenant: await make(tenant) for tenant in ("default", "research", "research/nlp", "vision")}
    for caller, expected in {
        "admin": ["default", "research", "research/nlp", "vision"],
        "operator": ["default", "research", "research/nlp", "vision"],
        "manager": ["research", "research/nlp"],
        "alice": ["research", "research/nlp"],
        "viewer": ["research", "research/nlp"],
        "bob": ["vision"],
    }.items():
        client = calls(caller)
        assert await tenants_seen(client) == expected, caller
        for tenant, environment in made.items():
            status = 200 if tenant in expected else 404
            assert (await client.get(f"/v1/environments/{environment['id']}")).status_code == status, (caller, tenant)
    assert await tenants_seen(calls("manager"), "?tenant=research/nlp") == ["research", "research/nlp"]
    assert (await calls("alice").get("/v1/environments?tenant=research")).status_code == 404
    assert await tenants_seen(calls("admin"), "?tenant=vision") == ["vision"]


async def test_only_managers_register_and_delete_within_their_reach(calls: Any, make: Any) -> None:
    made = {tenant: await make(tenant) for tenant in ("research/nlp", "vision")}
    body = {"name": "other", "requirements": LINES}
    for caller in ("alice", "viewer", "operator"):
        assert (await calls(caller).post("/v1/environments", json=body)).status_code == 403, caller
        answer = await calls(caller).delete(f"/v1/environments/{made['research/nlp']['id']}")
        assert answer.status_code == 403, caller
    manager = calls("manager")
    assert (await manager.post("/v1/environments", json=body | {"tenant": "vision"})).status_code == 422
    assert (await manager.delete(f"/v1/environments/{made['vision']['id']}")).status_code == 404
    assert (await manager.delete(f"/v1/environments/{made['research/nlp']['id']}")).status_code == 204
    assert (await manager.delete(f"/v1/environments/{made['research/nlp']['id']}")).status_code == 404
    assert (await manager.delete("/v1/environments/nlp")).status_code == 404
    assert await tenants_seen(calls("admin")) == ["vision"]


async def test_lists_have_pages_and_go_by_name(admin: httpx.AsyncClient, make: Any) -> None:
    for tenant, name in (("vision", "b"), ("research", "b"), ("default", "c"), ("research", "a")):
        await make(tenant, name)
    found, query = [], "?limit=1"
    while query:
        page = (await admin.get(f"/v1/environments{query}")).json()
        found += [(item["name"], item["tenant"]) for item in page["items"]]
        query = page["next_cursor"] and f"?limit=1&cursor={page['next_cursor']}"
    assert found == [("a", "research"), ("b", "research"), ("b", "vision"), ("c", "default")]
    assert await tenants_seen(admin, "?name=b") == ["research", "vision"]
    assert (await admin.get("/v1/environments?cursor=x")).status_code == 422


async def test_a_job_that_names_one_carries_its_requirements(
    alice: httpx.AsyncClient, make: Any, job_file: Any, admin: httpx.AsyncClient
) -> None:
    environment = await make("research")
    document = job_file(run={"command": "x", "environment": {"name": "nlp"}})
    tried = await alice.post("/v1/jobs?dry_run=true", json=document)
    assert tried.json()["spec"]["run"]["environment"]["requirements"] == LINES
    job = (await alice.post("/v1/jobs", json=document)).json()
    await admin.delete(f"/v1/environments/{environment['id']}")
    shown = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    assert shown["spec"]["run"]["environment"] == {"name": "nlp", "requirements": LINES, "image": None}
    for url in ("/v1/jobs", "/v1/jobs?dry_run=true"):
        gone = await alice.post(url, json=document)
        assert gone.status_code == 422 and gone.json()["errors"][0]["field"] == "run.environment.name"
        assert "phalanx environment create nlp" in gone.json()["errors"][0]["hint"]


async def test_a_job_never_gets_another_tenants(bob: httpx.AsyncClient, make: Any, job_file: Any) -> None:
    await make("research")
    document = job_file(tenant="vision", run={"command": "x", "environment": {"name": "nlp"}})
    answer = await bob.post("/v1/jobs", json=document)
    assert answer.status_code == 422 and "research" not in answer.text
