"""When all of Phalanx is stopped, what runs is put back into the queue, and says why."""

from __future__ import annotations

import pytest
from control_plane import ControlPlane
from phalanx_server import up_jobs
from phalanx_server.actions.cancel_job import cancel_job
from phalanx_server.actions.shut_down import shut_down
from phalanx_server.domain.access import SYSTEM
from phalanx_server.store.schema import attempts, events, jobs
from phalanx_worker.node import ranks


async def test_what_runs_goes_back_into_the_queue_and_is_told_that_phalanx_was_stopped(plane: ControlPlane) -> None:
    await plane.add_nodes(1)
    _, attempt = await plane.run(preemption={"grace": 600})
    asked_at = plane.now
    assert len(await shut_down(plane.engine, grace_most_s=15, now=asked_at)) == 1
    assert len(await shut_down(plane.engine, grace_most_s=5, now=plane.later(1))) == 1, "it has not ended"
    (row,) = await plane.rows(attempts)
    assert row.stop_requested_at == asked_at, "it is asked once"
    assert (row.state, row.stop_cause, row.stop_reason, row.grace_s) == ("stopping", "requeue", "shutdown", 15)
    await plane.report(plane.ended(attempt, 143))
    (job,) = await plane.rows(jobs)
    assert (job.state, job.reason, job.message, job.failures) == ("queued", "requeued", "Phalanx was stopped", 0)
    told = [row.message for row in await plane.rows(events, events.c.id)]
    assert told[-3:] == [
        "Phalanx is being stopped; its ranks are being ended.",
        "Attempt 1 is over: Phalanx was stopped.",
        "Phalanx was stopped. It is queued again.",
    ]


async def test_a_job_that_was_ending_already_is_named_too_and_goes_on_ending_as_it_was(
    plane: ControlPlane, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await plane.add_nodes(1)
    job_id, _ = await plane.run(preemption={"grace": 600})
    await cancel_job(plane.engine, job_id, actor=SYSTEM, now=plane.now)
    await up_jobs.end_attempts(database, hurry=lambda: True)
    said = capsys.readouterr().err
    assert said.startswith("Stopping 1 job (") and "except for those that were ending already" in said
    (row,) = await plane.rows(attempts)
    assert (row.stop_cause, row.grace_s) == ("cancel", 600)


def test_a_node_has_time_to_say_what_became_of_ranks_after_their_grace() -> None:
    assert up_jobs.REPORT_S >= ranks._STREAMS_END_S + ranks._COLLECT_S + 3, "and to send it"


async def test_what_runs_is_waited_for_until_somebody_is_in_a_hurry(
    plane: ControlPlane, database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await up_jobs.end_attempts(database, hurry=lambda: False)
    assert capsys.readouterr().err == "", "nothing runs"
    await plane.add_nodes(1)
    await plane.run()
    asked: list[bool] = []
    await up_jobs.end_attempts(database, hurry=lambda: asked.append(True) or len(asked) > 2)
    assert capsys.readouterr().err.startswith("Stopping 1 job (")


async def test_the_next_start_names_what_ran_and_not_what_only_waits(plane: ControlPlane, database: str) -> None:
    await plane.submit(name="waits", gpus=99)
    await plane.add_nodes(up_jobs.NAMED_MOST + 2)
    assert await up_jobs.taken_up(database) == ""
    ran = [await plane.run(name=f"ran-{number}") for number in range(up_jobs.NAMED_MOST + 2)]
    await shut_down(plane.engine, grace_most_s=15, now=plane.now)
    await plane.report(plane.ended(ran[0][1], 143))
    said = "Taken up again, as not ended before: 7 jobs (ran-0, ran-1, ran-2, ran-3, ran-4, …); `phalanx jobs` shows"
    assert (await up_jobs.taken_up(database)).startswith(said)
