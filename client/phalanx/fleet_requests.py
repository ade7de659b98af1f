"""The requests about what jobs run on and for whom: queue, plans, nodes, clusters, tenants, quotas, policy, tokens.
Described once for both clients, as in `job_requests.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote as quoted

from phalanx import models
from phalanx.answers import create, one, paged
from phalanx.calls import Answer, Call, Pages, Steps
from phalanx.errors import Conflict

M = TypeVar("M")
ETAG_MISMATCH = "etag_mismatch"

# ------------------------------------------------------------------ queue, plan, nodes


def queue(*, tenant: str | None = None, limit: int | None = None) -> Pages[models.QueueItem]:
    """Waiting jobs in the order in which they will be considered; `limit` is the size of a page."""
    return paged(models.QueueItem, "/v1/queue", limit=limit, tenant=tenant)


def plan(
    *,
    jobs: Sequence[Mapping[str, Any]] | None = None,
    quotas: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    nodes: Mapping[str, str] | None = None,
    changes: Mapping[str, Any] | None = None,
    snapshot: Mapping[str, Any] | None = None,
) -> Call[models.PlanAnswer]:
    """What the scheduler would do: with `jobs` added, `quotas` (by tenant and resource) and states of `nodes` (by name)
    as given, or `changes` made to the live state, or in a given `snapshot`."""
    body = {"jobs": jobs and list(jobs), "quotas": quotas, "nodes": nodes, "changes": changes, "snapshot": snapshot}
    sent = {key: value for key, value in body.items() if value is not None}
    return Call("POST", "/v1/plan", one(models.PlanAnswer), json=sent)


def calibration() -> Call[models.CalibrationReport]:
    """How good the scheduler's forecasts of starts and run times were, of the jobs that the caller may see."""
    return Call("GET", "/v1/scheduler/calibration", one(models.CalibrationReport))


def nodes() -> Pages[models.Node]:
    """All nodes of all clusters."""
    return paged(models.Node, "/v1/nodes")


def node(name: str) -> Call[models.Node]:
    """One node by id or name."""
    return Call("GET", f"/v1/nodes/{quoted(name, safe='')}", one(models.Node))


def _node_change(verb: str, name: str) -> Call[models.Node]:
    return Call("POST", f"/v1/nodes/{quoted(name, safe='')}/{verb}", one(models.Node))


def cordon(name: str) -> Call[models.Node]:
    """Place nothing new on a node; what runs there goes on."""
    return _node_change("cordon", name)


def uncordon(name: str) -> Call[models.Node]:
    """Let a node take work again."""
    return _node_change("uncordon", name)


def drain(name: str) -> Call[models.Node]:
    """Place nothing new on a node and move what runs there elsewhere, with its grace time."""
    return _node_change("drain", name)


def clusters() -> Pages[models.Cluster]:
    """All Ray clusters."""
    return paged(models.Cluster, "/v1/clusters")


def create_cluster(name: str) -> Call[models.Cluster]:
    """Add a cluster. Its agent's token is in the answer, and nowhere else ever again."""
    return create("/v1/clusters", {"name": name}, one(models.Cluster), key=None)


# ------------------------------------------------------------------ tenants, quotas


def tenants() -> Pages[models.Tenant]:
    """The tenants that the caller sees, parents first."""
    return paged(models.Tenant, "/v1/tenants")


def tenant(path: str) -> Call[models.Tenant]:
    """One tenant with its quotas and what it uses of them."""
    return Call("GET", f"/v1/tenants/{quoted(path)}", one(models.Tenant))


def create_tenant(
    path: str, *, weight: float | None = None, quotas: Mapping[str, Any] | None = None
) -> Call[models.Tenant]:
    """Create a tenant under its parent: `research/nlp` under `research`."""
    body = {
        key: value for key, value in {"path": path, "weight": weight, "quotas": quotas}.items() if value is not None
    }
    return create("/v1/tenants", body, one(models.Tenant), key=None)


def quota_set(path: str, gpu_type: str, **limits: int | None) -> Steps[dict[str, models.Quota]]:
    """Change the quota of a tenant for one GPU type: `nominal`, `borrowing_limit`, `lending_limit` (None: unbounded).

    Reads, changes and writes with If-Match; a concurrent change makes it start over, so none is lost.
    """

    def wanted(held: dict[str, Any]) -> dict[str, Any]:
        return {"quotas": {**held, gpu_type: {**held.get(gpu_type, {"nominal": 0}), **limits}}}

    return _read_and_put(f"/v1/quotas/{quoted(path)}", _quotas_with_etag, wanted, _quotas)


def quotas(path: str) -> Call[dict[str, models.Quota]]:
    """The quotas of a tenant by GPU type."""
    return Call("GET", f"/v1/quotas/{quoted(path)}", _quotas)


def _quotas(answer: Answer) -> dict[str, models.Quota]:
    held = answer.body.get("quotas") if isinstance(answer.body, dict) else None
    return {name: models.Quota.from_json(value) for name, value in (held or {}).items()}


def _quotas_with_etag(answer: Answer) -> tuple[str, dict[str, Any]]:
    return answer.headers.get("etag", "*"), {name: quota.raw for name, quota in _quotas(answer).items()}


def quota_unset(path: str, gpu_type: str) -> Steps[dict[str, models.Quota]]:
    """Take away the quota of a tenant for one GPU type: it has a nominal of 0 then, where others have one."""
    url = f"/v1/quotas/{quoted(path)}"

    def wanted(held: dict[str, Any]) -> dict[str, Any]:
        return {"quotas": {name: quota for name, quota in held.items() if name != gpu_type}}

    return _read_and_put(url, _quotas_with_etag, wanted, _quotas)


def change_tenant(
    path: str, *, weight: float | None = None, preemption: Mapping[str, Any] | None = None
) -> Steps[models.Tenant]:
    """Change a tenant's weight, or rules of `preemption` (`within_tenant`, `reclaim`, `borrow`); what is not named
    stays. A concurrent change makes it start over."""
    url = f"/v1/tenants/{quoted(path)}"

    def wanted(held: dict[str, Any]) -> dict[str, Any]:
        rules = None if preemption is None else {**held["preemption"], **preemption}
        changes = {"weight": weight, "preemption": rules}
        return {name: value for name, value in changes.items() if value is not None}

    return _read_and_put(url, _with_etag, wanted, one(models.Tenant), method="PATCH")


def _read_and_put(
    url: str,
    read: Callable[[Answer], tuple[str, dict[str, Any]]],
    wanted: Callable[[dict[str, Any]], dict[str, Any]],
    answer: Callable[[Answer], M],
    *,
    method: str = "PUT",
) -> Steps[M]:
    """Read, change and write with If-Match; a concurrent change makes it start over, so none is lost."""
    tries = 3
    while True:
        etag, held = yield Call("GET", url, read)
        try:
            return (yield Call(method, url, answer, json=wanted(held), headers={"If-Match": etag}))
        except Conflict as error:
            tries -= 1
            if not tries or error.code != ETAG_MISMATCH:
                raise


def _with_etag(answer: Answer) -> tuple[str, dict[str, Any]]:
    return answer.headers.get("etag", "*"), answer.body if isinstance(answer.body, dict) else {}


# ------------------------------------------------------------------ policy


def policy() -> Call[models.Policy]:
    """The policy that the scheduler follows."""
    return Call("GET", "/v1/policy", one(models.Policy))


def policy_set(settings: Mapping[str, Any], *, unset: Sequence[str] = ()) -> Steps[models.Policy]:
    """Set these fields of the policy, and take back those of `unset`; the others stay as they were set. A concurrent
    change makes it start over."""

    def wanted(held: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in held["settings"].items() if name not in unset}
        return {"settings": {**kept, **settings}}

    return _read_and_put("/v1/policy", _with_etag, wanted, one(models.Policy))


# ------------------------------------------------------------------ tokens


def tokens() -> Pages[models.Token]:
    """The tokens that the caller may see, without their text."""
    return paged(models.Token, "/v1/tokens")


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
    return create("/v1/tokens", body, one(models.Token), key=None)


def revoke_token(token_id: str) -> Call[None]:
    """End a token at once."""
    return Call("DELETE", f"/v1/tokens/{quoted(token_id, safe='')}", lambda _: None)


def whoami() -> Call[models.Whoami]:
    """Who the server takes the caller for."""
    return Call("GET", "/v1/whoami", one(models.Whoami))
