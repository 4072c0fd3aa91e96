"""The groups in which offloaded state is updated: the parameters that FSDP2 gathers together.

A parameter's whole local shard is updated at once: torch's fused AdamW is not bit-equal on a shard
that is cut elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import Declared, declared
from colonnade.parallel.gradients import local
from colonnade.parallel.optimizer.adamw import rate_and_decay
from colonnade.parallel.optimizer.base import OptimizerSettings
from colonnade.parallel.parallelize import fsdp_groups

ALIGNMENT = 256  # elements: a block of moments in 8 bits; kernels divide tensors at 64


@dataclass(eq=False)
class Member:
    """A parameter of a group.

    Attributes:
        name: canonical.
        parameter: on the device.
        rate: factor of the learning rate.
        decay: its weight decay.
        partial: whether its gradient is complete only after backward.
        start: of its elements in the buffers of the group.
        updates_before: updates of the run before its state began.
    """

    name: str
    parameter: nn.Parameter
    rate: float
    decay: float
    partial: bool = False
    start: int = 0
    updates_before: int = 0

    @property
    def weight(self) -> Tensor:
        """This rank's shard."""
        return local(self.parameter.detach())

    @property
    def trained(self) -> bool:
        """Whether it has moments, and is updated."""
        return self.parameter.requires_grad

    @property
    def numel(self) -> int:
        """Elements of this rank's shard."""
        return self.weight.numel()

    @property
    def typical_numel(self) -> int:
        """Elements of a rank's shard if all ranks had as many, which every rank can tell."""
        parameter, ranks = self.parameter, 1
        if isinstance(parameter, DTensor):
            for axis, placement in enumerate(parameter.placements):
                ranks *= 1 if placement.is_replicate() else parameter.device_mesh.size(axis)
        return -(-parameter.numel() // ranks)

    def flat(self, buffer: Tensor) -> Tensor:
        """Returns its elements in a buffer of the group."""
        return buffer[self.start : self.start + self.numel]

    def view(self, buffer: Tensor) -> Tensor:
        """Returns its elements in a buffer of the group, in the shape of the shard."""
        return self.flat(buffer).view(self.weight.shape)


@dataclass(eq=False)
class Group:
    """Parameters whose state moves together, in buffers of `length` elements."""

    members: list[Member]
    length: int

    @classmethod
    def of(cls, members: list[Member]) -> "Group":
        """Lays members out one after the other."""
        length = 0
        for member in members:
            member.start = length
            length += -(-member.numel // ALIGNMENT) * ALIGNMENT
        return cls(members, length)

    @property
    def trained(self) -> list[Member]:
        """The members that are updated."""
        return [member for member in self.members if member.trained]


def build_groups(model: Decoder, settings: OptimizerSettings, storage: torch.dtype) -> list[Group]:
    """Returns the groups of a model, in the order in which backward completes their gradients.

    Frozen parameters are in groups of their own if the device has them in a narrower dtype than
    `storage`: the host keeps their values, and no moments.
    """
    kept = [d for d in declared(model) if d.parameter.requires_grad or d.parameter.dtype != storage]
    by_module: dict[int, int] = {}  # group numbers by module
    for number, modules in enumerate(modules_in_backward_order(model)):
        by_module |= {id(m): number for module in modules for m in module.modules()}
    owners = {id(p): by_module.get(id(m), len(by_module)) for m in model.modules()
              for p in m.parameters(recurse=False)}  # fmt: skip
    grouped: dict[tuple[bool, int], list[Declared]] = {}
    for d in kept:
        key = not d.parameter.requires_grad, owners[id(d.parameter)]
        grouped.setdefault(key, []).append(d)
    return [
        Group.of([member_of(d, settings) for d in members])
        for _, members in sorted(grouped.items(), key=lambda item: item[0])
    ]


def member_of(d: Declared, settings: OptimizerSettings) -> Member:
    """Returns a parameter as a member of its group."""
    rate, decay = rate_and_decay(d.spec, settings)
    return Member(d.name, d.parameter, rate, decay, d.spec.partial is not None)


def modules_in_backward_order(model: Decoder) -> Iterator[list[nn.Module]]:
    """Yields the modules whose gradients are reduced together, the head first; the weights of
    experts by themselves. All others belong to the root, which backward completes last."""
    ends = list(model.ends())
    if model.has_head and model.head in ends:
        yield [model.head]
    for modules in reversed(list(fsdp_groups(model))):
        if len(modules) == 3:
            first, experts, second = modules
            yield [experts]
            yield [first, second]
        else:
            yield modules
    yield [end for end in ends if not model.has_head or end is not model.head]
