"""Profiles over HTTP: users ask for them and fetch the traces that nodes send."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest
from phalanx_server.domain import profile as limits
from phalanx_server.store import ids
from phalanx_server.store.schema import attempts, jobs
from sqlalchemy import update

TRACE = b"\x1f\x8b trace" * 1000
HASH = hashlib.sha256(TRACE).hexdigest()


@pytest.fixture
async def job(alice: httpx.AsyncClient) -> str:
    document = {"name": "x", "resources": {"gpus": 1}, "run": {"command": "x"}}
    return (await alice.post("/v1/jobs", json=document)).json()["id"]


@pytest.fixture
async def attempt(job: str, world: Any) -> str:
    """The job runs on n0."""
    name = await world.place(job)
    async with world.engine.begin() as conn:
        await conn.execute(update(attempts).where(attempts.c.id == ids.parse("attempt", name)).values(state="running"))
        for state in ("starting", "running"):
            await conn.execute(update(jobs).where(jobs.c.id == ids.parse("job", job)).values(state=state, attempts=1))
    return name


async def put(runner: httpx.AsyncClient, attempt: str, profile: str, body: bytes = TRACE, **query: Any) -> Any:
    url = f"/v1/node/attempts/{attempt}/profiles/{profile}/ranks/0"
    return await runner.put(url, content=body, params={"epoch": 1, "sha256": HASH} | query)


async def test_a_profile_is_asked_for_followed_and_fetched(
    job: str, attempt: str, alice: httpx.AsyncClient, calls: Any
) -> None:
    answer = await alice.post(f"/v1/jobs/{job}/profiles", json={"steps": 3})
    assert answer.status_code == 202, answer.text
    made = answer.json()
    shown = [made[name] for name in ("job_id", "attempt", "steps", "state", "reason", "created_by")]
    assert shown == [job, 1, 3, "requested", "", "alice (token)"]
    assert made["ranks"] == [{"rank": 0, "state": "requested", "reason": "", "bytes": None, "sha256": None}]
    url = f"/v1/jobs/{job}/profiles/{made['id']}"
    assert (await alice.get(url)).json() == made
    assert (await alice.get(f"{url}/ranks/0")).status_code == 404
    stored = await put(calls("n0"), attempt, made["id"])
    assert stored.status_code == 200, stored.text
    (listed,) = (await alice.get(f"/v1/jobs/{job}/profiles")).json()["items"]
    assert listed["state"] == "ready"
    assert listed["ranks"] == [{"rank": 0, "state": "ready", "reason": "", "bytes": len(TRACE), "sha256": HASH}]
    fetched = await alice.get(f"{url}/ranks/0")
    assert fetched.content == TRACE and fetched.headers["etag"] == f'"{HASH}"'
    assert fetched.headers["content-type"] == "application/gzip"
    assert fetched.headers["content-disposition"] == f"attachment; filename={made['id']}-rank-0.json.gz"
    assert (await alice.get(f"/v1/jobs/{job}/outputs")).json()["items"] == []


async def test_a_request_is_made_once_under_one_key(job: str, attempt: str, alice: httpx.AsyncClient) -> None:
    url, key = f"/v1/jobs/{job}/profiles", {"Idempotency-Key": "k"}
    first = await alice.post(url, json={}, headers=key)
    again = await alice.post(url, json={}, headers=key)
    assert (first.status_code, again.status_code, first.json()) == (202, 202, again.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = await alice.post(url, json={})
    assert other.status_code == 409 and "not done yet" in other.json()["detail"]


async def test_a_job_that_waits_cannot_be_profiled(job: str, alice: httpx.AsyncClient) -> None:
    refused = await alice.post(f"/v1/jobs/{job}/profiles", json={})
    assert refused.status_code == 409 and refused.json()["code"] == "conflict"
    assert refused.json()["detail"] == "x is queued: only a job that runs can be profiled"


WRONG = {
    "no step": ({"steps": 0}, "steps"),
    "too many steps": ({"steps": 101}, "steps"),
    "no rank": ({"ranks": []}, "ranks"),
    "a rank that is not there": ({"ranks": [0, 1]}, "ranks[1]"),
    "a rank of another type": ({"ranks": ["first"]}, "ranks[0]"),
    "an unknown key": ({"step": 3}, "step"),
}


@pytest.mark.parametrize(("body", "field"), WRONG.values(), ids=WRONG.keys())
async def test_what_is_wrong_is_named(
    body: dict[str, Any], field: str, job: str, attempt: str, alice: httpx.AsyncClient
) -> None:
    refused = await alice.post(f"/v1/jobs/{job}/profiles", json=body)
    assert refused.status_code == 422, refused.text
    assert [error["field"] for error in refused.json()["errors"]] == [field]


async def test_another_tenant_sees_none_and_a_viewer_asks_for_none(
    job: str, attempt: str, alice: httpx.AsyncClient, bob: httpx.AsyncClient, calls: Any
) -> None:
    made = (await alice.post(f"/v1/jobs/{job}/profiles", json={})).json()["id"]
    assert (await put(calls("n0"), attempt, made)).status_code == 200
    urls = [f"/v1/jobs/{job}/profiles", f"/v1/jobs/{job}/profiles/{made}", f"/v1/jobs/{job}/profiles/{made}/ranks/0"]
    assert [(await bob.get(url)).status_code for url in urls] == [404] * 3
    assert [(await calls("viewer").get(url)).status_code for url in urls] == [200] * 3
    assert (await bob.post(urls[0], json={})).status_code == 404
    assert (await calls("viewer").post(urls[0], json={})).status_code == 403
    assert (await put(bob, attempt, made)).status_code == 403


async def test_a_trace_that_is_too_large_is_refused_with_the_reason(
    job: str, attempt: str, alice: httpx.AsyncClient, calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TRACE_MAX_BYTES", len(TRACE) - 1)
    made = (await alice.post(f"/v1/jobs/{job}/profiles", json={})).json()["id"]
    refused = await put(calls("n0"), attempt, made)
    reason = "the trace has 8,000 bytes; at most 7,999: ask for fewer steps"
    assert (refused.status_code, refused.json()["detail"]) == (422, reason)
    told = (await alice.get(f"/v1/jobs/{job}/profiles/{made}")).json()
    assert (told["state"], told["reason"]) == ("failed", reason)


async def test_a_damaged_trace_is_not_taken(job: str, attempt: str, alice: httpx.AsyncClient, calls: Any) -> None:
    made = (await alice.post(f"/v1/jobs/{job}/profiles", json={})).json()["id"]
    assert (await put(calls("n0"), attempt, made, b"other")).status_code == 422
    assert (await put(calls("n0"), attempt, made, epoch=2)).status_code == 404
    assert (await put(calls("n0"), attempt, "prof_x")).status_code == 404
    assert (await alice.get(f"/v1/jobs/{job}/profiles/{made}")).json()["state"] == "requested"
