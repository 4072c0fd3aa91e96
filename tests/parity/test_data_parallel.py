"""FSDP2, HSDP and accumulation against one process: losses, gradients, parameters."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.launcher.cluster.collective import on_rank_zero
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe, TrainConfig
from colonnade.launcher.train.job import build_model
from colonnade.launcher.verify.equal import Bounds
from colonnade.launcher.verify.equal import compare as differences
from colonnade.launcher.verify.trace import Trace, record_trace
from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

STEPS, VOCAB, SEQ = 2, 61, 16


def recipe_for(
    pattern: str,
    layout: dict[str, int],
    micro_batch: int,
    precision: str = "fp64",
    recompute: str = "none",
    **fields: Any,
) -> Recipe:
    """A tiny model with every setting whose effect could depend on the layout."""
    small = dict(
        pattern=pattern,
        hidden=24,
        heads=4,
        kv_heads=2,
        ffn=40,
        vocab=VOCAB,
        delta_key_dim=6,
        delta_chunk=4,
        mamba1_state=4,
        mamba1_chunk=4,
        s4d_state=4,
        s4d_chunk=4,
        mamba_head_dim=8,
        mamba_state=8,
        mamba_groups=2,
        mamba_chunk=4,
        experts=3,
        top_k=2,
        balance=0.1,
        router_z=0.01,
        balance_samples=2,
        init_std=0.2,
    )
    model = ModelConfig.model_validate(small | fields)
    train = TrainConfig(
        steps=STEPS,
        global_batch=16,
        micro_batch=micro_batch,
        seq_len=SEQ,
        precision=precision,
        recompute=recompute,
        seed=5,
        loss_chunk=17,
    )
    optimizer = OptimizerConfig(lr=1e-2, clip=0.5)
    return Recipe(model=model, parallel=ParallelConfig(**layout), train=train, optimizer=optimizer)


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def trained(rank: int, size: int, recipe: Recipe) -> Trace:
    """A few steps of a recipe as one rank; rank 0's trace is complete, and others have its losses
    and norms alone."""
    local = record_trace(recipe, World(rank, size, torch.device("cpu")))
    losses, norms = on_rank_zero(lambda: (local.losses, local.norms))
    assert local.losses == losses
    assert local.norms == norms
    return local


_references: dict[str, Trace] = {}


def reference(ranks1: Ranks, recipe: Recipe) -> Trace:
    """The trace of one process, trained once for all tests of the session that compare with it."""
    key = repr(recipe)
    if key not in _references:
        _references[key] = ranks1.run(trained, recipe)[0]
    return _references[key]


def compare(a: Trace, b: Trace, relative: float = 1e-9, of_all: float = 1e-12) -> None:
    """Asserts that the traces are equal, and the replicas on the ranks of `a`, too."""
    bounds = Bounds(relative, of_all)
    for kind in ("losses", "norms", "gradients", "parameters"):
        worst = differences(getattr(a, kind), getattr(b, kind), bounds, a.replica_differences)[0]
        assert worst.excess <= 1, f"{kind}: {worst}"


LADDER: dict[str, Any] = {"residual": "ladder"}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
    "logit_multiplier": 2.0,
}  # fmt: skip
BIASED: dict[str, Any] = {"attention_bias": "all", "mlp_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("*-", {"learned_positions": 64}),
    "hybrid, ladder, tied, biases": ("M-*E", {**LADDER, **BIASED, "tied": True}),
    "mixture first, plain norms": ("E*M-", {"norm": "layer", "norm_weight": False}),
    "recurrent": ("mDS-G", {**LADDER, "mamba1_norm": "weighted", "norm_after": "S"}),
    "THOR": ("*TT-", {"thor_alpha": 0.5, "experts": 4}),
    "shared depth": ("*E", {"repeat": 3, "share": True}),
    "steered and noisy routing": (
        "E-E",
        {"expert_bias": True, "router_offset": True, "activation": "swiglu_clamped",
         "router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1, "experts": 6,
         "router_noise": 0.3, "capacity": 1.0, "balance_sequence": 0.1, "shared_ffn": 8},
    ),
    "multi-token": ("*-", {"mtp": 2, "mtp_pattern": "*E", "logit_z": 0.1, "logit_cap": 4.0}),
    "σReparam, polynomials": ("*-E", {"sigma_reparam": True, "activation": "polynorm"}),
    "centred, latent": (
        "*-", {"norm": "pre_rms", "attention": "mla", "kv_heads": None, "rope_dim": 4,
               "position_temperature": True, "sinks": True, "mlp_bias": True},
    ),
    "muP, multipliers": ("*-M", {"mup_base": {"hidden": 12, "ffn": 20}, **MULTIPLIERS}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layouts_equal_one_process(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, name: str) -> None:
    """Every model with FSDP2 and with replicas, one of them on two ranks and the other on four."""
    pattern, fields = MODELS[name]
    expected = reference(ranks1, recipe_for(pattern, {}, 16, **fields))

    def check(ranks: Ranks, layout: dict[str, int], micro: int) -> None:
        compare(ranks.run(trained, recipe_for(pattern, layout, micro, **fields))[0], expected)

    check(ranks1, {}, 4)
    if list(MODELS).index(name) % 2 == 0:
        check(ranks2, {"dp_replicate": 2}, 2)
        check(ranks4, {}, 2)
    else:
        check(ranks2, {}, 8)
        check(ranks4, {"dp_replicate": 2}, 2)


@pytest.mark.parametrize("recompute", ["block", "selective"])
@pytest.mark.parametrize("pattern", ["M-*E", "mTDG"])
def test_recomputation_changes_nothing(
    ranks1: Ranks, ranks2: Ranks, pattern: str, recompute: str
) -> None:
    fields: dict[str, Any] = {**LADDER, "sigma_reparam": True, "router_noise": 0.3}
    expected = reference(ranks1, recipe_for(pattern, {}, 8, **fields))
    recipe = recipe_for(pattern, {}, 4, recompute=recompute, **fields)
    compare(ranks2.run(trained, recipe)[0], expected)


def test_single_precision_within_rounding(ranks1: Ranks, ranks2: Ranks) -> None:
    """fp32 covers operators that have no fp64: 1e-4 of each tensor's largest element."""
    exact = reference(ranks1, recipe_for("*-", {}, 16))
    single = ranks2.run(trained, recipe_for("*-", {}, 4, precision="fp32"))[0]
    compare(single, exact, relative=1e-4, of_all=1e-5)


def test_bf16_reduces_in_fp32(ranks1: Ranks, ranks2: Ranks) -> None:
    """bf16 keeps 8 bits: losses agree to 2^-8, and parameters at rest stay fp32."""
    exact = reference(ranks1, recipe_for("M-*E", {}, 16, **LADDER))
    for ranks in (ranks1, ranks2):
        half = ranks.run(trained, recipe_for("M-*E", {}, 4, precision="bf16", **LADDER))[0]
        assert all(p.dtype == torch.float32 for p in half.parameters.values())
        assert half.losses["step 1: loss"] == pytest.approx(exact.losses["step 1: loss"], rel=2**-8)


def test_bf16_gradients_are_summed_in_fp32(ranks2: Ranks) -> None:
    """The sum of two bf16 gradients is mostly not a bf16 number; that of a bf16 reduction is."""
    recipe = recipe_for("*-", {}, 8, precision="bf16")
    unclipped = OptimizerConfig(lr=1e-2, clip=0)
    trace = ranks2.run(trained, recipe.model_copy(update={"optimizer": unclipped}))[0]
    gradient = trace.gradients["step 1: blocks.0.q"]
    assert gradient.dtype == torch.float32
    assert (gradient.bfloat16().float() != gradient).float().mean() > 0.2


def initial(rank: int, size: int, recipe: Recipe) -> dict[str, Tensor]:
    world = World(rank, size, torch.device("cpu"))
    model = build_model(recipe, world)[1]
    return {name: full(p) for name, p in model.named_parameters()}


def test_initial_weights_are_bit_equal(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks) -> None:
    recipe = recipe_for("M-*E", {}, 4, precision="fp32", **LADDER)
    expected = ranks1.run(initial, recipe)[0]
    for ranks in (ranks2, ranks4):
        for name, weight in ranks.run(initial, recipe)[0].items():
            assert torch.equal(weight, expected[name]), name
