"""Rules on ranks and batches."""

import math
from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe import Recipe
from colonnade.launcher.rules.base import Rules, choice, divisors, multiples

RULES = Rules()


@RULES.add("parallel")
def ranks(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The degrees multiply to the number of ranks."""
    p = r.parallel
    if world_size is None or _fits(r, world_size):
        return
    pairs = ", ".join(f"({d}, {world_size // d})" for d in divisors(world_size)[:8])
    remedy = f"does not divide the {world_size} ranks"
    field, value = "parallel.dp_replicate", p.dp_replicate
    if p.dp_shard is not None:
        field, value = "parallel.dp_shard", p.dp_shard
        product = f"{p.dp_replicate} x {p.dp_shard} = {p.dp_replicate * p.dp_shard}"
        remedy = f"dp_replicate x dp_shard = {product}, but there are {world_size} ranks"
    remedy += f"; set (parallel.dp_replicate, parallel.dp_shard) to one of {pairs}"
    yield Fault(field, value, remedy)


def _fits(r: Recipe, world_size: int) -> bool:
    return math.prod(r.parallel.degrees(world_size).values()) == world_size


def _batch_unit(r: Recipe, world_size: int | None) -> tuple[int, str]:
    """Rows that all data-parallel ranks take in one forward pass, and what they are called."""
    micro = r.train.micro_batch
    if world_size is None or not _fits(r, world_size):
        return micro, f"train.micro_batch = {micro}"
    degrees = r.parallel.degrees(world_size)
    dp = degrees["dp_replicate"] * degrees["dp_shard"]
    return micro * dp, f"train.micro_batch x data-parallel ranks = {micro} x {dp} = {micro * dp}"


@RULES.add("train.micro_batch", "parallel")
def batch(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A step is a whole number of micro-batches on every data-parallel rank."""
    rows = r.train.global_batch
    unit, name = _batch_unit(r, world_size)
    if rows % unit:
        remedy = f"must be a multiple of {name}; set train.global_batch to {multiples(unit, rows)}"
        dp = unit // r.train.micro_batch
        if rows % dp == 0:
            options = choice(divisors(rows // dp), r.train.micro_batch)
            remedy += f", or train.micro_batch to {options}"
        yield Fault("train.global_batch", rows, remedy)


@RULES.add("train.micro_batch", "train.global_batch", "train.ramp_steps", "parallel")
def ramp(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The batch grows from ramp_batch in whole units of it."""
    t = r.train
    if t.ramp_batch is None:
        if t.ramp_steps:
            remedy = "a ramp needs its first batch; set train.ramp_batch, or train.ramp_steps to 0"
            yield Fault("train.ramp_batch", None, remedy)
        return
    if not t.ramp_steps:
        remedy = "a ramp needs its length; set train.ramp_steps, or leave train.ramp_batch out"
        yield Fault("train.ramp_steps", t.ramp_steps, remedy)
    unit, name = _batch_unit(r, world_size)
    rows = t.global_batch
    if t.ramp_batch >= rows or rows % t.ramp_batch or t.ramp_batch % unit:
        fit = [b for b in divisors(rows) if b % unit == 0 and b < rows]
        options = f"set it to {choice(fit, t.ramp_batch)}" if fit else "leave the ramp out"
        remedy = f"must be a multiple of {name} that divides train.global_batch = {rows} and is "
        yield Fault("train.ramp_batch", t.ramp_batch, f"{remedy}smaller; {options}")


@RULES.add("train.steps", "train.ramp_batch")
def ramp_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The ramp ends within the run."""
    t = r.train
    if t.ramp_batch is not None and t.ramp_steps > t.steps:
        remedy = f"the run has train.steps = {t.steps}; set train.ramp_steps to at most that"
        yield Fault("train.ramp_steps", t.ramp_steps, remedy)
