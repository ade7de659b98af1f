"""Reservations: when a waiting job is expected to start, and who may start before it without delaying it."""

import pytest
from phalanx_server.scheduling.planner import schedule
from snapshots import NOW, evicted_by, expected_by, held_by, node, queued, running, snapshot_of, starts_of, tenant

HALF = running("r", "n0", 4, started_at=900, time_limit_s=200, priority=1)
"""Half of the node, until NOW + 100."""
BIG = queued("big", 8, priority=1)


def plan_of(jobs, nodes=None, tenants=None, **more):
    return schedule(snapshot_of(jobs, nodes or [node("n0")], tenants, **more))


LET_PAST = {
    "a job that ends when the waiting one starts is let past": ({"time_limit_s": 100}, True),
    "one that would end later is not": ({"time_limit_s": 101}, False),
    "nor one of which nobody knows when it ends": ({}, False),
    "a prediction counts, where the limit is longer": ({"time_limit_s": 900, "predicted_s": 100}, True),
    "or where there is no limit": ({"predicted_s": 100}, True),
    "a prediction that is too long does not": ({"predicted_s": 101}, False),
    "the limit counts where the prediction is longer": ({"time_limit_s": 100, "predicted_s": 900}, True),
    "what earlier attempts ran counts as done": ({"predicted_s": 600, "done_s": 500}, True),
    "a job that outlived its prediction is taken to run to its limit": (
        {"predicted_s": 600, "done_s": 600, "time_limit_s": 701}, False,
    ),
    "of its limit counts what earlier attempts left": ({"time_limit_s": 600, "done_s": 500}, True),
    "which may be too much": ({"time_limit_s": 600, "done_s": 499}, False),
    "or nothing at all": ({"time_limit_s": 600, "done_s": 700}, True),
    "and so it is with the default limit": ({"done_s": 500, "default": 600}, True),
    "one that would not delay it does not need to end": ({"gpus_per_replica": 4, "gpu_types": ["a100"]}, True),
    "nor one on what the waiting job leaves": ({"gpus_per_replica": 0, "cpus_per_replica": 4}, True),
}  # fmt: skip


@pytest.mark.parametrize(("small", "starts"), LET_PAST.values(), ids=LET_PAST.keys())
def test_who_is_let_past_a_waiting_job(small, starts):
    policy = {"default_time_limit_s": small.pop("default")} if "default" in small else {}
    nodes = [node("n0", cpus=8), {**node("n1"), "gpu_type": "a100"}, node("cpu", gpus=0, cpus=8)]
    big = BIG | {"gpu_types": ["h100"]}
    plan = plan_of([HALF, big, queued("small", 4, **({"gpu_types": ["h100"]} | small))], nodes, policy=policy)
    assert set(starts_of(plan)) == ({"small"} if starts else set())
    assert held_by(plan) == {"big": "capacity"} | ({} if starts else {"small": "reserved"})
    assert expected_by(plan)["big"] == NOW + 100


@pytest.mark.parametrize(("default_s", "starts"), [(100, True), (101, False), (None, False)])
def test_the_default_limit_holds_where_a_job_has_none(default_s, starts):
    plan = plan_of([HALF, BIG, queued("small", 4)], policy={"default_time_limit_s": default_s})
    assert set(starts_of(plan)) == ({"small"} if starts else set())


RUNNING = {
    "the limit": ({"time_limit_s": 500}, 400),
    "the prediction, if it is sooner": ({"time_limit_s": 500, "predicted_s": 300}, 200),
    "the limit, if that is sooner": ({"time_limit_s": 500, "predicted_s": 900}, 400),
    "a prediction without the time of earlier attempts": ({"predicted_s": 300, "done_s": 100}, 100),
    "what earlier attempts left of the limit": ({"time_limit_s": 500, "done_s": 300}, 100),
    "now, if that is nothing": ({"time_limit_s": 500, "done_s": 900}, 0),
    "the limit, once the prediction has passed": ({"time_limit_s": 500, "predicted_s": 50}, 400),
    "nothing, once the prediction has passed and there is no limit": ({"predicted_s": 50}, None),
    "nothing at all": ({}, None),
    "the default limit": ({"default": 150}, 50),
    "its own limit rather than the default": ({"default": 150, "time_limit_s": 500}, 400),
}


@pytest.mark.parametrize(("known", "in_s"), RUNNING.values(), ids=RUNNING.keys())
def test_what_tells_the_end_of_a_running_job(known, in_s):
    policy = {"default_time_limit_s": known.pop("default", None)} if "default" in known else {}
    plan = plan_of([running("r", "n0", 8, started_at=900, **known), queued("big", 8)], policy=policy)
    assert expected_by(plan) == {"big": None if in_s is None else NOW + in_s}


def until(name, on, in_s, gpus=8, **more):
    return running(name, on, gpus, started_at=900, time_limit_s=100 + in_s, **more)


SEVERAL = {
    "each waiting job is expected at an end of its own": (
        [until("r0", "n0", 100), until("r1", "n1", 200), queued("a", 8), queued("b", 8, submitted_at=2)],
        {"a": 100, "b": 200},
    ),
    "or when the one before it will have ended, which has not started yet": (
        [until("r0", "n0", 100), running("r1", "n1", 8), queued("a", 8, time_limit_s=50),
         queued("b", 8, submitted_at=2)],
        {"a": 100, "b": 150},
    ),
    "behind one without an end nothing tells": (
        [until("r0", "n0", 100), running("r1", "n1", 8), queued("a", 8), queued("b", 8, submitted_at=2)],
        {"a": 100, "b": None},
    ),
    "a gang is expected when the last of its places is free": (
        [until("r0", "n0", 100), until("r1", "n1", 200), queued("a", 8, 2)], {"a": 200},
    ),
    "a later job may be expected sooner, if it will have ended": (
        [until("r0", "n0", 100), until("r1", "n1", 200), queued("a", 8, 2), queued("b", 8, time_limit_s=100)],
        {"a": 200, "b": 100},
    ),
    "but not if it would then delay the one before it": (
        [until("r0", "n0", 100), until("r1", "n1", 200), queued("a", 8, 2, time_limit_s=9),
         queued("b", 8, time_limit_s=101)],
        {"a": 200, "b": 209},
    ),
    "one that starts in this pass counts as well": (
        [running("r1", "n1", 8), queued("a", 8, time_limit_s=70), queued("b", 8, submitted_at=2)], {"b": 70},
    ),
    "so does what is stopping, which is gone as soon as it has stopped": (
        [running("r1", "n1", 8), running("s", "n0", 8) | {"state": "stopping"}, queued("a", 8)], {"a": 30},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "expected"), SEVERAL.values(), ids=SEVERAL.keys())
def test_when_waiting_jobs_are_expected(jobs, expected):
    plan = plan_of(jobs, [node("n0"), node("n1")])
    assert expected_by(plan) == {job: None if at is None else NOW + at for job, at in expected.items()}


def test_a_job_is_let_past_two_if_it_delays_neither():
    jobs = [until("r0", "n0", 100, 4), until("r1", "n1", 300, 4), queued("a", 8), queued("b", 8)]
    short, long = queued("short", 4, submitted_at=8, time_limit_s=300), queued("long", 4, submitted_at=9)
    plan = plan_of([*jobs, short, long | {"time_limit_s": 301}], [node("n0"), node("n1")])
    assert expected_by(plan) == {"a": NOW + 100, "b": NOW + 300, "long": None}
    assert starts_of(plan) == {"short": {"n1": 1}}


QUOTA = {
    "what ends before is let past": (queued("small", 4, time_limit_s=100), True),
    "what would still use the quota is not": (queued("small", 4, time_limit_s=101), False),
    "another tenant's is, which has a quota of its own": (queued("small", 4, tenant="u"), True),
}


@pytest.mark.parametrize(("small", "starts"), QUOTA.values(), ids=QUOTA.keys())
def test_a_job_that_waits_for_quota_has_it_reserved(small, starts):
    plan = plan_of([HALF, BIG, small], [node("n0"), node("n1"), node("n2")], [tenant("t", h100=8), tenant("u", h100=8)])
    assert held_by(plan)["big"] == "quota"
    assert expected_by(plan)["big"] == NOW + 100
    assert ("small" in starts_of(plan)) == starts


WINDOWS = {
    "a job without an end waits for the end of the window": (
        [queued("a", 8)], [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}], {"a": 150},
    ),
    "so does one that would run into it": (
        [queued("a", 8, time_limit_s=51)], [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}],
        {"a": 150},
    ),
    "a prediction does not let a job run into it: the limit counts": (
        [queued("a", 8, predicted_s=10, time_limit_s=51)],
        [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}], {"a": 150},
    ),
    "one that ends before starts": (
        [queued("a", 8, time_limit_s=50)], [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}], {},
    ),
    "between two windows there may be time for it": (
        [queued("a", 8, time_limit_s=50)],
        [{"nodes": ["n0"], "starts_at": NOW - 9, "ends_at": NOW + 100},
         {"nodes": ["n0"], "starts_at": NOW + 150, "ends_at": NOW + 200}],
        {"a": 100},
    ),
    "or not": (
        [queued("a", 8, time_limit_s=51)],
        [{"nodes": ["n0"], "starts_at": NOW - 9, "ends_at": NOW + 100},
         {"nodes": ["n0"], "starts_at": NOW + 150, "ends_at": NOW + 200}],
        {"a": 200},
    ),
    "a job that waits for another's end waits for the window too, if it would run into that": (
        [until("r", "n0", 30), queued("a", 8, time_limit_s=21)],
        [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}], {"a": 150},
    ),
    "and not if there is time": (
        [until("r", "n0", 30), queued("a", 8, time_limit_s=20)],
        [{"nodes": ["n0"], "starts_at": NOW + 50, "ends_at": NOW + 150}], {"a": 30},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "windows", "expected"), WINDOWS.values(), ids=WINDOWS.keys())
def test_windows(jobs, windows, expected):
    plan = plan_of(jobs, maintenance=windows)
    assert expected_by(plan) == {job: NOW + at for job, at in expected.items()}
    assert all(reason in ("maintenance", "capacity") for reason in held_by(plan).values())


PROTECTED = {
    "the end of the minimum run time": ([running("v", "n0", 8, protected_until=NOW + 70)], 70),
    "of several the last": (
        [running("v", "n0", 4, protected_until=NOW + 70), running("w", "n0", 4, protected_until=NOW + 90)], 90,
    ),
    "of several of which one is enough the first in the order of victims": (
        [running("v", "n0", 8, protected_until=NOW + 90, priority=-1),
         running("w", "n1", 8, protected_until=NOW + 70, priority=0)], 90,
    ),
    "although the victim would run for longer": ([until("v", "n0", 160, protected_until=NOW + 70)], 70),
    "or the victim's own end, if that is sooner": ([until("v", "n0", 60, protected_until=NOW + 70)], 60),
    "of a job that may not be evicted only its end counts": (
        [until("v", "n0", 160, protected_until=NOW + 70, priority=1)], 160,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "in_s"), PROTECTED.values(), ids=PROTECTED.keys())
def test_a_job_that_may_evict_waits_for_minimum_run_times(jobs, in_s):
    nodes = [node(name) for name in sorted({p["node"] for job in jobs for p in job["placement"]})]
    plan = plan_of([*jobs, BIG], nodes)
    assert evicted_by(plan) == {}
    assert expected_by(plan) == {"big": NOW + in_s}


@pytest.mark.parametrize("restart_s", [30, 0, 7])
def test_a_job_that_waits_for_victims_is_expected_after_a_restart(restart_s):
    plan = plan_of([running("v", "n0", 8), BIG], policy={"restart_s": restart_s})
    assert (held_by(plan), expected_by(plan)) == ({"big": "victims"}, {"big": NOW + restart_s})


def test_a_cpu_job_that_may_start_after_all_does_not_wait_for_those_behind_it():
    """It is first in the queue, but may not take the CPUs of idle GPUs. Once a job behind it has started and taken less
    than its GPUs' share, it takes its turn before what is reserved for others."""
    on = [node("n0", 4, cpus=8)]
    first = queued("first", 0, priority=2, cpus_per_replica=4)
    gpus = queued("gpus", 2, priority=1, cpus_per_replica=0, time_limit_s=1000)
    behind = queued("behind", 4, cpus_per_replica=8, time_limit_s=1000)
    plan = plan_of([first, gpus, behind], nodes=on)
    assert sorted(starts_of(plan)) == ["first", "gpus"]
    assert held_by(plan) == {"behind": "capacity"}
