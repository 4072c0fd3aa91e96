"""Canonical names of parameters and buffers, which do not depend on the structure of the code.

A parameter `q` of the first half of sub-block 3 is `blocks.3.q` on disk, in reports and as the key
of its initial values. So a weight can move between halves without a change to checkpoints or to
initial weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

# Modules that only structure the code; canonical names omit them.
STRUCTURE = frozenset({"wiring", "first", "second", "small"})
AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def canonical(path: str) -> str:
    """Returns the canonical name of the parameter or buffer at `path` in the module tree."""
    return ".".join(word for word in path.split(".") if word not in STRUCTURE)


class CanonicalNames(nn.Module):
    """A module whose parameters, buffers and state dict have canonical names."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in `nn.Module`, with canonical names."""
        return renamed(super().named_parameters(*args, **kwargs))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """As in `nn.Module`, with canonical names."""
        return renamed(super().named_buffers(*args, **kwargs))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in `nn.Module`, with canonical names; only for the root module, without a prefix."""
        return dict(renamed(super().state_dict(*args, **kwargs).items()))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in `nn.Module`, from canonical names."""
        paths = {canonical(path): path for path in super().state_dict()}
        tensors = {paths.get(name, name): tensor for name, tensor in state_dict.items()}
        result = super().load_state_dict(tensors, strict=False, assign=assign)
        if strict and (result.missing_keys or result.unexpected_keys):
            missing = ", ".join(canonical(path) for path in result.missing_keys) or "none"
            unexpected = ", ".join(result.unexpected_keys) or "none"
            raise RuntimeError(f"missing tensors: {missing}; not of this model: {unexpected}")
        return result


def renamed(named: Iterable[tuple[str, AnyTensor]]) -> Iterator[tuple[str, AnyTensor]]:
    """Yields the tensors under their canonical names.

    Raises:
        ValueError: two tensors would have one name.
    """
    path_of: dict[str, str] = {}
    for path, tensor in named:
        name = canonical(path)
        if name in path_of:
            raise ValueError(
                f"{path_of[name]} and {path} are both called {name}; rename one of them"
            )
        path_of[name] = path
        yield name, tensor


def tensors_of(model: CanonicalNames) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter and every buffer of a model."""
    yield from model.named_parameters()
    yield from model.named_buffers()
