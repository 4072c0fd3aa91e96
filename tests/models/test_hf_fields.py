"""Every field of every family's config, off its value: read as transformers reads it, or refused.

The oracle is transformers: it makes a model of the changed config, and its logits say whether the
field matters. Ours either has the same logits, or refuses the field by name; where nothing of our
config changes, neither do transformers' logits.
"""

import copy
from collections.abc import Iterator
from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
from equal import assert_equal
from huggingface_hub.errors import StrictDataclassError
from oracle import fp64
from test_hf_dense import llama, olmo2, qwen3
from test_hf_hybrid import nemotron, qwen3_next
from test_hf_mamba import bamba, mamba, mamba2
from test_hf_moe import deepseek, mixtral, qwen3_moe
from torch import Tensor
from transformers.generation import GenerationConfig

from colonnade.launcher.convert.huggingface.config import function_of
from colonnade.launcher.convert.huggingface.family import Unsupported
from colonnade.launcher.convert.huggingface.fields import HARMLESS
from colonnade.models.config import ModelConfig
from colonnade.models.context import Context

BUILDS: dict[str, Any] = {
    "llama": llama, "qwen3": qwen3, "olmo2": olmo2, "mixtral": mixtral, "qwen3_moe": qwen3_moe,
    "deepseek": deepseek, "mamba": mamba, "mamba2": mamba2, "bamba": bamba,
    "nemotron": lambda: nemotron("ME*-"), "qwen3_next": lambda: qwen3_next("G*"),
}  # fmt: skip
each = pytest.mark.parametrize("name", BUILDS)
# How to run, not what: our tests choose these.
RUN = {"attn_implementation", "experts_implementation", "architectures", "model_type", "dtype"}
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
# Beside what transformers' classes have: what older folders have, and other families.
OLD: dict[str, list[Any]] = {
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
    """Values of a field that are not this one."""
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
    """Each field of this config at other values, and others beside it."""
    for name, value in given.items():
        if name not in RUN:
            yield from ((name, other) for other in values_of(name, value))
    for name, others in OLD.items():
        yield from ((name, other) for other in others if (name, other) not in given.items())


def made(theirs: Any, config: dict[str, Any]) -> Any:
    """Transformers' model of another config (it alters tables in place); None if it makes none."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        with fp64():
            return type(theirs)(type(theirs.config).from_dict(copy.deepcopy(config), **eager))
    except Exception:  # whatever is wrong with it
        return None


def logits_of(theirs: Any, tokens: Tensor) -> Tensor | None:
    """Transformers' logits in evaluation; None if it cannot."""
    try:
        with torch.no_grad():
            return oracle.run_theirs(theirs.eval(), tokens).logits
    except Exception:  # a config that it takes, and does not run
        return None


def ours_or_refusal(theirs: Any, config: dict[str, Any]) -> ModelConfig | Unsupported:
    try:
        return oracle.family(theirs).config_from(config).model_copy(update={"mtp": 0})
    except Unsupported as error:
        return error


def differing(a: ModelConfig, b: ModelConfig) -> dict[str, Any]:
    """What decides the function of one and is another in the other."""
    one, two = function_of(a), function_of(b)
    return {n: (one.get(n), two.get(n)) for n in one | two if one.get(n) != two.get(n)}


def difference(theirs: Any, changed: dict[str, Any], tokens: Tensor) -> str | None:
    """How ours of this config differs from transformers'; None where they are equal.

    So it is where one of both has no such model: a field is refused by its name (tested below),
    sizes that do not fit each other by the rules of recipes.
    """
    config, other = ours_or_refusal(theirs, changed), made(theirs, changed)
    if isinstance(config, Unsupported) or other is None:
        return None
    oracle.randomise(other, seed=1)
    if (expected := logits_of(other, tokens)) is None:
        return None
    context = Context(torch.arange(len(tokens))[:, None].expand_as(tokens))
    try:
        ours = oracle.decoder(config, oracle.in_our_names(other.state_dict(), config, theirs, True))
        with torch.no_grad():
            logits = ours(tokens, context)
        assert_equal({"logits": logits}, {"logits": expected.transpose(0, 1)})
    except (AssertionError, Unsupported) as error:
        return str(error)
    except ValueError:  # groups that do not divide the experts
        return None
    return None


@each
def test_every_field(name: str) -> None:
    theirs = BUILDS[name]()
    given, tokens = theirs.config.to_dict(), oracle.data(90, seed=1)[0][:12, :2]
    assert isinstance(ours_or_refusal(theirs, given), ModelConfig)
    free = HARMLESS | oracle.family(theirs).harmless
    harmless = {field: value for field, value in changes(given) if field in free and value}
    harmless.pop("return_dict", None)  # a tuple in place of a record
    single = [{f: value} for f, value in changes(given) if f not in free]
    found = {
        str(change): message
        for change in [harmless, *single]
        if (message := difference(theirs, given | change, tokens))
    }
    assert not found


@each
def test_every_absent_field(name: str) -> None:
    """What holds where a field is absent is what transformers' class takes, or it is refused."""
    theirs = BUILDS[name]()
    given, wrong = theirs.config.to_dict(), []
    for field in given:
        config = {n: v for n, v in given.items() if n != field}
        ours = ours_or_refusal(theirs, config)
        if isinstance(ours, Unsupported) or field in RUN:
            continue
        try:
            full = type(theirs.config).from_dict(copy.deepcopy(config)).to_dict()
        except StrictDataclassError:  # sizes that do not fit each other
            continue
        expected = ours_or_refusal(theirs, full)
        if isinstance(expected, Unsupported):
            wrong.append(f"{field}: read without it, and refused at its default: {expected}")
        elif found := differing(ours, expected):
            wrong.append(f"{field}: {found}")
    assert not wrong, "\n".join(wrong)


@each
@pytest.mark.parametrize(
    "value", ["text", -1, 0, 1.5, True, [], ["x"], {}, {"x": 1}, [None]], ids=str
)
def test_a_field_of_another_type(name: str, value: Any) -> None:
    """It is refused by name with a remedy, or it is a config: never another exception."""
    theirs = BUILDS[name]()
    given = theirs.config.to_dict()
    for field in {*given, *OLD}:
        result = ours_or_refusal(theirs, given | {field: value})
        if isinstance(result, Unsupported):
            assert result.field
            assert result.remedy


def test_what_transformers_drops_is_harmless() -> None:
    """Settings of text generation, which older folders have in config.json."""
    assert set(GenerationConfig._get_default_generation_params()) <= HARMLESS
