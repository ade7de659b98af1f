"""What a scheduling pass may know, read from the database: whole (`load_snapshot`) or since last time (`load_changes`).

Owns the mapping from rows to the snapshot's values. Names there: a job is its uuid in hex, a tenant its path, a node
its uuid in hex, a cluster its name. Refuses to decide anything.

* `starting` and `running` jobs are `running`, charged on every placement that is not released.
* A `stopping` job carries whom it stops for and, if it goes on elsewhere, its `next`; a queued one the place that is
  kept for it, unless it is on hold.
* What a `lost` attempt holds where its ranks are not yet confirmed gone is charged by a `stopping` job of its own,
  named by the attempt's uuid; its job is queued beside it. On lost nodes, which take nothing anyway, only until its
  ranks have certainly ended by themselves (docs/decisions/0010).
* A node takes nothing new (`cordoned`) while its agent says that it is gone, and while the agent itself is silent.
* A dependency on an array, which is one on all of its jobs, is named `array_` and the array's uuid in hex.
* The cursor is a transaction id (docs/decisions/0001): rows changed at or above it are read again, and jobs whose
  checkpoints are. (A new checkpoint does not touch its job's row: it comes with its attempt locked, and jobs come
  before attempts.) It also carries the version of every job that the pass was told of, for `commit_plan` to compare,
  and what is kept for queued ones; and what comes with time and changes no row: whose agents were silent (where it is
  different now, the nodes are read again), which jobs have ranks that may still run on lost nodes, and what tenants
  have used, with the moment as of which it was summed up: it is summed up again for another moment only; and
  maintenance windows, which leave when they are over, and whose nodes are looked up again when nodes have changed.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.scheduling.documents import read_record
from phalanx_server.scheduling.predict import Work
from phalanx_server.scheduling.snapshot import (
    ArrayLimit,
    BorrowRule,
    Changes,
    Dependency,
    Job,
    Node,
    PlacementItem,
    Policy,
    Preemption,
    Quota,
    Seat,
    Slice,
    Snapshot,
    Tenant,
    Topology,
)
from phalanx_server.store.forecasts import work_of
from phalanx_server.store.maintenance import EDITION, Windows, load_windows
from phalanx_server.store.policies import load_policy
from phalanx_server.store.seats import read_seat
from phalanx_server.store.speeds import FIGURES, speedup_in
from phalanx_server.store.time_limits import DONE_S
from phalanx_server.store.usage import Usage, load_usage, usage_moment

GIB = 1 << 30
Predict = Callable[[Work, float], float | None]
PIECE_ROWS = 2_000
# Agents are heard every 2 s. What is placed on the cluster of one that is not may wait there for nobody knows how long.
AGENT_SILENT_S = 30.0


@dataclass(frozen=True, slots=True)
class _Told:
    """The policy of the settings file, over which the stored one goes; the one in force; what tenants have used, if
    that was told; and the maintenance windows that are not over."""

    base: Policy
    policy: Policy
    usage: Usage | None
    windows: Windows


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next `load_changes` goes on, the version of each queued job and of each running one as the pass knows
    it, by name, what is kept for queued jobs, the clusters that were silent, and the jobs of lost attempts whose ranks
    might still run. `works` is what is known of the run time of each job that is not over; `leftovers`: the tenant of
    each lost attempt that still held something."""

    xid: int
    versions: Mapping[str, int]
    running: Mapping[str, int]
    kept: Mapping[str, Seat]
    told: _Told
    silent: frozenset[UUID] = frozenset()
    uncertain: frozenset[UUID] = frozenset()
    works: Mapping[str, Work] = field(default_factory=dict)
    leftovers: Mapping[str, str] = field(default_factory=dict)

    @property
    def usage(self) -> Usage | None:
        """What tenants have used, for the next `load_snapshot`."""
        return self.told.usage

    @property
    def policy(self) -> Policy:
        """The one in force, as the pass knows it."""
        return self.told.policy

    def tenant_of(self, job: str) -> str | None:
        """Whose a job is, by its name in the snapshot; None if it is not in it."""
        work = self.works.get(job)
        return work.tenant if work else self.leftovers.get(job)


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A read-only transaction whose statements all see the same moment."""
    async with engine.connect() as plain:
        conn = await plain.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        async with conn.begin():
            yield conn


async def load_snapshot(
    conn: AsyncConnection, now: datetime, policy: Policy, predict: Predict | None = None, usage: Usage | None = None
) -> tuple[Snapshot, Cursor]:
    """Everything. `policy` is that of the settings file, `predict` says how long a job will run in all that has run so
    long, `usage` is what was last known of past use. `conn` must see one moment throughout: see `reading`."""
    horizon = await _horizon(conn, since=0, now=now)
    jobs: list[Job] = []
    known = _Known({}, {}, {}, {}, {}, predict)
    async for rows in _in_pieces(conn, _JOBS_LIVE, {}):
        jobs += known.read(rows)
    async for rows in _in_pieces(conn, _JOBS_QUEUED, {}):
        jobs += known.read(rows)
    charged = known.leave([_leftover(row) for row in await conn.execute(_CHARGED_LOST, {"job_ids": None, "now": now})])
    silent = await silent_clusters(conn, now=now)
    in_force = (await load_policy(conn)).over(policy)
    usage = await load_usage(conn, usage_moment(now.timestamp(), in_force), known=usage)
    windows = await load_windows(conn, horizon.windows, now)
    snapshot = Snapshot(
        now=now.timestamp(),
        policy=in_force,
        tenants=await _load_tenants(conn, usage),
        nodes=tuple(_node(row, silent) for row in await conn.execute(_NODES, {"since": "0", "clusters": []})),
        maintenance=windows.windows,
        jobs=(*jobs, *charged),
    )
    told = _Told(policy, in_force, usage, windows)
    return snapshot, known.cursor(horizon.xid, told, silent, await _uncertain_jobs(conn, now))


async def load_changes(conn: AsyncConnection, cursor: Cursor, now: datetime) -> tuple[Changes, Cursor]:
    """What may have changed since `cursor`. `conn` must see one moment throughout: see `reading`."""
    horizon = await _horizon(conn, since=cursor.xid, now=now)
    since = {"since": str(cursor.xid)}
    silent = await silent_clusters(conn, now=now)
    turned = list(silent ^ cursor.silent)
    node_rows = await conn.execute(_NODES, since | {"clusters": turned}) if horizon.nodes_changed or turned else ()
    rows = [row async for piece in _in_pieces(conn, _JOBS_CHANGED, since) for row in piece]
    over = list((await conn.execute(_JOBS_OVER, since)).scalars())
    uncertain = await _uncertain_jobs(conn, now)
    concerned = {row.id for row in rows} | set(over) | (cursor.uncertain - uncertain)
    if horizon.nodes_changed:
        concerned |= set((await conn.execute(_LOST_ON_CHANGED, since)).scalars())
    leftovers, gone = await _leftovers(conn, concerned, now)
    known = _Known.of(cursor)
    known.forget(over)
    known.leave(leftovers, gone)
    told = cursor.told
    policy = (await load_policy(conn)).over(told.base) if horizon.policy_changed else None
    moment = usage_moment(now.timestamp(), policy or told.policy)
    usage = await load_usage(conn, moment, known=told.usage)
    tenants_changed = horizon.tenants_changed or usage is not told.usage
    windows = told.windows
    if horizon.nodes_changed or horizon.windows != windows.edition:
        windows = await load_windows(conn, horizon.windows, now)
    changes = Changes(
        now=now.timestamp(),
        jobs=tuple(known.read(rows)) + leftovers,
        removed_jobs=tuple(job_id.hex for job_id in over) + gone,
        nodes=tuple(_node(row, silent) for row in node_rows),
        tenants=await _load_tenants(conn, usage) if tenants_changed else None,
        policy=policy,
        maintenance=None if windows.windows == told.windows.windows else windows.windows,
    )
    told = _Told(told.base, policy or told.policy, usage, windows)
    return changes, known.cursor(horizon.xid, told, silent, uncertain)


async def _in_pieces(
    conn: AsyncConnection, query: TextClause, values: Mapping[str, Any]
) -> AsyncIterator[Sequence[Row[Any]]]:
    """Rows by a few thousand, so that a process with many jobs does other things in between (renew its lease)."""
    result = await conn.stream(query, values, execution_options={"yield_per": PIECE_ROWS})
    async for piece in result.partitions():
        yield piece
        await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a cursor knows of jobs, while it is brought up to date."""

    versions: dict[str, int]
    running: dict[str, int]
    kept: dict[str, Seat]
    works: dict[str, Work]
    leftovers: dict[str, str]
    predict: Predict | None = None

    @classmethod
    def of(cls, cursor: Cursor) -> _Known:
        kept, works = dict(cursor.kept), dict(cursor.works)
        return cls(dict(cursor.versions), dict(cursor.running), kept, works, dict(cursor.leftovers))

    def cursor(self, xid: int, told: _Told, silent: frozenset[UUID], uncertain: frozenset[UUID]) -> Cursor:
        jobs = (self.versions, self.running, self.kept)
        return Cursor(xid, *jobs, told, silent, uncertain, self.works, self.leftovers)

    def read(self, rows: Sequence[Row[Any]]) -> list[Job]:
        """The jobs that the rows say, their versions noted."""
        jobs = [_job(row, self.predict) for row in rows]
        for row, job in zip(rows, jobs, strict=True):
            self._drop(job.id)
            self.works[job.id] = _work(row, _ask(row.resources))
            if job.state == "queued":
                self.versions[job.id] = row.version
            elif job.state == "running":
                self.running[job.id] = row.version
            if job.kept is not None:
                self.kept[job.id] = job.kept
        return jobs

    def forget(self, over: Sequence[UUID]) -> None:
        for job_id in over:
            self._drop(job_id.hex)

    def leave(self, leftovers: Sequence[Job], gone: Sequence[str] = ()) -> Sequence[Job]:
        """Note whose these are. Those that are gone hold nothing any more."""
        self.leftovers.update((job.id, job.tenant) for job in leftovers)
        for attempt in gone:
            self.leftovers.pop(attempt, None)
        return leftovers

    def _drop(self, job: str) -> None:
        self.versions.pop(job, None)
        self.running.pop(job, None)
        self.kept.pop(job, None)
        self.works.pop(job, None)


# ------------------------------------------------------------------ horizon

_HORIZON = text(
    f"""
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text AS xid,
           EXISTS (SELECT FROM tenants WHERE changed_xid >= CAST(CAST(:since AS text) AS xid8)) AS tenants_changed,
           EXISTS (SELECT FROM nodes WHERE changed_xid >= CAST(CAST(:since AS text) AS xid8)) AS nodes_changed,
           EXISTS (SELECT FROM policy WHERE changed_xid >= CAST(CAST(:since AS text) AS xid8)) AS policy_changed,
           {EDITION} AS windows
    """
)


@dataclass(frozen=True, slots=True)
class _Horizon:
    """Every transaction below `xid` had ended; what changed at or above the one that was asked about; and the edition
    of the maintenance windows."""

    xid: int
    tenants_changed: bool
    nodes_changed: bool
    policy_changed: bool
    windows: str


async def _horizon(conn: AsyncConnection, *, since: int, now: datetime) -> _Horizon:
    row = (await conn.execute(_HORIZON, {"since": str(since), "now": now})).one()
    return _Horizon(int(row.xid), row.tenants_changed, row.nodes_changed, row.policy_changed, row.windows)


# ------------------------------------------------------------------ jobs

_COLUMNS = f"""
    j.id, j.state, j.version, j.name, j.created_by, j.array_index, t.path AS tenant, j.priority, j.submitted_at,
    j.held, j.not_before, j.backoff_until, j.avoid_nodes, CAST(j.spec->'resources' AS text) AS resources,
    CAST(j.spec->'preemption' AS text) AS preemption,
    CAST(j.spec->>'time_limit' AS double precision) AS time_limit, j.deadline, j.array_id, j.array_max_running,
    CASE WHEN j.unmet > 0 THEN (
        SELECT json_agg(json_build_array(
            CASE WHEN EXISTS (SELECT FROM jobs o WHERE o.id = d.on_id) THEN '' ELSE 'array_' END
                || replace(CAST(d.on_id AS text), '-', ''), d.kind) ORDER BY d.on_id, d.kind)
        FROM dependencies d WHERE d.job_id = j.id
    ) END AS after,
    {DONE_S} AS done_s, {FIGURES} AS speeds,
    CASE WHEN j.attempts > 0 THEN (
        SELECT max(past.ended_at) FROM attempts past WHERE past.job_id = j.id AND past.outcome = 'resized'
    ) END AS last_resized_at
"""
_LIVE_COLUMNS = f"""
    {_COLUMNS}, a.gpu_type, coalesce(a.started_at, a.created_at) AS started_at, placed.nodes, placed.replicas,
    (SELECT max(registered_at) FROM checkpoints c WHERE c.job_id = j.id) AS checkpointed_at,
    CASE WHEN a.state = 'stopping' THEN a.stop_for END AS for_job,
    CASE WHEN a.state = 'stopping' THEN a.next END AS next, NULL AS kept
"""
_NOT_LIVE_COLUMNS = f"""
    {_COLUMNS}, NULL AS gpu_type, NULL AS started_at, NULL AS nodes, NULL AS replicas, NULL AS checkpointed_at,
    NULL AS for_job, NULL AS next, CASE WHEN NOT j.held THEN h.kept END AS kept
"""
_NOT_LIVE_FROM = """
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id LEFT JOIN holds h ON h.job_id = j.id AND h.kept IS NOT NULL
"""
_LIVE_FROM = """
    FROM jobs j JOIN tenants t ON t.id = j.tenant_id
    JOIN attempts a ON a.job_id = j.id AND a.state IN ('starting', 'running', 'stopping')
    CROSS JOIN LATERAL (
        SELECT array_agg(p.node_id ORDER BY p.group_rank) AS nodes,
               array_agg(p.replicas ORDER BY p.group_rank) AS replicas
        FROM placements p WHERE p.attempt_id = a.id AND p.released_at IS NULL
    ) placed
"""
_SINCE = "j.changed_xid >= CAST(CAST(:since AS text) AS xid8)"
_JOBS_QUEUED = text(f"SELECT {_NOT_LIVE_COLUMNS} {_NOT_LIVE_FROM} WHERE j.state = 'queued'")
_JOBS_LIVE = text(f"SELECT {_LIVE_COLUMNS} {_LIVE_FROM} WHERE j.state IN ('starting', 'running', 'stopping')")
_JOBS_CHANGED = text(
    f"""
    SELECT {_NOT_LIVE_COLUMNS} {_NOT_LIVE_FROM} WHERE {_SINCE} AND j.state = 'queued'
    UNION ALL
    SELECT {_LIVE_COLUMNS} {_LIVE_FROM} WHERE {_SINCE} AND j.state IN ('starting', 'running', 'stopping')
    UNION ALL
    SELECT {_LIVE_COLUMNS} {_LIVE_FROM} WHERE NOT {_SINCE} AND j.state IN ('starting', 'running', 'stopping')
        AND j.id IN (SELECT job_id FROM checkpoints WHERE changed_xid >= CAST(CAST(:since AS text) AS xid8))
    """
)
_JOBS_OVER = text(f"SELECT j.id FROM jobs j WHERE {_SINCE} AND j.state IN ('succeeded', 'failed', 'cancelled')")


def _work(row: Row[Any], ask: _Ask) -> Work:
    return work_of(row, gpus=ask.replicas * ask.gpus, time_limit_s=row.time_limit)


def _job(row: Row[Any], predict: Predict | None) -> Job:
    ask, rules = _ask(row.resources), _rules(row.preemption)
    started_at, done_s = _seconds(row.started_at), row.done_s or 0.0
    return Job(
        id=_name(row),
        tenant=row.tenant,
        replicas=ask.replicas,
        gpus_per_replica=ask.gpus,
        submitted_at=row.submitted_at.timestamp(),
        state=_STATES[row.state],
        priority=row.priority,
        gpu_types=ask.gpu_types,
        gpu_type=row.gpu_type or None,
        cpus_per_replica=ask.cpus,
        memory_gib_per_replica=ask.memory_gib,
        min_replicas=ask.min_replicas,
        max_replicas=ask.max_replicas,
        speedup=speedup_in(row.speeds, row.gpu_type),
        topology=ask.topology,
        not_before=_seconds(row.not_before),
        deadline=_seconds(row.deadline),
        after=tuple(Dependency(job=on, on=kind) for on, kind in row.after or ()),
        array=ArrayLimit(id=_hex(row.array_id), max_running=row.array_max_running) if row.array_id else None,
        held=row.held,
        backoff_until=_seconds(row.backoff_until),
        avoid_nodes=tuple(map(_hex, row.avoid_nodes)),
        time_limit_s=row.time_limit,
        predicted_s=predict(_work(row, ask), done_s) if predict else None,
        done_s=done_s,
        preemptible=rules.preemptible,
        protected_until=None if started_at is None else started_at + rules.min_runtime_s,
        started_at=started_at,
        last_resized_at=_seconds(row.last_resized_at),
        checkpointed_at=_seconds(row.checkpointed_at),
        placement=_placement(row),
        for_job=_hex(row.for_job) if row.for_job else None,
        next=read_seat(row.next),
        kept=read_seat(row.kept),
    )


@dataclass(frozen=True, slots=True)
class _Ask:
    """What a job asks for, per replica but for their number."""

    replicas: int
    gpus: int
    gpu_types: tuple[str, ...]
    cpus: int
    memory_gib: int
    min_replicas: int | None
    max_replicas: int | None
    topology: Topology | None


@dataclass(frozen=True, slots=True)
class _Rules:
    preemptible: bool
    min_runtime_s: float


# Many jobs ask for the same: each text is read once.
@lru_cache(maxsize=16_384)
def _ask(resources: str) -> _Ask:
    asked = json.loads(resources)
    elastic = asked.get("elastic") or {}
    return _Ask(
        replicas=asked["replicas"],
        gpus=asked["gpus_per_replica"],
        gpu_types=tuple(asked["gpu_types"]),
        cpus=asked["cpus_per_replica"],
        memory_gib=math.ceil(asked["memory_per_replica"] / GIB),
        min_replicas=elastic.get("min_replicas"),
        max_replicas=elastic.get("max_replicas"),
        topology=topology_of(asked.get("topology")),
    )


def topology_of(asked: Mapping[str, Any] | None) -> Topology | None:
    """The snapshot's topology from that of a job's stored spec."""
    if asked is None:
        return None
    slice_ = asked["slice"]
    return Topology(
        required=asked["required"],
        preferred=asked["preferred"],
        slice=Slice(level=slice_["level"], replicas=slice_["replicas"]) if slice_ else None,
    )


@lru_cache(maxsize=16_384)
def _rules(preemption: str) -> _Rules:
    asked = json.loads(preemption)
    return _Rules(preemptible=asked["preemptible"], min_runtime_s=asked["min_runtime"])


def _name(row: Row[Any]) -> str:
    return row.id.hex


_STATES: dict[str, Any] = {"queued": "queued", "starting": "running", "running": "running", "stopping": "stopping"}


def _placement(row: Row[Any]) -> tuple[PlacementItem, ...]:
    pairs = zip(row.nodes or (), row.replicas or (), strict=True)
    return tuple(PlacementItem(_hex(node), replicas) for node, replicas in pairs)


@lru_cache(maxsize=32_768)
def _hex(value: UUID) -> str:
    return value.hex


def _seconds(at: datetime | None) -> float | None:
    return None if at is None else at.timestamp()


# ------------------------------------------------------------------ what lost attempts still hold

_CHARGED_LOST = text(
    """
    SELECT a.id, t.path AS tenant, j.priority, j.submitted_at, CAST(j.spec->'resources' AS text) AS resources,
           a.gpu_type, coalesce(a.started_at, a.created_at) AS started_at,
           array_agg(p.node_id ORDER BY p.group_rank) AS nodes, array_agg(p.replicas ORDER BY p.group_rank) AS replicas
    FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN tenants t ON t.id = j.tenant_id
    JOIN placements p ON p.attempt_id = a.id AND p.released_at IS NULL JOIN nodes n ON n.id = p.node_id
    WHERE a.state = 'lost' AND a.released_at IS NULL AND (n.state <> 'lost' OR a.certain_at > :now)
      AND (CAST(:job_ids AS uuid[]) IS NULL OR a.job_id = ANY(CAST(:job_ids AS uuid[])))
    GROUP BY a.id, t.path, j.id
    """
)
_UNCERTAIN = text("SELECT job_id FROM attempts WHERE state = 'lost' AND released_at IS NULL AND certain_at > :now")
_LOST_ON_CHANGED = text(
    """
    SELECT a.job_id FROM attempts a JOIN placements p ON p.attempt_id = a.id AND p.released_at IS NULL
    WHERE a.state = 'lost' AND a.released_at IS NULL AND p.node_id IN (
        SELECT id FROM nodes WHERE changed_xid >= CAST(CAST(:since AS text) AS xid8))
    """
)
_LOST = text("SELECT id FROM attempts WHERE state = 'lost' AND job_id = ANY(CAST(:job_ids AS uuid[]))")


def _leftover(row: Row[Any]) -> Job:
    """What a lost attempt still holds: a job that is stopping."""
    ask = _ask(row.resources)
    return Job(
        id=_name(row),
        tenant=row.tenant,
        replicas=sum(row.replicas),
        gpus_per_replica=ask.gpus,
        submitted_at=row.submitted_at.timestamp(),
        state="stopping",
        priority=row.priority,
        gpu_type=row.gpu_type or None,
        cpus_per_replica=ask.cpus,
        memory_gib_per_replica=ask.memory_gib,
        started_at=_seconds(row.started_at),
        placement=_placement(row),
    )


async def _uncertain_jobs(conn: AsyncConnection, now: datetime) -> frozenset[UUID]:
    """The jobs of lost attempts whose ranks may still run on a lost node."""
    return frozenset((await conn.execute(_UNCERTAIN, {"now": now})).scalars())


async def _leftovers(
    conn: AsyncConnection, job_ids: set[UUID], now: datetime
) -> tuple[tuple[Job, ...], tuple[str, ...]]:
    """What lost attempts of these jobs still hold, and the names of those that hold nothing any more. A release shows
    as a change of the job (a trigger)."""
    if not job_ids:
        return (), ()
    lost = list((await conn.execute(_LOST, {"job_ids": list(job_ids)})).scalars())
    if not lost:
        return (), ()
    held = tuple(_leftover(row) for row in await conn.execute(_CHARGED_LOST, {"job_ids": list(job_ids), "now": now}))
    names = {job.id for job in held}
    return held, tuple(attempt.hex for attempt in lost if attempt.hex not in names)


# ------------------------------------------------------------------ nodes and tenants

_NODES = text(
    """
    SELECT n.id, n.cluster_id, c.name AS cluster, n.gpu_type, n.gpus, n.cpus, n.memory_bytes, n.labels, n.state, n.alive
    FROM nodes n JOIN clusters c ON c.id = n.cluster_id
    WHERE n.changed_xid >= CAST(CAST(:since AS text) AS xid8) OR n.cluster_id = ANY(CAST(:clusters AS uuid[]))
    """
)
_SILENT = text("SELECT id FROM clusters WHERE agent_seen_at < :heard_before")
_TENANTS = text(
    """
    SELECT t.path, parent.path AS parent, t.weight, t.preemption,
           (SELECT json_object_agg(q.resource, json_build_object(
                'nominal', q.nominal, 'borrowing_limit', q.borrowing_limit, 'lending_limit', q.lending_limit))
            FROM quotas q WHERE q.tenant_id = t.id) AS quotas
    FROM tenants t LEFT JOIN tenants parent ON parent.id = t.parent_id ORDER BY t.path
    """
)


async def silent_clusters(conn: AsyncConnection, *, now: datetime) -> frozenset[UUID]:
    """The clusters whose agent was not heard for AGENT_SILENT_S. One that never had an agent has no nodes."""
    rows = await conn.execute(_SILENT, {"heard_before": now - timedelta(seconds=AGENT_SILENT_S)})
    return frozenset(rows.scalars())


def _node(row: Row[Any], silent: frozenset[UUID]) -> Node:
    """A node that its agent says is gone, or of which nothing is heard, and that is not given up, takes nothing new."""
    heard = row.alive and row.cluster_id not in silent
    return Node(
        name=_hex(row.id),
        gpu_type=row.gpu_type,
        gpus=row.gpus,
        cluster=row.cluster,
        cpus=row.cpus,
        memory_gib=row.memory_bytes // GIB,
        labels=row.labels,
        state=row.state if heard or row.state == "lost" else "cordoned",
    )


async def _load_tenants(conn: AsyncConnection, usage: Usage | None) -> tuple[Tenant, ...]:
    used = usage.by_tenant if usage else {}
    return tuple(_tenant(row, used.get(row.path, {})) for row in await conn.execute(_TENANTS))


def _tenant(row: Row[Any], usage: Mapping[str, float]) -> Tenant:
    rules = dict(row.preemption)
    borrow = rules.pop("borrow", None)
    return Tenant(
        name=row.path,
        parent=row.parent,
        weight=row.weight,
        usage=usage,
        quotas={name: Quota(**quota) for name, quota in (row.quotas or {}).items()},
        preemption=Preemption(borrow=BorrowRule(**borrow) if borrow else None, **rules),
    )


def read_policy(document: str | None) -> Policy:
    """The policy that a settings file says, as the `policy` object of plan-format; None = defaults. ValueError names
    what does not fit."""
    return read_record(Policy, json.loads(document)) if document else Policy()
