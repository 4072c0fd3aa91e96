"""The wiring of a row of sub-blocks: its recursion, recomputation, packed documents."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import empty, gradients, randomise
from shown import Row
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.kernels.norm import rms_norm_reference
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.recompute import recompute as recompute_model

S, B, V = 23, 2, 31
WIRINGS = ["standard", "ladder"]


def config_of(pattern: str, residual: Any = "standard", **more: Any) -> ModelConfig:
    """Returns a config with small, odd widths and two balancing losses."""
    return ModelConfig(
        pattern=pattern, residual=residual, vocab=V, hidden=12, heads=4, kv_heads=2, head_dim=6,
        ffn=11, mamba_heads=4, mamba_head_dim=3, mamba_state=5, mamba_groups=2, mamba_chunk=8,
        mamba1_inner=10, mamba1_rank=3, mamba1_chunk=8, s4d_inner=10, s4d_state=3, s4d_chunk=8,
        delta_heads=4, delta_key_dim=3,
        delta_value_dim=5, delta_key_heads=2, delta_chunk=8,
        experts=5, top_k=2, expert_ffn=7, **({"balance": 0.5, "router_z": 0.1} | more),
    )  # fmt: skip


def model_of(config: ModelConfig, seed: int) -> Decoder:
    """Builds a model in fp64 with random weights."""
    model = empty(config)
    randomise(model, seed)
    return model


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and labels, `[S, B]`, some labels without loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def context() -> Context:
    """Returns the context in which each row is one document, with three balance groups."""
    return Context(torch.arange(S)[:, None].expand(S, B), groups=3.0)


# The recursion of the stream


Output = Callable[[int, Tensor], Tensor]  # the output of sub-block t for a stream


def by_index(r0: Tensor, h: Output, n: int) -> Tensor:
    """Computes ladder over all n sub-blocks by its recursion over indices."""
    r: list[Tensor] = [r0, r0]
    added: list[Tensor] = []
    for t in range(n):
        if t >= 2:
            r.append(r[t - 1] + added[t - 2])
        added.append(h(t, r[t]))
    return r[n - 1] + torch.stack(added[-2:]).sum(0)


def by_layer(r0: Tensor, h: Output, n: int, ladder_layers: int) -> Tensor:
    """Computes layers of two sub-blocks, with ladder over the last `ladder_layers`.

    Between layers H is the stream, and P the stream without the newest output.
    """
    P = H = r0
    for layer in range(n // 2):
        ladder = layer >= n // 2 - ladder_layers
        A = H + h(2 * layer, P if ladder else H)
        P, H = A, A + h(2 * layer + 1, H if ladder else A)
    return H


def side_by_side(r0: Tensor, h: Output, n: int) -> Tensor:
    """Computes layers of two sub-blocks that read the same stream."""
    for t in range(0, n, 2):
        r0 = r0 + h(t, r0) + h(t + 1, r0)
    return r0


def one_by_one(r0: Tensor, h: Output, n: int) -> Tensor:
    """Computes the standard residual."""
    for t in range(n):
        r0 = r0 + h(t, r0)
    return r0


def final_stream(config: ModelConfig, r0: Tensor, h: Output) -> Tensor:
    """Returns the stream after the last sub-block."""
    n = len(config.symbols)
    if config.residual == "standard":
        return one_by_one(r0, h, n)
    if config.residual == "parallel":
        return side_by_side(r0, h, n)
    if config.ladder_last is None:
        return by_index(r0, h, n)
    assert config.ladder_last % 2 == 0
    return by_layer(r0, h, n, config.ladder_last // 2)


def written_out(
    model: Decoder, context: Context, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """Computes the model's summed loss with its sub-blocks, but without its wiring.

    Also returns the balancing losses by index.
    """
    wiring, config, weights = model.wiring, model.config, dict(model.named_parameters())
    terms: dict[int, Tensor] = {}

    def norm(name: str, x: Tensor) -> Tensor:
        name = f"{name}.weight"
        return rms_norm_reference(x, weights[name], config.norm_eps) if name in weights else x

    def h(t: int, r: Tensor) -> Tensor:
        block, at_t = wiring.block(t), context.at(t)
        x = wiring.enter(norm(f"norms.{t}", r))
        carried = block.begin(x, at_t)
        if (report := block.report(carried)) is not None:
            terms[t] = report.term
        return norm(f"after.{t}", wiring.leave(block.receive(block.finish(carried, at_t))))

    x = final_stream(config, weights["embedding.weight"][tokens], h)
    logits = norm("final", x) @ weights["head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), terms


RESIDUALS: dict[str, dict[str, Any]] = {
    "standard": {},
    "ladder": {"residual": "ladder"},
    "ladder-last-0": {"residual": "ladder", "ladder_last": 0},
    "ladder-last-2": {"residual": "ladder", "ladder_last": 2},
    "ladder-last-4": {"residual": "ladder", "ladder_last": 4},
    "parallel": {"residual": "parallel"},
}


TABLE = [Row("any row", f"{name} wiring", "its recursion written out") for name in RESIDUALS]


def check_wiring(pattern: str, recompute: str, **fields: Any) -> None:
    """Compares loss, balancing losses and gradients, with scaling functions at both seams."""
    model = model_of(config_of(pattern, **fields), seed=len(pattern))
    model.wiring.enter, model.wiring.leave = lambda x: 1.5 * x, lambda h: 0.7 * h
    reference = copy.deepcopy(model)
    recompute_model(model, recompute)
    tokens, labels = data(4)

    loss, ours = model(tokens, context(), labels)
    expected, theirs = written_out(reference, context(), tokens, labels)
    loss.backward()
    expected.backward()
    assert list(ours.terms) == [t for t, s in enumerate(model.config.symbols) if s == "E"]
    assert_equal(
        {"loss": loss.detach()} | {str(t): term for t, term in ours.terms.items()},
        {"loss": expected.detach()} | {str(t): term for t, term in theirs.items()},
    )
    assert_equal(gradients(model), gradients(reference))


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("pattern", ["*-*-", "M-*E", "*-", "mEG-D-"])
def test_wiring_is_its_recursion(pattern: str, residual: str, recompute: str) -> None:
    fields = RESIDUALS[residual]
    if fields.get("ladder_last", 0) <= len(pattern):
        check_wiring(pattern, recompute, **fields)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("residual", ["standard", "ladder"])
@pytest.mark.parametrize("pattern", ["M", "*E-"])
def test_rows_of_odd_length(pattern: str, residual: str, recompute: str) -> None:
    check_wiring(pattern, recompute, residual=residual)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel"])
@pytest.mark.parametrize("position", ["after", "both"])
def test_norms_behind_sub_blocks(position: str, residual: str, recompute: str) -> None:
    check_wiring("*-M-", recompute, residual=residual, norm_position=position)


@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel"])
@pytest.mark.parametrize("position", ["before", "both"])
def test_norms_behind_sub_blocks_of_some_kinds(position: str, residual: str) -> None:
    config = config_of("-*-M-", residual, norm_position=position, norm_after="*")
    assert config.norm_positions(config.symbols) == [position, *["after"] * 2, *[position] * 2]
    fields = {"residual": residual, "norm_position": position, "norm_after": "*"}
    check_wiring("*-M-", "block", **fields)
    if residual != "parallel":  # whose recursion here has layers of two
        check_wiring("-*-M", "none", **fields)


def test_ladder_of_no_sub_block_has_the_bits_of_standard() -> None:
    tokens, labels = data(5)
    results = []
    for fields in ({}, {"residual": "ladder", "ladder_last": 0}):
        model = model_of(config_of("M-*E", **fields), 5)
        loss, _ = model(tokens, context(), labels)
        loss.backward()
        results.append([loss.detach(), *gradients(model).values()])
    assert all(map(torch.equal, *results))


def test_wirings_differ_from_the_second_sub_block_on() -> None:
    tokens, _ = data(5)
    for pattern, same in (("*", True), ("*-", False)):
        standard, ladder = (model_of(config_of(pattern, w), 5)(tokens, context()) for w in WIRINGS)
        assert torch.equal(standard, ladder) == same


# Recomputation


class _Products(TorchDispatchMode):
    """Counts the matrix products that run."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (
            torch.ops.aten.mm.default,
            torch.ops.mkldnn._linear_pointwise.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", WIRINGS)
def test_recomputed_bits_are_the_same(residual: str, dtype: torch.dtype) -> None:
    """`block` recomputes every product, `selective` none; neither changes a bit."""
    tokens, labels = data(6)
    results: dict[str, tuple[int, list[Tensor]]] = {}
    for name in ("none", "block", "selective"):
        model = model_of(config_of("M-*E", residual), seed=6).to(dtype)
        recompute_model(model, name)
        loss, report = model(tokens, context(), labels)
        with _Products() as products:
            loss.backward()
        tensors = [loss.detach(), *report.terms.values(), *(p.grad for p in model.parameters())]
        results[name] = products.count, tensors
    for name in ("block", "selective"):
        assert all(map(torch.equal, results[name][1], results["none"][1])), name
    assert results["selective"][0] == results["none"][0] < results["block"][0]


def test_no_balancing_terms_in_evaluation() -> None:
    tokens, labels = data(7)
    model = model_of(config_of("*E", "standard"), 7).eval()
    assert model(tokens, context(), labels)[1] == ({}, {}, {})


# Packed documents

LENGTHS = ((9, 2, 1, 11), (17, 6))  # of the documents in each row; some shorter than a convolution


PACKED = ["*-", "M-", "*E", "M-*E", "m-", "S-", "D-", "G-"]
TABLE += [Row("packed documents", f"`{pattern}`", "the documents one by one") for pattern in PACKED]


@pytest.mark.parametrize("residual", WIRINGS)
@pytest.mark.parametrize("pattern", PACKED)
def test_packed_documents_are_alone(pattern: str, residual: str) -> None:
    """Logits, loss and gradients of packed rows equal those of each document in its own row."""
    model = model_of(config_of(pattern, residual, balance=0.0, router_z=0.0), seed=8)
    unpacked = copy.deepcopy(model)
    tokens, labels = data(8)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS], 1)
    documents = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS], 1
    )
    model(tokens, Context(positions, documents), labels)[0].backward()
    with torch.no_grad():
        packed = model(tokens, Context(positions, documents))
        merged = model(tokens, Context(positions))
    assert (packed - merged).abs().max() > 1e-3  # the documents do matter

    for b, row in enumerate(LENGTHS):
        start = 0
        for length in row:
            span = slice(start, start + length), slice(b, b + 1)
            start += length
            one_document = Context(torch.arange(length)[:, None])
            unpacked(tokens[span], one_document, labels[span])[0].backward()
            with torch.no_grad():
                expected = unpacked(tokens[span], one_document)
                assert_equal({"logits": packed[span]}, {"logits": expected})
    assert_equal(gradients(model), gradients(unpacked))
