"""`tensors.json` lists the tensors of a checkpoint and the file that holds each of their chunks."""

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

from colonnade.launcher.checkpoint.folders import STATE, TENSORS, newest_before
from colonnade.launcher.errors import UserError


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


# Format 1 named tensors by their modules (`model.wiring.blocks.3.first.q`); format 2 uses canonical
# parameter names (`blocks.3.q`).
FORMAT: Literal[2] = 2


class Catalog(BaseModel, frozen=True, extra="forbid"):
    """The content of `tensors.json`: the format's version and every tensor by name."""

    version: Literal[2] = FORMAT
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


def read(folder: Path) -> Catalog:
    """Reads the catalog of the checkpoint `folder`; raises UserError if it is absent or damaged."""
    content = read_text(folder, TENSORS)
    try:
        return Catalog.model_validate_json(content)
    except ValidationError as error:
        check_format(folder, content)
        first = error.errors(include_url=False)[0]
        location = "".join(f"{key}: " for key in first["loc"])
        raise damaged_error(folder / TENSORS, f"{location}{first['msg']}") from None


def check_format(folder: Path, content: str) -> None:
    """Raises UserError if the `tensors.json` text `content` is of another format version."""
    try:
        version = json.loads(content)["version"]
    except (ValueError, TypeError, KeyError):
        return  # not a catalog of any version: the caller reports damage
    if version != FORMAT:
        raise UserError(
            f"checkpoint {folder} has format {version}, and this version of colonnade reads format "
            f"{FORMAT}, whose tensors have other names: read it with the version that wrote it, or "
            "train anew"
        )


def read_text(folder: Path, name: str) -> str:
    """Reads the JSON file `name` of the checkpoint `folder`; raises UserError if it cannot."""
    if not (folder / STATE).is_file():
        problem = "is not a complete checkpoint" if folder.exists() else "does not exist"
        earlier = newest_before(folder)
        remedy = f"the newest earlier one is {earlier}" if earlier else "there is none before it"
        raise UserError(f"checkpoint {folder} {problem}: {remedy}")
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged_error(folder / name, str(error)) from None


def damaged_error(path: Path, reason: str) -> UserError:
    """Returns the error for the file `path` of a checkpoint that is unreadable or altered."""
    earlier = newest_before(path.parent)
    remedy = (
        f"resume from an earlier checkpoint: {earlier}"
        if earlier
        else "there is no earlier checkpoint beside it; restore the file from a copy, or start anew"
    )
    return UserError(f"{path} is damaged ({reason}): {remedy}")
