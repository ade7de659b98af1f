"""Whom a waiting job may evict, in which order, and that it is never for nothing: classic preemption, without fair
sharing. Each row also goes on for several passes in which the victims wait again: nobody is evicted a second time."""

import pytest
from phalanx_server.scheduling.planner import schedule
from rounds import carried_out, rounds
from snapshots import NOW, evicted_by, held_by, node, queued, running, snapshot_of, tenant

WITHIN, RECLAIM, BORROWING = "within_tenant", "reclaim", "reclaim_while_borrowing"


def outcome(jobs, nodes, tenants, **more):
    """Who is evicted by the first pass. Those that follow evict nobody, and let start whom it was done for."""
    first, *later = rounds(snapshot_of(jobs, nodes, tenants, **more))
    assert [evicted_by(plan) for plan in later] == [{}] * len(later)
    wanted = {p.for_job for p in first.preemptions}
    assert wanted <= {s.job for s in later[0].starts}
    assert all(held_by(first)[job] == "victims" for job in wanted)
    return evicted_by(first)


WITHIN_TENANT = {
    "a job of lower priority gives way": ("lower_priority", {"priority": 0}, True),
    "one of equal priority does not, however new": ("lower_priority", {"priority": 1, "submitted_at": 99}, False),
    "one of higher priority does not": ("lower_or_newer_equal", {"priority": 2, "submitted_at": 99}, False),
    "where newer equals give way, one that was submitted later does": (
        "lower_or_newer_equal", {"priority": 1, "submitted_at": 51}, True,
    ),
    "but not one that was submitted at the same time": (
        "lower_or_newer_equal", {"priority": 1, "submitted_at": 50}, False,
    ),
    "nor one that was submitted before, however late it started": (
        "lower_or_newer_equal", {"priority": 1, "submitted_at": 49, "started_at": 99}, False,
    ),
    "there a lower priority gives way even if it is older": (
        "lower_or_newer_equal", {"priority": 0, "submitted_at": 2}, True,
    ),
    "never means nobody": ("never", {"priority": -9, "submitted_at": 99}, False),
    "a job that is not preemptible stays": ("lower_priority", {"preemptible": False}, False),
    "so does one inside its minimum run time": ("lower_priority", {"protected_until": NOW + 1}, False),
    "once that is over it gives way": ("lower_priority", {"protected_until": NOW}, True),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "victim", "evicts"), WITHIN_TENANT.values(), ids=WITHIN_TENANT.keys())
def test_whom_of_its_own_tenant_a_job_evicts(rule, victim, evicts):
    jobs = [running("v", "n0", 8, **victim), queued("in", 8, priority=1, submitted_at=50)]
    plan = schedule(snapshot_of(jobs, [node("n0")], [tenant("t", preemption={"within_tenant": rule})]))
    assert evicted_by(plan) == ({"v": WITHIN} if evicts else {})
    assert held_by(plan) == {"in": "victims" if evicts else "capacity"}


def three(rules=None, *, a=8, b=8, c=8):
    """Three tenants that lend to each other; a's are the rules that matter."""
    return [
        tenant("all"),
        tenant("a", "all", h100=a, preemption=rules),
        tenant("b", "all", h100=b),
        tenant("c", "all", h100=c),
    ]


def of(name, id_, on, gpus=8, **more):
    return running(id_, on, gpus, tenant=name, **more)


NODES = [node("n0"), node("n1"), node("n2")]
BORROWED = [of("b", "b0", "n0", started_at=9), of("b", "b1", "n1"), of("c", "c0", "n2", priority=-9)]

RECLAIMED = {
    "nominal quota is taken back from whom borrows it, and from nobody within its own": (
        {}, BORROWED, queued("in", 8, tenant="a"), {"b0": RECLAIM},
    ),
    "even from a higher priority": (
        {"reclaim": "any"}, [j | {"priority": 7} for j in BORROWED], queued("in", 8, tenant="a"), {"b0": RECLAIM},
    ),
    "but not where only lower priorities are to be evicted": (
        {"reclaim": "lower_priority"}, BORROWED, queued("in", 8, tenant="a"), {},
    ),
    "there a lower priority is": (
        {"reclaim": "lower_priority"}, BORROWED, queued("in", 8, tenant="a", priority=1), {"b0": RECLAIM},
    ),
    "and nobody where reclaiming is off": (
        {"reclaim": "never"}, BORROWED, queued("in", 8, tenant="a", priority=9), {},
    ),
    "a job that would end above nominal takes nothing back": (
        {}, [*BORROWED[:2], of("b", "b2", "n2")], queued("in", 8, 2, tenant="a", priority=9), {},
    ),
    "a tenant that uses its nominal already takes nothing from borrowers": (
        {}, [of("a", "a0", "n0"), of("b", "b1", "n1"), of("b", "b2", "n2")],
        queued("in", 8, tenant="a", priority=9), {"a0": WITHIN},
    ),
    "and if its own jobs are as important, from nobody": (
        {}, [of("a", "a0", "n0"), of("b", "b1", "n1"), of("b", "b2", "n2")], queued("in", 8, tenant="a"), {},
    ),
    "a borrower gives way before the tenant's own lower priority, whatever the borrower's": (
        {}, [of("b", "b0", "n0", priority=9), of("b", "b1", "n1", 4, priority=9), of("a", "a0", "n1", 4, priority=-1),
             of("c", "c0", "n2")],
        queued("in", 4, tenant="a"), {"b1": RECLAIM},
    ),
    "both give way where one is not enough": (
        {}, [of("b", "b0", "n0", priority=9), of("b", "b1", "n1", 4, priority=9), of("a", "a0", "n1", 4, priority=-1),
             of("c", "c0", "n2")],
        queued("in", 8, tenant="a"), {"b1": RECLAIM, "a0": WITHIN},
    ),
    "a borrower is left what is its own": (
        {}, [of("b", "b0", "n0", 6), of("b", "b1", "n0", 2), of("b", "b2", "n1", 4), of("c", "c0", "n2")],
        queued("in", 8, tenant="a"), {"b2": RECLAIM},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "jobs", "job", "evicted"), RECLAIMED.values(), ids=RECLAIMED.keys())
def test_reclaim(rules, jobs, job, evicted):
    assert outcome([*jobs, job], NODES, three(rules)) == evicted


SUBTREES = {
    "a pool belongs to its subtree, which takes it back from outside": (
        [of("out", "o0", "n0"), of("out", "o1", "n1")], "x1", {"o1": RECLAIM},
    ),
    "not from a sibling that uses the pool": ([of("out", "o0", "n0"), of("x2", "s", "n1")], "x1", {}),
    "a tenant with nominal of its own takes that back from a sibling too": (
        [of("out", "o0", "n0", 8), of("x1", "s0", "n1", 8)], "x2", {"s0": RECLAIM},
    ),
    "an outsider takes nothing that the subtree owns": (
        [of("x1", "s0", "n1"), of("out", "o0", "n0")], "out", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "who", "evicted"), SUBTREES.values(), ids=SUBTREES.keys())
def test_reclaim_in_a_tree(jobs, who, evicted):
    """x has a pool of 4, its child x2 4 of its own, and out 8: the nodes hold all of it."""
    tenants = [
        tenant("all"),
        tenant("x", "all", h100=4),
        tenant("x1", "x"),
        tenant("x2", "x", h100=4),
        tenant("out", "all", h100=8),
    ]
    started = [job | {"started_at": 2 + i} for i, job in enumerate(jobs)]
    assert outcome([*started, queued("in", 4, tenant=who)], NODES[:2], tenants) == evicted


POOLED = [
    of("x2", "sibling", "n1", 2, priority=-1),
    of("out", "outside", "n0", 8),
    of("out", "important", "n1", 2, priority=9),
]


@pytest.mark.parametrize("own", [of("x1", "own", "n1", 4, priority=-1), of("x1", "own", "n1", 4, preemptible=False)])
def test_a_sibling_that_borrows_too_does_not_stand_between_a_subtree_and_its_pool(own):
    """x1 ends above its own 8, so it takes nothing from its sibling x2; x ends within its 16 and takes from outside."""
    tenants = [
        tenant("all"),
        tenant("x", "all", h100=8),
        tenant("x1", "x", h100=8),
        tenant("x2", "x"),
        tenant("out", "all"),
    ]
    assert outcome([*POOLED, own, queued("in", 8, tenant="x1")], NODES[:2], tenants) == {"outside": RECLAIM}


SWAP = [of("a", "high", "n0", priority=9), of("a", "low", "n1", 4, priority=-1)]
BORROW = {
    "a borrower swaps its own lower priority for as much": (
        None, [*SWAP, of("b", "b0", "n1", 4)], queued("in", 4, tenant="a"), {"low": WITHIN},
    ),
    "but not for more": (None, SWAP, queued("in", 8, tenant="a"), {}),
    "unless it may evict in order to borrow": (0, SWAP, queued("in", 8, tenant="a"), {"low": WITHIN}),
    "that is, whom is of low enough priority": (-2, SWAP, queued("in", 8, tenant="a"), {}),
    "who may evict in order to borrow takes a low priority from another borrower": (
        0, [of("b", "b0", "n0"), of("b", "b1", "n1", started_at=9)], queued("in", 8, tenant="small", priority=1),
        {"b1": BORROWING},
    ),
    "not one above the limit": (
        0, [of("b", "b0", "n0", priority=1), of("b", "b1", "n1", priority=1)],
        queued("in", 8, tenant="small", priority=2), {},
    ),
    "nor one that is as important": (
        0, [of("b", "b0", "n0"), of("b", "b1", "n1")], queued("in", 8, tenant="small"), {},
    ),
    "who may not takes none": (
        None, [of("b", "b0", "n0"), of("b", "b1", "n1")], queued("in", 8, tenant="small", priority=1), {},
    ),
    "who has used up its nominal takes none from others even so": (
        8, [of("small", "s", "n0", 4, priority=9), of("b", "b0", "n1"), of("b", "b1", "n0", 4)],
        queued("in", 4, tenant="small", priority=9), {},
    ),
    "the limit does not protect a borrower from the right to nominal quota": (
        -5, [of("b", "b0", "n0"), of("b", "b1", "n1", 8, started_at=9)], queued("in", 4, tenant="small"),
        {"b1": RECLAIM},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("most", "jobs", "job", "evicted"), BORROW.values(), ids=BORROW.keys())
def test_eviction_in_order_to_borrow(most, jobs, job, evicted):
    rules = {"borrow": None if most is None else {"max_priority": most}}
    if job["tenant"] == "a":
        tenants = [tenant("all"), tenant("a", "all", h100=8, preemption=rules), tenant("b", "all", h100=8)]
    else:
        tenants = [tenant("all"), tenant("small", "all", h100=4, preemption=rules), tenant("b", "all", h100=4)]
        tenants.append(tenant("c", "all", h100=8))
    assert outcome([*jobs, job], NODES[:2], tenants) == evicted


ORDER = {
    "the lower priority, although it loses more": (
        {"priority": -1, "started_at": 0}, {"priority": 0, "started_at": 900},
    ),
    "then who loses less, although it started first": (
        {"started_at": 0, "checkpointed_at": 990}, {"started_at": 900},
    ),
    "of what was lost before the last start nothing counts": (
        {"started_at": 900, "checkpointed_at": 100}, {"started_at": 800},
    ),
    "then who started last": (
        {"started_at": 20, "checkpointed_at": 990}, {"started_at": 10, "checkpointed_at": 990},
    ),
    "then the smaller id": ({}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("first", "other"), ORDER.values(), ids=ORDER.keys())
def test_the_order_of_victims(first, other):
    jobs = [running("x", "n0", 4, **({"id": "x"} | first)), running("y", "n0", 4, **other)]
    assert outcome([*jobs, queued("in", 4, priority=1)], [node("n0")], None) == {"x": WITHIN}


def test_a_restart_of_many_gpus_costs_more_than_the_little_that_few_lose():
    jobs = [running("wide", "n0", 6, started_at=990), running("narrow", "n0", 2, started_at=950)]
    jobs.append(queued("in", 2, priority=1))
    snapshot = snapshot_of(jobs, [node("n0")], policy={"restart_s": 30})
    (preemption,) = schedule(snapshot).preemptions  # 2 × (50 + 30) = 160 < 240 = 6 × (10 + 30)
    assert (preemption.job, preemption.lost_gpu_s) == ("narrow", 2 * 50)
    (preemption,) = schedule(snapshot_of(jobs, [node("n0")], policy={"restart_s": 0})).preemptions
    assert (preemption.job, preemption.lost_gpu_s) == ("wide", 6 * 10)  # 60 < 100


SPARED = {
    "who turns out not to be needed is spared": (
        [running("a", "n0", 2, priority=-2), running("b", "n0", 6, priority=-1), running("c", "n1", 8)],
        queued("in", 6), {"b"},
    ),
    "so is whoever stands where the job will not go": (
        [running("a", "n1", 4, priority=-1, started_at=990), running("b", "n0", 4, priority=-1),
         running("c", "n0", 4, priority=-1), running("d", "n1", 4)], queued("in", 8), {"b", "c"},
    ),
    "a gang takes all its victims in one pass": (
        [running("a", "n0", 8, priority=-1), running("b", "n1", 8, priority=-2)], queued("in", 8, 2), {"a", "b"},
    ),
    "one that holds a part of what is needed is not evicted alone": (
        [running("a", "n0", 8, priority=-1), running("b", "n1", 8)], queued("in", 8, 2), set(),
    ),
    "nobody is evicted for what can never start": (
        [running("a", "n0", 8, priority=-1), running("b", "n1", 8, priority=-1)], queued("in", 9), set(),
    ),
    "nor while a free place will do": ([running("a", "n0", 8, priority=-1)], queued("in", 8), set()),
    "nor for a job that may not start yet": (
        [running("a", "n0", 8, priority=-1), running("b", "n1", 8, priority=-1)], queued("in", 8, held=True), set(),
    ),
    "of a gang that must stay on one node only that node's jobs": (
        [running("a", "n0", 8, priority=-1), running("b", "n1", 4, priority=-2), running("c", "n1", 2, priority=1)],
        queued("in", 2, 4, topology={"required": "node"}), {"a"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "job", "evicted"), SPARED.values(), ids=SPARED.keys())
def test_nobody_is_evicted_in_vain(jobs, job, evicted):
    assert set(outcome([*jobs, job], None, None)) == evicted


AWAY = {
    "a job on a cordoned node is spared: that would free nothing of use": ("cordoned", None, {}),
    "but its quota may be what is needed": ("cordoned", 8, {"v": WITHIN}),
    "a lost node's jobs stay charged, whatever is done to them": ("lost", 8, {}),
}


@pytest.mark.parametrize(("state", "quota", "evicted"), AWAY.values(), ids=AWAY.keys())
def test_victims_on_nodes_that_take_nothing(state, quota, evicted):
    jobs = [running("v", "n0", 8, priority=-1), queued("in", 8)]
    if quota is None:
        jobs.append(running("r", "n1", 8))
    tenants = [tenant("t", **({} if quota is None else {"h100": quota}))]
    assert outcome(jobs, [node("n0", state=state), node("n1")], tenants) == evicted


def test_of_another_gpu_type_nobody_is_evicted():
    jobs = [running("v", "n0", 8, priority=-1), running("r", "n1", 8, priority=1)]
    nodes = [{**node("n0"), "gpu_type": "a100"}, node("n1")]
    assert outcome([*jobs, queued("in", 8, gpu_types=["h100"])], nodes, None) == {}


def test_what_is_gathered_is_kept_while_the_victims_stop_and_after():
    jobs = [running("v", "n0", 4, priority=-1), queued("in", 8, priority=1), queued("small", 4, priority=0)]
    snapshot = snapshot_of(jobs, [node("n0")])
    plan = schedule(snapshot)
    assert held_by(plan) == {"in": "victims", "small": "reserved"}
    again = schedule(carried_out(snapshot, plan))
    assert (held_by(again), again.starts, again.preemptions) == (held_by(plan), (), ())
    assert again.hold_of("in").kept == plan.hold_of("in").kept
    assert plan.hold_of("in").estimated_start == NOW + 30


def test_two_that_wait_for_one_victim_hold_for_it_and_it_stops_for_the_first():
    jobs = [running("v", "n0", 8, priority=-1), queued("young", 4, submitted_at=2), queued("old", 4, submitted_at=1)]
    plan = schedule(snapshot_of(jobs, [node("n0")]))
    assert [(p.job, p.for_job) for p in plan.preemptions] == [("v", "old")]
    assert held_by(plan) == {"old": "victims", "young": "victims"}
    assert plan.hold_of("young").message == "waits for v to stop"


def test_those_who_gave_way_do_not_take_it_back():
    """Three priorities in one tenant, and two tenants that want what the other has: after one pass nothing is won."""
    jobs = [
        *(of("b", f"b{i}", f"n{i // 4}", 2, priority=i % 3) for i in range(12)),
        *(queued(f"a{i}", 2, tenant="a", priority=i % 3) for i in range(6)),
    ]
    evicted = outcome(jobs, NODES, three(c=0, b=12, a=12))
    assert len(evicted) == 6
    assert set(evicted.values()) == {RECLAIM}
