"""Ray's nodes and the runner actors on them: the agent's only way to either.

Owns how a Ray node becomes `NodeFacts`, and how a runner is found, created and called. Decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
SUCCESSION_S = 90.0  # Ray knows of a dead raylet after 14 s, of a hung one after 62

T = TypeVar("T")
Row = Mapping[str, Any]  # of `ray.nodes()`


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
        self._successions = Successions()

    async def list(self) -> list[NodeFacts]:
        """The living training nodes. Raises ConnectionError when the cluster is gone."""
        try:
            rows = await self._in_thread(ray.nodes)
        except (RayError, RuntimeError) as error:
            raise ConnectionError(f"the Ray cluster does not answer: {_one_line(error)}") from error
        return inventory(self._successions.without_heirs(rows, time.monotonic()), self._settings)

    async def runner(self, ray_node_id: str) -> RayRunner:
        """The runner of that node, created if there is none. Raises RunnerGone or RunnerUnavailable."""
        try:
            return RayRunner(await self._in_thread(lambda: _get_or_create(ray_node_id)), self._threads)
        except (RayError, ValueError) as error:
            raise RunnerUnavailable(_one_line(error)) from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class RayRunner:
    """One runner actor."""

    def __init__(self, actor: Any, threads: ThreadPoolExecutor) -> None:
        self._actor = actor
        self._threads = threads

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method of the runner. Raises RunnerError."""
        known = getattr(self._actor, method, None)
        if known is None:
            raise RunnerRefused(f"its runner is older than this agent and knows no {method}; restart its Ray worker")
        try:
            async with asyncio.timeout(timeout_s):
                return await known.remote(*args)
        except TimeoutError as error:
            raise RunnerUnavailable(f"{method} was not answered within {timeout_s:.0f} s") from error
        except ActorDiedError as error:
            raise RunnerGone(_one_line(error)) from error
        except ActorUnavailableError as error:
            raise RunnerUnavailable(_one_line(error)) from error
        except RayTaskError as error:
            permanent = bool(getattr(error.cause, "permanent", False))  # of the runner's own StartFailed
            raise RunnerRefused(_one_line(error.cause), permanent=permanent) from error
        except RayError as error:
            raise RunnerUnavailable(_one_line(error)) from error

    async def kill(self) -> None:
        """Have Ray end the process, by SIGKILL when it has not ended after 5 s. Raises RunnerUnavailable."""
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: ray.kill(self._actor, no_restart=True)
            )
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
            enable_task_events=False,  # else Ray's GCS keeps 3.4 KB of each of the last 100,000 calls
            label_selector={"ray.io/node-id": ray_node_id},
        )
        .remote()
    )


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass
class Successions:
    """Which Ray node goes by its host's name alone.

    A raylet that is started again is there before Ray knows that the one before it is dead. For so long it is not
    listed: then it has the name of the one before it, and what that left on the host is found again.
    """

    _holders: dict[str, str] = field(default_factory=dict)  # by hostname: the Ray node that had it alone
    _shared_since_s: dict[str, float] = field(default_factory=dict)

    def without_heirs(self, rows: list[Row], now_s: float) -> list[Row]:
        sharing: dict[str, set[str]] = {}
        for row in rows:
            if is_training_node(row) and not _label(row):
                sharing.setdefault(row["NodeManagerHostname"], set()).add(row["NodeID"])
        heirs = {heir for hostname, ids in sharing.items() for heir in self._heirs(hostname, ids, now_s)}
        return [row for row in rows if row["NodeID"] not in heirs]

    def _heirs(self, hostname: str, ids: set[str], now_s: float) -> set[str]:
        if len(ids) == 1:
            self._shared_since_s.pop(hostname, None)
            self._holders[hostname] = next(iter(ids))
        elif self._holders.get(hostname) in ids:
            if now_s - self._shared_since_s.setdefault(hostname, now_s) < SUCCESSION_S:
                return ids - {self._holders[hostname]}
            del self._holders[hostname]  # so these are two nodes
        return set()


def inventory(rows: list[Row], settings: NodeSettings) -> list[NodeFacts]:
    """The living training nodes of `ray.nodes()`, sorted by name. Of a dead node Ray keeps too little to say more.

    Skips the head where it is labelled so or has nothing to train with. Checkpoints count as shared on a cluster of one
    machine unless the operator says otherwise.
    """
    rows = sorted((row for row in rows if is_training_node(row)), key=lambda row: row["NodeID"])
    shared = settings.shared_checkpoints
    if shared is None:
        shared = len({row["NodeManagerAddress"] for row in rows}) <= 1
    chosen: dict[str, NodeFacts] = {}
    for name, row in _named(rows):
        if name in chosen:
            log.error("two living nodes are called %s; give each its own %s label", name, NAME_LABEL)
        else:
            chosen[name] = _facts(name, row, settings, shared_checkpoints=shared)
    return sorted(chosen.values(), key=lambda facts: facts.name)


def is_training_node(row: Row) -> bool:
    labels, resources = row.get("Labels") or {}, row.get("Resources") or {}
    return bool(row["Alive"] and labels.get(ROLE_LABEL) != "head" and (resources.get("GPU") or resources.get("CPU")))


def _named(rows: list[Row]) -> Iterator[tuple[str, Row]]:
    """Each row with its node's name: the label, else the host's; where several share that, with the id, which is
    another after each start of the raylet."""
    names = Counter(_label(row) or row["NodeManagerHostname"] for row in rows)
    for row in rows:
        hostname = row["NodeManagerHostname"]
        yield _label(row) or (hostname if names[hostname] == 1 else f"{hostname}-{row['NodeID'][:8]}"), row


def _label(row: Row) -> str:
    return (row.get("Labels") or {}).get(NAME_LABEL) or ""


def gpu_type(row: Row, settings: NodeSettings) -> str:
    """The node's own label, else what the operator said, else what Ray found; "" where there is no GPU."""
    labels, resources = row.get("Labels") or {}, row.get("Resources") or {}
    if not resources.get("GPU"):
        return ""
    found = [name.removeprefix(ACCELERATOR_RESOURCE) for name in resources if name.startswith(ACCELERATOR_RESOURCE)]
    named = labels.get(GPU_TYPE_LABEL) or settings.gpu_type or labels.get(ACCELERATOR_LABEL) or next(iter(found), "gpu")
    return named.lower()


def _facts(name: str, row: Row, settings: NodeSettings, *, shared_checkpoints: bool) -> NodeFacts:
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
