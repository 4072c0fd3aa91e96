"""Shrunk recipes: valid under the layouts of the full ones, and equal to them except for widths."""

from typing import Any

import pytest

from colonnade.launcher.recipe.load import load_recipe, recipe_names
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import explicit_fields
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.cases import Case, with_case
from colonnade.launcher.verify.cover import all_layouts
from colonnade.launcher.verify.layouts import accumulated, parse_layout, with_layout
from colonnade.launcher.verify.shrink import EPS, in_one_process, on_case, shrink
from colonnade.models.config import FACTS, ModelConfig
from colonnade.models.shapes import measure
from colonnade.parallel.config import ParallelConfig

WIDE = dict(vocab=1024, hidden=512, heads=16, ffn=1536)
OPTIONS: dict[str, dict[str, Any]] = {
    "slices per head": dict(
        pattern="*-", attention_gate="head", kv_heads=4, rope_fraction=0.25, qk_norm="full"
    ),
    "windows": dict(
        pattern="*-", repeat=12, window=128, full_attention=(5, 11), residual="ladder",
        ladder_last=20,
    ),
    "windows in the first half": dict(
        pattern="*-", repeat=4, window=128, full_attention=(0, 1), unrotated=(2, 3),
        window_rope_theta=100.0,
    ),
    "ntk": dict(pattern="*-", rope_scaling="ntk", rope_factor=4.0),
    "yarn, latent": dict(
        pattern="*-", attention="mla", q_rank=96, kv_rank=64, rope_dim=32, value_dim=48,
        rope_scaling="yarn", rope_factor=8.0, rope_mscale_all=1.0,
    ),
    "odd heads, no positions": dict(pattern="*-", head_dim=33, positions="none"),
    "mixers": dict(
        pattern="MmSDG-", mamba_groups=4, delta_key_heads=4, delta_value_dim=128, mamba_state=64
    ),
    "experts": dict(
        pattern="*E-", repeat=6, share=True, experts=32, top_k=6, expert_ffn=96, shared_ffn=192,
        shared_gate=True, router_groups=8, router_top_groups=4, balance_samples=2, capacity=1.5,
    ),
    "further tokens, THOR": dict(pattern="*T", mtp=2, mtp_pattern="*-", tied=True, logit_z=0.1),
    "muP": dict(
        pattern="*MmSDG-E", expert_ffn=96, mup_base=dict(hidden=128, ffn=384, heads=4),
    ),
    "muP, slices per head": dict(
        pattern="*-", attention_gate="head", mup_base=dict(hidden=128, heads=4), repeat=3
    ),
    "muP, from a larger base": dict(pattern="*-", mup_base=dict(ffn=3072, head_dim=64)),
}  # fmt: skip


CONTEXTS: dict[str, dict[str, Any]] = {
    "heads exchanged": dict(cp=2, context="ulysses", recurrence="heads"),
    "heads exchanged in a ring": dict(cp=4, context="ring+ulysses", recurrence="heads"),
    "two of ranks in a ring": dict(cp=8, context="ring+ulysses", ulysses=2),
}
# Shrinking chooses a batch and a row that are valid under all layouts.
CHOSEN = {"train.global_batch", "train.seq_len", "train.micro_batch"}
SOME: dict[str, tuple[object, ...]] = {
    "etp": ("tp", 1), "sequence": (True, False), "schedule": ("1f1b", "zbv")
}  # fmt: skip


def recipe_of(fields: dict[str, Any]) -> Recipe:
    model = dict(WIDE) if "*" in fields["pattern"] else {"vocab": 1024, "hidden": 512, "ffn": 1536}
    tables = {"model": model | fields, "train": {"global_batch": 64, "micro_batch": 2}}
    tables["data"] = {"tokenizer": "bytes"}
    tables["optimizer"] = {"warmup": 5, "min_lr": 1e-5, "beta1": 0.8, "clip": 0.0}
    return Recipe.model_validate(tables)


def cases_of(recipe: Recipe, ranks: int) -> list[Case]:
    """Every set of axes, with some of the options; others are the recipe's."""
    return [Case(layout) for layout in all_layouts(recipe, ranks, SOME)]


RECIPES = {name: load_recipe(name) for name in recipe_names()}
RECIPES |= {name: recipe_of(fields) for name, fields in OPTIONS.items()}
HYBRID = recipe_of(dict(pattern="*MmSDG-", mamba_groups=4, delta_key_heads=4, kv_heads=4))
RECIPES |= {
    name: HYBRID.model_copy(update={"parallel": ParallelConfig.model_validate(parallel)})
    for name, parallel in CONTEXTS.items()
}


@pytest.mark.parametrize("ranks", [2, 4, 6, 16])
@pytest.mark.parametrize("name", RECIPES)
def test_a_layout_fits_both_or_neither(name: str, ranks: int) -> None:
    recipe = RECIPES[name]
    assert not validate(recipe, None)
    cases = cases_of(recipe, ranks)
    small = shrink(recipe, ranks, cases)
    assert not validate(in_one_process(small), 1)
    valid = 0
    for case in cases:
        large = {f.field for f in validate(with_case(recipe, case), ranks)}
        faults = validate(on_case(small, ranks, case, "fp32"), ranks)
        assert bool(faults) == bool(large - CHOSEN), (str(case), faults)
        valid += not faults
    assert valid >= len([case for case in cases if not {"tp", "cp", "pp"} & case.layout.keys()])


@pytest.mark.parametrize("name", RECIPES)
def test_everything_but_widths_stays(name: str) -> None:
    large = RECIPES[name]
    small = shrink(large, 4, [Case({"tp": 4})])
    may_change = {"init_std", "mup_base", "repeat", "full_attention", "unrotated", "ladder_last"}
    for field, known in FACTS.items():
        if field in may_change or known.kind in ("width", "length") or large.model.unused(field):
            continue
        assert getattr(small.model, field) == getattr(large.model, field), field
    assert len(small.model.symbols) == len(large.model.pattern) * min(2, large.model.repeat)
    assert bool(small.model.full_attention) == bool(large.model.full_attention)
    assert (small.model.mup_base is None) == (large.model.mup_base is None)
    for field in ("name", "beta1", "beta2", "weight_decay"):
        assert getattr(small.optimizer, field) == getattr(large.optimizer, field)
    assert small.optimizer.eps == EPS
    assert bool(small.optimizer.clip) == bool(large.optimizer.clip)
    assert small.train.recompute == large.train.recompute
    assert measure(small.model, small.train.seq_len).parameters < 2e6


def test_base_of_mup_differs_by_a_factor_of_2() -> None:
    small = shrink(RECIPES["muP"], 4, [Case({"tp": 4})]).model
    base = small.base()
    assert base is not None
    assert small.mup_base is not None
    assert base.heads == 4
    for width in ("hidden", "ffn", "mamba1_inner"):
        assert small.mup_base[width] * 2 == getattr(small, width)
    assert {"mamba_heads", "delta_heads"} < small.mup_base.keys()
    larger = shrink(RECIPES["muP, from a larger base"], 4, [Case({"tp": 4})]).model
    assert larger.mup_base == {"ffn": 2 * larger.ffn, "head_dim": 2 * (larger.head_dim or 0)}


def test_fields_of_a_subclass_stay() -> None:
    class Later(ModelConfig):
        future: int = 0

    model = Later(pattern="*-", future=3)
    small = shrink(Recipe().model_copy(update={"model": model}), 2, [Case({"tp": 2})])
    assert getattr(small.model, "future", None) == 3


def test_batches_accumulate_on_every_layout() -> None:
    """Two micro-batches, or those of a pipeline, of complete balance groups on every data rank."""
    recipe = RECIPES["experts"]
    cases = cases_of(recipe, 8)
    small = shrink(recipe, 8, cases)
    for case in cases:
        placed = on_case(small, 8, case, "fp64")
        train, p = placed.train, placed.parallel
        count = accumulated(placed)
        assert count == (p.pp if p.pp > 2 else 2)
        assert train.global_batch == count * train.micro_batch * (8 // p.tp // p.cp // p.pp)
        assert train.micro_batch % recipe.model.balance_samples == 0
    assert in_one_process(small).train.micro_batch == small.train.global_batch


def test_fields_other_than_degrees_stay_under_a_layout() -> None:
    """`parallel.sequence` of the recipe stays unless the layout gives it, or it has no effect."""
    recipe = load_recipe("quickstart", ["parallel.sequence=false", "parallel.tp=2"])
    small = shrink(recipe, 4, [Case({"tp": 4}), Case({"dp_shard": 4})])
    assert not on_case(small, 4, Case({"tp": 4}), "fp64").parallel.sequence
    assert on_case(small, 4, Case({"tp": 4, "sequence": True}), "fp64").parallel.sequence
    for other in (on_case(small, 4, Case({"dp_shard": 4}), "fp64"), in_one_process(small)):
        assert other.parallel.tp == 1
        assert "sequence" not in other.parallel.model_fields_set


def test_fields_without_effect_under_an_option_go() -> None:
    fields = ["train.recompute=block", "train.offload_inputs=true"]
    recipe = load_recipe("quickstart", [*fields, "optimizer.offload=interleaved"])
    cases = {
        text: Case.parse(text) for text in ("dp_shard=2", "recompute=selective", "recompute=none")
    }
    small = shrink(recipe, 2, cases.values())
    placed = {text: on_case(small, 2, case, "fp64") for text, case in cases.items()}
    assert all(validate(recipe, 2) == [] for recipe in placed.values())
    offloads = {text: recipe.train.offload_inputs for text, recipe in placed.items()}
    assert offloads == {"dp_shard=2": True, "recompute=selective": True, "recompute=none": False}
    for recipe in (placed["recompute=none"], in_one_process(small)):
        assert "offload_inputs" not in recipe.train.model_fields_set
    margin = load_recipe("quickstart", ["optimizer.offload=interleaved", "optimizer.margin=1"])
    assert validate(with_case(margin, Case.parse("offload=host")), 2) == []


@pytest.mark.parametrize(
    ("layouts", "model", "tokens"),
    [
        ([{"tp": 8}, {"dp_shard": 8}], {}, 16),
        ([{"tp": 4, "dp_shard": 2}], {"mamba_conv": 40}, 16),  # rows are not split
        ([{"cp": 2, "dp_shard": 4}], {}, 16),
        ([{"cp": 8}, {"cp": 2, "tp": 4}], {}, 64),
        ([{"cp": 4, "tp": 2}, {"dp_shard": 8}], {"attention_conv": 9}, 64),
        ([{"cp": 8, "zigzag": False, "context": "ulysses"}], {"mamba_conv": 9}, 128),
    ],
)
def test_a_row_is_as_long_as_its_segments_need(
    layouts: list[dict[str, object]], model: dict[str, int], tokens: int
) -> None:
    recipe = recipe_of({"pattern": "*M", **model})
    small = shrink(recipe, 8, map(Case, layouts))
    assert small.train.seq_len == tokens
    for layout in layouts:
        assert not validate(on_case(small, 8, Case(layout), "fp64"), 8)


def test_context_fields_stay_under_a_layout() -> None:
    """`parallel.ulysses` is no degree. Fields of the layout override; fields without effect go."""
    recipe = RECIPES["two of ranks in a ring"]

    def given_under(layout: str) -> dict[str, object]:
        return dict(explicit_fields(with_layout(recipe, parse_layout(layout)).parallel))

    assert given_under("cp=4") == {"cp": 4, "context": "ring+ulysses", "ulysses": 2}
    named = {"cp": 4, "tp": 2, "context": "ulysses"}
    assert given_under("cp=4,tp=2,context=ulysses") == named
    assert not validate(with_layout(recipe, named), 8)
    assert given_under("dp_shard=8") == {"dp_shard": 8}
    assert dict(explicit_fields(in_one_process(shrink(recipe, 8, [Case(named)])).parallel)) == {}
    heads = with_layout(RECIPES["heads exchanged"], {"cp": 8, "recurrence": "states"}).parallel
    assert (heads.context, heads.recurrence) == ("ulysses", "states")
