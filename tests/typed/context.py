"""Types along the context axis: what is computed token by token is a shard S(0) of the sequence.

What goes into a model is whole, R, and its parameters are: their gradients are partial sums, which
FSDP adds up. The objective and balancing terms are P, sums over a rank's tokens. Only what looks
across tokens is stated here: what `parallel.context` plugs takes shards and gives shards, and a
plain attention, scan or convolution takes none, so that one without its plug is a type error.

Under ring+ulysses the axis folds into two, inner and outer, which are checked in turn.
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
    experts,
    loss,
    routing,
    s4d,
    selective_scan,
    ssd,
)
from colonnade.kernels.segments import StatePassing
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel import context
from colonnade.parallel.context import plug
from colonnade.parallel.context.heads import HeadExchange
from typed.contracts import (
    CONTRACTS,
    Contract,
    Function,
    held,
    in_models,
    over_tokens,
    sharded,
)
from typed.model import checked
from typed.types import Type, along, expect, stamp, type_of

# Of a rank's tokens, which experts reorder; sums over them are parts of sums over all tokens.
TOKENS: dict[Function, Contract] = {
    experts.dispatch: Contract(
        sharded(0, "x", "keep_mask") | {"chosen": (S(0), R)}, (S(0), None)  # drawn: for all tokens
    ),
    experts.expert_mlp: Contract(sharded(0, "rows") | {"counts": None}, (S(0),)),
    experts.combine: Contract(sharded(0, "rows") | {"weight": (S(0), R)}, (S(0),)),
    routing.loads: Contract(sharded(0, "chosen", "keep_mask"), (P,)),
    routing.within_capacity: Contract({}, (R,)),  # first come, first served: among all
    routing.balance_loss: Contract(sharded(0, "probabilities"), (P,)),
    routing.router_z_loss: Contract(sharded(0, "logits"), (P,)),
    loss.linear_objective: Contract(sharded(0, "x", "labels"), (P, P)),
    loss.linear_consistency: Contract(sharded(0, "x1", "x2", "labels"), (P, P, P)),
}  # fmt: skip
# With `state_passing`, which completes states between segments.
PASSED: dict[Function, Contract] = {
    scan: Contract(over_tokens(symbol) | sharded(0, "documents"), (S(0), V))
    for symbol, scan in (
        ("M", ssd.ssd), ("m", selective_scan.selective_scan), ("S", s4d.s4d),
        ("G", delta.delta_rule),
    )
}  # fmt: skip
ATTENTION = Contract(over_tokens("*"), (S(0),))
CONTEXT_CONTRACTS = TOKENS | PASSED

# Seams by name, along the axis whose ranks share sequences, and along others.
SEAMS: dict[str, Contract] = {
    "local_segments": Contract({}, (S(0),)),
    "full_sequence": Contract(sharded(0, "t"), (R,)),
    "conv": Contract(sharded(0, "x"), (S(0),)),
}
SEAMS_ELSEWHERE: dict[str, Contract] = {
    "local_segments": Contract({}, (R,)),
    "full_sequence": Contract({}, (R,)),
    "conv": CONTRACTS[conv.causal_conv],
}
# Methods of `HeadExchange`, each with the types of its arguments and of its results.
EXCHANGES: dict[str, tuple[Type, Type]] = {
    "take": (S(0), S(2)),
    "give": (S(2), S(0)),
    "everything": (S(0), R),
    "mine": (R, S(0)),
}


def plugged(seam: Any) -> bool:
    """Whether `parallel.context` has put this at a seam: a function, a method or a `partial`."""
    made = getattr(seam, "func", seam)
    return getattr(made, "__module__", "").startswith(f"{context.__name__}.")


def exchanges(model: Decoder, shared: bool) -> Iterator[Any]:
    """Patches for what `parallel.context` has put into a model.

    `shared` says that the ranks along the axis are of those that share sequences.
    """
    for module in model.modules():
        for name, contract in (SEAMS if shared else SEAMS_ELSEWHERE).items():
            seam: Any = getattr(module, name, None)
            if plugged(seam):
                yield patch.object(module, name, held(seam, contract))
    for name, (before, after) in EXCHANGES.items():
        yield patch.object(HeadExchange, name, exchange(getattr(HeadExchange, name), before, after))
    yield patch.object(plug, "context_attention", across(plug.context_attention))


def exchange(method: Function, before: Type, after: Type) -> Function:
    """Tensors that are exchanged along the axis; an exchange along another leaves their types."""

    @functools.wraps(method)
    def call(self: HeadExchange, *tensors: Tensor) -> Any:
        found = [type_of(t) for t in tensors]
        if along(self.group):
            for t in tensors:
                expect(t, before, f"{method.__name__}: an argument")
            found = [after] * len(tensors)
        with spmd.no_typecheck():
            results = method(self, *tensors)
        several = [results] if isinstance(results, Tensor) else results
        for result, kind in zip(several, found, strict=True):
            stamp(result, kind)
        return results

    return call


def across(attend: Function) -> Function:
    """Attention across the ranks of a group: along the axis, or on heads apart."""
    tokens, heads = held(attend, ATTENTION), held(attend, CONTRACTS[attention.attention])

    @functools.wraps(attend)
    def call(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, **options: Any) -> Tensor:
        return (tokens if along(group) else heads)(q, k, v, group, **options)

    return call


def completed(scan: Function) -> Function:
    """A scan whose states are passed on between segments, or which has whole sequences."""
    whole, passed = held(scan, CONTRACTS[scan]), held(scan, PASSED[scan])

    @functools.wraps(scan)
    def call(*args: Any, state_passing: StatePassing | None = None, **options: Any) -> Any:
        return (whole if state_passing is None else passed)(
            *args, state_passing=state_passing, **options
        )

    return call


@contextmanager
def typechecked_context(model: Decoder, mesh: DeviceMesh) -> Iterator[None]:
    """Within, the model's forward is checked: raises SpmdTypeError where a type does not fit.

    Args:
        model: cut by `context_parallel`, before that by `tensor_parallel` or not; filled, in fp64
            or fp32; not sharded any further.
        mesh: of one dimension, more than one rank: those that share sequences, or where these
            exchange heads in a ring, one of the two that they fold into. Its backend may be `fake`.

    Tokens, positions and what else goes in are to be stamped R; the objective comes out P, and
    logits S(0).
    """
    contracts = CONTRACTS | TOKENS
    kernels = {kernel: held(kernel, contract) for kernel, contract in contracts.items()}
    kernels |= {scan: completed(scan) for scan in PASSED}
    forward = model.forward

    def summed(tokens: Tensor, where: Context, labels: Tensor | None = None) -> Any:
        found = forward(tokens, where, labels)
        if labels is None:
            expect(found, S(0), "logits")
        else:
            expect(found[0], P, "the objective")
        return found

    patches = [
        *in_models(kernels),
        *exchanges(model, shared=True),
        patch.object(model, "forward", summed),
    ]
    with checked(model, mesh, lambda p: R, patches):
        yield
