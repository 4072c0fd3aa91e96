"""Storage for torch.distributed.checkpoint: chunks in safetensors, metadata in JSON, no pickle."""

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

from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, Entry, damaged_error
from colonnade.launcher.checkpoint.folders import TENSORS, fsync, write_durably
from colonnade.launcher.cluster.collective import rank


class SafetensorsWriter(StorageWriter):
    """Writes one safetensors file per rank into `folder`, and `tensors.json` from rank 0.

    Raises failures of the disk as OSError with their errno.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.needed_bytes = 0  # of all ranks' chunks; set on rank 0 by prepare_global_plan

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing: a writer serves one checkpoint, given to its constructor."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder if this rank's node does not see it yet."""
        self.folder.mkdir(exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the planner's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Returns the planners' plans unchanged, after summing their bytes."""
        self.needed_bytes = sum(_bytes(item) for plan in plans for item in plan.items)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's chunks to `rank-NNNNN.safetensors` and waits until it is on disk."""
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
                # safetensors creates the file readable by its owner only; give it the permissions
                # of its folder, so that a team can share checkpoints.
                path.chmod(path.parent.stat().st_mode & 0o666)
            except SafetensorError as error:
                raise _os_error(error, path) from error
            fsync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes `tensors.json` on rank 0, after checking that rank 0 sees every rank's file."""
        chunks: dict[str, list[Chunk]] = defaultdict(list)
        for result in (result for rank_results in results for result in rank_results):
            chunks[result.index.fqn].append(result.storage_data)
        all_chunks = [chunk for tensor_chunks in chunks.values() for chunk in tensor_chunks]
        for file in sorted({chunk.file for chunk in all_chunks}):
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
        write_durably(self.folder / TENSORS, catalog.model_dump_json())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Returns False: torch must never choose this class by a checkpoint's name."""
        return False


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


def _chunk(item: WriteItem, file: str) -> Chunk:
    """Returns the chunk of `item`; its key is the tensor's name, with offsets if it is a shard."""
    data = _data(item)
    offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
    is_full_tensor = data.chunk.sizes == data.size
    key = item.index.fqn if is_full_tensor else f"{item.index.fqn}@{','.join(map(str, offsets))}"
    return Chunk(offsets=offsets, sizes=sizes, file=file, key=key)


def _data(item: WriteItem) -> TensorWriteData:
    """Returns the tensor data of `item`; raises TypeError if it is not a tensor."""
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor: it belongs in the JSON state")
    return item.tensor_data


def _bytes(item: WriteItem) -> int:
    """Returns the size of the chunk of `item` in bytes."""
    data = _data(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _os_error(error: SafetensorError, path: Path) -> OSError:
    """Converts `error` to an OSError; safetensors gives the errno only in its message's text."""
    match = re.search(r"os error (\d+)", str(error))
    if match is None:
        return OSError(errno.EIO, str(error), str(path))
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path))
