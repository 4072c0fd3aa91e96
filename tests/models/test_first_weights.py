"""Initial weights: their distribution, and that they depend only on seed and name."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import empty
from torch import Tensor

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder
from colonnade.models.parameters import constant, normal
from colonnade.parallel import materialise as materialise_module
from colonnade.parallel.materialise import fill_shard, materialise, new_decoder


def config_of(pattern: str, **more: object) -> ModelConfig:
    """Returns a config with small, odd widths."""
    fields = dict(
        pattern=pattern, vocab=31, hidden=12, heads=4, kv_heads=2, head_dim=6, ffn=11,
        mamba_heads=4, mamba_head_dim=3, mamba_state=5, mamba_groups=2, experts=5, expert_ffn=7,
        mamba1_inner=20, mamba1_rank=3, delta_heads=4, delta_key_dim=3,
    )  # fmt: skip
    return ModelConfig.model_validate(fields | more)


def first_distribution(name: str, layers: int, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Returns the expected distribution function: Mamba's from its paper, others by std."""
    role = name.split(".")[-1]
    if role == "A_log":  # A ~ U(1, 16)
        return lambda t: (t.exp() - 1) / 15
    if role == "dt_bias":  # softplus is log-uniform in [0.001, 0.1]
        return lambda t: (F.softplus(t).log() - math.log(1e-3)) / math.log(100)
    if role.startswith("conv_"):  # U(± 1/sqrt(width))
        return lambda t: (t * config.mamba_conv**0.5 + 1) / 2
    std = config.init_std / (layers**0.5 if role in ("out", "down") else 1)
    return lambda t: torch.special.ndtr(t / std)


def test_first_weights_have_their_distribution() -> None:
    """Kolmogorov-Smirnov test at a significance of 1 in 10 000; norms and D are 1, biases 0."""
    biases = {"attention_bias": "all", "mlp_bias": True}
    config = config_of("M-*E", init_std=0.05, **biases).model_copy(
        update={"hidden": 32, "mamba_heads": 1024, "mamba_conv": 3, "repeat": 2, "ffn": 33}
    )
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model, torch.device("cpu"), seed=9)
    for name, p in model.named_parameters():
        flat = p.detach().double().flatten()
        if "norm" in name or "final" in name or name.endswith(".D"):
            assert bool((flat == 1).all()), name
            continue
        if name.endswith("_bias") and not name.split(".")[-1].startswith(("dt_", "conv_")):
            assert bool((flat == 0).all()), name
            continue
        uniform = first_distribution(name, 8, config)(flat).sort().values
        n = len(uniform)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = torch.maximum(steps[1:] - uniform, uniform - steps[:-1]).max().item()
        assert distance < 2.23 / n**0.5, f"{name}: {distance} with {n} elements"


def test_first_weights_of_s4d() -> None:
    """S4D-Lin: A_n = −1/2 + iπn, steps within [0.001, 0.1], |C|² 1 on average."""
    block = new_decoder(ModelConfig(pattern="S", hidden=64, vocab=16)).wiring.block(0)
    t = {name: p.detach().double() for name, p in block.named_parameters()}
    assert bool(((t["A_real_log"].exp() - 0.5).abs() < 1e-7).all())
    angles = math.pi * torch.arange(32, dtype=torch.float64)
    assert_equal({"A": t["A_imag"]}, {"A": angles.expand(128, 32)}, relative=1e-6)
    assert t["log_dt"].exp().min() >= 0.999e-3
    assert t["log_dt"].exp().max() <= 0.1001
    assert abs(t["log_dt"].mean() - math.log(1e-2)) < 0.5
    assert abs((t["C_real"] ** 2 + t["C_imag"] ** 2).mean() - 1) < 0.1


def test_first_weights_are_a_function_of_seed_and_name() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = empty(config_of("**"))
        materialise(model, torch.device("cpu"), seed)
        return {n: p.detach() for n, p in model.named_parameters() if "norm" not in n}

    one, same_seed, other_seed = weights(1), weights(1), weights(2)
    del one["final.weight"]
    flat = [t.flatten()[:16] for t in one.values()] + [other_seed[n].flatten()[:16] for n in one]
    assert all(torch.equal(one[n], same_seed[n]) for n in one)
    assert len({tuple((t / t[0]).tolist()) for t in flat}) == len(
        flat
    )  # no two are equal, nor multiples of each other


@pytest.mark.parametrize("block", [1, 10, 64, 1 << 16])
def test_any_shard_is_the_slice_of_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random shapes and shards of one to three dimensions, in fp32 and fp64."""
    monkeypatch.setattr(materialise_module, "BLOCK", block)
    g = torch.Generator().manual_seed(block)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    for case in range(150):
        shape = tuple(draw(1, 9) for _ in range(1 + case % 3))
        offset = tuple(draw(0, n) for n in shape)  # some shards are empty
        size = tuple(draw(0, n - o) for n, o in zip(shape, offset, strict=True))
        whole, shard = torch.empty(shape), torch.full(size, math.nan, dtype=torch.float64)
        fill_shard(whole, shape, (0,) * len(shape), normal(1.0), f"7/{case}")
        fill_shard(shard, shape, offset, normal(1.0), f"7/{case}")
        block_slices = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        assert torch.equal(whole[block_slices].double(), shard), (shape, offset, size)
        assert whole.unique().numel() == whole.numel()  # no block repeats another


def test_a_shard_of_a_large_parameter() -> None:
    """Uses the real block size, which this parameter exceeds several times."""
    shape, offset, size = (700, 3, 111), (303, 1, 5), (290, 2, 100)
    whole, shard = torch.empty(shape), torch.empty(size)
    fill_shard(whole, shape, (0, 0, 0), normal(1.0), "1/w")
    fill_shard(shard, shape, offset, normal(1.0), "1/w")
    assert torch.equal(whole[303:593, 1:3, 5:105], shard)
    fill_shard(shard, shape, offset, constant(3.0), "1/w")
    assert bool((shard == 3).all())
