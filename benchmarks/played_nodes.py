"""Nodes that are only played: over the real agent and node links they take attempts and report as runners would, and
run nothing. For benchmarks of the server alone.
"""

import time
import uuid
from dataclasses import dataclass
from typing import Any

import httpx
from control_plane import ControlPlane
from phalanx_worker import protocol

GPUS_PER_NODE = 8
START_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class PlayedAttempt:
    """A running attempt with one rank on one node, whose token may report about it."""

    id: str
    epoch: int
    job_id: str
    node_token: str


def run_attempts(plane: ControlPlane, count: int) -> list[PlayedAttempt]:
    """`count` jobs that run, each on a node of its own."""
    instance = uuid.uuid4().hex
    agent = httpx.Client(base_url=plane.url, headers={"Authorization": f"Bearer {plane.cluster_token}"})
    user = httpx.Client(base_url=plane.url, headers={"Authorization": f"Bearer {plane.token}"})
    with agent, user:
        nodes = [
            protocol.NodeFacts(f"node-{i}", f"ray-{i}", "emulated", GPUS_PER_NODE, 64, 64 << 30, "127.0.0.1")
            for i in range(count)
        ]
        inventory = protocol.encode(protocol.Inventory(instance, time.time(), nodes))
        tokens = agent.put("/v1/agent/nodes", json=inventory).raise_for_status().json()["node_tokens"]
        for _ in range(count):
            user.post("/v1/jobs", json=_job()).raise_for_status()
        attempts = _desired(agent, count)
        facts = [_started(attempt) for attempt in attempts]
        report = protocol.encode(protocol.AgentReport(instance, time.time(), facts))
        answer = agent.post("/v1/agent/reports", json=report).raise_for_status().json()
        assert answer["refused"] == [], answer
    return [PlayedAttempt(a.attempt_id, a.epoch, a.job_id, tokens[a.groups[0].node]) for a in attempts]


def report_of(attempt: PlayedAttempt, boot: str, seq: int, points: list[protocol.MetricPoint]) -> dict[str, Any]:
    """A node's report with these points."""
    beat = protocol.Heartbeat(
        [protocol.AttemptRef(attempt.id, attempt.epoch)], protocol.NodeStats(0.1, 1 << 20), warm_ready=True
    )
    return protocol.encode(protocol.NodeReport(boot, seq, time.time(), beat, metrics=points))


def _job() -> dict[str, Any]:
    resources = {"replicas": 1, "gpus_per_replica": GPUS_PER_NODE, "ranks_per_replica": 1}
    return {"name": "bench", "tenant": "default", "resources": resources, "run": {"command": "python train.py"}}


def _desired(agent: httpx.Client, count: int) -> list[protocol.DesiredAttempt]:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        answer = agent.get("/v1/agent/desired").raise_for_status().json()
        desired = protocol.decode(protocol.Desired, answer)
        if len(desired.attempts) == count:
            return desired.attempts
        time.sleep(0.1)
    raise RuntimeError(f"the scheduler did not start {count} jobs within {START_TIMEOUT_S:.0f} s")


def _started(attempt: protocol.DesiredAttempt) -> protocol.AttemptFact:
    now = time.time()
    ranks = [protocol.RankStart(0, attempt.groups[0].node, 1000, now, warm=True)]
    return protocol.AttemptFact(attempt.attempt_id, attempt.epoch, "started", now, ranks_started=ranks)
