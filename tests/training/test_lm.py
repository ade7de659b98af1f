"""The `lm` recipe from the command line, under torchrun, on files; and its loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phalanx.recipes.lm import LmModel
from phalanx_worker.training.main import main
from phalanx_worker.training.models.transformer import Transformer, rotate, rotation

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def arguments(text: Path, **sections):
    args = {
        "data": {"paths": [str(text)], "seq_len": 32, "cache": str(text.parent / "cache")},
        "model": {"layers": 2, "width": 32, "heads": 4},
        "train": {"steps": 20, "global_batch": 8},
        "optim": {"lr": 1e-2},
        "device": "cpu",
    }
    return json.dumps({**args, **sections})


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz " * 200)
    return path


def last_loss(output: str) -> float:
    return float(output.split("loss ")[-1])


def test_one_rank_learns_the_alphabet(text, capsys):
    assert main(["lm", arguments(text), "train.steps=30"]) == 0
    assert last_loss(capsys.readouterr().out) < 3.0, "5.5 is chance"


TORN_DOWN = "the interpreter of a rank was torn down"
SITE = f"""
import os, sys
class Last:
    def __del__(self, write=os.write):
        write(2, b"{TORN_DOWN}")
if "RANK" in os.environ:
    sys.modules["last"] = Last()
"""


@pytest.mark.slow
def test_two_ranks_under_torchrun_learn_the_same(text, capsys, tmp_path):
    """And end without what gloo's threads do not outlive: they may abort a process that tears its interpreter down."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    argv = [*TORCHRUN, "-m", "phalanx_worker.training.main", "lm", arguments(text), "parallel.shard=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert TORN_DOWN not in done.stderr
    assert main(["lm", arguments(text)]) == 0
    assert last_loss(done.stdout) == pytest.approx(last_loss(capsys.readouterr().out), abs=2e-4)


def test_what_is_held_out_is_tried_every_so_often_and_not_trained_on(text, tmp_path, monkeypatch):
    reports = []
    monkeypatch.setattr("phalanx.report", lambda **values: reports.append(values))
    backwards = tmp_path / "backwards" / "alphabet.txt"
    backwards.parent.mkdir()
    backwards.write_text(text.read_text()[::-1])
    words = ["lm", arguments(text), "train.steps=30", "evaluate.every=20"]
    assert main([*words, "evaluate.share=0.2"]) == main([*words, f'evaluate.paths=["{backwards}"]']) == 0
    tried = [(values["step"], values["held_out_loss"]) for values in reports if "perplexity" in values]
    assert [step for step, _ in tried] == [20, 30] * 2, "every so often, and after the last"
    assert tried[1][1] < 3.0 < 4.0 < tried[3][1], "5.5 is chance"


@pytest.mark.slow
def test_a_training_goes_on_from_its_checkpoint_with_other_ranks(text, capsys, tmp_path):
    words = ["lm", arguments(text), f"checkpoint.url={tmp_path / 'kept'}"]
    argv = [*TORCHRUN, "-m", "phalanx_worker.training.main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    half = [*argv, "parallel.tensor=2", "train.steps=10", "optim.schedule.shape=constant"]
    done = subprocess.run(half, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert main([*words, "optim.schedule.shape=constant"]) == 0
    resumed = last_loss(capsys.readouterr().out)
    assert main(["lm", arguments(text), "optim.schedule.shape=constant"]) == 0
    assert resumed == pytest.approx(last_loss(capsys.readouterr().out), abs=2e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lm", "{}"], "phalanx: data is missing; it has no default"),
        (["ml"], "phalanx: usage: python -m phalanx_worker.training.main {lm,vision,recsys} [JSON] [KEY=VALUE ...]"),
        (["lm", '{"model":'], "phalanx: the arguments are not JSON: Expecting value: line 1 column 10 (char 9)"),
        (
            ["lm", "DATA", "parallel.tensor=3"],
            "phalanx: parallel has no room: shard × tensor × pipeline × context = 3 does not divide the 1 ranks; "
            "use sizes whose product does",
        ),
        (["lm", "DATA", "model.vocabulary=100"],
         "phalanx: model.vocabulary = 100 is less than the data's 256 symbols; use 256 or more"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_no_traceback(text, capsys, words, said):
    words = [arguments(text) if word == "DATA" else word for word in words]
    assert main(words) == 2
    assert capsys.readouterr().err.strip() == said


def whole(**sizes):
    torch.manual_seed(0)
    shape = LmModel(**{"vocabulary": 16, "layers": 2, "width": 16, "heads": 4, "kv_heads": 2, **sizes})
    return Transformer(shape, layers=range(shape.layers))


def test_no_position_sees_what_comes_after_it():
    model, tokens = whole(), torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 15
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-6)


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_distance():
    query, key = torch.randn(2, 1, 1, 1, 8)
    turned = rotate(query.expand(1, 1, 6, 8), rotation(torch.arange(6), size=8, base=100.0))
    keys = rotate(key.expand(1, 1, 6, 8), rotation(torch.arange(6), size=8, base=100.0))
    assert torch.allclose(turned.norm(dim=-1), query.norm().expand(1, 1, 6), atol=1e-5)
    products = (turned[0, 0] @ keys[0, 0].T).numpy()
    assert products[1, 0] == pytest.approx(products[4, 3], abs=1e-4)
    assert products[3, 0] == pytest.approx(products[5, 2], abs=1e-4)


def test_stages_in_a_row_are_the_whole_model():
    model = whole()
    first = Transformer(model.shape, layers=[0], predicts=False)
    last = Transformer(model.shape, layers=[1], embeds=False)
    for part in (first, last):
        part.load_state_dict({name: value for name, value in model.state_dict().items() if name in part.state_dict()})
    tokens = torch.arange(8)[None]
    assert torch.equal(last(first(tokens)), model(tokens))


def test_data_that_is_not_there_is_one_line(text, capsys):
    assert main(["lm", arguments(text.with_name("nowhere.txt"))]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nowhere.txt" in said
