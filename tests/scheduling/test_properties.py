"""What must hold of every plan, whatever the snapshot: safety of nodes and quotas, whole gangs, determinism, and that
the planner fed with changes says what a fresh pass over everything says."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

from crowds import LEVELS, NOW, crowd
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_server.scheduling.plan import Plan, dump_plan
from phalanx_server.scheduling.planner import Planner, schedule
from phalanx_server.scheduling.snapshot import (
    ArrayLimit,
    BorrowRule,
    Changes,
    Dependency,
    Job,
    Maintenance,
    Node,
    Policy,
    Preemption,
    Quota,
    Seat,
    Slice,
    Snapshot,
    Tenant,
    Topology,
    changed,
    checked,
    dump_snapshot,
    parse_snapshot,
    spread,
)
from rounds import carried_out, rounds, started, stopped

TYPES = ("a", "b")
NODES = tuple(f"n{i}" for i in range(6))
LEAVES = ("x1", "x2", "y", "solo")
IDS = tuple(f"j{i:02}" for i in range(24))
QUICK = settings(max_examples=40)


def optional(strategy):
    return st.none() | strategy


@st.composite
def nodes(draw, name):
    gpus = draw(st.sampled_from([4, 4, 4, 8, 2, 0]))
    return Node(
        name=name,
        gpu_type=draw(st.sampled_from(["a", "a", "a", "a", "b"])),
        gpus=gpus,
        cluster=draw(st.sampled_from([None, None, None, None, "east"])),
        cpus=draw(st.sampled_from([None, None, 8, 16, 30])),
        memory_gib=draw(optional(st.sampled_from([16, 64]))),
        state=draw(st.sampled_from(["ready"] * 7 + ["cordoned", "draining", "lost"])),
        labels=draw(st.sampled_from(RACKS)),
    )


RACKS = (
    {},
    {"block": "b0", "rack": "r0"},
    {"block": "b0", "rack": "r0"},
    {"block": "b0", "rack": "r1"},
    {"block": "b1", "rack": "r0"},
    {"rack": "r1"},
)


@st.composite
def topologies(draw, replicas):
    """Of a gang that prefers so many replicas."""
    level = st.sampled_from([*LEVELS, "node"])
    bound = draw(st.sampled_from(["required", "required", "preferred"]))
    sizes = [n for n in (1, 2, 3) if replicas % n == 0]
    slices = st.builds(Slice, level=level, replicas=st.sampled_from(sizes))
    return Topology(**{bound: draw(level)}, slice=draw(optional(slices)))


@st.composite
def quotas(draw):
    named = draw(st.lists(st.sampled_from(["a", "a", "a", "b", "cpu", "memory_gib"]), unique=True, max_size=2))
    limit = st.sampled_from([None] * 6 + [0, 2, 6])
    return {
        name: Quota(
            nominal=draw(st.sampled_from([4, 8, 2, 0, 24])) * (1 if name in TYPES else 8),
            borrowing_limit=draw(limit),
            lending_limit=draw(limit),
        )
        for name in named
    }


@st.composite
def forests(draw):
    parents = {"root": None, "x": "root", "x1": "x", "x2": "x", "y": "root", "solo": None}
    return tuple(
        Tenant(name=n, parent=p, quotas=draw(quotas()), weight=draw(weights), preemption=draw(preemptions()))
        for n, p in parents.items()
    )


weights = st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.0])


@st.composite
def preemptions(draw):
    return Preemption(
        within_tenant=draw(st.sampled_from(["lower_priority", "lower_priority", "lower_or_newer_equal", "never"])),
        reclaim=draw(st.sampled_from(["any", "any", "lower_priority", "never"])),
        borrow=draw(st.sampled_from([None, None, BorrowRule(max_priority=0)])),
    )


@st.composite
def queued_jobs(draw, id_):
    replicas = draw(st.sampled_from([1, 1, 1, 1, 2, 2, 3, 5]))
    is_elastic = draw(st.integers(0, 3)) == 0
    return Job(
        id=id_,
        tenant=draw(st.sampled_from(LEAVES)),
        state="queued",
        replicas=replicas,
        min_replicas=draw(st.integers(1, replicas)) if is_elastic else None,
        max_replicas=draw(st.integers(replicas, 8)) if is_elastic else None,
        speedup=draw(st.sampled_from([None, {"1": 1.0, "2": 1.9, "4": 3.0}])) if is_elastic else None,
        predicted_s=draw(optional(st.sampled_from([3.0, 60.0, 5000.0]))),
        preemptible=draw(st.sampled_from([True, True, True, False])),
        gpus_per_replica=draw(st.sampled_from([1, 1, 2, 2, 2, 3, 4, 4, 2, 0, 0, 9])),
        submitted_at=float(draw(st.integers(0, 3))),
        priority=draw(st.integers(-1, 1)),
        gpu_types=draw(st.sampled_from([(), ("a",), ("a",), ("a",), ("a", "b"), ("b", "a")])),
        cpus_per_replica=draw(st.sampled_from([0, 0, 1, 2])),
        memory_gib_per_replica=draw(st.sampled_from([0, 0, 0, 4])),
        topology=draw(topologies(replicas)) if draw(st.integers(0, 4)) == 0 else None,
        avoid_nodes=tuple(draw(st.sampled_from([(), (), (), ("n0",), ("n1", "n2")]))),
        time_limit_s=draw(optional(st.sampled_from([5.0, 500.0]))),
        **(draw(gates) if draw(st.integers(0, 5)) == 5 else {}),
    )


moments = st.sampled_from([NOW - 5, NOW + 5, NOW + 50])
gates = st.one_of(
    st.fixed_dictionaries({}, optional={"not_before": moments, "backoff_until": moments, "delay_until": moments}),
    st.just({"held": True}),
    st.just({"after": (Dependency(job="gone", on="ok"),)}),
    st.builds(
        lambda name, most: {"array": ArrayLimit(id=name, max_running=most)},
        st.sampled_from(["r", "s"]),
        optional(st.integers(1, 2)),
    ),
)


@st.composite
def policies(draw):
    return Policy(
        topology_levels=LEVELS,
        share_nodes=draw(st.sampled_from(["all", "all", "tenant", "none"])),
        fair_sharing=draw(st.booleans()),
        consolidation=draw(st.booleans()),
        elastic=draw(st.sampled_from([True, True, False])),
        backfill=draw(st.sampled_from([True, True, False])),
        order=draw(st.sampled_from(["fifo", "fifo", "shortest"])),
        preempt_longer=draw(st.booleans()),
        restart_s=draw(st.sampled_from([30.0, 0.0])),
        default_time_limit_s=draw(optional(st.just(100.0))),
    )


windows = st.builds(
    lambda names, starts, length: Maintenance(nodes=tuple(names), starts_at=starts, ends_at=starts + length),
    st.lists(st.sampled_from(NODES), unique=True, min_size=1, max_size=3),
    st.sampled_from([NOW - 50, NOW - 5, NOW + 20]),
    st.sampled_from([10.0, 100.0]),
)


@st.composite
def snapshots(draw):
    """A cluster in the midst of its life: some jobs run, some stop for others, some wait."""
    first = Snapshot(
        now=NOW,
        policy=draw(policies()),
        tenants=draw(forests()),
        nodes=tuple(draw(nodes(n)) for n in NODES),
        maintenance=tuple(draw(st.lists(windows, max_size=2))) if draw(st.booleans()) else (),
        jobs=tuple(
            draw(queued_jobs(i))
            for i in draw(st.lists(st.sampled_from(IDS[:12]), unique=True, min_size=6, max_size=12))
        ),
    )
    begun = started(first, schedule(first))
    more = tuple(
        draw(queued_jobs(i)) for i in draw(st.lists(st.sampled_from(IDS[12:]), unique=True, min_size=2, max_size=8))
    )
    crowded = replace(begun, jobs=begun.jobs + more)
    waiting = [h.job for h in schedule(crowded).holds if h.reason in ("quota", "capacity", "fragmented")]
    jobs = [draw(perhaps_stopping(j, waiting)) if j.state == "running" else j for j in begun.jobs]
    jobs = [draw(some_time_later(j)) if j.state == "running" else j for j in jobs]
    return checked(replace(begun, jobs=(*jobs, *more)))


@st.composite
def some_time_later(draw, job):
    return replace(
        job,
        started_at=NOW - draw(st.sampled_from([0.0, 1.0, 100.0])),
        checkpointed_at=draw(optional(st.just(NOW - 10))),
        protected_until=draw(st.sampled_from([None, None, None, NOW + 9, NOW - 9])),
    )


@st.composite
def perhaps_stopping(draw, job, waiting):
    if draw(st.integers(0, 3)):
        return job
    goes_on = Seat(gpu_type=job.gpu_type, placement=job.placement) if draw(st.integers(0, 3)) == 3 else None
    return replace(job, state="stopping", next=goes_on, for_job=draw(st.sampled_from([*waiting, None])))


@st.composite
def changes_to(draw, snapshot):
    jobs = {j.id: j for j in snapshot.jobs}
    names = {n.name for n in snapshot.nodes}
    used = {p.node for j in snapshot.jobs for p in j.placement} | {n for w in snapshot.maintenance for n in w.nodes}
    used |= {n for j in snapshot.jobs for n in j.avoid_nodes}
    used |= {p.node for j in snapshot.jobs for seat in (j.next, j.kept) if seat for p in seat.placement}
    fresh = [i for i in IDS if i not in jobs]
    new = tuple(draw(queued_jobs(i)) for i in draw(some_of(fresh)))
    touched = draw(some_of(sorted(i for i in jobs if jobs[i].state == "queued")))
    edited = tuple(replace(jobs[i], priority=draw(st.integers(-1, 1)), held=draw(st.booleans())) for i in touched)
    running = draw(some_of(sorted(i for i in jobs if jobs[i].state == "running")))
    stopped = tuple(replace(jobs[i], state="stopping") for i in running)
    redrawn = tuple(draw(nodes(n)) for n in draw(some_of(sorted(names))))
    return Changes(
        now=snapshot.now + draw(st.sampled_from([0.0, 7.0])),
        jobs=new + edited + stopped,
        removed_jobs=tuple(draw(some_of(sorted(jobs)))),
        nodes=redrawn + tuple(draw(nodes(n)) for n in draw(some_of([n for n in NODES if n not in names]))),
        removed_nodes=tuple(draw(some_of(sorted(names - used)))),
        tenants=draw(forests()) if draw(st.integers(0, 7)) == 0 else None,
        policy=draw(policies()) if draw(st.integers(0, 7)) == 0 else None,
    )


cases = snapshots() | st.integers(0, 2**32).map(crowd)


def some_of(names):
    return st.lists(st.sampled_from(names), unique=True, max_size=3) if names else st.just([])


def decisions(plan: Plan):
    return [*plan.starts, *plan.preemptions, *plan.resizes, *plan.migrations]


def taken_on(snapshot):
    """{(node, resource): amount}, the larger of what a stopping job holds and goes on with."""
    out = {}
    for job in snapshot.jobs:
        places = [spread(job.placement)] + ([spread(job.next.placement)] if job.next else [])
        for node in set().union(*places):
            replicas = max(p.get(node, 0) for p in places)
            each = (job.gpus_per_replica, job.cpus_per_replica, job.memory_gib_per_replica)
            for resource, amount in zip(("gpus", "cpus", "memory_gib"), each, strict=True):
                out[node, resource] = out.get((node, resource), 0) + amount * replicas
    return out


def over_committed(snapshot):
    """{(node, resource): by how much} over what the node has."""
    have = {(n.name, r): getattr(n, r) for n in snapshot.nodes for r in ("gpus", "cpus", "memory_gib")}
    return {k: v - have[k] for k, v in taken_on(snapshot).items() if have[k] is not None and v > have[k]}


def over_quota(snapshot):
    """{(tenant, resource): by how much} over its limit: the tree of quotas, naively, as plan-format says it."""
    types = {n.name: n.gpu_type for n in snapshot.nodes}
    use, over = {}, {}
    for job in snapshot.jobs:
        if job.state == "queued":
            continue
        gpu_type = job.gpu_type or types[job.placement[0].node]
        replicas = max(sum(spread(place).values()) for place in (job.placement, job.next.placement if job.next else ()))
        for name, each in ((gpu_type, job.gpus_per_replica), ("cpu", job.cpus_per_replica)):
            use[job.tenant, name] = use.get((job.tenant, name), 0) + each * replicas
        key = job.tenant, "memory_gib"
        use[key] = use.get(key, 0) + job.memory_gib_per_replica * replicas
    children = {}
    for tenant in snapshot.tenants:
        children.setdefault(tenant.parent, []).append(tenant)

    def named(tenant, resource):
        return resource in tenant.quotas or any(named(c, resource) for c in children.get(tenant.name, []))

    def walk(tenant, resource):
        quota = tenant.quotas.get(resource, Quota(nominal=0))
        have, used = quota.nominal, use.get((tenant.name, resource), 0)
        for child in children.get(tenant.name, []):
            child_have, child_used, child_own = walk(child, resource)
            have += child_have - child_own
            used += max(0, child_used - child_own)
        limit = have
        if tenant.parent is not None:
            limit = None if quota.borrowing_limit is None else have + quota.borrowing_limit
        if limit is not None and used > limit:
            over[tenant.name, resource] = used - limit
        return have, used, 0 if quota.lending_limit is None else max(0, have - quota.lending_limit)

    for root in children.get(None, []):
        for resource in (*TYPES, "cpu", "memory_gib"):
            if named(root, resource):
                walk(root, resource)
    return over


def no_worse(before, after):
    return all(excess <= before.get(key, 0) for key, excess in after.items())


@QUICK
@given(cases)
def test_no_node_and_no_quota_is_over_committed_now_or_when_all_has_stopped(snapshot):
    plan = schedule(snapshot)
    at_once, after = started(snapshot, plan), carried_out(snapshot, plan)
    for before, then in ((snapshot, at_once), (stopped(snapshot), stopped(after))):
        assert no_worse(over_committed(before), over_committed(then))
        assert no_worse(over_quota(before), over_quota(then))


@QUICK
@given(cases)
def test_a_gang_is_whole_on_ready_nodes_of_one_cluster_type_and_required_domain_or_absent(snapshot):
    jobs, by_name = {j.id: j for j in snapshot.jobs}, {n.name: n for n in snapshot.nodes}
    for start in schedule(snapshot).starts:
        job, on = jobs[start.job], [by_name[p.node] for p in start.placement]
        assert sum(p.replicas for p in start.placement) == start.replicas
        assert (job.min_replicas or job.replicas) <= start.replicas <= (job.max_replicas or job.replicas)
        assert len({n.cluster for n in on}) == 1
        assert all(n.state == "ready" and n.gpu_type in (job.gpu_types or TYPES) for n in on)
        assert not job.gpus_per_replica or {n.gpu_type for n in on} == {start.gpu_type}
        assert_in_its_domains(job, start.placement, by_name)


def domain_of(node, level):
    """Where a node is: the labels down to the level; a node that lacks one of them is a domain of its own."""
    labels = [node.labels.get(name) for name in LEVELS[: LEVELS.index(level) + 1]] if level in LEVELS else [None]
    return node.name if None in labels else (node.cluster, *labels)


def assert_in_its_domains(job, placement, by_name):
    if job.topology is None:
        return
    level, slices = job.topology.required, job.topology.slice
    if level is not None:
        assert len({domain_of(by_name[p.node], level) for p in placement}) == 1
    if slices is not None:
        there = Counter()
        for item in placement:
            there[domain_of(by_name[item.node], slices.level)] += item.replicas
        assert all(replicas % slices.replicas == 0 for replicas in there.values())


@QUICK
@given(cases)
def test_every_queued_job_either_starts_or_is_held_with_words(snapshot):
    plan = schedule(snapshot)
    named = [s.job for s in plan.starts] + [h.job for h in plan.holds]
    assert sorted(named) == sorted(j.id for j in snapshot.jobs if j.state == "queued")
    assert all(h.message and (h.unblocks or h.reason == "victims") for h in plan.holds)
    assert all(plan.hold_of(h.job) == h for h in plan.holds)
    json.dumps(dump_plan(plan))


@QUICK
@given(cases, st.randoms(use_true_random=False))
def test_the_lists_in_another_order_give_the_same_plan(snapshot, dice: Random):
    lists = {
        name: dice.sample(getattr(snapshot, name), len(getattr(snapshot, name)))
        for name in ("tenants", "nodes", "jobs")
    }
    mixed = replace(snapshot, **{name: tuple(rows) for name, rows in lists.items()})
    assert dump_plan(schedule(mixed)) == dump_plan(schedule(snapshot))


@QUICK
@given(cases)
def test_while_jobs_are_stopping_planning_again_decides_nothing_new(snapshot):
    after = carried_out(snapshot, schedule(snapshot))
    assert decisions(schedule(after)) == []


@QUICK
@given(cases)
def test_plans_that_are_carried_out_come_to_rest(snapshot):
    for _ in range(12):
        plan = schedule(snapshot)
        if not decisions(plan):
            return
        snapshot = stopped(carried_out(snapshot, plan))
    raise AssertionError("still deciding after a dozen passes over one moment")


@QUICK
@given(cases)
def test_who_was_evicted_and_waits_again_starts_no_loop(snapshot):
    *_, last = rounds(snapshot, most=24)
    assert decisions(last) == []


@QUICK
@given(cases)
def test_only_those_are_disturbed_who_may_be(snapshot):
    plan, jobs = schedule(snapshot), {j.id: j for j in snapshot.jobs}
    nodes = {n.name: n for n in snapshot.nodes}
    for row in (*plan.preemptions, *plan.resizes, *plan.migrations):
        job = jobs[row.job]
        assert job.state == "running"
        assert (job.protected_until or NOW) <= NOW
        assert row.for_job is None or jobs[row.for_job].state == "queued"
    assert all(jobs[p.job].preemptible or p.reason == "maintenance" for p in plan.preemptions)
    for row in (*plan.resizes, *plan.migrations):
        job, total = jobs[row.job], sum(p.replicas for p in row.placement)
        assert (job.min_replicas or job.replicas) <= total <= (job.max_replicas or job.replicas)
        held = spread(job.placement)
        assert all(nodes[p.node].state == "ready" or p.replicas <= held.get(p.node, 0) for p in row.placement)
        assert len({nodes[p.node].cluster for p in row.placement}) == 1
    assert all(jobs[m.job].preemptible for m in plan.migrations)


@QUICK
@given(cases)
def test_no_victim_can_be_spared(snapshot):
    """Each waiting job by itself: whom it evicts, less one, is not what it would evict if that one might not be. (By
    the same right, on the same GPU type and without moves, or there may be a cheaper way that comes later.)"""
    policy = replace(snapshot.policy, consolidation=False)
    tenants = tuple(replace(t, preemption=replace(t.preemption, borrow=None)) for t in snapshot.tenants)
    others = [j for j in snapshot.jobs if j.state != "queued"]
    for job in (j for j in snapshot.jobs if j.state == "queued"):
        alone = replace(snapshot, policy=policy, tenants=tenants, jobs=(*others, replace(job, kept=None)))
        plan = schedule(alone)
        victims = {p.job: p.reason for p in plan.preemptions if p.for_job == job.id}
        if victims:
            kept = plan.hold_of(job.id).kept
            job = replace(job, kept=None, gpu_types=(kept.gpu_type,) if kept.gpu_type else ())
        for spared in victims:
            fixed = tuple(replace(j, preemptible=j.preemptible and j.id != spared) for j in others)
            plan = schedule(replace(alone, jobs=(*fixed, job)))
            fewer = {p.job: p.reason for p in plan.preemptions if p.for_job == job.id}
            has_place = job.id in {s.job for s in plan.starts} or plan.hold_of(job.id).reason == "victims"
            assert not (has_place and fewer.items() < victims.items())


@QUICK
@given(cases)
def test_what_is_kept_for_a_waiting_job_is_there_when_all_has_stopped(snapshot):
    plan = schedule(snapshot)
    promised = {h.job: h.kept.placement for h in plan.holds if h.kept}
    later = schedule(stopped(carried_out(snapshot, plan)))
    given_ = {s.job: s.placement for s in later.starts}
    assert {job: given_.get(job) for job in promised} == promised


@QUICK
@given(st.data())
def test_a_planner_fed_with_changes_says_what_a_fresh_pass_says(data):
    snapshot = data.draw(cases)
    planner = Planner(snapshot)
    for _ in range(3):
        changes = data.draw(changes_to(snapshot))
        snapshot = changed(snapshot, changes)
        if data.draw(st.booleans()):
            assert dump_plan(planner.what_if(changes)) == dump_plan(schedule(snapshot))
        assert dump_plan(planner.apply(changes)) == dump_plan(schedule(snapshot))
        if data.draw(st.booleans()):
            snapshot, before = carried_out(snapshot, planner.plan()), snapshot
            news = tuple(new for new, old in zip(snapshot.jobs, before.jobs, strict=True) if new != old)
            assert dump_plan(planner.apply(Changes(now=snapshot.now, jobs=news))) == dump_plan(schedule(snapshot))


@QUICK
@given(cases)
def test_a_snapshot_survives_its_json_form(snapshot):
    assert parse_snapshot(json.loads(json.dumps(dump_snapshot(snapshot)))) == snapshot
