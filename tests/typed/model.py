"""Runs the checker on a model along one axis, with the types of its parameters and buffers."""

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
from torch.distributed.tensor import DTensor

from colonnade.models import reparam
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from typed.experts import axis_of, placed_type
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
        patches: context managers that state further types to the checker.
    """
    register()

    Local = Callable[[Tensor], Tensor]

    def typed_shard(local: Local, type_at_rest: Callable[[Tensor], Type], p: Tensor) -> Tensor:
        with spmd.no_typecheck():
            shard = local(p)
            shard = shard.view_as(p) if shard is p else shard  # types stay on tensors
        return stamp(shard, type_at_rest(p))

    def buffer_type(t: Tensor) -> Type:
        return placed_type(t, axis_of(mesh)) or R

    with ExitStack() as stack:
        untyped = spmd.no_typecheck(reparam.power_iteration)
        stack.enter_context(patch.object(reparam, "power_iteration", untyped))
        for further_types in patches:
            stack.enter_context(further_types)
        modules = [module for module in model.modules() if isinstance(module, ParameterModule)]
        for module in modules:
            local = functools.partial(typed_shard, module.local, parameter)
            stack.enter_context(patch.object(module, "local", local))
            local = functools.partial(typed_shard, module.local_state, buffer_type)
            stack.enter_context(patch.object(module, "local_state", local))
        stack.enter_context(spmd.set_current_mesh(mesh))
        stack.enter_context(typecheck("strict", local=False))
        operators = stack.enter_context(Operators())
        for module in modules:
            for name, buffer in module.named_buffers(recurse=False):
                if isinstance(buffer, DTensor):
                    continue  # typed by `local_state`
                with spmd.no_typecheck():
                    typed = buffer.view_as(buffer)
                stack.enter_context(patch.dict(module._buffers, {name: stamp(typed, R)}))
        yield operators
