"""The requests about jobs, each described once for both clients. It owns their paths, parameters and what is safe to
repeat; it refuses to send anything.

A function that returns a `Call` is one exchange; one that returns `Steps` is several; one that returns a `Stream`
follows something live.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote as quoted

from phalanx import bundle as bundles
from phalanx import models, requirements
from phalanx.answers import create, items, one, paged
from phalanx.calls import Answer, Call, Message, Page, Pages, Steps, Stream, Work, clean
from phalanx.errors import ProtocolError
from phalanx.models import Model
from phalanx.waiting import until_ended

M = TypeVar("M", bound=Model)
JobFile = Mapping[str, Any]  # the job file as a document

BUNDLE_TYPE = "application/gzip"
LOG_PIECE_BYTES = 16 << 20
REFUSALS = frozenset(range(400, 429))  # the answer to a HEAD has no body: the PUT after it says why


def _job_path(job_id: str, *rest: str) -> str:
    return "/v1/jobs/" + "/".join(quoted(part, safe="") for part in (job_id, *rest))


# ------------------------------------------------------------------ submitting


def submit(job: JobFile, *, workdir: str | Path | None = None, idempotency_key: str | None = None) -> Steps[models.Job]:
    """Submit one job. `workdir` (or else its `run.workdir`) is packed and uploaded, unless the server has it; a
    requirements file that `run.environment.requirements` names is read.

    Always sends an Idempotency-Key: sending the same job again with the same key answers the first one's job. A job
    with an `array` makes all jobs of it; the answer is the first, and its `array.id` names them all.
    """
    (document,) = yield from _delivered([job], workdir)
    return (yield create("/v1/jobs", document, one(models.Job), key=idempotency_key))


def dry_run(job: JobFile) -> Call[models.DryRun]:
    """Check a job and say what the scheduler would do with it now; nothing is stored."""
    return Call("POST", "/v1/jobs", one(models.DryRun), json=requirements.filled_in(job), params={"dry_run": "true"})


def submit_many(
    jobs: Sequence[JobFile], *, workdir: str | Path | None = None, idempotency_key: str | None = None
) -> Steps[list[models.Job]]:
    """Submit up to 1,000 jobs in one transaction: all or none. `workdir`, where given, is that of all."""
    documents = yield from _delivered(jobs, workdir)
    return (yield create("/v1/jobs/batch", {"jobs": documents}, items(models.Job), key=idempotency_key))


def _delivered(jobs: Sequence[JobFile], workdir: str | Path | None) -> Steps[list[dict[str, Any]]]:
    """The jobs with their directories on the server: `run.bundle` in place of `run.workdir`, and with the lines of
    their requirements files."""
    hashes: dict[tuple[str, Any], str] = {}
    delivered = []
    for job in map(requirements.filled_in, jobs):
        given = job.get("run")
        run = dict(given) if isinstance(given, Mapping) else {}
        directory = run.get("workdir") if workdir is None else workdir
        if directory is None:
            delivered.append(dict(job))
            continue
        where = str(directory), job.get("tenant")
        if where not in hashes:
            hashes[where] = yield from _delivered_directory(Path(directory), tenant=job.get("tenant"))
        run.pop("workdir", None)
        delivered.append({**job, "run": {**run, "bundle": hashes[where]}})
    return delivered


def _delivered_directory(directory: Path, *, tenant: str | None) -> Steps[str]:
    packed: bundles.Bundle = yield Work(partial(bundles.pack, directory))
    try:
        yield from upload(packed, tenant=tenant)
    finally:
        packed.discard()
    return packed.sha256


def upload(packed: bundles.Bundle, *, tenant: str | None = None) -> Steps[bool]:
    """Put a bundle on the server unless it is there already; says whether bytes were sent."""
    path, params = f"/v1/bundles/{packed.sha256}", clean({"tenant": tenant})
    there = yield Call("HEAD", path, lambda answer: answer.status == 200, params=params, accept=REFUSALS)
    if not there:
        headers = {"Content-Type": BUNDLE_TYPE}
        yield Call("PUT", path, lambda _: None, params=params, headers=headers, body_path=packed.path, timeout_s=600.0)
    return not there


# ------------------------------------------------------------------ jobs


def job(job_id: str) -> Call[models.Job]:
    """One job by its id."""
    return Call("GET", _job_path(job_id), one(models.Job))


def jobs(
    *,
    tenant: str | None = None,
    state: Sequence[str] = (),
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    submitted_after: datetime | None = None,
    array: str | None = None,
    limit: int | None = None,
) -> Pages[models.Job]:
    """Jobs, newest first, as an iterator over all pages; `limit` is the size of a page (≤ 500)."""
    params = {
        "tenant": tenant,
        "state": list(state),
        "name": name,
        "label": [f"{key}={value}" for key, value in (labels or {}).items()],
        "submitted_after": submitted_after.isoformat() if submitted_after else None,
        "array": array,
    }
    return paged(models.Job, "/v1/jobs", limit=limit, **params)


def cancel(job_id: str) -> Call[models.Job]:
    """Ask a job to end. It gets SIGTERM and its grace time; answers at once."""
    return Call("POST", _job_path(job_id, "cancel"), one(models.Job))


def hold(job_id: str) -> Call[models.Job]:
    """Keep a queued job from starting."""
    return Call("POST", _job_path(job_id, "hold"), one(models.Job))


def release(job_id: str) -> Call[models.Job]:
    """Let a held job start."""
    return Call("POST", _job_path(job_id, "release"), one(models.Job))


def requeue(job_id: str) -> Call[models.Job]:
    """End the attempt of a job that runs, with its grace time, and put the job back into the queue. Uses up no
    retry."""
    return Call("POST", _job_path(job_id, "requeue"), one(models.Job))


def set_priority(job_id: str, priority: str | int) -> Call[models.Job]:
    """Change the priority of a job that waits or runs: a class, such as `high`, or a number."""
    return Call("PATCH", _job_path(job_id), one(models.Job), json={"priority": priority})


def wait(job_id: str, *, timeout_s: float | None = None) -> Steps[models.Job]:
    """Wait until a job has ended, and answer it. WaitTimeout after `timeout_s` seconds. A server that is away is waited
    for too, OUTAGE_TOLERANCE_S at most: the job goes on without it."""
    return until_ended(partial(job, job_id), f"job {job_id}", timeout_s=timeout_s)


def attempts(job_id: str) -> Call[list[models.Attempt]]:
    """All attempts of a job, oldest first."""
    return Call("GET", _job_path(job_id, "attempts"), items(models.Attempt))


def goodput(job_id: str) -> Call[models.Goodput]:
    """What became of the GPU time of all its attempts."""
    return Call("GET", _job_path(job_id, "goodput"), one(models.Goodput))


def explain(job_id: str) -> Call[models.Explanation]:
    """Why a job waits, what would unblock it and when it is expected to start."""
    return Call("GET", _job_path(job_id, "explain"), one(models.Explanation))


# ------------------------------------------------------------------ events, logs, metrics


def events(job_id: str, *, after: int | None = None) -> Pages[models.Event]:
    """What happened to a job, oldest first, as an iterator; only what came after event `after`."""
    return paged(models.Event, _job_path(job_id, "events"), cursor_name="after", after=after)


def follow(job_id: str, *, after: int | None = None) -> Stream[models.Event]:
    """The events of a job as they happen, until it has ended. Resumes where it was if the connection breaks."""
    last = str(after) if after is not None else None
    params = clean({"follow": True, "after": after})
    return Stream(_job_path(job_id, "events"), _message(models.Event), params, last)


def logs(
    job_id: str,
    *,
    rank: int | None = None,
    stream: str | None = None,
    attempt: int | None = None,
    tail_lines: int | None = None,
    start_bytes: int = 0,
    limit_bytes: int = LOG_PIECE_BYTES,
) -> Call[str]:
    """Output of a job as text: of its latest attempt unless `attempt` says which, its first `limit_bytes` (≤ 16 MiB)
    or its last `tail_lines`."""
    params = {"rank": rank, "stream": stream, "attempt": attempt, "tail_lines": tail_lines}
    if tail_lines is None:
        params |= {"start_bytes": start_bytes, "limit_bytes": limit_bytes}
    return Call("GET", _job_path(job_id, "logs"), lambda answer: str(answer.body), params=clean(params))


def iter_logs(
    job_id: str, *, rank: int | None = None, stream: str | None = None, attempt: int | None = None
) -> Pages[str]:
    """All output of a job, however long, as an iterator over pieces of text."""

    def call(cursor: str | None) -> Call[Page[str]]:
        start = int(cursor or 0)
        asked = logs(job_id, rank=rank, stream=stream, attempt=attempt, start_bytes=start)
        return replace(asked, read=partial(_log_piece, start))  # type: ignore[arg-type]

    return call


def _log_piece(start_bytes: int, answer: Answer) -> Page[str]:
    end_bytes, size_bytes = start_bytes + LOG_PIECE_BYTES, int(answer.headers.get("x-log-size-bytes") or 0)
    return Page([str(answer.body)], str(end_bytes) if end_bytes < size_bytes else None)


def follow_logs(
    job_id: str,
    *,
    rank: int | None = None,
    stream: str | None = None,
    attempt: int | None = None,
    tail_lines: int | None = None,
) -> Stream[models.LogLine]:
    """Output of a job as it comes, until it has ended: of all its attempts unless `attempt` says which."""
    params = clean({"follow": True, "rank": rank, "stream": stream, "attempt": attempt, "tail_lines": tail_lines})
    return Stream(_job_path(job_id, "logs"), _message(models.LogLine), params)


def metrics(
    job_id: str,
    *,
    names: Sequence[str] = (),
    start: datetime | None = None,
    end: datetime | None = None,
    max_points: int | None = None,
) -> Call[list[models.Series]]:
    """Series that the job reported, downsampled to at most `max_points` points each; all without `names`."""
    window = {"from": start.isoformat() if start else None, "to": end.isoformat() if end else None}
    params = clean({"name": list(names), "max_points": max_points} | window)
    return Call("GET", _job_path(job_id, "metrics"), _series, params=params)


def _series(answer: Answer) -> list[models.Series]:
    if not isinstance(answer.body, dict):
        raise ProtocolError("expected `series`, the server sent something else")
    return [models.Series.from_json(item) for item in answer.body.get("series") or []]


def follow_metrics(job_id: str, *, names: Sequence[str] = ()) -> Stream[models.Progress]:
    """The latest progress of a job whenever it reports, until it has ended."""
    return Stream(_job_path(job_id, "metrics"), _message(models.Progress), clean({"follow": True, "name": list(names)}))


def _message(kind: type[M]) -> Callable[[Message], M | None]:
    return lambda message: kind.from_json(message.data) if isinstance(message.data, dict) else None
