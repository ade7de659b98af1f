"""Ray's nodes and the runner actors on them: the agent's only way to either.

Owns how a Ray node becomes `NodeFacts`, and how a runner is found, created and called. Decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from phalanx_worker.agent.hosts import RunnerGone, RunnerRefused, RunnerUnavailable
from phalanx_worker.protocol import NodeFacts

log = logging.getLogger("phalanx.agent")

NAMESPACE = "phalanx"
NAME_LABEL = "phalanx.io/node-name"
GPU_TYPE_LABEL = "phalanx.io/gpu-type"
ROLE_LABEL = "phalanx.io/role"
ACCELERATOR_LABEL = "ray.io/accelerator-type"
ACCELERATOR_RESOURCE = "accelerator_type:"
RUNNER_CALLS = 1000  # that one runner answers at once

T = TypeVar("T")


@dataclass(frozen=True)
class NodeSettings:
    """What the operator said about the nodes, where Ray cannot know. None: derived."""

    gpu_type: str | None = None
    shared_checkpoints: bool | None = None


def connect(address: str) -> None:
    """Join the Ray cluster as a driver. Raises ConnectionError with what to do about it."""
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.WARNING)
    except (RayError, RuntimeError, OSError) as error:
        raise ConnectionError(
            f"cannot join the Ray cluster at {address}: {error} (with token authentication, RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH must be set)"
        ) from error


class RayNodes:
    """The nodes of the cluster that this process has joined."""

    def __init__(self, settings: NodeSettings, threads: ThreadPoolExecutor) -> None:
        self._settings = settings
        self._threads = threads

    async def list(self) -> list[NodeFacts]:
        """The living training nodes. Raises ConnectionError when the cluster is gone."""
        try:
            return inventory(await self._in_thread(ray.nodes), self._settings)
        except (RayError, RuntimeError) as error:
            raise ConnectionError(f"the Ray cluster does not answer: {_one_line(error)}") from error

    async def runner(self, ray_node_id: str) -> RayRunner:
        """The runner of that node, created if there is none. Raises RunnerGone or RunnerUnavailable."""
        try:
            return RayRunner(await self._in_thread(lambda: _get_or_create(ray_node_id)))
        except (RayError, ValueError) as error:
            raise RunnerUnavailable(_one_line(error)) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class RayRunner:
    """One runner actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of the runner. Raises RunnerError."""
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self._actor, method).remote(*args)
        except TimeoutError as error:
            raise RunnerUnavailable(f"{method} was not answered within {timeout_s:.0f} s") from error
        except ActorDiedError as error:
            raise RunnerGone(_one_line(error)) from error
        except ActorUnavailableError as error:
            raise RunnerUnavailable(_one_line(error)) from error
        except RayTaskError as error:
            raise RunnerRefused(_one_line(error.cause)) from error
        except RayError as error:
            raise RunnerUnavailable(_one_line(error)) from error


def _get_or_create(ray_node_id: str) -> Any:
    from phalanx_worker.node.runner import NodeRunner  # heavy, and only needed where a runner is started

    return (
        ray.remote(NodeRunner)
        .options(
            name=f"phalanx-runner/{ray_node_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=RUNNER_CALLS,
            label_selector={"ray.io/node-id": ray_node_id},
        )
        .remote()
    )


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def inventory(rows: list[dict[str, Any]], settings: NodeSettings) -> list[NodeFacts]:
    """The living training nodes of `ray.nodes()`, sorted by name. Of a dead node Ray keeps too little to say more.

    Skips the head where it is labelled so or has nothing to train with. Checkpoints count as shared on a cluster of one
    machine unless the operator says otherwise.
    """
    rows = sorted((row for row in rows if is_training_node(row)), key=lambda row: row["NodeID"])
    shared = settings.shared_checkpoints
    if shared is None:
        shared = len({row["NodeManagerAddress"] for row in rows}) <= 1
    chosen: dict[str, NodeFacts] = {}
    for row in rows:
        name = node_name(row)
        if name in chosen:
            log.error("two living nodes are called %s; give each its own %s label", name, NAME_LABEL)
        else:
            chosen[name] = _facts(name, row, settings, shared_checkpoints=shared)
    return sorted(chosen.values(), key=lambda facts: facts.name)


def is_training_node(row: Mapping[str, Any]) -> bool:
    labels, resources = row.get("Labels") or {}, row.get("Resources") or {}
    return bool(row["Alive"] and labels.get(ROLE_LABEL) != "head" and (resources.get("GPU") or resources.get("CPU")))


def node_name(row: Mapping[str, Any]) -> str:
    labels = row.get("Labels") or {}
    return labels.get(NAME_LABEL) or f"{row['NodeManagerHostname']}-{row['NodeID'][:8]}"


def gpu_type(row: Mapping[str, Any], settings: NodeSettings) -> str:
    """The node's own label, else what the operator said, else what Ray found; "" where there is no GPU."""
    labels, resources = row.get("Labels") or {}, row.get("Resources") or {}
    if not resources.get("GPU"):
        return ""
    found = [name.removeprefix(ACCELERATOR_RESOURCE) for name in resources if name.startswith(ACCELERATOR_RESOURCE)]
    named = labels.get(GPU_TYPE_LABEL) or settings.gpu_type or labels.get(ACCELERATOR_LABEL) or next(iter(found), "gpu")
    return named.lower()


def _facts(name: str, row: Mapping[str, Any], settings: NodeSettings, *, shared_checkpoints: bool) -> NodeFacts:
    resources = row.get("Resources") or {}
    return NodeFacts(
        name=name,
        ray_node_id=row["NodeID"],
        gpu_type=gpu_type(row, settings),
        gpus=int(resources.get("GPU", 0)),
        cpus=int(resources.get("CPU", 0)),
        memory_bytes=int(resources.get("memory", 0)),
        address=row["NodeManagerAddress"],
        labels={str(key): str(value) for key, value in (row.get("Labels") or {}).items()},
        shared_checkpoints=shared_checkpoints,
    )
