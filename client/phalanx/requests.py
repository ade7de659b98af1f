"""Every request of the API that the SDK knows, described once for both clients. It owns paths, parameters and what is
safe to repeat; it refuses to send anything.

A function that returns a `Call` is one exchange; one that returns `Steps` is several; one that returns a `Stream`
follows something live. Creates carry an Idempotency-Key, so that a retry never makes two.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote as quoted

from phalanx import bundle as bundles
from phalanx import models
from phalanx.calls import Answer, Call, Message, Page, Pages, Pause, Steps, Stream, Work, clean
from phalanx.errors import Conflict, ProtocolError, WaitTimeout
from phalanx.models import Model

M = TypeVar("M", bound=Model)
JobFile = Mapping[str, Any]  # the job file as a document

BUNDLE_TYPE = "application/gzip"
FIRST_POLL_S, LAST_POLL_S = 0.1, 2.0


# ------------------------------------------------------------------ reading answers


def _one(kind: type[M]) -> Callable[[Answer], M]:
    return lambda answer: kind.from_json(answer.body)


def _items(kind: type[M]) -> Callable[[Answer], list[M]]:
    return lambda answer: _page(kind, answer).items


def _page(kind: type[M], answer: Answer) -> Page[M]:
    if not isinstance(answer.body, dict) or not isinstance(answer.body.get("items"), list):
        raise ProtocolError("expected a list with `items`, the server sent something else")
    items = [kind.from_json(item) for item in answer.body["items"]]
    return Page(items, answer.body.get("next_cursor"))


def _paged(kind: type[M], path: str, params: Mapping[str, Any], limit: int | None) -> Pages[M]:
    def call(cursor: str | None) -> Call[Page[M]]:
        asked = clean({**params, "limit": min(limit, 500) if limit else None, "cursor": cursor})
        return Call("GET", path, partial(_page, kind), params=asked)

    return call


def _create(path: str, body: Any, read: Callable[[Answer], Any], *, key: str | None, **params: Any) -> Call[Any]:
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    return Call("POST", path, read, json=body, headers=headers, params=clean(params))


def _job_path(job_id: str, *rest: str) -> str:
    return "/v1/jobs/" + "/".join(quoted(part, safe="") for part in (job_id, *rest))


# ------------------------------------------------------------------ submitting


def submit(job: JobFile, *, workdir: str | Path | None = None, idempotency_key: str | None = None) -> Steps[models.Job]:
    """Submit one job. `workdir` is packed and uploaded (unless the server has it) and becomes `run.bundle`.

    Always sends an Idempotency-Key: sending the same job again with the same key answers the first one's job.
    """
    document = yield from with_bundle(job, workdir=workdir)
    return (yield _create("/v1/jobs", document, _one(models.Job), key=idempotency_key))


def dry_run(job: JobFile) -> Call[models.DryRun]:
    """Check a job and say what the scheduler would do with it now; nothing is stored."""
    return Call("POST", "/v1/jobs", _one(models.DryRun), json=dict(job), params={"dry_run": "true"})


def submit_many(
    jobs: Sequence[JobFile], *, workdir: str | Path | None = None, idempotency_key: str | None = None
) -> Steps[list[models.Job]]:
    """Submit up to 1,000 jobs in one transaction: all or none. They share `workdir`."""
    documents = list(jobs)
    if workdir is not None and documents:
        first = yield from with_bundle(documents[0], workdir=workdir)
        documents = [_bundled(job, first["run"]["bundle"]) for job in documents]
    body = {"jobs": [dict(job) for job in documents]}
    return (yield _create("/v1/jobs/batch", body, _items(models.Job), key=idempotency_key))


def with_bundle(job: JobFile, *, workdir: str | Path | None) -> Steps[dict[str, Any]]:
    """The job with its working directory on the server and `run.bundle` naming it."""
    if workdir is None:
        return dict(job)
    packed: bundles.Bundle = yield Work(partial(bundles.pack, Path(workdir)))
    try:
        yield from upload(packed, tenant=job.get("tenant"))
    finally:
        packed.discard()
    return _bundled(job, packed.sha256)


def upload(packed: bundles.Bundle, *, tenant: str | None = None) -> Steps[bool]:
    """Put a bundle on the server unless it is there already; says whether bytes were sent."""
    path, params = f"/v1/bundles/{packed.sha256}", clean({"tenant": tenant})
    there = yield Call("HEAD", path, lambda answer: answer.status == 200, params=params, accept=frozenset({404}))
    if not there:
        headers = {"Content-Type": BUNDLE_TYPE}
        yield Call("PUT", path, lambda _: None, params=params, headers=headers, body_path=packed.path, timeout_s=600.0)
    return not there


def _bundled(job: JobFile, sha256: str) -> dict[str, Any]:
    run = {key: value for key, value in (job.get("run") or {}).items() if key != "workdir"}
    return {**job, "run": {**run, "bundle": sha256}}


# ------------------------------------------------------------------ jobs


def job(job_id: str) -> Call[models.Job]:
    """One job by its id."""
    return Call("GET", _job_path(job_id), _one(models.Job))


def jobs(
    *,
    tenant: str | None = None,
    state: Sequence[str] = (),
    name: str | None = None,
    labels: Mapping[str, str] | None = None,
    submitted_after: datetime | None = None,
    limit: int | None = None,
) -> Pages[models.Job]:
    """Jobs, newest first, as an iterator over all pages; `limit` is the size of a page (≤ 500)."""
    params = {
        "tenant": tenant,
        "state": list(state),
        "name": name,
        "label": [f"{key}={value}" for key, value in (labels or {}).items()],
        "submitted_after": submitted_after.isoformat() if submitted_after else None,
    }
    return _paged(models.Job, "/v1/jobs", params, limit)


def cancel(job_id: str) -> Call[models.Job]:
    """Ask a job to end. It gets SIGTERM and its grace time; answers at once."""
    return Call("POST", _job_path(job_id, "cancel"), _one(models.Job))


def hold(job_id: str) -> Call[models.Job]:
    """Keep a queued job from starting."""
    return Call("POST", _job_path(job_id, "hold"), _one(models.Job))


def release(job_id: str) -> Call[models.Job]:
    """Let a held job start."""
    return Call("POST", _job_path(job_id, "release"), _one(models.Job))


def wait(job_id: str, *, timeout_s: float | None = None) -> Steps[models.Job]:
    """Wait until a job has ended, and answer it. WaitTimeout after `timeout_s` seconds of waiting."""
    waited_s, pause_s = 0.0, FIRST_POLL_S
    while True:
        found: models.Job = yield job(job_id)
        if found.ended:
            return found
        if timeout_s is not None and waited_s >= timeout_s:
            raise WaitTimeout(f"job {job_id} is still {found.state} after {timeout_s:g} s")
        yield Pause(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(LAST_POLL_S, pause_s * 1.5)


def attempts(job_id: str) -> Call[list[models.Attempt]]:
    """All attempts of a job, oldest first."""
    return Call("GET", _job_path(job_id, "attempts"), _items(models.Attempt))


def explain(job_id: str) -> Call[models.Explanation]:
    """Why a job waits, what would unblock it and when it is expected to start."""
    return Call("GET", _job_path(job_id, "explain"), _one(models.Explanation))


# ------------------------------------------------------------------ events, logs, metrics


def events(job_id: str, *, after: int | None = None, limit: int | None = None) -> Call[list[models.Event]]:
    """What happened to a job, oldest first; only what came after event `after`."""
    params = clean({"after": after, "limit": limit})
    return Call("GET", _job_path(job_id, "events"), _items(models.Event), params=params)


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
    start_bytes: int | None = None,
    limit_bytes: int | None = None,
) -> Call[str]:
    """Output of a job as text. Without `attempt`: of its latest."""
    params = {"rank": rank, "stream": stream, "attempt": attempt}
    window = {"tail_lines": tail_lines, "start_bytes": start_bytes, "limit_bytes": limit_bytes}
    return Call("GET", _job_path(job_id, "logs"), lambda answer: str(answer.body), params=clean(params | window))


def follow_logs(
    job_id: str, *, rank: int | None = None, stream: str | None = None, tail_lines: int | None = None
) -> Stream[models.LogLine]:
    """Output of a job as it comes, until it has ended."""
    params = clean({"follow": True, "rank": rank, "stream": stream, "tail_lines": tail_lines})
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


# ------------------------------------------------------------------ queue, plan, nodes


def queue(*, tenant: str | None = None, limit: int | None = None) -> Pages[models.QueueItem]:
    """Waiting jobs in the order in which they will be considered; `limit` is the size of a page."""
    return _paged(models.QueueItem, "/v1/queue", {"tenant": tenant}, limit)


def plan(
    *,
    jobs: Sequence[JobFile] | None = None,
    changes: Mapping[str, Any] | None = None,
    snapshot: Mapping[str, Any] | None = None,
) -> Call[models.PlanAnswer]:
    """What the scheduler would do: with `jobs` added or `changes` made to the live state, or in a given `snapshot`."""
    body = {"jobs": jobs and list(jobs), "changes": changes, "snapshot": snapshot}
    sent = {key: value for key, value in body.items() if value is not None}
    return Call("POST", "/v1/plan", _one(models.PlanAnswer), json=sent)


def nodes() -> Call[list[models.Node]]:
    """All nodes of all clusters."""
    return Call("GET", "/v1/nodes", _items(models.Node))


def node(name: str) -> Call[models.Node]:
    """One node by id or name."""
    return Call("GET", f"/v1/nodes/{quoted(name, safe='')}", _one(models.Node))


def _node_change(verb: str, name: str) -> Call[models.Node]:
    return Call("POST", f"/v1/nodes/{quoted(name, safe='')}/{verb}", _one(models.Node))


def cordon(name: str) -> Call[models.Node]:
    """Place nothing new on a node; what runs there goes on."""
    return _node_change("cordon", name)


def uncordon(name: str) -> Call[models.Node]:
    """Let a node take work again."""
    return _node_change("uncordon", name)


def drain(name: str) -> Call[models.Node]:
    """Place nothing new on a node and move what runs there elsewhere, with its grace time."""
    return _node_change("drain", name)


# ------------------------------------------------------------------ tenants, tokens


def tenants() -> Call[list[models.Tenant]]:
    """The tenants that the caller sees, parents first."""
    return Call("GET", "/v1/tenants", _items(models.Tenant))


def tenant(path: str) -> Call[models.Tenant]:
    """One tenant with its quotas and what it uses of them."""
    return Call("GET", f"/v1/tenants/{quoted(path)}", _one(models.Tenant))


def create_tenant(
    path: str, *, weight: float | None = None, quotas: Mapping[str, Any] | None = None
) -> Call[models.Tenant]:
    """Create a tenant under its parent: `research/nlp` under `research`."""
    body = {
        key: value for key, value in {"path": path, "weight": weight, "quotas": quotas}.items() if value is not None
    }
    return _create("/v1/tenants", body, _one(models.Tenant), key=None)


def quota_set(path: str, gpu_type: str, **limits: int | None) -> Steps[dict[str, models.Quota]]:
    """Change the quota of a tenant for one GPU type: `nominal`, `borrowing_limit`, `lending_limit` (None: unbounded).

    Reads, changes and writes with If-Match; a concurrent change makes it start over, so none is lost.
    """
    url, tries = f"/v1/quotas/{quoted(path)}", 3
    while True:
        etag, held = yield Call("GET", url, _quotas_with_etag)
        wanted = {**held, gpu_type: {**held.get(gpu_type, {"nominal": 0}), **limits}}
        try:
            return (yield Call("PUT", url, _quotas, json={"quotas": wanted}, headers={"If-Match": etag}))
        except Conflict:
            tries -= 1
            if not tries:
                raise


def quotas(path: str) -> Call[dict[str, models.Quota]]:
    """The quotas of a tenant by GPU type."""
    return Call("GET", f"/v1/quotas/{quoted(path)}", _quotas)


def _quotas(answer: Answer) -> dict[str, models.Quota]:
    held = answer.body.get("quotas") if isinstance(answer.body, dict) else None
    return {name: models.Quota.from_json(value) for name, value in (held or {}).items()}


def _quotas_with_etag(answer: Answer) -> tuple[str, dict[str, Any]]:
    return answer.headers.get("etag", "*"), {name: quota.raw for name, quota in _quotas(answer).items()}


def tokens() -> Call[list[models.Token]]:
    """The tokens that the caller may see, without their text."""
    return Call("GET", "/v1/tokens", _items(models.Token))


def create_token(
    name: str,
    *,
    role: str,
    tenant: str | None = None,
    cluster: str | None = None,
    user: str | None = None,
    expires_in_s: float | None = None,
) -> Call[models.Token]:
    """Make a token. Its text is in the answer, and nowhere else ever again."""
    scope = {"tenant": tenant, "cluster": cluster, "user": user, "expires_in_s": expires_in_s}
    body = {"name": name, "role": role} | {key: value for key, value in scope.items() if value is not None}
    return _create("/v1/tokens", body, _one(models.Token), key=None)


def revoke_token(token_id: str) -> Call[None]:
    """End a token at once."""
    return Call("DELETE", f"/v1/tokens/{quoted(token_id, safe='')}", lambda _: None)


def whoami() -> Call[models.Whoami]:
    """Who the server takes the caller for."""
    return Call("GET", "/v1/whoami", _one(models.Whoami))
