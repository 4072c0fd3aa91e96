"""Rules on mixtures of experts: top-k, groups of experts, balance groups, ranks of experts."""

import math
from collections.abc import Iterator
from fractions import Fraction

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW_FIELDS, Rules, divisors, nearest_values
from colonnade.launcher.recipe.rules.layout import fits
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


@RULES.add(*ROW_FIELDS, "model.top_k", "model.experts", "model.balance_samples", "train.seq_len")
def capacity(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """An expert has capacity for at least one token of a balance group, which else are all dropped.

    (`kernels.routing.capacity` rounds up, so that one token would stay.)
    """
    m = r.model
    if not m.has("E") or m.capacity is None:
        return
    share = Fraction(r.train.seq_len * m.balance_samples * m.top_k, m.experts)
    if Fraction(str(m.capacity)) * share < 1:
        least = math.ceil(1000 / share) / 1000
        remedy = (
            f"an expert's fair share of a balance group is {float(share):g} tokens, of which it "
        )
        remedy += f"would accept less than one; set model.capacity to at least {least:g}"
        yield Fault("model.capacity", m.capacity, remedy)


@RULES.add(*ROW_FIELDS, "model.experts")
def expert_shards(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Experts divide over the ranks of parallel.ep, and each one's width over those of etp."""
    m, p = r.model, r.parallel
    if not m.has("E", "T"):
        return
    if m.experts % p.ep:
        remedy = f"does not divide model.experts = {m.experts}; set parallel.ep to "
        yield Fault("parallel.ep", p.ep, remedy + nearest_values(divisors(m.experts), p.ep))
    if p.etp is not None and m.expert_ffn % p.etp:
        remedy = f"does not divide {m.source_of('expert_ffn')} = {m.expert_ffn}, the width of an "
        remedy += f"expert; set parallel.etp to {nearest_values(divisors(m.expert_ffn), p.etp)}"
        yield Fault("parallel.etp", p.etp, remedy)


@RULES.add(*ROW_FIELDS, "model.experts", "parallel")
def expert_ranks(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The axes ep and etp fold over the ranks of dp_shard, cp and tp."""
    m, p = r.model, r.parallel
    if world_size is None or not m.has("E", "T") or not fits(r, world_size) or not p.folds_experts:
        return
    dense, etp = p.degrees(world_size), p.etp or p.tp
    ranks = dense["dp_shard"] * dense["cp"] * dense["tp"]
    if ranks % (p.ep * etp) == 0:
        return
    names = f"parallel.dp_shard x cp x tp = {dense['dp_shard']} x {dense['cp']} x {dense['tp']}"
    field, value, remedy = "parallel.ep", p.ep, f"ep x etp = {p.ep} x {etp} does not divide {names}"
    if ranks % etp:
        options = [
            d
            for d in divisors(ranks)
            if m.expert_ffn % d == 0 and (ranks % p.ep or ranks // p.ep % d == 0)
        ]
        field, value, remedy = "parallel.etp", etp, f"does not divide {names}"
    else:
        options = [d for d in divisors(ranks // etp) if m.experts % d == 0]
    remedy += f" = {ranks}; set {field} to {nearest_values(options, value)}"
    if p.etp is None and p.tp > 1 and field == "parallel.ep" and ranks % p.ep == 0:
        remedy += ", or parallel.etp to 1"
    yield Fault(field, value, remedy)
