"""Activation checkpointing: what a block computed is forgotten after forward and computed again for backward (Chen et
al. 2016, arXiv:1604.06174); `selective` keeps the costly results (matrix products and attention) and recomputes the
cheap ones between them (Korthikanti et al. 2022, arXiv:2205.05198, section 5)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from phalanx.recipes.parallel import Recompute
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
COSTLY = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._efficient_attention_forward.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def recompute_blocks(blocks: Iterable[nn.Module], how: Recompute) -> None:
    """Run the blocks' forward under activation checkpointing. Parameter names stay as they are."""
    if how == "none":
        return
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_costly)}
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, **(selective if how == "selective" else {})
        )


def _keep_costly(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
