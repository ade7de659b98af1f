"""When a request is tried again, and after how long. Pure: it owns the decision, and refuses to sleep, to send, and to
know a clock; the transports carry it out.

Exponential backoff with full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015); a
Retry-After of the server is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = frozenset({429, 502, 503, 504})
OUTAGE_TOLERANCE_S = 600.0  # how long who follows a job waits for a server that is away: the job goes on


@dataclass(frozen=True)
class RetryPolicy:
    """`attempts` counts the first one too; None: as many as `longest_outage_s` has room for. A Retry-After beyond
    `longest_wait_s` is not waited for."""

    attempts: int | None = 6
    base_s: float = 0.1
    cap_s: float = 5.0
    longest_wait_s: float = 60.0
    longest_outage_s: float = math.inf

    def delay_s(
        self, *, tried: int, jitter: float, retry_after_s: float | None = None, failing_s: float = 0.0
    ) -> float | None:
        """Seconds to wait after `tried` failures (≥ 1), the first `failing_s` ago, before the next try; None to give
        up. `jitter` is in [0, 1)."""
        if self.attempts is not None and tried >= self.attempts:
            return None
        if failing_s > self.longest_outage_s or (retry_after_s or 0.0) > self.longest_wait_s:
            return None
        backoff_s = jitter * min(self.cap_s, self.base_s * 2 ** min(tried, 60))
        return (retry_after_s or 0.0) + backoff_s


def retry_after_s(headers: Mapping[str, str], *, now: datetime | None = None) -> float | None:
    """The Retry-After of an answer in seconds, from either form (RFC 9110 §10.2.3); None if absent or unreadable."""
    text = (headers.get("retry-after") or "").strip()
    if not text:
        return None
    if text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())
