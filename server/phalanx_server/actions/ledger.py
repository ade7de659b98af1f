"""The ledger of a commit: what is free on the nodes that a plan names, and what its decisions take of it.

Owns the arithmetic. *Free* is what nobody holds and no stopping attempt goes on in: what may start now starts there.
*Soon* is what will be free once all that is stopping has stopped, and goes on where it shall: where an attempt that is
asked to stop may go on. Refuses to know jobs and plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.gang import Group, Seat, lay_out
from phalanx_server.domain.node import NodeState
from phalanx_server.scheduling.snapshot import PlacementItem, spread
from phalanx_server.store.charges import (
    NO_NEXT,
    NOTHING,
    Amounts,
    Charge,
    charges,
    charges_that_stay,
    next_charges,
)
from phalanx_server.store.nodes import lock_nodes_for_placing
from phalanx_server.store.snapshots import silent_clusters

Replicas = Mapping[UUID, int]
"""How many by node."""


@dataclass
class Free:
    """What is left of a node. `reserved_gpus` of those whose indices are free are kept for what stops."""

    gpu_indices: list[int]
    reserved_gpus: int
    cpus: float
    memory_bytes: int

    @property
    def gpus(self) -> int:
        return len(self.gpu_indices) - self.reserved_gpus


@dataclass
class Ledger:
    """The locked nodes, the clusters that are silent, and what is left after the decisions taken so far."""

    nodes: Mapping[UUID, Row[Any]]
    silent: frozenset[UUID]
    free: dict[UUID, Free] = field(default_factory=dict)
    soon: dict[UUID, Amounts] = field(default_factory=dict)

    @classmethod
    async def open(cls, conn: AsyncConnection, node_ids: set[UUID], *, now: datetime, soon: bool) -> Ledger:
        """Lock these nodes and read what is charged on them; what will be `soon` only where it is asked for."""
        if not node_ids:
            return cls({}, frozenset())
        nodes = await lock_nodes_for_placing(conn, list(node_ids))
        held, coming = await charges(conn, node_ids), await next_charges(conn, node_ids)
        ledger = cls(nodes, await silent_clusters(conn, now=now))
        for node_id, node in nodes.items():
            ledger.free[node_id] = _free(node, held.get(node_id, Charge()), coming.get(node_id, NO_NEXT).beyond)
        if soon:
            stays = await charges_that_stay(conn, node_ids)
            for node_id, node in nodes.items():
                whole = Amounts(node.gpus, node.cpus, node.memory_bytes)
                taken = stays.get(node_id, NOTHING) + coming.get(node_id, NO_NEXT).whole
                ledger.soon[node_id] = whole - taken
        return ledger

    def cluster_of(self, placement: Sequence[PlacementItem]) -> UUID:
        return self.nodes[UUID(hex=placement[0].node)].cluster_id

    def place(self, placement: Sequence[PlacementItem], resources: Mapping[str, Any]) -> tuple[Group, ...] | str:
        """Take what the whole gang needs and lay it out, nodes by name; or take nothing and say why."""
        replicas = by_node(placement)
        reason = self.closed(replicas) or self._shortage(replicas, resources)
        if reason is not None:
            return reason
        in_order = sorted(replicas, key=lambda node_id: (self.nodes[node_id].name, node_id))
        groups = lay_out(
            [Seat(node_id.hex, replicas[node_id], self.free[node_id].gpu_indices) for node_id in in_order],
            gpus_per_replica=resources["gpus_per_replica"],
            ranks_per_replica=resources["ranks_per_replica"],
        )
        if groups is None:
            return "GPUs are no longer free"
        for group in groups:
            self._take(group, resources)
        return groups

    def closed(self, replicas: Replicas) -> str | None:
        """Why a gang may not go there, room apart."""
        for node_id in replicas:
            node = self.nodes.get(node_id)
            if node is None or node.state != NodeState.READY or not node.alive:
                return "a node does not take work"
            if node.cluster_id in self.silent:
                return f"the agent of {node.name} is silent"
        if len({self.nodes[node_id].cluster_id for node_id in replicas}) > 1:
            return "a gang does not span clusters"
        return None

    def _shortage(self, replicas: Replicas, resources: Mapping[str, Any]) -> str | None:
        for node_id, count in replicas.items():
            name, free, asked = self.nodes[node_id].name, self.free[node_id], asked_of(resources, count)
            if asked.gpus > free.gpus:
                return f"GPUs of {name} are no longer free"
            if asked.cpus > free.cpus:
                return f"CPUs of {name} are no longer free"
            if asked.memory_bytes > free.memory_bytes:
                return f"memory of {name} is no longer free"
        return None

    def _take(self, group: Group, resources: Mapping[str, Any]) -> None:
        node_id = UUID(hex=group.node)
        free, asked = self.free[node_id], asked_of(resources, group.replicas)
        free.gpu_indices = [index for index in free.gpu_indices if index not in group.gpu_indices]
        free.cpus -= asked.cpus
        free.memory_bytes -= asked.memory_bytes
        if node_id in self.soon:
            self.soon[node_id] -= asked


def _free(node: Row[Any], held: Charge, beyond: Amounts) -> Free:
    return Free(
        gpu_indices=[index for index in range(node.gpus) if index not in held.gpu_indices],
        reserved_gpus=beyond.gpus,
        cpus=node.cpus - held.cpus - beyond.cpus,
        memory_bytes=node.memory_bytes - held.memory_bytes - beyond.memory_bytes,
    )


def by_node(placement: Sequence[PlacementItem]) -> Replicas:
    return {UUID(hex=node): count for node, count in spread(placement).items()}


def asked_of(resources: Mapping[str, Any], replicas: int) -> Amounts:
    """What so many replicas take of their node. `resources` as in the canonical job file."""
    return Amounts(
        replicas * resources["gpus_per_replica"],
        replicas * resources["cpus_per_replica"],
        replicas * resources["memory_per_replica"],
    )
