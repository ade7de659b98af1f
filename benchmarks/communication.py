"""What each technique of the `lm` recipe puts on the wire, and what time that costs: with and without, CPUs and gloo.

    python benchmarks/communication.py [--ranks N] [--rounds N] [--block N] [--width N] [--layers N] [--batch N]
                                       [--link-mbit N] [--only NAME ...]

Every technique trains a model of its own, in blocks of steps by turns, in the order A B C … C B A, so that all share
the machine's noise. Figures are rank 0's. "put in" counts what goes into collectives; "on a ring" is what a rank then
sends where they go round a ring, the least that is possible (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
"exposed" is the monitor's `comm_s`; "hidden" the share of a trace's communication during which operators ran
(`phalanx_worker.training.trace`; tracing slows the operators down, not gloo). Under FSDP nothing is hidden here: a CPU
has no streams, and torch waits for each collective. PowerSGD compresses from the eleventh step on, so none of the exact
ones is counted.

On one host the link is memory. `--link-mbit` puts the ranks into a network namespace of their own whose loopback passes
so much and no more, of all ranks together: a token bucket (tc-tbf(8)). It needs `unshare`, `ip`, `tc` and user
namespaces, and no root.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
import torch.multiprocessing
from one_batch import one_batch
from phalanx.recipes.health import VARIABLE
from phalanx.recipes.lm import LmConfig
from phalanx.recipes.parse import parse
from phalanx_worker.training.loop import Trainer, train
from phalanx_worker.training.mesh import make_world
from phalanx_worker.training.monitor import Monitor
from phalanx_worker.training.recipes.lm import make
from phalanx_worker.training.trace import overlap, read
from phalanx_worker.training.traffic import Traffic

WARM_UP_BLOCKS = 2  # DDP has its buckets after the first step, PowerSGD compresses after ten
TRACED_STEPS = 4
BUCKETS = 8
EVERY = 8  # steps between meetings; divides a block
MIB = 1 << 20
LOCAL_SGD = {"every": EVERY, "outer_lr": 1.0, "outer_momentum": 0.0}
ACCUMULATED_ALOUD = "accumulate 4, exchange each"
PLAIN = "DDP"
QUIET = {name: {"action": "off"} for name in ("corruption", "straggler", "spike", "divergence")}


def techniques(ranks: int, bucket_bytes: int) -> dict[str, dict[str, Any]]:
    """Sections of the recipe's arguments. `bucket_bytes` makes the usual number of buckets of a small model."""
    buckets = {"bucket_bytes": bucket_bytes}
    return {
        PLAIN: {"parallel": buckets},
        "one bucket": {"parallel": {"bucket_bytes": 1 << 30}},
        "accumulate 4": {"parallel": buckets, "train": {"accumulate": 4}},
        ACCUMULATED_ALOUD: {"parallel": buckets, "train": {"accumulate": 4}},
        "compute in bf16": {"parallel": buckets, "precision": {"compute": "bf16"}},
        "compress fp16": {"parallel": {**buckets, "compress": "fp16"}},
        "PowerSGD, rank 4": {"parallel": {**buckets, "compress": "powersgd"}},
        f"local SGD, every {EVERY}": {"parallel": {"local": LOCAL_SGD}},
        f"DiLoCo, every {EVERY}": {"parallel": {"local": {"every": EVERY}}},
        "FSDP": {"parallel": {"shard": ranks}},
        "FSDP, bf16": {"parallel": {"shard": ranks}, "precision": {"compute": "bf16"}},
    }


class Kept:
    """A checkpointer that keeps nothing but the step: `train` goes on where the block before ended."""

    def __init__(self) -> None:
        self.step = 0

    def save(self, step: int, state: Any, /, *, metrics: Any, keep_before: int | None = None) -> None:
        self.step = step

    def restore(self, state: Any, /, *, before: int | None = None) -> int:
        return self.step

    def finish(self) -> None: ...


class Listening:
    """The trainer's monitor, and what it says of each step: seconds, and seconds of exposed communication."""

    def __init__(self, monitor: Any) -> None:
        assert isinstance(monitor, Monitor)
        self.monitor, self.steps = monitor, []

    def __enter__(self):
        self.monitor.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.monitor.__exit__(*error)

    def after_step(self, facts: Any, *, keeps: bool) -> int | None:
        before = self.monitor.after_step(facts, keeps=keeps)
        self.steps.append((facts.step_time_s, self.monitor.meter.split().comm_s))
        return before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.monitor, name)


@dataclass
class Measured:
    """One technique's training, and of each block the means per step."""

    trainer: Trainer
    listening: Listening
    step_s: list[float] = field(default_factory=list)
    exposed_s: list[float] = field(default_factory=list)
    put_in: float = 0.0  # bytes per step
    on_a_ring: float = 0.0
    hidden_share: float = 0.0

    def run(self, steps: int) -> None:
        """Train so many steps more."""
        kept = self.trainer.checkpointer
        assert isinstance(kept, Kept)
        self.listening.steps.clear()
        self.trainer.train = replace(self.trainer.train, steps=kept.step + steps)
        train(self.trainer)

    def time(self, steps: int) -> None:
        self.run(steps)
        step_s, exposed_s = zip(*self.listening.steps, strict=True)
        self.step_s.append(statistics.mean(step_s))
        self.exposed_s.append(statistics.mean(exposed_s))

    def count(self, steps: int, ranks: int) -> None:
        with Traffic() as traffic:
            self.run(steps)
        self.put_in = traffic.bytes / steps
        self.on_a_ring = sum(size * ring_factor(name, ranks) for name, (_, size) in traffic.sent.items()) / steps

    def trace(self, directory: str) -> None:
        file = Path(directory, f"{dist.get_rank()}.json")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.run(TRACED_STEPS)
        profiler.export_chrome_trace(str(file))
        self.hidden_share = overlap(read(file)).hidden_share


def ring_factor(operation: str, ranks: int) -> float:
    """Bytes that a rank sends for each that it puts in."""
    if "gather" in operation:
        return ranks - 1
    share = (ranks - 1) / ranks
    return 2 * share if operation.startswith(("allreduce", "all_reduce")) else share


def prepare(name: str, sections: dict[str, Any], args: argparse.Namespace) -> Measured:
    given = base(args)
    config = parse(LmConfig, {**given, **{part: {**given.get(part, {}), **sections[part]} for part in sections}})
    config = config.placed(args.ranks)
    world = make_world(config.parallel, torch.device("cpu"))
    trainer = make(config, world, batches=one_batch(config, world), checkpointer=Kept())
    if name == ACCUMULATED_ALOUD:
        for replica in trainer.layout._runs.values():
            replica.no_sync = nullcontext
    listening: Any = Listening(trainer.monitor)
    trainer.monitor = listening
    return Measured(trainer, listening)


def base(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": {"layers": args.layers, "width": args.width, "heads": 4, "vocabulary": 1024},
        "data": {"seq_len": 64, "paths": ["unread"]},
        "train": {"global_batch": args.batch * args.ranks},
        "checkpoint": {"every_steps": 0},
        "device": "cpu",
    }


def rank_main(rank: int, args: argparse.Namespace, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ[VARIABLE] = json.dumps(QUIET)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=args.ranks)
    parameters = parse(LmConfig, base(args)).model.parameters
    wanted = techniques(args.ranks, 4 * parameters // BUCKETS)
    every = {name: prepare(name, wanted[name], args) for name in args.only or wanted}
    for one in every.values():
        one.run(WARM_UP_BLOCKS * args.block)
        one.count(args.block, args.ranks)
    for number in range(args.rounds):
        for one in list(every.values())[:: -1 if number % 2 else 1]:
            one.time(args.block)
    for one in every.values():
        one.trace(directory)
    if rank == 0:
        show(every, args, gradients=4 * parameters)
    dist.barrier()
    os._exit(0)  # a gloo thread may want the lock that a reducer's end holds


def show(every: dict[str, Measured], args: argparse.Namespace, *, gradients: int) -> None:
    first = next(iter(every.values()))
    rows = []
    for name, one in every.items():
        ratio = statistics.median(a / b for a, b in zip(one.step_s, first.step_s, strict=True))
        rows.append(
            [
                name,
                f"{one.put_in / MIB:.3f}",
                f"{one.on_a_ring / MIB:.3f}",
                f"{1000 * statistics.median(one.step_s):.1f}",
                f"{1000 * min(one.step_s):.1f}–{1000 * max(one.step_s):.1f}",
                f"{ratio:.2f}",
                f"{1000 * statistics.median(one.exposed_s):.1f}",
                f"{one.hidden_share:.0%}",
            ]
        )
    link = f"{args.link_mbit} Mbit/s for all" if args.link_mbit else "memory"
    title = f"{args.ranks} ranks, {gradients / MIB:.1f} MiB of gradients, link: {link}"
    columns = [
        "per step",
        "put in, MiB",
        "on a ring",
        "ms",
        "min–max",
        f"/ {next(iter(every))}",
        "exposed, ms",
        "hidden",
    ]
    measure.show(title, columns, rows)


def behind_a_link(mbit: int) -> None:
    """Become the same program in a network namespace with a slow loopback. RuntimeError where that cannot be."""
    missing = [program for program in ("unshare", "ip", "tc") if shutil.which(program) is None]
    if missing:
        raise RuntimeError(
            f"--link-mbit needs {', '.join(missing)} (util-linux, iproute2): install it, or leave that out"
        )
    slow = f'ip link set lo up && tc qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 200ms && exec "$@"'
    os.environ["PHALANX_BENCH_LINK"] = str(mbit)
    os.execvp("unshare", ["unshare", "-rn", "sh", "-c", slow, "sh", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--block", type=int, default=8, help=f"steps; a multiple of {EVERY}")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences of 64 per rank; a multiple of 4")
    parser.add_argument("--link-mbit", type=int, default=0, help="0: as fast as memory")
    parser.add_argument(
        "--only", nargs="+", choices=techniques(2, 1), metavar="NAME", help="the first is compared with"
    )
    args = parser.parse_args()
    if args.ranks < 2 or args.block % EVERY or args.batch % 4:
        parser.error(f"--ranks is 2 or more, --block a multiple of {EVERY}, --batch a multiple of 4")
    if args.link_mbit and "PHALANX_BENCH_LINK" not in os.environ:
        behind_a_link(args.link_mbit)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.start_processes(rank_main, (args, directory), nprocs=args.ranks, start_method="fork")


if __name__ == "__main__":
    main()
