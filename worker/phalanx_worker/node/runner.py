"""The node runner as a Ray actor: the only part of a node that knows Ray.

Owns the wiring of Ray's calls to `service.Runner`, and the question to GCS whether this node is still part of its
cluster. Created by the agent as a detached, async actor with no resources, one for each node.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray._private.worker import global_worker

from phalanx_worker.node.service import Runner

_GCS_TIMEOUT_S = 2.0


class NodeRunner:
    """Every method takes and returns plain data; see `Runner` for what each does and raises."""

    def __init__(self) -> None:
        self._runner: Runner | None = None

    async def configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        return await self._service().configure(settings)

    async def capabilities(self) -> dict[str, Any]:
        return self._service().capabilities()

    async def reserve_rendezvous(self, attempt_id: str) -> dict[str, Any]:
        return await self._service().reserve_rendezvous(attempt_id)

    async def prepare_group(self, order: dict[str, Any]) -> dict[str, Any]:
        return await self._service().prepare_group(order)

    async def start_group(self, order: dict[str, Any]) -> dict[str, Any]:
        return await self._service().start_group(order)

    async def stop_group(self, attempt_id: str, grace_s: float) -> None:
        await self._service().stop_group(attempt_id, grace_s)

    async def keep_stacks(self, attempt_id: str) -> None:
        await self._service().keep_stacks(attempt_id)

    async def profile_group(self, attempt_id: str, request: dict[str, Any]) -> None:
        await self._service().profile_group(attempt_id, request)

    async def kill_group(self, attempt_id: str) -> None:
        await self._service().kill_group(attempt_id)

    async def forget_group(self, attempt_id: str) -> None:
        await self._service().forget_group(attempt_id)

    async def next_facts(self, after: int, wait_s: float) -> dict[str, Any]:
        return await self._service().next_facts(after, wait_s)

    async def close(self) -> None:
        await self._service().close()

    def _service(self) -> Runner:
        """Made in the actor's event loop, which does not run yet when Ray calls the constructor."""
        if self._runner is None:
            self._runner = Runner(address=ray.util.get_node_ip_address(), gcs_alive=_gcs_alive)
        return self._runner


async def _gcs_alive() -> bool:
    await asyncio.to_thread(_ask_gcs)
    return True


def _ask_gcs() -> None:
    """Raises when GCS does not answer in time."""
    client: Any = global_worker.gcs_client  # type: ignore[attr-defined]  # set when Ray connects
    client.internal_kv_exists(b"phalanx", None, timeout=_GCS_TIMEOUT_S)
