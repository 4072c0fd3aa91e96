"""`M`: Mamba-2, a state-space mixer with scalar decay per head (arXiv:2405.21060)."""

from typing import TYPE_CHECKING, Annotated, ClassVar

from colonnade.models.cards.base import Argument, Card, Mixing
from colonnade.models.options import (
    Count,
    Formula,
    Length,
    Options,
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

HEADS, GROUPS = "model.mamba_heads", "model.mamba_groups"

OF_HEADS = Argument("head", lambda c: c.mamba_heads, lambda c: c.mamba_head_dim)
OF_GROUPS = Argument("group", lambda c: c.mamba_groups, lambda c: c.mamba_state)
SCAN = Mixing(
    "scan",
    {
        "x": OF_HEADS,
        "dt": Argument("head", lambda c: c.mamba_heads, wide=True),
        "A": Argument("constant"),
        "B": OF_GROUPS,
        "C": OF_GROUPS,
        "D": Argument("constant"),
    },
    result=OF_HEADS,
    # per head a state [P, N], and the transition of a segment: the product of its decays
    state=lambda c: c.mamba_heads * (c.mamba_head_dim * c.mamba_state + 1),
)


class Mamba2Card(Card):
    """Halves: `projections, convolution | scan, gated norm, out`."""

    symbol, title, mixing = "M", "Mamba-2", SCAN

    def parameters(self, config: "ModelConfig", out_std: float) -> list[ParameterSpec]:
        """Returns projections to z, x, B, C, dt, filters of x, B, C, decay, norm and output."""
        c, H = config, config.mamba_heads
        inner, state = H * c.mamba_head_dim, c.mamba_groups * c.mamba_state
        heads = Split(0, H, HEADS)
        groups = Split(0, c.mamba_groups, GROUPS, replicable=True)
        filters = fan_in_uniform(c.mamba_conv)
        records = []
        for name, size in {"z": inner, "x": inner, "B": state, "C": state, "dt": H}.items():
            split = groups if name in ("B", "C") else heads
            shape = size, c.hidden
            records.append(ParameterSpec(name, shape, normal(c.init_std), "reads", tp=split))
            if name in ("x", "B", "C"):
                taps, bias = f"conv_{name}", f"conv_{name}_bias"
                records.append(ParameterSpec(taps, (size, c.mamba_conv), filters, tp=split))
                records.append(ParameterSpec(bias, (size,), filters, tp=split))
        decay = {
            "A_log": log_uniform_a(1.0, 16.0),
            "dt_bias": inverse_softplus_dt(1e-3, 0.1, 1e-4),
            "D": constant(1.0),
        }
        return [
            *records,
            *(ParameterSpec(n, (H,), fill, tp=heads, half="small") for n, fill in decay.items()),
            ParameterSpec("norm", (inner,), constant(1.0), tp=heads, half="second"),
            ParameterSpec(
                "out", (c.hidden, inner), normal(out_std), "writes",
                tp=Split(1, H, HEADS), half="second",
            ),
        ]  # fmt: skip

    def mixing_flops(self, config: "ModelConfig", seq_len: int, index: int) -> int:
        """Counts C Bᵀ per group and its product with x over half a chunk, and reading and writing
        the state."""
        c, inner = config, config.mamba_heads * config.mamba_head_dim
        half = min(c.mamba_chunk, seq_len) // 2
        return 2 * half * (c.mamba_groups * c.mamba_state + inner) + 4 * inner * c.mamba_state

    def build(self, config: "ModelConfig", out_std: float) -> "SubBlock":
        """Builds the module."""
        from colonnade.models.blocks.mamba2 import Mamba2

        return Mamba2(self, config, out_std)


class Mamba2Options(Options):
    """`M`: Mamba-2."""

    cards: ClassVar[tuple[Card, ...]] = (Mamba2Card(),)

    mamba_head_dim: Annotated[Count, width(4)] = option(64, "head width P", ge=1)
    mamba_heads: Annotated[Count, head_count()] = formula(
        Formula("hidden", times=2, by="mamba_head_dim"), ge=1
    )
    mamba_state: Annotated[Count, width(4, grows=False)] = option(128, "state width N", ge=1)
    mamba_groups: Annotated[Count, head_count(divides="mamba_heads")] = option(
        1, "groups G that share B and C", ge=1
    )
    mamba_conv: Annotated[Count, taps()] = option(4, "width of the causal convolution", ge=1)
    mamba_chunk: Annotated[Length, length(4, training=True)] = option(
        128, "tokens per chunk of the scan", ge=1
    )
