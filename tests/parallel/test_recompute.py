"""Recomputation of halves that interleave: what it saves, recomputes and frees."""

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from equal import assert_equal
from oracle import gradients
from small import B, S, config_of, context, data, model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from colonnade.models.blocks.base import SubBlock
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.wiring import Halves
from colonnade.parallel.recompute import recompute

PATTERN = "*EM-"


class Live(TorchDispatchMode):
    """Counts the bytes of live tensors made under this mode, their peak, and matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.now = self.peak = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **kwargs or {})
        self.operators += func is torch.ops.aten.mm.default
        for leaf in tree_leaves(outputs):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in self.storages:
                self.storages[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def freed(self, size: int) -> None:
        self.now -= size


def built(name: str, pattern: str = PATTERN, **fields: Any) -> Decoder:
    """A model with this recomputation."""
    model = model_of(config_of(pattern, balance=0.1, router_z=0.1, **fields), 1)
    recompute(model, name)
    return model


def blocks(model: Decoder, indices: Iterable[int]) -> list[Halves]:
    """New halves of some sub-blocks."""
    wiring = model.wiring
    return [wiring.halves(wiring.block(t), context(groups=2.0).at(t)) for t in indices]


def inputs(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    drawn = torch.randn(count, S, B, 12, generator=g, dtype=torch.float64)
    return [x.clone().requires_grad_() for x in drawn]


def interleaved(model: Decoder) -> dict[str, Tensor]:
    """All first halves, then all second ones and the ends, each in another order."""
    order = [2, 0, 3, 1]
    halves, xs = blocks(model, range(4)), inputs(4)
    carried = [half.first(x) for half, x in zip(halves, xs, strict=True)]
    sent = {t: halves[t].second(carried[t]) for t in order}
    out = {t: halves[t].receive(sent[t]) for t in reversed(order)}
    del carried, sent
    sum((out[t] * out[t]).sum() for t in range(4)).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    outputs = {f"out {t}": out[t].detach() for t in order}
    return outputs | grads | {f"x {t}": x.grad for t, x in enumerate(xs) if x.grad is not None}


@pytest.mark.parametrize("name", ["block", "selective"])
def test_halves_may_interleave(name: str) -> None:
    results, expected = (interleaved(built(which)) for which in (name, "none"))
    assert results.keys() == expected.keys()
    assert len(results) > 20
    assert all(torch.equal(results[n], expected[n]) for n in results)


def run_block(model: Decoder, t: int = 0) -> tuple[Tensor, Tensor, weakref.ref[Any]]:
    """Sub-block t's input and output, and a weak reference to its frame."""
    (half,), (x,) = blocks(model, [t]), inputs(1)
    frame = weakref.ref(getattr(half, "frame", half))
    return x, half.receive(half.second(half.first(x))), frame


def test_backward_runs_halves_once_and_as_far_as_needed() -> None:
    """The last of attention's four matrix products is not recomputed: nothing is saved after it."""
    counts = []
    for name in ("none", "block"):
        _, out, _ = run_block(built(name, "*"))
        with Live() as live:
            out.sum().backward()
        counts.append(live.operators)
    assert counts[1] == counts[0] + 3


@pytest.mark.parametrize("t", range(4))
def test_frames_are_freed(t: int) -> None:
    """Backward frees a frame, as does dropping its graph, without the garbage collector."""
    model = built("block")
    run_block(model, t)[1].sum().backward()
    gc.collect()
    gc.disable()
    try:
        _, out, frame = run_block(model, t)
        assert frame() is not None
        del out
        assert frame() is None
        _, out, frame = run_block(model, t)
        out.sum().backward()
        assert frame() is None
    finally:
        gc.enable()


def test_a_retained_graph_is_differentiated_again() -> None:
    """`block` recomputes everything once more; `selective` returns what it saved only once, and
    raises."""
    x, out, _ = run_block(built("block"))
    one, two = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)
    x, out, _ = run_block(built("selective"))
    torch.autograd.grad(out.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(out.sum(), x)


def test_partial_backward_before_the_full_one() -> None:
    """Gradients of one parameter, and then of all, are equal to those without recomputation."""
    model, plain = built("block"), built("none")
    grads = []
    for which in (model, plain):
        _, out, _ = run_block(which)
        weight = which.wiring.block(0).second.out
        (grad,) = torch.autograd.grad(out.sum(), weight, retain_graph=True)
        out.sum().backward()
        assert weight.grad is not None
        grads.append({"one parameter": grad, "all": weight.grad})
    assert_equal(*grads)


def test_without_gradients_nothing_is_saved() -> None:
    model = built("selective")
    with torch.no_grad():
        assert type(blocks(model, [0])[0]) is Halves


def change_recomputation(block: SubBlock, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the input of the first half from its second call on."""
    begin, calls = block.begin, []

    def changed(x: Tensor, context: Context) -> Any:
        calls.append(x)
        return begin(x if len(calls) == 1 else change(x), context)

    block.begin = changed  # type: ignore[method-assign]


@pytest.mark.parametrize(("change", "message"), [
    (lambda x: x[:5], r"saved tensor \d+ of sub-block 0 was .*23.* and is .*5"),
    (lambda x: x.detach(), r"sub-block 0 saved \d+ tensors, and \d+ in backward|was .* and is"),
])  # fmt: skip
def test_a_different_recomputation_is_an_error(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    model = built("block", "-")
    for p in model.wiring.block(0).first.parameters():
        p.requires_grad_(False)  # so that a detached input saves nothing
    change_recomputation(model.wiring.block(0), change)
    _, out, _ = run_block(model)
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()


class Checkpointed(Halves):
    """Both halves in one checkpoint of PyTorch's, where they cannot interleave."""

    def first(self, x: Tensor) -> Tensor:
        return x

    def second(self, carried: Tensor) -> Tensor:
        run = partial(both, self.block, self.context)
        return checkpoint(run, carried, use_reentrant=False)


def both(block: SubBlock, context: Context, x: Tensor) -> Tensor:
    return block(x, context)


def memory(model: Decoder) -> tuple[int, int]:
    """Bytes that live after a forward pass, and the peak in forward and backward."""
    tokens, labels = data(3)
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        gc.collect()
        with Live() as live:
            objective, _ = model(tokens, context(), labels)
            saved = live.now
            objective.backward()
    return saved, live.peak


@pytest.mark.parametrize("residual", ["standard", "ladder"])
def test_memory_is_that_of_pytorchs_checkpoint(residual: str) -> None:
    fields = {"pattern": "*-M-", "residual": residual, "repeat": 2}
    ours, theirs = built("block", **fields), built("none", **fields)
    theirs.wiring.halves = Checkpointed
    ours_saved, ours_peak = memory(ours)
    saved, peak = memory(theirs)
    assert ours_saved <= saved
    assert ours_peak <= peak
    assert ours_saved < 0.5 * memory(built("none", **fields))[0]


@pytest.mark.parametrize("name", ["block", "selective"])
def test_model(name: str) -> None:
    """A model with ladder and every symbol."""
    tokens, labels = data(4)
    results = []
    for which in (name, "none"):
        model = built(which, "*-EMmDGT", residual="ladder", sigma_reparam=True)
        model(tokens, context(), labels)[0].backward()
        results.append(gradients(model))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[1])
