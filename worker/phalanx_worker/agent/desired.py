"""What to do next: the server's desired set against what the agent holds and what its nodes show, as plain steps.

Pure: no Ray, no network, no clock of its own. Owns the rules of reconciling (what is started, adopted, stopped, closed,
cleared away); refuses to know how any of it is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from phalanx.units import duration_text

from phalanx_worker.protocol import DesiredAttempt, ProfileRequest, RankExit

FAILURE_GRACE_S = 5.0  # for the rest of a gang when one of its ranks has failed
READY_DEADLINE_S = 30.0  # for the runners of a new attempt's nodes to show up
DELIVERY_WAIT_S = 30.0  # for what ended ranks left behind to reach a server that is there


class GroupState(StrEnum):
    """Of one group on its node. The first four are the runner's words."""

    PREPARING = "preparing"  # no rank was started yet: it is being prepared, or waits prepared for the other nodes
    RUNNING = "running"
    FAILING = "failing"  # a rank failed, others still run
    ENDED = "ended"
    VANISHED = "vanished"  # surely gone, but nobody saw how: its runner died
    LOST = "lost"  # its node is dead to the cluster; the ranks may live on


@dataclass(frozen=True)
class Group:
    """All ranks of one attempt on one node, as last heard of."""

    epoch: int
    state: GroupState
    exits: tuple[RankExit, ...] = ()
    first_failed_rank: int | None = None
    delivered: bool = True  # once over: its logs and marks have reached the server, as far as its runner has them
    hung: bool = False  # it takes no step any more

    @property
    def over(self) -> bool:
        return self.state in (GroupState.ENDED, GroupState.VANISHED)

    @property
    def failed(self) -> bool:
        if self.state in (GroupState.FAILING, GroupState.VANISHED) or self.first_failed_rank is not None:
            return True
        return any(end.exit_code != 0 for end in self.exits)


class Phase(StrEnum):
    """Of an attempt that the agent holds. Only RUNNING is judged here; the others are under way on their own."""

    STARTING = "starting"
    RUNNING = "running"
    CLOSING = "closing"  # every group is over: remove the placement group, report the end
    CLEARING = "clearing"  # not desired: kill, remove, report `gone`
    DONE = "done"  # its end is acknowledged; remembered until the server no longer wants it


@dataclass
class Gang:
    """An attempt that the agent holds. `attempt` is None for a stranger: what it was meant to be is not known here."""

    attempt_id: str
    epoch: int
    phase: Phase
    attempt: DesiredAttempt | None = None
    groups: dict[str, Group] = field(default_factory=dict)  # by node; empty while it is starting
    generations: dict[str, int] = field(default_factory=dict)  # by node: which of its runners has the group
    stopping: bool = False  # SIGTERM is on its way to every group
    aborting: bool = False  # its start is being given up
    profiles: set[str] = field(default_factory=set)  # that were asked for
    first_failed_rank: int | None = None  # as seen when it failed: later every rank has ended somehow
    hung: bool = False  # and the nodes that do not see it were told
    over_at_answered_s: float | None = None  # `World.answered_s` when every group was first seen to be over

    @property
    def over(self) -> bool:
        return all(group.over for group in self.groups.values())


@dataclass(frozen=True)
class World:
    """All that the rules look at. Times are of one monotonic clock."""

    now_s: float
    desired: Mapping[str, DesiredAttempt]
    desired_since_s: Mapping[str, float]
    gangs: Mapping[str, Gang]
    living: frozenset[str]  # nodes
    tables: Mapping[str, Mapping[str, Group]]  # node -> attempt -> group, of every node whose runner has answered
    placement_groups: frozenset[str]  # attempts that have one in Ray, or had and may not be cleared away
    answered_s: float  # for how long the server has been there so far; stands still while it is away


@dataclass(frozen=True)
class Start:
    attempt: DesiredAttempt
    remains: bool  # an earlier agent had begun to start it: clear first


@dataclass(frozen=True)
class Adopt:
    attempt: DesiredAttempt
    groups: Mapping[str, Group]


@dataclass(frozen=True)
class Refuse:
    """Report that the attempt never ran."""

    attempt: DesiredAttempt
    message: str
    node: str | None = None
    remains: bool = False  # an earlier agent had begun to start it: clear first, the report frees its GPUs


@dataclass(frozen=True)
class Stop:
    attempt_id: str
    grace_s: float


@dataclass(frozen=True)
class Profile:
    attempt_id: str
    request: ProfileRequest


@dataclass(frozen=True)
class Abort:
    attempt_id: str


@dataclass(frozen=True)
class Close:
    attempt_id: str


@dataclass(frozen=True)
class Clear:
    """Remove what is left of an attempt that must not run, wherever it is."""

    attempt_id: str
    epoch: int
    nodes: frozenset[str]


@dataclass(frozen=True)
class Forget:
    attempt_id: str


Step = Start | Adopt | Refuse | Stop | Profile | Abort | Close | Clear | Forget


def reconcile(world: World) -> list[Step]:
    """The steps that bring the cluster closer to what is desired; none for what is already under way."""
    steps: list[Step] = []
    for gang in world.gangs.values():
        steps += _held(gang, _wanted(gang, world.desired), world)
    for attempt_id, attempt in world.desired.items():
        if attempt_id not in world.gangs:
            steps += _new(attempt, world)
    steps += _strangers(world)
    return steps


def _wanted(gang: Gang, desired: Mapping[str, DesiredAttempt]) -> DesiredAttempt | None:
    attempt = desired.get(gang.attempt_id)
    return attempt if attempt is not None and attempt.epoch == gang.epoch else None


def _held(gang: Gang, wanted: DesiredAttempt | None, world: World) -> Iterator[Step]:
    if gang.phase is Phase.STARTING:
        if (wanted is None or wanted.action == "stop") and not gang.aborting:
            yield Abort(gang.attempt_id)
    elif gang.phase is Phase.DONE:
        if wanted is None:
            yield Forget(gang.attempt_id)
    elif gang.phase is Phase.RUNNING:
        yield from _running(gang, wanted, world)


def _running(gang: Gang, wanted: DesiredAttempt | None, world: World) -> Iterator[Step]:
    if wanted is None:
        yield Clear(gang.attempt_id, gang.epoch, frozenset(gang.groups))
    elif gang.over:
        if _is_told(gang, world):
            yield Close(gang.attempt_id)
    elif gang.stopping:
        return
    elif any(group.failed for group in gang.groups.values()):
        yield Stop(gang.attempt_id, FAILURE_GRACE_S)
    elif wanted.action == "stop":
        yield Stop(gang.attempt_id, wanted.grace_s)
    else:
        yield from (Profile(gang.attempt_id, each) for each in wanted.profiles if each.profile_id not in gang.profiles)


def _is_told(gang: Gang, world: World) -> bool:
    """Whether the server knows what the ranks left behind, or has had its time to hear it.

    The end must not come before the last checkpoint: the next attempt would start from an older one.
    """
    if all(group.delivered for group in gang.groups.values()):
        return True
    since_s = gang.over_at_answered_s
    return since_s is not None and world.answered_s - since_s > DELIVERY_WAIT_S


def _new(attempt: DesiredAttempt, world: World) -> Iterator[Step]:
    """An attempt that this agent does not hold: new, or begun by an agent before it."""
    nodes = [group.node for group in attempt.groups]
    shown = {node: table[attempt.attempt_id] for node, table in world.tables.items() if attempt.attempt_id in table}
    seen = {node: group for node, group in shown.items() if group.state is not GroupState.PREPARING}
    starting = len(seen) < len(shown)  # ranks may come up there yet, though nobody waits for them any more
    remains = bool(shown) or attempt.attempt_id in world.placement_groups
    stale = [group.epoch for group in shown.values() if group.epoch != attempt.epoch]
    silent = [node for node in nodes if node in world.living and node not in world.tables]
    half = not starting and (bool(silent) or attempt.action == "stop")  # what is to be seen will do
    overdue = world.now_s - world.desired_since_s.get(attempt.attempt_id, world.now_s) > READY_DEADLINE_S
    if stale:
        yield Clear(attempt.attempt_id, stale[0], frozenset(shown))
    elif silent and not overdue:
        return
    elif seen and (attempt.started or len(seen) == len(nodes) or half):
        yield Adopt(attempt, seen)
    elif not world.living.issuperset(nodes):
        return  # nobody can say that nothing was started on the dead node: the server has to lose it first
    elif silent and not attempt.started:
        message = f"the runner of node {silent[0]} did not answer within {duration_text(READY_DEADLINE_S)}"
        yield Refuse(attempt, message, silent[0], remains=remains)
    elif not silent:
        yield _beginning(attempt, remains=remains)


def _beginning(attempt: DesiredAttempt, *, remains: bool) -> Step:
    """Of an attempt that no node shows whole. `remains`: an agent before this one died while it was starting it."""
    if attempt.started:
        return Adopt(attempt, {})  # its ranks are gone and nobody saw how
    if attempt.action == "stop":
        return Refuse(attempt, "stopped before it started", remains=remains)
    return Start(attempt, remains=remains)


def _strangers(world: World) -> Iterator[Step]:
    """What is on the nodes, or has a placement group, but is neither desired nor held."""
    found: dict[str, dict[str, Group]] = {}
    for node, table in world.tables.items():
        for attempt_id, group in table.items():
            found.setdefault(attempt_id, {})[node] = group
    for attempt_id in world.placement_groups:
        found.setdefault(attempt_id, {})
    for attempt_id, groups in found.items():
        if attempt_id not in world.desired and attempt_id not in world.gangs:
            epoch = max((group.epoch for group in groups.values()), default=0)
            yield Clear(attempt_id, epoch, frozenset(groups))


def first_failed_rank(groups: Mapping[str, Group]) -> int | None:
    """The rank whose failure came first, by the nodes' own clocks. Of a gang that was ended because it hung, what the
    node says that ended it: the ranks of others failed for that."""
    ended = {node: group for node, group in groups.items() if any(end.fault == "hang" for end in group.exits)}
    groups = ended or groups
    by_rank = {end.rank: end for group in groups.values() for end in group.exits}
    ranks = [group.first_failed_rank for group in groups.values() if group.first_failed_rank is not None]

    def ended_at(rank: int) -> float:
        end = by_rank.get(rank)
        return end.ended_at if end is not None and end.ended_at is not None else float("inf")

    return min(ranks, key=ended_at, default=None)


def all_exits(attempt: DesiredAttempt, groups: Mapping[str, Group]) -> list[RankExit]:
    """One exit for each rank of the attempt; a rank whose end nobody saw has neither code nor signal."""
    seen = {end.rank: end for group in groups.values() for end in group.exits}
    ranks = [rank for group in attempt.groups for rank in group.all_ranks]
    return [seen.get(rank) or RankExit(rank=rank) for rank in ranks]
