"""Times of a peer whose clock may be off.

Owns the one rule: where the peer's clock differs from the server's by more than MAX_SKEW_S, all times of its message
are moved by the difference. A time is then kept within what is possible, so that nothing happens before its cause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime

MAX_SKEW_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Reads times of one message. `now` is the server's time, `sent_at` the peer's when it sent the message."""

    now: datetime
    sent_at: float

    @property
    def skew_s(self) -> float:
        """Server's clock minus the peer's, the way of the message included."""
        return self.now.timestamp() - self.sent_at if math.isfinite(self.sent_at) else 0.0

    def seconds(self, at: float, *, earliest: datetime) -> float:
        """`at` in seconds by the server's clock, not before `earliest` and not in the future."""
        shifted = at + self.skew_s if abs(self.skew_s) > MAX_SKEW_S else at
        return max(min(shifted, self.now.timestamp()), earliest.timestamp())

    def time(self, at: float, *, earliest: datetime) -> datetime:
        return datetime.fromtimestamp(self.seconds(at, earliest=earliest), UTC)

    def iso(self, at: float | None) -> str | None:
        """RFC 3339, for what is stored as JSON."""
        if at is None:
            return None
        return self.time(at, earliest=datetime.fromtimestamp(0, UTC)).isoformat().replace("+00:00", "Z")
