"""Parameters and FLOPs of a model, read off its modules on the meta device: nothing is built."""

from dataclasses import dataclass

import torch
from torch import nn

from colonnade.models.blocks import BLOCKS
from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder, Embedding
from colonnade.models.part import Part, Split


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
    places = [(w.block(t), w.start + t) for w in model.wirings() for t in range(len(w.late))]
    blocks = {block for block, _ in places}
    idle = sum(block.idle_weights() for block in blocks)
    ends = [model.embedding, model.head]
    head = config.vocab * config.hidden  # met once by the model, and once by each further token
    outside = total - sum(weights(module) for module in [*blocks, *ends])
    met = outside + (1 + config.mtp) * head
    met += sum(weights(block) - block.idle_weights() for block, _ in places)
    mixing = sum(block.mixing_flops(seq_len, index) for block, index in places)
    passes = 2 if config.has("T") else 1  # THOR's objective takes every token twice
    return Size(total, total - idle, 3 * passes * (2 * met + mixing))


def splits(config: ModelConfig) -> set[Split]:
    """Along what, and in how many pieces, ranks may share the parameters of a model."""
    row = set(config.symbols + (config.mtp_pattern if config.mtp else ""))
    with torch.device("meta"):
        made = [BLOCKS[symbol](config, 1.0) for symbol in sorted(row)]
        modules = [Embedding(config), *(m for block in made for m in block.modules())]
    specs = [spec for m in modules if isinstance(m, Part) for spec in m.specs.values()]
    return {spec.split for spec in specs if spec.split is not None}


def weights(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())
