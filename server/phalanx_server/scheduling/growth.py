"""Owns who grows: into what is idle, and into what another elastic job has and gains clearly less from.

Refuses to give a job more than its `max_replicas`, and to say how much each should have (`shares`). Idle GPUs go where
each gains the most, one after the other. Growing is a restart: it must be worth that until the next change that is
expected anyway. Who holds more than its share may be shrunk for who holds less, which are two restarts or more: what
is gained must be `CLEARLY` more than what is lost, the restarts counted on both sides. As every such change makes the
same sum larger, passes over an unchanged world come to rest. (Marginal gain per GPU is the rule of Optimus, EuroSys'18,
and of AFS, NSDI'21.)
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from phalanx_server.scheduling.consolidate import spot_for
from phalanx_server.scheduling.draft import Book, Draft, Room
from phalanx_server.scheduling.elastic import has_spare, parts_of, seat_without, slice_of
from phalanx_server.scheduling.nodes import GPUS
from phalanx_server.scheduling.order import least_replicas
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.shares import Stake, fair_shares, stake_of
from phalanx_server.scheduling.snapshot import Job, Seat, replicas_in
from phalanx_server.scheduling.speedup import progress
from phalanx_server.scheduling.world import Load, Running, shape_of

CLEARLY = 2.0
"""So many times what the others lose, a job must gain that grows at their cost."""

Changes = Mapping[str | None, float]
"""By cluster, when the next end or start is expected."""


def grow(draft: Draft, changes_at: Changes) -> None:
    """Let elastic jobs grow into what is idle, then at the cost of those that hold more than their share."""
    if not draft.world.policy.elastic:
        return
    stakes = {r.job.id: _stake(draft, r.job, r.job.placed) for r in draft.world.elastic.values()}
    _grow_into_idle(draft, stakes, changes_at)
    _even_out(draft, stakes, changes_at)


def _stake(draft: Draft, job: Job, replicas: int) -> Stake:
    return stake_of(draft.world, job, replicas, least_replicas(job), slice_of(job))


# ------------------------------------------------------------------ into what is idle


@dataclass(slots=True)
class _Growing:
    """An elastic job that could use more replicas. `load`: what it takes with those that it was promised so far;
    `best`: the fastest of those."""

    running: Running
    stake: Stake
    load: Load
    replicas: int
    best: tuple[int, Spot] | None = None

    @property
    def useful(self) -> int:
        """The number of replicas beyond which it was given some in vain."""
        return self.best[0] if self.best else self.running.job.placed


def _grow_into_idle(draft: Draft, stakes: Mapping[str, Stake], changes_at: Changes) -> None:
    most: dict[str, int] = {}
    while True:
        handed = _hand_out(draft, stakes, most)
        # What a job was given on the way to a size that it did not reach is for others; so is what is not worth it.
        short = {g.running.job.id: g.useful for g in handed if g.replicas != g.useful}
        grown = [(g, *g.best) for g in handed if g.best is not None]
        vain = {g.running.job.id: 0 for g, n, _ in grown if not _is_worth_it(draft, g.running, n, changes_at)}
        if not short and not vain:
            break
        most |= short | vain
    for growing, _, spot in grown:
        draft.make(Room(spot, shrunk=((growing.running, _seat(draft, growing.running, spot)),)), None)


def _hand_out(draft: Draft, stakes: Mapping[str, Stake], most: Mapping[str, int]) -> list[_Growing]:
    """Who would get how much, up to `most`, the restarts not counted."""
    book = draft.soon.copy()
    candidates = {}
    for r in _growable(draft):
        id_, stake = r.job.id, stakes[r.job.id]
        if r.job.placed < most.get(id_, stake.most):
            stake = replace(stake, most=most.get(id_, stake.most))
            candidates[id_] = _Growing(r, stake, r.load, r.job.placed)
    queue = [(-g.stake.gain_per_gpu(g.replicas)[0], id_) for id_, g in candidates.items()]
    heapq.heapify(queue)
    while queue:
        gain, id_ = heapq.heappop(queue)
        growing = candidates[id_]
        if gain < 0 and _gets_one_more(draft, book, growing):
            heapq.heappush(queue, (-growing.stake.gain_per_gpu(growing.replicas)[0], id_))
    return [g for _, g in sorted(candidates.items())]


def _growable(draft: Draft) -> Iterator[Running]:
    for running in draft.world.elastic.values():
        job = running.job
        is_free = job.id not in draft.disturbed and running.may_be_disturbed(draft.world.now)
        may_grow = job.max_replicas is not None and job.placed + slice_of(job) <= job.max_replicas
        if is_free and may_grow and not draft.world.is_lost(running):
            yield running


def _gets_one_more(draft: Draft, book: Book, growing: _Growing) -> bool:
    running, more = growing.running, growing.replicas + growing.stake.step
    if more > growing.stake.most:
        return False
    book.take(growing.load, -1)
    spot = _spot(draft, running, book, more)
    if spot is None:
        book.take(growing.load)
        return False
    growing.load, growing.replicas = draft.world.load(running.job, [_seat(draft, running, spot)]), more
    fastest = growing.best[0] if growing.best else running.job.placed
    if progress(running.job, more) > progress(running.job, fastest):
        growing.best = more, spot
    book.take(growing.load)
    return True


def _spot(draft: Draft, running: Running, book: Book, replicas: int) -> Spot | None:
    """Where it could go on with so many, once it has left where it is."""
    demand = shape_of(running.job).demand(running.gpu_type, replicas)
    if book.use.shortage(running.job.tenant, demand) is not None:
        return None
    return spot_for(draft, running, [book], replicas=replicas)


def _seat(draft: Draft, running: Running, spot: Spot) -> Seat:
    return Seat(gpu_type=running.gpu_type, placement=spot.placement(draft.table))


def _is_worth_it(draft: Draft, running: Running, replicas: int, changes_at: Changes) -> bool:
    """Does it get further until the next expected change, at most its own end, than without the restart?"""
    job, now = running.job, draft.world.now
    before, after = progress(job, job.placed), progress(job, replicas)
    cluster = draft.world.nodes[job.placement[0].node].cluster
    lasts_s = min(changes_at.get(cluster, inf), draft.world.expected_end(job)) - now
    if lasts_s == inf:
        return after > before
    return after * (lasts_s - draft.world.policy.restart_s) > before * lasts_s


# ------------------------------------------------------------------ at the cost of others


@dataclass(frozen=True, slots=True)
class _Change:
    """A job that would go on with another number of replicas, and what that is worth or costs for each GPU."""

    running: Running
    replicas: int
    value: float


_Pool = tuple[str | None, str]
"""A cluster and a GPU type: jobs grow and shrink within one."""


def _pools(draft: Draft) -> dict[_Pool, list[Running]]:
    """The elastic jobs that run on GPUs and are left alone so far; pools in which nobody could grow are left out."""
    pools: dict[_Pool, list[Running]] = {}
    growable: set[_Pool] = set()
    for running in draft.world.elastic.values():
        if running.gpu_type is not None and running.job.id not in draft.disturbed:
            pools.setdefault(_pool_of(draft, running), []).append(running)
    for running in _growable(draft):
        if running.gpu_type is not None:
            growable.add(_pool_of(draft, running))
    return {pool: members for pool, members in pools.items() if pool in growable and len(members) > 1}


def _pool_of(draft: Draft, running: Running) -> _Pool:
    assert running.gpu_type is not None, "it runs on GPUs"
    return draft.world.nodes[running.job.placement[0].node].cluster, running.gpu_type


def _resized(draft: Draft, pool: _Pool) -> Iterator[Stake]:
    """The stakes of those who are being resized or have just been started: nothing of theirs is to be changed, but what
    they hold is theirs."""
    world, decided = draft.world, draft.decided
    seats = [(job, job.next.placement) for job in world.stopping.values() if job.next is not None]
    seats += [(world.jobs[r.job], r.placement) for r in (*decided.resizes, *decided.starts)]
    for job, placement in seats:
        is_elastic = job.min_replicas is not None or job.max_replicas is not None
        node = world.nodes.get(placement[0].node)
        if is_elastic and job.gpus_per_replica and node is not None and (node.cluster, node.gpu_type) == pool:
            yield _stake(draft, job, replicas_in(placement))


def _idle_gpus(draft: Draft, pool: _Pool, columns: Sequence[int]) -> int:
    table = draft.table
    mask = table.of_type(pool[1]) & table.ready & table.in_cluster_of(list(columns))
    return int(draft.soon.free[GPUS].clip(min=0)[mask].sum())


def _even_out(draft: Draft, stakes: Mapping[str, Stake], changes_at: Changes) -> None:
    for pool, members in sorted(_pools(draft).items(), key=repr):
        theirs = [*(stakes[r.job.id] for r in members), *_resized(draft, pool)]
        held = sum(stake.replicas * stake.gpus for stake in theirs)
        shares = fair_shares(theirs, held + _idle_gpus(draft, pool, members[0].load.columns))
        givers = _givers(draft, members, shares, stakes)
        for taker in _takers(draft, members, shares, stakes):
            if givers and _is_worth_it(draft, taker.running, taker.replicas, changes_at):
                givers = _take_over(draft, taker, givers)


def _takers(
    draft: Draft, members: Sequence[Running], shares: Mapping[str, int], stakes: Mapping[str, Stake]
) -> list[_Change]:
    """Who holds less than its share, the one first that gains the most."""
    out = []
    can_grow = {r.job.id for r in _growable(draft)}
    for running in members:
        stake, share = stakes[running.job.id], shares[running.job.id]
        if share > stake.replicas and running.job.id in can_grow:
            gain = stake.worth(stake.replicas, share) - stake.restart_cost(share, draft.world.policy.restart_s)
            if gain > 0:
                out.append(_Change(running, share, gain / ((share - stake.replicas) * stake.gpus)))
    return sorted(out, key=lambda change: (-change.value, change.running.job.id))


def _givers(
    draft: Draft, members: Sequence[Running], shares: Mapping[str, int], stakes: Mapping[str, Stake]
) -> list[_Change]:
    """Who holds more than its share and may shrink, the one first that loses the least."""
    out = []
    for running in members:
        stake, share = stakes[running.job.id], shares[running.job.id]
        if share < stake.replicas and has_spare(draft, running):
            loss = stake.worth(share, stake.replicas) + stake.restart_cost(share, draft.world.policy.restart_s)
            out.append(_Change(running, share, loss / ((stake.replicas - share) * stake.gpus)))
    return sorted(out, key=lambda change: (change.value, change.running.job.id))


def _take_over(draft: Draft, taker: _Change, givers: list[_Change]) -> list[_Change]:
    """Let the taker grow to its share at the cost of as few givers as will do, if that is clearly better. Gives those
    that are left."""
    book = draft.soon.copy()
    book.take(taker.running.load, -1)
    given: list[tuple[Running, Seat]] = []
    for giver in givers:
        if taker.value <= CLEARLY * giver.value:
            break
        seat = _smaller(draft, giver)
        book.take(giver.running.load, -1)
        book.take(draft.world.load(giver.running.job, [seat]))
        given.append((giver.running, seat))
        spot = _spot(draft, taker.running, book, taker.replicas)
        if spot is not None:
            given, spot = _sparing(draft, taker, given, book, spot)
            taken = (taker.running, _seat(draft, taker.running, spot))
            draft.make(Room(spot, shrunk=(*given, taken)), None)
            shrunk = {running.job.id for running, _ in given}
            return [giver for giver in givers if giver.running.job.id not in shrunk]
    return givers


def _sparing(
    draft: Draft, taker: _Change, given: list[tuple[Running, Seat]], book: Book, spot: Spot
) -> tuple[list[tuple[Running, Seat]], Spot]:
    """Without those who need not shrink, tried from the end."""
    for running, seat in reversed(list(given)):
        smaller = draft.world.load(running.job, [seat])
        book.take(smaller, -1)
        book.take(running.load)
        without = _spot(draft, taker.running, book, taker.replicas)
        if without is not None:
            given, spot = [entry for entry in given if entry[0] is not running], without
        else:
            book.take(running.load, -1)
            book.take(smaller)
    return given, spot


def _smaller(draft: Draft, giver: _Change) -> Seat:
    pieces, parts = [], parts_of(draft, giver.running)
    less = giver.running.job.placed - giver.replicas
    while less > 0 and (piece := next(parts, None)) is not None:
        assert piece.spared is not None, "a part of a job says what it is"
        pieces.append(piece)
        less -= piece.spared[1]
    return seat_without(giver.running, pieces)
