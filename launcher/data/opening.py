"""Opens the data that a recipe's `[data]` names as rows to train and validate on; checks them."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from colonnade.launcher.data.cache import cached_tokens
from colonnade.launcher.data.files import (
    is_absent,
    resolve_format,
    source_files,
    source_name,
    source_path,
)
from colonnade.launcher.data.indexed import read_indexed
from colonnade.launcher.data.packing import PackedRows
from colonnade.launcher.data.record import TokenFileRecord
from colonnade.launcher.data.rows import (
    ChainedRows,
    IndexedRows,
    MixtureRows,
    Rows,
    Tokens,
    beyond_tokenizer_message,
    sampled_blocks,
)
from colonnade.launcher.data.sources import read_documents
from colonnade.launcher.data.stream import StreamRows
from colonnade.launcher.data.tokenizer import Tokenizer, tokenizer_of
from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.stages import TrainingStage, stages_from, training_stages
from colonnade.launcher.recipe.tables import Recipe, SourceConfig, StageConfig
from colonnade.launcher.recipe.vocabulary import far_above

Shuffle = tuple[int, ...]  # by which the order of rows is keyed


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows and tokenizer of a run; `validation` is None if no documents are held out."""

    train: Rows
    validation: Rows | None
    tokenizer: Tokenizer | None  # None if all sources are tokens and data.tokenizer is not set


def prepare_data(recipe: Recipe, step: int = 0) -> None:
    """Tokenises the sources that the cache lacks, before ranks start: of all training stages that a
    run which is at `step` has before it.

    Raises as `open_data`, and of stages that have not begun as `check_length`.

    It also hashes the files that are read, which ranks then need not do again. One process of every
    host must call it. Several may at the same time: one of them tokenises.
    """
    for stage in stages_from(training_stages(recipe), step):
        data = open_data(stage.recipe, stage.order)
        if recipe.stage and (stage.first >= step):
            check_length(stage, recipe.stage[stage.index], data.train)


def check_length(stage: TrainingStage, table: StageConfig, rows: Rows) -> None:
    """Raises UserError if a training stage reads a row more often than its table allows."""
    batch = stage.recipe.train.global_batch
    used = rows.epochs(stage.samples + stage.steps * batch)
    if used <= table.epochs + 1e-9:
        return
    longest = int(stage.steps * table.epochs / used) if not stage.samples else 0
    shorter = f"set stage.{stage.index}.steps to at most {longest}, " if longest else ""
    raise RecipeError(
        [
            Fault(
                f"stage.{stage.index}." + ("steps" if table.steps else "tokens"),
                table.steps or table.tokens,
                f"would read rows of its data up to {used:.2f} times, and stage.{stage.index}"
                f".epochs = {table.epochs:g} allows no more: {shorter}give more data, or set "
                f"stage.{stage.index}.epochs = {math.ceil(used)}",
            )
        ]
    )


def check_data(recipe: Recipe) -> list[str]:
    """Checks data, tokenizer and vocabulary, tokenising nothing; returns a line on each source of
    all training stages.

    Reads the first document of every source of text, and the index and samples of token files, but
    opens no data set of the hub. A tokenizer or source that is not on this machine is reported and
    not checked, since the recipe may be for another machine. Raises as `open_data`.
    """
    name = recipe.data.tokenizer_name
    if name not in (None, "bytes") and not Path(str(name)).expanduser().exists():
        return [f"tokenizer {name!r} is not on this machine: neither it nor the data are checked"]
    lines = (line for stage in training_stages(recipe) for line in _checked_sources(stage.recipe))
    return list(dict.fromkeys(lines))


def _checked_sources(recipe: Recipe) -> Iterator[str]:
    """Checks the sources of one training stage, and yields a line on each."""
    tokenizer = _tokenizer(recipe)
    for source in recipe.data.all_sources:
        if is_absent(source):
            yield f"{source_name(source)} is not on this machine: not checked"
        elif source.format == "tokens":
            yield _open_tokens(recipe, source, None, tokenizer)[0].describe()
        elif source.format == "hub":
            yield f"{source_name(source)}: read from the hub when the run starts"
        else:
            source = resolve_format(source)
            files = source_files(source)
            size = sum(file.stat().st_size for file in files)
            yield f"{source_name(source)}: {len(files):,} files, {size:,} bytes"
            if next(read_documents(source), None) is None:
                raise UserError(
                    f"data.sources: {source_name(source)} is an empty corpus: give a source that "
                    "holds text"
                )


def open_data(recipe: Recipe, order: int = 0) -> Data:
    """Opens the recipe's sources, and tokenises into the cache those that it lacks.

    Training rows are a mixture by weight, shuffled by train.seed and `order` (streams: in stream
    order), which is that of the training stage: a later one that reads the same data reads them in
    another order. Validation rows are in file order, source after source; streams have none. They
    are those held out, or of `data.validation_sources`. Raises UserError if a
    source cannot be read, is empty, or is too short for one row; RecipeError if model.vocab is
    smaller than the tokenizer. Token files that do not match the record beside them are refused; of
    the cache they are written again.
    """
    tokenizer, seed = _tokenizer(recipe), recipe.train.seed
    opened = [
        _open(recipe, source, (seed, index, *([order] if order else [])), tokenizer)
        for index, source in enumerate(recipe.data.sources)
    ]
    train = [rows for rows, _ in opened]
    validation = [rows for _, rows in opened if rows is not None]
    validation += [_open_whole(recipe, s, tokenizer) for s in recipe.data.validation_sources]
    weights = [source.weight for source in recipe.data.sources]
    return Data(
        train[0] if len(train) == 1 else MixtureRows(train, weights),
        ChainedRows(validation) if validation else None,
        tokenizer,
    )


def _tokenizer(recipe: Recipe) -> Tokenizer | None:
    """Opens the recipe's tokenizer; raises RecipeError if model.vocab is too small for it."""
    tokenizer = tokenizer_of(recipe.data)
    if tokenizer is not None and tokenizer.size > recipe.model.vocab:
        remedy = f"data.tokenizer has {tokenizer.size} tokens: set model.vocab to that or more"
        raise RecipeError([Fault("model.vocab", recipe.model.vocab, remedy)])
    return tokenizer


def _open(
    recipe: Recipe, source: SourceConfig, shuffle: Shuffle, tokenizer: Tokenizer | None
) -> tuple[Rows, Rows | None]:
    """Opens one source: (training rows, validation rows or None)."""
    S, vocab = recipe.train.seq_len, recipe.model.vocab
    if source.format == "tokens":
        return _open_tokens(recipe, source, shuffle, tokenizer, verify=True)
    assert tokenizer is not None  # the default for text is `bytes`
    if source.stream and source.format != "stdlib":
        return StreamRows(source, tokenizer, S, vocab), None
    train, held_out = _tokens_of_text(recipe, source, recipe.data.held_out, tokenizer)
    rows_class = _rows_class(recipe)
    rows = rows_class(train, S, vocab, shuffle=shuffle)
    if len(held_out.tokens) <= S:  # too short for one row
        return rows, None
    return rows, rows_class(held_out, S, vocab)


def _open_whole(recipe: Recipe, source: SourceConfig, tokenizer: Tokenizer | None) -> Rows:
    """Opens all documents of a source to validate on, in file order."""
    S, vocab = recipe.train.seq_len, recipe.model.vocab
    size = None if tokenizer is None else tokenizer.size
    if source.format == "tokens":
        tokens = read_indexed(source_path(source), verify=True)
        check_tokens(recipe, tokens, tokenizer)
    else:
        assert tokenizer is not None  # the default for text is `bytes`
        tokens, _ = _tokens_of_text(recipe, source, 0.0, tokenizer)
    return _rows_class(recipe)(tokens, S, vocab, tokenizer_size=size)


def _tokens_of_text(
    recipe: Recipe, source: SourceConfig, share: float, tokenizer: Tokenizer
) -> tuple[Tokens, Tokens]:
    """Returns the tokens of a source of text, of which a share of the documents is held out."""
    data = recipe.data.model_copy(update={"validation": share})
    train, held_out = (
        dataclasses.replace(tokens, name=source_name(source))
        for tokens in cached_tokens(source, data, tokenizer)
    )
    return train, held_out


def _rows_class(recipe: Recipe) -> type[IndexedRows]:
    """Returns the class of rows that `data.packing` selects."""
    return PackedRows if recipe.data.packing == "whole" else IndexedRows


def _open_tokens(
    recipe: Recipe,
    source: SourceConfig,
    shuffle: Shuffle | None,
    tokenizer: Tokenizer | None,
    verify: bool = False,
) -> tuple[Rows, Rows | None]:
    """Opens token files: (training rows, validation rows or None); `verify` as `read_indexed`.

    Holds out the last `data.validation` of the documents, or more of them if those are shorter than
    a row, or none if then too few tokens remain to train on.
    """
    tokens = read_indexed(source_path(source), verify)
    check_tokens(recipe, tokens, tokenizer)
    S, vocab = recipe.train.seq_len, recipe.model.vocab
    size, rows_class = None if tokenizer is None else tokenizer.size, _rows_class(recipe)
    total, starts = len(tokens.tokens), tokens.starts
    validation_share = recipe.data.held_out
    # The last document start that leaves validation its share and a row.
    by_share = int(len(starts) * (1 - validation_share))
    by_row = int(np.searchsorted(starts, total - S - 1, "right")) - 1
    first = min(by_share, by_row)
    if validation_share == 0 or first < 0 or starts[first] <= S:
        return rows_class(tokens, S, vocab, shuffle=shuffle, tokenizer_size=size), None
    split = int(starts[first])
    return (
        rows_class(tokens, S, vocab, (0, split), shuffle, size),
        rows_class(tokens, S, vocab, (split, total), tokenizer_size=size),
    )


def check_tokens(recipe: Recipe, tokens: Tokens, tokenizer: Tokenizer | None) -> None:
    """Raises UserError or RecipeError if tokens do not fit the named tokenizer or model.vocab.

    Compares the record beside the token file; without one, checks the ids of sampled blocks.
    """
    record, vocab = tokens.record, recipe.model.vocab
    if record is None:
        if tokenizer is not None:
            for _, block in sampled_blocks(tokens.tokens):
                if (largest := int(block.max())) >= tokenizer.size:
                    raise UserError(beyond_tokenizer_message(tokens.name, largest, tokenizer.size))
        return
    if tokenizer is not None and tokenizer.fingerprint != record.fingerprint:
        raise UserError(
            f"data.tokenizer = {tokenizer.name!r}: {tokens.name} was made by another tokenizer, "
            f"{record.name!r} of {record.vocabulary} tokens: set data.tokenizer to that, or leave "
            "it out, or tokenise the text again"
        )
    if record.vocabulary > vocab:
        remedy = f"{tokens.name} was made by {record.name!r} of {record.vocabulary} tokens: set "
        remedy += "model.vocab to that or more, or tokenise the text again"
        raise RecipeError([Fault("model.vocab", vocab, remedy)])
    if tokenizer is None and far_above(vocab, record.vocabulary):
        raise RecipeError(
            [Fault("model.vocab", vocab, _oversized_vocab_remedy(tokens.name, record))]
        )


def _oversized_vocab_remedy(name: str, record: TokenFileRecord) -> str:
    """Returns the remedy of the fault that model.vocab is far above the tokenizer's size."""
    return (
        f"{name} was made by {record.name!r} of {record.vocabulary} tokens, so most of the "
        "vocabulary would never be trained: give tokens of the right tokenizer, set model.vocab "
        f"near {record.vocabulary}, or set data.tokenizer to the one that made them if this is "
        "intended"
    )
