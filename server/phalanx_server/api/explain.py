"""Why a job does not run yet, or how it ended, in sentences: from what is stored, so the answer costs a few
milliseconds."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from phalanx_server.api.deps import Looking, Services, Serving, visible_job
from phalanx_server.api.job_documents import Attempt, Hold, Job
from phalanx_server.api.jobs import read_job
from phalanx_server.domain.attempt import BY_A_RANK
from phalanx_server.domain.job import TERMINAL, JobState
from phalanx_server.store import ids
from phalanx_server.store.event_views import load_named_rank

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
    text = sentences(job, await _named_rank(services, job))
    return JobExplanation(job_id=job.id, state=job.state, hold=job.hold, position=job.position, ahead=ahead, text=text)


async def _named_rank(services: Services, job: Job) -> int | None:
    """The rank that the message of its last attempt tells of, as was decided at its end; None if of none."""
    if job.attempt is None or job.attempt.outcome not in BY_A_RANK:
        return None
    async with services.reads.connect() as conn:
        return await load_named_rank(conn, ids.parse("job", job.id), ids.parse("attempt", job.attempt.id))


_DOING = {
    JobState.STARTING: "has its GPUs and is being started",
    JobState.RUNNING: "runs",
    JobState.STOPPING: "is being stopped",
    JobState.SUCCEEDED: "has succeeded",
    JobState.FAILED: "has failed",
    JobState.CANCELLED: "was cancelled",
}


def sentences(job: Job, named_rank: int | None) -> str:
    """The answer for people; `named_rank` is the rank that the message of its last attempt tells of."""
    if job.state == JobState.QUEUED:
        return _waiting(job, named_rank)
    if JobState(job.state) in TERMINAL:
        return _ended(job, named_rank)
    where = ", ".join(placement.node for placement in job.attempt.placements) if job.attempt else ""
    place = f" on {where}" if where else ""
    said = f": {job.message}" if job.message and job.message != job.state else ""
    return f"{job.name} {_DOING[JobState(job.state)]}{place}{said}."


def _ended(job: Job, named_rank: int | None) -> str:
    why = f" ({job.reason})" if job.reason and job.reason != job.state else ""
    tries = f" after {job.attempts} attempts" if job.attempts > 1 else ""
    said = f": {job.message}" if job.message and job.message != job.state else ""
    further = "" if job.state != JobState.FAILED else f" What happened to it: phalanx events {job.id}"
    if named_rank is not None and job.attempt is not None and job.message == job.attempt.message:
        said += f" (on {_node_of(job.attempt, named_rank)})"
        further = f" What that rank wrote: {_logs(job.id, named_rank, job.attempt.number)}"
    return f"{job.name} {_DOING[JobState(job.state)]}{why}{tries}{said}.{further}"


def _logs(job_id: str, rank: int, attempt: int) -> str:
    return f"phalanx logs {job_id} --rank {rank} --attempt {attempt}"


def _node_of(attempt: Attempt, rank: int) -> str:
    return next((p.node for p in attempt.placements if 0 <= rank - p.first_rank < p.ranks), "a node that is gone")


SHOWN = "%Y-%m-%dT%H:%M:%SZ"


def _between(hold: Hold) -> str:
    low, high = hold.estimated_start_low, hold.estimated_start_high
    return f", in four cases of five from {low:{SHOWN}} to {high:{SHOWN}}" if low and high and low < high else ""


def _last_words(job: Job, named_rank: int | None) -> str:
    """Where to read more of how the last attempt failed, of a job that waits to be tried again."""
    if job.attempt is None or job.attempt.outcome not in BY_A_RANK:
        return ""
    if named_rank is None:
        return f" What happened to it: phalanx events {job.id}."
    return f" What its rank wrote: {_logs(job.id, named_rank, job.attempt.number)}."


def _waiting(job: Job, named_rank: int | None) -> str:
    place = f" It is number {job.position} in the queue." if job.position else ""
    place += f" Its last attempt is over: {job.message}.{_last_words(job, named_rank)}" if job.message else ""
    if job.hold is None:
        return f"{job.name} waits for the scheduler to look at it.{place}"
    hold = job.hold
    unblocks = f" It could start when {', or when '.join(hold.unblocks)}." if hold.unblocks else ""
    at = hold.estimated_start
    expected = f" It is expected to start at {at:{SHOWN}}{_between(hold)}." if at else ""
    warned = "".join(f" It {warning}." for warning in job.warnings)
    return f"{job.name} waits ({hold.reason}): {hold.message}.{unblocks}{expected}{warned}{place}"
