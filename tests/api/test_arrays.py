"""Arrays, priorities and requeues over HTTP; what waits for others; deadlines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from phalanx_server.store import ids
from phalanx_server.store.schema import holds, jobs
from sqlalchemy import insert, update


async def submit(client: httpx.AsyncClient, document: dict[str, Any], **params: Any) -> dict[str, Any]:
    answer = await client.post("/v1/jobs", json=document, params=params)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


async def test_an_array_is_one_submit_and_one_thing_to_steer(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, job_file: Any
) -> None:
    first = await submit(alice, job_file(array={"indices": "0-4", "max_running": 2}))
    assert first["name"] == "train[0]"
    assert first["array"] == {"id": first["array"]["id"], "index": 0, "size": 5, "max_running": 2}
    url = f"/v1/arrays/{first['array']['id']}"
    array = (await alice.get(url)).json()
    assert (array["name"], array["size"], array["states"], array["ended"]) == ("train", 5, {"queued": 5}, False)
    listed = (await alice.get("/v1/jobs", params={"array": array["id"]})).json()["items"]
    assert [job["array"]["index"] for job in listed] == [4, 3, 2, 1, 0]
    queued = (await alice.get("/v1/queue")).json()["items"]
    assert [(item["name"], item["array"]["index"]) for item in queued] == [(f"train[{n}]", n) for n in range(5)]
    assert (await alice.post(f"{url}/hold")).json()["held"] == 5
    assert (await alice.post(f"{url}/release")).json()["held"] == 0
    assert (await alice.patch(url, json={"priority": "high"})).status_code == 200
    assert {job["priority"] for job in (await alice.get("/v1/jobs")).json()["items"]} == {10}
    assert (await alice.post(f"{url}/requeue")).status_code == 202, "none runs: nothing to do"
    for verb in ("", "/cancel", "/hold", "/release", "/requeue"):
        answer = await bob.request("POST" if verb else "GET", url + verb)
        assert answer.status_code == 404, "another tenant's does not exist"
    cancelled = await alice.post(f"{url}/cancel")
    assert cancelled.status_code == 202
    assert (cancelled.json()["states"], cancelled.json()["ended"]) == ({"cancelled": 5}, True)
    assert (await alice.post(f"{url}/hold")).status_code == 409
    assert (await alice.get("/v1/jobs", params={"array": "array_1"})).status_code == 404


async def test_viewers_look_at_arrays_and_do_not_steer_them(
    alice: httpx.AsyncClient, calls: Any, job_file: Any
) -> None:
    job = await submit(alice, job_file(array={"indices": "0-1"}))
    url, viewer = f"/v1/arrays/{job['array']['id']}", calls("viewer")
    assert (await viewer.get(url)).status_code == 200
    assert (await viewer.post(f"{url}/cancel")).status_code == 403
    assert (await viewer.patch(f"/v1/jobs/{job['id']}", json={"priority": 1})).status_code == 403
    assert (await viewer.post(f"/v1/jobs/{job['id']}/requeue")).status_code == 403


async def test_a_priority_is_a_class_or_a_number(alice: httpx.AsyncClient, job_file: Any) -> None:
    job = await submit(alice, job_file())
    url = f"/v1/jobs/{job['id']}"
    assert (await alice.patch(url, json={"priority": "urgent"})).json()["priority"] == 100
    assert (await alice.patch(url, json={"priority": -7})).json()["priority"] == -7
    for wrong, said in (("highest", "no priority class"), (5000, "out of range"), (True, "priority class"), (1.5, "")):
        answer = await alice.patch(url, json={"priority": wrong})
        assert answer.status_code in (400, 422), answer.text
        assert answer.json()["errors"][0]["field"] == "priority" and said in answer.json()["detail"]
    assert (await alice.patch(url, json={"prority": 1})).json()["code"] == "unknown_field"
    assert (await alice.post(f"{url}/requeue")).status_code == 409


async def test_what_a_job_waits_for_is_checked_and_told(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, job_file: Any
) -> None:
    first = await submit(alice, job_file())
    answer = await bob.post("/v1/jobs", json=job_file(tenant="vision", after={"ok": [first["id"]]}))
    assert answer.json()["errors"][0]["field"] == "after.ok[0]" and "there is no job_" in answer.json()["detail"]
    tried = await submit(alice, job_file(after={"ok": [first["id"]]}), dry_run=True)
    assert tried["would"]["hold"]["reason"] == "dependency"
    assert first["id"] in tried["would"]["hold"]["message"]
    asked = {"jobs": [job_file(after={"any": [first["id"]]})]}
    (hold,) = [h for h in (await alice.post("/v1/plan", json=asked)).json()["plan"]["holds"] if "dependency" in str(h)]
    assert hold["reason"] == "dependency"
    second = await submit(alice, job_file(name="second", after={"ok": [first["id"]]}))
    assert second["spec"]["after"] == {"ok": [first["id"]], "any": []}
    await alice.post(f"/v1/jobs/{first['id']}/cancel")
    job = (await alice.get(f"/v1/jobs/{second['id']}")).json()
    assert (job["state"], job["reason"]) == ("cancelled", "dependency_failed")
    assert job["message"] == f"dependency failed: train ({first['id']}) was cancelled"
    answer = await alice.post("/v1/jobs/batch", json={"jobs": [job_file(), job_file(after={"ok": [first["id"]]})]})
    assert answer.json()["errors"][0]["field"] == "jobs[1].after.ok[0]"


async def test_a_deadline_that_will_be_missed_is_warned_of(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    job = await submit(alice, job_file(deadline=at.isoformat()))
    assert job["warnings"] == []
    async with world.engine.begin() as conn:
        row = {"job_id": UUID(job["id"][4:]), "reason": "capacity", "message": "m", "since": at}
        await conn.execute(insert(holds).values(**row, estimated_start=at + timedelta(hours=1)))
    job = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    (warning,) = job["warnings"]
    assert warning.startswith("is expected to start at ") and "after its deadline" in warning
    assert warning in (await alice.get(f"/v1/jobs/{job['id']}/explain")).json()["text"]


async def test_levels_are_those_of_the_policy(admin: httpx.AsyncClient, job_file: Any) -> None:
    def together(**topology: Any) -> dict[str, Any]:
        return job_file(resources={"gpus": 4, "topology": topology})

    answer = await admin.post("/v1/jobs", json=together(required="rack"))
    error = answer.json()["errors"][0]
    assert (error["field"], error["hint"]) == ("resources.topology.required", "the levels are node")
    settings = {"topology_levels": ["block", "rack"]}
    assert (await admin.put("/v1/policy", json={"settings": settings}, headers={"If-Match": "*"})).status_code == 200
    answer = await admin.post("/v1/jobs", json=together(preferred="rak"))
    assert answer.json()["errors"][0]["hint"] == "did you mean rack? the levels are block, rack, node"
    wrong = together(required="rack", slice={"level": "block", "replicas": 2})
    answer = await admin.post("/v1/jobs", json=wrong)
    assert answer.json()["errors"][0]["field"] == "resources.topology.slice.level"
    job = await submit(admin, together(required="rack", slice={"level": "node", "replicas": 2}))
    for levels in ([], ["block"]):
        body = {"settings": {"topology_levels": levels}}
        answer = await admin.put("/v1/policy", json=body, headers={"If-Match": "*"})
        assert answer.status_code == 409 and "rack" in answer.json()["detail"], answer.text
    await admin.post(f"/v1/jobs/{job['id']}/cancel")
    assert (await admin.put("/v1/policy", json={"settings": {}}, headers={"If-Match": "*"})).status_code == 200


async def test_the_policy_is_read_by_all_and_changed_by_admins_who_have_read_it(
    admin: httpx.AsyncClient, alice: httpx.AsyncClient
) -> None:
    before = await alice.get("/v1/policy")
    assert before.json()["policy"]["order"] == "fifo" and before.json()["settings"] == {}
    assert set(before.json()["policy"]) >= {"fair_sharing", "backfill", "restart_s", "topology_levels", "share_nodes"}
    body = {"settings": {"order": "shortest", "restart_s": 60, "default_time_limit_s": 3600}}
    assert (await alice.put("/v1/policy", json=body, headers={"If-Match": "*"})).status_code == 403
    assert (await admin.put("/v1/policy", json=body)).status_code == 428
    headers = {"If-Match": before.headers["etag"]}
    after = await admin.put("/v1/policy", json=body, headers=headers)
    assert after.status_code == 200 and after.json()["settings"] == body["settings"]
    assert (after.json()["policy"]["order"], after.json()["policy"]["backfill"]) == ("shortest", True)
    assert (await admin.put("/v1/policy", json=body, headers=headers)).status_code == 412
    for wrong, said in (
        ({"ordr": "fifo"}, "did you mean order"),
        ({"order": "random"}, "order"),
        ({"backfill": "yes"}, "backfill"),
        ({"usage_half_life_s": 0}, "usage_half_life_s"),
        ({"restart_s": -1}, "restart_s"),
        ({"topology_levels": ["rack", "rack"]}, "rack twice"),
        ({"topology_levels": ["node"]}, "always the innermost"),
        ({"topology_levels": ["a b"]}, "no label"),
    ):
        answer = await admin.put("/v1/policy", json={"settings": wrong}, headers={"If-Match": "*"})
        assert answer.status_code in (400, 422) and said in answer.json()["detail"], answer.text
    reset = await admin.put("/v1/policy", json={"settings": {}}, headers={"If-Match": after.headers["etag"]})
    assert reset.json()["policy"] == before.json()["policy"]


async def test_a_requeue_of_a_job_that_runs(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    job = await submit(alice, job_file(resources={"gpus": 1}))
    await world.place(job["id"])
    async with world.engine.begin() as conn:
        values = {"state": "starting", "attempts": 1}
        await conn.execute(update(jobs).where(jobs.c.id == ids.parse("job", job["id"])).values(**values))
    answer = await alice.post(f"/v1/jobs/{job['id']}/requeue")
    assert answer.status_code == 202, answer.text
    assert (answer.json()["state"], answer.json()["attempt"]["stop_cause"]) == ("stopping", "requeue")
