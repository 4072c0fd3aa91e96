"""Rules on Mamba's and DeltaNet's heads."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW, Rules, choice, divisors
from colonnade.launcher.recipe.tables import Recipe

RULES = Rules()


@RULES.add(*ROW, "model.hidden", "model.mamba_heads", "model.mamba_head_dim")
def mamba_groups(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The number of Mamba-2 heads is whole, and its groups are equal."""
    m = r.model
    if not m.has("M"):
        return
    if m.mamba_heads is None and 2 * m.hidden % m.mamba_head_dim:
        options = choice(divisors(2 * m.hidden), m.mamba_head_dim)
        remedy = f"2 * model.hidden = {2 * m.hidden} is no multiple of it; set it to {options}, "
        yield Fault("model.mamba_head_dim", m.mamba_head_dim, remedy + "or set model.mamba_heads")
        return
    heads = m.mamba_heads or 2 * m.hidden // m.mamba_head_dim
    if heads % m.mamba_groups:
        options = choice(divisors(heads), m.mamba_groups)
        remedy = f"{heads} Mamba heads do not divide into them; set model.mamba_groups to {options}"
        yield Fault("model.mamba_groups", m.mamba_groups, remedy)


@RULES.add(*ROW, "model.hidden", "model.delta_heads", "model.delta_key_dim")
def delta_heads(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The number of DeltaNet heads is whole, and every key head serves as many of them."""
    m = r.model
    if not m.has("D", "G"):
        return
    if m.delta_heads is None and m.hidden % m.delta_key_dim:
        options = choice(divisors(m.hidden), m.delta_key_dim)
        remedy = f"model.hidden = {m.hidden} is no multiple of it; set it to {options}, "
        yield Fault("model.delta_key_dim", m.delta_key_dim, remedy + "or set model.delta_heads")
        return
    heads = m.delta_heads or m.hidden // m.delta_key_dim
    if m.delta_key_heads and heads % m.delta_key_heads:
        options = choice(divisors(heads), m.delta_key_heads)
        remedy = f"{heads} DeltaNet heads are no multiple of it; set model.delta_key_heads to "
        yield Fault("model.delta_key_heads", m.delta_key_heads, remedy + options)
