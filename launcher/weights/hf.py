"""Hugging Face folders as a target of `convert`."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Entry, Unsupported, entries_of
from colonnade.launcher.convert.huggingface.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    TOKENS,
    family_for,
    token_fields,
    tokenizer_files,
    write_json,
)
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.source import Weights, tokenizer_folder
from colonnade.launcher.weights.target import Piece, Target, whole_box


class HuggingFaceTarget(Target):
    """A folder that transformers reads."""

    def __init__(self, weights: Weights, family: str | None) -> None:
        self.metadata = {"format": "pt"}
        self.weights = weights
        self.like = tokenizer_folder(weights.folder)
        try:
            self.family = family_for(weights.config) if family is None else family_of(family)
            self.fields = self.family.config_to_hf(weights.config)
            if self.like is not None and (self.like / CONFIG).is_file():
                self.fields |= token_fields(self.like, self.fields)
        except Unsupported as error:
            raise UserError(f"convert --to hf: {weights.folder}: {error}") from None

    def describe(self) -> str:
        return f"hf {self.family.architecture}"

    def pieces(self, dtype: torch.dtype | None) -> Iterator[Piece]:
        for one in entries_of(self.family, self.weights.config, self.weights.shapes, packed=False):
            shape = tuple(one.shape(self.weights.shapes))
            kind = dtype or self.weights.dtype(one.native_names[0])
            for index, name in enumerate(one.hf_names):
                load = partial(self.joined, one, index)
                yield Piece(name, name, (0,) * len(shape), shape, shape, kind, load)

    def joined(self, entry: Entry, index: int) -> Tensor:
        """Returns one Hugging Face tensor of an entry; of stacked experts it reads that one."""
        shapes, read = self.weights.shapes, self.weights.read
        if len(entry.hf_names) == 1:
            native = {n: read(n, whole_box(shapes[n])) for n in entry.native_names}
            return entry.join(native)[entry.hf_names[0]]
        one = replace(entry, hf_names=entry.hf_names[index : index + 1], dim=max(0, entry.dim - 1))
        boxes = {
            n: (slice(index, index + 1), *whole_box(shapes[n][1:])) for n in entry.native_names
        }
        native = {n: read(n, box)[0] for n, box in boxes.items()}
        return one.join(native)[one.hf_names[0]]

    def file_names(self, count: int) -> list[str]:
        if count == 1:
            return [SINGLE]
        return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]

    def finish(
        self, folder: Path, files: Mapping[str, Sequence[Piece]], records: dict[str, FileRecord]
    ) -> None:
        pieces = [piece for of_file in files.values() for piece in of_file]
        dtypes = Counter(str(piece.dtype).removeprefix("torch.") for piece in pieces)
        fields = dict.fromkeys(TOKENS) | self.fields
        write_json(folder / CONFIG, fields | {"torch_dtype": dtypes.most_common(1)[0][0]})
        if len(files) > 1:
            weight_map = {p.key: name for name, of_file in files.items() for p in of_file}
            total = sum(piece.bytes for piece in pieces)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(folder / INDEX, index)
        for file in tokenizer_files(self.like):
            shutil.copyfile(file, folder / file.name)
