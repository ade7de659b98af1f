"""What tenants have used in the past, decayed: GPU-seconds by GPU type, for the order under fair sharing.

Owns the sum over attempts, placement by placement, from when its GPUs were charged until they were released. Use at a
moment t counts 2^(-(now - t) / half-life) (as in Slurm's multifactor priority and Maui, by half-lives instead of
windows). Refuses to know who goes first.

The sum is that of a moment on a grid, a thousandth of a half-life apart and before `now`: between two such moments it
is the same for everybody, so whoever keeps it (`Usage`) asks once in ten minutes with the default half-life of a week,
and never more than once a minute. It leaves out at most 0.07 % of it, more only with half-lives of less than 17 hours.
Use of more than ten half-lives ago, of which less than 0.1 % would count, is left out too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.scheduling.snapshot import Policy

STEPS_PER_HALF_LIFE = 1000
STEP_MIN_S = 60.0
HALF_LIVES = 10


@dataclass(frozen=True, slots=True)
class UsageMoment:
    """As of when use is summed up, in Unix seconds, and how it decays."""

    at_s: float
    half_life_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used as of a moment, by tenant path and GPU type, of the tenant's own jobs (not of those below it);
    nothing where there was no use. To whole GPU-seconds."""

    moment: UsageMoment
    by_tenant: Mapping[str, Mapping[str, float]]


def usage_moment(now_s: float, policy: Policy) -> UsageMoment | None:
    """The last moment of the grid; None where nobody asks for past use."""
    if not policy.fair_sharing:
        return None
    half_life_s = max(1.0, policy.usage_half_life_s)
    step_s = max(STEP_MIN_S, half_life_s / STEPS_PER_HALF_LIFE)
    return UsageMoment(math.floor(now_s / step_s) * step_s, half_life_s)


# The integral of the decay over the time that the GPUs were charged. Two reads, each by its index: what is charged now,
# and what was released within reach.
_HELD = """
    SELECT j.tenant_id, a.gpu_type, cardinality(p.gpu_indices) AS gpus,
           greatest(0, CAST(:at AS double precision) - extract(epoch FROM p.released_at)::double precision) AS till_ago,
           least(2 * CAST(:reach AS double precision),
                 CAST(:at AS double precision) - extract(epoch FROM a.created_at)::double precision) AS since_ago
    FROM placements p JOIN attempts a ON a.id = p.attempt_id JOIN jobs j ON j.id = a.job_id
    WHERE a.created_at < to_timestamp(CAST(:at AS double precision)) AND a.gpu_type <> ''
      AND cardinality(p.gpu_indices) > 0
"""
_USAGE = text(
    f"""
    WITH held AS (
        {_HELD} AND p.released_at IS NULL
        UNION ALL
        {_HELD} AND p.released_at > to_timestamp(CAST(:at AS double precision) - CAST(:reach AS double precision))
    )
    SELECT t.path, held.gpu_type,
           sum(gpus * (exp(-CAST(:decay AS double precision) * coalesce(till_ago, 0))
                       - exp(-CAST(:decay AS double precision) * since_ago))
               / CAST(:decay AS double precision)) AS gpu_s
    FROM held JOIN tenants t ON t.id = held.tenant_id
    WHERE since_ago > coalesce(till_ago, 0)
    GROUP BY t.path, held.gpu_type
    """
)


async def load_usage(conn: AsyncConnection, moment: UsageMoment | None, *, known: Usage | None) -> Usage | None:
    """The sum as of a moment; without a query where it is `known`. None where nobody asks for past use."""
    if moment is None or (known is not None and known.moment == moment):
        return known if moment else None
    values = {
        "at": moment.at_s,
        "decay": math.log(2) / moment.half_life_s,
        "reach": HALF_LIVES * moment.half_life_s,
    }
    usage: dict[str, dict[str, float]] = {}
    for row in await conn.execute(_USAGE, values):
        if (gpu_s := float(round(row.gpu_s))) > 0:
            usage.setdefault(row.path, {})[row.gpu_type] = gpu_s
    return Usage(moment, usage)
