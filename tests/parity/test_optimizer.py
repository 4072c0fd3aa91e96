"""Muon against PyTorch's own, and over shards against one process."""

from typing import Any

import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from small import config_of, model_of
from test_data_parallel import Trace, compare, recipe_for, trained
from torch.optim import Muon as TorchMuon
from torch.optim import _muon

from colonnade.launcher.recipe.tables import OptimizerConfig, Recipe
from colonnade.models.parameter_module import declared
from colonnade.parallel.optimizer import Muon, build_optimizer

MUON = OptimizerConfig(name="muon", momentum=0.9, weight_decay=0.2)


def unrounded_newton_schulz(grad: torch.Tensor, *options: Any) -> torch.Tensor:
    """PyTorch's iteration without its rounding to bf16."""
    a, b, c = options[0]
    tall = grad.size(0) > grad.size(1)
    x = grad.T if tall else grad
    x = x / x.norm().clamp(min=options[2])
    for _ in range(options[1]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def test_muon_is_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every matrix of the row, over several steps: to 1e-9 where torch's rounding to bf16 within
    is taken out, and to that rounding where ours multiplies in bf16 as well."""
    for rounded in (False, True):
        model = model_of(config_of("*-M", tied=False), seed=3).double()
        ours = Muon(model, MUON, torch.bfloat16 if rounded else torch.float64)
        theirs = {p.name: p.parameter.detach().clone() for p in ours.matrices}
        reference = TorchMuon(
            list(theirs.values()), lr=1.0, weight_decay=0.2, momentum=0.9,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        if not rounded:
            monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", unrounded_newton_schulz)
        g = torch.Generator().manual_seed(0)
        for step in range(4):
            for name, parameter, _ in declared(model):
                grad = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
                parameter.grad = grad
                if name in theirs:
                    theirs[name].grad = grad.clone()
            lr = 0.01 * (step + 1)
            reference.param_groups[0]["lr"] = lr
            ours.step(lr)
            reference.step()
        monkeypatch.undo()
        updated = {p.name: p.parameter.detach() for p in ours.matrices}
        assert len(updated) == 13
        assert_equal(updated, theirs, 2e-2 if rounded else 1e-9)


def test_adamw_updates_all_other_parameters() -> None:
    model = model_of(config_of("*EmG", tied=False), seed=3)
    muon = build_optimizer(model, MUON)
    assert isinstance(muon, Muon)
    by_adamw = {p.name for p in muon.adamw.named}
    assert {"embedding.weight", "head.weight", "final.weight"} < by_adamw
    assert not any("conv" in p.name or "norm" in p.name for p in muon.matrices)
    both = by_adamw | {p.name for p in muon.matrices}
    assert both == {name for name, _ in model.named_parameters()}
    state = muon.named_state()
    assert {name.rpartition(".")[0] for name in state} == both
    muon.resume(7, {"embedding.weight": 3})
    assert muon.updates == 7
    steps = {name: int(muon.adamw.torch.state[p]["step"]) for name, p, _ in muon.adamw.named}
    assert steps.pop("embedding.weight") == 4
    assert set(steps.values()) == {7}


LAYOUTS = [{"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"cp": 2, "tp": 2}]
EXPERTS = [
    {"ep": 2},
    {"ep": 4},
    {"ep": 2, "tp": 2},
    {"ep": 2, "tp": 2, "etp": 1},
    {"ep": 2, "etp": 2},
]
PATTERNS: dict[str, dict[str, Any]] = {
    "*-ME": {"vocab": 64, "experts": 4},
    "mG*-": {"vocab": 64, "residual": "ladder"},
}


def with_muon(recipe: Recipe) -> Recipe:
    update = {"name": "muon", "momentum": 0.9}
    optimizer = OptimizerConfig(**(recipe.optimizer.model_dump(exclude_unset=True) | update))
    return recipe.model_copy(update={"optimizer": optimizer})


@pytest.mark.parametrize("pattern", PATTERNS)
def test_layouts_equal_one_process(ranks1: Ranks, ranks4: Ranks, pattern: str) -> None:
    fields = PATTERNS[pattern]

    def run(ranks: Ranks, layout: dict[str, int], micro: int) -> Trace:
        return ranks.run(trained, with_muon(recipe_for(pattern, layout, micro, **fields)))[0]

    expected = run(ranks1, {}, 16)
    for layout in LAYOUTS + (EXPERTS if "E" in pattern else []):
        inner = layout.get("tp", 1) * layout.get("cp", 1)
        compare(run(ranks4, layout, 8 * inner // 4), expected)


def test_fifty_steps(ranks1: Ranks, ranks4: Ranks) -> None:
    """Rounding of each step carries over to the next, and after fifty is still within the bound."""

    def run(ranks: Ranks, layout: dict[str, int], micro: int) -> Trace:
        recipe = with_muon(recipe_for("*-", layout, micro, vocab=64))
        train = recipe.train.model_copy(update={"steps": 50})
        return ranks.run(trained, recipe.model_copy(update={"train": train}))[0]

    compare(run(ranks4, {"dp_shard": 2, "tp": 2}, 8), run(ranks1, {}, 16))
