"""The `lm` recipe's whole configuration: a transformer language model. Standard library only.

Owns the model's sizes and what they demand of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType

from phalanx.recipes.config import RecipeConfig
from phalanx.recipes.evaluate import Evaluate
from phalanx.recipes.parallel import Parallel, divisors
from phalanx.recipes.parse import RecipeError, demand, demand_sizes
from phalanx.recipes.precision import check_fp8


@dataclass(frozen=True)
class LmModel:
    """A decoder: `layers` blocks of grouped-query attention (`kv_heads` < `heads` shares keys and values; 0 means as
    many) and SwiGLU of width `hidden` (0: 8/3 of `width`, rounded up to a multiple of 32)."""

    vocabulary: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 0
    hidden: int = 0
    rotary_base: float = 10_000.0

    def __post_init__(self) -> None:
        demand_sizes(self, least=1, vocabulary=1 << 28, layers=4096, width=1 << 20, heads=1 << 20)
        demand_sizes(self, least=0, kv_heads=1 << 20, hidden=1 << 22)
        demand(
            self.width % (2 * self.heads) == 0,
            "width",
            self.width,
            f"does not give {self.heads} heads of an even size; use a multiple of {2 * self.heads}",
        )
        demand(
            self.heads % self.key_heads == 0,
            "kv_heads",
            self.kv_heads,
            f"does not divide heads = {self.heads}; use {divisors(self.heads)}",
        )

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def feed_width(self) -> int:
        """Inner width of the SwiGLU layers."""
        return self.hidden or -(-8 * self.width // 3 // 32) * 32

    @property
    def layer_sizes(self) -> dict[str, int]:
        """What the blocks' linear layers take and give, by field."""
        keys = self.width // self.heads * self.key_heads
        return {"model.width": self.width, "model.kv_heads × width / heads": keys, "model.hidden": self.feed_width}

    @property
    def parameters(self) -> int:
        """How many parameters the model has, embedding and output matrix counted apart."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.key_heads * head
        block = attention + 3 * self.width * self.feed_width + 2 * self.width
        return self.layers * block + 2 * self.vocabulary * self.width + self.width


@dataclass(frozen=True)
class LmConfig(RecipeConfig):
    """What `run: {recipe: lm, args: …}` holds. Nothing is held out unless `evaluate` says so."""

    FOUND = MappingProxyType({"held_out_loss": "lowest", "perplexity": "lowest"})

    model: LmModel = field(default_factory=LmModel)
    evaluate: Evaluate = field(default_factory=lambda: Evaluate(share=0.0))

    def check_model(self) -> None:
        check_sizes(self.model, self.parallel, self.data.seq_len)
        check_fp8(self.precision, self.model.layer_sizes, tensor=self.parallel.tensor)
        _check_evaluate(self.evaluate, self.parallel)


def _check_evaluate(evaluate: Evaluate, parallel: Parallel) -> None:
    if parallel.pipeline > 1 and evaluate.wanted:
        field = "evaluate.paths" if evaluate.paths else "evaluate.share"
        raise RecipeError(field, "asks for held-out data, which a pipeline is not tried on; leave it out")


def check_sizes(model: LmModel, parallel: Parallel, seq_len: int) -> None:
    """Whether the model can be cut as the layout says. Raises `RecipeError`."""
    tensor = parallel.tensor
    for name in ("heads", "key_heads", "feed_width", "vocabulary"):
        _divides(tensor, getattr(model, name), f"model.{_FIELDS.get(name, name)}")
    parts = tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if seq_len % parts:
        text = f"= {seq_len} is not a multiple of parallel.tensor × 2 · parallel.context = {parts}"
        raise RecipeError("data.seq_len", f"{text}; each of their ranks holds an equal part of every sequence")
    if model.layers < parallel.stages:
        text = f"= {model.layers} are fewer than the pipeline's {parallel.stages} stages"
        raise RecipeError("model.layers", f"{text}; use more layers, or a smaller parallel.pipeline")


_FIELDS = {"key_heads": "kv_heads", "feed_width": "hidden"}


def _divides(tensor: int, size: int, field: str) -> None:
    if size % tensor:
        text = f"= {tensor} does not divide {field} = {size}; use {divisors(size) if size < 512 else 'a divisor'}"
        raise RecipeError("parallel.tensor", text)
