"""A group that takes no step any more: its stacks are kept, its owner is told, and it is ended if its job says so.

Owns that sequence. When a group is hung is `pace.py`'s to say.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from phalanx_worker.node import offences, stacks
from phalanx_worker.node.ranks import Group

log = logging.getLogger("phalanx.node.hangs")

_OTHERS_S = 3.0  # for the agent, to have the stacks of the other nodes kept: once ranks end here, those there fail


async def attend(group: Group) -> None:
    """To be called once for each hang."""
    pace, action = group.pace, group.health.hang
    times = f", {pace.hung_s / pace.median_s:.0f} times the median" if pace.median_s else ""
    reason = f"took no step for {pace.hung_s:.0f} s{times}"
    kept = await keep_stacks(group)
    data = {"check": "hang", "action": action, "message": f"{_who(group)} {reason}{kept}", "blamed": pace.laggard}
    group.note("health", data)
    if action in ("restart", "stop") and len(group.order.desired.groups) > 1:
        await asyncio.sleep(_OTHERS_S)
    if action in ("restart", "stop") and pace.hung_s:
        group.fail(offences.hang(reason, rank=pace.laggard, final=action == "stop"))


async def keep_stacks(group: Group) -> str:
    """Keep what its ranks are doing among the outputs of the job; says where, in words that end a sentence."""
    exited = {end.rank for end in group.exits}
    pids = {start.rank: start.pid for start in group.starts if start.rank not in exited}
    name = f"attempt-{group.order.desired.number}-{time.strftime('%H%M%S', time.gmtime())}"
    try:
        read = await stacks.keep(pids, Path(group.places.output), name, group.uid)
    except OSError as error:
        log.warning("the stacks of %s cannot be kept: %s", group.order.attempt_id, error)
        return ""
    return f"; the stacks of {read} of its {len(pids)} ranks here are in stacks/{name}" if pids else ""


def _who(group: Group) -> str:
    laggard = group.pace.laggard
    return "the job" if laggard is None else f"rank {laggard}"
