"""Machines of a fake cluster: what really runs there, and the runner that tells the server of it.

Owns the physical truth that the invariants look at: which ranks run on which GPUs. A machine can be cut off, its raylet
and its runner can be killed, and a cut-off runner ends its ranks when its fence has run out.
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
KILLED = 9
TERMINATED = 15


@dataclass
class Ranks:
    """One group of an attempt on a machine, from its fork to the end of its last rank."""

    attempt: protocol.DesiredAttempt
    place: protocol.GroupPlacement
    ends_at_s: float  # by itself, with `code`
    code: int
    finished: bool = False
    exits: list[protocol.RankExit] = field(default_factory=list)
    last_report: int = 0  # the newest report that says something of it

    @property
    def runs(self) -> bool:
        return not self.exits

    def end(self, now_s: float, *, code: int | None = None, signal: int | None = None) -> None:
        if self.runs:
            ranks = range(self.place.first_rank, self.place.first_rank + self.place.ranks)
            self.exits = [
                protocol.RankExit(
                    rank=rank, exit_code=code, signal=signal, ended_at=now_s, finished=self.finished and code == 0
                )
                for rank in ranks
            ]

    def shown(self, taken: int) -> Group:
        """As the runner's table says; `taken`: the newest report that the server has."""
        failed = next((end.rank for end in self.exits if end.exit_code != 0), None)
        state = GroupState.RUNNING if self.runs else GroupState.ENDED
        return Group(self.attempt.epoch, state, tuple(self.exits), failed, delivered=self.last_report <= taken)


@dataclass
class Runner:
    """The node runner of one life: its table, and its reports to the server, numbered and kept until they are taken."""

    boot: str
    contact_s: float  # when it last reached the agent or Ray
    table: dict[str, Ranks] = field(default_factory=dict)
    waiting: list[m.NodeReport] = field(default_factory=list)
    seq: int = 0

    @property
    def taken(self) -> int:
        return self.waiting[0].seq - 1 if self.waiting else self.seq

    def shown(self) -> dict[str, Group]:
        return {attempt_id: ranks.shown(self.taken) for attempt_id, ranks in self.table.items()}

    def report(self, now_s: float, marks: list[m.Mark]) -> None:
        """Queue a report of what runs now."""
        running = [ranks for ranks in self.table.values() if ranks.runs]
        refs = [m.AttemptRef(attempt_id=r.attempt.attempt_id, epoch=r.attempt.epoch) for r in running]
        beat = m.Heartbeat(attempts=refs, stats=m.NodeStats(cpu_utilization=0.5, memory_bytes=1 << 30), warm_ready=True)
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
        running = [ranks for ranks in self.table.values() if ranks.runs]
        refs = [m.AttemptRef(attempt_id=r.attempt.attempt_id, epoch=r.attempt.epoch) for r in running]
        oldest = self.waiting[0]
        assert oldest.heartbeat is not None
        return oldest.model_copy(
            update={"sent_at": now_s, "heartbeat": oldest.heartbeat.model_copy(update={"attempts": refs})}
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

    def pass_time(self, now_s: float) -> None:
        """What happens by itself: the raylet comes back, ranks end, the fence runs out."""
        if self.ray_id is None and now_s >= self.back_at_s:
            self.start(now_s)
        if self.runner is None:
            return
        if not self.is_cut(now_s):
            if now_s - self.runner.contact_s >= SEEN_DEAD_AFTER_S + LONGEST_STEP_S:
                return self.kill_raylet(now_s, back_in_s=3.0)  # Ray never takes back a node that it called dead
            self.runner.contact_s = now_s
        cut_off = now_s - self.runner.contact_s >= FENCE_S
        for ranks in self.running():
            if ranks.ends_at_s <= now_s:
                ranks.end(now_s, code=ranks.code)
            elif cut_off:
                ranks.end(now_s, signal=KILLED)

    def fork(self, attempt: protocol.DesiredAttempt, place: protocol.GroupPlacement, now_s: float) -> None:
        """Start a group; starting it again changes nothing. How it will end is drawn now."""
        assert self.runner is not None
        if attempt.attempt_id not in self.runner.table:
            dice = self.dice
            lasts_s = dice.choice([2, 10, 40, 120])
            code = dice.choice([0, 0, 0, 1])
            self.runner.table[attempt.attempt_id] = Ranks(
                attempt, place, now_s + lasts_s, code, finished=dice.random() < 0.3
            )
