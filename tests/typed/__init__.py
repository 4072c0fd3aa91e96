"""What `spmd_types`' checker must know of our functions, to type a model's forward on one rank.

The checker runs along one axis: the ranks of a one-dimensional mesh, which share a model's widths
(`tensor`) or its sequences (`context`). Every tensor has a type over them: S(i), a shard of the
whole along dimension i; V, a part that is none; P, a partial sum; R and I, the same on all ranks,
with a gradient that is a partial sum (R) or the same (I). A missing or doubled reduction is a type
error. A model that is cut along several axes is checked along each of them in turn; what is sent
along another axis leaves a type as it is.

The types follow every operator of PyTorch; where they cannot, it is stated here. The checker does
not know FSDP2: it runs on a model that is cut over ranks and not sharded any further.

types      the type of a tensor, along the axis that is checked
rules      of each `autograd.Function`, from the types of its arguments to that of its result
contracts  of kernels that work on heads, channels or experts apart, whatever their number
operators  what PyTorch's operators do whose arguments are sizes; collectives of other axes
model      the checker around a model: parameters, and what is the same along every axis
tensor     along the tensor-parallel axis
context    along the context axis, and what its exchanges are along others
"""

from typed.context import CONTEXT_CONTRACTS, typechecked_context
from typed.contracts import CONTRACTS
from typed.tensor import parameter_types, typechecked
from typed.types import expect, stamp, type_of

__all__ = [
    "CONTEXT_CONTRACTS",
    "CONTRACTS",
    "expect",
    "parameter_types",
    "stamp",
    "type_of",
    "typechecked",
    "typechecked_context",
]
