"""What checkpoints cost a training: how long it stands still for one, and how much slower it is until that is written.

    python benchmarks/checkpoint_stall.py [--quick] [--rounds 3] [--block 40] [--width 512]

One training of 2 ranks, one thread each, goes on in blocks of steps. A block begins with a checkpoint (or with none)
and ends after so many steps, which are to take ten seconds or more; the blocks go none, asynchronous, synchronous, and
back, so that each kind stands beside the others. Of each save there is measured, on rank 0:

    stall     how long the loop stood still in the call: for the copy, or for everything
    slower    how much longer than usual the steps of the block took, all together: what the writing takes from them.
              "Usual" is the mean of the two nearest blocks without a checkpoint (for a block without: two others)
    written   from the call until the checkpoint is complete
    cost      stall and slower, as a share of the block's time without
    cpu       CPU time of the save in rank 0's process, over that of a block without: says more on a machine that others
              use too

Files go to TMPDIR, which should be a disk, and are synced. On a machine with as many cores as ranks, as here, whatever
writes takes its time from the training, which is not so beside a GPU. Budget: a cost below 5 % for asynchronous ones.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing
from one_batch import one_batch
from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx.recipes.lm import LmConfig
from phalanx.recipes.parse import parse
from phalanx_worker.training.checkpoint import Checkpointer
from phalanx_worker.training.loop import train
from phalanx_worker.training.mesh import make_world
from phalanx_worker.training.recipes.lm import make

KINDS = ("none", "asynchronous", "synchronous")
ORDER = (*KINDS, *reversed(KINDS))
WARM_UP_BLOCKS = 3  # one of each kind: files, threads and buffers are there afterwards
RANKS, SEQ_LEN = 2, 64
BUDGET = 0.05
MIB = 1 << 20


@dataclass
class Block:
    """One save (or none) and the steps that follow it, in seconds."""

    kind: str
    stall_s: float = 0.0
    written_s: float = 0.0
    bytes: int = 0
    cpu_s: float = 0.0
    steps_s: list[float] = field(default_factory=list)


class Turns:
    """A checkpointer that saves in one of the three ways, by turns; and the watcher that times the steps after it."""

    def __init__(self, directory: str) -> None:
        self.ways = {
            kind: Checkpointer(
                CheckpointConfig(asynchronous=kind == "asynchronous", keep_last=1),
                f"{directory}/{kind}",
                register=partial(self.registered, kind),
            )
            for kind in KINDS[1:]
        }
        self.blocks: list[Block] = []
        self.saving: dict[str, tuple[float, Block]] = {}
        self.stepped_at = self.cpu_from_s = 0.0

    def save(self, step: int, state: Any, *, metrics: Mapping[str, float], keep_before: int | None = None) -> None:
        kind = KINDS[len(self.blocks)] if len(self.blocks) < WARM_UP_BLOCKS else self._next()
        block, began, self.cpu_from_s = Block(kind), time.perf_counter(), time.process_time()
        self.blocks.append(block)
        if kind != "none":
            self.saving[kind] = began, block
            self.ways[kind].save(step, state, metrics=metrics)
        self.stepped_at = time.perf_counter()
        block.stall_s = self.stepped_at - began

    def _next(self) -> str:
        return ORDER[(len(self.blocks) - WARM_UP_BLOCKS) % len(ORDER)]

    def registered(self, kind: str, _url: str, **facts: Any) -> None:
        """A checkpoint is complete. Called in the thread that writes."""
        began, block = self.saving[kind]
        block.written_s, block.bytes = time.perf_counter() - began, facts["bytes"]

    def restore(self, _state: Any, *, before: int | None = None) -> None: ...

    def finish(self) -> None:
        for way in self.ways.values():
            way.finish()

    def after_backward(self, step: int, loss: float, grad_norm: Any) -> bool:
        return True

    def after_step(self, facts: Any) -> None:
        if self.blocks:
            now = time.perf_counter()
            self.blocks[-1].steps_s.append(now - self.stepped_at)
            self.blocks[-1].cpu_s = time.process_time() - self.cpu_from_s
            self.stepped_at = now


def config_of(args: argparse.Namespace) -> LmConfig:
    given = {
        "model": {"layers": 6, "width": args.width, "heads": 8},
        "data": {"seq_len": SEQ_LEN, "paths": ["unread"]},
        "train": {"steps": args.block * (WARM_UP_BLOCKS + len(ORDER) * args.rounds + 1), "global_batch": RANKS},
        "checkpoint": {"every_steps": args.block},
        "device": "cpu",
    }
    return parse(LmConfig, given).placed(RANKS)


def rank_main(rank: int, args: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=RANKS)
    config = config_of(args)
    world = make_world(config.parallel, torch.device("cpu"))
    turns = Turns(directory)
    trainer = make(config, world, batches=one_batch(config, world), checkpointer=turns)
    trainer.watchers = [turns]
    train(trainer)
    if rank == 0:
        show(config, turns.blocks[WARM_UP_BLOCKS:-1])  # the last is the save at the end
    dist.barrier()
    os._exit(0)  # a gloo thread may want the lock that a reducer's end holds


def usual(blocks: list[Block], place: int) -> tuple[float, float]:
    """How long the steps of a block take without a checkpoint, and their CPU time: the means of the two nearest such
    blocks."""
    plain = sorted((abs(place - at), at) for at, block in enumerate(blocks) if block.kind == "none" and at != place)
    nearest = [blocks[at] for _, at in plain[:2]]
    return statistics.mean(sum(each.steps_s) for each in nearest), statistics.mean(each.cpu_s for each in nearest)


def figures(blocks: list[Block], place: int) -> dict[str, float]:
    block, (whole_s, cpu_s) = blocks[place], usual(blocks, place)
    slower_s = sum(block.steps_s) - whole_s
    return {
        "stall": block.stall_s,
        "slower": slower_s,
        "written": block.written_s,
        "cost": (block.stall_s + slower_s) / whole_s,
        "cpu": block.cpu_s - cpu_s,
    }


def spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}}\n{min(values):{form}} to {max(values):{form}}"


def show(config: LmConfig, blocks: list[Block]) -> None:
    rows = []
    for kind in KINDS:
        found = [figures(blocks, place) for place, block in enumerate(blocks) if block.kind == kind]
        columns = {name: [each[name] for each in found] for name in found[0]}
        verdict = ("held" if statistics.median(columns["cost"]) < BUDGET else "MISSED") if kind == KINDS[1] else ""
        forms = [spread(values, ".1%" if name == "cost" else ".2f") for name, values in columns.items()]
        rows.append([kind, str(len(found)), *forms, verdict])
    step_s = statistics.median([step_s for block in blocks if block.kind == "none" for step_s in block.steps_s])
    steps = len(blocks[0].steps_s)
    size = (
        f"{4 * config.model.parameters / MIB:.0f} MiB of parameters, {max(b.bytes for b in blocks) / MIB:.0f} MiB saved"
    )
    title = f"cost of a checkpoint every {steps} steps of {step_s * 1e3:.0f} ms: {size} (s)"
    measure.show(title, ["", "n", "stall", "slower", "written", "cost", "cpu", f"budget < {BUDGET:.0%}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of short blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block", type=int, default=40, help="steps")
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.block = 1, 10
    with tempfile.TemporaryDirectory(prefix="phalanx-bench-") as directory:
        torch.multiprocessing.start_processes(rank_main, (args, directory), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main()
