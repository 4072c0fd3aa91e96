"""Types along the context axis: every layout with context parallelism passes, and no faulty one."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from equal import assert_equal
from spmd_types import I, P, R, S, SpmdTypeError
from test_types import EVERYWHERE, ROWS, SMALL, drawn, unsharded_vocabulary
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typed import CONTEXT_CONTRACTS, typechecked, typechecked_context
from typed.types import joined, shard_of, stamp, type_of

from colonnade.kernels.experts import combine, dispatch, expert_mlp
from colonnade.kernels.loss import linear_consistency, linear_objective
from colonnade.kernels.routing import balance_loss, loads, router_z_loss
from colonnade.models import reparam
from colonnade.models.blocks import delta, mamba1, mamba2, s4d
from colonnade.models.blocks.attention import AttendOut, local_attend
from colonnade.models.blocks.base import Convolving, local_conv
from colonnade.models.blocks.mixture import Mixture
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.context import plug
from colonnade.parallel.context.heads import HeadExchange
from colonnade.parallel.context.plug import context_parallel
from colonnade.parallel.materialise import materialise
from colonnade.parallel.passes import evaluating
from colonnade.parallel.tensor import tensor_parallel

pytestmark = pytest.mark.filterwarnings("ignore:.*_functional_collectives:FutureWarning")

TOKENS, SAMPLES, VOCAB = 32, 2, SMALL["vocab"]
Meshes = dict[str, DeviceMesh]


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    """Rank 1 of four, of which two or all are the context group; the fake backend sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)

    def pairs(*names: str) -> DeviceMesh:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)

    both, split = pairs("cp", "tp"), pairs("outer", "inner")
    yield {
        "four": init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)),
        "outer": split["outer"], "inner": split["inner"],  # the four, split
        "two": pairs("dp", "cp")["cp"],
        "cp": both["cp"], "tp": both["tp"],
    }  # fmt: skip
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_power_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of singular vectors do not matter to types."""
    monkeypatch.setattr(reparam, "INITIAL_ITERATIONS", 1)


class Inputs(NamedTuple):
    """`[S, B]` each."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor


def inputs() -> Inputs:
    """Two documents a row, which do not end where segments do."""
    draw = torch.Generator().manual_seed(0)
    # labels in the columns of every tp rank's shard
    tokens, labels = torch.randint(VOCAB // 4, (2, TOKENS, SAMPLES), generator=draw)
    positions = torch.arange(TOKENS)[:, None].repeat(1, SAMPLES)
    return Inputs(tokens, labels, positions, (positions > TOKENS // 2 + 1).long())


def model_of(
    mesh: DeviceMesh, variant: dict[str, Any], fields: dict[str, Any], tp: DeviceMesh | None = None
) -> Decoder:
    with torch.device("meta"):
        model = Decoder(ModelConfig.model_validate({**SMALL, **fields}), loss_chunk=8)
    model.to(torch.float64)
    config = ParallelConfig(cp=mesh.size(), **variant)
    if tp is not None:
        tensor_parallel(model, tp, config.sequence)
    context_parallel(model, mesh, config)
    materialise(model, torch.device("cpu"), 0)
    return model


def check(model: Decoder, mesh: DeviceMesh) -> None:
    """Forward and backward of one step, typed along the mesh."""
    typed = typechecked if mesh.mesh_dim_names == ("tp",) else typechecked_context
    given = inputs()
    model.zero_grad()
    with typed(model, mesh):
        for t in given:
            stamp(t, R)
        model.begin_step()
        context = Context(given.positions, given.documents)
        model(given.tokens, context, given.labels)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


RING: dict[str, Any] = {}
HEADS = {"context": "ulysses", "recurrence": "heads"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ring": RING,
    "ring, one segment each": {"zigzag": False},
    "heads": HEADS,
    "heads, one segment each": {**HEADS, "zigzag": False},
    "all keys": {"context": "allgather"},
    "heads in a ring": {"context": "ring+ulysses", "ulysses": 2},
}
LADDER = ("ring", "heads, one segment each", "heads in a ring")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row", ROWS)
def test_four(meshes: Meshes, row: str, variant: str) -> None:
    residual = "ladder" if variant in LADDER else "standard"
    model = model_of(meshes["four"], VARIANTS[variant], {**ROWS[row], "residual": residual})
    for axis in ("outer", "inner") if variant == "heads in a ring" else ("four",):
        check(model, meshes[axis])


@pytest.mark.parametrize("variant", ["ring", "heads", "all keys"])
@pytest.mark.parametrize("row", EVERYWHERE)
def test_two(meshes: Meshes, row: str, variant: str) -> None:
    model = model_of(meshes["two"], VARIANTS[variant], ROWS[row])
    check(model, meshes["two"])


WITH_TP = [(row, variant) for row in EVERYWHERE for variant in ("ring", "heads")]
WITH_TP += [(row, "ring") for row in ROWS if row not in EVERYWHERE]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("row", "variant"), WITH_TP)
def test_with_tensor_parallel(meshes: Meshes, row: str, variant: str, sequence: bool) -> None:
    """One model is checked along both axes."""
    residual = "ladder" if sequence else "standard"
    layout = {**VARIANTS[variant], "tp": 2, "sequence": sequence}
    model = model_of(meshes["cp"], layout, {**ROWS[row], "residual": residual}, meshes["tp"])
    check(model, meshes["cp"])
    check(model, meshes["tp"])


@pytest.mark.parametrize("variant", ["ring", "heads"])
def test_logits(meshes: Meshes, variant: str) -> None:
    model = model_of(meshes["four"], VARIANTS[variant], {"pattern": "*M"})
    given = inputs()
    with typechecked_context(model, meshes["four"]), evaluating(model):
        logits = model(stamp(given.tokens, R), Context(stamp(given.positions, R)))
        assert type_of(logits) == S(0)
        assert logits.shape == (TOKENS // 4, SAMPLES, VOCAB)


# Faults.


Fault = Callable[[Decoder], None]
LOCAL: dict[type[ParameterModule], tuple[str, Callable[..., Any]]] = {
    AttendOut: ("attend", local_attend),
    Convolving: ("conv", local_conv),
    mamba1.ScanOut: ("scan", mamba1.local_scan),
    mamba2.ScanOut: ("scan", mamba2.local_scan),
    s4d.ScanOut: ("scan", s4d.local_scan),
    delta.DeltaOut: ("scan", delta.local_scan),
}


def local(kind: type[ParameterModule]) -> Fault:
    """The seam of modules of this kind has the local function again."""

    def inject(model: Decoder) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                setattr(module, *LOCAL[kind])

    return inject


def full_tokens(model: Decoder) -> None:
    embed, full = model.embedding.forward, inputs().tokens
    model.embedding.forward = lambda tokens, *rest: embed(stamp(full, R), *rest)


def full_labels(model: Decoder) -> None:
    head, full = model.head.forward, inputs().labels
    model.head.forward = lambda x, labels, *rest: head(x, stamp(full, R), *rest)


def same_shard(model: Decoder) -> None:
    """Every rank takes the first shard."""
    model.local_segments = lambda full: full.chunk(4)[0]


def local_choices(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        assert isinstance(block, Mixture)
        block.full_sequence = lambda t: t


def full_keep_mask(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        assert isinstance(block, Mixture)
        block.local_segments = lambda t: t


def reduced_to(kind: Any) -> Fault:
    def inject(model: Decoder) -> None:
        forward = model.forward

        def total(*args: Any) -> Any:
            objective, report = forward(*args)
            return spmd.all_reduce(objective, dist.group.WORLD, src=P, dst=kind), report

        model.forward = total

    return inject


def local_documents(model: Decoder) -> None:
    """A scan over full sequences, by heads, gets the documents of the rank's shard."""
    for module in model.modules():
        if isinstance(module, mamba2.ScanOut):
            module.scan = with_local_documents(module.scan)


def with_local_documents(scan: mamba2.Scan) -> mamba2.Scan:
    def call(*args: Any) -> Tensor:
        *tensors, context = args
        return scan(*tensors, dataclasses.replace(context, whole_documents=context.documents))

    return call


# The fault, the model, the variant, and what the checker reports.
FAULTS: dict[str, tuple[Fault, dict[str, Any], dict[str, Any], str]] = {
    "local attention": (
        local(AttendOut), dict(pattern="*"), RING, r"attention: q is S\(0\), not S\(2\)"),
    "local attention for heads": (local(AttendOut), dict(pattern="*"), HEADS, "attention: q is S"),
    "local Mamba-2": (
        local(mamba2.ScanOut), dict(pattern="M"), RING, r"ssd: x is S\(0\), not S\(2\)"),
    "local Mamba-1": (local(mamba1.ScanOut), dict(pattern="m"), RING, "selective_scan: x is S"),
    "local S4D": (local(s4d.ScanOut), dict(pattern="S"), RING, "s4d: x is S"),
    "local DeltaNet": (local(delta.DeltaOut), dict(pattern="D"), RING, "delta_rule: q is S"),
    "local gated DeltaNet": (local(delta.DeltaOut), dict(pattern="G"), HEADS, "delta_rule: q is S"),
    "local convolution": (
        local(Convolving), dict(pattern="M"), RING, r"causal_conv: x is S\(0\), not S\(2\)"),
    "local convolution of keys": (
        local(Convolving), dict(pattern="*", attention_conv=3), RING, "causal_conv: x is S"),
    "full tokens": (full_tokens, dict(pattern="-"), RING, "objective: x is R"),
    "full labels": (full_labels, dict(pattern="-"), RING, "objective: labels is R"),
    "the same shard": (same_shard, dict(pattern="-"), RING, "objective: x is R"),
    "balance of a shard": (
        local_choices, dict(pattern="E"), RING, r"balance_loss: chosen is S\(0\), not R"),
    "capacity of a shard": (
        local_choices, dict(pattern="E", capacity=1.0), RING, "within_capacity: chosen is S"),
    "keep mask of all tokens": (
        full_keep_mask, dict(pattern="E", capacity=1.0), RING, "dispatch: keep_mask is R"),
    "loss all-reduced": (reduced_to(I), dict(pattern="-"), RING, "the objective is I, not P"),
    "loss all-reduced, R": (reduced_to(R), dict(pattern="-"), RING, "the objective is R, not P"),
    "documents of a shard": (
        local_documents, dict(pattern="M"), HEADS, r"ssd: documents is S\(0\), not R"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(meshes: Meshes, fault: str) -> None:
    inject, fields, variant, message = FAULTS[fault]
    model = model_of(meshes["four"], variant, fields)
    check(model, meshes["four"])
    inject(model)
    with pytest.raises(SpmdTypeError, match=message):
        check(model, meshes["four"])


class QueriesNotExchanged(HeadExchange):
    def sequence_to_heads(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)


HEADS_TO_SEQUENCE = HeadExchange.heads_to_sequence


class OutputNotExchanged(HeadExchange):
    def heads_to_sequence(self, t: Tensor) -> Tensor:
        """Returns the right shape with the type of a shard of heads."""
        kind = type_of(t)
        with spmd.no_typecheck():
            output = HEADS_TO_SEQUENCE(self, t)
        return stamp(output, kind)


class AllHeads(HeadExchange):
    def local_heads(self, t: Tensor) -> Tensor:
        return t


class LocalRows(HeadExchange):
    def all_gather(self, *tensors: Tensor) -> list[Tensor]:
        return [*tensors]


EXCHANGE_FAULTS: dict[str, tuple[type[HeadExchange], str, str]] = {
    "queries not exchanged": (QueriesNotExchanged, "*", "attention: q"),
    "attention not exchanged back": (OutputNotExchanged, "*", "sharding"),
    "Mamba-2 not exchanged back": (OutputNotExchanged, "M", "sharding"),
    "DeltaNet not exchanged back": (OutputNotExchanged, "D", "sharding"),
    "sinks of all heads": (AllHeads, "*", r"attention: sinks is R, not S\(0\)"),
    "A of all heads": (AllHeads, "M", r"ssd: A is R, not S\(0\)"),
    "A of all channels": (AllHeads, "m", r"selective_scan: A is R, not S\(0\)"),
    "B of a shard": (LocalRows, "m", r"selective_scan: B is S\(0\), not R"),
}


@pytest.mark.parametrize("fault", EXCHANGE_FAULTS)
def test_fault_in_exchange(meshes: Meshes, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    exchange, pattern, message = EXCHANGE_FAULTS[fault]
    fields = {"pattern": pattern, "sinks": "*" in pattern}
    check(model_of(meshes["four"], HEADS, fields), meshes["four"])
    monkeypatch.setattr(plug, "HeadExchange", exchange)
    model = model_of(meshes["four"], HEADS, fields)
    with pytest.raises(SpmdTypeError, match=message):
        check(model, meshes["four"])


def test_fault_with_tensor_parallel(meshes: Meshes) -> None:
    """The check along each axis finds the faults of this axis only."""
    for inject, wrong, right in (
        (local(AttendOut), "cp", "tp"), (unsharded_vocabulary, "tp", "cp")
    ):  # fmt: skip
        model = model_of(meshes["cp"], {"tp": 2}, {"pattern": "*-"}, meshes["tp"])
        inject(model)
        check(model, meshes[right])
        with pytest.raises(SpmdTypeError):
            check(model, meshes[wrong])


# What is stated to the checker is true: the results of shards of a sequence, joined, are those of
# the full sequence. `parity/` tests the collectives.

LOGITS = drawn(8, 2, 4)
CHOSEN = LOGITS.topk(2, -1).indices
ROW_LABELS = torch.arange(8) % 5
ARGUMENTS: dict[Callable[..., Any], dict[str, Any]] = {
    linear_objective: dict(x=drawn(8, 3), weight=drawn(5, 3), labels=ROW_LABELS, chunk=3, z=0.1),
    linear_consistency: dict(
        x1=drawn(8, 3), x2=-drawn(8, 3), weight=drawn(5, 3), labels=ROW_LABELS, chunk=3, alpha=1.0
    ),
    balance_loss: dict(probabilities=LOGITS.softmax(-1), chosen=CHOSEN, samples=2),
    router_z_loss: dict(logits=LOGITS, samples=1),
    loads: dict(chosen=CHOSEN, keep_mask=None, experts=4),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ARGUMENTS, ids=lambda kernel: kernel.__name__)
def test_contract(kernel: Callable[..., Any]) -> None:
    given, contract = ARGUMENTS[kernel], CONTEXT_CONTRACTS[kernel]
    means = kernel in (balance_loss, router_z_loss)  # times `share` in a model

    def results(rank: int | None) -> tuple[Tensor, ...]:
        arguments = {
            name: t if rank is None else shard_of(t, contract.arguments.get(name, R), rank)
            for name, t in given.items()
        }
        outputs = kernel(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(t / 2 if means and rank is not None else t.double() for t in outputs)

    both = zip(results(0), results(1), contract.results, strict=True)
    ours = {str(i): joined((a, b), wanted) for i, (a, b, wanted) in enumerate(both)}
    assert_equal(ours, {str(i): t for i, t in enumerate(results(None))})


def test_contracts_of_a_mixture() -> None:
    """Each shard's tokens are dispatched by themselves, and come back in their order."""

    def mixed(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        rows, order = dispatch(x, chosen, 4)
        up, down = drawn(4, 5, 3), drawn(4, 3, 5)
        return combine(expert_mlp(rows, order.counts, None, up, down, "relu2"), order, weight)

    given = drawn(8, 3), CHOSEN[:, 0], drawn(8, 2)
    shards = [mixed(*(shard_of(t, S(0), rank) for t in given)) for rank in range(2)]
    assert_equal({"y": joined((shards[0], shards[1]), S(0))}, {"y": mixed(*given)})
