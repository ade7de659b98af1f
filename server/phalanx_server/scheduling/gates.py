"""Owns the gates that a job must pass whatever is free: on hold, dependencies, arrays, times.

Refuses to know nodes and quotas. Gates are looked at in the order of precedence of their reasons.
"""

from collections.abc import Mapping

from phalanx_server.domain.reason import ArrayFull, Backoff, Carbon, Explanation, Held, NotBefore, WaitsForJobs
from phalanx_server.scheduling.order import Gates
from phalanx_server.scheduling.snapshot import Dependency


def closed_gate(gates: Gates, now: float, running_in_array: Mapping[str, int]) -> Explanation | None:
    """The first gate that is closed, or None. `running_in_array`: jobs by array that run, stop, or were started in this
    pass; it only grows in a pass, so that a gate once closed stays closed."""
    if gates.held:
        return Held()
    if gates.after:
        return _waits_for(gates.after)
    array = gates.array
    if array is not None and array.max_running is not None and running_in_array.get(array.id, 0) >= array.max_running:
        return ArrayFull(array.id, array.max_running)
    return _not_yet(gates, now)


def _waits_for(after: tuple[Dependency, ...]) -> Explanation:
    return WaitsForJobs(
        to_end=tuple(sorted(d.job for d in after if d.on == "any")),
        to_succeed=tuple(sorted(d.job for d in after if d.on == "ok")),
    )


def _not_yet(gates: Gates, now: float) -> Explanation | None:
    times = ((NotBefore, gates.not_before), (Backoff, gates.backoff_until), (Carbon, gates.delay_until))
    pending = [(kind, at) for kind, at in times if at is not None and at > now]
    if not pending:
        return None
    kind, until = pending[0]
    return kind(until=until, opens_at=max(at for _, at in pending))
