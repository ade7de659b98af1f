"""How Ray's rows become node facts, and when a gang's resources count as free. Needs Ray's package, not a cluster."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from link_server import attempt_of
from phalanx_worker.agent import gang
from phalanx_worker.agent.gang import Bundle, PlacementGroups, bundles_of, shortage
from phalanx_worker.agent.hosts import RunnerRefused
from phalanx_worker.agent.launch import StartFailed
from phalanx_worker.agent.nodes import SUCCESSION_S, NodeSettings, RayRunner, Successions, inventory
from ray.exceptions import RpcError


def row(node_id: str = "ab" * 28, *, alive: bool = True, labels: dict[str, str] | None = None, **more: Any) -> dict:
    return {
        "NodeID": node_id,
        "Alive": alive,
        "NodeManagerAddress": more.pop("address", "10.0.0.1"),
        "NodeManagerHostname": more.pop("hostname", "gpu-host"),
        "Resources": more.pop("resources", {"GPU": 8.0, "CPU": 64.0, "memory": 1e12, "accelerator_type:H100": 1.0}),
        "Labels": labels or {},
    }


def test_a_node_of_a_real_cluster() -> None:
    (facts,) = inventory([row(labels={"ray.io/node-id": "x", "rack": "r1"})], NodeSettings())
    assert (facts.name, facts.gpu_type, facts.gpus, facts.cpus) == ("gpu-host", "h100", 8, 64)
    assert (facts.memory_bytes, facts.address, facts.labels["rack"]) == (10**12, "10.0.0.1", "r1")


@pytest.mark.parametrize(
    ("labels", "setting", "expected"),
    [
        ({"phalanx.io/gpu-type": "MI300X"}, "a100", "mi300x"),
        ({"ray.io/accelerator-type": "B200"}, "a100", "a100"),
        ({"ray.io/accelerator-type": "B200"}, None, "b200"),
        ({}, None, "h100"),
    ],
)
def test_who_names_the_gpu_type(labels: dict[str, str], setting: str | None, expected: str) -> None:
    assert inventory([row(labels=labels)], NodeSettings(gpu_type=setting))[0].gpu_type == expected


def test_a_cpu_node_has_no_gpu_type() -> None:
    assert inventory([row(resources={"CPU": 4.0})], NodeSettings(gpu_type="a100"))[0].gpu_type == ""


def test_heads_and_dead_nodes_are_no_training_nodes() -> None:
    rows = [row(alive=False), row(labels={"phalanx.io/role": "head"}), row(resources={"memory": 1.0})]
    assert inventory(rows, NodeSettings()) == []


def test_of_two_nodes_with_one_name_the_first_stays() -> None:
    named = {"phalanx.io/node-name": "n1"}
    rows = [row("bb" * 28, labels=named), row("aa" * 28, labels=named)]
    assert [(facts.name, facts.ray_node_id[:2]) for facts in inventory(rows, NodeSettings())] == [("n1", "aa")]


def names(rows: list) -> list[str]:
    return [facts.name for facts in inventory(rows, NodeSettings())]


def test_only_nodes_that_share_a_hosts_name_get_their_id_added() -> None:
    rows = [row("bb" * 28), row("aa" * 28), row("cc" * 28, hostname="other"), row("dd" * 28, alive=False)]
    assert names(rows) == ["gpu-host-aaaaaaaa", "gpu-host-bbbbbbbb", "other"]


def test_a_label_that_is_another_nodes_hostname_leaves_both_a_name() -> None:
    assert names([row("bb" * 28), row("aa" * 28, labels={"phalanx.io/node-name": "gpu-host"})]) == [
        "gpu-host",
        "gpu-host-bbbbbbbb",
    ]


def test_a_raylet_that_is_started_again_keeps_its_nodes_name() -> None:
    """Its id is another, and at first Ray takes the one before it for alive."""
    old, new, successions = row("aa" * 28), row("bb" * 28), Successions()
    assert names(successions.without_heirs([old], 0.0)) == ["gpu-host"]
    both = successions.without_heirs([old, new], 10.0)
    assert [each["NodeID"] for each in both] == [old["NodeID"]]
    after = successions.without_heirs([old | {"Alive": False}, new], 24.0)
    assert [(facts.name, facts.ray_node_id) for facts in inventory(after, NodeSettings())] == [
        ("gpu-host", new["NodeID"])
    ]


def test_two_nodes_that_share_a_host_for_good_are_both_listed() -> None:
    rows, successions = [row("aa" * 28), row("bb" * 28)], Successions()
    assert len(successions.without_heirs(rows, 0.0)) == 2, "nobody had the name before"
    successions.without_heirs(rows[:1], 1.0)
    assert len(successions.without_heirs(rows, 2.0)) == 1
    for now_s in (2.0 + SUCCESSION_S, 500.0):
        assert names(successions.without_heirs(rows, now_s)) == ["gpu-host-aaaaaaaa", "gpu-host-bbbbbbbb"]


@pytest.mark.parametrize(
    ("addresses", "setting", "shared"),
    [
        (["127.0.0.1", "127.0.0.1"], None, True),
        (["10.0.0.1", "10.0.0.2"], None, False),
        (["10.0.0.1", "10.0.0.2"], True, True),
        (["127.0.0.1"], False, False),
    ],
)
def test_checkpoints_are_shared_on_one_machine_or_when_said_so(
    addresses: list[str], setting: bool | None, shared: bool
) -> None:
    rows = [row(f"{index}" * 56, address=address) for index, address in enumerate(addresses)]
    settings = NodeSettings(shared_checkpoints=setting)
    assert [facts.shared_checkpoints for facts in inventory(rows, settings)] == [shared] * len(rows)


# ---------------------------------------------------------------- placement

A, B = Bundle("a", "ray-a", 2, 0.0), Bundle("b", "ray-b", 2, 4.0)


def test_a_gang_takes_one_bundle_on_each_node() -> None:
    attempt = attempt_of("att_1", "true", {"a": [0, 1], "b": [3]}, cpus=2.0)
    assert bundles_of(attempt, {"a": "ray-a", "b": "ray-b"}) == [
        Bundle("a", "ray-a", 2, 2.0),
        Bundle("b", "ray-b", 1, 2.0),
    ]


def test_a_bundle_is_never_empty() -> None:
    assert Bundle("a", "ray-a", 0, 0.0).resources() == {"CPU": 0.001}


def test_what_is_missing_is_named() -> None:
    free = {"ray-a": {"GPU": 2.0}, "ray-b": {"GPU": 1.0, "CPU": 8.0}}
    assert shortage([A], free) == ("", None)
    assert shortage([A, B], free) == ("Ray shows 1 of 2 GPUs free on node b", "b")
    assert shortage([Bundle("c", "ray-c", 1, 0.0)], free)[1] == "c"


class FakeRay:
    """Ray's view of free GPUs on node a, its groups and its key-value store, as the test and the agent set them."""

    def __init__(self, free_gpus: float) -> None:
        self.free_gpus = free_gpus
        self.created: list[str] = []
        self.removed: list[str] = []
        self.keys: set[bytes] = set()
        self.tables_read = 0
        self.answers = True

    def available(self) -> dict[str, dict[str, float]]:
        return {"ray-a": {"GPU": self.free_gpus, "CPU": 8.0}}

    def create(self, bundles: list, *, name: str, **_: Any) -> FakeGroup:
        self.created.append(name)
        if not self.answers:
            raise RpcError("timed out", 4)
        return FakeGroup(self, name)

    def get(self, name: str) -> FakeGroup:
        if name not in self.created or name in self.removed:
            raise ValueError(f"Failed to look up placement group with name: {name}")
        return FakeGroup(self, name)

    def table(self) -> dict[str, dict[str, str]]:
        self.tables_read += 1
        states = {name: "REMOVED" if name in self.removed else "CREATED" for name in self.created}
        return {f"{number:036x}": {"name": name, "state": states[name]} for number, name in enumerate(states)}

    def wait(self) -> bool:
        return True


@dataclass(frozen=True)
class FakeGroup:
    ray: FakeRay
    name: str

    def wait(self, timeout_s: float) -> bool:
        return self.ray.wait()


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay(free_gpus=2.0)
    monkeypatch.setattr(gang.ray._private.state, "available_resources_per_node", fake.available)
    monkeypatch.setattr(gang, "placement_group", fake.create)
    monkeypatch.setattr(gang, "get_placement_group", fake.get)
    monkeypatch.setattr(gang, "remove_placement_group", lambda group: fake.removed.append(group.name))
    monkeypatch.setattr(gang, "placement_group_table", fake.table)
    monkeypatch.setattr(gang, "_internal_kv_put", lambda key, value, namespace: fake.keys.add(key))
    monkeypatch.setattr(gang, "_internal_kv_del", lambda key, namespace: fake.keys.discard(key))
    monkeypatch.setattr(gang, "_internal_kv_exists", lambda key, namespace: key in fake.keys)
    monkeypatch.setattr(
        gang, "_internal_kv_list", lambda prefix, namespace: [key for key in fake.keys if key.startswith(prefix)]
    )
    return fake


@pytest.fixture
def groups() -> PlacementGroups:
    return PlacementGroups(ThreadPoolExecutor(2))


def one_gpu(name: str) -> Any:
    return attempt_of(name, "true", {"a": [0]})


async def place(groups: PlacementGroups, name: str, timeout_s: float = 5.0) -> None:
    await groups.create(one_gpu(name), {"a": "ray-a"}, free_timeout_s=timeout_s)


async def test_a_group_is_created_only_when_ray_shows_the_gpus_free(view: FakeRay, groups: PlacementGroups) -> None:
    view.free_gpus = 0.0
    creating = asyncio.create_task(place(groups, "att_1"))
    await asyncio.sleep(0.05)
    assert view.created == []
    view.free_gpus = 1.0
    await creating
    assert view.created == ["phalanx/att_1"]


async def test_gpus_that_stay_taken_are_named(view: FakeRay, groups: PlacementGroups) -> None:
    view.free_gpus = 0.0
    with pytest.raises(StartFailed, match=r"Ray shows 0 of 1 GPUs free on node a after 0.020 s") as caught:
        await place(groups, "att_1", timeout_s=0.02)
    assert caught.value.node == "a"
    assert view.created == []


async def test_two_gangs_are_not_let_through_for_the_same_gpu(view: FakeRay, groups: PlacementGroups) -> None:
    view.free_gpus = 1.0
    ray_is_done = threading.Event()
    view.wait = lambda: ray_is_done.wait(10)
    first, second = (asyncio.create_task(place(groups, name)) for name in ("att_1", "att_2"))
    async with asyncio.timeout(10):
        while not view.created:  # noqa: ASYNC110 - made in a thread
            await asyncio.sleep(0.005)
    await asyncio.sleep(0.03)  # time enough to let the second through, if it were to be
    assert view.created == ["phalanx/att_1"]
    view.free_gpus = 0.0
    ray_is_done.set()
    await first
    await asyncio.sleep(0.02)
    assert view.created == ["phalanx/att_1"]
    view.free_gpus = 1.0
    await second


async def test_giving_up_while_waiting_leaves_nothing(view: FakeRay, groups: PlacementGroups) -> None:
    view.free_gpus = 0.0
    creating = asyncio.create_task(place(groups, "att_1"))
    await asyncio.sleep(0.02)
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)
    view.free_gpus = 1.0
    await place(groups, "att_2")
    assert view.created == ["phalanx/att_2"]
    assert groups.attempts() == {"att_2"}


async def found_by_the_next_agent() -> frozenset[str]:
    groups = PlacementGroups(ThreadPoolExecutor(1))
    await groups.load()
    return groups.attempts()


async def test_the_next_agent_finds_what_exists_and_never_asks_ray_for_all_there_ever_was(
    view: FakeRay, groups: PlacementGroups
) -> None:
    """Ray keeps the rows of removed groups for ever."""
    await groups.load()
    tables_read_at_first = view.tables_read
    for name in ("att_1", "att_2", "att_3"):
        await place(groups, name)
    await groups.remove("att_2")
    assert await found_by_the_next_agent() == {"att_1", "att_2", "att_3"}, "nobody has cleared its nodes yet"
    await groups.forget("att_2")
    assert await found_by_the_next_agent() == {"att_1", "att_3"}
    assert view.tables_read == tables_read_at_first
    for name in ("att_1", "att_3"):
        await groups.remove(name)
        await groups.forget(name)
    assert len(view.keys) == 1, "nothing may be left of an attempt"


async def test_groups_from_before_there_was_an_index_are_found(view: FakeRay) -> None:
    view.created, view.removed = ["phalanx/att_1", "phalanx/att_2", "another's"], ["phalanx/att_1"]
    assert await found_by_the_next_agent() == await found_by_the_next_agent() == {"att_2"}


async def test_a_group_without_a_key_is_removed_by_its_name(view: FakeRay, groups: PlacementGroups) -> None:
    """An agent from before there was an index made it, after one that had written it."""
    await groups.load()
    view.created.append("phalanx/att_1")
    assert await found_by_the_next_agent() == frozenset()
    for name in ("att_1", "att_none"):
        await groups.remove(name)
        await groups.forget(name)
    assert view.removed == ["phalanx/att_1"]


async def test_a_group_that_ray_made_without_saying_so_is_found_by_the_next_agent(
    view: FakeRay, groups: PlacementGroups
) -> None:
    await groups.load()
    view.answers = False
    with pytest.raises(StartFailed, match="refused"):
        await place(groups, "att_1")
    assert await found_by_the_next_agent() == {"att_1"}


async def test_a_runner_from_before_the_agent_says_no_to_what_it_does_not_know() -> None:
    """Runners outlive agents. One that knows no environments must not start ranks without them."""
    old_actor = object()
    with pytest.raises(RunnerRefused, match="older than this agent and knows no prepare_group") as refused:
        await RayRunner(old_actor, ThreadPoolExecutor(1)).call("prepare_group", {}, timeout_s=1)
    assert not refused.value.permanent
