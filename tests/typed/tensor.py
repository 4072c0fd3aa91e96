"""Types along the tensor-parallel axis: widths are sharded, and products over them partial sums."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import spmd_types as spmd
from spmd_types import I, P, R, SpmdTypeError
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels.sharding import Sharding
from colonnade.models.blocks import mamba2
from colonnade.models.decoder import Decoder, Embedding
from colonnade.models.parameter_module import declared
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.tensor import stream_modules
from typed.context import exchange_patches
from typed.contracts import CONTRACTS, in_models, under_contract
from typed.experts import (
    ExpertView,
    axis_of,
    expert_patches,
    expert_shardings,
    expert_view,
    placed_type,
)
from typed.model import checked
from typed.operators import local_over
from typed.types import Type, stamp


def typed_embedding(self: Embedding, tokens: Tensor, positions: Tensor) -> Tensor:
    """`Embedding.forward`: a rank has zeros for tokens whose row another rank holds, so that its
    output is a partial sum."""
    leave = self.leave

    def typed_leave(rows: Tensor) -> Tensor:
        with typecheck(local=False):
            return leave(stamp(rows, P))

    self.leave = typed_leave
    try:
        with spmd.local():
            return _embedding(self, tokens, positions)
    finally:
        self.leave = leave


_embedding = Embedding.forward


def parameter_types(model: Decoder, mesh: DeviceMesh, view: ExpertView) -> dict[str, Type]:
    """The types of parameters by path in the module tree, along the axis of a mesh.

    Shards are S. Replicated parameters are R where their spec is `partial`, and else I. A gradient
    has the type's `backward_type`: P for R, else the same. Along `edp` experts are R.

    Raises:
        SpmdTypeError: a shard whose gradient is said to be partial, or a parameter that the ranks
            of the axis neither shard nor replicate.
    """
    types: dict[str, Type] = {}
    of_experts = {id(p) for block in expert_blocks(model) for p in block.experts.parameters()}
    for name, p, spec in declared(model):
        kind = placed_type(p, axis_of(mesh), spec)
        if kind is None and view.role == "edp" and id(p) in of_experts:
            kind = R
        if kind is None:
            raise SpmdTypeError(f"{name} is not placed on the ranks of the axis")
        types[name] = kind
    return types


@contextmanager
def typechecked(
    model: Decoder, mesh: DeviceMesh, expert_mesh: DeviceMesh | None = None
) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    This includes a parameter whose gradient `complete_gradients` all-reduces without need, or does
    not all-reduce though it must.

    Args:
        model: sharded by `tensor_parallel`, and by `expert_parallel` and `context_parallel` or
            not; filled, in fp64 or fp32; not wrapped in FSDP2.
        mesh: of one dimension, more than one rank: the tensor-parallel axis, or one of the factors
            into which the expert view splits it. Its backend may be `fake`.
        expert_mesh: the expert view, if there is one.

    Tokens, positions and all other inputs must be stamped R; the objective comes out I, which
    its `backward` demands.
    """
    view = expert_view(mesh, expert_mesh, tensor_axis=True)
    types = parameter_types(model, mesh, view)
    # Other ranks than those of this axis may shard the widths of experts.
    elsewhere = expert_shardings(model) if view.role in ("edp", "ep") else set()
    type_of_id = {id(p): types[path] for path, p in model.named_parameters()}
    on_stream = {id(p) for m in stream_modules(model) for p in m.parameters(recurse=False)}

    def parameter(p: Tensor) -> Type:
        # In evaluation the stream is not sharded along the sequence, so it and its norms are I.
        return I if id(p) in on_stream and not model.training else type_of_id[id(p)]

    patches = [
        patch.object(Sharding, "local", local_over(lambda widths: widths not in elsewhere)),
        patch.object(Embedding, "forward", typed_embedding),
        *in_models(
            {kernel: under_contract(kernel, contract) for kernel, contract in CONTRACTS.items()}
        ),
        *exchange_patches(model, context_axis=False),
        *expert_patches(model, view),
    ]
    with checked(model, mesh, parameter, patches) as operators, ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, mamba2.ScanOut) and module.groups % module.sharding.size:
                stack.enter_context(
                    patch.object(module, "forward", operators.with_shared_groups(module.forward))
                )
        yield
