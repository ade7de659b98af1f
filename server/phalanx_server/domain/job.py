"""A job's life: its states, the legal transitions as data, and the priority classes.

Owns what may follow what; SQL repeats the same table in a trigger (a test compares the two). Refuses to know who asks.
Intent (`held`, cancel requested) is beside the state, never a state.
"""

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = JobState
TERMINAL = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
LIVE = frozenset({_S.STARTING, _S.RUNNING, _S.STOPPING})

JOB_TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    _S.QUEUED: frozenset({_S.STARTING, _S.FAILED, _S.CANCELLED}),
    _S.STARTING: frozenset({_S.RUNNING, _S.STOPPING, _S.QUEUED}) | TERMINAL,
    _S.RUNNING: frozenset({_S.STOPPING, _S.QUEUED}) | TERMINAL,
    _S.STOPPING: frozenset({_S.QUEUED}) | TERMINAL,
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}

PRIORITY_CLASSES: Mapping[str, int] = {"low": -10, "normal": 0, "high": 10, "urgent": 100}
PRIORITY_MIN, PRIORITY_MAX = -1000, 1000


class IllegalTransition(Exception):
    """A state may not follow another; a bug of ours, or a decision that came too late."""


def advance(state: JobState, to: JobState) -> JobState:
    """The state after a step. Raises IllegalTransition."""
    if to not in JOB_TRANSITIONS[state]:
        raise IllegalTransition(f"no transition from {state} to {to}")
    return to


def priority_of(given: str | int) -> int:
    """The number that a priority class, or a number, stands for. ValueError lists the classes."""
    if isinstance(given, str):
        if given not in PRIORITY_CLASSES:
            raise ValueError(
                f"{given!r} is no priority class: expected {', '.join(PRIORITY_CLASSES)} or a whole number"
            )
        return PRIORITY_CLASSES[given]
    if not PRIORITY_MIN <= given <= PRIORITY_MAX:
        raise ValueError(f"{given} is out of range: expected {PRIORITY_MIN} to {PRIORITY_MAX}")
    return given
