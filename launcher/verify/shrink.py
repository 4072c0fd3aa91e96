"""Shrinks a recipe to test size, and puts the shrunk recipe under a case or in one process."""

import math
from collections.abc import Iterable, Sequence

from colonnade.launcher.recipe.rules.context import convolution_reach
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, changed
from colonnade.launcher.recipe.unused import without_unused
from colonnade.launcher.verify.cases import Case, rewired, with_case
from colonnade.launcher.verify.layouts import accumulated, data_ranks, with_layout
from colonnade.launcher.verify.narrow import narrow_model
from colonnade.models.config import ModelConfig
from colonnade.models.records import matches, records_of

STEPS = 3
ROW, SEGMENT = 16, 4  # tokens of a row and of a segment, at least
RATE, CLIP = 1e-2, 0.5  # the norm is small enough that every step is clipped
# Adam divides by √v + eps: with a small eps, an element whose gradient is rounding noise would move
# by the full learning rate, in a direction that depends on the noise.
EPS = 1e-3


def shrink(recipe: Recipe, ranks: int, cases: Iterable[Case], steps: int = STEPS) -> Recipe:
    """The recipe at test size, for any of these cases of `ranks`.

    Counts (heads, groups, experts, choices) stay. A narrow width is divisible by the same divisors
    of `ranks` as the full width, so that a layout fits the shrunk model if and only if it fits the
    full one. A row has tokens for every rank, and a segment has at least the tokens that a
    convolution of the next segment reads. `on_case` puts the shrunk recipe under one of the cases,
    `in_one_process` in one process.
    """
    recipes = [with_case(recipe, case) for case in cases]
    token_ranks = math.lcm(*(ranks // data_ranks(r, ranks) for r in recipes))
    stages = max(r.parallel.stage_count for r in recipes)
    samples = recipe.model.balance_samples
    rows = samples * math.lcm(*(data_ranks(r, ranks) * accumulated(r) for r in recipes))
    train: dict[str, object] = {
        "steps": steps,
        "global_batch": rows,
        "micro_batch": rows,
        "loss_chunk": 17,
    }
    # at most two segments per context rank: zigzag
    segments = max((2 * r.parallel.cp for r in recipes if r.parallel.cp > 1), default=0)
    tokens = max(ROW, segments * max([SEGMENT, *convolution_reach(recipe).values()]))
    multiple = 2 * token_ranks
    train |= {"seq_len": -(-tokens // multiple) * multiple, "sample": 0}
    optimizer = recipe.optimizer
    constant_rate = {
        "schedule": "constant",
        "lr": RATE,
        "eps": max(EPS, optimizer.eps),
        "clip": min(CLIP, optimizer.clip),
    }
    model = without_unused(narrow_model(recipe.model, ranks, stages))
    train |= {"freeze": frozen_in(model, recipe.train.freeze)} if recipe.train.freeze else {}
    tables = {
        "model": model,
        "optimizer": changed(optimizer, constant_rate, remove=("warmup", "decay", "min_lr")),
        "data": DataConfig(sources=(SourceConfig(format="tokens", path="none"),)),
        "train": changed(recipe.train, train, remove=("ramp_batch", "ramp_steps", "timeline")),
    }
    return recipe.model_copy(update=tables)


def frozen_in(model: ModelConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """Those patterns of frozen names that match something in a model of a shorter row; none where
    they match all of it."""
    names = records_of(model)
    if all(matches(name, patterns) for name in names):
        return ()
    return tuple(p for p in patterns if any(matches(name, [p]) for name in names))


def on_case(small: Recipe, ranks: int, case: Case, precision: str) -> Recipe:
    """A shrunk recipe under one of the cases for which it was made.

    Every rank accumulates the gradients of two micro-batches, or of as many as a pipeline needs.
    The row may be shorter than that for which sizes of stages were given: these are scaled.
    """
    placed = with_case(small, case)
    if sizes := placed.parallel.stages:
        scaled = {"stages": scaled_to(sizes, len(small.model.symbols))}
        placed = placed.model_copy(update={"parallel": placed.parallel.model_copy(update=scaled)})
    rows = small.train.global_batch // (accumulated(placed) * data_ranks(placed, ranks))
    train = placed.train.model_copy(update={"micro_batch": rows, "precision": precision})
    return placed.model_copy(update={"train": train})


def in_one_process(small: Recipe, residual: str | None = None) -> Recipe:
    """A shrunk recipe in one process in fp64, with this residual wiring or its own.

    Every step has one micro-batch; nothing is recomputed, compiled or offloaded.
    """
    plain = {"precision": "fp64", "recompute": "none", "compile": False}
    changes = {
        "train": changed(small.train, plain, remove=("offload_inputs",)),
        "optimizer": small.optimizer.model_copy(update={"offload": "none"}),
    }
    return rewired(with_layout(small, {}), residual).model_copy(update=changes)


def scaled_to(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Positive numbers of this total that are about in proportion to `sizes`."""
    numbers, remaining = [], total
    for position, size in enumerate(sizes):
        following = len(sizes) - position - 1
        share = round(remaining * size / sum(sizes[position:]))
        numbers.append(min(max(1, share), remaining - following))
        remaining -= numbers[-1]
    return tuple(numbers)
