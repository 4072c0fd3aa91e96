"""`D` and `G`: the delta rule, plain (arXiv:2406.06484) and gated (arXiv:2412.06464)."""

from typing import TYPE_CHECKING, Annotated, ClassVar

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.options import (
    Count,
    Formula,
    Length,
    Options,
    choice,
    formula,
    head_count,
    length,
    option,
    taps,
    width,
)
from colonnade.models.parameters import (
    ParameterSpec,
    Split,
    constant,
    fan_in_uniform,
    inverse_softplus_dt,
    log_uniform_a,
    normal,
)

if TYPE_CHECKING:
    from colonnade.models.blocks.base import SubBlock
    from colonnade.models.config import ModelConfig

HEADS = "model.delta_heads"

OF_KEYS = Argument("group", lambda c: c.delta_key_heads, lambda c: c.delta_key_dim)
OF_VALUES = Argument("head", lambda c: c.delta_heads, lambda c: c.delta_value_dim)


def delta_mixing(gated: bool) -> Mixing:
    """Returns the delta rule as an operator along the sequence; `decay` is present if gated."""
    of_heads = Argument("head", lambda c: c.delta_heads, wide=True)
    decay = Argument("head", lambda c: c.delta_heads, wide=True, present=gated)
    return Mixing(
        "scan",
        {"q": OF_KEYS, "k": OF_KEYS, "v": OF_VALUES, "beta": of_heads, "decay": decay},
        result=OF_VALUES,
        # per head a state [K, V], and the transition [K, K] that a segment applies to it
        state=lambda c: c.delta_heads * c.delta_key_dim * (c.delta_value_dim + c.delta_key_dim),
    )


class DeltaCard(Card):
    """Halves: `projections, convolution | delta rule, norm, gate, out`."""

    def __init__(self, symbol: str, title: str, gated: bool) -> None:
        self.symbol, self.title, self.gated = symbol, title, gated
        self.mixing = delta_mixing(gated)

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections, filters of q, k and v, decay and gate if gated, norm and output."""
        c, H = config, config.delta_heads
        keys, values = c.delta_key_heads * c.delta_key_dim, H * c.delta_value_dim
        heads = key_heads = Split(0, H, HEADS)
        if c.is_explicit("delta_key_heads"):
            key_heads = Split(0, c.delta_key_heads, "model.delta_key_heads", replicable=True)
        widths = {"q": keys, "k": keys, "v": values, "beta": H}
        if self.gated:
            widths |= {"dt": H, "z": values}
        filters = fan_in_uniform(c.delta_conv)
        records = []
        for name, size in widths.items():
            split = key_heads if name in ("q", "k") else heads
            shape = size, c.hidden
            records.append(ParameterSpec(name, shape, normal(c.init_std), "reads", tp=split))
            if name in ("q", "k", "v"):
                shape = size, c.delta_conv
                records.append(ParameterSpec(f"conv_{name}", shape, filters, tp=split))
        decay = {
            "A_log": log_uniform_a(0.01, 16.0),
            "dt_bias": inverse_softplus_dt(1e-3, 0.1, 1e-4),
        }
        return [
            *records,
            *(
                ParameterSpec(name, (H,), fill, tp=heads, half="small")
                for name, fill in decay.items()
                if self.gated
            ),
            ParameterSpec("norm", (c.delta_value_dim,), constant(1.0), half="second"),
            ParameterSpec(
                "out", (c.hidden, values), normal(out_std), "writes",
                tp=Split(1, H, HEADS), half="second",
            ),
        ]  # fmt: skip

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Counts per head K Kᵀ, Q Kᵀ and the triangular solve over half a chunk, its products with
        K and V, and reading, correcting and writing the state."""
        key, value = config.delta_key_dim, config.delta_value_dim
        half = min(config.delta_chunk, seq_len) // 2
        return config.delta_heads * (2 * half * (3 * key + 2 * value) + 6 * key * value)

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.delta import DeltaNet

        return DeltaNet(self, config, out_std)


class DeltaOptions(Options):
    """`D`: DeltaNet; `G`: gated DeltaNet."""

    cards: ClassVar[tuple[Card, ...]] = (
        DeltaCard("D", "DeltaNet", False),
        DeltaCard("G", "gated DeltaNet", True),
    )

    delta_key_dim: Annotated[Count, width(4, grows=False)] = option(
        64, "width of a query and a key", ge=1
    )
    delta_heads: Annotated[Count, head_count()] = formula(
        Formula("hidden", by="delta_key_dim"), ge=1
    )
    delta_key_heads: Annotated[Count, head_count(divides="delta_heads")] = formula(
        Formula("delta_heads"), ge=1
    )
    delta_value_dim: Annotated[Count, width(6)] = formula(Formula("delta_key_dim"), ge=1)
    delta_conv: Annotated[Count, taps()] = option(4, "width of the causal convolution", ge=1)
    delta_chunk: Annotated[Length, length(4, training=True)] = option(64, "tokens per chunk", ge=1)
    delta_norm_eps: Annotated[float, choice()] = formula(
        Formula("norm_eps"), "norm_eps of the norms of each head's output", gt=0
    )
    delta_negative: Annotated[bool, choice()] = option(False, "beta up to 2: negative eigenvalues")
