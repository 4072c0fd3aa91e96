"""GPT-2 against transformers in fp64: learned positions, biases everywhere, GELU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, fp64  # before transformers, which it keeps from packages that need a GPU
from transformers import GPT2Config, GPT2LMHeadModel

from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.launcher.convert.huggingface.folder import read_hf
from colonnade.launcher.weights.convert import convert


def gpt2(**more: Any) -> Any:
    """Builds a small GPT-2."""
    small = {
        "vocab_size": 90, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager",
    }  # fmt: skip
    with fp64():
        return GPT2LMHeadModel(GPT2Config(**small | more))


ORACLE = "transformers GPT-2"
CASES = [
    Case("gpt2", "*-", "learned positions, LayerNorm, biases, tanh GELU, tied head", ORACLE, gpt2),
    Case("gpt2-untied", "*-", "the same, a head of its own, an inner width, GELU", ORACLE,
         lambda: gpt2(tie_word_embeddings=False, n_inner=40, activation_function="gelu")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True), ("add_cross_attention", True),
        ("activation_function", "tanh"), ("n_positions", 0),
    ],
)  # fmt: skip
def test_what_is_refused(field: str, value: object) -> None:
    hf_config = gpt2().config.to_dict() | {field: value}
    with pytest.raises(Unsupported) as caught:
        family_of("GPT2LMHeadModel").config_from_hf(hf_config)
    assert caught.value.field == field


def test_dropout_is_left_out_and_said() -> None:
    said: list[str] = []
    hf_config = gpt2().config.to_dict() | {"attn_pdrop": 0.1}
    family_of("GPT2LMHeadModel").config_from_hf(hf_config, said.append)
    assert any("attn_pdrop = 0.1 is left out" in sentence for sentence in said)


@pytest.mark.parametrize(
    "other", [{"learned_positions": None}, {"positions": "rope"}, {"mlp_bias": False}], ids=str
)
def test_other_models_are_not_written(other: dict[str, Any]) -> None:
    family = family_of("GPT2LMHeadModel")
    config = family.config_from_hf(gpt2().config.to_dict()).changed(**other)
    with pytest.raises(Unsupported, match=next(iter(other))):
        family.config_to_hf(config)


def test_the_published_names_are_read(tmp_path: Path) -> None:
    """Those of the model without its head, as the published folder has them."""
    model = gpt2()
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "published")
    config = (tmp_path / "whole/config.json").read_text()  # with the architecture of the whole
    (tmp_path / "published/config.json").write_text(config)
    expected, found = (read_hf(tmp_path / name)[1] for name in ("whole", "published"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_fewer_positions_than_tokens_are_compared(tmp_path: Path) -> None:
    gpt2(n_positions=20).save_pretrained(tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "native", "native", report=lambda line: None)
    assert done.logits == 0.0
    again = convert(tmp_path / "native", tmp_path / "back", "hf", report=lambda line: None)
    assert again.logits is not None
