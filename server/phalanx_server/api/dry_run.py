"""A submit that is only tried: is the job file valid, and what would the scheduler do with it now?"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

import structlog
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.check_jobs import Request, check_jobs
from phalanx_server.actions.hardware import HardwareWatch
from phalanx_server.actions.submit_warnings import Warnings
from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Services, now
from phalanx_server.api.job_documents import Hold, too_late
from phalanx_server.api.what_if import Outcome, hold_of, hypothetical
from phalanx_server.domain.errors import PhalanxError
from phalanx_server.domain.memory_estimate import estimate_of
from phalanx_server.domain.reason import HoldReason
from phalanx_server.domain.spec import JobSpec
from phalanx_server.scheduling.plan import Hold as PlannedHold
from phalanx_server.store import ids
from phalanx_server.store.node_views import gpu_types_of_nodes, names_of_nodes

log = structlog.get_logger("phalanx.submits")


class WouldPlace(BaseModel):
    node: str
    replicas: int


class Would(BaseModel):
    """What the next pass would do with the job; of an array, with its first."""

    start: bool
    hold: Hold | None
    placement: list[WouldPlace]


class MemoryOn(BaseModel):
    gpu_type: str
    fits: bool
    message: str = Field(description="In words, with what to change where it does not fit.")


class Memory(BaseModel):
    """What each rank of a recipe is expected to need, before it starts (docs/training.md)."""

    total_bytes: int = Field(description="Of the rank that needs most.")
    parts_bytes: dict[str, int]
    on: list[MemoryOn] = Field(description="The job's GPU types; those of the cluster where it names none.")


class DryRun(BaseModel):
    valid: Literal[True] = True
    spec: dict[str, Any]
    would: Would
    warnings: list[str]
    memory: Memory | None = Field(default=None, description="Of a job that runs a recipe.")


async def dry_run(services: Services, principal: Principal, spec: JobSpec) -> DryRun:
    """Raises what a submit would raise; stores nothing."""
    request = Request([spec], principal.actor)
    async with services.engine.connect() as conn:
        (checked,) = await check_jobs(conn, [request], HardwareWatch(), policy=services.policy)
        if isinstance(checked, PhalanxError):
            raise checked
    spec = checked.specs[0].for_tenant(request.tenant_of(spec))
    job = hypothetical(spec, id=ids.new_id().hex, submitted_at=now(), unmet=checked.unmet[0])
    outcome = await services.what_if.with_jobs([job])
    async with services.reads.connect() as conn:
        would = await _would(conn, outcome, job.id, principal)
        gpu_types = await gpu_types_of_nodes(conn)
    memory = _memory(spec, gpu_types)
    late = too_late(would.hold.estimated_start if would.hold else None, spec.deadline)
    warnings = [*_unsaid(checked.warnings[0], would, memory), *late]
    return DryRun(spec=spec.dump(), would=would, warnings=warnings, memory=memory)


def _unsaid(warnings: Warnings, would: Would, memory: Memory | None) -> list[str]:
    """What the rest of the answer does not say already: why it can never start, and what does not fit in memory."""
    if would.hold is not None and would.hold.reason == HoldReason.IMPOSSIBLE:
        warnings = replace(warnings, never=())
    if memory is not None:
        warnings = replace(warnings, memory=())
    return warnings.all


def _memory(spec: JobSpec, gpu_types: list[str]) -> Memory | None:
    try:
        found = estimate_of(spec, gpu_types)
    except Exception:  # the rest of the answer does not depend on it
        log.warning("memory_left_out", exc_info=True)
        return None
    if found is None:
        return None
    on = [MemoryOn(gpu_type=name, fits=fits, message=message) for name, fits, message in found.on]
    return Memory(total_bytes=found.total_bytes, parts_bytes=found.parts, on=on)


async def _would(conn: AsyncConnection, outcome: Outcome, job: str, principal: Principal) -> Would:
    start = next((start for start in outcome.plan.starts if start.job == job), None)
    if start is None:
        hold = hold_of(outcome, job, principal.sees)
        return Would(start=False, hold=_hold(hold, outcome.snapshot_at), placement=[])
    names = await names_of_nodes(conn, [item.node for item in start.placement])
    placement = [WouldPlace(node=names.get(item.node, item.node), replicas=item.replicas) for item in start.placement]
    return Would(start=True, hold=None, placement=placement)


def _hold(hold: PlannedHold | None, at: datetime) -> Hold | None:
    if hold is None:
        return None
    expected = None if hold.estimated_start is None else datetime.fromtimestamp(hold.estimated_start, UTC)
    return Hold(
        reason=hold.reason.value,
        message=hold.message,
        unblocks=list(hold.unblocks),
        estimated_start=expected,
        since=at,
    )
