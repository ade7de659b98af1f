"""What an agent reports, and what becomes of attempts and jobs."""

from __future__ import annotations

from datetime import timedelta

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.access import SYSTEM
from phalanx_server.domain.attempt import StopCause
from phalanx_server.domain.errors import Superseded
from phalanx_server.domain.messages import RankExit
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.event_views import load_named_rank
from phalanx_server.store.ids import new_id
from phalanx_server.store.schema import clusters, outbox


async def test_a_job_runs_and_succeeds(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id = await plane.submit(replicas=2, gpus=4)
    await plane.tick()
    assert await plane.state(job_id) == "starting"
    created = (await plane.attempt(job_id)).created_at
    plane.later(1)
    attempt = await plane.start(job_id)
    job = await plane.job(job_id)
    assert (job.state, job.started_at) == ("running", plane.now)
    assert (attempt.state, attempt.gang_ready_at, attempt.started_at) == ("running", plane.now, plane.now)
    assert [rank["rank"] for rank in attempt.ranks] == list(range(8))
    plane.later(60)
    assert await plane.report(plane.ended(attempt, *[0] * 8)) == []
    job, attempt = await plane.job(job_id), await plane.attempt(job_id)
    assert (job.state, job.finished_at, job.failures) == ("succeeded", plane.now, 0)
    assert (attempt.state, attempt.outcome, attempt.ended_at) == ("ended", "succeeded", plane.now)
    assert attempt.released_at == plane.now
    assert all(placement.released_at for placement in await plane.placements(job_id))
    assert (await plane.desired()).attempts == []
    assert await plane.kinds(job_id) == ["starting", "gang_ready", "running", "attempt_ended", "succeeded"]
    assert [row.topic for row in await plane.rows(outbox, outbox.c.id)] == ["job.running", "job.succeeded"]
    assert created == (await plane.attempt(job_id)).created_at


async def test_facts_sent_twice_change_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    facts = [plane.fact(attempt, "gang_ready"), plane.fact(attempt, "started"), plane.ended(attempt, 0)]
    await plane.report(*facts)
    before = await plane.job(job_id), await plane.attempt(job_id), await plane.kinds(job_id)
    plane.later(5)
    assert await plane.report(*facts) == []
    assert (await plane.job(job_id), await plane.attempt(job_id), await plane.kinds(job_id)) == before


async def test_one_report_may_tell_a_whole_life(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    await plane.tick()
    attempt = await plane.attempt(job_id)
    await plane.report(plane.fact(attempt, "gang_ready"), plane.fact(attempt, "started"), plane.ended(attempt, 0))
    assert await plane.state(job_id) == "succeeded"


async def test_the_rank_that_an_end_tells_of_is_kept_with_it(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, attempt = await plane.run(replicas=2, gpus=4, retries={"max": 1, "backoff": 30})
    await plane.report(plane.ended(attempt, *[0] * 4, 1, 1, 0, 0, first_failed_rank=5))
    async with plane.engine.connect() as conn:
        assert await load_named_rank(conn, job_id, attempt.id) == 5


async def test_a_failure_is_retried_after_a_pause_and_avoids_the_node(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, attempt = await plane.run(replicas=2, gpus=4, retries={"max": 1, "backoff": 30})
    await plane.report(plane.ended(attempt, *[0] * 5, 1, 0, 0, first_failed_rank=5))
    job = await plane.job(job_id)
    assert (job.state, job.failures, job.reason) == ("queued", 1, "failed")
    assert job.backoff_until == plane.now + timedelta(seconds=30)
    assert job.avoid_nodes == [(await plane.node("node-1")).id]
    await plane.tick()
    assert await plane.state(job_id) == "queued"
    plane.later(31)
    await plane.tick()
    second = await plane.attempt(job_id)
    assert (await plane.state(job_id), second.number, second.epoch) == ("starting", 2, 2)
    await plane.start(job_id)
    await plane.report(plane.ended(second, 1))
    job = await plane.job(job_id)
    assert (job.state, job.failures, job.finished_at) == ("failed", 2, plane.now)
    assert job.message == "rank 0 exited with code 1"


async def test_a_start_that_fails_is_tried_elsewhere(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id = await plane.submit()
    await plane.tick()
    attempt = await plane.attempt(job_id)
    node = (await plane.placements(job_id))[0].node
    await plane.report(plane.fact(attempt, "start_failed", message="no space left", node=node))
    job, attempt = await plane.job(job_id), await plane.attempt(job_id)
    assert (job.state, attempt.outcome) == ("queued", "start_failed")
    assert "no space left" in job.message
    assert job.avoid_nodes == [(await plane.node(node)).id]


async def test_a_start_that_can_never_work_fails_its_job_at_once(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id = await plane.submit(retries={"max": 5})
    await plane.tick()
    attempt = await plane.attempt(job_id)
    await plane.report(plane.fact(attempt, "start_failed", message="no such package", permanent=True))
    job, attempt = await plane.job(job_id), await plane.attempt(job_id)
    assert (job.state, attempt.outcome, job.finished_at) == ("failed", "start_failed", plane.now)
    assert job.message == "could not start: no such package"
    assert job.avoid_nodes == []


async def test_an_end_that_nobody_saw_uses_up_no_retry_but_waits_and_goes_elsewhere(plane: ControlPlane) -> None:
    await plane.add_nodes(2)
    job_id, attempt = await plane.run(replicas=2, gpus=4, retries={"max": 0, "backoff": 40})
    await plane.report(plane.fact(attempt, "ended", exits=[RankExit(rank=rank, exit_code=1) for rank in range(4)]))
    job = await plane.job(job_id)
    assert (job.state, job.failures, job.reason) == ("queued", 0, "node_lost")
    assert job.backoff_until == plane.now + timedelta(seconds=40)
    assert job.avoid_nodes == [(await plane.placements(job_id))[1].node_id], "of rank 4"


async def test_a_rank_that_the_agent_does_not_list_is_not_taken_for_a_success(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(replicas=2)
    await plane.report(plane.fact(attempt, "ended", exits=[RankExit(rank=0, exit_code=0)]))
    assert (await plane.job(job_id)).state == "queued"


@pytest.mark.parametrize(("before_stop", "state"), [(True, "succeeded"), (False, "queued")])
async def test_a_job_that_was_done_before_its_stop_came_does_not_run_again(
    plane: ControlPlane, before_stop: bool, state: str
) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    async with plane.engine.begin() as conn:
        rows = await lock_live_attempts(conn, [job_id])
        await request_stop(conn, rows, cause=StopCause.PREEMPTION, now=plane.now)
    await plane.report(plane.fact(attempt, "ended", exits=[RankExit(rank=0, exit_code=0, before_stop=before_stop)]))
    assert await plane.state(job_id) == state


async def test_a_cancelled_job_is_stopped_then_cancelled(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(preemption={"grace": 7})
    before = (await plane.desired()).version
    await cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    wanted = await plane.desired()
    assert wanted.version != before
    assert [(a.action, a.grace_s, a.started) for a in wanted.attempts] == [("stop", 7.0, True)]
    assert await plane.state(job_id) == "stopping"
    await plane.report(plane.fact(attempt, "ended", exits=[RankExit(rank=0, signal=15)]))
    assert (await plane.job(job_id)).state == "cancelled"
    assert (await plane.attempt(job_id)).outcome == "cancelled"


async def test_a_start_that_crosses_a_cancel_stays_a_stop(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    await plane.tick()
    await cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    attempt = await plane.start(job_id)
    assert (attempt.state, await plane.state(job_id)) == ("stopping", "stopping")
    assert attempt.started_at is not None


async def test_asking_twice_to_stop_keeps_the_first_cause_but_a_cancel_overrules(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run()

    async def ask(cause: StopCause) -> str | None:
        async with plane.engine.begin() as conn:
            await request_stop(conn, await lock_live_attempts(conn, [job_id]), cause=cause, now=plane.now)
        return (await plane.attempt(job_id)).stop_cause

    assert await ask(StopCause.DRAIN) == "drain"
    assert await ask(StopCause.TIME_LIMIT) == "drain"
    assert await ask(StopCause.CANCEL) == "cancel"
    assert (await plane.kinds(job_id)).count("stopping") == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epoch": 7}, "stale_epoch"),
        ({"attempt_id": "att_" + "0" * 32}, "unknown_attempt"),
        ({"attempt_id": "no id at all"}, "unknown_attempt"),
    ],
)
async def test_facts_that_do_not_fit_are_refused(plane: ControlPlane, change: dict, reason: str) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    fact = plane.ended(attempt, 0).model_copy(update=change)
    assert [refused.reason for refused in await plane.report(fact)] == [reason]
    assert await plane.state(job_id) == "running"


async def test_an_attempt_of_another_cluster_is_unknown(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run()
    other = new_id()
    async with plane.engine.begin() as conn:
        await conn.execute(clusters.insert().values(id=other, name="other"))
    plane.cluster_id, ours = other, plane.cluster_id
    assert [refused.reason for refused in await plane.report(plane.ended(attempt, 0))] == ["unknown_attempt"]
    plane.cluster_id = ours
    assert await plane.state(job_id) == "running"


async def test_late_facts_of_an_old_attempt_change_nothing(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id, first = await plane.run(retries={"max": 1, "backoff": 0})
    await plane.report(plane.ended(first, 1))
    await plane.tick()
    await plane.start(job_id)
    before = await plane.job(job_id), await plane.attempt(job_id)
    assert [r.reason for r in await plane.report(plane.fact(first, "started"))] == ["stale_epoch"]
    assert await plane.report(plane.ended(first, 1)) == []
    assert (await plane.job(job_id), await plane.attempt(job_id)) == before


async def test_a_clock_that_is_off_is_corrected(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    await plane.tick()
    attempt = await plane.attempt(job_id)
    plane.later(10)
    at = plane.now.timestamp() - 5
    await plane.report(plane.fact(attempt, "gang_ready", at=at + 3600), skew_s=3600)
    assert (await plane.attempt(job_id)).gang_ready_at == plane.now - timedelta(seconds=5)


async def test_nothing_happens_before_its_cause_or_in_the_future(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    job_id = await plane.submit()
    await plane.tick()
    attempt = await plane.attempt(job_id)
    plane.later(10)
    await plane.report(plane.fact(attempt, "gang_ready", at=0.0), plane.fact(attempt, "started", at=1e12))
    attempt = await plane.attempt(job_id)
    assert (attempt.gang_ready_at, attempt.started_at) == (attempt.created_at, plane.now)


async def test_a_replaced_agent_is_told_so(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run()
    await plane.send_inventory("agent-2")
    with pytest.raises(Superseded):
        await plane.report(plane.ended(attempt, 0), instance="agent-1")
    assert await plane.report(plane.ended(attempt, 0), instance="agent-2") == []
