"""Dropless experts against every expert run on every token and masked."""

from collections.abc import Callable

import pytest
import torch
from equal import assert_equal
from torch import Tensor

from colonnade.kernels import experts as module
from colonnade.kernels.experts import combine, dispatch, expert_mlp, experts, experts_reference

Inputs = dict[str, Tensor]


def inputs(T: int = 20, k: int = 2, E: int = 5, D: int = 6, F: int = 7, seed: int = 0) -> Inputs:
    """Random fp64 arguments of experts, gate included; the last expert is never chosen if k < E."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, D), "weight": (T, k), "gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
    t = {name: torch.randn(v, generator=g, dtype=torch.float64) for name, v in shapes.items()}
    available = E if k == E else E - 1
    t["chosen"] = torch.rand(T, available, generator=g).argsort(1)[:, :k]
    return t


def results(function: Callable[..., Tensor], t: Inputs, activation: str) -> Inputs:
    """The output, and gradients of a random function of it."""
    chosen = t["chosen"]
    t = {k: v.detach().requires_grad_() for k, v in t.items() if k != "chosen"}
    y = function(chosen=chosen, activation=activation, **{"gate": None, **t})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{k}": v for k, v in zip(t, gradients, strict=True)}}


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize(("T", "k"), [(20, 2), (20, 1), (13, 5), (1, 3)])
def test_equals_reference(T: int, k: int, activation: str) -> None:
    t = inputs(T, k)
    if activation != "swiglu":
        del t["gate"]
    expected = results(experts_reference, t, activation)
    assert_equal(results(experts, t, activation), expected, of_all=0)


def test_all_experts_equal_the_weighted_sum() -> None:
    t = inputs(k=5)
    total = 0
    for e in range(5):
        gate, up = t["x"] @ t["gate"][e].T, t["x"] @ t["up"][e].T
        weight = t["weight"][t["chosen"] == e][:, None]  # one choice of e for every token
        total = total + weight * ((gate * gate.sigmoid() * up) @ t["down"][e].T)
    assert_equal({"y": experts(**t, activation="swiglu")}, {"y": total}, of_all=0)


def test_expert_without_tokens_has_zero_gradients() -> None:
    got = results(experts, inputs(), "swiglu")
    for name in ("dgate", "dup", "ddown"):
        assert (got[name][-1] == 0).all()
        assert (got[name][:-1] != 0).any()


def test_no_tokens_at_all() -> None:
    got = results(experts, inputs(T=0), "swiglu")
    assert got["y"].shape == (0, 6)
    assert all((got[name] == 0).all() for name in ("dgate", "dup", "ddown"))


def test_dispatch_sorts_stably_and_combine_undoes_it() -> None:
    t = inputs(T=50, k=3)
    rows, order = dispatch(t["x"], t["chosen"], 5)
    flat = t["chosen"].flatten()
    pairs = sorted((int(e), i) for i, e in enumerate(flat))
    assert order.assignments.tolist() == [i for _, i in pairs]
    assert order.counts.tolist() == [int((flat == e).sum()) for e in range(5)]
    assert torch.equal(rows, t["x"][order.assignments // 3])
    back = combine(rows, order, torch.full_like(t["weight"], 0.25))
    assert_equal({"x": back}, {"x": 0.75 * t["x"]}, relative=1e-14, of_all=0)


def test_gradcheck() -> None:
    t = inputs(T=4, k=2, E=3, D=2, F=3)
    chosen = t.pop("chosen")
    names = list(t)

    def function(*values: Tensor) -> Tensor:
        return experts(chosen=chosen, activation="swiglu", **dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(v.requires_grad_() for v in t.values()))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes(
    dtype: torch.dtype, bound: float, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs rounded to the dtype, then fp64 as the truth; by either product."""
    monkeypatch.setattr(module, "_grouped", lambda rows, up: grouped)
    for seed in range(3):
        t = inputs(T=64, D=16, F=24, seed=seed)
        t = {k: v if k in ("chosen", "weight") else v.to(dtype) for k, v in t.items()}
        t["weight"] = t["weight"].float()
        got = results(experts, t, "swiglu")
        assert all(got[f"d{k}"].dtype == v.dtype for k, v in t.items() if k != "chosen")
        assert got["y"].dtype == dtype
        exact = {k: v if k == "chosen" else v.double() for k, v in t.items()}
        assert_equal(got, results(experts_reference, exact, "swiglu"), relative=bound, of_all=0)


def test_grouped_product_takes_any_gradient() -> None:
    """Also one that is not contiguous, which torch's own derivative refuses."""
    t = {k: v if k == "chosen" else v.float() for k, v in inputs(D=8, F=8).items()}
    rows, order = dispatch(t["x"], t["chosen"], 5)
    weights = [t[k].requires_grad_() for k in ("gate", "up", "down")]
    found = []
    for path in (expert_mlp, module._grouped_mlp):
        y = path(rows, order.counts, *weights, "swiglu")
        found.append(torch.autograd.grad(y.sum(), weights))
    names = ("gate", "up", "down")
    loop, grouped = (dict(zip(names, f, strict=True)) for f in found)
    assert_equal(grouped, loop, relative=1e-5, of_all=0)


def test_extreme_values_are_finite() -> None:
    zeros = {k: v if k == "chosen" else torch.zeros_like(v) for k, v in inputs().items()}
    assert all((v == 0).all() for v in results(experts, zeros, "swiglu").values())
    t = inputs()
    t["x"][4, 1] = 1e30
    expected = results(experts_reference, t, "swiglu")
    assert_equal(results(experts, t, "swiglu"), expected, of_all=0)
