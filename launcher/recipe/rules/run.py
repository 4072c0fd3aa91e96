"""Rules on the learning-rate schedule, the data and the text that is sampled."""

import difflib
from collections.abc import Iterable, Iterator

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.rules.base import ROW_FIELDS, Rules
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.vocabulary import BYTE_TOKENS, far_above
from colonnade.models.records import matches, records_of

RULES = Rules()


@RULES.add("train.steps", "optimizer.schedule", "optimizer.warmup", "optimizer.decay")
def schedule(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Warm-up and decay fit into the run."""
    o, steps = r.optimizer, r.train.steps
    wsd = o.schedule == "wsd"
    remaining, longest = steps - o.warmup, steps - 1 if wsd else steps
    if o.warmup > longest:
        remedy = f"the run has train.steps = {steps}; set optimizer.warmup to at most {longest}"
        yield Fault("optimizer.warmup", o.warmup, remedy)
    elif wsd and o.decay is None:
        remedy = f"schedule wsd needs its length; set optimizer.decay to 1..{remaining} steps"
        yield Fault("optimizer.decay", None, remedy)
    elif wsd and o.decay is not None and o.decay > remaining:
        remedy = f"warmup + decay = {o.warmup + o.decay} is more than train.steps = {steps}; "
        yield Fault("optimizer.decay", o.decay, f"{remedy}set optimizer.decay to 1..{remaining}")


@RULES.add("optimizer.lr", "optimizer.schedule")
def decayed_rate(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The learning rate at the end of the decay is at most the peak."""
    o = r.optimizer
    if o.schedule != "constant" and o.min_lr > o.lr:
        remedy = f"is above the peak optimizer.lr = {o.lr:g}; set optimizer.min_lr to 0..{o.lr:g}"
        yield Fault("optimizer.min_lr", o.min_lr, remedy)


@RULES.add("optimizer.name", "model.mup_base")
def mup_optimizer(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """muP's rules for learning rates hold for Adam alone."""
    if r.optimizer.name == "muon" and r.model.mup_base is not None:
        remedy = "model.mup_base transfers the learning rates of Adam, by rules that are not Muon's"
        yield Fault("optimizer.name", "muon", f"{remedy}; set it to adamw, or leave out mup_base")


@RULES.add("optimizer.name", "optimizer.offload")
def offloaded_optimizer(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """AdamW alone works element by element, wherever an element is."""
    if r.optimizer.offload != "none" and r.optimizer.name != "adamw":
        remedy = f"optimizer.name = {r.optimizer.name} all-gathers matrices on the device; set "
        yield Fault(
            "optimizer.offload", r.optimizer.offload, f"{remedy}optimizer.name to adamw, or offload"
            " to none",
        )  # fmt: skip


@RULES.add("train.freeze", *ROW_FIELDS)
def frozen(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every pattern matches something, and something is trained."""
    if not r.train.freeze or r.model.has_unknown_symbols:
        return
    records = records_of(r.model)
    for pattern in r.train.freeze:
        if not any(matches(name, [pattern]) for name in records):
            names = ", ".join(near_names(pattern, records))
            yield Fault("train.freeze", pattern, f"matches no parameter; names are like {names}")
    parameters = [name for name, record in records.items() if not record.state]
    if all(matches(name, r.train.freeze) for name in parameters):
        remedy = "matches all parameters, and nothing would be trained; leave one out"
        yield Fault("train.freeze", list(r.train.freeze), remedy)


def near_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns up to three names that are most like a pattern, or else the first three."""
    known = list(names)
    return difflib.get_close_matches(pattern, known, 3, 0.3) or known[:3]


@RULES.add()
def source_paths(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Every source but the standard library has a path."""
    kinds = {"hub": "the name of the data set", "tokens": "the path of the .bin file without .bin"}
    tables = ("sources", "validation_sources")
    named = [(f"data.{t}.{i}", s) for t in tables for i, s in enumerate(getattr(r.data, t))]
    for table, source in named:
        if source.format != "stdlib" and not source.path:
            field = f"{table}.path"
            wanted = kinds.get(source.format, "a file, a folder or a glob")
            remedy = f"format {source.format} reads from it; set {field} to {wanted}"
            yield Fault(field, source.path, remedy)


@RULES.add("model.vocab", "data.tokenizer", "data.sources")
def vocabulary(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """The embedding has a row for every byte token, and few more where bytes are the default."""
    if r.data.tokenizer_name == "bytes" and r.model.vocab < BYTE_TOKENS:
        size = BYTE_TOKENS
        remedy = f"the tokenizer `bytes` has {size} tokens; set model.vocab to at least that"
        yield Fault("model.vocab", r.model.vocab, remedy)
    by_default = r.data.tokenizer is None and r.data.tokenizer_name == "bytes"
    if by_default and far_above(r.model.vocab, BYTE_TOKENS):
        remedy = f"by default text is read as bytes, {BYTE_TOKENS} tokens, and model.vocab "
        remedy += f"= {r.model.vocab}; set data.tokenizer to a tokenizer.json, or to bytes if that "
        yield Fault("data.tokenizer", None, f"{remedy}is intended")


@RULES.add("data.sources")
def packing(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Best-fit packing needs the lengths of all documents, which a streamed source cannot give."""
    if r.data.packing == "whole" and any(source.stream for source in r.data.sources):
        remedy = "a stream's documents are not known before they are read; leave out stream, so "
        yield Fault(
            "data.packing", "whole", f"{remedy}that it is indexed, or set data.packing to stream"
        )


@RULES.add("data.tokenizer", "data.sources")
def sampling(r: Recipe, world_size: int | None) -> Iterator[Fault]:
    """Sampling text needs a tokenizer: token files do not record which one made them."""
    if r.train.sample and r.data.tokenizer_name is None:
        remedy = "text needs the tokenizer that made the tokens; set data.tokenizer to its "
        remedy += "tokenizer.json (or to bytes), or train.sample to 0"
        yield Fault("train.sample", r.train.sample, remedy)
