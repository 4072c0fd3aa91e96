"""Types along the context axis: every layout that shares sequences passes, and no faulty one."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from equal import assert_equal
from spmd_types import I, P, R, S, SpmdTypeError
from test_types import EVERYWHERE, ROWS, SMALL, drawn, joined, part_of, whole_vocabulary
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typed import (
    CONTEXT_CONTRACTS,
    stamp,
    type_of,
    typechecked,
    typechecked_context,
)

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
from colonnade.parallel.engine import evaluating
from colonnade.parallel.materialise import materialise
from colonnade.parallel.tensor import tensor_parallel

pytestmark = pytest.mark.filterwarnings("ignore:.*_functional_collectives:FutureWarning")

TOKENS, SAMPLES, VOCAB = 32, 2, SMALL["vocab"]
Meshes = dict[str, DeviceMesh]


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    """Rank 1 of four, of which two or all share sequences; nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)

    def pairs(*names: str) -> DeviceMesh:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)

    both, folded = pairs("cp", "tp"), pairs("outer", "inner")
    yield {
        "four": init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)),
        "outer": folded["outer"], "inner": folded["inner"],  # the four, folded
        "two": pairs("dp", "cp")["cp"],
        "cp": both["cp"], "tp": both["tp"],
    }  # fmt: skip
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular vectors are not looked at here."""
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
    # labels that all ranks of tp have in their columns
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


BESIDE = [(row, variant) for row in EVERYWHERE for variant in ("ring", "heads")]
BESIDE += [(row, "ring") for row in ROWS if row not in EVERYWHERE]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("row", "variant"), BESIDE)
def test_beside_tensor_parallel(meshes: Meshes, row: str, variant: str, sequence: bool) -> None:
    """Along both axes, of one model."""
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
PLAIN: dict[type[ParameterModule], tuple[str, Callable[..., Any]]] = {
    AttendOut: ("attend", local_attend),
    Convolving: ("conv", local_conv),
    mamba1.ScanOut: ("scan", mamba1.local_scan),
    mamba2.ScanOut: ("scan", mamba2.local_scan),
    s4d.ScanOut: ("scan", s4d.local_scan),
    delta.DeltaOut: ("scan", delta.local_scan),
}


def left(kind: type[ParameterModule]) -> Fault:
    """Parts of this kind without what is to be plugged."""

    def spoil(model: Decoder) -> None:
        for part in model.modules():
            if isinstance(part, kind):
                setattr(part, *PLAIN[kind])

    return spoil


def whole_tokens(model: Decoder) -> None:
    embed, whole = model.embedding.forward, inputs().tokens
    model.embedding.forward = lambda tokens: embed(stamp(whole, R))


def whole_labels(model: Decoder) -> None:
    head, whole = model.head.forward, inputs().labels
    model.head.forward = lambda x, labels, *rest: head(x, stamp(whole, R), *rest)


def only_one_part(model: Decoder) -> None:
    """Every rank takes the first."""
    model.local_segments = lambda whole: whole.chunk(4)[0]


def choices_of_a_part(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        assert isinstance(block, Mixture)
        block.full_sequence = lambda t: t


def places_of_all(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        assert isinstance(block, Mixture)
        block.local_segments = lambda t: t


def summed_to(kind: Any) -> Fault:
    def spoil(model: Decoder) -> None:
        forward = model.forward

        def total(*args: Any) -> Any:
            objective, report = forward(*args)
            return spmd.all_reduce(objective, dist.group.WORLD, src=P, dst=kind), report

        model.forward = total

    return spoil


def documents_of_a_part(model: Decoder) -> None:
    """What looks at whole sequences, by heads, is told of the rank's own documents."""
    for part in model.modules():
        if isinstance(part, mamba2.ScanOut):
            part.scan = part_told(part.scan)


def part_told(scan: mamba2.Scan) -> mamba2.Scan:
    def told(*args: Any) -> Tensor:
        *tensors, context = args
        return scan(*tensors, dataclasses.replace(context, whole_documents=context.documents))

    return told


# What is spoilt, of which model, in which variant; what the checker says.
FAULTS: dict[str, tuple[Fault, dict[str, Any], dict[str, Any], str]] = {
    "plain attention": (
        left(AttendOut), dict(pattern="*"), RING, r"attention: q is S\(0\), not S\(2\)"),
    "plain attention for heads": (left(AttendOut), dict(pattern="*"), HEADS, "attention: q is S"),
    "plain Mamba-2": (
        left(mamba2.ScanOut), dict(pattern="M"), RING, r"ssd: x is S\(0\), not S\(2\)"),
    "plain Mamba-1": (left(mamba1.ScanOut), dict(pattern="m"), RING, "selective_scan: x is S"),
    "plain S4D": (left(s4d.ScanOut), dict(pattern="S"), RING, "s4d: x is S"),
    "plain DeltaNet": (left(delta.DeltaOut), dict(pattern="D"), RING, "delta_rule: q is S"),
    "plain gated DeltaNet": (left(delta.DeltaOut), dict(pattern="G"), HEADS, "delta_rule: q is S"),
    "plain convolution": (
        left(Convolving), dict(pattern="M"), RING, r"causal_conv: x is S\(0\), not S\(2\)"),
    "plain convolution of keys": (
        left(Convolving), dict(pattern="*", attention_conv=3), RING, "causal_conv: x is S"),
    "whole tokens": (whole_tokens, dict(pattern="-"), RING, "objective: x is R"),
    "whole labels": (whole_labels, dict(pattern="-"), RING, "objective: labels is R"),
    "the same part": (only_one_part, dict(pattern="-"), RING, "objective: x is R"),
    "balance of a part": (
        choices_of_a_part, dict(pattern="E"), RING, r"balance_loss: chosen is S\(0\), not R"),
    "places of a part": (
        choices_of_a_part, dict(pattern="E", capacity=1.0), RING, "within_capacity: chosen is S"),
    "places of all": (
        places_of_all, dict(pattern="E", capacity=1.0), RING, "dispatch: keep_mask is R"),
    "loss summed": (summed_to(I), dict(pattern="-"), RING, "the objective is I, not P"),
    "loss summed, R": (summed_to(R), dict(pattern="-"), RING, "the objective is R, not P"),
    "documents of a part": (
        documents_of_a_part, dict(pattern="M"), HEADS, r"ssd: documents is S\(0\), not R"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(meshes: Meshes, fault: str) -> None:
    spoil, fields, variant, said = FAULTS[fault]
    model = model_of(meshes["four"], variant, fields)
    check(model, meshes["four"])
    spoil(model)
    with pytest.raises(SpmdTypeError, match=said):
        check(model, meshes["four"])


class NothingTaken(HeadExchange):
    def take(self, *tensors: Tensor) -> list[Tensor]:
        return list(tensors)


GIVE = HeadExchange.give


class NothingGiven(HeadExchange):
    def give(self, t: Tensor) -> Tensor:
        """What has the shape that is wanted, and still is of some heads."""
        kind = type_of(t)
        with spmd.no_typecheck():
            given = GIVE(self, t)
        return stamp(given, kind)


class AllHeads(HeadExchange):
    def mine(self, t: Tensor) -> Tensor:
        return t


class OwnRows(HeadExchange):
    def everything(self, *tensors: Tensor) -> list[Tensor]:
        return [*tensors]


EXCHANGE_FAULTS: dict[str, tuple[type[HeadExchange], str, str]] = {
    "queries not taken": (NothingTaken, "*", "attention: q"),
    "attention not given back": (NothingGiven, "*", "sharding"),
    "Mamba-2 not given back": (NothingGiven, "M", "sharding"),
    "DeltaNet not given back": (NothingGiven, "D", "sharding"),
    "sinks of all heads": (AllHeads, "*", r"attention: sinks is R, not S\(0\)"),
    "A of all heads": (AllHeads, "M", r"ssd: A is R, not S\(0\)"),
    "A of all channels": (AllHeads, "m", r"selective_scan: A is R, not S\(0\)"),
    "B of a part": (OwnRows, "m", r"selective_scan: B is S\(0\), not R"),
}


@pytest.mark.parametrize("fault", EXCHANGE_FAULTS)
def test_fault_in_exchange(meshes: Meshes, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    heads, pattern, said = EXCHANGE_FAULTS[fault]
    fields = {"pattern": pattern, "sinks": "*" in pattern}
    check(model_of(meshes["four"], HEADS, fields), meshes["four"])
    monkeypatch.setattr(plug, "HeadExchange", heads)
    model = model_of(meshes["four"], HEADS, fields)
    with pytest.raises(SpmdTypeError, match=said):
        check(model, meshes["four"])


def test_fault_beside_tensor_parallel(meshes: Meshes) -> None:
    """Each axis finds its own."""
    for spoil, wrong, right in ((left(AttendOut), "cp", "tp"), (whole_vocabulary, "tp", "cp")):
        model = model_of(meshes["cp"], {"tp": 2}, {"pattern": "*-"}, meshes["tp"])
        spoil(model)
        check(model, meshes[right])
        with pytest.raises(SpmdTypeError):
            check(model, meshes[wrong])


# What the checker is told is so: put together, the results of parts of a sequence are those of it.
# What ranks exchange is in `parity/`.

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
    means = kernel in (balance_loss, router_z_loss)  # of a part, of which `share` is taken

    def results(rank: int | None) -> tuple[Tensor, ...]:
        own = {
            name: t if rank is None else part_of(t, contract.arguments.get(name, R), rank)
            for name, t in given.items()
        }
        found = kernel(**own)
        several = found if isinstance(found, tuple) else (found,)
        return tuple(t / 2 if means and rank is not None else t.double() for t in several)

    both = zip(results(0), results(1), contract.results, strict=True)
    ours = {str(i): joined((a, b), wanted) for i, (a, b, wanted) in enumerate(both)}
    assert_equal(ours, {str(i): t for i, t in enumerate(results(None))})


def test_contracts_of_a_mixture() -> None:
    """Rows of a part's tokens are apart from others', and come back in their order."""

    def mixed(x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        rows, order = dispatch(x, chosen, 4)
        up, down = drawn(4, 5, 3), drawn(4, 3, 5)
        return combine(expert_mlp(rows, order.counts, None, up, down, "relu2"), order, weight)

    given = drawn(8, 3), CHOSEN[:, 0], drawn(8, 2)
    parts = [mixed(*(part_of(t, S(0), rank) for t in given)) for rank in range(2)]
    assert_equal({"y": joined((parts[0], parts[1]), S(0))}, {"y": mixed(*given)})
