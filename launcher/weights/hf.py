"""Hugging Face folders as a target of `convert`."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.convert.huggingface.entry import Entry
from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported, entries_of
from colonnade.launcher.convert.huggingface.folder import (
    CONFIG,
    file_names,
    token_fields,
    tokenizer_files,
    write_config,
    write_index,
)
from colonnade.launcher.convert.huggingface.nearest import family_for
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.logits import of_transformers
from colonnade.launcher.weights.source import Weights, tokenizer_folder, whole_box
from colonnade.launcher.weights.target import Piece, Target


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
        dtypes = self.dtypes(dtype)
        for one in self.entries():
            shape, kind = tuple(one.shape(self.weights.shapes)), dtypes[one.native_names[0]]
            for index, name in enumerate(one.hf_names):
                load = partial(self.joined, one, index)
                yield Piece(name, name, (0,) * len(shape), shape, shape, kind, load)

    def entries(self) -> list[Entry]:
        """Returns the family's entries, of the tensors in a checkpoint."""
        return entries_of(self.family, self.weights.config, self.weights.shapes, packed=False)

    def dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        return {
            name: dtype or self.weights.dtype(one.native_names[0])
            for one in self.entries()
            for name in one.native_names
        }

    def logits(self, folder: Path, tokens: Tensor) -> Tensor:
        return of_transformers(self.family.architecture, folder, tokens)

    def joined(self, entry: Entry, index: int) -> Tensor:
        """Returns one Hugging Face tensor of an entry; of stacked experts it reads that one."""
        shapes, read = self.weights.shapes, self.weights.read
        boxes = {n: whole_box(shapes[n]) for n in entry.native_names}
        if len(entry.hf_names) == 1:
            return entry.join({n: read(n, box) for n, box in boxes.items()})[entry.hf_names[0]]
        expert = slice(index, index + 1)
        native = {n: read(n, (expert, *box[1:]))[0] for n, box in boxes.items()}
        return entry.of_expert(index).join(native)[entry.hf_names[index]]

    def file_names(self, count: int) -> list[str]:
        return file_names(count)

    def finish(
        self, folder: Path, files: Mapping[str, Sequence[Piece]], records: dict[str, FileRecord]
    ) -> None:
        pieces = [piece for of_file in files.values() for piece in of_file]
        write_config(folder, self.fields, [piece.dtype for piece in pieces])
        if len(files) > 1:
            file_of = {p.key: name for name, of_file in files.items() for p in of_file}
            write_index(folder, file_of, sum(piece.bytes for piece in pieces))
        for file in tokenizer_files(self.like):
            shutil.copyfile(file, folder / file.name)
