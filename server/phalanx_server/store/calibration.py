"""How good forecasts were: what was first said of each job, and what came of it.

Owns the rows of `forecasts`, which are written once, and their comparison: a start with the first expected start that
was told, a run time with what was expected when the job first started. Refuses to forecast.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.predict import Expectation
from phalanx_server.store.holds import HoldRow
from phalanx_server.store.job_views import SUBTREE

NEWEST = 10_000
"""So many of the newest forecasts are compared."""
TOLERANCE_S = 10.0
"""A start is told to ten seconds."""

_RUNS = text(
    """
    INSERT INTO forecasts (job_id, run_s, run_low_s, run_high_s)
    SELECT * FROM unnest(CAST(:jobs AS uuid[]), CAST(:runs AS double precision[]), CAST(:lows AS double precision[]),
                         CAST(:highs AS double precision[]))
    ON CONFLICT (job_id) DO UPDATE SET
        run_s = EXCLUDED.run_s, run_low_s = EXCLUDED.run_low_s, run_high_s = EXCLUDED.run_high_s
    WHERE forecasts.run_s IS NULL
    """
)


async def record_runs(conn: AsyncConnection, said: Mapping[UUID, Expectation]) -> None:
    """How long these jobs, which start for the first time, are expected to run."""
    if not said:
        return
    values = {
        "jobs": list(said),
        "runs": [each.predicted_s for each in said.values()],
        "lows": [each.low_s for each in said.values()],
        "highs": [each.high_s for each in said.values()],
    }
    await conn.execute(_RUNS, values)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Of so many forecasts: the share inside their intervals (0.8 is meant; None where none had an interval), and the
    median of the absolute errors (None where there is no outcome yet)."""

    jobs: int
    within_interval: float | None
    median_error_s: float | None
    median_relative_error: float | None


@dataclass(frozen=True, slots=True)
class Said:
    """When a waiting job was said to start, and between when and when."""

    start: datetime
    low: datetime | None
    high: datetime | None


class StartRecord:
    """The same of starts, counted in one process as they come: each with what was first said while the job waited."""

    def __init__(self) -> None:
        self.jobs = self.within = 0
        self.error_s = 0.0
        self._said: dict[str, Said] = {}

    def load(self, holds: Iterable[Row[Any]]) -> None:
        """Go on from the stored holds (`store.holds.load_holds`): who waits was told before this process led."""
        self._said = {
            row.job_id.hex: Said(row.first_start, row.first_start_low, row.first_start_high)
            for row in holds
            if row.first_start is not None
        }

    def told(self, rows: Iterable[HoldRow]) -> None:
        """These holds were stored: the first expected start of a job is kept until the job starts."""
        for row in rows:
            if row.estimated_start is not None:
                said = Said(row.estimated_start, row.estimated_start_low, row.estimated_start_high)
                self._said.setdefault(row.job_id.hex, said)

    def started(self, jobs: Iterable[str], *, now: datetime) -> None:
        for job in jobs:
            said = self._said.pop(job, None)
            if said is None:
                continue
            self.jobs += 1
            self.error_s += abs((now - said.start).total_seconds())
            by = timedelta(seconds=TOLERANCE_S)
            self.within += said.low is not None and said.high is not None and said.low - by <= now <= said.high + by

    def keep(self, queued: Container[str]) -> None:
        """Forget who waits no more without having started."""
        self._said = {job: said for job, said in self._said.items() if job in queued}


# The newest forecasts of some kind; of a tenant's subtree they are read by tenant, so that the cost does not depend on
# how many others there are.
_NEWEST_OF_ALL = "SELECT * FROM forecasts f WHERE {told} ORDER BY job_id DESC LIMIT :newest"
_NEWEST_OF_TENANT = f"""
    SELECT newest.* FROM tenants, LATERAL (
        SELECT f.* FROM jobs j JOIN forecasts f ON f.job_id = j.id
        WHERE j.tenant_id = tenants.id AND {{told}} ORDER BY j.id DESC LIMIT :newest
    ) newest
    WHERE {SUBTREE} ORDER BY newest.job_id DESC LIMIT :newest
"""
_STARTS_CALIBRATED = """
    SELECT count(*) AS jobs,
           CAST(avg(CAST(error_low <= :tolerance AND error_high <= :tolerance AS integer)) AS double precision)
               AS within_interval,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(error)) AS median_error_s,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(error) / greatest(wait_s, 1)) AS median_relative_error
    FROM (
        SELECT CAST(extract(epoch FROM a.created_at - f.start) AS double precision) AS error,
               extract(epoch FROM f.start_low - a.created_at) AS error_low,
               extract(epoch FROM a.created_at - f.start_high) AS error_high,
               CAST(extract(epoch FROM a.created_at - f.said_at) AS double precision) AS wait_s
        FROM ({newest}) f JOIN attempts a ON a.job_id = f.job_id AND a.number = 1
    ) compared
"""
# What a job ran with other replicas than it prefers is no outcome of what was said.
_RUNS_CALIBRATED = """
    SELECT count(*) AS jobs,
           CAST(avg(CAST(ran_s BETWEEN run_low_s * 0.95 AND run_high_s * 1.05 AS integer)) AS double precision)
               AS within_interval,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(ran_s - run_s)) AS median_error_s,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY abs(ran_s - run_s) / greatest(ran_s, 1)) AS median_relative_error
    FROM (
        SELECT f.run_s, f.run_low_s, f.run_high_s, (
            SELECT CAST(sum(extract(epoch FROM a.ended_at - coalesce(a.started_at, a.created_at))) AS double precision)
            FROM attempts a WHERE a.job_id = f.job_id
            HAVING bool_and(a.replicas = CAST(j.spec->'resources'->>'replicas' AS integer))
        ) AS ran_s
        FROM ({newest}) f JOIN jobs j ON j.id = f.job_id AND j.finished_at IS NOT NULL
    ) compared WHERE ran_s IS NOT NULL
"""


async def calibrated_starts(conn: AsyncConnection, *, tenant: str | None = None) -> Calibrated:
    """Expected starts, as first told, against the first attempts, of the jobs of a tenant and all below it (None = of
    all). Relative errors are of the wait that was left."""
    return await _compare(conn, _STARTS_CALIBRATED, "f.start IS NOT NULL", tenant, tolerance=TOLERANCE_S)


async def calibrated_runs(conn: AsyncConnection, *, tenant: str | None = None) -> Calibrated:
    """Run times, as expected when jobs first started, against what they ran; of whose jobs: as `calibrated_starts`."""
    return await _compare(conn, _RUNS_CALIBRATED, "f.run_s IS NOT NULL", tenant)


async def _compare(conn: AsyncConnection, query: str, told: str, tenant: str | None, **values: float) -> Calibrated:
    newest = _NEWEST_OF_TENANT if tenant else _NEWEST_OF_ALL
    bound = {"newest": NEWEST, **values} | ({"tenant": tenant} if tenant else {})
    return Calibrated(*(await conn.execute(text(query.format(newest=newest.format(told=told))), bound)).one())
