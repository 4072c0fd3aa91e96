"""Operators on a width that is sharded over ranks, simulated by threads, against references."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from equal import assert_equal
from test_experts import uninitialised_grouped_mm
from torch import Tensor

from colonnade.kernels import experts as experts_module
from colonnade.kernels.activation import (
    NAMES,
    activate,
    activate_reference,
    activated_linear,
    gated,
    polynomial,
)
from colonnade.kernels.experts import experts, experts_reference
from colonnade.kernels.loss import (
    linear_consistency,
    linear_consistency_reference,
    linear_objective,
    linear_objective_reference,
)
from colonnade.kernels.norm import rms_norm, rms_norm_reference
from colonnade.kernels.sharding import UNSHARDED, Reduction, Sharding

Tensors = dict[str, Tensor]
Dims = dict[str, int | str]  # a sharded dimension, a "sum" over ranks, or the "same" on all
OPTIONS = [{}, {"cap": 1.5}, {"z": 0.3}, {"cap": 1.5, "z": 0.3}]
V, D = 24, 5


class Threads:
    """Ranks as threads, which meet at a barrier to reduce their tensors."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.tensors: list[Tensor] = [torch.empty(0)] * size
        self.collectives: list[str] = []  # those that rank 0 called

    def sharding(self, rank: int) -> Sharding:
        all_reduce = self.reduction(rank, "sum", lambda t: t.sum(0))
        all_reduce_max = self.reduction(rank, "max", lambda t: t.amax(0))
        return Sharding(self.size, rank, all_reduce, all_reduce_max)

    def reduction(self, rank: int, name: str, function: Reduction) -> Reduction:
        def reduce(local: Tensor) -> Tensor:
            assert not local.requires_grad, "inside an autograd.Function no graph is recorded"
            if rank == 0:
                self.collectives.append(name)
            self.tensors[rank] = local
            self.barrier.wait()
            assert all(t.shape == local.shape for t in self.tensors)
            reduced = function(torch.stack(self.tensors))
            self.barrier.wait()  # before any rank overwrites its tensor
            return reduced

        return reduce

    def run(self, function: Callable[[Sharding], Tensors]) -> list[Tensors]:
        """The function's results on each rank."""

        def guarded(rank: int) -> Tensors:
            try:
                return function(self.sharding(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
        for f in futures:  # the cause first, then the ranks that waited at the barrier
            if not isinstance(f.exception(), threading.BrokenBarrierError):
                f.result()
        return [f.result() for f in futures]


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def named(*outputs: Tensor) -> Tensors:
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)}


def results(function: Callable[..., Any], inputs: Tensors, grad: Tensor) -> Tensors:
    """Outputs, and the gradients of all inputs for `grad`, the gradient of the first output."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs[0], list(leaves.values()), grad.to(outputs[0].dtype))
    return named(*outputs) | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def joined(by_rank: Sequence[Tensors], dims: Dims) -> Tensors:
    """The full tensors from those of all ranks."""
    full = {}
    for k in by_rank[0]:
        each, how = [tensors[k] for tensors in by_rank], dims[k]
        if how == "same":
            assert all(torch.equal(t, each[0]) for t in each), f"{k} differs between ranks"
            each = each[:1]
        full[k] = torch.cat(each, how) if isinstance(how, int) else torch.stack(each).sum(0)
    return full


# Norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "groups"), [(3, 1), (2, 1), (4, 2), (6, 3), (4, 4), (2, 4), (1, 1), (1, 2)]
)
def test_rms_norm(size: int, groups: int, biased: bool, offset: float) -> None:
    """Rows of `groups` groups, each of several ranks, which reduce means, or several of a rank."""
    shards, width = max(groups, size), 12 // max(groups, size)  # a group's columns on a rank
    inputs = {"x": normal(3, 2, 12), "weight": normal(12, seed=1)}
    if biased:
        inputs["bias"] = normal(12, seed=2)
    grad = normal(3, 2, 12, seed=3)

    def full(x: Tensor, **parameters: Tensor) -> Tensor:
        split = {k: t.unflatten(0, (groups, -1)) for k, t in parameters.items()}
        y = rms_norm_reference(x.unflatten(-1, (groups, -1)), eps=1e-3, offset=offset, **split)
        return y.flatten(-2)

    def on_rank(sharding: Sharding) -> Tensors:
        mean, local_groups = sharding.mean_over_ranks(groups), shards // size
        assert (mean is None) == (groups % size == 0)

        def local(x: Tensor, **parameters: Tensor) -> Tensor:
            split = {k: t.view(local_groups, width) for k, t in parameters.items()}
            y = rms_norm(
                x.unflatten(-1, (local_groups, width)), eps=1e-3, offset=offset, mean=mean, **split
            )
            return y.flatten(-2)

        local_inputs = {k: sharding.local(t, -1) for k, t in inputs.items()}
        return results(local, local_inputs, sharding.local(grad, -1))

    ranks = Threads(size)
    by_rank = ranks.run(on_rank)
    assert_equal(joined(by_rank, {k: -1 for k in by_rank[0]}), results(full, inputs, grad))
    assert ranks.collectives == ["sum"] * (0 if groups % size == 0 else 2)


def test_local_shards() -> None:
    """A shard for each of four ranks, and two shards, each of which two neighbours hold."""
    full, ranks = torch.arange(8), [Sharding(4, rank) for rank in range(4)]
    assert [r.local(full, 0).tolist() for r in ranks] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    shared = [r.local(full, 0, shards=2).tolist() for r in ranks]
    assert shared == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


# Activations


def operands(name: str, *shape: int, seed: int = 0) -> Tensors:
    """`up`, and the gate and the coefficients where the activation has them."""
    t = {"up": 2 * normal(*shape, seed=seed)}
    if gated(name):
        t["gate"] = 2 * normal(*shape, seed=seed + 1)
    if polynomial(name):
        t["poly"] = normal(4, seed=seed + 2)
    return t


def split(t: Tensors, sharding: Sharding, dims: dict[str, int]) -> Tensors:
    """The tensors, those in `dims` sharded along these dimensions."""
    return {k: sharding.local(v, dims[k]) if k in dims else v for k, v in t.items()}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_activated_linear(name: str, size: int) -> None:
    inputs = {**operands(name, 5, 2, 12), "weight": normal(3, 12, seed=3)}
    grad = normal(5, 2, 3, seed=4)

    def full(up: Tensor, weight: Tensor, gate: Any = None, poly: Any = None) -> Tensor:
        return activate_reference(up, gate, name, poly) @ weight.T

    def on_rank(sharding: Sharding) -> Tensors:
        def local(up: Tensor, weight: Tensor, gate: Any = None, poly: Any = None) -> Tensor:
            return activated_linear(up, gate, weight, name, poly, sharding)

        return results(local, split(inputs, sharding, {"up": -1, "gate": -1, "weight": -1}), grad)

    ranks = Threads(size)
    dims: Dims = {"y0": "sum", "dpoly": "sum", **dict.fromkeys(["dup", "dgate", "dweight"], -1)}
    assert_equal(joined(ranks.run(on_rank), dims), results(full, inputs, grad))
    assert ranks.collectives == (["sum"] * 2 if name == "polynorm" else [])


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)],  # two roundings
)
def test_polynorm_of_extreme_rows(dtype: torch.dtype, bound: float) -> None:
    """Ranks' values differ by up to 1e15, with sixth powers far outside fp32; compared by row."""
    inputs, grad = operands("polynorm", 5, 12), normal(5, 12, seed=4)
    x = inputs["up"]
    x[0, :4], x[1, 4:8], x[2, 5], x[3] = 1e10 * x[0, :4], 0, -1e15, 1e-12 * x[3]
    inputs["up"], grad = x.to(dtype), grad.to(dtype).double()
    inputs["poly"] = inputs["poly"].to(torch.promote_types(dtype, torch.float32))

    def on_rank(sharding: Sharding) -> Tensors:
        def local(up: Tensor, poly: Tensor) -> Tensor:
            return activate(up, None, "polynorm", poly, sharding)

        return results(local, split(inputs, sharding, {"up": -1}), sharding.local(grad, -1))

    def full(up: Tensor, poly: Tensor) -> Tensor:
        return activate_reference(up, None, "polynorm", poly)

    ours = joined(Threads(3).run(on_rank), {"y0": -1, "dup": -1, "dpoly": "sum"})
    exact = results(full, {k: t.double() for k, t in inputs.items()}, grad)
    for k in ("y0", "dup"):
        for row in range(5):
            assert_equal({k: ours[k][row]}, {k: exact[k][row]}, bound)
    assert_equal({"dpoly": ours["dpoly"]}, {"dpoly": exact["dpoly"]}, min(bound, 1e-5))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "relu2", "polyrelu", "polynorm"])
def test_experts(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert without rows, some choices dropped; with a product per expert, and grouped."""
    (T, k, E, F), g = (13, 2, 4, 6), torch.Generator().manual_seed(0)
    chosen = torch.rand(T, E - 1, generator=g).argsort(1)[:, :k]
    keep_mask = torch.rand(T, k, generator=g) > 0.3
    inputs = {"x": normal(T, D), "weight": normal(T, k), "up": normal(E, F, D)}
    inputs["down"] = normal(E, D, F, seed=1)
    if gated(name):
        inputs["gate"] = normal(E, F, D, seed=2)
    if polynomial(name):
        inputs["poly"] = normal(4)
    grad = normal(T, D, seed=5)
    fixed: dict[str, Any] = {"chosen": chosen, "keep_mask": keep_mask, "activation": name}
    expected = results(
        lambda gate=None, **t: experts_reference(gate=gate, **t, **fixed), inputs, grad
    )
    if grouped:
        monkeypatch.setattr(experts_module, "_grouped", lambda rows, up: True)
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", uninitialised_grouped_mm)

    def on_rank(sharding: Sharding) -> Tensors:
        def local(gate: Tensor | None = None, **t: Any) -> Tensor:
            return experts(gate=gate, sharding=sharding, **t, **fixed)

        return results(local, split(inputs, sharding, {"up": 1, "gate": 1, "down": 2}), grad)

    dims: Dims = dict.fromkeys(["y0", "dx", "dweight", "dpoly"], "sum")
    by_rank = Threads(3).run(on_rank)
    assert_equal(joined(by_rank, {**dims, "dup": 1, "dgate": 1, "ddown": 2}), expected)


# Losses


def labels_of(T: int, ignored: float) -> Tensor:
    """Labels over the full vocabulary, a share of them ignored."""
    g = torch.Generator().manual_seed(T)
    labels = torch.randint(V, (T,), generator=g)
    return labels.masked_fill(torch.rand(T, generator=g) < ignored, -100)


@pytest.fixture(params=[(13, 0.3, 4), (9, 0.0, 100), (5, 1.0, 2)])
def tokens(request: pytest.FixtureRequest) -> tuple[int, Tensor, int]:
    """The number of tokens, their labels, and tokens per chunk."""
    T, ignored, chunk = request.param
    return T, labels_of(T, ignored), chunk


SAME: Dims = dict.fromkeys(["y0", "y1", "y2"], "same")
LOSS_DIMS: Dims = {**SAME, **dict.fromkeys(["dx", "dx1", "dx2"], "sum"), "dweight": 0}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_linear_objective(
    size: int, tokens: tuple[int, Tensor, int], options: dict[str, float]
) -> None:
    T, labels, chunk = tokens
    inputs = {"x": normal(T, D), "weight": normal(V, D)}
    inputs["weight"][V // 2] *= 5  # so that one shard has the largest logits

    def on_rank(sharding: Sharding) -> Tensors:
        def local(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return linear_objective(x, weight, labels, chunk, sharding=sharding, **options)

        return results(local, split(inputs, sharding, {"weight": 0}), normal())

    def full(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_objective_reference(x, weight, labels, **options)

    ranks = Threads(size)
    assert_equal(joined(ranks.run(on_rank), LOSS_DIMS), results(full, inputs, normal()))
    assert ranks.collectives == ["max", "sum"] * -(-T // chunk)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_linear_consistency(
    size: int, tokens: tuple[int, Tensor, int], options: dict[str, float]
) -> None:
    T, labels, chunk = tokens
    inputs = {"x1": normal(T, D), "x2": normal(T, D, seed=5), "weight": normal(V, D)}

    def on_rank(sharding: Sharding) -> Tensors:
        def local(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return linear_consistency(
                x1, x2, weight, labels, chunk, 5.0, sharding=sharding, **options
            )

        return results(local, split(inputs, sharding, {"weight": 0}), normal())

    def full(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_consistency_reference(x1, x2, weight, labels, 5.0, **options)

    ranks = Threads(size)
    assert_equal(joined(ranks.run(on_rank), LOSS_DIMS), results(full, inputs, normal()))
    assert ranks.collectives == ["max", "sum", "sum"] * -(-T // chunk)


def test_losses_without_gradient() -> None:
    """In validation: the same values as in training, on every rank."""
    one, two, weight, labels = normal(9, D), normal(9, D, seed=5), normal(V, D), labels_of(9, 0.3)

    def on_rank(sharding: Sharding) -> Tensors:
        shard = sharding.local(weight, 0)
        with torch.no_grad():
            a = linear_objective(one, shard, labels, 4, cap=2.0, sharding=sharding)
            b = linear_consistency(one, two, shard, labels, 4, 5.0, z=0.1, sharding=sharding)
        return named(*a, *b)

    a = linear_objective_reference(one, weight, labels, cap=2.0)
    b = linear_consistency_reference(one, two, weight, labels, 5.0, z=0.1)
    expected = named(*a, *b)
    assert_equal(joined(Threads(3).run(on_rank), dict.fromkeys(expected, "same")), expected)


def test_losses_of_large_logits() -> None:
    """A label with a logit 1e4 below another rank's, and one of probability 1: exact and finite."""
    x, labels = torch.eye(3, dtype=torch.float64), torch.tensor([0, 1, 0])

    def on_rank(sharding: Sharding) -> Tensors:
        weight = sharding.local(1e4 * x, 0).requires_grad_()
        y = linear_objective(x, weight, labels, 2, sharding=sharding)[0]
        y.backward()
        assert weight.grad is not None
        both = linear_consistency(x, x.flip(0), weight.detach(), labels, 2, 1.0, sharding=sharding)
        return {"objective": y.detach(), "grad": weight.grad, **named(*both)}

    dims: Dims = {**SAME, "objective": "same", "grad": 0}
    ours = joined(Threads(3).run(on_rank), dims)
    assert ours["objective"].item() == 1e4
    assert ours["grad"].tolist() == [[0, 0, -1], [0, 0, 0], [0, 0, 1]]
    assert all(t.isfinite().all() for t in ours.values())


@pytest.mark.parametrize("equal", [False, True])
def test_consistency_of_near_passes(equal: bool) -> None:
    """In fp32 a divergence of 1e-7 of the loss is precise; that of equal passes is 0."""
    one, weight, labels = normal(9, D).float(), normal(V, D).float(), labels_of(9, 0.0)
    two = one if equal else (one + 1e-4 * normal(9, D, seed=5)).float()

    def on_rank(sharding: Sharding) -> Tensors:
        shard = sharding.local(weight, 0)
        losses = linear_consistency(one, two, shard, labels, 9, 1.0, sharding=sharding)
        return {"divergence": losses[2]}

    ours = joined(Threads(3).run(on_rank), {"divergence": "same"})
    exact = linear_consistency_reference(*(t.double() for t in (one, two, weight)), labels, 1.0)[2]
    assert_equal(ours, {"divergence": exact}, 0.01)
    assert (ours["divergence"].item() == 0) == equal


# Compilation


@pytest.mark.parametrize("name", ["swiglu", "polynorm"])
def test_unsharded_is_traced(name: str) -> None:
    """`UNSHARDED` and None among a function's arguments cause no graph break."""
    inputs = {**operands(name, 5, 12), "weight": normal(3, 12, seed=3), "scale": normal(12)}
    grad = normal(5, 3, seed=4)

    def function(up: Tensor, weight: Tensor, scale: Tensor, **more: Tensor) -> Tensor:
        up = rms_norm(up, scale, 1e-3, mean=UNSHARDED.mean_over_ranks())
        return activated_linear(up, more.get("gate"), weight, name, more.get("poly"), UNSHARDED)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, inputs, grad), results(function, inputs, grad))
