"""What the pass decides and says, one sentence per row."""

import pytest
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.snapshot import parse_snapshot
from snapshots import NOW, node, plan_of, queued, running, starts_of, tenant

PLACED = {
    "the higher priority goes first": (
        [queued("low", 8, priority=0), queued("high", 8, priority=1)],
        [node("n0")],
        {"high": {"n0": 1}},
    ),
    "at equal priority the older goes first": (
        [queued("young", 8, submitted_at=2), queued("old", 8, submitted_at=1)],
        [node("n0")],
        {"old": {"n0": 1}},
    ),
    "at equal age the smaller id goes first": ([queued("b", 8), queued("a", 8)], [node("n0")], {"a": {"n0": 1}}),
    "a job goes where the least would be left": (
        [running("r", {"n1": 1}, 4), queued("a", 4)],
        None,
        {"a": {"n1": 1}},
    ),
    "a gang takes few nodes, whole ones first, and the tightest for the rest": (
        [running("r", {"n1": 1}, 5), queued("a", 1, 10)],
        [node("n0"), node("n1"), node("n2")],
        {"a": {"n0": 8, "n1": 2}},
    ),
    "a gang that one node holds is not spread": (
        [running("r", {"n0": 1}, 4), queued("a", 2, 3)],
        None,
        {"a": {"n1": 3}},
    ),
    "half a gang never starts": ([running("r", {"n1": 1}, 8), queued("a", 8, 2)], None, {}),
    "a replica may take any number of GPUs": (
        [queued("a", 3, 3), queued("b", 5)],
        None,
        {"a": {"n0": 2, "n1": 1}, "b": {"n1": 1}},
    ),
    "a job that does not fit does not stop smaller ones": (
        [running("r", {"n0": 1}, 4), queued("big", 8, 2), queued("small", 4, submitted_at=9)],
        None,
        {"small": {"n0": 1}},
    ),
    "a gang does not cross clusters": (
        [queued("a", 8, 2)],
        [node("n0", cluster="east"), node("n1", cluster="west")],
        {},
    ),
    "a node that is cordoned, drained or lost takes nothing": (
        [queued("a")],
        [node("n0", state="cordoned"), node("n1", state="draining"), node("n2", state="lost")],
        {},
    ),
    "the node where it failed is avoided while the others could hold it when empty": (
        [running("r", {"n1": 1}, 8), queued("a", 8, avoid_nodes=["n0"])],
        None,
        {},
    ),
    "the node where it failed is taken when the others never could": (
        [queued("a", 8, 2, avoid_nodes=["n0"])],
        None,
        {"a": {"n0": 1, "n1": 1}},
    ),
    "a CPU job leaves free GPUs their share": (
        [queued("a", 0, cpus_per_replica=1)],
        [node("n0", cpus=8)],
        {},
    ),
    "a CPU job takes the share of GPUs that are in use": (
        [running("r", {"n0": 1}, 4, cpus_per_replica=1), queued("a", 0, cpus_per_replica=3)],
        [node("n0", cpus=8)],
        {"a": {"n0": 1}},
    ),
    "a CPU job gets what a GPU job that starts later in the pass leaves of its share": (
        [queued("cpu", 0, cpus_per_replica=8, priority=1), queued("gpu", 8)],
        [node("n0", cpus=8)],
        {"gpu": {"n0": 1}, "cpu": {"n0": 1}},
    ),
    "too little memory keeps a job off a node": (
        [queued("a", 1, memory_gib_per_replica=65)],
        [node("n0", memory_gib=64), node("n1", memory_gib=128)],
        {"a": {"n1": 1}},
    ),
    "a job that must stay in one rack starts on a single node": (
        [queued("a", 4, 2, topology={"required": "rack"})],
        None,
        {"a": {"n0": 2}},
    ),
    "jobs that are alike start until nothing is left": (
        [queued(f"j{i}", 4) for i in range(6)],
        None,
        {"j0": {"n0": 1}, "j1": {"n0": 1}, "j2": {"n1": 1}, "j3": {"n1": 1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "nodes", "starts"), PLACED.values(), ids=PLACED.keys())
def test_placement(jobs, nodes, starts):
    levels = {"topology_levels": ["rack"]}
    assert starts_of(plan_of(jobs, nodes, policy=levels)) == starts


HELD = {
    "on hold": (queued("a", held=True), "held", "is on hold", None),
    "a dependency comes before the times": (
        queued("a", after=[{"job": "b", "on": "ok"}, {"job": "c", "on": "any"}], not_before=NOW + 5),
        "dependency",
        "waits for b to succeed and c to end",
        None,
    ),
    "of several times the first reason is told and the last time is expected": (
        queued("a", not_before=NOW + 5, backoff_until=NOW + 50, delay_until=NOW + 9),
        "not_before",
        "may not start before 1970-01-01T00:16:45Z, as was asked for",
        NOW + 50,
    ),
    "backoff": (
        queued("a", not_before=NOW, backoff_until=NOW + 5),
        "backoff",
        "pauses until 1970-01-01T00:16:45Z after its last attempt",
        NOW + 5,
    ),
    "carbon": (
        queued("a", delay_until=NOW + 5),
        "carbon",
        "waits until 1970-01-01T00:16:45Z for cleaner or cheaper power",
        NOW + 5,
    ),
    "a replica larger than any node is impossible, even on hold": (
        queued("a", 9, held=True),
        "impossible",
        "can never start: needs 1 × (9 gpu), but all nodes together hold 0 of 1 replicas on h100 in one cluster",
        None,
    ),
    "an unknown GPU type is impossible": (
        queued("a", gpu_types=["tpu"]),
        "impossible",
        "can never start: needs 1 × (1 tpu), but all nodes together hold 0 of 1 replicas on tpu in one cluster",
        None,
    ),
    "more than the quota ever allows is impossible": (
        queued("a", 5, tenant="poor"),
        "impossible",
        "can never start: needs 1 × (5 gpu), but the quotas allow poor at most 4 h100",
        None,
    ),
    "quota that others use": (
        queued("a", 2, tenant="poor"),
        "quota",
        "needs 2 h100, and the quota of poor leaves 1",
        None,
    ),
    "too little is free": (queued("a", 8, 2), "capacity", "needs 2 × (8 h100): 16 h100, of which 13 are free", None),
    "enough is free in pieces": (
        queued("a", 6, 2),
        "fragmented",
        "needs 2 × (6 h100): enough is free, but in pieces that hold 1 of 2 replicas",
        None,
    ),
    "a gang that no rack ever holds is impossible; nodes without a label are racks of their own": (
        queued("a", 5, 2, topology={"required": "rack"}),
        "impossible",
        "can never start: needs 2 × (5 gpu), but the largest rack holds 1 of 2 replicas on h100",
        None,
    ),
}


@pytest.mark.parametrize(("job", "reason", "message", "estimated_start"), HELD.values(), ids=HELD.keys())
def test_hold(job, reason, message, estimated_start):
    others = [running("r", {"n0": 1}, 3, tenant="poor")]
    tenants = [tenant("t"), tenant("poor", h100=4)]
    plan = plan_of([*others, job], tenants=tenants, policy={"topology_levels": ["rack"]})
    hold = plan.hold_of("a")
    assert hold is not None
    assert (hold.reason, hold.message, hold.estimated_start) == (reason, message, estimated_start)


TREE = [
    tenant("root"),
    tenant("a", "root", h100={"nominal": 4, "lending_limit": 1}),
    tenant("b", "root", h100={"nominal": 4, "borrowing_limit": 2}),
    tenant("pool", "root", h100=2),
    tenant("c", "pool"),
    tenant("other", None, h100=1),
    tenant("free", None),
]

QUOTA = {
    "nominal is there for the taking": ("a", 4, None),
    "a borrower may use what others lend: b's 4 and the pool's 2": ("a", 10, None),
    "and no more than that": ("a", 11, "impossible"),
    "a lender keeps what it does not lend, a borrower keeps to its limit": ("b", 6, None),
    "a borrower keeps to its limit": ("b", 7, "impossible"),
    "a subtree uses the pool above it and borrows what is lent beside it: 2 + 1 + 4": ("c", 7, None),
    "but not what is never lent": ("c", 8, "impossible"),
    "roots do not lend to each other": ("other", 2, "impossible"),
    "a tree without quotas for a type is limited by the nodes only": ("free", 16, None),
}


@pytest.mark.parametrize(("who", "gpus", "reason"), QUOTA.values(), ids=QUOTA.keys())
def test_quota(who, gpus, reason):
    plan = plan_of([queued("j", 1, gpus, tenant=who)], tenants=TREE)
    hold = plan.hold_of("j")
    assert (None if hold is None else hold.reason) == reason


def test_a_request_within_nominal_goes_before_one_of_higher_priority_that_borrows():
    jobs = [queued("borrows", 5, tenant="b", priority=9), queued("own", 4, tenant="a")]
    assert [s.job for s in plan_of(jobs, tenants=TREE).starts] == ["own", "borrows"]


def test_cpu_and_memory_are_limited_only_where_a_quota_names_them():
    jobs = [queued("a", 0, cpus_per_replica=9, tenant="t"), queued("b", 0, cpus_per_replica=9, tenant="u")]
    plan = plan_of(jobs, [node("n0", gpus=0, cpus=64)], [tenant("t", cpu=8), tenant("u", memory_gib=1)])
    assert [s.job for s in plan.starts] == ["b"]


def test_the_array_limit_counts_what_runs_and_what_starts():
    array = {"id": "x", "max_running": 2}
    jobs = [running("r", {"n0": 1}, array=array), *(queued(f"j{i}", array=array) for i in range(3))]
    plan = plan_of(jobs)
    assert [s.job for s in plan.starts] == ["j0"]
    assert {h.job: h.reason for h in plan.holds} == {"j1": "array", "j2": "array"}


def test_a_job_falls_to_its_second_type_when_the_first_is_full():
    jobs = [running("r", {"n0": 1}, 8), queued("a", 8, gpu_types=["h100", "a100"])]
    start = plan_of(jobs, [node("n0"), {"name": "n1", "gpu_type": "a100", "gpus": 8}]).starts[0]
    assert (start.gpu_type, start.placement[0].node) == ("a100", "n1")


def test_a_node_serves_one_job_at_a_time_where_nodes_are_not_shared():
    plan = plan_of([queued("a"), queued("b"), queued("c")], policy={"share_nodes": "none"})
    assert starts_of(plan) == {"a": {"n0": 1}, "b": {"n1": 1}}


def test_what_is_kept_for_a_waiting_job_is_given_to_nobody_else():
    place = [{"node": "n0", "replicas": 1}]
    jobs = [
        running("v", {"n0": 1}, 4) | {"state": "stopping", "for": "in"},
        queued("in", 6, kept={"gpu_type": "h100", "placement": place}),
        queued("late", 4, priority=9),
    ]
    plan = plan_of(jobs, [node("n0")])
    assert {h.job: h.reason for h in plan.holds} == {"late": "reserved", "in": "victims"}
    hold = plan.hold_of("in")
    assert hold is not None and hold.kept is not None
    assert (hold.message, hold.estimated_start, hold.kept.placement[0].node) == ("waits for v to stop", NOW + 30, "n0")


def test_a_place_that_can_no_longer_be_kept_is_given_up():
    kept = {"gpu_type": "h100", "placement": [{"node": "n0", "replicas": 1}]}
    plan = plan_of([queued("in", 6, kept=kept)], [node("n0", state="lost"), node("n1")])
    assert starts_of(plan) == {"in": {"n1": 1}}


def test_a_job_waits_for_the_window_that_it_would_run_into():
    window = [{"nodes": ["n0"], "starts_at": NOW + 100, "ends_at": NOW + 200}]
    plan = plan_of([queued("long"), queued("short", time_limit_s=100)], [node("n0")], maintenance=window)
    assert starts_of(plan) == {"short": {"n0": 1}}
    hold = plan.hold_of("long")
    assert hold is not None
    assert (hold.reason, hold.estimated_start) == ("maintenance", NOW + 200)


def test_no_nodes_at_all_is_no_error():
    plan = schedule(parse_snapshot({"now": 0, "tenants": [{"name": "t"}], "jobs": [queued("a"), queued("b", 0)]}))
    assert {h.job: h.reason for h in plan.holds} == {"a": "impossible", "b": "impossible"}


def test_nothing_at_all_is_no_error():
    assert schedule(parse_snapshot({"now": 0})).holds == ()
