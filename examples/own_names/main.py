"""A tree whose modules are called `server`, `worker` and `queue`: what it imports must be its own."""

import os
import queue

import torch
import torch.distributed as dist

import server
import worker


def main() -> None:
    assert (server.NAME, worker.NAME, queue.NAME) == ("the user's server", "the user's worker", "the user's queue")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    pushed = worker.work(server.Parameters(world_size), rank)
    buffer = queue.Queue(maxsize=1)
    buffer.put(pushed)
    total = torch.tensor(buffer.get())
    dist.all_reduce(total)
    print(f"rank {os.environ['RANK']}: total {total.item()}", flush=True)
    assert total.item() == sum(1.0 + r for r in range(world_size))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
