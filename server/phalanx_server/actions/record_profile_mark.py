"""Take what a rank, or its node in its name, says of a profile that it was asked for.

Owns what is believed: `recording` and `failed`. That a trace is there is seen when it comes (`save_trace`).
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from phalanx_server.domain.messages import Mark, plain
from phalanx_server.domain.profile import ProfileState
from phalanx_server.store import ids
from phalanx_server.store.attempts import Fence
from phalanx_server.store.profiles import move_rank

REASON_MAX_CHARS = 500
_SAID = frozenset({ProfileState.RECORDING, ProfileState.FAILED})


async def record_profile_mark(conn: AsyncConnection, fence: Fence, mark: Mark, now: datetime) -> None:
    """One that makes no sense is passed over: any rank may send any."""
    data = plain(mark.data)
    try:
        profile_id = ids.parse("profile", str(data.get("id")))
    except ValueError:
        return
    state = data.get("state")
    if state in _SAID:
        reason = str(data.get("reason") or "no reason was given")[:REASON_MAX_CHARS]
        said = {"state": state, "reason": reason if state == ProfileState.FAILED else ""}
        await move_rank(conn, profile_id, mark.rank, attempt_id=fence.id, **said, now=now)
