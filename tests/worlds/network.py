"""A network that loses, delays and repeats messages, as the seed says.

Owns what becomes of one call to the server. A delayed request that its sender has given up is processed all the same,
later, perhaps after its repetition: so messages are duplicated and reordered.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

Answer = TypeVar("Answer")
Request = Callable[[], Awaitable[object]]

LATE_S = (1.0, 3.0, 20.0, 90.0)


class Away(Exception):
    """No answer came. Whether the server has taken the request, nobody knows."""


@dataclass
class Network:
    """`down_until_s`: nothing reaches the server before (it, or its database, is away)."""

    dice: random.Random
    faults: bool = True
    down_until_s: float = 0.0
    late: list[tuple[float, Request]] = field(default_factory=list)

    async def call(self, now_s: float, request: Callable[[], Awaitable[Answer]], *, reached: bool = True) -> Answer:
        """Raises Away. `reached`: whether the sender's own link is up."""
        if not reached or now_s < self.down_until_s:
            raise Away
        if not self.faults:
            return await request()
        fate = self.dice.random()
        if fate < 0.04:
            raise Away  # the request was lost
        if fate < 0.08:
            self.late.append((now_s + self.dice.choice(LATE_S), request))
            raise Away  # it is still under way
        answer = await request()
        if fate < 0.12:
            self.late.append((now_s + self.dice.choice(LATE_S), request))  # and comes a second time
        if fate > 0.96:
            raise Away  # the answer was lost
        return answer

    async def deliver_late(self, now_s: float) -> None:
        """Process what is due by now; of what is still under way when the server is away, nothing arrives."""
        due = [request for at_s, request in self.late if at_s <= now_s]
        self.late = [(at_s, request) for at_s, request in self.late if at_s > now_s]
        if now_s >= self.down_until_s:
            for request in due:
                await request()
