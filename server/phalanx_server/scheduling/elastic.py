"""Owns elastic jobs: which replicas one can spare for others, and who grows into what is idle.

Refuses to give a job more than its `max_replicas` or less than its `min_replicas`. What is above the minimum is lent:
whoever waits and is within quota may take it. Idle GPUs go where each buys the most progress, one replica after the
other, and only where that is worth the restart until the next change that is expected anyway. (Marginal gain per GPU is
the rule of Optimus, EuroSys'18, and of AFS, NSDI'21.)
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from phalanx_server.scheduling.consolidate import spot_for
from phalanx_server.scheduling.draft import Book, Draft, Room
from phalanx_server.scheduling.nodes import amounts_of
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.snapshot import Job, PlacementItem, Seat, spread
from phalanx_server.scheduling.speedup import progress
from phalanx_server.scheduling.trial import Piece, Trial
from phalanx_server.scheduling.world import Load, Running, shape_of

# ------------------------------------------------------------------ giving up


def spare_replicas(trial: Trial) -> Iterator[Piece]:
    """The replicas that running elastic jobs have above their minimum, as pieces: the job's own tenant first, then
    whoever loses the least; of one job those first that stand alone on a node."""
    draft, tenant = trial.draft, trial.key.tenant
    world = draft.world
    now, restart_s = world.now, world.policy.restart_s
    lent = [r for r in world.elastic.values() if _has_spare(draft, r)] if world.policy.elastic else []
    for running in sorted(
        lent, key=lambda r: (r.job.tenant != tenant, r.loss(now, restart_s), -(r.job.started_at or 0.0), r.job.id)
    ):
        yield from _parts(draft, running)


def _has_spare(draft: Draft, running: Running) -> bool:
    job = running.job
    if job.min_replicas is None or replicas_of(job) <= job.min_replicas or job.id in draft.disturbed:
        return False
    if not draft.table.ready[running.load.columns].all():
        return False  # it starts anew when it shrinks, and these nodes take nothing new
    return running.may_be_disturbed(draft.world.now, even_protected=draft.even_protected)


def _parts(draft: Draft, running: Running) -> Iterator[Piece]:
    """One replica at a time, or one slice where a node holds whole ones."""
    job, shape = running.job, shape_of(running.job)
    each = slice_of(job)
    parts = (replicas_of(job) - (job.min_replicas or 1)) // each
    on = {node: count // each for node, count in spread(job.placement).items()}
    for node in sorted(on, key=lambda name: (on[name], name)):
        for _ in range(min(parts, on[node])):
            amounts = amounts_of(shape).reshape(3, 1) * each
            demand = shape.demand(running.gpu_type, each)
            load = Load(job.tenant, running.load.account, demand, [draft.table.column[node]], [each], amounts)
            yield Piece(running, load, "", draft.world.expected_end(job), (node, each))
        parts -= min(parts, on[node])


def seat_without(running: Running, given: Sequence[Piece]) -> Seat:
    """Where a job goes on that gives up these parts."""
    left = spread(running.job.placement)
    for piece in given:
        assert piece.spared is not None, "a part of a job says what it is"
        node, replicas = piece.spared
        left[node] -= replicas
    placement = tuple(PlacementItem(node, count) for node, count in sorted(left.items()) if count)
    return Seat(gpu_type=running.gpu_type, placement=placement)


# ------------------------------------------------------------------ growing


@dataclass(slots=True)
class _Growing:
    """An elastic job that could use more replicas. `load`: what it takes with those that it was promised so far."""

    running: Running
    load: Load
    replicas: int
    most: int
    spot: Spot | None = None

    @property
    def job(self) -> Job:
        return self.running.job

    @property
    def step(self) -> int:
        """It grows by whole slices."""
        return slice_of(self.job)

    @property
    def gain_per_gpu(self) -> float:
        faster = progress(self.job, self.replicas + self.step) - progress(self.job, self.replicas)
        return faster / (self.step * max(1, self.job.gpus_per_replica))


def grow(draft: Draft, changes_at: Mapping[str | None, float]) -> None:
    """Let elastic jobs grow into what is idle. `changes_at`: by cluster, when the next end or start is expected."""
    if not draft.world.policy.elastic:
        return
    left_out: set[str] = set()
    while True:
        grown = _hand_out(draft, left_out)
        idle = [g for g in grown if not _is_worth_it(draft, g, changes_at)]
        if not idle:
            break
        left_out.update(g.job.id for g in idle)
    for growing in grown:
        assert growing.spot is not None, "it has grown"
        seat = Seat(gpu_type=growing.running.gpu_type, placement=growing.spot.placement(draft.table))
        draft.make(Room(growing.spot, shrunk=((growing.running, seat),)), None)


def _hand_out(draft: Draft, left_out: set[str]) -> list[_Growing]:
    """Who would get how much, the restarts not counted."""
    book = draft.soon.copy()
    candidates = {
        r.job.id: _Growing(r, r.load, replicas_of(r.job), r.job.max_replicas or 0) for r in _growable(draft, left_out)
    }
    queue = [(-g.gain_per_gpu, id_) for id_, g in candidates.items() if g.replicas + g.step <= g.most]
    heapq.heapify(queue)
    while queue:
        _, id_ = heapq.heappop(queue)
        growing = candidates[id_]
        if (
            growing.gain_per_gpu > 0
            and _gets_one_more(draft, book, growing)
            and growing.replicas + growing.step <= growing.most
        ):
            heapq.heappush(queue, (-growing.gain_per_gpu, id_))
    return [g for _, g in sorted(candidates.items()) if g.spot is not None]


def _growable(draft: Draft, left_out: set[str]) -> Iterator[Running]:
    for running in draft.world.elastic.values():
        job = running.job
        is_free = job.id not in draft.disturbed and job.id not in left_out and running.may_be_disturbed(draft.world.now)
        may_grow = job.max_replicas is not None and replicas_of(job) < job.max_replicas
        if is_free and may_grow and not draft.world.is_lost(running):
            yield running


def _gets_one_more(draft: Draft, book: Book, growing: _Growing) -> bool:
    job, more = growing.job, growing.replicas + growing.step
    book.take(growing.load, -1)
    demand = shape_of(job).demand(growing.running.gpu_type, more)
    spot = None
    if book.use.shortage(job.tenant, demand) is None:
        spot = spot_for(draft, growing.running, [book], replicas=more)
    if spot is None:
        book.take(growing.load)
        return False
    seat = Seat(gpu_type=growing.running.gpu_type, placement=spot.placement(draft.table))
    growing.load, growing.replicas, growing.spot = draft.world.load(job, [seat]), more, spot
    book.take(growing.load)
    return True


def _is_worth_it(draft: Draft, growing: _Growing, changes_at: Mapping[str | None, float]) -> bool:
    """Does it get further until the next expected change, at most its own end, than without the restart?"""
    job, now = growing.job, draft.world.now
    before, after = progress(job, replicas_of(job)), progress(job, growing.replicas)
    cluster = draft.world.nodes[job.placement[0].node].cluster
    lasts_s = min(changes_at.get(cluster, inf), draft.world.expected_end(job)) - now
    if lasts_s == inf:
        return after > before
    return after * (lasts_s - draft.world.policy.restart_s) > before * lasts_s


def slice_of(job: Job) -> int:
    """How many of its replicas stay together: it shrinks and grows by so many."""
    return job.topology.slice.replicas if job.topology is not None and job.topology.slice is not None else 1


def replicas_of(job: Job) -> int:
    """How many replicas it runs with."""
    return sum(item.replicas for item in job.placement)
