"""Bytes sent over the context group: every variant counted, against its formula."""

from typing import Any

import pytest
import torch
from ranks import Ranks

from colonnade.bench import traffic
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.models.config import ModelConfig
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.world import World

ROWS, TOKENS = 2, 32
SMALL: dict[str, Any] = {
    "hidden": 24, "vocab": 16, "heads": 8, "head_dim": 4, "mamba_heads": 8, "mamba_head_dim": 6,
    "mamba_state": 5, "mamba_groups": 2, "mamba_chunk": 4, "mamba1_inner": 16, "mamba1_state": 3,
    "mamba1_chunk": 4, "s4d_inner": 16, "s4d_state": 3, "s4d_chunk": 4,
    "delta_heads": 8, "delta_key_heads": 2, "delta_key_dim": 6,
    "delta_value_dim": 5, "delta_chunk": 4, "mamba_conv": 3, "delta_conv": 2,
}  # fmt: skip
# Pattern, options of the model, and of the layout.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "hybrid": ("M-*D", {}, {}),
    "contiguous": ("M", {}, {"zigzag": False}),
    **{
        f"{context}, {kv_heads} key heads": ("*", {"kv_heads": kv_heads}, {"context": context})
        for context in ("ring", "ulysses", "ring+ulysses", "allgather")
        for kv_heads in (8, 2)
    },
    **{
        f"{symbol}, {recurrence}": (symbol, {}, {"recurrence": recurrence})
        for symbol in "MmSDG"
        for recurrence in ("states", "heads")
    },
}


def recipe(name: str, ranks: int) -> Recipe:
    """With fewer key heads than ranks in bf16, whose gradients travel in fp32."""
    pattern, fields, layout = CASES[name]
    precision = "bf16" if fields.get("kv_heads") == 2 else "fp32"
    return Recipe(
        model=ModelConfig(pattern=pattern, **SMALL, **fields),
        parallel=ParallelConfig(cp=ranks, **layout),
        train=TrainConfig(micro_batch=ROWS, seq_len=TOKENS, precision=precision),
    )


def counted(rank: int, size: int) -> dict[str, int]:
    world = World(rank, size, torch.device("cpu"))
    return {name: traffic.counted(world, recipe(name, size)) for name in CASES}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_send_what_the_formulas_say(ranks2: Ranks, ranks4: Ranks, size: int) -> None:
    for rank, sent in enumerate((ranks2 if size == 2 else ranks4).run(counted)):
        assert sent == {name: traffic.formula(recipe(name, size), rank) for name in CASES}


def test_formulas_of_a_ring_by_hand() -> None:
    """Two ranks of four tokens, one head of width 3: 24 numbers on each of three ways."""
    small = {"pattern": "*", "hidden": 3, "heads": 1, "vocab": 2}
    train = TrainConfig(micro_batch=1, seq_len=8)
    one = Recipe(model=ModelConfig(**small), parallel=ParallelConfig(cp=2), train=train)
    # keys and values are sent once forward and once backward, their gradients twice, to their owner
    assert traffic.formula(one, rank=0) == 4 * 24 * (1 + 1 + 2)
