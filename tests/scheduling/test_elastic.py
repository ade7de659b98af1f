"""Elastic jobs: with how many replicas they start, what they give up for others, and when they grow.

Without measurements each doubling of the replicas is taken to gain 1.8 times the progress; the rows say `speedup` where
that matters.
"""

import pytest
from phalanx_server.scheduling.planner import schedule
from rounds import rounds
from snapshots import (
    NOW,
    evicted_by,
    held_by,
    node,
    queued,
    resized_by,
    running,
    snapshot_of,
    starts_of,
    tenant,
)

LINEAR = {"1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0, "8": 8.0}
PAIRS = {"required": "node", "slice": {"level": "node", "replicas": 2}}


def plan_of(jobs, nodes=None, tenants=None, **more):
    return schedule(snapshot_of(jobs, nodes or [node("n0")], tenants, **more))


def elastic(least, most, **more):
    return {"min_replicas": least, "max_replicas": most, **more}


START = {
    "with as many as are preferred, even if more are free": (3, elastic(1, 8), 0, 3),
    "with fewer, if there is room for no more": (6, elastic(2, 8), 5, 3),
    "with the minimum": (6, elastic(3, 8), 5, 3),
    "not with less than the minimum": (6, elastic(4, 8), 5, None),
    "in whole slices": (6, elastic(2, 8, topology=PAIRS), 3, 4),
    "a minimum between two slices is the larger": (4, elastic(1, 4, topology=PAIRS), 7, None),
    "a rigid job with all or none": (6, {}, 5, None),
}


@pytest.mark.parametrize(("wanted", "range_", "used", "starts"), START.values(), ids=START.keys())
def test_an_elastic_job_starts(wanted, range_, used, starts):
    others = [running("r", "n0", used, preemptible=False)] if used else []
    plan = plan_of([*others, queued("e", 1, wanted, **range_)])
    assert starts_of(plan) == ({} if starts is None else {"e": {"n0": starts}})


def test_it_starts_with_as_many_as_its_quota_allows():
    plan = plan_of([queued("e", 1, 6, **elastic(2, 8))], tenants=[tenant("t", h100=3)])
    assert starts_of(plan) == {"e": {"n0": 3}}


def grown(id_, replicas, least=1, most=8, on="n0", gpus=1, **more):
    """An elastic job that runs with so many replicas."""
    return running(id_, {on: replicas}, gpus, **elastic(least, most, **more))


def low(on="n0", gpus=4):
    return running("low", on, gpus, priority=-9)


GIVES = {
    "what is above the minimum is given up, and no more than is needed": (
        [grown("e", 8)], queued("in", 3), {"e": 5}, {},
    ),
    "whatever the priority": ([grown("e", 8, priority=9)], queued("in", 3, priority=-9), {"e": 5}, {}),
    "also by a job that is not preemptible": ([grown("e", 8, preemptible=False)], queued("in", 3), {"e": 5}, {}),
    "down to the minimum": ([grown("e", 8, 2)], queued("in", 6), {"e": 2}, {}),
    "nothing, if that would not be enough": ([grown("e", 8, 2)], queued("in", 7), {}, {}),
    "nothing within its minimum run time": ([grown("e", 8, protected_until=NOW + 1)], queued("in", 3), {}, {}),
    "nothing while what is idle will do": ([grown("e", 5)], queued("in", 3), {}, {}),
    "before anybody is evicted": ([grown("e", 4, priority=9), low()], queued("in", 3), {"e": 1}, {}),
    "and then whoever is needed as well": (
        [grown("e", 4, 2, priority=9), low()], queued("in", 6), {"e": 2}, {"low": "within_tenant"},
    ),
    "nothing, if an eviction alone will do and nothing less": (
        [grown("e", 4, 4, priority=9), low()], queued("in", 4), {}, {"low": "within_tenant"},
    ),
    "nothing that would not help where it is": (
        [grown("e", 4), low()], queued("in", 8), {}, {},
    ),
    "by the one that loses less": (
        [grown("e", 4, checkpointed_at=900), grown("f", 4, checkpointed_at=990)], queued("in", 3), {"f": 1}, {},
    ),
    "and then by the other": (
        [grown("e", 4, checkpointed_at=900), grown("f", 4, checkpointed_at=990)], queued("in", 5),
        {"e": 2, "f": 1}, {},
    ),
    "by its own tenant's jobs first, whatever they lose": (
        [grown("e", 4, checkpointed_at=900), grown("f", 4, checkpointed_at=990, tenant="u")], queued("in", 3),
        {"e": 1}, {},
    ),
    "then by others'": (
        [grown("e", 4, checkpointed_at=900), grown("f", 4, checkpointed_at=990, tenant="u")], queued("in", 5),
        {"e": 1, "f": 2}, {},
    ),
    "in whole slices": ([grown("e", 8, 2, topology=PAIRS)], queued("in", 3), {"e": 4}, {}),
    "only as many slices as are above the minimum": (
        [grown("e", 8, 3, topology=PAIRS)], queued("in", 5), {}, {},
    ),
    "for an elastic job's minimum, not for more": (
        [grown("e", 8)], queued("in", 1, 6, **elastic(2, 8)), {"e": 6}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "job", "resized", "evicted"), GIVES.values(), ids=GIVES.keys())
def test_what_elastic_jobs_give_up(jobs, job, resized, evicted):
    plan = plan_of([*jobs, job], tenants=[tenant("t"), tenant("u")])
    assert (resized_by(plan), evicted_by(plan)) == (resized, evicted)
    assert all(r.for_job == "in" for r in plan.resizes)
    if resized or evicted:
        assert held_by(plan) == {"in": "victims"}


@pytest.mark.parametrize("state", ["cordoned", "draining"])
def test_nobody_shrinks_who_has_a_foot_on_a_node_that_takes_nothing_new(state):
    """It would have to start anew there."""
    wide = running("e", {"n0": 2, "n1": 4}, **elastic(1, 8))
    on = [node("n0", 2, state=state), node("n1", 8, state="ready")]
    plan = plan_of([wide, low("n1"), queued("in", 2)], nodes=on)
    assert (resized_by(plan), evicted_by(plan)) == ({}, {"low": "within_tenant"})


LENT = {
    "of a tenant that waits for its own quota its own job": ("t", {"e": 5}),
    "of others nobody, if it is over its quota": ("poor", {}),
    "of others, if its quota lets it start": ("rich", {"e": 5}),
}


@pytest.mark.parametrize(("who", "resized"), LENT.values(), ids=LENT.keys())
def test_who_takes_what_is_lent_is_within_quota(who, resized):
    tenants = [tenant("t", h100=8), tenant("poor", h100=4), tenant("rich", h100=4)]
    jobs = [grown("e", 8), running("p", "n1", 2, tenant="poor"), running("r", "n1", 6), queued("in", 3, tenant=who)]
    if who == "t":
        jobs = [job for job in jobs if job["id"] not in "pr"]
    assert resized_by(plan_of(jobs, [node("n0"), node("n1")], tenants)) == resized


GROWS = {
    "into what is idle, up to its maximum": ([grown("e", 2, most=6)], {"e": 6}),
    "not where another replica has no room": ([grown("e", 2, gpus=3, most=6)], {}),
    "not beyond its quota": ([grown("e", 2, tenant="u")], {"e": 5}),
    "in whole slices": ([grown("e", 2, most=7, topology=PAIRS)], {"e": 6}),
    "not if more replicas are no faster": ([grown("e", 2, speedup={"1": 1.0, "2": 1.9, "8": 1.9})], {}),
    "not within its minimum run time": ([grown("e", 2, protected_until=NOW + 1)], {}),
    "although it is not preemptible": ([grown("e", 2, most=4, preemptible=False)], {"e": 4}),
    "two that are alike share what is idle": ([grown("e", 2), grown("f", 2)], {"e": 4, "f": 4}),
    "whoever gains more gets it": (
        [grown("e", 2, speedup={"1": 1.0, "2": 1.8, "4": 2.2}), grown("f", 2, most=4, speedup=LINEAR)],
        {"e": 4, "f": 4},
    ),
    "gains count per GPU": (
        [grown("e", 1, most=2, gpus=2, speedup={"1": 1.0, "2": 1.9}), grown("f", 2, most=4, speedup=LINEAR),
         running("r", "n0", 2)],
        {"f": 4},
    ),
    "gains count beside what a job has": (
        [grown("e", 4, most=6, speedup=LINEAR), grown("f", 2, most=4, speedup={"1": 1.0, "2": 1.5, "4": 2.9})],
        {"f": 4},
    ),
    "past a size that is no faster": ([grown("e", 2, speedup={"1": 1.0, "2": 1.9, "4": 1.8, "8": 5.0})], {"e": 8}),
    "not to a size that is no faster on the way to one that it cannot have": (
        [grown("e", 2, speedup={"1": 1.0, "2": 1.9, "6": 1.8, "8": 5.0}), running("r", "n0", 2)], {},
    ),
    "not while another is stopping for a waiting job there": (
        [grown("e", 2, most=4), running("v", "n0", 6, priority=-1), queued("in", 6)], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "resized"), GROWS.values(), ids=GROWS.keys())
def test_elastic_jobs_grow(jobs, resized):
    plan = plan_of(jobs, tenants=[tenant("t"), tenant("u", h100=5)])
    assert resized_by(plan) == resized


def until(id_, on, at, gpus=1, **more):
    return running(id_, on, gpus, started_at=NOW - 100, time_limit_s=100 + at - NOW, **more)


WORTH = {
    "twice as fast for longer than two restarts": (NOW + 61, {}, {"e": 4}),
    "not for just two": (NOW + 60, {}, {}),
    "with a dearer restart not": (NOW + 61, {"restart_s": 31}, {}),
    "with a cheaper one already for less": (NOW + 21, {"restart_s": 10}, {"e": 4}),
    "if restarts cost nothing, always": (NOW + 1, {"restart_s": 0}, {"e": 4}),
}


@pytest.mark.parametrize(("next_at", "policy", "resized"), WORTH.values(), ids=WORTH.keys())
def test_growing_must_be_worth_the_restart_until_the_next_expected_change(next_at, policy, resized):
    """2 → 4 replicas, linear: 4 × (t - restart) > 2 × t, that is, t > 2 restarts. Each kind of change counts alike."""
    e = grown("e", 2, 2, 4, speedup=LINEAR)
    jobs = [e, until("r", "n0", next_at, 4)]
    own_end = [e | {"started_at": NOW - 100, "time_limit_s": 100 + next_at - NOW}]
    reserved = [e, running("x", "n0", 2), until("r", "n1", next_at, 8), queued("in", 8)]
    for rows in (jobs, own_end, reserved):
        assert resized_by(plan_of(rows, [node("n0"), node("n1")], policy=policy)) == resized


STEEP = {"1": 1.0, "2": 1.9, "4": 3.6, "8": 6.8}
FLAT = {"1": 1.0, "2": 1.1, "4": 1.15, "8": 1.2}
EVENS = {
    "a job that gains clearly less gives what is above its share": (
        [grown("e", 7, speedup=FLAT), grown("f", 1, speedup=STEEP)], {"e": 1, "f": 7},
    ),
    "not if it loses nearly as much": ([grown("e", 5, speedup=STEEP), grown("f", 3, speedup=STEEP)], {}),
    "not within its minimum run time": (
        [grown("e", 7, speedup=FLAT, protected_until=NOW + 1), grown("f", 1, speedup=STEEP)], {},
    ),
    "not for one that may not start anew": (
        [grown("e", 7, speedup=FLAT), grown("f", 1, speedup=STEEP, protected_until=NOW + 1)], {},
    ),
    "not for one that is done before the restart pays off": (
        [grown("e", 7, speedup=FLAT), grown("f", 1, speedup=STEEP, predicted_s=NOW + 30)], {},
    ),
    "for one that is nearly done rather than for one with weeks to go": (
        [grown("e", 7, speedup=LINEAR, time_limit_s=9e6), grown("f", 1, speedup=LINEAR, predicted_s=NOW + 600)],
        {"e": 1, "f": 7},
    ),
    "not beyond the taker's quota": (
        [grown("e", 7, speedup=FLAT), grown("f", 1, speedup=STEEP, tenant="poor")], {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "resized"), EVENS.values(), ids=EVENS.keys())
def test_elastic_jobs_even_out_what_they_hold(jobs, resized):
    snapshot = snapshot_of(jobs, [node("n0")], [tenant("t", h100=8), tenant("poor", h100=1)])
    first, *later = rounds(snapshot, most=3)
    assert resized_by(first) == resized
    assert not (resized and any(plan.stops for plan in later)), "and nobody takes it back"


def test_what_is_expected_in_another_cluster_does_not_matter():
    jobs = [grown("e", 2, most=4, speedup=LINEAR), until("r", "n1", NOW + 9)]
    nodes = [node("n0", cluster="east"), node("n1", cluster="west")]
    assert resized_by(plan_of(jobs, nodes)) == {"e": 4}


def test_nobody_grows_and_shrinks_for_ever():
    """Three that would take everything, and jobs that wait for room: after a few passes nothing is changed any more."""
    jobs = [*(grown(f"e{i}", 2, on=f"n{i % 2}") for i in range(3)), *(queued(f"q{i}", 3) for i in range(3))]
    *_, last = rounds(snapshot_of(jobs))
    assert (last.starts, last.resizes, last.preemptions) == ((), (), ())
