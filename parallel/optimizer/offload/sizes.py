"""What offloaded state takes of the host's memory, before any of it is allocated."""

from collections.abc import Sequence

import torch

from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import wide_dtype
from colonnade.parallel.optimizer.base import OptimizerSettings
from colonnade.parallel.optimizer.offload.groups import Group, build_groups
from colonnade.parallel.optimizer.offload.host_state import (
    HOST_KINDS,
    Dtypes,
    host_sizes,
    state_bytes,
)
from colonnade.parallel.optimizer.offload.scheduler import GroupSize

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


def total_sizes(groups: Sequence[Group], dtypes: Sequence[Dtypes]) -> dict[str, int]:
    """Returns the bytes that the host holds of all groups, by the kinds of `host_sizes`, and those
    of `widened` moments: of the copies by which moments in a narrower dtype are saved, which are
    there from a save to the next update."""
    typed = list(zip(groups, dtypes, strict=True))
    sizes = [host_sizes(group, of_group) for group, of_group in typed]
    widened = [
        2 * group.length * of_group.master.itemsize
        for group, of_group in typed
        if group.trained and of_group.moments != of_group.master
    ]
    return {kind: sum(s[kind] for s in sizes) for kind in HOST_KINDS} | {"widened": sum(widened)}


def host_report(model: Decoder, settings: OptimizerSettings) -> dict[str, int]:
    """Returns the bytes that this rank's host will hold of a sharded model, which may be on meta,
    by the kinds of `total_sizes`."""
    storage = storage_of(model)
    groups = build_groups(model, settings, storage)
    return total_sizes(groups, [dtypes_of(group, settings, storage) for group in groups])


def group_size(group: Group, dtypes: Dtypes) -> GroupSize:
    """Returns the size of a group on this rank; one that is not updated moves nothing."""
    count = sum(member.numel for member in group.trained)
    return GroupSize(
        parameters=count,
        state=state_bytes(group, dtypes) if group.trained else 0,
        gradients=tuple(m.numel * dtypes.gradient.itemsize for m in group.trained),
        weights=count * dtypes.weights.itemsize,
        scratch=scratch_bytes(group.length, dtypes) if group.trained else 0,
    )


def typical_size(group: Group, dtypes: Dtypes) -> GroupSize:
    """Returns the size of a group if all ranks had as large a shard of it, the same on all."""
    count = sum(member.typical_numel for member in group.trained)
    return GroupSize(
        parameters=count,
        state=count * (dtypes.master.itemsize + 2 * dtypes.moments.itemsize),
        gradients=tuple(m.typical_numel * dtypes.gradient.itemsize for m in group.trained),
        weights=count * dtypes.weights.itemsize,
        scratch=scratch_bytes(count, dtypes),
    )


def scratch_bytes(length: int, dtypes: Dtypes) -> int:
    """Returns the bytes of temporary tensors when the device updates a group: both moments in the
    dtype of master weights, and in 8 bits quotients and codes of 4 bytes of one of them."""
    if dtypes.moments == dtypes.master:
        return 0
    codes = 8 * length if dtypes.moments == torch.uint8 else 0
    return 2 * length * dtypes.master.itemsize + codes
