"""Trains small models on a gang of real processes with faults put in: `python fault_gang.py RANKS < cases.json`.

One start serves many cases. A case is the arguments of the `lm` recipe (`args`), the job file's `health`, every how
many steps a checkpoint is kept (`keeps_every`; in memory, where none is ever removed, or `to_files`), and `faults`:
batches whose loss or gradient goes wrong, a flipped bit, a slow rank or loader, somebody who looks on for long, a
request to stop, after which another attempt goes on where it `resumes`, with the data after that. What comes back is
what each rank said, and what became of the training.
"""

import copy
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from forked_ranks import answers, serve

ARGS = {
    "model": {"vocabulary": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 64},
    "data": {"seq_len": 16, "paths": ["unread"]},  # `Batches` instead
    "train": {"steps": 24, "global_batch": 16, "seed": 7},
    "optim": {"lr": 5e-3},
    "device": "cpu",
}
BLAMELESS = {"straggler": "off"}  # the machine of the tests is shared: ranks are slow for other reasons


def case(
    *,
    health: dict[str, Any] | None = None,
    faults: dict[str, Any] | None = None,
    keeps_every: int | None = 0,
    to_files: bool = False,
    resumes: bool = False,
    **sections: Any,
) -> dict[str, Any]:
    """`ARGS` with some fields of some sections replaced, and what is put in. `nan: stop` is short for
    `nan: {action: stop}`, as in a job file."""
    args = {**ARGS, **{name: {**ARGS.get(name, {}), **fields} for name, fields in sections.items()}}
    return {
        "args": args,
        "health": {name: {"action": of} if isinstance(of, str) else of for name, of in (health or {}).items()},
        "faults": faults or {},
        "keeps_every": keeps_every,
        "to_files": to_files,
        "resumes": resumes,
    }


def told(outcome: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Check and action of everything that was told, of the whole job."""
    return [(mark["check"], mark["action"]) for rank in outcome for mark in rank["marks"]]


def outcomes(cases: dict[str, Any], *, ranks: int, timeout_s: float = 240) -> dict[str, list[dict[str, Any]]]:
    """Of each case by its name, what `run_case` gives on each rank."""
    return answers(__file__, list(cases.items()), ranks=ranks, timeout_s=timeout_s)


class Batches:
    """Sequences that count up from a random token; the global batch depends on its number alone. It says no place, so
    that a rollback has nothing to take it back to."""

    def __init__(self, config: Any, rank: int, ways: int) -> None:
        part = config.train.global_batch // ways
        self.config, self.number, self.own = config, 0, slice(rank * part, (rank + 1) * part)
        self.before: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        import torch  # here, so that importing this module in the tests stays cheap

        self.number += 1
        if self.before:
            self.before()
        generator = torch.Generator().manual_seed(self.number)
        first = torch.randint(64, (self.config.train.global_batch, 1), generator=generator)
        return {"tokens": ((first + torch.arange(self.config.data.seq_len + 1)) % 64)[self.own]}


class Memory:
    """A checkpointer that keeps every state in this process."""

    def __init__(self) -> None:
        self.states: dict[int, Any] = {}

    def save(
        self, step: int, state: dict[str, Any], *, metrics: dict[str, float], keep_before: int | None = None
    ) -> None:
        self.states[step] = copy.deepcopy({name: part.state_dict() for name, part in state.items()})

    def restore(self, state: dict[str, Any], *, before: int | None = None) -> int | None:
        steps = [step for step in self.states if before is None or step < before]
        if not steps:
            return None
        for name, part in state.items():
            part.load_state_dict(copy.deepcopy(self.states[max(steps)][name]))
        return max(steps)

    def finish(self) -> None:
        pass


class Faults:
    """Puts faults into a trainer of this rank, by the number of the batch or step; and remembers what came of it."""

    def __init__(self, trainer: Any, wanted: dict[str, Any], rank: int) -> None:
        self.trainer, self.wanted, self.rank = trainer, wanted, rank
        self.facts: list[Any] = []
        self.tries: dict[int, int] = {}
        task = trainer.layout._task
        trainer.layout._task = replace(task, loss=lambda output, targets: self.loss(task.loss(output, targets)))

    def hits(self, name: str) -> dict[str, Any] | None:
        """The fault of this name, where it strikes this rank at the present batch."""
        fault = self.wanted.get(name)
        if fault is None or self.rank not in fault.get("ranks", [self.rank]):
            return None
        return fault if self.trainer.batches.number in fault["batches"] else None

    def before_batch(self) -> None:
        if fault := self.hits("loader"):
            time.sleep(fault["seconds"])

    def loss(self, value: Any) -> Any:
        if self.hits("slow"):
            time.sleep(self.wanted["slow"]["seconds"])
        if self.hits("loss"):
            value = value * float(self.wanted["loss"]["factor"])
        if self.hits("unsteady"):
            self.tries[0] = self.tries.get(0, 0) + 1
            value = value * (1 + self.tries[0] / 100)
        if self.hits("gradient"):
            value = value * 1.0
            value.register_hook(self.gradient)
        return value

    def gradient(self, value: Any) -> Any:
        number = self.trainer.batches.number
        self.tries[number] = self.tries.get(number, 0) + 1
        return value * float("nan") if self.tries[number] <= self.wanted["gradient"].get("tries", 99) else value

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        self.facts.append(facts)
        if fault := self.hits("beside"):
            time.sleep(fault["seconds"])
        if fault := self.hits("flip"):
            flip(list(self.trainer.layout.parameters())[fault.get("parameter", 3)], bit=fault["bit"])


def flip(parameter: Any, *, bit: int) -> None:
    import torch

    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    local.detach().view(torch.int32).view(-1)[5] ^= 1 << bit


def run_case(given: dict[str, Any], directory: Path) -> dict[str, Any]:
    import phalanx
    import torch.distributed as dist
    from phalanx import job
    from phalanx.recipes.lm import LmConfig
    from phalanx.recipes.parse import parse
    from phalanx_worker.training import monitor
    from phalanx_worker.training.checkpoint import Checkpointer
    from phalanx_worker.training.health.checksums import compare
    from phalanx_worker.training.health.telling import Unhealthy
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world, own_device
    from phalanx_worker.training.recipes.lm import make

    marks, reports, seen, ended, last = [], [], [], None, None
    monitor.REPORT_GAP_S = 0.0
    job.mark = lambda kind, **data: marks.append(data) if kind == "health" else None
    phalanx.report = lambda **values: reports.append(values)
    stop_at = given["faults"].get("stop", {}).get("batch", float("inf"))
    phalanx.should_stop = lambda: stream.number >= stop_at
    os.environ["PHALANX_HEALTH"] = json.dumps(given["health"])
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    config = parse(LmConfig, given["args"]).placed(dist.get_world_size())
    world = make_world(config.parallel, own_device(config.device))
    stream = Batches(config, world.batch_rank, config.parallel.batch_ways)
    for _ in range(1 + given["resumes"]):
        kept = Checkpointer(config.checkpoint, str(directory)) if given["to_files"] else Memory()
        trainer = make(config, world, batches=stream, checkpointer=kept if given["keeps_every"] is not None else None)
        trainer.checkpoint_every = given["keeps_every"] or 0
        faults = Faults(trainer, given["faults"], dist.get_rank())
        stream.before = faults.before_batch
        trainer.watchers = [faults]
        try:
            last = train(trainer)
        except Unhealthy as end:
            ended = str(end.code)
        seen += faults.facts
        phalanx.should_stop = lambda: False
    return {
        "marks": marks,
        "reports": [{name: float(value) for name, value in values.items()} for values in reports],
        "losses": [facts.loss for facts in seen],
        "updated": [facts.updated for facts in seen],
        "steps": [facts.step for facts in seen],
        "ended": ended,
        "last": last and last.step,
        "loss_scale": trainer.scale.scale,
        "same_parameters": compare(list(trainer.layout.named_parameters()), world.group("replicas")) is None,
    }


def main() -> None:
    import phalanx_worker.training.recipes.lm  # before forking, once for all ranks  # noqa: F401

    cases, seen = serve(lambda named, directory: run_case(named[1], directory))
    print(json.dumps({name: [one[i] for one in seen] for i, (name, _) in enumerate(cases)}))


if __name__ == "__main__":
    main()
