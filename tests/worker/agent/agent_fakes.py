"""What the agent talks to, without Ray and HTTP: runners whose ranks end when the test says so, a cluster that has
them, and a server that wants and hears."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from phalanx_worker.agent.hosts import RunnerGone, RunnerRefused, RunnerUnavailable
from phalanx_worker.agent.launch import StartFailed
from phalanx_worker.agent.link import ServerAway, Superseded
from phalanx_worker.protocol import (
    AttemptFact,
    Backlog,
    Desired,
    DesiredAttempt,
    InventoryAnswer,
    NodeFacts,
    Refused,
    ReportAnswer,
)

_numbers = itertools.count(1)


@dataclass
class FakeRunner:
    name: str
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    configured: list[dict[str, Any]] = field(default_factory=list)
    start_error: str = ""
    prepare_error: str = ""
    profile_error: str = ""
    permanent: bool = False  # of these errors
    ignore_sigterm: bool = False
    own_users: bool = False
    delivers: bool = True  # what its ranks left behind reaches the server
    dead: bool = False
    killed: bool = False
    hung: set[str] = field(default_factory=set)  # methods that are not answered; "*": none is
    stuck: set[str] = field(default_factory=set)  # attempts that take no step any more
    stacks_kept: list[str] = field(default_factory=list)
    seq: int = field(default_factory=lambda: next(_numbers) * 1000)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    start_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.start_gate.set()

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        await asyncio.sleep(0)
        await self._hang(method, timeout_s)
        if method != "next_facts":
            self.calls.append((method, *args))
        answer = await getattr(self, method)(*args)
        await self._hang(method, timeout_s)
        return answer

    async def _hang(self, method: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.dead and self.hung & {method, "*"}:
                    await self.changed.wait()
        except TimeoutError as error:
            raise RunnerUnavailable("not answered") from error
        if self.dead:
            raise RunnerGone("the actor died")

    async def kill(self) -> None:
        self.killed = True
        self.die()

    async def configure(self, settings: dict[str, Any]) -> dict[str, Any]:
        self.configured.append(settings)
        return {"own_users": self.own_users, "own_users_problem": "" if self.own_users else "not root"}

    async def capabilities(self) -> dict[str, Any]:
        return {}

    async def reserve_rendezvous(self, attempt_id: str) -> dict[str, Any]:
        return {"host": "127.0.0.1", "port": 29500}

    async def prepare_group(self, order: dict[str, Any]) -> dict[str, Any]:
        await self.start_gate.wait()
        if self.prepare_error:
            raise RunnerRefused(self.prepare_error, permanent=self.permanent)
        return {}

    async def start_group(self, order: dict[str, Any]) -> dict[str, Any]:
        await self.start_gate.wait()
        desired = order["desired"]
        if self.start_error:
            raise RunnerRefused(self.start_error, permanent=self.permanent)
        placed = next(group for group in desired["groups"] if group["group_rank"] == order["group_rank"])
        ranks = range(placed["first_rank"], placed["first_rank"] + placed["ranks"])
        known = self.groups.setdefault(
            desired["attempt_id"],
            {"epoch": desired["epoch"], "ranks": ranks, "exits": [], "failed": None, "order": order},
        )
        self.bump()
        return {
            "ranks": [
                {"rank": rank, "node": self.name, "pid": 100 + rank, "started_at": 50.0 + rank, "warm": True}
                for rank in known["ranks"]
            ]
        }

    async def stop_group(self, attempt_id: str, grace_s: float) -> None:
        if attempt_id in self.groups and not self.ignore_sigterm:
            self.end(attempt_id, signal=15)

    async def keep_stacks(self, attempt_id: str) -> None:
        self.stacks_kept.append(attempt_id)
        self.bump()

    async def profile_group(self, attempt_id: str, request: dict[str, Any]) -> None:
        if self.profile_error:
            raise RunnerRefused(self.profile_error)

    async def kill_group(self, attempt_id: str) -> None:
        if attempt_id in self.groups:
            self.end(attempt_id, signal=9)

    async def forget_group(self, attempt_id: str) -> None:
        self.groups.pop(attempt_id, None)
        self.bump()

    async def next_facts(self, after: int, wait_s: float) -> dict[str, Any]:
        if self.seq == after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), wait_s)
        return {"seq": self.seq, "groups": [self._row(name) for name in self.groups]}

    def bump(self) -> None:
        self.seq += 1
        self.changed.set()
        self.changed = asyncio.Event()

    def hang(self, *methods: str) -> None:
        """Answer these methods no more, or answer everything again."""
        self.hung = set(methods)
        self.bump()

    def deliver(self) -> None:
        self.delivers = True
        self.bump()

    def die(self) -> None:
        self.dead = True
        self.start_gate.set()
        self.bump()

    def end(self, attempt_id: str, *, rank: int | None = None, at: float = 0.0, **how: Any) -> None:
        """End one rank of a group, or all that are left."""
        group = self.groups[attempt_id]
        done = {end["rank"] for end in group["exits"]}
        for one in group["ranks"] if rank is None else [rank]:
            if one not in done:
                group["exits"].append({"rank": one, "ended_at": at, **how})
                if how.get("exit_code") != 0 and group["failed"] is None:
                    group["failed"] = one
        self.bump()

    def _row(self, attempt_id: str) -> dict[str, Any]:
        group = self.groups[attempt_id]
        state = "failing" if group["failed"] is not None else "running"
        ended = len(group["exits"]) == len(group["ranks"])
        return {
            "attempt_id": attempt_id,
            "epoch": group["epoch"],
            "state": "ended" if ended else state,
            "exits": list(group["exits"]),
            "first_failed_rank": group["failed"],
            "delivered": ended and self.delivers,
            "hung": attempt_id in self.stuck,
        }


@dataclass
class FakeCluster:
    """Nodes by name with their runners."""

    runners: dict[str, FakeRunner] = field(default_factory=dict)
    ray_ids: dict[str, str] = field(default_factory=dict)

    def add(self, name: str) -> FakeRunner:
        self.ray_ids[name] = f"ray{next(_numbers)}"
        self.runners[name] = FakeRunner(name)
        return self.runners[name]

    def remove(self, name: str) -> None:
        del self.ray_ids[name]
        self.runners[name].die()

    async def list(self) -> list[NodeFacts]:
        return [
            NodeFacts(name, ray_id, "emulated", gpus=2, cpus=2, memory_bytes=1 << 30, address="127.0.0.1")
            for name, ray_id in sorted(self.ray_ids.items())
        ]

    async def runner(self, ray_node_id: str) -> FakeRunner:
        name = next(name for name, ray_id in self.ray_ids.items() if ray_id == ray_node_id)
        if self.runners[name].dead:
            self.runners[name] = FakeRunner(name)
        return self.runners[name]


@dataclass
class FakePlacements:
    """Placement groups that are there at once, unless the gate is closed or there is an error."""

    placed: set[str] = field(default_factory=set)
    entered: set[str] = field(default_factory=set)  # as long as something may be left of them
    error: str = ""
    fault: Exception | None = None  # that nobody expects
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def create(self, attempt: DesiredAttempt, ray_node_ids: dict[str, str], *, free_timeout_s: float) -> None:
        await self.gate.wait()
        if self.error:
            raise StartFailed(self.error)
        if self.fault:
            raise self.fault
        self.placed.add(attempt.attempt_id)
        self.entered.add(attempt.attempt_id)

    async def remove(self, attempt_id: str) -> None:
        self.placed.discard(attempt_id)

    async def forget(self, attempt_id: str) -> None:
        assert attempt_id not in self.placed
        self.entered.discard(attempt_id)

    def attempts(self) -> frozenset[str]:
        return frozenset(self.placed | self.entered)


@dataclass
class FakeLink:
    """The server as the agent calls it, in the same event loop."""

    wanted: dict[str, DesiredAttempt] = field(default_factory=dict)
    version: int = 1
    facts: list[AttemptFact] = field(default_factory=list)
    nodes: list[NodeFacts] = field(default_factory=list)
    refuse: set[str] = field(default_factory=set)
    away: bool = False
    deaf: bool = False  # to facts alone
    backlogs: list[tuple[int, int]] = field(default_factory=list)  # facts that wait, and that may wait
    superseded: bool = False
    lose_answers: int = 0  # to so many inventories
    token_answers: list[dict[str, str]] = field(default_factory=list)  # the tokens that were given, lost ones included
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, *attempts: DesiredAttempt) -> None:
        self.set(self.wanted | {attempt.attempt_id: attempt for attempt in attempts})

    def want_stopped(self, attempt_id: str, grace_s: float = 5.0) -> None:
        self.want(replace(self.wanted[attempt_id], action="stop", grace_s=grace_s))

    def drop(self, attempt_id: str) -> None:
        self.set({name: attempt for name, attempt in self.wanted.items() if name != attempt_id})

    def set(self, wanted: dict[str, DesiredAttempt]) -> None:
        self.wanted, self.version = wanted, self.version + 1
        self.changed.set()
        self.changed = asyncio.Event()

    def kinds(self, attempt_id: str) -> list[str]:
        return [fact.kind for fact in self.facts if fact.attempt_id == attempt_id]

    def _present(self) -> None:
        if self.superseded:
            raise Superseded("another agent")
        if self.away:
            raise ServerAway("no route")

    async def put_nodes(self, nodes: list[NodeFacts], without_token: list[str], backlog: Backlog) -> InventoryAnswer:
        self._present()
        self.backlogs.append((backlog.facts, backlog.facts_limit))
        self.nodes = nodes
        ids = {node.name: f"node_{node.name}" for node in nodes}
        tokens = {name: f"token-{name}" for name in without_token}
        self.token_answers.append(tokens)
        if self.lose_answers:
            self.lose_answers -= 1
            raise ServerAway("the answer got lost")
        return InventoryAnswer(0.0, ids, tokens, fence_s=60.0, heartbeat_s=0.5)

    async def desired(self, version: str) -> Desired:
        self._present()
        if version == str(self.version):
            await self.changed.wait()
        return Desired(str(self.version), list(self.wanted.values()), 0.0)

    async def report(self, facts: list[AttemptFact]) -> ReportAnswer:
        self._present()
        if self.deaf:
            raise ServerAway("no report gets through")
        self.facts += facts
        return ReportAnswer(
            0.0, [Refused(f.attempt_id, f.epoch, "stale_epoch") for f in facts if f.attempt_id in self.refuse]
        )
