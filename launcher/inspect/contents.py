"""The content of a checkpoint or of a Hugging Face folder: its files and its tensors."""

import math
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from colonnade.launcher.checkpoint.catalog import read_catalog
from colonnade.launcher.checkpoint.folders import MANIFEST, TENSORS, checkpoint_of
from colonnade.launcher.checkpoint.loader import read_state
from colonnade.launcher.checkpoint.manifest import (
    FileRecord,
    block_faults,
    blocks,
    checksums,
    read_manifest,
    size_faults,
)
from colonnade.launcher.checkpoint.read import read_tensor
from colonnade.launcher.convert.huggingface.folder import CONFIG, Shards, read_json
from colonnade.launcher.errors import UserError


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: torch's name of its dtype, its global shape, and the number of its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: int

    @property
    def bytes(self) -> int:
        """The bytes of all its elements."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Contents:
    """What a folder holds.

    Attributes:
        folder: of the checkpoint.
        kind: `colonnade` or `huggingface`.
        about: what its writer says: step, layout, versions; of Hugging Face, the architecture.
        files: by name, with size and checksums; of Hugging Face those of the files as they are.
        damage: by file, why it is not what was written; Hugging Face records nothing to tell.
        tensors: by name.
        state: values that are no tensors.
        read: returns a tensor by its name.
    """

    folder: Path
    kind: str
    about: dict[str, Any]
    files: dict[str, FileRecord]
    damage: dict[str, str]
    tensors: dict[str, TensorInfo]
    state: dict[str, Any]
    read: Callable[[str], torch.Tensor]


def open_contents(path: Path) -> Contents:
    """Opens a checkpoint, the newest one of a run, or a Hugging Face folder, and checks its files.

    Raises:
        UserError: it is none of these, or its manifest is missing or damaged.
    """
    if (path / CONFIG).is_file():
        return open_huggingface(path)
    folder = path if (path / MANIFEST).is_file() else checkpoint_of(path)  # also one set aside
    if folder is None:
        raise UserError(
            f"{path}: neither a checkpoint, nor a run with one, nor a Hugging Face folder "
            f"({CONFIG} is missing); name such a folder"
        )
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> Contents:
    """Opens one of our checkpoints; where the catalog is damaged, no tensors are listed."""
    manifest = read_manifest(folder)
    damage = dict(size_faults(folder, manifest))
    share = [block for block in blocks(manifest) if block.name not in damage]
    for name, reason in block_faults(folder, share):
        damage.setdefault(name, reason)
    catalog = None if TENSORS in damage else read_catalog(folder)
    entries = {} if catalog is None else catalog.tensors
    return Contents(
        folder,
        "colonnade",
        manifest.about,
        manifest.files,
        damage,
        {n: TensorInfo(e.dtype, e.shape, len(e.chunks)) for n, e in entries.items()},
        {} if damage else read_state(folder),
        lambda name: read_tensor(folder, entries[name]),
    )


def open_huggingface(folder: Path) -> Contents:
    """Opens a Hugging Face folder."""
    config = read_json(folder / CONFIG)
    with ExitStack() as stack:
        file_of = Shards(folder, stack).file_of
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(file_of.values())):
        with safe_open(folder / file, framework="pt") as opened:
            for name in (name for name, held in file_of.items() if held == file):
                shape = tuple(opened.get_slice(name).get_shape())
                # a box of no element has the dtype, and reads nothing
                dtype = opened.get_slice(name)[(slice(0, 0),) * len(shape)].dtype
                tensors[name] = TensorInfo(str(dtype).removeprefix("torch."), shape, 1)

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / file_of[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

    about = {"architectures": config.get("architectures"), "model_type": config.get("model_type")}
    files = {name: checksums(folder / name) for name in sorted({CONFIG, *file_of.values()})}
    return Contents(
        folder, "huggingface", about, files, {}, dict(sorted(tensors.items())), {}, read
    )


def checksum(record: FileRecord) -> str:
    """Returns one checksum of a file, of those of its blocks, in hexadecimal digits."""
    crcs = b"".join(crc.to_bytes(4, "little") for crc in record.crc32)
    return f"{zlib.crc32(crcs):08x}"
