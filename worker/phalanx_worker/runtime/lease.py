"""The lease that a guardian holds for its runner: renewed by each ping, over when none came for `fence_s`.

Owns that clock. Pure but for it: knows no process.
"""

from __future__ import annotations

import time


class Lease:
    """`look_at` is when to ask next. Who comes late to that was stopped itself, like perhaps the runner, whose next
    ping gets an eighth of the lease to come."""

    def __init__(self, fence_s: float):
        self.fence_s = fence_s
        self._over_at = 0.0
        self.look_at = 0.0
        self.renew(fence_s)

    def renew(self, fence_s: float) -> None:
        self.fence_s = fence_s
        self._over_at = time.monotonic() + fence_s
        self.look_at = time.monotonic() + fence_s / 8

    def is_over(self, now: float) -> bool:
        if now - self.look_at > self.fence_s / 8:
            self._over_at = max(self._over_at, now + self.fence_s / 8)
        if now >= self.look_at:
            self.look_at = now + self.fence_s / 8
        return now >= self._over_at
