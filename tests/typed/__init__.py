"""States the types of our functions to `spmd_types`' checker, which then types a model's forward.

The checker runs along one axis, the ranks of a one-dimensional mesh, over which a model's widths
(`tensor`) or its sequences (`context`) are sharded. Every tensor has a type over this axis: S(i), a
shard along dimension i; V, a local value that is no such shard; P, a partial sum; R and I, the same
on all ranks, with a gradient that is a partial sum (R) or the same (I). A missing or doubled
reduction is a type error. A model that is sharded along several axes is checked along each of them
in turn; a collective over another axis leaves a type as it is.

The checker follows every operator of PyTorch; where it cannot, the type is stated here. It does not
know FSDP2: it runs on a model before `fully_shard`.

types      the type of a tensor along the axis that is checked
rules      for each `autograd.Function`, the type of its result from those of its arguments
contracts  types of kernels that compute heads, channels or experts independently
operators  types for PyTorch operators whose arguments are sizes; collectives over other axes
model      runs the checker on a model, along whichever axis
tensor     types along the tensor-parallel axis
context    types along the context axis, and of its collectives along other axes
experts    types of experts that have ranks of their own, along any axis
"""

from typed.context import CONTEXT_CONTRACTS, typechecked_context
from typed.contracts import CONTRACTS
from typed.experts import ExpertView
from typed.tensor import parameter_types, typechecked
from typed.types import expect, stamp, type_of

__all__ = [
    "CONTEXT_CONTRACTS",
    "CONTRACTS",
    "ExpertView",
    "expect",
    "parameter_types",
    "stamp",
    "type_of",
    "typechecked",
    "typechecked_context",
]
