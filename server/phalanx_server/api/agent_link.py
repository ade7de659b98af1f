"""The link of a cluster's agent: what nodes there are, what should run, what did.

Owns the long poll. Messages are `domain.messages`; what they mean is the actions'. Only cluster tokens work here, each
for its own cluster.
"""

from __future__ import annotations

import time
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from phalanx_server.actions.agent_instance import expect_instance
from phalanx_server.actions.desired import desired, desired_version
from phalanx_server.actions.record_agent_report import record_agent_report
from phalanx_server.actions.update_inventory import update_inventory
from phalanx_server.api.auth import Principal
from phalanx_server.api.bodies import message_as, takes
from phalanx_server.api.deps import Agent, Services, Serving, now, topic
from phalanx_server.domain.messages import AgentReport, Desired, Inventory, InventoryAnswer, Message, ReportAnswer

router = APIRouter(tags=["agent link"])

WAIT_MAX_S = 20.0


def answer(message: Message) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")


@router.put(
    "/v1/agent/nodes", operation_id="put_inventory", response_model=InventoryAnswer, openapi_extra=takes(Inventory)
)
async def put_inventory(
    services: Serving, principal: Agent, inventory: Annotated[Inventory, Depends(message_as(Inventory))]
) -> Response:
    """The whole node list of a cluster. The newest agent speaks for it; one that was replaced gets 409 `superseded`."""
    settings = services.settings
    return answer(
        await update_inventory(
            services.links,
            inventory,
            cluster_id=cluster_of(principal),
            now=now(),
            fence_s=settings.fence_s,
            heartbeat_s=settings.heartbeat_s,
            outage_tolerance_s=settings.outage_tolerance_s,
        )
    )


@router.get("/v1/agent/desired", operation_id="get_desired", response_model=Desired)
async def get_desired(
    services: Serving,
    principal: Agent,
    version: Annotated[str, Query(max_length=64, description="What the agent has; empty at first.")] = "",
    wait_s: Annotated[float, Query(ge=0, le=WAIT_MAX_S, allow_inf_nan=False)] = 0,
    instance: Annotated[str, Query(max_length=64, description="Which agent asks.")] = "",
) -> Response:
    """Everything that should exist on the cluster: at once if it differs from `version`, else when it changes, at the
    latest after `wait_s`. An agent that was replaced gets 409 `superseded`: it must not start what another starts."""
    cluster_id = cluster_of(principal)
    await _wait_for_another(services, cluster_id, version, wait_s)
    async with services.link_reads.connect() as conn:
        if instance:
            await expect_instance(conn, cluster_id=cluster_id, instance=instance)
        return answer(await desired(conn, cluster_id=cluster_id, now=now(), known=services.desired))


async def _wait_for_another(services: Services, cluster_id: UUID, version: str, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    async with services.wakeups.subscribe(topic("desired", cluster_id)) as subscription:
        while not services.stopping.is_set():
            async with services.link_reads.connect() as conn:
                if await desired_version(conn, cluster_id=cluster_id) != version:
                    return
            left_s = until - time.monotonic()
            if left_s <= 0:
                return
            await services.wait(subscription, left_s)


@router.post(
    "/v1/agent/reports",
    operation_id="report_facts",
    response_model=ReportAnswer,
    openapi_extra=takes(AgentReport),
)
async def report_facts(
    services: Serving, principal: Agent, report: Annotated[AgentReport, Depends(message_as(AgentReport))]
) -> Response:
    """Facts about attempts, in the order in which they happened. Sending them again is harmless."""
    cluster_id = cluster_of(principal)
    return answer(await record_agent_report(services.links, report, cluster_id=cluster_id, now=now()))


def cluster_of(principal: Principal) -> UUID:
    cluster_id = principal.credential.cluster_id
    assert cluster_id is not None, "a cluster token without a cluster: the schema forbids it"
    return cluster_id
