"""Jobs that have to do with each other, on a real Ray cluster: moved for a gang, of an array, one after another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from small_jobs import PATIENCE_S, SmallJobs, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def jobs(make_up: Callable[..., AbstractContextManager[Any]], tmp_path_factory: Any) -> Iterator[SmallJobs]:
    """On one cluster of two nodes with four GPUs each."""
    with make_up(nodes=2, gpus_per_node=4) as up, up.client() as client:
        yield SmallJobs(up, client, tmp_path_factory.mktemp("jobs"))


def home(attempt: Any) -> str:
    (place,) = attempt.placements
    return place.node


def test_the_one_job_whose_move_makes_room_moves_for_a_gang_and_loses_no_step(jobs: SmallJobs) -> None:
    """Two jobs on one node, one on the other, five GPUs free and no four of them together."""
    client = jobs.client
    client.policy_set({"consolidation": True})
    stay = [jobs.submit(name, "train") for name in ("a", "b")]
    (shared,) = {home(jobs.running(job)) for job in stay}
    filler = jobs.submit("filler", resources={"replicas": 1, "gpus_per_replica": 2})
    assert home(jobs.running(filler)) == shared
    moved = jobs.submit("moved", "train")
    alone = home(jobs.running(moved))
    assert alone != shared
    jobs.end("filler", filler)
    gang = jobs.submit("gang", resources={"replicas": 1, "gpus_per_replica": 4})
    assert home(jobs.running(gang)) == alone
    assert home(jobs.running(moved, 2)) == shared
    first, second = client.attempts(moved)
    assert (first.outcome, first.stop_cause, first.stop_for) == ("migrated", "migration", gang)
    assert [client.job(job).attempts for job in stay] == [1, 1], "the fewest that can move"
    assert jobs.end("gang", gang).state == "succeeded"
    ends = [jobs.end(name, job) for name, job in zip(("a", "b", "moved"), (*stay, moved), strict=True)]
    assert [(end.state, end.failures) for end in ends] == [("succeeded", 0)] * 3
    begun, reached = (client.logs(moved, rank=0, attempt=number).split() for number in (2, 1))
    assert begun[:2] == ["from", reached[-1]] and int(reached[-1]) > 0, (reached, begun)
    assert second.resume_from.endswith(f"step-{reached[-1]}")


def most_at_once(noted: list[str], name: str) -> int:
    most = now = 0
    for line in noted:
        if line[1:].startswith(name):
            now += 1 if line[0] == "+" else -1
            most = max(most, now)
    return most


def submitted(jobs: SmallJobs, document: dict[str, Any], *options: str) -> Any:
    """What `phalanx submit` made of it."""
    file = jobs.marks / f"{document['name']}.json"
    file.write_text(json.dumps(document))
    return json.loads(jobs.up.cli("submit", str(file), *options, "-o", "json").stdout)


def running_of(jobs: SmallJobs, array: str, count: int) -> list[Any]:
    def there() -> list[Any]:
        found = [job for job in jobs.client.jobs(array=array) if job.state == "running"]
        return found if len(found) == count else []

    return wait_for(there, f"{count} jobs of {array} run")


def test_no_more_of_an_array_run_at_once_than_it_says_and_all_of_it_ends(jobs: SmallJobs) -> None:
    document = jobs.document("sweep", "wait")
    array = submitted(jobs, document, "--array", "0-4", "--max-running", "2")["array"]["id"]
    assert [job.array.index for job in sorted(running_of(jobs, array, 2), key=lambda job: job.array.index)] == [0, 1]
    waiting = [job for job in jobs.client.jobs(array=array) if job.array.index > 1]
    assert "of its array run" in jobs.waits_for(waiting[0].id, "array").message
    assert sum(node.gpus_used for node in jobs.client.nodes()) == 2, "six GPUs are free, and stay so"
    jobs.let_end("sweep", 0, 1, 2, 3, 4)
    done = jobs.client.wait_array(array, timeout_s=PATIENCE_S)
    assert (done.states, done.ended) == ({"succeeded": 5}, True)
    noted = jobs.noted()
    assert most_at_once(noted, "sweep") == 2
    assert sorted(line for line in noted if line.startswith("-sweep")) == [f"-sweep{index}" for index in range(5)]


def test_a_cancel_ends_the_whole_array_and_frees_what_it_held(jobs: SmallJobs) -> None:
    document = jobs.document("given-up", "wait")
    array = submitted(jobs, document, "--array", "0-3", "--max-running", "2")["array"]["id"]
    running = {job.id for job in running_of(jobs, array, 2)}
    jobs.up.cli("cancel", array)
    done = jobs.client.wait_array(array, timeout_s=PATIENCE_S)
    assert (done.states, done.ended) == ({"cancelled": 4}, True)
    assert {job.id: job.attempts for job in jobs.client.jobs(array=array)} == {
        job.id: int(job.id in running) for job in jobs.client.jobs(array=array)
    }
    assert most_at_once(jobs.noted(), "given-up") == 2
    wait_for(lambda: not any(node.gpus_used for node in jobs.client.nodes()), "its GPUs are free")


def test_what_waits_for_a_success_or_an_end_starts_only_after_it(jobs: SmallJobs) -> None:
    first = jobs.submit("first")
    jobs.running(first)
    on_ok = submitted(jobs, jobs.document("on-ok", "wait"), "--after", first)["id"]
    on_any = submitted(jobs, jobs.document("on-any", "wait"), "--after-any", first)["id"]
    jobs.let_end("on-ok")
    jobs.let_end("on-any")
    assert f"{first} to succeed" in jobs.waits_for(on_ok, "dependency").message
    assert f"{first} to end" in jobs.waits_for(on_any, "dependency").message
    assert jobs.end("first", first).state == "succeeded"
    assert [jobs.client.wait(job, timeout_s=PATIENCE_S).state for job in (on_ok, on_any)] == ["succeeded"] * 2
    noted = jobs.noted()
    assert noted.index("-first") < min(noted.index("+on-ok"), noted.index("+on-any"))


def test_a_failure_starts_who_waits_for_an_end_and_cancels_who_waits_for_a_success(jobs: SmallJobs) -> None:
    failing = jobs.submit("failing", ends_with=3)
    jobs.running(failing)
    on_any = jobs.submit("however", after={"any": [failing]})
    on_ok = jobs.submit("in-vain", after={"ok": [failing]})
    behind = jobs.submit("behind", after={"ok": [on_ok]})
    jobs.let_end("however")
    assert jobs.end("failing", failing).state == "failed"
    assert jobs.client.wait(on_any, timeout_s=PATIENCE_S).state == "succeeded"
    for job, whom in ((on_ok, failing), (behind, on_ok)):
        end = jobs.client.wait(job, timeout_s=PATIENCE_S)
        assert (end.state, end.reason, end.attempts) == ("cancelled", "dependency_failed", 0)
        assert whom in end.message, end.message
        assert list(jobs.client.events(job))[-1].data["why"] == "dependency_failed"
    noted = jobs.noted()
    assert noted.index("-failing") < noted.index("+however")
    assert not {"+in-vain", "+behind"} & set(noted)
