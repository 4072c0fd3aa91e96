"""The verb `convert`: writes weights in the other format, file by file, in bounded memory.

Files are planned from names and shapes alone, so that a conversion that was interrupted goes on
behind its finished files. Each is written beside its name, synced and renamed; `convert.json` keeps
what the conversion is of, and the checksums of finished files. In the end all files are read again
and compared with these, and the folder gets its name.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade.launcher.checkpoint.folders import fsync, write_durably
from colonnade.launcher.checkpoint.manifest import FileRecord, checksums
from colonnade.launcher.checkpoint.write import write_tensors
from colonnade.launcher.convert.huggingface.folder import in_files
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.hf import HuggingFaceTarget
from colonnade.launcher.weights.native import NativeTarget
from colonnade.launcher.weights.source import Weights, open_weights
from colonnade.launcher.weights.target import Piece, Target

PROGRESS = "convert.json"
FILE_BYTES = 2 * 10**9  # largest file, unless one piece is larger; the memory that is needed
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16,
          "fp16": torch.float16}  # fmt: skip


@dataclass(frozen=True)
class Converted:
    """What was converted.

    Attributes:
        folder: that was written.
        tensors: in it.
        bytes: of them.
        files: that hold them.
        kept: files that an earlier, interrupted call had finished.
        seconds: that this call took.
    """

    folder: str
    tensors: int
    bytes: int
    files: int
    kept: int
    seconds: float


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: str | None = None,
    family: str | None = None,
    file_bytes: int = FILE_BYTES,
    report: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Converted:
    """Converts a run, a checkpoint or a Hugging Face folder.

    Args:
        source: of the weights; of a run its newest checkpoint. The optimizer's state is left out.
        destination: the folder to write, which must not exist.
        to: `hf`, or `native`: a folder like a run's, from which `train.init` and `generate` read.
        dtype: fp64, fp32, bf16 or fp16; None: that of each tensor.
        family: the Hugging Face class, such as "LlamaForCausalLM"; None: the first that can
            represent the model.
        file_bytes: largest size of a file, unless one tensor is larger.
        report: is called with lines of progress, and with what is left out.

    Raises:
        UserError: the source is no model or is damaged, no family can represent it, the destination
            exists, or the disk refuses; finished files stay, and the same call goes on with them.
    """
    start, folder = time.monotonic(), Path(destination)
    if folder.exists():
        raise UserError(f"convert: {folder} exists already; name a new folder")
    with open_weights(Path(source), report) as weights:
        target = target_of(to, weights, family)
        files = in_files(target.pieces(dtype_of(dtype)), lambda piece: piece.bytes, file_bytes)
        names = target.file_names(len(files))
        progress = Progress.open(folder, identity(weights, target, dtype, file_bytes))
        kept = len(progress.files)
        for number, (name, pieces) in enumerate(zip(names, files, strict=True), 1):
            if name not in progress.files:
                progress.write(name, {p.key: p.read() for p in pieces}, target.metadata)
                size = sum(piece.bytes for piece in pieces)
                report(f"{number} of {len(files)} files, {name}: {size:,} bytes")
        progress.verify()
        progress.finish(target, dict(zip(names, files, strict=True)), folder)
        pieces = [piece for of_file in files for piece in of_file]
        total = sum(piece.bytes for piece in pieces)
    seconds = time.monotonic() - start
    return Converted(
        str(folder), len({p.name for p in pieces}), total, len(files), kept, round(seconds, 3)
    )


def target_of(to: str, weights: Weights, family: str | None) -> Target:
    """Returns the format to write; raises UserError for one that cannot represent the model."""
    if to == "hf":
        return HuggingFaceTarget(weights, family)
    if family is not None:
        raise UserError("convert --family is for --to hf: leave it out")
    return NativeTarget(weights)


def dtype_of(name: str | None) -> torch.dtype | None:
    """Returns the dtype of a name of DTYPES."""
    if name is not None and name not in DTYPES:
        raise UserError(f"convert --dtype {name}: give one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def identity(
    weights: Weights, target: Target, dtype: str | None, file_bytes: int
) -> dict[str, Any]:
    """Returns what makes two conversions the same: the source's files, and the options."""
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(weights.folder.iterdir())
        if path.is_file()
    ]
    return {
        "source": str(weights.folder.absolute()),
        "files": [list(stat) for stat in stats],
        "target": target.describe(),
        "dtype": dtype,
        "file_bytes": file_bytes,
    }


class Progress:
    """The folder of a conversion that is not finished, and its finished files.

    Attributes:
        folder: `DESTINATION.coming`.
        identity: of the conversion.
        files: that are finished, by name.
    """

    def __init__(
        self, folder: Path, identity: dict[str, Any], files: dict[str, FileRecord]
    ) -> None:
        self.folder, self.identity, self.files = folder, identity, files

    @classmethod
    def open(cls, destination: Path, identity: dict[str, Any]) -> "Progress":
        """Makes the folder, or goes on with that of an earlier call.

        Raises:
            UserError: it is of another conversion, or cannot be made.
        """
        folder = destination.with_name(f"{destination.name}.coming")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            known = folder / PROGRESS
            if not known.exists():
                return cls(folder, identity, {})
            content = json.loads(known.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"convert: {folder} cannot be used ({error}); remove it") from error
        if content.get("identity") != identity:
            raise UserError(
                f"convert: {folder} holds a part of another conversion, or its source has changed; "
                "remove it, or name another folder"
            )
        found = {n: FileRecord.model_validate(r) for n, r in content["files"].items()}
        return cls(folder, identity, {n: r for n, r in found.items() if (folder / n).exists()})

    def write(
        self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None
    ) -> None:
        """Writes a file, and records it once it is on the disk."""
        part = self.folder / f"{name}.part"
        try:
            record = write_tensors(part, tensors, metadata)
            part.rename(self.folder / name)
            self.files[name] = record
            self.save()
        except OSError as error:
            raise self.refused(error) from error

    def refused(self, error: OSError) -> UserError:
        """Returns the error for a disk that refuses."""
        return UserError(
            f"convert: cannot write in {self.folder}: {error.strerror}; free space, then repeat "
            "the call, which goes on behind the finished files"
        )

    def save(self) -> None:
        """Writes the record of the finished files."""
        files = {name: record.model_dump(mode="json") for name, record in self.files.items()}
        content = json.dumps({"identity": self.identity, "files": files})
        new = self.folder / f"{PROGRESS}.new"
        write_durably(new, content)
        os.replace(new, self.folder / PROGRESS)

    def verify(self) -> None:
        """Reads all files again; raises UserError for one that is not what was written."""
        for name, record in list(self.files.items()):
            if checksums(self.folder / name) != record:
                del self.files[name]
                self.save()
                raise UserError(
                    f"convert: {self.folder / name} is not what was written; check the disk, and "
                    "repeat the call, which writes it again"
                )

    def finish(
        self, target: Target, files: Mapping[str, Sequence[Piece]], destination: Path
    ) -> None:
        """Writes what comes with the tensors' files, and gives the folder its name."""
        try:
            target.finish(self.folder, files, self.files)
            (self.folder / PROGRESS).unlink()
            for part in self.folder.glob("*.part"):
                part.unlink()
            fsync(self.folder)
            self.folder.rename(destination)
            fsync(destination.absolute().parent)
        except OSError as error:
            raise self.refused(error) from error
