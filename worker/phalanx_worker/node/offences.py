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
    """`reason` follows a rank's name in a sentence. `rank`: which one, None for any. `data` goes with the mark."""

    reason: str
    rank: int | None = None
    is_oom: bool = False
    data: dict[str, Any] = field(default_factory=dict)

    def reason_for(self, rank: int) -> str:
        """What to say of that rank's end."""
        if self.rank in (None, rank):
            return self.reason
        return f"was ended because rank {self.rank} {self.reason}"


def out_of_memory(order: GroupOrder, limit_bytes: int, *, rank: int | None, used_bytes: int | None = None) -> Offence:
    """`limit_bytes` 0: it was the node that had none left."""
    several = f" for the {order.group.ranks} ranks on this node" if order.group.ranks > 1 else ""
    limit = f"the limit is {sizes.text(limit_bytes)}{several}" if limit_bytes else "its node had none left"
    data = {"limit_bytes": limit_bytes, "used_bytes": used_bytes or limit_bytes}
    return Offence(f"ran out of memory: {limit}", rank, is_oom=True, data=data)


def foreign_gpu(indices: list[int]) -> Offence:
    return Offence(f"used GPU {', '.join(map(str, indices))} of its node, which it was not given")


def disk_full(used_bytes: int, allowed_bytes: int) -> Offence:
    wrote, allowance = sizes.text(used_bytes), sizes.text(allowed_bytes)
    return Offence(
        f"wrote {wrote} into its directories on this node; the allowance is {allowance}",
        data={"used_bytes": used_bytes, "limit_bytes": allowed_bytes},
    )
