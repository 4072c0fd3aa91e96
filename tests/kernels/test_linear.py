"""Products of linear layers against PyTorch's own, on every library that may serve them."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from torch import Tensor

from colonnade.kernels.linear import (
    CLASSES,
    SIZES,
    add_product,
    class_of,
    has_onednn,
    linear,
    prefer,
    preferred,
    product,
)


@pytest.fixture(autouse=True, params=["oneDNN", "MKL", "each for some"])
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs on one library, on the other, and on both mixed."""
    before = preferred()
    some = {name: i % 2 == 0 for i, name in enumerate(CLASSES)}
    alike = dict.fromkeys(CLASSES, request.param == "oneDNN")
    prefer(some if request.param == "each for some" else alike)
    yield
    prefer(before)


def test_classes_are_told_by_layout_and_work() -> None:
    """A product stands between two limits by its 2 M N K, whatever its leading dimensions."""
    found = set()
    for m in (8, 512, 4096):
        x, weight, grad = normal(2, m, 256), normal(512, 256), normal(2, m, 512)
        rows, inputs = grad.reshape(-1, 512), x.reshape(-1, 256)
        named = [class_of(x, weight), class_of(grad, weight.T), class_of(rows.T, inputs.T)]
        assert len({name.partition(", ")[2] for name in named}) == 1
        limit = SIZES[named[0].partition(", ")[2]]
        assert limit is None or 2 * 2 * m * 512 * 256 < limit
        found.update(named)
    assert found == set(CLASSES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def results(function: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its product with fixed random numbers."""
    x, weight = (t.detach().clone().requires_grad_() for t in inputs)
    y = function(x, weight)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), normal(*y.shape, seed=9).to(y))
    return {"y": y.detach(), "dx": d_x, "dweight": d_weight}


@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 3, 13), (3, 2, 2, 9)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(11, shape[-1], seed=1, dtype=dtype)
    exact = results(F.linear, x.double(), weight.double())
    assert_equal(results(linear, x, weight), exact, bound, of_all=0)


def test_linear_of_views_in_fp32() -> None:
    """oneDNN is given any strides: slices, transposes, a gradient that is one number expanded."""
    x, weight = normal(6, 3, 14, dtype=torch.float32), normal(22, 7, seed=1, dtype=torch.float32)
    leaves = [v.detach().requires_grad_() for v in (x.transpose(0, 1)[..., ::2], weight[::2])]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    ours, exact = linear(*leaves), F.linear(*wide)
    assert_equal({"y": ours.detach()}, {"y": exact.detach()}, 1e-5, of_all=0)
    for seed in (normal(3, 6, 11, seed=9), torch.ones(()).expand(3, 6, 11)):
        d_ours = torch.autograd.grad(ours, leaves, seed.float(), retain_graph=True)
        d_exact = torch.autograd.grad(exact, wide, seed.double(), retain_graph=True)
        a, b = (dict(zip(("dx", "dweight"), d, strict=True)) for d in (d_ours, d_exact))
        assert_equal(a, b, 1e-5, of_all=0)


def test_linear_makes_only_the_gradients_asked_for() -> None:
    x, weight = normal(4, 3, dtype=torch.float32), normal(5, 3, seed=1, dtype=torch.float32)
    for frozen in (0, 1):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
        linear(*leaves).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [frozen == 0, frozen == 1]


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_product_in_fp32(rows: int) -> None:
    """The path that oneDNN serves where it is there; without rows too."""
    a, b = normal(rows, 5, dtype=torch.float32), normal(3, 5, seed=1, dtype=torch.float32)
    assert product(a, b).shape == (rows, 3)
    if rows:
        assert_equal({"y": product(a, b)}, {"y": a.double() @ b.double().T}, 1e-5, of_all=0)
    assert not has_onednn(a.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_added(dtype: torch.dtype) -> None:
    """Onto what is there, of the operands' dtype or wider."""
    a, b = normal(6, 5, dtype=torch.float32), normal(3, 5, seed=1, dtype=torch.float32)
    total = normal(6, 3, seed=2, dtype=dtype)
    exact = total.double() + a.double() @ b.double().T
    add_product(total, a, b)
    assert total.dtype == dtype
    assert_equal({"": total}, {"": exact}, 1e-5, of_all=0)
    transposed = a.T.contiguous().T
    add_product(total, transposed, b)
    exact += a.double() @ b.double().T
    assert_equal({"": total}, {"": exact}, 1e-5, of_all=0)
