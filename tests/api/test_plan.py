"""`POST /v1/plan`: the live scheduler's own pass, asked what it would do."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from fastapi import FastAPI
from phalanx_server.api import what_if
from phalanx_server.store import ids


async def test_jobs_of_ones_own(alice: httpx.AsyncClient, admin: httpx.AsyncClient, job_file: Any) -> None:
    theirs = (await admin.post("/v1/jobs", json=job_file(tenant="vision"))).json()["id"]
    own = (await alice.post("/v1/jobs", json=job_file())).json()["id"]
    answer = await alice.post("/v1/plan", json={"jobs": [job_file(), job_file(resources={"gpus": 1})]})
    assert answer.status_code == 200, answer.text
    new, plan = answer.json()["jobs"], answer.json()["plan"]
    decided = {row["job"] for kind in plan.values() for row in kind}
    assert decided == {own, *new} and theirs not in decided
    assert all(item["node"].startswith("node_") for start in plan["starts"] for item in start["placement"])
    assert len((await alice.get("/v1/jobs")).json()["items"]) == 1, "nothing was stored"


async def test_nothing_given_is_the_next_pass(admin: httpx.AsyncClient, job_file: Any) -> None:
    job = (await admin.post("/v1/jobs", json=job_file())).json()["id"]
    plan = (await admin.post("/v1/plan", json={})).json()["plan"]
    assert [start["job"] for start in plan["starts"]] == [job]


async def test_changes_to_live_state(admin: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    job = (await admin.post("/v1/jobs", json=job_file())).json()["id"]
    gone = {"removed_nodes": [ids.encode("node", node) for node in world.nodes.values()]}
    (hold,) = (await admin.post("/v1/plan", json={"changes": gone})).json()["plan"]["holds"]
    assert hold["job"] == job and hold["reason"] == "impossible"
    wrong = await admin.post("/v1/plan", json={"changes": {"removed_node": []}})
    assert wrong.status_code == 422 and "removed_nodes" in wrong.json()["detail"]
    both = await admin.post("/v1/plan", json={"changes": {}, "jobs": []})
    assert both.status_code == 422


async def test_a_new_job_a_quota_and_a_drained_node_at_once(
    admin: httpx.AsyncClient, alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    quotas = {"research": {"h100": {"nominal": 0, "borrowing_limit": 0}}}
    asked = {"jobs": [job_file(name="new")], "nodes": {"n0": "draining"}}
    plan = (await admin.post("/v1/plan", json=asked)).json()
    (new,) = plan["jobs"]
    assert plan["names"][new] == "new"
    assert not {item["node"] for start in plan["plan"]["starts"] for item in start["placement"]} & {
        ids.encode("node", world.nodes["n0"])
    }
    without = (await admin.post("/v1/plan", json={"jobs": [job_file(name="new")], "quotas": quotas})).json()
    (hold,) = [row for row in without["plan"]["holds"] if row["job"] == without["jobs"][0]]
    assert hold["reason"] in ("quota", "impossible")
    for wrong, field in (({"quotas": {"nobody": {}}}, "quotas"), ({"changes": {}, "nodes": {}}, "changes")):
        refused = await admin.post("/v1/plan", json=wrong)
        assert refused.status_code == 422 and refused.json()["errors"][0]["field"] == field
    assert (await admin.post("/v1/plan", json={"nodes": {"nowhere": "draining"}})).status_code == 404
    assert (await alice.post("/v1/plan", json={"nodes": {"n0": "draining"}})).status_code == 403


async def test_a_given_snapshot(admin: httpx.AsyncClient) -> None:
    snapshot = {
        "now": 0,
        "tenants": [{"name": "t"}],
        "nodes": [{"name": "n", "gpu_type": "h100", "gpus": 8}],
        "jobs": [
            {"id": "a", "tenant": "t", "replicas": 1, "gpus_per_replica": 8, "submitted_at": 0, "state": "queued"},
            {"id": "b", "tenant": "t", "replicas": 1, "gpus_per_replica": 8, "submitted_at": 1, "state": "queued"},
        ],
    }
    plan = (await admin.post("/v1/plan", json={"snapshot": snapshot})).json()["plan"]
    assert [start["job"] for start in plan["starts"]] == ["a"] and [hold["job"] for hold in plan["holds"]] == ["b"]
    wrong = await admin.post("/v1/plan", json={"snapshot": snapshot | {"nwo": 1}})
    assert wrong.status_code == 422 and wrong.json()["errors"][0]["field"] == "snapshot"


async def test_a_wrong_job_is_named(alice: httpx.AsyncClient, job_file: Any) -> None:
    answer = await alice.post("/v1/plan", json={"jobs": [job_file(), job_file(tenant="vision")]})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "jobs[1].tenant"


async def test_too_many_questions_at_once_are_put_off(app: FastAPI, admin: httpx.AsyncClient, monkeypatch: Any) -> None:
    monkeypatch.setattr(what_if, "MOST_WAITING", 2)
    questions = app.state.services.what_if
    await questions._turn.acquire()
    waiting = [asyncio.create_task(admin.post("/v1/plan", json={})) for _ in range(2)]
    while questions._waiting < 2:  # noqa: ASYNC110 - nothing tells when a request waits
        await asyncio.sleep(0.01)
    refused = await admin.post("/v1/plan", json={})
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    questions._turn.release()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]
