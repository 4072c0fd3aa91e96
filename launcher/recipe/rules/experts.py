"""Rules on mixtures of experts: top-k, groups of experts, balance groups of samples."""

from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW_FIELDS, Rules, divisors, nearest_values
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.cards.mixture import in_balance_groups

RULES = Rules()


@RULES.add(*ROW_FIELDS, "model.experts")
def routing(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A token is routed to at most as many experts as there are."""
    m = r.model
    if m.has("E") and m.top_k > m.experts:
        remedy = f"there are model.experts = {m.experts}; set model.top_k to 1..{m.experts}"
        yield Fault("model.top_k", m.top_k, remedy)


@RULES.add(*ROW_FIELDS, "model.experts", "model.top_k", "model.router_score", "model.router_groups")
def expert_groups(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Groups of experts have equal sizes, and the chosen ones hold enough experts for top-k."""
    m, groups, top_groups = r.model, r.model.router_groups, r.model.router_top_groups
    if not m.has("E") or top_groups is None or groups == 1:
        return
    min_size = 2 if m.router_score == "sigmoid" else 1
    size, remainder = divmod(m.experts, groups)
    fitting = [d for d in divisors(m.experts) if m.experts // d >= min_size]
    options = nearest_values(fitting, groups)
    if remainder:
        remedy = f"model.experts = {m.experts} do not divide into them; set model.router_groups "
        yield Fault("model.router_groups", groups, f"{remedy}to {options}")
    elif size < min_size:
        remedy = "model.router_score = sigmoid ranks a group by its two best experts, and each has "
        yield Fault(
            "model.router_groups", groups, f"{remedy}1; set model.router_groups to {options}"
        )
    elif top_groups > groups:
        remedy = f"there are model.router_groups = {groups}; set model.router_top_groups to "
        yield Fault("model.router_top_groups", top_groups, f"{remedy}1..{groups}")
    elif top_groups * size < m.top_k <= m.experts:
        needed = -(-m.top_k // size)
        experts = f"{top_groups} x {size} = {top_groups * size}"
        remedy = f"they hold {experts} experts, and a token goes to "
        remedy += f"model.top_k = {m.top_k}; set model.router_top_groups to {needed}..{groups}"
        yield Fault("model.router_top_groups", top_groups, remedy)


@RULES.add(*ROW_FIELDS, "model.balance", "model.capacity", "train.micro_batch")
def balance_groups(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A micro-batch holds whole balance groups, so that losses do not depend on the layout."""
    m, micro = r.model, r.train.micro_batch
    if in_balance_groups(m) and micro % m.balance_samples:
        options = nearest_values(divisors(micro), m.balance_samples)
        remedy = f"a micro-batch of train.micro_batch = {micro} rows must hold whole balance groups"
        remedy += f"; set model.balance_samples to {options}"
        yield Fault("model.balance_samples", m.balance_samples, remedy)
