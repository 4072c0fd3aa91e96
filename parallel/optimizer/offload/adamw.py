"""AdamW whose master weights and moments are in the host's memory, updated on host and device."""

import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.host_adamw import HostKernel
from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import local
from colonnade.parallel.lanes.cuda import CudaLanes
from colonnade.parallel.lanes.tasks import ImmediateLanes, Lanes
from colonnade.parallel.optimizer.adamw import MOMENTS
from colonnade.parallel.optimizer.base import Optimizer, OptimizerSettings
from colonnade.parallel.optimizer.offload.arrivals import Arrivals
from colonnade.parallel.optimizer.offload.groups import build_groups
from colonnade.parallel.optimizer.offload.host_state import (
    Moment,
    allocate,
    as_parameter,
    opened_moment,
    round_moment,
)
from colonnade.parallel.optimizer.offload.memory import GIB, free_bytes, slab_of
from colonnade.parallel.optimizer.offload.placer import Placer
from colonnade.parallel.optimizer.offload.rates import Measured
from colonnade.parallel.optimizer.offload.scheduler import Scheduler
from colonnade.parallel.optimizer.offload.sizes import (
    dtypes_of,
    group_size,
    storage_of,
    total_sizes,
    typical_size,
)
from colonnade.parallel.optimizer.offload.work import TensorWork
from colonnade.parallel.parallelize import keep_wide_gradients


class Offload(NamedTuple):
    """What the optimizer is given beside its settings.

    Attributes:
        kernel: updates groups on the host.
        device: of the weights.
        refit: whether placements follow measured rates and memory; without it they are fixed, and a
            run can be repeated bit for bit.
        lanes: makes the lanes of a device, which report their times; None: those of `device`.
        choice: which kernel it is, and why, for people.
    """

    kernel: HostKernel
    device: torch.device
    refit: bool = True
    lanes: Callable[[Measured], Lanes] | None = None
    choice: str = ""


class Updated(NamedTuple):
    """What an update did: how many groups the device updated; the seconds that it took, and those
    that were predicted, None where nothing runs at once or nothing is measured yet."""

    device_groups: int
    seconds: float
    predicted: float | None


class OffloadedAdamW(Optimizer):
    """AdamW on parameters whose fp32 master weights and moments the host keeps, or in the
    parameters' own dtype where that is wider.

    The device has the weights, in 16 bits where it computes in these, and gradients. Gradients of
    groups that the host updates leave during the last backward pass. `host` updates all groups
    there; `interleaved` moves the state of some to the device, where these are updated at the same
    time. After a step each weight is its master weight, rounded.

    Ranks that have the same parameters place them alike, since two kernels round differently.
    """

    def __init__(self, model: Decoder, settings: OptimizerSettings, offload: Offload) -> None:
        super().__init__()
        self.settings, self.device, self.choice = settings, offload.device, offload.choice
        storage = storage_of(model)
        keep_wide_gradients(model, storage)
        self.groups = build_groups(model, settings, storage)
        dtypes = [dtypes_of(group, settings, storage) for group in self.groups]
        new_slab = partial(slab_of, device=offload.device, pinned=settings.pinned)
        self.host = allocate(self.groups, dtypes, new_slab)
        self.host_sizes = total_sizes(self.groups, dtypes)
        self.meshes: dict[DeviceMesh, DeviceMesh] = {}
        self.work = TensorWork(self.host, dtypes, offload.kernel, offload.device, settings)
        self.free = partial(free_bytes, offload.device)
        self.refit = offload.refit and offload.device.type == "cuda"
        typed = list(zip(self.groups, dtypes, strict=True))
        sizes = [typical_size(group, of_group) for group, of_group in typed]
        self.placer = Placer(sizes, settings.offload == "interleaved")
        measured = self.placer.measured
        lanes = offload.lanes(measured) if offload.lanes else self.lanes_of_device(measured)
        # more than two slots hold what is loaded before the norm is known, where memory is measured
        slots = len(self.groups) if self.refit else 2
        sizes = [group_size(group, of_group) for group, of_group in typed]
        self.scheduler = Scheduler(lanes, self.work, sizes, self.has_memory, slots)
        self.numbers = {
            member.parameter: (number, index)
            for number, group in enumerate(self.groups)
            for index, member in enumerate(group.trained)
        }
        early = [m.parameter for g in self.groups for m in g.trained if not m.partial]
        self.arrivals = Arrivals(early, self.take_gradient)
        self.copies: list[tuple[Moment, Tensor]] = []
        self.updated: Updated | None = None  # the last update
        if not self.refit:
            self.placer.place(slots)

    @property
    def placement(self) -> list[bool]:
        """Which groups the device updates."""
        return self.placer.placement

    def lanes_of_device(self, measured: Measured) -> Lanes:
        """Returns the lanes of the device of the weights."""
        if self.device.type == "cuda":
            return CudaLanes(self.device, measured.observe)
        return ImmediateLanes(measured.observe)

    def has_memory(self, size: int) -> bool:
        """Whether the device has so many bytes free, and the margin beside them."""
        return self.free() - self.settings.margin * GIB >= size

    def share_with_stages(self, parameters: Collection[nn.Parameter]) -> None:
        """The host updates groups with parameters of which other pipeline stages have copies, as
        their groups are others, and might be placed otherwise. Their gradients are complete only
        after backward."""
        self.placer.keep_on_host({self.numbers[p][0] for p in parameters if p in self.numbers})
        self.arrivals.leave_out(parameters)
        if parameters and not self.refit:
            self.placer.place(self.scheduler.most_slots)

    # The step.

    def expect_gradients(self) -> None:
        self.scheduler.begin(self.placement)
        self.arrivals.begin()

    def take_gradient(self, parameter: nn.Parameter) -> None:
        """Sends a gradient that backward has completed to the host, if its group is updated there;
        its norm stays on the device."""
        group, index = self.numbers[parameter]
        if not self.placement[group]:
            assert parameter.grad is not None
            (self.local_norms[parameter],) = torch._foreach_norm([local(parameter.grad)])
            self.scheduler.send_gradient(group, index)

    def backward_ended(self) -> None:
        """Loads the first groups into memory of activations, while the norm is not known yet."""
        self.scheduler.begin(self.placement)
        self.scheduler.prefetch()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        if parameter.grad is not None or parameter not in self.local_norms:
            return parameter.grad
        group, index = self.numbers[parameter]
        self.scheduler.wait_for_gradient(group, index)
        member = self.work.member(group, index)
        return as_parameter(member.view(self.host[group].gradient), member, self.meshes)

    def update(self, lr: float, scale: float) -> None:
        """Updates all parameters; returns when everything is in its place. Where memory and rates
        are measured it places groups anew at times, which is collective."""
        start = time.perf_counter()
        self.scheduler.begin(self.placement)  # unless passes have
        loaded = self.scheduler.slots * self.scheduler.slot_size
        room = self.free() + loaded - self.settings.margin * GIB
        self.copies = []  # of a checkpoint that was saved
        self.work.lr, self.work.scale, self.work.updates = lr, scale, self.updates + 1
        self.scheduler.step(self.placement)
        self.end_step()
        predicted = self.placer.predicted or None if self.device.type == "cuda" else None
        self.updated = Updated(sum(self.placement), time.perf_counter() - start, predicted)
        if self.refit:
            self.placer.end_update(room)

    def zero_grad(self) -> None:
        self.scheduler.discard()
        self.end_step()
        for parameter in self.numbers:
            parameter.grad = None

    def end_step(self) -> None:
        """Forgets the gradients that have left the device."""
        self.local_norms.clear()
        self.arrivals.end()

    # What is saved and restored.

    def masters(self) -> dict[str, Tensor]:
        return {
            m.name: as_parameter(m.view(host.state.master), m, self.meshes)
            for host in self.host
            for m in host.group.members
        }

    def named_state(self) -> dict[str, Tensor]:
        """Moments that are kept in a narrower dtype are given as fp32 copies, so that any run can
        go on from them; `resume` takes them from these copies."""
        self.copies, found = [], {}
        for host in self.host:
            moments = host.state.exp_avg, host.state.exp_avg_sq
            for key, moment in zip(MOMENTS, moments, strict=True):
                values = opened_moment(moment, host.state.master.dtype)
                if values is not moment:
                    self.copies.append((moment, values))
                for m in host.group.trained:
                    found[f"{m.name}.{key}"] = as_parameter(m.view(values), m, self.meshes)
        return found

    def write_weights(self) -> None:
        for group in range(len(self.groups)):
            self.work.round_weights(group)

    def resume(self, updates: int, before: Mapping[str, int]) -> None:
        super().resume(updates, before)
        for group in self.groups:
            for member in group.members:
                member.updates_before = before.get(member.name, 0)
        for moment, values in self.copies:
            round_moment(moment, values)
        self.copies = []
        self.write_weights()
