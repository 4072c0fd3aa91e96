"""Sources of weights: tensors by canonical name, of which any box can be read alone."""

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from colonnade.launcher.checkpoint import verify
from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, read_catalog
from colonnade.launcher.checkpoint.folders import checkpoint_of, step_of
from colonnade.launcher.checkpoint.loader import checked_sizes
from colonnade.launcher.checkpoint.read import read_box
from colonnade.launcher.convert.huggingface.entry import Entry, Shapes
from colonnade.launcher.convert.huggingface.family import (
    Unsupported,
    check_copies,
    check_shapes,
    shapes_of,
    unread_tensors,
    without_absent_mtp,
)
from colonnade.launcher.convert.huggingface.folder import CONFIG, Shards, family_in, read_json
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.stages import recipe_at
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import without_unused
from colonnade.launcher.run_files import RECIPE
from colonnade.launcher.weights.direct import DTYPES, Files
from colonnade.models.config import ModelConfig

TOKENIZER = "tokenizer.json"
Box = tuple[slice, ...]  # a slice of each dimension, with start and stop
Notify = Callable[[str], object]


class Weights(ABC):
    """Weights of a model on disk.

    Attributes:
        folder: where they are.
        config: of the model, valid as the `[model]` table of a recipe.
        shapes: by canonical name, of parameters and buffers.
        seq_len: tokens of the sequences that the model is made for; None: it is not known.
    """

    folder: Path
    config: ModelConfig
    shapes: Shapes
    seq_len: int | None = None

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor on disk."""

    @abstractmethod
    def read(self, name: str, box: Box) -> Tensor:
        """Returns a box of a tensor, in its dtype on disk."""

    @property
    def folders(self) -> list[Path]:
        """The folders of all weights of which these are made."""
        return [self.folder]

    def whole(self, name: str) -> Tensor:
        """Returns a whole tensor."""
        return self.read(name, whole_box(self.shapes[name]))


def whole_box(shape: Sequence[int]) -> Box:
    """Returns the box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


@contextmanager
def open_weights(
    path: Path, notify: Notify, check: bool = True, once: bool = False
) -> Iterator[Weights]:
    """Opens a run (its newest checkpoint), one of its checkpoints, or a Hugging Face folder.

    Args:
        path: of it.
        notify: is called with a sentence on each thing that is left out.
        check: check the checksums of a checkpoint, and copies within a Hugging Face folder; as
            `verify`, collective.
        once: every tensor is read once, by this process: from the disk, in large pieces. The
            checksums of a checkpoint are then compared while it is read, if `check` is given.

    Raises:
        UserError: it is none of these, is damaged, or has what the model cannot represent.
    """
    with ExitStack() as stack:
        if (path / CONFIG).is_file():
            yield HuggingFaceWeights(path, stack, notify, check, once)
            return
        folder = checkpoint_of(path)
        if folder is None:
            raise UserError(
                f"{path}: neither a run with a checkpoint, nor a checkpoint, nor a Hugging Face "
                f"folder ({CONFIG} is missing); name such a folder"
            )
        if not once:
            if check:
                verify(folder)
            yield CheckpointWeights(folder, stack)
            return
        records = checked_sizes(folder).files if check else None
        files = stack.enter_context(closing(Files(folder, records)))
        yield CheckpointWeights(folder, stack, files)


def config_in(path: Path) -> ModelConfig:
    """Returns the model of a run, a checkpoint or a Hugging Face folder, without its weights."""
    with open_weights(path, lambda sentence: None, check=False) as weights:
        return weights.config


def fields_of(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the tables of a recipe that follow from weights: `[model]`, and of `[data]` the
    tokenizer, if one is known."""
    model = tomllib.loads(dump_recipe(Recipe(model=config_in(path))))["model"]
    name = tokenizer_of(path)
    return {"model": model} | ({} if name is None else {"data": {"tokenizer": name}})


def tokenizer_of(path: Path) -> str | None:
    """Returns what `data.tokenizer` is for these weights: the folder, if it has a tokenizer, or
    that of the run's recipe; None where that has none."""
    if (path / TOKENIZER).is_file():
        return str(path)
    if not recipe_of(path).is_file():
        return None
    return recipe_in_force(checkpoint_of(path) or path).data.tokenizer_name


def tokenizer_folder(path: Path) -> Path | None:
    """Returns the folder of the tokenizer's files; None where it has none, as that of bytes."""
    name = tokenizer_of(path)
    folder = None if name in (None, "bytes") else Path(name)
    return folder.parent if folder is not None and folder.is_file() else folder


def recipe_in_force(checkpoint: Path) -> Recipe:
    """Returns the recipe of the training stage in which a checkpoint of a run was made."""
    return recipe_at(load_recipe(recipe_of(checkpoint)), step_of(checkpoint) or 0)


def recipe_of(path: Path) -> Path:
    """Returns the recipe of a run, or of the run of a checkpoint."""
    return (path if step_of(path) is None else path.absolute().parent.parent) / RECIPE


class CheckpointWeights(Weights):
    """Weights of one of our checkpoints. The optimizer's state is left out."""

    def __init__(self, folder: Path, stack: ExitStack, direct: Files | None = None) -> None:
        recipe = recipe_of(folder)
        if not recipe.is_file():
            raise UserError(
                f"checkpoint {folder}: {recipe} is missing, which describes its model; name a "
                "checkpoint in the folder of its run"
            )
        self.folder, in_force = folder, recipe_in_force(folder)
        self.config, self.seq_len = in_force.model, in_force.train.seq_len
        self.catalog: Catalog = read_catalog(folder)
        self.shapes = shapes_of(self.config)
        absent = sorted(set(self.shapes) - set(self.catalog.tensors))
        if absent:
            raise UserError(
                f"checkpoint {folder} has no {absent[0]} ({len(absent)} such tensors), which its "
                f"recipe {recipe} has; the recipe is of another run"
            )
        self.stack, self.direct = stack, direct
        self.files: dict[str, Any] = {}

    def dtype(self, name: str) -> torch.dtype:
        return self.catalog.tensors[name].torch_dtype

    def file(self, name: str) -> Any:
        """Returns an open file."""
        if name not in self.files:
            opened = safe_open(self.folder / name, framework="pt")
            self.files[name] = self.stack.enter_context(opened)
        return self.files[name]

    def boxes(self, chunk: Chunk) -> Any:
        """Returns what gives boxes of a chunk."""
        if self.direct is not None:
            return self.direct.boxes(chunk.file, chunk.key)
        return self.file(chunk.file).get_slice(chunk.key)

    def read(self, name: str, box: Box) -> Tensor:
        return read_box(self.catalog.tensors[name], box, self.boxes)


class HuggingFaceWeights(Weights):
    """Weights of a Hugging Face folder."""

    def __init__(
        self, folder: Path, stack: ExitStack, notify: Notify, check: bool, once: bool = False
    ) -> None:
        fields = read_json(folder / CONFIG)
        family = family_in(folder, fields)
        try:
            config = family.config_from_hf(fields, notify)
            shards = Shards(folder, stack)
            config = without_absent_mtp(family, config, shards, notify)
            shapes = {name: tuple(shards.slice(name).get_shape()) for name in shards}
            entries = check_shapes(family, config, shapes)
            if check:
                check_copies(family, config, shards)
        except Unsupported as error:
            raise UserError(f"{folder}: {error}") from None
        for sentence in unread_tensors(family, shards):
            notify(sentence)
        self.folder, self.config, self.shapes = folder, without_unused(config), shapes_of(config)
        self.shards, length = shards, fields.get("max_position_embeddings")
        known = isinstance(length, int) and length > 0
        self.seq_len = length if known else config.learned_positions
        self.direct = stack.enter_context(closing(Files(folder))) if once else None
        self.entry_of: dict[str, Entry] = {n: e for e in entries for n in e.native_names}
        self.check_dtypes()

    def check_dtypes(self) -> None:
        """Raises UserError for a tensor whose dtype is not read."""
        for one in self.entry_of.values():
            for name in one.hf_names:
                if (dtype := self.shards.slice(name).get_dtype()) not in DTYPES:
                    raise UserError(
                        f"{self.folder}: {name} is {dtype}; only 16, 32 and 64 bit floating point "
                        "is read: dequantise it first"
                    )

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.shards.slice(self.entry_of[name].hf_names[0]).get_dtype()]

    def read(self, name: str, box: Box) -> Tensor:
        return self.entry_of[name].read(name, box, self.shapes, self.boxes)

    def boxes(self, name: str) -> Any:
        """Returns what gives boxes of a Hugging Face tensor."""
        if self.direct is not None:
            return self.direct.boxes(self.shards.file_of[name], name)
        return self.shards.slice(name)
