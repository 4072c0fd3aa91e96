"""Experts on their own ranks against one process: every fold of the axes, and kind of routing."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_data_parallel import LADDER, Trace, compare, recipe_for, reference, trained
from test_tensor_parallel import collectives, rows
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.launcher.generate import extend
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.launcher.verify.trace import record_trace
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.decoder import Decoder
from colonnade.parallel import experts
from colonnade.parallel.passes import Passes, evaluating, forward
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.world import World

SMALL: dict[str, Any] = {"vocab": 64, "ffn": 48, "hidden": 32, "heads": 8, "experts": 8}
STEERED = {
    "router_score": "sigmoid", "router_bias": True, "router_bias_rate": 0.1, "router_noise": 0.3,
    "capacity": 1.0, "balance_sequence": 0.1, "shared_ffn": 16, "shared_gate": True,
}  # fmt: skip
BIASES = {"expert_bias": True, "router_offset": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("M-*E", LADDER),
    "standard": ("*EE-", {"shared_ffn": 16, "activation": "polynorm", **BIASES}),
    "steered, noisy, with a capacity": ("E-E", STEERED),
    "steered, in a ladder": ("E-E", {**STEERED, **LADDER}),
    "groups of experts": (
        "*E", {"router_score": "sigmoid", "router_groups": 4, "router_top_groups": 2, **LADDER},
    ),
    "THOR": ("*TT-", {"thor_alpha": 0.5, **LADDER}),
    "shared depth": ("*E", {"repeat": 3, "share": True}),
    "multi-token": ("*-", {"mtp": 2, "mtp_pattern": "*E", "logit_z": 0.1}),
    "σReparam, polynomials": ("*-E", {"sigma_reparam": True, "activation": "polynorm", **LADDER}),
    "one mixture": ("E", {"repeat": 3, "share": True, "shared_ffn": 16, **LADDER}),
    "parallel": (
        "*E*-", {"residual": "parallel", "norm_position": "both", "activation": "swiglu_clamped",
                 **BIASES},
    ),
    "muP": ("*E", {"mup_base": {"hidden": 16, "ffn": 24}, "tied": True}),
}  # fmt: skip
FOUR: dict[str, dict[str, Any]] = {
    "ep=4": {"ep": 4},
    "ep=2": {"ep": 2},
    "ep=2, HSDP": {"ep": 2, "dp_replicate": 2},
    "ep=2, cp=2": {"ep": 2, "cp": 2},
    "ep=2, tp=etp=2": {"ep": 2, "tp": 2},
    "ep=2, tp=2, etp=1": {"ep": 2, "tp": 2, "etp": 1},
    "ep=4, tp=2, etp=1, no sequence": {"ep": 4, "tp": 2, "etp": 1, "sequence": False},
    "ep=2, tp=4, etp=2": {"ep": 2, "tp": 4, "etp": 2},
    "tp=2, etp=1": {"tp": 2, "etp": 1},
    "ep=2, etp=2": {"ep": 2, "etp": 2},
    "tp=2, etp=4": {"tp": 2, "etp": 4, "sequence": False},
}
# Every model on two of the layouts, every layout with two of the models, or so.
CASES = [
    (model, layout)
    for m, model in enumerate(MODELS)
    for n, layout in enumerate(FOUR)
    if (n - m) % len(FOUR) in (0, 5)
]
# σReparam's gains have gradients that are partial sums over etp.
CASES.append(("σReparam, polynomials", "ep=2, etp=2"))


def layout_of(layout: dict[str, Any], size: int) -> tuple[dict[str, Any], int]:
    """The layout, and the rows of a micro-batch, of which every rank accumulates two."""
    inner = layout.get("tp", 1) * layout.get("cp", 1)
    return layout, 16 // 2 // (size // inner)


def one_process(ranks1: Ranks, name: str) -> Trace:
    pattern, fields = MODELS[name]
    return reference(ranks1, recipe_for(pattern, {}, 16, **SMALL | fields))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_four_ranks_equal_one(ranks1: Ranks, ranks4: Ranks, name: str, layout: str) -> None:
    pattern, fields = MODELS[name]
    degrees, micro = layout_of(FOUR[layout], 4)
    trace = ranks4.run(trained, recipe_for(pattern, degrees, micro, **SMALL | fields))[0]
    compare(trace, one_process(ranks1, name))


EIGHT: dict[str, dict[str, Any]] = {
    "ep=8": {"ep": 8},
    "ep=2, tp=2, cp=2, etp=1": {"ep": 2, "tp": 2, "cp": 2, "etp": 1},
    "ep=2, tp=4, cp=2, etp=2": {"ep": 2, "tp": 4, "cp": 2, "etp": 2},
    "ep=2, tp=2, HSDP": {"ep": 2, "tp": 2, "dp_replicate": 2},
}


@pytest.mark.parametrize("number", range(len(EIGHT)), ids=list(EIGHT))
def test_eight_ranks_equal_one(ranks1: Ranks, ranks8: Ranks, number: int) -> None:
    layout, name = list(EIGHT)[number], ("hybrid", "steered, noisy, with a capacity")[number % 2]
    pattern, fields = MODELS[name]
    degrees, micro = layout_of(EIGHT[layout], 8)
    micro = max(micro, 2)  # a balance group of two samples
    trace = ranks8.run(trained, recipe_for(pattern, degrees, micro, **SMALL | fields))[0]
    compare(trace, one_process(ranks1, name))


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("ep=4", "block"),
        ("ep=2, tp=2, etp=1", "block"),
        ("ep=2, tp=2, etp=1", "selective"),
        ("ep=2, HSDP", "selective"),
    ],
)
def test_recomputation(ranks1: Ranks, ranks4: Ranks, layout: str, recompute: str) -> None:
    pattern, fields = MODELS["hybrid"]
    degrees, micro = layout_of(FOUR[layout], 4)
    recipe = recipe_for(pattern, degrees, micro, recompute=recompute, **SMALL | fields)
    compare(ranks4.run(trained, recipe)[0], one_process(ranks1, "hybrid"))


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_recomputation_launches_no_collective(ranks4: Ranks, residual: str) -> None:
    """Neither all-to-alls, of which a mixture has four and one of counts, nor FSDP2's."""
    fields = SMALL | {"residual": residual, "shared_ffn": 16}
    launched = [
        ranks4.run(collectives, recipe_for("*E*E", {"ep": 2}, 2, recompute=recompute, **fields))[0]
        for recompute in ("none", "block", "selective")
    ]
    assert launched[0][0].count("all_to_all_single") == 2 * 5
    assert launched[1] == launched[2] == launched[0]


def trained_in_slots(rank: int, size: int, recipe: Recipe) -> tuple[Trace, int]:
    """As `trained`, with rows sent as on a GPU; and how many dispatches sent them in slots."""
    with (
        patch.object(experts, "sends_slots", lambda device: True),
        patch.object(experts, "arrivals_in_slots", wraps=experts.arrivals_in_slots) as in_slots,
    ):
        return trained(rank, size, recipe), in_slots.call_count


@pytest.mark.parametrize("layout", ["ep=4", "ep=2, tp=2, etp=1", "ep=2, cp=2", "ep=2, etp=2"])
def test_slots_of_a_capacity(ranks1: Ranks, ranks4: Ranks, layout: str) -> None:
    """With a capacity, rows can be sent without a number that the host waits for."""
    name = "steered, in a ladder"
    pattern, fields = MODELS[name]
    degrees, micro = layout_of(FOUR[layout], 4)
    recipe = recipe_for(pattern, degrees, micro, **SMALL | fields)
    results = ranks4.run(trained_in_slots, recipe)
    compare(results[0][0], one_process(ranks1, name))
    assert all(count > 0 for _, count in results)


def test_slots_of_unequal_shares(ranks1: Ranks, ranks2: Ranks) -> None:
    """Tensor-parallel ranks share 3 rows of 15 tokens; both have to send as many slots."""
    fields = SMALL | {"experts": 2, "top_k": 1, "capacity": 1.0, "balance_samples": 1}

    def recipe(layout: dict[str, Any]) -> Recipe:
        odd = recipe_for("*E", layout, 3, **fields)
        train = odd.train.model_copy(update={"seq_len": 15, "global_batch": 6})
        return odd.model_copy(update={"train": train})

    (expected,) = ranks1.run(trained, recipe({}))
    layout = {"tp": 2, "ep": 2, "etp": 1, "sequence": False}
    results = ranks2.run(trained_in_slots, recipe(layout))
    compare(results[0][0], expected)
    assert all(count > 0 for _, count in results)


# The loads of experts


def choose(model: Decoder, step: int) -> None:
    """Makes every token choose expert 0, on one rank."""
    for block in expert_blocks(model):
        assert isinstance(block, Mixture)
        block.small.router_bias.copy_(torch.tensor([9.0] + [0.0] * 7))


def trained_on_one_expert(rank: int, size: int, recipe: Recipe) -> Trace | None:
    world = World(rank, size, torch.device("cpu"))
    trace = record_trace(recipe, world, change=choose)
    return trace if world.is_rank_zero else None


@pytest.mark.parametrize(
    "layout", ["ep=4", "ep=2, tp=2, etp=1", "ep=2, tp=etp=2", "ep=2, cp=2", "ep=2, etp=2"]
)
def test_ranks_without_tokens(ranks1: Ranks, ranks4: Ranks, layout: str) -> None:
    """One expert takes all tokens: all others are empty, and other ranks receive none."""
    fields = SMALL | LADDER | {"top_k": 1, "router_bias": True, "balance": 0.0, "router_z": 0.0}
    (expected,) = ranks1.run(trained_on_one_expert, recipe_for("*E-E", {}, 16, **fields))
    degrees, micro = layout_of(FOUR[layout], 4)
    trace = ranks4.run(trained_on_one_expert, recipe_for("*E-E", degrees, micro, **fields))[0]
    assert trace is not None
    assert expected is not None
    compare(trace, expected)
    assert not expected.gradients["step 1: blocks.1.up"][1:].any()
    assert expected.gradients["step 1: blocks.1.up"][:1].any()


def drops_and_biases(rank: int, size: int, recipe: Recipe) -> tuple[list[int], list[Tensor]]:
    """The choices dropped in each step over all ranks, and the biases after the last."""
    dropped: list[Tensor] = []

    def count_drops(model: Decoder, step: int) -> None:
        dropped.append(torch.zeros((), dtype=torch.int64))
        for block in expert_blocks(model):
            inner = block.first.dispatch

            def dispatch(routed: Any, experts: int, inner: Any = inner) -> Any:
                dropped[-1] += (~routed.keep_mask).sum()
                return inner(routed, experts)

            if step == 0:
                block.first.dispatch = dispatch

    world = World(rank, size, torch.device("cpu"))
    trace = record_trace(recipe, world, change=count_drops)
    total = torch.stack(dropped)
    dist.all_reduce(total)
    copies = recipe.parallel.tp
    biases = [t for name, t in trace.parameters.items() if name.endswith("router_bias")]
    return (total // copies).tolist(), biases


def test_drops_and_biases_depend_neither_on_layout_nor_on_accumulation(
    ranks1: Ranks, ranks4: Ranks
) -> None:
    pattern, fields = MODELS["steered, noisy, with a capacity"]

    def run(ranks: Ranks, layout: dict[str, Any], micro: int) -> tuple[list[int], list[Tensor]]:
        recipe = recipe_for(pattern, layout, micro, **SMALL | fields)
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 3})})
        return ranks.run(drops_and_biases, recipe)[0]

    drops, biases = run(ranks1, {}, 16)
    assert len(drops) == 3
    assert min(drops) > 20
    assert len(biases) == 2 * 3
    others = [run(ranks1, {}, 2)]
    others += [
        run(ranks4, *layout_of(FOUR[name], 4))
        for name in ("ep=4", "ep=2, HSDP", "ep=2, tp=2, etp=1", "ep=2, cp=2")
    ]
    for other_drops, other_biases in others:
        assert other_drops == drops
        assert all(torch.equal(a, b) for a, b in zip(other_biases, biases, strict=True))


# Evaluation


def evaluated(rank: int, size: int, layout: dict[str, Any]) -> tuple[list[int], float]:
    """Tokens that a model generates, and its loss on a batch in evaluation mode."""
    world = World(rank, size, torch.device("cpu"))
    fields = SMALL | LADDER | {"shared_ffn": 16, "thor_alpha": 0.5}
    _, model, _ = build_model(recipe_for("*ET-E", layout, 2, **fields), world)
    tokens = extend(Passes(model, world.device), [3, 1, 4], 9, 8, None, seed=7)
    with evaluating(model):
        loss, _ = forward(model, rows(), [0, 1], world.device, rng_key=3)
    return tokens, loss.item()


def test_generation_and_validation(ranks1: Ranks, ranks4: Ranks) -> None:
    (expected,) = ranks1.run(evaluated, {})
    for name in ("ep=4", "ep=2, tp=2, etp=1", "ep=2, tp=etp=2"):
        for tokens, loss in ranks4.run(evaluated, FOUR[name]):
            assert tokens == expected[0]
            assert loss == pytest.approx(expected[1], rel=1e-9)


# Weights


def initial(rank: int, size: int, layout: dict[str, Any]) -> dict[str, Tensor]:
    world = World(rank, size, torch.device("cpu"))
    recipe = recipe_for("*E-T", layout, 2, "fp32", **SMALL | {"sigma_reparam": True})
    named = build_model(recipe, world)[1].named_parameters()
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in named}


def test_initial_weights_are_bit_equal(ranks1: Ranks, ranks4: Ranks) -> None:
    """On each kind of mesh; training from them on every layout is compared above."""
    (expected,) = ranks1.run(initial, {})
    for layout in ("ep=4", "ep=2, HSDP", "ep=2, tp=4, etp=2", "tp=2, etp=4"):
        for name, weight in ranks4.run(initial, FOUR[layout])[0].items():
            assert torch.equal(weight, expected[name]), name


def shards(rank: int, size: int, layout: dict[str, Any]) -> dict[str, int]:
    """Elements of the weights of experts that this rank holds, by name."""
    recipe = recipe_for("E", layout, 1, "fp32", **SMALL | {"experts": 2, "balance_samples": 1})
    _, model, _ = build_model(recipe, World(rank, size, torch.device("cpu")))
    (block,) = expert_blocks(model)
    named = block.experts.named_parameters()
    return {n: p.to_local().numel() if isinstance(p, DTensor) else p.numel() for n, p in named}


def test_fsdp_pads_no_expert(ranks4: Ranks) -> None:
    """Two experts on four ranks: their width is sharded, or half of the shards would be empty."""
    for layout in ({}, {"ep": 2}, {"tp": 2, "etp": 1}, {"tp": 2}):
        for held in ranks4.run(shards, layout):
            assert held == dict.fromkeys(("gate", "up", "down"), 2 * 48 * 32 // 4)


def test_bf16(ranks1: Ranks, ranks4: Ranks) -> None:
    """bf16 keeps 8 bits: losses agree to 2^-8; parameters at rest stay fp32."""
    exact = one_process(ranks1, "hybrid")
    pattern, fields = MODELS["hybrid"]
    recipe = recipe_for(pattern, {"ep": 2, "tp": 2, "etp": 1}, 4, "bf16", **SMALL | fields)
    half = ranks4.run(trained, recipe)[0]
    assert all(p.dtype == torch.float32 for p in half.parameters.values())
    first = "step 1: loss"
    assert float(half.losses[first]) == pytest.approx(float(exact.losses[first]), rel=2**-8)
