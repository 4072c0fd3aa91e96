"""Canonical names of parameters and buffers, which do not depend on the structure of the code.

A parameter `q` of the first half of sub-block 3 is `blocks.3.q` on disk, in reports and as the key
of its initial values. So a weight can move between halves without a change to checkpoints or to
initial weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

# Modules that only structure the code; canonical names omit them.
STRUCTURE = frozenset({"wiring", "first", "second", "small", "experts"})
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
        """As in `nn.Module`, with canonical names where it is asked for this module alone."""
        tensors = super().state_dict(*args, **kwargs)
        part_of_another = kwargs.get("destination") is not None or kwargs.get("prefix")
        return tensors if args or part_of_another else dict(renamed(tensors.items()))

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in `nn.Module`, from canonical names, which errors and the result name as well."""
        paths = {canonical(path): (path, t.shape) for path, t in super().state_dict().items()}
        unexpected = [name for name in state_dict if name not in paths]
        missing = [name for name in paths if name not in state_dict]
        reshaped = [
            f"{name} is {tuple(state_dict[name].shape)}, not {tuple(shape)}"
            for name, (_, shape) in paths.items()
            if name in state_dict and state_dict[name].shape != shape
        ]
        if reshaped or (strict and (missing or unexpected)):
            raise RuntimeError(
                f"missing tensors: {', '.join(missing) or 'none'}; "
                f"not of this model: {', '.join(unexpected) or 'none'}; "
                f"of another shape: {', '.join(reshaped) or 'none'}"
            )
        tensors = {paths[name][0]: t for name, t in state_dict.items() if name in paths}
        super().load_state_dict(tensors, strict=False, assign=assign)
        return _IncompatibleKeys(missing, unexpected)


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
