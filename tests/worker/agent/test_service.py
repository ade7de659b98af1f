"""The agent against fakes of Ray and of the server: every way in which a gang begins and ends, and who hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
from agent_fakes import FakeCluster, FakeLink, FakePlacements
from link_server import attempt_of
from phalanx_worker.agent import backoff, desired, hosts, launch, profiles, service
from phalanx_worker.agent.desired import GroupState, Phase
from phalanx_worker.agent.link import Superseded
from phalanx_worker.agent.service import Agent, RunnerSettings
from phalanx_worker.node.orders import Settings
from phalanx_worker.protocol import Environment, ProfileRequest, encode

GANG = attempt_of("att_1", "train", {"a": [0, 1], "b": [0, 1]})
WITH_ENVIRONMENT = replace(GANG, launch=replace(GANG.launch, environment=Environment(["einops==0.8.1"])))
SETTINGS = RunnerSettings(server_url="http://server", data_dir="/data", checkpoint_root="/ckpt", own_users=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loops, with shorter pauses between one look and the next."""
    monkeypatch.setattr(service, "INVENTORY_POLL_S", 0.01)
    monkeypatch.setattr(backoff, "BACKOFF_S", (0.01,))
    monkeypatch.setattr(launch, "RETRY_S", 0.01)
    monkeypatch.setattr(profiles, "RETRY_S", 0.01)
    monkeypatch.setattr(launch, "RETRY_SLOWLY_S", 0.01)


class Scene:
    """Two nodes, a server, and agents that come and go."""

    def __init__(self) -> None:
        self.cluster = FakeCluster()
        self.placements = FakePlacements()
        self.link = FakeLink()
        self.a, self.b = self.cluster.add("a"), self.cluster.add("b")
        self.agent = self.new_agent()

    def new_agent(self, settings: RunnerSettings = SETTINGS, **more: Any) -> Agent:
        link: Any = self.link
        self.agent = Agent(link=link, cluster=self.cluster, placements=self.placements, settings=settings, **more)
        return self.agent

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not what():  # noqa: ASYNC110  (what the test looks at has no event)
                await asyncio.sleep(0.005)

    async def reported(self, *kinds: str, attempt_id: str = "att_1") -> None:
        await self.until(lambda: self.link.kinds(attempt_id)[-len(kinds) :] == list(kinds))

    async def started(self) -> None:
        self.link.want(GANG)
        await self.reported("gang_ready", "started")

    async def forgotten(self) -> None:
        """The server no longer wants it; nothing is left anywhere, not even in the agent's mind."""
        self.link.drop("att_1")
        await self.until(lambda: not self.agent.gangs)
        assert not self.placements.attempts()
        assert not self.a.groups
        assert not self.b.groups


@asynccontextmanager
async def running(agent: Agent) -> AsyncIterator[None]:
    task = asyncio.create_task(agent.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    async with running(scene.agent):
        yield scene


async def test_a_gang_starts_on_every_node_at_once_and_ends(scene: Scene) -> None:
    await scene.started()
    first, second = scene.a.groups["att_1"]["order"], scene.b.groups["att_1"]["order"]
    assert (first["group_rank"], first["hosts_rendezvous"]) == (0, True)
    assert (second["group_rank"], second["hosts_rendezvous"]) == (1, False)
    assert (second["master_addr"], second["master_port"]) == ("127.0.0.1", 29500)
    assert [start.rank for start in scene.link.facts[-1].ranks_started] == [0, 1, 2, 3]
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=0)
    await scene.reported("started", "ended")
    assert [end.exit_code for end in scene.link.facts[-1].exits] == [0, 0, 0, 0]
    assert scene.link.facts[-1].first_failed_rank is None
    await scene.forgotten()
    assert scene.link.kinds("att_1") == ["gang_ready", "started", "ended"]


async def test_runners_get_settings_with_their_own_token_and_directory(scene: Scene) -> None:
    await scene.until(lambda: scene.b.configured)
    assert scene.b.configured[0]["node_token"] == "token-b"
    assert scene.b.configured[0]["node_id"] == "node_b"
    assert scene.b.configured[0]["data_dir"] == "/data/b"


async def test_runners_have_no_setting_that_no_agent_sends(scene: Scene) -> None:
    await scene.until(lambda: scene.b.configured)
    assert {field.name for field in fields(Settings)} <= scene.b.configured[0].keys()


async def test_a_token_whose_answer_got_lost_is_asked_for_again() -> None:
    scene = Scene()
    scene.link.lose_answers = 1
    async with running(scene.agent):
        await scene.until(lambda: scene.a.configured and scene.b.configured)
        await scene.until(lambda: len(scene.link.token_answers) > 2)
    given = scene.link.token_answers
    assert given[:2] == [{"a": "token-a", "b": "token-b"}] * 2
    assert not any(given[2:]), "what it has it does not ask for"


async def test_once_a_node_sees_a_hang_the_others_keep_their_stacks_once(scene: Scene) -> None:
    await scene.started()
    scene.a.stuck.add("att_1")
    scene.a.bump()
    await scene.until(lambda: scene.b.stacks_kept)
    scene.a.end("att_1", signal=9, fault="hang")
    await scene.reported("ended")
    assert (scene.a.stacks_kept, scene.b.stacks_kept) == ([], ["att_1"])
    assert [end.fault for end in scene.link.facts[-1].exits] == ["hang", "hang", "", ""]


async def test_one_failing_rank_ends_the_gang(scene: Scene) -> None:
    await scene.started()
    scene.b.end("att_1", rank=3, at=7.0, exit_code=1)
    await scene.reported("ended")
    ended = scene.link.facts[-1]
    assert ended.first_failed_rank == 3
    assert [(end.rank, end.exit_code, end.signal) for end in ended.exits] == [
        (0, None, 15),
        (1, None, 15),
        (2, None, 15),
        (3, 1, None),
    ]
    assert ("stop_group", "att_1", 5.0) in scene.a.calls
    await scene.forgotten()


async def test_a_stop_is_passed_on_to_every_node_with_its_grace(scene: Scene) -> None:
    await scene.started()
    scene.link.want_stopped("att_1", 33.0)
    await scene.reported("ended")
    assert ("stop_group", "att_1", 33.0) in scene.a.calls
    assert ("stop_group", "att_1", 33.0) in scene.b.calls
    await scene.forgotten()


async def test_a_start_that_fails_on_one_node_leaves_nothing_on_the_others(scene: Scene) -> None:
    scene.b.start_error = "no such program: train"
    scene.link.want(GANG)
    await scene.reported("start_failed")
    assert (scene.link.facts[-1].message, scene.link.facts[-1].node) == ("no such program: train", "b")
    await scene.forgotten()


async def test_no_rank_starts_before_every_node_has_the_environment(scene: Scene) -> None:
    scene.b.start_gate.clear()
    scene.link.want(WITH_ENVIRONMENT)
    await scene.until(lambda: any(call[0] == "prepare_group" for call in scene.b.calls))
    assert [call[0] for call in scene.a.calls if call[0] in ("prepare_group", "start_group")] == ["prepare_group"]
    scene.b.start_gate.set()
    await scene.reported("gang_ready", "started")


async def test_an_environment_that_cannot_be_built_is_reported_as_permanent(scene: Scene) -> None:
    scene.b.prepare_error, scene.b.permanent = "no such package", True
    scene.link.want(WITH_ENVIRONMENT)
    await scene.reported("start_failed")
    fact = scene.link.facts[-1]
    assert (fact.message, fact.node, fact.permanent) == ("no such package", "b", True)
    await scene.forgotten()


async def test_a_stop_while_an_environment_is_built_gives_the_start_up(scene: Scene) -> None:
    scene.b.start_gate.clear()
    scene.link.want(WITH_ENVIRONMENT)
    await scene.until(lambda: any(call[0] == "prepare_group" for call in scene.b.calls))
    scene.link.want_stopped("att_1")
    await scene.until(lambda: ("kill_group", "att_1") in scene.b.calls)
    scene.b.start_gate.set()  # a runner answers the call that it gave up
    await scene.reported("start_failed")
    assert not scene.link.facts[-1].permanent


async def test_a_gang_that_ray_does_not_place_is_reported(scene: Scene) -> None:
    scene.placements.error = "Ray shows 1 of 2 GPUs free on node a after 30 s"
    scene.link.want(GANG)
    await scene.reported("start_failed")
    assert scene.link.facts[-1].message == scene.placements.error
    await scene.forgotten()


async def test_a_start_that_fails_as_nobody_expected_is_given_up_too(scene: Scene) -> None:
    scene.placements.fault = RuntimeError("Ray has lost its mind")
    scene.link.want(GANG)
    await scene.reported("start_failed")
    assert scene.link.facts[-1].message == "the agent failed: RuntimeError: Ray has lost its mind"
    await scene.forgotten()


async def test_a_stop_while_waiting_for_gpus_ends_the_start(scene: Scene) -> None:
    scene.placements.gate.clear()
    scene.link.want(GANG)
    await scene.until(lambda: scene.agent.gangs)
    scene.link.want_stopped("att_1")
    await scene.reported("start_failed")
    assert scene.link.facts[-1].message == "stopped before it started"
    await scene.forgotten()


async def test_a_stop_during_a_slow_start_kills_what_has_started(scene: Scene) -> None:
    scene.b.start_gate.clear()
    scene.link.want(GANG)
    await scene.until(lambda: "att_1" in scene.a.groups)
    scene.link.want_stopped("att_1")
    await scene.until(lambda: ("kill_group", "att_1") in scene.b.calls)
    assert "start_failed" not in scene.link.kinds("att_1")
    scene.b.start_gate.set()  # the group comes up although it was killed before it was there
    await scene.reported("start_failed")
    assert scene.b.groups.get("att_1", {"exits": [0]})["exits"]
    await scene.forgotten()


async def test_what_is_dropped_while_it_starts_is_reported_gone(scene: Scene) -> None:
    scene.placements.gate.clear()
    scene.link.want(GANG)
    await scene.until(lambda: scene.agent.gangs)
    scene.link.drop("att_1")
    await scene.until(lambda: scene.link.kinds("att_1").count("gone") == 2)
    await scene.forgotten()


async def test_the_server_is_told_how_many_facts_wait_and_how_many_may(scene: Scene) -> None:
    """Ready, started and ended of each attempt that is held, and of each of its nodes that it is gone."""
    await scene.until(lambda: scene.link.backlogs[-1:] == [(0, 0)])
    await scene.started()
    await scene.until(lambda: scene.link.backlogs[-1:] == [(0, 5)])
    scene.link.deaf = True
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=0)
    await scene.until(lambda: scene.link.backlogs[-1:] == [(1, 5)])
    scene.link.deaf = False
    await scene.reported("ended")
    await scene.forgotten()
    await scene.until(lambda: scene.link.backlogs[-1:] == [(0, 0)])


async def test_what_is_on_the_nodes_and_nobody_wants_counts_too() -> None:
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
    scene.link.deaf = True
    scene.link.drop("att_1")
    scene.link.backlogs.clear()
    async with running(scene.new_agent()):
        await scene.until(lambda: scene.link.backlogs[-1:] == [(2, 5)])
    assert all(waiting <= most for waiting, most in scene.link.backlogs)


async def test_facts_wait_in_order_while_the_server_is_away(scene: Scene) -> None:
    await scene.started()
    scene.link.away = True
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=0)
    await scene.until(lambda: scene.agent.gangs["att_1"].phase is Phase.CLOSING)
    assert "att_1" in scene.a.groups, "an end is kept until the server has it"
    scene.link.away = False
    await scene.reported("gang_ready", "started", "ended")
    await scene.forgotten()


async def test_a_new_agent_adopts_what_runs(scene: Scene) -> None:
    scene.link.want(GANG)
    await scene.started()
    async with running(scene.new_agent()):
        await scene.reported("gang_ready", "started", "gang_ready", "started")
        assert scene.link.facts[-1].at == 53.0  # when the last rank really started
        scene.a.end("att_1", exit_code=0)
        scene.b.end("att_1", exit_code=0)
        await scene.reported("ended")
        await scene.forgotten()


async def test_a_new_agent_finds_a_gang_that_ended_meanwhile() -> None:
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=3)
    async with running(scene.new_agent()):
        await scene.reported("started", "ended")
        assert [end.exit_code for end in scene.link.facts[-1].exits] == [0, 0, 3, 3]
        await scene.forgotten()


async def test_a_new_agent_clears_a_half_started_gang_before_it_starts_it_again() -> None:
    scene = Scene()
    scene.placements.placed.add("att_1")
    async with running(scene.agent):
        await scene.started()
        assert ("kill_group", "att_1") in scene.a.calls
        await scene.until(lambda: scene.placements.placed == {"att_1"})


async def test_what_an_earlier_agent_began_and_is_to_be_stopped_is_cleared_before_its_end_is_told() -> None:
    scene = Scene()
    scene.placements.placed.add("att_1")
    scene.link.want(replace(GANG, action="stop"))
    scene.b.hang("kill_group")
    async with running(scene.agent):
        await scene.until(lambda: ("kill_group", "att_1") in scene.a.calls)
        await asyncio.sleep(0.03)
        assert scene.link.kinds("att_1") == []
        scene.b.hang()
        await scene.reported("start_failed")
        assert ("kill_group", "att_1") in scene.b.calls
        assert not scene.placements.placed
        await scene.forgotten()


async def test_what_is_silent_and_dropped_holds_no_gpus_and_is_cleared_by_the_next_agent_before_it_reports() -> None:
    scene = Scene()
    scene.placements.placed.add("att_1")
    scene.placements.entered.add("att_1")
    stopped = replace(GANG, action="stop")
    scene.link.want(stopped)
    scene.b.hang("kill_group")
    async with running(scene.agent):
        await scene.until(lambda: ("kill_group", "att_1") in scene.a.calls and not scene.placements.placed)
        scene.link.drop("att_1")
        await asyncio.sleep(0.03)
        assert scene.placements.attempts() == {"att_1"}
    scene.link.want(stopped)
    scene.a.calls.clear()
    async with running(scene.new_agent()):
        await scene.until(lambda: ("kill_group", "att_1") in scene.a.calls)
        await asyncio.sleep(0.03)
        assert scene.link.kinds("att_1") == []
        scene.b.hang()
        await scene.reported("start_failed")
        await scene.forgotten()


async def test_a_key_without_a_group_that_nobody_wants_is_forgotten() -> None:
    scene = Scene()
    scene.placements.entered.add("att_1")
    async with running(scene.agent):
        await scene.until(lambda: not scene.placements.attempts())
        await scene.forgotten()


async def test_what_ran_and_is_gone_without_a_trace_is_reported_with_unseen_exits() -> None:
    scene = Scene()
    scene.link.want(replace(GANG, started=True))
    async with running(scene.agent):
        await scene.reported("ended")
        assert [(end.exit_code, end.signal) for end in scene.link.facts[-1].exits] == [(None, None)] * 4
        assert not scene.a.groups


async def test_half_a_start_is_cleared_and_made_again() -> None:
    scene = Scene()
    await scene.a.start_group({"desired": encode(GANG), "group_rank": 0})
    scene.link.want(GANG)
    async with running(scene.agent):
        await scene.reported("gang_ready", "started")
        assert ("kill_group", "att_1") in scene.a.calls


async def test_what_no_server_wants_is_removed_and_reported_gone() -> None:
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
    scene.link.drop("att_1")
    async with running(scene.new_agent()):
        await scene.until(lambda: {f.node for f in scene.link.facts if f.kind == "gone"} == {"a", "b"})
        await scene.forgotten()


async def test_a_dead_runner_ends_the_gang_with_exits_that_nobody_saw(scene: Scene) -> None:
    await scene.started()
    scene.b.die()
    await scene.reported("ended")
    ended = scene.link.facts[-1]
    assert [(end.exit_code, end.signal) for end in ended.exits] == [(None, 15), (None, 15), (None, None), (None, None)]
    assert (ended.node, ended.message) == ("b", "the runner of b died")


async def test_a_runner_that_answers_nothing_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PROBE_TIMEOUT_S", 0.05)
    scene = Scene()
    async with running(scene.new_agent(runner_silent_s=0.2)):
        await scene.started()
        scene.b.hang("*")
        await scene.reported("ended")
        assert scene.b.killed
        assert not scene.a.killed
        assert (scene.link.facts[-1].node, scene.link.facts[-1].message) == ("b", "the runner of b died")
        await scene.until(lambda: scene.cluster.runners["b"].configured)


async def test_a_runner_that_hangs_during_a_start_ends_that_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "PROBE_TIMEOUT_S", 0.05)
    scene = Scene()
    async with running(scene.new_agent(runner_silent_s=0.2)):
        scene.b.start_gate.clear()
        scene.link.want(GANG)
        await scene.until(lambda: any(call[0] == "start_group" for call in scene.b.calls))
        scene.b.hang("*")
        await scene.reported("start_failed")
        assert scene.link.facts[-1].node == "b"
        await scene.until(lambda: not scene.placements.placed)


async def test_a_start_that_is_dropped_holds_no_gpus_while_a_node_is_still_starting(scene: Scene) -> None:
    scene.b.start_gate.clear()
    scene.link.want(GANG)
    await scene.until(lambda: any(call[0] == "start_group" for call in scene.b.calls))
    scene.link.drop("att_1")
    await scene.until(lambda: not scene.placements.placed)
    assert not {"start_failed", "gone"} & set(scene.link.kinds("att_1"))
    assert scene.placements.attempts() == {"att_1"}
    scene.b.start_gate.set()
    await scene.until(lambda: not scene.agent.gangs)
    await scene.forgotten()


async def test_a_runner_that_answers_anything_at_all_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is busy; or it was this agent that was stopped for a while."""
    monkeypatch.setattr(hosts, "PROBE_TIMEOUT_S", 0.05)
    scene = Scene()
    async with running(scene.new_agent(runner_silent_s=0.1)):
        await scene.started()
        scene.b.hang("next_facts")
        await scene.until(lambda: sum(call[0] == "capabilities" for call in scene.b.calls) > 2)
        assert not scene.b.killed
        scene.b.hang()
        scene.a.end("att_1", exit_code=0)
        scene.b.end("att_1", exit_code=0)
        await scene.reported("ended")


async def test_a_runner_that_never_answered_gets_twice_as_long_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node so slow that its runner needs longer to start must get one in the end."""
    monkeypatch.setattr(hosts, "PROBE_TIMEOUT_S", 0.01)
    scene = Scene()
    scene.b.hang("*")
    async with running(scene.new_agent(runner_silent_s=0.05)):
        await scene.until(lambda: scene.agent.hosts.by_name.get("b") and scene.agent.hosts.by_name["b"].patience_s)
        await scene.until(lambda: scene.b.killed)
        assert scene.agent.hosts.by_name["b"].patience_s == 0.1
        await scene.until(lambda: scene.cluster.runners["b"].configured)
        await scene.until(lambda: scene.agent.hosts.by_name["b"].patience_s == 0.05)


async def test_a_group_that_a_new_runner_does_not_have_is_gone_though_no_runner_was_seen_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Agent and runner died together, and the new runner was slow: the gang was lost for good."""
    monkeypatch.setattr(desired, "READY_DEADLINE_S", 0.05)
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
    scene.b.die()
    scene.b = await scene.cluster.runner(scene.cluster.ray_ids["b"])
    scene.b.hang("*")
    async with running(scene.new_agent()):
        await scene.until(lambda: scene.agent.gangs)
        assert scene.agent.gangs["att_1"].groups["b"].state is GroupState.LOST
        scene.b.hang()
        await scene.reported("ended")
        assert (scene.link.facts[-1].node, scene.link.facts[-1].message) == ("b", "the runner of b died")


async def test_an_end_waits_for_what_the_ranks_left_behind(scene: Scene) -> None:
    await scene.started()
    scene.b.delivers = False
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=0)
    await scene.until(lambda: scene.agent.gangs["att_1"].groups["b"].over)
    await asyncio.sleep(0.05)
    assert "ended" not in scene.link.kinds("att_1")
    scene.b.deliver()
    await scene.reported("ended")
    await scene.forgotten()


async def test_what_is_left_behind_outlasts_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for it counts only while the server is there: before that nothing could be delivered."""
    monkeypatch.setattr(desired, "DELIVERY_WAIT_S", 0.2)
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
        scene.link.away = True
        await scene.until(lambda: scene.agent._heard_s is None)
        answered_s = scene.agent.answered_s
        scene.a.delivers = scene.b.delivers = False
        scene.a.end("att_1", exit_code=0)
        scene.b.end("att_1", exit_code=0)
        await asyncio.sleep(0.3)
        assert scene.agent.gangs["att_1"].phase is Phase.RUNNING
        scene.link.away = False
        await scene.until(lambda: scene.agent._heard_s is not None)
        assert scene.agent.answered_s == answered_s and scene.agent.gangs["att_1"].phase is Phase.RUNNING
        scene.a.deliver()
        scene.b.deliver()
        await scene.reported("ended")


async def test_an_end_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desired, "DELIVERY_WAIT_S", 0.05)
    monkeypatch.setattr(service, "RECONCILE_AT_LEAST_EVERY_S", 0.02)
    scene = Scene()
    async with running(scene.agent):
        await scene.started()
        scene.b.delivers = False
        scene.a.end("att_1", exit_code=0)
        scene.b.end("att_1", exit_code=0)
        await scene.reported("ended")


async def test_where_own_users_are_required_a_node_without_them_starts_nothing() -> None:
    scene = Scene()
    scene.new_agent(replace(SETTINGS, require_own_users=True))
    scene.a.own_users = True
    async with running(scene.agent):
        scene.link.want(GANG)
        await scene.reported("start_failed")
        assert scene.link.facts[-1].node == "b"
        assert "node b cannot run ranks under their tenant's own user (not root)" in scene.link.facts[-1].message
        assert not scene.placements.placed
        await scene.forgotten()


async def test_a_dead_node_is_reported_and_its_gang_waits_for_the_server(scene: Scene) -> None:
    await scene.started()
    scene.cluster.remove("b")
    await scene.until(lambda: {node.name: node.alive for node in scene.link.nodes} == {"a": True, "b": False})
    scene.a.end("att_1", exit_code=1)
    await asyncio.sleep(0.05)
    assert scene.link.kinds("att_1") == ["gang_ready", "started"], "nobody knows what runs on b"
    scene.link.drop("att_1")
    await scene.until(lambda: [f.node for f in scene.link.facts if f.kind == "gone"] == ["a"])
    scene.cluster.add("b")
    await scene.until(lambda: [f.node for f in scene.link.facts if f.kind == "gone"] == ["a", "b"])


async def test_a_node_that_dies_during_the_start_is_never_reported_as_not_started(scene: Scene) -> None:
    scene.b.start_gate.clear()
    scene.link.want(GANG)
    await scene.until(lambda: any(call[0] == "start_group" for call in scene.b.calls))
    scene.cluster.remove("b")
    await scene.until(lambda: not scene.agent.hosts.by_name["b"].alive)
    scene.b.start_gate.set()
    scene.b.start_error = "gone"
    await scene.until(lambda: scene.agent.gangs["att_1"].phase is Phase.RUNNING)
    assert "start_failed" not in scene.link.kinds("att_1")
    scene.link.drop("att_1")
    await scene.until(lambda: [f.node for f in scene.link.facts if f.kind == "gone"] == ["a"])


async def test_a_server_that_refuses_the_end_hears_that_the_nodes_are_clear(scene: Scene) -> None:
    await scene.started()
    scene.link.refuse.add("att_1")
    scene.a.end("att_1", exit_code=0)
    scene.b.end("att_1", exit_code=0)
    await scene.until(lambda: {f.node for f in scene.link.facts if f.kind == "gone"} == {"a", "b"})
    await scene.forgotten()


async def test_an_agent_that_was_replaced_ends() -> None:
    scene = Scene()
    scene.link.superseded = True
    async with asyncio.timeout(5):
        with pytest.raises(Superseded):
            await scene.agent.run()


# ---------------------------------------------------------------- profiles


def asked(runner: Any) -> list[Any]:
    return [call[1:] for call in runner.calls if call[0] == "profile_group"]


async def test_a_profile_is_passed_on_to_the_nodes_of_its_ranks(scene: Scene) -> None:
    request = ProfileRequest("prof_1", 5, [3])
    await scene.started()
    scene.b.hang("profile_group")
    scene.link.want(replace(GANG, started=True, profiles=[request]))
    await scene.until(lambda: "prof_1" in scene.agent.gangs["att_1"].profiles)
    scene.b.hang()
    await scene.until(lambda: asked(scene.b))
    assert asked(scene.b) == [("att_1", encode(request))]
    assert asked(scene.a) == []


async def test_a_runner_that_takes_no_profile_is_asked_once(scene: Scene) -> None:
    scene.a.profile_error = "its runner is older than this agent"
    await scene.started()
    scene.link.want(replace(GANG, started=True, profiles=[ProfileRequest("prof_1", 5, [0])]))
    await scene.until(lambda: asked(scene.a))
    scene.link.want_stopped("att_1")
    await scene.reported("ended")
    assert len(asked(scene.a)) == 1
