"""Our own checkpoints as a target of `convert`: a folder like that of a run, without optimizer."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, Entry, chunk_key
from colonnade.launcher.checkpoint.folders import STATE, TENSORS, step_folder, write_durably
from colonnade.launcher.checkpoint.manifest import FileRecord, checksums, write_manifest
from colonnade.launcher.convert.huggingface.folder import CONFIG, tokenizer_files
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import DataConfig, Recipe, SourceConfig, TrainConfig
from colonnade.launcher.run_files import CHECKPOINTS, RECIPE
from colonnade.launcher.weights.logits import of_decoder
from colonnade.launcher.weights.source import (
    Weights,
    open_weights,
    tokenizer_folder,
    tokenizer_of,
)
from colonnade.launcher.weights.target import Piece, Target

PART_BYTES = 10**9  # largest part of a tensor that is read and written at once


class NativeTarget(Target):
    """A folder like a run's, with a recipe and a checkpoint of step 0."""

    place = str(step_folder(Path(CHECKPOINTS), 0))

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.like = tokenizer_folder(weights.folder)

    def describe(self) -> str:
        return "native"

    def pieces(self, dtype: torch.dtype | None) -> Iterator[Piece]:
        for name, kind in self.dtypes(dtype).items():
            shape = self.weights.shapes[name]
            for start, stop in row_ranges(shape, kind.itemsize):
                rows = (slice(start, stop), *(slice(0, size) for size in shape[1:]))
                box = rows if shape else ()
                part = (stop - start, *shape[1:]) if shape else ()
                offsets = (start, *(0 for _ in shape[1:])) if shape else ()
                key = chunk_key(name, offsets, part == tuple(shape))
                load = partial(self.weights.read, name, box)
                yield Piece(name, key, offsets, part, tuple(shape), kind, load)

    def dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        return {name: dtype or self.weights.dtype(name) for name in self.weights.shapes}

    def logits(self, folder: Path, tokens: Tensor) -> Tensor:
        with open_weights(folder, lambda sentence: None) as weights:
            return of_decoder(weights, None, tokens)

    def file_names(self, count: int) -> list[str]:
        return [f"part-{number:05}.safetensors" for number in range(count)]

    def finish(
        self, folder: Path, files: Mapping[str, Sequence[Piece]], records: dict[str, FileRecord]
    ) -> None:
        checkpoint = folder / self.place
        write_durably(checkpoint / TENSORS, catalog_of(files).model_dump_json())
        write_durably(checkpoint / STATE, json.dumps({"step": 0}))
        records = records | {name: checksums(checkpoint / name) for name in (TENSORS, STATE)}
        about = {"step": 0, "converted": str(self.weights.folder.name)}
        write_manifest(checkpoint, about, dict(sorted(records.items())))
        tokenizer = tokenizer_of(self.weights.folder)
        if copied := tokenizer_files(self.like):
            (folder / "tokenizer").mkdir(exist_ok=True)
            for file in [*copied, *special_tokens(self.like)]:
                shutil.copyfile(file, folder / "tokenizer" / file.name)
            tokenizer = str((folder.with_name(folder.name.removesuffix(".coming"))) / "tokenizer")
        data = DataConfig(tokenizer=tokenizer)
        if tokenizer is None:  # unknown, where the default would be bytes
            data = DataConfig(sources=(SourceConfig(format="tokens", path="tokens"),))
        length = self.weights.seq_len
        train = TrainConfig() if length is None else TrainConfig(seq_len=length)
        recipe = Recipe(name="converted", model=self.weights.config, data=data, train=train)
        write_durably(folder / RECIPE, dump_recipe(recipe))


def special_tokens(like: Path | None) -> list[Path]:
    """Returns the file that names special tokens and the length, if there is one: config.json."""
    config = None if like is None else like / CONFIG
    return [config] if config is not None and config.is_file() else []


def row_ranges(shape: Sequence[int], itemsize: int) -> list[tuple[int, int]]:
    """Returns ranges of rows of at most PART_BYTES; one row if that is larger."""
    if not shape or torch.Size(shape).numel() == 0:
        return [(0, shape[0] if shape else 0)]
    row = torch.Size(shape[1:]).numel() * itemsize
    rows = max(1, PART_BYTES // row)
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def catalog_of(files: Mapping[str, Sequence[Piece]]) -> Catalog:
    """Returns the catalog of the pieces in files."""
    chunks: dict[str, list[Chunk]] = {}
    entries: dict[str, Piece] = {}
    for file, pieces in files.items():
        for piece in pieces:
            entries.setdefault(piece.name, piece)
            chunk = Chunk(offsets=piece.offsets, sizes=piece.shape, file=file, key=piece.key)
            chunks.setdefault(piece.name, []).append(chunk)
    return Catalog(
        tensors={
            name: Entry(
                dtype=str(piece.dtype).removeprefix("torch."),
                shape=piece.whole,
                chunks=tuple(chunks[name]),
            )
            for name, piece in sorted(entries.items())
        }
    )
