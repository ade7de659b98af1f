"""Maintenance windows over HTTP: who may, what is refused and why, and what everybody sees."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from phalanx_server.store import ids
from phalanx_server.store.schema import audit, clusters, nodes
from sqlalchemy import insert, select, update

START = datetime(2030, 5, 1, 8, tzinfo=UTC)


def window(**changes: Any) -> dict[str, Any]:
    times = {"starts_at": "2030-05-01T08:00:00Z", "ends_at": "2030-05-01T12:00:00+02:00"}
    return {"nodes": ["n0"], "reason": "new kernel", **times} | changes


@pytest.fixture
async def operator(calls: Any) -> httpx.AsyncClient:
    return calls("operator")


async def made(client: httpx.AsyncClient, **changes: Any) -> dict[str, Any]:
    answer = await client.post("/v1/maintenance", json=window(**changes))
    assert answer.status_code == 201, answer.text
    return answer.json()


async def test_an_operator_declares_one_and_everybody_sees_it(
    operator: httpx.AsyncClient, alice: httpx.AsyncClient, world: Any
) -> None:
    created = await made(operator)
    assert created["id"].startswith("mnt_") and created["state"] == "planned"
    assert (created["nodes"], created["labels"], created["covers"]) == (["n0"], {}, 1)
    assert (created["starts_at"], created["ends_at"]) == ("2030-05-01T08:00:00Z", "2030-05-01T10:00:00Z")
    assert created["created_by"] == "operator (token)"
    (seen,) = (await alice.get("/v1/maintenance")).json()["items"]
    assert seen == created | {"created_by": None}, "who works there is not the tenants' business"
    assert (await alice.get(f"/v1/maintenance/{created['id']}")).json() == seen
    async with world.engine.connect() as conn:
        (row,) = await conn.execute(select(audit))
    assert (row.action, row.target, row.actor) == ("create_maintenance", created["id"], "operator (token)")
    assert row.detail["nodes"] == ["n0"] and row.detail["ends_at"] == "2030-05-01T10:00:00+00:00"


@pytest.mark.parametrize("name", ["alice", "manager", "viewer"])
async def test_others_may_not(calls: Any, operator: httpx.AsyncClient, name: str) -> None:
    id_ = (await made(operator))["id"]
    client = calls(name)
    answers = [
        await client.post("/v1/maintenance", json=window()),
        await client.patch(f"/v1/maintenance/{id_}", json={"reason": "x"}),
        await client.post(f"/v1/maintenance/{id_}/end"),
        await client.delete(f"/v1/maintenance/{id_}"),
    ]
    assert [answer.status_code for answer in answers] == [403] * 4


async def test_it_is_changed_ended_and_deleted(admin: httpx.AsyncClient) -> None:
    now = datetime.now(UTC)
    created = await made(admin, starts_at=(now - timedelta(hours=1)).isoformat(), ends_at=START.isoformat())
    path = f"/v1/maintenance/{created['id']}"
    assert created["state"] == "open"
    changed = (await admin.patch(path, json={"nodes": ["n1", "n0"], "reason": "new disks"})).json()
    assert (changed["nodes"], changed["reason"], changed["version"]) == (["n0", "n1"], "new disks", 2)
    assert changed["ends_at"] == created["ends_at"], "what is not named stays"
    ended = (await admin.post(f"{path}/end")).json()
    assert ended["state"] == "over" and ended["ends_at"] < created["ends_at"]
    assert (await admin.post(f"{path}/end")).status_code == 409
    assert (await admin.get("/v1/maintenance")).json()["items"] == []
    assert [each["id"] for each in (await admin.get("/v1/maintenance?over=true")).json()["items"]] == [ended["id"]]
    assert (await admin.delete(path)).status_code == 204
    assert {(await admin.delete(path)).status_code, (await admin.get(path)).status_code} == {404}


async def test_an_empty_list_or_object_takes_away_what_was_there(admin: httpx.AsyncClient, world: Any) -> None:
    async with world.engine.begin() as conn:
        await conn.execute(update(nodes).where(nodes.c.name == "n1").values(labels={"rack": "r0"}))
    path = f"/v1/maintenance/{(await made(admin, labels={'rack': 'r0'}))['id']}"
    changed = (await admin.patch(path, json={"nodes": []})).json()
    assert (changed["nodes"], changed["labels"], changed["covers"]) == ([], {"rack": "r0"}, 1)
    changed = (await admin.patch(path, json={"nodes": ["n0"], "labels": {}})).json()
    assert (changed["nodes"], changed["labels"], changed["covers"]) == (["n0"], {}, 1)
    assert (await admin.patch(path, json={"nodes": []})).status_code == 422


async def test_the_same_create_sent_again_makes_no_second_one(admin: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = [await admin.post("/v1/maintenance", json=window(), headers=headers) for _ in range(2)]
    assert first.json() == again.json() and again.headers["Idempotency-Replayed"] == "true"
    assert len((await admin.get("/v1/maintenance")).json()["items"]) == 1


async def test_a_list_is_by_start_and_comes_in_pages(admin: httpx.AsyncClient) -> None:
    for hour in (7, 5, 6):
        await made(admin, starts_at=f"2030-05-01T0{hour}:00:00Z")
    first = (await admin.get("/v1/maintenance?limit=2")).json()
    rest = (await admin.get(f"/v1/maintenance?limit=2&cursor={first['next_cursor']}")).json()
    assert [each["starts_at"][12] for each in first["items"] + rest["items"]] == ["5", "6", "7"]
    assert rest["next_cursor"] is None


REFUSED = {
    "an end before the start": ({"ends_at": "2030-05-01T07:00:00Z"}, "ends_at", "is not after starts_at", "later end"),
    "an end that has passed": (
        {"starts_at": "2020-01-01T00:00:00Z", "ends_at": "2020-01-02T00:00:00Z"},
        "ends_at",
        "has passed",
        "still to come",
    ),
    "a time without a zone": ({"starts_at": "2030-05-01T08:00:00"}, "starts_at", "no time zone: end it with Z", None),
    "a node that is not there": ({"nodes": ["n1", "n00"]}, "nodes[1]", "there is no node 'n00'", "did you mean n0?"),
    "no nodes at all": ({"nodes": []}, "nodes", "no node is named, and no label", "give nodes, labels or both"),
    "a label that no node has so": ({"labels": {"rack": "r9"}}, "labels", "no node has rack=r9", "nodes have rack: r0"),
    "a label that there is not": ({"labels": {"rak": "r0"}}, "labels", "no node has rak=r0", "no node has a label rak"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refusal_names_the_field_and_what_to_do(admin: httpx.AsyncClient, world: Any, case: str) -> None:
    async with world.engine.begin() as conn:
        await conn.execute(update(nodes).where(nodes.c.name == "n0").values(labels={"rack": "r0"}))
    changes, field, message, hint = REFUSED[case]
    answer = await admin.post("/v1/maintenance", json=window(**changes))
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert (error["field"], message in error["message"]) == (field, True), error
    assert hint is None or hint in error["hint"]
    assert (await admin.get("/v1/maintenance")).json()["items"] == []


async def test_of_many_mistyped_names_the_first_are_told_and_how_many_more_there_are(admin: httpx.AsyncClient) -> None:
    """What is near is said of the first few alone: it is sought among all nodes."""
    answer = await admin.post("/v1/maintenance", json=window(nodes=["n0", *(f"n0x{n}" for n in range(500)), "n1"]))
    assert answer.status_code == 422
    *told, last = answer.json()["errors"]
    assert [each["field"] for each in told] == [f"nodes[{n}]" for n in range(1, 21)]
    assert ["hint" in each for each in told] == [True] * 3 + [False] * 17
    assert (last["field"], last["message"]) == ("nodes", "480 more name no one node")
    assert "phalanx nodes" in last["hint"]


async def test_a_change_is_checked_with_what_stays(admin: httpx.AsyncClient) -> None:
    path = f"/v1/maintenance/{(await made(admin))['id']}"
    for change, field in (({"starts_at": "2031-01-01T00:00:00Z"}, "ends_at"), ({"nodes": []}, "nodes")):
        answer = await admin.patch(path, json=change)
        assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == field
    assert (await admin.patch(path, json={"labelz": {}})).json()["code"] == "unknown_field"


async def test_a_name_that_clusters_share_needs_an_id(admin: httpx.AsyncClient, world: Any) -> None:
    other, twin = ids.new_id(), ids.new_id()
    row = {"name": "n0", "ray_node_id": "x", "gpu_type": "h100", "gpus": 8, "cpus": 1, "memory_bytes": 1}
    async with world.engine.begin() as conn:
        await conn.execute(insert(clusters).values(id=other, name="other"))
        await conn.execute(insert(nodes).values(id=twin, cluster_id=other, address="10.0.0.2", **row))
    refused = (await admin.post("/v1/maintenance", json=window())).json()["errors"][0]
    assert "several clusters have a node n0" in refused["message"] and ids.encode("node", twin) in refused["hint"]
    assert (await made(admin, nodes=[ids.encode("node", twin)]))["covers"] == 1
