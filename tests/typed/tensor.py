"""Types along the tensor-parallel axis: widths are shards, and products over them partial sums."""

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
from colonnade.parallel.tensor import on_stream
from typed.context import exchanges
from typed.contracts import CONTRACTS, held, in_models
from typed.model import checked
from typed.types import Type, as_shard, stamp


def local(self: Sharding, full: Tensor, dim: int, shards: int | None = None) -> Tensor:
    """`Sharding.local`, whose result differs between ranks: a shard, maybe held by several."""
    own = _local(self, full, dim, shards)
    if self.size == 1 or not spmd.is_type_checking():
        return own
    return as_shard(own, dim)


def looked_up(self: Embedding, tokens: Tensor) -> Tensor:
    """`Embedding.forward`: where other ranks have the row, zeros, so that what is found adds up."""
    leave = self.leave

    def summed(found: Tensor) -> Tensor:
        with typecheck(local=False):
            return leave(stamp(found, P))

    self.leave = summed
    try:
        with spmd.local():
            return _looked_up(self, tokens)
    finally:
        self.leave = leave


_local, _looked_up = Sharding.local, Embedding.forward


def parameter_types(model: Decoder) -> dict[str, Type]:
    """By path in the module tree; of whole parameters, those in `partial` are R, and others I.

    A gradient has the type's `backward_type`: P for R, else the same.

    Raises:
        SpmdTypeError: a shard whose gradient is said to be partial.
    """
    types: dict[str, Type] = {}
    for name, p, spec in declared(model):
        assert isinstance(p, DTensor)
        (where,) = p.placements
        if isinstance(where, Shard) and spec.partial:
            raise SpmdTypeError(f"{name} is a shard: so is its gradient, and no sum")
        whole = R if spec.partial else I
        types[name] = S(where.dim) if isinstance(where, Shard) else whole
    return types


@contextmanager
def typechecked(model: Decoder, mesh: DeviceMesh) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    A parameter is at fault, too, whose gradient `complete_gradients` sums without need, or does not
    sum though it must.

    Args:
        model: cut by `tensor_parallel`, and by `context_parallel` or not; filled, in fp64 or fp32;
            not sharded any further.
        mesh: of one dimension, more than one rank. Its backend may be `fake`.

    Tokens, positions and what else goes in are to be stamped R; the objective comes out I, which
    its `backward` demands.
    """
    types = parameter_types(model)
    known = {id(p): types[path] for path, p in model.named_parameters()}
    stream = {id(p) for part in on_stream(model) for p in part.parameters(recurse=False)}

    def parameter(p: Tensor) -> Type:
        whole = id(p) in stream and not model.training  # so is the stream then
        return I if whole else known[id(p)]

    patches = [
        patch.object(Sharding, "local", local),
        patch.object(Embedding, "forward", looked_up),
        *in_models({kernel: held(kernel, contract) for kernel, contract in CONTRACTS.items()}),
        *exchanges(model, shared=False),
    ]
    with checked(model, mesh, parameter, patches) as operators, ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, mamba2.ScanOut) and part.groups % part.sharding.size:
                stack.enter_context(
                    patch.object(part, "forward", operators.in_pieces(part.forward))
                )
        yield
