"""Published Hugging Face folders: what is read, left out with a notice, or refused."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from oracle import Case, fp64
from safetensors.torch import load_file, save_file
from shown import Row
from test_hf_dense import llama
from test_hf_families import ALL
from test_hf_hybrid import NEMOTRON, nemotron, qwen3_next
from test_hf_mamba import MAMBA2_SMALL
from test_hf_moe import deepseek

from colonnade.launcher.convert.huggingface.config import function_fields
from colonnade.launcher.convert.huggingface.families import family_of
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.launcher.convert.huggingface.folder import CONFIG, SINGLE, read_hf, write_hf
from colonnade.launcher.errors import UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe
from colonnade.launcher.recipe.tables import Recipe, TrainConfig
from colonnade.launcher.recipe.unused import without_unused
from colonnade.launcher.recipe.validate import validate

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
HYBRID = {"hybrid_override_pattern": "M-*-"}
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("Qwen3NextForCausalLM", {"use_sliding_window": False}),
    ("NemotronHForCausalLM", {**HYBRID, "rope_theta": 10000}),
    ("NemotronHForCausalLM", {**HYBRID, "partial_rotary_factor": 1.0}),
    ("NemotronHForCausalLM", {**HYBRID, "time_step_limit": [0.0, 1e308]}),
    ("NemotronHForCausalLM", {**HYBRID, "num_nextn_predict_layers": 1}),
    ("Qwen3MoeForCausalLM", {"qkv_bias": False}),
    ("Qwen3MoeForCausalLM", {"use_qk_norm": True}),
    ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 0}),
    ("LlamaForCausalLM", {"is_llama_config": True}),
    ("LlamaForCausalLM", {"rope_interleaved": False}),
]


@pytest.mark.parametrize(("name", "given"), PUBLISHED, ids=str)
def test_a_notice_names_a_field_that_alters_nothing(name: str, given: dict[str, Any]) -> None:
    notices: list[str] = []
    family = family_of(name)
    config = family.config_from_hf(BASE | given, notices.append)
    field = list(given)[-1]
    assert sum(field in sentence for sentence in notices) == 1
    without = {n: v for n, v in (BASE | given).items() if n != field}
    assert config == family.config_from_hf(without)


def test_no_notice_of_bookkeeping_fields() -> None:
    notices: list[str] = []
    more = {"tokenizer_class": "X", "max_length": 20, "_commit_hash": "0", "is_decoder": False}
    family_of("LlamaForCausalLM").config_from_hf(BASE | more, notices.append)
    assert notices == []
    family_of("Mamba2ForCausalLM").config_from_hf(MAMBA2_SMALL | {"rms_norm": True})


@pytest.mark.parametrize(
    ("name", "field", "given"),
    [
        ("LlamaForCausalLM", "model_type", {"model_type": "mistral"}),
        ("LlamaForCausalLM", "rope_interleaved", {"rope_interleaved": True}),
        ("Qwen3MoeForCausalLM", "num_local_experts", {"num_experts": 4, "num_local_experts": 8}),
        ("Qwen3ForCausalLM", "head_dim", {"head_dim": None}),
        ("DeepseekV3ForCausalLM", "rope_interleave", {"rope_interleave": None}),
        ("MambaForCausalLM", "use_conv_bias", {"use_conv_bias": None}),
    ],
    ids=str,
)
def test_contradictions_and_nulls_are_refused(name: str, field: str, given: dict) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of(name).config_from_hf(BASE | given)
    assert caught.value.field == field


def test_a_null_boolean_is_false() -> None:
    """As in transformers 4, which tests its truth; transformers 5 refuses most of them."""
    config = family_of("MambaForCausalLM").config_from_hf({"tie_word_embeddings": None})
    assert not config.tied
    assert family_of("MambaForCausalLM").config_from_hf({}).tied


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (
            lambda: qwen3_next("**"),
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                 "original_max_position_embeddings": 16},
                "rope_parameters": {"rope_theta": 300.0, "rope_type": "default"},
            },
        ),
        (deepseek, {"rms_norm_eps": 0.01}),
    ],
    ids=["yarn-beside-parameters", "latent-norms"],
)  # fmt: skip
def test_logits_of_published_fields(build: Any, change: dict[str, Any]) -> None:
    """Checks which table of rotary positions and which epsilon transformers uses."""
    hf_model = build()
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with fp64():
        changed = type(hf_model.config).from_dict(
            hf_model.config.to_dict() | copy.deepcopy(change), **eager
        )
        other = type(hf_model)(changed)
    config = oracle.family(hf_model).config_from_hf(hf_model.config.to_dict() | change)
    config = config.model_copy(update={"mtp": 0})
    native = oracle.with_random_weights(config, other, seed=3)
    tokens, _ = oracle.data(config.vocab, seed=3)
    with torch.no_grad():
        logits = native(tokens, oracle.one_document_per_row())
        expected = oracle.run_hf(other, tokens).logits.transpose(0, 1)
        unchanged = oracle.run_hf(oracle_with(hf_model, other), tokens).logits.transpose(0, 1)
    assert_equal({"logits": logits}, {"logits": expected})
    assert (unchanged - expected).abs().max() > 1e-3  # the change matters


def oracle_with(hf_model: Any, other: Any) -> Any:
    """Copies the weights of `other` into a transformers model; returns it."""
    hf_model.load_state_dict(other.state_dict())
    return hf_model


def saved(hf_model: Any, folder: Path, **fields: Any) -> Path:
    """Saves a model with random weights and additional fields in config.json."""
    oracle.randomise(hf_model, seed=1)
    hf_model.save_pretrained(folder)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def test_tensors_that_transformers_ignores_are_left_out_with_a_notice(tmp_path: Path) -> None:
    saved(qwen3_next("G*"), tmp_path)
    _, expected = read_hf(tmp_path, lambda sentence: None)
    tensors = load_file(tmp_path / SINGLE)
    save_file({**tensors, "mtp.fc.weight": torch.zeros(20, 40)}, tmp_path / SINGLE)
    with pytest.warns(UserWarning, match=r"mtp\.fc\.weight.*further tokens"):
        _, read = read_hf(tmp_path)
    assert read.keys() == expected.keys()
    save_file({**tensors, "other.weight": torch.zeros(20, 40)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=r"other\.weight"):
        read_hf(tmp_path)


FLOOR = 0.001
TABLE = [
    Row(
        "M-*",
        f"any dt; at its default time_step_min = {FLOOR}, PyTorch's path there holds dt above it, "
        "and Nemotron-H's own code and Megatron do not",
        f"{NEMOTRON}, time_step_min at its default",
        "5e-4 to 1e-3, not equal",
    )
]


def test_the_notice_of_clamped_dt_has_the_measured_difference(tmp_path: Path) -> None:
    """With transformers' initial weights, scaled so that dt varies as with 4096 channels."""
    torch.manual_seed(0)
    std = 0.02 * math.sqrt(4096 / 20)
    hf_model = nemotron("M-M*-", time_step_min=FLOOR, initializer_range=std)
    notices: list[str] = []
    config = oracle.family(hf_model).config_from_hf(hf_model.config.to_dict(), notices.append)
    assert len(notices) == 1
    assert "time_step_min = 0.001" in notices[0]
    assert "5e-4" in notices[0]
    native = oracle.decoder(
        config, oracle.in_native_names(hf_model.state_dict(), config, hf_model, True)
    )
    tokens, _ = oracle.data(config.vocab, seed=0)
    with torch.no_grad():
        logits = native(tokens, oracle.one_document_per_row())
        expected = oracle.run_hf(hf_model, tokens).logits.transpose(0, 1)
    assert 1e-4 < (logits - expected).abs().max() / expected.abs().max() < 5e-3
    notices.clear()
    oracle.family(hf_model).config_from_hf(
        nemotron("M", time_step_min=1e-30).config.to_dict(), notices.append
    )
    oracle.family(hf_model).config_from_hf(nemotron("*-").config.to_dict(), notices.append)
    assert notices == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("fp8", ["FineGrainedFP8Config(dequantize=True)", "save_pretrained"]),
        ("gptq", ["dequantize"]),
    ],
)
def test_the_remedy_for_quantized_folders(method: str, words: list[str]) -> None:
    with pytest.raises(Unsupported) as caught:
        family_of("LlamaForCausalLM").config_from_hf(
            BASE | {"quantization_config": {"quant_method": method}}
        )
    assert caught.value.field == "quantization_config"
    assert all(word in caught.value.remedy for word in words)
    assert "remove" not in caught.value.remedy


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_config_that_was_read_is_valid_in_a_recipe(case: Case, tmp_path: Path) -> None:
    """`read_hf` returns `without_unused` of the config that a family reads (test_hf_folder)."""
    read = oracle.native_config(case.build())
    config = without_unused(read)
    assert function_fields(config) == function_fields(read)
    train = TrainConfig(seq_len=config.learned_positions or 256)
    model = config.model_copy(update={"vocab": 300})  # bytes are the default tokens
    recipe = Recipe(model=model, train=train)
    assert [str(fault) for fault in validate(recipe, 1)] == []
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe


def test_an_export_keeps_the_tokenizer_and_its_tokens(tmp_path: Path) -> None:
    tokens = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    source = saved(llama(), tmp_path / "source", max_position_embeddings=777, **tokens)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "generation_config.json"):
        (source / name).write_text(f'{{"name": "{name}"}}')
    (source / "README.md").write_text("of the source")
    config, tensors = read_hf(str(source))
    write_hf(str(tmp_path / "new"), config, tensors, like=str(source))
    files = {file.name for file in (tmp_path / "new").iterdir()}
    assert files == {file.name for file in source.iterdir()} - {"README.md"}
    for name in files - {CONFIG, SINGLE}:
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert {n: written[n] for n in tokens} == tokens
    assert written["max_position_embeddings"] == 777

    write_hf(tmp_path / "plain", config, tensors)
    written = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert {n: written[n] for n in tokens} == dict.fromkeys(tokens)  # not the class's defaults
    loaded = type(llama()).from_pretrained(tmp_path / "plain")
    assert loaded.config.bos_token_id is None

    small = config.model_copy(update={"vocab": 6})
    truncated = {n: t[:6] if t.shape[0] == config.vocab else t for n, t in tensors.items()}
    with pytest.raises(UserError, match=r"eos_token_id = \[6, 7\].*6 tokens"):
        write_hf(tmp_path / "small", small, truncated, like=source)
    assert not (tmp_path / "small").exists()
