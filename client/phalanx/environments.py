"""Registered environments, for both clients: what the API answers, and the requests, described as in
`job_requests.py`.

An environment never changes: a job that names one means the same packages at every submit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote as quoted

from phalanx import requirements as files
from phalanx.answers import create, one, paged
from phalanx.calls import Call, Pages
from phalanx.models import Model


@dataclass(frozen=True)
class Environment(Model):
    """Packages under a name, for the jobs of `tenant` and of all below it."""

    id: str
    name: str
    tenant: str = ""
    requirements: list[str] = field(default_factory=list)
    created_by: str = ""
    created_at: datetime | None = None


def _path(environment_id: str) -> str:
    return f"/v1/environments/{quoted(environment_id, safe='')}"


def environments(*, tenant: str | None = None, name: str | None = None) -> Pages[Environment]:
    """The environments that the caller sees, by name, as an iterator; or those that `tenant` sees."""
    return paged(Environment, "/v1/environments", tenant=tenant, name=name)


def environment(environment_id: str) -> Call[Environment]:
    """One environment by its id."""
    return Call("GET", _path(environment_id), one(Environment))


def create_environment(
    name: str,
    requirements: str | Path | Sequence[str],
    *,
    tenant: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Environment]:
    """Register requirements under a name: lines, or the path of a requirements file, which is read here."""
    lines = files.read(requirements, field="requirements") if isinstance(requirements, str | Path) else requirements
    body: dict[str, Any] = {"name": name, "requirements": list(lines)} | ({"tenant": tenant} if tenant else {})
    return create("/v1/environments", body, one(Environment), key=idempotency_key)


def delete_environment(environment_id: str) -> Call[None]:
    """Delete an environment. Jobs that used it keep their copy of its requirements."""
    return Call("DELETE", _path(environment_id), lambda _: None)
