"""An attempt can be asked to end for every cause, and each says why."""

from __future__ import annotations

import pytest
from control_plane import ControlPlane
from phalanx_server.actions.request_stop import request_stop
from phalanx_server.domain.attempt import StopCause
from phalanx_server.store.attempts import lock_attempts
from phalanx_server.store.schema import attempts, events

ASKED_FOR = [cause for cause in StopCause if cause is not StopCause.NODE_LOST]  # a lost attempt cannot be asked


@pytest.mark.parametrize("cause", ASKED_FOR)
async def test_an_attempt_is_asked_to_end_once_and_told_why(plane: ControlPlane, cause: StopCause) -> None:
    await plane.add_nodes(1)
    job_id, attempt = await plane.run(preemption={"grace": 7})
    for asked in ([job_id], []):
        async with plane.engine.begin() as conn:
            rows = await lock_attempts(conn, [attempt.id])
            assert await request_stop(conn, rows, cause=cause, now=plane.now) == asked
    (row,) = await plane.rows(attempts)
    assert (row.state, row.stop_cause, row.grace_s) == ("stopping", cause, 7)
    (told,) = [row.message for row in await plane.rows(events, events.c.id) if row.kind == "stopping"]
    assert told.endswith("its ranks are being ended.")
