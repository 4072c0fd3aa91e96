"""The verb `convert`: writes weights in the other format, file by file, in bounded memory.

Files are planned from names and shapes alone, so that a conversion that was interrupted goes on
behind its finished files. Each is written beside its name, synced, renamed, read again and compared
with the checksums of what was written; `convert.json` keeps what the conversion is of, and the
checksums of finished files. In the end the logits of small models are compared with those of the
source, and the folder gets its name.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.checkpoint.manifest import FileRecord
from colonnade.launcher.convert.huggingface.folder import in_files
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.fold import Folded
from colonnade.launcher.weights.hf import HuggingFaceTarget
from colonnade.launcher.weights.logits import compare
from colonnade.launcher.weights.native import NativeTarget
from colonnade.launcher.weights.progress import Progress
from colonnade.launcher.weights.source import Weights, open_weights
from colonnade.launcher.weights.stream import Stream
from colonnade.launcher.weights.surgery import edited
from colonnade.launcher.weights.target import Piece, Target

FILE_BYTES = 2 * 10**9  # largest file, unless one piece is larger
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
        logits: largest difference of the logits of random tokens from those of the source,
            relative to the largest; None: they were not compared.
        seconds: that this call took.
    """

    folder: str
    tensors: int
    bytes: int
    files: int
    kept: int
    logits: float | None
    seconds: float


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    dtype: str | None = None,
    family: str | None = None,
    edits: Sequence[str] = (),
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
        edits: weight surgery, `NAME=VALUE` each (`launcher.weights.surgery`).
        file_bytes: largest size of a file, unless one tensor is larger.
        report: is called with lines of progress, and with what is left out.

    Raises:
        UserError: the source is no model or is damaged, no family can represent it, the destination
            exists, or the disk refuses; finished files stay, and the same call goes on with them.
        LogitsDifferError: what was written computes something else than the source.
    """
    start, folder = time.monotonic(), Path(destination)
    if folder.exists():
        raise UserError(f"convert: {folder} exists already; name a new folder")
    # edits read a tensor several times, or parts of it in another order than its file has
    with ExitStack() as others, open_weights(Path(source), report, once=not edits) as opened:
        weights = edited(opened, edits, others, report)
        target = target_of(to, weights, family, report)
        files = in_files(target.pieces(dtype_of(dtype)), lambda piece: piece.bytes, file_bytes)
        named = dict(zip(target.file_names(len(files)), files, strict=True))
        progress = Progress.open(
            folder, identity(weights, target, dtype, edits, file_bytes), target.place
        )
        kept = len(progress.files)
        write(progress, named, target.metadata, report)
        progress.complete(target, named)
        logits = compare(weights, target, dtype_of(dtype), progress.folder, report)
        progress.rename(folder)
        pieces = [piece for of_file in files for piece in of_file]
        total = sum(piece.bytes for piece in pieces)
    tensors, seconds = len({piece.name for piece in pieces}), round(time.monotonic() - start, 3)
    return Converted(str(folder), tensors, total, len(files), kept, logits, seconds)


def write(
    progress: Progress,
    files: Mapping[str, Sequence[Piece]],
    metadata: Mapping[str, str] | None,
    report: Callable[[str], object],
) -> None:
    """Writes the files that are not finished, and checks all; raises UserError where the disk
    refuses, or gives back what was not written."""

    def finished(name: str, text: str, record: FileRecord) -> None:
        progress.add(name, record)
        report(text)

    kept = list(progress.files)
    try:
        with Stream() as stream:
            for name in kept:
                stream.check(partial(progress.check, name))
            for number, (name, pieces) in enumerate(files.items(), 1):
                if name not in kept:
                    size = sum(piece.bytes for piece in pieces)
                    text = f"{number} of {len(files)} files, {name}: {size:,} bytes"
                    stream.write(
                        progress.part(name), pieces, metadata, partial(finished, name, text)
                    )
    except OSError as error:
        raise progress.refused(error) from error


def target_of(
    to: str, weights: Weights, family: str | None, report: Callable[[str], object]
) -> Target:
    """Returns the format to write; raises UserError for one that cannot represent the model."""
    if to == "hf":
        if weights.config.sigma_reparam:
            report("σReparam is folded: plain weights γ W / σ(W) are written")
            weights = Folded(weights)
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
    weights: Weights, target: Target, dtype: str | None, edits: Sequence[str], file_bytes: int
) -> dict[str, Any]:
    """Returns what makes two conversions the same: the source's files, and the options."""
    stats = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for folder in weights.folders
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return {
        "source": str(weights.folder.absolute()),
        "files": [list(stat) for stat in stats],
        "target": target.describe(),
        "dtype": dtype,
        **({"edits": list(edits)} if edits else {}),
        "file_bytes": file_bytes,
    }
