"""A fake agent of a fake cluster: the real rules (`desired.reconcile`), carried out on machines that are not there.

Owns what one agent process remembers; a crash loses it. What its steps do is what `agent/launch.py` does with Ray, one
piece per tick, so that a crash finds it anywhere in between.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

from machines import FOR_GOOD, LONGEST_STEP_S, SEEN_DEAD_AFTER_S, Machine, Runner
from network import Away, Network
from phalanx_server.domain import messages as m
from phalanx_server.domain.errors import Superseded
from phalanx_worker import protocol
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
    Refuse,
    Start,
    Step,
    Stop,
    World,
    all_exits,
    first_failed_rank,
    reconcile,
)
from phalanx_worker.agent.hosts import Host
from phalanx_worker.agent.launch import NO_GENERATION
from phalanx_worker.agent.service import adopt, look_at

Work = Iterator[None]  # one step under way; every `next` is a tick later
Problem = tuple[str, str | None]  # why a gang cannot be started (any further), and the node to blame


@dataclass
class Server:
    """The three calls of the agent link, as the world answers them."""

    put_nodes: Callable[[m.Inventory], object]
    desired: Callable[[str], object]
    report: Callable[[m.AgentReport], object]


@dataclass
class Cluster:
    """What outlives an agent: the machines, Ray's placement groups and the keys of what is not cleared away."""

    machines: dict[str, Machine]
    placement_groups: dict[str, dict[str, int]] = field(default_factory=dict)  # attempt -> node -> GPUs
    keys: set[str] = field(default_factory=set)

    def fits(self, attempt: protocol.DesiredAttempt) -> bool:
        """Whether Ray counts enough free GPUs."""
        for group in attempt.groups:
            taken = sum(gang.get(group.node, 0) for gang in self.placement_groups.values())
            if taken + len(group.gpu_indices) > self.machines[group.node].gpus:
                return False
        return True


@dataclass
class FakeAgent:
    instance: str
    cluster: Cluster
    network: Network
    dice: random.Random
    gangs: dict[str, Gang] = field(default_factory=dict)
    desired: dict[str, protocol.DesiredAttempt] | None = None
    desired_since_s: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)
    facts: list[tuple[protocol.AttemptFact, dict[str, bool]]] = field(default_factory=list)  # with what the server said
    work: list[Work] = field(default_factory=list)
    superseded: bool = False
    answered_s: float = 0.0
    heard_s: float | None = None
    now_s: float = 0.0

    async def tick(self, now_s: float, server: Server) -> None:
        """Tell and ask the server what is due, look at the machines, take every step a piece further."""
        self.now_s = now_s
        try:
            self._observe()
            await self._talk(server)
        except Superseded:
            self.superseded = True
            return
        if self.desired is not None:
            self._reconcile(self.desired)
        self.work = [work for work in self.work if next(work, self) is not self]

    # ------------------------------------------------------------------ the server

    async def _talk(self, server: Server) -> None:
        try:
            nodes = [m.NodeFacts.model_validate(protocol.encode(host.facts)) for host in self.hosts.values()]
            inventory = m.Inventory(instance=self.instance, sent_at=self.now_s, nodes=nodes)
            await self.network.call(self.now_s, lambda: server.put_nodes(inventory))
            self.answered_s += 0.0 if self.heard_s is None else self.now_s - self.heard_s
            self.heard_s = self.now_s
            found = await self.network.call(self.now_s, lambda: server.desired(self.instance))
            answer = protocol.decode(protocol.Desired, found.encode())
            self.desired = {attempt.attempt_id: attempt for attempt in answer.attempts}
            since = self.desired_since_s
            self.desired_since_s = {attempt_id: since.get(attempt_id, self.now_s) for attempt_id in self.desired}
        except Away:
            self.heard_s = None
        await self._report(server)

    async def _report(self, server: Server) -> None:
        batch = self.facts[:20]
        if not batch:
            return
        facts = [m.AttemptFact.model_validate(protocol.encode(fact)) for fact, _ in batch]
        report = m.AgentReport(instance=self.instance, sent_at=self.now_s, facts=facts)
        try:
            answer = await self.network.call(self.now_s, lambda: server.report(report))
        except Away:
            return
        refused = {(refusal.attempt_id, refusal.epoch) for refusal in answer.refused}
        for fact, outcome in batch:
            outcome["taken"] = (fact.attempt_id, fact.epoch) not in refused
        self.facts = self.facts[len(batch) :]

    def _tell(self, gang: Gang, kind: str, **values: object) -> dict[str, bool]:
        fact = protocol.AttemptFact(gang.attempt_id, gang.epoch, kind, self.now_s, **values)  # type: ignore[arg-type]
        outcome: dict[str, bool] = {}
        self.facts.append((fact, outcome))
        return outcome

    def is_desired(self, gang: Gang) -> bool:
        attempt = (self.desired or {}).get(gang.attempt_id)
        return attempt is not None and attempt.epoch == gang.epoch

    # ------------------------------------------------------------------ the machines

    def _alive(self, machine: Machine) -> bool:
        """As Ray says: a node that is cut off is called dead only after a while."""
        silent_s = self.now_s - machine.runner.contact_s if machine.runner else float("inf")
        return machine.ray_id is not None and silent_s < SEEN_DEAD_AFTER_S + LONGEST_STEP_S

    def _reached(self, node: str) -> Machine | None:
        machine = self.cluster.machines[node]
        return machine if machine.runner is not None and not machine.is_cut(self.now_s) else None

    def _runner(self, node: str) -> Runner | None:
        machine = self._reached(node)
        return machine.runner if machine is not None else None

    def _observe(self) -> None:
        """As `agent/hosts.py`: follow the runners of living nodes, count their lives, keep what they show."""
        for name, machine in self.cluster.machines.items():
            host = self.hosts.get(name)
            if host is None:
                if not self._alive(machine):
                    continue
                host = self.hosts[name] = Host(self._facts(machine))
            if not self._alive(machine):
                host.facts, host.table, host.runner = replace(host.facts, alive=False), None, None
                continue
            if host.runner is not machine.runner:  # another than before: a later life
                host.runner, host.table = machine.runner, None  # type: ignore[assignment]
                host.generation += 1
            host.facts = self._facts(machine)
            if self._reached(name) is not None and machine.runner is not None:
                host.table = machine.runner.shown()

    def _facts(self, machine: Machine) -> protocol.NodeFacts:
        assert machine.ray_id is not None
        return protocol.NodeFacts(
            machine.name, machine.ray_id, "h100", machine.gpus, cpus=16, memory_bytes=64 << 30, address="10.0.0.1"
        )

    # ------------------------------------------------------------------ steps

    def _reconcile(self, desired: dict[str, protocol.DesiredAttempt]) -> None:
        for gang in self.gangs.values():
            if gang.phase is Phase.RUNNING:
                for node in gang.groups:
                    look_at(gang, node, self.hosts.get(node))
                if gang.over and gang.over_at_answered_s is None:
                    gang.over_at_answered_s = self.answered_s
        living = {name: host for name, host in self.hosts.items() if host.alive}
        world = World(
            now_s=self.now_s,
            desired=desired,
            desired_since_s=self.desired_since_s,
            gangs=self.gangs,
            living=frozenset(living),
            tables={name: host.table for name, host in living.items() if host.table is not None},
            placement_groups=frozenset(self.cluster.keys),
            answered_s=self.answered_s,
        )
        for step in reconcile(world):
            self._begin(step)

    def _begin(self, step: Step) -> None:
        match step:
            case Start(attempt, remains):
                self.work.append(self._start(self._hold(attempt, Phase.STARTING), attempt, remains=remains))
            case Adopt(attempt, groups):
                gang = self._hold(attempt, Phase.RUNNING)
                adopt(gang, attempt, groups, self.hosts)  # type: ignore[arg-type]  # it only asks `get`
                if len(groups) == len(attempt.groups):
                    self._tell(gang, "started", ranks_started=_starts(attempt, self.now_s))
            case Refuse(attempt, message, node, remains):
                gang = self._hold(attempt, Phase.CLOSING)
                if remains:
                    gang.generations = {group.node: NO_GENERATION for group in attempt.groups}
                self.work.append(self._give_up(gang, attempt, message, node))
            case Stop(attempt_id, grace_s):
                gang = self.gangs[attempt_id]
                gang.stopping, gang.first_failed_rank = True, first_failed_rank(gang.groups)
                self.work.append(self._stop(gang, grace_s))
            case Abort(attempt_id):
                self.gangs[attempt_id].aborting = True
            case Close(attempt_id):
                gang = self.gangs[attempt_id]
                gang.phase = Phase.CLOSING
                self.work.append(self._close(gang))
            case Clear(attempt_id, epoch, nodes):
                gang = self.gangs.setdefault(attempt_id, Gang(attempt_id, epoch, Phase.CLEARING))
                gang.phase = Phase.CLEARING
                self.work.append(self._clear(gang, sorted(nodes)))
            case Forget(attempt_id):
                del self.gangs[attempt_id]

    def _hold(self, attempt: protocol.DesiredAttempt, phase: Phase) -> Gang:
        gang = self.gangs[attempt.attempt_id] = Gang(attempt.attempt_id, attempt.epoch, phase, attempt)
        return gang

    def _start(self, gang: Gang, attempt: protocol.DesiredAttempt, *, remains: bool) -> Work:
        """Group by group, a tick apart at times, so that a crash or a lost node finds the gang half started."""
        nodes = [group.node for group in attempt.groups]
        if remains:
            self.cluster.placement_groups.pop(gang.attempt_id, None)
            cleared = yield from self._clear_all(gang, nodes)
            unknown = [node for node, is_clear in cleared.items() if not is_clear]
            gang.generations.update(dict.fromkeys(unknown, NO_GENERATION))
            if unknown:
                yield from self._give_up(gang, attempt, f"node {unknown[0]} is not alive", unknown[0])
                return
            self._forget(gang, nodes)
        began_s = self.now_s
        while not self.cluster.fits(attempt) and self.now_s < began_s + 30 and not gang.aborting:
            yield
        problem = self._problem(gang, attempt)
        if problem is None:
            self.cluster.keys.add(gang.attempt_id)
            self.cluster.placement_groups[gang.attempt_id] = {g.node: len(g.gpu_indices) for g in attempt.groups}
            self._tell(gang, "gang_ready")
            if attempt.launch.environment is not None:
                problem = yield from self._prepare(gang, attempt)
            for group in attempt.groups:
                if self.dice.random() < 0.2:
                    yield
                problem = problem or self._problem(gang, attempt)
                host, machine = self.hosts[group.node], self._reached(group.node)
                if problem is None and machine is not None:
                    gang.generations[group.node] = host.generation
                    machine.start_group(attempt, group, self.now_s)
            while problem is None and not all(self._has_ranks(gang, node) for node in nodes):
                yield
                problem = self._problem(gang, attempt)
        if problem is not None:
            yield from self._give_up(gang, attempt, *problem)
            return
        gang.groups = {node: Group(gang.epoch, GroupState.RUNNING) for node in nodes}
        self._tell(gang, "started", ranks_started=_starts(attempt, self.now_s))
        gang.phase = Phase.RUNNING

    def _prepare(self, gang: Gang, attempt: protocol.DesiredAttempt) -> Generator[None, None, Problem | None]:
        """On every node at once, until the last is ready or one says no."""
        nodes = [group.node for group in attempt.groups]
        for node in nodes:
            machine = self._reached(node)
            if machine is None:
                return f"node {node} is not alive", node
            gang.generations[node] = self.hosts[node].generation
            machine.prepare(attempt, self.now_s)
        while True:
            if gang.aborting:
                return "stopped before it started", None
            ready = [self._prepared(gang, node) for node in nodes]
            wrong = next((each for each in ready if isinstance(each, tuple)), None)
            if wrong or all(ready):
                return wrong
            yield

    def _prepared(self, gang: Gang, node: str) -> Problem | bool:
        """Whether a node has the environment; while nobody reaches it, its answer is waited for."""
        host = self.hosts[node]
        if not host.alive or host.generation != gang.generations[node]:
            return f"runner of node {node}: it is gone", node
        runner = self._runner(node)
        preparation = runner.prepared.get(gang.attempt_id) if runner is not None else None
        if runner is None or preparation is None or preparation.ready_at_s > self.now_s:
            return False
        if preparation.wrong:
            del runner.prepared[gang.attempt_id]
            return preparation.wrong, node
        return True

    def _has_ranks(self, gang: Gang, node: str) -> bool:
        runner = self._runner(node)
        return runner is not None and gang.attempt_id in runner.table

    def _problem(self, gang: Gang, attempt: protocol.DesiredAttempt) -> Problem | None:
        if gang.aborting:
            return "stopped before it started", None
        if not self.cluster.fits(attempt) and gang.attempt_id not in self.cluster.placement_groups:
            return "Ray shows too few free GPUs", attempt.groups[0].node
        for group in attempt.groups:
            host = self.hosts.get(group.node)
            moved = group.node in gang.generations and host and host.generation != gang.generations[group.node]
            if host is None or not host.alive or self._reached(group.node) is None or moved:
                return f"node {group.node} is not alive", group.node
        if self.dice.random() < 0.03:
            return "no luck", attempt.groups[0].node
        return None

    def _give_up(self, gang: Gang, attempt: protocol.DesiredAttempt, message: str, node: str | None) -> Work:
        self.cluster.placement_groups.pop(gang.attempt_id, None)
        cleared = yield from self._clear_all(gang, list(gang.generations))
        if all(cleared.values()):
            self.cluster.keys.discard(gang.attempt_id)
            gang.phase = Phase.CLOSING
            nodes = [group.node for group in attempt.groups]
            permanent = message == FOR_GOOD
            yield from self._finish(gang, nodes, "start_failed", message=message, node=node, permanent=permanent)
            return
        for name, is_clear in cleared.items():
            gang.groups[name] = Group(gang.epoch, GroupState.ENDED if is_clear else GroupState.LOST)
        gang.stopping, gang.phase = True, Phase.RUNNING

    def _clear_all(self, gang: Gang, nodes: list[str]) -> Generator[None, None, dict[str, bool]]:
        """Each node as soon as it answers; False where it is dead and nobody can tell."""
        cleared: dict[str, bool] = {}
        while len(cleared) < len(nodes):
            for node in [node for node in nodes if node not in cleared]:
                is_clear = self._is_clear(gang.attempt_id, node)
                if is_clear is not None:
                    cleared[node] = is_clear
            if len(cleared) < len(nodes):
                yield
        return cleared

    def _is_clear(self, attempt_id: str, node: str) -> bool | None:
        """Kill and look; False where the node is dead and nobody can tell, None where it must be asked again."""
        host = self.hosts.get(node)
        if host is None or not host.alive:
            return False
        runner = self._runner(node)
        if runner is None:
            return None
        runner.kill(attempt_id, self.now_s)
        return True

    def _stop(self, gang: Gang, grace_s: float) -> Work:
        """Every group that is not over; asked again where nobody answers."""
        told: set[str] = set()
        while gang.phase is Phase.RUNNING and not gang.over:
            for node, group in gang.groups.items():
                runner = self._runner(node)
                if node in told or runner is None or group.state not in (GroupState.RUNNING, GroupState.FAILING):
                    continue
                told.add(node)
                if gang.attempt_id in runner.table:
                    runner.table[gang.attempt_id].stop(self.now_s, grace_s, self.dice)
            yield

    def _close(self, gang: Gang) -> Work:
        assert gang.attempt is not None
        vanished = [node for node, group in gang.groups.items() if group.state is GroupState.VANISHED]
        self.cluster.placement_groups.pop(gang.attempt_id, None)
        cleared = yield from self._clear_all(gang, vanished)
        if not all(cleared.values()):
            lost = [node for node, is_clear in cleared.items() if not is_clear]
            gang.groups.update({node: replace(gang.groups[node], state=GroupState.LOST) for node in lost})
            gang.phase = Phase.RUNNING
            return
        self.cluster.keys.discard(gang.attempt_id)
        failed = gang.first_failed_rank
        yield from self._finish(
            gang,
            list(gang.groups),
            "ended",
            node=vanished[0] if vanished else None,
            first_failed_rank=first_failed_rank(gang.groups) if failed is None else failed,
            exits=all_exits(gang.attempt, gang.groups),
        )

    def _finish(self, gang: Gang, nodes: list[str], kind: str, **values: object) -> Work:
        outcome = self._tell(gang, kind, **values)
        while not outcome:
            yield
        if not outcome["taken"] or not self.is_desired(gang):
            gone = [self._tell(gang, "gone", node=node) for node in nodes]
            while not all(gone):
                yield
        self._forget(gang, nodes)
        gang.phase = Phase.DONE

    def _clear(self, gang: Gang, nodes: list[str]) -> Work:
        self.cluster.placement_groups.pop(gang.attempt_id, None)
        for node in nodes:
            while not self._is_clear(gang.attempt_id, node):
                yield
            outcome = self._tell(gang, "gone", node=node)
            while not outcome:
                yield
            self._forget(gang, [node])
        self.cluster.keys.discard(gang.attempt_id)
        gang.phase = Phase.DONE

    def _forget(self, gang: Gang, nodes: list[str]) -> None:
        for node in nodes:
            runner = self._runner(node)
            if runner is not None:
                runner.kill(gang.attempt_id, self.now_s)
                runner.forget(gang.attempt_id)
                host = self.hosts[node]
                if host.table is not None:
                    host.table.pop(gang.attempt_id, None)


def _starts(attempt: protocol.DesiredAttempt, now_s: float) -> list[protocol.RankStart]:
    return [
        protocol.RankStart(rank=rank, node=group.node, pid=100 + rank, started_at=now_s, warm=True)
        for group in attempt.groups
        for rank in range(group.first_rank, group.first_rank + group.ranks)
    ]
