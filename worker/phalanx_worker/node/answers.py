"""What the server's answer to a report means for the report. Pure: sends nothing."""

from __future__ import annotations

from enum import Enum

import httpx

_PROBLEM_TYPE = "application/problem+json"
_RETRY_STATUSES = frozenset({401, 403, 408, 409, 425, 429})


class Delivery(Enum):
    """What became of one report. FAULT: the server failed, perhaps over it; UNSTORED: it has no place for the logs, and
    would take the rest; REJECTED: it will never take it."""

    TAKEN = "taken"
    AWAY = "away"
    FAULT = "fault"
    UNSTORED = "unstored"
    REJECTED = "rejected"


def refusal(answer: httpx.Response) -> Delivery:
    """Of an answer other than 200. Only the server's own words refuse a report, or whoever finds it too large; whatever
    else a proxy says is about the way to the server. An overloaded server has not even looked."""
    code = _code(answer)
    if code == "overloaded":
        return Delivery.AWAY
    if code == "storage_unavailable":
        return Delivery.UNSTORED
    if answer.status_code >= 500:
        return Delivery.FAULT
    final = answer.status_code == 413 or (code and answer.status_code not in _RETRY_STATUSES)
    return Delivery.REJECTED if final else Delivery.AWAY


def _code(answer: httpx.Response) -> str:
    """Of the server's problem document; "" for any other answer."""
    if answer.headers.get("Content-Type", "").partition(";")[0].strip() != _PROBLEM_TYPE:
        return ""
    try:
        return str(answer.json().get("code") or "")
    except (ValueError, AttributeError):
        return ""
