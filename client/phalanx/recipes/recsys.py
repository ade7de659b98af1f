"""The `recsys` recipe's whole configuration: click prediction after DLRM (Naumov et al. 2019, arXiv:1906.00091).
Standard library only.

Owns the model's sizes and which layouts it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise
from types import MappingProxyType

from phalanx.recipes.config import RecipeConfig
from phalanx.recipes.optim import Optim
from phalanx.recipes.parallel import Parallel
from phalanx.recipes.parse import RecipeError, demand, demand_sizes
from phalanx.recipes.precision import refuse_fp8

COUNTS, TABLES = 13, 26  # of a line in Criteo's format: numbers, and words
SWITCHES = {"data", "compress", "powersgd_rank", "bucket_bytes"}  # of `parallel` that mean something here


@dataclass(frozen=True)
class RecsysModel:
    """A table of vectors of size `dim` for each of the 26 categories: all of `rows` rows, or a list of 26 sizes; a word
    takes the row of its remainder. `bottom` and `top` are the inner widths of the two stacks of layers."""

    rows: int | tuple[int, ...] = 100_000
    dim: int = 16
    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 256)

    def __post_init__(self) -> None:
        demand_sizes(self, least=1, dim=1 << 20)
        sizes = self.table_rows
        good = len(sizes) == TABLES and min(sizes) >= 1
        demand(good, "rows", self.rows, f"is not a positive number or a list of {TABLES}; use 100000")
        demand(max(sizes) <= 1 << 36, "rows", self.rows, f"is too large; use {1 << 36} or less per table")
        for name in ("bottom", "top"):
            widths = getattr(self, name)
            demand(all(width >= 1 for width in widths), name, widths, "has a width below 1; use 1 or more")
            few = len(widths) <= 64 and max(widths, default=1) <= 1 << 20
            demand(few, name, widths, f"is too large; use at most 64 layers of at most {1 << 20}")

    @property
    def table_rows(self) -> tuple[int, ...]:
        """Rows of each table."""
        return (self.rows,) * TABLES if isinstance(self.rows, int) else self.rows

    @property
    def bottom_widths(self) -> tuple[int, ...]:
        """From the counts to a vector."""
        return (COUNTS, *self.bottom, self.dim)

    @property
    def top_widths(self) -> tuple[int, ...]:
        """From the products of all pairs of vectors, beside the counts' own, to one logit."""
        vectors = TABLES + 1
        return (self.dim + vectors * (vectors - 1) // 2, *self.top, 1)

    @property
    def table_parameters(self) -> int:
        """Of all tables together: these are sharded."""
        return sum(self.table_rows) * self.dim

    @property
    def dense_parameters(self) -> int:
        """Of the two stacks: every rank has them all."""
        return sum((given + 1) * gives for w in (self.bottom_widths, self.top_widths) for given, gives in pairwise(w))


@dataclass(frozen=True)
class RecsysConfig(RecipeConfig):
    """What `run: {recipe: recsys, args: …}` holds. The layers are replicated and the rows of all tables shared out
    evenly, over all ranks."""

    FOUND = MappingProxyType({"held_out_loss": "lowest", "normalized_entropy": "lowest", "auc": "highest"})

    model: RecsysModel = field(default_factory=RecsysModel)
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, weight_decay=0.0))

    def check_model(self) -> None:
        if self.data.format != "criteo":
            raise RecipeError("data.format", f"= {self.data.format!r} is no click log; use criteo")
        _check_switches(self.parallel)
        refuse_fp8(self.precision, "is for the blocks of transformers, and these layers are small")


def _check_switches(parallel: Parallel) -> None:
    usual = Parallel()
    for name in sorted({switch.name for switch in fields(parallel)} - SWITCHES):
        if getattr(parallel, name) != getattr(usual, name):
            text = "does nothing for recsys: its tables are sharded over all ranks anyway; leave it out"
            raise RecipeError(f"parallel.{name}", text)
