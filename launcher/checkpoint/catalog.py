"""`tensors.json` lists the tensors of a checkpoint and the file that holds each of their chunks."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError, field_validator, model_validator
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from colonnade.launcher.checkpoint.folders import TENSORS, damaged_error


class Chunk(BaseModel, frozen=True, extra="forbid"):
    """A box of a tensor: its offsets, its sizes, and the safetensors file and key that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str

    @field_validator("file")
    @classmethod
    def _has_no_folder(cls, file: str) -> str:
        """Refuses a path with folders, so that a catalog cannot name files outside its own."""
        if Path(file).name != file:
            raise ValueError("a chunk lies outside the checkpoint's folder")
        return file


def chunk_key(name: str, offsets: Sequence[int], whole: bool) -> str:
    """Returns the key of a chunk in its file: the tensor's name, with offsets if it is a part."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


class Entry(BaseModel, frozen=True, extra="forbid"):
    """One tensor: torch's name of its dtype (`bfloat16`), global shape, and chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @field_validator("dtype")
    @classmethod
    def _is_torch_dtype(cls, dtype: str) -> str:
        """Refuses names that are not dtypes of the installed torch."""
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError("not a dtype of this torch")
        return dtype

    @model_validator(mode="after")
    def _chunks_cover_it(self) -> "Entry":
        """Refuses chunks that do not cover the tensor."""
        # The save planner deduplicates chunks, so equal volumes mean that no element is missing.
        if sum(math.prod(chunk.sizes) for chunk in self.chunks) != math.prod(self.shape):
            raise ValueError("the chunks do not cover the tensor")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a `torch.dtype`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Catalog(BaseModel, frozen=True, extra="forbid"):
    """The content of `tensors.json`: every tensor by its canonical name."""

    tensors: dict[str, Entry]

    def metadata(self) -> Metadata:
        """Converts the catalog to the metadata of torch.distributed.checkpoint."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=entry.torch_dtype),
                    size=torch.Size(entry.shape),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                        for chunk in entry.chunks
                    ],
                )
                for name, entry in self.tensors.items()
            }
        )


def read_catalog(folder: Path) -> Catalog:
    """Reads the catalog of a checkpoint whose files have been checked.

    Raises:
        UserError: it lists no tensors that could be read.
    """
    try:
        return Catalog.model_validate_json((folder / TENSORS).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = "".join(f"{key}: " for key in first["loc"])
        raise damaged_error(folder / TENSORS, f"{location}{first['msg']}") from None
