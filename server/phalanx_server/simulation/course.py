"""Owns the course of one job through a replay: its attempts, how far it has come, and what the scheduler is told of it.

Refuses to know other jobs and the plan. An attempt after the first spends its first `restart_s` seconds without
progress; a stop is graceful and leaves a checkpoint, so progress until then is kept, and none is made while stopping.
"""

from dataclasses import dataclass, replace

from phalanx_server.scheduling.predict import Expectation, Work
from phalanx_server.scheduling.snapshot import Job, PlacementItem, Seat, replicas_in
from phalanx_server.scheduling.speedup import progress
from phalanx_server.simulation.trace import TraceJob


@dataclass(frozen=True, slots=True)
class Attempt:
    """From when to when a job held which GPUs, and for how much of that it made progress."""

    job: str
    began_at: float
    ended_at: float
    progressed_s: float
    placement: tuple[PlacementItem, ...]

    @property
    def replicas(self) -> int:
        return replicas_in(self.placement)


class Course:
    """One job from its submission to its end. `job` is what the scheduler knows of it."""

    __slots__ = (
        "_left",
        "_progressed_s",
        "_progresses_from",
        "_restart_s",
        "_speed",
        "attempts",
        "ended_at",
        "job",
        "row",
        "said",
        "total_s",
        "turn",
        "work",
    )

    def __init__(self, row: TraceJob, job: Job, work: Work, *, total_s: float, restart_s: float) -> None:
        self.row, self.job, self.work = row, job, work
        self.total_s = total_s
        """Its run time at `job.replicas`."""
        self.attempts: list[Attempt] = []
        self.ended_at: float | None = None
        self.said: Expectation | None = None
        """What was expected when it was submitted."""
        self.turn = 0
        """Counts what happened to it: an event that was foreseen at another turn is out of date."""
        self._left = total_s * self._pace(job.replicas)
        self._progresses_from = 0.0
        self._progressed_s = 0.0
        self._restart_s = restart_s
        self._speed = 1.0

    def _pace(self, replicas: int) -> float:
        return 1.0 if self.job.speedup is None else progress(self.job, replicas)

    @property
    def ends_at(self) -> float:
        """When it will have ended if it goes on as it does."""
        return self._progresses_from + self._left / self._speed

    @property
    def is_elastic(self) -> bool:
        return self.job.speedup is not None

    def attains_at(self, total_s: float) -> float:
        """When it will have run so long, at the pace of `job.replicas`, if it goes on as it does."""
        return self.ends_at - (self.total_s - total_s) * self._pace(self.job.replicas) / self._speed

    def start(
        self, now: float, gpu_type: str | None, placement: tuple[PlacementItem, ...], min_runtime_s: float
    ) -> None:
        """It runs there from now on."""
        replicas = replicas_in(placement)
        was = self.attempts[-1].replicas if self.attempts else replicas
        self._speed = self._pace(replicas)
        self._progresses_from = now + (self._restart_s if self.attempts else 0.0)
        self.turn += 1
        self.job = replace(
            self.job,
            state="running",
            started_at=now,
            placement=placement,
            gpu_type=gpu_type,
            checkpointed_at=now,  # a graceful stop leaves a checkpoint, so nothing from before is at stake
            protected_until=now + min_runtime_s if min_runtime_s else None,
            last_resized_at=now if replicas != was else self.job.last_resized_at,
            kept=None,
            next=None,
            for_job=None,
        )

    def stop(self, now: float, for_job: str | None, following: Seat | None) -> None:
        """It is asked to stop, to go on elsewhere if so told."""
        self._progressed_s = max(0.0, now - self._progresses_from)
        self._left -= self._progressed_s * self._speed
        self.turn += 1
        self.job = replace(self.job, state="stopping", for_job=for_job, next=following)

    def stopped(self, now: float) -> Seat | None:
        """Its attempt is over. It waits, unless it goes on at the seat that is returned."""
        self._close(now)
        following = self.job.next
        self.turn += 1
        self.job = replace(
            self.job,
            state="queued",
            started_at=None,
            placement=(),
            gpu_type=None,
            protected_until=None,
            for_job=None,
            next=None,
            done_s=self.total_s - self._left / self._pace(self.job.replicas),
        )
        return following

    def end(self, now: float) -> None:
        """It has done its work."""
        self._progressed_s = self._left / self._speed
        self._left = 0.0
        self._close(now)
        self.turn += 1
        self.ended_at = now

    def _close(self, now: float) -> None:
        began_at = self.job.started_at
        assert began_at is not None, "it ran"
        self.attempts.append(Attempt(self.job.id, began_at, now, self._progressed_s, self.job.placement))

    def attained_s(self, now: float) -> float:
        """How long it would have run by now at `job.replicas`."""
        if self.job.state != "running":
            return self.job.done_s
        left = self._left - max(0.0, now - self._progresses_from) * self._speed
        return max(0.0, self.total_s - left / self._pace(self.job.replicas))
