"""Context parallelism: each rank holds a part of every sequence, and sees the keys and values of all of it by gathering
them, layer by layer (Llama Team 2024, arXiv:2407.21783, section 3.3.2).

torch's own `context_parallel` is a prototype for CUDA alone; this runs wherever collectives do. A rank takes one chunk
from the front half and its mirror from the back half: under a causal mask all have then equally much to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from phalanx_worker.training.models.transformer import Attention, WholeSequence


class PartOfSequence(WholeSequence):
    """This rank's part among those of the group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's part of (batch, length), in order; the length has to be a multiple of twice the group's size."""
        return tokens[:, self.positions(tokens.shape[1] // self._group.size(), tokens.device)]

    def positions(self, length: int, device: torch.device) -> Tensor:
        return _places(self._group.rank(), self._group.size(), length, device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = self._whole(key), self._whole(value)
        return torch.cat([_end_of(chunk, key, value) for chunk in self._chunks(query)], dim=2)

    def _chunks(self, query: Tensor) -> list[tuple[Tensor, int]]:
        """Each with where it ends in the sequence."""
        ranks, rank = self._group.size(), self._group.rank()
        front, mirror = query.chunk(2, dim=2)
        return [(front, (rank + 1) * front.shape[2]), (mirror, (2 * ranks - rank) * mirror.shape[2])]

    def _whole(self, part: Tensor) -> Tensor:
        """Everyone's part of (batch, heads, length, size), in the order of the sequence."""
        gathered = all_gather_tensor_autograd(part.contiguous(), 2, self._group)
        chunks = gathered.chunk(2 * self._group.size(), dim=2)
        return torch.cat((*chunks[::2], *chunks[:0:-2]), dim=2)


def _end_of(chunk: tuple[Tensor, int], key: Tensor, value: Tensor) -> Tensor:
    """What a chunk of queries makes of all that is not behind it: without a mask where the GPU has a kernel for that,
    as most have in bf16 and fp16."""
    query, end = chunk
    causal = _causal(query.shape[2], end)
    key, value = key[:, :, :end], value[:, :, :end]
    grouped = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=causal, enable_gqa=grouped)


@cache
def _causal(queries: int, keys: int) -> CausalBias:
    """Of the last queries over all keys: two numbers in the guise of a tensor. torch (2.13) can make none while
    something looks on at its operations, such as selective recomputation."""
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def use_parts(modules: Iterable[nn.Module], part: PartOfSequence) -> None:
    """Let every attention among the modules' own see the whole sequence from this part of it."""
    for module in modules:
        for inner in module.modules():
            if isinstance(inner, Attention):
                inner.sequence = part


def _places(rank: int, ranks: int, length: int, device: torch.device) -> Tensor:
    """Where the `length` tokens of a rank stand in the whole sequence: chunk `rank` of 2 · `ranks`, then its mirror."""
    half = length // 2
    own = torch.arange(half, device=device)
    return torch.cat((own + rank * half, own + (2 * ranks - 1 - rank) * half))
