"""Why a job does not run yet, or how it ended, in sentences: from what is stored, so the answer costs a few
milliseconds."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from phalanx_server.api.deps import Looking, Serving, visible_job
from phalanx_server.api.job_documents import Attempt, Hold, Job
from phalanx_server.api.jobs import read_job
from phalanx_server.domain.attempt import Outcome
from phalanx_server.domain.job import TERMINAL, JobState

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
    """Why it waits, what would unblock it, and when it is expected to start; or what it does instead of waiting, or how
    it ended."""
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
    if JobState(job.state) in TERMINAL:
        return _ended(job)
    where = ", ".join(placement.node for placement in job.attempt.placements) if job.attempt else ""
    place = f" on {where}" if where else ""
    said = f": {job.message}" if job.message and job.message != job.state else ""
    return f"{job.name} {_DOING[JobState(job.state)]}{place}{said}."


_FAILED = frozenset({Outcome.FAILED, Outcome.OOM, Outcome.HUNG, Outcome.UNHEALTHY})


def _ended(job: Job) -> str:
    why = f" ({job.reason})" if job.reason and job.reason != job.state else ""
    tries = f" after {job.attempts} attempts" if job.attempts > 1 else ""
    failed = _first_failure(job.attempt)
    said = f": {job.message}" if job.message and job.message != job.state else ""
    further = "" if job.state != JobState.FAILED else f" What happened to it: phalanx events {job.id}"
    if failed is not None and job.attempt is not None:
        rank, node = failed
        said += (
            f" (on {node})" if job.message and job.message.startswith(f"rank {rank} ") else f" (rank {rank}, on {node})"
        )
        further = f" What that rank wrote: {_logs(job.id, rank, job.attempt.number)}"
    return f"{job.name} {_DOING[JobState(job.state)]}{why}{tries}{said}.{further}"


def _logs(job_id: str, rank: int, attempt: int) -> str:
    return f"phalanx logs {job_id} --rank {rank} --attempt {attempt}"


def _first_failure(attempt: Attempt | None) -> tuple[int, str] | None:
    """Of an attempt that failed the rank that did not end well before any other, and its node."""
    if attempt is None or attempt.outcome not in _FAILED:
        return None
    bad = [each for each in attempt.exits if each.get("exit_code") != 0]
    if not bad:
        return None
    rank: int = min(bad, key=lambda each: (str(each.get("ended_at") or "~"), each["rank"]))["rank"]  # "~" is after all
    return rank, next((p.node for p in attempt.placements if 0 <= rank - p.first_rank < p.ranks), "a node that is gone")


SHOWN = "%Y-%m-%dT%H:%M:%SZ"


def _between(hold: Hold) -> str:
    low, high = hold.estimated_start_low, hold.estimated_start_high
    return f", in four cases of five from {low:{SHOWN}} to {high:{SHOWN}}" if low and high and low < high else ""


def _last_words(job: Job) -> str:
    """Where to read what the rank wrote that failed in the last attempt of a job that waits to be tried again."""
    failed = _first_failure(job.attempt)
    return f" What its rank wrote: {_logs(job.id, failed[0], job.attempt.number)}." if failed and job.attempt else ""


def _waiting(job: Job) -> str:
    place = f" It is number {job.position} in the queue." if job.position else ""
    place += f" Its last attempt is over: {job.message}.{_last_words(job)}" if job.message else ""
    if job.hold is None:
        return f"{job.name} waits for the scheduler to look at it.{place}"
    hold = job.hold
    unblocks = f" It could start when {', or when '.join(hold.unblocks)}." if hold.unblocks else ""
    at = hold.estimated_start
    expected = f" It is expected to start at {at:{SHOWN}}{_between(hold)}." if at else ""
    warned = "".join(f" It {warning}." for warning in job.warnings)
    return f"{job.name} waits ({hold.reason}): {hold.message}.{unblocks}{expected}{warned}{place}"
