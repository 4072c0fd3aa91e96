"""Mixtral, Qwen3-MoE, DeepSeek-V3 against transformers in fp64: conversion, losses."""

from typing import Any

import oracle  # before transformers, which it keeps from packages that need a GPU
import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import B, Case, S, fp64
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_layers import MtpModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from colonnade.launcher.convert.huggingface.family import (
    Unsupported,
    from_hf,
    to_hf,
    without_absent_mtp,
)

YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def shape(**more: Any) -> dict[str, Any]:
    """Returns the config of a tiny transformer with odd sizes."""
    return {
        "vocab_size": 97, "hidden_size": 20, "intermediate_size": 13, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "use_cache": False,
        "max_position_embeddings": 128, "pad_token_id": None, "num_experts_per_tok": 2,
        "attn_implementation": "eager", "experts_implementation": "eager", **more,
    }  # fmt: skip


def mixtral(**more: Any) -> Any:
    """Builds a Mixtral with five experts of an odd width."""
    options = {"head_dim": 6, "num_local_experts": 5, "output_router_logits": True, **more}
    with fp64():
        return MixtralForCausalLM(MixtralConfig(**shape(**options)))


def qwen3_moe(**more: Any) -> Any:
    """Builds a Qwen3-MoE, which has QK-norm in each head."""
    options = {"head_dim": 6, "num_experts": 5, "moe_intermediate_size": 7, **more}
    with fp64():
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape(**options)))


def deepseek(**more: Any) -> Any:
    """Builds a DeepSeek-V3: one dense layer of three, one of two groups of experts chosen."""
    options = {
        "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-6, "kv_lora_rank": 5, "q_lora_rank": 7, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 5, "n_group": 2, "topk_group": 1,
        "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "moe_intermediate_size": 7, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    }  # fmt: skip
    with fp64():
        return DeepseekV3ForCausalLM(DeepseekV3Config(**shape(**options | more)))


def case(name: str, symbols: str, options: str, model: str, build: Any) -> Case:
    return Case(name, symbols, options, f"transformers {model}", build)


CASES = [
    case("mixtral", "*E", "softmax over the chosen experts", "Mixtral", mixtral),
    case(
        "mixtral-3-of-4", "*E", "three of four experts, tied head", "Mixtral",
        lambda: mixtral(num_local_experts=4, num_experts_per_tok=3, tie_word_embeddings=True),
    ),
    case(
        "mixtral-window", "*E", "sliding window in every layer", "Mixtral",
        lambda: mixtral(sliding_window=7),
    ),
    case(
        "qwen3-moe", "*E", "softmax over all experts, weights as they are", "Qwen3-MoE", qwen3_moe
    ),
    case(
        "qwen3-moe-normalised", "*E", "weights of a token sum to 1, YaRN", "Qwen3-MoE",
        lambda: qwen3_moe(norm_topk_prob=True, rope_parameters=dict(YARN)),
    ),
    case(
        "qwen3-moe-top-1", "*E", "one expert per token", "Qwen3-MoE",
        lambda: qwen3_moe(num_experts_per_tok=1),
    ),
    case(
        "qwen3-moe-dense-layers", "*-E", "dense layers among mixtures, sliding window", "Qwen3-MoE",
        lambda: qwen3_moe(
            num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3],
            use_sliding_window=True, sliding_window=9,
        ),
    ),
    case(
        "deepseek", "*-E", "latent attention, sigmoid router with bias, groups, shared expert",
        "DeepSeek-V3", deepseek,
    ),
    case(
        "deepseek-yarn", "*-E", "latent attention with YaRN, mscale in the scores", "DeepSeek-V3",
        lambda: deepseek(rope_parameters=dict(YARN)),
    ),
    case(
        "deepseek-plain-queries", "*E", "latent attention without a latent of queries",
        "DeepSeek-V3", lambda: deepseek(q_lora_rank=None, first_k_dense_replace=0),
    ),
    case(
        "deepseek-no-groups", "*-E", "all groups, weights as they are, two shared experts",
        "DeepSeek-V3",
        lambda: deepseek(n_group=1, norm_topk_prob=False, n_shared_experts=2,
                         num_experts_per_tok=3, tie_word_embeddings=True),
    ),
    case(
        "deepseek-dense", "*-", "latent attention alone", "DeepSeek-V3",
        lambda: deepseek(first_k_dense_replace=3, v_head_dim=6),
    ),
]  # fmt: skip


@pytest.mark.parametrize("samples", [1, 2, B])
def test_balance_equals_transformers(samples: int) -> None:
    """Balancing loss and z-loss have equal values and gradients.

    transformers has one balancing loss: it averages the experts' shares and probabilities over all
    layers and samples before it multiplies them, and its shares sum to k. The native loss is per
    sub-block and balance group, with shares that sum to 1. So transformers' function is called on
    the logits of one layer and one group at a time, and its result divided by k.
    """
    weight, z_weight, groups = 0.7, 0.03, 5.0
    hf_model = mixtral()
    losses = {"balance": weight, "router_z": z_weight, "balance_samples": samples}
    config = oracle.native_config(hf_model).model_copy(update=losses)
    native = oracle.with_random_weights(config, hf_model, seed=3)
    tokens, labels = oracle.data(config.vocab, 3)

    output = oracle.run_hf(hf_model, tokens)
    terms = {}
    for layer, flat in enumerate(output.router_logits):
        term = flat.new_zeros(())
        for group in flat.view(B // samples, samples * S, config.experts):  # samples are in order
            with fp64():
                balance = load_balancing_loss_func((group,), config.experts, config.top_k)
            z = torch.logsumexp(group, -1).square().mean()
            term = term + (weight * balance / config.top_k + z_weight * z) / groups
        terms[str(2 * layer + 1)] = term
    objective = oracle.mean_loss(output.logits, labels) + sum(terms.values())
    objective.backward()

    context = oracle.one_document_per_row(groups)
    native_objective, report = native(tokens, context, labels)
    (native_objective / (labels != -100).sum()).backward()
    assert_equal(
        {str(t): term for t, term in report.terms.items()},
        {t: term.detach() for t, term in terms.items()},
    )
    expected = oracle.in_native_names(oracle.gradients(hf_model), config, hf_model)
    assert_equal(oracle.gradients(native), expected)


def checkpoint_names(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Renames tensors of transformers' multi-token prediction modules as in a checkpoint."""
    named = {}
    for name, tensor in tensors.items():
        index, suffix = name.split(".", 1)
        suffix = suffix.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        named[f"model.layers.{layers + int(index)}.{suffix}"] = tensor
    return named


def hf_mtp_loss(
    hf_model: Any, modules: Any, hidden: Tensor, tokens: Tensor, labels: Tensor
) -> Tensor:
    """Returns the sum over tokens of transformers' losses of its modules, averaged over modules."""
    loss = hidden.new_zeros(())
    positions = torch.arange(S).expand(B, S)
    for depth, module in enumerate(modules, start=1):
        inputs, targets = tokens.roll(-depth, 0).T, labels.roll(-depth, 0).T.clone()
        targets[:, S - depth :] = -100
        embedded = hf_model.model.embed_tokens(inputs)
        causal = torch.full((S, S), -torch.inf, dtype=hidden.dtype).triu(1).expand(B, 1, S, S)
        rope = hf_model.model.rotary_emb(embedded, position_ids=positions)
        hidden = module(embedded, hidden, rope, causal, positions, None)
        logits = hf_model.lm_head(hidden).flatten(0, 1)
        loss = loss + F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    return loss / len(modules)


@pytest.mark.parametrize("depths", [1, 2])
def test_multi_token_prediction_equals_transformers(depths: int) -> None:
    """DeepSeek-V3's multi-token prediction: objective, every gradient, and both conversions."""
    hf_model = deepseek(num_mtp_layers=depths)
    with fp64():
        modules = MtpModel(hf_model, depths).layers
    oracle.randomise(hf_model, seed=4)
    oracle.randomise(modules, seed=5)
    weights = hf_model.state_dict() | checkpoint_names(modules.state_dict(), layers=3)
    table = oracle.family(hf_model)
    config = table.config_from_hf(hf_model.config.to_dict())
    assert (config.mtp, config.mtp_pattern) == (depths, "*E")
    assert without_absent_mtp(table, config, weights) == config
    assert without_absent_mtp(table, config, hf_model.state_dict()).mtp == 0
    assert table.config_from_hf(table.config_to_hf(config)) == config

    native_weights = from_hf(table, config, weights)
    back = to_hf(table, config, native_weights, packed=True)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[n], weights[n]) for n in weights)
    native = oracle.decoder(config, native_weights)

    tokens, labels = oracle.data(config.vocab, 4)
    with fp64():
        hidden = hf_model.model(tokens.T).last_hidden_state
        logits = hf_model.lm_head(hidden).flatten(0, 1)
        sum_of_losses = F.cross_entropy(logits, labels.T.flatten(), reduction="sum")
        mtp_loss = hf_mtp_loss(hf_model, modules, hidden, tokens, labels)
        objective = sum_of_losses + config.mtp_weight * mtp_loss
    objective.backward()
    native_objective, _ = native(tokens, oracle.one_document_per_row(), labels)
    native_objective.backward()
    assert_equal({"objective": native_objective.detach()}, {"objective": objective.detach()})

    gradients = oracle.gradients(hf_model) | checkpoint_names(oracle.gradients(modules), layers=3)
    assert_equal(oracle.gradients(native), from_hf(table, config, gradients, state=False))

    # a checkpoint may have copies of embedding and head, if they are equal
    copies = {copy: weights[name] for copy, name in table.copies(config).items()}
    assert len(copies) == 2 * depths
    from_hf(table, config, weights | copies)
    first = min(copies)
    with pytest.raises(Unsupported, match=first):
        from_hf(table, config, weights | copies | {first: copies[first] + 1})


REFUSED = [
    (mixtral, "router_jitter_noise", {"router_jitter_noise": 0.1}),
    (mixtral, "norm_topk_prob", {"num_experts_per_tok": 1}),
    (mixtral, "attention_bias", {"attention_bias": True}),
    (qwen3_moe, "norm_topk_prob", {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    (qwen3_moe, "sliding_window", {"use_sliding_window": True}),
    (qwen3_moe, "shared_expert_intermediate_size", {"shared_expert_intermediate_size": 8}),
    (mixtral, "norm_topk_prob", {"norm_topk_prob": False}),
    (deepseek, "rope_interleave", {"rope_interleave": None}),
    (deepseek, "scoring_func", {"scoring_func": "softmax"}),
    (deepseek, "topk_method", {"topk_method": "greedy"}),
    (deepseek, "rope_interleave", {"rope_interleave": False}),
    (deepseek, "moe_layer_freq", {"moe_layer_freq": 2}),
    (deepseek, "num_key_value_heads", {"num_key_value_heads": 1}),
    (deepseek, "n_shared_experts", {"n_shared_experts": "two"}),
    (deepseek, "quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
]


@pytest.mark.parametrize(
    ("build", "field", "change"), REFUSED, ids=[f"{b.__name__}-{f}" for b, f, _ in REFUSED]
)
def test_unknown_fields_are_refused(build: Any, field: str, change: dict[str, Any]) -> None:
    hf_model = build()
    given = hf_model.config.to_dict()
    with pytest.raises(Unsupported) as caught:
        oracle.family(hf_model).config_from_hf(given | change)
    assert caught.value.field == field
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("build", "field", "change"),
    [
        (mixtral, "shared_ffn", {"shared_ffn": 13}),
        (mixtral, "capacity", {"capacity": 1.5}),
        (mixtral, "router_score", {"router_score": "sigmoid"}),
        (qwen3_moe, "router_scale", {"router_scale": 2.0}),
        (qwen3_moe, "windows", {"window": 7, "full_attention": (0,)}),
        (deepseek, "shared_ffn", {"shared_ffn": 9}),
        (deepseek, "symbols", {"pattern": "*E*-*E"}),
        (deepseek, "router_bias", {"router_bias": False}),
        (deepseek, "mtp_pattern", {"mtp": 1, "mtp_pattern": "*-"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_native_fields_that_a_family_cannot_represent(
    build: Any, field: str, change: dict[str, Any]
) -> None:
    hf_model = build()
    config = oracle.native_config(hf_model).model_copy(update=change)
    with pytest.raises(Unsupported) as caught:
        oracle.family(hf_model).config_to_hf(config)
    assert caught.value.field == field


def test_missing_and_unknown_experts_are_refused() -> None:
    """A checkpoint has a tensor per expert; a missing or an extra one is refused by name."""
    hf_model = qwen3_moe()
    table, config = oracle.family(hf_model), oracle.native_config(hf_model)
    checkpoint = to_hf(table, config, from_hf(table, config, hf_model.state_dict()))
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    assert name.format(4) in checkpoint
    with pytest.raises(Unsupported, match=r"experts\.4\.down_proj\.weight = 'missing'"):
        from_hf(table, config, {n: t for n, t in checkpoint.items() if n != name.format(4)})
    with pytest.raises(Unsupported, match=r"experts\.5\.down_proj"):
        from_hf(table, config, checkpoint | {name.format(5): checkpoint[name.format(4)]})
    native = from_hf(table, config, checkpoint)
    del native["blocks.3.router"]
    with pytest.raises(Unsupported, match=r"router"):
        to_hf(table, config, native)
