"""Looking at jobs and steering them: lists, pages, filters, the queue, attempts, logs and metrics as stored."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from phalanx_server.store import ids
from phalanx_server.store.attempts import last_checkpoints
from phalanx_server.store.engine import POOL_WAIT_S
from phalanx_server.store.logs import LogBatch, LogFiles, LogPiece, index_logs
from phalanx_server.store.metrics import Point, Progress, insert_points, upsert_progress
from phalanx_server.store.schema import attempts, checkpoints, events, holds, jobs, placements
from sqlalchemy import insert, update

GIB = 1 << 30


async def submit(client: httpx.AsyncClient, *documents: dict[str, Any]) -> list[str]:
    answer = await client.post("/v1/jobs/batch", json={"jobs": list(documents)})
    assert answer.status_code == 201, answer.text
    return [job["id"] for job in answer.json()["items"]]


async def items(client: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    answer = await client.get(url)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"]


async def names(client: httpx.AsyncClient, url: str) -> list[str]:
    return [item["name"] for item in await items(client, url)]


# ------------------------------------------------------------------ lists


async def test_pages_go_through_all_once_newest_first(alice: httpx.AsyncClient, job_file: Any) -> None:
    await submit(alice, *(job_file(name=f"j{n}") for n in range(7)))
    found, url = [], "/v1/jobs?limit=3"
    while url:
        page = (await alice.get(url)).json()
        found += [job["name"] for job in page["items"]]
        url = page["next_cursor"] and f"/v1/jobs?limit=3&cursor={page['next_cursor']}"
    assert found == [f"j{n}" for n in reversed(range(7))]


async def test_filters(admin: httpx.AsyncClient, job_file: Any) -> None:
    await submit(
        admin,
        job_file(name="a", labels={"team": "nlp", "x": "1"}),
        job_file(name="b", tenant="research", labels={"team": "nlp"}),
        job_file(name="c", tenant="vision"),
    )
    (c,) = await items(admin, "/v1/jobs?name=c")
    await admin.post(f"/v1/jobs/{c['id']}/cancel")
    assert await names(admin, "/v1/jobs?tenant=research") == ["b", "a"], "with everything below it"
    assert await names(admin, "/v1/jobs?tenant=research/nlp") == ["a"]
    assert await names(admin, "/v1/jobs?label=team=nlp&label=x=1") == ["a"]
    assert await names(admin, "/v1/jobs?state=cancelled&state=running") == ["c"]
    assert await names(admin, "/v1/jobs?tenant=vision&state=queued") == []
    later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert await names(admin, f"/v1/jobs?submitted_after={later}") == []


# ------------------------------------------------------------------ steering


async def test_cancel_hold_release(alice: httpx.AsyncClient, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    assert (await alice.post(f"/v1/jobs/{job}/hold")).json()["held"] is True
    assert (await alice.post(f"/v1/jobs/{job}/release")).json()["held"] is False
    cancelled = await alice.post(f"/v1/jobs/{job}/cancel")
    assert cancelled.status_code == 202 and cancelled.json()["state"] == "cancelled"
    assert cancelled.json()["finished_at"] and cancelled.json()["position"] is None
    assert (await alice.post(f"/v1/jobs/{job}/cancel")).status_code == 202, "asking again is fine"
    answer = await alice.post(f"/v1/jobs/{job}/hold")
    assert answer.status_code == 409 and answer.json()["code"] == "conflict"
    kinds = [event["kind"] for event in await items(alice, f"/v1/jobs/{job}/events")]
    assert kinds == ["submitted", "held", "released", "cancelled"]


async def test_events_are_paged_by_id(alice: httpx.AsyncClient, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    await alice.post(f"/v1/jobs/{job}/hold")
    first = (await alice.get(f"/v1/jobs/{job}/events?limit=1")).json()
    assert [event["kind"] for event in first["items"]] == ["submitted"]
    rest = (await alice.get(f"/v1/jobs/{job}/events?after={first['next_cursor']}")).json()
    assert [event["kind"] for event in rest["items"]] == ["held"] and rest["next_cursor"] is None


# ------------------------------------------------------------------ queue


async def test_the_queue_is_in_order_with_global_positions(
    admin: httpx.AsyncClient, alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    await submit(admin, job_file(name="first"), job_file(name="theirs", tenant="vision"), job_file(name="last"))
    await submit(admin, job_file(name="urgent", priority="urgent"))
    everything = [(each["position"], each["name"]) for each in await items(admin, "/v1/queue")]
    assert everything == [(1, "urgent"), (2, "first"), (3, "theirs"), (4, "last")]
    own = [(each["position"], each["name"]) for each in await items(alice, "/v1/queue")]
    assert own == [(1, "urgent"), (2, "first"), (4, "last")]
    page = (await admin.get("/v1/queue?limit=2")).json()
    rest = await items(admin, f"/v1/queue?limit=2&cursor={page['next_cursor']}")
    assert [(each["position"], each["name"]) for each in rest] == [(3, "theirs"), (4, "last")]
    (last,) = await items(alice, "/v1/jobs?name=last")
    assert (await alice.get(f"/v1/jobs/{last['id']}")).json()["position"] == 4


async def test_a_waiting_job_explains_itself(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    before = (await alice.get(f"/v1/jobs/{job}/explain")).json()
    assert before["hold"] is None and "waits for the scheduler" in before["text"]
    soon = datetime.now(UTC) + timedelta(minutes=5)
    hold = {"reason": "quota", "message": "needs 8 h100, and the quota of research leaves 0", "since": soon}
    row = hold | {"job_id": ids.parse("job", job), "unblocks": ["research gets 8 more h100"], "estimated_start": soon}
    async with world.engine.begin() as conn:
        await conn.execute(insert(holds).values(row))
    why = (await alice.get(f"/v1/jobs/{job}/explain")).json()
    assert why["hold"]["reason"] == "quota" and why["position"] == 1 and why["ahead"] == 0
    for part in ("train waits (quota): needs 8 h100", "could start when research gets 8 more h100", "number 1 in"):
        assert part in why["text"]
    (shown,) = await items(alice, "/v1/queue")
    assert shown["hold"] == why["hold"] and shown["replicas"] == 2 and shown["gpus_per_replica"] == 4


async def test_a_job_that_waits_to_be_tried_again_says_how_its_last_attempt_ended(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    said = "could not start: mount /etc: the operator allows nothing to be mounted (--allow-mount)"
    async with world.engine.begin() as conn:
        await conn.execute(update(jobs).values(message=said).where(jobs.c.id == ids.parse("job", job)))
    before = (await alice.get(f"/v1/jobs/{job}/explain")).json()
    assert f"Its last attempt is over: {said}." in before["text"], "before any pass has looked at it"
    hold = {"reason": "backoff", "message": "pauses after its last attempt", "since": datetime.now(UTC)}
    async with world.engine.begin() as conn:
        await conn.execute(insert(holds).values(hold | {"job_id": ids.parse("job", job), "unblocks": []}))
    why = (await alice.get(f"/v1/jobs/{job}/explain")).json()
    assert why["hold"]["reason"] == "backoff" and f"Its last attempt is over: {said}." in why["text"]


# ------------------------------------------------------------------ what ran


async def run(world: Any, job: str, *, finished: bool = False) -> tuple[UUID, UUID]:
    """Put a job on both nodes, as the scheduler and the agent would have; its id and its attempt's."""
    job_id, attempt_id = ids.parse("job", job), ids.new_id()
    async with world.engine.begin() as conn:
        row = (await conn.execute(jobs.select().where(jobs.c.id == job_id))).one()
        at = [row.submitted_at + timedelta(seconds=second) for second in range(6)]
        times = {"created_at": at[1], "gang_ready_at": at[2], "started_at": at[3], "first_step_at": at[5]}
        fixed = {"number": 1, "epoch": 1, "gpu_type": "h100", "replicas": 2, "state": "starting"}
        values = fixed | times | {"id": attempt_id, "job_id": job_id, "cluster_id": world.cluster}
        await conn.execute(insert(attempts).values(values))
        for rank, name in enumerate(("n0", "n1")):
            place = {"group_rank": rank, "replicas": 1, "gpu_indices": [0, 1, 2, 3], "first_rank": 4 * rank, "ranks": 4}
            use = {"cpus": 0, "memory_bytes": 0, "node_id": world.nodes[name], "attempt_id": attempt_id}
            await conn.execute(insert(placements).values(place | use))
        for state in ("starting", "running", *(["succeeded"] if finished else [])):
            over = at[5] if state == "succeeded" else None
            await conn.execute(
                update(jobs).where(jobs.c.id == job_id).values(state=state, attempts=1, epoch=1, finished_at=over)
            )
        await conn.execute(
            insert(events).values(job_id=job_id, attempt_id=attempt_id, at=at[3], kind="running", message="Runs.")
        )
    return job_id, attempt_id


async def test_a_running_job_shows_attempt_placement_and_phases(
    alice: httpx.AsyncClient, calls: Any, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    job_id, attempt_id = await run(world, job)
    at = datetime.now(UTC)
    async with world.engine.begin() as conn:
        point = {"job_id": job_id, "attempt_id": attempt_id, "step": 7, "url": "file:///c/7", "registered_at": at}
        await conn.execute(insert(checkpoints).values(point))
        progress = Progress(at=at, step=7, total_steps=100, values={"loss": 0.5})
        await upsert_progress(conn, job_id=job_id, attempt_id=attempt_id, progress=progress)
    shown = (await alice.get(f"/v1/jobs/{job}")).json()
    attempt = shown["attempt"]
    assert attempt["id"] == ids.encode("attempt", attempt_id) and attempt["cluster"] == "main"
    assert [(p["node"], p["first_rank"], p["gpu_indices"]) for p in attempt["placements"]] == [
        ("n0", 0, [0, 1, 2, 3]),
        ("n1", 4, [0, 1, 2, 3]),
    ]
    phases = dict(shown["phases"])
    assert phases["placed_s"] == phases["ranks_started_s"] == 1 and phases["first_step_s"] == 2
    assert phases.pop("rendezvous_s") is None, "a mark that never came is skipped"
    assert phases.pop("total_s") == pytest.approx(sum(phases.values()))
    assert shown["progress"]["values"] == {"loss": 0.5} and shown["progress"]["total_steps"] == 100
    assert shown["checkpoint"]["url"] == "file:///c/7"
    assert await items(alice, f"/v1/jobs/{job}/attempts") == [attempt]
    metrics = (await calls("operator").get("/metrics")).text
    for line in ('phalanx_jobs{state="running"} 1.0', "phalanx_submit_flush_jobs_count 1.0"):
        assert line in metrics
    nodes = {node["name"]: node for node in await items(alice, "/v1/nodes")}
    assert nodes["n0"]["gpus_used"] == 4 and nodes["n0"]["jobs"] == [job] and nodes["n0"]["stats"] is None


async def end(
    world: Any, job: str, *, state: str, outcome: str, message: str, exits: list[dict[str, Any]], named: int | None
) -> None:
    """End the attempt that `run` has made, with a message that tells of rank `named`; put its job into a state."""
    over = {"finished_at": datetime.now(UTC)} if state in ("failed", "cancelled") else {}
    async with world.engine.begin() as conn:
        ended = {
            "state": "ended",
            "outcome": outcome,
            "message": message,
            "exits": exits,
            "number": 2,
            "ended_at": datetime.now(UTC),
        }
        over_now = update(attempts).where(attempts.c.job_id == ids.parse("job", job)).values(ended)
        attempt_id = await conn.scalar(over_now.returning(attempts.c.id))
        event = {"kind": "attempt_ended", "at": datetime.now(UTC), "message": message, "data": {"named_rank": named}}
        of_it = {"job_id": ids.parse("job", job), "attempt_id": attempt_id}
        await conn.execute(insert(events).values(event | of_it))
        told = {"state": state, "reason": outcome, "message": message, "attempts": 2}
        await conn.execute(update(jobs).where(jobs.c.id == ids.parse("job", job)).values(told | over))


EXITS = [
    {"rank": 0, "exit_code": None, "signal": 15, "ended_at": "2026-11-21T00:00:02Z"},
    {"rank": 5, "exit_code": None, "signal": 9, "oom": True, "ended_at": "2026-11-21T00:00:01Z"},
    {"rank": 6, "exit_code": 0, "signal": None, "ended_at": "2026-11-21T00:00:00Z"},
]


@pytest.mark.parametrize(
    ("state", "outcome", "message", "named", "said"),
    [
        (
            "failed",
            "oom",
            "rank 5 ran out of memory",
            5,
            "train has failed (oom) after 2 attempts: rank 5 ran out of memory (on n1)."
            " What that rank wrote: phalanx logs {job} --rank 5 --attempt 2",
        ),
        (
            "failed",
            "time_limit",
            "reached its time limit",
            None,
            "train has failed (time_limit) after 2 attempts: reached its time limit."
            " What happened to it: phalanx events {job}",
        ),
        (
            "failed",
            "unhealthy",
            "rank 0 stopped itself: the loss is NaN",
            0,
            "train has failed (unhealthy) after 2 attempts: rank 0 stopped itself: the loss is NaN (on n0)."
            " What that rank wrote: phalanx logs {job} --rank 0 --attempt 2",
        ),
        (
            "failed",
            "hung",
            "the job took no step for 90 s",
            None,
            "train has failed (hung) after 2 attempts: the job took no step for 90 s."
            " What happened to it: phalanx events {job}",
        ),
        ("cancelled", "cancelled", "cancelled", None, "train was cancelled after 2 attempts."),
    ],
)
async def test_a_job_that_has_ended_explains_how_and_where_to_read_more(
    alice: httpx.AsyncClient,
    world: Any,
    job_file: Any,
    state: str,
    outcome: str,
    message: str,
    named: int | None,
    said: str,
) -> None:
    (job,) = await submit(alice, job_file())
    await run(world, job)
    await end(world, job, state=state, outcome=outcome, message=message, exits=EXITS, named=named)
    assert (await alice.get(f"/v1/jobs/{job}/explain")).json()["text"] == said.format(job=job)


@pytest.mark.parametrize(
    ("outcome", "message", "named", "more"),
    [
        ("failed", "rank 5 exited with code 1", 5, "What its rank wrote: phalanx logs {job} --rank 5 --attempt 2."),
        ("hung", "the job took no step for 90 s", None, "What happened to it: phalanx events {job}."),
    ],
)
async def test_a_job_that_waits_to_be_tried_again_says_where_to_read_of_its_failure(
    alice: httpx.AsyncClient, world: Any, job_file: Any, outcome: str, message: str, named: int | None, more: str
) -> None:
    (job,) = await submit(alice, job_file())
    await run(world, job)
    async with world.engine.begin() as conn:
        await conn.execute(update(jobs).where(jobs.c.id == ids.parse("job", job)).values(state="stopping"))
    await end(world, job, state="queued", outcome=outcome, message=message, exits=EXITS, named=named)
    text = (await alice.get(f"/v1/jobs/{job}/explain")).json()["text"]
    assert f"Its last attempt is over: {message}. {more.format(job=job)}" in text


async def test_no_rank_is_named_for_an_end_that_came_after_its_own(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    await run(world, job)
    message = "rank 5 exited with code 1"
    await end(world, job, state="cancelled", outcome="failed", message=message, exits=EXITS, named=5)
    async with world.engine.begin() as conn:
        told = {"reason": "cancelled", "message": "cancelled by alice before it started"}
        await conn.execute(update(jobs).where(jobs.c.id == ids.parse("job", job)).values(told))
    text = (await alice.get(f"/v1/jobs/{job}/explain")).json()["text"]
    assert text.endswith("was cancelled after 2 attempts: cancelled by alice before it started.")


async def test_an_attempt_says_whom_it_gives_way_to_where_that_may_be_seen(
    alice: httpx.AsyncClient, admin: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    job, other = await submit(alice, job_file(), job_file())
    (foreign,) = await submit(admin, job_file(tenant="vision"))
    _, attempt_id = await run(world, job)
    for seat, whom, said in ((None, foreign, None), ("n1", other, other)):
        place = seat and {"gpu_type": "h100", "placement": [{"node": world.nodes[seat].hex, "replicas": 2}]}
        values = {"stop_cause": "resize", "stop_reason": "reclaim", "stop_for": ids.parse("job", whom), "next": place}
        async with world.engine.begin() as conn:
            await conn.execute(update(attempts).where(attempts.c.id == attempt_id).values(values))
        shown = (await alice.get(f"/v1/jobs/{job}")).json()["attempt"]
        assert (shown["stop_reason"], shown["stop_for"]) == ("reclaim", said)
        assert shown["next"] == (seat and {"gpu_type": "h100", "placement": [{"node": "n1", "replicas": 2}]})
        assert await items(alice, f"/v1/jobs/{job}/attempts") == [shown]


async def test_the_checkpoint_that_is_shown_is_the_one_that_a_resume_would_take(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    """An attempt that went back to step 5 saves step 6 after the step 9 of the one before."""
    (job,) = await submit(alice, job_file())
    job_id, attempt_id = await run(world, job)
    async with world.engine.begin() as conn:
        for minute, step in enumerate((5, 9, 6)):
            at = datetime.now(UTC) + timedelta(minutes=minute)
            point = {"job_id": job_id, "attempt_id": attempt_id, "step": step, "url": f"/c/{step}", "registered_at": at}
            await conn.execute(insert(checkpoints).values(point))
        resumed = await last_checkpoints(conn, [job_id])
    assert (await alice.get(f"/v1/jobs/{job}")).json()["checkpoint"]["url"] == resumed[job_id] == "/c/6"


async def test_a_tenant_sees_what_it_uses_of_every_resource(
    alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    _, attempt_id = await run(world, job)
    use = {"cpus": 12, "memory_bytes": 3 * GIB, "replicas": 2}  # 1.5 GiB per replica count as 2, as in a pass
    async with world.engine.begin() as conn:
        await conn.execute(update(placements).where(placements.c.attempt_id == attempt_id).values(use))
    usage = (await alice.get("/v1/tenants/research/nlp")).json()["usage"]
    assert usage == {"h100": 8, "cpu": 24, "memory_gib": 8}
    assert (await alice.get("/v1/quotas/research/nlp")).json()["usage"] == usage
    async with world.engine.begin() as conn:
        await conn.execute(update(placements).values(released_at=datetime.now(UTC)))
    assert (await alice.get("/v1/tenants/research/nlp")).json()["usage"] == {}


async def test_nodes_show_no_other_tenants_jobs(
    alice: httpx.AsyncClient, bob: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    await run(world, job)
    (n0, _) = await items(bob, "/v1/nodes")
    assert n0["gpus_used"] == 4 and n0["jobs"] == []
    research = (await alice.get("/v1/tenants/research/nlp")).json()
    assert research["usage"] == {"h100": 8}


# ------------------------------------------------------------------ logs


async def write_logs(world: Any, settings: Any, job_id: UUID, attempt_id: UUID, *lines: tuple[int, bytes]) -> None:
    """Lines of ranks, one piece each, in their order."""
    starts: dict[int, int] = {}
    pieces = []
    for rank, data in lines:
        start = starts.get(rank, 0)
        pieces.append(LogPiece(rank=rank, stream="stdout", start_bytes=start, data=data, at=datetime.now(UTC)))
        starts[rank] = start + len(data)
    batch = LogBatch(job_id=job_id, attempt_id=attempt_id, path=f"logs/{ids.new_id().hex}", pieces=pieces)
    await LogFiles(settings.storage_root).write(batch.path, batch.content())
    async with world.engine.begin() as conn:
        await index_logs(conn, batch)


async def test_the_ends_of_many_logs_are_read_at_once(
    settings: Any, alice: httpx.AsyncClient, world: Any, job_file: Any
) -> None:
    (job,) = await submit(alice, job_file())
    await write_logs(world, settings, *await run(world, job), (0, b"one\ntwo\n"))
    reads = (alice.get(f"/v1/jobs/{job}/logs?tail_lines=1") for _ in range(3 * settings.database_pool))
    async with asyncio.timeout(POOL_WAIT_S):
        answers = await asyncio.gather(*reads)
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "two\n")}


async def test_logs(alice: httpx.AsyncClient, world: Any, settings: Any, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    lines = [(0, b"one\n"), (1, b"two\n"), (0, b"three\nfour\n"), (1, "fünf\n".encode()), (1, b"\xff six")]
    await write_logs(world, settings, *await run(world, job), *lines)
    url = f"/v1/jobs/{job}/logs"
    whole = await alice.get(url)
    assert whole.text == "one\ntwo\nthree\nfour\nfünf\n\ufffd six"
    assert whole.headers["content-type"].startswith("text/plain") and whole.headers["x-log-size-bytes"] == "30"
    assert (await alice.get(f"{url}?rank=0")).text == "one\nthree\nfour\n"
    assert (await alice.get(f"{url}?rank=0&start_bytes=4&limit_bytes=5")).text == "three"
    assert (await alice.get(f"{url}?tail_lines=1")).text == "\ufffd six"
    assert (await alice.get(f"{url}?tail_lines=3")).text == "four\nfünf\n\ufffd six"
    assert (await alice.get(f"{url}?rank=0&tail_lines=2")).text == "three\nfour\n"
    assert (await alice.get(f"{url}?tail_lines=99")).text == whole.text
    assert (await alice.get(f"{url}?tail_lines=0")).text == ""
    assert (await alice.get(f"{url}?stream=stderr")).text == (await alice.get(f"{url}?attempt=2")).text == ""


async def test_a_job_without_output_has_an_empty_log(alice: httpx.AsyncClient, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    answer = await alice.get(f"/v1/jobs/{job}/logs")
    assert answer.status_code == 200 and answer.text == ""


# ------------------------------------------------------------------ metrics


async def test_metrics(alice: httpx.AsyncClient, world: Any, job_file: Any) -> None:
    (job,) = await submit(alice, job_file())
    job_id, attempt_id = await run(world, job)
    start = datetime.now(UTC).timestamp() - 7200
    few = [Point(rank, "loss", step, float(10 - step + rank), start + step) for step in range(5) for rank in range(2)]
    many = [Point(0, "grad_norm", step, float(step), start + step) for step in range(3000)]
    async with world.engine.begin() as conn:
        await insert_points(conn, job_id=job_id, attempt_id=attempt_id, points=few + many)
    url = f"/v1/jobs/{job}/metrics"
    series = {each["name"]: each for each in (await alice.get(url)).json()["series"]}
    loss = series["loss"]
    assert loss["resolution_s"] == 0 and [point["step"] for point in loss["points"]] == [0, 1, 2, 3, 4]
    assert loss["points"][0] | {"at": 0} == {"at": 0, "step": 0, "min": 10, "max": 11, "mean": 10.5, "count": 2}
    norm = series["grad_norm"]
    assert norm["resolution_s"] % 10 == 0 and sum(point["count"] for point in norm["points"]) == 3000
    assert norm["points"][-1]["max"] == 2999
    for most in (2, 10, 100):
        (only,) = (await alice.get(f"{url}?name=grad_norm&max_points={most}")).json()["series"]
        assert 1 <= len(only["points"]) <= most + 1
        assert sum(point["count"] for point in only["points"]) == 3000
    empty = await alice.get(f"{url}?name=nothing")
    assert empty.json() == {"series": []}
    cut = datetime.fromtimestamp(start + 3, UTC).isoformat().replace("+00:00", "Z")
    (later,) = (await alice.get(f"{url}?name=loss&from={cut}")).json()["series"]
    assert [point["step"] for point in later["points"]] == [3, 4]
    wrong = await alice.get(f"{url}?from={cut}&to={cut}")
    assert wrong.status_code == 422
