"""The kinds of events in the history of jobs and nodes.

Owns the names. A job's state events are named after the state that it entered.
"""

from enum import StrEnum

from phalanx_server.domain.job import TERMINAL


class EventKind(StrEnum):
    SUBMITTED = "submitted"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    HELD = "held"
    RELEASED = "released"
    CANCEL_REQUESTED = "cancel_requested"
    REQUEUE_REQUESTED = "requeue_requested"
    PRIORITY = "priority"
    DEPENDENCY_MET = "dependency_met"

    ENVIRONMENT = "environment"
    GANG_READY = "gang_ready"
    RENDEZVOUS = "rendezvous"
    FIRST_STEP = "first_step"
    CHECKPOINT = "checkpoint"
    ATTEMPT_ENDED = "attempt_ended"
    ATTEMPT_LOST = "attempt_lost"
    RELEASED_GPUS = "released_gpus"
    HEALTH = "health"
    NOTE = "note"

    NODE_JOINED = "node_joined"
    NODE_LOST = "node_lost"
    NODE_BACK = "node_back"
    NODE_CORDONED = "node_cordoned"
    NODE_DRAINING = "node_draining"
    NODE_READY = "node_ready"


TERMINAL_EVENTS = frozenset(EventKind(state) for state in TERMINAL)
