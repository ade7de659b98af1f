"""An owner's idle nominal quota is lent to whom it could evict again; else it is kept while a job of its own waits."""

import pytest
from phalanx_server.scheduling.planner import schedule
from snapshots import NOW, held_by, node, queued, running, snapshot_of, starts_of, tenant

WAITS = queued("own", 8, tenant="owner")
"""It needs a whole node, and there is none: the owner's 8 GPUs of quota are idle."""
BUSY = [running("x", "n0", 4, tenant="other"), running("y", "n1", 4, tenant="other")]
BORROWS = queued("b", 4, tenant="borrower", submitted_at=9)

LENT = {
    "an owner that may evict any borrower lends": ("any", {}, WAITS, True),
    "whatever the borrower's priority": ("any", {"priority": 9}, WAITS, True),
    "but not to a job that is not preemptible": ("any", {"preemptible": False}, WAITS, False),
    "an owner that may evict lower priorities lends to those": (
        "lower_priority", {"priority": -1}, WAITS, True,
    ),
    "and not to an equal one": ("lower_priority", {}, WAITS, False),
    "nor to one that is lower but not preemptible": (
        "lower_priority", {"priority": -1, "preemptible": False}, WAITS, False,
    ),
    "an owner that may evict nobody does not lend": ("never", {"priority": -9}, WAITS, False),
    "unless nothing of its own waits": ("never", {}, None, True),
    "or what waits is on hold": ("never", {}, WAITS | {"held": True}, True),
    "or waits for another GPU type": ("never", {}, WAITS | {"gpu_types": ["a100"]}, True),
}  # fmt: skip


def tenants_with(reclaim, *, owner=8, pool=0):
    return [
        tenant("all", h100=pool),
        tenant("owner", "all", h100=owner, a100=8, preemption={"reclaim": reclaim}),
        tenant("borrower", "all"),
        tenant("other"),
    ]


NODES = [node("n0"), node("n1"), {**node("n2"), "gpu_type": "a100"}]


@pytest.mark.parametrize(("reclaim", "borrower", "owners", "lent"), LENT.values(), ids=LENT.keys())
def test_to_whom_an_owner_lends(reclaim, borrower, owners, lent):
    jobs = [*BUSY, running("z", "n2", 8, tenant="other"), BORROWS | {"gpu_types": ["h100"]} | borrower]
    jobs += [{"gpu_types": ["h100"]} | owners] if owners else []
    plan = schedule(snapshot_of(jobs, NODES, tenants_with(reclaim)))
    assert ("b" in starts_of(plan)) == lent
    if not lent:
        assert held_by(plan) == {"own": "fragmented", "b": "reserved"}
        assert plan.hold_of("b").message == "what it needs is kept for own"


def test_what_others_could_lend_as_well_is_lent():
    """4 of the 12 are not the owner's."""
    plan = schedule(snapshot_of([*BUSY, WAITS, BORROWS], NODES[:2], tenants_with("never", pool=4)))
    assert set(starts_of(plan)) == {"b"}


def test_only_what_the_waiting_job_could_use_is_kept():
    """The owner has 12 and its job needs 8."""
    plan = schedule(snapshot_of([*BUSY, WAITS, BORROWS], NODES[:2], tenants_with("never", owner=12)))
    assert set(starts_of(plan)) == {"b"}


def test_what_the_owner_uses_already_is_not_idle():
    jobs = [running("used", "n1", 4, tenant="owner"), BUSY[0], WAITS, BORROWS | {"gpus_per_replica": 4}]
    plan = schedule(snapshot_of(jobs, NODES[:2], tenants_with("never", pool=4)))
    assert set(starts_of(plan)) == {"b"}


@pytest.mark.parametrize(("owners", "lent"), [(WAITS, False), (queued("own", 4, 3, tenant="owner"), True)])
def test_nothing_is_kept_for_a_job_that_is_larger_than_the_nominal_quota(owners, lent):
    """The owner has 8 and all share 4 more: 8 for the borrower are 4 of the owner's."""
    jobs = [*BUSY, owners, BORROWS | {"replicas": 2}]
    plan = schedule(snapshot_of(jobs, NODES[:2], tenants_with("never", pool=4)))
    assert ("b" in starts_of(plan)) == lent


def test_the_owner_itself_is_not_kept_from_its_quota():
    small = queued("small", 4, tenant="owner", submitted_at=9)
    plan = schedule(snapshot_of([*BUSY, WAITS, small], NODES[:2], tenants_with("never")))
    assert set(starts_of(plan)) == {"small"}


@pytest.mark.parametrize(("limit_s", "lent"), [(100, True), (101, False), (None, False)])
def test_a_borrower_that_will_have_left_when_the_owner_is_expected_to_start_may_borrow(limit_s, lent):
    busy = [job | {"started_at": 900, "time_limit_s": 200} for job in BUSY]
    nodes = [*NODES[:2], node("n3", gpus=4)]
    jobs = [*busy, WAITS, BORROWS | {"time_limit_s": limit_s}]
    plan = schedule(snapshot_of(jobs, nodes, tenants_with("never")))
    assert ("b" in starts_of(plan)) == lent
    assert plan.hold_of("own").estimated_start == NOW + 100
