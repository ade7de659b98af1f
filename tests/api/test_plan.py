"""`POST /v1/plan`: the live scheduler's own pass, asked what it would do."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from phalanx_server.api import what_if
from phalanx_server.domain.access import covers
from phalanx_server.domain.reason import Reserved, WaitsForVictims
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling import snapshot as parts
from phalanx_server.scheduling.plan import HoldGroup, Migration, Plan, Preemption, Resize
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


@pytest.mark.parametrize(
    ("resource", "said"),
    [
        ("h10", "there is no resource h10; did you mean h100? (known: "),
        ("gpus", "there is no resource gpus (known: "),
        ("memory", "there is no resource memory; did you mean memory_gib? (known: "),
    ],
)
async def test_a_quota_of_what_no_node_has_is_refused_with_what_there_is(
    admin: httpx.AsyncClient, resource: str, said: str
) -> None:
    refused = await admin.post("/v1/plan", json={"quotas": {"research": {resource: {"nominal": 3}}}})
    (error,) = refused.json()["errors"]
    assert refused.status_code == 422 and error["field"] == "quotas"
    assert error["message"].startswith(said) and "cpu, h100, memory_gib" in error["message"]


async def test_quotas_of_processors_and_memory_can_be_asked_for(admin: httpx.AsyncClient) -> None:
    quotas = {"research": {"cpu": {"nominal": 3}, "memory_gib": {"nominal": 64}}}
    assert (await admin.post("/v1/plan", json={"quotas": quotas})).status_code == 200


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


def _job(id_: str, tenant: str) -> parts.Job:
    return parts.Job(id=id_, tenant=tenant, replicas=1, gpus_per_replica=1, submitted_at=0.0, state="queued")


@pytest.mark.parametrize("caller", ["research/nlp", "research", None])
def test_a_plan_names_no_job_that_the_caller_does_not_see(caller: str | None) -> None:
    own, below, theirs, waits, reserved = (f"{number:032x}" for number in range(1, 6))
    whose = {
        own: "research/nlp",
        below: "research/nlp/deep",
        theirs: "vision",
        waits: "research/nlp",
        reserved: "vision",
    }
    node = f"{9:032x}"
    place = (parts.PlacementItem(node, 1),)
    plan = Plan(
        preemptions=(Preemption(own, theirs, "reclaim", 1.0), Preemption(theirs, own, "reclaim", 1.0)),
        resizes=(Resize(own, theirs, 1, place), Resize(below, own, 1, place)),
        migrations=(Migration(own, theirs, place), Migration(below, None, place)),
        hold_groups=(
            HoldGroup((waits,), WaitsForVictims((own, below, theirs), 1.0), parts.Seat(placement=place)),
            HoldGroup((waits,), Reserved((theirs,))),
            HoldGroup((reserved,), Reserved((own,))),
        ),
    )
    snapshot = parts.Snapshot(now=0.0, jobs=tuple(_job(*pair) for pair in whose.items()))
    outcome = what_if.Outcome(plan, snapshot)
    document = what_if.plan_document(outcome, lambda tenant: covers(caller, tenant))
    if caller is None:
        assert theirs in str(document) and document["preemptions"][0]["for"] == f"job_{theirs}"
        return
    assert theirs not in str(document) and reserved not in str(document)
    assert [row["for"] for row in document["preemptions"]] == [None]
    assert [row["for"] for row in document["resizes"]] == [None, f"job_{own}"]
    assert [row["for"] for row in document["migrations"]] == [None, None]
    victims, kept = document["holds"]
    assert victims["message"] == f"waits for job_{own}, job_{below} and 1 job of another tenant to stop"
    assert victims["kept"]["placement"] == [{"node": f"node_{node}", "replicas": 1}], "as in every placement"
    assert kept["message"] == "what it needs is kept for 1 job of another tenant"
    assert kept["unblocks"] == ["1 job of another tenant starts and leaves enough"]
    hold = what_if.hold_of(outcome, waits, lambda tenant: covers(caller, tenant))
    assert hold is not None and theirs not in hold.message


async def test_who_waits_behind_another_tenants_job_is_told_no_id_of_it(
    app: FastAPI, admin: httpx.AsyncClient, alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    """Some of a node runs, a job of another tenant waits for all of it, and what is left is kept for that one."""
    now = datetime.now(UTC)
    nodes = len(world.nodes)
    leader = Leader(world.engine, holder="test", ttl_s=60, renew_s=20)
    await leader.tick(now)
    loop = ScheduleLoop(world.engine, leader, policy=parts.Policy())
    running = job_file(tenant="vision", resources={"replicas": nodes, "gpus_per_replica": 4}, time_limit="1h")
    (await admin.post("/v1/jobs", json=running)).raise_for_status()
    await loop.tick(now)
    large = job_file(tenant="vision", resources={"replicas": nodes, "gpus_per_replica": 8})
    ahead = (await admin.post("/v1/jobs", json=large)).json()["id"]
    await loop.tick(now)
    small = job_file(resources={"gpus": 4})
    mine = (await alice.post("/v1/jobs", json=small)).json()["id"]
    await loop.tick(now)
    answers = [
        await alice.get(f"/v1/jobs/{mine}"),
        await alice.get(f"/v1/jobs/{mine}/explain"),
        await alice.get("/v1/queue"),
        await alice.post("/v1/plan", json={"jobs": [small]}),
        await alice.post("/v1/jobs?dry_run=true", json=small),
    ]
    for answer in answers:
        assert answer.is_success and ahead not in answer.text and "1 job of another tenant" in answer.text, answer.text
    operators = (await admin.post("/v1/plan", json={})).json()["plan"]["holds"]
    assert any(ahead in hold["message"] for hold in operators)
