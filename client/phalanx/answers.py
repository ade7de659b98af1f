"""How answers are read and requests commonly shaped: one object, a list, the pages of a list, a create. It refuses to
know which requests exist (`job_requests.py`, `fleet_requests.py`).

Creates carry an Idempotency-Key, so that a retry never makes two.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from phalanx.calls import Answer, Call, Page, Pages, clean
from phalanx.errors import ProtocolError
from phalanx.models import Model

M = TypeVar("M", bound=Model)

MAX_PAGE = 500


def one(kind: type[M]) -> Callable[[Answer], M]:
    return lambda answer: kind.from_json(answer.body)


def items(kind: type[M]) -> Callable[[Answer], list[M]]:
    return lambda answer: page_of(kind, answer).items


def page_of(kind: type[M], answer: Answer) -> Page[M]:
    if not isinstance(answer.body, dict) or not isinstance(answer.body.get("items"), list):
        raise ProtocolError("expected a list with `items`, the server sent something else")
    items = [kind.from_json(item) for item in answer.body["items"]]
    return Page(items, answer.body.get("next_cursor"))


def paged(
    kind: type[M], path: str, *, limit: int | None = None, cursor_name: str = "cursor", **params: Any
) -> Pages[M]:
    """A list, page by page; without `limit` in pages as large as the API gives."""

    def call(cursor: str | None) -> Call[Page[M]]:
        asked = {**params, "limit": min(limit or MAX_PAGE, MAX_PAGE)}
        return Call(
            "GET", path, partial(page_of, kind), params=clean(asked | ({cursor_name: cursor} if cursor else {}))
        )

    return call


def create(path: str, body: Any, read: Callable[[Answer], Any], *, key: str | None, **params: Any) -> Call[Any]:
    headers = {"Idempotency-Key": key or str(uuid.uuid4())}
    return Call("POST", path, read, json=body, headers=headers, params=clean(params))
