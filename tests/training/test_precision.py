"""Number formats: half precision trains as well, a loss scale survives overflows, and what a device lacks is said."""

import pytest
import torch
from layout_cases import INTERLEAVED, ONE, PIPELINE
from phalanx.recipes.catalog import check
from phalanx.recipes.lm import LmModel
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.precision import Precision
from phalanx_server.domain.errors import Invalid
from phalanx_server.domain.spec import parse_job
from phalanx_worker.training.mesh import World
from phalanx_worker.training.parallel.layout import lay_out
from phalanx_worker.training.precision import LossScale, has_fp8, use_fp8
from phalanx_worker.training.recipes.lm import lm_task
from recipe_cases import VIT, vision
from recipe_gang import trained
from torch import nn
from training_gang import MODEL, case

FP8 = {"compute": "fp8", "emulate": True}
FP8_SIZES = {**MODEL, "layers": 2, "width": 64}
FP8_LOSS = 0.03  # relative: measured up to 0.016 in the layouts below


def fp8_case(**sections):
    return case(**{"model": FP8_SIZES, "precision": FP8, "train": {"steps": 12}, **sections})


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
FP8_ONE = {
    "fp8": fp8_case(),
    "bf16": fp8_case(precision={"compute": "bf16"}),
    "fp8, then bf16": fp8_case(stop_at=4, then={"precision": {"compute": "bf16"}}),
    "bf16, then fp8": fp8_case(stop_at=4, precision={"compute": "bf16"}, then={"precision": FP8}),
}
FP8_TWO = {name: fp8_case(parallel=LAYOUTS[name]) for name in ("FSDP2", "tensor")}
FP8_LAYOUTS = {
    "DDP": fp8_case(),
    "offload": fp8_case(parallel={"shard": 2, "offload": True}),
    "context": fp8_case(parallel={"context": 2}),
    "pipeline": fp8_case(parallel=PIPELINE),
    "FSDP2, recomputed": fp8_case(parallel={"shard": 2, "recompute": "full"}),
    "tensor, recomputed": fp8_case(parallel={"tensor": 2, "recompute": "selective"}),
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
    for finite in (False, True, True, False, True):
        seen.append((scale.accept(finite=finite), scale.scale))
    assert seen == [(False, 4.0), (True, 4.0), (True, 8.0), (False, 4.0), (True, 4.0)]
    again = LossScale(Precision(compute="fp16", loss_scale_interval=2))
    again.load_state_dict(scale.state_dict())
    assert again.accept(finite=True) and again.scale == 8.0


def test_other_formats_are_not_scaled():
    scale = LossScale(Precision(compute="bf16"))
    assert scale.accept(finite=False), "what to make of it is for the health checks"
    assert scale.scale == 1.0


def fp8_model():
    world = World(CPU, Parallel(data=1), mesh=None)
    return lay_out(lm_task(LmModel(**FP8_SIZES)), world, Precision(**FP8), seed=1)


def test_fp8_is_for_the_linear_layers_of_blocks_alone():
    (model,) = fp8_model().modules
    kinds = {name: type(part).__name__ for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    assert kinds.pop("head") == "Linear"
    assert len(kinds) == 7 * FP8_SIZES["layers"] and set(kinds.values()) == {"Float8Linear"}


def test_fp8_layers_keep_fp32_parameters_under_their_names():
    world = World(CPU, Parallel(data=1), mesh=None)
    (usual,) = lay_out(lm_task(LmModel(**FP8_SIZES)), world, Precision(), seed=1).modules
    (model,) = fp8_model().modules
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.state_dict(), usual.state_dict(), rtol=0, atol=0)


def test_an_fp8_layer_rounds_as_far_as_its_formats_do():
    """e4m3 has 3 bits of fraction, e5m2 has 2: each value is off by 1/16 or 1/8 at most, a sum by much less."""
    layer = fp8_model().modules[0].get_submodule("blocks.0.feed.up")
    x = torch.randn(32, FP8_SIZES["width"], requires_grad=True)
    back = torch.randn(32, FP8_SIZES["hidden"])
    seen, exact = [], []
    for results, product in ((seen, layer(x)), (exact, x @ layer.weight.t())):
        results += [product.detach(), *torch.autograd.grad(product, (x, layer.weight), back)]
    for of_layer, of_product in zip(seen, exact, strict=True):
        off = (of_layer - of_product).norm() / of_product.norm()
        assert 1e-3 < off < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("fp8", 1), ("FSDP2", 2), ("tensor", 2)])
def test_fp8_learns_nearly_as_bf16_does(computed, name, ranks):
    one = computed(FP8_ONE, ranks=1)
    curve = one[name] if ranks == 1 else computed(FP8_TWO, ranks=2)[name]
    assert curve["loss"] != one["bf16"]["loss"]
    assert curve["loss"] == pytest.approx(one["bf16"]["loss"], rel=FP8_LOSS)
    assert curve["loss"][-1] < curve["loss"][0] - 0.3


@pytest.mark.slow
def test_a_checkpoint_of_fp8_goes_on_in_bf16_and_the_other_way_round(computed):
    one = computed(FP8_ONE, ranks=1)
    assert one["fp8, then bf16"]["loss"][:4] == one["fp8"]["loss"][:4]
    assert one["bf16, then fp8"]["loss"][:4] == one["bf16"]["loss"][:4]
    for name in ("fp8, then bf16", "bf16, then fp8"):
        assert one[name]["loss"] == pytest.approx(one["bf16"]["loss"], rel=FP8_LOSS)


@pytest.mark.full
@pytest.mark.parametrize("name", FP8_LAYOUTS)
def test_fp8_learns_nearly_as_bf16_does_under_every_layout(computed, name):
    curve = computed(FP8_LAYOUTS, ranks=2)[name]
    assert curve["loss"] == pytest.approx(computed(FP8_ONE, ranks=1)["bf16"]["loss"], rel=FP8_LOSS)


@pytest.mark.full
def test_a_vit_whose_layers_have_biases_learns_in_fp8_nearly_as_in_bf16():
    layouts = {"tensor": {"tensor": 2}, "FSDP2": {"shard": 2}}
    (bf16,) = trained({"one": vision(VIT, precision={"compute": "bf16"})}, ranks=1)["one"]
    fp8 = trained({name: vision(VIT, precision=FP8, parallel=layout) for name, layout in layouts.items()}, ranks=2)
    for name in layouts:
        assert fp8[name][0]["loss"] != bf16["loss"]
        assert fp8[name][0]["loss"] == pytest.approx(bf16["loss"], rel=FP8_LOSS)


def test_fp8_without_its_hardware_is_refused_with_what_to_use_instead():
    with pytest.raises(RecipeError) as error:
        use_fp8([], Precision(compute="fp8"), CPU)
    assert str(error.value) == (
        "precision.compute = 'fp8' needs a GPU of compute capability 8.9 or more, and this rank has the CPU; "
        "use bf16, or precision.emulate = true to try it, slowly"
    )


@pytest.mark.parametrize(
    ("product", "capability", "has"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), True),
        ("NVIDIA A100-SXM4-80GB", (8, 0), False),
        ("NVIDIA GeForce RTX 4090", (8, 9), True),
        ("NVIDIA GeForce RTX 3090", (8, 6), False),
    ],
)
def test_fp8_is_known_by_the_product_or_by_the_compute_capability(monkeypatch, product, capability, has):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: product)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fp8(torch.device("cuda", 0)) is has


@pytest.mark.parametrize(
    ("gpu_types", "emulate", "said"),
    [
        (("h100",), False, None),
        (("a100", "h100"), False, None),
        (("of-tomorrow",), False, None),
        (("a100", "v100"), True, None),
        (("a100", "v100"), False, "needs GPUs that compute in it, and a100 and v100 cannot"),
        ((), False, "needs GPUs that compute in it, and the job asks for no GPU"),
    ],
)
def test_fp8_is_refused_at_submit_where_no_gpu_of_the_job_can_have_it(gpu_types, emulate, said):
    args = {"data": {"paths": ["unread"]}, "precision": {"compute": "fp8", "emulate": emulate}}
    asked = {"gpus": 1, "gpu_types": gpu_types} if gpu_types else {"replicas": 1, "gpus_per_replica": 0}
    job = {"name": "a", "resources": asked, "run": {"recipe": "lm", "args": args}}
    if said is None:
        parse_job(job)
        return
    with pytest.raises(Invalid) as error:
        parse_job(job)
    assert [(problem.field, problem.message) for problem in error.value.errors] == [
        ("run.args.precision.compute", f"'fp8' {said}; use bf16, or precision.emulate = true to try it, slowly")
    ]


@pytest.mark.parametrize(
    ("recipe", "sections", "said"),
    [
        (
            "lm",
            {"model": {"width": 64, "heads": 8, "hidden": 72}},
            "16 × parallel.tensor = 16, unlike model.hidden = 72",
        ),
        ("lm", {"parallel": {"tensor": 2}, "model": MODEL}, "= 32, unlike model.kv_heads × width / heads = 16"),
        ("vision", {"model": {"vit": {"width": 120, "heads": 6}}}, "unlike model.vit.width = 120"),
        ("vision", {"model": {"kind": "resnet"}}, "is for linear layers, and a resnet's are convolutions; use bf16"),
    ],
)
def test_models_that_fp8_is_not_for_are_refused(recipe, sections, said):
    data = {"format": "digits"} if recipe == "vision" else {"paths": ["unread"], "seq_len": 32}
    if recipe == "vision":
        sections = {"model": {"kind": "vit", **sections["model"]}}
        sections["model"].setdefault("vit", {}).setdefault("patch", 2)
    with pytest.raises(RecipeError) as error:
        check(recipe, {"data": data, "precision": FP8, **sections}, range(2, 3))
    assert said in str(error.value)


def test_emulation_is_of_fp8_alone():
    with pytest.raises(RecipeError) as error:
        Precision(compute="bf16", emulate=True)
    assert str(error.value) == "emulate = True emulates fp8, and compute = 'bf16'; use fp8, or leave it out"
