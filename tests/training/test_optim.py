"""Optimizers, the learning rate over time, and clipping."""

import pytest
import torch
from layout_cases import PIPELINE
from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx.recipes.optim import Optim
from phalanx.recipes.parse import RecipeError, parse
from phalanx_worker.training.adafactor import Adafactor
from phalanx_worker.training.checkpoint import Checkpointer
from phalanx_worker.training.mesh import process_group
from phalanx_worker.training.optim import clip, divide, global_norm, make_optimizer, set_rate
from phalanx_worker.training.state import OptimizerState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_gang import case

NAMES = ("adamw", "adafactor", "sgd", "lamb")
ADAFACTOR = {"name": "adafactor", "lr": 0.3}
LAMB = {"name": "lamb", "lr": 0.02}
SGD = {"name": "sgd", "lr": 0.3}
SHARDED = {"shard": 2}
TENSOR = {"tensor": 2}
ONE = {"sgd": case(optim=SGD), "adafactor": case(optim=ADAFACTOR), "lamb": case(optim=LAMB)}
TWO = {
    "adafactor FSDP2": case(optim=ADAFACTOR, parallel=SHARDED),
    "adafactor tensor": case(optim=ADAFACTOR, parallel=TENSOR),
    "adafactor FSDP2, then tensor": case(stop_at=4, optim=ADAFACTOR, parallel=SHARDED, then={"parallel": TENSOR}),
    "lamb FSDP2": case(optim=LAMB, parallel=SHARDED),
    "lamb tensor": case(optim=LAMB, parallel=TENSOR),
    "lamb DDP, then FSDP2": case(stop_at=4, optim=LAMB, then={"parallel": SHARDED}),
}
TWO_FULL = {
    "sgd FSDP2": case(optim=SGD, parallel=SHARDED),
    "sgd pipeline": case(optim=SGD, parallel=PIPELINE),
    "sgd tensor": case(optim=SGD, parallel=TENSOR),
    "adafactor DDP": case(optim=ADAFACTOR),
    "adafactor pipeline": case(optim=ADAFACTOR, parallel=PIPELINE),
    "adafactor offload": case(optim=ADAFACTOR, parallel={**SHARDED, "offload": True}),
    "lamb DDP": case(optim=LAMB),
    "lamb pipeline": case(optim=LAMB, parallel=PIPELINE),
    "lamb offload": case(optim=LAMB, parallel={**SHARDED, "offload": True}),
}
FOUR = {
    f"{optim['name']} {name}": case(optim=optim, parallel=layout)
    for optim in (ADAFACTOR, LAMB)
    for name, layout in {
        "hybrid sharding": {"data": 2, "shard": 2},
        "shard × tensor": {"shard": 2, "tensor": 2},
        "data × tensor": {"data": 2, "tensor": 2},
        "shard × pipeline": {"shard": 2, **PIPELINE},
        "tensor × pipeline": {"tensor": 2, **PIPELINE},
    }.items()
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


def test_adafactor_is_that_of_torch_where_parameters_are_whole():
    """Matrices, a vector and a convolution's weights, over steps whose gradients differ."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((12, 8), (3, 5), (7,), (4, 3, 5, 5))]
    own, theirs = ([nn.Parameter(values.clone()) for values in start] for _ in range(2))
    optimizers = (
        Adafactor([{"params": own, "weight_decay": 0.1}], lr=0.2),
        torch.optim.Adafactor(theirs, lr=0.2, weight_decay=0.1),
    )
    for _ in range(5):
        for mine, other in zip(own, theirs, strict=True):
            other.grad = torch.randn(other.shape)
            mine.grad = other.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(own, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        kept, expected = optimizers[0].state[mine], optimizers[1].state[other]
        assert kept.keys() == expected.keys(), "checkpoints of either can be read"
        torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)


def assert_same(curve, one):
    assert curve.get("error") is None
    assert curve["loss"] == pytest.approx(one["loss"], rel=2e-6)
    assert curve["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_optimizer_keeps_of_shards_is_copied_and_saved_while_training_goes_on(name, tmp_path):
    with process_group(torch.device("cpu")):
        net = fully_shard(model(), mesh=init_device_mesh("cpu", (1,)))
        optimizer = make_optimizer(Optim(name=name, lr=0.01), net)
        backward(net)
        optimizer.step()
        checkpointer = Checkpointer(CheckpointConfig(), str(tmp_path), register=lambda *_, **__: None)
        checkpointer.save(1, {"optimizer": OptimizerState([net], [optimizer])})
        checkpointer.finish()
    assert (checkpointer.failures, checkpointer.last and checkpointer.last.step) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO)
def test_adafactor_and_lamb_take_parameters_in_parts(computed, name):
    assert_same(computed(TWO, ranks=2)[name], computed(ONE, ranks=1)[name.partition(" ")[0]])


@pytest.mark.full
@pytest.mark.parametrize("name", TWO_FULL)
def test_optimizers_agree_between_layouts(computed, name):
    assert_same(computed(TWO_FULL, ranks=2)[name], computed(ONE, ranks=1)[name.partition(" ")[0]])


@pytest.mark.full
@pytest.mark.parametrize("name", FOUR)
def test_adafactor_and_lamb_take_parameters_that_are_cut_along_two_axes(computed, name):
    assert_same(computed(FOUR, ranks=4)[name], computed(ONE, ranks=1)[name.partition(" ")[0]])


def test_a_wrong_option_is_named():
    with pytest.raises(RecipeError, match=r"^clip = -1 is negative; use 0 \(off\) or a norm such as 1.0$"):
        Optim(clip=-1)
