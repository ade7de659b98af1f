"""Owns why a queued job waits: the reasons in order of precedence, the facts behind each, and the words for them.

Refuses to know how a pass found out. An explanation holds facts only; words are made when somebody reads them, so a
pass over many jobs renders nothing. Times are seconds since the Unix epoch.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import ClassVar, Self

from phalanx.units import duration_text


class HoldReason(StrEnum):
    """Why a job waits. Where several hold, the first that would still hold if the others were lifted, in this order."""

    IMPOSSIBLE = "impossible"
    HELD = "held"
    DEPENDENCY = "dependency"
    ARRAY = "array"
    NOT_BEFORE = "not_before"
    BACKOFF = "backoff"
    CARBON = "carbon"
    QUOTA = "quota"
    VICTIMS = "victims"
    MAINTENANCE = "maintenance"
    CAPACITY = "capacity"
    FRAGMENTED = "fragmented"
    TOPOLOGY = "topology"
    RESERVED = "reserved"


@dataclass(frozen=True, slots=True)
class Explanation(ABC):
    """One reason with its facts. `reason` is fixed by the class."""

    reason: ClassVar[HoldReason]

    @abstractmethod
    def message(self) -> str:
        """One clause for people: what it waits for, with the figures."""

    @abstractmethod
    def unblocks(self) -> tuple[str, ...]:
        """What would let it start, one clause each."""

    def hiding(self, is_hidden: Callable[[str], bool]) -> Self:
        """The same for a reader who may not know of some jobs that other tenants have: those are only counted."""
        return self

    @property
    def estimated_start(self) -> float | None:
        """When it is expected to start; None where nothing known decides it."""
        return None


@dataclass(frozen=True, slots=True)
class Impossible(Explanation):
    """It would not fit even if nothing else ran. `limits` says why, one clause per GPU type that it accepts."""

    reason = HoldReason.IMPOSSIBLE
    asks: str
    limits: tuple[str, ...]

    def message(self) -> str:
        return f"can never start: needs {self.asks}, but {'; '.join(self.limits)}"

    def unblocks(self) -> tuple[str, ...]:
        return ("the job asks for less", "nodes or quota are added")


@dataclass(frozen=True, slots=True)
class Held(Explanation):
    """Somebody put it on hold."""

    reason = HoldReason.HELD

    def message(self) -> str:
        return "is on hold"

    def unblocks(self) -> tuple[str, ...]:
        return ("the job is released",)


@dataclass(frozen=True, slots=True)
class WaitsForJobs(Explanation):
    """Jobs that must end, or end well, before it."""

    reason = HoldReason.DEPENDENCY
    to_end: tuple[str, ...]
    to_succeed: tuple[str, ...]

    def message(self) -> str:
        return f"waits for {' and '.join(self._conditions('to succeed', 'to end'))}"

    def unblocks(self) -> tuple[str, ...]:
        return (
            *(f"{_known_as(job)} succeeds" for job in self.to_succeed),
            *(f"{_known_as(job)} ends" for job in self.to_end),
        )

    def _conditions(self, succeed: str, end: str) -> list[str]:
        wanted = ((self.to_succeed, succeed), (self.to_end, end))
        return [f"{_some(jobs)} {verb}" for jobs, verb in wanted if jobs]


@dataclass(frozen=True, slots=True)
class ArrayFull(Explanation):
    """As many jobs of its array run as may at once."""

    reason = HoldReason.ARRAY
    array: str
    max_running: int

    def message(self) -> str:
        return f"{self.max_running} jobs of its array run, and no more may at once"

    def unblocks(self) -> tuple[str, ...]:
        return ("a job of the same array ends",)


@dataclass(frozen=True, slots=True)
class NotYet(Explanation):
    """It may not start before a time. `opens_at` counts its other gates of time too, which may open later."""

    until: float
    opens_at: float

    @property
    def estimated_start(self) -> float | None:
        return self.opens_at

    def unblocks(self) -> tuple[str, ...]:
        return (f"it is {_time(self.until)}",)


@dataclass(frozen=True, slots=True)
class NotBefore(NotYet):
    """The job's own earliest time."""

    reason = HoldReason.NOT_BEFORE

    def message(self) -> str:
        return f"may not start before {_time(self.until)}, as was asked for"


@dataclass(frozen=True, slots=True)
class Backoff(NotYet):
    """The pause after a failed or lost attempt."""

    reason = HoldReason.BACKOFF

    def message(self) -> str:
        return f"pauses until {_time(self.until)} after its last attempt"


@dataclass(frozen=True, slots=True)
class Carbon(NotYet):
    """The hour that the carbon or price policy chose."""

    reason = HoldReason.CARBON

    def message(self) -> str:
        return f"waits until {_time(self.until)} for cleaner or cheaper power"


@dataclass(frozen=True, slots=True)
class OverQuota(Explanation):
    """Its tenant may not use that much. `limiter` is the tenant, its own or one above, whose quota is the tightest."""

    reason = HoldReason.QUOTA
    resource: str
    asks: int
    leaves: int
    limiter: str

    def message(self) -> str:
        return f"needs {self.asks} {self.resource}, and the quota of {self.limiter} leaves {self.leaves}"

    def unblocks(self) -> tuple[str, ...]:
        missing = self.asks - self.leaves
        return (
            f"jobs under {self.limiter} release {missing} {self.resource}",
            f"{self.limiter} gets {missing} more {self.resource}",
        )


@dataclass(frozen=True, slots=True)
class WaitsForVictims(Explanation):
    """Jobs are stopping for it, `hidden` others of other tenants too; its place is kept."""

    reason = HoldReason.VICTIMS
    victims: tuple[str, ...]
    starts_at: float
    hidden: int = 0

    def message(self) -> str:
        if not self.victims and not self.hidden:
            return "waits for its kept place to become free"
        return f"waits for {_some(self.victims, self.hidden)} to stop"

    def unblocks(self) -> tuple[str, ...]:
        others = (f"{_others(self.hidden)} {'stops' if self.hidden == 1 else 'stop'}",) if self.hidden else ()
        return (*(f"{_known_as(job)} stops" for job in self.victims), *others)

    def hiding(self, is_hidden: Callable[[str], bool]) -> Self:
        shown = tuple(job for job in self.victims if not is_hidden(job))
        return replace(self, victims=shown, hidden=self.hidden + len(self.victims) - len(shown))

    @property
    def estimated_start(self) -> float | None:
        return self.starts_at


@dataclass(frozen=True, slots=True)
class InMaintenance(Explanation):
    """Nodes that would do have a maintenance window now, or one before the job is sure to have ended."""

    reason = HoldReason.MAINTENANCE
    ends_at: float
    run_limit_s: float | None

    def message(self) -> str:
        limit_s = self.run_limit_s
        left = "without a time limit" if limit_s is None else f"with {duration_text(limit_s)} of its time limit left"
        return f"{left} it would run into a maintenance window that ends at {_time(self.ends_at)}"

    def unblocks(self) -> tuple[str, ...]:
        return (f"maintenance ends at {_time(self.ends_at)}", "the job has a time limit that ends before the window")

    @property
    def estimated_start(self) -> float | None:
        return self.ends_at


@dataclass(frozen=True, slots=True)
class NoRoom(Explanation):
    """Too little is free: `free` of `asks` units of the scarcest resource. Of what is idle, `for_gpus` are not free for
    a CPU job: idle GPUs keep their share."""

    reason = HoldReason.CAPACITY
    gang: str
    resource: str
    asks: int
    free: int
    for_gpus: int = 0

    def message(self) -> str:
        kept = f"; {self.for_gpus} more are kept for idle GPUs" if self.for_gpus else ""
        return f"needs {self.gang}: {self.asks} {self.resource}, of which {self.free} are free{kept}"

    def unblocks(self) -> tuple[str, ...]:
        missing = f"{self.asks - self.free} more {self.resource} become free"
        if not self.for_gpus:
            return (missing,)
        return (missing, "jobs with GPUs start and leave some of their share", "a node without GPUs is added")


@dataclass(frozen=True, slots=True)
class Fragmented(Explanation):
    """Enough is free in total, but on the nodes there is room for `fit` of its replicas only."""

    reason = HoldReason.FRAGMENTED
    gang: str
    replicas: int
    fit: int

    def message(self) -> str:
        return f"needs {self.gang}: enough is free, but in pieces that hold {self.fit} of {self.replicas} replicas"

    def unblocks(self) -> tuple[str, ...]:
        return ("enough becomes free together on one node for each replica",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart(Explanation):
    """Enough is free on nodes, but not within one domain of the level; the cluster is the outermost level.

    `free` of the `asks` units of a resource are free in the domain with the most room, for `fit` of the replicas.
    `slices` (replicas, level): so many replicas at a time stay in one domain of that level. `excluded`: why other
    domains have no node for it at all, and how many.
    """

    reason = HoldReason.TOPOLOGY
    level: str
    resource: str
    asks: int
    free: int
    replicas: int
    fit: int
    slices: tuple[int, str] | None = None
    excluded: tuple[tuple[str, int], ...] = ()

    def message(self) -> str:
        needs = f"needs {self.asks} {self.resource} {_within(self.level)}{in_slices(self.slices)}"
        pieces = f", in pieces that hold {self.fit} of {self.replicas} replicas" if self.free >= self.asks else ""
        return f"{needs}; the best {self.level} has {self.free} free{pieces}{self._exclusions()}"

    def _exclusions(self) -> str:
        if not self.excluded:
            return ""
        total = sum(number for _, number in self.excluded)
        why = ", ".join(f"{number} {reason}" for reason, number in self.excluded)
        return f"; {total} {self.level}{'' if total == 1 else 's'} excluded: {why}"

    def unblocks(self) -> tuple[str, ...]:
        return (f"enough becomes free {_within(self.level)}{in_slices(self.slices)}",)


@dataclass(frozen=True, slots=True)
class Reserved(Explanation):
    """What it needs is free, but kept for jobs ahead of it, `hidden` others of other tenants too."""

    reason = HoldReason.RESERVED
    ahead: tuple[str, ...]
    hidden: int = 0

    def message(self) -> str:
        return f"what it needs is kept for {_some(self.ahead, self.hidden)}"

    def unblocks(self) -> tuple[str, ...]:
        others = f"{'one of ' * (self.hidden > 1)}{_others(self.hidden)} starts and leaves enough"
        named = tuple(f"{_known_as(job)} starts and leaves enough" for job in self.ahead)
        return (*named, others) if self.hidden else named

    def hiding(self, is_hidden: Callable[[str], bool]) -> Self:
        shown = tuple(job for job in self.ahead if not is_hidden(job))
        return replace(self, ahead=shown, hidden=self.hidden + len(self.ahead) - len(shown))


def in_slices(slices: tuple[int, str] | None) -> str:
    """`, each 4 replicas on one node`; nothing without slices."""
    if slices is None:
        return ""
    replicas, level = slices
    return f", each {replicas} replicas {_within(level)}"


def _within(level: str) -> str:
    return f"{'on' if level == 'node' else 'in'} one {level}"


def _some(names: Sequence[str], hidden: int = 0, most: int = 5) -> str:
    parts = [", ".join(map(_known_as, names[:most]))] if names else []
    if len(names) > most:
        parts.append(f"{len(names) - most} more")
    return " and ".join([*parts, _others(hidden)] if hidden else parts)


def _others(number: int) -> str:
    return "1 job of another tenant" if number == 1 else f"{number} jobs of other tenants"


def _known_as(job: str) -> str:
    """A job as people know it: a live pass names it by the 32 hex digits of its id."""
    return f"job_{job}" if _BARE_ID.fullmatch(job) else job


_BARE_ID = re.compile(r"[0-9a-f]{32}")


# What a date can say, with room for rounding.
_EARLIEST_S = datetime(1, 1, 2, tzinfo=UTC).timestamp()
_LATEST_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def date_of(at: float) -> datetime:
    """A time in Unix seconds as a date. Any float has one: beyond what a date can say, and for NaN, the last or first
    that there is."""
    return datetime.fromtimestamp(max(_EARLIEST_S, min(_LATEST_S, at)), UTC)


def _time(at: float) -> str:
    return date_of(at).strftime("%Y-%m-%dT%H:%M:%SZ")
