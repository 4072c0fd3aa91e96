"""The sub-blocks, one file each, and the table from pattern symbol to sub-block."""

from collections.abc import Callable

from colonnade.models.blocks.attention import Attention
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.mamba2 import Mamba2
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.blocks.mlp import MLP
from colonnade.models.config import ModelConfig

__all__ = ["BLOCKS", "MLP", "Attention", "Mamba2", "Mixture", "SubBlock"]

# symbol -> (config, std of the output projection, place in the row) -> sub-block
BLOCKS: dict[str, Callable[[ModelConfig, float, int], SubBlock]] = {
    "*": lambda config, std, index: Attention(config, std),
    "-": lambda config, std, index: MLP(config, std),
    "M": lambda config, std, index: Mamba2(config, std),
    "E": lambda config, std, index: Mixture(config, std, index),
}
