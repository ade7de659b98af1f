"""Dependencies: which jobs must end, or end well, before a job may start; and what the end of one means for those that
wait for it.

Owns the key `after` and the verdict. Refuses to know how it is found out what became of a job.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from phalanx_server.domain.field_types import Part

AFTER_MAX = 256
Kind = Literal["ok", "any"]

_ID = re.compile(r"(job|array)_[0-9a-f]{32}")


def _is_id(given: object) -> object:
    if not isinstance(given, str) or not _ID.fullmatch(given):
        raise ValueError(f"{given!r:.60} is no id of a job or an array; `phalanx jobs` lists them")
    return given


JobOrArray = Annotated[str, BeforeValidator(_is_id), Field(json_schema_extra={"pattern": f"^{_ID.pattern}$"})]


class After(Part):
    """It starts when every job of `ok` has succeeded and every job of `any` has ended, however. An array stands for all
    of its jobs. A job of `ok` that does not succeed cancels this one."""

    ok: Annotated[tuple[JobOrArray, ...], Field(max_length=AFTER_MAX)] = ()
    any: Annotated[tuple[JobOrArray, ...], Field(max_length=AFTER_MAX)] = ()

    @model_validator(mode="after")
    def _each_once(self) -> "After":
        names = [*self.ok, *self.any]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"names {twice} twice")
        return self

    def each(self) -> Iterator[tuple[Kind, int, str]]:
        """Every condition, with its place in its list."""
        for index, name in enumerate(self.ok):
            yield "ok", index, name
        for index, name in enumerate(self.any):
            yield "any", index, name


class Verdict(StrEnum):
    """What has become of a dependency."""

    WAITS = "waits"
    MET = "met"
    BROKEN = "broken"  # it can never be met


def judge(kind: str, *, is_open: bool, is_bad: bool) -> Verdict:
    """Of a job or an array: `is_open` = not all of it has ended, `is_bad` = some of it has failed or was cancelled."""
    if kind == "ok" and is_bad:
        return Verdict.BROKEN
    return Verdict.WAITS if is_open else Verdict.MET
