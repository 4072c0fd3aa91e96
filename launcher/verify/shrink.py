"""A recipe at test size, and what it becomes under a layout."""

import math
from collections.abc import Iterable
from typing import TypeVar

from pydantic import BaseModel

from colonnade.launcher.recipe.rules.context import convolution_reach
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig
from colonnade.launcher.recipe.unused import explicit_fields, unused_setting
from colonnade.launcher.verify.layouts import Layout, data_ranks, laid_out
from colonnade.launcher.verify.narrow import narrow_model

STEPS = 3
ROW, SEGMENT = 16, 4  # tokens, at least
ACCUMULATED = 2  # micro-batches of a rank in a step
RATE, CLIP = 1e-2, 0.5  # every step is clipped
# Adam divides by √v + eps: an element whose gradient is rounding noise would else move by the whole
# learning rate, in a direction that the noise decides.
EPS = 1e-3

AnyTable = TypeVar("AnyTable", bound=BaseModel)


def shrink(recipe: Recipe, ranks: int, layouts: Iterable[Layout]) -> Recipe:
    """The recipe at test size, for any of these layouts of `ranks`.

    Counts (heads, groups, experts, choices) stay, and a width is divisible by a divisor of `ranks`
    where the large one is, so that a layout fits the small model if and only if it fits the large
    one; a row has tokens for every rank, and for what convolutions read of the segment before.
    `on_layout` puts it on one of them, `alone` in one process.
    """
    laid = [laid_out(recipe, layout) for layout in layouts]
    sharers = math.lcm(*(ranks // data_ranks(r, ranks) for r in laid))
    samples = recipe.model.balance_samples
    rows = ACCUMULATED * samples * math.lcm(*(data_ranks(r, ranks) for r in laid))
    train: dict[str, object] = {
        "steps": STEPS,
        "global_batch": rows,
        "micro_batch": rows,
        "loss_chunk": 17,
    }
    cut = max((2 * r.parallel.cp for r in laid if r.parallel.cp > 1), default=0)
    tokens = max(ROW, cut * max([SEGMENT, *convolution_reach(recipe).values()]))
    train |= {"seq_len": -(-tokens // (2 * sharers)) * 2 * sharers, "sample": 0}
    own = recipe.optimizer
    steady = {
        "schedule": "constant",
        "lr": RATE,
        "eps": max(EPS, own.eps),
        "clip": min(CLIP, own.clip),
    }
    tables = {
        "model": narrow_model(recipe.model, ranks),
        "optimizer": changed(own, steady, out=("warmup", "decay", "min_lr")),
        "data": DataConfig(sources=(SourceConfig(format="tokens", path="none"),)),
        "train": changed(recipe.train, train, out=("ramp_batch", "ramp_steps")),
    }
    return effective(recipe.model_copy(update=tables))


def on_layout(small: Recipe, ranks: int, layout: Layout, precision: str) -> Recipe:
    """A shrunk recipe on one of the layouts it was made for, with accumulation."""
    laid = laid_out(small, layout)
    rows = small.train.global_batch // (ACCUMULATED * data_ranks(laid, ranks))
    train = small.train.model_copy(update={"micro_batch": rows, "precision": precision})
    return laid.model_copy(update={"train": train})


def alone(small: Recipe) -> Recipe:
    """A shrunk recipe in one process, in fp64, every step in one piece and as plain as can be."""
    plain = {"precision": "fp64", "recompute": "none", "compile": False}
    train = small.train.model_copy(update=plain)
    return laid_out(small, {}).model_copy(update={"train": train})


def changed(table: AnyTable, update: dict[str, object], out: Iterable[str] = ()) -> AnyTable:
    """A table with some fields changed, and others as if they had not been given."""
    values = {name: getattr(table, name) for name in table.model_fields_set}
    return type(table).model_validate(
        {name: value for name, value in (values | update).items() if name not in out}
    )


def effective(recipe: Recipe) -> Recipe:
    """The recipe without those given fields of the model that change nothing in it."""
    while idle := [
        f for f, _ in explicit_fields(recipe.model, "model.") if unused_setting(recipe, f)
    ]:
        model = recipe.model
        if base := {f.rpartition(".")[2] for f in idle if f.startswith("model.mup_base.")}:
            kept = {k: v for k, v in (model.mup_base or {}).items() if k not in base}
            model = changed(model, {"mup_base": kept})
        names = [f.removeprefix("model.") for f in idle]
        recipe = recipe.model_copy(update={"model": changed(model, {}, out=names)})
    return recipe
