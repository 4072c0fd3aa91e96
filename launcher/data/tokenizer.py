"""Tokenizers: text to ids and back, either bytes or a tokenizer.json and the files beside it."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import DataConfig
from colonnade.launcher.recipe.vocabulary import BYTE_TOKENS

# The common names of the end of a text, for a tokenizer.json without the files beside it.
_END_OF_DOCUMENT = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<|im_end|>",
)
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    @property
    def size(self) -> int:
        """Largest id + 1; model.vocab must be at least this."""

    @property
    def eod(self) -> int:
        """The id that ends a document; `encode` does not append it."""

    @property
    def bos(self) -> int | None:
        """The id that is put before every document, if any; `encode` does not prepend it."""

    @property
    def name(self) -> str:
        """`bytes`, or the file's path, for messages."""

    @property
    def fingerprint(self) -> str:
        """A hash of the vocabulary's file, wherever it lies; `bytes` for bytes."""

    @property
    def encoding(self) -> dict[str, Any]:
        """Everything that decides the tokens of a document, as JSON-able values."""

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an integer array."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens around it, and within it unless allowed."""

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens and ids beyond `size` have none."""

    def byte_lengths(self) -> torch.Tensor:
        """int64 [size]: bytes of UTF-8 text each token stands for, 0 for special ones."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    size = BYTE_TOKENS
    eod = BYTE_TOKENS - 1
    bos = None
    name = fingerprint = "bytes"
    encoding: ClassVar[dict[str, Any]] = {"tokenizer": "bytes"}

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.arrays`; uint8."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`; broken UTF-8 shows as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def byte_lengths(self) -> torch.Tensor:
        """One each; 0 for the end of a document."""
        lengths = torch.ones(self.size, dtype=torch.int64)
        lengths[self.eod] = 0
        return lengths


class FileTokenizer:
    """A tokenizer.json, through the `tokenizers` library.

    UserError if the file cannot be read, if it has none of the tokens that are asked for, or if
    nothing tells which token ends a document.
    """

    def __init__(
        self,
        path: Path,
        eod: str | None = None,
        bos: str | None = None,
        special_tokens: bool = False,
    ) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"data.tokenizer = {str(path)!r} needs the tokenizers library: "
                "pip install 'colonnade[text]'"
            ) from error
        self.name = str(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = _content(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"data.tokenizer = {self.name!r} is not a tokenizer.json: {error}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = not special_tokens
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values()) + 1
        self.eod = self._id("eod", eod) if eod is not None else self._end(file, vocabulary)
        self.bos = None if bos is None else self._id("bos", bos)
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.encoding = {
            "tokenizer": self.fingerprint,
            "eod": self.eod,
            "bos": self.bos,
            "special_tokens": special_tokens,
        }
        self._spelt = {} if special_tokens else self._spellings()
        self._special = np.zeros(self.size, bool)
        self._special[list(self._spelt)] = True

    def _id(self, field: str, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(
                f"data.{field} = {token!r}: {self.name} has no such token: give one that it has"
            )
        return found

    def _end(self, file: Path, vocabulary: dict[str, int]) -> int:
        """The token that ends a document, by the files beside tokenizer.json or its common name."""
        if file.name == "tokenizer.json":
            for told, end in _told_ends(file.parent):
                if isinstance(end, str) and end in vocabulary:
                    return vocabulary[end]
                if isinstance(end, int) and 0 <= end < self.size:
                    return end
                raise UserError(
                    f"data.tokenizer = {self.name!r}: {told} names {end!r} as the end of a text, "
                    "which is no token of it: set data.eod to the token that ends a document"
                )
        for token in _END_OF_DOCUMENT:
            if token in vocabulary:
                return vocabulary[token]
        raise UserError(
            f"data.tokenizer = {self.name!r} has no end-of-document token that is told by a "
            "tokenizer_config.json or generation_config.json beside it, or that has a common name "
            f"(such as {', '.join(_END_OF_DOCUMENT[:4])}): set data.eod to the token that ends a "
            "document"
        )

    def _spellings(self) -> dict[int, str]:
        """Special tokens by id that no text may become, however it is spelt."""
        model = json.loads(self._tokenizer.to_str())["model"]
        unknown = {model.get("unk_token"), model.get("unk_id")}
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {self.eod: self._tokenizer.id_to_token(self.eod) or ""} | {
            i: token.content
            for i, token in added
            if token.special and not {i, token.content} & unknown
        }

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.arrays`; int32."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.asarray(e.ids, np.int32) for e in encoded]
        for number, ids in enumerate(arrays):
            if self._special[ids].any():
                arrays[number] = self._as_text(texts[number], ids)
        return arrays

    def _as_text(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The ids of a text some of which are special tokens that the model's own vocabulary has.

        The library keeps added tokens out of a text, but a model of whole words or pieces finds
        them once more; so the text is cut within each such spelling, behind its first character.
        """
        spelt = [self._spelt[i] for i in set(ids[self._special[ids]].tolist())]
        spelt = [token for token in spelt if token in text and len(token) > 1]
        if spelt:
            inside = "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in spelt)
            pieces = re.split(inside, text)
            encoded = self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
            ids = np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])
        if (ids == self.eod).any():
            raise UserError(
                f"data.tokenizer = {self.name!r} turns a text into the token that ends a document, "
                f"{self._tokenizer.id_to_token(self.eod)!r}: set data.eod to another token"
            )
        return ids

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        return [ids.tolist() for ids in self.arrays(texts)]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True)

    def byte_lengths(self) -> torch.Tensor:
        """See `Tokenizer.byte_lengths`.

        Exact for byte-level BPE, whose every character is a byte, and for vocabularies in
        SentencePiece's style (a space is `▁`, a lone byte `<0x0A>`) up to what the normalizer
        changes; other tokens count as they are spelt.
        """
        layout = json.loads(self._tokenizer.to_str())
        byte_level = any(
            '"type": "ByteLevel"' in json.dumps(layout[part])
            for part in ("pre_tokenizer", "decoder")
        )
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = torch.zeros(self.size, dtype=torch.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(token.encode())
            elif byte_level:
                lengths[i] = len(token)
            elif _BYTE_FALLBACK.fullmatch(token):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode())
        lengths[self.eod] = 0
        return lengths


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer = {str(file)!r}: {error.strerror}: give `bytes`, or the path of a "
            "tokenizer.json or of the folder that holds it"
        ) from error


def _told_ends(folder: Path) -> Iterator[tuple[str, object]]:
    """What the files beside a tokenizer.json name as the end of a text, the first to hold first.

    `eos_token` is a string or an added token's table; `eos_token_id` an id, or a list of those
    that end a generation, of which the first ends a text.
    """
    places = (
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("special_tokens_map.json", "eos_token"),
    )
    for name, key in places:
        if not (folder / name).is_file():
            continue
        try:
            table = json.loads(_content(folder / name))
        except ValueError as error:
            raise UserError(
                f"data.tokenizer: {folder / name} is not JSON: {error}: copy it again, or set "
                "data.eod to the token that ends a document"
            ) from error
        end = table.get(key) if isinstance(table, dict) else None
        if isinstance(end, dict):
            end = end.get("content")
        if isinstance(end, list) and end:
            end = end[0]
        if end is not None:
            yield name, end


def open_tokenizer(
    name: str, eod: str | None = None, bos: str | None = None, special_tokens: bool = False
) -> Tokenizer:
    """`bytes`, or the tokenizer.json at that path or in that folder.

    Args:
        eod: the token that ends a document, by its spelling; default: what the files tell.
        bos: the token that is put before every document; default: none.
        special_tokens: whether the spelling of a special token in a text is that token.
    """
    if name != "bytes":
        return FileTokenizer(Path(name).expanduser(), eod, bos, special_tokens)
    for field, value in {"eod": eod, "bos": bos}.items():
        if value is not None:
            raise UserError(
                f"data.{field} = {value!r}: the tokenizer `bytes` has a token of its own for the "
                "end of a document and no other: leave it out"
            )
    return ByteTokenizer()


def tokenizer_of(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a recipe's `[data]`; None where all sources are tokens and none is named."""
    name = data.tokenizer_name
    return None if name is None else open_tokenizer(name, data.eod, data.bos, data.special_tokens)
