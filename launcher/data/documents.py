"""Documents: texts of a source, and the tokens that they become."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 20

Fields = dict[str, str]  # what a document consists of (`text`, `prompt`) to the column of each


@dataclass(frozen=True)
class Document:
    """One text; `prompt` comes before it and carries no loss. `key` identifies it in its source."""

    key: str
    text: str
    prompt: str = ""


def fields_of(source: SourceConfig) -> Fields:
    """The columns that are read, by what they hold."""
    fields = {"text": source.column}
    return fields if source.prompt is None else {**fields, "prompt": source.prompt}


def option(field: str) -> str:
    """The option of a source that names the column of a field."""
    return "column" if field == "text" else field


def text_of(field: str, column: str, record: Mapping[str, object], where: str) -> str:
    """The text in a column of a record; a null is none. UserError if it holds something else."""
    named = option(field)
    if column not in record:
        raise UserError(
            f"data.sources: {named} = {column!r}, but {where} has the columns "
            f"{', '.join(map(repr, record)) or 'none'}: set `{named}` to one of them"
        )
    text = record[column]
    if not isinstance(text, str | None):
        kinds = {bool: "a boolean", float: "a number", list: "a list", dict: "an object"}
        kind = kinds.get(type(text), type(text).__name__)
        raise UserError(
            f"data.sources: {named} = {column!r} of {where} holds {kind}, not text: write it as "
            f"text, or set `{named}` to a column of text"
        )
    return text or ""


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of a size that is good to tokenise at once."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text) + len(document.prompt)
        if len(chunk) == _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_documents(
    documents: list[Document], tokenizer: Tokenizer, masked: bool
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """(tokens [T], mask uint8 [T] or None) of each document.

    The tokens are those of prompt and text, behind the tokenizer's `bos` if it has one and before
    its `eod`. The mask is 0 at the tokens that come before the text.
    """
    begin = np.array([] if tokenizer.bos is None else [tokenizer.bos], np.int32)
    end = np.array([tokenizer.eod], np.int32)
    texts = tokenizer.arrays([document.text for document in documents])
    if not masked:
        return [(np.concatenate((begin, text, end)), None) for text in texts]
    encoded: list[tuple[np.ndarray, np.ndarray | None]] = []
    prompts = tokenizer.arrays([document.prompt for document in documents])
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.concatenate((begin, prompt, text, end))
        trained = np.arange(len(tokens)) >= len(begin) + len(prompt)
        encoded.append((tokens, trained.astype(np.uint8)))
    return encoded
