"""The `recsys` recipe: it learns what a click log's generator put in, with tables on one rank or shared out."""

import json

import pytest
import scipy.stats
import torch
from phalanx.recipes.catalog import check
from phalanx.recipes.parse import RecipeError
from phalanx_worker.training.data.click_log import clicks, main, write
from phalanx_worker.training.loop import train
from phalanx_worker.training.mesh import make_world, process_group
from phalanx_worker.training.models.dlrm import BLOCK, products, start_rows
from phalanx_worker.training.recipes.recsys import auc, judged, make
from recipe_cases import DLRM, EIGHT, FOUR, ONE, TRAIN, TWO, recsys
from recipe_gang import trained
from sklearn.metrics import roc_auc_score

OPTIMIZERS = {name: recsys(optim={"name": name, "lr": 3e-2}) for name in ("adafactor", "lamb")}


@pytest.mark.parametrize("name", ["recsys", "recsys, accumulated"])
def test_two_ranks_with_shared_tables_train_as_one_does(name):
    assert_as_one(trained(TWO, ranks=2)[name])


@pytest.mark.slow
def test_four_ranks_with_shared_tables_train_as_one_does():
    assert_as_one(trained(FOUR, ranks=4)["recsys"])


@pytest.mark.full
def test_eight_ranks_with_shared_tables_train_as_one_does():
    assert_as_one(trained(EIGHT, ranks=8)["recsys"])


def assert_as_one(ranks):
    (one,) = trained(ONE, ranks=1)["recsys"]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(one["loss"], rel=2e-6)
        assert rank["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_measures_whole_parameters_takes_shared_tables(name):
    (one,) = trained(OPTIMIZERS, ranks=1)[name]
    for rank in trained(OPTIMIZERS, ranks=2)[name]:
        assert rank["loss"] == pytest.approx(one["loss"], rel=2e-6)


@pytest.mark.slow
def test_shared_tables_go_on_from_a_checkpoint_on_another_number_of_ranks(tmp_path):
    def case(steps, **sections):
        optim = {"lr": 3e-2, "schedule": {"shape": "constant"}}
        return recsys(optim=optim, train={**TRAIN, "steps": steps}, **sections)

    kept = {"checkpoint": {"url": str(tmp_path), "asynchronous": False}}
    (undisturbed,) = trained({"one": case(4)}, ranks=1)["one"]
    begun = trained({"two": case(2, **kept)}, ranks=2)["two"][0]
    (resumed,) = trained({"one": case(4, **kept)}, ranks=1)["one"]
    assert begun["loss"] + resumed["loss"] == pytest.approx(undisturbed["loss"], rel=2e-6)


@pytest.mark.slow
def test_shared_tables_are_not_taken_for_replicas_that_differ(tmp_path, monkeypatch):
    health = {"corruption": {"every": 1, "action": "stop"}}
    monkeypatch.setenv("PHALANX_HEALTH", json.dumps(health))
    checked = recsys(train={**TRAIN, "seed": 8})
    assert len(trained({"two": checked}, ranks=2)["two"][0]["loss"]) == TRAIN["steps"]


def test_each_rank_has_its_share_of_the_tables_alone():
    (one,), two = trained(ONE, ranks=1)["recsys"], trained(TWO, ranks=2)["recsys"]
    tables = 4 * 26 * DLRM["rows"] * DLRM["dim"]
    for what, per_parameter in (("parameters", 1), ("optimizer", 2)):
        assert [rank[what] for rank in two] == [one[what] - per_parameter * tables // 2] * 2


@pytest.mark.slow
def test_a_model_learns_most_of_what_the_generator_put_in(tmp_path):
    log = clicks(60_000, values=30)
    write(log, tmp_path / "clicks.tsv")
    recipe, args = recsys(
        data={"format": "criteo", "paths": [str(tmp_path / "clicks.tsv")], "cache": str(tmp_path / "cache")},
        model={"rows": 32, "dim": 8, "bottom": [32], "top": [32]},
        train={"steps": 200, "global_batch": 512},
        optim={"lr": 3e-3, "weight_decay": 0.0, "schedule": {"warmup": 10}},
    )
    config = check(recipe, args, range(1, 2)).placed(1)
    with process_group(torch.device("cpu")):
        trainer = make(config, make_world(config.parallel, torch.device("cpu")))
        train(trainer)
        found = trainer.evaluation.last
        assert found.keys() == config.FOUND.keys()
    assert log.best_loss == pytest.approx(0.447, abs=2e-3) and log.base_loss == pytest.approx(0.635, abs=2e-3)
    assert found["held_out_loss"] < log.best_loss + 0.25 * (log.base_loss - log.best_loss)
    assert found["normalized_entropy"] < 0.8 and found["auc"] > 0.8


def test_the_generator_writes_lines_that_the_recipe_reads(tmp_path, capsys):
    assert main(["--rows", "300", "--values", "7", str(tmp_path / "log.tsv")]) == 0
    said = capsys.readouterr().out
    log = clicks(300, values=7)
    assert f"best possible {log.best_loss:.4f}" in said
    data = {"format": "criteo", "paths": [str(tmp_path / "log.tsv")], "cache": str(tmp_path), "shuffle": False}
    config = check(*recsys(data=data, evaluate={"share": 0}), range(1, 2)).placed(1)
    with process_group(torch.device("cpu")):
        batch = next(make(config, make_world(config.parallel, torch.device("cpu"))).batches)
    assert batch["categories"].tolist() == log.words[:16].tolist()
    assert torch.allclose(batch["dense"], torch.log1p(torch.tensor(log.counts[:16]).float()))
    assert batch["label"].tolist() == log.labels[:16].tolist()


def test_the_best_loss_is_the_entropy_of_the_chances_that_labels_were_drawn_from():
    log = clicks(50_000)
    entropy = scipy.stats.bernoulli(log.chances).entropy().mean()
    assert log.best_loss == pytest.approx(entropy, rel=0.02)
    assert log.labels.mean() == pytest.approx(log.chances.mean(), rel=0.02)


def test_auc_is_that_of_scikit_learn_with_ties_too():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(20, (500,), generator=generator).double()
    labels = (torch.rand(500, generator=generator) < 0.3).double()
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores))


def test_who_always_says_the_base_rate_has_a_normalized_entropy_of_one():
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    said = judged(torch.logit(labels.mean()).expand(4), labels)
    assert said["normalized_entropy"] == pytest.approx(1.0) and said["auc"] == 0.5


def test_rows_start_alike_whoever_holds_them():
    whole = torch.empty(BLOCK + 100, 2)
    start_rows(whole, first=0, seed=3)
    for first, end in ((0, 50), (50, BLOCK + 7), (BLOCK - 3, BLOCK + 100)):
        part = torch.empty(end - first, 2)
        start_rows(part, first=first, seed=3)
        assert torch.equal(part, whole[first:end])


def test_every_pair_of_vectors_is_multiplied_once():
    own, vectors = torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0, 4.0], [5.0, 6.0]]])
    assert products(own, vectors).tolist() == [[11.0, 17.0, 39.0]]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"parallel": {"shard": 2}},
            "parallel.shard does nothing for recsys: its tables are sharded over all ranks anyway; leave it out",
        ),
        ({"data": {"format": "digits"}}, "data.format = 'digits' is no click log; use criteo"),
        ({"model": {"rows": [3, 4]}}, "model.rows = (3, 4) is not a positive number or a list of 26; use 100000"),
        (
            {"precision": {"compute": "fp8", "emulate": True}},
            "precision.compute = 'fp8' is for the blocks of transformers, and these layers are small; use bf16",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_fix(sections, said):
    recipe, args = recsys()
    with pytest.raises(RecipeError) as error:
        check(recipe, {**args, **sections}, range(2, 3))
    assert str(error.value) == said
