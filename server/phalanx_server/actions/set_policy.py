"""Sets the policy of the scheduler, all fields at once, if it is still as the caller saw it. The next pass follows it.

Owns which values make sense together, and that no level goes away that a job still names.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from phalanx_server.domain.access import Actor
from phalanx_server.domain.errors import Conflict, EtagMismatch, FieldError, Invalid
from phalanx_server.domain.gang_spec import LEVEL_NODE, is_level
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.store import ids
from phalanx_server.store.audit import record_audit
from phalanx_server.store.policies import job_with_level, load_policy, over, write_policy
from phalanx_server.store.wakeups import notify

LEVELS_MAX = 8
SECONDS_MAX = 10 * 365 * 86_400.0


async def set_policy(
    engine: AsyncEngine, settings: Mapping[str, Any], *, base: Policy, if_version: int | None, actor: Actor
) -> None:
    """Fields that `settings` does not name are as in `base`, the settings file. `if_version` None = whatever is there.
    Raises Invalid, Conflict, EtagMismatch."""
    try:
        policy = over(base, settings)
    except ValueError as error:
        raise Invalid.field("settings", str(error)) from None
    check_policy(policy)
    async with engine.begin() as conn:
        stored = await load_policy(conn, lock="UPDATE")
        if if_version is not None and stored.version != if_version:
            raise EtagMismatch(f"the policy is at version {stored.version}, not {if_version}: read it again")
        await _keep_levels_in_use(conn, stored.over(base).topology_levels, policy.topology_levels)
        await write_policy(conn, settings)
        await record_audit(conn, actor, "set_policy", "policy", settings)
        await notify(conn, "queue")


def check_policy(policy: Policy) -> None:
    """Raises Invalid, naming every value that cannot be."""
    errors = [
        FieldError(f"settings.{name}", f"{value:g} is not between {least:g} and {SECONDS_MAX:g} seconds")
        for name, value, least in (
            ("usage_half_life_s", policy.usage_half_life_s, 1.0),
            ("restart_s", policy.restart_s, 0.0),
            ("default_time_limit_s", policy.default_time_limit_s, 1.0),
        )
        if value is not None and not least <= value <= SECONDS_MAX
    ]
    errors += _level_errors(policy.topology_levels)
    if errors:
        raise Invalid.fields(errors)


def _level_errors(levels: tuple[str, ...]) -> list[FieldError]:
    field = "settings.topology_levels"
    hint = "name the labels of nodes that say where they are, outermost first, such as block and rack"
    if len(levels) > LEVELS_MAX:
        return [FieldError(field, f"are {len(levels)} levels, at most {LEVELS_MAX}", hint)]
    counts = Counter(levels)
    errors = [FieldError(field, f"names {level} twice", hint) for level in counts if counts[level] > 1]
    if LEVEL_NODE in counts:
        errors.append(FieldError(field, f"{LEVEL_NODE} is always the innermost level: leave it out", hint))
    return errors + [FieldError(field, f"{level[:80]!r} is no label", hint) for level in counts if not is_level(level)]


async def _keep_levels_in_use(conn: AsyncConnection, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """Submits hold the policy while they check their levels, so none can slip in."""
    gone = sorted(set(before) - set(after))
    used = await job_with_level(conn, gone) if gone else None
    if used is not None:
        raise Conflict(
            f"{used.name} ({ids.encode('job', used.id)}) names the level {used.level}, which would be gone: keep it in "
            "topology_levels until such jobs have ended"
        )
