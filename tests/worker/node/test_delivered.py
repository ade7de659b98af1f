"""When a group counts as over for the server too: what its ranks left behind has arrived there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phalanx_worker.node.link import Link
from phalanx_worker.node.outbox import Outbox
from phalanx_worker.node.spool import Spool
from phalanx_worker.protocol import Heartbeat, MetricPoint, NodeStats

pytestmark = pytest.mark.asyncio(loop_scope="session")

KEY = ("att_a", 1)


async def ended(runner: Any, attempt: Any) -> dict[str, Any]:
    await attempt.exits()
    return next(row for row in (await runner.next_facts(-1, 0))["groups"] if row["attempt_id"] == attempt.id)


async def test_in_the_usual_case_a_group_ends_delivered(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path
) -> None:
    runner = await light_runner(server)
    attempt = make_workbench([runner], server, tmp_path).attempt("echo hello")
    await attempt.start()
    seq = -1
    while True:
        facts = await runner.next_facts(seq, 5)
        seq, (row,) = facts["seq"], facts["groups"]
        assert row["delivered"] == (row["state"] == "ended"), "its end is told once, and waits for nothing"
        if row["delivered"]:
            break
    assert server.text(attempt.id, rank=0) == "hello\n"


@pytest.mark.parametrize("answers_as_a_proxy", [False, True])
async def test_a_group_that_ends_in_an_outage_is_delivered_after_it(
    light_runner: Any, server: Any, make_workbench: Any, tmp_path: Path, answers_as_a_proxy: bool
) -> None:
    """Also where something else answers in the server's place: it is not the one to refuse a report."""
    runner = await light_runner(server)
    attempt = make_workbench([runner], server, tmp_path).attempt("echo hello")
    server.answers_as_a_proxy, server.status = answers_as_a_proxy, 404 if answers_as_a_proxy else 503
    await attempt.start()
    assert not (await ended(runner, attempt))["delivered"]
    server.answers_as_a_proxy, server.status = False, 200
    seq = (await runner.next_facts(-1, 0))["seq"]
    (row,) = (await runner.next_facts(seq, 10))["groups"]
    assert row["delivered"], "the agent is told when it is"
    assert server.text(attempt.id, rank=0) == "hello\n"
    assert not server.marks(attempt.id, "dropped")


async def test_what_is_held_in_memory_or_on_disk_is_told_apart_by_attempt(tmp_path: Path) -> None:
    outbox = Outbox("boot")
    link = Link(outbox, Spool(tmp_path), lambda: Heartbeat([], NodeStats(0.0, 0), warm_ready=True))
    assert not link.holds(KEY)
    outbox.put(MetricPoint(*KEY, rank=0, at=1.0, step=1, values={"loss": 1.0}))
    assert link.holds(KEY)
    await link.close()
    assert not outbox.filled.is_set()
    assert link.holds(KEY), "on disk"
    assert not link.holds(("att_b", 1))
