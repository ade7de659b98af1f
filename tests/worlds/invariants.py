"""What must hold after every step of a world, in the database and on the machines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from datetime import datetime

from machines import Machine, Ranks, Starting
from phalanx_server.domain.job import JOB_TRANSITIONS, JobState
from phalanx_server.store import ids
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

# One row for each thing that is not as it must be.
_BROKEN = text(
    """
    SELECT 'a GPU is charged twice' AS what, node_id::text || ' ' || gpu AS which
    FROM placements, unnest(gpu_indices) AS gpu WHERE released_at IS NULL GROUP BY node_id, gpu HAVING count(*) > 1
    UNION ALL
    SELECT 'a job and its attempt are at odds', j.id::text
    FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id AND a.state IN ('starting', 'running', 'stopping')
    WHERE (j.state IN ('starting', 'running', 'stopping') OR a.id IS NOT NULL) AND j.state IS DISTINCT FROM a.state
    UNION ALL
    SELECT 'a live attempt is of an old epoch', a.id::text FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.state IN ('starting', 'running', 'stopping') AND a.epoch <> j.epoch
    UNION ALL
    SELECT 'what is released and what is held differ', a.id::text FROM attempts a WHERE (a.released_at IS NULL) <>
        EXISTS (SELECT FROM placements p WHERE p.attempt_id = a.id AND p.released_at IS NULL)
    UNION ALL
    SELECT 'an ended attempt holds something', id::text FROM attempts WHERE state = 'ended' AND released_at IS NULL
    UNION ALL
    SELECT 'a live attempt holds nothing', id::text FROM attempts
    WHERE state IN ('starting', 'running', 'stopping') AND released_at IS NOT NULL
    UNION ALL
    SELECT 'a gang is not whole', a.id::text FROM attempts a JOIN placements p ON p.attempt_id = a.id GROUP BY a.id
    HAVING sum(p.replicas) <> a.replicas
    UNION ALL
    SELECT 'a job that does not wait has a hold', j.id::text FROM holds h JOIN jobs j ON j.id = h.job_id
    WHERE j.state <> 'queued'
    UNION ALL
    SELECT 'a job is over without an end, or the other way', id::text FROM jobs
    WHERE (state IN ('succeeded', 'failed', 'cancelled')) <> (finished_at IS NOT NULL)
    UNION ALL
    SELECT 'a tenant is over its quota', t.path FROM tenants t JOIN quotas q ON q.tenant_id = t.id
    WHERE q.borrowing_limit IS NOT NULL AND q.nominal + q.borrowing_limit < (
        SELECT coalesce(sum(cardinality(p.gpu_indices)), 0) FROM placements p JOIN attempts a ON a.id = p.attempt_id
        JOIN jobs j ON j.id = a.job_id JOIN nodes n ON n.id = p.node_id
        WHERE j.tenant_id = t.id AND p.released_at IS NULL AND (n.state <> 'lost' OR a.certain_at > :now))
    UNION ALL
    SELECT 'an attempt resumes from what its job never registered', a.id::text FROM attempts a
    WHERE a.resume_from IS NOT NULL AND NOT EXISTS (
        SELECT FROM checkpoints c WHERE c.job_id = a.job_id AND c.url = a.resume_from)
    UNION ALL
    SELECT 'a job goes on though it can never start', a.id::text FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.outcome = 'start_failed' AND a.message LIKE '%for good' AND j.state <> 'failed'
    UNION ALL
    SELECT 'a job that was done before it was stopped has not succeeded', id::text FROM attempts
    WHERE state = 'ended' AND exits <> '[]' AND outcome NOT IN ('succeeded', 'cancelled') AND NOT EXISTS (
        SELECT FROM jsonb_array_elements(exits) AS e
        WHERE e->>'exit_code' IS DISTINCT FROM '0' OR e->>'before_stop' <> 'true')
    UNION ALL
    SELECT 'an attempt goes on elsewhere that was not asked to', id::text FROM attempts
    WHERE next IS NOT NULL AND (state NOT IN ('stopping', 'ended') OR stop_cause NOT IN ('resize', 'migration'))
    UNION ALL
    SELECT 'more goes on at a node than it will have room for', n.name FROM nodes n WHERE n.gpus < (
        SELECT coalesce(sum(cardinality(p.gpu_indices)), 0) FROM placements p JOIN attempts a ON a.id = p.attempt_id
        WHERE p.node_id = n.id AND p.released_at IS NULL AND a.state IN ('starting', 'running')
    ) + (
        SELECT coalesce(sum((item->>'replicas')::int * (j.spec->'resources'->>'gpus_per_replica')::int), 0)
        FROM attempts a JOIN jobs j ON j.id = a.job_id, jsonb_array_elements(a.next->'placement') AS item
        WHERE a.state = 'stopping' AND a.next IS NOT NULL AND CAST(item->>'node' AS uuid) = n.id)
    UNION ALL
    SELECT 'an attempt has more or fewer replicas than its job allows', a.id::text
    FROM attempts a JOIN jobs j ON j.id = a.job_id, LATERAL (SELECT j.spec->'resources' AS asked) spec
    WHERE a.replicas NOT BETWEEN coalesce((asked->'elastic'->>'min_replicas')::int, (asked->>'replicas')::int)
                             AND coalesce((asked->'elastic'->>'max_replicas')::int, (asked->>'replicas')::int)
    UNION ALL
    SELECT 'a job that may not be preempted was', a.id::text FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.stop_cause = 'preemption' AND NOT (j.spec->'preemption'->>'preemptible')::boolean
    UNION ALL
    SELECT 'giving way has used up a retry', j.id::text FROM jobs j WHERE j.failures > (
        SELECT count(*) FROM attempts a WHERE a.job_id = j.id AND a.outcome IN ('failed', 'oom', 'start_failed'))
    UNION ALL
    SELECT 'a job that gave way counts as done', id::text FROM attempts
    WHERE stop_cause IN ('preemption', 'resize', 'migration', 'drain') AND outcome = 'succeeded'
    AND NOT finished_called AND NOT EXISTS (
        SELECT FROM jsonb_array_elements(exits) AS e WHERE (e->>'finished')::boolean)
    AND EXISTS (SELECT FROM jsonb_array_elements(exits) AS e WHERE NOT (e->>'before_stop')::boolean)
    """
)
_HELD = text(
    """
    SELECT a.id, n.name FROM placements p JOIN attempts a ON a.id = p.attempt_id JOIN nodes n ON n.id = p.node_id
    WHERE p.released_at IS NULL
    """
)
_STEPS = text(
    """
    SELECT j.id, j.state, e.kind FROM jobs j JOIN events e ON e.job_id = j.id
    WHERE e.kind = ANY(:states) ORDER BY j.id, e.id
    """
)


async def broken(conn: AsyncConnection, machines: Collection[Machine], *, now: datetime) -> list[str]:
    """Everything that is wrong now, in words."""
    running = [(machine, ranks) for machine in machines for ranks in machine.running()]
    starting = [(machine, each) for machine in machines for each in machine.starting()]
    collecting = [(machine, ranks) for machine in machines for ranks in machine.collecting()]
    return [
        *(f"{row.what}: {row.which}" for row in await conn.execute(_BROKEN, {"now": now})),
        *_collisions([*running, *starting]),
        *await _uncharged(conn, [*running, *starting, *collecting]),
    ]


def _collisions(running: list[tuple[Machine, Ranks | Starting]]) -> list[str]:
    """Two groups on one GPU, or two attempts of one job at once, wherever they run or are about to."""
    gpus = Counter((machine.name, gpu) for machine, ranks in running for gpu in ranks.place.gpu_indices)
    attempts: dict[str, set[str]] = defaultdict(set)
    for _, ranks in running:
        attempts[ranks.attempt.job_id].add(ranks.attempt.attempt_id)
    return [
        *(f"GPU {gpu} of {name} is used twice" for (name, gpu), count in gpus.items() if count > 1),
        *(f"{job} runs twice: {sorted(ids)}" for job, ids in attempts.items() if len(ids) > 1),
    ]


async def _uncharged(conn: AsyncConnection, running: list[tuple[Machine, Ranks | Starting]]) -> list[str]:
    """What runs, or is about to, is charged: else its GPUs would be given away."""
    held = {(ids.encode("attempt", row.id), row.name) for row in await conn.execute(_HELD)}
    return [
        f"{ranks.attempt.attempt_id} runs on {machine.name}, which is not charged for it"
        for machine, ranks in running
        if (ranks.attempt.attempt_id, machine.name) not in held
    ]


async def unexplained(conn: AsyncConnection) -> list[str]:
    """Jobs whose events are no path through the table of transitions that ends where the job is."""
    paths: dict[str, list[str]] = defaultdict(list)
    state_now: dict[str, str] = {}
    for row in await conn.execute(_STEPS, {"states": [state.value for state in JobState]}):
        paths[row.id.hex].append(row.kind)
        state_now[row.id.hex] = row.state
    wrong = []
    for job, path in paths.items():
        steps = zip(["queued", *path] if path[0] != "queued" else path, path[path[0] == "queued" :], strict=False)
        if any(JobState(to) not in JOB_TRANSITIONS[JobState(state)] for state, to in steps):
            wrong.append(f"{job}: {' → '.join(path)} is no life of a job")
        if path[-1] != state_now[job]:
            wrong.append(f"{job} is {state_now[job]}, but its last event says {path[-1]}")
    return wrong
