"""What the attempts of a job spent their time on, as far as it is stored: their moments, their first and last steps,
and the totals that rank 0 reports.

Owns the names of these totals. They are running sums, so the last value is all of it.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.goodput import AttemptTime

TOTALS = {
    "productive_s": "productive_s",
    "data_wait_s": "data_wait_total_s",
    "checkpoint_s": "checkpoint_total_s",
    "rolled_back_s": "lost_s",
}
"""The metric that each total of `AttemptTime` comes from."""

# The index of metrics is by name and time, so of each attempt only the newest or the oldest point is read.
_POINT = """
    (SELECT {column} FROM metrics m
     WHERE m.job_id = a.job_id AND m.name = {name} AND m.attempt_id = a.id AND m.rank = 0 AND m.step IS NOT NULL
       AND m.at >= a.created_at - interval '1 hour' AND m.at <= coalesce(a.ended_at, 'infinity') + interval '1 hour'
     ORDER BY m.at {order} LIMIT 1)
"""
_TOTALS = ", ".join(
    f"{_POINT.format(column='value', name=f':{metric}', order='DESC')} AS {field}" for field, metric in TOTALS.items()
)
_ATTEMPTS = text(
    f"""
    SELECT a.created_at, a.started_at, a.rendezvous_at, a.stop_requested_at, a.ended_at, a.replicas,
           (SELECT sum(cardinality(p.gpu_indices)) FROM placements p WHERE p.attempt_id = a.id) AS gpus,
           coalesce(a.first_step_at, {_POINT.format(column="at", name=":steps_of", order="ASC")}) AS first_step_at,
           {_POINT.format(column="step", name=":steps_of", order="ASC")} AS first_step,
           {_POINT.format(column="step", name=":steps_of", order="DESC")} AS last_step,
           {_POINT.format(column="at", name=":steps_of", order="DESC")} AS last_step_at, {_TOTALS}
    FROM attempts a WHERE a.job_id = :job_id ORDER BY a.number
    """
)
_NAMES = text('SELECT ARRAY(SELECT jsonb_object_keys("values")) FROM progress WHERE job_id = :job_id')


async def load_attempt_times(conn: AsyncConnection, job_id: UUID) -> list[AttemptTime]:
    """Of all attempts of a job, in their order."""
    names = (await conn.execute(_NAMES, {"job_id": job_id})).scalar() or []
    steps_of = next((name for name in ("loss", "productive_s", *sorted(names)) if name in names), "loss")
    values = {"job_id": job_id, "steps_of": steps_of, **{metric: metric for metric in TOTALS.values()}}
    return [_attempt(row) for row in await conn.execute(_ATTEMPTS, values)]


def _attempt(row: Row[Any]) -> AttemptTime:
    known = {name: value for name, value in row._mapping.items() if value is not None and name not in _WEIGHTS}
    return AttemptTime(weight=row.gpus or row.replicas, **known)


_WEIGHTS = {"gpus", "replicas"}
