"""Rules on sizes that are quotients or divisors of each other, as the sub-blocks' cards define."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules import attention
from colonnade.launcher.recipe.rules.base import Rules, divisors, nearest_values
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import FACTS, FORMULAS, ModelConfig

RULES = Rules()


@RULES.add("model")
def integer_quotients(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A size whose default is a quotient of other fields is an integer, or is given explicitly."""
    m = r.model
    for field in indivisible(m):
        formula = FORMULAS[field]
        by, (product, divisor) = str(formula.by), quotient_terms(m, field)
        options = [d for d in divisors(product) if is_valid_size(r, by, d)]
        factor = f"{formula.times} * " if formula.times > 1 else ""
        remedy = f"{factor}model.{formula.of} = {product} is no multiple of it; set model.{field}"
        if options:
            remedy += f", or model.{by} to {nearest_values(options, divisor)}"
        yield Fault(f"model.{by}", divisor, remedy)


@RULES.add("model")
def group_divisors(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A number of groups divides the number of heads or channels that are grouped."""
    m, broken = r.model, indivisible(r.model)
    for field, known in FACTS.items():
        of = known.divides
        if of is None or not m.is_explicit(field) or m.unused(field) or of in broken:
            continue
        value, total = getattr(m, field), getattr(m, of)
        if total % value:
            remedy = f"model.{of} = {total} is no multiple of it; set model.{field} to "
            yield Fault(f"model.{field}", value, remedy + nearest_values(divisors(total), value))


def quotient_terms(m: ModelConfig, field: str) -> tuple[int, int]:
    """Returns the product and the divisor whose quotient is the default of a field."""
    terms = FORMULAS[field].terms(dict(m))
    assert terms is not None
    return terms


def indivisible(m: ModelConfig) -> list[str]:
    """Returns the used fields that were not given and whose default quotient is no integer."""
    return [
        field
        for field, formula in FORMULAS.items()
        if isinstance(formula.by, str) and not m.is_explicit(field) and not m.unused(field)
        if quotient_terms(m, field)[0] % quotient_terms(m, field)[1]
    ]


def is_valid_size(r: Recipe, field: str, value: int) -> bool:
    """Whether setting a field of the model to this value adds no new fault on sizes."""
    changed = r.model_copy(update={"model": r.model.changed(**{field: value})})
    return not indivisible(changed.model) and faulty_sizes(changed) <= faulty_sizes(r)


def faulty_sizes(r: Recipe) -> set[str]:
    """Returns the fields that the rules on sizes and on attention report."""
    checks = (group_divisors, *(check for _, check in attention.RULES))
    return {fault.field for check in checks for fault in check(r, None)}
