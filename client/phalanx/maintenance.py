"""Maintenance windows: what the API answers about them, and the requests. Described once for both clients, as in
`job_requests.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote as quoted

from phalanx.answers import create, one, paged
from phalanx.calls import Call, Pages
from phalanx.models import Model


@dataclass(frozen=True)
class MaintenanceWindow(Model):
    """Nodes that are kept empty between two times: those named, and those with all of `labels`."""

    id: str
    state: str
    starts_at: datetime
    ends_at: datetime
    reason: str = ""
    nodes: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    covers: int = 0
    created_by: str | None = None
    created_at: datetime | None = None
    version: int = 0


def _path(window_id: str) -> str:
    return f"/v1/maintenance/{quoted(window_id, safe='')}"


def _body(**given: Any) -> dict[str, Any]:
    """What was given, as JSON."""
    told = {name: value for name, value in given.items() if value is not None}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in told.items()}


def maintenance_windows(*, over: bool = False) -> Pages[MaintenanceWindow]:
    """The windows that are planned or open, by their start; with `over` all that are remembered."""
    return paged(MaintenanceWindow, "/v1/maintenance", over="true" if over else None)


def maintenance_window(window_id: str) -> Call[MaintenanceWindow]:
    """One window by its id."""
    return Call("GET", _path(window_id), one(MaintenanceWindow))


def create_maintenance(
    *,
    starts_at: datetime,
    ends_at: datetime,
    nodes: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    reason: str = "",
    idempotency_key: str | None = None,
) -> Call[MaintenanceWindow]:
    """Keep nodes empty between two times: those named, and those with all of `labels`. What still runs there when it
    begins is stopped."""
    body = _body(starts_at=starts_at, ends_at=ends_at, nodes=list(nodes), labels=dict(labels or {}), reason=reason)
    return create("/v1/maintenance", body, one(MaintenanceWindow), key=idempotency_key)


def change_maintenance(
    window_id: str,
    *,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
    nodes: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    reason: str | None = None,
) -> Call[MaintenanceWindow]:
    """Change a window that is not over; what is not given stays. Empty `nodes` or `labels` take away what it had of
    them: one of the two has to be left."""
    named = None if nodes is None else list(nodes)
    having = None if labels is None else dict(labels)
    body = _body(starts_at=starts_at, ends_at=ends_at, nodes=named, labels=having, reason=reason)
    return Call("PATCH", _path(window_id), one(MaintenanceWindow), json=body)


def end_maintenance(window_id: str) -> Call[MaintenanceWindow]:
    """End an open window now: its nodes take work again."""
    return Call("POST", f"{_path(window_id)}/end", one(MaintenanceWindow))


def delete_maintenance(window_id: str) -> Call[None]:
    """Delete a window, also one that is open."""
    return Call("DELETE", _path(window_id), lambda _: None)
