"""Rules on context parallelism and on sequence parallelism."""

import math
from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules, divisors, nearest_multiples, nearest_values
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import FACTS
from colonnade.models.parameters import Split
from colonnade.models.records import splits_of_mixers
from colonnade.parallel.config import ParallelConfig

RULES = Rules()


def length_multiple(p: ParallelConfig) -> int:
    """Returns the number that has to divide the length of every sequence."""
    return math.lcm(p.segments, p.cp * p.tp if p.sequence else 1)


@RULES.add("parallel.tp", "parallel.sequence", "parallel.cp", "parallel.zigzag")
def sequence_shards(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Context and sequence parallelism shard a sequence evenly."""
    p, length = r.parallel, r.train.seq_len
    if length % length_multiple(p) == 0:
        return
    tp_ranks = f"over parallel.tp = {p.tp} ranks"
    remedy = f"parallel.sequence shards it {tp_ranks}"
    if p.cp > 1:
        remedy = f"parallel.cp = {p.cp} ranks share it in {p.segments} segments"
        if p.sequence and p.tp > 1:
            remedy += f", and parallel.sequence shards each rank's tokens {tp_ranks}"
    remedy += f"; set it to {nearest_multiples(length_multiple(p), length)}"
    if length % p.segments == 0:
        remedy += ", or parallel.sequence to false"
    yield Fault("train.seq_len", length, remedy)


def convolution_reach(r: Recipe) -> dict[str, int]:
    """Returns how many earlier tokens each kind of causal convolution reads, by its field."""
    fields = (name for name, known in FACTS.items() if known.kind == "taps")
    used = [name for name in fields if r.model.unused(name) is None]
    return {f"model.{name}": getattr(r.model, name) - 1 for name in used}


@RULES.add("model", "parallel", "train.seq_len")
def convolutions(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A causal convolution reads tokens of its segment and the previous one, no earlier ones."""
    p, length = r.parallel, r.train.seq_len
    reach_of = {} if r.model.has_unknown_symbols else convolution_reach(r)
    if p.cp == 1 or not reach_of:
        return
    field = max(reach_of, key=lambda name: reach_of[name])
    reach = reach_of[field]
    if length // p.segments >= reach:
        return

    def is_valid_degree(cp: int) -> bool:
        q = p.model_copy(update={"cp": cp})
        return length % length_multiple(q) == 0 and (cp == 1 or length // q.segments >= reach)

    shortest = -(-reach * p.segments // length_multiple(p)) * length_multiple(p)
    remedy = f"{field} = {reach + 1} taps read {reach} tokens of the segment before, and one of "
    remedy += f"{p.segments} segments has {length // p.segments}; set train.seq_len to at least "
    remedy += f"{shortest}"
    if smaller := [cp for cp in divisors(p.cp)[:-1] if is_valid_degree(cp)]:
        remedy += f", or parallel.cp to at most {smaller[-1]}"
    yield Fault("train.seq_len", length, remedy)


def local_splits(r: Recipe, seam: str) -> list[Split]:
    """Returns the heads, groups and channels that one tensor-parallel rank holds, by field.

    They are those of the sub-blocks that mix along the sequence through `seam`. The list is empty
    where tp cannot shard them; the rule `tensor_parallel` reports that.
    """
    tp = r.parallel.tp
    mixer_splits = [] if r.model.has_unknown_symbols else list(splits_of_mixers(r.model, seam))
    if not all_suit(mixer_splits, tp):
        return []
    by_field = {split.field: split for split in mixer_splits}
    return [by_field[f]._replace(units=max(1, by_field[f].units // tp)) for f in sorted(by_field)]


def all_suit(heads: list[Split], ranks: int) -> bool:
    """Whether a group of so many ranks can exchange all these heads by all-to-all."""
    return all(split.suits(ranks) for split in heads)


def why_unsuited(r: Recipe, heads: list[Split], ranks: int) -> str:
    """Writes why a group of so many ranks cannot exchange these heads by all-to-all."""
    tp, reasons = r.parallel.tp, []
    for split in heads:
        if not split.suits(ranks):
            verb = "neither divides nor is a multiple of" if split.replicable else "does not divide"
            quotient = f" / parallel.tp = {split.units * tp} / {tp}" if tp > 1 else ""
            reasons.append(f"{verb} {split.field}{quotient} = {split.units}")
    return " and ".join(reasons)


def exchange_remedy(r: Recipe, heads: list[Split], world_size: int | None, setting: str) -> str:
    """Writes why the context group cannot exchange these heads, and which cp could.

    The caller completes the sentence with another value of `setting`, such as parallel.context.
    """
    p = r.parallel
    count = math.gcd(*(split.units for split in heads if not split.replicable))
    degrees = [d for d in divisors(count) if d > 1 and all_suit(heads, d)]
    if world_size is not None:
        degrees = [d for d in degrees if world_size // p.tp % d == 0]
    remedy = f"{why_unsuited(r, heads, p.cp)}, and {setting} exchanges heads; set "
    return remedy + (f"parallel.cp to {nearest_values(degrees, p.cp)}, or " if degrees else "")


def other_contexts(r: Recipe, heads: list[Split]) -> str:
    """Writes the other values of `parallel.context` that are valid with these heads.

    Adds the changes of other fields that they need.
    """
    p, possible = r.parallel, ["ring", "allgather"]
    for context in ("ulysses", "ring+ulysses"):
        q = p.model_copy(update={"context": context, "ulysses": None})
        degree = q.ulysses_degree(heads[0].units)
        if degree and all_suit(heads, degree):
            possible.append(context)
    words = " or ".join(context for context in possible if context != p.context)
    if p.ulysses and p.context == "ring+ulysses":
        words += " without parallel.ulysses"
    return words if p.zigzag else f"{words} with parallel.zigzag = true"


@RULES.add("model", "parallel")
def ulysses(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Ulysses all-to-all gives every rank of the context group equally many attention heads."""
    p = r.parallel
    if p.cp > 1 and p.context == "ulysses":
        heads = local_splits(r, "attend")
        if not all_suit(heads, p.cp):
            remedy = exchange_remedy(r, heads, world_size, "parallel.context = ulysses")
            remedy += f"parallel.context to {other_contexts(r, heads)}"
            yield Fault("parallel.cp", p.cp, remedy)


@RULES.add("model", "parallel")
def ulysses_in_ring(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """In ring+ulysses the Ulysses groups inside the ring have a degree that suits the heads."""
    p = r.parallel
    heads = local_splits(r, "attend") if p.cp > 1 and p.context == "ring+ulysses" else []
    if not heads:
        return
    proper = divisors(p.cp)[1:-1] or [p.cp]  # a prime cp leaves only Ulysses over all its ranks
    valid = [d for d in proper if all_suit(heads, d)]
    degree = p.ulysses_degree(heads[0].units)
    if degree in valid:
        return
    field, value = ("parallel.ulysses", p.ulysses) if p.ulysses else ("parallel.context", p.context)
    if p.ulysses and p.ulysses not in proper:
        reason = f"must divide parallel.cp = {p.cp} and be less"
    elif p.ulysses:
        reason = why_unsuited(r, heads, p.ulysses)
    else:
        tried = [degree] if degree else proper
        reason = f"a degree of {' or '.join(map(str, tried))} {why_unsuited(r, heads, tried[0])}"
    remedy = f"{reason}; set "
    if valid:
        remedy += f"parallel.ulysses to {nearest_values(valid, degree)}, or "
    yield Fault(field, value, f"{remedy}parallel.context to {other_contexts(r, heads)}")


@RULES.add("model", "parallel")
def recurrent_heads(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """All-to-all gives every rank of the context group equally many Mamba and DeltaNet heads."""
    p = r.parallel
    if p.cp > 1 and p.recurrence == "heads":
        heads = local_splits(r, "scan")
        if not all_suit(heads, p.cp):
            remedy = exchange_remedy(r, heads, world_size, "parallel.recurrence = heads")
            yield Fault("parallel.cp", p.cp, f"{remedy}parallel.recurrence to states")


@RULES.add("model", "parallel")
def equal_work(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Causal attention needs zigzag: with one segment per rank, later ranks have more work."""
    p = r.parallel
    if p.cp == 1 or p.zigzag or p.context == "ulysses" or not r.model.has("*"):
        return
    remedy = "ranks with later segments would have more work in attention; set it to true"
    if all_suit(local_splits(r, "attend"), p.cp):
        remedy += ", or parallel.context to ulysses"
    yield Fault("parallel.zigzag", False, remedy)
