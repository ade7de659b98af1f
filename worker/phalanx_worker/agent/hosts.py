"""The nodes as the agent deals with them: each with its runner, its token and the last table of its groups.

Owns the life of the runners: one for each living node, configured, followed by one long-poll, replaced when it dies.
Knows no Ray (that is `nodes.py`) and does not judge what the tables say (that is `desired.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from phalanx_worker.agent.backoff import Backoff
from phalanx_worker.agent.desired import Group, GroupState
from phalanx_worker.protocol import NodeFacts, RankExit, decode

log = logging.getLogger("phalanx.agent")

POLL_WAIT_S = 20.0
CALL_TIMEOUT_S = 15.0
CONFIGURE_TIMEOUT_S = 60.0


class RunnerError(Exception):
    """A call to a runner did not give an answer."""


class RunnerGone(RunnerError):
    """The runner is dead; its ranks die with it."""


class RunnerUnavailable(RunnerError):
    """Nobody knows: the runner may be dead, hung or only out of reach."""


class RunnerRefused(RunnerError):
    """The runner lives and says no; the message says why."""


class Runner(Protocol):
    """A node runner, by the methods of `node/runner.py`. Raises RunnerError."""

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any: ...


class RunnerSource(Protocol):
    async def runner(self, ray_node_id: str) -> Runner:
        """The runner of that node, created if there is none. Raises RunnerError."""
        ...


@dataclass
class Host:
    """One node. `table` is None until its present runner has answered; `generation` counts its runners."""

    facts: NodeFacts
    generation: int = 0
    runner: Runner | None = None
    table: dict[str, Group] | None = None
    warm_ready: bool = False
    own_users: bool = False  # as its runner says: ranks run under their tenant's own Unix user
    settings: dict[str, Any] | None = None
    given: asyncio.Event = field(default_factory=asyncio.Event)  # there are settings
    configured: dict[str, Any] | None = None  # what the present runner was last given
    follower: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def alive(self) -> bool:
        return self.facts.alive

    async def call(self, method: str, *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        if self.runner is None:
            raise RunnerUnavailable(f"node {self.name} has no runner yet")
        return await self.runner.call(method, *args, timeout_s=timeout_s)


@dataclass
class Hosts:
    """All nodes by name. `changed` is called after anything in a host changed."""

    source: RunnerSource
    changed: Callable[[], None]
    by_name: dict[str, Host] = field(default_factory=dict)
    background: set[asyncio.Task[None]] = field(default_factory=set)

    def get(self, name: str) -> Host | None:
        return self.by_name.get(name)

    def tables(self) -> dict[str, Mapping[str, Group]]:
        return {host.name: host.table for host in self.by_name.values() if host.alive and host.table is not None}

    def observe(self, living: list[NodeFacts]) -> None:
        """Take the nodes that live now: follow what is new, let go of what died."""
        for facts in living:
            host = self.by_name.setdefault(facts.name, Host(facts=replace(facts, alive=False)))
            if host.alive and host.facts.ray_node_id != facts.ray_node_id:
                self._let_go(host)
            new = not host.alive
            host.facts = facts
            if new:
                self._follow(host)
        for name in self.by_name.keys() - {facts.name for facts in living}:
            if self.by_name[name].alive:
                self._let_go(self.by_name[name])

    def inventory(self) -> list[NodeFacts]:
        """Every node that this agent has seen, the dead ones with what was last known of them."""
        return [replace(host.facts, own_users=host.own_users) for host in self.by_name.values()]

    def living(self) -> frozenset[str]:
        return frozenset(host.name for host in self.by_name.values() if host.alive)

    def configure(self, name: str, settings: dict[str, Any]) -> None:
        """Give a node's runner new settings; it gets them again whenever it is replaced."""
        host = self.by_name.get(name)
        if host is not None and host.settings != settings:
            host.settings = settings
            if host.given.is_set():  # else the one who follows the runner waits for it
                self._spawn(self._configure_again(host))
            host.given.set()

    async def close(self) -> None:
        """Stop following. The runners live on."""
        tasks = [*self.background, *(host.follower for host in self.by_name.values() if host.follower)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _follow(self, host: Host) -> None:
        log.info("node %s is alive as Ray node %s", host.name, host.facts.ray_node_id[:12])
        host.follower = asyncio.create_task(self._follow_runners(host), name=f"follow {host.name}")

    def _let_go(self, host: Host) -> None:
        log.warning("node %s is dead to the cluster", host.name)
        host.facts = replace(host.facts, alive=False)
        if host.follower is not None:
            host.follower.cancel()
        host.follower = None
        self._forget_runner(host)

    def _forget_runner(self, host: Host) -> None:
        host.runner, host.table, host.configured, host.warm_ready = None, None, None, False
        self.changed()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def _follow_runners(self, host: Host) -> None:
        """Follow the node's runner, and the next one when it has died, for as long as the node lives."""
        backoff = Backoff(f"the runner of node {host.name}")
        while True:
            try:
                host.runner = await self.source.runner(host.facts.ray_node_id)
                host.generation += 1
                await self._follow_tables(host)
            except RunnerError as error:
                if host.table is not None:
                    backoff.succeeded()
                self._forget_runner(host)
                await backoff.failed(error)

    async def _follow_tables(self, host: Host) -> None:
        """One long-poll after another, once the runner has its settings; returns only by raising RunnerGone."""
        await host.given.wait()
        seq = -1
        backoff = Backoff(f"following the runner of node {host.name}")
        while True:
            try:
                await self._configure(host)
                wait_s = 0.0 if seq < 0 else POLL_WAIT_S
                facts = await host.call("next_facts", seq, wait_s, timeout_s=wait_s + CALL_TIMEOUT_S)
            except (RunnerUnavailable, RunnerRefused) as error:
                await backoff.failed(error)
                continue
            backoff.succeeded()
            seq = int(facts["seq"])
            host.table = read_table(facts)
            host.warm_ready = bool(facts.get("warm_ready"))
            self.changed()

    async def _configure(self, host: Host) -> None:
        settings = host.settings
        if settings is None or host.runner is None or host.configured == settings:
            return
        answer = await host.call("configure", settings, timeout_s=CONFIGURE_TIMEOUT_S)
        host.configured = settings
        host.own_users = bool(answer.get("own_users"))
        if settings.get("own_users") and not host.own_users:
            log.warning("node %s: %s", host.name, answer.get("own_users_problem") or "no users of their own for ranks")
        self.changed()

    async def _configure_again(self, host: Host) -> None:
        try:
            await self._configure(host)
        except RunnerError as error:  # the one who follows the runner tries again
            log.warning("runner of node %s could not be configured: %s", host.name, error)


def read_table(facts: dict[str, Any]) -> dict[str, Group]:
    """A runner's answer to `next_facts` as groups by attempt."""
    return {
        str(row["attempt_id"]): Group(
            epoch=int(row["epoch"]),
            state=GroupState(row["state"]),
            exits=tuple(decode(RankExit, end) for end in row.get("exits", [])),
            first_failed_rank=row.get("first_failed_rank"),
        )
        for row in facts["groups"]
    }
