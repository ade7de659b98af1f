"""Owns what nodes that are going away mean for the jobs on them: those on draining nodes move where there is room
elsewhere, and those in a maintenance window that has begun are stopped.

Refuses to touch what is inside its minimum run time, and to move what is not preemptible.
"""

from phalanx_server.scheduling.consolidate import may_move, spot_for
from phalanx_server.scheduling.draft import Draft, Room
from phalanx_server.scheduling.place import Spot
from phalanx_server.scheduling.snapshot import Seat

MAINTENANCE = "maintenance"


def empty_nodes(draft: Draft) -> None:
    """Stop what is in a window, and move what is on draining nodes."""
    world = draft.world
    in_window = draft.windows.closed()
    if not (draft.table.states == "draining").any() and not in_window.any():
        return
    for running in sorted(world.running.values(), key=lambda r: (-r.job.priority, r.job.submitted_at, r.job.id)):
        nodes = [world.nodes[item.node] for item in running.job.placement]
        if world.is_lost(running) or not running.may_be_disturbed(world.now):
            continue
        if in_window[running.load.columns].any():
            nowhere = Spot(None, [], [])
            draft.make(Room(nowhere, evicted=((running, MAINTENANCE),)), None)
        elif any(node.state == "draining" for node in nodes) and may_move(draft, running):
            draft.soon.take(running.load, -1)  # what it has on nodes that stay it may keep
            spot = spot_for(draft, running, [draft.soon])
            draft.soon.take(running.load)
            if spot is not None:
                seat = Seat(gpu_type=running.gpu_type, placement=spot.placement(draft.table))
                draft.make(Room(spot, moved=((running, seat),)), None)
