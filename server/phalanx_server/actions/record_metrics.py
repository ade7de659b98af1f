"""Take metric points of one attempt: what can be stored is, what cannot is told once.

Owns the limits' consequences. A value that is refused never takes its neighbours with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.clock import Clock
from phalanx_server.domain.event import EventKind
from phalanx_server.domain.messages import MetricPoint
from phalanx_server.domain.metric import NAMES_PER_JOB, RANK_MAX, check_values, clean_step, over_limit
from phalanx_server.store.attempts import Fence
from phalanx_server.store.events import Event, record_once
from phalanx_server.store.goodput import note_steps
from phalanx_server.store.metrics import Point, Progress, insert_points, names_over_limit, upsert_progress

# An attempt gets at most so many events about metrics that were refused.
REFUSALS_MAX = 100


async def record_metrics(conn: AsyncConnection, fence: Fence, reported: Sequence[MetricPoint], clock: Clock) -> None:
    """Store points that the fence let through, with roll-ups, progress, and what outlives them."""
    points, refused = _sort_out(reported, fence, clock)
    names = {point.name for point in points}
    full = await names_over_limit(conn, job_id=fence.job_id, names=names, limit=NAMES_PER_JOB) if names else set()
    if full:
        points = [point for point in points if point.name not in full]
        refused |= {name: over_limit(name) for name in full}
    if points:
        await insert_points(conn, job_id=fence.job_id, attempt_id=fence.id, points=points)
    steps = _steps(reported, fence, clock)
    if points or steps:
        progress = latest(points, steps)
        await upsert_progress(conn, job_id=fence.job_id, attempt_id=fence.id, progress=progress)
    if of_first := _steps([each for each in reported if each.rank == 0], fence, clock):
        own = [point for point in points if point.rank == 0]
        await note_steps(conn, attempt_id=fence.id, steps=of_first, points=own)
    await _tell(conn, fence, refused, clock.now)


def _sort_out(reported: Sequence[MetricPoint], fence: Fence, clock: Clock) -> tuple[list[Point], dict[str, str]]:
    points: list[Point] = []
    refused: dict[str, str] = {}
    for point in reported:
        if not 0 <= point.rank <= RANK_MAX:
            continue
        checked = check_values(point.values)
        refused |= checked.refused
        step, at_s = clean_step(point.step), clock.seconds(point.at, earliest=fence.created_at)
        points += [Point(point.rank, name, step, float(value), at_s) for name, value in checked.values.items()]
    return points, refused


def _steps(reported: Sequence[MetricPoint], fence: Fence, clock: Clock) -> list[tuple[int, float]]:
    """Each step with its time: those without any value too, for some scripts report nothing else."""
    told = ((clean_step(each.step), each.at) for each in reported if 0 <= each.rank <= RANK_MAX)
    return [(step, clock.seconds(at, earliest=fence.created_at)) for step, at in told if step is not None]


def latest(points: Sequence[Point], steps: Sequence[tuple[int, float]]) -> Progress:
    """The newest value of each name (of the lowest rank, where several report it) and the highest step."""
    newest = {point.name: point.value for point in sorted(points, key=lambda point: (point.at_s, -point.rank))}
    at_s = max([*(point.at_s for point in points), *(at_s for _, at_s in steps)])
    at = datetime.fromtimestamp(at_s, UTC)
    return Progress(at=at, step=max((step for step, _ in steps), default=None), values=newest)


async def _tell(conn: AsyncConnection, fence: Fence, refused: Mapping[str, str], now: datetime) -> None:
    """One event per attempt and name."""
    for name in sorted(refused)[:REFUSALS_MAX]:
        event = Event(
            at=now,
            kind=EventKind.NOTE.value,
            message=refused[name],
            job_id=fence.job_id,
            attempt_id=fence.id,
            data={"metric": name},
        )
        await record_once(conn, event, topic="metric", at_most=REFUSALS_MAX)
