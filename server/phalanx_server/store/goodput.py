"""What the attempts of a job spent their time on, as far as it is stored: their moments, their first and last steps,
and the totals that rank 0 reports.

Owns the names of these totals, and that all of it is kept with the attempt as it is reported: metrics are forgotten
earlier. Totals are running sums, so the last value is all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.goodput import AttemptTime
from phalanx_server.store.engine import dump_json
from phalanx_server.store.metrics import Point

TOTALS = {
    "productive_s": "productive_s",
    "data_wait_s": "data_wait_total_s",
    "checkpoint_s": "checkpoint_total_s",
    "rolled_back_s": "lost_s",
}
"""The metric that each total of `AttemptTime` comes from."""

_OF_TRAINING = frozenset({"loss", "productive_s"})
"""Metrics whose steps are those of the training: a script may report others, as by epoch."""

# Reports of a node may come out of their order, after it was without the server. The first step of a training is the
# lowest, since it may go back to a checkpoint of an earlier attempt. Of others it is the first in time, and the last is
# the highest: an epoch's number is no step, and lower than most.
_IS_FIRST = "(EXCLUDED.of_training, old.first_step_at) > (old.of_training, EXCLUDED.first_step_at)"
_IS_LAST = "(EXCLUDED.of_training, EXCLUDED.last_step_at) >= (old.of_training, old.last_step_at)"
_NOTE_STEPS = text(
    f"""
    INSERT INTO attempt_steps AS old
        (attempt_id, of_training, first_step, first_step_at, last_step, last_step_at, totals)
    VALUES (:attempt_id, :of_training, :first_step, to_timestamp(:first_at_s), :last_step, to_timestamp(:last_at_s),
            CAST(:totals AS jsonb))
    ON CONFLICT (attempt_id) DO UPDATE SET
        of_training = old.of_training OR EXCLUDED.of_training,
        first_step = CASE WHEN EXCLUDED.of_training AND old.of_training THEN LEAST(EXCLUDED.first_step, old.first_step)
                          WHEN {_IS_FIRST} THEN EXCLUDED.first_step ELSE old.first_step END,
        first_step_at = CASE WHEN {_IS_FIRST} THEN EXCLUDED.first_step_at ELSE old.first_step_at END,
        last_step = CASE WHEN NOT (EXCLUDED.of_training OR old.of_training)
                              THEN GREATEST(EXCLUDED.last_step, old.last_step)
                         WHEN {_IS_LAST} THEN EXCLUDED.last_step ELSE old.last_step END,
        last_step_at = CASE WHEN {_IS_LAST} THEN EXCLUDED.last_step_at ELSE old.last_step_at END,
        totals = CASE WHEN EXCLUDED.last_step_at >= old.last_step_at
                      THEN old.totals || EXCLUDED.totals ELSE EXCLUDED.totals || old.totals END
    """
)
_ATTEMPTS = text(
    """
    SELECT a.created_at, a.started_at, a.rendezvous_at, a.stop_requested_at, a.ended_at, a.replicas,
           (SELECT sum(cardinality(p.gpu_indices)) FROM placements p WHERE p.attempt_id = a.id) AS gpus,
           coalesce(a.first_step_at, s.first_step_at) AS first_step_at, s.first_step, s.last_step, s.last_step_at,
           s.totals
    FROM attempts a LEFT JOIN attempt_steps s ON s.attempt_id = a.id WHERE a.job_id = :job_id ORDER BY a.number
    """
)
_NOT_ITS_TIME = {"replicas", "gpus", "totals"}


async def note_steps(
    conn: AsyncConnection, *, attempt_id: UUID, steps: Sequence[tuple[int, float]], points: Sequence[Point]
) -> None:
    """Add what rank 0 of an attempt reported: each step with its time (seconds since the epoch), at least one, and its
    points. The steps of the training go before all others."""
    trained = [(p.step, p.at_s) for p in points if p.name in _OF_TRAINING and p.step is not None]
    in_time = sorted((at_s, step) for step, at_s in trained or steps)
    (first_at_s, first), (last_at_s, last) = in_time[0], in_time[-1]
    if trained:
        first = min(step for step, _ in trained)
    else:
        last = max(step for step, _ in steps)
    told = [point for point in points if point.name in TOTALS.values() and point.step is not None]
    totals = {point.name: point.value for point in sorted(told, key=lambda point: point.at_s)}
    values = {"first_step": first, "first_at_s": first_at_s, "last_step": last, "last_at_s": last_at_s}
    values |= {"attempt_id": attempt_id, "of_training": bool(trained), "totals": dump_json(totals)}
    await conn.execute(_NOTE_STEPS, values)


async def load_attempt_times(conn: AsyncConnection, job_id: UUID) -> list[AttemptTime]:
    """Of all attempts of a job, in their order."""
    return [_attempt(row) for row in await conn.execute(_ATTEMPTS, {"job_id": job_id})]


def _attempt(row: Row[Any]) -> AttemptTime:
    known = {name: value for name, value in row._mapping.items() if value is not None and name not in _NOT_ITS_TIME}
    said = row.totals or {}
    totals = {field: said[metric] for field, metric in TOTALS.items() if metric in said}
    return AttemptTime(weight=row.gpus or row.replicas, **known, **totals)
