"""Attempts and their placements: locked for a change, created, changed, released.

Owns the SQL and the order of locks that every action keeps to: lease, nodes, jobs, attempts, placements; several
attempts in the order of their jobs. Refuses to decide what becomes of an attempt: the domain does, and actions carry it
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Table, bindparam, insert, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.store.engine import dump_json
from phalanx_server.store.schema import attempts, jobs, placements
from phalanx_server.store.time_limits import DONE_S

LIVE = ("starting", "running", "stopping")
LAST_WORDS_S = 3600.0
LAST_LOGS_S = 86_400.0  # a runner keeps logs for as long as the storage is full, if its disk can hold them


# ------------------------------------------------------------------ locked for a change

_LOCK = f"""
SELECT a.id, a.job_id, a.cluster_id, a.number, a.epoch, a.state, a.created_at, a.gang_ready_at, a.started_at,
       a.stop_cause, a.stop_reason, a.stop_requested_at, a.next, a.grace_s, a.finished_called, a.released_at, a.outcome,
       a.replicas, j.state AS job_state, j.version AS job_version, j.epoch AS job_epoch,
       j.started_at AS job_started_at, j.name AS job_name, j.failures, j.avoid_nodes,
       j.cancel_requested_at, j.spec, j.tenant_id, t.path AS tenant,
       {DONE_S} AS done_s
FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN tenants t ON t.id = j.tenant_id
WHERE {{condition}}
ORDER BY j.id, a.id FOR NO KEY UPDATE OF j, a
"""
_LOCK_BY_ID = text(_LOCK.format(condition="a.id = ANY(CAST(:ids AS uuid[]))"))
_LOCK_LIVE_OF_JOBS = text(
    _LOCK.format(condition="a.job_id = ANY(CAST(:ids AS uuid[])) AND a.state IN ('starting', 'running', 'stopping')")
)
_LOCK_LIVE = text(_LOCK.format(condition="a.state IN ('starting', 'running', 'stopping')"))
_LOCK_LIVE_ON_NODES = text(
    _LOCK.format(
        condition="""
        a.state IN ('starting', 'running', 'stopping') AND a.id IN (
            SELECT attempt_id FROM placements WHERE node_id = ANY(CAST(:ids AS uuid[])) AND released_at IS NULL)"""
    )
)


async def lock_attempts(conn: AsyncConnection, ids: Iterable[UUID]) -> list[Row[Any]]:
    """These attempts with their jobs, both locked; those that do not exist are missing."""
    return list(await conn.execute(_LOCK_BY_ID, {"ids": list(ids)}))


async def lock_live_attempts(conn: AsyncConnection, job_ids: Iterable[UUID]) -> list[Row[Any]]:
    """The live attempts of these jobs, with their jobs, both locked."""
    return list(await conn.execute(_LOCK_LIVE_OF_JOBS, {"ids": list(job_ids)}))


async def lock_all_live_attempts(conn: AsyncConnection) -> list[Row[Any]]:
    """Every live attempt, with its job, both locked."""
    return list(await conn.execute(_LOCK_LIVE))


async def lock_attempts_on(conn: AsyncConnection, node_ids: Iterable[UUID]) -> list[Row[Any]]:
    """The live attempts charged on these nodes, with their jobs, both locked."""
    return list(await conn.execute(_LOCK_LIVE_ON_NODES, {"ids": list(node_ids)}))


_LOCK_QUEUED = text(
    """
    SELECT j.id, j.version, j.epoch, j.attempts, j.held, j.cancel_requested_at, j.submitted_at, j.spec, j.name,
           t.path AS tenant
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    WHERE j.id = ANY(CAST(:ids AS uuid[])) AND j.state = 'queued' ORDER BY j.id FOR NO KEY UPDATE OF j
    """
)
_LOCK_JOBS = text(
    """
    SELECT id FROM jobs WHERE id = ANY(ARRAY(
        SELECT unnest(CAST(:ids AS uuid[])) UNION
        SELECT job_id FROM holds WHERE kept IS NOT NULL AND job_id = ANY(CAST(:held AS uuid[]))))
    ORDER BY id FOR NO KEY UPDATE
    """
)


async def lock_jobs(conn: AsyncConnection, ids: Iterable[UUID], *, held: Iterable[UUID]) -> None:
    """Lock these jobs, and those of `held` for which a place is kept: all at once, so in one order."""
    await conn.execute(_LOCK_JOBS, {"ids": list(ids), "held": list(held)})


async def lock_queued_jobs(conn: AsyncConnection, ids: Iterable[UUID]) -> list[Row[Any]]:
    """Those of these jobs that are queued, locked."""
    return list(await conn.execute(_LOCK_QUEUED, {"ids": list(ids)}))


# ------------------------------------------------------------------ created


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAttempt:
    id: UUID
    job_id: UUID
    cluster_id: UUID
    number: int
    epoch: int
    gpu_type: str
    replicas: int
    resume_from: str | None
    created_at: datetime
    grace_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPlacement:
    attempt_id: UUID
    node_id: UUID
    group_rank: int
    replicas: int
    gpu_indices: list[int]
    first_rank: int
    ranks: int
    cpus: float
    memory_bytes: int


_START_JOBS = text(
    """
    UPDATE jobs SET state = 'starting', epoch = epoch + 1, attempts = attempts + 1, version = version + 1,
                    backoff_until = NULL, reason = NULL, message = NULL
    WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'queued'
    """
)


async def create_attempts(conn: AsyncConnection, rows: Sequence[NewAttempt], places: Sequence[NewPlacement]) -> None:
    """Start attempts of queued jobs that the caller has locked."""
    started = await conn.execute(_START_JOBS, {"ids": [row.job_id for row in rows]})
    if started.rowcount != len(rows):
        raise RuntimeError(f"{len(rows)} locked jobs were to start, but {started.rowcount} were queued")
    await conn.execute(insert(attempts), [asdict(row) for row in rows])
    await conn.execute(insert(placements), [asdict(place) for place in places])


_RESUME = text(
    """
    SELECT DISTINCT ON (job_id) job_id, url FROM checkpoints WHERE job_id = ANY(CAST(:ids AS uuid[]))
    ORDER BY job_id, registered_at DESC, step DESC
    """
)


async def last_checkpoints(conn: AsyncConnection, job_ids: Iterable[UUID]) -> dict[UUID, str]:
    """The checkpoint that each job registered last, where it has one."""
    return {row.job_id: row.url for row in await conn.execute(_RESUME, {"ids": list(job_ids)})}


# ------------------------------------------------------------------ changed


async def update_attempts(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Change locked attempts: each row has `id` and the new values of columns."""
    await _update(conn, attempts, rows)


async def update_jobs(conn: AsyncConnection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Change locked jobs: each row has `id` and the new values of columns. Their version grows by one."""
    await _update(conn, jobs, rows, version=jobs.c.version + 1)


async def _update(conn: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]], **always: Any) -> None:
    """One statement for all rows that change the same columns."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        columns = tuple(sorted(row.keys() - {"id"}))
        alike.setdefault(columns, []).append({"row_id": row["id"]} | {f"new_{name}": row[name] for name in columns})
    for columns, values in alike.items():
        new = {name: bindparam(f"new_{name}") for name in columns} | always
        await conn.execute(update(table).where(table.c.id == bindparam("row_id")).values(new), values)


# ------------------------------------------------------------------ released

_RELEASE = text(
    """
    UPDATE placements SET released_at = :now
    WHERE attempt_id = ANY(CAST(:ids AS uuid[])) AND released_at IS NULL
      AND (CAST(:node_ids AS uuid[]) IS NULL OR node_id = ANY(CAST(:node_ids AS uuid[])))
    """
)
_CLOSE = text(
    """
    UPDATE attempts a SET released_at = :now
    WHERE id = ANY(CAST(:ids AS uuid[])) AND released_at IS NULL
      AND NOT EXISTS (SELECT FROM placements p WHERE p.attempt_id = a.id AND p.released_at IS NULL)
    RETURNING id
    """
)


async def release(
    conn: AsyncConnection, attempt_ids: Sequence[UUID], *, node_ids: Sequence[UUID] | None = None, now: datetime
) -> set[UUID]:
    """Free what locked attempts hold (on these nodes; None = on all); those that hold nothing any more since now."""
    if not attempt_ids:
        return set()
    values = {"ids": list(attempt_ids), "now": now}
    await conn.execute(_RELEASE, values | {"node_ids": None if node_ids is None else list(node_ids)})
    return set((await conn.execute(_CLOSE, values)).scalars())


# ------------------------------------------------------------------ looked at

_GROUPS = text(
    """
    SELECT p.attempt_id, p.node_id, n.name AS node, p.first_rank, p.ranks
    FROM placements p JOIN nodes n ON n.id = p.node_id WHERE p.attempt_id = ANY(CAST(:ids AS uuid[]))
    """
)


async def load_groups(conn: AsyncConnection, attempt_ids: Iterable[UUID]) -> dict[UUID, list[Row[Any]]]:
    """Which ranks of each attempt are, or were, on which node."""
    groups: dict[UUID, list[Row[Any]]] = {}
    for row in await conn.execute(_GROUPS, {"ids": list(attempt_ids)}):
        groups.setdefault(row.attempt_id, []).append(row)
    return groups


async def nodes_of_ranks(conn: AsyncConnection, attempt_id: UUID) -> dict[int, UUID]:
    """By rank of an attempt, the node where it runs or ran."""
    query = text("SELECT node_id, first_rank, ranks FROM placements WHERE attempt_id = :attempt_id")
    placed = await conn.execute(query, {"attempt_id": attempt_id})
    return {rank: row.node_id for row in placed for rank in range(row.first_rank, row.first_rank + row.ranks)}


@dataclass(frozen=True, slots=True)
class Fence:
    """What decides whether a node may report about an attempt."""

    id: UUID
    job_id: UUID
    epoch: int
    job_epoch: int
    state: str
    created_at: datetime
    closed_at: datetime | None  # when the server learned of its end
    placed: bool

    def refusal(self, epoch: int, *, now: datetime, logs: bool = False) -> str | None:
        """Why a report under `epoch` is refused; None if it is taken. An attempt that ended may still say its last
        words, for LAST_WORDS_S, and not once its job is started again. Its `logs`, which change nothing of the job, are
        taken for LAST_LOGS_S even then."""
        if not self.placed:
            return "wrong_node"
        left_over = logs and self.state == "ended"
        if epoch != self.epoch or self.state == "lost" or (self.epoch != self.job_epoch and not left_over):
            return "stale_epoch"
        longest = timedelta(seconds=LAST_LOGS_S if logs else LAST_WORDS_S)
        if self.closed_at is not None and now - self.closed_at > longest:
            return "too_late"
        return None


# `closed_at` is by the server's clock: a node may report the end, at its own time, only hours later.
_FENCES = """
SELECT a.id, a.job_id, a.epoch, j.epoch AS job_epoch, a.state, a.created_at,
       CASE WHEN a.state = 'ended' THEN coalesce(j.finished_at, j.queued_at) END AS closed_at,
       p.node_id IS NOT NULL AS placed
FROM attempts a JOIN jobs j ON j.id = a.job_id
LEFT JOIN placements p ON p.attempt_id = a.id AND p.node_id = :node_id
WHERE a.id = ANY(CAST(:ids AS uuid[])) ORDER BY a.job_id, a.id
"""


async def load_fences(
    conn: AsyncConnection, ids: Iterable[UUID], *, node_id: UUID, lock: bool = False
) -> dict[UUID, Fence]:
    """The fences of these attempts, as one node meets them; locked, no attempt can be lost or end meanwhile."""
    wanted = list(ids)
    if not wanted:
        return {}
    query = text(_FENCES + (" FOR NO KEY UPDATE OF a" if lock else ""))
    rows = await conn.execute(query, {"ids": wanted, "node_id": node_id})
    return {row.id: Fence(**row._mapping) for row in rows}


# ------------------------------------------------------------------ marked


@dataclass(frozen=True, slots=True, kw_only=True)
class Milestones:
    """What ranks of an attempt have reached; None = nothing new."""

    rendezvous_at: datetime | None
    first_step_at: datetime | None
    finished_called: bool


_REACH = text(
    """
    UPDATE attempts a SET rendezvous_at = GREATEST(a.rendezvous_at, :rendezvous_at),
        first_step_at = GREATEST(a.first_step_at, :first_step_at),
        finished_called = a.finished_called OR :finished_called
    FROM attempts before WHERE before.id = a.id AND a.id = :id
    RETURNING before.rendezvous_at AS rendezvous, before.first_step_at AS first_step
    """
)


async def reach_milestones(conn: AsyncConnection, attempt_id: UUID, reached: Milestones) -> dict[str, datetime | None]:
    """Move the milestones of a locked attempt forward; `rendezvous` and `first_step` as they were before."""
    return dict((await conn.execute(_REACH, asdict(reached) | {"id": attempt_id})).one()._mapping)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is complete."""

    job_id: UUID
    attempt_id: UUID
    step: int
    url: str
    data: Mapping[str, Any]
    registered_at: datetime


_REGISTER = text(
    """
    INSERT INTO checkpoints (job_id, attempt_id, step, url, data, registered_at)
    VALUES (:job_id, :attempt_id, :step, :url, CAST(:data AS jsonb), :registered_at)
    ON CONFLICT (job_id, step, url) DO UPDATE SET
        attempt_id = EXCLUDED.attempt_id, data = EXCLUDED.data, registered_at = EXCLUDED.registered_at,
        changed_xid = pg_current_xact_id()
    RETURNING xmax = 0 AS is_new
    """
)


async def register_checkpoint(conn: AsyncConnection, checkpoint: Checkpoint) -> bool:
    """Store it, or its registration anew; whether it is new."""
    values = asdict(checkpoint) | {"data": dump_json(dict(checkpoint.data))}
    return (await conn.execute(_REGISTER, values)).scalar_one()
