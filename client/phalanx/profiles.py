"""Profiles of running jobs, for both clients: what the API answers, and the requests, described as in
`job_requests.py`.

A trace lies here whole and under its own hash or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote as quoted

from phalanx.answers import create, items, one
from phalanx.calls import Call, Download, Steps
from phalanx.models import Model
from phalanx.outputs import arrived, explained
from phalanx.waiting import until_ended

ENDED = frozenset({"ready", "failed"})


@dataclass(frozen=True)
class RankProfile(Model):
    """One rank of a profile. `bytes` and `sha256` are of its trace, once that is there; `reason` says why it never will
    be."""

    rank: int
    state: str = ""
    reason: str = ""
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Profile(Model):
    """`state`: `requested`, `recording`, `ready` (at least one rank has a trace, and no other is awaited), `failed`."""

    id: str
    job_id: str = ""
    attempt: int = 0
    steps: int = 0
    state: str = ""
    reason: str = ""
    ranks: list[RankProfile] = field(default_factory=list)
    created_by: str = ""
    created_at: datetime | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def doing(self) -> str:
        return self.state


def request_profile(
    job_id: str, *, steps: int = 5, ranks: Sequence[int] | None = None, idempotency_key: str | None = None
) -> Call[Profile]:
    """Ask a running job for a torch.profiler trace of its next optimizer steps, of the first rank of each node unless
    `ranks` says otherwise. Conflict where the job does not run, or is being profiled."""
    body: dict[str, Any] = {"steps": steps} | ({"ranks": list(ranks)} if ranks is not None else {})
    return create(_path(job_id), body, one(Profile), key=idempotency_key)


def profiles(job_id: str) -> Call[list[Profile]]:
    """All profiles of a job, newest first."""
    return Call("GET", _path(job_id), items(Profile))


def profile(job_id: str, profile_id: str) -> Call[Profile]:
    """One profile: how far each of its ranks is."""
    return Call("GET", _path(job_id, profile_id), one(Profile))


def wait_profile(
    job_id: str, profile_id: str, *, timeout_s: float | None = None, told: Callable[[Profile], object] = lambda _: None
) -> Steps[Profile]:
    """Wait until a profile is ready or has failed, and answer it. `told` sees it at each look. WaitTimeout after
    `timeout_s` seconds."""
    look = partial(profile, job_id, profile_id)
    return until_ended(look, f"profile {profile_id}", timeout_s=timeout_s, told=told)


def download_trace(job_id: str, profile_id: str, rank: int, file: Path) -> Download:
    """Fetch the trace of one rank into a local file, which is overwritten as it comes; answers its SHA-256."""
    return Download(f"{_path(job_id, profile_id)}/ranks/{rank}", file)


def download_traces(job_id: str, of: Profile, to: str | Path) -> Steps[list[Path]]:
    """Fetch the traces of a profile that is ready into the directory `to`, one file for each rank that has one."""
    files = []
    for rank in of.ranks:
        if rank.state == "ready":
            file = Path(to) / f"{quoted(of.id, safe='')}-rank-{rank.rank}.json.gz"
            with explained(file.name, Path(to)):
                fetch = partial(download_trace, job_id, of.id, rank.rank)
                yield from arrived(fetch, file, sha256=rank.sha256 or "")
            files.append(file)
    return files


def _path(job_id: str, *more: str) -> str:
    return "/".join(["/v1/jobs", quoted(job_id, safe=""), "profiles", *(quoted(part, safe="") for part in more)])
