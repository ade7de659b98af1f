"""Signs of life where no step is reported."""

from types import SimpleNamespace
from typing import Any

import phalanx
import pytest
import torch
from phalanx.recipes.data import DataConfig
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.parallel import Parallel
from phalanx_worker.training import loop
from phalanx_worker.training.evaluation import HeldOut, separate
from phalanx_worker.training.health.life import GAP_S, Life, life
from phalanx_worker.training.loop import Facts
from phalanx_worker.training.mesh import make_world, process_group


@pytest.fixture
def marks(monkeypatch):
    """The kinds of what was marked; every sign is due."""
    seen = []
    monkeypatch.setattr(phalanx, "alive", lambda: seen.append("alive"))
    monkeypatch.setattr("phalanx_worker.training.health.life.GAP_S", 0.0)
    monkeypatch.setattr(life, "_due", 0.0)
    return seen


class Slow:
    """A checkpointer that notes when it is at work."""

    def __init__(self, seen):
        self.seen = seen

    def restore(self, state, *, before=None):
        self.seen.append("restore")
        return 4

    def save(self, step, state, *, metrics):
        self.seen.append("save")

    def finish(self):
        self.seen.append("finish")


def trainer_with(checkpointer) -> Any:
    monitor = SimpleNamespace(returned=lambda step: None, after_keep=lambda step, stall_s: None)
    return SimpleNamespace(checkpointer=checkpointer, state=dict, monitor=monitor, layout=SimpleNamespace(outer=None))


def test_a_sign_of_life_is_given_at_most_once_in_the_gap(monkeypatch):
    seen, now = [], [100.0]
    monkeypatch.setattr(phalanx, "alive", lambda: seen.append(now[0]))
    own = Life(clock=lambda: now[0])
    for now[0] in (100.0, 101.0, 100.0 + GAP_S, 101.0 + GAP_S):
        own.show()
    assert seen == [100.0, 100.0 + GAP_S]


def test_a_restore_at_the_start_and_in_a_rollback_is_between_signs_of_life(marks):
    trainer = trainer_with(Slow(marks))
    assert loop._resume(trainer) == 4
    assert loop._go_back(trainer, 9) == 4
    assert marks == ["alive", "restore", "alive"] * 2


def test_a_save_and_the_wait_for_the_last_one_are_between_signs_of_life(marks):
    trainer = trainer_with(Slow(marks))
    loop._keep(trainer, Facts(5, 1.0, 1.0, 1.0, True, step_time_s=1.0, data_wait_s=0.0))
    loop._finish(trainer)
    assert marks == ["alive", "save", "alive", "alive", "finish", "alive"]


def test_every_batch_of_an_evaluation_is_a_sign_of_life(marks):
    config = DataConfig(format="digits")
    _, kept_back = separate(config, Evaluate(share=0.1))
    assert kept_back is not None
    with process_group(torch.device("cpu")):
        world = make_world(Parallel(data=1), torch.device("cpu"))
        batches = sum(1 for _ in HeldOut(kept_back, config, world, batch=64))
    assert marks == ["alive"] * batches == ["alive"] * 3
