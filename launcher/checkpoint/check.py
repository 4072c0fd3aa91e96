"""Checks that tensors can be saved, and that they match the tensors of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from colonnade.launcher.checkpoint.catalog import Catalog
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.errors import UserError


def check_savable(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises TypeError or ValueError, naming the tensor, if one cannot be written to disk."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: it belongs in the JSON state")
        if tensor.is_meta:
            raise ValueError(f"{name} is on meta: materialise it first")
        if isinstance(tensor, DTensor) and not _shard_is_contiguous(tensor):
            raise ValueError(
                f"{name} with {tensor.placements} has a local shard that is not contiguous, of "
                "which torch.distributed.checkpoint knows only the first rows: redistribute it"
            )


def _shard_is_contiguous(tensor: DTensor) -> bool:
    """Returns whether this rank's shard is one box of the tensor; a strided shard may not be."""
    coordinate = tensor.device_mesh.get_coordinate()
    strides = [getattr(placement, "split_factor", 1) for placement in tensor.placements]
    if coordinate is None or max(strides) == 1:
        return True
    for dim in range(tensor.ndim):
        indices = torch.arange(tensor.shape[dim])
        for mesh_dim, placement in enumerate(tensor.placements):
            if getattr(placement, "dim", None) == dim:
                # Shard splits as torch.chunk does; _StridedShard splits into `split_factor`
                # blocks first and takes the rank's chunk of each. The slice [c:][:1] is empty
                # where torch.chunk returns fewer chunks than there are ranks.
                rank_chunks = [
                    block.chunk(tensor.device_mesh.size(mesh_dim))[coordinate[mesh_dim] :][:1]
                    for block in indices.chunk(strides[mesh_dim])
                ]
                local = [chunk for chunks in rank_chunks for chunk in chunks]
                indices = torch.cat([indices[:0], *local])
        if (indices.diff() != 1).any():
            return False
    return True


def check_fits(
    folder: Path, catalog: Catalog, tensors: Mapping[str, torch.Tensor], partial: bool
) -> None:
    """Raises UserError, naming the tensors, unless those of all ranks match the catalog.

    All-gathers the names of each rank's mismatches, so every rank must call it and every rank
    raises the same message. `partial` allows saved tensors that no rank asks for.
    """
    saved = catalog.tensors
    absent = [name for name in tensors if name not in saved]
    shapes = [
        f"{name} (saved {list(saved[name].shape)}, model {list(tensor.shape)})"
        for name, tensor in tensors.items()
        if name in saved and saved[name].shape != tuple(tensor.shape)
    ]
    dtypes = [
        f"{name} (saved {saved[name].torch_dtype}, model {tensor.dtype})"
        for name, tensor in tensors.items()
        if name in saved and saved[name].torch_dtype != tensor.dtype
    ]
    unused = [] if partial else [name for name in saved if name not in tensors]
    by_rank = on_all_ranks(lambda: (absent, shapes, dtypes, unused))
    all_absent, all_shapes, all_dtypes, all_unused = zip(*by_rank, strict=True)
    mismatches = {
        "not in the checkpoint": set().union(*all_absent),
        # A saved tensor is unused only if no rank asks for it: pipeline stages ask for different
        # ones.
        "only in the checkpoint": set.intersection(*map(set, all_unused)),
        "of another shape": set().union(*all_shapes),
        "of another dtype": set().union(*all_dtypes),
    }
    lines = [_line(kind, sorted(names)) for kind, names in mismatches.items() if names]
    if lines:
        raise UserError(
            f"the checkpoint {folder} does not fit this model:\n" + "\n".join(lines) + "\n"
            "The recipe is not the one the checkpoint was made with: resume with the recipe.toml "
            "of its run, or begin a new run."
        )


def _line(mismatch: str, names: list[str], shown: int = 4) -> str:
    """Formats one kind of mismatch: how many tensors have it, and the first of their names."""
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"  {mismatch} ({len(names)}): {', '.join(names[:shown])}{more}"
