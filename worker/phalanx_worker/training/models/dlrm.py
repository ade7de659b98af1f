"""A click predictor after DLRM (Naumov et al. 2019, arXiv:1906.00091): counts go through layers, words through tables,
and the products of all pairs of the vectors through layers again.

Owns the architecture and how each parameter starts. It knows nothing of ranks: the tables and what follows them are two
modules, as they are laid out differently.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from phalanx.recipes.recsys import RecsysModel
from torch import Tensor, nn

BLOCK = 65_536  # rows that one random state fills, so that any part of the tables can be filled alone
ROW_LIMIT = 0.05  # small, so that a rare word says little at first


class Tables(nn.Module):
    """(batch, tables) int64 words -> (batch, tables, dim). All tables lie one after another in one parameter, `tables`:
    (rows of all, dim); `lookup` may be replaced where a rank holds a part of the rows."""

    def __init__(self, shape: RecsysModel) -> None:
        super().__init__()
        self.sizes = shape.table_rows
        self.begins = (0, *accumulate(self.sizes[:-1]))
        self.lookup = whole_lookup
        self.tables = nn.Parameter(torch.empty(sum(self.sizes), shape.dim))

    def forward(self, words: Tensor) -> Tensor:
        sizes, begins = (torch.tensor(numbers, device=words.device) for numbers in (self.sizes, self.begins))
        return self.lookup(self.tables, words % sizes + begins)


def whole_lookup(tables: Tensor, rows: Tensor) -> Tensor:
    """(…,) rows -> (…, dim)."""
    return F.embedding(rows, tables)


class Dense(nn.Module):
    """(batch, counts) float32 and (batch, tables, dim) vectors -> (batch,) logits of a click."""

    def __init__(self, shape: RecsysModel) -> None:
        super().__init__()
        self.bottom = layers(shape.bottom_widths, last=nn.ReLU())
        self.top = layers(shape.top_widths, last=nn.Identity())

    def forward(self, counts: Tensor, vectors: Tensor) -> Tensor:
        own = self.bottom(counts)
        return self.top(torch.cat((own, products(own, vectors)), dim=1)).squeeze(1)


def layers(widths: tuple[int, ...], *, last: nn.Module) -> nn.Sequential:
    """Linear layers with ReLU between, and `last` at the end."""
    parts: list[nn.Module] = []
    for given, gives in pairwise(widths):
        parts += [nn.Linear(given, gives), nn.ReLU()]
    return nn.Sequential(*parts[:-1], last)


def products(own: Tensor, vectors: Tensor) -> Tensor:
    """The dot products of all pairs among `own` (batch, dim) and `vectors` (batch, tables, dim): (batch, pairs)."""
    every = torch.cat((own[:, None], vectors.to(own.dtype)), dim=1)
    first, second = torch.tril_indices(every.shape[1], every.shape[1], offset=-1, device=own.device)
    return torch.bmm(every, every.transpose(1, 2))[:, first, second]


@torch.no_grad()
def start_dense(dense: Dense, generator: torch.Generator) -> None:
    """First values of the layers, in their order: normal, as in the authors' own code."""
    for part in dense.modules():
        if isinstance(part, nn.Linear):
            gives, given = part.weight.shape
            part.weight.normal_(0.0, math.sqrt(2 / (gives + given)), generator=generator)
            part.bias.normal_(0.0, math.sqrt(1 / gives), generator=generator)


@torch.no_grad()
def start_rows(part: Tensor, *, first: int, seed: int) -> None:
    """First values of the rows from `first` on, (rows, dim): uniform within ± `ROW_LIMIT`. They depend on the row and
    the seed alone, not on which rank holds it."""
    end = first + len(part)
    for block in range(first // BLOCK, -(-end // BLOCK)):
        generator = torch.Generator(part.device).manual_seed((seed << 32) + block)
        values = torch.empty(BLOCK, part.shape[1], device=part.device)
        values.uniform_(-ROW_LIMIT, ROW_LIMIT, generator=generator)
        low, high = max(first, block * BLOCK), min(end, (block + 1) * BLOCK)
        part[low - first : high - first] = values[low - block * BLOCK : high - block * BLOCK]
