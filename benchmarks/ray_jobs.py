"""Ray alone as a peer: a private cluster of emulated nodes with its dashboard, for the length of a `with`.

Owns the cluster's processes and its session directory, and the two ways in which work is given to it: Ray Jobs, over
the HTTP API of its dashboard, and actors on a placement group. Its settings are Ray's own defaults, but for what a
cluster on loopback needs.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load
from phalanx_worker.agent.ray_environment import LOOPBACK_SETTINGS

os.environ.update(
    {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **LOOPBACK_SETTINGS}
)  # before the import

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

HOST = "127.0.0.1"
OVER = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass(frozen=True)
class RayCluster:
    """A running cluster; this process is connected to it."""

    address: str
    """Of the dashboard, `http://…`."""

    def submit_request(self, command: str, **fields: Any) -> bytes:
        """A submit for the Ray Jobs API."""
        return load.request("POST", "/api/jobs/", document={"entrypoint": command, **fields})


@contextmanager
def cluster(*, nodes: int, gpus_per_node: int) -> Iterator[RayCluster]:
    """Run a private cluster: a head without GPUs, which takes the jobs' drivers, and `nodes` nodes."""
    home = Path(tempfile.mkdtemp(prefix="ray-bench-"))
    os.environ["RAY_TMPDIR"] = str(home)  # its session and its address file
    dashboard_port = _free_port()
    head = {
        "num_cpus": 16,
        "num_gpus": 0,
        "node_ip_address": HOST,
        "gcs_server_port": _free_port(),
        "include_dashboard": True,
        "dashboard_host": HOST,
        "dashboard_port": dashboard_port,
        "dashboard_agent_listen_port": _free_port(),
        "object_store_memory": 80 << 20,
    }
    running = None
    try:
        running = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes):
            running.add_node(
                node_ip_address=HOST,
                num_cpus=2 * gpus_per_node,
                num_gpus=gpus_per_node,
                object_store_memory=80 << 20,
                dashboard_agent_listen_port=_free_port(),
            )
        ray.init(address=running.address, log_to_driver=False, logging_level="ERROR")
        yield RayCluster(f"http://{HOST}:{dashboard_port}")
    finally:
        ray.shutdown()
        if running is not None:
            running.shutdown()
        del os.environ["RAY_TMPDIR"]
        shutil.rmtree(home, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@ray.remote(num_cpus=0)
class Rank:
    def now(self) -> float:
        return time.time()


@dataclass
class Gang:
    """Actors on a placement group, one bundle per node."""

    group: PlacementGroup
    actors: list[Any]
    running_at: float
    """When the last of the actors ran, by Unix time."""

    def release(self) -> None:
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def start_gang(*, nodes: int, gpus_per_node: int) -> Gang:
    group = placement_group([{"GPU": gpus_per_node}] * nodes, strategy="STRICT_SPREAD")
    actors = [
        Rank.options(
            num_gpus=gpus_per_node,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(nodes)
    ]
    return Gang(group, actors, max(ray.get([actor.now.remote() for actor in actors])))
