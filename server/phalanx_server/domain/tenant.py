"""The tenant tree: paths, quotas and who may evict whom.

Owns what a valid path, quota and preemption rule is. Refuses to know who uses how much: that is scheduling.
"""

import difflib
import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from phalanx_server.domain.errors import FieldError, Invalid

_NAME = r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
_PATH = re.compile(rf"{_NAME}(/{_NAME})*")
_RESOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PATH_MAX_CHARS = 256
DEPTH_MAX = 16
COMPARED_MAX = 50
ROOT = "default"
QUOTA_MAX = 1 << 50
WEIGHT_MAX = 1e6


class PreemptionRules(BaseModel):
    """Whom a tenant's jobs may evict; the fields of plan-format's `tenants[].preemption`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    within_tenant: Literal["never", "lower_priority", "lower_or_newer_equal"] = "lower_priority"
    reclaim: Literal["never", "lower_priority", "any"] = "any"
    borrow: "BorrowRule | None" = None


class BorrowRule(BaseModel):
    """It may evict in order to borrow: victims of at most this priority, and below its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_priority: Annotated[int, Field(strict=True)]


@dataclass(frozen=True, slots=True)
class QuotaLimits:
    """Of one GPU type, or of `cpu` or `memory_gib`. A limit of None = no limit."""

    nominal: int
    borrowing_limit: int | None = None
    lending_limit: int | None = None


def check_path(path: str, field: str = "path") -> str:
    """`path` if it is one; raises Invalid."""
    if len(path) > PATH_MAX_CHARS or path.count("/") >= DEPTH_MAX or not _PATH.fullmatch(path):
        raise Invalid.field(
            field,
            f"{path[:80]!r} is no tenant path",
            "lower-case names of letters, digits, '.', '_' and '-', joined by '/', like research/nlp",
        )
    return path


def check_weight(weight: float) -> float:
    """`weight` if it is one; raises Invalid."""
    if not 0 <= weight <= WEIGHT_MAX:
        raise Invalid.field("weight", f"{weight:g} is not in 0..{WEIGHT_MAX:g}")
    return weight


def parent_of(path: str) -> str | None:
    """The tenant above; None for a root."""
    parent, slash, _ = path.rpartition("/")
    return parent if slash else None


def lineage(path: str) -> list[str]:
    """A tenant and those above it, nearest first."""
    names = path.split("/")
    return ["/".join(names[:depth]) for depth in range(len(names), 0, -1)]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What somebody who wrote `name` probably meant. Of many names those are compared in full that begin and end most
    like it: a single mistake leaves all before and after it alike."""
    names = list(known)
    if len(names) > COMPARED_MAX:
        names = heapq.nlargest(COMPARED_MAX, names, key=lambda other: _alike(name, other))
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


def _alike(name: str, other: str) -> int:
    """How many characters two names have in common at their ends."""
    return min(_common(name, other) + _common(name[::-1], other[::-1]), len(name), len(other))


def _common(name: str, other: str) -> int:
    count = 0
    for mine, its in zip(name, other, strict=False):
        if mine != its:
            break
        count += 1
    return count


def check_quotas(quotas: Mapping[str, QuotaLimits], field: str = "quotas") -> None:
    """Raises Invalid, naming every value that cannot be."""
    errors = [
        FieldError(f"{field}.{resource}", f"{resource[:80]!r} is no resource", "a GPU type, cpu or memory_gib")
        for resource in quotas
        if not _RESOURCE.fullmatch(resource) or len(resource) > 64
    ]
    for resource, limits in quotas.items():
        for name in ("nominal", "borrowing_limit", "lending_limit"):
            amount = getattr(limits, name)
            if amount is not None and not 0 <= amount <= QUOTA_MAX:
                errors.append(FieldError(f"{field}.{resource}.{name}", f"{amount} is not in 0..{QUOTA_MAX}"))
    if errors:
        raise Invalid.fields(errors)
