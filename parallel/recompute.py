"""Activation recomputation: what a checkpointed region keeps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from colonnade.kernels.linear import ONEDNN_LINEAR

aten = torch.ops.aten
# Costly to compute again, and no larger than a sub-block's input or its inner width. Batched
# products are not: they stand inside kernels, which choose themselves what they keep.
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._grouped_mm.default,
}
if ONEDNN_LINEAR is not None:
    KEPT.add(ONEDNN_LINEAR.default)


# What another rank has sent is never asked for twice. (`enter` and `leave` stand outside anyway.)
SENT = {torch.ops._c10d_functional.all_reduce.default}


def keep_sent(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what collectives within a sub-block brought; compute the rest again."""
    return CheckpointPolicy.MUST_SAVE if operator in SENT else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep results of matrix products and attention as well."""
    kept = operator in KEPT or operator in SENT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_policy(name: str, ranks: int = 1) -> Callable[[], tuple[Any, Any]] | None:
    """`none` keeps everything, `block` only inputs of sub-blocks, `selective` products as well.

    Where so many `ranks` share a sub-block, what they send each other within it is kept, too.
    """
    if name == "none":
        return None
    if name == "block" and ranks == 1:
        return noop_context_fn
    policy = keep_sent if name == "block" else keep_products
    return partial(create_selective_checkpoint_contexts, policy)
