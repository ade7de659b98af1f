"""Owns what must hold between the parts of a snapshot: references that exist, names given once, gangs that add up.

Refuses to know JSON. Every error is a ValueError of one line that names the record and the field.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # snapshot imports this module to check what it parsed
    from phalanx_server.scheduling.snapshot import Job, Seat, Snapshot, Topology


def check_snapshot(snapshot: "Snapshot") -> None:
    """ValueError about the first reference, name or gang that is wrong."""
    tenants = _unique("tenants", (t.name for t in snapshot.tenants))
    nodes = _unique("nodes", (n.name for n in snapshot.nodes))
    _unique("jobs", (j.id for j in snapshot.jobs))
    _check_tree(snapshot, tenants)
    for i, window in enumerate(snapshot.maintenance):
        _known(f"maintenance[{i}].nodes", "node", window.nodes, nodes)
    levels = {*snapshot.policy.topology_levels, "node"}
    for job in snapshot.jobs:
        _known(f"job {job.id}: tenant", "tenant", [job.tenant], tenants)
        _known(f"job {job.id}: avoid_nodes", "node", job.avoid_nodes, nodes)
        _check_range(job)
        _check_topology(job, levels)
        _check_place(job, nodes)


def _unique(where: str, names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{where}: {name} is given twice")
        seen.add(name)
    return seen


def _known(where: str, noun: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: there is no {noun} {name}")


def _check_tree(snapshot: "Snapshot", tenants: set[str]) -> None:
    parent = {t.name: t.parent for t in snapshot.tenants}
    for tenant in snapshot.tenants:
        if tenant.parent is not None:
            _known(f"tenant {tenant.name}: parent", "tenant", [tenant.parent], tenants)
    settled: set[str] = set()
    for name in parent:
        way: set[str] = set()
        above: str | None = name
        while above is not None and above not in settled:
            if above in way:
                raise ValueError(f"tenant {name}: parent: its ancestors form a circle")
            way.add(above)
            above = parent[above]
        settled |= way


def _check_range(job: "Job") -> None:
    low, high = job.min_replicas or job.replicas, job.max_replicas or job.replicas
    if not low <= job.replicas <= high:
        raise ValueError(f"job {job.id}: replicas: {job.replicas} is outside min_replicas..max_replicas")
    for text in job.speedup or ():
        if not text.isdecimal():
            raise ValueError(f"job {job.id}: speedup: {text} is not a number of replicas")


def _check_topology(job: "Job", levels: set[str]) -> None:
    topology: Topology | None = job.topology
    if topology is None:
        return
    named = [x for x in (topology.required, topology.preferred) if x is not None]
    if len(named) != 1:
        raise ValueError(f"job {job.id}: topology: needs one of required and preferred")
    if topology.slice is not None:
        named.append(topology.slice.level)
        if job.replicas % topology.slice.replicas:
            raise ValueError(f"job {job.id}: topology.slice: {topology.slice.replicas} does not divide the gang")
    for level in named:
        if level not in levels:
            raise ValueError(f"job {job.id}: topology: {level} is not one of {', '.join(sorted(levels))}")


def _check_place(job: "Job", nodes: set[str]) -> None:
    if job.state != "stopping" and (job.next is not None or job.for_job is not None):
        raise ValueError(f"job {job.id}: {'for' if job.next is None else 'next'}: only a stopping job has it")
    if job.kept is not None:
        _check_seat(job, "kept", job.kept, nodes)
    if job.next is not None:
        _check_seat(job, "next", job.next, nodes)
    if job.state == "queued":
        if job.placement:
            raise ValueError(f"job {job.id}: placement: a queued job has none")
        return
    if not job.placement:
        raise ValueError(f"job {job.id}: field placement is missing: the job is {job.state}")
    _known(f"job {job.id}: placement", "node", (p.node for p in job.placement), nodes)
    _check_gang(job, "placement", job.placed)


def _check_seat(job: "Job", name: str, seat: "Seat", nodes: set[str]) -> None:
    _known(f"job {job.id}: {name}.placement", "node", (p.node for p in seat.placement), nodes)
    _check_gang(job, f"{name}.placement", seat.placed)


def _check_gang(job: "Job", where: str, placed: int) -> None:
    low, high = job.min_replicas or job.replicas, job.max_replicas or job.replicas
    if not low <= placed <= high:
        gang = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"job {job.id}: {where}: {placed} replicas are placed, but its gang is {gang}")
