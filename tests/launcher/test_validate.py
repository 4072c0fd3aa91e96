"""What is valid: every rule and every setting without effect, failing and mended."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from colonnade.launcher.effects import EFFECTS
from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.load import dump_recipe, load_recipe
from colonnade.launcher.recipe import Recipe
from colonnade.launcher.validate import RULES, validate

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]


# Rules: name, overrides, ranks, the field named, an override from the remedy that mends it

RULE_CASES: list[tuple[str, str, int | None, str, str]] = [
    ("symbols", "model.pattern=*Z-", None, "model.pattern", "model.pattern=*-"),
    ("grouped_queries", "model.heads=8 model.kv_heads=3", None, "model.kv_heads", "{f}=4"),
    ("grouped_queries", "model.heads=4 model.kv_heads=8", None, "model.kv_heads", "{f}=4"),
    ("head_width", "model.hidden=96 model.heads=5", None, "model.heads", "model.heads=6"),
    ("head_width", "model.head_dim=15", None, "model.head_dim", "model.head_dim=16"),
    ("head_width", "model.hidden=12", None, "model.head_dim", "model.positions=none"),
    ("mamba_groups", "model.pattern=M model.mamba_head_dim=48", None,
     "model.mamba_head_dim", "{f}=32"),
    ("mamba_groups", "model.pattern=M model.mamba_groups=3", None, "model.mamba_groups", "{f}=4"),
    ("mamba_groups", "model.pattern=M model.mamba_heads=6 model.mamba_groups=4", None,
     "model.mamba_groups", "{f}=3"),
    ("routing", "model.pattern=E model.experts=4 model.top_k=5", None, "model.top_k", "{f}=4"),
    ("balance_groups", "model.pattern=E model.balance_samples=3", None,
     "model.balance_samples", "{f}=4"),
    ("ranks", "train.global_batch=32 parallel.dp_replicate=3", 4,
     "parallel.dp_replicate", "{f}=2"),
    ("ranks", "train.global_batch=32 parallel.dp_replicate=8", 4,
     "parallel.dp_replicate", "{f}=4"),
    ("ranks", "parallel.dp_shard=2", 1, "parallel.dp_shard", "{f}=1"),
    ("batch", "train.global_batch=20", None, "train.global_batch", "{f}=24"),
    ("batch", "train.global_batch=40", 2, "train.global_batch", "{f}=48"),
    ("batch", "train.global_batch=40", 2, "train.global_batch", "train.micro_batch=10"),
    ("ramp", "train.ramp_steps=5", None, "train.ramp_batch", "train.ramp_steps=0"),
    ("ramp", "train.ramp_batch=8", None, "train.ramp_steps", "train.ramp_steps=5"),
    ("ramp", "train.global_batch=64 train.ramp_batch=24 train.ramp_steps=5", 1,
     "train.ramp_batch", "{f}=32"),
    ("ramp", "train.global_batch=64 train.ramp_batch=8 train.ramp_steps=5", 2,
     "train.ramp_batch", "{f}=16"),
    ("ramp", "train.ramp_batch=16 train.ramp_steps=5", 1, "train.ramp_batch", "{f}=8"),
    ("ramp_length", "train.steps=9 train.ramp_batch=8 train.ramp_steps=10", 1,
     "train.ramp_steps", "{f}=9"),
    ("schedule", "train.steps=9 optimizer.warmup=10", None, "optimizer.warmup", "{f}=9"),
    ("schedule", "optimizer.schedule=wsd", None, "optimizer.decay", "{f}=100"),
    ("schedule", "optimizer.schedule=wsd optimizer.warmup=60 optimizer.decay=41", None,
     "optimizer.decay", "{f}=40"),
    ("decayed_rate", "optimizer.lr=1e-3 optimizer.min_lr=2e-3", None,
     "optimizer.min_lr", "{f}=0.001"),
    ("source_paths", "data.sources.0.format=jsonl", None, "data.sources.0.path", "{f}=a.jsonl"),
    ("vocabulary", "model.vocab=256", None, "model.vocab", "{f}=257"),
    ("sampling", "data.sources.0.format=tokens data.sources.0.path=a model.vocab=1000 "
     "train.sample=9", None, "train.sample", "data.tokenizer=tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "ranks", "field", "mend"), RULE_CASES)
def test_a_rule(
    faults: Faults, name: str, overrides: str, ranks: int | None, field: str, mend: str
) -> None:
    (fault,) = faults(*overrides.split(), world_size=ranks)
    assert fault.field == field
    mend = mend.format(f=field)
    assert mend.partition("=")[0] in fault.remedy or field == mend.partition("=")[0]
    assert faults(*overrides.split(), mend, world_size=ranks) == []


def test_every_rule_has_a_case() -> None:
    assert {check.__name__ for _, check in RULES} == {case[0] for case in RULE_CASES}


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ("model.heads=8 model.kv_heads=3", None, "one of 1, 2, 4, 8"),
        ("model.pattern=*Z-Q", None, "`Z` at position 2, `Q` at position 4"),
        ("parallel.dp_shard=3", 4, "(1, 4), (2, 2), (4, 1)"),
        ("train.global_batch=40", 2, "8 x 2 = 16; set train.global_batch to 32 or 48"),
    ],
)
def test_a_remedy_has_the_numbers(
    faults: Faults, overrides: str, ranks: int | None, words: str
) -> None:
    (fault,) = faults(*overrides.split(), world_size=ranks)
    assert words in fault.remedy


def test_without_ranks_the_rules_about_them_are_skipped(faults: Faults) -> None:
    given = ("parallel.dp_replicate=3", "train.global_batch=8")
    assert faults(*given) == []
    assert {f.field for f in faults(*given, world_size=6)} == {"train.global_batch"}
    assert {f.field for f in faults(*given, world_size=4)} == {"parallel.dp_replicate"}


def test_layouts_and_batches_are_valid_exactly_when_they_divide() -> None:
    draw = random.Random(0)
    for _ in range(500):
        world, replicate, shard = (draw.choice((1, 2, 3, 4, 6, 8)) for _ in range(3))
        rows, micro = draw.choice((4, 8, 12, 16, 24, 48)), draw.choice((1, 2, 3, 4))
        recipe = Recipe.model_validate(
            {
                "parallel": {"dp_replicate": replicate, "dp_shard": draw.choice((shard, None))},
                "train": {"global_batch": rows, "micro_batch": micro},
            }
        )
        fixed = recipe.parallel.dp_shard
        fits = any(replicate * s == world for s in ([fixed] if fixed else range(1, world + 1)))
        whole = any(micro * (world if fits else 1) * n == rows for n in range(1, rows + 1))
        told = {fault.field.partition(".")[0] for fault in validate(recipe, world)}
        assert told == ({"parallel"} if not fits else set()) | ({"train"} if not whole else set())


# Settings without effect

_SOURCE = "data.sources.0"
EFFECT_CASES: list[tuple[str, str, str]] = [  # the rest of the recipe, the field, what mends it
    *(
        ("model.pattern=-", f"model.{field}", "model.pattern=*")
        for field in ("heads=4", "kv_heads=2", "head_dim=8", "positions=rope", "rope_theta=1e4")
    ),
    ("model.positions=none", "model.rope_theta=1e4", "model.positions=rope"),
    *(
        ("model.pattern=*-", f"model.mamba_{field}", "model.pattern=*-M")
        for field in ("heads=4", "head_dim=64", "state=8", "groups=1", "conv=4", "chunk=8")
    ),
    ("model.pattern=*M", "model.activation=gelu", "model.pattern=*E"),
    ("model.pattern=*M", "model.ffn=8", "model.pattern=*-"),
    ("model.pattern=*E model.expert_ffn=8", "model.ffn=8", "model.expert_ffn="),
    *(
        ("model.pattern=*-", f"model.{field}", "model.pattern=*-E")
        for field in ("experts=4", "top_k=1", "expert_ffn=8", "balance=0.0", "router_z=0.1")
    ),
    ("model.pattern=E model.balance=0", "model.balance_samples=2", "model.balance=0.1"),
    ("", "optimizer.decay=5", "optimizer.schedule=wsd"),
    ("optimizer.schedule=constant", "optimizer.min_lr=1e-4", "optimizer.schedule=cosine"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", "data.cache=c", f"{_SOURCE}.format=text"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a {_SOURCE}.stream=true", "data.cache=c",
     f"{_SOURCE}.stream=false"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a {_SOURCE}.stream=true", "data.validation=0.1",
     f"{_SOURCE}.stream=false"),
    ("data.validation=0", "train.validate_rows=8", "data.validation=0.1"),
    ("data.validation=0", "train.validate_every=8", "data.validation=0.1"),
    ("train.validate_rows=0", "train.validate_every=8", "train.validate_rows=8"),
    ("", f"{_SOURCE}.path=a", f"{_SOURCE}.format=text"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", f"{_SOURCE}.column=a", f"{_SOURCE}.format=jsonl"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.prompt=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.subset=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.split=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", f"{_SOURCE}.stream=true",
     f"{_SOURCE}.format=text"),
    ("", f"{_SOURCE}.weight=2", "data.sources.1.format=stdlib"),
]  # fmt: skip


@pytest.mark.parametrize(("rest", "setting", "mend"), EFFECT_CASES)
def test_a_setting_without_effect_is_a_fault(
    faults: Faults, rest: str, setting: str, mend: str
) -> None:
    field = setting.partition("=")[0]
    (fault,) = faults(*rest.split(), setting)
    assert fault.field == field
    assert fault.remedy.startswith("has no effect")
    assert faults(*rest.split(), setting, f"{field}=") == []  # as the remedy says
    assert faults(*rest.split()) == []  # not set, not a fault
    assert faults(*rest.split(), setting, mend) == []


def test_every_setting_that_may_lack_effect_has_a_case() -> None:
    cased = {
        re.sub(r"^data\.sources\.0", "source", s.partition("=")[0]) for _, s, _ in EFFECT_CASES
    }
    assert {field for effect in EFFECTS for field in effect.fields.split()} == cased
    known = {f"{t}.{f}" for t, table in Recipe() for f in getattr(type(table), "model_fields", ())}
    known |= {f"source.{f}" for f in type(Recipe().data.sources[0]).model_fields}
    assert cased <= known


def test_random_recipes_survive_writing(write: Write) -> None:
    pool = [[*case[0].split(), case[1]] for case in EFFECT_CASES]
    settings = sorted({s for group in pool for s in group} | {c[2] for c in EFFECT_CASES})
    draw, kept = random.Random(1), 0
    for _ in range(600):
        try:
            recipe = load_recipe(write(""), draw.sample(settings, 4))
        except RecipeError:
            continue
        kept += 1
        assert load_recipe(write(dump_recipe(recipe))) == recipe
    assert kept > 50
