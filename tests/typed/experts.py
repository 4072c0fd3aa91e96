"""Types of experts that have ranks of their own, along an axis of the dense or of the expert view.

The axis that is checked lies in one axis of the expert view, its role. Experts compute on rows,
copies of tokens that the seam `dispatch` sends to them. Of these seams, the checker follows all but
the sort by expert and the methods of `TokenExchange` that are typed here. A row is S(0) where it is
on the rank of its token, and the role says what it is on the ranks of its expert:

    role   weights of experts      rows that arrive          outputs
    edp    R                       S(0), of this rank        S(0)
    ep     S(0), other experts     V, of other tokens        V
    etp    S(1) or S(2), widths    R, on all these ranks     P

An exchange over the axis turns S(0) into rows that arrive, and outputs into S(0) again: it takes
nothing else, and experts take only what arrives, so one that is missing or doubled is an error.
Over other axes it changes no type. So along `etp` = `tp`, where the exchange is over `ep` alone,
rows are R before as after, as without expert parallelism. Where these differ, each rank of `tp`
takes its share of the tokens, R to S(0), and pads its output with zeros, S(0) to P.

Along `edp` the gradient of experts is a partial sum, R, as that of all weights along the data axes:
FSDP's reduce-scatter completes it, which the checker does not see. Along `etp` it is complete for
shards, and partial for what is declared so, and for nothing else.

Not typed, because the type would be the same: to which rank of `ep` a row goes, that it comes back
to its token, and that `combine` adds all `etp` outputs of a choice with its weight. These
`test_expert_types.py` computes for the shards of several ranks. Nor is an axis of data-parallel
ranks checked: an exchange over it alone is that over the context axis, of other samples' rows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import spmd_types as spmd
from spmd_types import I, P, R, S, SpmdTypeError, V
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from colonnade.kernels import experts
from colonnade.kernels.experts import DispatchOrder
from colonnade.kernels.sharding import Sharding
from colonnade.models.decoder import Decoder
from colonnade.models.parameters import ParameterSpec
from colonnade.parallel.experts import Arrivals, TokenExchange, _Reorder
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.tensor import _Wait
from typed.contracts import CONTRACTS, Contract, Function, in_models, sharded, under_contract
from typed.types import Type, as_shard, expect, includes_axis, stamp, type_of

Role = Literal["edp", "ep", "etp"]

# Functions of a rank's tokens, which they sort by expert.
OF_TOKENS: dict[Function, Contract] = {
    experts.dispatch: Contract(
        sharded(0, "x", "keep_mask") | {"chosen": (S(0), R)},  # R: drawn at random for all tokens
        (S(0), None),
    ),
    experts.expert_mlp: Contract(sharded(0, "rows") | {"counts": None}, (S(0),)),
    experts.combine: Contract(sharded(0, "rows") | {"weight": (S(0), R)}, (S(0),)),
}  # fmt: skip
# What experts compute by the role of the axis: rows that arrive, weights, and outputs.
OF_ROLE: dict[Role, Contract] = {
    "edp": OF_TOKENS[experts.expert_mlp],
    "ep": Contract(
        {"rows": V, "counts": V}
        | sharded(0, "gate", "up", "down", "gate_bias", "up_bias", "down_bias"),
        (V,),
    ),
    "etp": CONTRACTS[experts.expert_mlp],
}


class ExpertView(NamedTuple):
    """How the axis that is checked lies in the expert view.

    Attributes:
        role: the axis of the expert view in which it lies; None: there is no expert view.
        splits_tokens: whether it is an axis of tensor-parallel ranks that share the tokens.
    """

    role: Role | None
    splits_tokens: bool = False

    @property
    def arrived(self) -> Type:
        """The type of rows that arrive at their experts."""
        assert self.role is not None
        return OF_ROLE[self.role].arguments.get("rows", R)

    @property
    def output(self) -> Type:
        """The type of what experts compute."""
        assert self.role is not None
        return OF_ROLE[self.role].results[0]


def expert_view(
    checked: DeviceMesh, mesh: DeviceMesh | None, tensor_axis: bool = False
) -> ExpertView:
    """How the axis of a one-dimensional mesh lies in the expert view.

    Args:
        checked: the axis that is checked.
        mesh: the expert view; None: there is none.
        tensor_axis: whether the axis is of tensor-parallel ranks.

    Raises:
        SpmdTypeError: it lies in several axes of the expert view; check its factors in turn.
    """
    if mesh is None:
        return ExpertView(None)
    axis = axis_of(checked)
    roles: list[Role] = [role for role in OF_ROLE if axis <= axis_of(mesh[role])]
    if len(roles) != 1:
        raise SpmdTypeError(f"{axis} is in no axis of the expert view: check its factors in turn")
    return ExpertView(roles[0], tensor_axis)


def axis_of(mesh: DeviceMesh) -> spmd.MeshAxis:
    """The axis of a mesh of one dimension."""
    return spmd.MeshAxis.of(mesh.get_group())


def placed_type(t: Tensor, axis: spmd.MeshAxis, spec: ParameterSpec | None = None) -> Type | None:
    """The type along an axis of a tensor at rest, by its placement; None: it is not a DTensor over
    this axis.

    A shard is S. A replicated tensor is R if its spec says that its gradient is `partial` over the
    ranks of this axis, or if it has no spec, and else I.

    Raises:
        SpmdTypeError: a shard whose gradient is said to be partial, or a gradient that is partial
            over an axis on which the tensor is not placed.
    """
    if not isinstance(t, DTensor):
        return None
    names = t.device_mesh.mesh_dim_names or ()
    partial = None if spec is None else spec.partial
    if partial is not None and partial not in names:
        raise SpmdTypeError(f"a gradient is said to be partial over {partial}, not in {names}")
    for dim, (name, placement) in enumerate(zip(names, t.placements, strict=True)):
        if isinstance(placement, Shard) and partial == name:
            raise SpmdTypeError("a shard's gradient is said to be partial, and is a shard")
        if axis <= axis_at_rest(t.device_mesh, dim):
            replicated = R if spec is None or partial == name else I
            return S(placement.dim) if isinstance(placement, Shard) else replicated
    return None


def axis_at_rest(mesh: DeviceMesh, dim: int) -> spmd.MeshAxis:
    """The axis of a dimension of a mesh, by its ranks: PyTorch keeps a DTensor's mesh for the next
    equal one, which in tests may have groups that are closed."""
    with spmd.no_typecheck():
        ranks = mesh.mesh.movedim(dim, -1).reshape(-1, mesh.shape[dim])[0].tolist()
    return spmd.MeshAxis.of(len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1)


def expert_patches(model: Decoder, view: ExpertView) -> Iterator[Any]:
    """Patches that type experts that have ranks of their own; none where they have not."""
    if view.role is None:
        return
    role = view.role
    yield from in_models(
        {experts.expert_mlp: under_contract(experts.expert_mlp, OF_ROLE[role])}
        | {kernel: of_tokens(kernel, role) for kernel in (experts.dispatch, experts.combine)}
    )
    typed: dict[str, Callable[[Function, ExpertView], Function]] = {
        "local_tokens": typed_local_tokens,
        "all_tokens": typed_all_tokens,
        "shards_of": typed_shards_of,
        "arrivals": typed_arrivals,
        "exchange": typed_exchange,
    }
    for name, wrapper in typed.items():
        yield patch.object(TokenExchange, name, wrapper(getattr(TokenExchange, name), view))
    for function in (_Reorder, _Wait):
        yield patch.object(function, "apply", of_rows(function.apply))


def of_tokens(function: Function, role: Role) -> Function:
    """Types a function of a rank's rows. Along `etp` = `tp` all ranks have the same tokens, and the
    checker follows it."""
    shards = under_contract(function, OF_TOKENS[function])

    @functools.wraps(function)
    def call(rows: Tensor, *args: Any) -> Any:
        same = role == "etp" and type_of(rows) != S(0)
        return (function if same else shards)(rows, *args)

    return call


def untyped(method: Function, *args: Any) -> Any:
    """Calls a method whose operators the checker does not follow."""
    with spmd.no_typecheck():
        return method(*args)


def of_rows(apply: Function) -> Function:
    """Types a function that permutes the rows that a rank has, or waits for them: they have the
    same type, whatever it is."""

    def call(rows: Tensor, *order: Tensor) -> Tensor:
        return stamp(untyped(apply, rows, *order), type_of(rows))

    return call


def typed_local_tokens(method: Function, view: ExpertView) -> Function:
    """`local_tokens`: tokens R become shards S(0) where the ranks of the axis share them."""

    def call(self: TokenExchange, t: Tensor) -> Tensor:
        kind = type_of(t)
        local = untyped(method, self, t)
        if not view.splits_tokens or self.shares == 1:
            return stamp(local, kind)
        expect(t, R, "tokens of which each rank takes its share")
        return as_shard(stamp(local, R), 0)

    return call


def typed_all_tokens(method: Function, view: ExpertView) -> Function:
    """`all_tokens`: a shard S(0) between zeros is a partial sum, P."""

    def call(self: TokenExchange, y: Tensor, *sizes: int) -> Tensor:
        kind = type_of(y)
        if view.splits_tokens and self.shares > 1:
            expect(y, S(0), "outputs for a rank's share of the tokens")
            kind = P
        return stamp(untyped(method, self, y, *sizes), kind)

    return call


def typed_shards_of(method: Function, view: ExpertView) -> Function:
    """`shards_of`, which works token by token."""

    def call(self: TokenExchange, chosen: Tensor, number: int) -> Tensor:
        return stamp(untyped(method, self, chosen, number), type_of(chosen))

    return call


def typed_arrivals(method: Function, view: ExpertView) -> Function:
    """`arrivals`: numbers and orders of rows that arrive differ where these rows do."""

    def call(self: TokenExchange, order: DispatchOrder, slots: int | None) -> Arrivals:
        arrivals = untyped(method, self, order, slots)
        for t in (arrivals.counts, arrivals.by_expert, arrivals.by_rank):
            stamp(t, view.arrived)
        return arrivals

    return call


def typed_exchange(method: Function, view: ExpertView) -> Function:
    """`exchange`: over the axis, S(0) becomes rows that arrive, or outputs become S(0)."""

    def call(self: TokenExchange, rows: Tensor, *sizes: list[int]) -> Tensor:
        kind = type_of(rows)
        if self.group.size() > 1 and includes_axis(self.group):
            expect(rows, (S(0), view.output), "rows that are sent")
            kind = view.arrived if kind == S(0) else S(0)
        return stamp(untyped(method, self, rows, *sizes), kind)

    return call


def expert_shardings(model: Decoder) -> set[Sharding]:
    """The shardings of the widths of experts."""
    return {block.experts.sharding for block in expert_blocks(model)}
