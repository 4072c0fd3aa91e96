"""Types of experts on their own ranks: every layout passes along each axis, and no faulty one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from spmd_types import R, S, SpmdTypeError
from test_context_types import inputs
from test_types import SMALL, flip
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typed import stamp, type_of, typechecked, typechecked_context

from colonnade.kernels.sharding import UNSHARDED
from colonnade.models import reparam
from colonnade.models.blocks.experts import (
    ExpertBlock,
)
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context, attach
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule, declared
from colonnade.models.seams import identity
from colonnade.parallel import experts, parallelize
from colonnade.parallel.config import ParallelConfig
from colonnade.parallel.experts import TokenExchange
from colonnade.parallel.materialise import materialise
from colonnade.parallel.mesh import build_expert_mesh, build_mesh, mesh_of
from colonnade.parallel.passes import evaluating
from colonnade.parallel.seams import expert_blocks
from colonnade.parallel.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.*_functional_collectives:FutureWarning")

RANKS = 4


class Echo:
    """All-to-alls that return as much from every rank as this one sends to it, where the fake
    backend would leave numbers of rows to chance."""

    @staticmethod
    def all_to_all_single(t: Tensor, *sizes_and_group: Any) -> Tensor:
        return t.clone()

    wait_tensor = staticmethod(identity)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Rank 1 of four; the fake backend sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=RANKS)
    yield World(1, RANKS, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def values_that_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of singular vectors and of rows do not matter to types."""
    monkeypatch.setattr(reparam, "INITIAL_ITERATIONS", 1)
    monkeypatch.setattr(experts, "c10d", Echo)
    monkeypatch.setattr(parallelize, "apply_fsdp", lambda *a, **b: None)  # unknown to the checker


class Sharded(NamedTuple):
    """A model under a layout, with both views of its ranks."""

    model: Decoder
    mesh: DeviceMesh
    expert_mesh: DeviceMesh | None


def sharded(world: World, layout: dict[str, Any], **fields: Any) -> Sharded:
    with torch.device("meta"):
        model = Decoder(ModelConfig.model_validate({**SMALL, **fields}), loss_chunk=8)
    config = ParallelConfig(**layout)
    train = SimpleNamespace(
        precision="fp64", recompute="none", offload_inputs=False, compile=False, freeze=()
    )
    mesh, expert_mesh = build_mesh(config, world), build_expert_mesh(config, world)
    optimizer = SimpleNamespace(offload="none")
    recipe = SimpleNamespace(train=train, parallel=config, optimizer=optimizer)
    parallelize.parallelize(model, mesh, recipe, expert_mesh)
    materialise(model, torch.device("cpu"), 0)
    for module in model.modules():  # which of its vectors a rank has drawn is of no type
        if isinstance(module, ParameterModule):
            module.started |= module.transformed
            for vector in module.buffers(recurse=False):
                vector.fill_(1.0)
    return Sharded(model, mesh, expert_mesh)


def factors(world: World, mesh: DeviceMesh) -> list[DeviceMesh]:
    """The axis as it is, or the factors 2 · 2 of all ranks, each of which the expert view has in an
    axis of its own."""
    if mesh.size() < RANKS:
        return [mesh]
    pairs = mesh_of({"outer": 2, "inner": 2}, world)
    return [pairs["outer"], pairs["inner"]]


def check(world: World, sharded: Sharded) -> None:
    """Forward and backward of one step, typed along tp and along cp."""
    for axis, typed in ("tp", typechecked), ("cp", typechecked_context):
        if sharded.mesh[axis].size() > 1:
            for mesh in factors(world, sharded.mesh[axis]):
                run(sharded.model, typed(sharded.model, mesh, sharded.expert_mesh))


def run(model: Decoder, typed: AbstractContextManager[None]) -> None:
    given = inputs()
    model.zero_grad()
    with typed:
        for t in given:
            stamp(t, R)
        model.begin_step()
        model(given.tokens, Context(given.positions, given.documents), given.labels)[0].backward()
    assert all(p.grad is not None for p in model.parameters())


# By the axes of the expert view in which tp and cp lie. Where one lies in two, it is 4 = 2 · 2.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp etp": dict(tp=2, ep=2),  # over data-parallel ranks
    "tp edp": dict(tp=2, etp=1),
    "tp ep": dict(tp=2, etp=1, ep=2),
    "tp in ep": dict(tp=2, etp=1, ep=4),
    "tp edp etp": dict(tp=4, etp=2),
    "tp ep etp": dict(tp=4, etp=2, ep=2),
    "tp, cp in etp": dict(tp=2, cp=2, etp=4),
    "tp, cp in ep": dict(tp=2, cp=2, etp=1, ep=4),
    "tp ep, cp edp": dict(tp=2, cp=2, etp=1, ep=2),
    "tp etp, cp ep": dict(tp=2, cp=2, ep=2),
    "cp in ep": dict(cp=4, ep=4),
    "cp etp": dict(cp=2, etp=2),
    "cp etp, dp ep": dict(cp=2, etp=2, ep=2),
    "cp ep etp": dict(cp=4, etp=2, ep=2),
}
ROWS: dict[str, dict[str, Any]] = {
    "mixture": dict(
        pattern="*E-E", shared_ffn=8, shared_gate=True, capacity=1.0, router_noise=0.1,
        router_bias=True, router_score="sigmoid", balance_sequence=0.1,
    ),
    "σReparam, polynorm": dict(pattern="*E", sigma_reparam=True, activation="polynorm"),
    "THOR": dict(pattern="*T", thor_alpha=0.5),
    "WideNet": dict(pattern="*E", repeat=2, share=True),
    "multi-token prediction": dict(pattern="*E", mtp=1, mtp_pattern="E"),
}  # fmt: skip
FEW = ("tp etp", "tp edp", "tp in ep", "cp ep etp")
CASES = [(row, layout) for row in ROWS for layout in LAYOUTS if row in list(ROWS)[:2]]
CASES += [(row, layout) for row in list(ROWS)[2:] for layout in FEW]
WIRED = [
    (*case, residual, (residual == "ladder") == bool(number % 2))
    for number, case in enumerate(CASES)
    for residual in ("standard", "ladder")
    if case[0] == "mixture" or number % 4 // 2 == (residual == "ladder")
]


@pytest.mark.parametrize(("row", "layout", "residual", "sequence"), WIRED)
def test_layout(world: World, row: str, layout: str, residual: str, sequence: bool) -> None:
    degrees = LAYOUTS[layout] | {"sequence": sequence}
    check(world, sharded(world, degrees, **ROWS[row], residual=residual))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("layout", ["tp etp", "tp in ep", "tp edp", "tp, cp in etp"])
def test_logits(world: World, layout: str, sequence: bool) -> None:
    model, mesh, expert_mesh = sharded(
        world, LAYOUTS[layout] | {"sequence": sequence}, **ROWS["mixture"]
    )
    for axis, typed, kind in ("tp", typechecked, R), ("cp", typechecked_context, S(0)):
        if mesh[axis].size() > 1:
            given = inputs()
            with typed(model, mesh[axis], expert_mesh), evaluating(model):
                logits = model(stamp(given.tokens, R), Context(stamp(given.positions, R)))
                assert type_of(logits) == kind


def test_axes(world: World) -> None:
    """An axis that is in no single axis of the expert view is refused: its factors are checked."""
    model, mesh, expert_mesh = sharded(world, LAYOUTS["cp ep etp"], **ROWS["THOR"])
    with pytest.raises(SpmdTypeError, match="factors"):
        run(model, typechecked_context(model, mesh["cp"], expert_mesh))


SUMMED = dict(pattern="E", sigma_reparam=True, activation="polynorm", shared_ffn=8, norm="layer")


@pytest.mark.parametrize("layout", ["tp etp", "cp etp", "cp ep etp"])
def test_gradients(world: World, layout: str) -> None:
    """Exactly the gradients of experts whose spec is `partial` are partial sums over `etp`: any
    other set is an error."""
    given = sharded(world, LAYOUTS[layout], **SUMMED)
    check(world, given)
    partial = set()
    for name, _, spec in declared(given.model):
        if spec.ep is None:
            continue
        partial |= {name} if spec.partial else set()
        flip(spec, "etp")
        with pytest.raises(SpmdTypeError):
            check(world, given)
        flip(spec, "etp")
    assert {name.split(".")[-1] for name in partial} == {"up_gain", "down_gain"}
    check(world, given)


# Faults.


class NotSent(TokenExchange):
    def exchange(self, rows: Tensor, *sizes: list[int]) -> Tensor:
        return rows


class NotSentBack(TokenExchange):
    def exchange(self, rows: Tensor, *sizes: list[int]) -> Tensor:
        return super().exchange(rows, *sizes) if type_of(rows) == S(0) else rows


class SentTwice(TokenExchange):
    def exchange(self, rows: Tensor, *sizes: list[int]) -> Tensor:
        return super().exchange(super().exchange(rows, *sizes), *sizes)


class WithoutZeros(TokenExchange):
    def all_tokens(self, y: Tensor, S: int, B: int) -> Tensor:
        return y.view(-1, B, y.shape[1])


class Copies(TokenExchange):
    def all_tokens(self, y: Tensor, S: int, B: int) -> Tensor:
        return torch.cat([y] * self.shares).view(S, B, y.shape[1])


class AllTokens(TokenExchange):
    """Every rank sends all tokens, and has the outputs of all."""

    def local_tokens(self, t: Tensor) -> Tensor:
        return t.flatten(0, 1)

    def all_tokens(self, y: Tensor, S: int, B: int) -> Tensor:
        return y.view(S, B, -1)


# The fault, the layout, and what the checker reports.
EXCHANGE_FAULTS: dict[str, tuple[type[TokenExchange], str, str]] = {
    "not sent, ep": (NotSent, "cp in ep", r"expert_mlp: rows is S\(0\), not V"),
    "not sent, tp ep": (NotSent, "tp ep", r"expert_mlp: rows is S\(0\), not V"),
    "not sent, etp": (NotSent, "cp etp", r"expert_mlp: rows is S\(0\), not R"),
    "not sent back, ep": (NotSentBack, "cp in ep", r"combine: rows is V, not S\(0\)"),
    "not sent back, tp ep": (NotSentBack, "tp in ep", r"combine: rows is V, not S\(0\)"),
    "not sent back, etp": (NotSentBack, "cp etp", "operand 1 of"),
    "sent twice, ep": (SentTwice, "cp in ep", r"expert_mlp: rows is S\(0\), not V"),
    "sent twice, etp": (SentTwice, "cp etp", r"rows that are sent is R, not S\(0\) or P"),
    "no zeros": (WithoutZeros, "tp in ep", r"is S\(0\), not P"),
    "no zeros, no exchange": (WithoutZeros, "tp edp", r"is S\(0\), not P"),
    "copies": (Copies, "tp in ep", r"is S\(0\), not P"),
    "all tokens": (AllTokens, "tp in ep", r"dispatch: x is R, not S\(0\)"),
    "all tokens, no exchange": (AllTokens, "tp edp", r"dispatch: x is R, not S\(0\)"),
}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("fault", EXCHANGE_FAULTS)
def test_fault_in_exchange(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str, sequence: bool
) -> None:
    exchange, name, message = EXCHANGE_FAULTS[fault]
    layout = LAYOUTS[name] | {"sequence": sequence}
    monkeypatch.setattr(experts, "TokenExchange", exchange)
    with pytest.raises(SpmdTypeError, match=message):
        check(world, sharded(world, layout, pattern="E"))


def shared_twice(block: ExpertBlock) -> None:
    """The shared expert's output is all-reduced before it is added to partial sums."""
    output = block.second.shared_output
    block.second.shared_output = lambda *args: block.second.sharding.all_reduce(output(*args))


FAULTS: dict[str, tuple[Callable[[ExpertBlock], None], str, str]] = {
    "shared expert twice": (shared_twice, "tp etp", "all operands to be Partial"),
    "shared expert twice, ep": (shared_twice, "tp in ep", "all operands to be Partial"),
    "shared expert twice, edp": (shared_twice, "tp edp", "all operands to be Partial"),
    "polynorm without its sums": (
        lambda block: setattr(block.experts, "sharding", UNSHARDED),
        "cp etp",
        "without the sharding",
    ),
    "balance on every rank": (
        lambda block: setattr(block, "attach", attach),
        "tp in ep",
        "attached on all ranks",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(world: World, fault: str) -> None:
    inject, layout, message = FAULTS[fault]
    given = sharded(world, LAYOUTS[layout], pattern="E", shared_ffn=8, activation="polynorm")
    check(world, given)
    for block in expert_blocks(given.model):
        inject(block)
    with pytest.raises(SpmdTypeError, match=message):
        check(world, given)
