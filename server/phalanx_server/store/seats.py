"""Seats: the place of a whole gang, as it is stored with an attempt that goes on elsewhere or a job that waits for it.

Owns their JSON. Nodes are named as in snapshots: their uuid in hex.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phalanx_server.scheduling.snapshot import PlacementItem, Seat


def dump_seat(seat: Seat | None) -> dict[str, Any] | None:
    if seat is None:
        return None
    placement = [{"node": item.node, "replicas": item.replicas} for item in seat.placement]
    return {"gpu_type": seat.gpu_type, "placement": placement}


def read_seat(stored: Mapping[str, Any] | None) -> Seat | None:
    if stored is None:
        return None
    placement = tuple(PlacementItem(item["node"], item["replicas"]) for item in stored["placement"])
    return Seat(gpu_type=stored["gpu_type"], placement=placement)
