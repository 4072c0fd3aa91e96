"""Types along the tp axis: every layout's forward passes spmd_types' checker, and no faulty one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from equal import assert_equal
from spmd_types import I, P, R, S, SpmdTypeError
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from typed import CONTRACTS, ExpertView, parameter_types, typechecked
from typed.rules import register
from typed.types import joined, shard_of, stamp, type_of

from colonnade.kernels import activation, experts, linear, norm, rope
from colonnade.kernels.sharding import UNSHARDED, Sharding
from colonnade.models import context, reparam
from colonnade.models.blocks.base import SubBlock
from colonnade.models.blocks.experts import ExpertBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import declared
from colonnade.models.parameters import ParameterSpec
from colonnade.parallel.materialise import materialise
from colonnade.parallel.passes import evaluating
from colonnade.parallel.tensor import stream_modules, tensor_parallel

pytestmark = pytest.mark.filterwarnings("ignore:.*_functional_collectives:FutureWarning")

TOKENS, SAMPLES, VOCAB = 8, 2, 32
SMALL = dict(
    vocab=VOCAB, hidden=16, heads=4, ffn=8, experts=4, top_k=2,
    mamba_heads=4, mamba_head_dim=4, mamba_state=4, mamba_groups=4, mamba_chunk=4,
    mamba1_inner=16, mamba1_rank=2, mamba1_state=4, mamba1_chunk=4,
    s4d_inner=16, s4d_state=4, s4d_chunk=4,
    delta_heads=4, delta_key_dim=4, delta_chunk=4,
)  # fmt: skip
LATENT = dict(attention="mla", kv_rank=6, rope_dim=2, q_rank=4)
ROWS: dict[str, dict[str, Any]] = {
    "gqa, one group, tied": dict(pattern="*-MmSDGE", kv_heads=2, mamba_groups=1, tied=True),
    "mla, polynorm, two groups": dict(
        pattern="*-MDGmE", **LATENT, activation="polynorm", mamba_groups=2, delta_key_heads=2,
        mamba1_norm="weighted", shared_ffn=8, shared_gate=True, router_z=0.1, router_noise=0.1,
    ),
    "THOR, plain norms": dict(
        pattern="*T", activation="polyrelu", thor_alpha=0.5, norm="layer", norm_weight=False,
    ),
    "experts": dict(
        pattern="*E-", shared_ffn=8, shared_gate=True, balance_sequence=0.1, router_z=0.1,
        capacity=1.0, router_bias=True, logit_z=0.1, logit_cap=5.0, expert_bias=True,
        router_offset=True, activation="swiglu_clamped",
    ),
    "attention's options": dict(
        pattern="*-", attention_gate="head", qk_norm="full", sinks=True, kv_heads=2,
        position_temperature=True, query_temperature=0.5, query_temperature_length=3,
        attention_conv=3, norm="layer", norm_bias=True,
        norm_position="both", attention_bias="all", mlp_bias=True,
    ),
    "more of them": dict(
        pattern="*-M", attention_gate="channel", qk_norm="head", window=3, norm="pre_rms",
        norm_position="after", embedding_multiplier=2.0, residual_multiplier=0.5, clip_low=-0.1,
        attention_cap=3.0, mlp_bias=True,
    ),
    "σReparam, multi-token prediction": dict(
        pattern="*mE", norm="crms", kv_heads=1, sigma_reparam=True, mtp=1, mtp_pattern="M-",
        norm_after="m",
    ),
}  # fmt: skip

Meshes = dict[int, DeviceMesh]
Fault = Callable[[Decoder], None]
Reduction = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    """Rank 1 of four, of which two or all are tensor-parallel; the fake backend sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    yield {2: two, 4: init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))}
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_power_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of singular vectors do not matter to types."""
    monkeypatch.setattr(reparam, "INITIAL_ITERATIONS", 1)


def model_of(mesh: DeviceMesh, sequence: bool, **fields: Any) -> Decoder:
    with torch.device("meta"):
        model = Decoder(ModelConfig.model_validate({**SMALL, **fields}), loss_chunk=8)
    model.to(torch.float64)
    tensor_parallel(model, mesh, sequence)
    materialise(model, torch.device("cpu"), 0)
    return model


def check(model: Decoder, mesh: DeviceMesh) -> None:
    """Forward and backward of one step, typed."""
    draw = torch.Generator().manual_seed(0)
    # labels in the columns of every rank's shard: a loss without a `Sharding` takes them, too
    tokens, labels = torch.randint(VOCAB // 4, (2, TOKENS, SAMPLES), generator=draw)
    positions = torch.arange(TOKENS)[:, None].repeat(1, SAMPLES)
    documents = (positions > TOKENS // 2).long()
    with typechecked(model, mesh):
        for t in (tokens, labels, positions, documents):
            stamp(t, R)
        model.begin_step()
        model(tokens, Context(positions, documents), labels)[0].backward()


EVERYWHERE = list(ROWS)[:3]  # every symbol; the other rows are options
LAYOUTS = [(tp, residual) for tp in (2, 4) for residual in ("standard", "ladder")]
CASES = [(row, *layout) for row in ROWS for layout in LAYOUTS if row in EVERYWHERE]
CASES += [(row, 4, "standard") for row in ROWS if row not in EVERYWHERE]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("row", "tp", "residual"), CASES)
def test_layout(meshes: Meshes, row: str, tp: int, sequence: bool, residual: str) -> None:
    model = model_of(meshes[tp], sequence, residual=residual, **ROWS[row])
    check(model, meshes[tp])
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("sequence", [False, True])
def test_logits(meshes: Meshes, sequence: bool) -> None:
    model = model_of(meshes[2], sequence, pattern="*E")
    tokens, positions = torch.zeros(2, TOKENS, SAMPLES, dtype=torch.long)
    with typechecked(model, meshes[2]), evaluating(model):
        logits = model(stamp(tokens, R), Context(stamp(positions, R)))
        assert type_of(logits) == R
        assert logits.shape == (TOKENS, SAMPLES, VOCAB)


# Which gradients are partial sums, and so all-reduced at the end of a step.

SUMMED = {
    "latent": dict(pattern="*-", **LATENT, activation="polynorm", norm="layer", norm_bias=True),
    "shared": dict(
        pattern="*M-",
        kv_heads=2,
        mamba_groups=1,
        qk_norm="head",
        attention_bias="all",
        mlp_bias=True,
    ),
    "routed": dict(pattern="E", activation="polyrelu", shared_ffn=8, sigma_reparam=True),
    "multi-token": dict(pattern="G", mtp=1, mtp_pattern="m", norm_position="both"),
}


def flip(spec: ParameterSpec, axis: Literal["tp", "etp"] = "tp") -> None:
    """Declares a gradient to be a partial sum if it is not declared so, and else the opposite."""
    spec.partial = None if spec.partial else axis


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("row", SUMMED)
def test_gradients(meshes: Meshes, row: str, sequence: bool) -> None:
    """Exactly the gradients whose spec is `partial` are partial sums: any other set is an error."""
    mesh = meshes[4]
    model = model_of(mesh, sequence, **SUMMED[row])
    check(model, mesh)
    types = parameter_types(model, mesh, ExpertView(None))
    for name, _, spec in declared(model):
        assert (types[name].backward_type() is P) == (spec.partial is not None)
        flip(spec)
        with pytest.raises(SpmdTypeError):
            check(model, mesh)
        flip(spec)
    assert (I in types.values()) != sequence
    check(model, mesh)


# Faults. Under sequence parallelism a seam without its collective still returns the right shape.


def first_shard(ranks: int) -> Reduction:
    return lambda h: h.chunk(ranks)[0]


def repeated(ranks: int) -> Reduction:
    return lambda x: torch.cat([x] * ranks) if ranks > 1 else x


def ranks_of(model: Decoder) -> int:
    return model.head.sharding.size if model.wiring.gathers else 1


def without_leave(model: Decoder) -> None:
    for wiring in model.wirings():
        wiring.leave = first_shard(ranks_of(model))


def leave_twice(model: Decoder) -> None:
    leave = model.wiring.leave
    model.wiring.leave = lambda h: leave(leave(h))


def without_enter(model: Decoder) -> None:
    for wiring in model.wirings():
        wiring.enter = repeated(ranks_of(model))


def without_last_enter(model: Decoder) -> None:
    model.head.enter = repeated(ranks_of(model))


def without_first_leave(model: Decoder) -> None:
    model.embedding.leave = first_shard(ranks_of(model))


def replace_all_reduce(model: Decoder, reduce: Reduction, mean: bool = True) -> None:
    """Replaces the all-reduce within sub-blocks, and without `mean` removes that of means."""
    for block in model.wiring.blocks.values():
        assert isinstance(block, SubBlock)
        for half in (block.first, block.second):
            old = half.sharding
            half.sharding = Sharding(old.size, old.rank, reduce, old.all_reduce_max)
            if not mean:
                object.__setattr__(half.sharding, "mean_over_ranks", lambda groups=1: None)


def without_all_reduce(model: Decoder) -> None:
    replace_all_reduce(model, lambda t: t)


def all_reduce_twice(model: Decoder) -> None:
    all_reduce = model.wiring.block(0).second.sharding.all_reduce
    replace_all_reduce(model, lambda t: all_reduce(all_reduce(t)))


def without_means(model: Decoder) -> None:
    replace_all_reduce(model, model.head.sharding.all_reduce, mean=False)


def attach_on_every_rank(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        block.attach = context.attach


def bias_on_every_rank(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        block.second.sharding = replace(block.second.sharding, once=lambda t: t)


def unsharded(model: Decoder) -> None:
    for block in model.wiring.blocks.values():
        (block.experts if isinstance(block, ExpertBlock) else block.second).sharding = UNSHARDED


def unsharded_vocabulary(model: Decoder) -> None:
    model.head.sharding = UNSHARDED


def one_norm_omitted(model: Decoder) -> None:
    """One norm of many, as in a real mistake."""
    flip(list(stream_modules(model))[1].specs["weight"])


FAULTS: dict[str, tuple[Fault, dict[str, Any]]] = {
    "no leave": (without_leave, dict(pattern="*-")),
    "no leave, ladder": (without_leave, dict(pattern="*-M", residual="ladder")),
    "leave twice": (leave_twice, dict(pattern="*-")),
    "no enter": (without_enter, dict(pattern="-*")),
    "no enter, ladder": (without_enter, dict(pattern="-*E", residual="ladder")),
    "head does not enter": (without_last_enter, dict(pattern="*")),
    "embedding does not leave": (without_first_leave, dict(pattern="*")),
    "Mamba-1's selection": (without_all_reduce, dict(pattern="m")),
    "Mamba-1's selection twice": (all_reduce_twice, dict(pattern="m")),
    "Mamba-2's groups": (without_means, dict(pattern="M", mamba_groups=2)),
    "norm of all queries": (without_means, dict(pattern="*", qk_norm="full")),
    "polynorm": (unsharded, dict(pattern="-", activation="polynorm")),
    "polynorm of experts": (unsharded, dict(pattern="E", activation="polynorm")),
    "balance on every rank": (attach_on_every_rank, dict(pattern="E")),
    "output's bias on every rank": (bias_on_every_rank, dict(pattern="*", attention_bias="all")),
    "down's bias on every rank": (bias_on_every_rank, dict(pattern="-", mlp_bias=True)),
    "shard of a vocabulary": (unsharded_vocabulary, dict(pattern="-")),
    "a norm's gradient": (one_norm_omitted, dict(pattern="*-")),
}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(meshes: Meshes, fault: str, sequence: bool) -> None:
    inject, fields = FAULTS[fault]
    model = model_of(meshes[4], sequence, **fields)
    check(model, meshes[4])
    inject(model)
    with pytest.raises(SpmdTypeError):
        check(model, meshes[4])


@pytest.mark.parametrize("times", [0, 2])
def test_fault_in_spectral_norm(
    meshes: Meshes, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Without the all-reduce, and with two of them."""
    model, total = model_of(meshes[2], True, pattern="-", sigma_reparam=True), reparam.all_reduce
    check(model, meshes[2])

    def faulty(t: Tensor, *shardings: Any) -> Tensor:
        for _ in range(times):
            t = total(t, *shardings)
        return t

    monkeypatch.setattr(reparam, "all_reduce", faulty)
    with pytest.raises(SpmdTypeError):
        check(model, meshes[2])


# What is stated to the checker is true: the ranks' results, joined, are those of one device.


def drawn(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


X, DT = drawn(8, 2, 4, 3), drawn(8, 2, 4).abs()
ARGUMENTS: dict[str, dict[str, Any]] = {
    "attention": dict(q=X, k=drawn(8, 2, 2, 3), v=drawn(8, 2, 2, 5), sinks=drawn(4)),
    "causal_conv": dict(x=DT, weight=drawn(4, 3), bias=drawn(4), activation=True),
    "ssd": dict(
        x=X, dt=DT, A=-drawn(4).abs(), B=drawn(8, 2, 2, 5), C=drawn(8, 2, 2, 5), D=drawn(4), chunk=4
    ),
    "selective_scan": dict(
        x=DT, dt=DT, A=-drawn(4, 3).abs(), B=drawn(8, 2, 3), C=drawn(8, 2, 3), D=drawn(4), chunk=4
    ),
    "s4d": dict(
        x=DT, dt=drawn(4).exp(), A_real=-drawn(4, 3).exp(), A_imag=drawn(4, 3),
        C_real=drawn(4, 3), C_imag=drawn(4, 3), D=drawn(4), chunk=4,
    ),
    "delta_rule": dict(
        q=drawn(8, 2, 2, 3), k=drawn(8, 2, 2, 3), v=X, beta=DT.sigmoid(), decay=-DT, chunk=4
    ),
    "expert_mlp": dict(
        rows=drawn(9, 3), counts=torch.tensor([4, 0, 3]), gate=drawn(3, 4, 3), up=drawn(3, 4, 3),
        down=drawn(3, 3, 4), gate_bias=drawn(3, 4), up_bias=drawn(3, 4), down_bias=drawn(3, 3),
        activation="swiglu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kernel", CONTRACTS, ids=lambda kernel: kernel.__name__)
def test_contract(kernel: Callable[..., Any]) -> None:
    given, contract = ARGUMENTS[kernel.__name__], CONTRACTS[kernel]

    def results(rank: int | None) -> tuple[Tensor, ...]:
        local = {
            name: t if rank is None else shard_of(t, contract.arguments.get(name, R), rank)
            for name, t in given.items()
        }
        outputs = kernel(**local)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    assert contract.arguments.keys() <= given.keys()
    both = zip(results(0), results(1), contract.results, strict=True)
    ours = {str(i): joined((a, b), wanted) for i, (a, b, wanted) in enumerate(both)}
    assert_equal(ours, {str(i): t for i, t in enumerate(results(None))})


def plain(*values: Any) -> list[tuple[Any, Any]]:
    """Arguments that are no tensors."""
    return [(value, None) for value in values]


ORDER = experts.DispatchOrder(
    torch.tensor([4, 4]), torch.arange(8), torch.arange(8).view(4, 2), None
)
RULE_CASES: dict[str, tuple[Any, list[tuple[Any, Any]], Any]] = {
    "columns": (linear._Linear, [(drawn(3, 4, 6), R), (drawn(8, 6), S(0)), *plain(None)], S(2)),
    "rows": (linear._Linear, [(drawn(3, 4, 6), S(2)), (drawn(8, 6), S(1)), *plain(None)], P),
    "of a sum": (linear._Linear, [(drawn(3, 4, 6), P), (drawn(8, 6), R), *plain(None)], P),
    "norm of a stream": (norm._RMSNorm, [
        (drawn(4, 3, 6), S(0)), (drawn(6), R), (drawn(6), R), *plain(0.1, 1.0, 6, False, None),
    ], S(0)),
    "norm of groups": (norm._RMSNorm, [
        (drawn(4, 4, 6), S(1)), (drawn(4, 6), S(0)), *plain(None, 0.1, 0.0, 6, False, None),
    ], S(1)),
    "layer norm": (norm._LayerNorm, [
        (drawn(4, 3, 6), S(0)), (drawn(6), R), (drawn(6), R), *plain(0.1),
    ], S(0)),
    "rotation": (rope._Rotate, [
        (drawn(3, 2, 4, 6), S(2)), (drawn(3, 2, 1, 2), R), (drawn(3, 2, 1, 2), R),
    ], S(2)),
    "gate": (activation._Activate, [
        (drawn(3, 6), S(1)), (drawn(3, 6) + 1, S(1)), *plain("swiglu", None, UNSHARDED),
    ], S(1)),
    "polynorm": (activation._Activate, [
        (drawn(4, 6), S(0)), *plain(None, "polynorm"), (drawn(4), R), *plain(UNSHARDED),
    ], S(0)),
    "gate and product": (activation._ActivatedLinear, [
        (drawn(3, 6), S(1)), (drawn(3, 6) + 1, S(1)), (drawn(5, 6), S(1)),
        *plain("swiglu", None, UNSHARDED, None),
    ], P),
    "combine": (experts._Combine, [(drawn(8, 6), P), (drawn(4, 2), R), *plain(ORDER)], P),
    "attach": (context._Attach, [(drawn(4, 2), R), (drawn(), P)], R),
}  # fmt: skip


@pytest.mark.parametrize("case", RULE_CASES)
def test_rule(meshes: Meshes, case: str) -> None:
    register()
    function, arguments, wanted = RULE_CASES[case]
    results = []
    for rank in range(2):
        local = [shard_of(t, kind, rank) for t, kind in arguments]
        with spmd.set_current_mesh(meshes[2]), typecheck("strict", local=False):
            for t, (_, kind) in zip(local, arguments, strict=True):
                if isinstance(t, Tensor):
                    stamp(t, kind)
            results.append(function.apply(*local))
            assert type_of(results[-1]) == wanted
    expected = function.apply(*(t for t, _ in arguments))
    assert_equal({"y": joined((results[0], results[1]), wanted)}, {"y": expected})
