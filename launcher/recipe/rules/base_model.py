"""Rules on the base model from which muP transfers hyper-parameters (`model.mup_base`)."""

from collections.abc import Iterator

from pydantic import ValidationError

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules import attention, experts, row, sizes
from colonnade.launcher.recipe.rules.base import Rules
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import unused_setting
from colonnade.models.config import FACTS

RULES = Rules()

# Widths and numbers of heads that the base may change. Excluded are the sizes of keys and states,
# for which there is no muP rule in Mamba and DeltaNet, and the number of experts, which is not a
# width.
SIZES = [name for name, known in FACTS.items() if known.grows]


@RULES.add("model")
def base_sizes(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The base differs from the model only in sizes, and only in those that the model has."""
    m = r.model
    if m.mup_base == {}:
        remedy = "name the sizes in which the base differs, such as {hidden = 128}, or leave it out"
        yield Fault("model.mup_base", {}, remedy)
    for name, value in (m.mup_base or {}).items():
        field = f"model.mup_base.{name}"
        if name not in SIZES:
            remedy = f"a base differs in sizes alone; remove it, the sizes are {', '.join(SIZES)}"
            yield Fault(field, value, remedy)
        elif value < 1:
            yield Fault(field, value, "give a whole number of at least 1")
        elif FACTS[name].optional and not getattr(m, name) and not unused_setting(r, field):
            yield Fault(field, value, f"the model itself has none; set model.{name}, or remove it")


@RULES.add("model")
def base_model(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The base is a valid model by itself."""
    m = r.model
    if m.mup_base is None or next(base_sizes(r, None), None):
        return
    try:
        base = m.base()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]  # the others may only follow from the first
        name, reason = first["loc"][0], f"{first['input']!r}: {first['msg']}"
        remedy = f"the base must be a valid model, too; change model.mup_base.{name}, because in "
        yield Fault("model.mup_base", dict(m.mup_base), f"{remedy}the base model.{name} = {reason}")
        return
    assert base is not None
    # A fault that the model itself has is reported there, once.
    faulty_in_model = {fault.field for fault in model_faults(r)}
    for fault in model_faults(r.model_copy(update={"model": base})):
        if fault.field not in faulty_in_model:
            name = fault.field.rpartition(".")[2]
            known = name if name in SIZES else next(iter(m.mup_base or {}))
            remedy = f"the base must be a valid model, too; set model.mup_base.{known}, because in "
            yield Fault("model.mup_base", dict(m.mup_base or {}), f"{remedy}the base {fault}")


@RULES.add("model")
def mup_conflicts(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """No setting contradicts the scales that muP gives to weights and gradients."""
    m = r.model
    if m.mup_base is None:
        return
    if m.sigma_reparam:
        remedy = "holds the norm of every weight fixed, which model.mup_base scales; set "
        yield Fault(
            "model.sigma_reparam", True, f"{remedy}it to false, or leave model.mup_base out"
        )
    if not m.has("*") or m.attention != "gqa":
        return
    if m.mup_zero_init and m.qk_norm != "none":
        remedy = f"model.qk_norm = {m.qk_norm} blows up the gradient of queries that are zero; set "
        yield Fault("model.mup_zero_init", True, f"{remedy}one of them to false or none")
    if next(base_model(r, None), None) or next(base_sizes(r, None), None):
        return
    base = m.base()
    assert base is not None
    width, base_width = m.hidden // m.heads, base.hidden // base.heads
    if m.attention_gate == "head" and width != base_width:
        remedy = f"it reads slices of {width} channels, in the base of {base_width}, and muP has "
        remedy += "no rule for them; set model.attention_gate to channel, or model.mup_base.heads "
        yield Fault("model.attention_gate", "head", f"{remedy}so that they are equal")


def model_faults(r: Recipe) -> Iterator[Fault]:
    """Yields the faults that the rules on the model alone report."""
    for _, check in (*row.RULES, *attention.RULES, *sizes.RULES, *experts.RULES):
        yield from check(r, None)
