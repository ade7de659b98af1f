"""What should exist on a cluster: every live attempt, to run or to stop, as its agent is told.

Owns the translation from attempts to `Desired` and its version, a digest that changes whenever an answer would. What is
not desired must not run, so a lost or ended attempt is simply missing. Of a live attempt nothing changes but whether it
is to stop, with which grace, whether it has started, and which profile is wanted of it: the rest is read once and kept
(`Known`), or each answer would cost as much as all that runs.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from phalanx.recipes import health as health_recipe
from sqlalchemy import ARRAY, Row, Uuid, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.array import size_of
from phalanx_server.domain.attempt import AttemptState
from phalanx_server.domain.health_spec import Health as HealthSpec
from phalanx_server.domain.messages import (
    Desired,
    DesiredAttempt,
    Environment,
    GroupPlacement,
    Health,
    Launch,
    Mount,
    ProfileRequest,
)
from phalanx_server.domain.run_spec import program_of
from phalanx_server.store import ids

_ATTEMPTS = text(
    """
    SELECT a.id, a.job_id, a.number, a.epoch, a.state, a.grace_s, a.resume_from, a.started_at IS NOT NULL AS started,
           j.name AS job_name, j.spec, j.bundle, j.traceparent, j.array_id, j.array_index,
           t.path AS tenant, t.uid AS tenant_uid, placed.groups, placed.cpus, placed.memory
    FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN tenants t ON t.id = j.tenant_id
    CROSS JOIN LATERAL (
        SELECT jsonb_agg(jsonb_build_object(
                   'node', n.name, 'replicas', p.replicas, 'gpu_indices', p.gpu_indices, 'group_rank', p.group_rank,
                   'first_rank', p.first_rank, 'ranks', p.ranks) ORDER BY p.group_rank) AS groups,
               array_agg(p.cpus ORDER BY p.group_rank) AS cpus,
               array_agg(p.memory_bytes ORDER BY p.group_rank) AS memory
        FROM placements p JOIN nodes n ON n.id = p.node_id WHERE p.attempt_id = a.id
    ) placed
    WHERE a.id = ANY(:attempt_ids)
    """
).bindparams(bindparam("attempt_ids", type_=ARRAY(Uuid)))
_LIVE = text(
    """
    SELECT a.id, a.state = 'stopping' AS stopping, a.grace_s, a.started_at IS NOT NULL AS started,
           p.id AS profile_id, p.steps,
           (SELECT array_agg(r.rank ORDER BY r.rank) FROM profile_ranks r WHERE r.profile_id = p.id) AS ranks
    FROM attempts a LEFT JOIN profiles p ON p.attempt_id = a.id AND p.closed_at IS NULL
    WHERE a.cluster_id = :cluster_id AND a.state IN ('starting', 'running', 'stopping')
    ORDER BY a.created_at, a.id
    """
)
_VERSION = text(
    """
    SELECT left(encode(sha256(convert_to(string_agg(concat_ws(' ', a.id, a.started_at IS NOT NULL,
                CASE WHEN a.state = 'stopping' THEN a.grace_s END, p.id), ',' ORDER BY a.id), 'UTF8')), 'hex'), 32)
    FROM attempts a LEFT JOIN profiles p ON p.attempt_id = a.id AND p.closed_at IS NULL
    WHERE a.cluster_id = :cluster_id AND a.state IN ('starting', 'running', 'stopping')
    """
)

NOTHING = "0" * 32
"""The version where nothing should exist."""
Known = dict[UUID, dict[UUID, DesiredAttempt]]
"""By cluster: the attempts of the last answer, as they were told."""


async def desired(conn: AsyncConnection, *, cluster_id: UUID, now: datetime, known: Known | None = None) -> Desired:
    """Everything that should exist on the cluster. `known` is kept up to date from answer to answer."""
    before = known.get(cluster_id, {}) if known is not None else {}
    version = await desired_version(conn, cluster_id=cluster_id)  # first: what comes in between makes it an old one
    live = list(await conn.execute(_LIVE, {"cluster_id": cluster_id}))
    new = [row.id for row in live if row.id not in before]
    read = {row.id: _attempt(row) for row in await conn.execute(_ATTEMPTS, {"attempt_ids": new})} if new else {}
    told = {row.id: _as_now(attempt, row) for row in live if (attempt := before.get(row.id) or read.get(row.id))}
    if known is not None:
        known[cluster_id] = told
    return Desired(version=version, attempts=list(told.values()), server_time=now.timestamp())


async def desired_version(conn: AsyncConnection, *, cluster_id: UUID) -> str:
    """The version that `desired` would have: cheap, for a long poll."""
    return (await conn.execute(_VERSION, {"cluster_id": cluster_id})).scalar_one() or NOTHING


def _as_now(attempt: DesiredAttempt, row: Row[Any]) -> DesiredAttempt:
    """The attempt with what may have changed since it was read."""
    action = "stop" if row.stopping else "run"
    profiles = _profiles(row)
    as_told = attempt.action, attempt.grace_s, attempt.started, attempt.profiles
    if as_told == (action, row.grace_s, row.started, profiles):
        return attempt
    now = {"action": action, "grace_s": row.grace_s, "started": row.started, "profiles": profiles}
    return attempt.model_copy(update=now)


def _profiles(row: Row[Any]) -> list[ProfileRequest]:
    if row.profile_id is None:
        return []
    name = ids.encode("profile", row.profile_id)
    return [ProfileRequest(profile_id=name, steps=row.steps, ranks=row.ranks)]


def _attempt(row: Row[Any]) -> DesiredAttempt:
    return DesiredAttempt(
        attempt_id=ids.encode("attempt", row.id),
        job_id=ids.encode("job", row.job_id),
        job_name=row.job_name,
        tenant=row.tenant,
        tenant_uid=row.tenant_uid,
        number=row.number,
        epoch=row.epoch,
        action="stop" if row.state == AttemptState.STOPPING else "run",
        grace_s=row.grace_s,
        groups=[GroupPlacement(**group) for group in row.groups],
        launch=_launch(row),
        started=row.started,
        traceparent=row.traceparent,
    )


def _launch(row: Row[Any]) -> Launch:
    run, health = row.spec["run"], HealthSpec.model_validate(row.spec.get("health") or {})
    return Launch(
        command=program_of(run),
        env=run["env"] | _array_variables(row) | _recipe_variables(run, health),
        world_size=sum(group["ranks"] for group in row.groups),
        bundle=row.bundle,
        cpus_per_group=row.cpus,
        memory_bytes_per_group=row.memory,
        resume_from=row.resume_from,
        checkpoint_url=row.spec["checkpoint"]["url"],
        environment=_environment(run.get("environment")),
        mounts=[Mount(**mount) for mount in run.get("mounts") or ()],
        outputs=run.get("outputs") or [],
        shm_bytes=run.get("shm") or 0,
        health=Health(
            hang=health.hang.action,
            hang_factor=health.hang.factor,
            hang_at_least_s=health.hang.at_least,
            gpu=health.gpu.action,
            preflight_factor=0.0 if health.preflight.action == "off" else health.preflight.factor,
        ),
    )


def _recipe_variables(run: dict[str, Any], health: HealthSpec) -> dict[str, str]:
    """What a recipe is told of the job file beside its arguments."""
    return {health_recipe.VARIABLE: health.model_dump_json()} if run.get("recipe") else {}


def _array_variables(row: Row[Any]) -> dict[str, str]:
    """What a rank is told of the array that its job is of."""
    if row.array_id is None:
        return {}
    return {
        "PHALANX_ARRAY_ID": ids.encode("array", row.array_id),
        "PHALANX_ARRAY_INDEX": str(row.array_index),
        "PHALANX_ARRAY_SIZE": str(size_of(row.spec["array"]["indices"])),
    }


def _environment(asked: dict[str, Any] | None) -> Environment | None:
    return Environment(requirements=asked["requirements"], name=asked["name"] or "") if asked else None
