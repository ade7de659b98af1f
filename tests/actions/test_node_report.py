"""What a node runner reports: taken once, only about its own live attempts, one bad value at a time refused."""

from __future__ import annotations

import asyncio
import math
import random
import string
from datetime import timedelta
from typing import Any

import pytest
from control_plane import ControlPlane
from phalanx_server.actions import record_node_report
from phalanx_server.actions.record_marks import URL_MAX_BYTES
from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.domain import messages as m
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.metric import NAMES_PER_JOB
from phalanx_server.domain.node import NodeState
from phalanx_server.store.attempts import LAST_WORDS_S
from phalanx_server.store.logs import read_pieces
from phalanx_server.store.metric_views import Window, list_extents, load_series
from phalanx_server.store.node_views import list_nodes
from phalanx_server.store.schema import checkpoints, events, jobs, logs, metric_rollups, metrics, progress
from sqlalchemy import delete, select


async def notes(plane: ControlPlane) -> list[str]:
    return [row.message for row in await plane.rows(events, events.c.id) if row.kind == "note"]


async def test_a_report_is_taken_once(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    parts = {"metrics": [plane.metric(attempt, loss=2.0)], "logs": [plane.log(attempt, "hello\n")]}
    first = await plane.node_report("node-0", seq=7, **parts)
    again = await plane.node_report("node-0", seq=7, **parts)
    late = await plane.node_report("node-0", seq=3, **parts)
    assert (first.accepted_seq, again.accepted_seq, late.accepted_seq) == (7, 7, 7)
    assert len(await plane.rows(metrics)) == len(await plane.rows(logs)) == 1
    assert (await plane.rows(progress))[0].values == {"loss": 2.0}
    restarted = await plane.node_report("node-0", seq=1, boot="another", **parts)
    assert restarted.accepted_seq == 1
    assert len(await plane.rows(logs)) == 1, "the same bytes of the same stream are one piece"


async def test_a_heartbeat_shows_on_the_node(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    plane.later(3)
    await plane.heartbeat("node-0", skew_s=-90)
    node = await plane.node("node-0")
    assert (node.runner_seen_at, node.stats_at, node.clock_skew_s) == (plane.now, plane.now, pytest.approx(90))
    assert (node.stats["warm_ready"], node.stats["cpu_utilization"]) == (True, 0.5)


async def test_logs_are_bytes_in_files_and_rows_in_an_index(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run(resources={"ranks_per_replica": 2})
    text = "grüße\0\n"
    await plane.node_report(
        "node-0",
        logs=[plane.log(attempt, text), plane.log(attempt, "err", rank=1, stream="stderr"), plane.log(attempt, "")],
    )
    await plane.node_report("node-0", logs=[plane.log(attempt, "more", offset=len(text.encode()))])
    async with plane.engine.connect() as conn:
        rows = list((await conn.execute(select(logs).order_by(logs.c.id))).mappings())
    assert [(row["rank"], row["stream"], row["start_bytes"]) for row in rows] == [
        (0, "stdout", 0),
        (1, "stderr", 0),
        (0, "stdout", len(text.encode())),
    ]
    assert await read_pieces(plane.files, rows) == [text.encode(), b"err", b"more"]


@pytest.mark.parametrize(
    "change",
    [
        {"data": "no base64!"},
        {"stream": "stdlog"},
        {"rank": -1},
        {"rank": 1 << 40},
        {"offset": -1},
        {"offset": 1 << 63},
    ],
)
async def test_a_chunk_that_cannot_be_is_passed_over(plane: ControlPlane, change: dict) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    bad = plane.log(attempt, "bad").model_copy(update=change)
    await plane.node_report("node-0", logs=[bad, plane.log(attempt, "good")])
    assert [row.length_bytes for row in await plane.rows(logs)] == [4]


async def test_points_are_rolled_up_at_three_resolutions(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    for step, loss in enumerate([3.0, 1.0, 2.0], start=1):
        plane.later(8)
        await plane.node_report("node-0", metrics=[plane.metric(attempt, step, loss=loss)])
    rows = await plane.rows(metric_rollups, metric_rollups.c.resolution_s, metric_rollups.c.bucket)
    assert [(r.resolution_s, r.min, r.max, r.sum, r.count, r.last_step) for r in rows] == [
        (10, 3.0, 3.0, 3.0, 1, 1),
        (10, 1.0, 1.0, 1.0, 1, 2),
        (10, 2.0, 2.0, 2.0, 1, 3),
        (60, 1.0, 3.0, 6.0, 3, 3),
        (600, 1.0, 3.0, 6.0, 3, 3),
    ]
    assert all(row.bucket.timestamp() % row.resolution_s == 0 for row in rows)


async def test_progress_keeps_what_is_reported_seldom(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    await plane.node_report("node-0", marks=[plane.mark(attempt, "progress", total_steps=100)])
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 1, loss=3.0, lr=0.1)])
    plane.later(1)
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 2, loss=2.0)])
    row = (await plane.rows(progress))[0]
    assert (row.step, row.total_steps, row.values, row.at) == (2, 100, {"loss": 2.0, "lr": 0.1}, plane.now)


async def test_a_step_without_any_value_is_progress_too(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    plane.later(1)
    await plane.node_report("node-0", metrics=[plane.metric(attempt, 7)])
    row = (await plane.rows(progress))[0]
    assert (row.step, row.values, row.at) == (7, {}, plane.now)
    assert not await plane.rows(metrics)


async def test_values_that_are_not_finite_are_refused_one_by_one_and_told_once(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    for step in (1, 2):
        bad = {"grad_norm": "nan", "x": math.inf, "y": "-inf", "z": "seven"}
        await plane.node_report("node-0", metrics=[plane.metric(attempt, step, loss=1.0, **bad)])
    assert [(row.name, row.value) for row in await plane.rows(metrics)] == [("loss", 1.0), ("loss", 1.0)]
    told = await notes(plane)
    assert len(told) == 4
    assert any("grad_norm was NaN" in message for message in told)


async def test_values_whose_sum_could_not_be_stored_are_refused(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    for step in (1, 2):
        values = {"huge": 1.7e308, "minus": -1.7e308, "large": 1e100, "small": 5e-324, "loss": 1.0}
        await plane.node_report("node-0", metrics=[plane.metric(attempt, step, **values)])
    assert {row.name: row.value for row in await plane.rows(metrics)} == {"large": 1e100, "small": 0.0, "loss": 1.0}
    assert [message for message in await notes(plane) if "huge" in message] == [
        "The metric huge was 1.7e+308; values beyond 1e+100 are dropped."
    ]
    window = Window(None, None)
    async with plane.engine.connect() as conn:
        await conn.execute(delete(metrics).where(metrics.c.name == "small"))  # so that its roll-ups are read
        extents = await list_extents(conn, job_id, names=None, window=window)
        series = [await load_series(conn, job_id, extent, window=window, max_points=10) for extent in extents]
    assert {each.name: each.points[-1].mean for each in series} == {"large": 1e100, "small": 0.0, "loss": 1.0}


async def test_what_cannot_be_stored_costs_neither_the_heartbeat_nor_the_others(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.add_nodes(1)
    (_, bad), (_, good) = await plane.run(), await plane.run()
    taken = record_node_report.record_metrics

    async def unstorable(conn: Any, fence: Any, *rest: Any) -> None:
        await taken(conn, fence, *rest)
        if fence.id == bad.id:
            await conn.exec_driver_sql("SELECT 1e308::float8 + 1e308::float8 * 1.7")

    monkeypatch.setattr(record_node_report, "record_metrics", unstorable)
    plane.later(5)
    for step in (1, 2):
        parts = {
            "metrics": [plane.metric(bad, step, loss=1.0), plane.metric(good, step, loss=2.0)],
            "logs": [plane.log(bad, "x", offset=step), plane.log(good, "x", offset=step)],
            "marks": [plane.mark(good, "first_step")],
        }
        answer = await plane.heartbeat("node-0", bad, good, **parts)
        assert (answer.accepted_seq, answer.refused) == (plane.seqs["node-0"], [])
    assert (await plane.node("node-0")).runner_seen_at == plane.now
    assert [row.value for row in await plane.rows(metrics)] == [2.0, 2.0]
    assert {row.attempt_id for row in await plane.rows(logs)} == {good.id}
    assert (await plane.attempt(good.job_id)).first_step_at == plane.now
    assert len([message for message in await notes(plane) if "cannot be stored" in message]) == 1, "told once"


@pytest.mark.parametrize("name", ["", "x" * 129, "x" * 10_000_000, "a\nb", "ä", "\0", "'; DROP TABLE jobs"])
async def test_a_name_that_cannot_be_is_refused(plane: ControlPlane, name: str) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    await plane.node_report("node-0", metrics=[plane.metric(attempt, **{name: 1.0, "train/loss@1": 1.0})])
    assert [row.name for row in await plane.rows(metrics)] == ["train/loss@1"]
    (told,) = await notes(plane)
    assert "name" in told and len(told) < 400


async def test_names_are_limited_per_point_and_per_job(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    many = {f"m{i:04}": 1.0 for i in range(NAMES_PER_JOB + 50)}
    pages = [dict(list(many.items())[at : at + 100]) for at in range(0, len(many), 100)]
    await plane.node_report("node-0", metrics=[plane.metric(attempt, **page) for page in pages])
    assert len({row.name for row in await plane.rows(metrics)}) == NAMES_PER_JOB
    assert sum("different names" in message for message in await notes(plane)) == 50
    await plane.node_report("node-0", metrics=[plane.metric(attempt, m0001=2.0, other=1.0)])
    assert {row.name for row in await plane.rows(metrics) if row.value == 2.0} == {"m0001"}
    await plane.node_report("node-0", metrics=[plane.metric(attempt, **dict(list(many.items())[:101]))])
    assert any("101 metrics" in message for message in await notes(plane))


async def test_a_step_out_of_range_does_not_take_the_value_with_it(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    await plane.node_report(
        "node-0", metrics=[plane.metric(attempt, 1 << 70, loss=1.0), plane.metric(attempt, 5, loss=2.0)]
    )
    assert sorted((row.step, row.value) for row in await plane.rows(metrics) if row.step) == [(5, 2.0)]
    assert len(await plane.rows(metrics)) == 2


async def test_a_clock_that_is_off_is_corrected(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    plane.later(100)
    point = plane.metric(attempt, loss=1.0).model_copy(update={"at": plane.now.timestamp() - 10 - 7200})
    await plane.node_report("node-0", metrics=[point], skew_s=-7200)
    assert [row.at for row in await plane.rows(metrics)] == [plane.now - timedelta(seconds=10)]
    point = plane.metric(attempt, loss=1.0).model_copy(update={"at": plane.now.timestamp() + 1e9})
    await plane.node_report("node-0", metrics=[point], skew_s=1.5)
    assert max(row.at for row in await plane.rows(metrics)) == plane.now, "never in the future"


async def test_nodes_that_share_jobs_never_wait_for_each_other(plane: ControlPlane) -> None:
    """Each tells of the jobs in an order of its own; both write the progress and the roll-ups of both."""
    await plane.add_nodes(2)
    _, one = await plane.run(replicas=2, gpus=3)
    _, two = await plane.run(replicas=2, gpus=1)
    for turn in range(20):
        plane.later(1)
        forth = {"metrics": [plane.metric(one, loss=1.0), plane.metric(two, loss=1.0)]}
        back = {"metrics": [plane.metric(two, loss=1.0), plane.metric(one, loss=1.0)]}
        mixed = {"metrics": [plane.metric(two, loss=1.0)], "marks": [plane.mark(one, "progress", total_steps=9)]}
        answers = await asyncio.gather(
            plane.node_report("node-0", **forth), plane.node_report("node-1", **(mixed if turn % 2 else back))
        )
        assert [answer.refused for answer in answers] == [[], []]


async def test_a_node_and_the_agent_never_wait_for_each_other(plane: ControlPlane) -> None:
    """Both lock the same attempts; the job that was submitted last started first."""
    await plane.add_nodes(1)
    first, last = await plane.submit(), await plane.submit(priority="high")
    await plane.tick()
    one, two = await plane.attempt(first), await plane.attempt(last)
    assert first < last and one.id > two.id
    async with plane.engine.begin() as conn:
        await conn.execute(select(jobs).where(jobs.c.id == last).with_for_update(key_share=True))
        agent = asyncio.create_task(plane.report(plane.fact(one, "gang_ready"), plane.fact(two, "gang_ready")))
        await waiting(plane, 1)  # it has the first job and its attempt
        marks = [plane.mark(each, "first_step") for each in (one, two)]
        runner = asyncio.create_task(plane.node_report("node-0", marks=marks))
        await waiting(plane, 2)
    assert await agent == [] and (await runner).refused == []


async def waiting(plane: ControlPlane, count: int) -> None:
    """Until so many transactions wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while True:
            async with plane.engine.connect() as conn:
                if (await conn.exec_driver_sql(query)).scalar_one() >= count:
                    return
            await asyncio.sleep(0.01)


async def test_marks_move_the_attempt_forward(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, attempt = await plane.run(replicas=2, gpus=4)
    plane.later(1)
    await plane.node_report("node-0", marks=[plane.mark(attempt, "rendezvous"), plane.mark(attempt, "first_step")])
    plane.later(1)
    await plane.node_report(
        "node-1", marks=[plane.mark(attempt, "first_step", rank=4), plane.mark(attempt, "finished")]
    )
    attempt = await plane.attempt(job_id)
    assert (attempt.rendezvous_at, attempt.first_step_at) == (plane.now - timedelta(seconds=1), plane.now)
    assert attempt.finished_called
    kinds = await plane.kinds(job_id)
    assert kinds.count("rendezvous") == kinds.count("first_step") == 1


async def test_a_checkpoint_is_registered_and_told_once(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    good = {"url": "s3://b/5", "step": 5, "note": "a\0b", "loss": math.nan}
    bad: list[dict] = [{"step": 5}, {"url": "", "step": 5}, {"url": "u", "step": "5"}, {"url": "u", "step": 1 << 70}]
    bad += [{"url": "s3://b/" + "🐘" * 1000, "step": 5}, {"url": "x" * 2049, "step": 5}]
    marks = [plane.mark(attempt, "checkpoint", rank=rank, **good) for rank in (0, 0)]
    await plane.node_report("node-0", marks=[*marks, *(plane.mark(attempt, "checkpoint", **data) for data in bad)])
    (row,) = await plane.rows(checkpoints)
    assert (row.url, row.step, row.attempt_id) == ("s3://b/5", 5, attempt.id)
    assert row.data == {"note": "a�b", "loss": "nan"}
    assert (await plane.kinds(job_id)).count("checkpoint") == 1


async def test_reports_about_others_are_refused(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    _, attempt = await plane.run()
    (other,) = {"node-0", "node-1"} - {(await plane.placements(attempt.job_id))[0].node}
    own = "node-1" if other == "node-0" else "node-0"
    point = plane.metric(attempt, loss=1.0)
    wrong_node = await plane.node_report(other, metrics=[point, point])
    assert [refused.reason for refused in wrong_node.refused] == ["wrong_node"]
    mixed = await plane.node_report(
        own,
        metrics=[
            point,
            point.model_copy(update={"epoch": 9}),
            point.model_copy(update={"attempt_id": "att_" + "1" * 32}),
        ],
    )
    assert sorted(refused.reason for refused in mixed.refused) == ["stale_epoch", "unknown_attempt"]
    assert len(await plane.rows(metrics)) == 1


async def test_last_words_are_taken_until_the_job_starts_again(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run(retries={"max": 1, "backoff": 0})
    await plane.report(plane.ended(attempt, 1))
    parts = {
        "logs": [plane.log(attempt, "Traceback\n")],
        "metrics": [plane.metric(attempt, loss=1.0)],
        "marks": [plane.mark(attempt, "checkpoint", url="s3://b/1", step=1)],
    }
    assert (await plane.node_report("node-0", **parts)).refused == []
    assert len(await plane.rows(logs)) == len(await plane.rows(metrics)) == len(await plane.rows(checkpoints)) == 1
    await plane.tick()
    parts["marks"] = [plane.mark(attempt, "checkpoint", url="s3://b/2", step=2)]
    parts["logs"] = [plane.log(attempt, "late\n", offset=100)]
    late = await plane.node_report("node-0", **parts)
    assert [refused.reason for refused in late.refused] == ["stale_epoch"]
    assert len(await plane.rows(metrics)) == len(await plane.rows(checkpoints)) == 1
    assert len(await plane.rows(logs)) == 2, "logs change nothing of the job"


async def test_the_longest_url_of_a_checkpoint_can_be_stored(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    noise = random.Random(1).choices(string.ascii_letters, k=URL_MAX_BYTES)  # an index compresses what repeats
    await plane.node_report("node-0", marks=[plane.mark(attempt, "checkpoint", url="".join(noise), step=1)])
    assert len((await plane.rows(checkpoints))[0].url) == URL_MAX_BYTES


@pytest.mark.parametrize("retries", [0, 1], ids=["over", "queued again"])
async def test_last_words_are_taken_for_an_hour_after_the_server_learned_of_the_end(
    plane: ControlPlane, retries: int
) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run(retries={"max": retries, "backoff": 0})
    ended_at = plane.now.timestamp()
    plane.later(5 * 3600)  # the agent could not reach the server
    await plane.report(plane.ended(attempt, 1, at=ended_at))
    plane.later(LAST_WORDS_S)
    last = await plane.node_report("node-0", metrics=[plane.metric(attempt, loss=1.0)])
    plane.later(1)
    late = await plane.node_report("node-0", metrics=[plane.metric(attempt, loss=2.0)])
    assert [[refused.reason for refused in answer.refused] for answer in (last, late)] == [[], ["too_late"]]
    assert [row.value for row in await plane.rows(metrics)] == [1.0]


async def test_a_lost_attempt_says_nothing_any_more(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    _, attempt = await plane.run(replicas=2, gpus=4)
    await plane.lose("node-1")
    mark = plane.mark(attempt, "checkpoint", url="s3://b/9", step=9)
    answer = await plane.node_report("node-0", marks=[mark])
    assert answer.refused == [m.Refused(attempt_id=mark.attempt_id, epoch=1, reason="stale_epoch")]
    assert await plane.rows(checkpoints) == []


async def test_notes_are_told(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    marks = [
        plane.mark(attempt, "note", message="started cold"),
        plane.mark(attempt, "dropped", what="log lines", count=3, bytes=99),
        plane.mark(attempt, "oom"),
        plane.mark(attempt, "from_the_future"),
    ]
    await plane.node_report("node-0", marks=marks)
    assert await notes(plane) == [
        "Started cold.",
        "Rank 0: 3 log lines (99 bytes) were dropped.",
        "Rank 0 ran out of memory.",
    ]


async def test_the_last_of_many_words_are_told(plane: ControlPlane) -> None:
    """They say why the attempt ended; of a node that was without the server one report brings all."""
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    notes = [plane.mark(attempt, "note", message=f"note {number}") for number in range(30)]
    warned = [plane.mark(attempt, "health", check="spike", message=f"spike {number}") for number in range(30)]
    stopped = plane.mark(attempt, "health", check="nan", action="stop", message="the loss is NaN")
    oom = plane.mark(attempt, "oom", message="rank 0 ran out of memory")
    await plane.node_report("node-0", marks=[*notes, *warned, stopped, oom])
    told = [event.message for event in await plane.rows(events, events.c.id) if event.kind in ("health", "note")]
    assert len(told) == 40
    assert [told[18], told[19], told[38], told[39]] == [
        "Spike 29.",
        "The loss is NaN.",
        "Note 29.",
        "Rank 0 ran out of memory.",
    ]


async def test_what_checks_find_is_told_and_speaks_against_the_node_after_repeats(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    slow = "rank 4 takes 1.9 times as long as the others"
    found = {"check": "straggler", "action": "warn", "message": slow, "blamed": 4}

    async def suspects() -> dict[str, int]:
        async with plane.engine.connect() as conn:
            rows = await list_nodes(conn, tenant=None, after=None, limit=10, now=plane.now)
        return {row.name: row.suspect_attempts for row in rows}

    for _ in range(2):
        _, attempt = await plane.run(replicas=2, gpus=4)
        marks = [plane.mark(attempt, "health", **found), plane.mark(attempt, "health", **found)]
        loss = {"check": "nan", "action": "skip", "message": "the loss of step 3 is NaN", "blamed": 0}
        await plane.node_report("node-0", marks=[*marks, plane.mark(attempt, "health", **loss)])
        await plane.report(plane.ended(attempt, *[0] * 8))
    assert await suspects() == {"node-0": 0, "node-1": 2}
    told = [event for event in await plane.rows(events) if event.kind == "health"]
    straggler, nan = "Rank 4 takes 1.9 times as long as the others.", "The loss of step 3 is NaN."
    assert [event.message for event in told] == [straggler, straggler, nan] * 2
    assert told[0].data == {"check": "straggler", "action": "warn", "blamed": 4}
    for wanted in (NodeState.CORDONED, NodeState.READY):
        node = await plane.node("node-1")
        await set_node_state(plane.engine, node.id, wanted=wanted, actor=SYSTEM, now=plane.now)
    assert await suspects() == {"node-0": 0, "node-1": 0}
