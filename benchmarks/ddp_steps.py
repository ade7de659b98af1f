"""The training script that the benchmarks launch in several ways: DistributedDataParallel on a small network.

Each rank prints `first_step T` (Unix time at the end of its first optimizer step); rank 0 prints `steps_per_s X`, taken
over the steps after the first fifth. It runs under Phalanx and under torchrun; there, reporting does nothing.
"""

import argparse
import time

import phalanx
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def say(name: str, value: float) -> None:
    """One line in one write: under torchrun all ranks write to the same stream."""
    print(f"{name} {value}\n", end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = [nn.Linear(args.width, args.width), nn.ReLU(), nn.Linear(args.width, args.width)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(args.batch, args.width)
    timed_from, began = max(1, args.steps // 5), 0.0
    for step in range(1, args.steps + 1):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1:
            say("first_step", time.time())
        if step == timed_from:
            began = time.perf_counter()
        if dist.get_rank() == 0:
            phalanx.report(step=step, loss=loss.item())
    if dist.get_rank() == 0 and args.steps > timed_from:
        say("steps_per_s", (args.steps - timed_from) / (time.perf_counter() - began))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
