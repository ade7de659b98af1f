"""Crowded clusters by the dice: nearly all is in use, much of it borrowed, and jobs of higher priority or with a right
to more wait. Snapshots whose parts are drawn one by one hardly ever come to evictions."""

from random import Random

from phalanx_server.scheduling.snapshot import (
    BorrowRule,
    Job,
    Node,
    PlacementItem,
    Policy,
    Preemption,
    Quota,
    Slice,
    Snapshot,
    Tenant,
    Topology,
    checked,
)

NOW = 1000.0
LEVELS = ("block", "rack")
PARENTS = {"root": None, "x": "root", "x1": "x", "x2": "x", "y": "root", "solo": None}
USERS = ("x1", "x2", "y", "y", "solo")


def crowd(seed: int) -> Snapshot:
    dice = Random(seed)
    nodes = tuple(_node(dice, f"n{i}") for i in range(dice.choice([2, 3, 4])))
    total = sum(n.gpus for n in nodes)
    jobs = _fill(dice, nodes)
    jobs += [_waiting(dice, f"q{i}") for i in range(dice.choice([1, 2, 4, 6]))]
    return checked(
        Snapshot(
            now=NOW,
            policy=Policy(
                fair_sharing=dice.random() < 0.4,
                consolidation=dice.random() < 0.4,
                topology_levels=LEVELS,
                share_nodes=dice.choice(["all", "all", "all", "tenant"]),
                order=dice.choice(["fifo", "shortest"]),
                preempt_longer=dice.random() < 0.5,
                restart_s=dice.choice([30.0, 0.0]),
            ),
            tenants=tuple(_tenant(dice, name, total) for name in PARENTS),
            nodes=nodes,
            jobs=tuple(jobs),
        )
    )


def _node(dice, name):
    rack = dice.choice(["r0", "r1"])
    labels = {"block": "b0", "rack": rack} if dice.random() < 0.8 else {}
    return Node(name=name, gpu_type="a", gpus=dice.choice([4, 4, 8]), labels=labels)


def _tenant(dice, name, total):
    nominal = dice.choice([0, 0, 2, 4, 8]) if name not in ("root", "solo") else dice.choice([0, total, total])
    limit = dice.choice([None] * 6 + [2, 4])
    quota = Quota(nominal=nominal, borrowing_limit=limit, lending_limit=dice.choice([None] * 6 + [0, 2]))
    return Tenant(
        name=name,
        parent=PARENTS[name],
        weight=dice.choice([1.0, 1.0, 1.0, 2.0, 0.0]),
        usage={"a": dice.choice([0.0, 1e5])},
        quotas={"a": quota} if name != "solo" or dice.random() < 0.5 else {},
        preemption=Preemption(
            within_tenant=dice.choice(["lower_priority", "lower_priority", "lower_or_newer_equal", "never"]),
            reclaim=dice.choice(["any", "any", "any", "lower_priority", "never"]),
            borrow=dice.choice([None, None, BorrowRule(max_priority=0)]),
        ),
    )


def _fill(dice, nodes):
    """Running jobs on all nodes until little is left; some are gangs over two of them."""
    free, jobs = {n.name: n.gpus for n in nodes}, []
    while sum(free.values()) > dice.choice([0, 0, 2, 3]):
        each = dice.choice([1, 1, 2, 2, 3, 4])
        on = [name for name in free if free[name] >= each]
        if not on:
            break
        spread = dice.sample(on, min(len(on), dice.choice([1, 1, 1, 2])))
        placement = []
        for name in sorted(spread):
            count = dice.randint(1, min(3, free[name] // each))
            free[name] -= count * each
            placement.append(PlacementItem(name, count))
        jobs.append(_job(dice, f"r{len(jobs):02}", each, sum(p.replicas for p in placement), tuple(placement)))
    return jobs


def _job(dice, id_, gpus, replicas, placement):
    is_elastic = dice.random() < 0.3
    return Job(
        id=id_,
        tenant=dice.choice(USERS),
        state="running",
        replicas=replicas,
        gpus_per_replica=gpus,
        min_replicas=dice.randint(1, replicas) if is_elastic else None,
        max_replicas=replicas + dice.choice([0, 2]) if is_elastic else None,
        priority=dice.choice([-1, 0, 0, 1]),
        submitted_at=float(dice.randint(0, 5)),
        started_at=NOW - dice.choice([1.0, 10.0, 100.0]),
        checkpointed_at=dice.choice([None, NOW - 5]),
        protected_until=dice.choice([None] * 8 + [NOW + 9]),
        preemptible=dice.random() < 0.9,
        time_limit_s=dice.choice([None, 500.0]),
        gpu_type="a",
        placement=placement,
    )


def _waiting(dice, id_):
    replicas = dice.choice([1, 1, 2, 2, 3, 4])
    bound = dice.choice(["required", "preferred"])
    sizes = [n for n in (1, 2) if replicas % n == 0]
    slices = Slice(level="node", replicas=dice.choice(sizes)) if dice.random() < 0.3 else None
    topology = Topology(**{bound: dice.choice([*LEVELS, "node"])}, slice=slices)
    return Job(
        id=id_,
        tenant=dice.choice(USERS),
        state="queued",
        replicas=replicas,
        min_replicas=dice.randint(1, replicas) if dice.random() < 0.2 else None,
        gpus_per_replica=dice.choice([1, 2, 2, 3, 4]),
        priority=dice.choice([0, 1, 1, 2]),
        submitted_at=float(dice.randint(0, 5)),
        topology=topology if dice.random() < 0.3 else None,
        time_limit_s=dice.choice([None, 50.0]),
        preemptible=dice.random() < 0.9,
    )
