"""Who yields to a shorter job of its tenant: `policy.preempt_longer`."""

import pytest
from phalanx_server.scheduling.yielding import CLEARLY_SHORTER, LEAST_RESTARTS
from rounds import rounds
from snapshots import NOW, evicted_by, expected_by, held_by, node, plan_of, queued, running, snapshot_of, tenant

POLICY = {"order": "shortest", "preempt_longer": True}
TURN_S = LEAST_RESTARTS * 30
NODES = [node("n0")]


def long(id_="long", left_s=9_000.0, **more):
    """It runs on all of the node, and is expected to need so much longer."""
    started = NOW - TURN_S
    usual = {"started_at": started, "submitted_at": started, "checkpointed_at": started, "predicted_s": TURN_S + left_s}
    return running(id_, "n0", 8, **(usual | more))


def short(id_="short", run_s=100.0, **more):
    return queued(id_, 8, predicted_s=run_s, **({"submitted_at": NOW - 10} | more))


YIELDS = {
    "to one that needs far less": (long(), short(), POLICY, True),
    "not by default": (long(), short(), {"order": "shortest"}, False),
    "not where the order is fifo": (long(), short(), {"preempt_longer": True}, False),
    "not to one that needs not much less": (long(left_s=299), short(), POLICY, False),
    "not while its turn is short": (long(started_at=NOW - TURN_S + 1), short(), POLICY, False),
    "not within its minimum run time": (long(protected_until=NOW + 1), short(), POLICY, False),
    "not if it never saved": (long(checkpointed_at=None), short(), POLICY, False),
    "not if it is not preemptible": (long(preemptible=False), short(), POLICY, False),
    "not to one of another tenant": (long(), short(tenant="u"), POLICY, False),
    "not to one of lower priority": (long(), short(priority=-1), POLICY, False),
    "not if its tenant never evicts its own": (long(tenant="never"), short(tenant="never"), POLICY, False),
    "not once it is older than that is short": (
        long(submitted_at=NOW - 9_000 * 8, left_s=900), short(), POLICY, False,
    ),
    "when it has outlived what was predicted": (long(predicted_s=10), short(), POLICY, True),
}  # fmt: skip


@pytest.mark.parametrize(("runs", "waits", "policy", "yields"), YIELDS.values(), ids=YIELDS.keys())
def test_a_running_job_yields(runs, waits, policy, yields):
    tenants = [tenant("t"), tenant("u"), tenant("never", preemption={"within_tenant": "never"})]
    plan = plan_of([runs, waits], NODES, tenants, policy=policy)
    assert evicted_by(plan) == ({"long": "within_tenant"} if yields else {})
    if yields:
        assert held_by(plan) == {"short": "victims"}


def test_the_bound_is_in_gpu_seconds():
    """A gang of eight for a minute needs more than one GPU for three."""
    one = long("one", left_s=8 * 60 * CLEARLY_SHORTER - 1) | {"gpus_per_replica": 1}
    assert evicted_by(plan_of([one, short(run_s=60)], NODES, policy=POLICY)) == {}
    one |= {"predicted_s": one["predicted_s"] + 2}
    assert evicted_by(plan_of([one, short(run_s=60)], NODES, policy=POLICY)) == {"one": "within_tenant"}


def test_a_shorter_job_of_the_class_that_stands_behind_is_tried_as_well():
    """`old` stands first, but needs too much for `long` to yield to it; `new` does not."""
    old, new = short("old", 5_000, submitted_at=NOW - 50_000), short("new", 100)
    assert evicted_by(plan_of([long(), old, new], NODES, policy=POLICY)) == {"long": "within_tenant"}


def test_nobody_takes_back_what_it_yielded():
    jobs = [long(), *(short(f"s{i}", 100.0 * (i + 1)) for i in range(3))]
    evicted = [set(evicted_by(plan)) for plan in rounds(snapshot_of(jobs, NODES, policy=POLICY), most=8)]
    assert evicted == [{"long"}, *[set()] * 7]


def test_a_start_is_reserved_once_nobody_new_could_get_ahead():
    runs = running("r", "n0", 4, started_at=NOW - 10, predicted_s=500)
    for submitted_at, expected in ((NOW - 100 * 8, NOW + 490), (NOW - 100 * 8 + 1, None)):
        waits = short("wide", 100, submitted_at=submitted_at)
        assert expected_by(plan_of([runs, waits], NODES, policy=POLICY)) == {"wide": expected}
