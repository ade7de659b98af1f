"""Tiny traces whose outcome is computed by hand, and what must hold of every replay."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_server.scheduling.snapshot import Policy, spread
from phalanx_server.scheduling.speedup import progress
from phalanx_server.simulation import replay as replaying
from phalanx_server.simulation.figures import figures_of, summary_of
from phalanx_server.simulation.replay import Rules, replay
from phalanx_server.simulation.trace import Cluster, Pool, TraceJob

TWO = Cluster("two", (Pool(1, 2, "g"),))
FOUR = Cluster("four", (Pool(2, 2, "g"),))


def rows(*jobs):
    """(submit_s, duration_s, gpus) each, called a, b, c …"""
    return [
        TraceJob(id=id_, submit_s=at, duration_s=runs, gpus=gpus, time_limit_s=2 * runs)
        for id_, (at, runs, gpus) in zip("abcdefgh", jobs, strict=False)
    ]


def ends(done):
    return {course.job.id: course.ended_at for course in done.courses}


def test_each_job_runs_as_soon_as_there_is_room():
    done = replay(rows((0, 10, 1), (1, 10, 2), (12, 3, 1)), TWO, Rules())
    assert ends(done) == {"a": 10, "b": 20, "c": 23}, "b waits for a until 10, c for b until 20"
    figures = figures_of([summary_of(done)])
    assert figures["avg_jct_s"] == round((10 + 19 + 11) / 3, 3)
    assert figures["avg_wait_s"] == round((0 + 9 + 8) / 3, 3)
    assert (figures["p50_jct_s"], figures["makespan_s"]) == (11, 23)
    assert figures["utilization"] == round((10 + 20 + 3) / (2 * 23), 4)
    assert (figures["jobs"], figures["never_started"], figures["preemptions"]) == (3, 0, 0)


def test_events_of_one_moment_share_a_pass():
    done = replay(rows((0, 10, 2), (10, 5, 1), (10, 5, 1)), TWO, Rules())
    assert ends(done) == {"a": 10, "b": 15, "c": 15}
    assert len(done.passes_s) == 2, "nothing waits at 15"


def test_a_job_that_can_never_start_is_counted_and_holds_up_nobody():
    done = replay(rows((0, 10, 3), (1, 5, 2)), TWO, Rules())
    assert ends(done) == {"a": None, "b": 6}
    assert figures_of([summary_of(done)], skipped=2)["never_started"] == 3


def test_a_job_without_a_run_time_ends_at_once_and_an_empty_trace_is_no_error():
    assert ends(replay(rows((5, 0, 1)), TWO, Rules())) == {"a": 5}
    assert figures_of([summary_of(replay([], TWO, Rules()))])["jobs"] == 0


def test_gpu_types_are_those_that_the_row_names():
    cluster = Cluster("mixed", (Pool(1, 1, "T4 (AWS)"), Pool(1, 1, "V100")))
    types = ("T4", "T4", None)
    trace = rows((0, 9, 1), (0, 5, 1), (0, 5, 1))
    jobs = [replace(row, gpu_type=gpu_type) for row, gpu_type in zip(trace, types, strict=True)]
    done = replay(jobs, cluster, Rules())
    assert ends(done) == {"a": 9, "b": 14, "c": 5}


def test_jobs_without_gpus_take_cpus():
    cluster = Cluster("cpus", (Pool(1, 0, "none", cpus_per_node=4),))
    done = replay([replace(row, cpus=3) for row in rows((0, 5, 0), (0, 5, 0))], cluster, Rules())
    assert ends(done) == {"a": 5, "b": 10}


def told(monkeypatch, trace, rules=None):
    """What the planner is told, as (now, {job: its snapshot value})."""
    seen = []

    class Listening(replaying.Planner):
        def apply(self, changes):
            seen.append((changes.now, {job.id: job for job in changes.jobs}))
            return super().apply(changes)

    monkeypatch.setattr(replaying, "Planner", Listening)
    replay(trace, TWO, rules or Rules())
    return seen


def test_the_pass_sees_limits_and_history_but_no_true_run_times(monkeypatch):
    by_time = dict(told(monkeypatch, rows((0, 70, 2), (1, 100, 2), (71, 100, 2))))
    first, third = by_time[0]["a"], by_time[71]["c"]
    assert (first.time_limit_s, first.predicted_s) == (140, 140), "nothing is known but the limit"
    assert third.predicted_s == 70, "as long as a, which had ended by then"


def test_jobs_that_wait_are_predicted_anew_as_others_end(monkeypatch):
    by_time = dict(told(monkeypatch, rows((0, 70, 2), (1, 100, 2), (2, 100, 2))))
    assert by_time[2]["c"].predicted_s == 200
    assert by_time[70]["c"].predicted_s == 70


def test_the_clairvoyant_pass_sees_true_run_times(monkeypatch):
    (_, jobs), *_ = told(monkeypatch, rows((0, 70, 2)), Rules(clairvoyant=True))
    assert (jobs["a"].predicted_s, jobs["a"].time_limit_s) == (70, 70)


def test_a_prediction_that_is_outlived_is_made_anew(monkeypatch):
    trace = [replace(row, time_limit_s=None) for row in rows((0, 10, 2), (20, 15, 2), (33, 1, 2))]
    by_time = dict(told(monkeypatch, trace))
    assert by_time[20]["b"].predicted_s == 10
    assert by_time[33]["b"].predicted_s == 20, "at 30 it had outlived all that was known: as long again"
    assert by_time[33]["b"].state == "running"


# ---------------------------------------------------------------- what holds of every replay

CURVE = {1: 100.0, 2: 55.0, 4: 32.0, 8: 40.0}

traces = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 4), st.sampled_from("xy"), st.sampled_from("mn")),
    min_size=1,
    max_size=14,
)
policies = st.builds(
    Policy,
    order=st.sampled_from(["fifo", "shortest"]),
    backfill=st.booleans(),
    fair_sharing=st.booleans(),
    consolidation=st.booleans(),
    restart_s=st.sampled_from([0.0, 3.0, 30.0]),
)


@settings(max_examples=60)
@given(traces, policies, st.booleans(), st.booleans(), st.sampled_from([0.0, 5.0]))
def test_no_gpu_is_used_twice_and_all_work_is_done(jobs, policy, clairvoyant, elastic, min_runtime_s):
    trace = [
        TraceJob(id=f"j{i:02}", submit_s=at, duration_s=runs, gpus=gpus, tenant=tenant, model=model, time_limit_s=40)
        for i, (at, runs, gpus, tenant, model) in enumerate(sorted(jobs))
    ]
    rules = Rules(
        policy=policy,
        clairvoyant=clairvoyant,
        profiles={"m": CURVE} if elastic else {},
        min_runtime_s=min_runtime_s,
    )
    done = replay(trace, FOUR, rules)
    assert all(course.ended_at is not None for course in done.courses)
    assert all(gpus <= 2 for gpus in most_used(done).values())
    for course in done.courses:
        assert work_done(course, policy.restart_s) == pytest.approx(work_of(course), abs=1e-6)


def most_used(done):
    """By node: the most GPUs that were in use at once."""
    steps = defaultdict(list)
    for course in done.courses:
        for attempt in course.attempts:
            for node, replicas in spread(attempt.placement).items():
                steps[node] += [(attempt.began_at, 1, replicas), (attempt.ended_at, 0, -replicas)]
    most = {}
    for node, changes in steps.items():
        used = most[node] = 0
        for _, _, change in sorted(changes):
            used += change
            most[node] = max(most[node], used)
    return most


def work_of(course):
    """In seconds of one replica where the job is elastic, else of the gang."""
    return course.total_s * (progress(course.job, course.job.replicas) if course.is_elastic else 1.0)


def work_done(course, restart_s):
    for number, attempt in enumerate(course.attempts):
        held_s = attempt.ended_at - attempt.began_at
        assert attempt.progressed_s <= max(0.0, held_s - (restart_s if number else 0.0)) + 1e-6
    pace = [progress(course.job, a.replicas) if course.is_elastic else 1.0 for a in course.attempts]
    return sum(a.progressed_s * speed for a, speed in zip(course.attempts, pace, strict=True))
