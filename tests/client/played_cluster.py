"""A cluster that is only played: it says over the real agent and node links what a cluster would, and runs nothing.

With it goes the scheduler, so that a job that is submitted goes through its whole life in a second, without Ray.
"""

from __future__ import annotations

import asyncio
import base64
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx
from phalanx_server.loops.leader import Leader
from phalanx_server.loops.schedule import ScheduleLoop
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store.engine import create_engine
from phalanx_worker import protocol

NODES, GPUS_PER_NODE, STEPS = 2, 2, 8
TICK_S = 0.05


@dataclass
class PlayedCluster:
    """Two nodes of two GPUs. Each attempt is told from start to end at once, with `exit_code` for its rank 1."""

    database: str
    url: str
    token: str
    exit_code: int = 0
    told: set[str] = field(default_factory=set)

    def __enter__(self) -> PlayedCluster:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._play()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _play(self) -> None:
        engine = create_engine(self.database)
        leader = Leader(engine, holder="test", ttl_s=30, renew_s=10)
        schedule = ScheduleLoop(engine, leader, policy=Policy())
        headers = {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers) as http:
            agent = Agent(http, self.exit_code)
            await agent.introduce()
            await leader.tick(datetime.now(UTC))
            while not self._stop.is_set():
                await schedule.tick(datetime.now(UTC))
                await agent.obey(self.told)
                await asyncio.sleep(TICK_S)
        await engine.dispose()


class Agent:
    def __init__(self, http: httpx.AsyncClient, exit_code: int) -> None:
        self._http, self._exit_code = http, exit_code
        self._instance = uuid.uuid4().hex
        self._node_tokens: dict[str, str] = {}

    async def introduce(self) -> None:
        nodes = [
            protocol.NodeFacts(
                f"node-{i}", f"ray-{i}", "emulated", GPUS_PER_NODE, 8, 8 << 30, "127.0.0.1", {"rack": "r1"}
            )
            for i in range(NODES)
        ]
        message = protocol.Inventory(self._instance, time.time(), nodes)
        answer = await self._http.put("/v1/agent/nodes", json=protocol.encode(message))
        answer.raise_for_status()
        self._node_tokens = answer.json()["node_tokens"]

    async def obey(self, told: set[str]) -> None:
        answer = await self._http.get("/v1/agent/desired")
        desired = protocol.decode(protocol.Desired, answer.raise_for_status().json())
        for attempt in desired.attempts:
            if attempt.attempt_id not in told and attempt.action == "run":
                told.add(attempt.attempt_id)
                await self._tell(attempt)

    async def _tell(self, attempt: protocol.DesiredAttempt) -> None:
        ranks = [(rank, g.node) for g in attempt.groups for rank in range(g.first_rank, g.first_rank + g.ranks)]
        starts = [protocol.RankStart(rank, node, 1000 + rank, time.time(), warm=True) for rank, node in ranks]
        await self._fact(attempt, "gang_ready")
        await self._fact(attempt, "started", ranks_started=starts)
        for group in attempt.groups:
            await self._report(attempt, group)
        exits = [self._exit(rank) for rank, _ in ranks]
        await self._fact(attempt, "ended", exits=exits, first_failed_rank=1 if self._exit_code else None)

    def _exit(self, rank: int) -> protocol.RankExit:
        failed = rank == 1 and self._exit_code != 0
        return protocol.RankExit(rank, self._exit_code if failed else 0, tail="ValueError: played\n" if failed else "")

    async def _fact(self, attempt: protocol.DesiredAttempt, kind: str, **fields: object) -> None:
        fact = protocol.AttemptFact(attempt.attempt_id, attempt.epoch, kind, time.time(), **fields)  # type: ignore[arg-type]
        message = protocol.AgentReport(self._instance, time.time(), [fact])
        answer = await self._http.post("/v1/agent/reports", json=protocol.encode(message))
        assert answer.raise_for_status().json()["refused"] == []

    async def _report(self, attempt: protocol.DesiredAttempt, group: protocol.GroupPlacement) -> None:
        """What the runner of one node saw: the loss falls, rank 0 keeps a checkpoint, each rank says hello."""
        of, now, first = (attempt.attempt_id, attempt.epoch), time.time(), group.first_rank
        ranks = range(first, first + group.ranks)
        marks = [protocol.Mark(*of, rank, kind, now) for rank in ranks for kind in ("rendezvous", "first_step")]
        marks.append(protocol.Mark(*of, first, "progress", now, {"total_steps": STEPS}))
        if first == 0:
            marks.append(protocol.Mark(*of, 0, "checkpoint", now, {"url": "file:///ckpt/8", "step": STEPS}))
        points = [
            protocol.MetricPoint(
                *of, first, now + step / 1000, step, {"loss": 4.0 / step, "tokens_per_s": 1000.0 * step}
            )
            for step in range(1, STEPS + 1)
        ]
        lines = [
            protocol.LogChunk(*of, rank, "stdout", 0, base64.b64encode(f"hello from {rank}\n".encode()).decode(), now)
            for rank in ranks
        ]
        heartbeat = protocol.Heartbeat([protocol.AttemptRef(*of)], protocol.NodeStats(0.1, 1 << 20), warm_ready=True)
        message = protocol.NodeReport(
            f"boot-{group.node}-{of[0]}", 1, now, heartbeat, logs=lines, metrics=points, marks=marks
        )
        headers = {"Authorization": f"Bearer {self._node_tokens[group.node]}"}
        answer = await self._http.post("/v1/node/reports", json=protocol.encode(message), headers=headers)
        assert answer.raise_for_status().json()["refused"] == [], answer.text
