"""Optimizers, the learning rate over time, and clipping."""

import pytest
import torch
from layout_cases import PIPELINE
from phalanx.recipes.optim import Optim
from phalanx.recipes.parse import RecipeError, parse
from phalanx_worker.training.optim import clip, divide, global_norm, make_optimizer, set_rate
from torch import nn
from training_gang import case

NAMES = ("adamw", "adafactor", "sgd", "lamb")
SHARDED = {"shard": 2}
TWO = {
    "sgd FSDP2": case(optim={"name": "sgd", "lr": 0.3}, parallel=SHARDED),
    "sgd pipeline": case(optim={"name": "sgd", "lr": 0.3}, parallel=PIPELINE),
    "sgd tensor": case(optim={"name": "sgd", "lr": 0.3}, parallel={"tensor": 2}),
    "adafactor DDP": case(optim={"name": "adafactor", "lr": 0.05}),
    "adafactor pipeline": case(optim={"name": "adafactor", "lr": 0.05}, parallel=PIPELINE),
    "lamb DDP": case(optim={"name": "lamb", "lr": 0.02}),
    "lamb pipeline": case(optim={"name": "lamb", "lr": 0.02}, parallel=PIPELINE),
    "adafactor FSDP2": case(optim={"name": "adafactor"}, parallel=SHARDED),
    "lamb tensor": case(optim={"name": "lamb"}, parallel={"tensor": 2}),
}
ONE = {
    "sgd": case(optim={"name": "sgd", "lr": 0.3}),
    "adafactor": case(optim={"name": "adafactor", "lr": 0.05}),
    "lamb": case(optim={"name": "lamb", "lr": 0.02}),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 4))


def backward(net):
    net(torch.arange(12.0).reshape(3, 4)).square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends(name):
    net = model()
    optimizer = make_optimizer(parse(Optim, {"name": name, "lr": 0.01}), net)
    x = torch.arange(12.0).reshape(3, 4) / 12
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (net(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_only_matrices_decay():
    optimizer = make_optimizer(Optim(weight_decay=0.3), model())
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in optimizer.param_groups] == [
        (0.3, {2}),
        (0.0, {1}),
    ]


def test_the_rate_is_set_for_all_groups():
    optimizer = make_optimizer(Optim(lr=1.0), model())
    set_rate([optimizer], 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_clipping_scales_large_gradients_to_the_limit_and_leaves_small_ones():
    net = model()
    backward(net)
    norm = global_norm(net.parameters(), None)
    assert norm == pytest.approx(torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item(), rel=1e-6)
    clip(net.parameters(), norm=norm, limit=0.5)
    assert global_norm(net.parameters(), None) == pytest.approx(0.5, rel=1e-4)
    clip(net.parameters(), norm=global_norm(net.parameters(), None), limit=1.0)
    assert global_norm(net.parameters(), None) == pytest.approx(0.5, rel=1e-4)
    divide(net.parameters(), 2.0)
    assert global_norm(net.parameters(), None) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in TWO if name not in ("adafactor FSDP2", "lamb tensor")])
def test_optimizers_agree_between_layouts(computed, name):
    optimizer, _, _ = name.partition(" ")
    assert computed(TWO, ranks=2)[name]["loss"] == pytest.approx(computed(ONE, ranks=1)[optimizer]["loss"], rel=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor FSDP2", "lamb tensor"])
def test_an_optimizer_that_needs_whole_parameters_refuses_parts_of_them(computed, name):
    optimizer, _, _ = name.partition(" ")
    assert computed(TWO, ranks=2)[name]["error"] == (
        f"optim.name = {optimizer!r} needs whole parameters; use adamw or sgd, or data alone in parallel"
    )


def test_a_wrong_option_is_named():
    with pytest.raises(RecipeError, match=r"^clip = -1 is negative; use 0 \(off\) or a norm such as 1.0$"):
        Optim(clip=-1)
