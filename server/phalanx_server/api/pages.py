"""Lists: `{items, next_cursor}`, with keyset cursors that clients treat as opaque.

Owns the encoding of a cursor. Refuses to know what the keys mean: each list defines its own.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, Field

from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.field_errors import check_text

T = TypeVar("T")

MAX_LIMIT = 500
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="How many items a page holds at most.")]
CursorText = Annotated[str | None, Query(max_length=512, description="`next_cursor` of the page before.")]


class Page(BaseModel, Generic[T]):
    """One page of a list. `next_cursor` is null on the last."""

    items: list[T]
    next_cursor: str | None = Field(default=None)


def encode_cursor(*keys: Any) -> str:
    """The keys of the last row of a page, in the list's order, as opaque text."""
    return base64.urlsafe_b64encode(json.dumps(keys, separators=(",", ":")).encode()).decode().rstrip("=")


def decode_cursor(text: str, kinds: Sequence[type]) -> list[Any]:
    """The keys back. Raises Problem 422 unless they are of exactly these types."""
    try:
        keys = json.loads(base64.b64decode(text.encode() + b"=" * (-len(text) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as error:
        raise _bad_cursor() from error
    if not isinstance(keys, list) or [type(key) for key in keys] != list(kinds):
        raise _bad_cursor()
    check_text(keys, where="cursor")
    return keys


def _bad_cursor() -> Exception:
    return Invalid.field("cursor", "is not a cursor of this list", "pass next_cursor of the page before, or none")
