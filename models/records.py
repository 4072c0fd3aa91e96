"""The parameters of a whole model, by canonical name, without torch: sub-blocks, norms and ends."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from colonnade.models.parameters import ParameterSpec, Split, constant, normal

if TYPE_CHECKING:
    from colonnade.models.config import ModelConfig


def embedding(c: "ModelConfig") -> list[ParameterSpec]:
    """Token embeddings, `[V, D]`."""
    split = Split(0, c.vocab, "model.vocab")
    shape = c.vocab, c.hidden
    return [ParameterSpec("weight", shape, normal(c.init_std), "table", tp=split)]


def head(c: "ModelConfig") -> list[ParameterSpec]:
    """The vocabulary projection, `[V, D]`; tied, it has no weight of its own."""
    if c.tied:
        return []
    (table,) = embedding(c)
    return [replace(table, fill=normal(0.0 if c.zero_init else c.init_std), role="reads")]


def norm(c: "ModelConfig") -> list[ParameterSpec]:
    """A norm of the stream, `[D]`, and its bias where there is one."""
    weight = ParameterSpec("weight", (c.hidden,), constant(c.first_norm))
    if c.norm_bias and c.norm in ("layer", "pre_rms"):
        return [weight, ParameterSpec("bias", (c.hidden,), constant(0.0))]
    return [weight]


def join(c: "ModelConfig") -> list[ParameterSpec]:
    """What makes one stream of two before a further token is predicted (`models.mtp`)."""
    shape = c.hidden, c.hidden
    return [ParameterSpec(n, shape, normal(c.init_std), "writes") for n in ("stream", "token")]


def writing_std(c: "ModelConfig", row: str) -> float:
    """Of first weights that write onto the stream of a row: one residual add per sub-block."""
    return c.init_std * len(row) ** -0.5


def named(prefix: str, records: list[ParameterSpec]) -> Iterator[tuple[str, ParameterSpec]]:
    """The records by full name."""
    return ((f"{prefix}.{record.name}", record) for record in records)


def row(
    c: "ModelConfig", prefix: str, symbols: str, distinct: int
) -> Iterator[tuple[str, ParameterSpec]]:
    """Sub-blocks and norms of a row, of which the first `distinct` sub-blocks have weights."""
    from colonnade.models.config import CARDS

    for t, symbol in enumerate(symbols[:distinct]):
        yield from named(f"{prefix}blocks.{t}", CARDS[symbol].records(c, writing_std(c, symbols)))
    for t in range(len(symbols)):
        if c.norm_position != "after":
            yield from named(f"{prefix}norms.{t}", norm(c))
        if c.norm_position != "before":
            yield from named(f"{prefix}after.{t}", norm(c))
    yield from named(f"{prefix}final", norm(c))


def records_of(c: "ModelConfig") -> dict[str, ParameterSpec]:
    """Every parameter and buffer of the model, by canonical name."""
    distinct = len(c.pattern) if c.share else len(c.symbols)
    records = dict(named("embedding", embedding(c)))
    records.update(row(c, "", c.symbols, distinct))
    records.update(named("head", head(c)))
    for depth in range(c.mtp):
        prefix = f"mtp.{depth}."
        for name in ("norm_stream", "norm_token"):
            records.update(named(prefix + name, norm(c)))
        records.update(named(f"{prefix}join", join(c)))
        records.update(row(c, prefix, c.mtp_pattern, len(c.mtp_pattern)))
    return records


def splits(c: "ModelConfig") -> set[Split]:
    """Along what, and in how many pieces, ranks may share the parameters of a model."""
    records = [*embedding(c), *(r for card in c.sub_blocks() for r in card.parameters(c, 1.0))]
    return {record.split for record in records if record.split is not None}


def splits_of_mixers(c: "ModelConfig", seam: str) -> set[Split]:
    """Those of the sub-blocks that mix along the sequence through this seam."""
    cards = [card for card in c.sub_blocks() if card.mixing and card.mixing.seam == seam]
    records = [record for card in cards for record in card.parameters(c, 1.0)]
    return {record.split for record in records if record.split is not None}
