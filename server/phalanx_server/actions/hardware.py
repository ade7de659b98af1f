"""The nodes that there are, as submits look at them: what one can hold, what all together can, who shares checkpoints.

Owns how long such a look is trusted. Nodes of every state count: a job that has to wait for one is accepted.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.spec import Resources
from phalanx_server.store.hardware import NodeKind, node_kinds
from phalanx_server.store.node_views import without_shared_checkpoints

TTL_S = 5.0
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Largest:
    """The most that any node of one GPU type has, of each thing by itself."""

    gpus: int
    cpus: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Most:
    """The most replicas that all nodes together hold, and the GPU type on which they do (None = it plays no part)."""

    replicas: int
    gpu_type: str | None
    of_several_types: bool  # others that it accepts hold some as well


@dataclass(frozen=True)
class Hardware:
    """One look. Empty where no node has ever been seen."""

    kinds: Sequence[NodeKind] = ()
    unshared: Sequence[str] = ()  # some of the nodes whose checkpoint directory no other node sees
    _most: dict[tuple[object, ...], Most] = field(default_factory=dict, compare=False)

    @cached_property
    def largest(self) -> Mapping[str, Largest]:
        """By GPU type."""
        by_type: dict[str, list[NodeKind]] = defaultdict(list)
        for kind in self.kinds:
            by_type[kind.gpu_type].append(kind)
        return {
            gpu_type: Largest(
                max(kind.gpus for kind in kinds),
                max(kind.cpus for kind in kinds),
                max(kind.memory_bytes for kind in kinds),
            )
            for gpu_type, kinds in by_type.items()
        }

    def most_replicas(self, asked: Resources) -> Most:
        """How many replicas all nodes that a gang may lie on hold together: those of one cluster and, for GPUs, of one
        type. The pass counts the same (`scheduling.fit.EmptyCluster`)."""
        wanted = (asked.gpus_per_replica, asked.cpus_per_replica, asked.memory_per_replica, asked.gpu_types)
        if wanted not in self._most:
            by_pool: dict[tuple[UUID, str | None], int] = defaultdict(int)
            for kind in self._accepted(asked):
                if replicas := kind.nodes * _holds(kind, asked):
                    by_pool[kind.cluster_id, kind.gpu_type if asked.gpus_per_replica else None] += replicas
            replicas = max(by_pool.values(), default=0)
            best = min((pool[1] or "" for pool, each in by_pool.items() if each == replicas), default="")
            self._most[wanted] = Most(replicas, best or None, len({pool[1] for pool in by_pool}) > 1)
        return self._most[wanted]

    def most_on_one_node(self, asked: Resources) -> int:
        """How many replicas the node that holds most of them holds."""
        return max((_holds(kind, asked) for kind in self._accepted(asked)), default=0)

    def _accepted(self, asked: Resources) -> list[NodeKind]:
        return [kind for kind in self.kinds if not asked.gpu_types or kind.gpu_type in asked.gpu_types]


def _holds(kind: NodeKind, asked: Resources) -> int:
    """How many replicas one such node holds when it is empty; REPLICAS_MAX and more where they ask for nothing."""
    amounts = (
        (kind.gpus, asked.gpus_per_replica),
        (kind.cpus, asked.cpus_per_replica),
        (kind.memory_bytes // GIB, math.ceil(asked.memory_per_replica / GIB)),
    )
    return min((there // each for there, each in amounts if each), default=1 << 30)


class HardwareWatch:
    """The newest look, and when it was taken."""

    def __init__(self) -> None:
        self._seen = Hardware()
        self._read_at = -TTL_S

    def recent(self) -> Hardware | None:
        """None where it is too old to be trusted."""
        return self._seen if time.monotonic() - self._read_at < TTL_S else None

    async def look(self, conn: AsyncConnection) -> Hardware:
        self._seen = Hardware(await node_kinds(conn), await without_shared_checkpoints(conn))
        self._read_at = time.monotonic()
        return self._seen
