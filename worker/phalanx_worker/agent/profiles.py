"""A profile that the server wants of a gang that runs, passed on to the runners of its ranks.

Owns that each of them hears of it, for as long as its ranks run. What becomes of it the runners report themselves.
"""

from __future__ import annotations

import asyncio
import logging

from phalanx_worker.agent.desired import Gang, Phase
from phalanx_worker.agent.hosts import Hosts, RunnerError, RunnerRefused
from phalanx_worker.protocol import ProfileRequest, encode

log = logging.getLogger("phalanx.agent")

RETRY_S = 1.0


async def pass_on(gang: Gang, request: ProfileRequest, hosts: Hosts) -> None:
    """Until every runner that has ranks of it has answered."""
    placed = gang.attempt.groups if gang.attempt is not None else []
    nodes = [group.node for group in placed if set(request.ranks) & set(group.all_ranks)]
    await asyncio.gather(*(_tell(gang, node, request, hosts) for node in nodes))


async def _tell(gang: Gang, node: str, request: ProfileRequest, hosts: Hosts) -> None:
    while gang.phase is Phase.RUNNING and not gang.groups[node].over:
        host = hosts.get(node)
        try:
            if host is not None and host.alive:
                return await host.call("profile_group", gang.attempt_id, encode(request))
        except RunnerRefused as error:
            return log.warning("node %s takes no profile of %s: %s", node, gang.attempt_id, error)
        except RunnerError as error:
            log.warning("node %s cannot be asked for a profile of %s yet: %s", node, gang.attempt_id, error)
        await asyncio.sleep(RETRY_S)
