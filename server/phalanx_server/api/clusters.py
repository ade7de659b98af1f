"""Clusters: where jobs may run. Each has an agent, which calls with the cluster's token."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions import create_cluster as creation
from phalanx_server.actions.idempotency import once
from phalanx_server.api.bodies import Given, body_as, takes
from phalanx_server.api.deps import Administering, Operating, Serving, now
from phalanx_server.api.idempotency import IdempotencyKey, idempotency_of, mark_replayed
from phalanx_server.api.pages import Page
from phalanx_server.store import ids
from phalanx_server.store.tokens import list_clusters

router = APIRouter(tags=["clusters"])


class NewCluster(Given):
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-z0-9]([a-z0-9._-]*[a-z0-9])?$")]


class Cluster(BaseModel):
    id: str
    name: str
    agent_seen_at: datetime | None
    created_at: datetime
    token: str | None = Field(default=None, description="For its agent; shown once, in the answer that created it.")


@router.get("/v1/clusters", operation_id="list_clusters")
async def list_all_clusters(services: Serving, principal: Operating) -> Page[Cluster]:
    """Every cluster, by name."""
    async with services.reads.connect() as conn:
        rows = await list_clusters(conn)
    return Page(items=[_document(row) for row in rows])


@router.post("/v1/clusters", operation_id="create_cluster", status_code=201, openapi_extra=takes(NewCluster))
async def create_cluster(
    request: Request,
    response: Response,
    services: Serving,
    principal: Administering,
    given: Annotated[NewCluster, Depends(body_as(NewCluster))],
    idempotency_key: IdempotencyKey = None,
) -> Cluster:
    """Register a cluster and make its agent's token, which is in this answer and nowhere else ever again."""

    async def work(conn: AsyncConnection) -> dict[str, Any]:
        made = await creation.create_cluster(conn, given.name, actor=principal.actor, now=now())
        row = next(row for row in await list_clusters(conn) if row.id == made.id)
        return _document(row).model_copy(update={"token": made.token}).model_dump(mode="json")

    key = await idempotency_of(request, principal, idempotency_key, operation="create_cluster")
    done = await once(services.engine, key, work, secrets=["token"])
    mark_replayed(response, done.replayed)
    return Cluster.model_validate(done.response)


def _document(row: Row[Any]) -> Cluster:
    return Cluster(
        id=ids.encode("cluster", row.id), name=row.name, agent_seen_at=row.agent_seen_at, created_at=row.created_at
    )
