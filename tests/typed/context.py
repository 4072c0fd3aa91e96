"""Types along the context axis: what is computed token by token is a shard S(0) of the sequence.

A model's inputs and its parameters are replicated, R: the gradients of parameters are partial sums,
which FSDP's reduce-scatter completes. The objective and balancing terms are P, sums over a rank's
tokens. Only functions that mix tokens are stated here: those that `parallel.context` puts at seams
take and return sequence shards. A local attention, scan or convolution takes none, so a seam that
is left local is a type error.

Under ring+ulysses the axis is split into two, inner and outer, which are checked in turn.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import spmd_types as spmd
import torch.distributed as dist
from spmd_types import P, R, S, V
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colonnade.kernels import (
    attention,
    conv,
    delta,
    loss,
    routing,
    s4d,
    selective_scan,
    ssd,
)
from colonnade.kernels.segments import StatePassing
from colonnade.kernels.sharding import Sharding
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import declared
from colonnade.parallel import context
from colonnade.parallel.context import plug
from colonnade.parallel.context.heads import HeadExchange
from typed.contracts import (
    CONTRACTS,
    Contract,
    Function,
    in_models,
    over_tokens,
    sharded,
    under_contract,
)
from typed.experts import (
    OF_TOKENS,
    axis_of,
    expert_patches,
    expert_shardings,
    expert_view,
    placed_type,
)
from typed.model import checked
from typed.operators import local_over
from typed.types import Type, expect, includes_axis, stamp, type_of

# Functions of a rank's tokens, which experts reorder; sums over them are partial sums.
TOKENS: dict[Function, Contract] = OF_TOKENS | {
    routing.loads: Contract(sharded(0, "chosen", "keep_mask"), (P,)),
    routing.within_capacity: Contract({}, (R,)),  # first come, first served: among all tokens
    routing.balance_loss: Contract(sharded(0, "probabilities"), (P,)),
    routing.router_z_loss: Contract(sharded(0, "logits"), (P,)),
    loss.linear_objective: Contract(sharded(0, "x", "labels"), (P, P)),
    loss.linear_consistency: Contract(sharded(0, "x1", "x2", "labels"), (P, P, P)),
}  # fmt: skip
# With `state_passing`, which gives each segment the state before it.
WITH_STATE_PASSING: dict[Function, Contract] = {
    scan: Contract(over_tokens(symbol) | sharded(0, "documents"), (S(0), V))
    for symbol, scan in (
        ("M", ssd.ssd), ("m", selective_scan.selective_scan), ("S", s4d.s4d),
        ("G", delta.delta_rule),
    )
}  # fmt: skip
ATTENTION = Contract(over_tokens("*"), (S(0),))
CONTEXT_CONTRACTS = TOKENS | WITH_STATE_PASSING

# Seams by name, along the context axis, and along other axes.
SEAMS: dict[str, Contract] = {
    "local_segments": Contract({}, (S(0),)),
    "full_sequence": Contract(sharded(0, "t"), (R,)),
    "conv": Contract(sharded(0, "x"), (S(0),)),
}
SEAMS_OF_OTHER_AXES: dict[str, Contract] = {
    "local_segments": Contract({}, (R,)),
    "full_sequence": Contract({}, (R,)),
    "conv": CONTRACTS[conv.causal_conv],
}
# Methods of `HeadExchange`, each with the types of its arguments and of its results.
EXCHANGE_METHODS: dict[str, tuple[Type, Type]] = {
    "sequence_to_heads": (S(0), S(2)),
    "heads_to_sequence": (S(2), S(0)),
    "all_gather": (S(0), R),
    "local_heads": (R, S(0)),
}


def is_plugged(seam: Any) -> bool:
    """Whether `parallel.context` has put this at a seam: a function, a method or a `partial`."""
    function = getattr(seam, "func", seam)
    return getattr(function, "__module__", "").startswith(f"{context.__name__}.")


def exchange_patches(model: Decoder, context_axis: bool) -> Iterator[Any]:
    """Patches that type what `parallel.context` has put into a model.

    `context_axis` says whether the axis that is checked is the context axis, or one of the two into
    which it is split.
    """
    for module in model.modules():
        for name, contract in (SEAMS if context_axis else SEAMS_OF_OTHER_AXES).items():
            seam: Any = getattr(module, name, None)
            if is_plugged(seam):
                yield patch.object(module, name, under_contract(seam, contract))
    for name, (before, after) in EXCHANGE_METHODS.items():
        typed = typed_exchange(getattr(HeadExchange, name), before, after)
        yield patch.object(HeadExchange, name, typed)
    yield patch.object(plug, "context_attention", typed_attention(plug.context_attention))


def typed_exchange(method: Function, before: Type, after: Type) -> Function:
    """Types a collective: over the axis that is checked it turns `before` into `after`, and over
    another it leaves types as they are."""

    @functools.wraps(method)
    def call(self: HeadExchange, *tensors: Tensor) -> Any:
        kinds = [type_of(t) for t in tensors]
        if includes_axis(self.group):
            for t in tensors:
                expect(t, before, f"{method.__name__}: an argument")
            kinds = [after] * len(tensors)
        with spmd.no_typecheck():
            results = method(self, *tensors)
        several = [results] if isinstance(results, Tensor) else results
        for result, kind in zip(several, kinds, strict=True):
            stamp(result, kind)
        return results

    return call


def typed_attention(attend: Function) -> Function:
    """Types attention over a group: over the axis that is checked its arguments are sequence
    shards, and over another they may be shards of heads."""
    tokens = under_contract(attend, ATTENTION)
    heads = under_contract(attend, CONTRACTS[attention.attention])

    @functools.wraps(attend)
    def call(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, **options: Any) -> Tensor:
        return (tokens if includes_axis(group) else heads)(q, k, v, group, **options)

    return call


def typed_scan(scan: Function) -> Function:
    """Types a scan: with state passing of sequence shards, without it of shards of heads."""
    heads = under_contract(scan, CONTRACTS[scan])
    segments = under_contract(scan, WITH_STATE_PASSING[scan])

    @functools.wraps(scan)
    def call(*args: Any, state_passing: StatePassing | None = None, **options: Any) -> Any:
        return (heads if state_passing is None else segments)(
            *args, state_passing=state_passing, **options
        )

    return call


@contextmanager
def typechecked_context(
    model: Decoder, mesh: DeviceMesh, expert_mesh: DeviceMesh | None = None
) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    Args:
        model: sharded by `context_parallel`, before that by `tensor_parallel` and
            `expert_parallel` or not; filled, in fp64 or fp32; not wrapped in FSDP2.
        mesh: of one dimension, more than one rank: the context axis, or one of the factors into
            which ring+ulysses or the expert view splits it. Its backend may be `fake`.
        expert_mesh: the expert view, if there is one.

    Tokens, positions and all other inputs must be stamped R; the objective comes out P, and
    logits S(0).
    """
    contracts = CONTRACTS | TOKENS
    kernels = {kernel: under_contract(kernel, contract) for kernel, contract in contracts.items()}
    kernels |= {scan: typed_scan(scan) for scan in WITH_STATE_PASSING}
    forward, view = model.forward, expert_view(mesh, expert_mesh)
    axis, specs = axis_of(mesh), {id(p): spec for _, p, spec in declared(model)}
    sharded_here = expert_shardings(model) if view.role == "etp" else set()

    def parameter(p: Tensor) -> Type:
        return placed_type(p, axis, specs[id(p)]) or R

    def typed_forward(tokens: Tensor, inputs: Context, labels: Tensor | None = None) -> Any:
        outputs = forward(tokens, inputs, labels)
        if labels is None:
            expect(outputs, S(0), "logits")
        else:
            expect(outputs[0], P, "the objective")
        return outputs

    patches = [
        *in_models(kernels),
        *exchange_patches(model, context_axis=True),
        *expert_patches(model, view),
        patch.object(Sharding, "local", local_over(sharded_here.__contains__)),
        patch.object(model, "forward", typed_forward),
    ]
    with checked(model, mesh, parameter, patches):
        yield
