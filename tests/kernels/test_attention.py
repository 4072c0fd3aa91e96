"""Attention with every option: tiles against full scores, and these against other libraries."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import fp64  # before transformers
from shown import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss

from colonnade.kernels import tiles as module
from colonnade.kernels.attention import attention, attention_reference

TABLE = [
    Row("*", "attention sinks", "transformers gpt-oss"),
    Row("*", "soft-capped scores", "transformers Gemma 2"),
]

S, B, P = 13, 2, 6
PACKED = (5, 1, 7), (13,)  # documents' lengths by row
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale": {"scale": 0.7},
    "cap": {"cap": 1.3},
    "sinks": {"sinks": True},
    "clip": {"clip": (-0.05, 1.1)},
    "all": {"cap": 1.3, "sinks": True, "clip": (-0.03, 1.2), "scale": 0.9},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def documents(*rows: Sequence[int]) -> Tensor:
    """Document numbers `[S, B]` of rows given by their documents' lengths."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows], 1)


def tensors(
    heads: int = 4, kv_heads: int = 2, queries: int = S, keys: int = S, values: int = P
) -> dict[str, Tensor]:
    """Scores are spread over about ±4, so that caps, clips and sinks all matter."""
    return {
        "q": 1.5 * normal(queries, B, heads, P, seed=1),
        "k": 1.5 * normal(keys, B, kv_heads, P, seed=2),
        "v": normal(keys, B, kv_heads, values, seed=3),
        "sinks": normal(heads, seed=4),
    }


def results(function: Callable[..., Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The function's output, and the gradients of its product with fixed random numbers."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in named.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), normal(*out.shape, seed=9).to(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def both(named: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results of `attention` and of its reference. sinks=True: with the sinks among `named`."""
    if not options.pop("sinks", False):
        named = {n: t for n, t in named.items() if n != "sinks"}
    ours, theirs = (
        results(lambda q, k, v, sinks=None, f=f: f(q, k, v, sinks=sinks, **options), named)
        for f in (attention, attention_reference)
    )
    return ours, theirs


def visible(rows: Sequence[Sequence[int]], window: int | None) -> Tensor:
    """`[B, S, S]`, element by element: not later, within the window, in the same document."""
    mask = torch.zeros(len(rows), S, S, dtype=torch.bool)
    for b, lengths in enumerate(rows):
        start = 0
        for length in lengths:
            for query in range(start, start + length):
                for key in range(start, query + 1):
                    mask[b, query, key] = window is None or query - key < window
            start += length
    return mask


# Tiles against the reference


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", [None, 1, 3, 5, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed: bool, window: int | None, option: str) -> None:
    """Heads, widths of values and numbers of queries within."""
    rows = documents(*PACKED) if packed else None
    for heads, kv_heads in ((4, 4), (4, 2), (3, 1)):
        for queries, values in ((S, P), (S, 9), (6, 4), (1, P), (1, 4)):
            named = tensors(heads, kv_heads, queries, values=values)
            ours, theirs = both(named, documents=rows, window=window, **OPTIONS[option])
            assert ours["out"].shape == (queries, B, heads, values)
            assert_equal(ours, theirs, 1e-12)


@pytest.mark.parametrize("block", [1, 3, 12, 13, 256])
def test_any_block(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    for option in ("none", "all"):
        for window in (None, 3):
            options = {"documents": documents(*PACKED), "window": window, **OPTIONS[option]}
            assert_equal(*both(tensors(), **options), 1e-12)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_fewer_queries_than_keys(packed: bool, window: int | None, option: str) -> None:
    """The queries are those of the last positions: the last rows of the full result."""
    named = tensors()
    sinks = named.pop("sinks")
    options = {"documents": documents(*PACKED) if packed else None, "window": window}
    options |= OPTIONS[option] | ({"sinks": sinks} if OPTIONS[option].get("sinks") else {})
    full = attention(**named, **options)
    for queries in (1, 2, 5, 12):
        tail = attention(named["q"][-queries:], named["k"], named["v"], **options)
        assert_equal({"": tail}, {"": full[-queries:]}, 1e-12)


def test_packed_documents_equal_separate_ones() -> None:
    named = tensors()
    packed = attention(named["q"], named["k"], named["v"], documents=documents(*PACKED))
    for start, end in ((0, 5), (5, 6), (6, 13)):
        separate = attention(*(named[n][start:end] for n in "qkv"))
        assert_equal({"": packed[start:end, :1]}, {"": separate[:, :1]}, 1e-12)


# The reference against others


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("rows", [((13,), (13,)), PACKED])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_reference_against_torch(
    heads: int, kv_heads: int, rows: Sequence[Sequence[int]], window: int | None
) -> None:
    """One head at a time, with the mask as numbers to add."""
    bias = torch.zeros(B, S, S, dtype=torch.float64)
    bias = bias.masked_fill(~visible(rows, window), -torch.inf)
    named = tensors(heads, kv_heads, values=4)
    del named["sinks"]

    def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_heads = (
            F.scaled_dot_product_attention(
                q[:, :, h].transpose(0, 1),
                k[:, :, h * kv_heads // heads].transpose(0, 1),
                v[:, :, h * kv_heads // heads].transpose(0, 1),
                bias,
            ).transpose(0, 1)
            for h in range(heads)
        )
        return torch.stack(list(of_heads), dim=2)

    options = {"documents": documents(*rows) if rows is PACKED else None, "window": window}
    ours = results(lambda q, k, v: attention_reference(q, k, v, **options), named)
    assert_equal(ours, results(of_torch, named), 1e-12)


@pytest.mark.parametrize("rows", [((13,), (13,)), PACKED])
@pytest.mark.parametrize("model", ["gpt-oss", "gemma2"])
def test_reference_against_transformers(model: str, rows: Sequence[Sequence[int]]) -> None:
    """gpt-oss has sinks, Gemma 2 soft-capping; windows are in their masks."""
    bias = torch.zeros(B, 1, S, S, dtype=torch.float64)
    bias = bias.masked_fill(~visible(rows, 4)[:, None], -torch.inf)

    def theirs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        layer = SimpleNamespace(num_key_value_groups=2, training=False, sinks=sinks)
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        with fp64():
            if model == "gpt-oss":
                out, _ = gpt_oss.eager_attention_forward(layer, *heads_first, bias, 0.4)
            else:
                out, _ = gemma2.eager_attention_forward(
                    layer, *heads_first, bias, scaling=0.4, softcap=1.3
                )
        return out.transpose(0, 1)

    named = tensors()
    if model == "gemma2":
        del named["sinks"]
    options: dict[str, Any] = {"documents": documents(*rows), "window": 4, "scale": 0.4}
    options |= {"cap": 1.3} if model == "gemma2" else {}
    for function in (attention_reference, attention):
        ours = results(lambda q, k, v, f=function, **s: f(q, k, v, **s, **options), named)
        assert_equal(ours, results(theirs, named), 1e-12)


def test_clipped_weights() -> None:
    """With the identity as values the output is the weights: compared with the paper's formula."""
    gamma, zeta = -0.1, 1.3
    named = tensors(heads=4, kv_heads=4)
    identity = torch.eye(S, dtype=torch.float64)[:, None, None].expand(S, B, 4, S)
    softmax = attention_reference(named["q"], named["k"], identity)
    expected = ((zeta - gamma) * softmax + gamma).clip(0, 1)
    assert (expected == 1).any()
    assert ((expected == 0) & (softmax > 0)).any()
    assert ((expected > 0) & (expected < 1)).any()
    for function in (attention_reference, attention):
        weights = function(named["q"], named["k"], identity, clip=(gamma, zeta))
        assert_equal({"": weights}, {"": expected}, 1e-12)


# Memory and cost


class CreatedElements(TorchDispatchMode):
    """Counts the elements of every tensor that an operator returns, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.numel())
                self.total += leaf.numel()
        return result


def footprint(length: int, **options: Any) -> tuple[int, int, int]:
    """Elements: saved for backward, of the largest tensor created, and created in total."""
    q, k, v = (normal(length, 1, 2, 2, seed=i).requires_grad_() for i in range(3))
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with CreatedElements() as created:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = attention(q, k, v, **options)
        out.backward(torch.ones_like(out))
    return sum(saved.values()), created.largest, created.total


@pytest.mark.parametrize("option", [n for n in OPTIONS if n != "sinks"])
def test_windows_are_linear(option: str) -> None:
    """Twice the sequence: twice the saved memory and the work, except for slices at its start."""
    for packed in (False, True):
        short, long = (
            footprint(
                n,
                window=16,
                documents=torch.arange(n)[:, None] // 10 if packed else None,
                **{n: o for n, o in OPTIONS[option].items() if n != "sinks"},
            )
            for n in (128, 256)
        )
        assert 0 < long[0] <= 2 * short[0]
        assert long[1] <= 2 * short[1]
        assert long[2] <= 2.1 * short[2]


@pytest.mark.parametrize("option", ["none", "cap"])
def test_memory_is_never_quadratic(option: str) -> None:
    """Without a window each block of queries sees all earlier keys, but one block at a time."""
    n = 256
    rows = torch.arange(n)[:, None] // 10
    saved, largest, _ = footprint(n, documents=rows, **OPTIONS[option])
    assert saved <= 4 * n * 2 * 2 + 2 * n  # inputs, output, and one number a query and head
    assert largest <= 2 * module.BLOCK * n  # one block's scores of two heads


def test_generation_is_one_fused_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single query takes only the keys of its window, and a mask only with documents; query heads
    of one key head are its queries, so that keys are not repeated."""
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        masked = options.get("attn_mask") is not None
        calls.append((k.shape[1:3], q.shape[2], options.get("is_causal", False), masked))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    named = tensors(queries=1)
    for window in (None, 5, 40):
        attention(named["q"], named["k"], named["v"], window=window)
    attention(*(tensors()[n] for n in "qkv"), window=13)
    rows = torch.arange(13)[:, None].expand(-1, named["q"].shape[1]) // 8
    attention(named["q"], named["k"], named["v"], documents=rows)
    groups, heads = named["k"].shape[2], named["q"].shape[2]
    one = [((groups, n), heads // groups, False, False) for n in (13, 5, 13)]
    of_all = ((groups, 13), 13, True, False)
    assert calls == [*one, of_all, ((groups, 13), heads // groups, False, True)]


# Precision


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-7)])
def test_narrow(dtype: torch.dtype, bound: float, option: str) -> None:
    """bf16: weights and output are rounded, 2^-9 each, and gradients pass through two more."""
    options = {"documents": documents(*PACKED), "window": 9, **OPTIONS[option]}
    with_sinks = options.pop("sinks", False)
    named = {n: t.to(dtype) for n, t in tensors().items() if n != "sinks" or with_sinks}
    exact = results(
        lambda **t: attention_reference(**t, **options), {n: t.double() for n, t in named.items()}
    )
    ours = results(lambda **t: attention(**t, **options), named)
    assert {t.dtype for t in ours.values()} == {dtype}
    assert_equal(ours, exact, bound, of_all=0.0)
    reference = results(lambda **t: attention_reference(**t, **options), named)
    assert_equal(reference, exact, bound, of_all=0.0)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_extreme_inputs_stay_finite(dtype: torch.dtype, option: str) -> None:
    for factor in (0.0, 1e4):
        named = {n: (factor * t).to(dtype) for n, t in tensors().items()}
        options = {**OPTIONS[option], "documents": documents(*PACKED)}
        if not options.pop("sinks", False):
            del named["sinks"]
        ours = results(lambda _o=options, **t: attention(**t, **_o), named)
        assert all(t.isfinite().all() for t in ours.values())


# Autograd and compilers


def test_frozen_inputs_get_no_gradient() -> None:
    named = tensors()
    options = {"documents": documents(*PACKED), "cap": 2.0}
    exact = results(lambda **t: attention_reference(**t, **options), named)
    for frozen in named:
        leaves = {n: t.clone().requires_grad_(n != frozen) for n, t in named.items()}
        attention(**leaves, **options).backward(normal(S, B, 4, P, seed=9))
        assert leaves[frozen].grad is None
        grads = {n: t.grad for n, t in leaves.items() if t.grad is not None}
        assert_equal(grads, {n: exact[n] for n in grads}, 1e-12)


def test_recomputation_and_no_grad() -> None:
    named = tensors()
    options = {"documents": documents(*PACKED), "window": 5}
    plain = results(lambda **t: attention(**t, **options), named)

    def recomputed(**t: Tensor) -> Tensor:
        return checkpoint(lambda: attention(**t, **options) * 1.0, use_reentrant=False)

    assert_equal(results(recomputed, named), plain, 1e-15)
    with torch.no_grad():
        assert torch.equal(attention(**named, **options), plain["out"])


@pytest.mark.parametrize("option", ["none", "all"])
def test_compiled(option: str) -> None:
    """Code around attention is compiled, with its gradients; the loop over tiles is not traced."""
    options = {k: o for k, o in OPTIONS[option].items() if k != "sinks"}

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out = attention(2 * q, k, v, sinks=sinks, documents=documents(*PACKED), **options)
        return out.sin()

    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager")
    assert_equal(results(compiled, tensors()), results(function, tensors()), 1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (14, {}, "14 queries for 13 keys"),
        (S, {"window": 0}, "window 0"),
        (S, {"clip": (0.1, 1.0)}, r"clip \(0.1, 1.0\)"),
        (S, {"clip": (-0.1, 0.9)}, r"clip \(-0.1, 0.9\)"),
    ],
)
def test_refused(queries: int, options: dict[str, Any], message: str) -> None:
    named = tensors(queries=queries)
    for function in (attention, attention_reference):
        with pytest.raises(ValueError, match=message):
            function(named["q"], named["k"], named["v"], **options)
