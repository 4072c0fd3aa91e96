"""Storage for torch.distributed.checkpoint: chunks in safetensors, metadata in JSON, no pickles."""

import errno
import math
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, Entry, damaged
from colonnade.launcher.checkpoint.folders import TENSORS, sync, write
from colonnade.launcher.cluster.collective import rank


class SafetensorsWriter(StorageWriter):
    """Writes one safetensors file per rank into `folder`, and `tensors.json` from rank 0.

    Failures of the disk are raised as OSError with their errno.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.needed = 0  # bytes of all ranks' chunks; known on rank 0 once the plan is made

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a writer serves one checkpoint, named when it is made."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the folder visible on this rank's node."""
        self.folder.mkdir(exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The planner's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The planner's plans as they are, their bytes counted."""
        self.needed = sum(_bytes(item) for plan in plans for item in plan.items)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into `rank-NNNNN.safetensors`, down to the disk."""
        path = self.folder / f"rank-{rank():05d}.safetensors"
        chunks: dict[str, torch.Tensor] = {}
        results: list[WriteResult] = []
        storages: set[int] = set()
        for item in plan.items:
            tensor = cast(torch.Tensor, planner.resolve_data(item)).detach().cpu().contiguous()
            if tensor.untyped_storage().data_ptr() in storages:
                tensor = tensor.clone()  # tied or sliced: safetensors refuses shared memory
            storages.add(tensor.untyped_storage().data_ptr())
            chunk = _chunk(item, path.name)
            chunks[chunk.key] = tensor
            results.append(WriteResult(item.index, _bytes(item), chunk))
        if chunks:
            try:
                save_file(chunks, path)
                # safetensors makes it for the owner alone; a team reads what its folder lets it.
                path.chmod(path.parent.stat().st_mode & 0o666)
            except SafetensorError as error:
                raise _os_error(error, path) from error
            sync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `tensors.json`, once every rank's file is seen from here (rank 0)."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for result in (result for of_rank in results for result in of_rank):
            chunks[result.index.fqn].append(result.storage_data)
        for file in sorted({chunk.file for of_tensor in chunks.values() for chunk in of_tensor}):
            if not (self.folder / file).is_file():
                reason = "not visible to rank 0: every node must share the folder of the run"
                raise FileNotFoundError(errno.ENOENT, reason, str(self.folder / file))
        tensors = cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)
        catalog = Catalog(
            tensors={
                name: Entry(
                    dtype=str(tensor.properties.dtype).removeprefix("torch."),
                    shape=tuple(tensor.size),
                    chunks=tuple(chunks[name]),
                )
                for name, tensor in sorted(tensors.items())
            }
        )
        write(self.folder / TENSORS, catalog.model_dump_json())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by name."""
        return False


class SafetensorsReader(StorageReader):
    """Reads the chunks that `catalog` lists from `folder`; UserError where a file is damaged."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self.folder = folder
        self.catalog = catalog
        self.chunks = {
            (name, chunk.offsets): chunk
            for name, entry in catalog.tensors.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to forget: a reader serves one checkpoint, named when it is made."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The catalog in the terms of torch.distributed.checkpoint."""
        return self.catalog.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The planner's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The planner's plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the part of each chunk that this rank needs into its tensors."""
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
                raise damaged(path, str(error)) from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Never chosen by name."""
        return False


def _read(opened: Any, chunk: Chunk, item: ReadItem, target: torch.Tensor) -> None:
    stored = opened.get_slice(chunk.key)
    if tuple(stored.get_shape()) != chunk.sizes:
        raise SafetensorError(f"{chunk.key} is {stored.get_shape()}, {TENSORS} says {chunk.sizes}")
    starts = zip(item.storage_offsets, item.lengths, strict=True)
    part = stored[tuple(slice(start, start + length) for start, length in starts)]
    if part.dtype != target.dtype:
        raise SafetensorError(f"{chunk.key} is {part.dtype}, {TENSORS} says {target.dtype}")
    target.detach().copy_(part)


def _chunk(item: WriteItem, file: str) -> Chunk:
    """Where `item` is stored: under its own name if it is a whole tensor, else with its offsets."""
    data = _data(item)
    offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    whole = data.chunk.sizes == data.size
    key = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, offsets))}"
    return Chunk(offsets=offsets, sizes=sizes, file=file, key=key)


def _data(item: WriteItem) -> TensorWriteData:
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor: it belongs in the JSON state")
    return item.tensor_data


def _bytes(item: WriteItem) -> int:
    data = _data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """`error` as the OSError it reports; safetensors tells the errno in its message only."""
    found = re.search(r"os error (\d+)", str(error))
    if found is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path))
