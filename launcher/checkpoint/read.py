"""Reads the chunks of a checkpoint for torch.distributed.checkpoint."""

import os
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, Entry
from colonnade.launcher.checkpoint.folders import TENSORS, damaged_error


class SafetensorsReader(StorageReader):
    """Reads the chunks that `catalog` lists from `folder`; raises UserError on a damaged file."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.folder = folder
        self.catalog = catalog
        self.chunks = {
            (name, chunk.offsets): chunk
            for name, entry in catalog.tensors.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a reader serves one checkpoint, given to its constructor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the catalog as the metadata of torch.distributed.checkpoint."""
        return self.catalog.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: the constructor has set up all that reading needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the planner's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the planners' plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the slices of chunks that this rank's shards need into its tensors."""
        by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            index = item.storage_index
            chunk = self.chunks[index.fqn, tuple(cast(torch.Size, index.offset))]
            by_file[chunk.file].append((chunk, item))
        for file, reads in by_file.items():
            path = self.folder / file
            try:
                with safe_open(path, framework="pt") as opened:
                    for chunk, item in reads:
                        _read(opened, chunk, item, planner.resolve_tensor(item))
            except (SafetensorError, OSError) as error:
                raise damaged_error(path, str(error)) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns False: torch must never choose this class by a checkpoint's name."""
        return False


def _read(opened: Any, chunk: Chunk, item: ReadItem, target: torch.Tensor) -> None:
    """Copies the slice of `chunk` that `item` asks for into `target`."""
    stored = opened.get_slice(chunk.key)
    if tuple(stored.get_shape()) != chunk.sizes:
        raise SafetensorError(f"{chunk.key} is {stored.get_shape()}, {TENSORS} says {chunk.sizes}")
    ranges = zip(item.storage_offsets, item.lengths, strict=True)
    values = stored[tuple(slice(start, start + length) for start, length in ranges)]
    if values.dtype != target.dtype:
        raise SafetensorError(f"{chunk.key} is {values.dtype}, {TENSORS} says {target.dtype}")
    target.detach().copy_(values)


def read_box(
    entry: Entry, box: tuple[slice, ...], slice_of: Callable[[Chunk], Any]
) -> torch.Tensor:
    """Reads a box of a tensor, of a checkpoint whose files have been checked; it is a view of the
    file where one chunk has all of it.

    Args:
        entry: of the tensor, in the catalog.
        box: a slice of each dimension, with start and stop.
        slice_of: returns what gives boxes of a chunk (`get_slice` of safetensors).
    """
    shape = [at.stop - at.start for at in box]
    found = torch.empty(0, dtype=entry.torch_dtype)
    for chunk in entry.chunks:
        ends = zip(box, chunk.offsets, chunk.sizes, strict=True)
        common = [(max(at.start, o), min(at.stop, o + size)) for at, o, size in ends]
        if any(start >= stop for start, stop in common):
            continue
        stored = tuple(slice(a - o, b - o) for (a, b), o in zip(common, chunk.offsets, strict=True))
        part = slice_of(chunk)[stored]
        if list(part.shape) == shape:
            return part
        if list(found.shape) != shape:
            found = torch.empty(shape, dtype=entry.torch_dtype)
        target = tuple(
            slice(a - at.start, b - at.start) for (a, b), at in zip(common, box, strict=True)
        )
        found[target] = part
    return found.reshape(shape)


def read_tensor(folder: Path, entry: Entry) -> torch.Tensor:
    """Reads a whole tensor of a checkpoint whose files have been checked."""
    with ExitStack() as stack:

        def slice_of(chunk: Chunk) -> Any:
            return stack.enter_context(safe_open(folder / chunk.file, "pt")).get_slice(chunk.key)

        return read_box(entry, tuple(slice(0, size) for size in entry.shape), slice_of)
