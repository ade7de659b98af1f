"""Trying a model on held-out data: which samples these are, and how it stands beside training."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phalanx.recipes.catalog import read
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.lm import LmConfig
from phalanx.recipes.parse import RecipeError, parse
from phalanx.recipes.vision import VisionConfig
from phalanx_worker.training.checkpoint_store import Store
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.held_out import Split, separate
from phalanx_worker.training.evaluation import HeldOut
from phalanx_worker.training.main import main
from phalanx_worker.training.mesh import make_world, process_group
from phalanx_worker.training.metrics.meter import Meter
from phalanx_worker.training.recipes import vision


class Facts:
    step_time_s, data_wait_s, updated = 1.0, 0.0, True


@given(st.integers(2, 300).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size - 1))))
def test_every_sample_is_kept_back_or_trained_on_and_these_are_in_order(numbers):
    size, count = numbers
    split = Split(size, count)
    kept, others = [split.kept(i) for i in range(count)], [split.others(i) for i in range(size - count)]
    assert sorted(kept + others) == list(range(size)) and others == sorted(others) and kept == sorted(kept)


def test_what_is_kept_back_of_very_much_takes_no_memory_and_stands_anywhere():
    split = Split(10**12, 10**9)
    assert split.others(10**12 - 10**9 - 1) < 10**12
    places = {split.kept(i) - 1000 * i for i in range(1000)}
    assert len(places) > 500 and min(places) >= 0 and max(places) < 1000


@pytest.fixture
def texts(tmp_path):
    def text(size):
        path = tmp_path / "text.txt"
        path.write_text("ab" * size)
        return {"paths": [str(path)], "seq_len": 16, "cache": str(tmp_path / "cache")}

    return text


def test_a_share_keeps_at_least_one_sample_back_and_leaves_one(texts):
    config = parse(VisionConfig, {"data": {**texts(40), "format": "text"}}).data
    for share, kept in ((0.001, 1), (0.999, 4)):
        train_on, kept_back = separate(config, Evaluate(share=share))
        assert (len(train_on), len(kept_back)) == (5 - kept, kept)


def test_a_sample_alone_cannot_be_shared(texts):
    config = parse(VisionConfig, {"data": {**texts(10), "format": "text"}}).data
    with pytest.raises(DataError, match=r"there is 1 sample, of which evaluate.share can keep none back"):
        separate(config, Evaluate(share=0.5))


def test_as_much_is_tried_at_a_time_as_training_computes():
    train = {"global_batch": 64, "accumulate": 4}
    sections = {"data": {"format": "digits"}, "model": {"vit": {"patch": 2}}, "train": train}
    config = parse(VisionConfig, sections).placed(1)
    with process_group(torch.device("cpu")):
        _, kept_back = separate(config.data, config.evaluate)
        batch, _ = next(iter(HeldOut(kept_back, config, make_world(config.parallel, torch.device("cpu")))))
    assert len(batch["label"]) == 16


class Job:
    """What a run says and is told: it is asked to stop at the `stop_at`-th time that it asks."""

    def __init__(self, monkeypatch, stop_at):
        self.asked, self.stop_at, self.reports = 0, stop_at, []
        monkeypatch.setattr("phalanx.should_stop", self.should_stop)
        monkeypatch.setattr("phalanx.report", lambda **values: self.reports.append(values))

    def should_stop(self):
        self.asked += 1
        return self.asked >= self.stop_at

    @property
    def tried(self):
        return [values["step"] for values in self.reports if "perplexity" in values]


@pytest.mark.parametrize(
    ("stop_at", "last"), [(20, 17), (13, 11), (11, 11)], ids=["later", "between its batches", "as it begins"]
)
def test_who_is_asked_to_stop_saves_at_once_and_tries_nothing_more(monkeypatch, texts, tmp_path, stop_at, last):
    """It asks once a step, and before each of the 3 batches of the evaluation of step 10."""
    job = Job(monkeypatch, stop_at)
    args = {
        "data": texts(300),
        "model": {"layers": 1, "width": 16, "heads": 2},
        "train": {"steps": 100, "global_batch": 4},
        "evaluate": {"every": 10, "share": 0.3},
        "checkpoint": {"every_steps": 10, "url": str(tmp_path / "kept")},
        "device": "cpu",
    }
    assert main(["lm", json.dumps(args)]) == 0
    assert job.tried == ([10] if stop_at == 20 else [])
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "kept").glob("step-*"))
    assert kept == [10, last], "step 10 before it was tried"


def test_who_is_interrupted_in_the_last_evaluation_is_not_finished_and_makes_up_for_it(monkeypatch, texts, tmp_path):
    args = {
        "data": texts(300),
        "model": {"layers": 1, "width": 16, "heads": 2},
        "train": {"steps": 10, "global_batch": 4},
        "evaluate": {"share": 0.3},
        "checkpoint": {"url": str(tmp_path / "kept")},
        "device": "cpu",
    }
    finished = []
    monkeypatch.setattr("phalanx.finished", lambda: finished.append(True))
    for stop_at, tried, said in ((12, [], []), (100, [10], [True])):
        job = Job(monkeypatch, stop_at)
        assert main(["lm", json.dumps(args)]) == 0
        assert (job.tried, finished) == (tried, said)
        assert all(LmConfig.FOUND.keys() <= values.keys() for values in job.reports if "perplexity" in values)


def test_the_best_of_a_recipe_is_the_one_that_did_best_on_what_it_was_not_trained_on(monkeypatch, tmp_path):
    accuracies = iter((0.2, 0.9, 0.5))
    monkeypatch.setattr(vision, "top_1", lambda *_: {"accuracy": next(accuracies)})
    best = {"keep_last": 1, "keep_best": 1, "best_metric": "accuracy", "best": "highest"}
    args = {
        "data": {"format": "digits"},
        "model": {"vit": {"patch": 2, "layers": 1, "width": 16, "heads": 2}},
        "train": {"steps": 6, "global_batch": 4},
        "evaluate": {"every": 2},
        "checkpoint": {"every_steps": 2, "url": str(tmp_path), **best},
        "device": "cpu",
    }
    assert main(["vision", json.dumps(args)]) == 0
    kept = {entry.step: entry.manifest.metrics["accuracy"] for entry in Store(str(tmp_path)).entries()}
    assert kept == {6: 0.5, 4: 0.9}


@pytest.mark.parametrize(
    ("recipe", "given", "said"),
    [
        (
            "vision",
            {"checkpoint": {"best_metric": "acuracy"}},
            "checkpoint.best_metric = 'acuracy' is nothing that this recipe measures; use one of loss, accuracy",
        ),
        (
            "vision",
            {"checkpoint": {"keep_best": 1, "best_metric": "accuracy"}},
            "checkpoint.best = lowest, but the highest accuracy is the best; use highest",
        ),
        (
            "lm",
            {"checkpoint": {"keep_best": 1, "best_metric": "perplexity"}},
            "checkpoint.best_metric = 'perplexity' comes of an evaluation; set evaluate.share or evaluate.paths, "
            "or use loss",
        ),
        (
            "lm",
            {"checkpoint": {"keep_best": 1, "best_metric": "perplexity"}, "evaluate": {"share": 0.1, "every": 250}},
            "evaluate.every = 250 is not a multiple of checkpoint.every_steps = 100: what is evaluated has to be kept, "
            "for checkpoint.keep_best",
        ),
        (
            "lm",
            {"checkpoint": {"keep_best": 1, "best": "highest"}},
            "checkpoint.best = highest, but the lowest loss is the best; use lowest",
        ),
    ],
)
def test_what_the_best_are_kept_by_has_to_be_measured_of_each(recipe, given, said):
    of_recipe = {"vision": {"data": {"format": "digits"}, "model": {"vit": {"patch": 2}}}}
    sections = of_recipe.get(recipe, {"data": {"paths": ["unread"]}})
    with pytest.raises(RecipeError) as error:
        read(recipe, sections | given).placed(1)
    assert str(error.value) == said


def test_what_an_evaluation_waits_for_is_no_part_of_a_step():
    with process_group(torch.device("cpu")):
        meter = Meter(torch.device("cpu"), longest_window=1)
        meter.before_step()
        meter.after_step(Facts())
        meter.waits._held_s += 100.0
        meter.before_step()
        meter.after_step(Facts())
        assert meter.split().comm_s == 0.0
