"""Parameters and FLOPs of a model, read off its modules on the meta device: nothing is built."""

from dataclasses import dataclass

import torch

from colonnade.models.blocks import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder


@dataclass(frozen=True)
class Size:
    """How large a model is, and what a token costs."""

    parameters: int  # all
    active: int  # those that one token meets, with a tied embedding counted once
    flops_per_token: int  # forward and backward, without recomputation


def measure(config: ModelConfig, seq_len: int) -> Size:
    """Count parameters and training FLOPs per token at this sequence length.

    2 FLOPs per weight that a token meets in a product, forward, and twice that backward (Kaplan et
    al. 2020, arXiv:2001.08361, section 2.1); an embedding lookup costs none, causal attention half
    of its square.
    """
    with torch.device("meta"):
        model = Decoder(config)
    total = sum(p.numel() for p in model.parameters())
    blocks = [b for b in model.wiring.blocks if isinstance(b, SubBlock)]
    idle = sum(b.idle_weights() for b in blocks)
    table = config.vocab * config.hidden
    met = total - idle - (0 if config.tied else table)  # a tied table is the head's
    mixing = sum(b.mixing_flops(seq_len) for b in blocks)
    return Size(total, total - idle, 3 * (2 * met + mixing))
