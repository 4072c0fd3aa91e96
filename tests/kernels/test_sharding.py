"""Operators on a width that is cut over ranks, here threads, against references of all of it."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from equal import assert_equal
from test_experts import rubbish_grouped_mm
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
from colonnade.kernels.cut import WHOLE, Combine, Cut
from colonnade.kernels.experts import experts, experts_reference
from colonnade.kernels.loss import (
    linear_consistency,
    linear_consistency_reference,
    linear_objective,
    linear_objective_reference,
)
from colonnade.kernels.norm import rms_norm, rms_norm_reference

Tensors = dict[str, Tensor]
Dims = dict[str, int | str]  # a dimension that is cut, a "sum" over ranks, or the "same" on all
OPTIONS = [{}, {"cap": 1.5}, {"z": 0.3}, {"cap": 1.5, "z": 0.3}]
V, D = 24, 5


class Threads:
    """Ranks as threads, which meet at a barrier to combine what they hold."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.held: list[Tensor] = [torch.empty(0)] * count
        self.asked: list[str] = []  # what rank 0 asked for

    def cut(self, rank: int) -> Cut:
        total = self.combining(rank, "total", lambda t: t.sum(0))
        return Cut(self.count, rank, total, self.combining(rank, "largest", lambda t: t.amax(0)))

    def combining(self, rank: int, name: str, function: Combine) -> Combine:
        def combine(own: Tensor) -> Tensor:
            assert not own.requires_grad, "inside an autograd.Function no graph is recorded"
            if rank == 0:
                self.asked.append(name)
            self.held[rank] = own
            self.barrier.wait()
            assert all(t.shape == own.shape for t in self.held)
            combined = function(torch.stack(self.held))
            self.barrier.wait()  # before any rank writes what it holds
            return combined

        return combine

    def run(self, function: Callable[[Cut], Tensors]) -> list[Tensors]:
        """What the function returns on each rank."""

        def guarded(rank: int) -> Tensors:
            try:
                return function(self.cut(rank))
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            done = [pool.submit(guarded, rank) for rank in range(self.count)]
        for f in done:  # the cause first, then those whom it left at the barrier
            if not isinstance(f.exception(), threading.BrokenBarrierError):
                f.result()
        return [f.result() for f in done]


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64)


def results(function: Callable[..., Any], inputs: Tensors, grad: Tensor) -> Tensors:
    """Outputs, the first one's product with `grad` differentiated in all inputs."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs[0], list(leaves.values()), grad.to(outputs[0].dtype))
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


def joined(parts: Sequence[Tensors], dims: Dims) -> Tensors:
    """The whole of each."""
    whole = {}
    for k in parts[0]:
        each, how = [part[k] for part in parts], dims[k]
        if how == "same":
            assert all(torch.equal(t, each[0]) for t in each), f"{k} differs between ranks"
            each = each[:1]
        whole[k] = torch.cat(each, how) if isinstance(how, int) else torch.stack(each).sum(0)
    return whole


# Norm


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("count", "pieces"), [(3, 1), (2, 1), (4, 2), (6, 3), (4, 4), (2, 4), (1, 1), (1, 2)]
)
def test_rms_norm(count: int, pieces: int, biased: bool, offset: float) -> None:
    """Rows of `pieces` groups, whose ranks complete their means; or whole groups on each rank."""
    groups, width = max(pieces, count), 12 // max(pieces, count)  # columns as each rank has them
    inputs = {"x": normal(3, 2, 12), "weight": normal(12, seed=1)}
    if biased:
        inputs["bias"] = normal(12, seed=2)
    grad = normal(3, 2, 12, seed=3)

    def whole(x: Tensor, **parameters: Tensor) -> Tensor:
        split = {k: t.unflatten(0, (pieces, -1)) for k, t in parameters.items()}
        y = rms_norm_reference(x.unflatten(-1, (pieces, -1)), eps=1e-3, offset=offset, **split)
        return y.flatten(-2)

    def rank(cut: Cut) -> Tensors:
        mean, here = cut.mean(pieces), groups // count
        assert (mean is None) == (pieces % count == 0)

        def own(x: Tensor, **parameters: Tensor) -> Tensor:
            split = {k: t.view(here, width) for k, t in parameters.items()}
            y = rms_norm(
                x.unflatten(-1, (here, width)), eps=1e-3, offset=offset, mean=mean, **split
            )
            return y.flatten(-2)

        return results(own, {k: cut.mine(t, -1) for k, t in inputs.items()}, cut.mine(grad, -1))

    ranks = Threads(count)
    parts = ranks.run(rank)
    assert_equal(joined(parts, {k: -1 for k in parts[0]}), results(whole, inputs, grad))
    assert ranks.asked == ["total"] * (0 if pieces % count == 0 else 2)


def test_cut_slices_what_it_shares() -> None:
    """Four ranks of two pieces: neighbours have the same one."""
    whole = torch.arange(8)
    assert [Cut(4, i).mine(whole, 0).tolist() for i in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    shared = [Cut(4, i).mine(whole, 0, pieces=2).tolist() for i in range(4)]
    assert shared == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2


# Activations


def operands(name: str, *shape: int, seed: int = 0) -> Tensors:
    """`up`, and the gate and coefficients that the activation has."""
    t = {"up": 2 * normal(*shape, seed=seed)}
    if gated(name):
        t["gate"] = 2 * normal(*shape, seed=seed + 1)
    if polynomial(name):
        t["poly"] = normal(4, seed=seed + 2)
    return t


def split(t: Tensors, cut: Cut, dims: dict[str, int]) -> Tensors:
    """This rank's part of all that is cut."""
    return {k: cut.mine(v, dims[k]) if k in dims else v for k, v in t.items()}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_activated_linear(name: str, count: int) -> None:
    inputs = {**operands(name, 5, 2, 12), "weight": normal(3, 12, seed=3)}
    grad = normal(5, 2, 3, seed=4)

    def whole(up: Tensor, weight: Tensor, gate: Any = None, poly: Any = None) -> Tensor:
        return activate_reference(up, gate, name, poly) @ weight.T

    def rank(cut: Cut) -> Tensors:
        def own(up: Tensor, weight: Tensor, gate: Any = None, poly: Any = None) -> Tensor:
            return activated_linear(up, gate, weight, name, poly, cut)

        return results(own, split(inputs, cut, {"up": -1, "gate": -1, "weight": -1}), grad)

    ranks = Threads(count)
    dims: Dims = {"y0": "sum", "dpoly": "sum", **dict.fromkeys(["dup", "dgate", "dweight"], -1)}
    assert_equal(joined(ranks.run(rank), dims), results(whole, inputs, grad))
    assert ranks.asked == (["total"] * 2 if name == "polynorm" else [])


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2.0**-8)],  # two roundings
)
def test_polynorm_of_extreme_rows(dtype: torch.dtype, bound: float) -> None:
    """Ranks whose numbers differ by up to 1e15, sixth powers far outside fp32: right, by rows."""
    inputs, grad = operands("polynorm", 5, 12), normal(5, 12, seed=4)
    x = inputs["up"]
    x[0, :4] *= 1e10
    x[1, 4:8] = 0
    x[2, 5] = -1e15
    x[3] *= 1e-12
    inputs["up"], grad = x.to(dtype), grad.to(dtype).double()
    inputs["poly"] = inputs["poly"].to(torch.promote_types(dtype, torch.float32))

    def rank(cut: Cut) -> Tensors:
        def own(up: Tensor, poly: Tensor) -> Tensor:
            return activate(up, None, "polynorm", poly, cut)

        return results(own, split(inputs, cut, {"up": -1}), cut.mine(grad, -1))

    def whole(up: Tensor, poly: Tensor) -> Tensor:
        return activate_reference(up, None, "polynorm", poly)

    ours = joined(Threads(3).run(rank), {"y0": -1, "dup": -1, "dpoly": "sum"})
    exact = results(whole, {k: t.double() for k, t in inputs.items()}, grad)
    for k in ("y0", "dup"):
        for got, wanted in zip(ours[k], exact[k], strict=True):
            assert_equal({k: got}, {k: wanted}, bound)
    assert_equal({"dpoly": ours["dpoly"]}, {"dpoly": exact["dpoly"]}, min(bound, 1e-5))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["swiglu", "relu2", "polyrelu", "polynorm"])
def test_experts(name: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert without rows, some choices dropped; a product for each expert, and grouped."""
    (T, k, E, F), g = (13, 2, 4, 6), torch.Generator().manual_seed(0)
    chosen = torch.rand(T, E - 1, generator=g).argsort(1)[:, :k]
    kept = torch.rand(T, k, generator=g) > 0.3
    inputs = {"x": normal(T, D), "weight": normal(T, k), "up": normal(E, F, D)}
    inputs["down"] = normal(E, D, F, seed=1)
    if gated(name):
        inputs["gate"] = normal(E, F, D, seed=2)
    if polynomial(name):
        inputs["poly"] = normal(4)
    grad = normal(T, D, seed=5)
    fixed: dict[str, Any] = {"chosen": chosen, "kept": kept, "activation": name}
    expected = results(
        lambda gate=None, **t: experts_reference(gate=gate, **t, **fixed), inputs, grad
    )
    if grouped:
        monkeypatch.setattr(experts_module, "_grouped", lambda rows, up: True)
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", rubbish_grouped_mm)

    def rank(cut: Cut) -> Tensors:
        def own(gate: Tensor | None = None, **t: Any) -> Tensor:
            return experts(gate=gate, cut=cut, **t, **fixed)

        return results(own, split(inputs, cut, {"up": 1, "gate": 1, "down": 2}), grad)

    dims: Dims = dict.fromkeys(["y0", "dx", "dweight", "dpoly"], "sum")
    parts = Threads(3).run(rank)
    assert_equal(joined(parts, {**dims, "dup": 1, "dgate": 1, "ddown": 2}), expected)


# Losses


def labels_of(T: int, ignored: float) -> Tensor:
    """Labels of the whole vocabulary, a share of them without loss."""
    g = torch.Generator().manual_seed(T)
    labels = torch.randint(V, (T,), generator=g)
    return labels.masked_fill(torch.rand(T, generator=g) < ignored, -100)


@pytest.fixture(params=[(13, 0.3, 4), (9, 0.0, 100), (5, 1.0, 2)])
def tokens(request: pytest.FixtureRequest) -> tuple[int, Tensor, int]:
    """How many there are, their labels, and tokens per chunk."""
    T, ignored, chunk = request.param
    return T, labels_of(T, ignored), chunk


SAME: Dims = dict.fromkeys(["y0", "y1", "y2"], "same")
LOSS_DIMS: Dims = {**SAME, **dict.fromkeys(["dx", "dx1", "dx2"], "sum"), "dweight": 0}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_linear_objective(
    count: int, tokens: tuple[int, Tensor, int], options: dict[str, float]
) -> None:
    T, labels, chunk = tokens
    inputs = {"x": normal(T, D), "weight": normal(V, D)}
    inputs["weight"][V // 2] *= 5  # so that the largest logits are of one block
    grad = normal()

    def rank(cut: Cut) -> Tensors:
        def own(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return linear_objective(x, weight, labels, chunk, cut=cut, **options)

        return results(own, split(inputs, cut, {"weight": 0}), grad)

    def whole(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_objective_reference(x, weight, labels, **options)

    ranks = Threads(count)
    assert_equal(joined(ranks.run(rank), LOSS_DIMS), results(whole, inputs, grad))
    assert ranks.asked == ["largest", "total"] * -(-T // chunk)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_linear_consistency(
    count: int, tokens: tuple[int, Tensor, int], options: dict[str, float]
) -> None:
    T, labels, chunk = tokens
    inputs = {"x1": normal(T, D), "x2": normal(T, D, seed=5), "weight": normal(V, D)}
    grad = normal()

    def rank(cut: Cut) -> Tensors:
        def own(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return linear_consistency(x1, x2, weight, labels, chunk, 5.0, cut=cut, **options)

        return results(own, split(inputs, cut, {"weight": 0}), grad)

    def whole(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return linear_consistency_reference(x1, x2, weight, labels, 5.0, **options)

    ranks = Threads(count)
    assert_equal(joined(ranks.run(rank), LOSS_DIMS), results(whole, inputs, grad))
    assert ranks.asked == ["largest", "total", "total"] * -(-T // chunk)


def test_losses_without_gradient() -> None:
    """Validation: the same numbers, on every rank."""
    inputs, labels = [normal(9, D), normal(9, D, seed=5), normal(V, D)], labels_of(9, 0.3)

    def rank(cut: Cut) -> Tensors:
        one, two, weight = *inputs[:2], cut.mine(inputs[2], 0)
        with torch.no_grad():
            a = linear_objective(one, weight, labels, 4, cap=2.0, cut=cut)
            b = linear_consistency(one, two, weight, labels, 4, 5.0, z=0.1, cut=cut)
        return dict(zip("01234", (*a, *b), strict=True))

    one, two, weight = inputs
    a = linear_objective_reference(one, weight, labels, cap=2.0)
    b = linear_consistency_reference(one, two, weight, labels, 5.0, z=0.1)
    ours = joined(Threads(3).run(rank), dict.fromkeys("01234", "same"))
    assert_equal(ours, dict(zip("01234", (*a, *b), strict=True)))


def test_losses_of_large_logits() -> None:
    """A label whose logit is 1e4 below another rank's, and a certain one: exact, finite."""
    x = torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0])

    def rank(cut: Cut) -> Tensors:
        weight = cut.mine(1e4 * x, 0).requires_grad_()
        y = linear_objective(x, weight, labels, 2, cut=cut)[0]
        y.backward()
        assert weight.grad is not None
        both = linear_consistency(x, x.flip(0), weight.detach(), labels, 2, 1.0, cut=cut)
        return {"y": y.detach(), "d": weight.grad, **dict(zip("abc", both, strict=True))}

    how: Dims = {**dict.fromkeys("yabc", "same"), "d": 0}
    ours = joined(Threads(3).run(rank), how)
    assert ours["y"].item() == 1e4
    assert ours["d"].tolist() == [[0, 0, -1], [0, 0, 0], [0, 0, 1]]
    assert all(t.isfinite().all() for t in ours.values())


@pytest.mark.parametrize("equal", [False, True])
def test_consistency_of_near_passes(equal: bool) -> None:
    """In fp32 a divergence of 1e-7 of the loss keeps its digits; that of equal passes is 0."""
    one, weight, labels = normal(9, D).float(), normal(V, D).float(), labels_of(9, 0.0)
    two = one if equal else (one + 1e-4 * normal(9, D, seed=5)).float()

    def rank(cut: Cut) -> Tensors:
        own = cut.mine(weight, 0)
        return {"divergence": linear_consistency(one, two, own, labels, 9, 1.0, cut=cut)[2]}

    ours = joined(Threads(3).run(rank), {"divergence": "same"})
    wide = (one.double(), two.double(), weight.double())
    exact = linear_consistency_reference(*wide, labels, 1.0)[2]
    assert_equal(ours, {"divergence": exact}, 0.01)
    assert (ours["divergence"].item() == 0) == equal


# Compilation


@pytest.mark.parametrize("name", ["swiglu", "polynorm"])
def test_whole_is_traced(name: str) -> None:
    """`WHOLE` and None among a function's arguments break no compiled graph."""
    inputs = {**operands(name, 5, 12), "weight": normal(3, 12, seed=3), "scale": normal(12)}
    grad = normal(5, 3, seed=4)

    def function(up: Tensor, weight: Tensor, scale: Tensor, **more: Tensor) -> Tensor:
        up = rms_norm(up, scale, 1e-3, mean=WHOLE.mean())
        return activated_linear(up, more.get("gate"), weight, name, more.get("poly"), WHOLE)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_equal(results(compiled, inputs, grad), results(function, inputs, grad))
