"""Runs training cases on a gang of real processes (gloo, CPU): `python training_gang.py RANKS < cases.json`.

One start serves many cases: torch is imported once, the ranks are forked, and each case gets its own mesh. A case is
the arguments of the `lm` recipe; its curve is what every rank saw.
"""

import json
from pathlib import Path
from typing import Any

from forked_ranks import answers, serve

MODEL = {"vocabulary": 64, "layers": 4, "width": 32, "heads": 8, "kv_heads": 4, "hidden": 64}
CASE = {
    "model": MODEL,
    "data": {"seq_len": 16, "paths": ["unread"]},  # `Batches` instead
    "train": {"steps": 8, "global_batch": 16, "seed": 7},
    "optim": {"lr": 5e-3, "schedule": {"shape": "cosine", "warmup": 2}, "clip": 0.5},
    "checkpoint": {"every_steps": 0},
    "device": "cpu",
}


def case(**sections: Any) -> dict[str, Any]:
    """`CASE` with some fields of some sections replaced. `stop_at=4, then={…}` stops after step 4 and goes on from its
    checkpoint with these sections."""
    return {**CASE, **{name: _over(CASE.get(name), fields) for name, fields in sections.items()}}


def _over(base: Any, fields: Any) -> Any:
    return {**base, **fields} if isinstance(base, dict) else fields


def curves(cases: list[dict[str, Any]], *, ranks: int) -> list[dict[str, Any]]:
    """What became of each case on a gang of so many ranks: `loss` and `grad_norm` per step, or `error`."""
    return answers(__file__, cases, ranks=ranks, timeout_s=120 + 100 * ranks)


class Batches:
    """Sequences that count up from a random token by a random stride, with some noise: the global batch of a step
    depends on seed and step alone. A rank gets its part; what is kept is the step."""

    def __init__(self, config: Any, *, rank: int, ways: int) -> None:
        self.config, self.step = config, 0
        part = config.train.global_batch // ways
        self.own = slice(rank * part, (rank + 1) * part)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Any]:
        import torch  # here, so that importing this module in the tests stays cheap

        train, vocabulary = self.config.train, self.config.model.vocabulary
        generator = torch.Generator().manual_seed(1000 * train.seed + self.step)
        self.step += 1
        shape = (train.global_batch, 1)
        first, stride = (torch.randint(high, shape, generator=generator) for high in (vocabulary, 4))
        tokens = (first + stride * torch.arange(self.config.data.seq_len + 1)) % vocabulary
        noise = torch.rand(tokens.shape, generator=generator) < 0.05
        return {"tokens": torch.where(noise, torch.zeros_like(tokens), tokens)[self.own]}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class Curve:
    """Watches a training and remembers what it saw."""

    def __init__(self) -> None:
        self.facts: list[Any] = []

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        self.facts.append(facts)


def run_case(args: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Train by `args`; where they hold `then`, go on to the end from a checkpoint with those sections instead."""
    if "then" not in args:
        return run_part(args)
    kept = {**args, "checkpoint": {**args["checkpoint"], "url": str(directory)}}
    first = run_part(kept)
    second = run_part({**kept, "stop_at": None, **args["then"]})
    return {**second, "loss": first["loss"] + second["loss"], "grad_norm": first["grad_norm"] + second["grad_norm"]}


def run_part(args: dict[str, Any]) -> dict[str, Any]:
    import phalanx
    import torch.distributed as dist
    from phalanx.recipes.lm import LmConfig
    from phalanx.recipes.parse import RecipeError, parse
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world, own_device
    from phalanx_worker.training.recipes.lm import make
    from phalanx_worker.training.traffic import Traffic

    stop_at = args.get("stop_at")
    try:
        config = parse(LmConfig, {k: v for k, v in args.items() if k not in ("stop_at", "then")})
        config = config.placed(dist.get_world_size())
        world = make_world(config.parallel, own_device(config.device))
    except RecipeError as error:
        return {"error": str(error), "loss": [], "own_bytes": 0}
    stream = Batches(config, rank=world.batch_rank, ways=config.parallel.batch_ways)
    trainer = make(config, world, batches=stream)
    curve = Curve()
    trainer.watchers = [curve]
    phalanx.should_stop = lambda: len(curve.facts) + 1 == stop_at  # asked while step `stop_at` goes on
    with Traffic() as traffic:
        train(trainer)
    return {
        "held_out": None if config.parallel.pipeline > 1 else held_out(trainer.layout, stream),
        "loss": [facts.loss for facts in curve.facts],
        "grad_norm": [facts.grad_norm for facts in curve.facts],
        "updated": [facts.updated for facts in curve.facts],
        "traffic": traffic.sent,
        "own_bytes": own_bytes(trainer.layout.parameters()),
    }


def held_out(layout: Any, stream: Batches) -> float:
    """The loss of the next global batch without its last sequence."""
    import torch
    from phalanx_worker.training.recipes.lm import held_out_loss

    batch, last = next(stream), stream.config.train.global_batch - 1
    counts = torch.arange(stream.own.start, stream.own.stop) < last
    return held_out_loss(layout, [(batch, counts)])["held_out_loss"]


def own_bytes(parameters: Any) -> int:
    """Of this rank's parameters, in memory."""
    from torch.distributed.tensor import DTensor

    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(p.numel() * p.element_size() for p in local)


def main() -> None:
    import phalanx_worker.training.recipes.lm  # before forking, once for all ranks  # noqa: F401

    cases, seen = serve(run_case)
    for of_ranks in zip(*seen, strict=True):
        assert all(one["loss"] == of_ranks[0]["loss"] for one in of_ranks), "all ranks see the same loss"
    print(json.dumps([{**seen[0][i], "own_bytes": [one[i]["own_bytes"] for one in seen]} for i in range(len(cases))]))


if __name__ == "__main__":
    main()
