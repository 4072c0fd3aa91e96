"""Documents: the texts of a source, and their encoding as tokens and loss masks."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from colonnade.launcher.data.tokenizer import Tokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import SourceConfig

_CHUNK_DOCUMENTS = 256
_CHUNK_CHARACTERS = 1 << 20

Fields = dict[str, str]  # from a field of a document (`text`, `prompt`) to its column


@dataclass(frozen=True)
class Document:
    """One text; `prompt` precedes it and has no loss; `key` identifies it in its source."""

    key: str
    text: str
    prompt: str = ""


def fields_of(source: SourceConfig) -> Fields:
    """Returns the columns of a source that are read, by the document's field that they hold."""
    fields = {"text": source.column}
    return fields if source.prompt is None else {**fields, "prompt": source.prompt}


def option_name(field: str) -> str:
    """Returns the name of the source's option that sets the column of a field."""
    return "column" if field == "text" else field


def text_of(field: str, column: str, record: Mapping[str, object], location: str) -> str:
    """Returns the text in a column of a record, "" for a null.

    Raises UserError, naming `location`, if the column is missing or holds something else.
    """
    option = option_name(field)
    if column not in record:
        raise UserError(
            f"data.sources: {option} = {column!r}, but {location} has the columns "
            f"{', '.join(map(repr, record)) or 'none'}: set `{option}` to one of them"
        )
    text = record[column]
    if not isinstance(text, str | None):
        kinds = {bool: "a boolean", float: "a number", list: "a list", dict: "an object"}
        kind = kinds.get(type(text), type(text).__name__)
        raise UserError(
            f"data.sources: {option} = {column!r} of {location} holds {kind}, not text: write it "
            f"as text, or set `{option}` to a column of text"
        )
    return text or ""


def document_chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Groups documents into lists that are large enough to tokenise fast, in bounded memory."""
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
    """Returns (tokens [T], mask uint8 [T] or None) of each document.

    The tokens are the tokenizer's `bos` if it has one, those of prompt and text, and its `eod`.
    The mask is 0 at the tokens before the text and 1 at the others; it is None unless `masked`.
    """
    bos = np.array([] if tokenizer.bos is None else [tokenizer.bos], np.int32)
    eod = np.array([tokenizer.eod], np.int32)
    texts = tokenizer.encode_to_arrays([document.text for document in documents])
    if not masked:
        return [(np.concatenate((bos, text, eod)), None) for text in texts]
    encoded: list[tuple[np.ndarray, np.ndarray | None]] = []
    prompts = tokenizer.encode_to_arrays([document.prompt for document in documents])
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = np.concatenate((bos, prompt, text, eod))
        trained = np.arange(len(tokens)) >= len(bos) + len(prompt)
        encoded.append((tokens, trained.astype(np.uint8)))
    return encoded
