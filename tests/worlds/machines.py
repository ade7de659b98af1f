"""Machines of a fake cluster: what really runs there, and the runner that tells the server of it.

Owns the physical truth that the invariants look at: which ranks run on which GPUs, what is prepared for ranks or being
started, what of theirs is collected. A machine can be cut off, its raylet and its runner can be killed, and a cut-off
runner ends its ranks when its fence has run out.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

from phalanx_server.domain import messages as m
from phalanx_worker import protocol
from phalanx_worker.agent.desired import Group, GroupState

FENCE_S = 60.0
SEEN_DEAD_AFTER_S = 5.0  # how long Ray takes to call a cut-off node dead
LONGEST_STEP_S = 5.0  # of the world: nothing passes between two looks
COLLECT_S = 5.0  # at least, for the outputs of a group that is being stopped
FOR_NOW, FOR_GOOD = "no mirror answers", "there is no such package, for good"  # why a preparation fails
KILLED = 9
TERMINATED = 15


@dataclass
class Preparation:
    """An environment on a machine: built by `ready_at_s`, or found then to be `wrong`; kept until the ranks start."""

    attempt: protocol.DesiredAttempt
    ready_at_s: float
    wrong: str = ""


@dataclass
class Starting:
    """A group whose ranks come up at `ready_at_s`, whether or not the agent that ordered it still lives."""

    attempt: protocol.DesiredAttempt
    place: protocol.GroupPlacement
    ready_at_s: float


@dataclass
class Ranks:
    """One group of an attempt on a machine, from its fork until its outputs, if it leaves any, are collected."""

    attempt: protocol.DesiredAttempt
    place: protocol.GroupPlacement
    ends_at_s: float  # by itself or by a stop, with `code` or `signal`
    code: int | None
    signal: int | None = None
    finished: bool = False
    collects_s: float = 0.0  # what it leaves takes so long
    exits: list[protocol.RankExit] = field(default_factory=list)
    first_failed_rank: int | None = None
    stopping: bool = False
    stop_at_s: float | None = None  # the grace of a stop is over
    collected_at_s: float | None = None  # no rank runs any more, and then nothing is left
    over: bool = False
    last_report: int = 0  # the newest report that says something of it

    @property
    def runs(self) -> bool:
        return not self.exits

    def end(self, now_s: float, *, code: int | None = None, signal: int | None = None) -> None:
        """No rank runs any more; what they left is collected, within the grace where they were stopped."""
        if not self.runs:
            return
        ranks = range(self.place.first_rank, self.place.first_rank + self.place.ranks)
        finished = self.finished and code == 0
        self.exits = [
            protocol.RankExit(rank, code, signal, now_s, finished=finished, before_stop=not self.stopping)
            for rank in ranks
        ]
        if code != 0 and not self.stopping:
            self.first_failed_rank = self.place.first_rank
        self.collected_at_s = now_s + self.collects_s
        if self.stop_at_s is not None:
            self._cut(max(self.stop_at_s, now_s + COLLECT_S))
        self.pass_time(now_s)

    def stop(self, now_s: float, grace_s: float, dice: random.Random) -> None:
        """They take their time within the grace; some save and exit with 0."""
        self.stopping = True
        if self.first_failed_rank is None:
            self.stop_at_s = now_s + grace_s
            if self.collected_at_s is not None:
                self._cut(max(self.stop_at_s, self.exits[0].ended_at + COLLECT_S))  # type: ignore[operator]
        ends_at_s = now_s + dice.choice([0.0, 1.0, grace_s])
        clean = dice.random() < 0.5
        if ends_at_s < self.ends_at_s:
            self.ends_at_s, self.code, self.signal = ends_at_s, 0 if clean else None, None if clean else TERMINATED

    def kill(self, now_s: float) -> None:
        """By whoever wants nothing more of it."""
        self.stopping = True
        self.end(now_s, signal=KILLED)
        self._cut(now_s)
        self.pass_time(now_s)

    def pass_time(self, now_s: float) -> None:
        if self.runs and self.ends_at_s <= now_s:
            self.end(now_s, code=self.code, signal=self.signal)
        if self.collected_at_s is not None and self.collected_at_s <= now_s:
            self.over = True

    def _cut(self, until_s: float) -> None:
        assert self.collected_at_s is not None
        self.collected_at_s = min(self.collected_at_s, until_s)

    def shown(self, taken: int) -> Group:
        """As the runner's table says; `taken`: the newest report that the server has."""
        state = GroupState.RUNNING if self.first_failed_rank is None else GroupState.FAILING
        return Group(
            self.attempt.epoch,
            GroupState.ENDED if self.over else state,
            tuple(self.exits),
            self.first_failed_rank,
            delivered=self.over and self.last_report <= taken,
        )


@dataclass
class Runner:
    """The node runner of one life: its table, and its reports to the server, numbered and kept until they are taken."""

    boot: str
    contact_s: float  # when it last reached the agent or Ray
    table: dict[str, Ranks] = field(default_factory=dict)
    prepared: dict[str, Preparation] = field(default_factory=dict)
    starting: dict[str, Starting] = field(default_factory=dict)
    waiting: list[m.NodeReport] = field(default_factory=list)
    seq: int = 0

    @property
    def taken(self) -> int:
        return self.waiting[0].seq - 1 if self.waiting else self.seq

    def shown(self) -> dict[str, Group]:
        without_ranks = self.prepared | self.starting
        preparing = {
            attempt_id: Group(each.attempt.epoch, GroupState.PREPARING) for attempt_id, each in without_ranks.items()
        }
        return preparing | {attempt_id: ranks.shown(self.taken) for attempt_id, ranks in self.table.items()}

    def kill(self, attempt_id: str, now_s: float) -> None:
        self.prepared.pop(attempt_id, None)
        self.starting.pop(attempt_id, None)
        if attempt_id in self.table:
            self.table[attempt_id].kill(now_s)

    def forget(self, attempt_id: str) -> None:
        self.prepared.pop(attempt_id, None)
        self.starting.pop(attempt_id, None)
        self.table.pop(attempt_id, None)

    def present(self) -> list[m.AttemptRef]:
        """What has ranks, leaves outputs, or is prepared or started to have ranks."""
        attempts = [
            *(each.attempt for each in (self.prepared | self.starting).values()),
            *(ranks.attempt for ranks in self.table.values() if not ranks.over),
        ]
        return [m.AttemptRef(attempt_id=each.attempt_id, epoch=each.epoch) for each in attempts]

    def report(self, now_s: float, marks: list[m.Mark]) -> None:
        """Queue a report of what is there now."""
        beat = m.Heartbeat(
            attempts=self.present(), stats=m.NodeStats(cpu_utilization=0.5, memory_bytes=1 << 30), warm_ready=True
        )
        if self.waiting and not marks:
            return  # a heartbeat is told with the next report that gets through
        self.seq += 1
        for mark in marks:
            self.table[mark.attempt_id].last_report = self.seq
        self.waiting.append(m.NodeReport(boot=self.boot, seq=self.seq, sent_at=now_s, heartbeat=beat, marks=marks))

    def sent(self, now_s: float) -> m.NodeReport | None:
        """The oldest report that was not taken yet, with the heartbeat of now."""
        if not self.waiting:
            return None
        oldest = self.waiting[0]
        assert oldest.heartbeat is not None
        return oldest.model_copy(
            update={"sent_at": now_s, "heartbeat": oldest.heartbeat.model_copy(update={"attempts": self.present()})}
        )


@dataclass
class Machine:
    """`ray_id` is None while its raylet is dead; `cut_until_s`: it reaches neither agent, Ray nor server before;
    `mute_until_s`: it does not reach the server before, though it reaches its cluster."""

    name: str
    gpus: int
    dice: random.Random
    ray_id: str | None = None
    runner: Runner | None = None
    cut_until_s: float = 0.0
    mute_until_s: float = 0.0
    back_at_s: float = 0.0
    lives: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def start(self, now_s: float) -> None:
        """Its raylet starts, and the agent's runner on it."""
        life = next(self.lives)
        self.ray_id = f"ray-{self.name}-{life}"
        self.new_runner(now_s)

    def new_runner(self, now_s: float) -> None:
        self.runner = Runner(boot=f"boot-{self.name}-{next(self.lives)}", contact_s=now_s)

    def is_cut(self, now_s: float) -> bool:
        return now_s < self.cut_until_s

    def kill_runner(self, now_s: float) -> None:
        """Its ranks die with it, and nobody sees how; a new one takes its place."""
        self.new_runner(now_s)

    def kill_raylet(self, now_s: float, back_in_s: float) -> None:
        self.ray_id = self.runner = None
        self.back_at_s = now_s + back_in_s

    def running(self) -> list[Ranks]:
        return [ranks for ranks in self.runner.table.values() if ranks.runs] if self.runner else []

    def collecting(self) -> list[Ranks]:
        return [each for each in self.runner.table.values() if not each.runs and not each.over] if self.runner else []

    def starting(self) -> list[Starting]:
        return list(self.runner.starting.values()) if self.runner else []

    def pass_time(self, now_s: float) -> None:
        """What happens by itself: the raylet comes back, ranks come up and end, outputs are collected, the fence runs
        out."""
        if self.ray_id is None and now_s >= self.back_at_s:
            self.start(now_s)
        if self.runner is None:
            return
        if not self.is_cut(now_s):
            if now_s - self.runner.contact_s >= SEEN_DEAD_AFTER_S + LONGEST_STEP_S:
                return self.kill_raylet(now_s, back_in_s=3.0)  # Ray never takes back a node that it called dead
            self.runner.contact_s = now_s
        cut_off = now_s - self.runner.contact_s >= FENCE_S
        if cut_off:
            self.runner.starting.clear()  # behind its fence nothing starts
        for each in self.starting():
            if each.ready_at_s <= now_s:
                self._fork(each)
        for ranks in [*self.running(), *self.collecting()]:
            ranks.pass_time(now_s)
            if cut_off:
                ranks.kill(now_s)

    def prepare(self, attempt: protocol.DesiredAttempt, now_s: float) -> None:
        """Begin to build its environment. Whether that will do is drawn now."""
        assert self.runner is not None
        wrong = self.dice.choice(["", "", "", "", "", FOR_NOW, FOR_GOOD])
        ready_at_s = now_s + self.dice.choice([0.0, 3.0, 15.0, 60.0])
        self.runner.prepared[attempt.attempt_id] = Preparation(attempt, ready_at_s, wrong)

    def start_group(self, attempt: protocol.DesiredAttempt, place: protocol.GroupPlacement, now_s: float) -> None:
        """Start a group; starting it again changes nothing. Some must fetch their code first, which takes a while."""
        assert self.runner is not None
        if attempt.attempt_id not in self.runner.table and attempt.attempt_id not in self.runner.starting:
            takes_s = self.dice.choice([0.0, 0.0, 0.0, 0.0, 2.0, 5.0, 15.0])
            self.runner.prepared.pop(attempt.attempt_id, None)
            self.runner.starting[attempt.attempt_id] = starting = Starting(attempt, place, now_s + takes_s)
            if not takes_s:
                self._fork(starting)

    def _fork(self, starting: Starting) -> None:
        """Its ranks come up. How they will end is drawn now."""
        assert self.runner is not None
        dice, attempt = self.dice, starting.attempt
        lasts_s = dice.choice([2, 10, 40, 120])
        code = dice.choice([0, 0, 0, 1])
        finished = dice.random() < 0.3
        collects_s = dice.choice([0.0, 2.0, 15.0, 60.0]) if attempt.launch.outputs else 0.0
        del self.runner.starting[attempt.attempt_id]
        self.runner.table[attempt.attempt_id] = Ranks(
            attempt, starting.place, starting.ready_at_s + lasts_s, code, finished=finished, collects_s=collects_s
        )
