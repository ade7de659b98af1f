"""The nodes as the agent deals with them: each with its runner, its token and the last table of its groups.

Owns the life of the runners: one for each living node, configured, followed by one long-poll, replaced when it dies or
has answered nothing for too long.
Knows no Ray (that is `nodes.py`) and does not judge what the tables say (that is `desired.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
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
PROBE_TIMEOUT_S = 10.0
RUNNER_SILENT_S = 60.0  # as the fence: who could not reach anybody for so long has ended its ranks
MOST_PATIENCE_S = 960.0


class RunnerError(Exception):
    """A call to a runner did not give an answer."""


class RunnerGone(RunnerError):
    """The runner is dead; its ranks die with it."""


class RunnerUnavailable(RunnerError):
    """Nobody knows: the runner may be dead, hung or only out of reach."""


class RunnerRefused(RunnerError):
    """The runner lives and says no; the message says why. `permanent`: it would say so again."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class Runner(Protocol):
    """A node runner, by the methods of `node/runner.py`. Raises RunnerError."""

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any: ...

    async def kill(self) -> None:
        """End its process; all that runs for it ends with it."""
        ...


class RunnerSource(Protocol):
    async def runner(self, ray_node_id: str) -> Runner:
        """The runner of that node, created if there is none. Raises RunnerError."""
        ...


@dataclass
class Host:
    """One node. `table` is None until its present runner has answered; `generation` counts its runners.

    `heard_s` is when that runner last answered anything, or was first asked; `patience_s` how long it may be silent.
    """

    facts: NodeFacts
    generation: int = 0
    runner: Runner | None = None
    table: dict[str, Group] | None = None
    heard_s: float = 0.0  # monotonic
    patience_s: float = 0.0
    own_users: bool = False  # as its runner says: ranks run under their tenant's own Unix user
    own_users_problem: str = ""
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
        try:
            answer = await self.runner.call(method, *args, timeout_s=timeout_s)
        except RunnerRefused:
            self.heard_s = time.monotonic()
            raise
        self.heard_s = time.monotonic()
        return answer

    @property
    def is_silent(self) -> bool:
        return time.monotonic() - self.heard_s > self.patience_s


@dataclass
class Hosts:
    """All nodes by name. `changed` is called after anything in a host changed."""

    source: RunnerSource
    changed: Callable[[], None]
    silent_s: float = RUNNER_SILENT_S  # then a runner on a living node is killed
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
        host.runner, host.table, host.configured = None, None, None
        self.changed()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    async def _follow_runners(self, host: Host) -> None:
        """Follow the node's runner, and the next one when it has died, for as long as the node lives."""
        backoff = Backoff(f"the runner of node {host.name}")
        host.patience_s = self.silent_s
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
        host.heard_s = time.monotonic()  # nobody has asked it anything before
        seq = -1
        backoff = Backoff(f"following the runner of node {host.name}")
        while True:
            try:
                await self._configure(host)
                wait_s = 0.0 if seq < 0 else min(POLL_WAIT_S, self.silent_s / 3)
                facts = await host.call("next_facts", seq, wait_s, timeout_s=wait_s + self._timeout_s(CALL_TIMEOUT_S))
            except (RunnerUnavailable, RunnerRefused) as error:
                if host.is_silent:
                    await self._end_silent(host)
                await backoff.failed(error)
                continue
            backoff.succeeded()
            host.patience_s = self.silent_s
            seq = int(facts["seq"])
            host.table = read_table(facts)
            self.changed()

    def _timeout_s(self, longest_s: float) -> float:
        """Of a call whose failure tells that the runner is silent: not much later than it is."""
        return min(longest_s, self.silent_s)

    async def _end_silent(self, host: Host) -> None:
        """Kill a runner that answers nothing, and raise RunnerGone: hung, it would hold its node's gangs for ever.

        It is asked once more first: it may be this process that was stopped. And the next one may be silent for twice
        as long, until one has answered: a node may be too slow to start a runner in time.
        """
        with contextlib.suppress(RunnerUnavailable, RunnerRefused):
            await host.call("capabilities", timeout_s=self._timeout_s(PROBE_TIMEOUT_S))
        if not host.is_silent or host.runner is None:
            return
        log.error("the runner of node %s has answered nothing for %.0f s: it is killed", host.name, host.patience_s)
        try:
            await host.runner.kill()
        except RunnerError as error:
            return log.warning("the runner of node %s cannot be killed yet: %s", host.name, error)
        host.patience_s = min(2 * host.patience_s, MOST_PATIENCE_S)
        raise RunnerGone("it answered nothing and was killed")

    async def _configure(self, host: Host) -> None:
        settings = host.settings
        if settings is None or host.runner is None or host.configured == settings:
            return
        answer = await host.call("configure", settings, timeout_s=self._timeout_s(CONFIGURE_TIMEOUT_S))
        host.configured = settings
        host.own_users = bool(answer.get("own_users"))
        host.own_users_problem = str(answer.get("own_users_problem") or "it has no users of their own for ranks")
        if settings.get("own_users") and not host.own_users:
            log.warning("node %s: %s", host.name, host.own_users_problem)
        log.info("node %s holds attempts to their limits so: %s", host.name, answer.get("isolation") or "unknown")
        self.changed()

    async def _configure_again(self, host: Host) -> None:
        try:
            await self._configure(host)
        except RunnerError as error:  # the one who follows the runner tries again
            log.warning("runner of node %s could not be configured: %s", host.name, error)


def read_table(facts: dict[str, Any]) -> dict[str, Group]:
    """A runner's answer to `next_facts` as groups by attempt; a runner of before says nothing of what has no ranks."""
    preparing = {
        str(row["attempt_id"]): Group(int(row["epoch"]), GroupState.PREPARING) for row in facts.get("preparing", [])
    }
    return preparing | {
        str(row["attempt_id"]): Group(
            epoch=int(row["epoch"]),
            state=GroupState(row["state"]),
            exits=tuple(decode(RankExit, end) for end in row.get("exits", [])),
            first_failed_rank=row.get("first_failed_rank"),
            delivered=bool(row.get("delivered", True)),
            hung=bool(row.get("hung")),
        )
        for row in facts["groups"]
    }
