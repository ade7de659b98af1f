"""What a runner shows of attempts whose ranks are yet to be started: an agent that died has left them to the next."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from phalanx_worker.agent.desired import Group, GroupState
from phalanx_worker.agent.hosts import read_table
from phalanx_worker.node.orders import StartFailed

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_table_shows_what_is_prepared_until_it_is_killed(
    workbench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, built = workbench.runners[0], asyncio.Event()

    async def build(*_: object) -> None:
        await built.wait()

    monkeypatch.setattr(type(runner._duties.launcher), "prepare", build)
    first, second = workbench.attempt("true"), workbench.attempt("true")
    orders = [await each.order(0, {"host": "127.0.0.1", "port": 0}) for each in (first, second)]
    epochs = {order["desired"]["attempt_id"]: order["desired"]["epoch"] for order in orders}
    seq = (await runner.next_facts(-1, 0))["seq"]

    async def shows(**expected: Group) -> None:
        nonlocal seq
        table: dict[str, Group] | None = None
        while table != expected:
            facts = await asyncio.wait_for(runner.next_facts(seq, 30), 10)  # it must not wait for its time to be over
            seq = facts["seq"]
            table = {name: group for name, group in read_table(facts).items() if name in epochs}

    of = {name: Group(epoch, GroupState.PREPARING) for name, epoch in epochs.items()}
    calls = [asyncio.create_task(runner.prepare_group(order)) for order in orders]
    await shows(**of)
    await runner.kill_group(second.id)
    with pytest.raises(StartFailed, match="stopped"):
        await calls[1]
    del of[second.id]
    await shows(**of)
    built.set()
    await calls[0]
    assert not runner._preparing, "it waits for the other nodes"
    await shows(**of)
    await runner.kill_group(first.id)
    await shows()


async def test_what_has_ranks_is_shown_as_a_group_alone(workbench: Any) -> None:
    attempt = workbench.attempt("true")
    await attempt.run()
    await attempt.exits()
    facts = await workbench.runners[0].next_facts(-1, 0)
    assert attempt.id not in {row["attempt_id"] for row in facts["preparing"]}
    assert read_table(facts)[attempt.id].state is GroupState.ENDED
