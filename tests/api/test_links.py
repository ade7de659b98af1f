"""The links of agent and node runners, and code bundles: what comes in over HTTP, who may send it, what goes back."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import httpx
import pytest
from phalanx_server.store import ids

NODE = {
    "name": "n0",
    "ray_node_id": "ray-n0",
    "gpu_type": "h100",
    "gpus": 8,
    "cpus": 64,
    "memory_bytes": 1 << 39,
    "address": "10.0.0.1",
}


def inventory(instance: str = "a1", *nodes: dict[str, Any]) -> dict[str, Any]:
    return {"instance": instance, "sent_at": time.time(), "nodes": list(nodes), "protocol": 1}


@pytest.fixture
async def agent(calls: Any) -> httpx.AsyncClient:
    return calls("agent")


async def test_an_inventory_gets_ids_and_tokens(agent: httpx.AsyncClient, admin: httpx.AsyncClient, world: Any) -> None:
    answer = await agent.put("/v1/agent/nodes", json=inventory("a1", NODE, NODE | {"name": "n2"}))
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["node_ids"]["n0"] == ids.encode("node", world.nodes["n0"])
    assert told["fence_s"] == 60 and told["heartbeat_s"] == 2
    assert set(told["node_tokens"]) == {"n0", "n2"}
    alive = {node["name"]: node["alive"] for node in (await admin.get("/v1/nodes")).json()["items"]}
    assert alive == {"n0": True, "n1": False, "n2": True}
    report = {"boot": "b1", "seq": 1, "sent_at": time.time()}
    runner = {"Authorization": f"Bearer {told['node_tokens']['n2']}"}
    assert (await agent.post("/v1/node/reports", json=report, headers=runner)).json()["accepted_seq"] == 1


async def test_a_replaced_agent_is_told(agent: httpx.AsyncClient) -> None:
    await agent.put("/v1/agent/nodes", json=inventory("a1"))
    await agent.put("/v1/agent/nodes", json=inventory("a2"))
    for method, url, body in (
        ("PUT", "/v1/agent/nodes", inventory("a1")),
        ("POST", "/v1/agent/reports", {"instance": "a1", "sent_at": time.time(), "facts": []}),
    ):
        answer = await agent.request(method, url, json=body)
        assert answer.status_code == 409 and answer.json()["code"] == "superseded"


async def test_a_message_that_does_not_fit_names_the_field(agent: httpx.AsyncClient) -> None:
    answer = await agent.put("/v1/agent/nodes", json=inventory("a1", NODE | {"gpus": "eight"}))
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "nodes[0].gpus"
    answer = await agent.put("/v1/agent/nodes", content=b"{oops", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["code"] == "invalid_json"
    newer = await agent.put("/v1/agent/nodes", json=inventory("a1") | {"colour": "red"})
    assert newer.status_code == 200, "what a newer agent adds is ignored"


async def test_whether_ranks_have_users_of_their_own_is_shown(
    agent: httpx.AsyncClient, admin: httpx.AsyncClient
) -> None:
    for own_users in (True, False):
        await agent.put("/v1/agent/nodes", json=inventory("a1", NODE | {"own_users": own_users}))
        assert (await admin.get("/v1/nodes/n0")).json()["own_users"] is own_users


async def test_a_fact_about_an_unknown_attempt_is_refused_alone(agent: httpx.AsyncClient) -> None:
    fact = {"attempt_id": ids.encode("attempt", ids.new_id()), "epoch": 1, "kind": "started", "at": time.time()}
    body = {"instance": "a1", "sent_at": time.time(), "facts": [fact]}
    answer = await agent.post("/v1/agent/reports", json=body)
    assert answer.status_code == 200 and answer.json()["refused"][0]["reason"] == "unknown_attempt"


async def test_a_node_report_is_taken_once(calls: Any, admin: httpx.AsyncClient) -> None:
    runner = calls("n0")
    beat = {"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": True}
    report = {"boot": "b1", "seq": 3, "sent_at": time.time() - 60, "heartbeat": beat}
    assert (await runner.post("/v1/node/reports", json=report)).json()["accepted_seq"] == 3
    assert (await runner.post("/v1/node/reports", json=report | {"seq": 2})).json()["accepted_seq"] == 3
    node = (await admin.get("/v1/nodes/n0")).json()
    assert node["warm_ready"] and node["last_seen_at"] and node["stats"]["cpu_utilization"] == 0.5
    assert node["clock_skew_s"] == pytest.approx(60, abs=5), "the clocks' difference is shown"


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("metrics", '{PART, "step": 1, "values": {"\\ud800": 1.0}}'),
        ("metrics", '{PART, "step": 1}'),
        ("metrics", "7"),
        ("marks", '{PART, "kind": "note", "data": {"message": "\\udfff"}}'),
        (
            "marks",
            f'{{PART, "kind": "note", "data": {"[" * 5000}{"]" * 5000}}}'.replace('"data": ', '"data": {"a": ') + "}",
        ),
        ("logs", '{PART, "stream": "stdout", "offset": "0", "data": ""}'),
    ],
    ids=["half a name", "no values", "no object", "half a character", "deep", "another type"],
)
async def test_a_part_that_does_not_read_costs_only_itself(
    calls: Any, admin: httpx.AsyncClient, kind: str, bad: str
) -> None:
    name = ids.encode("attempt", ids.new_id())
    part = f'"attempt_id": "{name}", "epoch": 1, "rank": 0, "at": {time.time()}'
    beat = '{"attempts": [], "stats": {"cpu_utilization": 0.5, "memory_bytes": 1}, "warm_ready": true}'
    good = {"metrics": '{PART, "step": 1, "values": {}}', "marks": '{PART, "kind": "x"}'}
    parts = {"metrics": [good["metrics"]], "marks": [good["marks"]], "logs": []}
    parts[kind] = [bad, *parts[kind]]
    lists = ", ".join(f'"{each}": [{", ".join(given)}]' for each, given in parts.items()).replace("PART", part)
    body = f'{{"boot": "b1", "seq": 1, "sent_at": {time.time()}, "heartbeat": {beat}, {lists}}}'
    answer = await calls("n0").post("/v1/node/reports", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["refused"] == [{"attempt_id": name, "epoch": 1, "reason": "unknown_attempt"}], "it was read"
    assert (await admin.get("/v1/nodes/n0")).json()["warm_ready"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"boot": "b1", "seq": 1, "sent_at": 1, "metrics": [', 400),
        ("[]", 422),
        ('{"boot": "b1", "seq": 1, "sent_at": 1, "metrics": 5}', 422),
        ('{"boot": "b1", "seq": 0, "sent_at": 1, "metrics": [5]}', 422),
        ('{"boot": "b1", "sent_at": 1}', 422),
    ],
    ids=["cut off", "a list", "no list", "no such number", "no number"],
)
async def test_a_report_whose_frame_does_not_read_is_refused(calls: Any, body: str, status: int) -> None:
    answer = await calls("n0").post("/v1/node/reports", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text


async def test_a_report_of_more_than_4_mib_is_refused(calls: Any) -> None:
    report = {"boot": "b1", "seq": 1, "sent_at": time.time(), "logs": [], "x": "x" * (4 << 20)}
    answer = await calls("n0").post("/v1/node/reports", json=report)
    assert answer.status_code == 413 and answer.json()["code"] == "body_too_large"


async def test_desired_answers_at_once_when_it_differs(agent: httpx.AsyncClient) -> None:
    first = (await agent.get("/v1/agent/desired?wait_s=20")).json()
    assert first["attempts"] == [] and first["version"]
    same = (await agent.get(f"/v1/agent/desired?version={first['version']}&wait_s=0.05")).json()
    assert same["version"] == first["version"]
    assert (await agent.get("/v1/agent/desired?wait_s=21")).status_code == 422
    assert (await agent.get("/v1/agent/desired?wait_s=nan")).status_code == 422


# ------------------------------------------------------------------ bundles

BUNDLE = b"\x1f\x8b" + b"code" * 1000
DIGEST = hashlib.sha256(BUNDLE).hexdigest()


async def test_a_bundle_is_uploaded_once_per_tenant(alice: httpx.AsyncClient, bob: httpx.AsyncClient) -> None:
    url = f"/v1/bundles/{DIGEST}"
    assert (await alice.head(url)).status_code == 404
    first = await alice.put(url, content=BUNDLE)
    assert first.status_code == 201, first.text
    assert first.json() == {"sha256": DIGEST, "tenant": "research/nlp", "bytes": len(BUNDLE)}
    assert (await alice.put(url, content=BUNDLE)).status_code == 200
    assert (await alice.head(url)).status_code == 200
    assert (await bob.head(url)).status_code == 404, "another tenant does not learn of it"
    assert (await alice.head(url, params={"tenant": "vision"})).status_code == 422
    job = {"name": "x", "resources": {"gpus": 1}, "run": {"command": "x", "bundle": DIGEST}}
    assert (await alice.post("/v1/jobs", json=job)).status_code == 201
    assert (await bob.post("/v1/jobs", json=job)).status_code == 422


@pytest.mark.parametrize(
    ("digest", "body", "status"),
    [
        (DIGEST, BUNDLE[:-1], 422),
        ("0" * 64, BUNDLE, 422),
        ("xyz", BUNDLE, 422),
        (DIGEST, b"", 422),
        (DIGEST, b"PK", 422),
    ],
    ids=["cut off", "another digest", "no digest", "nothing", "no gzip"],
)
async def test_a_wrong_bundle_is_refused(alice: httpx.AsyncClient, digest: str, body: bytes, status: int) -> None:
    assert (await alice.put(f"/v1/bundles/{digest}", content=body)).status_code == status
    assert (await alice.head(f"/v1/bundles/{DIGEST}")).status_code == 404


async def test_a_bundle_over_the_limit_is_refused_while_it_streams(app: Any, alice: httpx.AsyncClient) -> None:
    async def endless() -> Any:
        for _ in range(9):
            yield b"\x1f\x8b" + b"x" * (1 << 20)

    answer = await alice.put(f"/v1/bundles/{DIGEST}", content=endless())
    assert answer.status_code == 413


async def test_a_runner_fetches_the_code_of_its_own_attempts_only(
    alice: httpx.AsyncClient, calls: Any, world: Any
) -> None:
    await alice.put(f"/v1/bundles/{DIGEST}", content=BUNDLE)
    job = {"name": "x", "resources": {"gpus": 1}, "run": {"command": "x", "bundle": DIGEST}}
    job_id = ids.parse("job", (await alice.post("/v1/jobs", json=job)).json()["id"])
    attempt = ids.new_id()
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql(
            "INSERT INTO attempts (id, job_id, cluster_id, number, epoch, gpu_type, replicas, created_at)"
            f" VALUES ('{attempt}', '{job_id}', '{world.cluster}', 1, 1, 'h100', 1, now())"
        )
        await conn.exec_driver_sql(
            f"INSERT INTO placements VALUES ('{attempt}', '{world.nodes['n0']}', 0, 1, '{{0}}', 0, 1, 0, 0)"
        )
    url = f"/v1/node/bundles/{DIGEST}"
    name = ids.encode("attempt", attempt)
    fetched = await calls("n0").get(url, params={"attempt_id": name})
    assert fetched.status_code == 200 and fetched.content == BUNDLE
    assert fetched.headers["content-length"] == str(len(BUNDLE))
    other = ids.encode("attempt", ids.new_id())
    assert (await calls("n0").get(url, params={"attempt_id": other})).status_code == 404
    assert (await calls("n0").get(f"/v1/node/bundles/{'0' * 64}", params={"attempt_id": name})).status_code == 404
    desired = (await calls("agent").get("/v1/agent/desired")).json()["attempts"]
    assert [(each["attempt_id"], each["launch"]["bundle"]) for each in desired] == [(name, DIGEST)]
