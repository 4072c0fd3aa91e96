"""The one list of what is valid: rules across the fields of a recipe, checked on any machine.

Types and bounds of single fields stand with the fields (`launcher.recipe`), settings without
effect in `launcher.effects`; here stands what several fields, or the fields and the number of
ranks, must satisfy together.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from colonnade.launcher.corpus.tokenizer import ByteTokenizer
from colonnade.launcher.effects import given, involved, no_effect
from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe import Recipe
from colonnade.models.config import SYMBOLS


class Finding(NamedTuple):
    """A fault, and the fields it was concluded from."""

    fault: Fault
    involves: tuple[str, ...]


def validate(recipe: Recipe, world_size: int | None) -> list[Fault]:
    """All faults of a recipe on `world_size` ranks; None skips the rules about ranks.

    A field counts as set if it was given, so rebuild a recipe from another one with
    `model_copy` or `model_dump(exclude_unset=True)`.
    """
    return [finding.fault for finding in findings(recipe, world_size)]


def findings(recipe: Recipe, world_size: int | None) -> Iterator[Finding]:
    """As `validate`, each fault with the fields it involves."""
    for involves, check in RULES:
        for fault in check(recipe, world_size):
            yield Finding(fault, (*involves, fault.field))
    for field, value in given(recipe):
        if effect := no_effect(recipe, field):
            remedy = f"has no effect {effect.otherwise}; leave it out (in an override: {field}=)"
            yield Finding(Fault(field, value, remedy), (*involved(effect, field), field))


Rule = Callable[[Recipe, int | None], Iterator[Fault]]
RULES: list[tuple[tuple[str, ...], Rule]] = []


def rule(*involves: str) -> Callable[[Rule], Rule]:
    """Adds a rule to the list; it looks at the fields `involves` and at those it reports."""

    def register(check: Rule) -> Rule:
        RULES.append((involves, check))
        return check

    return register


def divisors(n: int) -> list[int]:
    """All divisors, in order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def choice(values: Iterable[int], near: int) -> str:
    """The up to six values nearest to a given one, in words."""
    nearest = sorted(sorted(set(values), key=lambda v: abs(v - near))[:6])
    return ("" if len(nearest) == 1 else "one of ") + ", ".join(map(str, nearest))


def multiples(unit: int, near: int) -> str:
    """The positive multiples on both sides of a value, in words."""
    below = near // unit * unit
    return " or ".join(str(v) for v in (below, below + unit) if v > 0)


@rule("model.pattern")
def symbols(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every symbol of the pattern is one we build."""
    pattern = r.model.pattern
    unknown = [f"`{s}` at position {i}" for i, s in enumerate(pattern, 1) if s not in SYMBOLS]
    if unknown:
        known = ", ".join(f"`{s}` {what}" for s, what in SYMBOLS.items())
        remedy = f"unknown symbol {', '.join(unknown)}; the symbols are {known}"
        yield Fault("model.pattern", pattern, remedy)


@rule("model.pattern", "model.heads", "model.kv_heads")
def grouped_queries(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every key-value head serves the same number of query heads."""
    m = r.model
    if m.has("*") and m.kv_heads and m.heads % m.kv_heads:
        options = choice(divisors(m.heads), m.kv_heads)
        remedy = f"model.heads = {m.heads} is no multiple of it; set model.kv_heads to {options}"
        yield Fault("model.kv_heads", m.kv_heads, remedy)


@rule("model.pattern", "model.hidden", "model.heads", "model.head_dim", "model.positions")
def head_width(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Heads divide the hidden width unless their width is given; rotation needs it even."""
    m = r.model
    if not m.has("*"):
        return
    if m.head_dim is None and m.hidden % m.heads:
        fit = [h for h in divisors(m.hidden) if m.positions == "none" or m.hidden // h % 2 == 0]
        kept = [h for h in fit if h % (m.kv_heads or 1) == 0]
        remedy = f"model.hidden = {m.hidden} is no multiple of it; set model.head_dim"
        if fit:
            remedy += f", or model.heads to {choice(kept or fit, m.heads)}"
        yield Fault("model.heads", m.heads, remedy)
        return
    width = m.head_dim or m.hidden // m.heads
    if m.positions == "rope" and width % 2:
        taken = "" if m.head_dim else f"hidden / heads = {width} is taken; "
        remedy = f"{taken}rope turns pairs of channels: set model.head_dim to "
        remedy += f"{multiples(2, width)}, or model.positions to none"
        yield Fault("model.head_dim", m.head_dim, remedy)


@rule("model.pattern", "model.hidden", "model.mamba_heads", "model.mamba_head_dim")
def mamba_groups(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The number of Mamba heads is whole, and its groups are equal."""
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


@rule("model.pattern", "model.experts")
def routing(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A token goes to no more experts than there are."""
    m = r.model
    if m.has("E") and m.top_k > m.experts:
        remedy = f"there are model.experts = {m.experts}; set model.top_k to 1..{m.experts}"
        yield Fault("model.top_k", m.top_k, remedy)


@rule("model.pattern", "model.balance", "train.micro_batch")
def balance_groups(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A micro-batch holds whole balance groups, so that the loss does not depend on the layout."""
    m, micro = r.model, r.train.micro_batch
    if m.has("E") and m.balance > 0 and micro % m.balance_samples:
        options = choice(divisors(micro), m.balance_samples)
        remedy = f"a micro-batch of train.micro_batch = {micro} rows must hold whole balance groups"
        remedy += f"; set model.balance_samples to {options}"
        yield Fault("model.balance_samples", m.balance_samples, remedy)


@rule("parallel")
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


@rule("train.micro_batch", "parallel")
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


@rule("train.micro_batch", "train.global_batch", "train.ramp_steps", "parallel")
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


@rule("train.steps", "train.ramp_batch")
def ramp_length(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The ramp ends within the run."""
    t = r.train
    if t.ramp_batch is not None and t.ramp_steps > t.steps:
        remedy = f"the run has train.steps = {t.steps}; set train.ramp_steps to at most that"
        yield Fault("train.ramp_steps", t.ramp_steps, remedy)


@rule("train.steps", "optimizer.schedule", "optimizer.warmup", "optimizer.decay")
def schedule(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Warm-up and decay fit into the run."""
    o, steps = r.optimizer, r.train.steps
    wsd = o.schedule == "wsd"
    left, room = steps - o.warmup, steps - 1 if wsd else steps
    if o.warmup > room:
        remedy = f"the run has train.steps = {steps}; set optimizer.warmup to at most {room}"
        yield Fault("optimizer.warmup", o.warmup, remedy)
    elif wsd and o.decay is None:
        remedy = f"schedule wsd needs its length; set optimizer.decay to 1..{left} steps"
        yield Fault("optimizer.decay", None, remedy)
    elif wsd and o.decay is not None and o.decay > left:
        remedy = f"warmup + decay = {o.warmup + o.decay} is more than train.steps = {steps}; "
        yield Fault("optimizer.decay", o.decay, f"{remedy}set optimizer.decay to 1..{left}")


@rule("optimizer.lr", "optimizer.schedule")
def decayed_rate(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The learning rate decays downwards."""
    o = r.optimizer
    if o.schedule != "constant" and o.min_lr > o.lr:
        remedy = f"is above the peak optimizer.lr = {o.lr:g}; set optimizer.min_lr to 0..{o.lr:g}"
        yield Fault("optimizer.min_lr", o.min_lr, remedy)


@rule()
def source_paths(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every source but the standard library says what to read."""
    what = {"hub": "the name of the data set", "tokens": "the path of the .bin file without .bin"}
    for index, source in enumerate(r.data.sources):
        if source.format != "stdlib" and not source.path:
            field = f"data.sources.{index}.path"
            give = what.get(source.format, "a file, a folder or a glob")
            remedy = f"format {source.format} reads from it; set {field} to {give}"
            yield Fault(field, source.path, remedy)


@rule("data.tokenizer", "data.sources")
def vocabulary(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The embedding has a row for every token the byte tokenizer makes."""
    if r.data.tokenizer_name == "bytes" and r.model.vocab < ByteTokenizer.size:
        size = ByteTokenizer.size
        remedy = f"the tokenizer `bytes` has {size} tokens; set model.vocab to at least that"
        yield Fault("model.vocab", r.model.vocab, remedy)


@rule("data.tokenizer", "data.sources")
def sampling(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """A sample can be turned into text. Tokens on disk do not say by what they were made."""
    if r.train.sample and r.data.tokenizer_name is None:
        remedy = "text needs the tokenizer that made the tokens; set data.tokenizer to its "
        remedy += "tokenizer.json (or to bytes), or train.sample to 0"
        yield Fault("train.sample", r.train.sample, remedy)
