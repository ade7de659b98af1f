"""Owns how a gang is laid out over its nodes: groups, ranks and GPU indices.

A group is all replicas of an attempt on one node. Ranks number node by node, in the order in which the nodes are given.
Refuses to know which nodes are free: the caller says which GPUs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """So many replicas on a node of which these GPUs are free."""

    node: str
    replicas: int
    free_gpus: Sequence[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Its ranks are `first_rank .. first_rank + ranks - 1`; it shares the GPUs of its replicas."""

    node: str
    replicas: int
    gpu_indices: tuple[int, ...]
    group_rank: int
    first_rank: int
    ranks: int


def lay_out(seats: Sequence[Seat], *, gpus_per_replica: int, ranks_per_replica: int) -> tuple[Group, ...] | None:
    """One group per seat, each on the lowest free GPUs of its node; None if a node has too few."""
    groups: list[Group] = []
    first_rank = 0
    for seat in seats:
        gpus = seat.replicas * gpus_per_replica
        if gpus > len(seat.free_gpus):
            return None
        indices = tuple(sorted(seat.free_gpus)[:gpus])
        ranks = seat.replicas * ranks_per_replica
        groups.append(Group(seat.node, seat.replicas, indices, len(groups), first_rank, ranks))
        first_rank += ranks
    return tuple(groups)
