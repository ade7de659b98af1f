"""Submitting: what is accepted, what is refused and how it is said, and that a key makes it happen once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from phalanx_server.actions import submit_warnings
from phalanx_server.api import dry_run

BAD_FIELDS = [
    ("an unknown field", {"nmae": "x"}, "unknown_field", "nmae", "did you mean name?"),
    (
        "an unknown nested field",
        {"resources": {"gpus": 1, "replica": 2}},
        "unknown_field",
        "resources.replica",
        "replicas",
    ),
    ("no GPUs said", {"resources": {"replicas": 2}}, "invalid_request", "resources", "gpus_per_replica"),
    (
        "zero replicas",
        {"resources": {"replicas": 0, "gpus_per_replica": 1}},
        "invalid_request",
        "resources.replicas",
        "",
    ),
    ("negative GPUs", {"resources": {"gpus_per_replica": -1}}, "invalid_request", "resources.gpus_per_replica", ""),
    ("absurd replicas", {"resources": {"gpus": 10**9}}, "invalid_request", "resources.replicas", "10000"),
    (
        "more than any node",
        {"resources": {"gpus_per_replica": 16}},
        "impossible_request",
        "resources.gpus_per_replica",
        "8",
    ),
    (
        "an unknown GPU type",
        {"resources": {"gpus": 1, "gpu_types": ["b900"]}},
        "invalid_request",
        "resources.gpu_types",
        "h100",
    ),
    ("an unknown tenant", {"tenant": "research/nlq"}, "invalid_request", "tenant", "research/nlp"),
    ("no such bundle", {"run": {"command": "x", "bundle": "0" * 64}}, "invalid_request", "run.bundle", "PUT"),
    ("a later feature", {"checkpoint": {"keep_last": 2}}, "invalid_request", "checkpoint.keep_last", "not supported"),
    ("no body at all", None, "invalid_json", "", "line 1, column 1"),
]


async def test_a_job_is_accepted_and_shown(alice: httpx.AsyncClient, job_file: Any) -> None:
    answer = await alice.post("/v1/jobs", json=job_file(labels={"team": "nlp"}, priority="high"))
    assert answer.status_code == 201, answer.text
    job = answer.json()
    assert job["state"] == "queued" and job["tenant"] == "research/nlp" and job["priority"] == 10
    assert job["received_at"] <= job["submitted_at"] and job["received_at"].endswith("Z")
    assert job["created_by"] == "alice (token)" and job["spec"]["preemption"]["grace"] == 30.0
    assert job["warnings"] == []
    shown = (await alice.get(f"/v1/jobs/{job['id']}")).json()
    assert shown == job | {"position": 1}


MORE_THAN_ALL = [
    ("as many as there are", {"gpus": 16}, None),
    ("one more", {"gpus": 17}, "17 × (1 gpu), but all nodes together hold at most 16 of these on h100 in one cluster"),
    (
        "of whole nodes",
        {"replicas": 3, "gpus_per_replica": 8, "gpu_types": ["h100"]},
        "3 × (8 h100), but all nodes together hold at most 2 of these on h100 in one cluster",
    ),
    (
        "more memory than all have",
        {"replicas": 5, "gpus_per_replica": 1, "memory_per_replica": "200GiB"},
        "5 × (1 gpu, 200 GiB memory), but all nodes together hold at most 4 of these on h100 in one cluster",
    ),
    (
        "of CPUs",
        {"gpus": 0, "replicas": 10, "cpus_per_replica": 64},
        "all nodes together hold at most 2 of these in one cluster",
    ),
]


@pytest.mark.parametrize(("says", "resources", "warning"), MORE_THAN_ALL, ids=[case[0] for case in MORE_THAN_ALL])
async def test_what_all_nodes_together_could_not_hold_is_accepted_with_a_warning(
    alice: httpx.AsyncClient, job_file: Any, says: str, resources: Any, warning: str | None
) -> None:
    document = job_file(resources=resources)
    one = (await alice.post("/v1/jobs", json=document)).json()
    many = (await alice.post("/v1/jobs/batch", json={"jobs": [job_file(), document]})).json()["items"]
    tried = (await alice.post("/v1/jobs?dry_run=true", json=document)).json()
    assert one["state"] == "queued" and many[0]["warnings"] == []
    assert tried["warnings"] == []
    assert warning is None or tried["would"]["hold"]["reason"] == "impossible", "that says it already"
    for said in (one["warnings"], many[1]["warnings"]):
        assert len(said) == (warning is not None), said
        assert not said or (warning or "") in said[0], said


async def test_nodes_of_every_state_count(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE nodes SET state = 'lost', alive = false")
    assert (await alice.post("/v1/jobs", json=job_file(resources={"gpus": 16}))).json()["warnings"] == []


async def test_where_no_node_was_ever_seen_nothing_is_said_of_them(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql("DELETE FROM tokens WHERE node_id IS NOT NULL")
        await conn.exec_driver_sql("DELETE FROM nodes")
    assert (await alice.post("/v1/jobs", json=job_file(resources={"gpus": 99}))).json()["warnings"] == []


async def test_types_are_not_added_up(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    """A gang lies on one: 17 of 16 and 16 wait, and nobody is told that there are 16 in all."""
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE nodes SET gpus = 16")
        await conn.exec_driver_sql("UPDATE nodes SET gpu_type = 'a100' WHERE name = 'n1'")
    resources = ({"gpus": 17}, {"gpus": 17, "gpu_types": ["h100"]}, {"gpus": 16})
    said = [(await alice.post("/v1/jobs", json=job_file(resources=each))).json()["warnings"] for each in resources]
    assert "hold at most 16 of these on a100 in one cluster, and a gang lies on one GPU type" in said[0][0]
    assert "hold at most 16 of these on h100 in one cluster, empty" in said[1][0] and said[2] == []


async def test_a_gang_that_one_node_cannot_hold_is_warned_where_nodes_do_not_share_its_checkpoints(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    async with world.engine.begin() as conn:
        await conn.exec_driver_sql("UPDATE nodes SET facts = '{\"shared_checkpoints\": false}' WHERE name = 'n1'")
    documents = [job_file(resources={"gpus": gpus}) for gpus in (9, 8, 1)]
    answers = [(await alice.post("/v1/jobs", json=document)).json()["warnings"] for document in documents]
    assert "some nodes (n1) do not share PHALANX_CHECKPOINT_DIR" in answers[0][0] and answers[1:] == [[], []]


async def test_the_tenant_defaults_to_the_callers_own(alice: httpx.AsyncClient, job_file: Any) -> None:
    document = job_file()
    del document["tenant"]
    job = (await alice.post("/v1/jobs", json=document)).json()
    assert job["tenant"] == "research/nlp" and job["spec"]["tenant"] == "research/nlp"


@pytest.mark.parametrize(("says", "changes", "code", "field", "hint"), BAD_FIELDS, ids=[case[0] for case in BAD_FIELDS])
async def test_bad_fields_are_named(
    admin: httpx.AsyncClient, job_file: Any, says: str, changes: Any, code: str, field: str, hint: str
) -> None:
    body = b"" if changes is None else json.dumps(job_file(**changes)).encode()
    answer = await admin.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    problem = answer.json()
    assert answer.status_code in (400, 422) and problem["code"] == code, problem
    assert answer.headers["content-type"] == "application/problem+json"
    (error, *_) = [each for each in problem["errors"] if each["field"] == field] or [None]
    assert error is not None and hint in f"{error['message']} {error.get('hint')}", problem
    assert problem["request_id"] == answer.headers["x-request-id"]


async def test_malformed_json_names_line_and_column(admin: httpx.AsyncClient) -> None:
    answer = await admin.post(
        "/v1/jobs", content=b'{\n  "name": "x",\n  oops\n}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400 and answer.json()["code"] == "invalid_json"
    assert "line 3, column 3" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b"NaN", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'"\\ud800"', b"[]", b"null"])
async def test_odd_bodies_are_refused_not_crashed_on(admin: httpx.AsyncClient, body: bytes) -> None:
    for url in ("/v1/jobs", "/v1/jobs/batch", "/v1/tenants", "/v1/plan"):
        answer = await admin.post(url, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), (url, answer.text)


async def test_another_media_type_is_refused(admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/v1/jobs", content=b"name: x", headers={"Content-Type": "application/yaml"})
    assert answer.status_code == 415 and answer.json()["code"] == "unsupported_media_type"


@pytest.mark.parametrize("declared", [True, False], ids=["by Content-Length", "while streaming"])
async def test_an_oversized_body_is_refused(admin: httpx.AsyncClient, declared: bool) -> None:
    body = b'{"name": "' + b"x" * (1 << 20) + b'"}'

    async def pieces() -> Any:
        yield body

    content = body if declared else pieces()
    answer = await admin.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and answer.json()["code"] == "body_too_large"
    assert answer.headers["content-type"] == "application/problem+json"


async def test_another_tenants_tenant_does_not_exist(bob: httpx.AsyncClient, job_file: Any) -> None:
    answer = await bob.post("/v1/jobs", json=job_file())
    assert answer.status_code == 422 and "nlp" not in str(answer.json()["errors"][0].get("hint"))


async def test_a_viewer_may_not_submit(calls: Any, job_file: Any) -> None:
    answer = await calls("viewer").post("/v1/jobs", json=job_file())
    assert answer.status_code == 403 and answer.json()["code"] == "forbidden"


# ------------------------------------------------------------------ once


async def test_the_same_key_and_body_is_one_job(alice: httpx.AsyncClient, job_file: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await alice.post("/v1/jobs", json=job_file(), headers=headers)
    again = await alice.post("/v1/jobs", json=job_file(), headers=headers)
    assert again.status_code == 201 and again.json() == first.json()
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    assert len((await alice.get("/v1/jobs")).json()["items"]) == 1


async def test_the_same_key_with_another_body_is_a_conflict(alice: httpx.AsyncClient, job_file: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    await alice.post("/v1/jobs", json=job_file(), headers=headers)
    answer = await alice.post("/v1/jobs", json=job_file(name="other"), headers=headers)
    assert answer.status_code == 409 and answer.json()["code"] == "idempotency_conflict"


async def test_a_key_is_the_callers_own(alice: httpx.AsyncClient, admin: httpx.AsyncClient, job_file: Any) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = await alice.post("/v1/jobs", json=job_file(), headers=headers)
    other = await admin.post("/v1/jobs", json=job_file(), headers=headers)
    assert first.json()["id"] != other.json()["id"]


# ------------------------------------------------------------------ many, and none


async def test_a_batch_is_all_or_nothing(alice: httpx.AsyncClient, job_file: Any) -> None:
    good = await alice.post("/v1/jobs/batch", json={"jobs": [job_file(name=f"j{n}") for n in range(3)]})
    assert good.status_code == 201 and [job["name"] for job in good.json()["items"]] == ["j0", "j1", "j2"]
    bad = await alice.post(
        "/v1/jobs/batch", json={"jobs": [job_file(), job_file(resources={"gpus": 0, "replicas": 0})]}
    )
    assert bad.status_code == 422 and bad.json()["errors"][0]["field"] == "jobs[1].resources.replicas"
    late = await alice.post("/v1/jobs/batch", json={"jobs": [job_file(), job_file(tenant="nowhere")]})
    assert late.status_code == 422 and late.json()["errors"][0]["field"] == "jobs[1].tenant"
    assert len((await alice.get("/v1/jobs")).json()["items"]) == 3


async def test_a_batch_has_a_bound(alice: httpx.AsyncClient) -> None:
    answer = await alice.post("/v1/jobs/batch", json={"jobs": [{}] * 1001})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "jobs"


async def test_a_dry_run_says_what_would_happen_and_stores_nothing(alice: httpx.AsyncClient, job_file: Any) -> None:
    fits = await alice.post("/v1/jobs?dry_run=true", json=job_file())
    assert fits.status_code == 200, fits.text
    assert fits.json()["valid"] and fits.json()["would"]["start"]
    assert {place["node"] for place in fits.json()["would"]["placement"]} <= {"n0", "n1"}
    large = job_file(resources={"replicas": 2, "gpus_per_replica": 8})
    waits = (await alice.post("/v1/jobs?dry_run=true", json=large)).json()["would"]
    assert not waits["start"] and waits["hold"]["reason"] in ("quota", "impossible") and waits["hold"]["message"]
    bad = await alice.post("/v1/jobs?dry_run=true", json=job_file(tenant="nowhere"))
    assert bad.status_code == 422
    assert (await alice.get("/v1/jobs")).json()["items"] == []


async def test_the_trace_context_is_kept_with_the_job(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await alice.post("/v1/jobs", json=job_file(name="traced"), headers={"traceparent": trace})
    await alice.post("/v1/jobs", json=job_file(name="odd"), headers={"traceparent": "nonsense"})
    async with world.engine.connect() as conn:
        rows = await conn.exec_driver_sql("SELECT name, traceparent FROM jobs")
        assert dict(map(tuple, rows)) == {"traced": trace, "odd": None}


async def test_a_dry_run_of_a_recipe_says_what_memory_each_rank_needs(alice: httpx.AsyncClient, job_file: Any) -> None:
    model = {"layers": 32, "width": 4096, "heads": 32, "vocabulary": 32_000}
    args = {"model": model, "data": {"paths": ["/data/*.txt"], "seq_len": 2048}, "train": {"global_batch": 4}}
    gpus = {"gpus": 4, "gpu_types": ["h100", "of-tomorrow"]}
    large = job_file(run={"recipe": "lm", "args": args}, resources=gpus)
    memory = (await alice.post("/v1/jobs?dry_run=true", json=large)).json()["memory"]
    assert sum(memory["parts_bytes"].values()) == memory["total_bytes"] > 80 << 30
    (on,) = memory["on"]
    assert (on["gpu_type"], on["fits"]) == ("h100", False)
    assert on["message"].startswith("does not fit on h100-80gb: needs ") and "parallel." in on["message"]
    assert (await alice.post("/v1/jobs?dry_run=true", json=large)).json()["warnings"] == [], "it is said once"
    accepted = (await alice.post("/v1/jobs", json=large)).json()
    assert any("does not fit on h100-80gb" in warning for warning in accepted["warnings"])
    small = job_file(run={"recipe": "lm", "args": {"data": {"paths": ["/data/*.txt"]}}}, resources=gpus)
    tried = (await alice.post("/v1/jobs?dry_run=true", json=small)).json()
    assert tried["memory"]["on"][0]["fits"]
    assert (await alice.post("/v1/jobs?dry_run=true", json=job_file())).json()["memory"] is None


async def test_a_dry_run_says_once_that_a_job_can_never_start(alice: httpx.AsyncClient, job_file: Any) -> None:
    large = job_file(resources={"replicas": 1000, "gpus_per_replica": 1})
    tried = (await alice.post("/v1/jobs?dry_run=true", json=large)).json()
    assert tried["would"]["hold"]["reason"] == "impossible" and tried["warnings"] == []
    accepted = (await alice.post("/v1/jobs", json=large)).json()
    assert any("all nodes together hold at most" in warning for warning in accepted["warnings"])


async def test_a_dry_run_of_a_job_that_can_never_start_still_warns_of_other_things(
    alice: httpx.AsyncClient, job_file: Any
) -> None:
    large = job_file(resources={"replicas": 1000, "gpus_per_replica": 1}, health={"nan": "stop"})
    warnings = (await alice.post("/v1/jobs?dry_run=true", json=large)).json()["warnings"]
    assert warnings == ["health.nan is looked for in recipes only: nobody looks for it in a command"]


async def test_a_dry_run_warns_of_the_memory_that_it_does_not_show(
    alice: httpx.AsyncClient, job_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "estimate_of", lambda *_: 1 / 0)
    model = {"layers": 32, "width": 4096, "heads": 32, "vocabulary": 32_000}
    args = {"model": model, "data": {"paths": ["/data/*.txt"], "seq_len": 2048}, "train": {"global_batch": 4}}
    large = job_file(run={"recipe": "lm", "args": args}, resources={"gpus": 4, "gpu_types": ["h100"]})
    tried = (await alice.post("/v1/jobs?dry_run=true", json=large)).json()
    assert tried["memory"] is None and "does not fit on h100-80gb" in tried["warnings"][0]


async def test_checks_that_only_recipes_make_are_said_to_do_nothing_for_a_command(
    alice: httpx.AsyncClient, job_file: Any
) -> None:
    asked = {"nan": "stop", "hang": "restart"}
    warnings = (await alice.post("/v1/jobs", json=job_file(health=asked))).json()["warnings"]
    assert "health.nan is looked for in recipes only: nobody looks for it in a command" in warnings
    assert not any("hang" in warning for warning in warnings)


async def test_a_recipe_whose_memory_cannot_be_estimated_is_accepted_and_fails_no_other(
    alice: httpx.AsyncClient, job_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def broken(spec: Any, gpu_types: Any) -> None:
        asked.append(spec.name)
        raise OverflowError("int too large to convert to float")

    monkeypatch.setattr(submit_warnings, "estimate_of", broken)
    monkeypatch.setattr(dry_run, "estimate_of", broken)
    run = {"recipe": "lm", "args": {"data": {"paths": ["/data/*.txt"]}}}
    document = job_file(name="odd", run=run, resources={"gpus": 4, "gpu_types": ["h100"]})
    answers = await asyncio.gather(
        *(alice.post("/v1/jobs", json=each) for each in (document, job_file(name="other"))),
    )
    assert [answer.status_code for answer in answers] == [201, 201]
    assert asked == ["odd"], "once per submit"
    assert (await alice.post("/v1/jobs?dry_run=true", json=document)).json()["memory"] is None
