"""What the scheduler would do: the live scheduler's own pass over live state, with jobs or changes added.

Owns the way from job files to a plan and back to API names. Refuses to change anything. Plans are computed in a thread,
one at a time; the snapshot they start from is shared for a moment, because loading one is the larger part of the cost,
and what was learnt of run times and what tenants have used for longer.
"""

from __future__ import annotations

import asyncio
import difflib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from phalanx_server.actions.awaited_jobs import Unmet, awaited_by
from phalanx_server.api.errors import Problem
from phalanx_server.domain.resources import CPU, MEMORY
from phalanx_server.domain.spec import JobSpec
from phalanx_server.scheduling.plan import Hold, Plan, dump_plan
from phalanx_server.scheduling.planner import schedule
from phalanx_server.scheduling.predict import Predictor, Work
from phalanx_server.scheduling.snapshot import (
    Changes,
    Dependency,
    Job,
    NodeState,
    Policy,
    Quota,
    Snapshot,
    changed,
    checked,
    parse_changes,
)
from phalanx_server.store.forecasts import Forecast, learnt, load_history
from phalanx_server.store.snapshots import GIB, load_snapshot, reading, topology_of
from phalanx_server.store.usage import Usage

SNAPSHOT_AGE_S = 1.0
HISTORY_AGE_S = 60.0
MOST_WAITING = 8

_API_ID = re.compile(r"(?:job|node)_([0-9a-f]{32})")


@dataclass(frozen=True)
class Outcome:
    """A plan and the moment of the state that it was made for."""

    plan: Plan
    snapshot: Snapshot

    @property
    def snapshot_at(self) -> datetime:
        return datetime.fromtimestamp(self.snapshot.now, UTC)


@dataclass(frozen=True)
class Edits:
    """Quotas that tenants would have, by path and resource (those that are not named stay), and states that nodes would
    have, by the name in the snapshot."""

    quotas: Mapping[str, Mapping[str, Quota]]
    nodes: Mapping[str, NodeState]

    def made(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the edits. ValueError where there is no such tenant, resource or node."""
        for noun, asked, known in (
            ("tenant", self.quotas, {tenant.name for tenant in snapshot.tenants}),
            ("node", self.nodes, {node.name for node in snapshot.nodes}),
        ):
            if unknown := sorted(asked.keys() - known):
                raise ValueError(f"there is no {noun} {unknown[0]}")
        self._check_resources(snapshot)
        tenants = (
            replace(tenant, quotas={**tenant.quotas, **self.quotas.get(tenant.name, {})}) for tenant in snapshot.tenants
        )
        nodes = (replace(node, state=self.nodes.get(node.name, node.state)) for node in snapshot.nodes)
        return replace(snapshot, tenants=tuple(tenants), nodes=tuple(nodes))

    def _check_resources(self, snapshot: Snapshot) -> None:
        """A quota of what no node has would change nothing: ValueError names what there is."""
        known = {CPU, MEMORY, *(node.gpu_type for node in snapshot.nodes if node.gpus)}
        known |= {resource for tenant in snapshot.tenants for resource in tenant.quotas}
        for resource in sorted({name for quotas in self.quotas.values() for name in quotas} - known):
            near = difflib.get_close_matches(resource, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"there is no resource {resource}{meant} (known: {', '.join(sorted(known))})")


class WhatIf:
    """Answers what-if questions of one process."""

    def __init__(self, engine: AsyncEngine, policy: Policy) -> None:
        self._engine = engine
        self._policy = policy
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._snapshot: Snapshot | None = None
        self._loaded_at = -math.inf
        self._predictor = Predictor()
        self._forecast = Forecast(self._predictor)
        self._learnt_at = -math.inf
        self._usage: Usage | None = None

    async def with_jobs(
        self, jobs: Sequence[Job], works: Mapping[str, Work] | None = None, edits: Edits | None = None
    ) -> Outcome:
        """The plan if these jobs were submitted now, after edits. `works`: what is known of their run times. ValueError
        names what the edits have wrong."""

        def add(snapshot: Snapshot) -> Snapshot:
            edited = edits.made(snapshot) if edits else snapshot
            expected = self._forecast.predicted(jobs, works or {})
            return changed(edited, Changes(now=snapshot.now, jobs=expected))

        return await self._ask(add)

    async def with_changes(self, document: Mapping[str, Any]) -> Outcome:
        """The plan after changes as plan-format says them; `now` may be left out. ValueError names what is wrong."""

        def apply(snapshot: Snapshot) -> Snapshot:
            changes = parse_changes({"now": snapshot.now, **_internal(dict(document))})
            return checked(changed(snapshot, changes))

        return await self._ask(apply)

    async def of_snapshot(self, snapshot: Snapshot) -> Outcome:
        """The plan of a given snapshot, without looking at live state."""
        async with self._line():
            return Outcome(await asyncio.to_thread(schedule, snapshot), snapshot)

    async def _ask(self, change: Any) -> Outcome:
        async with self._line():
            live = await self._live()
            return await asyncio.to_thread(_plan, live, change)

    async def _live(self) -> Snapshot:
        if self._snapshot is None or time.monotonic() - self._loaded_at > SNAPSHOT_AGE_S:
            async with reading(self._engine) as conn:
                if time.monotonic() - self._learnt_at > HISTORY_AGE_S:
                    history = await load_history(conn)
                    self._predictor = await asyncio.to_thread(learnt, history)
                    self._learnt_at = time.monotonic()
                self._forecast = Forecast(self._predictor)
                predict = self._forecast.predicted_s
                now = datetime.now(UTC)
                snapshot, cursor = await load_snapshot(conn, now, self._policy, predict, self._usage)
            self._usage = cursor.usage
            self._snapshot = await asyncio.to_thread(self._forecast.begin, snapshot, cursor.works)
            self._loaded_at = time.monotonic()
        return self._snapshot

    def _line(self) -> _Line:
        return _Line(self)


class _Line:
    """One at a time; whoever would be far behind in the line is asked to come back."""

    def __init__(self, owner: WhatIf) -> None:
        self._owner = owner

    async def __aenter__(self) -> None:
        if self._owner._waiting >= MOST_WAITING:
            raise Problem("rate_limited", "Too many plans are being made. Try again.", headers={"Retry-After": "1"})
        self._owner._waiting += 1
        try:
            await self._owner._turn.acquire()
        except BaseException:
            self._owner._waiting -= 1
            raise

    async def __aexit__(self, *_: object) -> None:
        self._owner._waiting -= 1
        self._owner._turn.release()


def _plan(live: Snapshot, change: Any) -> Outcome:
    snapshot = change(live)
    return Outcome(schedule(snapshot), snapshot)


def _internal(value: Any) -> Any:
    """API ids as the live snapshot names things: `job_<hex>` and `node_<hex>` as the bare hex."""
    if isinstance(value, str):
        match = _API_ID.fullmatch(value)
        return match.group(1) if match else value
    if isinstance(value, dict):
        return {key: _internal(item) for key, item in value.items()}
    return [_internal(item) for item in value] if isinstance(value, list) else value


def hypothetical(spec: JobSpec, *, id: str, submitted_at: datetime, unmet: Unmet = ()) -> Job:
    """A job as the snapshot would have it, from a job file that names its tenant. An array is one job here."""
    resources, elastic = spec.resources, spec.resources.elastic
    arrays = {id_ for *_, name, id_ in awaited_by(spec) if name.startswith("array_")}
    return Job(
        id=id,
        tenant=spec.tenant or "",
        priority=spec.priority_value,
        replicas=resources.replicas,
        gpus_per_replica=resources.gpus_per_replica,
        gpu_types=resources.gpu_types,
        cpus_per_replica=resources.cpus_per_replica,
        memory_gib_per_replica=math.ceil(resources.memory_per_replica / GIB),
        min_replicas=elastic.min_replicas if elastic else None,
        max_replicas=elastic.max_replicas if elastic else None,
        topology=topology_of(resources.topology.model_dump() if resources.topology else None),
        after=tuple(Dependency(job=f"{'array_' * (on in arrays)}{on.hex}", on=kind) for on, kind in unmet),
        deadline=spec.deadline.timestamp() if spec.deadline else None,
        time_limit_s=spec.time_limit,
        preemptible=spec.preemption.preemptible,
        held=spec.held,
        not_before=spec.not_before.timestamp() if spec.not_before else None,
        submitted_at=submitted_at.timestamp(),
        state="queued",
    )


def work_of_spec(spec: JobSpec, *, user: str) -> Work:
    """What is known of the run time of a job that is not submitted yet."""
    gpus = spec.resources.replicas * spec.resources.gpus_per_replica
    return Work(tenant=spec.tenant or "", gpus=gpus, user=user, name=spec.name, time_limit_s=spec.time_limit)


def plan_document(outcome: Outcome, sees: Callable[[str], bool]) -> dict[str, Any]:
    """The plan in plan-format with API ids, of the jobs of tenants that the caller sees. Others' are named nowhere."""
    visible = _Visible(outcome.snapshot, sees)
    document = dump_plan(visible.of(outcome.plan))
    return {kind: [_external(row, visible) for row in rows if visible(row["job"])] for kind, rows in document.items()}


def hold_of(outcome: Outcome, job: str, sees: Callable[[str], bool]) -> Hold | None:
    """Why this job waits, for a caller who sees these tenants; None if the plan does not hold it."""
    return _Visible(outcome.snapshot, sees).of(outcome.plan).hold_of(job)


class _Visible:
    """Which jobs of a snapshot a caller may know of."""

    def __init__(self, snapshot: Snapshot, sees: Callable[[str], bool]) -> None:
        self._tenants = {job.id: job.tenant for job in snapshot.jobs}
        self._sees = sees

    def __call__(self, job: str | None) -> bool:
        tenant = self._tenants.get(job) if job else None
        return tenant is not None and self._sees(tenant)

    def of(self, plan: Plan) -> Plan:
        """The plan, why a job waits said without the jobs that are hidden."""

        def hidden(job: str) -> bool:
            return not self(job)

        groups = (replace(group, explanation=group.explanation.hiding(hidden)) for group in plan.hold_groups)
        return replace(plan, hold_groups=tuple(groups))


_HEX = re.compile(r"[0-9a-f]{32}")


def _external(row: dict[str, Any], visible: _Visible) -> dict[str, Any]:
    named: dict[str, Any] = {"job": _prefixed("job", row["job"])}
    if "for" in row:
        named["for"] = _prefixed("job", row["for"]) if visible(row["for"]) else None
    if "placement" in row:
        named["placement"] = _external_places(row["placement"])
    if "kept" in row:
        named["kept"] = {**row["kept"], "placement": _external_places(row["kept"]["placement"])}
    return {**row, **named}


def _external_places(placement: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**item, "node": _prefixed("node", item["node"])} for item in placement]


def _prefixed(kind: str, name: str | None) -> str | None:
    return f"{kind}_{name}" if name and _HEX.fullmatch(name) else name
