"""Repeats the passes of a micro-batch, and records checksums of what a rank computes in them.

The checksum of a tensor is the sum of its bits as whole numbers, modulo 2^64: it does not depend on
the order of the sum, and a single wrong element always changes it. Checksums are taken of what is
local to a rank, before other ranks' results are added to it: of the outputs of embedding, halves of
sub-blocks and head, the last of which is the loss, and of every gradient of a weight before FSDP2
reduces it. The gradients of activations are not recorded by themselves, but those of all weights
before them depend on them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from colonnade.models.decoder import Decoder
from colonnade.parallel.gradients import local
from colonnade.parallel.parallelize import fsdp_groups
from colonnade.parallel.passes import Inputs, Passes

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksum(NamedTuple):
    """The checksum of a result.

    Attributes:
        result: what it is of, in words.
        order: about when it is computed in the passes of the whole model: a lower pair comes
            earlier, also on another rank.
        value: the checksum.
    """

    result: str
    order: tuple[int, int]
    value: int


@dataclass
class Recording:
    """The checksums of a rank's results in the passes of one micro-batch, in their order."""

    results: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)  # on the device

    def add(self, result: str, order: tuple[int, int], t: Tensor) -> None:
        """Appends the checksum of a tensor."""
        self.results.append((result, order))
        self.sums.append(checksum(t))

    def digest(self) -> Tensor:
        """Returns one number, int64, that any other checksum changes."""
        sums = torch.stack(self.sums)
        return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()

    def checksums(self) -> list[Checksum]:
        """Returns the checksums, copied to the host."""
        values = torch.stack(self.sums).tolist()
        return [Checksum(*of, value) for of, value in zip(self.results, values, strict=True)]


@torch.no_grad()
def checksum(t: Tensor) -> Tensor:
    """Returns the sum of a tensor's bits as integers of its elements' width, int64."""
    if isinstance(t, AsyncCollectiveTensor):
        t = t.wait()
    t = local(t.detach())
    if t.is_complex():
        t = torch.view_as_real(t)
    return t.contiguous().view(INTEGERS[t.element_size()]).sum(dtype=torch.int64)


def repeat(model: Decoder, passes: Passes, inputs: Inputs, scale: float) -> Recording:
    """Runs a micro-batch forward and backward in training mode, and returns checksums of it. It
    leaves no gradient, no state and no random draw behind. Collective.

    Call it between two steps, when no parameter has a gradient.

    Args:
        model: that `passes` run.
        passes: of the model.
        inputs: the micro-batch.
        scale: of the objective whose gradients are computed.
    """
    recording = Recording()
    model.train()
    with recorded(model, recording):
        passes.repeat(inputs, scale)
    for parameter in model.parameters():
        parameter.grad = None
    return recording


@contextmanager
def recorded(model: Decoder, recording: Recording) -> Iterator[None]:
    """Records the checksums of results while the block runs."""
    row = len(model.config.symbols)
    handles = []
    paths = {module: path.removeprefix("wiring.") for path, module in model.named_modules()}
    for module in [*model.ends(), *(half for group in fsdp_groups(model) for half in group)]:
        handles.append(module.register_forward_hook(output_hook(recording, paths[module], row)))
    names = dict((parameter, name) for name, parameter in model.named_parameters())
    for sharded, gathered in gathered_parameters(model):
        hook = gradient_hook(recording, names[sharded], row)
        handles.append(gathered.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_hook(recording: Recording, path: str, row: int) -> Callable[..., None]:
    """Returns a hook that records the output of a module at `path`."""
    index = index_of(path, row)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        again = torch._C._current_graph_task_id() != -1  # within backward
        result = f"the {'recomputed ' * again}forward pass of {path}"
        order = (1, -index) if again else (0, index)
        for t in tree_leaves(output):
            if isinstance(t, Tensor):
                recording.add(result, order, t)

    return hook


def gradient_hook(recording: Recording, name: str, row: int) -> Callable[[Tensor], None]:
    """Returns a hook that records the gradient of the parameter `name`."""
    result, order = f"the gradient of {name}", (1, -index_of(name, row))

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        recording.add(result, order, parameter.grad)

    return hook


def index_of(path: str, row: int) -> int:
    """Returns the index of the sub-block of a module or parameter in a row of so many: -1 for the
    embedding, and that of the end of the row for what follows the sub-blocks."""
    first, _, rest = path.partition(".")
    if first in ("blocks", "norms", "after") and (number := rest.partition(".")[0]).isdigit():
        return int(number)
    return -1 if first == "embedding" else row


def gathered_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yields every parameter that FSDP2 has all-gathered in an earlier pass and that is trained:
    as it is at rest, and as it is used, which gets the gradient of this rank alone."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # modules whose weights are gathered together have one state
    for state in dict.fromkeys(module._get_fsdp_state() for module in sharded):
        for one in (one for group in state._fsdp_param_groups for one in group.fsdp_params):
            if hasattr(one, "_unsharded_param") and one.sharded_param.requires_grad:
                yield one.sharded_param, one.unsharded_param
