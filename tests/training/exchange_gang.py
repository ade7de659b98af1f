"""Trains the `lm` recipe on two real processes (gloo, CPU) and looks at what they exchange:
`python exchange_gang.py 2 < cases.json`, each case the arguments of the recipe.

Of each rank comes back how many bytes it put into each operation in each step (`sent`), or, for a case that is
`traced`, what a trace of the last steps comes to.
"""

import copy
import functools
import gc
import json
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from forked_ranks import answers, serve
from training_gang import Batches, case

EXACT_STEPS = 10  # of PowerSGD, before it compresses

COUNTED = {
    "DDP": case(),
    "DDP, one bucket": case(parallel={"bucket_bytes": 1 << 30}),
    "DDP, accumulated": case(train={"accumulate": 4}),
    "bf16": case(precision={"compute": "bf16"}),
    "fp16 hook": case(parallel={"compress": "fp16"}),
    "PowerSGD": case(parallel={"compress": "powersgd"}, train={"steps": EXACT_STEPS + 4}),
    "PowerSGD, small buckets": case(
        parallel={"compress": "powersgd", "bucket_bytes": 20_000}, train={"steps": EXACT_STEPS + 4}
    ),
    "DiLoCo": case(parallel={"local": {"every": 2}}),
    "FSDP2": case(parallel={"shard": 2}),
    "FSDP2, bf16": case(parallel={"shard": 2}, precision={"compute": "bf16"}),
}


def traced(**parallel: Any) -> dict[str, Any]:
    """Of a model whose layers have 360 kB each."""
    model = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "hidden": 0}
    made = case(model=model, data={"seq_len": 64}, train={"steps": 5}, parallel=parallel)
    return {**made, "traced": True}


TRACED = {"a bucket for each layer": traced(bucket_bytes=300_000), "one bucket": traced(bucket_bytes=1 << 30)}
TRACED_STEPS = 3


@functools.cache
def exchanged() -> dict[str, list[Any]]:
    """Of each case by its name, what `run_case` gives on each rank. Computed once per session."""
    cases = {**COUNTED, **TRACED}
    return dict(zip(cases, answers(__file__, list(cases.values()), ranks=2, timeout_s=300), strict=True))


class Steps:
    """Watches a training: what had been sent at the end of each step."""

    def __init__(self, sent: dict[str, list[int]]) -> None:
        self.sent, self.after = sent, []

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        self.after.append(copy.deepcopy(self.sent))

    def each(self) -> list[dict[str, int]]:
        """Bytes of every step but the first, by operation."""
        pairs = zip(self.after, self.after[1:], strict=False)
        return [{name: now[name][1] - before.get(name, [0, 0])[1] for name in now} for before, now in pairs]


class Recorded:
    """Records the last steps of a training: after the first, in which DDP has one bucket for everything."""

    def __init__(self, first_step: int) -> None:
        import torch.profiler

        self.first_step = first_step
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        if facts.step == self.first_step - 1:
            self.profiler.start()


def run_case(args: dict[str, Any], directory: Path) -> dict[str, Any]:
    import torch.distributed as dist
    from phalanx.recipes.lm import LmConfig
    from phalanx.recipes.parse import parse
    from phalanx_worker.training.loop import train
    from phalanx_worker.training.mesh import make_world, own_device
    from phalanx_worker.training.recipes.lm import make
    from phalanx_worker.training.trace import overlap, read
    from phalanx_worker.training.traffic import Traffic

    is_traced = args.pop("traced", False)
    config = parse(LmConfig, args).placed(dist.get_world_size())
    world = make_world(config.parallel, own_device(config.device))
    stream = Batches(config, rank=world.batch_rank, ways=config.parallel.batch_ways)
    trainer = make(config, world, batches=stream)
    if not is_traced:
        with Traffic() as traffic:
            trainer.watchers = [steps := Steps(traffic.sent)]
            train(trainer)
        return {"sent": steps.each(), "left_out": left_out_bytes()}
    trainer.watchers = [recorded := Recorded(config.train.steps - TRACED_STEPS + 1)]
    train(trainer)
    recorded.profiler.stop()
    directory.mkdir(exist_ok=True)
    file = directory / f"{dist.get_rank()}.json"
    recorded.profiler.export_chrome_trace(str(file))
    return {**asdict(overlap(events := read(file))), "still_to_do": still_to_do(events)}


def left_out_bytes() -> int:
    """What PowerSGD keeps for the next step, of every training that is still there."""
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

    gc.collect()
    states = [each for each in gc.get_objects() if type(each) is PowerSGDState]
    return sum(tensor.nbytes for state in states for tensor in state.error_dict.values())


def still_to_do(events: list[dict[str, Any]]) -> list[int]:
    """Of each all-reduce that backward starts, how many nodes of the graph were to be computed after it."""
    nodes = sorted(event["ts"] for event in events if event["name"].startswith("autograd::engine::evaluate_function"))
    updates = sorted(event["ts"] for event in events if event["name"].startswith("Optimizer.step"))
    exchanges = [event["ts"] for event in events if event["name"] == "c10d::allreduce_" and is_of_gradients(event)]
    ends = [min(update for update in updates if update > begin) for begin in exchanges]
    return [sum(begin < node < end for node in nodes) for begin, end in zip(exchanges, ends, strict=True)]


def is_of_gradients(exchange: dict[str, Any]) -> bool:
    """The others are the loop's own, of five numbers."""
    (shape,) = exchange["args"]["Input Dims"][0]
    return prod(shape) > 5


def main() -> None:
    import phalanx_worker.training.recipes.lm  # before forking, once for all ranks  # noqa: F401

    _, seen = serve(run_case)
    print(json.dumps([list(of_ranks) for of_ranks in zip(*seen, strict=True)]))


if __name__ == "__main__":
    main()
