"""Tensor and sequence parallelism against one process: every symbol, option and wiring."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from test_data_parallel import (
    BIASED,
    LADDER,
    MODELS,
    MULTIPLIERS,
    compare,
    recipe_for,
    reference,
    trained,
)
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.launcher.data import Batch
from colonnade.launcher.generate import extend
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.parallel.passes import Passes, forward
from colonnade.parallel.world import World

SMALL: dict[str, Any] = {"vocab": 64, "ffn": 48, "hidden": 32, "heads": 8, "delta_key_dim": 4}
LAYOUTS = {
    "tp=2": {"tp": 2, "sequence": False},
    "tp=2, sequence": {"tp": 2, "sequence": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one(ranks1: Ranks, ranks2: Ranks, name: str, layout: str) -> None:
    pattern, fields = MODELS[name]
    fields = {"vocab": 64, "ffn": 48} | fields
    expected = reference(ranks1, recipe_for(pattern, {}, 16, **fields))
    traces = ranks2.run(trained, recipe_for(pattern, LAYOUTS[layout], 8, **fields))
    assert traces[0].losses == traces[1].losses
    compare(traces[0], expected)


# With four ranks there are fewer key-value heads, groups or key heads than ranks.
FOUR: dict[str, tuple[str, dict[str, Any]]] = {
    "few keys, normed over all heads": (
        "*-", {"kv_heads": 2, "qk_norm": "full", "attention_gate": "head", "attention_conv": 3,
                "attention_bias": "qkv"},
    ),
    "one key, gate per channel": (
        "*-", {"kv_heads": 1, "qk_norm": "head", "attention_gate": "channel",
               "position_temperature": True, "sinks": True, "window": 5, **BIASED, **LADDER},
    ),
    "latent": ("*-", {"attention": "mla", "kv_heads": None, "q_rank": 6, "rope_dim": 4, **LADDER}),
    "one group": ("M-mS", {"mamba_groups": 1, "mamba1_norm": "plain", **LADDER}),
    "two groups": ("M-", {"mamba_groups": 2, "norm_position": "both", **LADDER}),
    "few key heads": ("GD", {"delta_heads": 8, "delta_key_heads": 2}),
    "norms by kind": ("G-*-", {"norm_after": "*", "delta_norm_eps": 1e-2, **LADDER}),
    "experts": (
        "ET", {"experts": 4, "activation": "polynorm", "shared_ffn": 16, "shared_gate": True,
               "thor_alpha": 0.5, "router_bias": True, **LADDER},
    ),
    "σReparam": ("*-M", {"kv_heads": 2, "sigma_reparam": True, "activation": "polynorm"}),
    "layer norms, parallel residual": (
        "*-E", {"norm": "layer", "norm_bias": True, "norm_position": "both",
                "residual": "parallel", "activation": "geglu_tanh"},
    ),
    "centred, multi-token prediction": (
        "*-", {"norm": "crms", "kv_heads": 4, "logit_cap": 3.0, "logit_z": 0.1, "mtp": 1,
               "mtp_pattern": "*-", **LADDER},
    ),
    "ladder at the end": ("*-M-", {"residual": "ladder", "ladder_last": 2, "tied": True,
                                     "learned_positions": 16, **MULTIPLIERS}),
}  # fmt: skip


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one(ranks1: Ranks, ranks4: Ranks, name: str, sequence: bool) -> None:
    pattern, fields = FOUR[name]
    expected = reference(ranks1, recipe_for(pattern, {}, 16, **SMALL | fields))
    layout = {"tp": 4, "sequence": sequence}
    compare(ranks4.run(trained, recipe_for(pattern, layout, 8, **SMALL | fields))[0], expected)


@pytest.mark.parametrize("data", ["dp_shard", "dp_replicate"])
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_with_data_parallel_and_recomputation(
    ranks1: Ranks, ranks4: Ranks, data: str, recompute: str
) -> None:
    fields = SMALL | {"mamba_groups": 1, "activation": "polynorm", **LADDER}
    expected = reference(ranks1, recipe_for("M*m-E", {}, 16, **fields))
    layout = {"tp": 2, "sequence": data == "dp_shard", data: 2}
    recipe = recipe_for("M*m-E", layout, 2, recompute=recompute, **fields)
    compare(ranks4.run(trained, recipe)[0], expected)


class Collectives(TorchDispatchMode):
    """Records launched collectives: functional ones in `calls`, those of FSDP2 in `fsdp`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.fsdp: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name, *_ = str(func).split(".")
        if library == "_c10d_functional" and name not in ("wait_tensor", "_wrap_tensor_autograd"):
            self.calls.append(name)
        elif library == "c10d":
            self.fsdp.append((name, sum(t.numel() for t in args if isinstance(t, Tensor))))
        return func(*args, **kwargs or {})


def rows() -> Batch:
    """A micro-batch of two rows."""
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(64, (2, 2, 16), generator=g)
    positions = torch.arange(16).expand(2, 16)
    return Batch(tokens, labels, positions, torch.zeros_like(positions))


def objectives(rank: int, size: int, layout: dict[str, int]) -> dict[tuple[bool, bool], float]:
    """The objective by mode: training or not, with gradients or without."""
    world, by_mode = World(rank, size, torch.device("cpu")), {}
    routing = {"router_noise": 0.3, "capacity": 1.0}
    recipe = recipe_for("M*m-E", layout, 2, **SMALL, **LADDER, **routing)
    _, model, _ = build_model(recipe, world)
    for training in (True, False):
        model.train(training)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                objective, _ = forward(model, rows(), [0, 1], world.device, rng_key=3)
            by_mode[training, gradients] = objective.item()
    return by_mode


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_training_mode_changes_the_objective(
    ranks1: Ranks, ranks2: Ranks, layout: str
) -> None:
    """Sequences are sharded in training, with gradients or without; nothing else depends on it."""
    (expected,) = ranks1.run(objectives, {})
    for by_mode in ranks2.run(objectives, LAYOUTS[layout]):
        assert by_mode == pytest.approx(expected, rel=1e-9)
        for training in (True, False):
            assert by_mode[training, False] == by_mode[training, True]
        assert by_mode[True, True] != by_mode[False, True]


def gradients_in_evaluation(rank: int, size: int) -> str:
    """The error of a backward pass in evaluation mode."""
    world = World(rank, size, torch.device("cpu"))
    _, model, _ = build_model(recipe_for("*-", {"tp": size, "sequence": True}, 2, **SMALL), world)
    loss, _ = forward(model.eval(), rows(), [0, 1], world.device)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    return str(caught.value)


def test_gradients_in_evaluation_are_refused_under_sequence_parallelism(ranks2: Ranks) -> None:
    """The norms then work on whole sequences, and their gradients would be summed twice."""
    for message in ranks2.run(gradients_in_evaluation):
        assert "has no gradients: call model.train()" in message


def collectives(rank: int, size: int, recipe: Recipe) -> tuple[list[str], list[tuple[str, int]]]:
    """The collectives of the forward and the backward pass of a micro-batch."""
    world = World(rank, size, torch.device("cpu"))
    _, model, _ = build_model(recipe, world)
    with Collectives() as launched:
        loss, _ = forward(model, rows(), [0, 1], world.device)
        launched.calls.append("backward")
        launched.fsdp.append(("backward", 0))
        loss.backward()
    return launched.calls, launched.fsdp


@pytest.mark.parametrize("sequence", [False, True])
def test_recomputation_launches_no_collective(ranks2: Ranks, sequence: bool) -> None:
    fields = SMALL | {"mamba_groups": 1, "activation": "polynorm", **LADDER}
    layout = {"tp": 2, "sequence": sequence}
    launched = [
        ranks2.run(collectives, recipe_for("M*m-E", layout, 2, recompute=recompute, **fields))[0][0]
        for recompute in ("none", "block", "selective")
    ]
    assert len(launched[0]) > 20
    assert launched[1] == launched[2] == launched[0]


@pytest.mark.parametrize("sequence", [False, True])
def test_ladder_keeps_the_order_of_fsdp(ranks4: Ranks, sequence: bool) -> None:
    """FSDP2 launches its collectives in the same order as with the standard residual."""
    layout = {"tp": 2, "dp_shard": 2, "sequence": sequence}
    fields = SMALL | {"repeat": 2}
    standard, ladder = (
        ranks4.run(collectives, recipe_for("*-M", layout, 1, residual=residual, **fields))[0][1]
        for residual in ("standard", "ladder")
    )
    assert len(standard) > 20
    assert ladder == standard


@pytest.mark.parametrize(("tied", "expected"), [(True, 1), (False, 3)])
def test_the_head_is_gathered_once_in_a_step(ranks2: Ranks, tied: bool, expected: int) -> None:
    """An embedding of its own is gathered twice, for the forward and for the backward pass."""
    recipe = recipe_for("*-", {"dp_shard": 2}, 2, **SMALL, tied=tied)
    launched = ranks2.run(collectives, recipe)[0][1]
    weight = SMALL["vocab"] * SMALL["hidden"]
    gathered_and_shard = weight + weight // 2
    assert launched.count(("_allgather_base_", gathered_and_shard)) == expected


def generated(rank: int, size: int, layout: dict[str, int]) -> list[int]:
    """Tokens that a model generates."""
    world = World(rank, size, torch.device("cpu"))
    recipe = recipe_for("M*mS-GE", layout, 2, **SMALL, **LADDER)
    _, model, _ = build_model(recipe, world)
    return extend(Passes(model, world.device), [3, 1, 4], 9, 8, None, seed=7)


def test_ranks_generate_the_same_tokens(ranks1: Ranks, ranks2: Ranks) -> None:
    (expected,) = ranks1.run(generated, {})
    for layout in LAYOUTS.values():
        assert ranks2.run(generated, layout) == [expected, expected]


def initial(rank: int, size: int, layout: dict[str, int]) -> dict[str, Tensor]:
    world = World(rank, size, torch.device("cpu"))
    recipe = recipe_for("M-*EmSG", layout, 2, "fp32", **SMALL | {"mamba_groups": 1})
    named = build_model(recipe, world)[1].named_parameters()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in named}


def test_initial_weights_are_bit_equal(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks) -> None:
    (expected,) = ranks1.run(initial, {})
    for ranks, layout in ((ranks2, {"tp": 2}), (ranks4, {"tp": 4}), (ranks4, {"tp": 2})):
        for name, weight in ranks.run(initial, layout)[0].items():
            assert torch.equal(weight, expected[name]), name


def test_bf16_keeps_parameters_in_fp32(ranks1: Ranks, ranks2: Ranks) -> None:
    """bf16 keeps 8 bits: losses agree to 2^-8."""
    exact = reference(ranks1, recipe_for("M-*E", {}, 16, **SMALL, **LADDER))
    layout = LAYOUTS["tp=2, sequence"]
    half = ranks2.run(trained, recipe_for("M-*E", layout, 4, "bf16", **SMALL, **LADDER))[0]
    assert all(p.dtype == torch.float32 for p in half.parameters.values())
    first = "step 1: loss"
    assert float(half.losses[first]) == pytest.approx(float(exact.losses[first]), rel=2**-8)
