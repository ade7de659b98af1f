"""Let running jobs give way as a plan says: be preempted, resized or moved.

Owns the last word on these decisions. Each is checked under the caller's locks: the job is as the pass saw it and runs,
the one that it is for waits as the pass saw it, and both the place that is kept for that one and where it is to go on
itself are open and have room once all that is stopping has stopped. Decisions for one waiting job hold together or not
at all: nobody gives way in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.actions.attempt_change import AttemptChange, StopOrder, write
from phalanx_server.actions.ledger import Ledger, Replicas, asked_of, by_node
from phalanx_server.domain.attempt import AttemptState, StopCause
from phalanx_server.domain.stop import GivingWay, cause_of
from phalanx_server.scheduling.plan import Plan
from phalanx_server.scheduling.snapshot import PlacementItem, Seat
from phalanx_server.store import ids
from phalanx_server.store.attempts import lock_live_attempts
from phalanx_server.store.charges import Amounts, held_by
from phalanx_server.store.seats import dump_seat

_RUNS = frozenset({AttemptState.STARTING, AttemptState.RUNNING})


@dataclass(frozen=True, slots=True)
class Order:
    """One decision of a plan about a running job. `placement`: where it goes on; empty = nowhere."""

    job: UUID
    for_job: UUID | None
    cause: StopCause
    reason: str = ""
    lost_gpu_s: float = 0.0
    placement: tuple[PlacementItem, ...] = ()


def orders_of(plan: Plan) -> list[Order]:
    """The plan's preemptions, resizes and migrations."""
    return [
        *(
            Order(UUID(hex=p.job), _uuid(p.for_job), cause_of(p.reason), p.reason, p.lost_gpu_s)
            for p in plan.preemptions
        ),
        *(Order(UUID(hex=r.job), _uuid(r.for_job), StopCause.RESIZE, placement=r.placement) for r in plan.resizes),
        *(
            Order(UUID(hex=m.job), _uuid(m.for_job), StopCause.MIGRATION, placement=m.placement)
            for m in plan.migrations
        ),
    ]


def _uuid(name: str | None) -> UUID | None:
    return None if name is None else UUID(hex=name)


Kept = Mapping[UUID, Replicas]
"""Where jobs that wait for others to give way will start."""


def kept_of(plan: Plan, orders: Iterable[Order]) -> Kept:
    """What the plan keeps for those that the orders are for."""
    wanted = {order.for_job for order in orders if order.for_job is not None}
    groups = [group for group in plan.hold_groups if group.kept is not None] if wanted else []
    return {
        job_id: by_node(group.kept.placement)
        for group in groups
        if group.kept is not None
        for job in group.jobs
        if (job_id := UUID(hex=job)) in wanted
    }


@dataclass(frozen=True, slots=True)
class Seen:
    """What the pass saw, and what is: versions of jobs by name, and the waiting jobs, locked, by id. `kept`: what the
    pass keeps for those that others give way to."""

    versions: Mapping[str, int]
    running: Mapping[str, int]
    waiting: Mapping[UUID, Row[Any]]
    kept: Kept


@dataclass(frozen=True, slots=True)
class Stop:
    """An order about a live attempt (locked): what that holds, by node, and where it goes on."""

    order: Order
    row: Row[Any]
    held: Mapping[UUID, Amounts]
    next: Replicas


@dataclass(frozen=True, slots=True)
class GaveWay:
    """What became of the orders: `stopped` jobs with why, `dropped` ones with why, and the waiting jobs that nobody
    gives way for after all."""

    stopped: Mapping[str, StopCause]
    dropped: Mapping[str, str]
    in_vain: frozenset[str]


async def give_way(
    conn: AsyncConnection, orders: Sequence[Order], ledger: Ledger, seen: Seen, *, now: datetime
) -> GaveWay:
    """Stop what the orders name, with the grace that each job asked for; jobs and nodes are locked."""
    rows = {row.job_id: row for row in await lock_live_attempts(conn, [order.job for order in orders])}
    held = await held_by(conn, [row.id for row in rows.values()])
    dropped: dict[str, str] = {}
    groups: dict[UUID, list[Stop]] = {}
    for order in orders:
        row = rows.pop(order.job, None)  # once: of two decisions about a job the first counts
        reason = _refusal(order, row, seen)
        if row is None or reason is not None:
            dropped[order.job.hex] = reason or "the job no longer runs"
        else:
            stop = Stop(order, row, held.get(row.id, {}), by_node(order.placement))
            groups.setdefault(order.for_job or order.job, []).append(stop)
    undone = {order.for_job for order in orders if order.job.hex in dropped and order.for_job is not None}
    for job in undone:
        _drop(groups, job, "another decision for the same job no longer holds", dropped)
    undone |= _drop_without_room(groups, ledger, seen, dropped)
    stops = [stop for group in groups.values() for stop in group]
    await write(conn, [_change(stop, ledger, seen, now) for stop in stops], now=now)
    stopped = {stop.order.job.hex: stop.order.cause for stop in stops}
    return GaveWay(stopped, dropped, frozenset(job.hex for job in undone))


def _refusal(order: Order, row: Row[Any] | None, seen: Seen) -> str | None:
    if row is None:
        return "the job no longer runs"
    if row.job_version != seen.running.get(order.job.hex) or row.state not in _RUNS:
        return "the job has changed since the pass looked at it"
    if order.for_job is None:
        return None
    waiting = seen.waiting.get(order.for_job)
    if waiting is None or waiting.version != seen.versions.get(order.for_job.hex) or waiting.held:
        return "the job that it would give way to no longer waits as the pass saw it"
    return None


def _drop(groups: dict[UUID, list[Stop]], group: UUID, why: str, dropped: dict[str, str]) -> None:
    for stop in groups.pop(group, ()):
        dropped[stop.order.job.hex] = why


def _drop_without_room(
    groups: dict[UUID, list[Stop]], ledger: Ledger, seen: Seen, dropped: dict[str, str]
) -> set[UUID]:
    """Drop the groups in which a job is to go on, or the one that waits to start, where it cannot; those of them that
    were for a waiting job. What one group frees another may have counted on, so after each all are looked at again."""
    undone: set[UUID] = set()
    while (found := _first_without_room(groups, ledger, seen)) is not None:
        group, why = found
        undone |= {group} if groups[group][0].order.for_job is not None else set()
        _drop(groups, group, why, dropped)
    return undone


def _first_without_room(groups: Mapping[UUID, Sequence[Stop]], ledger: Ledger, seen: Seen) -> tuple[UUID, str] | None:
    soon = dict(ledger.soon)
    for stop in (stop for group in groups.values() for stop in group):
        for node_id, amounts in stop.held.items():
            if node_id in soon:
                soon[node_id] += amounts
    for name, group in groups.items():
        for replicas, resources in _wanted(name, group, seen):
            why = ledger.closed(replicas)
            if why is not None:
                return name, why
            for node_id, count in replicas.items():
                soon[node_id] -= asked_of(resources, count)
                if soon[node_id].overdrawn:
                    return name, f"{ledger.nodes[node_id].name} will have no room for it"
    return None


def _wanted(name: UUID, group: Sequence[Stop], seen: Seen) -> Iterator[tuple[Replicas, Mapping[str, Any]]]:
    """Where the jobs of a group go on, and where the one that it is for will start; each with what it asks for."""
    for stop in group:
        yield stop.next, stop.row.spec["resources"]
    if name in seen.kept:
        yield seen.kept[name], seen.waiting[name].spec["resources"]


def _change(stop: Stop, ledger: Ledger, seen: Seen, now: datetime) -> AttemptChange:
    order, row = stop.order, stop.row
    seat = _seat(stop, ledger)
    whom, shown = _whom(order, row, seen.waiting)
    words = GivingWay(
        cause=order.cause,
        whom=whom,
        reason=order.reason,
        lost_gpu_s=order.lost_gpu_s,
        replicas=row.replicas,
        next_replicas=sum(stop.next.values()),
        next_nodes=tuple(sorted(ledger.nodes[node_id].name for node_id in stop.next)),
    )
    columns = {"stop_reason": order.reason or None, "stop_for": order.for_job, "next": dump_seat(seat)}
    data = {"reason": order.reason or None, "for": shown, "lost_gpu_s": round(order.lost_gpu_s, 1)}
    if seat is not None:
        data |= {"replicas": words.next_replicas, "nodes": list(words.next_nodes)}
    change = AttemptChange(row, now)
    change.stop(
        order.cause,
        grace_s=row.spec["preemption"]["grace"],
        message=words.message(),
        order=StopOrder(columns, {key: value for key, value in data.items() if value is not None}),
    )
    return change


def _seat(stop: Stop, ledger: Ledger) -> Seat | None:
    if not stop.next:
        return None
    gpu_type = ledger.nodes[next(iter(stop.next))].gpu_type if stop.row.spec["resources"]["gpus_per_replica"] else None
    placement = tuple(PlacementItem(node_id.hex, count) for node_id, count in stop.next.items())
    return Seat(gpu_type=gpu_type, placement=placement)


def _whom(order: Order, row: Row[Any], waiting: Mapping[UUID, Row[Any]]) -> tuple[str | None, str | None]:
    """The job that it is for, in words and by its public id; neither where that belongs to a tenant that those who see
    the victim need not see."""
    if order.for_job is None:
        return None, None
    job = waiting[order.for_job]
    if job.tenant != row.tenant and not job.tenant.startswith(f"{row.tenant}/"):
        return "a job of another tenant", None
    name = ids.encode("job", job.id)
    return f"{job.name} ({name})", name


def nodes_of(orders: Iterable[Order], kept: Kept) -> set[UUID]:
    """Where the orders let jobs go on, and those that they are for start."""
    going_on = {UUID(hex=item.node) for order in orders for item in order.placement}
    return going_on.union(*(replicas.keys() for replicas in kept.values()))


def jobs_of(orders: Iterable[Order]) -> set[UUID]:
    """Those that give way and those that they give way to."""
    return {job for order in orders for job in (order.job, order.for_job) if job is not None}
