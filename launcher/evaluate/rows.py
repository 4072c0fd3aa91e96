"""All rows of a source: as in training, but each token counts once, and none is left out."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from colonnade.kernels.labels import IGNORED
from colonnade.launcher.data.cache import cached_tokens
from colonnade.launcher.data.files import source_name, source_path
from colonnade.launcher.data.indexed import read_indexed
from colonnade.launcher.data.opening import check_tokens
from colonnade.launcher.data.rows import Batch, Tokens, slice_rows
from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig


class WholeRows:
    """The rows of all tokens, in order. The last one may be shorter: padding without loss, a
    document of its own, makes it as long as the others."""

    def __init__(
        self, tokens: Tokens, seq_len: int, vocab: int, tokenizer_size: int | None = None
    ) -> None:
        """Raises UserError if there are fewer than two tokens: the first one has no loss."""
        if len(tokens.tokens) < 2:
            raise UserError(f"{tokens.name} is an empty corpus: give a source that holds text")
        self.tokens, self.seq_len = tokens, seq_len
        self.vocab, self.tokenizer_size = vocab, tokenizer_size
        self.rows = -(-(len(tokens.tokens) - 1) // seq_len)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Reads rows; raises UserError if an id is beyond the vocabulary."""
        return Batch(*map(torch.cat, zip(*map(self.row, rows), strict=True)))

    def row(self, index: int) -> Batch:
        """Reads one row, `[1, S]`."""
        offset = index * self.seq_len
        length = min(self.seq_len, len(self.tokens.tokens) - 1 - offset)
        row = slice_rows(self.tokens, [offset], length, self.vocab, self.tokenizer_size)
        missing = (0, self.seq_len - length)
        return Batch(
            pad(row.tokens, missing),
            pad(row.labels, missing, value=IGNORED),
            pad(row.positions, missing),
            pad(row.documents, missing, value=int(row.documents.max()) + 1),
        )


def open_rows(recipe: Recipe, source: SourceConfig, tokenizer: Tokenizer | None) -> WholeRows:
    """Opens a source; tokenises its text into the cache, unless that has it.

    Raises:
        UserError: the source cannot be read, is empty, or has tokens of another tokenizer; or there
            is text and no tokenizer.
    """
    train, vocab = recipe.train, recipe.model.vocab
    if source.format == "tokens":
        tokens = read_indexed(source_path(source), verify=True)
        check_tokens(recipe, tokens, tokenizer)
        size = None if tokenizer is None else tokenizer.size
        return WholeRows(tokens, train.seq_len, vocab, size)
    if tokenizer is None:
        raise UserError(
            f"{source_name(source)} is text, and no tokenizer of the model is known: give "
            "data.tokenizer=... (a tokenizer.json, or bytes)"
        )
    # all documents are in the first part: none is held out
    tokens, _ = cached_tokens(source, DataConfig(validation=0, cache=recipe.data.cache), tokenizer)
    return WholeRows(tokens, train.seq_len, vocab)
