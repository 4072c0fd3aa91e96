"""Rules on sizes that follow from each other, as the cards of the sub-blocks have them."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules import attention
from colonnade.launcher.recipe.rules.base import Rules, choice, divisors
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import FACTS, FORMULAS, ModelConfig

RULES = Rules()


@RULES.add("model")
def whole_quotients(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A size that is a quotient by default is whole, or given."""
    m = r.model
    for field in indivisible(m):
        formula = FORMULAS[field]
        by, (product, divisor) = str(formula.by), parts(m, field)
        options = [d for d in divisors(product) if fits(r, by, d)]
        told = f"{formula.times} * " if formula.times > 1 else ""
        remedy = f"{told}model.{formula.of} = {product} is no multiple of it; set model.{field}"
        if options:
            remedy += f", or model.{by} to {choice(options, divisor)}"
        yield Fault(f"model.{by}", divisor, remedy)


@RULES.add("model")
def divisors_of_sizes(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A number of groups divides what is grouped."""
    m, broken = r.model, indivisible(r.model)
    for field, known in FACTS.items():
        of = known.divides
        if of is None or not m.given(field) or m.unused(field) or of in broken:
            continue
        value, whole = getattr(m, field), getattr(m, of)
        if whole % value:
            remedy = f"model.{of} = {whole} is no multiple of it; set model.{field} to "
            yield Fault(f"model.{field}", value, remedy + choice(divisors(whole), value))


def parts(m: ModelConfig, field: str) -> tuple[int, int]:
    """The product and the divisor whose quotient a field is by default."""
    found = FORMULAS[field].parts(dict(m))
    assert found is not None
    return found


def indivisible(m: ModelConfig) -> list[str]:
    """The fields that the model has, that were not given, and whose quotients are not whole."""
    return [
        field
        for field, formula in FORMULAS.items()
        if isinstance(formula.by, str) and not m.given(field) and not m.unused(field)
        if parts(m, field)[0] % parts(m, field)[1]
    ]


def fits(r: Recipe, field: str, value: int) -> bool:
    """Whether this value of a field of the model brings no fault on sizes that is not there now."""
    changed = r.model_copy(update={"model": r.model.changed(**{field: value})})
    return not indivisible(changed.model) and faulty(changed) <= faulty(r)


def faulty(r: Recipe) -> set[str]:
    """The fields with faults on sizes."""
    checks = (divisors_of_sizes, *(check for _, check in attention.RULES))
    return {fault.field for check in checks for fault in check(r, None)}
