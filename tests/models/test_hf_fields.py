"""Changes every field of every family's config: it is read as transformers reads it, or refused.

The oracle is transformers: it builds a model of the changed config, and its logits show whether the
field matters. The native model either has the same logits, or refuses the field by name; where the
native config does not change, neither do transformers' logits.
"""

import copy
from collections.abc import Iterator
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import test_hf_biased
import test_hf_gpt_oss
import test_hf_granite
import test_hf_mixtures
import test_hf_normed_mamba
import test_hf_olmo_hybrid
import test_hf_phi3
import test_hf_positions
import torch
from equal import assert_equal
from huggingface_hub.errors import StrictDataclassError
from oracle import fp64
from test_hf_dense import llama, olmo2, qwen3
from test_hf_gpt2 import gpt2
from test_hf_hybrid import nemotron, qwen3_next
from test_hf_mamba import bamba, mamba, mamba2
from test_hf_moe import deepseek, mixtral, qwen3_moe
from torch import Tensor
from transformers.generation import GenerationConfig

from colonnade.launcher.convert.huggingface.config import function_fields
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.launcher.convert.huggingface.fields import HARMLESS
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context

BUILDS: dict[str, Any] = {
    "llama": llama, "qwen3": qwen3, "olmo2": olmo2, "mixtral": mixtral, "qwen3_moe": qwen3_moe,
    "deepseek": deepseek, "mamba": mamba, "mamba2": mamba2, "bamba": bamba,
    "gpt2": gpt2, **test_hf_biased.BUILDS, **test_hf_granite.BUILDS, **test_hf_positions.BUILDS,
    **test_hf_mixtures.BUILDS,
    **test_hf_gpt_oss.BUILDS, **test_hf_normed_mamba.BUILDS, **test_hf_phi3.BUILDS,
    **test_hf_olmo_hybrid.BUILDS,
    "nemotron": lambda: nemotron("ME*-"), "qwen3_next": lambda: qwen3_next("G*"),
}  # fmt: skip
each = pytest.mark.parametrize("name", BUILDS)
# Fields about execution, which the tests set themselves.
EXECUTION_FIELDS = {
    "attn_implementation",
    "experts_implementation",
    "architectures",
    "model_type",
    "dtype",
}
CHOICES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"], "mlp_hidden_act": ["silu", "tanh"], 
    "mamba_hidden_act": ["gelu"],
    "layer_types": [["full_attention"] * 3], "layers_block_type": [["linear_attention", "mlp"]],
    "time_step_rank": [2], "mamba_d_head": ["auto"], "time_step_init_scheme": ["constant"],
    "mlp_only_layers": [[0]], "attn_layer_indices": [[0]], "id2label": [{"0": "a", "1": "b"}],
    "label2id": [{"a": 0}], "time_step_limit": [[0.0, 1e308], [0.01, 0.1]], "mtp_layers_block_type":
    [["mlp"]], "mamba_ssm_cache_dtype": ["bfloat16"], "problem_type": ["regression"],
    "rope_parameters": [
        {"rope_theta": 77.0, "rope_type": "default"},
        {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0},
        {"rope_theta": 500.0, "rope_type": "dynamic", "factor": 2.0},
        {"rope_theta": 500.0, "rope_type": "default", "partial_rotary_factor": 0.5},
    ],
}  # fmt: skip
# Fields that transformers' classes do not have: of older folders, and of other families.
FOREIGN: dict[str, list[Any]] = {
    "rope_theta": [33.0], "partial_rotary_factor": [0.5, 1.0], "rope_scaling": [
        None, {"type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": None, "truncate": None},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8},
    ],
    "head_dim": [4, 8], "norm_topk_prob": [True, False], "rms_norm": [True, False],
    "norm_before_gate": [True, False], "norm_eps": [1e-3], "rms_norm_eps": [1e-3],
    "use_qk_norm": [True, False], "qkv_bias": [True, False], "use_sliding_window": [False],
    "rope_interleaved": [False], "rope_interleave": [None, False], "is_llama_config": [True],
    "shared_expert_intermediate_size": [0], "scoring_func": ["sigmoid", "softmax"],
    "num_local_experts": [4], "num_experts": [4], "tie_encoder_decoder": [False],
    "tokenizer_class": ["LlamaTokenizer"], "_commit_hash": ["0"], "max_length": [20],
    "layer_types": [["full_attention"] * 2], "full_attention_interval": [2], "d_model": [15],
    "torch_dtype": ["float64"],
}  # fmt: skip


def values_of(name: str, value: Any) -> Iterator[Any]:
    """Yields values of a field that differ from the given one."""
    if name in CHOICES:
        yield from (choice for choice in CHOICES[name] if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value * 2 or 1
    elif isinstance(value, float):
        yield value * 2 if value else 0.1
    elif value is None:
        yield from (1, True)
    elif isinstance(value, str):
        yield f"{value}x"
    yield None


def changes(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields each field of a config with other values, and the foreign fields."""
    for name, value in given.items():
        if name not in EXECUTION_FIELDS:
            yield from ((name, other) for other in values_of(name, value))
    for name, others in FOREIGN.items():
        yield from ((name, other) for other in others if (name, other) not in given.items())


def built(hf_model: Any, config: dict[str, Any]) -> Any:
    """Returns transformers' model of a config, or None if it refuses the config.

    The config is with_random_weights, because transformers alters its tables in place.
    """
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        with fp64():
            return type(hf_model)(type(hf_model.config).from_dict(copy.deepcopy(config), **eager))
    except Exception:  # transformers raises errors of many types
        return None


def logits_of(hf_model: Any, tokens: Tensor) -> Tensor | None:
    """Returns transformers' logits in evaluation mode, or None if it fails."""
    try:
        with torch.no_grad():
            return oracle.run_hf(hf_model.eval(), tokens).logits
    except Exception:  # a config that transformers accepts and cannot run
        return None


def config_or_refusal(hf_model: Any, config: dict[str, Any]) -> ModelConfig | Unsupported:
    """Returns the native config, or the error by which it is refused."""
    try:
        return oracle.family(hf_model).config_from_hf(config).model_copy(update={"mtp": 0})
    except Unsupported as error:
        return error


def differing(a: ModelConfig, b: ModelConfig) -> dict[str, Any]:
    """Returns the fields that decide the function in which two configs differ."""
    fields_a, fields_b = function_fields(a), function_fields(b)
    names = [n for n in fields_a | fields_b if fields_a.get(n) != fields_b.get(n)]
    return {n: (fields_a.get(n), fields_b.get(n)) for n in names}


def difference(hf_model: Any, changed: dict[str, Any], tokens: Tensor) -> str | None:
    """Returns how the native model of this config differs from transformers'; None: they are equal.

    Also None if one of the two cannot be built: a field is refused by its name (tested below), or
    sizes contradict each other by the rules of recipes.
    """
    config, other = config_or_refusal(hf_model, changed), built(hf_model, changed)
    if isinstance(config, Unsupported) or other is None:
        return None
    oracle.randomise(other, seed=1)
    if (expected := logits_of(other, tokens)) is None:
        return None
    context = Context(torch.arange(len(tokens))[:, None].expand_as(tokens))
    try:
        native = oracle.decoder(
            config, oracle.in_native_names(other.state_dict(), config, hf_model, True)
        )
        with torch.no_grad():
            logits = native(tokens, context)
        assert_equal({"logits": logits}, {"logits": expected.transpose(0, 1)})
    except (AssertionError, Unsupported) as error:
        return str(error)
    except ValueError:  # groups that do not divide the experts
        return None
    return None


@each
def test_every_field(name: str) -> None:
    hf_model = BUILDS[name]()
    given, tokens = hf_model.config.to_dict(), oracle.data(90, seed=1)[0][:12, :2]
    assert isinstance(config_or_refusal(hf_model, given), ModelConfig)
    ignored = HARMLESS | oracle.family(hf_model).harmless
    harmless = {field: value for field, value in changes(given) if field in ignored and value}
    harmless.pop("return_dict", None)  # it makes transformers return a tuple
    single = [{f: value} for f, value in changes(given) if f not in ignored]
    differences = {
        str(change): message
        for change in [harmless, *single]
        if (message := difference(hf_model, given | change, tokens))
    }
    assert not differences


@each
def test_every_absent_field(name: str) -> None:
    """The value of an absent field is the default of transformers' class, or it is refused."""
    hf_model = BUILDS[name]()
    given, wrong = hf_model.config.to_dict(), []
    for field in given:
        config = {n: v for n, v in given.items() if n != field}
        native = config_or_refusal(hf_model, config)
        if isinstance(native, Unsupported) or field in EXECUTION_FIELDS:
            continue
        try:
            full = type(hf_model.config).from_dict(copy.deepcopy(config)).to_dict()
        except StrictDataclassError:  # sizes that contradict each other
            continue
        expected = config_or_refusal(hf_model, full)
        if isinstance(expected, Unsupported):
            wrong.append(f"{field}: read without it, and refused at its default: {expected}")
        elif differences := differing(native, expected):
            wrong.append(f"{field}: {differences}")
    assert not wrong, "\n".join(wrong)


@each
@pytest.mark.parametrize(
    "value", ["text", -1, 0, 1.5, True, [], ["x"], {}, {"x": 1}, [None]], ids=str
)
def test_a_field_of_another_type(name: str, value: Any) -> None:
    """The field is refused by name with a remedy, or accepted: never another exception."""
    hf_model = BUILDS[name]()
    given = hf_model.config.to_dict()
    for field in {*given, *FOREIGN}:
        result = config_or_refusal(hf_model, given | {field: value})
        if isinstance(result, Unsupported):
            assert result.field
            assert result.remedy


def test_settings_of_text_generation_are_harmless() -> None:
    """Older folders have them in config.json, and transformers drops them."""
    assert set(GenerationConfig._get_default_generation_params()) <= HARMLESS
