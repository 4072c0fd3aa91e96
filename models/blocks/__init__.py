"""The sub-blocks, one file each, and the table from pattern symbol to sub-block."""

from collections.abc import Callable

from colonnade.models.blocks.attention import Attention
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.delta import DeltaNet
from colonnade.models.blocks.latent import LatentAttention
from colonnade.models.blocks.mamba1 import Mamba1
from colonnade.models.blocks.mamba2 import Mamba2
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.blocks.mlp import MLP
from colonnade.models.blocks.thor import Thor
from colonnade.models.config import ModelConfig

__all__ = ["BLOCKS", "SubBlock"]


def attention(config: ModelConfig, out_std: float) -> SubBlock:
    """Grouped queries or latent attention, as configured."""
    kind = LatentAttention if config.attention == "mla" else Attention
    return kind(config, out_std)


# symbol -> (config, std of the output projection) -> sub-block
BLOCKS: dict[str, Callable[[ModelConfig, float], SubBlock]] = {
    "*": attention,
    "M": Mamba2,
    "m": Mamba1,
    "D": lambda config, std: DeltaNet(config, std, gated=False),
    "G": lambda config, std: DeltaNet(config, std, gated=True),
    "-": MLP,
    "E": Mixture,
    "T": Thor,
}
