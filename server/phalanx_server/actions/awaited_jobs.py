"""What jobs wait for, when they are submitted: does it exist, may the submitter see it, can it still be met?

Owns the checks of `after`. What happens when it ends later is `settle_dependents`'.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias
from uuid import UUID

from phalanx_server.domain.access import Actor
from phalanx_server.domain.dependency import Kind, Verdict, judge
from phalanx_server.domain.errors import FieldError
from phalanx_server.domain.spec import JobSpec, field_of
from phalanx_server.store import ids
from phalanx_server.store.dependencies import Target

Unmet: TypeAlias = Sequence[tuple[UUID, Kind]]
"""What one job waits for: a job or an array, and how (`ok`, `any`)."""


def awaited_by(spec: JobSpec) -> Iterator[tuple[Kind, int, str, UUID]]:
    """Every condition of a job: its kind, its place in the list, the id as it is written and as it is stored."""
    for kind, index, name in spec.after.each() if spec.after else ():
        yield kind, index, name, ids.parse("array" if name.startswith("array_") else "job", name)


def unmet_of(spec: JobSpec, awaited: Mapping[UUID, Target]) -> Unmet:
    """What a job whose conditions were checked still waits for."""
    return [(id_, kind) for kind, _, _, id_ in awaited_by(spec) if awaited[id_].is_open]


def after_errors(spec: JobSpec, actor: Actor, awaited: Mapping[UUID, Target], *, where: str) -> list[FieldError]:
    """What is wrong with the conditions of a job. What the actor may not see does not exist."""
    errors = []
    for kind, index, name, id_ in awaited_by(spec):
        target = awaited.get(id_)
        field = f"{field_of(where, 'after', kind)}[{index}]"
        if target is None or not actor.reaches(target.tenant) or target.is_array != name.startswith("array_"):
            errors.append(FieldError(field, f"there is no {name}", "`phalanx jobs` lists the jobs that you can see"))
        elif judge(kind, is_open=target.is_open, is_bad=target.bad is not None) is Verdict.BROKEN:
            assert target.bad is not None
            said = f"{target.bad[0]} {'has failed' if target.bad[1] == 'failed' else 'was cancelled'}"
            hint = "run it again and wait for that, or say after.any to start however it ended"
            errors.append(FieldError(field, f"{said}, so it can never be met", hint))
    return errors
