"""Unused settings: every condition, unmet and met; a written recipe has no unused setting."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade.launcher.errors import Fault, RecipeError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.unused import conditions, without_unused
from colonnade.models.config import FORMULAS, ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder
from colonnade.models.parameter_module import ParameterModule
from colonnade.parallel.materialise import materialise

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]

_SOURCE = "data.sources.0"
_VALIDATION = "data.validation_sources.0"
_YARN = "rope_scaling=yarn rope_factor=2"
_LATENT = ("q_rank=8", "kv_rank=8", "rope_dim=8", "value_dim=8", "latent_norm_eps=1e-6")
ATTENTION = {  # setting of [model]: the other settings of [model] that make it used
    **dict.fromkeys(
        ("attention=gqa", "heads=4", "kv_heads=2", "head_dim=8", "positions=rope", "rope_theta=1e4",
         "rope_fraction=0.5", "rope_scaling=none", "qk_norm=head", "window=8", "sinks=true",
         "attention_bias=all", "attention_multiplier=0.2", "attention_gate=head",
         "attention_cap=5.0", "clip_low=-0.1", "clip_high=1.1", "position_temperature=true",
         "attention_conv=3"),
        "",
    ),
    **dict.fromkeys(_LATENT, "attention=mla"),
    "rope_factor=2": "rope_scaling=linear",
    "rope_low=2": "rope_scaling=llama3 rope_factor=2",
    "rope_high=8": "rope_scaling=llama3 rope_factor=2",
    **dict.fromkeys(
        ("rope_original=512", "rope_fast=16", "rope_slow=2", "rope_attention_factor=1",
         "rope_truncate=false"),
        _YARN,
    ),
    "rope_mscale=1": f"{_YARN} rope_mscale_all=1",
    "rope_mscale_all=1": f"{_YARN} attention=mla",
    "full_attention=[0]": "window=8 repeat=2",
    "query_temperature=0.1": "",
    "query_temperature_length=4": "query_temperature=0.1",
    "unrotated=[0]": "repeat=2",
    "window_rope_theta=1e3": "window=8",
    "window_rope_scaled=false": "window=8 rope_scaling=linear rope_factor=2",
}  # fmt: skip
_ROTATED = [
    s for s in ATTENTION
    if s.startswith(("rope_", "window_rope", "unrotated")) and not s.startswith("rope_dim")
]  # fmt: skip


def model(settings: str) -> str:
    """Returns settings of [model], separated by spaces, as overrides."""
    return " ".join(f"model.{setting}" for setting in settings.split())


# (the other settings, the unused setting, settings that make it used)
UNUSED_CASES: list[tuple[str, str, str]] = [
    # the stream
    ("", "model.share=true", "model.repeat=2"),
    ("model.pattern=-*", "model.residual=parallel", "model.pattern=*-"),
    ("model.pattern=-*", "model.residual=parallel", "model.repeat=2"),
    ("model.pattern=-*", "model.residual=parallel", "model.mtp=1"),
    ("model.pattern=MDmG*", "model.residual=parallel", "model.pattern=MD-"),
    ("", "model.ladder_last=1", "model.residual=ladder"),
    ("", "model.norm_bias=true", "model.norm=layer"),
    ("model.norm=rms_offset", "model.norm_bias=true", "model.norm=pre_rms"),
    ("model.norm=layer model.norm_weight=false", "model.norm_bias=true", "model.norm_weight=true"),
    ("model.pattern=*M model.norm_position=after", "model.norm_after=M",
     "model.norm_position=both"),
    ("", "model.mtp_pattern=M", "model.mtp=1"),
    ("", "model.mtp_weight=0.1", "model.mtp=1"),
    ("", "model.mup_zero_init=true", "model.mup_base.hidden=128"),
    ("model.pattern=- model.tied=true model.mup_base.hidden=128", "model.mup_zero_init=true",
     "model.tied=false"),
    ("model.pattern=- model.tied=true model.mup_base.hidden=128", "model.mup_zero_init=true",
     "model.pattern=*"),
    # attention
    *(
        ("model.pattern=-", f"model.{setting}", f"model.pattern=* {model(needs)}")
        for setting, needs in ATTENTION.items()
    ),
    ("model.pattern=-", "model.heads=2", "model.mtp=1"),
    *(("", f"model.{setting}", "model.attention=mla") for setting in _LATENT),
    *(
        ("model.attention=mla", f"model.{setting}", "model.attention=gqa")
        for setting in ("kv_heads=2", "rope_fraction=0.5", "qk_norm=full", "attention_gate=channel",
                        "attention_conv=3", "attention_bias=qkv")
    ),
    *(
        ("model.positions=none", f"model.{setting}", f"model.positions=rope {model(needs)}")
        for setting, needs in ATTENTION.items() if setting in _ROTATED
    ),
    *(
        ("", f"model.{setting}", model(ATTENTION[setting]))
        for setting in _ROTATED if ATTENTION[setting] and not setting.startswith("unrotated")
    ),
    (model("rope_scaling=ntk rope_factor=2"), "model.rope_original=8", "model.rope_scaling=llama3"),
    (model("rope_scaling=llama3 rope_factor=2"), "model.rope_fast=8", "model.rope_scaling=yarn"),
    (model(_YARN), "model.rope_low=2", "model.rope_scaling=llama3"),
    (model(_YARN), "model.rope_mscale=1", "model.rope_mscale_all=1"),
    (model(f"{_YARN} attention=mla rope_mscale_all=1 rope_attention_factor=1"),
     "model.rope_mscale=1", "model.rope_attention_factor="),
    (model(_YARN), "model.rope_mscale_all=1", "model.attention=mla"),
    (model(_YARN), "model.rope_mscale_all=1", "model.rope_mscale=1"),
    ("model.repeat=2", "model.full_attention=[1]", "model.window=8"),
    ("", "model.query_temperature_length=4", "model.query_temperature=0.1"),
    (model("rope_scaling=linear rope_factor=2"), "model.window_rope_scaled=false",
     "model.window=8"),
    # state-space mixers and DeltaNet
    *(
        ("model.pattern=*m-", f"model.mamba_{setting}", "model.pattern=*-M")
        for setting in ("heads=4", "head_dim=64", "state=8", "groups=1", "conv=4", "chunk=8")
    ),
    *(
        ("model.pattern=*M-", f"model.mamba1_{setting}", "model.pattern=m")
        for setting in ("inner=64", "state=8", "rank=4", "conv=4", "chunk=8", "norm=plain")
    ),
    ("model.pattern=*M-", "model.mamba1_norm_eps=1e-3", "model.pattern=m model.mamba1_norm=plain"),
    ("model.pattern=m", "model.mamba1_norm_eps=1e-3", "model.mamba1_norm=weighted"),
    *(
        ("model.pattern=*M-", f"model.s4d_{setting}", "model.pattern=S")
        for setting in ("inner=64", "state=8", "chunk=8")
    ),
    *(
        ("model.pattern=*-", f"model.delta_{setting}", f"model.pattern=*{symbol}")
        for symbol in "DG"
        for setting in ("heads=4", "key_heads=2", "key_dim=32", "value_dim=8", "conv=2", "chunk=8",
                        "norm_eps=1e-3", "negative=true")
    ),
    # MLPs and experts
    ("model.pattern=*M", "model.activation=gelu", "model.pattern=*E"),
    ("model.pattern=*M", "model.activation=gelu", "model.pattern=*T"),
    ("model.pattern=*E", "model.mlp_bias=true", "model.pattern=*-"),
    ("model.pattern=*M", "model.ffn=8", "model.pattern=*-"),
    ("model.pattern=*M", "model.ffn=8", "model.pattern=*T"),
    ("model.pattern=*E model.expert_ffn=8", "model.ffn=8", "model.expert_ffn="),
    *(
        ("model.pattern=*-", f"model.{setting}", f"model.pattern=*{symbol}")
        for symbol in "ET"
        for setting in ("experts=4", "expert_ffn=8", "expert_bias=true", "balance_samples=2")
    ),
    *(
        ("model.pattern=*T", f"model.{setting}", f"model.pattern=*E {model(needs)}")
        for setting, needs in {
            "top_k=1": "", "shared_ffn=8": "", "shared_gate=true": "shared_ffn=8",
            "router_score=sigmoid": "", "router_normalise=false": "", "router_scale=2.5": "",
            "router_groups=4": "router_top_groups=2", "router_top_groups=2": "router_groups=4",
            "router_bias=true": "", "router_bias_rate=0.1": "router_bias=true",
            "router_offset=true": "",
            "router_noise=0.1": "", "capacity=1.0": "", "balance=0.0": "",
            "balance_sequence=0.1": "", "router_z=0.1": "",
        }.items()
    ),
    ("model.pattern=*E", "model.thor_alpha=5", "model.pattern=*T"),
    ("model.pattern=E", "model.shared_gate=true", "model.shared_ffn=8"),
    ("model.pattern=E model.top_k=1", "model.router_normalise=true", "model.top_k=2"),
    ("model.pattern=E", "model.router_groups=4", "model.router_top_groups=2"),
    ("model.pattern=E", "model.router_top_groups=1", "model.router_groups=4"),
    ("model.pattern=E", "model.router_bias_rate=0.1", "model.router_bias=true"),
    ("model.pattern=E model.balance=0", "model.balance_samples=2", "model.balance=0.1"),
    ("model.pattern=E model.balance=0", "model.balance_samples=2", "model.capacity=2"),
    (model("pattern=E balance=0 router_z=0.1 balance_sequence=0.1"), "model.balance_samples=2",
     "model.pattern=ET"),
    # the run
    ("", "optimizer.momentum=0.9", "optimizer.name=muon"),
    ("", "optimizer.host_kernel=torch", "optimizer.offload=host"),
    ("", "optimizer.pinned=require", "optimizer.offload=host"),
    ("", "optimizer.offload_gradients=bf16", "optimizer.offload=host"),
    ("", "optimizer.offload_moments=8bit", "optimizer.offload=host"),
    ("optimizer.offload=host train.precision=fp64", "optimizer.offload_gradients=bf16",
     "train.precision=bf16"),
    ("optimizer.offload=host train.precision=fp64", "optimizer.offload_moments=bf16",
     "train.precision=bf16"),
    ("optimizer.offload=host", "optimizer.margin=2", "optimizer.offload=interleaved"),
    ("", "optimizer.decay=5", "optimizer.schedule=wsd"),
    ("optimizer.schedule=constant", "optimizer.min_lr=1e-4", "optimizer.schedule=cosine"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", "data.cache=c", f"{_SOURCE}.format=text"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a {_SOURCE}.stream=true", "data.cache=c",
     f"{_SOURCE}.stream=false"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a {_SOURCE}.stream=true", "data.validation=0.1",
     f"{_SOURCE}.stream=false"),
    *(
        (f"{_SOURCE}.format=text {_SOURCE}.path=a {_SOURCE}.stream=true", f"train.{setting}=8",
         f"{_SOURCE}.stream=false")
        for setting in ("validate_rows", "validate_every")
    ),
    (f"{_VALIDATION}.path=a", "data.validation=0.1", "data.validation_sources="),
    (f"{_SOURCE}.path=a {_SOURCE}.stream=true", "train.validate_rows=8", f"{_VALIDATION}.path=a"),
    (f"{_VALIDATION}.path=a data.sources.1.format=stdlib", f"{_VALIDATION}.weight=2",
     "data.validation_sources="),
    (f"{_VALIDATION}.path=a", f"{_VALIDATION}.stream=true",
     "data.validation_sources="),
    ("data.validation=0", "train.validate_rows=8", "data.validation=0.1"),
    ("data.validation=0", "train.validate_every=8", "data.validation=0.1"),
    ("train.validate_rows=0", "train.validate_every=8", "train.validate_rows=8"),
    *(
        ("model.pattern=*T", f"train.{setting}", f"model.pattern=*{symbol}")
        for setting in ("loads_every=5", "collapse_share=0.8", "collapse_steps=5")
        for symbol in ("E", "T model.mtp=1 model.mtp_pattern=E")
    ),
    *(
        (f"model.pattern=E model.experts={experts} model.top_k={experts}", f"train.{setting}",
         "model.experts=8 model.top_k=2")
        for setting in ("collapse_share=1.0", "collapse_steps=5")
        for experts in (1, 4)
    ),
    ("model.pattern=E model.top_k=4", "train.collapse_share=0.5", "model.top_k=2"),
    ("model.pattern=E train.collapse_steps=0", "train.collapse_share=0.8",
     "train.collapse_steps=5"),
    *(("checkpoint.every=5", f"guard.{setting}=2", "guard.spike=6")
      for setting in ("window", "skip", "limit")),
    ("checkpoint.every=5 guard.spike=6", "train.bad_steps=2", "guard.spike=0"),
    ("", "monitor.metrics_host=0.0.0.0", "monitor.metrics_port=0"),
    ("monitor.ranks_every=0", "monitor.slow_rank=2.0", "monitor.ranks_every=5"),
    ("data.sources.0.format=stdlib", f"{_SOURCE}.path=a", f"{_SOURCE}.format=text"),
    ("", "data.eod=a", "data.tokenizer=a"),
    ("data.tokenizer=bytes", "data.special_tokens=true", "data.tokenizer=a"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", "data.eod=a", "data.tokenizer=a"),
    ("", "data.bos=a", "data.tokenizer=a"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a data.tokenizer=a", "data.bos=a",
     f"{_SOURCE}.format=auto"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", f"{_SOURCE}.column=a", f"{_SOURCE}.format=jsonl"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.prompt=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.subset=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=text {_SOURCE}.path=a", f"{_SOURCE}.split=a", f"{_SOURCE}.format=hub"),
    (f"{_SOURCE}.format=tokens {_SOURCE}.path=a", f"{_SOURCE}.stream=true",
     f"{_SOURCE}.format=text"),
    ("", f"{_SOURCE}.weight=2", "data.sources.1.format=stdlib"),
    # ranks
    ("model.vocab=264", "parallel.sequence=false", "parallel.tp=2"),
    ("", "parallel.ep=2", "model.pattern=*E"),
    ("", "parallel.etp=2", "model.pattern=*E"),
    ("model.repeat=2", "parallel.schedule=zbv", "parallel.pp=2"),
    ("", "parallel.stages=[1,1]", "parallel.pp=2"),
    ("model.repeat=2", "parallel.stages_per_rank=2", "parallel.pp=2 parallel.schedule=bfs"),
    ("parallel.pp=2", "parallel.stages_per_rank=1", "parallel.schedule=bfs"),
    ("", "train.init_only=['*']", "train.init=somewhere"),
    ("", "train.init_skip=['*']", "train.init=somewhere"),
    ("stage.0.steps=4", "train.steps=8", "stage="),
    ("stage.0.steps=4", "train.ramp_batch=8", "stage= train.ramp_steps=9"),
    ("stage.0.steps=4", "train.ramp_steps=9", "stage= train.ramp_batch=8"),
    ("", "train.offload_inputs=true", "train.recompute=block"),
    ("", "train.timeline=3", "parallel.pp=2"),
    ("parallel.pp=2 train.steps=3", "train.timeline=4", "train.steps=4"),
    ("", "parallel.zigzag=false", "parallel.cp=2 parallel.context=ulysses"),
    ("", "parallel.context=allgather", "parallel.cp=2"),
    ("", "parallel.ulysses=2", "parallel.cp=4 parallel.context=ring+ulysses"),
    ("model.pattern=M", "parallel.recurrence=heads", "parallel.cp=2"),
    ("model.pattern=M parallel.cp=2", "parallel.context=ulysses", "model.pattern=M*"),
    ("model.pattern=M parallel.cp=2", "parallel.context=ulysses", "model.mtp=1"),
    ("model.pattern=M parallel.cp=4", "parallel.ulysses=2",
     "model.pattern=M* parallel.context=ring+ulysses"),
    ("parallel.cp=4", "parallel.ulysses=2", "parallel.context=ring+ulysses"),
    *(
        ("parallel.cp=2", "parallel.recurrence=heads", f"model.pattern=*{symbol}")
        for symbol in "MmSDG"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("others", "setting", "remedy"), UNUSED_CASES)
def test_an_unused_setting_is_a_fault(
    faults: Faults, others: str, setting: str, remedy: str
) -> None:
    field = setting.partition("=")[0]
    (fault,) = faults(*others.split(), setting)
    assert fault.field == field
    assert fault.remedy.startswith("has no effect")
    assert faults(*others.split(), setting, f"{field}=") == []  # as the message says
    assert faults(*others.split()) == []  # a field that is not set is no fault
    assert faults(*others.split(), setting, *remedy.split()) == []


def test_every_condition_of_every_setting_has_a_case(faults: Faults) -> None:
    tested = set()
    for others, setting, _ in UNUSED_CASES:
        (fault,) = faults(*others.split(), setting)
        reason = fault.remedy.removeprefix("has no effect ").partition("; leave it out")[0]
        tested.add((re.sub(r"^data\.(validation_)?sources\.0", "source", fault.field), reason))
    assert tested == set(conditions())


def test_every_field_of_a_model_is_always_used_or_has_a_condition() -> None:
    always = {
        "pattern", "repeat", "hidden", "vocab", "tied", "norm", "norm_position", "norm_eps",
        "init_std", "sigma_reparam", "embedding_multiplier", "residual_multiplier",
        "logit_multiplier", "norm_weight", "learned_positions", "logit_cap", "logit_z",
        "mtp", "mup_base",
    }  # fmt: skip
    listed = {field for field, _ in conditions()}
    conditional = {f.removeprefix("model.") for f in listed if f.startswith("model.")}
    assert always | conditional == set(ModelConfig.model_fields)
    assert not always & conditional
    known = {f"{t}.{f}" for t, table in Recipe() for f in getattr(type(table), "model_fields", ())}
    known |= {f"source.{f}" for f in type(Recipe().data.sources[0]).model_fields}
    assert listed <= known


def trained(config: ModelConfig) -> dict[str, Any]:
    """Returns the parameters of a model, their rates and decay, and the losses of two steps."""
    with torch.device("meta"):
        model = Decoder(config).double()
    materialise(model, torch.device("cpu"), 0)
    tokens, labels = torch.arange(64).view(2, 8, 4) * 7 % config.vocab
    positions = torch.arange(8)[:, None].expand(8, 4)
    observed: dict[str, Any] = {n: p.detach().clone() for n, p in model.named_parameters()}
    for path, part in model.named_modules():
        if isinstance(part, ParameterModule):
            observed[f"{path}: rates, decay"] = {
                n: (s.rate, s.decayed) for n, s in part.specs.items()
            }
    for step in range(2):
        context = Context(positions, None, 4 / config.balance_samples, torch.arange(4), step)
        model.begin_step()
        objective, report = model(tokens, context, labels)
        observed[f"step {step}"] = torch.stack([objective.detach(), *report.terms.values()])
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view_as(p)
        model.end_step(report.loads)
    return observed


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """Returns the keys under which the observations of two models differ."""

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor):
            return x.shape == y.shape and torch.allclose(x, y, rtol=1e-9, atol=1e-12)
        return x == y

    return {name for name in a.keys() | b.keys() if not same(a.get(name), b.get(name))}


def test_an_unused_setting_changes_nothing(write: Write, faults: Faults) -> None:
    small: dict[str, Any] = {"hidden": 64, "vocab": 32}
    expected: dict[str, dict[str, Any]] = {}
    changed = {}
    for others, setting, _ in UNUSED_CASES:
        if setting.startswith("model."):
            without = load_recipe(write(""), others.split()).model.model_copy(update=small)
            (fault,) = faults(*others.split(), setting)
            given = without.model_copy(update={fault.field.removeprefix("model."): fault.value})
            if others not in expected:
                expected[others] = trained(without)
            if names := differing(expected[others], trained(given)):
                changed[f"{others} {setting}"] = sorted(names)[:3]
    assert changed == {}


def test_a_size_of_the_base_that_the_model_does_not_use(faults: Faults) -> None:
    base = ("model.pattern=-", "model.mup_base={hidden=128, heads=2}")
    (fault,) = faults(*base)
    assert (fault.field, fault.value) == ("model.mup_base.heads", 2)
    assert "without attention" in fault.remedy
    assert faults(*base, "model.mup_base.heads=") == []
    assert faults(*base, "model.pattern=*") == []


def test_unused_fields_are_left_out_of_a_model_and_of_its_base() -> None:
    given = ModelConfig(pattern="-", hidden=512, heads=8, mup_base={"hidden": 128, "head_dim": 8})
    model = without_unused(given)
    assert model.model_fields_set == {"pattern", "hidden", "mup_base"}
    assert model == ModelConfig(pattern="-", hidden=512, mup_base={"hidden": 128})


def test_random_recipes_survive_writing(write: Write) -> None:
    generator, valid = random.Random(1), 0
    for _ in range(250):
        cases = [" ".join(case).split() for case in generator.sample(UNUSED_CASES, 2)]
        try:
            recipe = load_recipe(write(""), [s for overrides in cases for s in overrides])
        except RecipeError:
            continue
        valid += 1
        read = load_recipe(write(dump_recipe(recipe)))
        assert read == recipe
        for name in FORMULAS:  # fields that follow from others do so again
            if recipe.model.unused(name) is None:
                assert read.model.is_explicit(name) == recipe.model.is_explicit(name), name
        assert read.model.base() == recipe.model.base()
    assert valid > 50
