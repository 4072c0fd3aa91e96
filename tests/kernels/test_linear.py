"""Products of linear layers against PyTorch's, with each library that can compute them."""

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


@pytest.fixture(autouse=True, params=["oneDNN", "MKL", "mixed"])
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs with one library, with the other, and with both mixed."""
    before = preferred()
    mixed = {name: i % 2 == 0 for i, name in enumerate(CLASSES)}
    same = dict.fromkeys(CLASSES, request.param == "oneDNN")
    prefer(mixed if request.param == "mixed" else same)
    yield
    prefer(before)


def test_classes_by_layout_and_flops() -> None:
    """A product's size class follows from its 2 M N K, whatever its leading dimensions."""
    classes = set()
    for m in (8, 512, 4096):
        x, weight, grad = normal(2, m, 256), normal(512, 256), normal(2, m, 512)
        rows, inputs = grad.reshape(-1, 512), x.reshape(-1, 256)
        names = [class_of(x, weight), class_of(grad, weight.T), class_of(rows.T, inputs.T)]
        assert len({name.partition(", ")[2] for name in names}) == 1
        limit = SIZES[names[0].partition(", ")[2]]
        assert limit is None or 2 * 2 * m * 512 * 256 < limit
        classes.update(names)
    assert classes == set(CLASSES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def results(function: Callable[[Tensor, Tensor], Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of both inputs for a fixed random gradient of it."""
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
    """oneDNN gets any strides: slices, transposes, a gradient that is one number expanded."""
    x, weight = normal(6, 3, 14, dtype=torch.float32), normal(22, 7, seed=1, dtype=torch.float32)
    leaves = [v.detach().requires_grad_() for v in (x.transpose(0, 1)[..., ::2], weight[::2])]
    wide = [v.detach().double().requires_grad_() for v in leaves]
    ours, exact = linear(*leaves), F.linear(*wide)
    assert_equal({"y": ours.detach()}, {"y": exact.detach()}, 1e-5, of_all=0)
    for grad in (normal(3, 6, 11, seed=9), torch.ones(()).expand(3, 6, 11)):
        d_ours = torch.autograd.grad(ours, leaves, grad.float(), retain_graph=True)
        d_exact = torch.autograd.grad(exact, wide, grad.double(), retain_graph=True)
        a, b = (dict(zip(("dx", "dweight"), d, strict=True)) for d in (d_ours, d_exact))
        assert_equal(a, b, 1e-5, of_all=0)


def test_linear_computes_only_needed_gradients() -> None:
    x, weight = normal(4, 3, dtype=torch.float32), normal(5, 3, seed=1, dtype=torch.float32)
    for frozen in (0, 1):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
        linear(*leaves).sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [frozen == 0, frozen == 1]


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_product_in_fp32(rows: int) -> None:
    """By oneDNN where it is available; also without rows."""
    a, b = normal(rows, 5, dtype=torch.float32), normal(3, 5, seed=1, dtype=torch.float32)
    assert product(a, b).shape == (rows, 3)
    if rows:
        assert_equal({"y": product(a, b)}, {"y": a.double() @ b.double().T}, 1e-5, of_all=0)
    assert not has_onednn(a.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_added(dtype: torch.dtype) -> None:
    """To a total of the operands' dtype or wider."""
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
