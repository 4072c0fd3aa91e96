"""The records of all parameters of a model, by canonical name: sub-blocks, norms, embedding, head.

Imports no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from colonnade.models.parameters import ParameterSpec, Split, constant, normal

if TYPE_CHECKING:
    from colonnade.models.config import ModelConfig


def embedding(c: "ModelConfig") -> list[ParameterSpec]:
    """The records of the token embeddings, `[V, D]`, and of learned positions, `[N, D]`."""
    split = Split(0, c.vocab, "model.vocab")
    shape = c.vocab, c.hidden
    tokens = ParameterSpec("weight", shape, normal(c.init_std), "table", tp=split)
    if c.learned_positions is None:
        return [tokens]
    shape = c.learned_positions, c.hidden
    return [tokens, ParameterSpec("positions", shape, normal(c.init_std), "table")]


def head(c: "ModelConfig") -> list[ParameterSpec]:
    """The record of the vocabulary projection, `[V, D]`; none where it is tied to the embedding."""
    if c.tied:
        return []
    table = embedding(c)[0]
    return [replace(table, fill=normal(0.0 if c.zero_init else c.init_std), role="reads")]


def norm(c: "ModelConfig") -> list[ParameterSpec]:
    """The records of a norm of the stream: weight `[D]` and bias `[D]` where configured."""
    if not c.norm_weight:
        return []
    weight = ParameterSpec("weight", (c.hidden,), constant(c.first_norm))
    if c.norm_bias and c.norm in ("layer", "pre_rms"):
        return [weight, ParameterSpec("bias", (c.hidden,), constant(0.0))]
    return [weight]


def join(c: "ModelConfig") -> list[ParameterSpec]:
    """The two projections `[D, D]` whose sum is the input of an MTP module (`models.mtp`)."""
    shape = c.hidden, c.hidden
    return [ParameterSpec(n, shape, normal(c.init_std), "writes") for n in ("stream", "token")]


def writing_std(c: "ModelConfig", row: str) -> float:
    """The initial std of weights that write onto the stream: init_std / √(length of the row)."""
    return c.init_std * len(row) ** -0.5


def with_prefix(prefix: str, records: list[ParameterSpec]) -> Iterator[tuple[str, ParameterSpec]]:
    """Yields the records by canonical name, `prefix.name`."""
    return ((f"{prefix}.{record.name}", record) for record in records)


def row_records(
    c: "ModelConfig", prefix: str, symbols: str, distinct: int
) -> Iterator[tuple[str, ParameterSpec]]:
    """Yields the records of a row; only its first `distinct` sub-blocks have weights (WideNet)."""
    from colonnade.models.config import CARDS

    for t, symbol in enumerate(symbols[:distinct]):
        yield from with_prefix(
            f"{prefix}blocks.{t}", CARDS[symbol].records(c, writing_std(c, symbols))
        )
    for t, position in enumerate(c.norm_positions(symbols)):
        if position != "after":
            yield from with_prefix(f"{prefix}norms.{t}", norm(c))
        if position != "before":
            yield from with_prefix(f"{prefix}after.{t}", norm(c))
    yield from with_prefix(f"{prefix}final", norm(c))


def records_of(c: "ModelConfig") -> dict[str, ParameterSpec]:
    """Returns the record of every parameter and buffer of the model, by canonical name."""
    distinct = len(c.pattern) if c.share else len(c.symbols)
    records = dict(with_prefix("embedding", embedding(c)))
    records.update(row_records(c, "", c.symbols, distinct))
    records.update(with_prefix("head", head(c)))
    for depth in range(c.mtp):
        prefix = f"mtp.{depth}."
        for name in ("norm_stream", "norm_token"):
            records.update(with_prefix(prefix + name, norm(c)))
        records.update(with_prefix(f"{prefix}join", join(c)))
        records.update(row_records(c, prefix, c.mtp_pattern, len(c.mtp_pattern)))
    return records


def splits(c: "ModelConfig", experts: bool = True) -> set[Split]:
    """Returns every way in which tensor-parallel ranks shard parameters of the model.

    `experts`: including those of the weights of experts, where etp = tp.
    """
    records = [*embedding(c), *(r for card in c.sub_blocks() for r in card.parameters(c, 1.0))]
    all_splits = {record.split if experts else record.tp for record in records}
    return {split for split in all_splits if split is not None}


def splits_of_mixers(c: "ModelConfig", seam: str) -> set[Split]:
    """Returns those of the sub-blocks that mix along the sequence through this seam."""
    cards = [card for card in c.sub_blocks() if card.mixing and card.mixing.seam == seam]
    records = [record for card in cards for record in card.parameters(c, 1.0)]
    return {record.split for record in records if record.split is not None}


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a canonical name matches one of some patterns, such as a shell has: `blocks.3.*`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
