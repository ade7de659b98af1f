"""Tests of computing a step again, on one rank."""

import pytest
import torch
from phalanx_worker.training.health.recompute import Dice, Pulse, recompute
from phalanx_worker.training.mesh import process_group

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def pulse(norm):
    return Pulse(5, loss=1.0, own_loss=torch.tensor(1.0), norm=torch.tensor(norm))


@pytest.mark.parametrize(
    ("story", "device", "second", "differs"),
    [
        ("a CPU gives the same bits", CPU, 2.0, False),
        ("a CPU gives other bits", CPU, 2.000001, True),
        ("a GPU adds up in another order, of gradients that lie in host memory", GPU, 2.000001, False),
        ("a GPU gives something else", GPU, 2.1, True),
    ],
)
def test_a_norm_is_compared_by_what_computes_it_and_not_by_where_it_lies(story, device, second, differs):
    with process_group(CPU):
        assert recompute(pulse(2.0), lambda: pulse(second), Dice(device, ()))[2] is differs
