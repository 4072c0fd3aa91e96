"""Converts GPT-2, as Megatron-LM's own is: learned positions, biases, LayerNorm, GELU."""

from functools import partial
from typing import Any

from colonnade.launcher.convert.huggingface.config import pattern_fields
from colonnade.launcher.convert.huggingface.dense import leave_out_dropout
from colonnade.launcher.convert.huggingface.entry import Entry, entry
from colonnade.launcher.convert.huggingface.family import Family, Unsupported
from colonnade.launcher.convert.huggingface.fields import Fields
from colonnade.models.config import ModelConfig

# `activation_function` to the native activation; the first is the default.
ACTIVATIONS: dict[str, Any] = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu",
}  # fmt: skip
# Fields of other heads than that of language modelling, and copies of `n_positions`.
UNUSED = frozenset({
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
    "summary_first_dropout", "n_ctx", "task_specific_params",
})  # fmt: skip
TIED = {"lm_head.weight": "transformer.wte.weight"}


def read_gpt2(f: Fields) -> ModelConfig:
    """Reads a GPT-2 config."""
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        leave_out_dropout(f, name, 0.1)
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("reorder_and_upcast_attn", False)
    f.only("add_cross_attention", False)
    hidden = f.integer("n_embd", "hidden_size", least=1)
    return ModelConfig(
        **pattern_fields("*-" * f.integer("n_layer", "num_hidden_layers")),
        vocab=f.get("vocab_size"),
        hidden=hidden,
        heads=f.integer("n_head", "num_attention_heads", least=1),
        ffn=f.integer("n_inner", default=4 * hidden, null=4 * hidden, least=1),
        learned_positions=f.integer("n_positions", "max_position_embeddings", least=1),
        positions="none",
        activation=ACTIVATIONS[f.only("activation_function", *ACTIVATIONS)],
        norm="layer",
        norm_bias=True,
        norm_eps=f.get("layer_norm_epsilon", default=1e-5),
        attention_bias="all",
        mlp_bias=True,
        tied=f.get("tie_word_embeddings", default=True),
        init_std=f.get("initializer_range", default=0.02),
    )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """Writes a GPT-2 config."""
    c = config
    names: dict[str, str] = {}
    for name, native in ACTIVATIONS.items():
        names.setdefault(native, name)
    if c.activation not in names:
        raise Unsupported("activation", c.activation, f"only {' or '.join(names)} can be")
    if c.learned_positions is None:
        raise Unsupported("learned_positions", None, "GPT-2 has no other positions")
    return {
        "vocab_size": c.vocab,
        "n_embd": c.hidden,
        "n_layer": len(c.symbols) // 2,
        "n_head": c.heads,
        "n_inner": c.ffn,
        "n_positions": c.learned_positions,
        "activation_function": names[c.activation],
        "layer_norm_epsilon": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "initializer_range": c.init_std,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def both(hf: str, *native: str) -> list[Entry]:
    """Returns the entries of a linear map: its weight, stored as `[in, out]`, and its bias."""
    return [
        entry(f"{hf}.weight", *native, transposed=True),
        entry(f"{hf}.bias", *(f"{name}_bias" for name in native)),
    ]


def gpt2(root: str, config: ModelConfig) -> list[Entry]:
    """Returns the entries of GPT-2, whose names begin with `root`, but for the head's."""
    entries = [
        entry(f"{root}wte.weight", "embedding.weight"),
        entry(f"{root}wpe.weight", "embedding.positions"),
    ]
    for layer in range(len(config.symbols) // 2):
        hf, attention, mlp = f"{root}h.{layer}", 2 * layer, 2 * layer + 1
        entries += both(f"{hf}.attn.c_attn", *(f"blocks.{attention}.{name}" for name in "qkv"))
        entries += both(f"{hf}.attn.c_proj", f"blocks.{attention}.out")
        entries += both(f"{hf}.mlp.c_fc", f"blocks.{mlp}.up")
        entries += both(f"{hf}.mlp.c_proj", f"blocks.{mlp}.down")
        for norm, index in (("ln_1", attention), ("ln_2", mlp)):
            for part in ("weight", "bias"):
                entries.append(entry(f"{hf}.{norm}.{part}", f"norms.{index}.{part}"))
    for part in ("weight", "bias"):
        entries.append(entry(f"{root}ln_f.{part}", f"final.{part}"))
    return [*entries, *([] if config.tied else [entry("lm_head.weight", "head.weight")])]


FAMILIES = (
    Family(
        "GPT2LMHeadModel", "gpt2", read_gpt2, write_gpt2, partial(gpt2, "transformer."),
        also_read=(partial(gpt2, ""),),  # as published: saved from the model without its head
        copies=lambda config: TIED if config.tied else {},
        ignored=(".attn.bias", ".attn.masked_bias"),
        harmless=UNUSED,
    ),
)  # fmt: skip
