"""How good the scheduler's forecasts were."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from phalanx_server.api.deps import Looking, Serving
from phalanx_server.store.calibration import Calibrated, calibrated_runs, calibrated_starts

router = APIRouter(tags=["scheduler"])


class ForecastFigures(BaseModel):
    """Forecasts of one kind against what came."""

    jobs: int = Field(description="How many forecasts have an outcome, among the newest ten thousand.")
    within_interval: float | None = Field(description="Share of outcomes inside their interval; 0.8 is meant.")
    median_error_s: float | None
    median_relative_error: float | None = Field(description="Of run times by the run time, of starts by the wait.")


class CalibrationReport(BaseModel):
    starts: ForecastFigures = Field(description="The expected start that a job was first told, and when it started.")
    runs: ForecastFigures = Field(description="The run time expected when a job first started, and how long it ran.")


@router.get("/v1/scheduler/calibration", operation_id="get_calibration")
async def get_calibration(services: Serving, principal: Looking) -> CalibrationReport:
    """How good forecasts were, of the jobs that the caller may see: its tenant's and those below it, or all. A count
    over others' jobs would tell how many they have."""
    async with services.reads.connect() as conn:
        starts = await calibrated_starts(conn, tenant=principal.tenant)
        runs = await calibrated_runs(conn, tenant=principal.tenant)
    return CalibrationReport(starts=_figures(starts), runs=_figures(runs))


def _figures(found: Calibrated) -> ForecastFigures:
    return ForecastFigures(
        jobs=found.jobs,
        within_interval=found.within_interval,
        median_error_s=found.median_error_s,
        median_relative_error=found.median_relative_error,
    )
