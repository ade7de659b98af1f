"""The agent: what it has heard, what it holds, and the loops that keep the two together.

Owns the state of one agent process and the four loops over it: inventory, desired set, facts, reconcile. The rules are
in `desired.py`, their execution in `launch.py`; Ray and HTTP are behind `Cluster` and `ServerLink`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from phalanx_worker.agent.desired import (
    Abort,
    Adopt,
    Clear,
    Close,
    Forget,
    Gang,
    Group,
    GroupState,
    Phase,
    Profile,
    Refuse,
    Start,
    Step,
    Stop,
    World,
    first_failed_rank,
    reconcile,
)
from phalanx_worker.agent.hosts import RUNNER_SILENT_S, Host, Hosts, RunnerSource
from phalanx_worker.agent.launch import NO_GENERATION, Launcher, Placements
from phalanx_worker.agent.link import Backoff, FactOutbox, ServerAway, ServerLink, ServerRefused
from phalanx_worker.agent.profiles import pass_on
from phalanx_worker.protocol import Backlog, DesiredAttempt, InventoryAnswer, NodeFacts

log = logging.getLogger("phalanx.agent")

INVENTORY_POLL_S = 0.5
RECONCILE_AT_LEAST_EVERY_S = 1.0
REST_AT_MOST_S = 0.5
"""A look at everything takes as long as there is much, and something always happens: then as long again is for the
rest, or nothing but looking would be done."""
FACTS_PER_ATTEMPT = 3  # `gang_ready`, `started`, and `ended` or `start_failed`; beside them `gone` of each node


class Cluster(RunnerSource, Protocol):
    """The nodes of the Ray cluster: `nodes.RayNodes`."""

    async def list(self) -> list[NodeFacts]: ...


@dataclass(frozen=True)
class RunnerSettings:
    """What every runner is told beside its token. Paths are of the nodes; each node gets its own part of `data_dir`.

    `require_own_users` is not told: nothing is started on a node that cannot give ranks their tenant's user.
    """

    server_url: str
    data_dir: str
    checkpoint_root: str
    own_users: bool
    require_own_users: bool = False
    environments_bytes: int = 20 << 30
    allow_mounts: tuple[str, ...] = ()  # host directories, `:ro` at the end for only to read
    disk_bytes: int = 64 << 30  # of the directories of one attempt on a node; 0: no limit


@dataclass
class Agent:
    """One agent process. `run` returns only by raising: Superseded, or a fault of its own."""

    link: ServerLink
    cluster: Cluster
    placements: Placements
    settings: RunnerSettings
    gangs: dict[str, Gang] = field(default_factory=dict)
    desired: dict[str, DesiredAttempt] | None = None  # None until the server has answered
    desired_since_s: dict[str, float] = field(default_factory=dict)
    node_tokens: dict[tuple[str, str], str] = field(default_factory=dict)  # by node name and Ray node
    heartbeat_s: float = 2.0
    runner_silent_s: float = RUNNER_SILENT_S
    answered_s: float = 0.0  # for how long the server has been there so far

    def __post_init__(self) -> None:
        self.wake = asyncio.Event()
        self.outbox = FactOutbox(self.link)
        self.hosts = Hosts(source=self.cluster, changed=self.wake.set, silent_s=self.runner_silent_s)
        self.launcher = Launcher(
            hosts=self.hosts,
            placements=self.placements,
            deliver=self.outbox.deliver,
            is_desired=self.is_desired,
            require_own_users=self.settings.require_own_users,
        )
        self._rest_s = 0.0  # between two looks at everything
        self._heard_s: float | None = None  # when the server answered last; None once it did not
        self._steps: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until cancelled. Gangs and runners live on afterwards, for the next agent."""
        duties = (self._watch_nodes(), self._follow_desired(), self.outbox.run(), self._reconcile())
        loops = [asyncio.create_task(duty) for duty in duties]
        try:
            ended, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for loop in ended:
                loop.result()
        finally:
            tasks = [*loops, *self._steps]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.hosts.close()

    def is_desired(self, attempt_id: str, epoch: int) -> bool:
        attempt = (self.desired or {}).get(attempt_id)
        return attempt is not None and attempt.epoch == epoch

    # ---------------------------------------------------------------- inventory

    async def _watch_nodes(self) -> None:
        """Poll the cluster; tell the server on every change and once in `heartbeat_s`."""
        backoff = Backoff("reporting nodes")
        told: list[NodeFacts] = []
        told_s = float("-inf")
        while True:
            self.hosts.observe(await self.cluster.list())
            nodes = self.hosts.inventory()
            if nodes != told or time.monotonic() - told_s >= self.heartbeat_s:
                self.wake.set()
                try:
                    answer = await self.link.put_nodes(nodes, self._without_token(nodes), self._backlog())
                    self._take_answer(nodes, answer)
                except (ServerAway, ServerRefused) as error:
                    self._count_answer(isinstance(error, ServerRefused))
                    await backoff.failed(error, at_least_s=_asked_s(error))
                    continue
                self._count_answer(True)
                backoff.succeeded()
                told, told_s = nodes, time.monotonic()
            await asyncio.sleep(INVENTORY_POLL_S)

    def _count_answer(self, came: bool) -> None:
        """Between two answers in a row the server was there."""
        now_s = time.monotonic()
        if came and self._heard_s is not None:
            self.answered_s += now_s - self._heard_s
        self._heard_s = now_s if came else None

    def _without_token(self, nodes: list[NodeFacts]) -> list[str]:
        """Asked for by name: the answer with a token may have got lost, and the one before it runs out."""
        return [node.name for node in nodes if node.alive and (node.name, node.ray_node_id) not in self.node_tokens]

    def _backlog(self) -> Backlog:
        """Facts wait of attempts that are held only: each is held until the last of them is acknowledged."""
        facts_limit = sum(FACTS_PER_ATTEMPT + nodes_of(gang) for gang in self.gangs.values())
        return Backlog(facts=self.outbox.waiting, facts_limit=facts_limit)

    def _take_answer(self, nodes: list[NodeFacts], answer: InventoryAnswer) -> None:
        self.heartbeat_s = answer.heartbeat_s
        held = {(node.name, node.ray_node_id): answer.node_tokens.get(node.name) for node in nodes}
        self.node_tokens = {
            node: token for node, new in held.items() if (token := new or self.node_tokens.get(node)) is not None
        }
        for (name, _), token in self.node_tokens.items():
            self.hosts.configure(name, self._runner_settings(name, answer.node_ids[name], token, answer))

    def _runner_settings(self, name: str, node_id: str, token: str, answer: InventoryAnswer) -> dict[str, Any]:
        return {
            "server_url": self.settings.server_url,
            "node_token": token,
            "node_id": node_id,
            "node_name": name,
            "fence_s": answer.fence_s,
            "heartbeat_s": answer.heartbeat_s,
            "outage_tolerance_s": answer.outage_tolerance_s,
            "data_dir": f"{self.settings.data_dir}/{name}",
            "checkpoint_root": self.settings.checkpoint_root,
            "own_users": self.settings.own_users,
            "environments_bytes": self.settings.environments_bytes,
            "allow_mounts": list(self.settings.allow_mounts),
            "disk_bytes": self.settings.disk_bytes,
        }

    # ---------------------------------------------------------------- desired set

    async def _follow_desired(self) -> None:
        backoff = Backoff("asking what should run")
        version = ""
        while True:
            try:
                desired = await self.link.desired(version)
            except (ServerAway, ServerRefused) as error:
                await backoff.failed(error, at_least_s=_asked_s(error))
                continue
            backoff.succeeded()
            version = desired.version
            self._take_desired({attempt.attempt_id: attempt for attempt in desired.attempts})
            await asyncio.sleep(self._rest_s)

    def _take_desired(self, desired: dict[str, DesiredAttempt]) -> None:
        now_s = time.monotonic()
        self.desired = desired
        self.desired_since_s = {attempt_id: self.desired_since_s.get(attempt_id, now_s) for attempt_id in desired}
        self.wake.set()

    # ---------------------------------------------------------------- reconcile

    async def _reconcile(self) -> None:
        while True:
            self.wake.clear()
            began_s = time.monotonic()
            self.tick(began_s)
            self._rest_s = min(time.monotonic() - began_s, REST_AT_MOST_S)
            await asyncio.sleep(self._rest_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RECONCILE_AT_LEAST_EVERY_S):
                    await self.wake.wait()

    def tick(self, now_s: float) -> None:
        """Look at everything once and begin every step that is due. Nothing happens before the server has spoken."""
        if self.desired is None:
            return
        for gang in self.gangs.values():
            if gang.phase is Phase.RUNNING:
                for node in gang.groups:
                    look_at(gang, node, self.hosts.get(node))
                self._look_for_hang(gang)
                if gang.over and gang.over_at_answered_s is None:
                    gang.over_at_answered_s = self.answered_s
        world = World(
            now_s=now_s,
            desired=self.desired,
            desired_since_s=self.desired_since_s,
            gangs=self.gangs,
            living=self.hosts.living(),
            tables=self.hosts.tables(),
            placement_groups=self.placements.attempts(),
            answered_s=self.answered_s,
        )
        for step in reconcile(world):
            self._begin(step)

    def _look_for_hang(self, gang: Gang) -> None:
        is_hung = any(group.hung for group in gang.groups.values())
        if is_hung and not gang.hung:
            self._spawn(self.launcher.keep_stacks(gang))
        gang.hung = is_hung

    def _begin(self, step: Step) -> None:
        """Mark the gang, so that the next look sees the step under way, and carry it out in the background."""
        match step:
            case Start(attempt, remains):
                gang = self._hold(attempt, Phase.STARTING)
                self._spawn(self.launcher.start(gang, attempt, remains=remains))
            case Adopt(attempt, groups):
                gang = self._hold(attempt, Phase.RUNNING)
                adopt(gang, attempt, groups, self.hosts)
                self._spawn(self.launcher.report_adopted(gang, attempt))
            case Refuse(attempt, message, node, remains):
                gang = self._hold(attempt, Phase.CLOSING)
                self._spawn(self.launcher.refuse(gang, attempt, message=message, node=node, remains=remains))
            case Stop(attempt_id, grace_s):
                gang = self.gangs[attempt_id]
                gang.stopping, gang.first_failed_rank = True, first_failed_rank(gang.groups)
                self._spawn(self.launcher.stop(gang, grace_s))
            case Profile(attempt_id, request):
                gang = self.gangs[attempt_id]
                gang.profiles.add(request.profile_id)
                self._spawn(pass_on(gang, request, self.hosts))
            case Abort(attempt_id):
                self.launcher.abort(self.gangs[attempt_id])
            case Close(attempt_id):
                self._close(self.gangs[attempt_id])
            case Clear(attempt_id, epoch, nodes):
                gang = self.gangs.get(attempt_id) or self._hold_stranger(attempt_id, epoch, nodes)
                gang.phase = Phase.CLEARING
                self._spawn(self.launcher.clear(gang, nodes))
            case Forget(attempt_id):
                del self.gangs[attempt_id]

    def _hold(self, attempt: DesiredAttempt, phase: Phase) -> Gang:
        gang = Gang(attempt.attempt_id, attempt.epoch, phase, attempt)
        self.gangs[attempt.attempt_id] = gang
        return gang

    def _hold_stranger(self, attempt_id: str, epoch: int, nodes: Iterable[str]) -> Gang:
        tables = self.hosts.tables()
        shown = {node: tables[node][attempt_id] for node in nodes}
        gang = self.gangs[attempt_id] = Gang(attempt_id, epoch, Phase.CLEARING, groups=shown)
        return gang

    def _close(self, gang: Gang) -> None:
        gang.phase = Phase.CLOSING
        if gang.attempt is not None:
            self._spawn(self.launcher.close(gang, gang.attempt))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._steps.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._steps.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a step failed", exc_info=task.exception())
        self.wake.set()


def adopt(gang: Gang, attempt: DesiredAttempt, groups: Any, hosts: Hosts) -> None:
    """Take over what an earlier agent started. A group that its node does not show is gone.

    On a dead node it is lost, and where the runner has not answered yet: that may be the one that had the group, or
    already the next.
    """
    log.info("attempt %s is adopted", attempt.attempt_id)
    for placement in attempt.groups:
        host = hosts.get(placement.node)
        shown = groups.get(placement.node)
        answered = host if host is not None and host.table is not None else None
        state = GroupState.VANISHED if answered is not None else GroupState.LOST
        gang.groups[placement.node] = shown or Group(attempt.epoch, state)
        gang.generations[placement.node] = answered.generation if answered is not None else NO_GENERATION


def nodes_of(gang: Gang) -> int:
    """How many nodes there are ranks of it on, or were to be."""
    return max(len(gang.groups), len(gang.attempt.groups) if gang.attempt is not None else 0)


def look_at(gang: Gang, node: str, host: Host | None) -> None:
    """Bring one group up to date with what its node shows now.

    A runner keeps every group until it is told to forget it. So a group that is missing is gone only where another
    runner has taken the place of the one that had it.
    """
    group = gang.groups[node]
    shown = _shown(gang, host)
    if group.over:
        if shown is not None:
            gang.groups[node] = replace(group, delivered=shown.delivered)
    elif host is None or not host.alive:
        gang.groups[node] = replace(group, state=GroupState.LOST)
    elif shown is not None:
        gang.groups[node] = shown
    elif host.table is not None and host.generation != gang.generations.get(node, NO_GENERATION):
        # What its runner had not sent is lost with it, or on disk, where nobody knows whose it is: not waited for.
        gang.groups[node] = replace(group, state=GroupState.VANISHED, delivered=True)


def _shown(gang: Gang, host: Host | None) -> Group | None:
    """The group as its node shows it now; a table of before its start shows none."""
    group = host.table.get(gang.attempt_id) if host is not None and host.alive and host.table is not None else None
    if group is None or group.state is GroupState.PREPARING:
        return None
    return group if group.epoch == gang.epoch else None


def _asked_s(error: ServerAway | ServerRefused) -> float | None:
    """How long the server wants to be left alone."""
    return error.retry_after_s if isinstance(error, ServerAway) else None
