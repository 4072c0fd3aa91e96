"""Refuses offloaded optimizer state for which a host has too little memory, before it is allocated.

Every rank reports what its host will hold of it; ranks of one host share what that has available.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn
from torch.distributed.tensor import DTensor

from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.cluster.memory import available_bytes, host_id, return_freed_memory
from colonnade.launcher.cluster.sizes import listed, size
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.hints import schema_of
from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe
from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import local
from colonnade.parallel.optimizer.offload.sizes import host_report, storage_of
from colonnade.parallel.world import World


class Need(NamedTuple):
    """What one rank needs of its host's memory, in bytes.

    Attributes:
        host: name and id of the host.
        available: there.
        kinds: by kind, with the recipe as it is.
        changed: altogether, with each change of the recipe that saves some.
        on_device: more that the device would hold without offload.
    """

    host: tuple[str, str]
    available: int
    kinds: dict[str, int]
    changed: dict[str, int]
    on_device: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())


def require_host_memory(
    model: Decoder,
    recipe: Recipe,
    world: World,
    available: Callable[[], int] = available_bytes,
    host: Callable[[], tuple[str, str]] = host_id,
) -> None:
    """Checks that every host has the memory for the optimizer's state of its ranks, and for the
    copies from which it is saved. Collective.

    Args:
        model: sharded, and perhaps on meta.
        available: returns the bytes that this host has available.
        host: returns what tells this host from others.

    Raises:
        UserError: the same on every rank: a host has less.
    """
    if recipe.optimizer.offload == "none":
        return
    return_freed_memory()  # of an earlier training stage
    needs = on_all_ranks(
        lambda: need_of(model, recipe, available(), host()), wait_for_all=world.wait_for_all
    )
    ranks_of: dict[tuple[str, str], list[Need]] = {}
    for need in needs:
        ranks_of.setdefault(need.host, []).append(need)
    for ranks in ranks_of.values():
        if sum(need.total for need in ranks) > min(need.available for need in ranks):
            raise UserError(refusal(recipe, ranks, needs))


def need_of(model: Decoder, recipe: Recipe, available: int, host: tuple[str, str]) -> Need:
    """Returns what this rank needs, and would need with changes."""
    optimizer, saves = recipe.optimizer, saved_bytes(model)
    kinds = host_report(model, optimizer)
    copies = saves if recipe.checkpoint.asynchronous else 0
    changed = {
        field: sum(host_report(model, other).values()) + copies
        for field, other in narrower(optimizer)
        if storage_of(model).itemsize <= 4  # fp64 is never narrowed
    }
    if copies:
        changed["checkpoint.asynchronous=false"] = sum(kinds.values())
    on_device = kinds["masters"] + kinds["moments"] - kinds["weights"]
    return Need(host, available, {**kinds, "saved_copies": copies}, changed, on_device)


def narrower(optimizer: OptimizerConfig) -> list[tuple[str, OptimizerConfig]]:
    """Returns changes of `[optimizer]` that take less of the host's memory, with their results."""
    found = []
    for name in ("offload_moments", "offload_gradients"):
        kinds = (schema_of(("optimizer", name)) or {})["enum"]  # from the widest on
        for kind in kinds[kinds.index(getattr(optimizer, name)) + 1 :]:
            changed = optimizer.model_copy(update={name: kind})
            found.append((f"optimizer.{name}={kind}", changed))
    return found


def saved_bytes(model: Decoder) -> int:
    """Returns the bytes that this rank saves of parameters and moments; the first of the ranks that
    have a shard saves it."""
    itemsize, total = storage_of(model).itemsize, 0
    for parameter in model.parameters():
        if saves(parameter):
            copies = 1 + 2 * parameter.requires_grad
            total += copies * local(parameter).numel() * itemsize
    return total


def saves(parameter: nn.Parameter) -> bool:
    """Whether this rank is the first along every axis along which a parameter has replicas."""
    if not isinstance(parameter, DTensor):
        return True
    place = parameter.device_mesh.get_coordinate() or ()
    along = zip(place, parameter.placements, strict=True)
    return not any(index for index, placement in along if placement.is_replicate())


def refusal(recipe: Recipe, ranks: Sequence[Need], needs: Sequence[Need]) -> str:
    """Says what the ranks of a host need, what it has, and what would fit; `needs` are those of
    all."""
    available, total = min(need.available for need in ranks), sum(need.total for need in ranks)
    kinds = {kind: sum(need.kinds[kind] for need in ranks) for kind in ranks[0].kinds}
    of_ranks = "1 rank" if len(ranks) == 1 else f"{len(ranks)} ranks"
    fits = [
        f"{field} ({size(after)})"
        for field in ranks[0].changed
        if (after := sum(need.changed[field] for need in ranks)) <= available
    ]
    if available:
        enough = math.ceil(sum(need.total for need in needs) / available)
        fits.append(f"{max(enough, len({need.host for need in needs}) + 1):,} hosts as this one")
    fits += [
        "optimizer.offload=none, where each device has room for "
        f"{size(max(need.on_device for need in ranks))} more"
    ]
    return (
        f"optimizer.offload = {recipe.optimizer.offload}: {of_ranks} on host {ranks[0].host[0]} "
        f"need {size(total)} of its memory ({listed(kinds)}), and {size(available)} are "
        f"available. What would fit: {'; '.join(fits)}"
    )
