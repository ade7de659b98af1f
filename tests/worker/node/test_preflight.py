"""The look at a gang's nodes before it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from phalanx_worker.protocol import Health
from phalanx_worker.training.preflight import Figures, judge, meetings


def gang(nodes: int = 4, ranks: int = 2) -> list[Figures]:
    return [
        Figures(node * ranks + i, node, 100.0 + i, 10.0, {ranks: 20.0}, {ranks: 1.0})
        for node in range(nodes)
        for i in range(ranks)
    ]


@pytest.mark.parametrize(
    ("sentence", "rank", "change", "says"),
    [
        ("a slow rank makes a slow node", 3, {"flops": 40.0}, "the node of rank 2 has 40% of the speed in matrix"),
        ("slow memory", 6, {"memory_bytes_s": 2.0}, "the node of rank 6 has 20% of the memory bandwidth of its peers"),
        (
            "a bad link inside",
            3,
            {"intra_bytes_s": {2: 8.0}},
            "the node of rank 2 has 40% of the intra-node all-reduce",
        ),
        ("a bad link out", 5, {"inter_bytes_s": {2: 0.5}}, "the node of rank 4 has 50% of the inter-node all-reduce"),
    ],
)
def test_a_node_that_does_worse_than_its_peers_is_named(sentence: str, rank: int, change: Any, says: str) -> None:
    figures = gang()
    figures[rank] = replace(figures[rank], **change)
    (unfit,) = judge(figures, 1.5)
    assert unfit.message.startswith(says), sentence
    assert judge(figures, 10.0) == []


def test_a_gang_of_equals_and_a_node_alone_are_fit() -> None:
    assert judge(gang(), 1.2) == []
    alone = [Figures(0, 0, 100.0, 10.0), Figures(1, 0, 1.0, 0.1)]
    assert judge(alone, 1.5) == []


def test_all_reduces_are_compared_only_with_those_of_as_many_ranks() -> None:
    """Two ranks that share a node's links have less each than one alone."""
    small = [Figures(8 + node, 4 + node, 100.0, 10.0, {}, {1: 2.0}) for node in range(2)]
    large = [replace(figures, inter_bytes_s={1: 2.0, 2: 1.0}) for figures in gang()]
    assert judge([*large, *small], 1.5) == []
    (unfit,) = judge([*large, small[0], replace(small[1], inter_bytes_s={1: 0.5})], 1.5)
    assert (unfit.node, unfit.times) == (5, 4.0)


@pytest.mark.parametrize("nodes", range(1, 10))
def test_every_node_meets_some_others_one_at_a_time(nodes: int) -> None:
    rounds = meetings(nodes)
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds), "one at a time"
    met = [sorted(pair) for pairs in rounds for pair in pairs]
    assert all(met.count(pair) == 1 for pair in met), "each a new one"
    assert all(sum(node in pair for pair in met) >= min(nodes - 1, 2) for node in range(nodes))


@pytest.mark.asyncio(loop_scope="session")
async def test_a_fit_gang_trains_as_if_nothing_had_been(workbench: Any) -> None:
    script = workbench.script("""
        import os, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        one = torch.ones(1)
        dist.all_reduce(one)
        print("sum", int(one), flush=True)
        dist.destroy_process_group()
    """)
    attempt = workbench.attempt(f"python {script}", nodes=2, ranks=2, health=Health(preflight_factor=1e6))
    exits = await attempt.run()
    assert [end["exit_code"] for end in exits] == [0] * 4, workbench.server.text(attempt.id, rank=0, stream="stderr")
    assert workbench.server.text(attempt.id, rank=3) == "sum 4\n"
    (note,) = workbench.server.marks(attempt.id, "note")
    assert note["data"]["message"].startswith("preflight: 4 ranks on 2 nodes are fit, the slowest with ")
    assert note["data"]["message"].endswith(" GB/s in all-reduces")


@pytest.mark.asyncio(loop_scope="session")
async def test_a_program_that_is_executed_comes_after_it_too(workbench: Any) -> None:
    attempt = workbench.attempt("sh -c 'echo $RANK'", nodes=2, health=Health(preflight_factor=1e6))
    assert [end["exit_code"] for end in await attempt.run()] == [0, 0]
    assert workbench.server.text(attempt.id, rank=1) == "1\n"


@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_a_gang_with_an_unfit_node_does_not_begin(workbench: Any) -> None:
    attempt = workbench.attempt("echo trains", nodes=2, health=Health(preflight_factor=4.0))  # nobody else is so slow
    attempt.desired.launch.cpus_per_group[1] = 0.1  # 10 ms of a core in 100: a fifth of what a matrix product takes
    exits = await attempt.run()
    assert [(end["exit_code"], end["fault"]) for end in exits] == [(1, "preflight")] * 2
    assert [group["first_failed_rank"] for group in [await attempt.group(r) for r in attempt.runners]] == [1, 1]
    assert "the node of rank 1 has " in exits[1]["reason"]
    assert workbench.server.text(attempt.id, rank=0) == ""
