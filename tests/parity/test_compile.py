"""Compiled halves against eager ones: every symbol, with recomputation and FSDP2, and the message
without a compiler."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from small import V, config_of, model_of
from test_data_parallel import Trace, compare, recipe_for, reference, trained
from torch import Tensor
from torch._dynamo.utils import counters

from colonnade.launcher.cluster.doctor import doctor
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.train.run import train
from colonnade.models.cache import Cache
from colonnade.models.config import CARDS
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.parallel.parallelize import compile_halves
from colonnade.parallel.passes import evaluating
from colonnade.parallel.recompute import recompute

AOT_EAGER = functools.partial(torch.compile, backend="aot_eager")


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Each test compiles from scratch; where Dynamo would fall back to eager, it raises."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def results(
    model: Decoder, seed: int, shape: tuple[int, int] = (23, 2), packed: bool = True
) -> dict[str, Tensor]:
    """Objective, gradients, loads and states of a step on random tokens; `shape` is (S, B)."""
    S, B = shape
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    position = torch.arange(S)[:, None]
    start = torch.randint(1, S, (B,), generator=g) if packed else torch.full((B,), S)
    document = (position >= start).int()  # the second one starts there
    samples = torch.arange(B) + 10 * seed
    documents = document if packed else None
    context = Context(
        position - document * start, documents, groups=2.0, rng_key=seed, samples=samples
    )
    model.begin_step()
    model.zero_grad()
    loss, report = model(tokens, context, labels)
    loss.backward()
    extras = {f"extra {name}": value for name, value in report.extras.items()}
    outputs = {"loss": loss.detach(), **extras}
    outputs |= {f"loads {index}": load for index, load in report.loads.items()}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        outputs[name] = p.grad.clone()
    return outputs | {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs the graphs as they are: for what depends on the graphs alone, without the time
    that a C++ compiler takes."""
    monkeypatch.setattr(torch, "compile", AOT_EAGER)


def pair(dtype: torch.dtype, pattern: str, **fields: Any) -> tuple[Decoder, Decoder]:
    """The same model twice, the first compiled."""
    config = config_of(pattern, balance=0.1, router_z=0.01, **fields)
    compiled, eager = (model_of(config, seed=1).to(dtype) for _ in range(2))
    compile_halves(compiled)
    return compiled, eager


def graphs() -> int:
    """How many graphs have been compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def checked(compiled: Decoder, eager: Decoder, seed: int, *args: Any, **kwargs: Any) -> int:
    """Compares a step, and returns how many graphs have been compiled."""
    assert_equal(results(compiled, seed, *args, **kwargs), results(eager, seed, *args, **kwargs))
    return graphs()


# Every symbol, some at two positions of the row; then options that act inside of halves.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention, MLP, experts": (
        "*-E*T-", {"window": 5, "full_attention": (1,), "residual": "ladder", "shared_ffn": 5,
                   "rope_scaling": "yarn", "rope_factor": 4.0, "attention_gate": "channel",
                   "qk_norm": "head"},
    ),
    "recurrent": ("MmSDGM", {}),
    "latent, polynomials, σReparam, muP": (
        "*-", {"attention": "mla", "kv_rank": 5, "rope_dim": 4, "q_rank": 7, "value_dim": 4,
               "norm": "pre_rms", "activation": "polynorm", "sigma_reparam": True, "mtp": 1,
               "mup_base": {"hidden": 6, "ffn": 5}},
    ),
}  # fmt: skip


def test_every_symbol_is_compiled() -> None:
    assert set(CARDS) <= set("".join(pattern for pattern, _ in MODELS.values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager(name: str) -> None:
    """Equal in fp64; the graphs of the first step serve all others."""
    pattern, fields = MODELS[name]
    compiled, eager = pair(torch.float64, pattern, **fields)
    count = checked(compiled, eager, 0)
    assert count >= 2 * len(set(pattern) - {"T"})  # whose halves compute nothing but seams
    assert [checked(compiled, eager, seed) for seed in range(1, 5)] == [count] * 4


@pytest.mark.slow
def test_shapes_and_kinds_of_rows() -> None:
    """A second shape compiles every graph once more, then for all others; as do unpacked rows."""
    compiled, eager = pair(torch.float64, "M*", window=5)
    first = checked(compiled, eager, 0)
    second = checked(compiled, eager, 1, (17, 3))
    assert second <= 2 * first
    assert checked(compiled, eager, 2, (11, 4)) == checked(compiled, eager, 3) == second
    assert checked(compiled, eager, 4, packed=False) <= second + first


def test_single_precision_within_rounding() -> None:
    """fp32, where oneDNN may serve the products: 1e-4 of each tensor's largest element."""
    compiled, eager = pair(torch.float32, "*-", window=5)
    exact = pair(torch.float64, "*-", window=5)[1]
    for seed in range(2):
        wanted = results(exact, seed)
        for model in (compiled, eager):
            assert_equal(results(model, seed), wanted, 1e-4, of_all=1e-6)
    assert graphs() >= 4


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "selective"])
def test_recomputation(traced: None, policy: str) -> None:
    """Backward runs the graph of the forward pass again, or the saved tensors would differ."""
    compiled, eager = pair(torch.float64, "*-*", sigma_reparam=True)
    recompute(compiled, policy)
    for seed in range(2):
        checked(compiled, eager, seed)


def test_in_evaluation_nothing_is_compiled() -> None:
    """Validation and generation run uncompiled: same bits, and no graph for each cached length."""
    compiled, eager = pair(torch.float64, "*-MG")
    tokens = torch.randint(V, (4, 2))
    positions = torch.arange(4)[:, None].expand(4, 2)
    with evaluating(compiled), evaluating(eager):
        for cached in (False, True):
            contexts = [Context(positions, cache=Cache() if cached else None) for _ in range(2)]
            assert torch.equal(compiled(tokens, contexts[0]), eager(tokens, contexts[1]))
    assert graphs() == 0


def compiled_ranks(rank: int, size: int, recipe: Recipe) -> tuple[Trace, int]:
    """As `trained`, and how many graphs were compiled."""
    torch.compiler.reset()
    counters.clear()
    return trained(rank, size, recipe), graphs()


def traced_ranks(rank: int, size: int, recipe: Recipe) -> tuple[Trace, int]:
    """The same without a C++ compiler."""
    with patch.object(torch, "compile", AOT_EAGER):
        return compiled_ranks(rank, size, recipe)


@pytest.mark.slow
def test_sharded(ranks1: Ranks, ranks2: Ranks) -> None:
    """FSDP2 all-gathers weights in hooks around the graphs."""
    fields: dict[str, Any] = {"residual": "ladder", "sigma_reparam": True}
    expected = reference(ranks1, recipe_for("*-", {}, 8, **fields))
    recipe = recipe_for("*-", {}, 4, recompute="block", **fields)
    compiling = recipe.train.model_copy(update={"compile": True})
    recipe = recipe.model_copy(update={"train": compiling})
    ran = ranks2.run(compiled_ranks, recipe)
    compare(ran[0][0], expected)
    assert min(graph_count for _, graph_count in ran) >= 4


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "sequence": False},
        {"tp": 2, "sequence": True},
        {"cp": 2},
        {"pp": 2, "schedule": "interleaved"},
    ],
    ids=str,
)
def test_between_ranks(ranks1: Ranks, ranks2: Ranks, layout: dict[str, Any]) -> None:
    """Graphs do not wait for asynchronous collectives: the wait comes before they begin."""
    fields: dict[str, Any] = {"vocab": 64, "ffn": 48, "activation": "polynorm", "mamba_groups": 1}
    fields["residual"] = "ladder"
    expected = reference(ranks1, recipe_for("M-mE", {}, 16, **fields))
    recipe = recipe_for("M-mE", layout, 8, **fields)
    compiling = recipe.train.model_copy(update={"compile": True})
    recipe = recipe.model_copy(update={"train": compiling})
    ran = ranks2.run(traced_ranks, recipe)
    compare(ran[0][0], expected)
    counts = [graph_count for _, graph_count in ran]
    # Stages have a part of the sub-blocks each, other ranks all of them.
    assert (sum(counts) if "pp" in layout else min(counts)) >= 8, counts


def test_no_compiler_is_one_message(tmp_path: Path) -> None:
    recipe = Recipe(train=TrainConfig(compile=True, device="cpu", steps=1))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"train\.compile = True: no C\+\+ compiler: install"):
            train(recipe, runs=tmp_path)
        assert "no C++ compiler" in doctor()["train.compile"]
    assert not list(tmp_path.iterdir())
    assert doctor()["train.compile"].startswith("yes")
