"""The `[model]` table: every choice that decides which function is trained."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

SYMBOLS = {
    "*": "attention",
    "M": "Mamba-2",
    "m": "Mamba-1",
    "D": "DeltaNet",
    "G": "gated DeltaNet",
    "-": "MLP",
    "E": "mixture of experts",
    "T": "THOR experts",
}
LONGEST_ROW = 16384  # sub-blocks
# Bounds far beyond what is trained: larger is a slip, and would be met as a hang or an overflow.
Count = Annotated[int, Field(le=2**20)]  # widths, heads, experts, taps
Length = Annotated[int, Field(le=2**31 - 1)]  # tokens
CHANNEL_MIXERS = "-ET"  # sub-blocks that look at one token at a time


class Options(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """Fields of the `[model]` table that belong together."""


class StreamOptions(Options):
    """What stands on the residual stream and at its ends, whatever the sub-blocks."""

    pattern: str = Field(
        "*-", min_length=1, max_length=4096, description="one symbol per residual sub-block"
    )
    repeat: int = Field(1, ge=1, le=4096, description="how many times the pattern stands in a row")
    share: bool = Field(
        False, description="every repeat uses the same sub-blocks, with norms of its own (WideNet)"
    )
    residual: Literal["standard", "ladder", "parallel"] = Field(
        "standard",
        description="ladder: each sub-block reads the stream without the newest output "
        "(arXiv:2501.06589); parallel: a channel mixer reads what the mixer before it reads",
    )
    ladder_last: Count | None = Field(
        None, ge=0, description="ladder over the last n sub-blocks of a row only; default: all"
    )
    hidden: Count = Field(256, ge=1, description="width D of the residual stream")
    vocab: int = Field(257, ge=2, le=2**26, description="rows of the embedding and of the head")
    tied: bool = Field(False, description="the head uses the embedding's weights")
    norm: Literal["rms", "rms_offset", "layer", "pre_rms", "crms"] = Field(
        "rms", description="rms_offset: weights stored minus 1; pre_rms, crms: a centred stream"
    )
    norm_bias: bool = Field(False, description="layer and pre_rms: the norms add a bias")
    norm_position: Literal["before", "after", "both"] = Field(
        "before", description="of each sub-block: at its input, at its output, or at both"
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the mean square in norms")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    sigma_reparam: bool = Field(False, description="linear weights as γ W / σ(W)")
    logit_cap: float | None = Field(None, gt=0, description="logits as cap · tanh(logits / cap)")
    logit_z: float = Field(0.0, ge=0, description="weight of the z-loss on logits")
    mtp: Count = Field(0, ge=0, description="further tokens predicted, each by a module of its own")
    mtp_pattern: str = Field(
        "*-", min_length=1, max_length=4096, description="sub-blocks of such a module"
    )
    mtp_weight: float = Field(0.3, ge=0, description="weight of the mean of their losses")
    mup_base: dict[str, Count] | None = Field(
        None, description="fields of the base model whose hyper-parameters are transferred (muP)"
    )
    mup_zero_init: bool = Field(False, description="muP: queries and an untied head start at 0")


class AttentionOptions(Options):
    """`*`."""

    attention: Literal["gqa", "mla"] = Field("gqa", description="grouped queries, or latent")
    heads: Count = Field(4, ge=1, description="query heads")
    kv_heads: Count | None = Field(None, ge=1, description="gqa; default: heads")
    head_dim: Count | None = Field(None, ge=1, description="default: hidden / heads")
    q_rank: Count | None = Field(
        None, ge=1, description="mla: latent of the queries; default: none"
    )
    kv_rank: Count = Field(128, ge=1, description="mla: latent of keys and values")
    rope_dim: Count = Field(32, ge=2, description="mla: channels with positions, beside head_dim")
    value_dim: Count | None = Field(
        None, ge=1, description="mla: width of values; default: head_dim"
    )
    latent_norm_eps: float | None = Field(
        None, gt=0, description="mla: norm_eps of the latents' norms; default: norm_eps"
    )
    positions: Literal["rope", "none"] = Field("rope", description="rotary positions, or none")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="gqa: share of channels rotated")
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = Field(
        "none", description="how positions are stretched beyond the trained length"
    )
    rope_factor: float = Field(1.0, ge=1, description="how much longer than trained")
    rope_original: Length = Field(4096, ge=1, description="yarn, llama3: positions trained on")
    rope_low: float = Field(1.0, gt=0, description="llama3: low_freq_factor")
    rope_high: float = Field(4.0, gt=0, description="llama3: high_freq_factor")
    rope_fast: float = Field(32.0, gt=0, description="yarn: beta_fast")
    rope_slow: float = Field(1.0, gt=0, description="yarn: beta_slow")
    rope_mscale: float = Field(0.0, ge=0, description="yarn: mscale; 0: none")
    rope_mscale_all: float = Field(0.0, ge=0, description="yarn: mscale_all_dim; 0: none")
    rope_attention_factor: float | None = Field(
        None, gt=0, description="yarn: factor of cos and sin; default: 0.1 ln(factor) + 1"
    )
    rope_truncate: bool = Field(True, description="yarn: whole channels in the ramp's ends")
    qk_norm: Literal["none", "head", "full"] = Field(
        "none", description="norm queries and keys in each head, or over all of them"
    )
    window: Length | None = Field(None, ge=1, description="keys a query sees, its own included")
    full_attention: Annotated[tuple[int, ...], Field(strict=False)] = Field(
        (), description="which attentions of the row, counted from 0, have no window"
    )
    sinks: bool = Field(False, description="a learned logit per head that takes weight, no value")
    attention_gate: Literal["none", "head", "channel"] = Field(
        "none", description="sigmoid gate per head on its input slice, or per channel"
    )
    attention_cap: float | None = Field(None, gt=0, description="scores as cap · tanh(score / cap)")
    clip_low: float = Field(0.0, le=0, description="clipped softmax: γ, for instance −α / length")
    clip_high: float = Field(1.0, ge=1, description="clipped softmax: ζ")
    position_temperature: bool = Field(
        False, description="scores grow with the query's position, at a rate learned per head"
    )
    attention_conv: Count = Field(0, ge=0, description="taps of convolutions on q, k, v; 0: none")


class MLPOptions(Options):
    """`-`, and the inside of experts."""

    ffn: Count = Field(704, ge=1, description="inner width of an MLP")
    activation: Literal[
        "swiglu", "geglu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "polyrelu", "polynorm"
    ] = Field("swiglu", description="swiglu and geglu have a gate; polyrelu, polynorm: PolyCom")


class MambaOptions(Options):
    """`M` Mamba-2 and `m` Mamba-1."""

    mamba_heads: Count | None = Field(
        None, ge=1, description="default: 2 * hidden / mamba_head_dim"
    )
    mamba_head_dim: Count = Field(64, ge=1, description="head width P")
    mamba_state: Count = Field(128, ge=1, description="state width N")
    mamba_groups: Count = Field(1, ge=1, description="groups G that share B and C")
    mamba_conv: Count = Field(4, ge=1, description="width of the causal convolution")
    mamba_chunk: Length = Field(128, ge=1, description="tokens per chunk of the scan")
    mamba1_inner: Count | None = Field(None, ge=1, description="channels; default: 2 * hidden")
    mamba1_state: Count = Field(16, ge=1, description="state width N")
    mamba1_rank: Count | None = Field(None, ge=1, description="rank of dt; default: hidden / 16")
    mamba1_conv: Count = Field(4, ge=1, description="width of the causal convolution")
    mamba1_chunk: Length = Field(64, ge=1, description="tokens per chunk of the scan")


class DeltaOptions(Options):
    """`D` DeltaNet and `G` gated DeltaNet."""

    delta_heads: Count | None = Field(None, ge=1, description="default: hidden / delta_key_dim")
    delta_key_heads: Count | None = Field(None, ge=1, description="default: delta_heads")
    delta_key_dim: Count = Field(64, ge=1, description="width of a query and a key")
    delta_value_dim: Count | None = Field(None, ge=1, description="default: delta_key_dim")
    delta_conv: Count = Field(4, ge=1, description="width of the causal convolution")
    delta_chunk: Length = Field(64, ge=1, description="tokens per chunk")
    delta_negative: bool = Field(False, description="beta up to 2: negative eigenvalues")


class ExpertOptions(Options):
    """`E` mixture of experts and `T` THOR."""

    experts: Count = Field(8, ge=1, description="experts of each sub-block")
    top_k: Count = Field(2, ge=1, description="experts per token")
    expert_ffn: Count | None = Field(
        None, ge=1, description="inner width of an expert; default: ffn"
    )
    shared_ffn: Count = Field(0, ge=0, description="width of an expert every token meets; 0: none")
    shared_gate: bool = Field(False, description="a sigmoid gate on the shared expert")
    router_score: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="of a token over all experts, or of each expert by itself"
    )
    router_normalise: bool = Field(True, description="a token's weights sum to 1")
    router_scale: float = Field(1.0, gt=0, description="factor of the weights")
    router_groups: Count = Field(1, ge=1, description="groups of experts")
    router_top_groups: Count | None = Field(
        None, ge=1, description="groups a token may choose from"
    )
    router_bias: bool = Field(
        False, description="a bias steers choices; set balance to 0 to do without the loss"
    )
    router_bias_rate: float = Field(1e-3, ge=0, description="its change per step")
    router_noise: float = Field(0.0, ge=0, description="standard deviation of noise in training")
    capacity: float | None = Field(
        None, gt=0, description="rows of an expert over its fair share; default: no limit"
    )
    balance: float = Field(0.01, ge=0, description="weight of the load-balancing loss")
    balance_sequence: float = Field(0.0, ge=0, description="the same, for each sample alone")
    balance_samples: Count = Field(1, ge=1, description="consecutive samples per balance group")
    router_z: float = Field(0.0, ge=0, description="weight of the router's z-loss")
    thor_alpha: float = Field(1.0, ge=0, description="weight of the consistency loss")


class ModelConfig(  # pydantic takes the fields of the last one first
    ExpertOptions, DeltaOptions, MambaOptions, MLPOptions, AttentionOptions, StreamOptions
):
    """A decoder: a row of residual sub-blocks given by `pattern`, one symbol of `SYMBOLS` each."""

    @property
    def symbols(self) -> str:
        """The whole row of sub-blocks."""
        return self.pattern * self.repeat

    def has(self, *symbols: str) -> bool:
        """Whether any of these symbols stands in the model."""
        row = self.pattern + (self.mtp_pattern if self.mtp else "")
        return any(s in row for s in symbols)

    def window_of(self, index: int) -> int | None:
        """The window of the attention that stands at `index` of the row; None: it sees all."""
        before = self.symbols[:index].count("*")
        return None if before in self.full_attention else self.window

    @property
    def zero_init(self) -> bool:
        """Whether queries and an untied head start at zero."""
        return self.mup_base is not None and self.mup_zero_init

    def base(self) -> "ModelConfig | None":
        """The model whose hyper-parameters muP transfers; None without muP."""
        if self.mup_base is None:
            return None
        return self.model_copy(update={**self.mup_base, "mup_base": None})

    @property
    def score_width(self) -> int:
        """Channels of a query that meet those of a key."""
        width = self.head_dim or self.hidden // self.heads
        return width + self.rope_dim if self.attention == "mla" else width
