"""Fair sharing: whose turn it is among tenants, and what one may take from another.

In the tables `a` and `b` have no quota of their own: what they use is borrowed of `all`, which has 8 GPUs. A share is
what is used above quota ÷ what could be lent (8) ÷ weight, so it is told in eighths.
"""

import pytest
from phalanx_server.scheduling.planner import schedule
from rounds import rounds
from snapshots import evicted_by, held_by, node, queued, running, snapshot_of, starts_of, tenant

FAIR = {"fair_sharing": True}


def pair(a=1.0, b=1.0, *, used_a=0.0, used_b=0.0, rules=None):
    """Two tenants with their weights and past use, that borrow everything."""
    return [
        tenant("all", h100=8),
        tenant("a", "all", weight=a, usage={"h100": used_a}, preemption=rules),
        tenant("b", "all", weight=b, usage={"h100": used_b}, preemption=rules),
    ]


def has(name, *gpus, on="n0"):
    return [running(f"{name}{i}", on, each, tenant=name, started_at=100 + i) for i, each in enumerate(gpus)]


def wants(name, *gpus, at=1, **more):
    return [queued(f"{name}-{i}", g, tenant=name, submitted_at=at + i, **more) for i, g in enumerate(gpus)]


def order(jobs, tenants, nodes=None):
    return list(starts_of(schedule(snapshot_of(jobs, nodes or [node("n0")], tenants, policy=FAIR))))


TURNS = {
    "who would hold less with its next job started goes first, whatever the age and priority": (
        [*has("a", 2), *wants("a", 1, priority=9), *wants("b", 2, at=50)], pair(), ["b-0", "a-0"],
    ),
    "that counts the next job: a small one of the larger holder may come first": (
        [*has("a", 1), *wants("a", 1, at=50), *wants("b", 4)], pair(), ["a-0", "b-0"],
    ),
    "after each start it is looked at anew": (
        [*wants("a", 2, 2), *wants("b", 1, 1, 1, at=50)], pair(), ["b-0", "a-0", "b-1", "b-2", "a-1"],
    ),
    "at equal shares the less past use goes first": (
        [*wants("a", 1), *wants("b", 1, at=50)], pair(used_a=9e4), ["b-0", "a-0"],
    ),
    "past use counts by weight": (
        [*wants("a", 4), *wants("b", 2, at=50)], pair(2.0, used_a=1e5, used_b=8e4), ["a-0", "b-0"],
    ),
    "at equal past use too, the higher priority": (
        [*wants("a", 1), *wants("b", 1, at=50, priority=1)], pair(), ["b-0", "a-0"],
    ),
    "then the older job": ([*wants("a", 1, at=50), *wants("b", 1)], pair(), ["b-0", "a-0"]),
    "a double weight halves the share": (
        [*has("a", 2), *has("b", 2), *wants("a", 1, at=50), *wants("b", 1)], pair(2.0), ["a-0", "b-0"],
    ),
    "weight 0 comes after every weight": (
        [*has("b", 4), *wants("a", 1, priority=9), *wants("b", 1)], pair(0.0), ["b-0", "a-0"],
    ),
    "within a tenant the priority comes first, then the age": (
        [*wants("a", 1, 1), queued("top", 1, tenant="a", priority=1, submitted_at=99)], pair(), ["top", "a-0", "a-1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "tenants", "starts"), TURNS.values(), ids=TURNS.keys())
def test_whose_turn_it_is(jobs, tenants, starts):
    assert order(jobs, tenants) == starts


def test_a_burst_within_nominal_quota_does_not_get_ahead_of_the_accounts():
    """Shares are zero within nominal quota, and past use is counted only later: each start counts as some at once."""
    tenants = [tenant("all"), tenant("a", "all", h100=8), tenant("b", "all", h100=8)]
    jobs = [*wants("a", 1, 1, 1), *wants("b", 1, 1, 1, at=50)]
    assert order(jobs, tenants) == ["a-0", "b-0", "a-1", "b-1", "a-2", "b-2"]


def test_what_stays_within_nominal_quota_goes_before_what_borrows():
    tenants = [tenant("all", h100=4), tenant("a", "all", h100=4, usage={"h100": 9e9}), tenant("b", "all")]
    assert order([*wants("b", 1, priority=9), *wants("a", 1, at=50)], tenants) == ["a-0", "b-0"]


def test_the_largest_share_over_all_resources_counts():
    """a uses 1 of 8 GPUs but 60 of 64 CPUs: that is its share, against b's 2 of 8."""
    tenants = [tenant("all", h100=8, cpu=64), tenant("a", "all"), tenant("b", "all")]
    jobs = [
        running("a0", "n0", 1, tenant="a", cpus_per_replica=58),
        *has("b", 1),
        *wants("a", 1, cpus_per_replica=2),
        *wants("b", 1, at=50, cpus_per_replica=2),
    ]
    assert order(jobs, tenants, [node("n0", cpus=96)]) == ["b-0", "a-0"]


DEPARTMENTS = [
    tenant("all", h100=8),
    tenant("x", "all"),
    tenant("y", "all"),
    tenant("x1", "x"),
    tenant("x2", "x"),
    tenant("y1", "y"),
]

TOURNAMENT = {
    "tenants of two departments are compared as departments": (
        [*has("x2", 3), *has("y1", 1), *wants("x1", 1), *wants("y1", 1, at=50)], ["y1-0", "x1-0"],
    ),
    "tenants of one department by themselves": (
        [*has("x2", 1), *has("y1", 5), *wants("x2", 1), *wants("x1", 1, at=50)], ["x1-0", "x2-0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "starts"), TOURNAMENT.values(), ids=TOURNAMENT.keys())
def test_tournament(jobs, starts):
    assert order(jobs, DEPARTMENTS) == starts


TAKEN = {
    "a tenant takes until it would hold no more than what is left to the other": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 4)], pair(), 4,
    ),
    "and nothing if it would hold more": ([*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 5)], pair(), 0),
    "from who holds all in one job it takes that, if it would hold less than the other did": (
        [*has("b", 8), *wants("a", 7)], pair(), 1,
    ),
    "but not to hold just as much": ([*has("b", 8), *wants("a", 8)], pair(), 0),
    "with double weight a tenant may hold twice as much: 5 ÷ 2 is less than the 3 that are left": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 5)], pair(2.0), 5,
    ),
    "but not more than that: 6 ÷ 2 is more than 2": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 6)], pair(2.0), 0,
    ),
    "with weight 0 a tenant loses all that it borrows to anybody": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 8)], pair(1.0, 0.0), 8,
    ),
    "and takes nothing from a weight": ([*has("b", 8), *wants("a", 1)], pair(0.0, 1.0), 0),
    "two of weight 0 share as two of equal weight": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 4)], pair(0.0, 0.0), 4,
    ),
    "so neither of them takes more than what is left to the other": (
        [*has("b", 1, 1, 1, 1, 1, 1, 1, 1), *wants("a", 5)], pair(0.0, 0.0), 0,
    ),
    "the priority does not matter": (
        [*(j | {"priority": 9} for j in has("b", 1, 1, 1, 1, 1, 1, 1, 1)), *wants("a", 2)], pair(), 2,
    ),
    "a job inside its minimum run time is left alone": (
        [*(j | {"protected_until": 2000} for j in has("b", 1, 1, 1, 1, 1, 1, 1, 1)), *wants("a", 1)], pair(), 0,
    ),
    "and one that is not preemptible": (
        [*(j | {"preemptible": False} for j in has("b", 1, 1, 1, 1, 1, 1, 1, 1)), *wants("a", 1)], pair(), 0,
    ),
}  # fmt: skip


def settled(jobs, nodes, tenants):
    """What is evicted at first, and then no more."""
    first, *later = rounds(snapshot_of(jobs, nodes, tenants, policy=FAIR))
    assert [evicted_by(plan) for plan in later] == [{}] * len(later)
    return evicted_by(first)


@pytest.mark.parametrize(("jobs", "tenants", "evictions"), TAKEN.values(), ids=TAKEN.keys())
def test_what_a_tenant_takes_from_another(jobs, tenants, evictions):
    assert list(settled(jobs, [node("n0")], tenants).values()) == ["fair_share"] * evictions


OTHERS = {
    "nobody within nominal quota loses anything": ({"a": 0, "b": 8, "c": 0}, {"b": 8}, "a", {}),
    "who borrows does": ({"a": 0, "b": 6, "c": 2}, {"b": 8}, "a", {"b7": "fair_share"}),
    "and to its owner by right": ({"a": 2, "b": 6, "c": 0}, {"b": 8}, "a", {"b7": "reclaim"}),
    "of two borrowers the one with the larger share loses": (
        {"a": 0, "b": 0, "c": 0, "all": 8}, {"b": 5, "c": 3}, "a", {"b4": "fair_share"},
    ),
    "so it is spared whoever has just as much": (
        {"a": 0, "b": 0, "c": 0, "all": 8}, {"b": 7, "c": 1}, "c", {"b6": "fair_share"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nominal", "has_", "who", "evicted"), OTHERS.values(), ids=OTHERS.keys())
def test_from_whom_it_is_taken(nominal, has_, who, evicted):
    tenants = [tenant("all", h100=nominal.get("all", 0)), *(tenant(n, "all", h100=nominal[n]) for n in "abc")]
    jobs = [job for name, count in has_.items() for job in has(name, *[1] * count)]
    assert settled([*jobs, *wants(who, 1)], [node("n0")], tenants) == evicted


def test_two_equal_borrowers_lose_one_job_each():
    tenants = [tenant("all", h100=8), *(tenant(n, "all") for n in "abc")]
    jobs = [*has("b", 1, 1, 1, 1), *has("c", 1, 1, 1, 1), *wants("a", 2)]
    assert settled(jobs, [node("n0")], tenants) == {"b3": "fair_share", "c3": "fair_share"}


def test_departments_are_compared_where_they_part():
    """x1 holds nothing itself; what its department would hold with its job is 4 or 5 of 8, against 4 or 3 left to y."""
    more, less = [*has("x2", 4), *has("y1", 1, 1, 1, 1)], [*has("x2", 3), *has("y1", 1, 1, 1, 1, 1)]
    fixed = [[j | {"preemptible": j["tenant"] == "y1"} for j in jobs] for jobs in (more, less)]
    assert settled([*fixed[0], *wants("x1", 1)], [node("n0")], DEPARTMENTS) == {}
    assert settled([*fixed[1], *wants("x1", 1)], [node("n0")], DEPARTMENTS) == {"y14": "fair_share"}


def test_own_lower_priorities_give_way_as_ever():
    jobs = [*has("b", 4), running("low", "n0", 4, tenant="a", priority=-1), *wants("a", 4)]
    assert settled(jobs, [node("n0")], pair()) == {"low": "within_tenant"}


@pytest.mark.parametrize("rules", [{}, {"borrow": {"max_priority": 9}}], ids=["share only", "may borrow"])
@pytest.mark.parametrize("weights", [(1, 1), (2, 1), (3, 1), (1, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_two_that_each_want_everything_do_not_take_it_from_each_other_for_ever(weights, size, rules):
    """Each has as many jobs waiting as there is room for: evictions come to an end, and what was evicted waits."""
    count = 8 // size
    jobs = [*has("b", *[size] * count), *wants("a", *[size] * count), *wants("b", *[size] * count, at=50)]
    plans = list(rounds(snapshot_of(jobs, [node("n0")], pair(*weights, rules=rules), policy=FAIR), most=24))
    assert [evicted_by(plan) for plan in plans[count + 1 :]] == [{}] * (len(plans) - count - 1)
    assert all(reason != "impossible" for reason in held_by(plans[-1]).values())
