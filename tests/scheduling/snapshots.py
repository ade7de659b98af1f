"""Small snapshots in few words, and what a plan says in a form that fits into the row of a table."""

from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.snapshot import Snapshot, parse_snapshot

NOW = 1000


def node(name, gpus=8, **more):
    return {"name": name, "gpu_type": "h100", "gpus": gpus, **more}


def queued(id_, gpus=1, replicas=1, **more):
    base = {"id": id_, "tenant": "t", "replicas": replicas, "gpus_per_replica": gpus, "submitted_at": 1}
    return {**base, "state": "queued", **more}


def running(id_, on, gpus=1, **more):
    """`on`: replicas by node, or the node of the only one."""
    on = {on: 1} if isinstance(on, str) else on
    placement = [{"node": name, "replicas": count} for name, count in on.items()]
    here = {"state": "running", "started_at": 2, "placement": placement}
    return queued(id_, gpus, sum(on.values()), **(here | more))


def tenant(name, parent=None, *, weight=1.0, usage=None, preemption=None, **quotas):
    """Quotas by resource: the nominal amount, or the whole of it."""
    return {
        "name": name,
        "parent": parent,
        "weight": weight,
        "usage": usage or {},
        "preemption": preemption or {},
        "quotas": {r: q if isinstance(q, dict) else {"nominal": q} for r, q in quotas.items()},
    }


def snapshot_of(jobs, nodes=None, tenants=None, **more) -> Snapshot:
    """Without nodes and tenants two nodes of eight GPUs, and one tenant without quotas."""
    nodes, tenants = nodes or [node("n0"), node("n1")], tenants or [tenant("t")]
    return parse_snapshot({"now": NOW, "jobs": jobs, "nodes": nodes, "tenants": tenants, **more})


def plan_of(jobs, nodes=None, tenants=None, **more) -> Plan:
    return schedule(snapshot_of(jobs, nodes, tenants, **more))


def starts_of(plan):
    return {s.job: {p.node: p.replicas for p in s.placement} for s in plan.starts}


def evicted_by(plan):
    return {p.job: p.reason for p in plan.preemptions}


def resized_by(plan):
    return {r.job: r.replicas for r in plan.resizes}


def moved_by(plan):
    return {m.job: {p.node: p.replicas for p in m.placement} for m in plan.migrations}


def held_by(plan):
    return {h.job: h.reason.value for h in plan.holds}


def expected_by(plan):
    """When each waiting job is expected to start."""
    return {h.job: h.estimated_start for h in plan.holds}
