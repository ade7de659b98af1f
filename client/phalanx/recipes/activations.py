"""What a forward pass keeps for its backward, in bytes, by the operations of each recipe's model. Pure arithmetic;
standard library only.

The method is that of Korthikanti et al. 2022, arXiv:2205.05198, section 4 (what each operation of a layer stores, and
what of it tensor and sequence parallelism divide), for the models here and the way torch 2.13 computes them. Owns the
counts; temporary tensors within an operation are not in them.
"""

from __future__ import annotations

from dataclasses import dataclass

from phalanx.recipes.lm import LmModel
from phalanx.recipes.recsys import TABLES, RecsysModel
from phalanx.recipes.vision import Picture, Resnet, Vit
from phalanx.recipes.weights import RESNET_SMALL, ResidualBlock, residual_blocks, stem

INT64 = STATS = 8  # bytes of an index, and of the two numbers that a layer norm keeps per row
FP32 = 4


@dataclass(frozen=True)
class Widths:
    """Bytes of a number: `stream` in the residual stream, `product` in and out of matrix products. Where autocast makes
    the one of the other, each product has a copy of its own (`copies`). GPUs have a kernel for RMSNorm that keeps its
    input alone (`fused_norms`); elsewhere it keeps that and an intermediate result, both in fp32. Most have
    one for attention from the end of a sequence to all of it, too, which elsewhere takes a mask (`masks`), as on all of
    them do shared keys in fp32."""

    stream: int
    product: int
    copies: bool
    fused_norms: bool
    masks: bool

    @property
    def rms_norm(self) -> int:
        """Bytes that an RMSNorm keeps per number."""
        return self.stream if self.fused_norms else 2 * FP32

    def inputs(self, products: int) -> int:
        """Bytes of a number that goes into so many products."""
        return self.product * (products if self.copies else 1)


@dataclass(frozen=True)
class Sequences:
    """What one microbatch is on a rank: `count` sequences of `length` tokens here, `whole` over all ranks of its
    context group; cut over `tensor` ranks."""

    count: int
    length: int
    whole: int
    tensor: int

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True)
class Kept:
    """Bytes per microbatch: of the input of a block, of what a block keeps (with that input), and of the costly results
    in it; and beside the blocks, at the model's beginning and end."""

    block_input: int
    block: int
    costly: int
    first: int
    last: int
    logits: int = 0  # one set of logits, in fp32

    def blocks(self, number: int, recompute: str) -> int:
        """Of so many blocks in a row, while they wait for backward."""
        each = {"none": self.block, "selective": self.block_input + self.costly, "full": self.block_input}
        return number * each[recompute]

    def again(self, recompute: str) -> int:
        """What comes to it while one of them is computed again."""
        cheap = max(0, self.block - self.block_input - self.costly)
        return {"none": 0, "selective": cheap, "full": self.block - self.block_input}[recompute]


def lm(model: LmModel, part: Sequences, widths: Widths) -> Kept:
    """Per token: the block's input, as its norm keeps it; the norm's result, whole on every tensor-parallel
    rank; queries, keys, values and the mixed values twice, in the ranks' heads; the same for SwiGLU and its four inner
    results."""
    tensor, tokens = part.tensor, part.tokens
    stream, product = widths.stream * model.width, widths.product * model.width
    size = model.width // model.heads
    keys = widths.product * model.key_heads * size * (1 if part.length == part.whole else part.whole // part.length)
    feed = widths.product * model.feed_width
    norm = (widths.rms_norm * model.width + FP32) / tensor
    attention = model.width * widths.inputs(3) + (3 * product + 2 * keys + FP32 * model.heads) / tensor
    swiglu = model.width * widths.inputs(2) + 4 * feed / tensor
    turn = FP32 * size * part.length  # of all sequences
    chunk = part.length / 2  # of a context rank's two, which see the whole and a chunk between them
    no_kernel = widths.masks or (widths.product == FP32 and model.key_heads != model.heads)
    masked = chunk * (part.whole + chunk) if part.length != part.whole and no_kernel else 0
    costly = (2 * product + 2 * widths.product * model.key_heads * size + FP32 * model.heads + 2 * feed) / tensor
    return Kept(
        block_input=round(tokens * stream / tensor),
        block=round(tokens * (2 * norm + attention + swiglu)) + turn + round(widths.product * masked),
        costly=round(tokens * (costly + 2 * product)),
        first=INT64 * tokens,
        last=round(tokens * (norm + product + INT64)),
        logits=FP32 * tokens * model.vocabulary,
    )


def vit(model: Vit, picture: Picture, classes: int, *, pictures: int, tensor: int, widths: Widths) -> Kept:
    """Likewise; a layer norm keeps its input and two numbers, and GELU its input and result."""
    tokens = pictures * model.patches(picture)
    stream, product, feed = widths.stream * model.width, widths.product * model.width, widths.product * model.feed_width
    norm = (stream + STATS) / tensor
    attention = model.width * widths.inputs(3) + (4 * product + FP32 * model.heads) / tensor
    costly = (4 * product + FP32 * model.heads + feed) / tensor + 2 * product
    return Kept(
        block_input=round(tokens * stream / tensor),
        block=round(tokens * (2 * norm + attention + product + 2 * feed / tensor)),
        costly=round(tokens * costly),
        first=round(tokens * widths.product * picture.channels * model.patch**2 / tensor),
        last=round(tokens * norm) + pictures * product,
        logits=FP32 * pictures * classes,
    )


def resnet(
    model: Resnet, picture: Picture, classes: int, *, pictures: int, widths: Widths
) -> tuple[tuple[Kept, int], ...]:
    """For each kind of block, and how many there are; then the entrance, and at last the end."""
    entrance = stem(model, picture)
    blocks = residual_blocks(model, picture)
    kept = [(_residual(block, pictures * widths.product), block.times) for block in blocks]
    pixels = picture.channels * picture.size**2
    pooled = 0 if picture.size <= RESNET_SMALL else entrance.outputs // 4 * INT64
    first = pictures * (widths.product * (pixels + 2 * entrance.outputs) + pooled)
    last = pictures * widths.product * blocks[-1].convolutions[-1].gives
    end = Kept(0, 0, 0, first=0, last=last, logits=FP32 * pictures * classes)
    return (*kept, (Kept(0, 0, 0, first=first, last=0), 1), (end, 1))


def _residual(block: ResidualBlock, width: int) -> Kept:
    """Every convolution keeps its input and every norm the convolution's result. A block's input is its
    predecessor's result: it counts where it is made, that is here the result."""
    results = sum(convolution.outputs for convolution in block.convolutions)
    inner = sum(convolution.outputs for convolution in block.convolutions[:-1])
    short = block.short.outputs if block.short else 0
    gives = block.convolutions[-1].outputs
    return Kept(block_input=width * gives, block=width * (results + inner + short + gives), costly=0, first=0, last=0)


def recsys(model: RecsysModel, *, samples: int, widths: Widths) -> int:
    """Bytes: the inputs, the results of every layer (that of the last has no ReLU), all vectors side by side, and where
    each of them was found; which pairs of vectors there are; and, the most of it, the gradient of all products of
    pairs as it comes and as it is put in place."""
    layers = sum(model.bottom_widths) + sum(model.top_widths)
    vectors = TABLES + 1
    products = 2 * widths.product * vectors**2
    pairs = vectors * (vectors - 1) // 2
    kept = widths.product * (layers + vectors * model.dim) + 2 * INT64 * TABLES + FP32
    return samples * (kept + products) + 2 * INT64 * pairs
