"""What the monitor of the training loop (split of step time, comparison of ranks, health, reports) costs a step.

    python benchmarks/report_cost.py [--quick] [--ranks N] [--pairs N] [--block N] [--width N] [--batch N]

One training goes on in blocks of steps, by turns with the monitor and without any, in the order A B B A. Each pair of
blocks gives a ratio, of wall time and of this process's CPU time; on a machine that others use too, the second says
more. Reports go into a socket that another process empties, as the node's runner does. Reports are due by the clock, so
short blocks hold rather more of them than a run of steps. Budget: under 1 % at 10 ms steps.
"""

import argparse
import math
import os
import socket
import statistics
import tempfile
import time
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing
from one_batch import one_batch
from phalanx.recipes.lm import LmConfig
from phalanx.recipes.parse import parse
from phalanx_worker.training.loop import train
from phalanx_worker.training.mesh import make_world
from phalanx_worker.training.monitor import Monitor
from phalanx_worker.training.recipes.lm import make

WARM_UP_BLOCKS = 40  # the model is counted and the CPU's peak measured meanwhile, once


class Silent:
    """No monitor."""

    def __enter__(self): ...
    def __exit__(self, *_): ...
    def before_step(self, step): ...
    def before_forward(self): ...
    def after_step(self, facts, *, keeps): ...
    def state(self): ...
    def keep_before(self, step): ...
    def after_keep(self, step, stall_s): ...
    def returned(self, step): ...
    def finished(self, step, waited_s): ...

    def after_backward(self, pulse, again):
        return pulse, True


class Turns:
    """Lets the monitor look on in every other block, and measures the blocks."""

    def __init__(self, make_monitor: Any, block: int) -> None:
        self.make_monitor, self.block = make_monitor, block
        self.now: Any = Silent()
        self.blocks: list[tuple[bool, float, float]] = []
        self.began = (0.0, 0.0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end_block()

    def before_step(self, step):
        if (step - 1) % self.block == 0:
            if step > 1:
                self._end_block()
            watched = (step - 1) // self.block % 4 in (0, 3)
            self.now = self.make_monitor() if watched else Silent()
            self.now.__enter__()
            self.began = (time.perf_counter(), time.process_time())
        self.now.before_step(step)

    def _end_block(self):
        wall_s, cpu_s = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        self.now.__exit__(None, None, None)
        self.blocks.append((not isinstance(self.now, Silent), wall_s / self.block, cpu_s / self.block))

    def __getattr__(self, name):
        return getattr(self.now, name)


def config_of(args: argparse.Namespace) -> LmConfig:
    given = {
        "model": {"layers": 2, "width": args.width, "heads": 4},
        "data": {"seq_len": 64, "paths": ["unread"]},
        "train": {"steps": args.block * (2 * args.pairs + WARM_UP_BLOCKS), "global_batch": args.batch * args.ranks},
        "device": "cpu",
    }
    return parse(LmConfig, given).placed(args.ranks)


def rank_main(rank: int, args: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    reports = open_socket()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=args.ranks)
    config = config_of(args)
    world = make_world(config.parallel, torch.device("cpu"))
    trainer = make(config, world, batches=one_batch(config, world))
    # one monitor over all its blocks: its start is no cost of a step
    monitor = trainer.monitor
    assert isinstance(monitor, Monitor)
    turns = Turns(lambda: monitor, args.block)
    trainer.monitor = turns
    train(trainer)
    if rank == 0:
        show(turns.blocks[WARM_UP_BLOCKS:])
    dist.barrier()
    reports.close()
    os._exit(0)  # a gloo thread may want the lock that a reducer's end holds


def open_socket() -> socket.socket:
    """A report socket like a rank's, emptied by a process of its own until this one ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        while theirs.recv(65536):
            pass
        os._exit(0)
    theirs.close()
    os.environ["PHALANX_REPORT_FD"] = str(ours.fileno())
    return ours


def show(blocks: list[tuple[bool, float, float]]) -> None:
    pairs = [
        sorted(pair, reverse=True) for pair in zip(blocks[::2], blocks[1::2], strict=True)
    ]  # the watched one first
    rows = []
    for name, place in (("wall time", 1), ("CPU time", 2)):
        with_s, without_s = ([pair[i][place] for pair in pairs] for i in (0, 1))
        ratios = sorted(a / b for a, b in zip(with_s, without_s, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        away = math.ceil(0.98 * math.sqrt(len(ratios)))  # ranks from the middle: the median's 95 % interval, binomial
        sure = [ratios[max(0, len(ratios) // 2 - away)], ratios[min(len(ratios) - 1, len(ratios) // 2 + away)]]
        figures = [f"{1000 * statistics.median(times):.2f} ms" for times in (with_s, without_s)]
        spread = [f"{low:.3f} to {high:.3f}", f"{sure[0]:.4f} to {sure[1]:.4f}"]
        rows.append([name, *figures, f"{middle:.4f}", *spread])
    columns = ["per step", "with monitor", "without", "ratio", "half of the pairs", "95 % of the median"]
    measure.show(f"cost of the monitor, {len(pairs)} pairs of blocks", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 pairs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 64 per rank")
    args = parser.parse_args()
    if args.quick:
        args.pairs = 40
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.start_processes(rank_main, (args, directory), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
