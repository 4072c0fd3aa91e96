"""What the operations of a step do with a rank's tensors, on a device and its host."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from colonnade.kernels.host_adamw import AdamWStep, HostKernel, fused_adamw
from colonnade.parallel.gradients import local
from colonnade.parallel.optimizer.base import OptimizerSettings
from colonnade.parallel.optimizer.offload.groups import Member
from colonnade.parallel.optimizer.offload.host_state import Dtypes, HostGroup, moments_of, views


class TensorWork:
    """The operations on the groups of a rank (`scheduler.Work`).

    Attributes:
        host: master weights, moments and buffers of each group.
        dtypes: of each group.
        kernel: AdamW on the host.
        device: of the weights.
        settings: `[optimizer]`.
        lr: learning rate of the step.
        scale: factor of its gradients.
        updates: of the run, this one included.
    """

    def __init__(
        self,
        host: Sequence[HostGroup],
        dtypes: Sequence[Dtypes],
        kernel: HostKernel,
        device: torch.device,
        settings: OptimizerSettings,
    ) -> None:
        self.host, self.dtypes, self.kernel = host, dtypes, kernel
        self.device, self.settings = device, settings
        self.lr, self.scale, self.updates = 0.0, 1.0, 0

    def member(self, group: int, index: int) -> Member:
        """Returns a trained parameter by the number of its group, and its own within that."""
        return self.host[group].group.trained[index]

    def has_gradient(self, group: int, index: int) -> bool:
        return self.member(group, index).parameter.grad is not None

    def copy_gradient(self, group: int, index: int) -> None:
        member, buffer = self.member(group, index), self.host[group].gradient
        assert member.parameter.grad is not None
        gradient = local(member.parameter.grad).to(buffer.dtype)  # on the device
        member.view(buffer).copy_(gradient, non_blocking=True)

    def drop_gradient(self, group: int, index: int) -> None:
        self.member(group, index).parameter.grad = None

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def load(self, group: int, memory: Tensor) -> None:
        state = self.host[group].state.buffer
        memory[: len(state)].copy_(state, non_blocking=True)

    def store(self, group: int, memory: Tensor) -> None:
        state = self.host[group].state.buffer
        state.copy_(memory[: len(state)], non_blocking=True)

    @torch.no_grad()
    def update(self, group: int, memory: Tensor) -> None:
        """Updates a group in its slot by torch's fused AdamW, and writes its weights."""
        of_group = self.host[group].group
        state = views(memory, of_group, self.dtypes[group])
        alike: dict[tuple[float, float, int], list[Member]] = defaultdict(list)
        for member in of_group.trained:
            if member.parameter.grad is not None and member.numel:
                alike[member.rate, member.decay, member.updates_before].append(member)
        sent = self.dtypes[group].gradient
        with moments_of(state) as moments:
            for members in alike.values():
                self.update_alike(members, sent, state.master, *moments)
        for member in of_group.trained:
            member.weight.copy_(member.view(state.master))

    def update_alike(
        self,
        members: Sequence[Member],
        sent: torch.dtype,
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
    ) -> None:
        """Updates parameters with the same rate, decay and number of updates, in the buffers of
        their group, from gradients rounded to the dtype in which those for the host are `sent`."""
        gradients = [
            local(member.parameter.grad).to(sent).to(master.dtype)  # as if the host had updated it
            for member in members
            if member.parameter.grad is not None
        ]
        flats = master, exp_avg, exp_avg_sq
        masters, *moments = ([member.view(flat) for member in members] for flat in flats)
        fused_adamw(masters, gradients, moments[0], moments[1], self.step_of(members[0]))

    def step_of(self, member: Member) -> AdamWStep:
        """Returns the figures of a parameter's update."""
        s = self.settings
        return AdamWStep(
            step=self.updates - member.updates_before,
            lr=self.lr * member.rate,
            beta1=s.beta1,
            beta2=s.beta2,
            eps=s.eps,
            weight_decay=member.decay,
            scale=self.scale,
        )

    def update_on_host(self, group: int, indices: Sequence[int]) -> None:
        """Updates those parameters of a group that have a gradient by the host's kernel, which
        rounds the weights."""
        host = self.host[group]
        rounded = host.weights if host.weights is not host.state.master else None
        with moments_of(host.state, served=[torch.bfloat16]) as (exp_avg, exp_avg_sq):
            for member in (host.group.trained[index] for index in indices):
                self.kernel(
                    master=member.flat(host.state.master),
                    grad=member.flat(host.gradient),
                    exp_avg=member.flat(exp_avg),
                    exp_avg_sq=member.flat(exp_avg_sq),
                    weight=None if rounded is None else member.flat(rounded),
                    step=self.step_of(member),
                )

    def copy_weights(self, group: int, indices: Sequence[int]) -> None:
        host = self.host[group]
        for member in (host.group.trained[index] for index in indices):
            member.weight.copy_(member.view(host.weights), non_blocking=True)

    @torch.no_grad()
    def round_weights(self, group: int) -> None:
        """Writes all weights of a group from its master weights."""
        host = self.host[group]
        for member in host.group.members:
            member.weight.copy_(member.view(host.state.master))
