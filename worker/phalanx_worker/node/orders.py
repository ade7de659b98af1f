"""What the agent asks of a runner: one group of one attempt, and the settings of the node.

Owns the reading of both from their JSON form, and `StartFailed`, the one error that a start may end with.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from phalanx_worker import protocol
from phalanx_worker.protocol import DesiredAttempt, GroupPlacement


class StartFailed(Exception):
    """A group could not be started; nothing of it runs. The message, one line, is for the user. `permanent`: another
    try would end the same on any node of any cluster, whatever its operator has set."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True)
class Settings:
    """From `configure`; sent again whenever the token changes or another agent takes over."""

    server_url: str
    node_token: str
    data_dir: str
    checkpoint_root: str | None = None
    fence_s: float = 60.0
    heartbeat_s: float = 2.0
    outage_tolerance_s: float = 3_600.0
    own_users: bool = False
    environments_bytes: int = 20 << 30  # environments that nobody uses go beyond this
    allow_mounts: list[str] = field(default_factory=list)  # directories that jobs may mount, `:ro` for only to read
    disk_bytes: int = 64 << 30  # that the directories of one group may hold; 0: no limit

    @classmethod
    def read(cls, values: dict[str, Any]) -> Settings:
        """Unknown keys are ignored: a newer agent may send more. Raises ValueError naming what is missing."""
        known = {spec.name: spec for spec in dataclasses.fields(cls)}
        given = {name: value for name, value in values.items() if name in known and value is not None}
        required = [name for name, spec in known.items() if spec.default is spec.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in given]
        if missing:
            raise ValueError(f"runner settings lack {', '.join(missing)}")
        return cls(**given)


@dataclass(frozen=True)
class GroupOrder:
    """One group to start. `hosts_rendezvous`: the socket reserved for this attempt on this node serves the store."""

    desired: DesiredAttempt
    group: GroupPlacement
    master_addr: str
    master_port: int
    hosts_rendezvous: bool

    @property
    def attempt_id(self) -> str:
        return self.desired.attempt_id

    @property
    def epoch(self) -> int:
        return self.desired.epoch

    @property
    def memory_limit_bytes(self) -> int:
        limits = self.desired.launch.memory_bytes_per_group
        return limits[self.group.group_rank] if self.group.group_rank < len(limits) else 0

    @property
    def name(self) -> str:
        """Of this group among all of a node."""
        return f"{self.attempt_id}-{self.group.group_rank}"

    @property
    def cpu_limit(self) -> float:
        """Cores of the group; 0 where nothing was said."""
        cpus = self.desired.launch.cpus_per_group
        return max(0.0, cpus[self.group.group_rank]) if self.group.group_rank < len(cpus) else 0.0

    @property
    def cpus(self) -> int:
        """Whole cores of the group, at least one; 0 where nothing was said."""
        return max(1, int(self.cpu_limit)) if self.cpu_limit > 0 else 0

    @classmethod
    def read(cls, order: dict[str, Any]) -> GroupOrder:
        """Raises StartFailed where the order makes no sense."""
        try:
            desired = protocol.decode(DesiredAttempt, order["desired"])
            group_rank = int(order["group_rank"])
            group = next(group for group in desired.groups if group.group_rank == group_rank)
            return cls(
                desired=desired,
                group=group,
                master_addr=str(order["master_addr"]),
                master_port=int(order["master_port"]),
                hosts_rendezvous=bool(order["hosts_rendezvous"]),
            )
        except StopIteration:
            raise StartFailed(f"the order names group {order['group_rank']}, which the attempt does not have") from None
        except (KeyError, TypeError, ValueError) as error:
            raise StartFailed(f"the order cannot be read: {error}") from error
