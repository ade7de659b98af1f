"""Why a node ends a group of its own accord, in words for the job's owner.

Owns the sentences. Watches nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from phalanx_worker.node import sizes
from phalanx_worker.node.orders import GroupOrder


@dataclass(frozen=True)
class Offence:
    """`reason` follows a rank's name in a sentence. `rank`: which one, None for any. `fault`: `oom`, or as in
    `RankExit`; `final`: the job is not to be tried again. `data` goes with the mark."""

    reason: str
    rank: int | None = None
    fault: str = ""
    final: bool = False
    data: dict[str, Any] = field(default_factory=dict)

    def reason_for(self, rank: int) -> str:
        """What to say of that rank's end."""
        if self.rank in (None, rank):
            return self.reason
        return f"was ended because rank {self.rank} {self.reason}"


@dataclass
class Blame:
    """Why a group ends, as far as its node knows: what it was ended for, or what a rank said before it ended itself
    (`verdicts`, by rank). The first counts."""

    offence: Offence | None = None
    verdicts: dict[int, Offence] = field(default_factory=dict)

    def take_verdict(self, rank: int) -> None:
        """That rank has failed: for what it said, or for what another rank of the group did."""
        self.offence = self.offence or self.verdicts.get(rank) or next(iter(self.verdicts.values()), None)

    @property
    def is_oom(self) -> bool:
        return self.offence is not None and self.offence.fault == "oom"

    @property
    def fault(self) -> str:
        """As in `RankExit`."""
        return "" if self.offence is None or self.is_oom else self.offence.fault

    @property
    def is_final(self) -> bool:
        return self.offence is not None and self.offence.final

    def reason(self, rank: int) -> str:
        """What to say of that rank's end; "" where it ended by itself."""
        return self.offence.reason_for(rank) if self.offence is not None else ""

    def culprit(self, failed_rank: int) -> int | None:
        """Whose node is to blame; None where nobody knows: a rank that hangs makes all others wait."""
        if self.offence is None or (self.offence.rank is None and self.offence.fault != "hang"):
            return failed_rank
        return self.offence.rank


def out_of_memory(order: GroupOrder, limit_bytes: int, *, rank: int | None, used_bytes: int | None = None) -> Offence:
    """`limit_bytes` 0: it was the node that had none left."""
    several = f" for the {order.group.ranks} ranks on this node" if order.group.ranks > 1 else ""
    limit = f"the limit is {sizes.text(limit_bytes)}{several}" if limit_bytes else "its node had none left"
    data = {"limit_bytes": limit_bytes, "used_bytes": used_bytes or limit_bytes}
    return Offence(f"ran out of memory: {limit}", rank, "oom", data=data)


def hang(reason: str, *, rank: int | None, final: bool) -> Offence:
    return Offence(reason, rank, "hang", final)


def own_check(data: dict[str, Any], *, may_be_unfit: bool) -> Offence:
    """Of a rank that said what it found before it ended itself. Nothing of that is trusted."""
    message, rank = str(data.get("message") or "a health check failed")[:300], data.get("blamed")
    blamed = rank if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 else None
    fault = "preflight" if data.get("check") == "preflight" and may_be_unfit else "health"
    return Offence(f"stopped itself: {message}", blamed, fault, data.get("action") == "stop")


def sick_gpu(reason: str, *, final: bool) -> Offence:
    return Offence(reason, None, "health", final)


def foreign_gpu(indices: list[int]) -> Offence:
    return Offence(f"used GPU {', '.join(map(str, indices))} of its node, which it was not given")


def disk_full(used_bytes: int, allowed_bytes: int) -> Offence:
    wrote, allowance = sizes.text(used_bytes), sizes.text(allowed_bytes)
    return Offence(
        f"wrote {wrote} into its directories on this node; the allowance is {allowance}",
        data={"used_bytes": used_bytes, "limit_bytes": allowed_bytes},
    )
