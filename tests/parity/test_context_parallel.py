"""Context parallelism against one process: every sub-block, variant, option and wiring."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from equal import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Ranks
from test_data_parallel import LADDER, MODELS, compare, full, recipe_for, reference, trained
from test_tensor_parallel import collectives
from torch import Tensor

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data import Batch
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.train.job import build_model
from colonnade.launcher.verify.trace import Trace
from colonnade.models.decoder import Decoder
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.passes import forward
from colonnade.parallel.world import World

# Heads and channels for every exchange on four ranks; a segment is longer than a halo.
WIDE: dict[str, Any] = {
    "vocab": 64, "ffn": 48, "hidden": 32, "heads": 8, "kv_heads": 2, "delta_key_dim": 4,
    "mamba_heads": 8, "mamba_groups": 2,
}  # fmt: skip
LENGTH = 32


def long(recipe: Recipe) -> Recipe:
    """Rows of `LENGTH` tokens."""
    train = recipe.train.model_copy(update={"seq_len": LENGTH})
    return recipe.model_copy(update={"train": train})


def one_process(ranks1: Ranks, pattern: str, **fields: Any) -> Trace:
    return reference(ranks1, long(recipe_for(pattern, {}, 16, **fields)))


def on_layout(ranks: Ranks, layout: dict[str, Any], pattern: str, **fields: Any) -> Trace:
    """A recipe under a layout, with two micro-batches a step."""
    micro = 8 if ranks.size == layout["cp"] * layout.get("tp", 1) else 4
    return ranks.run(trained, long(recipe_for(pattern, layout, micro, **fields)))[0]


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_one(ranks1: Ranks, ranks2: Ranks, name: str) -> None:
    pattern, fields = MODELS[name]
    compare(on_layout(ranks2, {"cp": 2}, pattern, **fields), one_process(ranks1, pattern, **fields))


PATTERNS: dict[str, dict[str, Any]] = {
    "*-": {}, "M-": {}, "mS-": LADDER, "D-": {}, "G-": LADDER, "M-*-": LADDER,
    "*": {"attention": "mla", "kv_heads": None, "q_rank": 6, "rope_dim": 4},
    "*-*-": {"window": 9, "full_attention": (1,), "window_rope_theta": 30.0, "unrotated": (1,),
             "sinks": True, "position_temperature": True,
             "query_temperature": 0.5, "query_temperature_length": 5,
             "attention_cap": 3.0, **LADDER},
    "*-M": {"attention_conv": 3, "attention_gate": "head", "clip_low": -0.02, "qk_norm": "full"},
}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    {"context": "ring"}, {"context": "ulysses", "recurrence": "heads"}, {"context": "ring+ulysses"},
    {"context": "allgather"},
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_four_ranks_equal_one(ranks1: Ranks, ranks4: Ranks, pattern: str) -> None:
    """Without attention, there are two variants: states, or heads."""
    fields = WIDE | PATTERNS[pattern]
    expected = one_process(ranks1, pattern, **fields)
    for variant in VARIANTS if "*" in pattern else VARIANTS[:2]:
        compare(on_layout(ranks4, {"cp": 4, **variant}, pattern, **fields), expected)


TENSOR: dict[str, Any] = {"cp": 2, "tp": 2}
WITHOUT_SEQUENCE = {**TENSOR, "sequence": False, "context": "ulysses"}
SHARDED: dict[str, Any] = {"cp": 2, "dp_shard": 2, "context": "allgather", "recurrence": "heads"}
REPLICATED: dict[str, Any] = {"cp": 2, "dp_replicate": 2, "zigzag": False, "context": "ulysses"}


@pytest.mark.parametrize(("layout", "recompute"), [
    (TENSOR, "block"), (TENSOR, "selective"), (WITHOUT_SEQUENCE, "selective"),
    (SHARDED, "block"), (SHARDED, "selective"), (REPLICATED, "block"),
], ids=str)  # fmt: skip
def test_with_other_axes(
    ranks1: Ranks, ranks4: Ranks, layout: dict[str, Any], recompute: str
) -> None:
    """Every layout, and both recomputations with the ring, Ulysses and all-gathered keys; tests of
    other axes compare the same sub-blocks without recomputation."""
    fields = WIDE | LADDER | {"mamba_groups": 1, "window": 11, "sigma_reparam": True}
    expected = one_process(ranks1, "M*mG-E", **fields)
    compare(on_layout(ranks4, layout, "M*mG-E", recompute=recompute, **fields), expected)


def test_contiguous(ranks1: Ranks, ranks4: Ranks) -> None:
    expected = one_process(ranks1, "MmSD-", **WIDE)
    compare(on_layout(ranks4, {"cp": 4, "zigzag": False}, "MmSD-", **WIDE), expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_recomputation_launches_no_collective(ranks2: Ranks, variant: dict[str, Any]) -> None:
    """Ring+ulysses needs four ranks; the ring and the all-to-all are tested by themselves."""
    if variant["context"] == "ring+ulysses":
        variant = {"context": "ring", "recurrence": "heads"}
    layout = {"cp": 2, **variant}
    fields = WIDE | LADDER
    launched = [
        ranks2.run(collectives, recipe_for("M*mG-E", layout, 2, recompute=recompute, **fields))[0]
        for recompute in ("none", "block", "selective")
    ]
    assert len(launched[0][0]) >= 8
    assert launched[1] == launched[2] == launched[0]


@functools.cache
def built(recipe: str, world: World) -> Decoder:
    return build_model(Recipe.model_validate_json(recipe), world)[1]


def summed(rank: int, size: int, recipe: Recipe, batches: list[Batch]) -> dict[str, Tensor]:
    """Loss and gradients, summed over batches of one row."""
    world = World(rank, size, torch.device("cpu"))
    model = built(recipe.model_dump_json(exclude_unset=True), world)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        loss, _ = forward(model, batch, [0], world.device)
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


@given(lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=LENGTH), seed=st.integers(0))
@settings(max_examples=24, deadline=None, derandomize=True)
def test_packed_documents_are_independent(
    ranks1: Ranks, ranks4: Ranks, lengths: list[int], seed: int
) -> None:
    """A packed row over ranks has the loss and gradients of its documents one by one."""
    g = torch.Generator().manual_seed(seed % 2**63)
    tokens, labels = torch.randint(64, (2, 1, LENGTH), generator=g)
    batches, start = [], 0
    documents, positions = torch.zeros(2, 1, LENGTH, dtype=torch.long)
    for number, length in enumerate(lengths):
        document = slice(start, min(start + length, LENGTH))
        if document.stop == document.start:
            break
        position = torch.arange(document.stop - document.start)[None]
        documents[:, document], positions[:, document] = number, position
        zeros = torch.zeros_like(position)
        batches.append(Batch(tokens[:, document], labels[:, document], position, zeros))
        start = document.stop
    documents[:, start:] = len(lengths)
    positions[:, start:] = torch.arange(LENGTH - start)
    labels[:, start:] = IGNORED
    fields = {"window": 9, "full_attention": (1,), "repeat": 1, **WIDE}
    recipe = recipe_for("*MmSDG*-", {}, 1, **fields)
    packed = Batch(tokens, labels, positions, documents)
    variant = VARIANTS[seed % len(VARIANTS)]
    layout = ParallelConfig(cp=4, **variant)
    ours = ranks4.run(summed, recipe.model_copy(update={"parallel": layout}), [packed])[0]
    assert_equal(ours, ranks1.run(summed, recipe, batches)[0])
