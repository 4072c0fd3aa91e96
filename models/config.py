"""The `[model]` table: every choice that decides which function is trained."""

from typing import Literal

from pydantic import BaseModel, Field

SYMBOLS = {"*": "attention", "-": "MLP", "M": "Mamba-2", "E": "mixture of experts"}


class ModelConfig(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """A decoder: a row of residual sub-blocks given by `pattern`, one symbol each.

    Symbols: `*` softmax attention, `-` MLP, `M` Mamba-2, `E` mixture of experts.
    """

    pattern: str = Field("*-", min_length=1, description="one symbol per residual sub-block")
    repeat: int = Field(1, ge=1, description="how many times the pattern stands in a row")
    residual: Literal["standard", "ladder"] = "standard"
    hidden: int = Field(256, ge=1, description="width D of the residual stream")
    vocab: int = Field(257, ge=2, description="rows of the embedding and of the head")
    tied: bool = Field(False, description="the head uses the embedding's weights")
    norm_eps: float = Field(1e-5, gt=0)
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")

    # attention
    heads: int = Field(4, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="default: heads")
    head_dim: int | None = Field(None, ge=1, description="default: hidden / heads")
    positions: Literal["rope", "none"] = "rope"
    rope_theta: float = Field(10000.0, gt=0)

    # MLP and experts
    ffn: int = Field(704, ge=1, description="inner width of an MLP")
    activation: Literal["swiglu", "gelu", "relu2"] = "swiglu"

    # Mamba-2
    mamba_heads: int | None = Field(None, ge=1, description="default: 2 * hidden / mamba_head_dim")
    mamba_head_dim: int = Field(64, ge=1, description="head width P")
    mamba_state: int = Field(128, ge=1, description="state width N")
    mamba_groups: int = Field(1, ge=1, description="groups G that share B and C")
    mamba_conv: int = Field(4, ge=1, description="width of the causal convolution")
    mamba_chunk: int = Field(128, ge=1, description="tokens per chunk of the scan")

    # mixture of experts
    experts: int = Field(8, ge=1)
    top_k: int = Field(2, ge=1, description="experts per token")
    expert_ffn: int | None = Field(None, ge=1, description="inner width of an expert; default: ffn")
    balance: float = Field(0.01, ge=0, description="weight of the load-balancing loss")
    router_z: float = Field(0.0, ge=0, description="weight of the router's z-loss")
    balance_samples: int = Field(1, ge=1, description="consecutive samples per balance group")

    @property
    def symbols(self) -> str:
        """The whole row of sub-blocks."""
        return self.pattern * self.repeat

    def has(self, *symbols: str) -> bool:
        """Whether any of these symbols stands in the pattern."""
        return any(s in self.pattern for s in symbols)
