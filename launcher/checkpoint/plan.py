"""Decides which rank writes which chunk of which tensor, by PyTorch's planner.

The plan depends on names, shapes, dtypes and placements alone, so that a run makes it once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem

from colonnade.launcher.checkpoint.catalog import Catalog, Chunk, Entry, chunk_key
from colonnade.launcher.cluster.collective import on_rank_zero, rank

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class WritePlan:
    """What this rank writes, and what all ranks write together.

    Attributes:
        planner: finds the chunk of an item among given tensors.
        items: this rank's chunks.
        catalog: all chunks of all tensors; None but on rank 0.
        bytes: of all chunks of all ranks.
    """

    planner: DefaultSavePlanner
    items: tuple[WriteItem, ...]
    catalog: Catalog | None
    bytes: int

    def chunks(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """Returns this rank's chunks of `tensors`, on their devices, by their keys in the file."""
        self.planner.set_up_planner(dict(tensors), None, False)
        with torch.no_grad():
            return {
                key_of(item): cast(torch.Tensor, self.planner.resolve_data(item)).detach()
                for item in self.items
            }


def file_of(rank: int) -> str:
    """Returns the name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def signature(tensors: Tensors) -> tuple[tuple[object, ...], ...]:
    """Returns all that a plan depends on, on this rank."""
    return tuple(
        (name, tensor.shape, tensor.dtype, getattr(tensor, "placements", None))
        for name, tensor in tensors.items()
    )


def make_plan(tensors: Tensors) -> WritePlan:
    """Plans a checkpoint of `tensors`; a chunk that several ranks hold is written by the lowest of
    them. Collective: gathers the ranks' plans on rank 0, and scatters what each writes."""
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    planner.set_up_planner(dict(tensors), None, rank() == 0)
    locals_ = gathered(planner.create_local_plan())
    plans: list[SavePlan] = []
    catalogs: list[Catalog] = []  # on rank 0 alone: it grows with the number of ranks

    def plan_all() -> int:
        written, metadata = planner.create_global_plan(locals_)
        plans.extend(written)
        catalogs.append(catalog_of(plans, metadata))
        return sum(bytes_of(item) for plan in plans for item in plan.items)

    total = on_rank_zero(plan_all)
    return WritePlan(
        planner, tuple(scattered(plans).items), catalogs[0] if catalogs else None, total
    )


def gathered(plan: SavePlan) -> list[SavePlan]:
    """Gathers a plan of every rank on rank 0; elsewhere returns an empty list."""
    if not dist.is_initialized():
        return [plan]
    plans = [plan] * dist.get_world_size() if rank() == 0 else None
    dist.gather_object(plan, plans)
    return plans or []


def scattered(plans: list[SavePlan]) -> SavePlan:
    """Scatters rank 0's plans, one to every rank."""
    if not dist.is_initialized():
        return plans[0]
    received: list[SavePlan] = [SavePlan([])]
    dist.scatter_object_list(received, plans or None)
    return received[0]


def catalog_of(plans: list[SavePlan], metadata: Metadata) -> Catalog:
    """Returns the catalog of the chunks of all ranks' plans."""
    chunks: dict[str, list[Chunk]] = {}
    for number, plan in enumerate(plans):
        for item in plan.items:
            chunk = data_of(item).chunk
            chunks.setdefault(item.index.fqn, []).append(
                Chunk(
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    file=file_of(number),
                    key=key_of(item),
                )
            )
    tensors = cast("dict[str, TensorStorageMetadata]", metadata.state_dict_metadata)
    return Catalog(
        tensors={
            name: Entry(
                dtype=str(tensor.properties.dtype).removeprefix("torch."),
                shape=tuple(tensor.size),
                chunks=tuple(chunks[name]),
            )
            for name, tensor in sorted(tensors.items())
        }
    )


def key_of(item: WriteItem) -> str:
    """Returns the key of an item's chunk in its file."""
    data = data_of(item)
    return chunk_key(item.index.fqn, data.chunk.offsets, data.chunk.sizes == data.size)


def data_of(item: WriteItem) -> TensorWriteData:
    """Returns the tensor data of an item; raises TypeError if it is not a tensor."""
    if item.tensor_data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor: it belongs in the JSON state")
    return item.tensor_data


def bytes_of(item: WriteItem) -> int:
    """Returns the size of a chunk in bytes."""
    data = data_of(item)
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
