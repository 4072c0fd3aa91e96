"""The data room: from a recipe's `[data]` to batches of rows.

    data = open_data(recipe)
    batch = data.train.batch([0, 1, 2, 3])   # by sample index

Text is tokenised once into Megatron's `.bin` / `.idx` (and a `.mask` of the tokens that carry a
loss) in a cache, then read from there; a source with `stream = true` is read while training.
"""

import dataclasses
from pathlib import Path

import numpy as np

from colonnade.launcher.corpus.cache import Summary, cached_tokens, tokenise
from colonnade.launcher.corpus.files import source_name, source_path
from colonnade.launcher.corpus.indexed import IndexedWriter, read_indexed
from colonnade.launcher.corpus.prefetch import Prefetcher
from colonnade.launcher.corpus.rows import (
    Batch,
    ChainedRows,
    IndexedRows,
    MixtureRows,
    Rows,
)
from colonnade.launcher.corpus.stream import StreamRows
from colonnade.launcher.corpus.tokenizer import Tokenizer, open_tokenizer, tokenizer_of
from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe import Recipe, SourceConfig

__all__ = [
    "Batch",
    "Data",
    "IndexedWriter",
    "Prefetcher",
    "Rows",
    "Summary",
    "Tokenizer",
    "data",
    "open_data",
    "open_tokenizer",
    "prepare_data",
    "read_indexed",
    "tokenise",
    "tokenizer_of",
]


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads; `validation` is None if nothing was held out."""

    train: Rows
    validation: Rows | None
    tokenizer: Tokenizer | None  # None where only tokens are read and nobody said what they mean


def data(
    source: str,
    destination: str | Path,
    *,
    format: str | None = None,
    tokenizer: str = "bytes",
    column: str = "text",
    prompt: str | None = None,
    eod: str | None = None,
    bos: str | None = None,
    special_tokens: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Tokenise text into `DESTINATION.bin` and `.idx`, and `.mask` where there is a prompt.

    Args:
        source: file, folder or glob; for `hub` the data set's name.
        format: `text`, `jsonl`, `parquet`, `hub` or `stdlib`; default: what the files are.
        tokenizer: `bytes`, or the path of a tokenizer.json or of the folder that holds it.
        column: the column that holds the text.
        prompt: a column put before the text, without loss.
        eod: the token that ends a document; default: what the tokenizer's files tell.
        bos: a token put before every document; default: none.
        special_tokens: whether the spelling of a special token in a text is that token.

    Raises:
        UserError: the source cannot be read or is empty, or the destination is there already.
    """
    fields: dict[str, object] = {"column": column, "prompt": prompt}
    if format is not None:
        fields["format"] = format
    if format != "stdlib":
        fields["path"] = source
    config = SourceConfig.model_validate(fields)
    loaded = open_tokenizer(tokenizer, eod, bos, special_tokens)
    return tokenise(config, Path(destination), loaded, overwrite)


def prepare_data(recipe: Recipe) -> None:
    """Tokenises what the cache lacks and finds any fault of the data, before ranks start."""
    open_data(recipe)


def open_data(recipe: Recipe) -> Data:
    """Opens the recipe's sources, tokenising into the cache what it lacks.

    Training rows are a mixture by weight, shuffled by train.seed (streams: in stream order).
    Validation rows are in file order, source after source; streams have none. UserError if a
    source cannot be read, is empty, or is too short for one row; RecipeError if model.vocab is
    smaller than the tokenizer.
    """
    tokenizer = tokenizer_of(recipe.data)
    if tokenizer is not None and tokenizer.size > recipe.model.vocab:
        remedy = f"data.tokenizer has {tokenizer.size} tokens: set model.vocab to that or more"
        raise RecipeError([Fault("model.vocab", recipe.model.vocab, remedy)])
    opened = [_open(recipe, i, tokenizer) for i in range(len(recipe.data.sources))]
    train = [rows for rows, _ in opened]
    validation = [rows for _, rows in opened if rows is not None]
    weights = [source.weight for source in recipe.data.sources]
    return Data(
        train[0] if len(train) == 1 else MixtureRows(train, weights),
        ChainedRows(validation) if validation else None,
        tokenizer,
    )


def _open(recipe: Recipe, index: int, tokenizer: Tokenizer | None) -> tuple[Rows, Rows | None]:
    """(training rows, validation rows) of one source."""
    source, S, vocab = recipe.data.sources[index], recipe.train.seq_len, recipe.model.vocab
    shuffle = (recipe.train.seed, index)
    if source.format == "tokens":
        return _open_tokens(recipe, source, shuffle)
    assert tokenizer is not None  # the default for text is `bytes`
    if source.stream and source.format != "stdlib":
        return StreamRows(source, tokenizer, S, vocab), None
    entry = cached_tokens(source, recipe.data, tokenizer)
    name = source_name(source)
    train, held_out = (
        dataclasses.replace(read_indexed(entry / part), name=name)
        for part in ("train", "validation")
    )
    rows = IndexedRows(train, S, vocab, shuffle=shuffle)
    if len(held_out.tokens) <= S:  # not one row
        return rows, None
    return rows, IndexedRows(held_out, S, vocab)


def _open_tokens(
    recipe: Recipe, source: SourceConfig, shuffle: tuple[int, int]
) -> tuple[Rows, Rows | None]:
    """The last share of the documents is held out, more if that is no row, none if too short."""
    tokens = read_indexed(source_path(source))
    S, vocab = recipe.train.seq_len, recipe.model.vocab
    total, starts = len(tokens.tokens), tokens.starts
    share = recipe.data.validation
    # The last document start that leaves validation its share and a row.
    by_share = int(len(starts) * (1 - share))
    by_row = int(np.searchsorted(starts, total - S - 1, "right")) - 1
    first = min(by_share, by_row)
    if share == 0 or first < 0 or starts[first] <= S:
        return IndexedRows(tokens, S, vocab, shuffle=shuffle), None
    split = int(starts[first])
    return (
        IndexedRows(tokens, S, vocab, (0, split), shuffle),
        IndexedRows(tokens, S, vocab, (split, total)),
    )
