"""The verb `inspect`: reports on a checkpoint, or on the differences of two."""

from pathlib import Path
from typing import Any

import torch

from colonnade.launcher.errors import UserError
from colonnade.launcher.inspect.contents import Contents, checksum, open_contents


def inspect(checkpoint: str | Path, other: str | Path | None = None) -> dict[str, Any]:
    """Reports what a checkpoint holds and whether its files are whole; with `other`, what differs.

    Tensors are compared one by one: the memory is that of two of them, in fp64.

    Args:
        checkpoint: one of ours, a run (its newest), or a Hugging Face folder.
        other: to compare with it.

    Returns:
        the report: `whole` says that no file of either is damaged, and `equal`, of two, that they
        hold the same tensors.

    Raises:
        UserError: a folder is no checkpoint, or of two one is damaged.
    """
    first = open_contents(Path(checkpoint))
    if other is None:
        return report_of(first)
    second = open_contents(Path(other))
    for contents in (first, second):
        for name, reason in contents.damage.items():
            raise UserError(f"{contents.folder / name} is damaged ({reason}): compare whole ones")
    return compare(first, second)


def report_of(contents: Contents) -> dict[str, Any]:
    """Returns the content of a checkpoint for JSON, sizes in bytes."""
    return {
        "checkpoint": str(contents.folder),
        "kind": contents.kind,
        "whole": not contents.damage,
        "about": contents.about,
        "files": {
            name: {
                "bytes": record.size,
                "checksum": checksum(record),
                **({"damage": contents.damage[name]} if name in contents.damage else {}),
            }
            for name, record in contents.files.items()
        },
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "chunks": t.chunks, "bytes": t.bytes}
            for name, t in contents.tensors.items()
        },
        "state": contents.state,
    }


def compare(first: Contents, second: Contents) -> dict[str, Any]:
    """Returns the differences of two checkpoints for JSON."""
    differ: dict[str, dict[str, Any]] = {}
    equal = 0
    for name in first.tensors:
        if name in second.tensors:
            if difference := difference_of(name, first, second):
                differ[name] = difference
            else:
                equal += 1
    only = [[n for n in a.tensors if n not in b.tensors] for a, b in
            ((first, second), (second, first))]  # fmt: skip
    keys = {*first.about, *second.about}
    return {
        "checkpoints": [str(first.folder), str(second.folder)],
        "whole": True,
        "equal": not differ and not any(only),
        "equal_tensors": equal,
        "only_in_first": only[0],
        "only_in_second": only[1],
        "differ": differ,
        "about": {
            key: [first.about.get(key), second.about.get(key)]
            for key in sorted(keys)
            if first.about.get(key) != second.about.get(key)
        },
        "state": {
            key: [first.state.get(key), second.state.get(key)]
            for key in sorted({*first.state, *second.state})
            if first.state.get(key) != second.state.get(key)
        },
    }


def difference_of(name: str, first: Contents, second: Contents) -> dict[str, Any] | None:
    """Returns how a tensor of two checkpoints differs: in shape, dtype or values; None: not."""
    one, other = first.tensors[name], second.tensors[name]
    found: dict[str, Any] = {}
    if one.dtype != other.dtype:
        found["dtype"] = [one.dtype, other.dtype]
    if one.shape != other.shape:
        return {**found, "shape": [list(one.shape), list(other.shape)]}
    a, b = first.read(name), second.read(name)
    if not found and torch.equal(bits(a), bits(b)):
        return None
    if a.is_floating_point() or b.is_floating_point():
        a, b = a.double(), b.double()
    else:
        a, b = a.long(), b.long()
    difference = (a - b).abs()
    if strange := int(difference.isnan().sum()):
        return {**found, "not_a_number": strange}
    if not found and not difference.any():
        return {"bits_only": True}
    difference = difference.double()
    norm, largest = float(a.double().norm()), float(difference.max()) if difference.numel() else 0.0
    relative = float(difference.norm()) / norm if norm else None
    elements = int((difference != 0).sum())
    return {**found, "elements": elements, "largest": largest, "relative": relative}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a tensor: equal numbers may have other bits, and NaN is not itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
