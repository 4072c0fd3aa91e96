"""`*-`, `*E` and `M` equal Hugging Face's Llama, Mixtral and Mamba2 in fp64: logits, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equal import assert_equal
from oracle import decoder, fp64, gradients, in_our_names, randomise
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from colonnade.models.config import ModelConfig
from colonnade.models.context import Context
from colonnade.models.decoder import Decoder

S, B, V, LAYERS, EPS = 41, 4, 97, 2, 1e-4


def transformer(kind: Any, hf: Any, config: ModelConfig, **more: object) -> Any:
    """Hugging Face's `kind` of transformer, of the shape of `config`."""
    with fp64():
        return kind(
            hf(
                vocab_size=V,
                hidden_size=config.hidden,
                num_hidden_layers=LAYERS,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                head_dim=config.head_dim,
                rms_norm_eps=EPS,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attn_implementation="eager",
                use_cache=False,
                **more,
            )
        )


def llama(tied: bool) -> tuple[ModelConfig, Any]:
    """Grouped queries, a head width that is not hidden / heads."""
    config = ModelConfig(
        pattern="*-", repeat=LAYERS, vocab=V, hidden=20, heads=4, kv_heads=2, head_dim=6,
        rope_theta=500.0, ffn=23, norm_eps=EPS, tied=tied,
    )  # fmt: skip
    return config, transformer(
        LlamaForCausalLM, LlamaConfig, config, intermediate_size=23, tie_word_embeddings=tied
    )


def mixtral(experts: int = 5, top_k: int = 2, **balance: Any) -> tuple[ModelConfig, Any]:
    """As llama, with experts of an odd width."""
    config = ModelConfig(
        pattern="*E", repeat=LAYERS, vocab=V, hidden=20, heads=4, kv_heads=2, head_dim=6,
        rope_theta=500.0, expert_ffn=13, experts=experts, top_k=top_k, norm_eps=EPS,
        **({"balance": 0.0} | balance),
    )  # fmt: skip
    return config, transformer(
        MixtralForCausalLM, MixtralConfig, config, intermediate_size=13, num_local_experts=experts,
        num_experts_per_tok=top_k, experts_implementation="eager", output_router_logits=True,
    )  # fmt: skip


def mamba2(groups: int) -> tuple[ModelConfig, Any]:
    """Odd widths; 8 tokens a chunk here, 16 there, neither dividing the sequence."""
    config = ModelConfig(
        pattern="M", repeat=LAYERS, vocab=V, hidden=15, mamba_heads=6, mamba_head_dim=5,
        mamba_state=7, mamba_groups=groups, mamba_conv=3, mamba_chunk=8, norm_eps=EPS,
    )  # fmt: skip
    with fp64():
        return config, Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=V, hidden_size=15, num_hidden_layers=LAYERS, num_heads=6, head_dim=5,
                state_size=7, n_groups=groups, conv_kernel=3, chunk_size=16, use_cache=False,
                layer_norm_epsilon=EPS, expand=2,
            )
        )  # fmt: skip


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels, `[S, B]`, a fifth of the labels without loss."""
    g = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(V, (2, S, B), generator=g)
    return tokens, labels.where(torch.rand(S, B, generator=g) > 0.2, -100)


def context(groups: float = 1.0) -> Context:
    """Whole rows."""
    return Context(torch.arange(S)[:, None].expand(S, B), groups=groups)


def run_theirs(theirs: Any, tokens: Tensor) -> Any:
    """Their output, over `[B, S]` as they have it."""
    with fp64():
        return theirs(tokens.T)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over valid labels, of their `[B, S, V]` logits."""
    return F.cross_entropy(logits.flatten(0, 1), labels.T.flatten(), ignore_index=-100)


def copied(config: ModelConfig, theirs: Any, seed: int) -> Decoder:
    """Random weights for theirs; ours with the same."""
    randomise(theirs, seed)
    return decoder(config, in_our_names(dict(theirs.named_parameters()), config))


MODELS: dict[str, Callable[[], tuple[ModelConfig, Any]]] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "mixtral": mixtral,
    "mixtral-3-of-4": lambda: mixtral(experts=4, top_k=3),
    "mamba2": lambda: mamba2(groups=1),
    "mamba2-groups": lambda: mamba2(groups=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_logits_loss_and_gradients(name: str, seed: int) -> None:
    config, theirs = MODELS[name]()
    ours = copied(config, theirs, seed)
    tokens, labels = data(seed)

    logits = run_theirs(theirs, tokens).logits
    with torch.no_grad():
        assert_equal(
            {"logits": ours(tokens, context())}, {"logits": logits.detach().transpose(0, 1)}
        )

    loss = mean_loss(logits, labels)
    loss.backward()
    mine = ours(tokens, context(), labels) / (labels != -100).sum()
    mine.backward()
    assert_equal({"loss": mine.detach()}, {"loss": loss.detach()})
    assert_equal(gradients(ours), in_our_names(gradients(theirs), config))


@pytest.mark.parametrize("samples", [1, 2, B])
def test_balance_equals_transformers(samples: int) -> None:
    """Balancing loss and z-loss, in value and in every gradient.

    transformers has one balancing loss for all it is given: it averages the experts' shares and
    probabilities over all layers and samples before it multiplies them, and its shares sum to k.
    Ours is per sub-block and balance group, with shares that sum to 1. So theirs is called on one
    layer's logits of one group at a time, and divided by k.
    """
    weight, z_weight, groups = 0.7, 0.03, 5.0
    config, theirs = mixtral(balance=weight, router_z=z_weight, balance_samples=samples)
    ours = copied(config, theirs, seed=3)
    tokens, labels = data(3)

    output = run_theirs(theirs, tokens)
    terms = {}
    for layer, flat in enumerate(output.router_logits):
        term = flat.new_zeros(())
        for group in flat.view(B // samples, samples * S, config.experts):  # samples stand in order
            with fp64():
                balance = load_balancing_loss_func((group,), config.experts, config.top_k)
            z = torch.logsumexp(group, -1).square().mean()
            term = term + (weight * balance / config.top_k + z_weight * z) / groups
        terms[str(2 * layer + 1)] = term
    objective = mean_loss(output.logits, labels) + sum(terms.values())
    objective.backward()

    passed = context(groups)
    (ours(tokens, passed, labels) / (labels != -100).sum()).backward()
    assert_equal(
        {str(t): term for t, term in passed.terms.items()},
        {t: term.detach() for t, term in terms.items()},
    )
    assert_equal(gradients(ours), in_our_names(gradients(theirs), config))
