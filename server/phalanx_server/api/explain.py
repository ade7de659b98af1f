"""Why a job does not run yet, in sentences: from what the last pass stored, so the answer costs a few milliseconds."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from phalanx_server.api.deps import Looking, Serving, visible_job
from phalanx_server.api.job_documents import Hold, Job
from phalanx_server.api.jobs import read_job
from phalanx_server.domain.job import JobState

router = APIRouter(tags=["jobs"])


class JobExplanation(BaseModel):
    job_id: str
    state: str
    hold: Hold | None
    position: int | None
    ahead: int | None = Field(description="Jobs before it in the queue.")
    text: str


@router.get("/v1/jobs/{job_id}/explain", operation_id="explain_job")
async def explain_job(job_id: str, services: Serving, principal: Looking) -> JobExplanation:
    """Why it waits, what would unblock it, and when it is expected to start; or what it does instead of waiting."""
    job = await read_job(services, await visible_job(services, principal, job_id))
    ahead = job.position - 1 if job.position else None
    return JobExplanation(
        job_id=job.id, state=job.state, hold=job.hold, position=job.position, ahead=ahead, text=sentences(job)
    )


_DOING = {
    JobState.STARTING: "has its GPUs and is being started",
    JobState.RUNNING: "runs",
    JobState.STOPPING: "is being stopped",
    JobState.SUCCEEDED: "has succeeded",
    JobState.FAILED: "has failed",
    JobState.CANCELLED: "was cancelled",
}


def sentences(job: Job) -> str:
    """The answer for people."""
    if job.state == JobState.QUEUED:
        return _waiting(job)
    where = ", ".join(placement.node for placement in job.attempt.placements) if job.attempt else ""
    place = f" on {where}" if where and job.state in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING) else ""
    said = f": {job.message}" if job.message and job.message != job.state else ""
    return f"{job.name} {_DOING[JobState(job.state)]}{place}{said}."


SHOWN = "%Y-%m-%dT%H:%M:%SZ"


def _between(hold: Hold) -> str:
    low, high = hold.estimated_start_low, hold.estimated_start_high
    return f", in four cases of five from {low:{SHOWN}} to {high:{SHOWN}}" if low and high and low < high else ""


def _waiting(job: Job) -> str:
    place = f" It is number {job.position} in the queue." if job.position else ""
    place += f" Its last attempt is over: {job.message}." if job.message else ""
    if job.hold is None:
        return f"{job.name} waits for the scheduler to look at it.{place}"
    hold = job.hold
    unblocks = f" It could start when {', or when '.join(hold.unblocks)}." if hold.unblocks else ""
    at = hold.estimated_start
    expected = f" It is expected to start at {at:{SHOWN}}{_between(hold)}." if at else ""
    warned = "".join(f" It {warning}." for warning in job.warnings)
    return f"{job.name} waits ({hold.reason}): {hold.message}.{unblocks}{expected}{warned}{place}"
