"""What offloaded state takes of the host's memory, before any of it is allocated."""

from collections.abc import Iterable

import torch

from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import wide_dtype
from colonnade.parallel.optimizer.base import OptimizerSettings
from colonnade.parallel.optimizer.offload.groups import Group, build_groups
from colonnade.parallel.optimizer.offload.host_state import HOST_KINDS, Dtypes, host_sizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}


def storage_of(model: Decoder) -> torch.dtype:
    """Returns the dtype of master weights: at least fp32."""
    return wide_dtype(next(model.parameters()))


def dtypes_of(group: Group, settings: OptimizerSettings, storage: torch.dtype) -> Dtypes:
    """Returns the dtypes of a group's tensors, master weights being in `storage`; fp64 is never
    narrowed."""
    exact = storage == torch.float64
    gradients, moments = settings.offload_gradients, settings.offload_moments
    (weights,) = {member.parameter.dtype for member in group.members}
    return Dtypes(
        master=storage,
        moments=storage if exact else DTYPES[moments],
        gradient=storage if exact else DTYPES[gradients],
        weights=weights,
    )


def total_sizes(groups: Iterable[tuple[Group, Dtypes]]) -> dict[str, int]:
    """Returns the bytes of `host_sizes` of all groups together."""
    sizes = [host_sizes(group, dtypes) for group, dtypes in groups]
    return {kind: sum(size[kind] for size in sizes) for kind in HOST_KINDS}


def host_report(model: Decoder, settings: OptimizerSettings) -> dict[str, int]:
    """Returns the bytes that this rank's host will hold of a sharded model, which may be on meta,
    by kind, as `host_sizes` does."""
    storage = storage_of(model)
    groups = build_groups(model, settings, storage)
    return total_sizes((group, dtypes_of(group, settings, storage)) for group in groups)
