"""Rules on one sequence across ranks."""

import math
from collections.abc import Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import Rules, choice, divisors, multiples
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import FACTS
from colonnade.models.parameters import Split
from colonnade.models.records import splits_of_mixers
from colonnade.parallel.config import ParallelConfig

RULES = Rules()


def unit(p: ParallelConfig) -> int:
    """What the length of every sequence is a multiple of."""
    return math.lcm(p.segments, p.cp * p.tp if p.sequence else 1)


@RULES.add("parallel.tp", "parallel.sequence", "parallel.cp", "parallel.zigzag")
def sequence_parts(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Ranks that share a sequence hold equal parts of it."""
    p, length = r.parallel, r.train.seq_len
    if length % unit(p) == 0:
        return
    over = f"over parallel.tp = {p.tp} ranks"
    remedy = f"parallel.sequence cuts it {over}"
    if p.cp > 1:
        remedy = f"parallel.cp = {p.cp} ranks share it in {p.segments} segments"
        if p.sequence and p.tp > 1:
            remedy += f", and parallel.sequence cuts each rank's part {over}"
    remedy += f"; set it to {multiples(unit(p), length)}"
    if length % p.segments == 0:
        remedy += ", or parallel.sequence to false"
    yield Fault("train.seq_len", length, remedy)


def reaches(r: Recipe) -> dict[str, int]:
    """How many earlier tokens each kind of causal convolution reads, by the field of its taps."""
    fields = (name for name, known in FACTS.items() if known.kind == "taps")
    used = [name for name in fields if r.model.unused(name) is None]
    return {f"model.{name}": getattr(r.model, name) - 1 for name in used}


@RULES.add("model", "parallel", "train.seq_len")
def convolutions(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A causal convolution reads no further than into the segment before."""
    p, length = r.parallel, r.train.seq_len
    reach = {} if r.model.unclear else reaches(r)
    if p.cp == 1 or not reach:
        return
    field = max(reach, key=lambda name: reach[name])
    least = reach[field]
    if length // p.segments >= least:
        return

    def enough(cp: int) -> bool:
        q = p.model_copy(update={"cp": cp})
        return length % unit(q) == 0 and (cp == 1 or length // q.segments >= least)

    shortest = -(-least * p.segments // unit(p)) * unit(p)
    remedy = f"{field} = {least + 1} taps read {least} tokens of the segment before, and one of "
    remedy += f"{p.segments} segments has {length // p.segments}; set train.seq_len to at least "
    remedy += f"{shortest}"
    if fewer := [cp for cp in divisors(p.cp)[:-1] if enough(cp)]:
        remedy += f", or parallel.cp to at most {fewer[-1]}"
    yield Fault("train.seq_len", length, remedy)


def of_one_rank(r: Recipe, seam: str) -> list[Split]:
    """Which heads, groups and channels of mixers one tensor-parallel rank has, and how many.

    Those of the sub-blocks that mix along the sequence through `seam`. None where the ranks of tp
    cannot share them, which is for another rule to say.
    """
    tp = r.parallel.tp
    there = [] if r.model.unclear else list(splits_of_mixers(r.model, seam))
    if not suit(there, tp):
        return []
    by_field = {split.field: split for split in there}
    return [by_field[f]._replace(pieces=max(1, by_field[f].pieces // tp)) for f in sorted(by_field)]


def suit(there: list[Split], ranks: int) -> bool:
    """Whether so many ranks can exchange all of these."""
    return all(split.suits(ranks) for split in there)


def unsuited(r: Recipe, there: list[Split], ranks: int) -> str:
    """Why so many ranks cannot exchange these."""
    tp, reasons = r.parallel.tp, []
    for split in there:
        if not split.suits(ranks):
            verb = "neither divides nor is a multiple of" if split.shared else "does not divide"
            whole = f" / parallel.tp = {split.pieces * tp} / {tp}" if tp > 1 else ""
            reasons.append(f"{verb} {split.field}{whole} = {split.pieces}")
    return " and ".join(reasons)


def cannot_exchange(r: Recipe, there: list[Split], world_size: int | None, setting: str) -> str:
    """Remedy up to the other settings: why all of cp cannot exchange these, and which could."""
    p = r.parallel
    pieces = math.gcd(*(split.pieces for split in there if not split.shared))
    degrees = [d for d in divisors(pieces) if d > 1 and suit(there, d)]
    if world_size is not None:
        degrees = [d for d in degrees if world_size // p.tp % d == 0]
    remedy = f"{unsuited(r, there, p.cp)}, and {setting} exchanges heads; set "
    return remedy + (f"parallel.cp to {choice(degrees, p.cp)}, or " if degrees else "")


def variants(r: Recipe, there: list[Split]) -> str:
    """The other values of `parallel.context` that these heads leave, and what goes with them."""
    p, possible = r.parallel, ["ring", "allgather"]
    for context in ("ulysses", "ring+ulysses"):
        q = p.model_copy(update={"context": context, "ulysses": None})
        degree = q.ulysses_degree(there[0].pieces)
        if degree and suit(there, degree):
            possible.append(context)
    words = " or ".join(context for context in possible if context != p.context)
    if p.ulysses and p.context == "ring+ulysses":
        words += " without parallel.ulysses"
    return words if p.zigzag else f"{words} with parallel.zigzag = true"


@RULES.add("model", "parallel")
def ulysses(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """All ranks that share a sequence get equal numbers of attention's heads."""
    p = r.parallel
    if p.cp > 1 and p.context == "ulysses":
        there = of_one_rank(r, "attend")
        if not suit(there, p.cp):
            remedy = cannot_exchange(r, there, world_size, "parallel.context = ulysses")
            remedy += f"parallel.context to {variants(r, there)}"
            yield Fault("parallel.cp", p.cp, remedy)


@RULES.add("model", "parallel")
def ulysses_in_ring(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Some of the ranks that share a sequence exchange heads; those are in a ring with others."""
    p = r.parallel
    there = of_one_rank(r, "attend") if p.cp > 1 and p.context == "ring+ulysses" else []
    if not there:
        return
    between = divisors(p.cp)[1:-1] or [p.cp]
    fit = [d for d in between if suit(there, d)]
    degree = p.ulysses_degree(there[0].pieces)
    if degree in fit:
        return
    field, value = ("parallel.ulysses", p.ulysses) if p.ulysses else ("parallel.context", p.context)
    if p.ulysses and p.ulysses not in between:
        why = f"must divide parallel.cp = {p.cp} and be less"
    elif p.ulysses:
        why = unsuited(r, there, p.ulysses)
    else:
        tried = [degree] if degree else between
        why = f"a degree of {' or '.join(map(str, tried))} {unsuited(r, there, tried[0])}"
    remedy = f"{why}; set "
    if fit:
        remedy += f"parallel.ulysses to {choice(fit, degree)}, or "
    yield Fault(field, value, f"{remedy}parallel.context to {variants(r, there)}")


@RULES.add("model", "parallel")
def recurrent_heads(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """All ranks that share a sequence get equal numbers of Mamba's and DeltaNet's heads."""
    p = r.parallel
    if p.cp > 1 and p.recurrence == "heads":
        there = of_one_rank(r, "scan")
        if not suit(there, p.cp):
            remedy = cannot_exchange(r, there, world_size, "parallel.recurrence = heads")
            yield Fault("parallel.cp", p.cp, f"{remedy}parallel.recurrence to states")


@RULES.add("model", "parallel")
def equal_work(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """One segment each is more work of causal attention for later ranks."""
    p = r.parallel
    if p.cp == 1 or p.zigzag or p.context == "ulysses" or not r.model.has("*"):
        return
    remedy = "ranks with later segments would have more work in attention; set it to true"
    if suit(of_one_rank(r, "attend"), p.cp):
        remedy += ", or parallel.context to ulysses"
    yield Fault("parallel.zigzag", False, remedy)
