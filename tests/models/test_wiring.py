"""The row of sub-blocks: its recursion, recomputation, packed documents, first weights."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import empty, gradients, randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.kernels.norm import rms_norm_reference
from colonnade.models.blocks import SubBlock
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.part import constant, normal
from colonnade.parallel import materialise as materialise_module
from colonnade.parallel.materialise import fill_shard, materialise
from colonnade.parallel.recompute import recompute_policy

S, B, V = 23, 2, 31
WIRINGS = ["standard", "ladder"]


def config_of(pattern: str, residual: Any, **more: Any) -> ModelConfig:
    """Small and odd, with both balancing terms on."""
    return ModelConfig(
        pattern=pattern, residual=residual, vocab=V, hidden=12, heads=4, kv_heads=2, head_dim=6,
        ffn=11, mamba_heads=4, mamba_head_dim=3, mamba_state=5, mamba_groups=2, mamba_chunk=8,
        experts=5, top_k=2, expert_ffn=7, **({"balance": 0.5, "router_z": 0.1} | more),
    )  # fmt: skip


def model_of(config: ModelConfig, seed: int) -> Decoder:
    """In fp64, with random weights."""
    model = empty(config)
    randomise(model, seed)
    return model


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, `[S, B]`, some labels without loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def context() -> Context:
    """Whole rows, three balance groups in the batch."""
    return Context(torch.arange(S)[:, None].expand(S, B), groups=3.0)


# What the wiring computes


def final_stream(residual: str, r0: Tensor, h: Callable[[int, Tensor], Tensor], n: int) -> Tensor:
    """The stream after n sub-blocks, by index; h(t, r) is what sub-block t makes of stream r."""
    if residual == "standard":
        for t in range(n):
            r0 = r0 + h(t, r0)
        return r0
    r: list[Tensor] = [r0, r0]
    added: list[Tensor] = []
    for t in range(n):
        if t >= 2:
            r.append(r[t - 1] + added[t - 2])
        added.append(h(t, r[t]))
    return r[n - 1] + torch.stack(added[-2:]).sum(0)


def written_out(model: Decoder, context: Context, tokens: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of the model with its own sub-blocks, all between them written out here."""
    wiring, eps, weights = model.wiring, model.config.norm_eps, dict(model.named_parameters())

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm_reference(x, weights[f"wiring.{name}.weight"], eps)

    def h(t: int, r: Tensor) -> Tensor:
        block = wiring.blocks[t]
        assert isinstance(block, SubBlock)
        x = wiring.enter(norm(f"norms.{t}", r))
        return wiring.leave(block.finish(block.begin(x, context), context))

    embedding = weights["embedding.weight"][tokens]
    x = final_stream(model.config.residual, embedding, h, len(wiring.blocks))
    logits = norm("final", x) @ weights["head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("residual", WIRINGS)
@pytest.mark.parametrize("pattern", ["*-*-", "M-*E", "*E-", "M", "*-"])
def test_wiring_is_its_recursion(pattern: str, residual: str, recompute: str) -> None:
    """Loss, balancing terms and gradients; seams that are not the identity act once each."""
    model = model_of(config_of(pattern, residual), seed=len(pattern))
    model.wiring.enter, model.wiring.leave = lambda x: 1.5 * x, lambda h: 0.7 * h
    reference = copy.deepcopy(model)
    model.wiring.recompute = recompute_policy(recompute)
    tokens, labels = data(4)

    ours, theirs = context(), context()
    loss, expected = model(tokens, ours, labels), written_out(reference, theirs, tokens, labels)
    loss.backward()
    expected.backward()
    assert list(ours.terms) == [t for t, s in enumerate(pattern) if s == "E"]
    assert_equal(
        {"loss": loss.detach()} | {str(t): term for t, term in ours.terms.items()},
        {"loss": expected.detach()} | {str(t): term for t, term in theirs.terms.items()},
    )
    assert_equal(gradients(model), gradients(reference))


def test_wirings_differ_from_the_second_sub_block_on() -> None:
    tokens, _ = data(5)
    for pattern, same in (("*", True), ("*-", False)):
        standard, ladder = (model_of(config_of(pattern, w), 5)(tokens, context()) for w in WIRINGS)
        assert torch.equal(standard, ladder) == same


# Recomputation


class _Products(TorchDispatchMode):
    """Counts matrix products."""

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
    """`block` makes every product again, `selective` none; neither changes a bit."""
    tokens, labels = data(6)
    found: dict[str, tuple[int, list[Tensor]]] = {}
    for name in ("none", "block", "selective"):
        model = model_of(config_of("M-*E", residual), seed=6).to(dtype)
        model.wiring.recompute = recompute_policy(name)
        passed = context()
        loss = model(tokens, passed, labels)
        with _Products() as products:
            loss.backward()
        tensors = [loss.detach(), *passed.terms.values(), *(p.grad for p in model.parameters())]
        found[name] = products.count, tensors
    for name in ("block", "selective"):
        assert all(map(torch.equal, found[name][1], found["none"][1])), name
    assert found["selective"][0] == found["none"][0] < found["block"][0]


def test_no_balancing_terms_without_gradients() -> None:
    tokens, labels = data(7)
    passed = context()
    with torch.no_grad():
        model_of(config_of("*E", "standard"), 7)(tokens, passed, labels)
    assert not passed.terms


# Packed documents

LENGTHS = ((9, 2, 1, 11), (17, 6))  # of the documents in each row; some shorter than a convolution


@pytest.mark.parametrize("residual", WIRINGS)
@pytest.mark.parametrize("pattern", ["*-", "M-", "*E", "M-*E"])
def test_packed_documents_are_alone(pattern: str, residual: str) -> None:
    """Logits, loss and gradients of packed rows are those of the documents one by one."""
    model = model_of(config_of(pattern, residual, balance=0.0, router_z=0.0), seed=8)
    alone = copy.deepcopy(model)
    tokens, labels = data(8)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS], 1)
    documents = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS], 1
    )
    model(tokens, Context(positions, documents), labels).backward()
    with torch.no_grad():
        packed = model(tokens, Context(positions, documents))
        merged = model(tokens, Context(positions))
    assert (packed - merged).abs().max() > 1e-3  # the documents do matter

    for b, row in enumerate(LENGTHS):
        start = 0
        for length in row:
            part = slice(start, start + length), slice(b, b + 1)
            start += length
            here = Context(torch.arange(length)[:, None])
            alone(tokens[part], here, labels[part]).backward()
            with torch.no_grad():
                assert_equal({"logits": packed[part]}, {"logits": alone(tokens[part], here)})
    assert_equal(gradients(model), gradients(alone))


# First weights


def first_distribution(name: str, layers: int, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """The distribution function a parameter must have: Mamba's from its paper, others by std."""
    role = name.split(".")[-1]
    if role == "A_log":  # A ~ U(1, 16)
        return lambda t: (t.exp() - 1) / 15
    if role == "dt_bias":  # softplus is log-uniform in [0.001, 0.1]
        return lambda t: (F.softplus(t).log() - math.log(1e-3)) / math.log(100)
    if role.startswith("conv_"):  # U(± 1/sqrt(width))
        return lambda t: (t * config.mamba_conv**0.5 + 1) / 2
    std = config.init_std / (layers**0.5 if role in ("out", "down") else 1)
    return lambda t: torch.special.ndtr(t / std)


def test_first_weights_have_their_distribution() -> None:
    """By Kolmogorov and Smirnov's statistic, at 1 in 10 000; norms and D are 1."""
    config = config_of("M-*E", "standard", init_std=0.05).model_copy(
        update={"hidden": 32, "mamba_heads": 1024, "mamba_conv": 3, "repeat": 2, "ffn": 33}
    )
    with torch.device("meta"):
        model = Decoder(config)
    materialise(model, torch.device("cpu"), seed=9)
    for name, p in model.named_parameters():
        flat = p.detach().double().flatten()
        if "norm" in name or "final" in name or name.endswith(".D"):
            assert bool((flat == 1).all()), name
            continue
        uniform = first_distribution(name, 8, config)(flat).sort().values
        n = len(uniform)
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = torch.maximum(steps[1:] - uniform, uniform - steps[:-1]).max().item()
        assert distance < 2.23 / n**0.5, f"{name}: {distance} with {n} elements"


def test_first_weights_are_a_function_of_seed_and_name() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        model = empty(config_of("**", "standard"))
        materialise(model, torch.device("cpu"), seed)
        return {n: p.detach() for n, p in model.named_parameters() if "norm" not in n}

    one, again, other = weights(1), weights(1), weights(2)
    del one["wiring.final.weight"]
    flat = [t.flatten()[:16] for t in one.values()] + [other[n].flatten()[:16] for n in one]
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert len({tuple((t / t[0]).tolist()) for t in flat}) == len(flat)  # no two alike, nor scaled


@pytest.mark.parametrize("block", [1, 10, 64, 1 << 16])
def test_any_shard_is_the_slice_of_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For random shapes and shards of one to three dimensions, in fp32 and fp64."""
    monkeypatch.setattr(materialise_module, "BLOCK", block)
    g = torch.Generator().manual_seed(block)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    for case in range(150):
        shape = tuple(draw(1, 9) for _ in range(1 + case % 3))
        offset = tuple(draw(0, n) for n in shape)  # some shards are empty
        size = tuple(draw(0, n - o) for n, o in zip(shape, offset, strict=True))
        whole, shard = torch.empty(shape), torch.full(size, math.nan, dtype=torch.float64)
        fill_shard(whole, shape, (0,) * len(shape), normal(1.0), f"7/{case}")
        fill_shard(shard, shape, offset, normal(1.0), f"7/{case}")
        part = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        assert torch.equal(whole[part].double(), shard), (shape, offset, size)
        assert whole.unique().numel() == whole.numel()  # no block repeats another


def test_a_shard_of_a_large_parameter() -> None:
    """With the true block size, which this parameter exceeds several times."""
    shape, offset, size = (700, 3, 111), (303, 1, 5), (290, 2, 100)
    whole, shard = torch.empty(shape), torch.empty(size)
    fill_shard(whole, shape, (0, 0, 0), normal(1.0), "1/w")
    fill_shard(shard, shape, offset, normal(1.0), "1/w")
    assert torch.equal(whole[303:593, 1:3, 5:105], shard)
    fill_shard(shard, shape, offset, constant(3.0), "1/w")
    assert bool((shard == 3).all())
