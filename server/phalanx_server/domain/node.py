"""A node's states: what somebody wants of it, and what it is.

Owns the names. Refuses to know when a node counts as dead: `watch_nodes` decides that.
"""

from enum import StrEnum


class NodeState(StrEnum):
    """`ready` takes work · `cordoned` takes nothing new · `draining` is also being emptied · `lost` was given up."""

    READY = "ready"
    CORDONED = "cordoned"
    DRAINING = "draining"
    LOST = "lost"


WANTED_STATES = frozenset({NodeState.READY, NodeState.CORDONED, NodeState.DRAINING})
