"""The checker around a model: the types of its parameters, and what holds along every axis."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import spmd_types as spmd
from spmd_types import R
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.models import reparam
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from typed.operators import Operators
from typed.rules import register
from typed.types import Type, stamp


@contextmanager
def checked(
    model: Decoder,
    mesh: DeviceMesh,
    parameter: Callable[[Tensor], Type],
    patches: Iterable[Any],
) -> Iterator[Operators]:
    """Within, the model's forward is checked along a mesh of one dimension.

    Args:
        parameter: the type of each parameter at its use.
        patches: context managers, what else the checker is to know.
    """
    register()

    def typed_shard(local: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        with spmd.no_typecheck():
            shard = local(p)
            shard = shard.view_as(p) if shard is p else shard  # types stay on tensors
        return stamp(shard, parameter(p))

    with ExitStack() as stack:
        untyped = spmd.no_typecheck(reparam.power_iteration)
        stack.enter_context(patch.object(reparam, "power_iteration", untyped))
        for change in patches:
            stack.enter_context(change)
        parts = [part for part in model.modules() if isinstance(part, ParameterModule)]
        for part in parts:
            local = functools.partial(typed_shard, part.local)
            stack.enter_context(patch.object(part, "local", local))
        stack.enter_context(spmd.set_current_mesh(mesh))
        stack.enter_context(typecheck("strict", local=False))
        operators = stack.enter_context(Operators())
        for part in parts:
            for name, buffer in part.named_buffers(recurse=False):
                with spmd.no_typecheck():
                    typed = buffer.view_as(buffer)
                stack.enter_context(patch.dict(part._buffers, {name: stamp(typed, R)}))
        yield operators
