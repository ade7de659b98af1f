"""Owns what the rows of a trace and its cluster are in the scheduler's own terms: nodes, tenants, queued jobs.

Refuses to know time and what becomes of them. `duration_s` goes into none of these values.
"""

from collections.abc import Iterable, Mapping, Sequence

from phalanx_server.scheduling.snapshot import Job, Node, Policy, Quota, Tenant, Topology
from phalanx_server.simulation.trace import Cluster, TraceJob

ROOT = "all"


def nodes_of(cluster: Cluster) -> tuple[Node, ...]:
    """The nodes that have GPUs or CPUs to give."""
    return tuple(
        Node(
            name=f"{pool.gpu_type}-{number:02}-{i:04}",
            gpu_type=pool.gpu_type,
            gpus=pool.gpus_per_node,
            cpus=pool.cpus_per_node,
            cluster=cluster.name,
        )
        for number, pool in enumerate(cluster.pools)
        for i in range(pool.nodes)
        if pool.gpus_per_node or pool.cpus_per_node
    )


def tenants_of(cluster: Cluster, jobs: Iterable[TraceJob], policy: Policy) -> tuple[Tenant, ...]:
    """The trace's tenants under one root. Under fair sharing all GPUs are the root's pool and nobody has any of their
    own, so that shares are of the whole; else there are no quotas, and the nodes alone limit."""
    gpus: dict[str, int] = {}
    for pool in cluster.pools:
        gpus[pool.gpu_type] = gpus.get(pool.gpu_type, 0) + pool.nodes * pool.gpus_per_node
    quotas = {name: Quota(nominal=amount) for name, amount in gpus.items()} if policy.fair_sharing else {}
    names = sorted({job.tenant for job in jobs})
    return (Tenant(name=ROOT, quotas=quotas), *(Tenant(name=f"{ROOT}/{name}", parent=ROOT) for name in names))


def queued_job(row: TraceJob, cluster: Cluster, runtime_s: Mapping[int, float] | None) -> Job:
    """The row as a job that waits: a gang of one-GPU replicas that prefers few nodes; elastic with run times."""
    job = Job(
        id=row.id,
        tenant=f"{ROOT}/{row.tenant}",
        replicas=max(row.gpus, 1),
        gpus_per_replica=min(row.gpus, 1),
        cpus_per_replica=_cpus_per_replica(row, cluster),
        gpu_types=_accepted_types(row, [pool.gpu_type for pool in cluster.pools]),
        topology=Topology(preferred="node") if row.gpus > 1 else None,
        time_limit_s=row.time_limit_s,
        submitted_at=row.submit_s,
        state="queued",
    )
    return job if runtime_s is None or not row.gpus else elastic(job, runtime_s, most=cluster.gpus)


def elastic(job: Job, runtime_s: Mapping[int, float], *, most: int) -> Job:
    """The job at any number of GPUs from 1 up to that at which it runs fastest. What was asked as time limit was asked
    for another number, so it has none."""
    known = {gpus: seconds for gpus, seconds in runtime_s.items() if gpus <= most}
    fastest = min(known, key=lambda gpus: (known[gpus], gpus))
    return Job(
        id=job.id,
        tenant=job.tenant,
        replicas=min(job.replicas, fastest),
        gpus_per_replica=1,
        cpus_per_replica=job.cpus_per_replica,
        min_replicas=1,
        max_replicas=fastest,
        speedup={str(gpus): runtime_s[1] / seconds for gpus, seconds in known.items() if gpus <= fastest},
        gpu_types=job.gpu_types,
        topology=Topology(preferred="node") if fastest > 1 else None,
        submitted_at=job.submitted_at,
        state="queued",
    )


def _cpus_per_replica(row: TraceJob, cluster: Cluster) -> int:
    """Where nodes' CPUs are not known, they limit nothing and only jobs without GPUs ask for them."""
    if not row.gpus:
        return row.cpus
    return -(-row.cpus // row.gpus) if any(pool.cpus_per_node for pool in cluster.pools) else 0


def _accepted_types(row: TraceJob, types: Sequence[str]) -> tuple[str, ...]:
    """The GPU types of the cluster that a row's name means, also where the cluster says more: `T4` is `T4 (AWS)`. ()
    = any: the row or the trace names none, or none that the cluster has."""
    wanted = row.gpu_type
    if wanted is None:
        return ()
    named = {name for name in types if name == wanted} or {name for name in types if name.split()[:1] == [wanted]}
    return () if named == set(types) else tuple(sorted(named))
