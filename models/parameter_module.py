"""A module that holds parameters by their records, and the `local` seam."""

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from colonnade.kernels.sharding import UNSHARDED
from colonnade.models.names import canonical
from colonnade.models.parameters import ParameterSpec
from colonnade.models.seams import Seam


class ParameterModule(nn.Module):
    """One half of a sub-block, or another holder of parameters.

    `local` is a seam: what stands between a parameter at rest and its use. It is the identity here;
    `parallel/` replaces it by the rank's shard.

    `specs` has the record of each parameter and buffer, by name. `sharding` says which shard of
    all split widths is local. Of the transformed weights `started` have a state, and `due` may
    advance it at the next use.

    A half of a sub-block declares its `seams`, `()` where it works token by token; what declares
    none is refused where ranks share sequences.
    """

    seams: ClassVar[tuple[Seam, ...] | None] = None

    def __init__(self, records: Iterable[ParameterSpec] = ()) -> None:
        super().__init__()
        for seam in self.seams or ():
            setattr(self, seam.name, seam.local)
        self.local: Callable[[Tensor], Tensor] = lambda parameter: parameter
        self.specs: dict[str, ParameterSpec] = {}
        self.sharding = UNSHARDED
        self.due: set[str] = set()
        self.started: set[str] = set()
        for record in records:
            self.hold(record)

    def hold(self, record: ParameterSpec) -> None:
        """Register a parameter, or a buffer of state, to be filled wherever its shards lie."""
        if record.state:
            self.register_buffer(record.name, torch.empty(record.shape))
        else:
            self.register_parameter(record.name, nn.Parameter(torch.empty(record.shape)))
        self.specs[record.name] = record

    @torch.no_grad()
    def fill(self) -> None:
        """Draw every parameter and buffer of this part, in fp32, from PyTorch's CPU generator."""
        own = [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]
        for name, tensor in own:
            drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            self.specs[name].fill(drawn, torch.default_generator)
            tensor.copy_(drawn)

    @property
    def transformed(self) -> set[str]:
        """The parameters that have transforms."""
        return {name for name, spec in self.specs.items() if spec.transforms}

    def weight_of(self, name: str) -> Tensor:
        """The parameter `name` as this rank uses it."""
        weight = self.local(getattr(self, name))
        for transform in self.specs[name].transforms:
            weight = transform(weight)
        return weight


class Declared(NamedTuple):
    """A parameter with its canonical name and its record."""

    name: str
    parameter: nn.Parameter
    spec: ParameterSpec


def declared(model: nn.Module) -> Iterator[Declared]:
    """Every parameter of a model.

    Raises:
        ValueError: a parameter that no `ParameterModule` declared.
    """
    for path, part in model.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            full = canonical(f"{path}.{name}" if path else name)
            if not isinstance(part, ParameterModule):
                raise ValueError(f"{full} was not declared by a ParameterModule")
            yield Declared(full, parameter, part.specs[name])
