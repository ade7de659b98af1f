"""What a preflight's all-reduces find on gangs of six ranks, one of which is slow."""

import pytest
from phalanx_worker.training.preflight import Figures, judge
from preflight_gang import measured

pytestmark = pytest.mark.slow

FACTOR = 10.0  # the delay is far more than that, and chance on a busy machine less

SLOW = {  # nodes, who is slow, the node to name, what it is bad at
    "a rank that is not its node's first, between nodes": ([2, 2, 2], [3, "between"], 1, "inter"),
    "a rank that is not its node's first, within its node": ([2, 2, 2], [3, "within"], 1, "intra"),
    "a node of one rank": ([1, 1, 1, 1, 1, 1], [2, "between"], 2, "inter"),
    "the smallest of unequal nodes": ([3, 2, 1], [5, "between"], 2, "inter"),
    "a larger one of unequal nodes": ([3, 2, 1], [1, "within"], 0, "intra"),
    "a node alone": ([6], [3, "within"], None, None),
}


@pytest.fixture(scope="module")
def seen():
    cases = {name: {"nodes": nodes, "slow": slow} for name, (nodes, slow, _, _) in SLOW.items()}
    return {
        name: [
            Figures(
                one["rank"],
                one["node"],
                flops=1.0,
                memory_bytes_s=1.0,
                intra_bytes_s={int(ranks): value for ranks, value in one["intra_bytes_s"].items()},
                inter_bytes_s={int(ranks): value for ranks, value in one["inter_bytes_s"].items()},
            )
            for one in ranks
        ]
        for name, ranks in measured(cases, ranks=6).items()
    }


@pytest.mark.parametrize("name", [name for name, (_, _, node, _) in SLOW.items() if node is not None])
def test_the_node_of_a_slow_link_is_named(seen, name):
    _, _, node, what = SLOW[name]
    worst = max(judge(seen[name], FACTOR), key=lambda unfit: unfit.times)
    assert (worst.node, worst.what) == (node, f"{what}-node all-reduce bandwidth")


def test_a_node_alone_is_measured_and_has_no_peers(seen):
    assert judge(seen["a node alone"], FACTOR) == []
    for figures in seen["a node alone"]:
        assert figures.intra_bytes_s[6] > 0 and figures.inter_bytes_s == {6: 0.0}


def test_every_rank_with_a_peer_is_measured_on_unequal_nodes(seen):
    figures = seen["the smallest of unequal nodes"]
    assert [[ranks for ranks, value in each.intra_bytes_s.items() if value] for each in figures] == [
        [2, 3],
        [2, 3],
        [3],
        [2],
        [2],
        [],
    ]
    assert [[ranks for ranks, value in each.inter_bytes_s.items() if value] for each in figures] == [
        [1, 2],
        [2],
        [],
        [1, 2],
        [2],
        [1],
    ]
