"""Gangs placed by topology: which domains they take, when they wait, and what is said; one sentence per row."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_server.domain.resources import Shape
from phalanx_server.scheduling.fit import holds_gang, most_replicas, room
from phalanx_server.scheduling.nodes import NodeTable
from phalanx_server.scheduling.order import Ask
from phalanx_server.scheduling.place import find_spot
from phalanx_server.scheduling.planner import Planner, schedule
from phalanx_server.scheduling.snapshot import Changes, Node, Slice, Topology, changed, parse_snapshot

NOW = 1000
LEVELS = ("block", "rack")


def node(path, gpus=8, **more):
    """`b0/r0/n0`: block, rack and name; `-` is no label."""
    *labels, name = path.split("/")
    given_ = {level: label for level, label in zip(LEVELS, labels, strict=False) if label != "-"}
    return {"name": name, "gpu_type": "h100", "gpus": gpus, "labels": given_, **more}


def nodes(*paths):
    """`b0/r0/n0:4` has 4 GPUs."""
    return [node(path, int(gpus or 8)) for path, _, gpus in (p.partition(":") for p in paths)]


def queued(replicas, gpus=1, topology=None, **more):
    base = {"id": "a", "tenant": "t", "replicas": replicas, "gpus_per_replica": gpus, "submitted_at": 1}
    return {**base, "topology": topology, "state": "queued", **more}


def running(name, gpus, id_="r"):
    here = {"state": "running", "started_at": 2, "placement": [{"node": name, "replicas": 1}]}
    return {"id": id_, "tenant": "t", "replicas": 1, "gpus_per_replica": gpus, "submitted_at": 1, **here}


def snapshot_of(jobs, on, **more):
    policy = {"topology_levels": LEVELS}
    document = {"now": NOW, "policy": policy, "jobs": jobs, "nodes": on, "tenants": [{"name": "t"}], **more}
    return parse_snapshot(document)


def where(jobs, on, **more):
    """{node: replicas} of job a, or the reason why it waits."""
    plan = schedule(snapshot_of(jobs, on, **more))
    for start in plan.starts:
        if start.job == "a":
            return {p.node: p.replicas for p in start.placement}
    hold = plan.hold_of("a")
    assert hold is not None
    return str(hold.reason)


def required(level, slice_level=None, of=None):
    return {"required": level, "slice": slice_level and {"level": slice_level, "replicas": of}}


def preferred(level, slice_level=None, of=None):
    return {"preferred": level, "slice": slice_level and {"level": slice_level, "replicas": of}}


# b0: r0 has 4 + 4, r1 has 2;  b1: r0 has 3 + 3 + 3
SMALL = nodes("b0/r0/n0:4", "b0/r0/n1:4", "b0/r1/n2:2", "b1/r0/n3:3", "b1/r0/n4:3", "b1/r0/n5:3")

PLACED = {
    "the smallest rack that holds all is taken": (2, required("rack"), SMALL, {"n2": 2}),
    "racks of the same name in different blocks are different racks": (
        10, preferred("rack"), nodes("b0/r0/n0:6", "b1/r0/n1:5", "b0/r1/n2:5"), {"n0": 6, "n2": 4},
    ),
    "a gang that fits on one node goes on one node, though another rack is the better fit": (
        2, required("rack"), nodes("b0/r0/n0:1", "b0/r0/n1:1", "b0/r0/n2:1", "b0/r1/n3:4"), {"n3": 2},
    ),
    "fewest racks come before fewest nodes": (
        4, required("block"), nodes("b0/r0/n0:2", "b0/r1/n1:2", *(f"b0/r2/n{i}:1" for i in range(2, 6))),
        {"n2": 1, "n3": 1, "n4": 1, "n5": 1},
    ),
    "of racks that hold all, one where it takes the fewest nodes": (
        4, required("rack"), nodes("b0/r0/n0:1", "b0/r0/n1:1", "b0/r0/n2:2", "b0/r1/n3:3", "b0/r1/n4:2"),
        {"n3": 3, "n4": 1},
    ),
    "of racks alike the first by label, and of nodes the first by name": (
        1, required("rack"), nodes("b0/r1/n0:4", "b1/r0/n1:4", "b0/r0/n3:2", "b0/r0/n2:2"), {"n2": 1},
    ),
    "the roomiest rack is filled first and the last is the tightest that holds the rest": (
        9, required("block"), nodes("b0/r0/n0:6", "b0/r1/n1:5", "b0/r2/n2:3", "b0/r3/n3:2"), {"n0": 6, "n2": 3},
    ),
    "a preference widens by one level": (7, preferred("rack"), nodes("b0/r0/n0:4", "b1/r0/n1:4", "b1/r1/n2:4"),
                                         {"n1": 4, "n2": 3}),
    "a preference widens to the cluster": (6, preferred("node"), nodes("b0/r0/n0:4", "b1/r0/n1:3"), {"n0": 4, "n1": 2}),
    "who prefers a block gets the smallest that holds it": (6, preferred("block"), SMALL, {"n3": 3, "n4": 3}),
    "who prefers a rack gets the smallest rack": (6, preferred("rack"), SMALL, {"n0": 4, "n1": 2}),
    "in a block that is preferred the rack that leaves the other block whole is taken": (
        2, preferred("block"), nodes("b0/r0/n0:2", "b0/r1/n1:8", "b1/r0/n2:3"), {"n2": 2},
    ),
    "nodes without a label are each alone in a rack": (
        6, preferred("rack"), nodes("b0/-/n0:4", "b0/-/n1:4", "b0/r0/n2:3", "b0/r0/n3:3"), {"n2": 3, "n3": 3},
    ),
    "slices go whole to nodes": (
        6, required("block", "node", 2), nodes("b0/r0/n0:3", "b0/r0/n1:3", "b0/r0/n2:3"), {"n0": 2, "n1": 2, "n2": 2},
    ),
    "the node with most whole slices first, then the tightest": (
        12, required("block", "node", 2), nodes("b0/r0/n0:6", "b0/r0/n1:5", "b0/r0/n2:4", "b0/r0/n3:2"),
        {"n0": 6, "n2": 4, "n3": 2},
    ),
    "a slice wider than a node lies in one rack": (
        8, required("block", "rack", 4), nodes("b0/r0/n0:3", "b0/r0/n1:4", "b0/r1/n2:2", "b0/r1/n3:2", "b0/r1/n4:1"),
        {"n1": 4, "n2": 2, "n3": 2},
    ),
    "slices of a gang that prefers a rack may lie in several blocks": (
        4, preferred("rack", "block", 2), nodes("b0/r0/n0:3", "b1/r0/n1:2", "b1/r1/n2:1"), {"n0": 2, "n1": 2},
    ),
    "slices that are wider than the required level say nothing": (4, required("rack", "block", 2), SMALL, {"n0": 4}),
    "slices of one level below are shared out among the fewest nodes": (
        8, preferred("block", "rack", 4), nodes("b0/r0/n0:2", "b0/r0/n1:5", "b1/r0/n2:1", "b1/r0/n3:3", "b1/r0/n4:2"),
        {"n1": 4, "n3": 3, "n2": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replicas", "topology", "on", "placed"), PLACED.values(), ids=PLACED.keys())
def test_placement(replicas, topology, on, placed):
    assert where([queued(replicas, topology=topology)], on) == placed


def test_a_gang_takes_the_rack_in_which_no_node_is_avoided_cordoned_or_about_to_be_in_maintenance():
    on = nodes("b0/r0/n0", "b0/r0/n1", "b0/r1/n2", "b0/r1/n3", "b0/r2/n4", "b0/r2/n5", "b0/r3/n6", "b0/r3/n7")
    on[0]["state"] = "cordoned"
    window = [{"nodes": ["n3"], "starts_at": NOW + 10, "ends_at": NOW + 20}]
    job = queued(2, 8, required("rack"), avoid_nodes=["n4"])
    assert where([job], on, maintenance=window) == {"n6": 1, "n7": 1}


def test_a_cpu_job_may_span_gpu_types_within_a_rack_and_keeps_off_gpus():
    on = [
        node("b0/r0/n0", 8, cpus=16),
        node("b0/r0/n1", 0, cpus=4, gpu_type="none"),
        node("b0/r1/n2", 0, cpus=4, gpu_type="none"),
        node("b0/r1/n3", 0, cpus=4, gpu_type="other"),
    ]
    job = queued(8, 0, required("rack"), cpus_per_replica=1)
    assert where([job], on) == {"n2": 4, "n3": 4}


def test_a_gang_stays_in_one_cluster_and_goes_where_it_takes_the_fewest_domains():
    on = [
        *({**n, "cluster": "east"} for n in nodes("b0/r0/n0:4", "b0/r1/n1:4")),
        *({**n, "cluster": "west"} for n in nodes("b0/r0/n2:4", "b0/r0/n3:4")),
    ]
    assert where([queued(8, topology=preferred("rack"))], on) == {"n2": 4, "n3": 4}
    assert where([queued(9, topology=preferred("rack"))], on) == "impossible"


HELD = {
    "too large for any rack even when empty": (
        [queued(10, 1, required("rack"))],
        "impossible",
        "can never start: needs 10 × (1 gpu), but the largest rack holds 9 of 10 replicas on h100",
    ),
    "slices too large for any node even when empty": (
        [queued(10, 1, preferred("rack", "node", 5))],
        "impossible",
        "can never start: needs 10 × (1 gpu), but all nodes together hold 0 of 10 replicas on h100 in one cluster, "
        "each 5 replicas on one node",
    ),
    "enough on nodes, but not within the level": (
        [running("n0", 3), running("n3", 2, "q"), queued(8, 1, required("rack"))],
        "topology",
        "needs 8 h100 in one rack; the best rack has 7 free",
    ),
    "enough in the rack, but in pieces": (
        [running("n1", 2), running("n3", 1, "q"), running("n4", 1, "p"), queued(2, 3, required("rack"))],
        "topology",
        "needs 6 h100 in one rack; the best rack has 7 free, in pieces that hold 1 of 2 replicas",
    ),
    "enough in the block, but not in whole slices": (
        [running("n0", 2), running("n3", 1, "q"), running("n4", 1, "p"), queued(6, 1, required("block", "node", 3))],
        "topology",
        "needs 6 h100 in one block, each 3 replicas on one node; the best block has 8 free, "
        "in pieces that hold 3 of 6 replicas",
    ),
}


@pytest.mark.parametrize(("jobs", "reason", "message"), HELD.values(), ids=HELD.keys())
def test_hold(jobs, reason, message):
    hold = schedule(snapshot_of(jobs, SMALL)).hold_of("a")
    assert hold is not None
    assert (hold.reason, hold.message) == (reason, message)


def test_a_hold_says_how_many_domains_are_out_and_why():
    on = nodes(*(f"b0/r{i}/n{i}{j}" for i in range(6) for j in range(2)))
    on[2] |= {"state": "cordoned"}
    on[3] |= {"state": "cordoned"}
    on[4] |= {"state": "lost"}
    on[5] |= {"gpu_type": "a100"}
    on[6] |= {"gpu_type": "a100"}
    on[7] |= {"gpu_type": "a100"}
    window = [{"nodes": ["n40", "n41"], "starts_at": NOW + 10, "ends_at": NOW + 20}]
    job = queued(2, 8, required("rack"), gpu_types=["h100"], avoid_nodes=["n50"], time_limit_s=100)
    hold = schedule(snapshot_of([running("n00", 1), running("n40", 1, "q"), job], on, maintenance=window)).hold_of("a")
    assert hold is not None
    assert hold.message == (
        "needs 16 h100 in one rack; the best rack has 15 free; "
        "4 racks excluded: 1 cordoned, 1 in maintenance, 1 lost, 1 wrong type"
    )


def test_a_node_that_is_carried_to_another_rack_counts_there_from_then_on():
    snapshot = snapshot_of([queued(16, topology=required("rack"))], nodes("b0/r0/n0", "b0/r1/n1"))
    planner = Planner(snapshot)
    assert planner.plan().starts == ()
    moved = Changes(now=NOW, nodes=(replace(snapshot.nodes[1], labels={"block": "b0", "rack": "r0"}),))
    assert planner.apply(moved) == schedule(changed(snapshot, moved))
    assert len(planner.plan().starts) == 1


def ask_for(topology, gpus=1, replicas=1):
    return Ask(Shape(gpus, 0, 0), replicas, replicas, (), (), None, topology)


def table_of(on):
    return NodeTable([Node(**n) for n in on], LEVELS)


def test_any_number_of_replicas_may_be_asked_for_in_whole_slices():
    table = table_of(SMALL)
    anywhere = np.ones(len(table.names), dtype=np.bool_)
    ask = ask_for(Topology(required="rack", slice=Slice(level="node", replicas=2)), replicas=4)
    question = (table, table.total, ask, "h100", anywhere)
    assert most_replicas(*question, at_most=99) == 8
    assert [n for n in range(1, 12) if find_spot(*question, replicas=n)] == [2, 4, 6, 8]
    assert [n for n in range(1, 12) if holds_gang(*question, replicas=n)] == [2, 4, 6, 8]


@st.composite
def clusters(draw):
    labels = st.sampled_from(["r0", "r0", "r1", "r2", "-"])
    paths = draw(st.lists(st.tuples(st.sampled_from(["b0", "b0", "b1", "-"]), labels), min_size=1, max_size=6))
    return [
        node(f"{block}/{rack}/n{i}", draw(st.integers(0, 4)), cluster=draw(st.sampled_from([None, None, None, "east"])))
        for i, (block, rack) in enumerate(paths)
    ]


@st.composite
def topologies(draw):
    level = draw(st.sampled_from([*LEVELS, "node"]))
    slice_ = Slice(level=draw(st.sampled_from([*LEVELS, "node"])), replicas=draw(st.integers(1, 3)))
    slice_ = draw(st.sampled_from([None, slice_]))
    return draw(st.sampled_from([Topology(required=level, slice=slice_), Topology(preferred=level, slice=slice_)]))


def domain_of(n, level):
    """The domain of a node at a level, as plan-format says it: naively."""
    if level == "cluster":
        return (n["cluster"],)
    names = (*LEVELS[: LEVELS.index(level) + 1],) if level in LEVELS else None
    if names is None or any(name not in n["labels"] for name in names):
        return n["cluster"], n["name"]
    return n["cluster"], *(n["labels"][name] for name in names)


def is_in_order(topology, on, replicas):
    """Does a placement, replicas by node, keep to its topology?"""
    used = [(n, r) for n, r in zip(on, replicas, strict=True) if r]
    bound = topology.required or "cluster"
    if len({domain_of(n, bound) for n, _ in used}) != 1:
        return False
    if topology.slice is None:
        return True
    sums = {}
    for n, r in used:
        sums[domain_of(n, topology.slice.level)] = sums.get(domain_of(n, topology.slice.level), 0) + r
    return len(sums) == 1 or all(r % topology.slice.replicas == 0 for r in sums.values())


def domains_used(on, replicas):
    """The number of blocks, racks and nodes."""
    used = [n for n, r in zip(on, replicas, strict=True) if r]
    return [len({domain_of(n, level) for n in used}) for level in (*LEVELS, "node")]


@settings(max_examples=300)
@given(clusters(), topologies(), st.integers(1, 2), st.integers(1, 4), st.data())
def test_a_place_is_found_whenever_there_is_one_keeps_to_its_topology_and_takes_the_fewest_domains(
    on, topology, gpus, slices, data
):
    step = topology.slice.replicas if topology.slice else 1
    replicas = slices * step
    table, ask = table_of(on), ask_for(topology, gpus, replicas)
    names = [n["name"] for n in on]
    columns = [table.column[name] for name in names]
    allowed = np.array(data.draw(st.lists(st.sampled_from([True, True, True, False]), min_size=6, max_size=6)))
    counts = (room(table.total, ask.shape, replicas) * allowed[: len(on)])[columns]

    ways = (way for way in product(*(range(c + 1) for c in counts)) if sum(way) == replicas)
    in_order = [way for way in ways if is_in_order(topology, on, way)]
    spot = find_spot(table, table.total, ask, "h100", allowed[: len(on)])

    assert (spot is not None) == bool(in_order) == holds_gang(table, table.total, ask, "h100", allowed[: len(on)])
    if spot is None:
        return
    taken = dict(zip(spot.columns, spot.replicas, strict=True))
    way = tuple(taken.get(column, 0) for column in columns)
    assert way in in_order
    numbers = domains_used(on, way)
    decided = next((i for i, n in enumerate(numbers) if n > 1), len(numbers)) + 1  # further in it depends on the fit
    assert numbers[:decided] == min(domains_used(on, w) for w in in_order)[:decided]


@settings(max_examples=100)
@given(clusters(), topologies(), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_nodes_in_another_order_give_the_same_place(on, topology, slices, dice):
    replicas = slices * (topology.slice.replicas if topology.slice else 1)
    spots = []
    for nodes_ in (on, dice.sample(on, len(on))):
        table = table_of(nodes_)
        anywhere = np.ones(len(on), dtype=np.bool_)
        spot = find_spot(table, table.total, ask_for(topology, 1, replicas), "h100", anywhere)
        spots.append(None if spot is None else spot.placement(table))
    assert spots[0] == spots[1]


def test_a_level_that_the_policy_no_longer_has_leaves_each_node_a_domain_of_its_own():
    on = nodes("b0/r0/n0:4", "b0/r0/n1:4")
    snapshot = snapshot_of([queued(4, 1, required("rack"))], on)
    gone = replace(snapshot, policy=replace(snapshot.policy, topology_levels=()))
    (start,) = schedule(gone).starts
    assert {p.node: p.replicas for p in start.placement} == {"n0": 4}
    too_wide = replace(gone, jobs=tuple(replace(job, replicas=5) for job in gone.jobs))
    assert [hold.reason for hold in schedule(too_wide).holds] == ["impossible"]
