"""Number formats: half precision trains as well, a loss scale survives overflows, and what a device lacks is said."""

import pytest
import torch
from layout_cases import INTERLEAVED, ONE
from phalanx.recipes.lm import LmModel
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.precision import Precision
from phalanx_worker.training.mesh import World
from phalanx_worker.training.parallel.layout import lay_out
from phalanx_worker.training.precision import LossScale
from phalanx_worker.training.recipes.lm import lm_task
from training_gang import MODEL, case

CPU = torch.device("cpu")
LAYOUTS = {
    "DDP": {},
    "FSDP2": {"shard": 2},
    "tensor": {"tensor": 2},
    "pipeline": INTERLEAVED,
}
SLOW = {
    **{
        f"{compute} {name}": case(precision={"compute": compute, "loss_scale": 1024}, parallel=layout)
        for compute in ("bf16", "fp16")
        for name, layout in LAYOUTS.items()
    },
    "overflow": case(precision={"compute": "fp16", "loss_scale": 2.0**20}),
    "overflow, pipeline": case(precision={"compute": "fp16", "loss_scale": 2.0**20}, parallel=LAYOUTS["pipeline"]),
}


@pytest.mark.full
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_half_precision_follows_the_full_one_under_every_layout(computed, compute, name):
    one = computed(ONE, ranks=1)["one rank"]
    half = computed(SLOW, ranks=2)[f"{compute} {name}"]
    assert half["loss"] != one["loss"]
    assert half["loss"] == pytest.approx(one["loss"], rel=1e-2)
    assert all(half["updated"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["overflow", "overflow, pipeline"])
def test_steps_that_overflow_are_skipped_by_the_whole_gang(computed, name):
    curve = computed(SLOW, ranks=2)[name]
    assert not curve["updated"][0]
    assert curve["updated"][-1], "the scale has come down to one that fits"


def test_a_bf16_forward_multiplies_in_bf16_and_keeps_fp32_parameters():
    world = World(CPU, Parallel(data=1), mesh=None)
    layout = lay_out(lm_task(LmModel(**MODEL)), world, Precision(compute="bf16"), seed=1)
    logits = layout.modules[0](torch.zeros(1, 8, dtype=torch.int64))
    assert logits.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in layout.parameters()} == {torch.float32}


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_good_steps():
    scale = LossScale(Precision(compute="fp16", loss_scale=8.0, loss_scale_interval=2))
    seen = []
    for norm in (float("inf"), 1.0, 1.0, float("nan"), 1.0):
        seen.append((scale.accept(torch.tensor(norm)), scale.scale))
    assert seen == [(False, 4.0), (True, 4.0), (True, 8.0), (False, 4.0), (True, 4.0)]
    again = LossScale(Precision(compute="fp16", loss_scale_interval=2))
    again.load_state_dict(scale.state_dict())
    assert again.accept(torch.tensor(1.0)) and again.scale == 8.0


def test_other_formats_are_not_scaled():
    scale = LossScale(Precision(compute="bf16"))
    assert scale.accept(torch.tensor(float("nan"))), "what to make of it is for the health checks"
    assert scale.scale == 1.0


def test_fp8_is_refused_as_long_as_nothing_computes_in_it():
    with pytest.raises(RecipeError, match="'fp8' is not built yet; use bf16"):
        Precision(compute="fp8")
