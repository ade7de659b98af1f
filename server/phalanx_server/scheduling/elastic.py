"""Owns what an elastic job can spare for others: which replicas, in which order, and where it goes on without them.

Refuses to leave a job less than its `min_replicas`. What is above the minimum is lent: whoever waits and is within
quota may take it.
"""

from collections.abc import Iterator, Sequence

from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.nodes import amounts_of
from phalanx_server.scheduling.snapshot import Job, PlacementItem, Seat, spread
from phalanx_server.scheduling.trial import Piece, Trial
from phalanx_server.scheduling.world import Load, Running, shape_of


def spare_replicas(trial: Trial) -> Iterator[Piece]:
    """The replicas that running elastic jobs have above their minimum, as pieces: the job's own tenant first, then
    whoever loses the least; of one job those first that stand alone on a node."""
    draft, tenant = trial.draft, trial.key.tenant
    world = draft.world
    now, restart_s = world.now, world.policy.restart_s
    lent = [r for r in world.elastic.values() if has_spare(draft, r)] if world.policy.elastic else []
    for running in sorted(
        lent, key=lambda r: (r.job.tenant != tenant, r.loss(now, restart_s), -(r.job.started_at or 0.0), r.job.id)
    ):
        yield from parts_of(draft, running)


def has_spare(draft: Draft, running: Running) -> bool:
    """Does it run with more than its minimum, and may it start anew with fewer?"""
    job = running.job
    if job.min_replicas is None or job.placed <= job.min_replicas or job.id in draft.disturbed:
        return False
    if not draft.table.ready[running.load.columns].all():
        return False  # it starts anew when it shrinks, and these nodes take nothing new
    return running.may_be_disturbed(draft.world.now, even_protected=draft.even_protected)


def parts_of(draft: Draft, running: Running) -> Iterator[Piece]:
    """One replica at a time, or one slice where a node holds whole ones."""
    job, shape = running.job, shape_of(running.job)
    each = slice_of(job)
    parts = (job.placed - (job.min_replicas or 1)) // each
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


def slice_of(job: Job) -> int:
    """How many of its replicas stay together: it shrinks and grows by so many."""
    return job.topology.slice.replicas if job.topology is not None and job.topology.slice is not None else 1
