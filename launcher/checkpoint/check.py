"""Whether tensors can be saved, and whether they are those a checkpoint was made of."""

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from colonnade.launcher.checkpoint.catalog import Catalog
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.errors import UserError


def savable(tensors: dict[str, torch.Tensor]) -> None:
    """Raise TypeError or ValueError, naming the tensor, if one has no place on disk."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: it belongs in the JSON state")
        if tensor.is_meta:
            raise ValueError(f"{name} is on meta: materialise it first")
        if isinstance(tensor, DTensor) and not _one_box(tensor):
            raise ValueError(
                f"{name} with {tensor.placements} holds rows that do not adjoin, of which "
                "torch.distributed.checkpoint knows only the first: redistribute it first"
            )


def _one_box(tensor: DTensor) -> bool:
    """Whether this rank's part is contiguous; that of a strided shard need not be."""
    coordinate = tensor.device_mesh.get_coordinate()
    strides = [getattr(placement, "split_factor", 1) for placement in tensor.placements]
    if coordinate is None or max(strides) == 1:
        return True
    for dim in range(tensor.ndim):
        rows = torch.arange(tensor.shape[dim])
        for mesh_dim, placement in enumerate(tensor.placements):
            if getattr(placement, "dim", None) == dim:
                # Cut as torch.chunk cuts; a strided shard cuts each of its parts separately.
                cuts = [
                    part.chunk(tensor.device_mesh.size(mesh_dim))[coordinate[mesh_dim] :][:1]
                    for part in rows.chunk(strides[mesh_dim])
                ]
                rows = torch.cat([rows[:0], *(piece for cut in cuts for piece in cut)])
        if (rows.diff() != 1).any():
            return False
    return True


def fits(folder: Path, catalog: Catalog, tensors: dict[str, torch.Tensor], partial: bool) -> None:
    """Raise UserError, naming the tensors, unless `tensors` of all ranks match; collective.

    `partial`: saved tensors that no rank asks for are no fault.
    """
    saved = catalog.tensors
    absent = [name for name in tensors if name not in saved]
    shapes = [
        f"{name} ({list(saved[name].shape)} there, {list(tensor.shape)} here)"
        for name, tensor in tensors.items()
        if name in saved and saved[name].shape != tuple(tensor.shape)
    ]
    dtypes = [
        f"{name} ({saved[name].torch_dtype} there, {tensor.dtype} here)"
        for name, tensor in tensors.items()
        if name in saved and saved[name].torch_dtype != tensor.dtype
    ]
    unused = [] if partial else [name for name in saved if name not in tensors]
    by_rank = on_all_ranks(lambda: (absent, shapes, dtypes, unused))
    faults = {
        "not in the checkpoint": set().union(*(faults[0] for faults in by_rank)),
        "only in the checkpoint": set.intersection(*(set(faults[3]) for faults in by_rank)),
        "of another shape": set().union(*(faults[1] for faults in by_rank)),
        "of another dtype": set().union(*(faults[2] for faults in by_rank)),
    }
    lines = [_line(fault, sorted(names)) for fault, names in faults.items() if names]
    if lines:
        raise UserError(
            f"the checkpoint {folder} does not fit this model:\n" + "\n".join(lines) + "\n"
            "The recipe is not the one the checkpoint was made with: resume with the recipe.toml "
            "of its run, or begin a new run."
        )


def _line(fault: str, names: list[str], shown: int = 4) -> str:
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"  {fault} ({len(names)}): {', '.join(names[:shown])}{more}"
