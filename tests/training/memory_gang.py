"""Trains a model of 40 MB on two real processes (gloo, CPU) and hears what they say of their memory:
`python memory_gang.py 2 < cases.json`, one case, the arguments of the `lm` recipe. A second would find memory that the
first has left.
"""

import json
from pathlib import Path
from typing import Any

from forked_ranks import answers, serve
from training_gang import Batches, case

MODEL = {"vocabulary": 4096, "layers": 4, "width": 384, "heads": 4, "kv_heads": 4, "hidden": 0}


ARGUMENTS = case(model=MODEL, data={"seq_len": 32}, train={"steps": 4, "global_batch": 4})


def heard() -> list[dict[str, Any]]:
    """Of each rank, its `notes` and those of its `reports` that tell of memory."""
    return answers(__file__, [ARGUMENTS], ranks=2, timeout_s=120)


def run_case(args: dict[str, Any], _: Path) -> dict[str, Any]:
    import phalanx
    import torch
    import torch.distributed as dist
    from phalanx import job
    from phalanx.recipes.catalog import read
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world
    from phalanx_worker.training.metrics.memory import MemoryReport
    from phalanx_worker.training.recipes.lm import make

    notes, reports = [], []
    job.mark = lambda kind, **data: notes.append(data["message"]) if kind == "note" else None
    phalanx.report = lambda **values: reports.append(values) if "memory_peak_bytes" in values else None
    device = torch.device("cpu")
    config: Any = read("lm", args).placed(dist.get_world_size())
    memory = MemoryReport(device, config)
    world = make_world(config.parallel, device)
    trainer = make(config, world, batches=Batches(config, rank=world.batch_rank, ways=config.parallel.batch_ways))
    trainer.watchers = [memory]
    train(trainer)
    memory.tell(config.train.steps)
    return {"notes": notes, "reports": reports}


def main() -> None:
    import phalanx_worker.training.recipes.lm  # before forking, once for all ranks  # noqa: F401

    _, seen = serve(run_case)
    print(json.dumps([answers[0] for answers in seen]))


if __name__ == "__main__":
    main()
