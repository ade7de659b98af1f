"""Why a running attempt gives way, and the words for it: for its job when it is asked to, and once it has.

Owns the reasons of a preemption and their sentences. Refuses to decide who gives way to whom, and to know who may read
it: a name that the reader may not see is not handed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from phalanx_server.domain.attempt import StopCause


class StopReason(StrEnum):
    """Why a job is preempted (plan-format, `preemptions`)."""

    WITHIN_TENANT = "within_tenant"
    RECLAIM = "reclaim"
    RECLAIM_WHILE_BORROWING = "reclaim_while_borrowing"
    FAIR_SHARE = "fair_share"
    MAINTENANCE = "maintenance"


SHUTDOWN = "shutdown"
"""The reason of an attempt that was put back into the queue because Phalanx itself was stopped."""

_CLAIMS: Mapping[str, str] = {
    StopReason.WITHIN_TENANT: "which goes before it within the tenant",
    StopReason.RECLAIM: "whose tenant takes its own quota back",
    StopReason.RECLAIM_WHILE_BORROWING: "whose tenant may borrow before it",
    StopReason.FAIR_SHARE: "whose tenant has less than its fair share",
}
GAVE_WAY: Mapping[str, str] = {
    StopReason.WITHIN_TENANT: "gave way to another job of its tenant",
    StopReason.RECLAIM: "gave way to a tenant that took its own quota back",
    StopReason.RECLAIM_WHILE_BORROWING: "gave way to a tenant that may borrow before it",
    StopReason.FAIR_SHARE: "gave way to a tenant that has less than its fair share",
    StopReason.MAINTENANCE: "its node goes into maintenance",
    SHUTDOWN: "Phalanx was stopped",
}
"""What is said of an attempt that has ended for a reason."""


def cause_of(reason: str) -> StopCause:
    """As what an attempt is stopped that a plan preempts."""
    return StopCause.DRAIN if reason == StopReason.MAINTENANCE else StopCause.PREEMPTION


@dataclass(frozen=True, slots=True, kw_only=True)
class GivingWay:
    """What a plan asks of a running job. `whom` is the job that it is for, in words; None = for no job."""

    cause: StopCause
    whom: str | None
    reason: str = ""
    lost_gpu_s: float = 0.0
    replicas: int = 0
    next_replicas: int = 0
    next_nodes: tuple[str, ...] = ()

    def message(self) -> str:
        """One sentence."""
        return f"{self._what()}; its ranks are being ended."

    def _what(self) -> str:
        if self.cause is StopCause.RESIZE:
            return f"Goes on with {_counted(self.next_replicas)} instead of {self.replicas}{self._so_that()}"
        if self.cause is StopCause.MIGRATION:
            return f"Moves to {_some(self.next_nodes)}{self._so_that()}"
        return f"{self._to_whom()}; {_lost(self.lost_gpu_s)}"

    def _to_whom(self) -> str:
        if self.cause is StopCause.DRAIN:
            return "Gives way to the maintenance of its node"
        claim = _CLAIMS.get(self.reason, self.reason)
        return f"Gives way to {self.whom or 'another job'}, {claim}" if claim else f"Gives way to {self.whom}"

    def _so_that(self) -> str:
        return f", so that {self.whom} can start" if self.whom else ""


def _lost(gpu_s: float) -> str:
    if gpu_s < 1:
        return "nothing of its work is lost"
    return f"{gpu_s:,.0f} GPU-seconds of work that no checkpoint holds are lost"


def _counted(replicas: int) -> str:
    return "1 replica" if replicas == 1 else f"{replicas} replicas"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
