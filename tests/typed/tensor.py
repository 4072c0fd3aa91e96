"""Types along the tensor-parallel axis: widths are sharded, and products over them partial sums."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import spmd_types as spmd
from spmd_types import I, P, R, S, SpmdTypeError
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from colonnade.kernels.sharding import Sharding
from colonnade.models.blocks import mamba2
from colonnade.models.decoder import Decoder, Embedding
from colonnade.models.parameter_module import declared
from colonnade.parallel.tensor import stream_modules
from typed.context import exchange_patches
from typed.contracts import CONTRACTS, in_models, under_contract
from typed.model import checked
from typed.types import Type, as_shard, stamp


def local(self: Sharding, full: Tensor, dim: int, shards: int | None = None) -> Tensor:
    """`Sharding.local`, whose result differs between ranks: a shard, which several may hold."""
    shard = _local(self, full, dim, shards)
    if self.size == 1 or not spmd.is_type_checking():
        return shard
    return as_shard(shard, dim)


def typed_embedding(self: Embedding, tokens: Tensor) -> Tensor:
    """`Embedding.forward`: a rank has zeros for tokens whose row another rank holds, so that its
    output is a partial sum."""
    leave = self.leave

    def typed_leave(rows: Tensor) -> Tensor:
        with typecheck(local=False):
            return leave(stamp(rows, P))

    self.leave = typed_leave
    try:
        with spmd.local():
            return _embedding(self, tokens)
    finally:
        self.leave = leave


_local, _embedding = Sharding.local, Embedding.forward


def parameter_types(model: Decoder) -> dict[str, Type]:
    """The types of parameters by path in the module tree.

    Shards are S. Replicated parameters are R where their spec is `partial`, and else I. A gradient
    has the type's `backward_type`: P for R, else the same.

    Raises:
        SpmdTypeError: a shard whose gradient is said to be partial.
    """
    types: dict[str, Type] = {}
    for name, p, spec in declared(model):
        assert isinstance(p, DTensor)
        (placement,) = p.placements
        if isinstance(placement, Shard) and spec.partial:
            raise SpmdTypeError(f"{name} is a shard: so is its gradient, and not a partial sum")
        replicated = R if spec.partial else I
        types[name] = S(placement.dim) if isinstance(placement, Shard) else replicated
    return types


@contextmanager
def typechecked(model: Decoder, mesh: DeviceMesh) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    This includes a parameter whose gradient `complete_gradients` all-reduces without need, or does
    not all-reduce though it must.

    Args:
        model: sharded by `tensor_parallel`, and by `context_parallel` or not; filled, in fp64 or
            fp32; not wrapped in FSDP2.
        mesh: of one dimension, more than one rank. Its backend may be `fake`.

    Tokens, positions and all other inputs must be stamped R; the objective comes out I, which
    its `backward` demands.
    """
    types = parameter_types(model)
    type_of_id = {id(p): types[path] for path, p in model.named_parameters()}
    on_stream = {id(p) for m in stream_modules(model) for p in m.parameters(recurse=False)}

    def parameter(p: Tensor) -> Type:
        # In evaluation the stream is not sharded along the sequence, so it and its norms are I.
        return I if id(p) in on_stream and not model.training else type_of_id[id(p)]

    patches = [
        patch.object(Sharding, "local", local),
        patch.object(Embedding, "forward", typed_embedding),
        *in_models(
            {kernel: under_contract(kernel, contract) for kernel, contract in CONTRACTS.items()}
        ),
        *exchange_patches(model, context_axis=False),
    ]
    with checked(model, mesh, parameter, patches) as operators, ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, mamba2.ScanOut) and module.groups % module.sharding.size:
                stack.enter_context(
                    patch.object(module, "forward", operators.with_shared_groups(module.forward))
                )
        yield
