"""The data room: from a recipe's `[data]` to batches of rows.

    data = open_data(recipe)
    batch = data.train.batch([0, 1, 2, 3])   # by sample index

Text is tokenised once into Megatron's `.bin` / `.idx` (and a `.mask` of the tokens that carry a
loss) in a cache, then read from there; a source with `stream = true` is read while training.
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
