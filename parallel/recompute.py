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
from colonnade.parallel.context.attention import ATTENTION
from colonnade.parallel.context.halo import HANDED_ON

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


c10d = torch.ops._c10d_functional
# What another rank has sent is never asked for twice.
SENT = {c10d.all_reduce.default, c10d.all_to_all_single.default, ATTENTION, HANDED_ON}


def sent(operator: Any, args: tuple[Any, ...], between: str | None) -> bool:
    """Whether an operator brings what other ranks of a sub-block sent.

    `enter` stands between the halves of another sub-block, and is not repeated with them: what is
    gathered over its group, `between`, is none of theirs.
    """
    if operator is c10d.all_gather_into_tensor.default:
        return args[-1] != between
    return operator in SENT


def recompute_policy(
    name: str, ranks: int = 1, between: str | None = None
) -> Callable[[], tuple[Any, Any]] | None:
    """`none` keeps everything, `block` only inputs of sub-blocks, `selective` products as well.

    Where so many `ranks` share a sub-block, what they send each other within it is kept, too;
    `between` is the group over which inputs of sub-blocks are gathered, if any.
    """
    if name == "none":
        return None
    if name == "block" and ranks == 1:
        return noop_context_fn
    products = KEPT if name == "selective" else set()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator in products or sent(operator, args, between)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)
