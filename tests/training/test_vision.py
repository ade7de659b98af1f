"""The `vision` recipe: it learns, whatever the layout, from pictures that are changed alike on any number of ranks."""

import json

import pytest
import torch
from phalanx.recipes.catalog import check
from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.parse import RecipeError
from phalanx.recipes.vision import Augment, Picture, Resnet, Vit
from phalanx_worker.training.data.augment import MEAN, STD, Augmented, Plain
from phalanx_worker.training.data.held_out import separate
from phalanx_worker.training.evaluation import HeldOut
from phalanx_worker.training.loop import train
from phalanx_worker.training.main import main
from phalanx_worker.training.mesh import make_world, process_group
from phalanx_worker.training.models.vit import squares
from phalanx_worker.training.recipes.vision import make
from PIL import Image
from recipe_cases import EIGHT, FOUR, ONE, TWO, TWO_SLOW, vision
from recipe_gang import trained

LOSS, NORM = 2e-6, 2e-5  # as in test_parity


def names(cases):
    return [name for name in cases if name.startswith(("vit", "resnet")) and "bf16" not in name]


def assert_as_one(ranks, name):
    (one,) = trained(ONE, ranks=1)[name.split(",")[0]]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=LOSS)
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=NORM)


@pytest.mark.parametrize("name", names(TWO))
def test_two_ranks_train_as_one_does(name):
    assert_as_one(trained(TWO, ranks=2)[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names(TWO_SLOW))
def test_two_ranks_that_recompute_train_as_one_does(name):
    assert_as_one(trained(TWO_SLOW, ranks=2)[name], name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names(FOUR))
def test_four_ranks_train_as_one_does(name):
    assert_as_one(trained(FOUR, ranks=4)[name], name)


@pytest.mark.full
@pytest.mark.parametrize("name", names(EIGHT))
def test_eight_ranks_train_as_one_does(name):
    assert_as_one(trained(EIGHT, ranks=8)[name], name)


VIT = {"kind": "vit", "vit": {"patch": 2, "layers": 2, "width": 64, "heads": 4}}
RESNET = {"kind": "resnet", "resnet": {"depths": [1, 1], "width": 16, "groups": 4}}


@pytest.mark.parametrize(
    ("model", "crop", "steps", "lr"),
    [
        pytest.param(VIT, "none", 150, 3e-3, id="vit"),
        pytest.param(RESNET, "shift", 400, 2e-2, id="resnet", marks=pytest.mark.slow),
    ],
)
def test_the_digits_are_learned_to_ninety_percent_of_what_was_kept_back(model, crop, steps, lr):
    steps = {"steps": steps, "global_batch": 64}
    optim = {"lr": lr, "schedule": {"warmup": 10}}
    augment = {"crop": crop, "shift": 1, "flip": False}
    config = check(*vision(model, train=steps, optim=optim, augment=augment), range(1, 2))
    with process_group(torch.device("cpu")):
        trainer = make(config.placed(1), make_world(config.placed(1).parallel, torch.device("cpu")))
        train(trainer)
        assert trainer.evaluation.last["accuracy"] > 0.9
        assert trainer.evaluation.last.keys() == config.FOUND.keys()


def write_pictures(root, *, size=(20, 14), each=8):
    for label, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (root / label).mkdir()
        for number in range(each):
            Image.new("RGB", size, tuple(max(0, part - 5 * number) for part in colour)).save(
                root / label / f"{number}.png"
            )


def test_a_folder_of_pictures_is_learned_from_the_command_line(tmp_path, monkeypatch):
    write_pictures(tmp_path)
    reports = []
    monkeypatch.setattr("phalanx.report", lambda **values: reports.append(values))
    args = {
        "data": {"format": "images", "paths": [str(tmp_path)], "image_size": 8},
        "model": {"kind": "resnet", "classes": 2, "resnet": {"depths": [1], "width": 8, "groups": 2}},
        "train": {"steps": 12, "global_batch": 8},
        "evaluate": {"share": 0.25},
        "optim": {"lr": 2e-2},
        "device": "cpu",
    }
    assert main(["vision", json.dumps(args)]) == 0
    assert [values["accuracy"] for values in reports if "accuracy" in values] == [1.0]


def a_picture(size=8, channels=3):
    return {"image": torch.arange(channels * size * size, dtype=torch.uint8).reshape(channels, size, size), "label": 0}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("crop", ["none", "resized", "shift"])
def test_changes_follow_from_the_generator_and_keep_the_size(crop):
    change = Augmented(Augment(crop=crop, shift=2), size=8)
    first, again, *others = (change(a_picture(), seeded(seed))["image"] for seed in (1, 1, 2, 3, 4, 5, 6, 7))
    assert first.shape == (3, 8, 8) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not all(torch.equal(first, other) for other in others)


def test_a_shift_moves_by_no_more_than_it_may_and_fills_with_black():
    image = torch.ones(1, 8, 8)
    for seed in range(20):
        moved = Augmented(Augment(crop="shift", shift=1, flip=False), size=8)({"image": image}, seeded(seed))["image"]
        black = ((moved * STD + MEAN).abs() < 1e-6).sum()
        assert black in (0, 8, 15)


def test_half_of_the_pictures_are_mirrored():
    change = Augmented(Augment(crop="none"), size=8)
    plain = Plain(8)(a_picture(), seeded(0))["image"]
    same = sum(torch.equal(change(a_picture(), seeded(seed))["image"], plain) for seed in range(200))
    assert 70 < same < 130


def test_what_is_kept_back_is_never_trained_on():
    digits = DataConfig(format="digits")
    train_on, kept_back = separate(digits, Evaluate(share=0.1))
    assert len(train_on) + len(kept_back) == 1797 and len(kept_back) == 180
    pixels = [{tuple(part[i]["image"].flatten().tolist()) for i in range(len(part))} for part in (train_on, kept_back)]
    assert len(pixels[1] - pixels[0]) >= 178, "two of the 1,797 are the same picture"


@pytest.mark.parametrize("batch", [7, 64, 500])
def test_a_last_batch_that_is_not_full_counts_each_sample_once(batch):
    _, kept_back = separate(DataConfig(format="digits"), Evaluate(share=0.1))
    config = check(*vision(VIT, evaluate={"batch": batch}), range(1, 2)).placed(1)
    with process_group(torch.device("cpu")):
        world = make_world(config.parallel, torch.device("cpu"))
        seen = sum(int(counts.sum()) for _, counts in HeldOut(kept_back, config, world))
    assert seen == 180


def test_squares_are_cut_row_by_row():
    pixels = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert squares(pixels, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]


def test_the_usual_sizes_have_the_usual_number_of_parameters():
    photograph = Picture(channels=3, size=224)
    assert Vit().parameters(photograph, 1000) == pytest.approx(22.05e6, rel=0.01)  # ViT-S/16, Touvron et al. 2021
    assert Resnet(depths=(3, 4, 6, 3), bottleneck=True).expansion == 4


@pytest.mark.parametrize(
    ("sections", "ranks", "said"),
    [
        ({"parallel": {"pipeline": 2}}, 2, "parallel.pipeline = 2: vision has no such layout; use 1"),
        ({"parallel": {"tensor": 3}}, 3, "parallel.tensor = 3 does not divide the ViT's heads = 4; use a divisor"),
        (
            {"model": {**VIT, "classes": 3}, "parallel": {"tensor": 4}},
            4,
            "parallel.tensor = 4 is more than model.classes = 3; use at most 3",
        ),
        (
            {"model": {"vit": {**VIT["vit"], "patch": 1}}, "parallel": {"tensor": 2}},
            2,
            "parallel.tensor = 2 is more than channels × model.vit.patch² = 1; use at most 1",
        ),
        (
            {"model": RESNET, "parallel": {"tensor": 2}},
            2,
            "parallel.tensor = 2: convolutions are not cut; use 1, and shard or data",
        ),
        (
            {"model": {"vit": {"patch": 3}}},
            1,
            "model.vit.patch = 3 does not divide the pictures' 8 pixels; use 1, 2, 4 or 8",
        ),
        (
            {"data": {"format": "text", "paths": ["x"]}},
            1,
            "data.format = 'text' has no pictures; use images, tar or digits",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_fix(sections, ranks, said):
    recipe, args = vision(VIT)
    with pytest.raises(RecipeError) as error:
        check(recipe, {**args, **sections}, range(ranks, ranks + 1))
    assert str(error.value) == said
