"""A job's goodput: how much of the GPU time it was given it spent on steps that count, and where the rest went."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from phalanx_server.api.deps import Looking, Serving, now, visible_job
from phalanx_server.domain.goodput import PARTS, goodput_of
from phalanx_server.store import ids
from phalanx_server.store.goodput import load_attempt_times

router = APIRouter(tags=["jobs"])


class JobGoodput(BaseModel):
    """Time is in GPU-seconds, of a CPU job in seconds of its replicas; that of the queue is no part of it."""

    job_id: str
    attempts: int
    goodput: float | None = Field(description="`productive` by `allocated_gpu_s`; null before it was given anything.")
    allocated_gpu_s: float
    parts_gpu_s: dict[str, float] = Field(
        description=f"What it went to, adding up to `allocated_gpu_s`: {', '.join(PARTS)} (docs/training.md)."
    )
    measured: bool = Field(
        description="Every attempt that trained said itself how long it took productive steps, as recipes do. Else"
        " `productive` is the time from the first step to the last, without what is known to be lost."
    )


@router.get("/v1/jobs/{job_id}/goodput", operation_id="get_goodput")
async def get_goodput(job_id: str, services: Serving, principal: Looking) -> JobGoodput:
    """What became of the GPU time of all its attempts, until now."""
    job = await visible_job(services, principal, job_id)
    async with services.reads.connect() as conn:
        attempts = await load_attempt_times(conn, job)
    found = goodput_of(attempts, now())
    return JobGoodput(
        job_id=ids.encode("job", job),
        attempts=len(attempts),
        goodput=found.share,
        allocated_gpu_s=found.allocated,
        parts_gpu_s=found.parts,
        measured=found.is_measured,
    )
