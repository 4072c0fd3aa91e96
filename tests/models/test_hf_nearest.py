"""A model that no Hugging Face class has is refused with the nearest class that there is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade.launcher.checkpoint import save, step_folder
from colonnade.launcher.cli import main
from colonnade.launcher.convert.huggingface.families import FAMILIES
from colonnade.launcher.convert.huggingface.family import Unsupported, shapes_of
from colonnade.launcher.convert.huggingface.nearest import differences, family_for
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import Recipe
from colonnade.models.config import ModelConfig

SIZES = {"hidden": 16, "heads": 2, "vocab": 270}
EXPERTS = {"pattern": "*E", "experts": 4, "balance": 0.0}
MAMBA = {"pattern": "M", "mamba_heads": 4, "mamba_head_dim": 8, "mamba_state": 8}
GATED_DELTA = {"pattern": "G-", "norm": "rms_offset", "delta_heads": 2, "delta_key_dim": 8}
# fields of a model, the nearest class, what the message says of each option that differs
MODELS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"residual": "ladder"}, "LlamaForCausalLM", ["residual = 'ladder': no", "has 'standard'"]),
    (
        {"residual": "ladder", "logit_cap": 30.0}, "LlamaForCausalLM",
        ["residual = 'ladder': no", "has 'standard'", "logit_cap = None where this is 30.0"],
    ),
    ({"share": True, "repeat": 2}, "LlamaForCausalLM", ["share = True: no", "has False"]),
    ({"attention_cap": 5.0}, "LlamaForCausalLM", ["attention_cap = 5.0: no", "has None"]),
    (
        {"pattern": "S-", "repeat": 2}, "LlamaForCausalLM",
        ["pattern = 'S-S-': no", "has '*-*-'"],
    ),
    ({**MAMBA, "residual": "ladder"}, "Mamba2ForCausalLM", ["residual = 'ladder': no"]),
    ({**EXPERTS, "capacity": 1.5}, "MixtralForCausalLM", ["capacity = 1.5: no", "has None"]),
    (
        {**EXPERTS, "activation": "polynorm"}, "MixtralForCausalLM",
        ["activation = 'polynorm': no", "has 'swiglu'"],
    ),
    ({**GATED_DELTA, "delta_negative": True}, "Qwen3NextForCausalLM",
     ["delta_negative = True: no", "has False"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "nearest", "words"), MODELS, ids=str)
def test_the_nearest_class_is_named(fields: dict[str, Any], nearest: str, words: list[str]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_for(ModelConfig(**SIZES, **fields))
    message = str(caught.value)
    assert f"the nearest, {nearest}, has" in message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_fewer_options_are_nearer() -> None:
    """Llama has no windows, Qwen3, which has, has norms of queries and keys; Ministral has both."""
    config = ModelConfig(**SIZES, window=8, repeat=3, full_attention=(1,))
    llama, qwen3 = (differences(FAMILIES[f"{n}ForCausalLM"], config) for n in ("Llama", "Qwen3"))
    assert [(d.field, d.value, d.other) for d in qwen3] == [("qk_norm", "none", "'head'")]
    assert [(d.field, d.value) for d in llama] == [("window", [8, None, 8])]
    assert family_for(config).architecture == "MinistralForCausalLM"
    with pytest.raises(Unsupported, match=r"^residual = 'ladder': .* MinistralForCausalLM, has"):
        family_for(config.changed(residual="ladder"))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("fields", [fields for fields, *_ in MODELS], ids=str)
def test_differences_are_found_wherever_writing_refuses(family: Any, fields: Any) -> None:
    config = ModelConfig(**SIZES, **fields)
    assert differences(family, config)
    with pytest.raises(Unsupported):
        family.config_to_hf(config)


def test_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(**SIZES, residual="ladder")
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text(dump_recipe(Recipe(name="run", model=config)))
    tensors = {name: torch.zeros(shape) for name, shape in shapes_of(config).items()}
    save(step_folder(run / "checkpoints", 1), tensors, {})
    assert main(["convert", str(run), str(out), "--to", "hf"]) == 2
    message = capsys.readouterr().err
    assert "residual = 'ladder': no Hugging Face class can represent this model" in message
    assert "the nearest, LlamaForCausalLM, has 'standard'" in message
    assert not list(tmp_path.glob("out*"))
