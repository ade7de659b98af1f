"""Owns to whom of its tenant a running job yields because that one is shorter: `policy.preempt_longer`.

Refuses to know priorities and the rights of tenants. Under `order: shortest` a job that began while nothing shorter was
there, or that runs for much longer than was predicted, need not keep the shorter ones waiting to its end. That is what
the shortest remaining time first gains over the shortest job first (Schrage, 1968), here without an oracle, as Tiresias
(NSDI'19) demotes what has run for long. A place in the order ages, so who has waited for long is not overtaken, and who
was put off for long is not put off again.

Only a job yields that has ever saved: one that never did would lose all it has done for somebody else's convenience.

No loops: who yields stands behind whom it yielded to and needs far more than that, so it has no right to the place
unless predictions change; and then it has to be far less again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from phalanx_server.scheduling.draft import Draft
from phalanx_server.scheduling.order import Bid, order_s
from phalanx_server.scheduling.snapshot import Policy
from phalanx_server.scheduling.world import Running

CLEARLY_SHORTER = 3.0
"""Nobody yields but to a job that needs so many times less GPU-seconds than it still needs itself."""

LEAST_RESTARTS = 20
"""Nobody yields before it has run for so many times what a restart costs."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a running job would stand in its tenant's order if it waited. `most_s`: how far behind its submission one
    may stand at most that it yields to."""

    order_at: float
    most_s: float

    def yields_to(self, bid: Bid) -> bool:
        """May this job of the same tenant and priority have its place?"""
        return bid.order_at < self.order_at and bid.behind_s < self.most_s


def places_of(draft: Draft, tenant: str) -> Mapping[str, Place]:
    """The places of a tenant's running jobs. Who yields to nobody is left out."""
    world, policy = draft.world, draft.world.policy
    if not policy.preempt_longer:
        return {}
    question = ("places", tenant)
    if question not in draft.memo:
        turn_s = LEAST_RESTARTS * policy.restart_s
        draft.memo[question] = {
            r.job.id: _place_of(draft, r)
            for r in world.of_tenant.get(tenant, {}).values()
            if r.job.checkpointed_at is not None and world.now >= (r.job.started_at or 0.0) + turn_s
        }
    return draft.memo[question]


def is_due(policy: Policy, bid: Bid, now: float) -> bool:
    """Has a waiting job reached its place in the order, so that nobody who is submitted from now on gets ahead of it?
    Until then shorter ones still may, and to reserve a start against them would only leave GPUs idle: those it could
    not start beside will yield to it."""
    return not policy.preempt_longer or bid.order_at <= now


def _place_of(draft: Draft, running: Running) -> Place:
    world, job = draft.world, running.job
    ends_at = world.expected_end(job)
    left_s = inf if ends_at == inf else ends_at - world.now
    behind_s = order_s(world.policy, left_s, max(1, running.gpus))
    return Place(job.submitted_at + behind_s, behind_s / CLEARLY_SHORTER)
