"""Rules on degrees of parallelism and on batches."""

import math
from collections.abc import Iterable, Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import (
    ROW_FIELDS,
    Rules,
    divisors,
    nearest_multiples,
    nearest_values,
)
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.records import splits

RULES = Rules()


@RULES.add("parallel")
def ranks(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The product of the degrees is the number of ranks."""
    p = r.parallel
    if world_size is None or fits(r, world_size):
        return
    # Divide the ranks by tp, cp and pp first: the remaining ones are for data parallelism.
    remaining, groups = world_size, f"{world_size} ranks"
    inner: dict[str, int] = {}
    for name, degree in {"tp": p.tp, "cp": p.cp, "pp": p.pp}.items():
        if remaining % degree:
            options = nearest_values(divisors(remaining), degree)
            remedy = f"does not divide the {groups}; set parallel.{name} to {options}"
            yield Fault(f"parallel.{name}", degree, remedy)
            return
        if degree > 1:
            inner[name], remaining = degree, remaining // degree
            names = " x ".join(f"parallel.{n}" for n in inner)
            groups = f"{remaining} groups of {names} = {_product(inner.values())} ranks"
    pairs = ", ".join(f"({d}, {remaining // d})" for d in divisors(remaining)[:8])
    field, value, remedy = "parallel.dp_replicate", p.dp_replicate, f"does not divide the {groups}"
    if p.dp_shard is not None:
        field, value = "parallel.dp_shard", p.dp_shard
        degrees = {"dp_replicate": p.dp_replicate, "dp_shard": p.dp_shard, **inner}
        product = f"{_product(degrees.values())} = {math.prod(degrees.values())}"
        remedy = f"{' x '.join(degrees)} = {product}, but there are {world_size} ranks"
    remedy += f"; set (parallel.dp_replicate, parallel.dp_shard) to one of {pairs}"
    yield Fault(field, value, remedy)


def _product(degrees: Iterable[int]) -> str:
    """Writes a product, such as `2 x 4`."""
    return " x ".join(map(str, degrees))


@RULES.add(*ROW_FIELDS, "model", "parallel.tp", "parallel.etp")
def tensor_parallel(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Heads, groups, widths and vocabulary shard evenly over the tensor-parallel group; so do
    experts, unless parallel.etp is given."""
    tp = r.parallel.tp
    if tp == 1 or r.model.has_unknown_symbols:
        return
    all_splits = sorted(
        splits(r.model, experts=r.parallel.etp is None), key=lambda split: split.field
    )
    degrees = [d for d in divisors(r.model.vocab) if all(s.suits(d) for s in all_splits)]
    options = nearest_values(degrees, tp)
    fields_without_experts = {split.field for split in splits(r.model, experts=False)}
    # Several parameters may split by the same field: report each field once.
    for field, size in dict.fromkeys((s.field, s.units) for s in all_splits if not s.suits(tp)):
        remedy = f"does not divide {field} = {size}; set parallel.tp to {options}"
        if field not in fields_without_experts:
            remedy += ", or parallel.etp to 1"
        yield Fault("parallel.tp", tp, remedy)


def fits(r: Recipe, world_size: int) -> bool:
    """Whether the product of the degrees is the number of ranks."""
    return math.prod(r.parallel.degrees(world_size).values()) == world_size


def _batch_unit(r: Recipe, world_size: int | None) -> tuple[int, str]:
    """Returns the rows of one micro-batch on all data-parallel ranks, and the product in words.

    Those of one rank where the number of ranks is unknown or faulty, or may change.
    """
    micro = r.train.micro_batch
    if world_size is None or r.parallel.elastic or not fits(r, world_size):
        return micro, f"train.micro_batch = {micro}"
    degrees = r.parallel.degrees(world_size)
    dp = degrees["dp_replicate"] * degrees["dp_shard"]
    return micro * dp, f"train.micro_batch x data-parallel ranks = {micro} x {dp} = {micro * dp}"


@RULES.add("train.micro_batch", "parallel")
def batch(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A step is a whole number of micro-batches, the same on every data-parallel rank unless the
    job is elastic."""
    rows = r.train.global_batch
    unit, name = _batch_unit(r, world_size)
    if rows % unit:
        remedy = f"must be a multiple of {name}; set train.global_batch to "
        remedy += nearest_multiples(unit, rows)
        dp = unit // r.train.micro_batch
        if rows % dp == 0:
            options = nearest_values(divisors(rows // dp), r.train.micro_batch)
            remedy += f", or train.micro_batch to {options}"
        if unit > r.train.micro_batch and rows % r.train.micro_batch == 0:
            remedy += ", or parallel.elastic to true: ranks without rows then wait for the others"
        yield Fault("train.global_batch", rows, remedy)


@RULES.add("train.micro_batch", "train.global_batch", "train.ramp_steps", "parallel")
def ramp(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The batch grows from ramp_batch to global_batch in multiples of ramp_batch."""
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
        options = f"set it to {nearest_values(fit, t.ramp_batch)}" if fit else "leave the ramp out"
        remedy = f"must be a multiple of {name} that divides train.global_batch = {rows} and is "
        yield Fault("train.ramp_batch", t.ramp_batch, f"{remedy}smaller; {options}")


@RULES.add("train.steps", "train.ramp_batch")
def ramp_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The ramp ends within the run."""
    t = r.train
    if t.ramp_batch is not None and t.ramp_steps > t.steps:
        remedy = f"the run has train.steps = {t.steps}; set train.ramp_steps to at most that"
        yield Fault("train.ramp_steps", t.ramp_steps, remedy)
