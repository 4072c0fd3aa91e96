"""Tokenizers: text to ids and back, either bytes or a tokenizer.json."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from colonnade.launcher.errors import UserError

_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
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
    def fingerprint(self) -> str:
        """Changes whenever the ids of a text may."""

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text as an integer array."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens around it."""

    def decode(self, ids: list[int]) -> str:
        """Text of the ids; special tokens and ids beyond `size` have none."""

    def byte_lengths(self) -> torch.Tensor:
        """int64 [size]: bytes of UTF-8 text each token stands for, 0 for special ones."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 for the end of a document."""

    size = 257
    eod = 256
    fingerprint = "bytes"

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

    UserError if the file cannot be read, or has none of the end-of-document tokens
    `<|endoftext|>`, `</s>`, `<eos>`, `<|end_of_text|>`.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                f"data.tokenizer = {str(path)!r} needs the tokenizers library: "
                "pip install 'colonnade[text]'"
            ) from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"data.tokenizer = {str(path)!r}: {error.strerror}: give `bytes` or the path of "
                "a tokenizer.json"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"data.tokenizer = {str(path)!r} is not a tokenizer.json: {error}"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [token for token in _END_OF_DOCUMENT if token in vocabulary]
        if not found:
            raise UserError(
                f"data.tokenizer = {str(path)!r} has no end-of-document token: add one of "
                f"{', '.join(_END_OF_DOCUMENT)} to it"
            )
        self.eod = vocabulary[found[0]]
        self.size = max(vocabulary.values()) + 1
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer.arrays`; int32."""
        return [np.asarray(ids, np.int32) for ids in self.encode(list(texts))]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """See `Tokenizer.encode`."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [e.ids for e in encoded]

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


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes`, or the tokenizer.json at that path."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name).expanduser())
