"""Small models of every kind, in fp64 with random weights, and token batches for them."""

from typing import Any

import torch
from oracle import empty, randomise
from torch import Tensor

from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder

S, B, V = 23, 2, 31


def config_of(pattern: str, **fields: Any) -> ModelConfig:
    """Returns a config with odd widths, chunks that do not divide S, and no balancing losses."""
    small = dict(
        vocab=V, hidden=12, heads=4, head_dim=6, ffn=11, balance=0.0,
        mamba_heads=4, mamba_head_dim=3, mamba_state=5, mamba_groups=2, mamba_chunk=8,
        mamba1_inner=10, mamba1_rank=3, mamba1_state=4, mamba1_chunk=8,
        s4d_inner=10, s4d_state=3, s4d_chunk=8,
        delta_heads=4, delta_key_heads=2, delta_key_dim=3, delta_value_dim=5, delta_chunk=8,
        experts=5, top_k=2, expert_ffn=7,
    )  # fmt: skip
    return ModelConfig.model_validate({"pattern": pattern, **small, **fields})


def model_of(config: ModelConfig, seed: int) -> Decoder:
    """Builds a model with random weights, and with zeros in the buffers."""
    model = empty(config)
    randomise(model, seed)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and labels, `[S, B]`, some labels without loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def context(**fields: Any) -> Context:
    """Returns the context in which each row is one document."""
    return Context(torch.arange(S)[:, None].expand(S, B), **fields)
