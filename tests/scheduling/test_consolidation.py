"""What is moved: for a gang that would fit if what is free lay together, and off nodes that are going away."""

import pytest
from phalanx_server.scheduling.planner import schedule
from rounds import rounds
from snapshots import (
    NOW,
    evicted_by,
    held_by,
    moved_by,
    node,
    queued,
    resized_by,
    running,
    snapshot_of,
    starts_of,
    tenant,
)

NODES = [node("n0"), node("n1"), node("n2")]
IN = queued("in", 8)


def plan_of(jobs, nodes=None, tenants=None, *, consolidation=True, **more):
    policy = {"consolidation": consolidation, "topology_levels": ["rack"]}
    return schedule(snapshot_of(jobs, nodes or NODES, tenants, policy=policy, **more))


SCATTERED = [running("a", "n0", 2), running("b", "n1", 2), running("c", "n1", 2), running("d", "n2", 5)]

MOVES = {
    "the only job of a node, rather than two of another": (SCATTERED, IN, {"a": {"n2": 1}}),
    "one that is cheap to move rather than a dear one": (
        [running("a", "n0", 2, started_at=900), running("b", "n1", 2, started_at=990), running("d", "n2", 5)],
        IN, {"b": {"n2": 1}},
    ),
    "the lower priority first, whatever it costs": (
        [running("a", "n0", 2, priority=-1, started_at=500), running("b", "n1", 2, started_at=990),
         running("d", "n2", 6)], IN, {"a": {"n2": 1}},
    ),
    "several, where one is not enough": (
        [running("a", "n0", 2), running("b", "n0", 2), running("c", "n1", 5), running("d", "n2", 5)], IN,
        {"a": {"n1": 1}, "b": {"n2": 1}},
    ),
    "none that is not preemptible": (
        [job | {"preemptible": False} for job in SCATTERED], IN, {},
    ),
    "two, if the one that would do alone is not preemptible": (
        [SCATTERED[0] | {"preemptible": False}, *SCATTERED[1:3], running("d", "n2", 4, preemptible=False)], IN,
        {"b": {"n2": 1}, "c": {"n2": 1}},
    ),
    "none within its minimum run time": ([job | {"protected_until": NOW + 9999} for job in SCATTERED], IN, {}),
    "none while a whole node is free": (SCATTERED[1:], IN, {}),
    "none if there is too little free, wherever it lies": (
        [running("a", "n0", 6), running("b", "n1", 6), running("c", "n2", 6)], IN, {},
    ),
    "none for a job that its quota does not let start": (SCATTERED, IN | {"tenant": "poor"}, {}),
    "none to another cluster": (
        [running("a", "n0", 2), running("b", "n1", 8), running("c", "n2", 8)], IN, {},
    ),
    "a gang as a whole": (
        [running("a", {"n0": 2}, 1), running("b", "n1", 8), running("d", "n2", 5)], IN, {"a": {"n2": 2}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "job", "moved"), MOVES.values(), ids=MOVES.keys())
def test_what_is_moved_for_a_waiting_job(jobs, job, moved):
    nodes = [*NODES, node("far", cluster="west", gpus=4)]
    tenants = [tenant("t"), tenant("poor", h100={"nominal": 8, "borrowing_limit": 0})]
    more = [running("p", "far", 1, tenant="poor", preemptible=False)]
    first, *later = rounds(
        snapshot_of([*jobs, *more, job], nodes, tenants, policy={"consolidation": True}),
    )
    assert (moved_by(first), evicted_by(first)) == (moved, {})
    assert [moved_by(plan) for plan in later] == [{}] * len(later)
    if moved:
        assert held_by(first) == {"in": "victims"}
        assert [s.job for s in later[0].starts] == ["in"]


def test_nothing_is_moved_unless_the_policy_says_so():
    assert moved_by(plan_of([*SCATTERED, IN], consolidation=False)) == {}


def test_moving_comes_before_shrinking_and_before_eviction():
    wide = running("e", {"n2": 5}, 1, min_replicas=1, max_replicas=5, priority=2)
    jobs = [running("a", "n0", 2), running("low", "n1", 8, priority=-9), wide, IN]
    plan = plan_of(jobs)
    assert (moved_by(plan), resized_by(plan), evicted_by(plan)) == ({"a": {"n2": 1}}, {}, {})


def test_a_rack_is_cleared_for_a_gang_that_needs_one():
    nodes = [node(f"n{i}", labels={"rack": f"r{i // 2}"}) for i in range(4)]
    jobs = [running("a", "n0", 2), running("b", "n2", 4), running("c", "n3", 4)]
    plan = plan_of([*jobs, queued("in", 8, 2, topology={"required": "rack"})], nodes)
    assert set(moved_by(plan)) == {"a"}


DRAINING = {
    "a job is moved off": ([running("a", "n0", 4)], {"a": {"n1": 1}}),
    "and stays while there is no room elsewhere": ([running("a", "n0", 4), running("b", "n1", 6)], {}),
    "not to make room are others evicted": ([running("a", "n0", 4), running("b", "n1", 6, priority=-9)], {}),
    "it stays if it is not preemptible": ([running("a", "n0", 4, preemptible=False)], {}),
    "and within its minimum run time": ([running("a", "n0", 4, protected_until=NOW + 1)], {}),
    "a gang that is partly on it moves": ([running("a", {"n0": 1, "n1": 1}, 4)], {"a": {"n1": 2}}),
    "whoever is more important moves first": (
        [running("a", "n0", 4), running("b", "n0", 4, priority=1), running("c", "n1", 4)], {"b": {"n1": 1}},
    ),
    "a job on another node stays": ([running("a", "n1", 4)], {}),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "moved"), DRAINING.values(), ids=DRAINING.keys())
def test_a_draining_node(jobs, moved):
    plan = plan_of(jobs, [node("n0", state="draining"), node("n1")], consolidation=False)
    assert (moved_by(plan), evicted_by(plan)) == (moved, {})
    assert all(m.for_job is None for m in plan.migrations)


WINDOWS = {
    "before the window nothing happens": (1, 100, {}, {}),
    "once it has begun what is there is stopped": (0, 100, {}, {"a": "maintenance"}),
    "also what is not preemptible": (0, 100, {"preemptible": False}, {"a": "maintenance"}),
    "but not what is within its minimum run time": (0, 100, {"protected_until": NOW + 1}, {}),
    "after it nothing": (-100, 0, {}, {}),
}


@pytest.mark.parametrize(("starts_in", "ends_in", "job", "evicted"), WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("state", ["ready", "draining"])
def test_a_maintenance_window(state, starts_in, ends_in, job, evicted):
    nodes = [node("n0", state=state), node("n1")]
    window = {"nodes": ["n0"], "starts_at": NOW + starts_in, "ends_at": NOW + ends_in}
    jobs = [running("a", "n0", 4, **job), running("full", "n1", 6)]
    plan = plan_of(jobs, nodes, maintenance=[window])
    assert (evicted_by(plan), moved_by(plan)) == (evicted, {})
    assert all(p.for_job is None for p in plan.preemptions)


def test_what_a_window_stopped_starts_elsewhere_when_there_is_room():
    window = {"nodes": ["n0"], "starts_at": NOW, "ends_at": NOW + 500}
    first, second, *later = rounds(snapshot_of([running("a", "n0", 4)], maintenance=[window]))
    assert evicted_by(first) == {"a": "maintenance"}
    assert starts_of(second) == {"a": {"n1": 1}}
    assert all(not plan.migrations and not plan.preemptions for plan in later)
