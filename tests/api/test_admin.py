"""Tenants, quotas, tokens, clusters and nodes: made, changed under If-Match, and told apart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from phalanx_server.store import ids
from phalanx_server.store.schema import attempts, jobs, placements
from sqlalchemy import insert, update


async def test_a_tenant_is_created_once(admin: httpx.AsyncClient) -> None:
    body = {"path": "research/cv", "weight": 2, "quotas": {"h100": {"nominal": 4, "borrowing_limit": 2}}}
    headers = {"Idempotency-Key": "t1"}
    made = await admin.post("/v1/tenants", json=body, headers=headers)
    assert made.status_code == 201, made.text
    tenant = made.json()
    assert tenant["parent"] == "research" and tenant["weight"] == 2 and tenant["id"].startswith("ten_")
    assert tenant["quotas"] == {"h100": {"nominal": 4, "borrowing_limit": 2, "lending_limit": None}}
    again = await admin.post("/v1/tenants", json=body, headers=headers)
    assert again.json() == tenant and again.headers["idempotency-replayed"] == "true"
    assert (await admin.post("/v1/tenants", json=body)).json()["code"] == "conflict"
    shown = await admin.get("/v1/tenants/research%2Fcv")
    assert shown.json() == tenant and shown.headers["etag"] == made.headers["etag"] == f'"{tenant["version"]}"'


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"path": "No Spaces"}, "path"),
        ({"path": "nowhere/x"}, "path"),
        ({"path": "x", "weight": -1}, "weight"),
        ({"path": "x", "weight": 2e6}, "weight"),
        ({"path": "x", "preemption": {"reclaim": "all"}}, "preemption.reclaim"),
        ({"path": "x", "preemption": {"reclaims": "any"}}, "preemption.reclaims"),
        ({"path": "x", "quotas": {"h100": {"nominal": -1}}}, "quotas.h100.nominal"),
        ({"path": "x", "quotas": {"h100": {"nominal": 1 << 60}}}, "quotas.h100.nominal"),
        ({}, "path"),
    ],
)
async def test_a_wrong_tenant_is_named(admin: httpx.AsyncClient, body: Any, field: str) -> None:
    answer = await admin.post("/v1/tenants", json=body)
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text
    assert (await admin.get("/v1/tenants/x")).status_code == 404, "nothing was created"


async def test_quotas_change_under_if_match(admin: httpx.AsyncClient) -> None:
    url = "/v1/quotas/research"
    read = await admin.get(url)
    assert read.json()["quotas"]["h100"]["nominal"] == 8
    body = {"quotas": {"h100": {"nominal": 16}, "cpu": {"nominal": 64}}}
    assert (await admin.put(url, json=body)).status_code == 428
    first = await admin.put(url, json=body, headers={"If-Match": read.headers["etag"]})
    assert first.status_code == 200 and first.json()["quotas"]["cpu"]["nominal"] == 64
    stale = await admin.put(url, json={"quotas": {}}, headers={"If-Match": read.headers["etag"]})
    assert stale.status_code == 412 and stale.json()["code"] == "etag_mismatch"
    odd = await admin.put(url, json={"quotas": {}}, headers={"If-Match": "x"})
    assert odd.status_code == 412
    forced = await admin.put(url, json={"quotas": {}}, headers={"If-Match": "*"})
    assert forced.status_code == 200 and forced.json()["quotas"] == {}
    assert (await admin.put("/v1/quotas/no", json=body, headers={"If-Match": "*"})).status_code == 404
    unknown = await admin.put(url, json={"quotas": {"h100": {"nominl": 1}}}, headers={"If-Match": "*"})
    assert unknown.json()["code"] == "unknown_field"


async def test_weight_changes_under_if_match(admin: httpx.AsyncClient) -> None:
    url = "/v1/tenants/research/nlp"
    etag = (await admin.get(url)).headers["etag"]
    changed = await admin.patch(url, json={"weight": 3}, headers={"If-Match": etag})
    assert changed.status_code == 200 and changed.json()["weight"] == 3 and changed.headers["etag"] != etag
    rules = await admin.patch(
        url, json={"preemption": {"reclaim": "never"}}, headers={"If-Match": changed.headers["etag"]}
    )
    assert rules.json()["preemption"] == {"reclaim": "never"} and rules.json()["weight"] == 3
    assert (await admin.patch(url, json={"weight": 1}, headers={"If-Match": etag})).status_code == 412


async def test_a_token_is_shown_once_and_can_be_revoked(admin: httpx.AsyncClient, calls: Any) -> None:
    body = {"name": "ci", "role": "member", "tenant": "vision", "user": "carol", "expires_in_s": 3600}
    headers = {"Idempotency-Key": "k"}
    made = (await admin.post("/v1/tokens", json=body, headers=headers)).json()
    assert made["token"].startswith("phx_") and made["expires_at"] and made["user"] == "carol"
    replay = await admin.post("/v1/tokens", json=body, headers=headers)
    assert replay.json() == made | {"token": None} and replay.headers["idempotency-replayed"] == "true"
    listed = (await admin.get("/v1/tokens")).json()["items"]
    assert made["token"] not in str(listed) and "hash" not in listed[0]
    client = calls("")
    client.headers["Authorization"] = f"Bearer {made['token']}"
    assert (await client.get("/v1/whoami")).json()["tenant"] == "vision"
    assert (await admin.delete(f"/v1/tokens/{made['id']}")).status_code == 204
    assert (await client.get("/v1/whoami")).status_code == 401
    assert (await admin.delete(f"/v1/tokens/tok_{'0' * 32}")).status_code == 404


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"role": "king"}, "role"),
        ({"role": "node"}, "role"),
        ({"tenant": None}, "tenant"),
        ({"tenant": "nowhere"}, "tenant"),
        ({"role": "admin"}, "tenant"),
        ({"expires_in_s": 0}, "expires_in_s"),
        ({"expires_in_s": 1e300}, "expires_in_s"),
        ({"name": ""}, "name"),
        ({"user": " "}, "user"),
    ],
)
async def test_a_wrong_token_request_is_named(admin: httpx.AsyncClient, changes: Any, field: str) -> None:
    answer = await admin.post("/v1/tokens", json={"name": "t", "role": "member", "tenant": "vision"} | changes)
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field, answer.text


async def test_lists_of_tokens_have_pages(admin: httpx.AsyncClient, world: Any) -> None:
    page = (await admin.get("/v1/tokens?limit=3")).json()
    rest = (await admin.get(f"/v1/tokens?limit=500&cursor={page['next_cursor']}")).json()
    found = [token["name"] for token in page["items"] + rest["items"]]
    assert len(found) == len(set(found)) and set(found) == set(world.tokens) - {"n0"}, "no node tokens"


async def test_a_cluster_comes_with_its_agents_token(admin: httpx.AsyncClient, calls: Any) -> None:
    made = (await admin.post("/v1/clusters", json={"name": "east"})).json()
    client = calls("")
    client.headers["Authorization"] = f"Bearer {made['token']}"
    assert (await client.get("/v1/agent/desired")).json()["attempts"] == []
    assert [cluster["name"] for cluster in (await admin.get("/v1/clusters")).json()["items"]] == ["east", "main"]
    assert (await admin.post("/v1/clusters", json={"name": "east"})).status_code == 409
    assert (await admin.post("/v1/clusters", json={"name": "No"})).status_code == 422


async def test_nodes_by_id_or_name_and_their_states(admin: httpx.AsyncClient, world: Any) -> None:
    n0 = (await admin.get("/v1/nodes/n0")).json()
    assert n0["gpus"] == 8 and n0["gpus_used"] == 0 and n0["state"] == "ready" and n0["warm_ready"] is False
    assert (await admin.get(f"/v1/nodes/{n0['id']}")).json() == n0
    assert (await admin.get("/v1/nodes/n9")).status_code == 404
    states = [(await admin.post(f"/v1/nodes/n0/{verb}")).json()["state"] for verb in ("cordon", "drain", "uncordon")]
    assert states == ["cordoned", "draining", "ready"]
    page = (await admin.get("/v1/nodes?limit=1")).json()
    assert [node["name"] for node in page["items"]] == ["n0"]
    rest = (await admin.get(f"/v1/nodes?cursor={page['next_cursor']}")).json()
    assert [node["name"] for node in rest["items"]] == ["n1"] and rest["next_cursor"] is None
    audit = "SELECT actor, action, request_id FROM audit ORDER BY id"
    async with world.engine.connect() as conn:
        rows = list(await conn.exec_driver_sql(audit))
    assert [(row.actor, row.action) for row in rows] == [("admin (token)", f"node.{state}") for state in states]
    assert all(row.request_id for row in rows)


async def test_a_name_that_two_clusters_use_has_to_be_an_id(admin: httpx.AsyncClient, world: Any) -> None:
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql("INSERT INTO clusters (id, name) VALUES (gen_random_uuid(), 'east');")
        await conn.exec_driver_sql(
            "INSERT INTO nodes (id, cluster_id, name, ray_node_id, gpu_type, gpus, cpus, memory_bytes, address)"
            " SELECT gen_random_uuid(), id, 'n0', 'r', '', 0, 1, 1, 'a' FROM clusters WHERE name = 'east'"
        )
    answer = await admin.get("/v1/nodes/n0")
    assert answer.status_code == 409 and "east" in answer.json()["detail"]


async def test_a_drain_says_what_will_not_leave_and_until_when(
    admin: httpx.AsyncClient, calls: Any, world: Any, job_file: Any
) -> None:
    """To each caller of the jobs that they may see; and the node's view says it again."""
    stays = {"preemption": {"preemptible": False, "grace": "10s"}}
    wanted = (
        ("not_preemptible", stays | {"time_limit": "1h"}),
        ("not_preemptible", stays),
        ("min_runtime", {"preemption": {"min_runtime": "1h"}, "time_limit": "2h"}),
        ("no_room", {"tenant": "vision"}),
    )
    assert (await admin.post("/v1/nodes/n0/drain")).json()["outlook"] == "Nothing is left there."
    await admin.post("/v1/nodes/n0/uncordon")
    made = []
    for _, fields in wanted:
        job = (await admin.post("/v1/jobs", json=job_file(**fields))).json()["id"]
        await world.place(job)
        made.append(job)
    started = datetime.now(UTC).replace(microsecond=0)
    async with world.engine.begin() as conn:
        await conn.execute(update(attempts).values(started_at=started, state="running", grace_s=10))
    assert (await admin.get("/v1/nodes/n0")).json()["remaining"] == [], "it is not draining"
    answer = (await admin.post("/v1/nodes/n0/drain")).json()
    assert [(each["job"], each["why"]) for each in answer["remaining"]] == [
        (job, why) for job, (why, _) in zip(made, wanted, strict=True)
    ]
    ends = [each["ends_by"] and datetime.fromisoformat(each["ends_by"]) - started for each in answer["remaining"]]
    assert ends == [timedelta(seconds=3610), None, timedelta(seconds=7210), None]
    assert answer["outlook"].startswith(
        "2 jobs are not preemptible and run on, 1 without a time limit. 1 job moves after"
    )
    assert "It may not empty by itself" in answer["outlook"]
    assert (await admin.get("/v1/nodes/n0")).json() == answer
    assert (await admin.get("/v1/nodes")).json()["items"][0] == answer
    bobs = (await calls("bob").get("/v1/nodes/n0")).json()
    assert [each["job"] for each in bobs["remaining"]] == made[3:] and bobs["outlook"] is None


async def test_the_end_that_a_drain_tells_counts_earlier_attempts_and_the_default_limit(
    admin: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    """As the loop counts that enforces limits. A lost attempt may not be told to end: nobody can stop it."""
    version = (await admin.get("/v1/policy")).headers["etag"]
    await admin.put("/v1/policy", json={"settings": {"default_time_limit_s": 900}}, headers={"If-Match": version})
    started = datetime.now(UTC).replace(microsecond=0)
    past = {"started_at": started - timedelta(seconds=400), "ended_at": started - timedelta(seconds=100)}
    past |= {"created_at": past["started_at"], "released_at": past["ended_at"]}
    for state, fields in (("running", {"time_limit": "1h"}), ("running", {}), ("lost", {"time_limit": "1h"})):
        job = (await admin.post("/v1/jobs", json=job_file(**fields))).json()["id"]
        attempt = ids.parse("attempt", await world.place(job))
        number = {"job_id": ids.parse("job", job), "cluster_id": world.cluster, "epoch": 2, "gpu_type": "h100"}
        first = number | {"id": ids.new_id(), "number": 1, "replicas": 1, "state": "ended", "outcome": "preempted"}
        async with world.engine.begin() as conn:
            running = {"started_at": started, "state": state, "grace_s": 10, "number": 2}
            running |= {"ended_at": started, "outcome": "node_lost"} if state == "lost" else {}
            await conn.execute(update(attempts).where(attempts.c.id == attempt).values(running))
            await conn.execute(insert(attempts).values(first | past))
            await conn.execute(update(jobs).where(jobs.c.id == number["job_id"]).values(attempts=2))
    remaining = (await admin.post("/v1/nodes/n0/drain")).json()["remaining"]
    ends = [each["ends_by"] and datetime.fromisoformat(each["ends_by"]) - started for each in remaining]
    assert ends == [timedelta(seconds=3600 - 300 + 10), timedelta(seconds=900 - 300 + 10), None]


async def test_what_a_draining_node_holds_for_others_is_told_to_nobody_else(
    admin: httpx.AsyncClient, calls: Any, world: Any, job_file: Any
) -> None:
    """Nor is it said to be empty, be it that no GPU is used."""
    await world.place((await admin.post("/v1/jobs", json=job_file())).json()["id"])
    await admin.post("/v1/nodes/n0/drain")
    for gpus in ([0], []):
        async with world.engine.begin() as conn:
            await conn.execute(update(placements).values(gpu_indices=gpus))
        bobs = (await calls("bob").get("/v1/nodes/n0")).json()
        assert (bobs["remaining"], bobs["outlook"], bobs["gpus_used"]) == ([], None, len(gpus))
