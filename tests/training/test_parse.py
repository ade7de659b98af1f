"""A recipe's arguments: what is taken, with which units, and what is said about what is not."""

from dataclasses import dataclass

import pytest
from phalanx.recipes.catalog import read
from phalanx.recipes.lm import LmConfig, LmModel
from phalanx.recipes.optim import Schedule
from phalanx.recipes.parallel import Parallel, divisors
from phalanx.recipes.parse import Bytes, RecipeError, Seconds, document, parse


@dataclass(frozen=True)
class Keeping:
    size: Bytes
    every: Seconds = 60.0
    names: tuple[str, ...] = ()
    limit: int | None = None


DATA = {"paths": ["text"], "seq_len": 256}


def lm(given=None, *words):
    given = given or {}
    return parse(LmConfig, {**given, "data": {**DATA, **given.get("data", {})}}, words)


def refusal(given, *words):
    with pytest.raises(RecipeError) as caught:
        lm(given, *words)
    return str(caught.value)


def test_what_is_not_given_keeps_its_default():
    config = lm({"model": {"layers": 2}, "parallel": {"tensor": 2}})
    assert (config.model.layers, config.model.heads, config.parallel.tensor) == (2, LmModel().heads, 2)


def test_words_go_over_the_mapping():
    given = {"model": {"layers": 2}}
    config = lm(given, "model.layers=6", "optim.lr=3e-4", "parallel.schedule=gpipe", "optim.clip=0")
    assert (config.model.layers, config.optim.lr, config.parallel.schedule) == (6, 3e-4, "gpipe")
    assert given == {"model": {"layers": 2}}, "what was given is left alone"


def test_units_become_bytes_and_seconds():
    assert parse(Keeping, {"size": "64MiB", "every": "1m30s"}) == Keeping(64 << 20, 90.0)
    assert parse(Keeping, {"size": 5, "every": 2, "names": ["a"], "limit": 3}) == Keeping(5, 2, ("a",), 3)
    assert lm({"parallel": {"bucket_bytes": "1MB"}}).parallel.bucket_bytes == 1_000_000


def test_a_configuration_survives_being_written_down():
    config = lm({"parallel": {"pipeline": 2, "local": {"every": 5}}, "optim": {"betas": [0.9, 0.99]}})
    assert parse(LmConfig, document(config)) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"modle": {}}, "modle is not a field; did you mean 'model'?"),
        ({"model": {"layer": 2}}, "model.layer is not a field; did you mean 'layers'?"),
        ({"model": {"layers": "two"}}, "model.layers = 'two' is not a whole number; write a whole number"),
        ({"model": {"layers": True}}, "model.layers = True is not a whole number; write a whole number"),
        ({"model": {"layers": 0}}, "model.layers = 0 is not positive; use 1 or more"),
        ({"model": 3}, "model = 3 is not a section; write keys and values, such as {vocabulary: …}"),
        ({"parallel": {"data": "al"}}, "parallel.data = 'al' is not a whole number; write a whole number, or 'auto'"),
        (
            {"parallel": {"schedule": "1f1"}},
            "parallel.schedule = '1f1' is unknown; did you mean '1f1b'? use gpipe, 1f1b or interleaved",
        ),
        (
            {"parallel": {"bucket_bytes": "1 MIB"}},
            "parallel.bucket_bytes = '1 MIB' is not a size; write 64MiB, 2GB or bytes",
        ),
        ({"parallel": {"local": {"every": -1}}}, "parallel.local.every = -1 is negative; use 0 (off) or more"),
        ({"optim": {"betas": [0.9]}}, "optim.betas = [0.9] has 1 values; write 2"),
        ({"optim": {"lr": "fast"}}, "optim.lr = 'fast' is not a number; write a number"),
        (
            {"parallel": {"compress": "bf16", "shard": 2}},
            "parallel.compress = 'bf16' works with plain replicas (DDP) only; use compress = none, or data alone",
        ),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_the_fix(given, said):
    assert refusal(given) == said


def test_a_missing_value_and_a_bare_word_are_named():
    with pytest.raises(RecipeError, match="size is missing; it has no default"):
        parse(Keeping, {})
    assert "'layers' is not KEY=VALUE" in refusal({}, "layers")


def test_data_fills_what_the_other_sizes_leave():
    assert Parallel(tensor=2, shard=2).filled(8).sizes == (1, 2, 2, 2)
    assert Parallel(data=1, pipeline=2).filled(2).data == 1


@pytest.mark.parametrize(
    ("args", "world_size", "said"),
    [
        ({"parallel": {"tensor": 3}}, 3, "parallel.tensor = 3 does not divide model.heads = 8; use 1, 2, 4 or 8"),
        (
            {"parallel": {"tensor": 3}},
            4,
            "parallel has no room: shard × tensor × pipeline × context = 3 does not divide the 4 ranks; "
            "use sizes whose product does",
        ),
        (
            {"parallel": {"data": 2}},
            4,
            "parallel does not fit: data × shard × tensor × pipeline × context = 2, and the job has 4 ranks; "
            "use data = auto or other sizes",
        ),
        (
            {"parallel": {"pipeline": 8}},
            8,
            "model.layers = 4 are fewer than the pipeline's 8 stages; use more layers, or a smaller parallel.pipeline",
        ),
        (
            {"train": {"global_batch": 30}},
            4,
            "train.global_batch = 30 is not a multiple of data × shard × accumulate × microbatches = 4; use 32",
        ),
        (
            {"train": {"accumulate": 2}, "parallel": {"pipeline": 2}},
            2,
            "train.accumulate = 2, but a pipeline accumulates over its microbatches; "
            "use 1 and set parallel.microbatches",
        ),
        (
            {"parallel": {"local": {"every": 7}}},
            4,
            "checkpoint.every_steps = 100 is not a multiple of parallel.local.every = 7, when replicas are equal; "
            "use one",
        ),
        (
            {"evaluate": {"share": 0.1, "every": 30}, "parallel": {"local": {"every": 20}}},
            4,
            "evaluate.every = 30 is not a multiple of parallel.local.every = 20, when replicas are equal; use one",
        ),
        (
            {"evaluate": {"share": 0.1}, "parallel": {"pipeline": 2}},
            2,
            "evaluate.share asks for held-out data, which a pipeline is not tried on; leave it out",
        ),
        (
            {"data": {"seq_len": 255}, "parallel": {"tensor": 2}},
            2,
            "data.seq_len = 255 is not a multiple of parallel.tensor × 2 · parallel.context = 2; "
            "each of their ranks holds an equal part of every sequence",
        ),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(args, world_size, said):
    with pytest.raises(RecipeError) as caught:
        lm(args).placed(world_size)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("shape", "factors"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.775, 0.325, 0.1]),
        ("cosine", [0.5, 1.0, 0.868, 0.232, 0.1]),
        ("wsd", [0.5, 1.0, 1.0, 1.0, 0.1]),
    ],
)
def test_schedules_warm_up_and_come_down(shape, factors):
    schedule = Schedule(shape=shape, warmup=2)
    steps = [1, 2, 4, 8, 10]
    assert [round(schedule.factor(step, steps=10), 3) for step in steps] == factors


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(RecipeError) as caught:
        lm({"modle": {}, "model": {"layers": "two", "widht": 8}, "train": {"steps": 0, "accumulate": -1}})
    assert [error.field for error in caught.value.all] == [
        "modle",
        "model.layers",
        "model.widht",
        "train.steps",
        "train.accumulate",
    ]
    assert str(caught.value).startswith("modle is not a field; did you mean 'model'?; model.layers = 'two' is not")
    assert not any(error.others for error in caught.value.all)


HUGE = 10**400


@pytest.mark.parametrize(
    ("recipe", "args", "said"),
    [
        ("lm", {"model": {"layers": 10_000}}, "model.layers = 10000 is too large; use 4096 or less"),
        ("lm", {"model": {"vocabulary": HUGE}}, "model.vocabulary = 1000"),
        ("lm", {"model": {"width": 1 << 40, "heads": 1}}, "model.width"),
        ("lm", {"model": {"kv_heads": -8}}, "model.kv_heads = -8 is negative; use 0 or more"),
        ("lm", {"model": {"hidden": -8}}, "model.hidden"),
        ("lm", {"train": {"steps": HUGE}}, "train.steps"),
        ("lm", {"train": {"global_batch": HUGE}}, "train.global_batch"),
        ("lm", {"data": {"seq_len": HUGE}}, "data.seq_len"),
        ("lm", {"parallel": {"shard": HUGE}}, "parallel.shard"),
        ("lm", {"parallel": {"stages_per_rank": HUGE}}, "parallel.stages_per_rank"),
        ("lm", {"parallel": {"local": {"every": HUGE}}}, "parallel.local.every"),
        ("lm", {"optim": {"schedule": {"warmup": HUGE}}}, "optim.schedule.warmup"),
        ("lm", {"precision": {"loss_scale_interval": HUGE}}, "precision.loss_scale_interval"),
        ("vision", {"data": {"image_size": HUGE}}, "data.image_size"),
        ("vision", {"model": {"classes": HUGE}}, "model.classes"),
        ("vision", {"model": {"vit": {"layers": 10_000}}}, "model.vit.layers"),
        ("vision", {"model": {"vit": {"hidden": -1}}}, "model.vit.hidden"),
        ("vision", {"model": {"resnet": {"depths": [10_000]}}}, "model.resnet.depths"),
        ("vision", {"model": {"resnet": {"depths": [1] * 1000}}}, "model.resnet.depths"),
        ("vision", {"model": {"resnet": {"width": HUGE}}}, "model.resnet.width"),
        ("vision", {"augment": {"shift": HUGE}}, "augment.shift"),
        ("recsys", {"model": {"rows": HUGE}}, "model.rows"),
        ("recsys", {"model": {"dim": HUGE}}, "model.dim"),
        ("recsys", {"model": {"bottom": [HUGE]}}, "model.bottom"),
        ("recsys", {"model": {"top": [1] * 1000}}, "model.top"),
        ("recsys", {"evaluate": {"batch": HUGE}}, "evaluate.batch"),
    ],
)
def test_a_size_that_no_run_can_have_is_refused(recipe, args, said):
    with pytest.raises(RecipeError) as caught:
        read(recipe, {**args, "data": {"paths": ["unread"], **args.get("data", {})}})
    assert str(caught.value).startswith(said) and "; use " in str(caught.value)


@pytest.mark.parametrize(("number", "said"), [(1, "1"), (7, "1 or 7"), (12, "1, 2, 3, 4, 6 or 12"), (9, "1, 3 or 9")])
def test_the_numbers_that_divide_another(number, said):
    assert divisors(number) == said
