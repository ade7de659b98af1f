"""How each step is carried out: a gang is started, adopted, stopped, closed and cleared away, and the facts it leaves.

Owns the order of the calls to runners and placement groups, and what happens when one of them fails. Decides nothing
about what should run (that is `desired.py`) and knows neither Ray nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from phalanx_worker.agent.desired import Gang, Group, GroupState, Phase, all_exits, first_failed_rank
from phalanx_worker.agent.hosts import Host, Hosts, RunnerError, RunnerGone, RunnerRefused, RunnerUnavailable
from phalanx_worker.protocol import AttemptFact, DesiredAttempt, GroupPlacement, RankStart, decode, encode

log = logging.getLogger("phalanx.agent")

FREE_TIMEOUT_S = 30.0  # for Ray to show released GPUs as free
PREPARE_TIMEOUT_S = 4_500.0  # for a runner to build the environment; it gives up by itself before
START_TIMEOUT_S = 900.0  # for a runner to fetch the code and start the ranks
FORGET_TIMEOUT_S = 60.0  # the runner removes the attempt's directory
CLEAR_WAIT_S = 5.0
RETRY_S = 0.2
RETRY_SLOWLY_S = 1.0
NO_GENERATION = -1  # of a runner: none that this agent has seen


class StartFailed(Exception):
    """A gang could not be started; `node` is set where one is to blame, `permanent` where no other try can help."""

    def __init__(self, message: str, node: str | None = None, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.node = node
        self.permanent = permanent


class PlacementUnavailable(Exception):
    """The cluster does not answer about placement groups."""


class Placements(Protocol):
    """Gangs as the cluster counts them: `gang.PlacementGroups`."""

    async def create(self, attempt: DesiredAttempt, ray_node_ids: dict[str, str], *, free_timeout_s: float) -> None:
        """Raises StartFailed."""
        ...

    async def remove(self, attempt_id: str) -> None:
        """No group is fine. Raises PlacementUnavailable."""
        ...

    async def forget(self, attempt_id: str) -> None:
        """Nothing is left of it, neither its group nor on any node. Raises PlacementUnavailable."""
        ...

    def attempts(self) -> frozenset[str]:
        """Those that have a group, or had one and are not forgotten: this agent's, and those of agents before it."""
        ...


class Deliver(Protocol):
    def __call__(self, fact: AttemptFact, *, urgent: bool = True) -> Awaitable[bool]: ...


@dataclass
class Launcher:
    """Carries out steps on gangs. `is_desired` tells whether the server still wants that attempt and epoch."""

    hosts: Hosts
    placements: Placements
    deliver: Deliver
    is_desired: Callable[[str, int], bool]
    require_own_users: bool = False
    aborts: dict[str, asyncio.Event] = field(default_factory=dict)

    # ---------------------------------------------------------------- start

    async def start(self, gang: Gang, attempt: DesiredAttempt, *, remains: bool) -> None:
        """Take the resources, start every group at once, report. On any failure leave nothing behind and say so."""
        abort = self.aborts.setdefault(gang.attempt_id, asyncio.Event())
        try:
            if remains:
                await self._clear_remains(gang, [group.node for group in attempt.groups])
            self._expect_own_users(attempt)
            master = await _unless(abort, self._assemble(attempt))
            self._report(gang, "gang_ready", urgent=False)
            if attempt.launch.environment is not None:  # on all nodes, before a rank on one waits for the others
                await self._ask_groups(gang, attempt, master, "prepare_group", PREPARE_TIMEOUT_S)
            starts = await self._start_groups(gang, attempt, master)
        except StartFailed as error:
            await self._give_up(gang, attempt, error)
        except Exception as error:  # a fault of ours or of Ray's: held for ever, it would keep its GPUs for ever
            log.exception("starting attempt %s failed", gang.attempt_id)
            await self._give_up(gang, attempt, StartFailed(f"the agent failed: {type(error).__name__}: {error}"))
        else:
            self._report(gang, "started", ranks_started=starts)
            gang.phase = Phase.RUNNING
            log.info("attempt %s started with %d ranks on %s", gang.attempt_id, len(starts), ", ".join(gang.groups))
        finally:
            del self.aborts[gang.attempt_id]

    def abort(self, gang: Gang) -> None:
        gang.aborting = True
        self.aborts.setdefault(gang.attempt_id, asyncio.Event()).set()

    async def _clear_remains(self, gang: Gang, nodes: list[str]) -> None:
        cleared = await self._give_back(gang, nodes)
        unknown = [node for node, is_clear in cleared.items() if not is_clear]
        gang.generations.update(dict.fromkeys(unknown, NO_GENERATION))
        if unknown:
            raise StartFailed(f"node {unknown[0]} is not alive", unknown[0])
        await asyncio.gather(*(self._forget_group(gang.attempt_id, node) for node in nodes))

    def _expect_own_users(self, attempt: DesiredAttempt) -> None:
        """Raises StartFailed where the operator requires them and a node does not give them."""
        for host in (self._host(group.node) for group in attempt.groups):
            if self.require_own_users and not host.own_users:
                raise StartFailed(
                    f"node {host.name} cannot run ranks under their tenant's own user ({host.own_users_problem}), and "
                    "the agent was told to require it",
                    host.name,
                )

    async def _assemble(self, attempt: DesiredAttempt) -> dict[str, Any]:
        """The placement group, and beside it the rendezvous address of group 0."""
        ids = {group.node: self._host(group.node).facts.ray_node_id for group in attempt.groups}
        first = min(attempt.groups, key=lambda group: group.group_rank)
        placed = asyncio.create_task(self.placements.create(attempt, ids, free_timeout_s=FREE_TIMEOUT_S))
        reserved = asyncio.create_task(self._call(first.node, "reserve_rendezvous", attempt.attempt_id))
        try:
            _, master = await asyncio.gather(placed, reserved)
        finally:
            placed.cancel()
            reserved.cancel()
            await asyncio.gather(placed, reserved, return_exceptions=True)
        return master

    async def _start_groups(self, gang: Gang, attempt: DesiredAttempt, master: dict[str, Any]) -> list[RankStart]:
        answers = await self._ask_groups(gang, attempt, master, "start_group", START_TIMEOUT_S)
        for group in attempt.groups:
            gang.groups[group.node] = Group(epoch=gang.epoch, state=GroupState.RUNNING)
        starts = [decode(RankStart, start) for answer in answers for start in answer["ranks"]]
        return sorted(starts, key=lambda start: start.rank)

    async def _ask_groups(
        self, gang: Gang, attempt: DesiredAttempt, master: dict[str, Any], method: str, timeout_s: float
    ) -> list[Any]:
        """All at once; when one fails, or on abort, none is left between not started and started."""
        for group in attempt.groups:
            gang.generations[group.node] = self._host(group.node).generation
        desired = encode(attempt)
        calls = [
            asyncio.create_task(self._call(group.node, method, _order(desired, group, master), timeout_s=timeout_s))
            for group in attempt.groups
        ]
        try:
            return await _unless(self.aborts[gang.attempt_id], _all(calls))
        except Exception:
            nodes = [group.node for group in attempt.groups]
            killing = self._kill_while(gang.attempt_id, nodes, calls)
            await asyncio.gather(self._remove_placement(gang.attempt_id), killing)
            raise

    async def _kill_while(self, attempt_id: str, nodes: list[str], calls: Iterable[asyncio.Task[Any]]) -> None:
        """Kill the groups until no start call is under way: one that returns later would have started ranks unseen."""
        pending = {call for call in calls if not call.done()}
        while pending:
            await asyncio.gather(*(self._try(node, "kill_group", attempt_id) for node in nodes))
            _, pending = await asyncio.wait(pending, timeout=RETRY_SLOWLY_S)
        await asyncio.gather(*calls, return_exceptions=True)

    async def _give_up(self, gang: Gang, attempt: DesiredAttempt, error: StartFailed) -> None:
        """Clear every node that was told to start, then report it: the server frees the GPUs when it hears that.

        Where one died meanwhile nobody can say that nothing runs there: then the server has to lose the node first, and
        the gang stays held with that group lost.
        """
        log.warning("attempt %s could not be started: %s", gang.attempt_id, error)
        cleared = await self._give_back(gang, gang.generations)
        if all(cleared.values()):
            gang.phase = Phase.CLOSING
            await self._forget_placement(gang.attempt_id)
            await self._never_ran(gang, attempt, error)
            return
        for node, is_clear in cleared.items():
            gang.groups[node] = Group(gang.epoch, GroupState.ENDED if is_clear else GroupState.LOST)
        gang.stopping, gang.phase = True, Phase.RUNNING

    async def refuse(
        self, gang: Gang, attempt: DesiredAttempt, *, message: str, node: str | None, remains: bool
    ) -> None:
        """Give up an attempt of which this agent has begun nothing. `remains`: one before it may have, on any node."""
        if remains:
            gang.generations = {group.node: NO_GENERATION for group in attempt.groups}
        await self._give_up(gang, attempt, StartFailed(message, node))

    async def _never_ran(self, gang: Gang, attempt: DesiredAttempt, error: StartFailed) -> None:
        nodes = [group.node for group in attempt.groups]
        why = {"message": str(error), "node": error.node, "permanent": error.permanent}
        await self._finish(gang, nodes, "start_failed", **why)

    # ---------------------------------------------------------------- adopt, stop, close, clear, forget

    async def report_adopted(self, gang: Gang, attempt: DesiredAttempt) -> None:
        """Report what an earlier agent may not have got through: runners answer a repeated start with the same."""
        desired = encode(attempt)
        master = {"host": "", "port": 0}
        calls = [
            self._call(group.node, "start_group", _order(desired, group, master))
            for group in attempt.groups
            if gang.groups[group.node].state not in (GroupState.VANISHED, GroupState.LOST)
        ]
        try:
            answers = await asyncio.gather(*calls)
        except StartFailed as error:
            log.warning("attempt %s: its ranks cannot be reported again: %s", gang.attempt_id, error)
            return
        starts = sorted(
            (decode(RankStart, start) for answer in answers for start in answer["ranks"]), key=lambda start: start.rank
        )
        if len(starts) == attempt.launch.world_size:
            self._report(gang, "gang_ready", at=min(start.started_at for start in starts), urgent=False)
            self._report(gang, "started", at=max(start.started_at for start in starts), ranks_started=starts)

    async def stop(self, gang: Gang, grace_s: float) -> None:
        """SIGTERM to every group, SIGKILL after the grace; asked again of runners that do not answer."""
        log.info("attempt %s is being stopped with %g s of grace", gang.attempt_id, grace_s)
        await asyncio.gather(*(self._stop_group(gang, node, grace_s) for node in gang.groups))

    async def _stop_group(self, gang: Gang, node: str, grace_s: float) -> None:
        while gang.phase is Phase.RUNNING and gang.groups[node].state in (GroupState.RUNNING, GroupState.FAILING):
            if await self._try(node, "stop_group", gang.attempt_id, grace_s):
                return
            await asyncio.sleep(RETRY_S)

    async def keep_stacks(self, gang: Gang) -> None:
        """Have the nodes that do not see it themselves keep what the ranks of a hung gang are doing."""
        unaware = [node for node, group in gang.groups.items() if group.state is GroupState.RUNNING and not group.hung]
        await asyncio.gather(*(self._try(node, "keep_stacks", gang.attempt_id) for node in unaware))

    async def close(self, gang: Gang, attempt: DesiredAttempt) -> None:
        """Every group is over: give the resources back, then report the end.

        A node that did not show its group is cleared first: what a dead agent had ordered may have come up there since.
        """
        vanished = [node for node, group in gang.groups.items() if group.state is GroupState.VANISHED]
        unknown = [node for node, is_clear in (await self._give_back(gang, vanished)).items() if not is_clear]
        if unknown:  # dead by now: the server has to lose it first
            gang.groups.update({node: replace(gang.groups[node], state=GroupState.LOST) for node in unknown})
            gang.phase = Phase.RUNNING
            return
        await self._forget_placement(gang.attempt_id)
        first = gang.first_failed_rank
        await self._finish(
            gang,
            list(gang.groups),
            "ended",
            message=f"the runner of {', '.join(vanished)} died" if vanished else "",
            node=vanished[0] if vanished else None,
            first_failed_rank=first_failed_rank(gang.groups) if first is None else first,
            exits=all_exits(attempt, gang.groups),
        )

    async def clear(self, gang: Gang, nodes: Iterable[str]) -> None:
        """Remove an attempt that must not run, and report `gone` for each node where nothing is left of it."""
        log.warning("attempt %s epoch %d is not wanted: removing it", gang.attempt_id, gang.epoch)
        await self._remove_placement(gang.attempt_id)
        await asyncio.gather(*(self._clear_for_good(gang, node) for node in nodes))
        await self._forget_placement(gang.attempt_id)
        gang.phase = Phase.DONE

    async def _clear_for_good(self, gang: Gang, node: str) -> None:
        """As long as it takes: on a dead node until the node is back and shows nothing of the attempt."""
        while True:
            if await self._clear_group(gang.attempt_id, node):
                break
            await asyncio.sleep(RETRY_SLOWLY_S)
        await self._report(gang, "gone", node=node)
        await self._forget_group(gang.attempt_id, node)

    # ---------------------------------------------------------------- parts

    async def _finish(self, gang: Gang, nodes: Iterable[str], kind: str, **fact: Any) -> None:
        """Report the last fact of an attempt and forget it once the server knows.

        A server that has given the attempt up takes no end of it, and waits to hear that each node is clear of it.
        """
        taken = await self._report(gang, kind, **fact)
        if not taken or not self.is_desired(gang.attempt_id, gang.epoch):
            await asyncio.gather(*(self._report(gang, "gone", node=node) for node in nodes))
        log.info("attempt %s: %s is acknowledged", gang.attempt_id, kind)
        await asyncio.gather(*(self._forget_group(gang.attempt_id, node) for node in nodes))
        gang.phase = Phase.DONE

    async def _give_back(self, gang: Gang, nodes: Iterable[str]) -> dict[str, bool]:
        """Remove the placement group, and see the nodes clear: `_clear_group` of each.

        The group does not wait for them: one may be silent for long, while the server gives the GPUs of the others to
        other jobs. It is not forgotten yet: should this agent die meanwhile, the next one has to clear the nodes too.
        """
        _, cleared = await asyncio.gather(self._remove_placement(gang.attempt_id), self._clear_all(gang, nodes))
        return cleared

    async def _clear_all(self, gang: Gang, nodes: Iterable[str]) -> dict[str, bool]:
        names = list(nodes)
        return dict(
            zip(names, await asyncio.gather(*(self._clear_group(gang.attempt_id, node) for node in names)), strict=True)
        )

    async def _clear_group(self, attempt_id: str, node: str) -> bool:
        """Kill the group and see it gone; False if the node is dead and nobody can tell."""
        said = False
        while True:
            host = self.hosts.get(node)
            if host is None or not host.alive:
                return False
            try:
                if await _killed(host, attempt_id):
                    return True
            except RunnerError as error:
                if not said:
                    log.warning("attempt %s cannot be cleared from node %s yet: %s", attempt_id, node, error)
                said = True
                await asyncio.sleep(RETRY_S)

    async def _forget_group(self, attempt_id: str, node: str) -> None:
        if await self._try(node, "forget_group", attempt_id, timeout_s=FORGET_TIMEOUT_S):
            host = self.hosts.get(node)
            if host is not None and host.table is not None:
                host.table.pop(attempt_id, None)

    async def _remove_placement(self, attempt_id: str) -> None:
        await _until_available(self.placements.remove, attempt_id)

    async def _forget_placement(self, attempt_id: str) -> None:
        await _until_available(self.placements.forget, attempt_id)

    def _host(self, node: str) -> Host:
        host = self.hosts.get(node)
        if host is None or not host.alive:
            raise StartFailed(f"node {node} is not alive", node)
        return host

    async def _call(self, node: str, method: str, *args: Any, timeout_s: float = 15.0) -> Any:
        """Call a runner for a start. Raises StartFailed naming the node."""
        try:
            return await self._host(node).call(method, *args, timeout_s=timeout_s)
        except RunnerRefused as error:
            raise StartFailed(str(error), node, permanent=error.permanent) from error
        except (RunnerGone, RunnerUnavailable) as error:
            raise StartFailed(f"runner of node {node}: {error}", node) from error

    async def _try(self, node: str, method: str, *args: Any, timeout_s: float = 15.0) -> bool:
        host = self.hosts.get(node)
        if host is None or not host.alive:
            return False
        try:
            await host.call(method, *args, timeout_s=timeout_s)
        except RunnerError as error:
            log.warning("%s on node %s: %s", method, node, error)
            return False
        return True

    def _report(
        self, gang: Gang, kind: str, *, at: float | None = None, urgent: bool = True, **fact: Any
    ) -> Awaitable[bool]:
        happened = AttemptFact(
            attempt_id=gang.attempt_id, epoch=gang.epoch, kind=kind, at=time.time() if at is None else at, **fact
        )
        return self.deliver(happened, urgent=urgent)


def _order(desired: dict[str, Any], group: GroupPlacement, master: dict[str, Any]) -> dict[str, Any]:
    return {
        "desired": desired,
        "group_rank": group.group_rank,
        "master_addr": master["host"],
        "master_port": master["port"],
        "hosts_rendezvous": group.group_rank == 0,
    }


async def _until_available(call: Callable[[str], Awaitable[None]], attempt_id: str) -> None:
    said = False
    while True:
        try:
            return await call(attempt_id)
        except PlacementUnavailable as error:
            if not said:
                log.warning("placement group of %s cannot be removed yet: %s", attempt_id, error)
            said = True
            await asyncio.sleep(RETRY_SLOWLY_S)


async def _all(calls: list[asyncio.Task[Any]]) -> list[Any]:
    """The results in order, or the first failure at once; the calls go on when this is cancelled."""
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    for call in done:
        call.result()
    return [call.result() for call in calls]


async def _killed(host: Host, attempt_id: str) -> bool:
    """Kill and look: is nothing of the attempt running there any more? Raises RunnerError."""
    await host.call("kill_group", attempt_id)
    seq, wait_s = -1, 0.0
    deadline_s = time.monotonic() + CLEAR_WAIT_S
    while time.monotonic() < deadline_s:
        facts = await host.call("next_facts", seq, wait_s, timeout_s=wait_s + 15.0)
        states = [row["state"] for row in facts["groups"] if row["attempt_id"] == attempt_id]
        if all(state == GroupState.ENDED for state in states):
            return True
        seq, wait_s = int(facts["seq"]), 1.0
    return False


async def _unless(abort: asyncio.Event, work: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> Any:
    """The result of `work`, or StartFailed as soon as `abort` is set; then the work is cancelled and has ended."""
    task = asyncio.ensure_future(work)
    aborted = asyncio.create_task(abort.wait())
    try:
        await asyncio.wait([task, aborted], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise StartFailed("stopped before it started")
        return task.result()
    finally:
        aborted.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
