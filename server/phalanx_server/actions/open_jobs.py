"""The jobs that a request to steer is about: one, or those of an array that have not ended, locked.

Owns what is refused: what does not exist, and what has ended.
"""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.errors import Conflict, NotFound
from phalanx_server.domain.job import TERMINAL
from phalanx_server.store import ids
from phalanx_server.store.jobs import LockedJob, lock_array, lock_job


async def open_jobs(conn: AsyncConnection, job_id: UUID) -> tuple[str, Sequence[LockedJob]]:
    """The name for the audit, and the one job. Raises NotFound and Conflict."""
    name = ids.encode("job", job_id)
    job = await lock_job(conn, job_id)
    if job is None:
        raise NotFound(f"there is no job {name}")
    if job.state in TERMINAL:
        raise Conflict(f"{job.name} is already {job.state}")
    return name, [job]


async def open_jobs_of_array(conn: AsyncConnection, array_id: UUID) -> tuple[str, Sequence[LockedJob]]:
    """The name for the audit, and the jobs that have not ended. Raises NotFound and Conflict."""
    name = ids.encode("array", array_id)
    jobs = await lock_array(conn, array_id)
    if not jobs:
        raise NotFound(f"there is no array {name}")
    open_ = [job for job in jobs if job.state not in TERMINAL]
    if not open_:
        raise Conflict(f"all jobs of {name} have ended")
    return name, open_
