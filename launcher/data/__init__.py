"""Data: turns a recipe's `[data]` into batches of rows of tokens.

    data = open_data(recipe)
    batch = data.train.batch([0, 1, 2, 3])   # by sample index

Text is tokenised once into Megatron's `.bin` / `.idx` (and a `.mask` of the tokens that have a
loss) in a cache, and read from there; a source with `stream = true` is tokenised while training.
"""

from pathlib import Path

from colonnade.launcher.data.cache import Summary, source_fingerprint, tokenise
from colonnade.launcher.data.indexed import IndexedWriter, read_indexed
from colonnade.launcher.data.opening import Data, check_data, open_data, prepare_data
from colonnade.launcher.data.prefetch import Prefetcher
from colonnade.launcher.data.rows import Batch, Rows
from colonnade.launcher.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_of
from colonnade.launcher.recipe.tables import SourceConfig

__all__ = [
    "Batch",
    "Data",
    "IndexedWriter",
    "Prefetcher",
    "Rows",
    "Summary",
    "Tokenizer",
    "check_data",
    "data",
    "open_data",
    "open_tokenizer",
    "prepare_data",
    "read_indexed",
    "source_fingerprint",
    "tokenise",
    "tokenizer_of",
]


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
    """Tokenises text into `DESTINATION.bin` and `.idx`, and `.mask` if `prompt` is given.

    Args:
        source: file, folder or glob; for `hub` the data set's name.
        destination: the prefix of the files, without an ending.
        format: `text`, `jsonl`, `parquet`, `hub` or `stdlib`; default: the format of the files.
        tokenizer: `bytes`, or the path of a tokenizer.json or of the folder that holds it.
        column: the column that holds the text.
        prompt: the column of a prompt that precedes the text and has no loss; default: none.
        eod: the token that ends a document; default: the one that the tokenizer's files name.
        bos: the token that begins every document; default: none.
        special_tokens: whether the spelling of a special token in a text is encoded as that token.
        overwrite: whether existing files are replaced.

    Raises:
        UserError: the source cannot be read or is empty, or the destination exists already.
    """
    fields: dict[str, object] = {"column": column, "prompt": prompt}
    if format is not None:
        fields["format"] = format
    if format != "stdlib":
        fields["path"] = source
    config = SourceConfig.model_validate(fields)
    loaded = open_tokenizer(tokenizer, eod, bos, special_tokens)
    return tokenise(config, Path(destination), loaded, overwrite)
