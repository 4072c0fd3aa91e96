"""A module whose parameters are declared by records, and the `local` seam."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from colonnade.kernels.linear import linear
from colonnade.kernels.sharding import UNSHARDED
from colonnade.models.names import canonical
from colonnade.models.parameters import ParameterSpec
from colonnade.models.records import matches
from colonnade.models.seams import Seam, identity


class ParameterModule(nn.Module):
    """One half of a sub-block, or another module with parameters.

    `local` is a seam that maps a parameter at rest to the tensor that is used: the identity on one
    device, the rank's shard of a DTensor under `parallel/`. `local_state` does so for a buffer.

    `specs` has the record of each parameter and buffer, by name. `sharding` is the rank's shard of
    every sharded width. `started` are the transformed weights whose state (the singular vectors of
    σReparam) is initialised; `due` are those whose state may advance at the next use in training.
    `frozen` are parameters and buffers that training leaves as they are.

    A half of a sub-block declares its `seams`, `()` where it works token by token. Under context
    parallelism a half that declares none is refused. `compiled` is the method that
    `train.compile` compiles; None: nothing.
    """

    seams: ClassVar[tuple[Seam, ...] | None] = None
    compiled: ClassVar[str | None] = "forward"

    def __init__(self, records: Iterable[ParameterSpec] = ()) -> None:
        super().__init__()
        for seam in self.seams or ():
            setattr(self, seam.name, seam.local)
        self.local: Callable[[Tensor], Tensor] = identity
        self.local_state: Callable[[Tensor], Tensor] = identity
        self.specs: dict[str, ParameterSpec] = {}
        self.sharding = UNSHARDED
        self.due: set[str] = set()
        self.started: set[str] = set()
        self.frozen: set[str] = set()
        for record in records:
            self.register(record)

    def register(self, record: ParameterSpec) -> None:
        """Registers a parameter or buffer without values; they are drawn after sharding."""
        if record.state:
            self.register_buffer(record.name, torch.empty(record.shape))
        else:
            self.register_parameter(record.name, nn.Parameter(torch.empty(record.shape)))
        self.specs[record.name] = record

    @torch.no_grad()
    def fill(self) -> None:
        """Draws each parameter and buffer of this module in fp32 from PyTorch's CPU generator."""
        tensors = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in tensors:
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            self.specs[name].fill(drawn, torch.default_generator)
            tensor.copy_(drawn)

    @property
    def transformed(self) -> set[str]:
        """The names of parameters that have transforms."""
        return {name for name, spec in self.specs.items() if spec.transforms}

    @property
    def fixed(self) -> set[str]:
        """The names of weights whose state must not advance: they, or it, are frozen."""
        return {re.sub("_(left|right)$", "", name) for name in self.frozen}

    def weight_of(self, name: str) -> Tensor:
        """Returns the rank's shard of the parameter `name`, after its transforms."""
        weight = self.local(getattr(self, name))
        for transform in self.specs[name].transforms:
            weight = transform(weight)
        return weight

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Returns x Wᵀ for the weight `name`, plus the bias `{name}_bias` where it has one.

        x `[..., I]` gives `[..., O]`. Where ranks shard I, the result is a partial sum.
        """
        return self.biased(linear(x, self.weight_of(name)), name)

    def biased(self, y: Tensor, name: str) -> Tensor:
        """Returns y plus the bias of the weight `name`, where it has one.

        The output of a weight that writes onto the stream is a partial sum over the ranks that
        shard its input: one of them adds the bias.
        """
        bias = self.bias_of(name)
        return y if bias is None else y + bias

    def bias_of(self, name: str) -> Tensor | None:
        """Returns the bias of the weight `name`, on one rank alone where `biased` says so; None: it
        has none."""
        if (spec := self.specs.get(f"{name}_bias")) is None:
            return None
        bias = self.weight_of(spec.name)
        return self.sharding.once(bias) if spec.role == "bias" else bias

    def state_of(self, name: str) -> Tensor:
        """Returns the rank's shard of the buffer `name`, which shares its memory."""
        return self.local_state(getattr(self, name))


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes the parameters and buffers whose canonical names match one of `patterns`: they get no
    gradient, and no optimizer has state for them."""
    for path, module in model.named_modules():
        if isinstance(module, ParameterModule):
            prefix = f"{path}." if path else ""
            module.frozen = {n for n in module.specs if matches(canonical(prefix + n), patterns)}
            for name, parameter in module.named_parameters(recurse=False):
                parameter.requires_grad_(name not in module.frozen)


class Declared(NamedTuple):
    """A parameter with its canonical name and its record."""

    name: str
    parameter: nn.Parameter
    spec: ParameterSpec


def declared(model: nn.Module) -> Iterator[Declared]:
    """Yields every parameter of a model.

    Raises:
        ValueError: a parameter that no `ParameterModule` declared.
    """
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = canonical(f"{path}.{name}" if path else name)
            if not isinstance(module, ParameterModule):
                raise ValueError(f"{full} was not declared by a ParameterModule")
            yield Declared(full, parameter, module.specs[name])


def trained(model: nn.Module) -> list[Declared]:
    """Returns the parameters of a model that are not frozen."""
    return [d for d in declared(model) if d.parameter.requires_grad]
