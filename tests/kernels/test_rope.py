"""Rotary embeddings: rotation against complex numbers, every scaling against transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equal import assert_equal
from oracle import fp64  # before transformers
from shown import Row
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from colonnade.kernels.rope import (
    RopeScaling,
    rope_frequencies,
    rope_table,
    rotate,
    yarn_mscale,
)

TABLE = [
    Row(
        "*",
        "linear, NTK, YaRN and Llama 3 RoPE scaling, partial rotary",
        "transformers' RoPE",
        "1e-12",
    )
]

BF16 = 2.0**-8  # of the largest element: twice the error of one rounding to bf16
POSITIONS = torch.tensor([[0, 3], [1, 4], [2, 0], [3, 1], [4, 2], [0, 3], [1, 900]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def results(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """The function's output, and the gradient of `x` for a fixed random gradient of it."""
    x = x.clone().requires_grad_()
    out = function(x)
    return {"out": out.detach(), "x": torch.autograd.grad(out, x, normal(*out.shape, seed=9))[0]}


# Rotation


def test_rotate() -> None:
    """A pair (x_i, x_{i + P/2}) is a complex number, rotated by position · theta^(−2i/P)."""
    S, B, H, P, theta = 7, 2, 3, 10, 77.0
    x = normal(S, B, H, P)

    def rotated(x: Tensor) -> Tensor:
        i = torch.arange(P // 2, dtype=torch.float64)
        angle = POSITIONS[..., None, None] * theta ** (-2 * i / P)
        z = torch.complex(x[..., : P // 2], x[..., P // 2 :]) * torch.polar(angle * 0 + 1, angle)
        return torch.cat([z.real, z.imag], -1)

    table = rope_table(POSITIONS, P, theta, torch.float64)
    assert_equal(results(lambda x: rotate(x, table), x), results(rotated, x), 1e-12)

    narrow = rope_table(POSITIONS, P, theta, torch.bfloat16)
    assert narrow[0].dtype == narrow[1].dtype == torch.float32
    rounded = rotate(x.bfloat16(), narrow)
    assert rounded.dtype == torch.bfloat16
    assert_equal({"": rounded}, {"": rotated(x.bfloat16().double())}, BF16)


@pytest.mark.parametrize("rotated", [2, 4, 10])
def test_partial_rotary(rotated: int) -> None:
    """As in GPT-NeoX the first channels are rotated among themselves, and the others unchanged."""
    x, theta = normal(7, 2, 3, 10), 500.0
    table = rope_table(POSITIONS, rotated, theta, torch.float64)

    def theirs(x: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], -1).squeeze(2).transpose(0, 1) for t in table)  # [B, S, 2w]
        heads_first = x.permute(1, 2, 0, 3)
        return apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0].permute(2, 0, 1, 3)

    assert table[0].shape == (7, 2, 1, rotated // 2)
    assert_equal(results(lambda x: rotate(x, table), x), results(theirs, x), 1e-12)
    assert torch.equal(rotate(x, table)[..., rotated:], x[..., rotated:])


def test_angles_of_far_positions_are_precise() -> None:
    """At position 10^6 the fp32 table is the fp64 one, rounded."""
    positions = torch.arange(1_000_000, 1_000_064)[:, None]
    exact = rope_table(positions, 64, 1e4, torch.float64)
    for narrow, wide in zip(rope_table(positions, 64, 1e4, torch.bfloat16), exact, strict=True):
        assert (narrow.double() - wide).abs().max() <= 2.0**-24


# Scalings: each as transformers' parameters and as ours

SCALINGS: dict[str, tuple[dict[str, Any], RopeScaling]] = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, RopeScaling("linear", 3.0, 64)),
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, RopeScaling("yarn", 4.0, 64)),
    "yarn-untruncated": (
        {"rope_type": "yarn", "factor": 32.0, "truncate": False},
        RopeScaling("yarn", 32.0, 64, truncate=False),
    ),
    "yarn-ramp": (
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 5.0, "beta_slow": 0.3},
        RopeScaling("yarn", 8.0, 64, fast=5.0, slow=0.3),
    ),
    "yarn-step": (  # a ramp of width zero
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 100.0, "beta_slow": 50.0},
        RopeScaling("yarn", 8.0, 64, fast=100.0, slow=50.0),
    ),
    "yarn-deepseek": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        RopeScaling("yarn", 40.0, 64, mscale=1.0, mscale_all=1.0),
    ),
    "yarn-mscales": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
        RopeScaling("yarn", 40.0, 64, mscale=0.7, mscale_all=1.3),
    ),
    "yarn-one-mscale": (  # without `mscale_all` it has no effect
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7},
        RopeScaling("yarn", 40.0, 64, mscale=0.7),
    ),
    "yarn-attention-factor": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7, "mscale": 0.7},
        RopeScaling("yarn", 4.0, 64, attention_factor=1.7, mscale=0.7),
    ),
    "yarn-factor-1": ({"rope_type": "yarn", "factor": 1.0}, RopeScaling("yarn", 1.0, 64)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        RopeScaling("llama3", 8.0, 64),
    ),
    "llama3-bounds": (
        {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 0.4, "high_freq_factor": 9.0},
        RopeScaling("llama3", 3.0, 64, low=0.4, high=9.0),
    ),
}


def llama_config(parameters: dict[str, Any], width: int, theta: float) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * width,
        num_attention_heads=2,
        head_dim=width,
        max_position_embeddings=64,
        rope_parameters={"rope_theta": theta, **parameters},
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("width", "theta"), [(8, 1e4), (10, 77.0), (64, 5e5)])
def test_scaled_frequencies(name: str, width: int, theta: float) -> None:
    parameters, scaling = SCALINGS[name]
    if scaling.kind in ("yarn", "llama3"):
        parameters = {**parameters, "original_max_position_embeddings": 64}
    with fp64():
        config = llama_config(parameters, width, theta)
        theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    ours, our_factor = rope_frequencies(width, theta, scaling)
    assert ours.dtype == torch.float64
    assert_equal({name: ours / theirs}, {name: torch.ones_like(theirs)}, 1e-12)
    assert our_factor == pytest.approx(factor, rel=1e-14)


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_ntk(factor: float) -> None:
    """Dynamic NTK of factor f − 1 at twice the trained length is the static rule of factor f."""
    with fp64():
        config = llama_config({"rope_type": "dynamic", "factor": factor - 1}, 10, 1e4)
        theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, seq_len=2 * 64)
    ours, one = rope_frequencies(10, 1e4, RopeScaling("ntk", factor, 64))
    assert one == 1.0
    assert_equal({"": ours / theirs}, {"": torch.ones_like(theirs)}, 1e-12)
    plain = rope_frequencies(10, 1e4, None)[0]
    assert ours[0] == plain[0] == 1
    assert float(plain[-1] / ours[-1]) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", [None, *SCALINGS])
def test_scaled_table(name: str | None) -> None:
    """Cosine and sine as Llama's rotary module makes them, the attention factor multiplied in."""
    parameters, scaling = SCALINGS[name] if name else ({"rope_type": "default"}, None)
    if scaling is not None and scaling.kind in ("yarn", "llama3"):
        parameters = {**parameters, "original_max_position_embeddings": 64}
    with fp64():
        module = LlamaRotaryEmbedding(llama_config(parameters, 12, 1e4))
        theirs = module(normal(1), POSITIONS.T)
    ours = rope_table(POSITIONS, 12, 1e4, torch.float64, scaling)
    for table, expected in zip(ours, theirs, strict=True):  # theirs: [B, S, P], each angle twice
        twice = torch.cat([table, table], -1).squeeze(2).transpose(0, 1)
        assert_equal({"": twice}, {"": expected}, 1e-11)  # angles near 900 are off by up to 1e-13


def test_yarn_mscale() -> None:
    """0.1 · weight · ln(factor) + 1, which DeepSeek-V3 squares into the scale of its scores."""
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 3.0) == 1.0
    assert yarn_mscale(40.0, 0.7) == pytest.approx(1 + 0.07 * torch.tensor(40.0).log().item())
    deepseek = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all=1.0)
    assert rope_frequencies(64, 1e4, deepseek)[1] == 1.0


def test_unknown_scaling_is_refused() -> None:
    scaling = RopeScaling("longrope", 2.0, 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'longrope'"):
        rope_frequencies(8, 1e4, scaling)
