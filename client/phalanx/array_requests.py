"""The requests about arrays, the jobs of one submit that carry an index. Described once for both clients, as in
`job_requests.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from urllib.parse import quote as quoted

from phalanx import models
from phalanx.answers import one
from phalanx.calls import Call, Steps
from phalanx.waiting import until_ended


def _path(array_id: str, verb: str = "") -> str:
    return f"/v1/arrays/{quoted(array_id, safe='')}" + (f"/{verb}" if verb else "")


def array(array_id: str) -> Call[models.ArrayStatus]:
    """An array, and how many of its jobs are in which state."""
    return Call("GET", _path(array_id), one(models.ArrayStatus))


def _change(verb: str, array_id: str) -> Call[models.ArrayStatus]:
    return Call("POST", _path(array_id, verb), one(models.ArrayStatus))


def cancel_array(array_id: str) -> Call[models.ArrayStatus]:
    """Ask all jobs of an array that have not ended to end; answers at once."""
    return _change("cancel", array_id)


def hold_array(array_id: str) -> Call[models.ArrayStatus]:
    """Keep the jobs of an array that wait from starting."""
    return _change("hold", array_id)


def release_array(array_id: str) -> Call[models.ArrayStatus]:
    """Let the held jobs of an array start."""
    return _change("release", array_id)


def requeue_array(array_id: str) -> Call[models.ArrayStatus]:
    """Put the jobs of an array that run back into the queue."""
    return _change("requeue", array_id)


def set_array_priority(array_id: str, priority: str | int) -> Call[models.ArrayStatus]:
    """Change the priority of all jobs of an array that have not ended."""
    return Call("PATCH", _path(array_id), one(models.ArrayStatus), json={"priority": priority})


def wait_array(
    array_id: str, *, timeout_s: float | None = None, told: Callable[[models.ArrayStatus], object] = lambda _: None
) -> Steps[models.ArrayStatus]:
    """Wait until all jobs of an array have ended, and answer it; `told` is shown it at each look. As for a job."""
    return until_ended(partial(array, array_id), f"array {array_id}", timeout_s=timeout_s, told=told)
