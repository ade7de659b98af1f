"""Owns whose turn it is within one pass, and who of a class may still have one when another of it was refused.

Refuses to know what is free. (Under fair sharing `fair` says whose turn it is.)
"""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter

from phalanx_server.domain.reason import Explanation
from phalanx_server.scheduling.order import Bid, ClassKey, JobClass, Member, Queue, Rank, rank_of
from phalanx_server.scheduling.snapshot import Job


@dataclass(frozen=True, slots=True)
class Unless:
    """Who of a class may still be tried once one was refused: who ends by a moment, and so is out of the way of what is
    reserved; who stands less far behind its submission, for others yield to who needs less; who was submitted before,
    for it may evict newer ones."""

    ends_by: float = -inf
    behind_s: float = -inf
    submitted_before: float = -inf

    def allows(self, member: Member, now: float) -> bool:
        """May this one be tried?"""
        order_at, submitted_at, _, run_s = member
        return (
            now + run_s <= self.ends_by
            or order_at - submitted_at < self.behind_s
            or submitted_at < self.submitted_before
        )


NOBODY = Unless()


@dataclass(slots=True)
class Turn:
    """A class within one pass; `at` is the member whose turn it is, `number` the class's own in `Turns`."""

    group: JobClass
    members: Sequence[Member]
    number: int = 0
    at: int = 0
    is_deferred: bool = False
    whys: list[tuple[int, Explanation]] = field(default_factory=list)
    """From which member on, and why, those wait that do not start."""
    settled: set[str] | None = None
    """The members that start, or wait for a place that is kept for them."""
    has_reserved: bool = False
    """Is a start reserved for any of them?"""
    unless: Unless = NOBODY
    """Who of those that wait may be tried all the same."""

    @property
    def key(self) -> ClassKey:
        return self.group.key

    @property
    def member(self) -> Member:
        return self.members[self.at]

    @property
    def bid(self) -> Bid:
        """The member whose turn it is."""
        order_at, submitted_at, job, run_s = self.members[self.at]
        return Bid(self.group.key, job, submitted_at, run_s, order_at)

    @property
    def rank(self) -> Rank:
        """Where the member whose turn it is stands in the queue, apart from borrowing."""
        is_head = self.at == 0 and self.members is self.group.members
        return self.group.rank if is_head else rank_of(self.group.key, self.member)

    def settle(self) -> None:
        """This member is served."""
        if self.settled is None:
            self.settled = set()
        self.settled.add(self.members[self.at].id)

    @property
    def is_settled(self) -> bool:
        """Is the member whose turn it is served?"""
        return self.settled is not None and self.members[self.at].id in self.settled

    def hold(self, why: Explanation, unless: Unless = NOBODY) -> None:
        """This member and those after it wait, with exceptions."""
        self.whys.append((self.at, why))
        self.unless = unless

    def may_be_tried(self, now: float) -> bool:
        """Was nobody of the class refused so far, or nothing that goes for this member?"""
        return not self.whys or self.unless.allows(self.members[self.at], now)

    def skip_tried(self, now: float) -> bool:
        """Go on to the next member that may be tried; False if there is none."""
        if self.unless is NOBODY:
            return False
        allows = self.unless.allows
        for at in range(self.at + 1, len(self.members)):
            if allows(self.members[at], now):
                self.at = at
                return True
        return False

    def waiting(self) -> Iterator[tuple[Rank, Explanation, Sequence[str]]]:
        """Who waits, and why: (where the first of them stands, why, their ids)."""
        ends = [*(at for at, _ in self.whys[1:]), len(self.members)]
        for (start, why), end in zip(self.whys, ends, strict=False):
            if self.settled is None and end - start == len(self.group.members):
                yield self.group.rank, why, self.group.ids
                continue
            places = [m for m in self.members[start:end] if self.settled is None or m.id not in self.settled]
            if places:
                yield rank_of(self.key, places[0]), why, [m.id for m in places]


def turns_of(queue: Queue, settled: Collection[Job]) -> list[Turn]:
    """The turns of all classes in the order of the queue, leaving out the jobs that are settled already."""
    done = {job.id for job in settled}
    touched = {queue.key_of(job) for job in settled}
    turns = []
    for group in queue.classes():
        if not touched or group.key not in touched:
            turns.append(Turn(group, group.members))
        elif members := [m for m in group.members if m.id not in done]:
            turns.append(Turn(group, members))
    if touched:
        turns.sort(key=attrgetter("rank"))
    return turns


class Turns:
    """Whose turn it is: one entry per class, given in the order of the queue. Whoever is given a turn says what became
    of it: `again`, `defer`, `return_to`, or nothing, and then the class is out. (Under fair sharing: `fair.FairTurns`.)
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        self._turns = list(turns)
        for i, turn in enumerate(self._turns):
            turn.number = i
        self._deferred: list[Turn] = []
        self._again: list[tuple[Rank, int, Turn]] = []

    def __iter__(self) -> Iterator[Turn]:
        """Each next turn, for as long as there are any: first of those that stay within nominal."""
        yield from self._in_order(self._turns)
        yield from self._in_order(sorted(self._deferred, key=attrgetter("rank")))

    def _in_order(self, turns: Iterable[Turn]) -> Iterator[Turn]:
        """Those given, and between them whoever comes again."""
        for turn in turns:
            while self._again and self._again[0][0] < turn.rank:
                yield heapq.heappop(self._again)[-1]
            yield turn
        while self._again:
            yield heapq.heappop(self._again)[-1]

    def again(self, turn: Turn) -> None:
        """Its member is done with: the class comes again with the next one, if there is one."""
        turn.at += 1
        if turn.at < len(turn.members):
            self.return_to(turn)

    def defer(self, turn: Turn) -> None:
        """It borrows: the class comes again after all that stay within nominal."""
        turn.is_deferred = True
        self._deferred.append(turn)

    def return_to(self, turn: Turn) -> None:
        """The class comes again with the member at which it stands."""
        heapq.heappush(self._again, (turn.rank, turn.number, turn))
