"""Norm, activations, products, attention and loss against their references and PyTorch's own."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colonnade.kernels import loss
from colonnade.kernels.activation import activate, activate_reference
from colonnade.kernels.attention import (
    attention,
    attention_reference,
    document_mask,
    rope_table,
    rotate,
)
from colonnade.kernels.linear import linear, product, uses_onednn
from colonnade.kernels.loss import linear_cross_entropy, linear_cross_entropy_reference
from colonnade.kernels.norm import rms_norm, rms_norm_reference

BF16 = 2.0**-8  # twice the rounding error of a bf16 number: one rounding, and room for the input's


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, the same in every dtype up to rounding."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The function's output, and the gradients of its product with fixed random numbers."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out))]


def assert_close(a: Sequence[Tensor], b: Sequence[Tensor], relative: float = 1e-12) -> None:
    """|a − b| ≤ relative · max|b|, tensor by tensor."""
    assert len(a) == len(b)
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert left.shape == right.shape, i
        assert (left.double() - right).abs().max() <= relative * right.abs().max(), i


# Norm


@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 3, 13), (4, 2, 3, 5)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight, eps = normal(*shape), normal(*shape[-1:], seed=1), 0.03
    ours = results(lambda x, w: rms_norm(x, w, eps), x, weight)
    assert_close(ours, results(lambda x, w: rms_norm_reference(x, w, eps), x, weight))
    assert_close(ours, results(lambda x, w: F.rms_norm(x, shape[-1:], w, eps), x, weight))


def test_rms_norm_in_groups() -> None:
    """A weight `[G, W]` norms each group of W by itself."""
    x, weight, eps = normal(5, 2, 3, 7), normal(3, 7, seed=1), 1e-3
    ours = results(lambda x, w: rms_norm(x, w, eps), x, weight)
    assert_close(ours, results(lambda x, w: rms_norm_reference(x, w, eps), x, weight))
    for g in range(3):
        alone = results(lambda x, w: F.rms_norm(x, (7,), w, eps), x[:, :, g], weight[g])
        assert_close([ours[0][:, :, g]], alone[:1])


def test_rms_norm_in_bf16() -> None:
    """Computed wide and rounded once: 2^-8 of each element, and 2^-8 of a gradient's largest."""
    x, weight = normal(37, 129, dtype=torch.bfloat16), normal(129, seed=1, dtype=torch.float32)
    ours = results(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    grad = normal(37, 129, seed=9).bfloat16()
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    out = rms_norm_reference(leaves[0], leaves[1], 1e-5)
    exact = [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]
    assert bool(((ours[0].double() - exact[0]).abs() <= BF16 * exact[0].abs()).all())
    assert_close(ours[1:2], exact[1:2], BF16)
    assert_close(ours[2:], exact[2:], 1e-5)  # summed and kept in fp32


# Activations

OF_TORCH: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda up, gate: F.silu(gate) * up,
    "gelu": lambda up: F.gelu(up),
    "relu2": lambda up: F.relu(up).square(),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_activate(name: str) -> None:
    inputs = [3 * normal(5, 2, 7), 3 * normal(5, 2, 7, seed=1)][: 2 if name == "swiglu" else 1]
    ours, reference = (
        results(lambda up, gate=None, f=f: f(up, gate, name), *inputs)
        for f in (activate, activate_reference)
    )
    assert_close(ours, reference)
    assert_close(ours, results(OF_TORCH[name], *inputs))


def test_loss_without_gradients_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation: one product per chunk, though the weight is a Parameter."""
    calls = []
    monkeypatch.setattr(loss, "product", lambda a, b: calls.append(1) or a @ b.T)
    x, weight = normal(10, 4), torch.nn.Parameter(normal(6, 4, seed=1))
    labels = torch.arange(10) % 6
    with torch.no_grad():
        linear_cross_entropy(x, weight, labels, 5)
    assert len(calls) == 2


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'tanh'"):
        activate(normal(3), None, "tanh")


# Products


@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 3, 13), (3, 2, 2, 9)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, bound: float) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(11, shape[-1], seed=1, dtype=dtype)
    exact = results(F.linear, x.double(), weight.double())
    assert_close(results(linear, x, weight), exact, bound)


def test_linear_of_views_in_fp32() -> None:
    """oneDNN is given any strides: slices, transposes, a gradient that is one number expanded."""
    x, weight = normal(6, 3, 14, dtype=torch.float32), normal(22, 7, seed=1, dtype=torch.float32)
    views = x.transpose(0, 1)[..., ::2], weight[::2]
    exact = results(F.linear, *(v.double() for v in views))
    assert_close(results(linear, *(v for v in views)), exact, 1e-5)
    leaves = [v.detach().requires_grad_() for v in views]
    summed = torch.autograd.grad(linear(*leaves).sum(), leaves)
    wide = [v.double().requires_grad_() for v in leaves]
    assert_close(summed, torch.autograd.grad(F.linear(*wide).sum(), wide), 1e-5)


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
        assert_close([product(a, b)], [a.double() @ b.double().T], 1e-5)
    assert not uses_onednn(a.double())


# Attention


def documents(*rows: Sequence[int]) -> Tensor:
    """Document numbers `[S, B]` of rows given by their documents' lengths."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows], 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attention(heads: int, kv_heads: int, packed: bool) -> None:
    S, B, P = 13, 2, 6
    q, k, v = (
        normal(S, B, h, P, seed=i) for i, h in enumerate((heads, kv_heads, kv_heads), start=1)
    )
    mask = document_mask(documents((5, 1, 7), (13,))) if packed else None
    ours = results(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    assert_close(ours, results(lambda q, k, v: attention_reference(q, k, v, mask), q, k, v))

    def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One head at a time, with the causal document mask as numbers to add."""
        visible = torch.ones(B, S, S, dtype=torch.bool).tril() if mask is None else mask[:, 0]
        bias = torch.zeros(B, S, S, dtype=q.dtype).masked_fill(~visible, -torch.inf)
        heads_of = (
            F.scaled_dot_product_attention(
                q[:, :, h].transpose(0, 1),
                k[:, :, h * kv_heads // heads].transpose(0, 1),
                v[:, :, h * kv_heads // heads].transpose(0, 1),
                bias,
            ).transpose(0, 1)
            for h in range(heads)
        )
        return torch.stack(list(heads_of), dim=2)

    assert_close(ours, results(of_torch, q, k, v))


def test_document_mask() -> None:
    mask = document_mask(documents((2, 3), (4, 1)))
    assert mask.shape == (2, 1, 5, 5)
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert mask[0, 0].int().tolist() == first
    assert mask[1, 0].sum().item() == 4 * 5 // 2 + 1


def test_rotate() -> None:
    """A pair (x_i, x_{i + P/2}) is a complex number, turned by position · theta^(−2i/P)."""
    S, B, H, P, theta = 7, 2, 3, 10, 77.0
    x = normal(S, B, H, P)
    positions = torch.tensor([[0, 3], [1, 4], [2, 0], [3, 1], [4, 2], [0, 3], [1, 900]])

    def turned(x: Tensor) -> Tensor:
        i = torch.arange(P // 2, dtype=torch.float64)
        angle = positions[..., None, None] * theta ** (-2 * i / P)
        z = torch.complex(x[..., : P // 2], x[..., P // 2 :]) * torch.polar(angle * 0 + 1, angle)
        return torch.cat([z.real, z.imag], -1)

    table = rope_table(positions, P, theta, torch.float64)
    assert_close(results(lambda x: rotate(x, table), x), results(turned, x))
    narrow = rope_table(positions, P, theta, torch.bfloat16)
    assert narrow[0].dtype == torch.float32
    rounded = rotate(x.bfloat16(), narrow)
    assert rounded.dtype == torch.bfloat16
    assert_close([rounded], [turned(x.bfloat16().double())], BF16)


# Loss


def labels_of(T: int, V: int, ignored: float) -> Tensor:
    """Labels, a share of them without loss."""
    g = torch.Generator().manual_seed(T)
    labels = torch.randint(V, (T,), generator=g)
    return labels.masked_fill(torch.rand(T, generator=g) < ignored, -100)


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
@pytest.mark.parametrize(("T", "ignored"), [(13, 0.3), (29, 0.0), (5, 1.0), (1, 0.0)])
def test_linear_cross_entropy(T: int, ignored: float, chunk: int) -> None:
    x, weight, labels = normal(T, 7), normal(17, 7, seed=1), labels_of(T, 17, ignored)
    ours = results(lambda x, w: linear_cross_entropy(x, w, labels, chunk), x, weight)
    theirs = results(lambda x, w: linear_cross_entropy_reference(x, w, labels), x, weight)
    assert_close(ours, theirs)

    def by_formula(x: Tensor, w: Tensor) -> Tensor:
        likelihood = F.linear(x, w).softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -likelihood.log().where(labels != -100, 0).sum()

    assert_close(ours, results(by_formula, x, weight))


def test_linear_cross_entropy_of_large_logits() -> None:
    """No overflow, and the loss of a certain token is 0."""
    x = torch.eye(3, dtype=torch.float64)
    assert linear_cross_entropy(x, 1e4 * x, torch.tensor([0, 1, 0]), 2).item() == 1e4


def test_linear_cross_entropy_asks_for_what_it_needs() -> None:
    """A frozen weight or input gets no gradient, the other the right one; and none without grad."""
    x, weight, labels = normal(9, 7), normal(17, 7, seed=1), labels_of(9, 17, 0.3)
    loss, d_x, d_w = results(lambda x, w: linear_cross_entropy(x, w, labels, 4), x, weight)
    seed = normal(seed=9)
    for frozen, right in ((1, d_x), (0, d_w)):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, weight))]
        (linear_cross_entropy(leaves[0], leaves[1], labels, 4) * seed).backward()
        assert leaves[frozen].grad is None
        free = leaves[1 - frozen].grad
        assert free is not None
        assert_close([free], [right])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels, 4), loss)


def test_linear_cross_entropy_in_fp32() -> None:
    x, weight = normal(29, 33, dtype=torch.float32), normal(41, 33, seed=1, dtype=torch.float32)
    labels = labels_of(29, 41, 0.3)
    ours = results(lambda x, w: linear_cross_entropy(x, w, labels, 8), x, weight)
    exact = results(
        lambda x, w: linear_cross_entropy_reference(x, w, labels), x.double(), weight.double()
    )
    assert [t.dtype for t in ours] == [torch.float32] * 3
    assert_close(ours, exact, 1e-5)


def test_linear_cross_entropy_in_bf16() -> None:
    """Logits are rounded to bf16, by at most 2^-9 of each, and a loss changes by at most twice the
    largest change of its logits; gradients pass through two roundings, 1% of the largest."""
    x, weight = normal(61, 33, dtype=torch.bfloat16), normal(41, 33, seed=1, dtype=torch.bfloat16)
    labels = labels_of(61, 41, 0.3)
    ours = results(lambda x, w: linear_cross_entropy(x, w, labels, 8), x, weight)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    exact = results(
        lambda x, w: linear_cross_entropy_reference(x, w, labels), x.double(), weight.double()
    )
    largest = (x.double() @ weight.double().T).abs().max().item()
    valid = int((labels != -100).sum())
    assert abs(ours[0].item() - exact[0].item()) <= valid * 2 * 2**-9 * largest
    assert_close(ours[1:], exact[1:], 1e-2)
