"""Whether the process lives, whether it can serve, and what it measures."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError

from phalanx_server.api.deps import Services, Serving, caller
from phalanx_server.api.errors import unavailable
from phalanx_server.api.measures import Counts
from phalanx_server.api.node_measures import render_nodes
from phalanx_server.store.job_counts import count_jobs, count_queue
from phalanx_server.store.migrate import HEAD
from phalanx_server.store.node_views import load_backlogs, load_fullness
from phalanx_server.store.outbox import count_undelivered
from phalanx_server.store.revision import read_revision

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready"] = "ready"
    schema_revision: str


@router.get("/healthz", operation_id="healthz")
async def healthz() -> Health:
    """The process answers. Says nothing of the database: restarting a server does not mend one."""
    return Health()


@router.get("/readyz", operation_id="readyz")
async def readyz(services: Serving) -> Readiness:
    """The database can be reached and has the schema of this version."""
    try:
        async with services.link_reads.connect() as conn:
            revision = await read_revision(conn)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        raise unavailable() from error
    if revision != HEAD:
        raise unavailable(f"The database is at schema {revision or 'none'}, this server needs {HEAD}.")
    return Readiness(schema_revision=revision)


@router.get(
    "/metrics",
    operation_id="server_metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request, services: Serving) -> Response:
    """Prometheus text. Needs an operator's token unless PHALANX_METRICS_PUBLIC is set."""
    if not services.settings.metrics_public:
        await caller("operate")(request)
    return Response(await _render(services), media_type=CONTENT_TYPE_LATEST)


async def _render(services: Services) -> bytes:
    async with services.link_reads.connect() as conn:
        counts = Counts(
            jobs_by_state=await count_jobs(conn),
            queued_by_reason=await count_queue(conn),
            undelivered_notices=await count_undelivered(conn),
        )
        nodes, agents = await load_fullness(conn), await load_backlogs(conn)
    return services.measures.render(counts) + await asyncio.to_thread(render_nodes, nodes, agents)
