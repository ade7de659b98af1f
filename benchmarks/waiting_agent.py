"""The real agent on nodes that are not there: whatever is started only waits as long as its command says (`sleep 0.2`).

The agent's own loops, rules, launcher and link to the server run as they do with Ray; what is missing are Ray's
placement groups and node runners, in whose place are the `Placements` and the `Runner` of this module. A rank ends by
itself when its time is over, and at once when it is told to stop. Nodes send no reports of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from phalanx_worker.agent.link import ServerLink
from phalanx_worker.agent.service import Agent, RunnerSettings
from phalanx_worker.protocol import DesiredAttempt, NodeFacts

TERMINATED, KILLED = 15, 9


@dataclass
class WaitingGroup:
    """The ranks of one attempt on one node."""

    epoch: int
    ranks: range
    started_at: float
    exits: list[dict[str, Any]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None


@dataclass
class WaitingRunner:
    """A node's runner, by the calls that the agent makes."""

    node: str
    groups: dict[str, WaitingGroup] = field(default_factory=dict)
    seq: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        return await getattr(self, method)(*args)

    async def kill(self) -> None:
        raise AssertionError("it answers, so nobody kills it")

    async def configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {"own_users": False, "own_users_problem": "nothing runs here"}

    async def reserve_rendezvous(self, attempt_id: str) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": 29500}

    async def start_group(self, order: dict[str, Any]) -> dict[str, Any]:
        desired, loop = order["desired"], asyncio.get_running_loop()
        placed = next(group for group in desired["groups"] if group["group_rank"] == order["group_rank"])
        ranks = range(placed["first_rank"], placed["first_rank"] + placed["ranks"])
        group = self.groups[desired["attempt_id"]] = WaitingGroup(desired["epoch"], ranks, time.time())
        run_s = float(desired["launch"]["command"].removeprefix("sleep "))
        group.timer = loop.call_later(run_s, self._end, desired["attempt_id"], {"exit_code": 0})
        starts = [
            {"rank": rank, "node": self.node, "pid": 1, "started_at": group.started_at, "warm": True} for rank in ranks
        ]
        self._bump()
        return {"ranks": starts}

    async def stop_group(self, attempt_id: str, grace_s: float) -> None:
        self._end(attempt_id, {"signal": TERMINATED})

    async def kill_group(self, attempt_id: str) -> None:
        self._end(attempt_id, {"signal": KILLED})

    async def forget_group(self, attempt_id: str) -> None:
        self.groups.pop(attempt_id, None)

    async def next_facts(self, after: int, wait_s: float) -> dict[str, Any]:
        if self.seq == after:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.changed.wait()
        return {"seq": self.seq, "groups": [_row(attempt_id, group) for attempt_id, group in self.groups.items()]}

    def _end(self, attempt_id: str, how: dict[str, Any]) -> None:
        group = self.groups.get(attempt_id)
        if group is None or group.exits:
            return
        if group.timer is not None:
            group.timer.cancel()
        group.exits = [{"rank": rank, "ended_at": time.time(), **how} for rank in group.ranks]
        self._bump()

    def _bump(self) -> None:
        self.seq += 1
        self.changed.set()
        self.changed = asyncio.Event()


def _row(attempt_id: str, group: WaitingGroup) -> dict[str, Any]:
    state = "ended" if group.exits else "running"
    return {"attempt_id": attempt_id, "epoch": group.epoch, "state": state, "exits": group.exits}


@dataclass
class WaitingCluster:
    """Nodes that are always there."""

    nodes: Sequence[NodeFacts]

    def __post_init__(self) -> None:
        self._runners = {node.ray_node_id: WaitingRunner(node.name) for node in self.nodes}

    async def list(self) -> list[NodeFacts]:
        return list(self.nodes)

    async def runner(self, ray_node_id: str) -> WaitingRunner:
        return self._runners[ray_node_id]


@dataclass
class CountedGangs:
    """Placement groups as Ray counts them: one that does not fit is a fault of the server, and says so."""

    free: dict[str, int]
    gangs: dict[str, dict[str, int]] = field(default_factory=dict)

    async def create(self, attempt: DesiredAttempt, ray_node_ids: dict[str, str], *, free_timeout_s: float) -> None:
        takes = {group.node: len(group.gpu_indices) for group in attempt.groups}
        for node, gpus in takes.items():
            self.free[node] -= gpus
            assert self.free[node] >= 0, f"{node} is given away twice"
        self.gangs[attempt.attempt_id] = takes

    async def remove(self, attempt_id: str) -> None:
        for node, gpus in self.gangs.pop(attempt_id, {}).items():
            self.free[node] += gpus

    async def forget(self, attempt_id: str) -> None:
        return

    def attempts(self) -> frozenset[str]:
        return frozenset(self.gangs)


def make_nodes(count: int, *, gpus: int, labels: Sequence[dict[str, str]] = ()) -> list[NodeFacts]:
    """So many equal nodes; `labels` of each, if they have any."""
    return [
        NodeFacts(
            name=f"n{i:05}",
            ray_node_id=f"ray-{i:05}",
            gpu_type="h100",
            gpus=gpus,
            cpus=16 * gpus,
            memory_bytes=gpus << 37,
            address="127.0.0.1",
            labels=labels[i] if labels else {},
        )
        for i in range(count)
    ]


@contextmanager
def waiting_agent(url: str, token: str, nodes: Sequence[NodeFacts]) -> Iterator[int]:
    """Run it in a process of its own, whose id this gives."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(url, token, nodes), daemon=True)
    process.start()
    try:
        assert process.pid is not None
        yield process.pid
    finally:
        process.terminate()
        process.join()


def _run(url: str, token: str, nodes: Sequence[NodeFacts]) -> None:
    logging.basicConfig(level=logging.ERROR)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(_serve(url, token, nodes))


async def _serve(url: str, token: str, nodes: Sequence[NodeFacts]) -> None:
    link = ServerLink(url=url, token=lambda: token, instance=secrets.token_hex(8))
    agent = Agent(
        link=link,
        cluster=WaitingCluster(nodes),
        placements=CountedGangs({node.name: node.gpus for node in nodes}),
        settings=RunnerSettings(server_url=url, data_dir="", checkpoint_root="", own_users=False),
    )
    serving = asyncio.create_task(agent.run())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    try:
        await serving
    finally:
        await link.close()
