"""`tensors.json`: which tensors a checkpoint holds, and in which file each chunk of them lies."""

import json
import math
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ValidationError, field_validator, model_validator
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from colonnade.launcher.checkpoint.folders import STATE, TENSORS, earlier
from colonnade.launcher.errors import UserError


class Chunk(BaseModel, frozen=True, extra="forbid"):
    """A box of a tensor: where it starts, its extent, and the safetensors entry that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str

    @field_validator("file")
    @classmethod
    def _inside(cls, file: str) -> str:
        if Path(file).name != file:
            raise ValueError("a chunk lies outside the checkpoint's folder")
        return file


class Entry(BaseModel, frozen=True, extra="forbid"):
    """One tensor: dtype by torch's name (`bfloat16`), global shape, chunks that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError("not a dtype of this torch")
        return dtype

    @model_validator(mode="after")
    def _covered(self) -> "Entry":
        # Save leaves no overlap, so equal volumes mean that no element is missing.
        if sum(math.prod(chunk.sizes) for chunk in self.chunks) != math.prod(self.shape):
            raise ValueError("the chunks do not cover the tensor")
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


# 1: names with the code's structure in them (`model.wiring.blocks.3.first.q`); 2: canonical ones.
FORMAT: Literal[2] = 2


class Catalog(BaseModel, frozen=True, extra="forbid"):
    """The whole of `tensors.json`."""

    version: Literal[2] = FORMAT
    tensors: dict[str, Entry]

    def metadata(self) -> Metadata:
        """The same in the terms of torch.distributed.checkpoint."""
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


def read(folder: Path) -> Catalog:
    """The catalog of the checkpoint `folder`; UserError if it is absent or damaged."""
    written = text(folder, TENSORS)
    try:
        return Catalog.model_validate_json(written)
    except ValidationError as error:
        check_format(folder, written)
        first = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise damaged(folder / TENSORS, f"{where}{first['msg']}") from None


def check_format(folder: Path, written: str) -> None:
    """Say so where a catalog that cannot be read is one of another format."""
    try:
        version = json.loads(written)["version"]
    except (ValueError, TypeError, KeyError):
        return  # no catalog at all: damaged
    if version != FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {version}, and this version of colonnade reads format "
            f"{FORMAT}, whose tensors have other names: read it with the version that wrote it, or "
            "train anew"
        )


def text(folder: Path, name: str) -> str:
    """The JSON file `name` of the checkpoint `folder`; UserError if it cannot be read."""
    if not (folder / STATE).is_file():
        problem = "is not a complete checkpoint" if folder.exists() else "does not exist"
        other = earlier(folder)
        remedy = f"the newest earlier one is {other}" if other else "there is none before it"
        raise UserError(f"checkpoint {folder} {problem}: {remedy}")
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(folder / name, str(error)) from None


def damaged(path: Path, reason: str) -> UserError:
    """The message for the file `path` of a checkpoint, unreadable or not what was written."""
    other = earlier(path.parent)
    remedy = (
        f"resume from an earlier checkpoint: {other}"
        if other
        else "there is no earlier checkpoint beside it; restore the file from a copy, or start anew"
    )
    return UserError(f"{path} is damaged ({reason}): {remedy}")
