"""Tests of a training from its arguments to its end."""

import json

import phalanx
from phalanx import job
from phalanx_worker.training.main import run


class Onlooker:
    def __init__(self):
        self.steps = []

    def after_backward(self, *_):
        return True

    def after_step(self, facts):
        self.steps.append(facts.step)


def test_who_looks_on_from_outside_does_so_beside_the_recipes_own(tmp_path, monkeypatch):
    onlooker, told, ends = Onlooker(), [], []
    monkeypatch.setattr(job, "mark", lambda kind, **data: told.append(data["message"]) if kind == "note" else None)
    monkeypatch.setattr(phalanx, "finished", lambda: ends.append("finished"))
    (tmp_path / "text.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 200)
    args = {
        "data": {"paths": [f"{tmp_path}/text.txt"], "seq_len": 16, "cache": f"{tmp_path}/cache"},
        "model": {"layers": 2, "width": 32, "heads": 4},
        "train": {"steps": 3, "global_batch": 4},
        "device": "cpu",
    }
    assert run(["lm", json.dumps(args)], watchers=lambda trainer: [onlooker]) == 0
    assert (onlooker.steps, ends) == ([1, 2, 3], ["finished"])
    assert "estimated" in told[0], "of memory"
