"""Fills a sharded model from a source: every rank reads the boxes of its own shards."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from colonnade.launcher.checkpoint.loader import without_group_warning
from colonnade.launcher.cluster.collective import on_all_ranks
from colonnade.launcher.errors import UserError
from colonnade.launcher.weights.source import Weights
from colonnade.models.names import CanonicalNames, tensors_of
from colonnade.models.records import matches


class WeightsReader(StorageReader):
    """Reads boxes of a source for torch.distributed.checkpoint, one tensor at a time."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing: a reader serves one source, given to its constructor."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns every tensor as one chunk."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=self.weights.dtype(name)),
                    size=shape,
                    chunks=[ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)],
                )
                for name, shape in self.weights.shapes.items()
            }
        )

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the constructor has set up all that reading needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the planner's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the planners' plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies the boxes that this rank's shards need into its tensors, in their dtypes."""
        for item in plan.items:
            pairs = zip(item.storage_offsets, item.lengths, strict=True)
            box = tuple(slice(start, start + length) for start, length in pairs)
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.weights.read(item.storage_index.fqn, box))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Returns False: torch must never choose this class by a checkpoint's name."""
        return False


def fill(
    model: CanonicalNames,
    weights: Weights,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    masters: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[str]:
    """Fills parameters and buffers of a model from a source, whatever their placement. Collective.

    Args:
        model: built, sharded and materialised.
        weights: of a model that has these tensors, in any dtype.
        only: patterns of canonical names, as of a shell; those that match none keep their values.
            None given: all.
        skip: patterns of those that keep their values.
        masters: an optimizer's master weights, which are filled in place of the model's weights.

    Returns:
        the names that keep their values, of all ranks' tensors, sorted.

    Raises:
        UserError: a pattern matches nothing, a tensor is missing or of another shape; no tensor is
            changed then.
    """
    tensors = dict(tensors_of(model)) | dict(masters)
    kept = {name for name in tensors if not is_chosen(name, only, skip)}
    chosen = {name: t.detach() for name, t in tensors.items() if name not in kept}
    everywhere = on_all_ranks(lambda: (sorted(tensors), faults(chosen, weights), sorted(kept)))
    names = {name for of_rank, _, _ in everywhere for name in of_rank}
    for field, patterns in (("train.init_only", only), ("train.init_skip", skip)):
        check_patterns(field, patterns, names)
    if wrong := sorted({fault for _, of_rank, _ in everywhere for fault in of_rank}):
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"train.init = {str(weights.folder)!r}: does not fit this model: "
            f"{'; '.join(wrong[:4])}{more}; change [model] to its own, or leave these out by "
            "train.init_skip"
        )
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with without_group_warning(), torch.no_grad():
        dcp.load(chosen, storage_reader=WeightsReader(weights), planner=planner)
    return sorted({name for _, _, of_rank in everywhere for name in of_rank})


def is_chosen(name: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a name matches one of `only`, if there are any, and none of `skip`."""
    return (not only or matches(name, only)) and not matches(name, skip)


def faults(tensors: dict[str, torch.Tensor], weights: Weights) -> list[str]:
    """Returns what is missing in a source, or has another shape."""
    found = []
    for name, tensor in tensors.items():
        if name not in weights.shapes:
            found.append(f"{name} is missing")
        elif tuple(weights.shapes[name]) != tuple(tensor.shape):
            there = list(weights.shapes[name])
            found.append(f"{name} is {there}, and {list(tensor.shape)} is needed")
    return found


def check_patterns(field: str, patterns: Sequence[str], names: set[str]) -> None:
    """Raises UserError for a pattern that no name matches."""
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            examples = ", ".join(sorted(names)[:3])
            raise UserError(
                f"{field} = {pattern!r}: matches no tensor of the model; names are like {examples}"
            )
