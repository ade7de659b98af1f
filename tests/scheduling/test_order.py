"""A tenant's own order: first come first served, or the shortest first with a bound on how long a job may wait."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_server.scheduling.order import AGING, UNKNOWN_RUN_S
from phalanx_server.scheduling.planner import schedule
from snapshots import node, queued, running, snapshot_of, starts_of, tenant

SHORTEST = {"order": "shortest"}

ORDER = {
    "fifo: the older goes first, however long it runs": (
        {}, queued("a", submitted_at=1, predicted_s=9000), queued("b", submitted_at=2, predicted_s=1), "a",
    ),
    "shortest: the shorter goes first": (
        SHORTEST, queued("a", submitted_at=1, predicted_s=100), queued("b", submitted_at=2, predicted_s=10), "b",
    ),
    "shortest: unless it is younger by as many seconds as the other needs more GPU-seconds": (
        SHORTEST, queued("a", submitted_at=1, predicted_s=100), queued("b", submitted_at=92, predicted_s=10), "a",
    ),
    "shortest: just before that it does": (
        SHORTEST, queued("a", submitted_at=1, predicted_s=100), queued("b", submitted_at=90, predicted_s=10), "b",
    ),
    "shortest: if that is equal the older goes first": (
        SHORTEST, queued("b", submitted_at=1, predicted_s=100), queued("a", submitted_at=91, predicted_s=10), "b",
    ),
    "shortest: GPUs and replicas count": (
        SHORTEST, queued("a", 2, 2, submitted_at=1, predicted_s=10), queued("b", submitted_at=2, predicted_s=30), "b",
    ),
    "shortest: what earlier attempts have done does not": (
        SHORTEST, queued("a", predicted_s=100, done_s=95), queued("b", predicted_s=10), "a",
    ),
    "shortest: a limit counts where it is sooner than what is predicted": (
        SHORTEST, queued("a", predicted_s=100, time_limit_s=5), queued("b", predicted_s=10), "a",
    ),
    "shortest: a limit counts where nothing is predicted": (
        SHORTEST, queued("a", time_limit_s=100), queued("b", predicted_s=99, submitted_at=1), "b",
    ),
    "shortest: of which nothing is known is taken to run for a day": (
        SHORTEST, queued("a"), queued("b", predicted_s=UNKNOWN_RUN_S - 2), "b",
    ),
    "shortest: the default limit counts as a limit": (
        {**SHORTEST, "default_time_limit_s": 50}, queued("a"), queued("b", predicted_s=51), "a",
    ),
    "shortest: the priority comes first": (
        SHORTEST, queued("a", predicted_s=9000, priority=1), queued("b", predicted_s=1), "a",
    ),
    "shortest: and what stays within nominal quota before that": (
        SHORTEST, queued("a", predicted_s=9000, tenant="owns"), queued("b", predicted_s=1, tenant="borrows"), "a",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "a", "b", "first"), ORDER.values(), ids=ORDER.keys())
def test_which_of_two_goes_first(policy, a, b, first):
    tenants = [tenant("t"), tenant("all", h100=0), tenant("owns", "all", h100=8), tenant("borrows", "all")]
    plan = schedule(snapshot_of([a, b], [node("n0")], tenants, policy=policy))
    assert next(iter(starts_of(plan))) == first


jobs_that_come = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 60), st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=12
)
"""(submitted, runs for so many seconds, GPUs per replica, replicas)"""


def served(coming, policy):
    """A node that runs one job at a time (each takes its memory), from one end to the next: the jobs, as they start."""
    waiting = [
        queued(f"j{i:02}", gpus, replicas, submitted_at=at, predicted_s=s, memory_gib_per_replica=2 // replicas)
        for i, (at, s, gpus, replicas) in enumerate(coming)
    ]
    now, order = 0.0, []
    while waiting:
        here = [job for job in waiting if job["submitted_at"] <= now]
        if not here:
            now = min(job["submitted_at"] for job in waiting)
            continue
        snapshot = snapshot_of(here, [node("n0", memory_gib=2)], policy=policy)
        (start,) = schedule(snapshot).starts
        (job,) = (job for job in here if job["id"] == start.job)
        waiting.remove(job)
        order.append(job)
        now += job["predicted_s"]
    return order


def overtaken(order):
    """(who was overtaken, by whom): started after a job that was submitted later."""
    return [(late, early) for i, late in enumerate(order) for early in order[:i] if came(early) > came(late)]


def came(job):
    return job["submitted_at"]


def gpu_seconds(job):
    return job["predicted_s"] * job["replicas"] * job["gpus_per_replica"]


@settings(max_examples=100)
@given(jobs_that_come)
def test_a_job_is_overtaken_only_by_those_that_come_within_a_time_for_its_size(coming):
    order = served(coming, SHORTEST)
    assert all(came(by) < came(job) + AGING * gpu_seconds(job) for job, by in overtaken(order))


@settings(max_examples=50)
@given(jobs_that_come)
def test_first_come_first_served_overtakes_nobody(coming):
    assert overtaken(served(coming, {"order": "fifo"})) == []


def test_a_long_job_that_is_old_enough_is_not_passed_by_any_number_of_short_ones():
    short = [queued(f"s{i}", 4, submitted_at=401 + i, predicted_s=1) for i in range(20)]
    jobs = [queued("long", 4, submitted_at=1, predicted_s=100), *short, running("r", "n0", 4)]
    plan = schedule(snapshot_of(jobs, [node("n0")], policy=SHORTEST))
    assert list(starts_of(plan)) == ["long"]
