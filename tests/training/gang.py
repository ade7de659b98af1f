"""Runs training cases on a gang of real processes (gloo, CPU): `python gang.py RANKS < cases.json > curves.json`.

One start serves many cases: torch is imported once, the ranks are forked, and each case gets its own mesh. A case is
the arguments of the `lm` recipe; its curve is what every rank saw.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = {"vocabulary": 64, "layers": 8, "width": 32, "heads": 4, "kv_heads": 2, "hidden": 64}
CASE = {
    "model": MODEL,
    "data": {"seq_len": 16},
    "train": {"steps": 8, "global_batch": 16, "seed": 7},
    "optim": {"lr": 5e-3, "schedule": {"shape": "cosine", "warmup": 2}, "clip": 0.5},
    "device": "cpu",
}


def case(**sections: dict[str, Any]) -> dict[str, Any]:
    """`CASE` with some fields of some sections replaced."""
    return {**CASE, **{name: {**CASE.get(name, {}), **fields} for name, fields in sections.items()}}


def curves(cases: list[dict[str, Any]], *, ranks: int, timeout_s: float = 240) -> list[dict[str, Any]]:
    """What became of each case on a gang of so many ranks: `loss` and `grad_norm` per step, or `error`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, __file__, str(ranks)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def batches(config: Any, *, rank: int, ways: int) -> Iterator[dict[str, Any]]:
    """Sequences that count up from a random token by a random stride, with some noise: the global batch of a step
    depends on seed and step alone."""
    import torch  # here, so that importing this module in the tests stays cheap

    part = config.train.global_batch // ways
    for step in range(10**9):
        generator = torch.Generator().manual_seed(1000 * config.train.seed + step)
        shape = (config.train.global_batch, 1)
        first, stride = (torch.randint(high, shape, generator=generator) for high in (config.model.vocabulary, 4))
        tokens = (first + stride * torch.arange(config.data.seq_len + 1)) % config.model.vocabulary
        noise = torch.rand(tokens.shape, generator=generator) < 0.05
        tokens = torch.where(noise, torch.zeros_like(tokens), tokens)
        yield {"tokens": tokens[rank * part : (rank + 1) * part]}


def run_case(args: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist
    from phalanx.recipes.lm import LmConfig
    from phalanx.recipes.parse import parse
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world, own_device
    from phalanx_worker.training.recipes.lm import make

    class Curve:
        def __init__(self):
            self.facts = []

        def after_backward(self, step, loss, grad_norm):
            return True

        def after_step(self, facts):
            self.facts.append(facts)

    config = parse(LmConfig, args).placed(dist.get_world_size())
    world = make_world(config.parallel, own_device(config.device))
    stream = batches(config, rank=world.batch_rank, ways=config.parallel.batch_ways)
    trainer = make(config, world, stream)
    curve = Curve()
    trainer.watchers = [curve]
    began = time.perf_counter()
    train(trainer)
    return {
        "loss": [facts.loss for facts in curve.facts],
        "grad_norm": [facts.grad_norm for facts in curve.facts],
        "updated": [facts.updated for facts in curve.facts],
        "parameters": sum(p.numel() for p in trainer.layout.parameters()),
        "own_bytes": own_bytes(trainer.layout.parameters()),
        "took_s": time.perf_counter() - began,
    }


def own_bytes(parameters: Any) -> int:
    """Of this rank's parameters, in memory."""
    from torch.distributed.tensor import DTensor

    local = (p.to_local() if isinstance(p, DTensor) else p for p in parameters)
    return sum(p.numel() * p.element_size() for p in local)


def rank_main(rank: int, ranks: int, cases: list[dict[str, Any]], directory: str) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    answers = []
    for args in cases:
        answers.append(run_case(args))
        gc.collect()
        if rank == 0:
            print(json.dumps(args.get("parallel", {})), f"{answers[-1]['took_s']:.2f} s", file=sys.stderr, flush=True)
    Path(directory, f"{rank}.json").write_text(json.dumps(answers))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a gloo thread may want the lock that a reducer's end holds


def main() -> None:
    import phalanx_worker.training.recipes.lm  # before forking, once for all ranks  # noqa: F401
    import torch.multiprocessing

    ranks, cases = int(sys.argv[1]), json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (ranks, cases, directory)
        torch.multiprocessing.start_processes(rank_main, arguments, nprocs=ranks, start_method="fork")
        seen = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(ranks)]
    for of_ranks in zip(*seen, strict=True):
        assert all(one["loss"] == of_ranks[0]["loss"] for one in of_ranks), "all ranks see the same loss"
    print(json.dumps([{**seen[0][i], "own_bytes": [one[i]["own_bytes"] for one in seen]} for i in range(len(cases))]))


if __name__ == "__main__":
    main()
