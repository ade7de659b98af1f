"""The launcher by itself: no end of an attempt is told while one of its nodes may still have something of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from agent_fakes import FakePlacements, FakeRunner
from link_server import attempt_of
from phalanx_worker.agent import launch
from phalanx_worker.agent.desired import Gang, Group, GroupState, Phase
from phalanx_worker.agent.hosts import Host, Hosts, RunnerGone, RunnerUnavailable
from phalanx_worker.agent.launch import Launcher
from phalanx_worker.protocol import AttemptFact, NodeFacts

GANG = attempt_of("att_1", "train", {"a": [0, 1], "b": [0, 1]})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "RETRY_S", 0.01)


class Scene:
    """Two nodes, on which a dead agent had begun GANG: `a` has its ranks, `b` is said to be starting them."""

    def __init__(self) -> None:
        self.told: list[AttemptFact] = []
        self.runners = {name: FakeRunner(name) for name in ("a", "b")}
        self.placements = FakePlacements(placed={"att_1"}, entered={"att_1"})
        source: Any = None  # nobody follows these runners
        self.hosts = Hosts(source=source, changed=lambda: None)
        for name, runner in self.runners.items():
            facts = NodeFacts(name, f"ray-{name}", "emulated", gpus=2, cpus=2, memory_bytes=1 << 30, address="::1")
            self.hosts.by_name[name] = Host(facts, generation=1, runner=runner, table={})
        self.launcher = Launcher(self.hosts, self.placements, self.deliver, is_desired=lambda *_: True)
        self.gang = Gang("att_1", GANG.epoch, Phase.CLOSING, GANG)
        self.begin("a")

    def begin(self, node: str) -> None:
        ranks = {"a": range(2), "b": range(2, 4)}[node]
        group = {"epoch": GANG.epoch, "ranks": ranks, "exits": [], "failed": None, "order": {}}
        self.runners[node].groups["att_1"] = group

    async def deliver(self, fact: AttemptFact, *, urgent: bool = True) -> bool:
        """The server frees the GPUs of what it is told of."""
        for name, runner in self.runners.items():
            assert not self.runs(name), f"{fact.kind} is told while ranks run on {name}"
            assert ("kill_group", "att_1") in runner.calls, f"{fact.kind} is told though {name} was not cleared"
        assert not self.placements.attempts(), f"{fact.kind} is told though its resources are not given back"
        self.told.append(fact)
        return True

    def runs(self, node: str) -> bool:
        group = self.runners[node].groups.get("att_1")
        return group is not None and len(group["exits"]) < len(group["ranks"])

    def asked_to_kill(self, node: str) -> int:
        return self.runners[node].calls.count(("kill_group", "att_1"))

    def die(self, node: str) -> None:
        self.hosts._let_go(self.hosts.by_name[node])

    async def refuse(self) -> None:
        await self.launcher.refuse(self.gang, GANG, message="stopped before it started", node=None, remains=True)

    async def start(self) -> None:
        await self.launcher.start(self.gang, GANG, remains=True)

    async def close(self) -> None:
        await self.launcher.close(self.gang, GANG)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    yield Scene()


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not what():  # noqa: ASYNC110  (what the test looks at has no event)
            await asyncio.sleep(0.005)


async def test_what_an_earlier_agent_began_is_cleared_before_it_is_refused(scene: Scene) -> None:
    await scene.refuse()
    assert [(fact.kind, fact.message) for fact in scene.told] == [("start_failed", "stopped before it started")]
    assert scene.gang.phase is Phase.DONE


async def test_a_refusal_waits_for_a_start_that_ends_only_when_it_is_killed(scene: Scene) -> None:
    """A runner answers `kill_group` when the start under way has ended; till then it does not answer, or says no."""
    scene.runners["b"].hang("kill_group")
    refusing = asyncio.create_task(scene.refuse())
    await until(lambda: not scene.runs("a"))
    scene.begin("b")  # its ranks come up although nobody waits for them any more
    await asyncio.sleep(0.03)
    assert scene.told == [] and not refusing.done()
    scene.runners["b"].hang()
    await refusing
    assert [fact.kind for fact in scene.told] == ["start_failed"]


@pytest.mark.parametrize("way", ["refuse", "close", "start"])
async def test_a_silent_node_keeps_no_gpus_of_the_others(
    scene: Scene, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server loses the silent node, frees the others when their runners say so, and gives them to other jobs."""

    async def unavailable(attempt_id: str) -> None:
        raise RunnerUnavailable("it did not answer")

    monkeypatch.setattr(scene.runners["b"], "kill_group", unavailable)
    scene.gang.groups = {node: Group(1, GroupState.VANISHED) for node in ("a", "b")}
    ways = {"refuse": scene.refuse, "close": scene.close, "start": scene.start}
    under_way = asyncio.create_task(ways[way]())
    await until(lambda: not scene.runs("a") and scene.asked_to_kill("b") > 3)
    assert not scene.placements.placed
    assert not under_way.done() and scene.told == []
    assert scene.placements.attempts() == {"att_1"}, "should this agent die now, the next one has to clear it"
    assert sum("cannot be cleared from node b" in line for line in caplog.messages) == 1
    monkeypatch.undo()
    await under_way


async def test_it_is_not_forgotten_while_a_dead_node_may_still_have_ranks(scene: Scene) -> None:
    scene.die("b")
    await scene.refuse()
    assert not scene.placements.placed
    assert scene.placements.attempts() == {"att_1"}


async def test_a_clearing_that_fails_is_made_again_before_the_refusal(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, failures = scene.runners["b"], iter([RunnerGone("its actor died"), RunnerGone("the next one too")])
    kill = runner.kill_group

    async def kill_group(attempt_id: str) -> None:
        for failure in failures:
            raise failure
        await kill(attempt_id)

    monkeypatch.setattr(runner, "kill_group", kill_group)
    scene.begin("b")
    await scene.refuse()
    assert scene.asked_to_kill("b") == 3
    assert [fact.kind for fact in scene.told] == ["start_failed"]


async def test_what_may_live_on_on_a_dead_node_is_not_refused_but_left_to_the_server(scene: Scene) -> None:
    scene.die("b")
    await scene.refuse()
    assert scene.told == []
    assert (scene.gang.phase, scene.gang.stopping) == (Phase.RUNNING, True)
    states = {node: group.state for node, group in scene.gang.groups.items()}
    assert states == {"a": GroupState.ENDED, "b": GroupState.LOST}


async def test_a_node_that_dies_while_it_is_cleared_ends_no_attempt(scene: Scene) -> None:
    scene.runners["b"].hang("kill_group")
    refusing = asyncio.create_task(scene.refuse())
    await until(lambda: not scene.runs("a"))
    scene.die("b")
    scene.runners["b"].die()
    await refusing
    assert scene.told == []
    assert scene.gang.groups["b"].state is GroupState.LOST


async def test_what_nobody_began_is_refused_at_once() -> None:
    told: list[AttemptFact] = []

    async def deliver(fact: AttemptFact, *, urgent: bool = True) -> bool:
        told.append(fact)
        return True

    scene = Scene()
    scene.launcher.deliver = deliver
    for runner in scene.runners.values():
        runner.hang("kill_group")
    await scene.launcher.refuse(scene.gang, GANG, message="its node is silent", node="b", remains=False)
    assert [(fact.kind, fact.message, fact.node) for fact in told] == [("start_failed", "its node is silent", "b")]


async def test_an_end_is_told_when_nodes_that_showed_no_group_have_none(scene: Scene) -> None:
    """An adopted group that its node did not show counts as gone; a start that was on its way may have brought it."""
    scene.runners["a"].groups.clear()
    scene.runners["a"].calls.append(("kill_group", "att_1"))  # it has shown its end: nobody need ask it again
    scene.gang.groups = {"a": Group(1, GroupState.ENDED), "b": Group(1, GroupState.VANISHED)}
    scene.begin("b")
    await scene.close()
    assert [fact.kind for fact in scene.told] == ["ended"]


async def test_no_end_is_told_while_such_a_node_is_dead(scene: Scene) -> None:
    scene.gang.groups = {"a": Group(1, GroupState.ENDED), "b": Group(1, GroupState.VANISHED)}
    scene.die("b")
    await scene.close()
    assert scene.told == []
    assert scene.gang.phase is Phase.RUNNING
    assert scene.gang.groups["b"].state is GroupState.LOST
