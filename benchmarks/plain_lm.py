"""The training of the `lm` recipe as one would write it without Phalanx: the same transformer, first values, data,
loss, clipping and AdamW, replicated by plain DistributedDataParallel. Run by torchrun:

    torchrun --nproc-per-node 2 plain_lm.py STAMPS JSON

JSON is the recipe's configuration, of which it uses what `lm_steps.py` gives.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from phalanx.recipes.lm import LmModel
from phalanx_worker.training.models.transformer import Transformer, start
from stamps import Stamps
from torch.nn.parallel import DistributedDataParallel


def make_model(shape: LmModel, seed: int) -> Transformer:
    """With the recipe's first values, which follow from the seed and each parameter's name."""
    model = Transformer(shape, layers=range(shape.layers))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
            start(name, parameter, torch.Generator().manual_seed(int.from_bytes(digest)), layers=shape.layers)
    return model


def make_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def batches(path: str, *, batch: int, seq_len: int) -> Iterator[torch.Tensor]:
    """This rank's windows of a file of 16-bit tokens, one after the other."""
    tokens = np.memmap(path, dtype="<u2", mode="r")
    each, first = batch // dist.get_world_size(), batch // dist.get_world_size() * dist.get_rank()
    while True:
        starts = [seq_len * place for place in range(first, first + each)]
        yield torch.from_numpy(np.stack([tokens[at : at + seq_len + 1] for at in starts]).astype(np.int64))
        first += batch


def main(directory: str, config: dict[str, Any]) -> None:
    dist.init_process_group("gloo")
    stamps, train = Stamps(directory), config["train"]
    model = DistributedDataParallel(make_model(LmModel(**config["model"]), train["seed"]))
    optimizer = make_optimizer(model, config["optim"]["lr"])
    data = batches(config["data"]["paths"][0], batch=train["global_batch"], seq_len=config["data"]["seq_len"])
    for step in range(1, train["steps"] + 1):
        tokens = next(data)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        stamps.stamp(step, loss.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    os._exit(0)  # with torch 2.13 a rank now and then aborts in the interpreter's finalization
