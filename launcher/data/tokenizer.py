"""Tokenizers encode text to ids and decode it: bytes, or a tokenizer.json and files beside it."""

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

# Common end-of-text tokens, tried in this order if no file beside the tokenizer.json names one.
_COMMON_EOD_TOKENS = (
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
    """The interface that the data room and sampling need of a tokenizer."""

    @property
    def size(self) -> int:
        """The largest id + 1; model.vocab must be at least this."""

    @property
    def eod(self) -> int:
        """The id that ends a document; `encode` does not append it."""

    @property
    def bos(self) -> int | None:
        """The id that begins every document, if any; `encode` does not prepend it."""

    @property
    def name(self) -> str:
        """`bytes`, or the path of the file or its folder, for messages."""

    @property
    def fingerprint(self) -> str:
        """A hash of the tokenizer.json's content, whatever its path; `bytes` for bytes."""

    @property
    def encoding(self) -> dict[str, Any]:
        """All settings that determine the tokens of a document, as JSON-able values."""

    def encode_to_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes each text as `encode` does, to an integer array."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encodes each text to ids.

        Adds no special tokens around a text, and encodes the spelling of one within it as ordinary
        text unless `special_tokens` was set.
        """

    def decode(self, ids: list[int]) -> str:
        """Decodes ids to text; special tokens and ids beyond `size` add nothing to it."""

    def byte_lengths(self) -> torch.Tensor:
        """Returns int64 [size]: the bytes of UTF-8 text of each token, 0 for special tokens."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    size = BYTE_TOKENS
    eod = BYTE_TOKENS - 1
    bos = None
    name = fingerprint = "bytes"
    encoding: ClassVar[dict[str, Any]] = {"tokenizer": "bytes"}

    def encode_to_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode_to_arrays`; the arrays are uint8."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`; broken UTF-8 shows as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def byte_lengths(self) -> torch.Tensor:
        """See `Tokenizer.byte_lengths`: 1 for each byte, 0 for the end of a document."""
        lengths = torch.ones(self.size, dtype=torch.int64)
        lengths[self.eod] = 0
        return lengths


class FileTokenizer:
    """A tokenizer.json, loaded by the `tokenizers` library.

    Raises UserError if the file cannot be read, if it lacks the token given as `eod` or `bos`, or
    if no argument, file or common name determines the token that ends a document.
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
        content = _read_bytes(file)
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
        self.eod = self._id_of("eod", eod) if eod is not None else self._find_eod(file, vocabulary)
        self.bos = None if bos is None else self._id_of("bos", bos)
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.encoding = {
            "tokenizer": self.fingerprint,
            "eod": self.eod,
            "bos": self.bos,
            "special_tokens": special_tokens,
        }
        # Special tokens by id that the encoding of a text must not contain.
        self._forbidden = {} if special_tokens else self._special_spellings()
        self._is_forbidden = np.zeros(self.size, bool)
        self._is_forbidden[list(self._forbidden)] = True

    def _id_of(self, field: str, token: str) -> int:
        """Returns the id of `token`, the value of `data.FIELD`; raises UserError if it has none."""
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"data.{field} = {token!r}: {self.name} has no such token: give one that it has"
            )
        return token_id

    def _find_eod(self, file: Path, vocabulary: dict[str, int]) -> int:
        """Finds the token that ends a document, by the files beside `file` or by a common name."""
        if file.name == "tokenizer.json":
            for config, eos in _configured_eos_tokens(file.parent):
                if isinstance(eos, str) and eos in vocabulary:
                    return vocabulary[eos]
                if isinstance(eos, int) and 0 <= eos < self.size:
                    return eos
                raise UserError(
                    f"data.tokenizer = {self.name!r}: {config} names {eos!r} as the end of a text, "
                    "which is no token of it: set data.eod to the token that ends a document"
                )
        for token in _COMMON_EOD_TOKENS:
            if token in vocabulary:
                return vocabulary[token]
        raise UserError(
            f"data.tokenizer = {self.name!r} has no end-of-document token that is named by a "
            "tokenizer_config.json or generation_config.json beside it, or that has a common name "
            f"(such as {', '.join(_COMMON_EOD_TOKENS[:4])}): set data.eod to the token that ends a "
            "document"
        )

    def _special_spellings(self) -> dict[int, str]:
        """Returns the spellings, by id, of `eod` and all special tokens but the unknown token."""
        model = json.loads(self._tokenizer.to_str())["model"]
        unknown = {model.get("unk_token"), model.get("unk_id")}
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {self.eod: self._tokenizer.id_to_token(self.eod) or ""} | {
            i: token.content
            for i, token in added
            if token.special and not {i, token.content} & unknown
        }

    def encode_to_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.encode_to_arrays`; the arrays are int32."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        arrays = [np.asarray(e.ids, np.int32) for e in encoded]
        for number, ids in enumerate(arrays):
            if self._is_forbidden[ids].any():
                arrays[number] = self._encode_as_plain_text(texts[number], ids)
        return arrays

    def _encode_as_plain_text(self, text: str, ids: np.ndarray) -> np.ndarray:
        """Encodes a text again whose encoding `ids` contains special tokens.

        The library does not match added tokens in a text, but a word or subword model whose own
        vocabulary lists one of them matches it nevertheless. So this splits the text within each
        such spelling, after its first character, and encodes the substrings.
        """
        spellings = [self._forbidden[i] for i in set(ids[self._is_forbidden[ids]].tolist())]
        spellings = [token for token in spellings if token in text and len(token) > 1]
        if spellings:
            split = "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in spellings)
            substrings = re.split(split, text)
            encoded = self._tokenizer.encode_batch_fast(substrings, add_special_tokens=False)
            ids = np.concatenate([np.asarray(e.ids, np.int32) for e in encoded])
        if (ids == self.eod).any():
            raise UserError(
                f"data.tokenizer = {self.name!r} turns a text into the token that ends a document, "
                f"{self._tokenizer.id_to_token(self.eod)!r}: set data.eod to another token"
            )
        return ids

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        return [ids.tolist() for ids in self.encode_to_arrays(texts)]

    def decode(self, ids: list[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True)

    def byte_lengths(self) -> torch.Tensor:
        """See `Tokenizer.byte_lengths`.

        Exact for byte-level BPE, where every character is a byte, and for vocabularies in
        SentencePiece's style (a space is `▁`, a single byte `<0x0A>`) up to changes by the
        normalizer; other tokens count the bytes of their spelling.
        """
        config = json.loads(self._tokenizer.to_str())
        byte_level = any(
            '"type": "ByteLevel"' in json.dumps(config[component])
            for component in ("pre_tokenizer", "decoder")
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


def _read_bytes(file: Path) -> bytes:
    """Reads a tokenizer's file; raises UserError if it cannot."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.tokenizer = {str(file)!r}: {error.strerror}: give `bytes`, or the path of a "
            "tokenizer.json or of the folder that holds it"
        ) from error


def _configured_eos_tokens(folder: Path) -> Iterator[tuple[str, object]]:
    """Yields (file name, end-of-text token) of the files beside a tokenizer.json, best first.

    `eos_token` is a string or an added token's table; `eos_token_id` is an id, or a list of ids
    that end a generation, of which the first ends a text.
    """
    configs = (
        ("tokenizer_config.json", "eos_token"),
        ("generation_config.json", "eos_token_id"),
        ("special_tokens_map.json", "eos_token"),
    )
    for name, key in configs:
        if not (folder / name).is_file():
            continue
        try:
            table = json.loads(_read_bytes(folder / name))
        except ValueError as error:
            raise UserError(
                f"data.tokenizer: {folder / name} is not JSON: {error}: copy it again, or set "
                "data.eod to the token that ends a document"
            ) from error
        eos = table.get(key) if isinstance(table, dict) else None
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, list) and eos:
            eos = eos[0]
        if eos is not None:
            yield name, eos


def open_tokenizer(
    name: str, eod: str | None = None, bos: str | None = None, special_tokens: bool = False
) -> Tokenizer:
    """Opens the tokenizer `bytes`, or the tokenizer.json at the path `name` or in that folder.

    Args:
        eod: the token that ends a document, by its spelling; default: the one that the files
            beside tokenizer.json name, else one with a common name.
        bos: the token that begins every document; default: none.
        special_tokens: whether the spelling of a special token in a text is encoded as that token.

    Raises:
        UserError: the file cannot be read, or a token is missing from it.
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
    """Opens the tokenizer of `[data]`; returns None if all sources are tokens and none is set."""
    name = data.tokenizer_name
    return None if name is None else open_tokenizer(name, data.eod, data.bos, data.special_tokens)
