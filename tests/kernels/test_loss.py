"""Chunked losses of the vocabulary projection against all logits at once, and PyTorch's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.kernels import loss
from colonnade.kernels.loss import (
    linear_consistency,
    linear_consistency_reference,
    linear_objective,
    linear_objective_reference,
)

Outputs = dict[str, Tensor]
V, D = 17, 7
CHUNKS = [1, 4, 13, 1000]
TOKENS = [
    (13, 0.3),
    (29, 0.0),
    (5, 1.0),
    (1, 0.0),
]  # number of tokens, and the share without a loss
OPTIONS = [{}, {"cap": 1.5}, {"z": 0.3}, {"cap": 1.5, "z": 0.3}]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def labels_of(T: int, V: int, ignored: float) -> Tensor:
    """Labels, a share of them ignored."""
    g = torch.Generator().manual_seed(T)
    labels = torch.randint(V, (T,), generator=g)
    return labels.masked_fill(torch.rand(T, generator=g) < ignored, -100)


def results(function: Callable[..., Any], *inputs: Tensor) -> Outputs:
    """All outputs, and the gradients of all inputs for a fixed gradient of the first output."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert not any(y.requires_grad for y in outputs[1:])
    grads = torch.autograd.grad(outputs[0], leaves, normal(seed=9).to(outputs[0]))
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient {i}": g for i, g in enumerate(grads)}


def two_passes(T: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of two passes, and the weight."""
    return normal(T, D, dtype=dtype), normal(T, D, seed=5, dtype=dtype), normal(V, D, dtype=dtype)


# Cross entropy


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("T", "ignored"), TOKENS)
def test_cross_entropy(T: int, ignored: float, chunk: int) -> None:
    x, weight, labels = normal(T, D), normal(V, D, seed=1), labels_of(T, V, ignored)
    ours = results(lambda x, w: linear_objective(x, w, labels, chunk)[0], x, weight)
    theirs = results(lambda x, w: linear_objective_reference(x, w, labels)[0], x, weight)
    assert_equal(ours, theirs)

    def by_formula(x: Tensor, w: Tensor) -> Tensor:
        likelihood = F.linear(x, w).softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -likelihood.log().where(labels != -100, 0).sum()

    assert_equal(ours, results(by_formula, x, weight))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("T", "ignored"), TOKENS)
def test_objective(T: int, ignored: float, options: dict[str, float], chunk: int) -> None:
    x, weight, labels = normal(T, D), normal(V, D, seed=1), labels_of(T, V, ignored)
    ours = results(lambda x, w: linear_objective(x, w, labels, chunk, **options), x, weight)
    theirs = results(lambda x, w: linear_objective_reference(x, w, labels, **options), x, weight)
    assert_equal(ours, theirs)

    def by_formula(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logits, valid = x @ w.T, labels != -100
        if "cap" in options:
            logits = options["cap"] * torch.tanh(logits / options["cap"])
        lse = logits.exp().sum(-1).log()
        nll = lse - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        z = options.get("z", 0) * lse**2
        return (nll + z).where(valid, 0).sum(), z.detach().where(valid, 0).sum()

    assert_equal(ours, results(by_formula, x, weight))


def test_cross_entropy_is_the_objective_without_z() -> None:
    x, weight, labels = normal(9, D), normal(V, D, seed=1), labels_of(9, V, 0.3)
    objective, z = linear_objective(x, weight, labels, 4, cap=2.0, z=0.1)
    nll = linear_objective(x, weight, labels, 4, cap=2.0)[0]
    assert_equal({"nll": nll}, {"nll": objective - z})
    assert linear_objective(x, weight, labels, 4)[1].item() == 0


def test_cross_entropy_of_large_logits() -> None:
    """No overflow, and the loss of a token of probability 1 is 0."""
    x = torch.eye(3, dtype=torch.float64)
    assert linear_objective(x, 1e4 * x, torch.tensor([0, 1, 0]), 2)[0].item() == 1e4


# Consistency


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("T", "ignored"), TOKENS)
def test_consistency(T: int, ignored: float, options: dict[str, float], chunk: int) -> None:
    labels = labels_of(T, V, ignored)

    def ours(*inputs: Tensor) -> tuple[Tensor, ...]:
        return linear_consistency(*inputs, labels, chunk, 5.0, **options)

    def by_kl_div(*inputs: Tensor) -> tuple[Tensor, ...]:
        return linear_consistency_reference(*inputs, labels, 5.0, **options)

    def by_formula(x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """With softmax and its logarithm."""
        objectives, zs, ps = [], [], []
        for x in (x1, x2):
            objective, z = linear_objective_reference(x, weight, labels, **options)
            objectives.append(objective)
            zs.append(z)
            logits = x @ weight.T
            cap = options.get("cap", 1e9)
            ps.append(torch.softmax(cap * torch.tanh(logits / cap), -1))
        p, q = ps
        divergence = ((p - q) * (p.log() - q.log())).sum(-1).where(labels != -100, 0).sum() * 2.5
        mean = (sum(objectives) - sum(zs)).detach() / 2
        return sum(objectives) + divergence, mean, divergence.detach()

    assert_equal(results(ours, *two_passes(T)), results(by_kl_div, *two_passes(T)))
    assert_equal(results(ours, *two_passes(T)), results(by_formula, *two_passes(T)))


def test_consistency_of_equal_passes() -> None:
    """Equal passes: no divergence, twice the loss, and exactly equal gradients."""
    x, _, weight = two_passes(13)
    labels = labels_of(13, V, 0.3)
    single = results(lambda x, w: linear_objective(x, w, labels, 4)[0], x, weight)
    both = results(lambda a, b, w: linear_consistency(a, b, w, labels, 4, 5.0), x, x, weight)
    assert both["output 2"].item() == 0
    assert_equal(
        {k: both[f"output {i}"] for i, k in enumerate(("sum", "mean"))},
        {"sum": 2 * single["output 0"], "mean": single["output 0"]},
    )
    assert_equal({"dx": both["gradient 0"]}, {"dx": single["gradient 0"]})
    assert_equal({"dw": both["gradient 2"]}, {"dw": 2 * single["gradient 1"]})
    assert torch.equal(both["gradient 0"], both["gradient 1"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_consistency_of_one_hot_passes(dtype: torch.dtype) -> None:
    """One-hot distributions (in the dtype) give finite losses, equal to the formula's limit.

    Where p and q have probability 1 at different tokens, ½ Σ (p − q)(log p − log q) is the
    difference of their logits, here 1e4.
    """
    x = torch.eye(2, dtype=dtype)
    weight, labels = 1e4 * x, torch.tensor([0, 1])
    out = results(lambda a, b, w: linear_consistency(a, b, w, labels, 2, 1.0), x, x.flip(0), weight)
    assert [out[f"output {i}"].item() for i in range(3)] == [4e4, 1e4, 2e4]
    assert all(t.isfinite().all() for t in out.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_zeros_and_huge_inputs(dtype: torch.dtype) -> None:
    """Zeros: log V a token, no divergence. Huge logits: all finite, and bounded where capped."""
    zeros, weight = torch.zeros(5, D, dtype=dtype), normal(V, D, dtype=dtype)
    labels = labels_of(5, V, 0.0)
    log_v = torch.tensor(float(V)).log()
    out = results(
        lambda a, b, w: linear_consistency(a, b, w, labels, 2, 5.0, cap=30.0), zeros, zeros, weight
    )
    assert_equal({"nll": out["output 1"]}, {"nll": 5 * log_v}, 1e-6)
    assert out["output 2"].item() == 0
    for options in ({"z": 1e-4}, {"cap": 30.0, "z": 1e-4}):
        out = results(
            lambda a, b, w, o=options: linear_consistency(a, b, w, labels, 2, 5.0, **o),
            1e12 * normal(5, D, dtype=dtype),
            -1e12 * normal(5, D, dtype=dtype),
            weight,
        )
        assert all(t.isfinite().all() for t in out.values())
    assert out["output 1"].item() <= 5 * (60 + log_v.item())


# Dtypes


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_in_fp32(options: dict[str, float]) -> None:
    labels = labels_of(29, V, 0.3)
    ours = results(
        lambda *t: linear_consistency(*t, labels, 8, 5.0, **options), *two_passes(29, torch.float32)
    )
    exact = results(
        lambda *t: linear_consistency_reference(*t, labels, 5.0, **options),
        *(t.double() for t in two_passes(29, torch.float32)),
    )
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert_equal(ours, exact, 1e-5)
    x, _, weight = two_passes(29, torch.float32)
    ours = results(lambda *t: linear_objective(*t, labels, 8, **options), x, weight)
    exact = results(
        lambda *t: linear_objective_reference(*t, labels, **options), x.double(), weight.double()
    )
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert_equal(ours, exact, 1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_objective_in_bf16(options: dict[str, float]) -> None:
    """Logits are rounded to bf16, by at most 2^-9 of each. A loss changes by at most twice the
    largest change of its logits, z · n² by 2 z n times it (and capping does not increase the
    change); gradients take two roundings, 1% of the largest."""
    x, weight = normal(61, 33).bfloat16(), (normal(41, 33, seed=1) / 4).bfloat16()
    labels = labels_of(61, 41, 0.3)
    ours = results(lambda x, w: linear_objective(x, w, labels, 8, **options), x, weight)
    assert [t.dtype for t in ours.values()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    exact = results(
        lambda x, w: linear_objective_reference(x, w, labels, **options),
        x.double(),
        weight.double(),
    )
    logits = x.double() @ weight.double().T
    change, n = 2**-9 * logits.abs().max().item(), logits.abs().max().item() + 4  # 4 > log V
    valid = int((labels != -100).sum())
    bound = valid * change * (2 + 2 * options.get("z", 0) * (n + change))
    assert abs(ours["output 0"].item() - exact["output 0"].item()) <= bound
    gradients = [{k: t[k] for k in t if k.startswith("gradient")} for t in (ours, exact)]
    assert_equal(gradients[0], gradients[1], 1e-2)


def test_consistency_in_bf16() -> None:
    """½ (p − q)·(log p − log q) has derivative ½ (p δ − p KL + p − q) in the logits of p: a sum of
    absolute values of at most KL's bound, max |δ|, plus 1, times the change of the logits."""
    inputs = (normal(61, 33), normal(61, 33, seed=5), normal(41, 33, seed=1) / 4)
    inputs = tuple(t.bfloat16() for t in inputs)
    labels = labels_of(61, 41, 0.3)
    ours = results(lambda *t: linear_consistency(*t, labels, 8, 5.0), *inputs)
    exact = results(
        lambda *t: linear_consistency_reference(*t, labels, 5.0), *(t.double() for t in inputs)
    )
    logits = [x.double() @ inputs[2].double().T for x in inputs[:2]]
    change = 2**-9 * max(t.abs().max().item() for t in logits)
    delta = (logits[0].log_softmax(-1) - logits[1].log_softmax(-1)).abs().max().item()
    valid = int((labels != -100).sum())
    bound = valid * 5.0 * 2 * change * (delta + 1)
    assert abs(ours["output 2"].item() - exact["output 2"].item()) <= bound
    for i in range(3):
        k = f"gradient {i}"
        assert_equal({k: ours[k]}, {k: exact[k]}, 1e-2)


# Memory and work


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_at_most_a_chunk_of_logits_exists() -> None:
    x1, x2, weight = (t.requires_grad_() for t in (normal(64, 3), normal(64, 3), normal(50, 3)))
    labels = labels_of(64, 50, 0.1)
    with Largest() as largest:
        linear_objective(x1, weight, labels, 8, cap=2.0, z=0.1)[0].backward()
        linear_consistency(x1, x2, weight, labels, 8, 1.0, cap=2.0, z=0.1)[0].backward()
    assert largest.elements == 8 * 50


def test_frozen_inputs_get_no_gradient() -> None:
    """A frozen weight or input gets no gradient, and the others' do not change."""
    inputs, labels = two_passes(9), labels_of(9, V, 0.3)
    ours = results(lambda *t: linear_consistency(*t, labels, 4, 2.0, z=0.1), *inputs)
    grad = normal(seed=9)
    for frozen in range(3):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        (linear_consistency(*leaves, labels, 4, 2.0, z=0.1)[0] * grad).backward()
        assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]
        others = {f"gradient {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
        assert_equal(others, {k: ours[k] for k in others})


def test_no_grad_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """In validation there is one product per chunk and pass, though the weight is a Parameter."""
    x1, x2, weight = two_passes(10)
    weight, labels = torch.nn.Parameter(weight), torch.arange(10) % V
    trained = linear_objective(x1, weight, labels, 5, cap=2.0, z=0.1)
    both = linear_consistency(x1, x2, weight, labels, 5, 2.0, cap=2.0, z=0.1)
    calls = []
    monkeypatch.setattr(loss, "product", lambda a, b: calls.append(1) or a @ b.T)
    with torch.no_grad():
        validated = linear_objective(x1, weight, labels, 5, cap=2.0, z=0.1)
        assert len(calls) == 2
        assert all(torch.equal(a, b) for a, b in zip(trained, validated, strict=True))
        validated = linear_consistency(x1, x2, weight, labels, 5, 2.0, cap=2.0, z=0.1)
        assert len(calls) == 6
        assert_equal(dict(enumerate(validated)), dict(enumerate(both)))


def test_backward_twice_is_refused() -> None:
    x = normal(4, D).requires_grad_()
    total = linear_objective(x, normal(V, D), torch.arange(4), 2)[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="walked backward once"):
        total.backward()
