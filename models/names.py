"""Canonical names of parameters and buffers: what a tensor is, without how the code holds it.

A parameter `q` of the first half of sub-block 3 is `blocks.3.q` on disk, in reports and as the key
of its first values. So a weight may move between halves, and no checkpoint and no first weight
changes.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

# Modules that structure the code and say nothing of the model.
STRUCTURE = frozenset({"wiring", "first", "second", "small"})
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def canonical(path: str) -> str:
    """The canonical name of the parameter or buffer at `path` of the module tree."""
    return ".".join(word for word in path.split(".") if word not in STRUCTURE)


class CanonicalNames(nn.Module):
    """A module that names parameters, buffers and a state dict's tensors canonically."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module` has it, by canonical names."""
        return renamed(super().named_parameters(*args, **kwargs))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As `nn.Module` has it, by canonical names."""
        return renamed(super().named_buffers(*args, **kwargs))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module` has it, by canonical names; of a whole model alone, without a prefix."""
        return dict(renamed(super().state_dict(*args, **kwargs).items()))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module` has it, from canonical names."""
        paths = {canonical(path): path for path in super().state_dict()}
        tensors = {paths.get(name, name): tensor for name, tensor in state_dict.items()}
        result = super().load_state_dict(tensors, strict=False, assign=assign)
        if strict and (result.missing_keys or result.unexpected_keys):
            missing = ", ".join(canonical(path) for path in result.missing_keys) or "none"
            left_over = ", ".join(result.unexpected_keys) or "none"
            raise RuntimeError(f"missing tensors: {missing}; not of this model: {left_over}")
        return result


def renamed(named: Iterable[tuple[str, AnyTensor]]) -> Iterator[tuple[str, AnyTensor]]:
    """The same tensors by canonical names.

    Raises:
        ValueError: two tensors would have one name.
    """
    taken: dict[str, str] = {}
    for path, tensor in named:
        name = canonical(path)
        if name in taken:
            raise ValueError(f"{taken[name]} and {path} are both called {name}; rename one of them")
        taken[name] = path
        yield name, tensor


def tensors_of(model: CanonicalNames) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer of a model."""
    yield from model.named_parameters()
    yield from model.named_buffers()
