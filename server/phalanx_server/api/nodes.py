"""Nodes: what there is, what runs there, and whether it takes work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.set_node_state import set_node_state
from phalanx_server.api.auth import Principal
from phalanx_server.api.deps import Looking, Operating, Services, Serving, now
from phalanx_server.api.errors import Problem, not_found
from phalanx_server.api.pages import CursorText, Limit, Page, decode_cursor, encode_cursor
from phalanx_server.domain.draining import Occupant, Why, outlook
from phalanx_server.domain.node import NodeState
from phalanx_server.store import ids
from phalanx_server.store.node_views import list_nodes, load_node, load_occupants, nodes_named
from phalanx_server.store.policies import load_policy

router = APIRouter(tags=["nodes"])


class Remaining(BaseModel):
    """A job that still holds something on a draining node."""

    job: str
    why: Why = Field(
        description="`stopping`: on its way. `lost`: not confirmed gone. `not_preemptible`: it runs on to its end."
        " `min_runtime`: it moves after its minimum run time. `no_room`: it moves once there is room elsewhere."
    )
    ends_by: datetime | None = Field(
        description="When it is gone at the latest, by its time limit or the grace of its stop; null: nothing says so."
    )


class Suspect(BaseModel):
    """What speaks against a node: the health checks of several attempts, in the last 24 hours and since it was last
    taken into service (`uncordon`)."""

    attempts: int = Field(description="In how many attempts a check found fault with it.")
    last_at: datetime
    message: str | None = Field(description="What was found last; for those who see all tenants.")


class Node(BaseModel):
    id: str
    name: str
    cluster: str
    state: str
    gpu_type: str
    gpus: int
    gpus_used: int = Field(description="GPUs that are charged to attempts, everybody's together.")
    cpus: int
    memory_bytes: int
    address: str
    labels: dict[str, str]
    alive: bool
    warm_ready: bool = Field(description="A process with torch imported waits there to be forked.")
    own_users: bool = Field(
        description="Ranks of each tenant run there under their own Unix user; else they run as the node's runner does."
    )
    last_seen_at: datetime | None
    clock_skew_s: float | None
    stats: dict[str, Any] | None = Field(description="Latest use of CPU, memory and GPUs; for operators.")
    jobs: list[str] = Field(description="Jobs that hold something there, those that the caller may see.")
    suspect: Suspect | None = Field(default=None, description="Set once checks of several attempts speak against it.")
    remaining: list[Remaining] = Field(
        default=[], description="Of a draining node: those jobs, why each is still there, and until when at the latest."
    )
    outlook: str | None = Field(
        default=None,
        description="Of a draining node, in words: what still runs there, and if it empties by itself;"
        " for those who see all tenants.",
    )


@router.get("/v1/nodes", operation_id="list_nodes")
async def list_all_nodes(
    services: Serving, principal: Looking, limit: Limit = 500, cursor: CursorText = None
) -> Page[Node]:
    """Nodes, by cluster and name."""
    after = decode_cursor(cursor, (str, str)) if cursor else None
    async with services.reads.connect() as conn:
        place = (after[0], after[1]) if after else None
        rows = await list_nodes(conn, tenant=principal.tenant, after=place, limit=limit + 1, now=now())
        page = rows[:limit]
        occupants = await _occupants(conn, page, services, principal)
    more = encode_cursor(page[-1].cluster, page[-1].name) if len(rows) > limit else None
    return Page(items=[_document(row, principal, occupants.get(row.id, ())) for row in page], next_cursor=more)


@router.get("/v1/nodes/{node}", operation_id="get_node")
async def get_node(node: str, services: Serving, principal: Looking) -> Node:
    """One node, by id or name."""
    return await _read(services, principal, await find_node(services, node))


@router.post("/v1/nodes/{node}/cordon", operation_id="cordon_node")
async def cordon(node: str, services: Serving, principal: Operating) -> Node:
    """Place nothing new on a node; what runs there goes on."""
    return await _set(services, principal, node, NodeState.CORDONED)


@router.post("/v1/nodes/{node}/uncordon", operation_id="uncordon_node")
async def uncordon(node: str, services: Serving, principal: Operating) -> Node:
    """Let a node take work again."""
    return await _set(services, principal, node, NodeState.READY)


@router.post("/v1/nodes/{node}/drain", operation_id="drain_node")
async def drain(node: str, services: Serving, principal: Operating) -> Node:
    """Place nothing new on a node, and move its preemptible jobs off where there is room elsewhere. What will not leave
    by that is in `remaining` and `outlook`, which say the same of the node later."""
    return await _set(services, principal, node, NodeState.DRAINING)


async def _set(services: Services, principal: Principal, node: str, wanted: NodeState) -> Node:
    node_id = await find_node(services, node)
    await set_node_state(services.engine, node_id, wanted=wanted, actor=principal.actor, now=now())
    return await _read(services, principal, node_id)


async def find_node(services: Services, text: str) -> UUID:
    """A node's id from an id or a name. Problem 404, or 409 where clusters share the name."""
    async with services.reads.connect() as conn:
        return _id_of(text) or await _id_of_name(conn, text)


def _id_of(text: str) -> UUID | None:
    try:
        return ids.parse("node", text)
    except ValueError:
        return None


async def _id_of_name(conn: AsyncConnection, name: str) -> UUID:
    rows = await nodes_named(conn, name)
    if len(rows) > 1:
        clusters = ", ".join(f"{ids.encode('node', row.id)} ({row.cluster})" for row in rows)
        raise Problem("conflict", f"Several clusters have a node {name}: name it by id, one of {clusters}.")
    if not rows:
        raise not_found(f"node {name[:200]}")
    return rows[0].id


async def _read(services: Services, principal: Principal, node_id: UUID) -> Node:
    async with services.reads.connect() as conn:
        row = await load_node(conn, node_id, tenant=principal.tenant, now=now())
        if row is None:
            raise not_found(f"node {ids.encode('node', node_id)}")
        occupants = await _occupants(conn, [row], services, principal)
    return _document(row, principal, occupants.get(node_id, ()))


async def _occupants(
    conn: AsyncConnection, rows: Sequence[Row[Any]], services: Services, principal: Principal
) -> Mapping[UUID, Sequence[tuple[UUID, Occupant]]]:
    draining = [row.id for row in rows if row.state == NodeState.DRAINING]
    if not draining:
        return {}
    default_s = (await load_policy(conn)).over(services.policy).default_time_limit_s
    return await load_occupants(conn, draining, tenant=principal.tenant, default_s=default_s)


SUSPECT_ATTEMPTS = 2
_WORKED_OUT = {"remaining", "outlook", "suspect"}
_SHOWN = Node.model_fields.keys() - {"id", "warm_ready", "last_seen_at", "stats", "jobs"} - _WORKED_OUT


def _document(row: Row[Any], principal: Principal, occupants: Sequence[tuple[UUID, Occupant]]) -> Node:
    stats, at = row.stats or {}, now()
    is_told = row.state == NodeState.DRAINING and principal.tenant is None  # of all that is there, so to who sees it
    return Node(
        **{name: row._mapping[name] for name in _SHOWN},
        id=ids.encode("node", row.id),
        warm_ready=row.alive and bool(stats.get("warm_ready")),
        last_seen_at=row.runner_seen_at,
        stats=row.stats if principal.may("operate") else None,
        jobs=[ids.encode("job", job_id) for job_id in row.jobs],
        remaining=[
            Remaining(job=ids.encode("job", job_id), why=each.why(at), ends_by=each.ends_by)
            for job_id, each in occupants
        ],
        suspect=_suspect(row, principal),
        outlook=outlook([each for _, each in occupants], at) if is_told else None,
    )


def _suspect(row: Row[Any], principal: Principal) -> Suspect | None:
    if row.suspect_attempts < SUSPECT_ATTEMPTS:
        return None
    message = row.suspect_message if principal.tenant is None else None
    return Suspect(attempts=row.suspect_attempts, last_at=row.suspect_at, message=message)
