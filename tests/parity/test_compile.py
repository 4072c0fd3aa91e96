"""Compiled halves against eager ones: every symbol, with recomputation and FSDP2; no compiler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from small import V, config_of, model_of
from test_data_parallel import Trace, compare, recipe_for, trained
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
from colonnade.parallel.engine import evaluating
from colonnade.parallel.parallelize import compile_halves
from colonnade.parallel.recompute import recompute


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Each test compiles anew, and where Dynamo would give up and run eagerly it raises."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def results(
    model: Decoder, seed: int, shape: tuple[int, int] = (23, 2), packed: bool = True
) -> dict[str, Tensor]:
    """What a step on random tokens finds: objective, gradients, loads, states; shape [S, B]."""
    S, B = shape
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    place = torch.arange(S)[:, None]
    cut = torch.randint(1, S, (B,), generator=g) if packed else torch.full((B,), S)
    later = (place >= cut).int()
    samples = torch.arange(B) + 10 * seed
    context = Context(
        place - later * cut, later if packed else None, groups=2.0, rng_key=seed, samples=samples
    )
    model.begin_step()
    model.zero_grad()
    loss, report = model(tokens, context, labels)
    loss.backward()
    extras = {f"extra {name}": value for name, value in report.extras.items()}
    found = {"loss": loss.detach(), **extras}
    found |= {f"loads {place}": load for place, load in report.loads.items()}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        found[name] = p.grad.clone()
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def pair(dtype: torch.dtype, pattern: str, **fields: Any) -> tuple[Decoder, Decoder]:
    """The same model twice, the first compiled."""
    config = config_of(pattern, balance=0.1, router_z=0.01, **fields)
    compiled, eager = (model_of(config, seed=1).to(dtype) for _ in range(2))
    compile_halves(compiled)
    return compiled, eager


def graphs() -> int:
    """How many graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def checked(compiled: Decoder, eager: Decoder, seed: int, *args: Any, **kwargs: Any) -> int:
    """Compare a step; returns how many graphs there are by now."""
    found = results(compiled, seed, *args, **kwargs)
    assert_equal(found, results(eager, seed, *args, **kwargs))
    return graphs()


# Every symbol, some at two places of the row; then options that are seen inside of halves.
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
    """In fp64, and what is compiled in the first step serves the others."""
    pattern, fields = MODELS[name]
    compiled, eager = pair(torch.float64, pattern, **fields)
    once = checked(compiled, eager, 0)
    assert once >= 2 * len(set(pattern))
    assert [checked(compiled, eager, seed) for seed in range(1, 5)] == [once] * 4


@pytest.mark.slow
def test_shapes_and_kinds_of_rows() -> None:
    """A second shape compiles every graph once more, then for all others; as do unpacked rows."""
    compiled, eager = pair(torch.float64, "M*", window=5)
    once = checked(compiled, eager, 0)
    twice = checked(compiled, eager, 1, (17, 3))
    assert twice <= 2 * once
    assert checked(compiled, eager, 2, (11, 4)) == checked(compiled, eager, 3) == twice
    assert checked(compiled, eager, 4, packed=False) <= twice + once


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
def test_recomputation(policy: str) -> None:
    """The graph that runs again in backward is the forward pass's, or checkpoints would not fit."""
    compiled, eager = pair(torch.float64, "*-*", sigma_reparam=True)
    recompute(compiled, policy)
    for seed in range(2):
        checked(compiled, eager, seed)


def test_in_evaluation_nothing_is_compiled() -> None:
    """Validation and generation run as they are: same bits, no graph for each cached length."""
    compiled, eager = pair(torch.float64, "*-MG")
    tokens = torch.randint(V, (4, 2))
    positions = torch.arange(4)[:, None].expand(4, 2)
    with evaluating(compiled), evaluating(eager):
        for keeps in (False, True):
            contexts = [Context(positions, cache=Cache() if keeps else None) for _ in range(2)]
            assert torch.equal(compiled(tokens, contexts[0]), eager(tokens, contexts[1]))
    assert graphs() == 0


def compiled_ranks(rank: int, size: int, recipe: Recipe) -> tuple[Trace, int]:
    """As `trained`, and how many graphs there were."""
    torch.compiler.reset()
    counters.clear()
    return trained(rank, size, recipe), graphs()


@pytest.mark.slow
def test_sharded(ranks1: Ranks, ranks2: Ranks) -> None:
    """FSDP2 gathers weights in hooks around the graphs."""
    fields: dict[str, Any] = {"residual": "ladder", "sigma_reparam": True}
    alone = ranks1.run(trained, recipe_for("*-", {}, 8, **fields))[0]
    recipe = recipe_for("*-", {}, 4, recompute="block", **fields)
    compiling = recipe.train.model_copy(update={"compile": True})
    recipe = recipe.model_copy(update={"train": compiling})
    for trace, count in ranks2.run(compiled_ranks, recipe):
        compare(trace, alone)
        assert count >= 4


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "sequence": False}, {"tp": 2, "sequence": True}, {"cp": 2}], ids=str
)
def test_between_ranks(ranks1: Ranks, ranks2: Ranks, layout: dict[str, Any]) -> None:
    """Graphs do not wait for what is under way between ranks: it arrives before they begin."""
    fields: dict[str, Any] = {"vocab": 64, "ffn": 48, "activation": "polynorm", "mamba_groups": 1}
    fields["residual"] = "ladder"
    alone = ranks1.run(trained, recipe_for("M-mE", {}, 16, **fields))[0]
    recipe = recipe_for("M-mE", layout, 8, **fields)
    compiling = recipe.train.model_copy(update={"compile": True})
    recipe = recipe.model_copy(update={"train": compiling})
    for trace, count in ranks2.run(compiled_ranks, recipe):
        compare(trace, alone)
        assert count >= 8


def test_no_compiler_is_one_message(tmp_path: Path) -> None:
    recipe = Recipe(train=TrainConfig(compile=True, device="cpu", steps=1))
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        with pytest.raises(UserError, match=r"train\.compile = True: no C\+\+ compiler: install"):
            train(recipe, runs=tmp_path)
        assert "no C++ compiler" in doctor()["train.compile"]
    assert not list(tmp_path.iterdir())
    assert doctor()["train.compile"].startswith("yes")
