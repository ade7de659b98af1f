"""Who may do what: tokens that do not work, roles, and tenants that do not know of each other."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.api.auth import Authenticator
from phalanx_server.api.errors import Problem
from phalanx_server.main import create_app
from phalanx_server.settings import Settings
from phalanx_server.store.tokens import revoke
from sqlalchemy import text


async def test_no_token(calls: Any) -> None:
    answer = await calls("").get("/v1/jobs")
    assert answer.status_code == 401 and answer.json()["code"] == "unauthorized"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "header", ["Basic YTpi", "Bearer", "Bearer x", "Bearer phx_zz_yy", f"Bearer phx_{'0' * 32}_secret", "Bearer phx__"]
)
async def test_a_wrong_token(calls: Any, header: str) -> None:
    answer = await calls("").get("/v1/jobs", headers={"Authorization": header})
    assert answer.status_code == 401 and answer.json()["code"] == "unauthorized"


async def test_the_right_id_with_a_wrong_secret(calls: Any, world: Any) -> None:
    wrong = world.tokens["alice"][:-1] + ("A" if world.tokens["alice"][-1] != "A" else "B")
    answer = await calls("").get("/v1/jobs", headers={"Authorization": f"Bearer {wrong}"})
    assert answer.status_code == 401


async def test_an_expired_token(calls: Any) -> None:
    answer = await calls("expired").get("/v1/jobs")
    assert answer.status_code == 401 and answer.json()["code"] == "token_expired"
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


async def test_a_revoked_token_is_trusted_no_longer_than_the_cache(world: Any) -> None:
    now_s = 0.0
    authenticator = Authenticator(world.engine, cache_s=3, clock=lambda: now_s)
    header = f"Bearer {world.tokens['alice']}"
    assert (await authenticator.credential(header)).name == "alice"
    async with world.engine.begin() as conn:
        at = (await conn.execute(text("SELECT now()"))).scalar_one()
        await revoke(conn, world.token_ids["alice"], at)
    assert (await authenticator.credential(header)).name == "alice"
    now_s = 3.1
    with pytest.raises(Problem) as refused:
        await authenticator.credential(header)
    assert refused.value.status_code == 401


ROLES = [
    # who, method, url, body, status
    ("viewer", "GET", "/v1/jobs", None, 200),
    ("viewer", "POST", "/v1/jobs", {}, 403),
    ("operator", "POST", "/v1/jobs", {}, 403),
    ("alice", "POST", "/v1/nodes/n0/cordon", None, 403),
    ("operator", "POST", "/v1/nodes/n0/cordon", None, 200),
    ("manager", "PUT", "/v1/quotas/research", {"quotas": {}}, 403),
    ("alice", "POST", "/v1/tenants", {"path": "research/nlp/x"}, 403),
    ("manager", "POST", "/v1/tenants", {"path": "research/cv"}, 201),
    ("manager", "POST", "/v1/tenants", {"path": "vision/x"}, 403),
    ("manager", "POST", "/v1/tenants", {"path": "research/q", "quotas": {"h100": {"nominal": 1}}}, 403),
    ("manager", "POST", "/v1/tenants", {"path": "research/w", "weight": 2}, 403),
    ("manager", "POST", "/v1/tenants", {"path": "research/p", "preemption": {"borrow": {"max_priority": 5}}}, 403),
    ("manager", "POST", "/v1/tenants", {"path": "research/d", "weight": 1, "preemption": {"reclaim": "any"}}, 201),
    ("manager", "POST", "/v1/tokens", {"name": "t", "role": "member", "tenant": "research/nlp"}, 201),
    ("manager", "POST", "/v1/tokens", {"name": "t", "role": "member", "tenant": "vision"}, 403),
    ("manager", "POST", "/v1/tokens", {"name": "t", "role": "admin"}, 403),
    ("alice", "GET", "/v1/tokens", None, 403),
    ("manager", "POST", "/v1/clusters", {"name": "other"}, 403),
    ("alice", "GET", "/metrics", None, 403),
    ("operator", "GET", "/metrics", None, 200),
    ("alice", "POST", "/v1/plan", {"changes": {}}, 403),
    ("operator", "POST", "/v1/plan", {"changes": {}}, 200),
    # machines' tokens work on their links, and nobody else's do
    ("agent", "GET", "/v1/jobs", None, 403),
    ("n0", "GET", "/v1/whoami", None, 403),
    ("n0", "GET", "/v1/agent/desired", None, 403),
    ("agent", "POST", "/v1/node/reports", {}, 403),
    ("admin", "GET", "/v1/agent/desired", None, 403),
    ("admin", "POST", "/v1/node/reports", {}, 403),
    ("agent", "GET", "/v1/agent/desired", None, 200),
]


@pytest.mark.parametrize(
    ("who", "method", "url", "body", "status"), ROLES, ids=[f"{r[0]} {r[1]} {r[2]}" for r in ROLES]
)
async def test_roles(calls: Any, who: str, method: str, url: str, body: Any, status: int) -> None:
    answer = await calls(who).request(method, url, **({"json": body} if body is not None else {}))
    assert answer.status_code == status, answer.text


async def test_another_tenants_job_does_not_exist(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, calls: Any, job_file: Any
) -> None:
    job = (await alice.post("/v1/jobs", json=job_file())).json()["id"]
    for path in ("", "/events", "/attempts", "/explain", "/logs", "/metrics", "/events?follow=true"):
        theirs = await bob.get(f"/v1/jobs/{job}{path}")
        never = await bob.get(f"/v1/jobs/job_{'0' * 32}{path}")
        assert theirs.status_code == never.status_code == 404, path
        assert theirs.json()["code"] == never.json()["code"] == "not_found"
    for verb in ("cancel", "hold", "release"):
        assert (await bob.post(f"/v1/jobs/{job}/{verb}")).status_code == 404
    assert (await bob.get("/v1/jobs")).json()["items"] == []
    assert (await bob.get("/v1/queue")).json()["items"] == []
    assert (await bob.get("/v1/jobs?tenant=research/nlp")).status_code == 404
    assert (await calls("manager").get(f"/v1/jobs/{job}")).status_code == 200, "a role reaches down the tree"


async def test_a_tenant_sees_its_own_subtree_only(calls: Any) -> None:
    paths = {
        who: [t["path"] for t in (await calls(who).get("/v1/tenants")).json()["items"]] for who in ("manager", "bob")
    }
    assert paths == {"manager": ["research", "research/nlp"], "bob": ["vision"]}
    assert (await calls("bob").get("/v1/tenants/research")).status_code == 404
    assert (await calls("alice").get("/v1/quotas/research")).status_code == 404, "not even the tenant above"


async def test_whoami(alice: httpx.AsyncClient) -> None:
    me = (await alice.get("/v1/whoami")).json()
    assert me["role"] == "member" and me["tenant"] == "research/nlp" and me["name"] == "alice"


async def test_metrics_may_be_made_public(settings: Settings, world: Any) -> None:
    app: FastAPI = create_app(settings.model_copy(update={"metrics_public": True}))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://phalanx")
    async with app.router.lifespan_context(app), client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200 and 'phalanx_jobs{state="queued"} 0.0' in answer.text


async def test_metrics_name_routes_by_template(admin: httpx.AsyncClient) -> None:
    await admin.get(f"/v1/jobs/job_{'0' * 32}")
    await admin.get("/v1/no/such/route")
    metrics = (await admin.get("/metrics")).text
    assert 'phalanx_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 1.0' in metrics
    assert 'route="unmatched"' in metrics and "no/such" not in metrics
