"""Dropless experts against every expert on every token, masked."""

from collections.abc import Callable

import pytest
import torch
from equal import assert_equal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade.kernels import experts as module
from colonnade.kernels.activation import gated
from colonnade.kernels.experts import combine, dispatch, expert_mlp, experts, experts_reference

Inputs = dict[str, Tensor]


def inputs(
    T: int = 20, k: int = 2, E: int = 5, D: int = 6, F: int = 7, seed: int = 0, bias: bool = False
) -> Inputs:
    """Random fp64 arguments of experts, gate included, and biases with `bias`; the last expert is
    never chosen if k < E."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, D), "weight": (T, k), "gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
    if bias:
        shapes |= {"gate_bias": (E, F), "up_bias": (E, F), "down_bias": (E, D)}
    t = {name: torch.randn(v, generator=g, dtype=torch.float64) for name, v in shapes.items()}
    available = E if k == E else E - 1
    t["chosen"] = torch.rand(T, available, generator=g).argsort(1)[:, :k]
    return t


def results(function: Callable[..., Tensor], t: Inputs, activation: str) -> Inputs:
    """The output, and gradients of a random function of it."""
    fixed = {k: v for k, v in t.items() if not v.is_floating_point()}
    t = {k: v.detach().requires_grad_() for k, v in t.items() if k not in fixed}
    y = function(activation=activation, **fixed, **{"gate": None, **t})
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, list(t.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{k}": v for k, v in zip(t, gradients, strict=True)}}


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2", "swiglu_clamped"])
@pytest.mark.parametrize(("T", "k"), [(20, 2), (20, 1), (13, 5), (1, 3)])
def test_equals_reference(T: int, k: int, activation: str) -> None:
    t = inputs(T, k, bias=activation == "swiglu_clamped")
    if not gated(activation):
        del t["gate"]
    expected = results(experts_reference, t, activation)
    assert_equal(results(experts, t, activation), expected, of_all=0)


def dropping(t: Inputs, activation: str, share: float = 0.4) -> Inputs:
    """The inputs with a share of choices dropped, all of token 0's among them, and with `poly`."""
    g = torch.Generator().manual_seed(2)
    t = dict(t, keep_mask=torch.rand(t["chosen"].shape, generator=g) > share)
    t["keep_mask"][0] = False
    if not gated(activation):
        del t["gate"]
        t.pop("gate_bias", None)
    if activation.startswith("poly"):
        t["poly"] = torch.randn(4, generator=g, dtype=torch.float64)
    return t


@pytest.mark.parametrize("activation", ["swiglu", "relu2", "polyrelu", "polynorm"])
@pytest.mark.parametrize(("T", "k"), [(20, 2), (20, 1), (13, 5), (1, 3)])
def test_dropped_choices_add_nothing(T: int, k: int, activation: str) -> None:
    t = dropping(inputs(T, k), activation)
    got = results(experts, t, activation)
    assert_equal(got, results(experts_reference, t, activation), of_all=0)
    assert (got["y"][0] == 0).all()
    assert (got["dx"][0] == 0).all()
    assert (got["dweight"][~t["keep_mask"]] == 0).all()
    if T > 1:  # dropped choices take no part in the products, nor in the gradients
        rows, order = dispatch(t["x"], t["chosen"], 5, t["keep_mask"])
        assert order.counts.sum() == t["keep_mask"].sum() < len(rows)


def test_mask_that_keeps_all_is_bit_equal_to_none() -> None:
    t = inputs()
    masked = dict(t, keep_mask=torch.ones(20, 2, dtype=torch.bool))
    assert_equal(results(experts, masked, "swiglu"), results(experts, t, "swiglu"), 0, 0)


def test_all_dropped() -> None:
    t = dict(inputs(), keep_mask=torch.zeros(20, 2, dtype=torch.bool))
    got = results(experts, t, "swiglu")
    assert all((v == 0).all() for v in got.values())


def uninitialised_grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """PyTorch's `grouped_mm` in any dtype, with NaN wherever CUDA writes nothing."""
    ends = offs.tolist()
    if b.dim() == 2:  # a gradient of weights: the inner dimension is split
        y = a.new_full((len(ends), a.shape[0], b.shape[1]), torch.nan)
    else:
        y = a.new_full((a.shape[0], b.shape[2]), torch.nan)
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end and b.dim() == 2:
            y[e] = a[:, start:end] @ b[start:end]
        elif start < end:
            y[start:end] = a[start:end] @ b[e]
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "polyrelu", "polynorm"])
def test_grouped_products_read_no_uninitialised_rows(
    activation: str, drop: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_grouped", lambda rows, up: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", uninitialised_grouped_mm)
    t = dropping(inputs(bias=bias), activation, 0.4 if drop else -1)
    if not drop:
        t["keep_mask"][0] = True
    assert_equal(
        results(experts, t, activation), results(experts_reference, t, activation), of_all=0
    )


@pytest.mark.parametrize("activation", ["swiglu", "polynorm"])
def test_grouped_path_copies_no_counts_to_the_host(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on meta tensors, which have no values to copy."""
    monkeypatch.setattr(module, "_grouped", lambda rows, up: True)
    t = dropping(inputs(D=8, F=8, bias=True), activation)
    t = {k: (v.bfloat16() if v.is_floating_point() else v).to("meta") for k, v in t.items()}
    t = {k: v.requires_grad_(v.is_floating_point()) for k, v in t.items()}
    experts(activation=activation, **{"gate": None, **t}).sum().backward()
    assert t["x"].grad.shape == t["x"].shape


def test_one_expert_for_all_is_an_mlp() -> None:
    """As in THOR: the other experts' gradients are zeros."""
    t = inputs(k=1)
    t["chosen"], t["weight"] = torch.full((20, 1), 3), torch.ones(20, 1, dtype=torch.float64)
    got = results(experts, t, "swiglu")
    gate, up = t["x"] @ t["gate"][3].T, t["x"] @ t["up"][3].T
    expected = (gate * gate.sigmoid() * up) @ t["down"][3].T
    assert_equal({"y": got["y"]}, {"y": expected}, of_all=0)
    for name in ("dgate", "dup", "ddown"):
        assert [bool((g != 0).any()) for g in got[name]] == [e == 3 for e in range(5)]


def test_recomputation_and_no_grad() -> None:
    t = dropping(inputs(), "polynorm")
    expected = results(experts, t, "polynorm")

    def recomputed(**arguments: Tensor) -> Tensor:
        return checkpoint(experts, use_reentrant=False, **arguments)

    assert_equal(results(recomputed, t, "polynorm"), expected, 0, 0)
    with torch.no_grad():
        assert torch.equal(experts(gate=None, activation="polynorm", **t), expected["y"])


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
    combined = combine(rows, order, torch.full_like(t["weight"], 0.25))
    assert_equal({"x": combined}, {"x": 0.75 * t["x"]}, relative=1e-14, of_all=0)


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
    """Against fp64 of the same rounded inputs; with a product per expert, and grouped."""
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
    """Also one that is not contiguous, which PyTorch's backward refuses."""
    t = {k: v if k == "chosen" else v.float() for k, v in inputs(D=8, F=8).items()}
    rows, order = dispatch(t["x"], t["chosen"], 5)
    weights = [t[k].requires_grad_() for k in ("gate", "up", "down")]
    grads = []
    for path in (expert_mlp, module._grouped_mlp):
        y = path(rows, order.counts, *weights, "swiglu")
        grads.append(torch.autograd.grad(y.sum(), weights))
    names = ("gate", "up", "down")
    loop, grouped = (dict(zip(names, g, strict=True)) for g in grads)
    assert_equal(grouped, loop, relative=1e-5, of_all=0)


def test_extreme_values_are_finite() -> None:
    zeros = {k: v if k == "chosen" else torch.zeros_like(v) for k, v in inputs().items()}
    assert all((v == 0).all() for v in results(experts, zeros, "swiglu").values())
    t = inputs()
    t["x"][4, 1] = 1e30
    expected = results(experts_reference, t, "swiglu")
    assert_equal(results(experts, t, "swiglu"), expected, of_all=0)
