"""How one exchange with the server is described, as data. It owns the descriptions (`Call`, `Download`, `Stream`,
`Steps`) and refuses to know which requests exist (`job_requests.py`, `fleet_requests.py`), and how they are sent,
awaited or tried again (`transport.py`).

The sync and the async client are two small interpreters of these descriptions, so no request is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A successful answer: `body` is decoded JSON where the server said JSON, else text."""

    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how its answer is read.

    `repeatable` says that sending it twice does no more than sending it once: only then is it tried again after a
    failure. `accept` lists statuses ≥ 400 that are an answer, not an error. `body_path` is a file to stream as body.
    """

    method: str
    path: str
    read: Callable[[Answer], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    body_path: Path | None = None
    repeatable: bool = True
    accept: frozenset[int] = frozenset()
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Download:
    """A GET whose answer goes into `file` as it comes. The result is its SHA-256 in hex."""

    path: str
    file: Path
    params: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0  # of silence


@dataclass(frozen=True)
class Message:
    """One server-sent event, its data decoded from JSON."""

    event: str
    id: str
    data: Any


@dataclass(frozen=True)
class Stream(Generic[T]):
    """A server-sent event stream that is resumed by Last-Event-ID until the event `end`. `read` may answer None for a
    message that says nothing."""

    path: str
    read: Callable[[Message], T | None]
    params: Mapping[str, Any] = field(default_factory=dict)
    last_event_id: str | None = None


@dataclass(frozen=True)
class Pause:
    """A step that waits."""

    seconds: float


@dataclass(frozen=True)
class Work(Generic[T]):
    """A step that takes long on this machine (packing files): the async client runs it in a thread."""

    run: Callable[[], T]


@dataclass(frozen=True)
class Now:
    """A step whose result is the time, in seconds of a clock that only goes forward."""


Step: TypeAlias = Call[Any] | Download | Pause | Work[Any] | Now

# Several exchanges that make one operation: a generator that yields steps, is sent their results, and returns.
Steps: TypeAlias = Generator[Step, Any, T]


@dataclass(frozen=True)
class Page(Generic[T]):
    """One page of a list; `next_cursor` is null on the last."""

    items: list[T]
    next_cursor: str | None


# The pages of a list: given a cursor (None for the first), the call for that page.
Pages: TypeAlias = Callable[[str | None], Call[Page[T]]]


def clean(params: Mapping[str, Any]) -> dict[str, Any]:
    """Query parameters without those not given; booleans as the API spells them."""
    kept = {name: value for name, value in params.items() if value is not None and value != []}
    return {name: str(value).lower() if isinstance(value, bool) else value for name, value in kept.items()}
