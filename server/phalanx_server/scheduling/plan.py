"""Owns the plan: everything that one scheduling pass decides, and its JSON form (plan-format).

Refuses to know how it was decided. Jobs that wait for the same cause share one `HoldGroup`, so that a plan about a
hundred thousand waiting jobs stays small; `Plan.holds` spells the groups out, one `Hold` per job.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from phalanx_server.domain.reason import Explanation, HoldReason
from phalanx_server.scheduling.snapshot import PlacementItem, Seat


@dataclass(frozen=True, slots=True)
class Start:
    """A queued job starts, all of its gang at once. `gpu_type` None = a CPU job."""

    job: str
    gpu_type: str | None
    replicas: int
    placement: tuple[PlacementItem, ...]


@dataclass(frozen=True, slots=True)
class Preemption:
    """A running job is stopped for a queued one (or for a maintenance window: `for_job` None)."""

    job: str
    for_job: str | None
    reason: str
    lost_gpu_s: float


@dataclass(frozen=True, slots=True)
class Resize:
    """A running elastic job goes on with another number of replicas."""

    job: str
    for_job: str | None
    replicas: int
    placement: tuple[PlacementItem, ...]


@dataclass(frozen=True, slots=True)
class Migration:
    """A running job goes on elsewhere."""

    job: str
    for_job: str | None
    placement: tuple[PlacementItem, ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """Why one queued job does not start now. `estimated_start` None = nothing known decides it."""

    job: str
    reason: HoldReason
    message: str
    unblocks: tuple[str, ...]
    estimated_start: float | None
    kept: Seat | None


@dataclass(frozen=True, slots=True)
class HoldGroup:
    """Queued jobs, in queue order, that wait for one and the same cause."""

    jobs: Sequence[str]
    explanation: Explanation
    kept: Seat | None = None
    expected_start: float | None = None  # by a look ahead, where the cause itself does not say

    @property
    def estimated_start(self) -> float | None:
        said = self.explanation.estimated_start
        return self.expected_start if said is None else said

    def holds(self) -> Iterator[Hold]:
        """One hold per job. The words are rendered once for all of them."""
        why = self.explanation
        message, unblocks = why.message(), why.unblocks()
        for job in self.jobs:
            yield Hold(job, why.reason, message, unblocks, self.estimated_start, self.kept)


@dataclass(frozen=True)
class Plan:
    """The decisions of one pass, each list in the order in which they were taken."""

    starts: tuple[Start, ...] = ()
    preemptions: tuple[Preemption, ...] = ()
    resizes: tuple[Resize, ...] = ()
    migrations: tuple[Migration, ...] = ()
    hold_groups: tuple[HoldGroup, ...] = ()

    @cached_property
    def holds(self) -> tuple[Hold, ...]:
        """Every queued job that does not start, with why."""
        return tuple(hold for group in self.hold_groups for hold in group.holds())

    @property
    def stops(self) -> bool:
        """Does it stop anybody, for good or to go on differently?"""
        return bool(self.preemptions or self.resizes or self.migrations)

    def and_then(self, later: "Plan") -> "Plan":
        """Both, the later one made on what the first leads to: who waits, and why, is what that one says."""
        return Plan(
            starts=self.starts + later.starts,
            preemptions=self.preemptions + later.preemptions,
            resizes=self.resizes + later.resizes,
            migrations=self.migrations + later.migrations,
            hold_groups=later.hold_groups,
        )

    def hold_of(self, job: str) -> Hold | None:
        """Why this job waits, without spelling out the others; None if the plan does not hold it."""
        groups = (g for g in self.hold_groups if job in g.jobs)
        return next((hold for group in groups for hold in group.holds() if hold.job == job), None)


def dump_plan(plan: Plan) -> dict[str, Any]:
    """The JSON document of a plan."""
    return {
        "starts": [
            {"job": s.job, "gpu_type": s.gpu_type, "replicas": s.replicas, "placement": _items(s.placement)}
            for s in plan.starts
        ],
        "preemptions": [
            {"job": p.job, "for": p.for_job, "reason": p.reason, "lost_gpu_s": p.lost_gpu_s} for p in plan.preemptions
        ],
        "resizes": [
            {"job": r.job, "for": r.for_job, "replicas": r.replicas, "placement": _items(r.placement)}
            for r in plan.resizes
        ],
        "migrations": [{"job": m.job, "for": m.for_job, "placement": _items(m.placement)} for m in plan.migrations],
        "holds": [dump_hold(h) for h in plan.holds],
    }


def dump_hold(hold: Hold) -> dict[str, Any]:
    """The JSON document of one hold; `kept` only where something is kept."""
    document: dict[str, Any] = {
        "job": hold.job,
        "reason": hold.reason.value,
        "message": hold.message,
        "unblocks": list(hold.unblocks),
        "estimated_start": hold.estimated_start,
    }
    if hold.kept is not None:
        document["kept"] = {"gpu_type": hold.kept.gpu_type, "placement": _items(hold.kept.placement)}
    return document


def _items(placement: Sequence[PlacementItem]) -> list[dict[str, Any]]:
    return [{"node": item.node, "replicas": item.replicas} for item in placement]
