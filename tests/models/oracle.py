"""Hugging Face's models as oracles: all their arithmetic in fp64, their tensors under our names.

with fp64(): model = LlamaForCausalLM(config); logits = model(tokens).logits
assert_equal(in_our_names(dict(model.named_parameters()), config), dict(decoder.named_parameters()))
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from colonnade.models.config import ModelConfig
from colonnade.models.decoder import Decoder

# transformers takes these wherever they are installed, and they cannot run fp64 on a CPU: the test
# process does not see them. Import this file before transformers.
for name in ("mamba_ssm", "causal_conv1d", "fla"):
    sys.modules[name] = None  # type: ignore[assignment]


class _Lifted(TorchFunctionMode):
    """Every cast to fp32 becomes one to fp64; an fp32 result that still appears is an error."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(
            lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                assert leaf.dtype != torch.float32, f"{func} made fp32 in an fp64 oracle"
        return result


@contextmanager
def fp64() -> Iterator[None]:
    """Build and run a transformers model inside this: it computes in fp64 throughout.

    Its modules cast rotary angles, norms, softmax and router to fp32 whatever their parameters'
    dtype, which would leave errors of 1e-7. Backward passes need no cover: autograd keeps dtypes.
    """
    assert not torch.is_autocast_enabled("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lifted():
            yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Weights with which no parameter hides: norms and D off 1, biases off 0, decays slow enough
    that a state is carried over many tokens."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("A_log") or name.endswith("dt_bias"):
            p.uniform_(-3.0, 0.0, generator=generator)
        elif p.dim() == 1:
            p.normal_(1.0, 0.3, generator=generator)
        else:
            p.normal_(0.0, 1.5 * p.shape[-1] ** -0.5, generator=generator)


def in_our_names(theirs: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Parameters or gradients of a Llama (`*-`), Mixtral (`*E`) or Mamba2 (`M`), as our decoder's.

    Packed ones are split by role. Every element of `theirs` appears once.
    """
    mamba = config.pattern == "M"
    root, embedding, final = (
        ("backbone", "embeddings", "norm_f") if mamba else ("model", "embed_tokens", "norm")
    )
    ours = {
        "embedding.weight": theirs[f"{root}.{embedding}.weight"],
        "wiring.final.weight": theirs[f"{root}.{final}.weight"],
    }
    if not config.tied:
        ours["head.weight"] = theirs["lm_head.weight"]
    of_symbol = {"*": _attention, "-": _mlp, "E": _mixture, "M": _mamba2}
    for t, symbol in enumerate(config.symbols):
        layer = f"{root}.layers.{t // len(config.pattern)}."
        inside = {n.removeprefix(layer): p for n, p in theirs.items() if n.startswith(layer)}
        norm, parts = of_symbol[symbol](inside, config)
        ours[f"wiring.norms.{t}.weight"] = inside[norm]
        ours |= {f"wiring.blocks.{t}.{n}": p for n, p in parts.items()}
    assert sum(p.numel() for p in ours.values()) == sum(p.numel() for p in theirs.values())
    return ours


Named = dict[str, Tensor]


def _attention(layer: Named, config: ModelConfig) -> tuple[str, Named]:
    parts = {f"first.{n}": layer[f"self_attn.{n}_proj.weight"] for n in "qkv"}
    return "input_layernorm.weight", parts | {"second.out": layer["self_attn.o_proj.weight"]}


def _mlp(layer: Named, config: ModelConfig) -> tuple[str, Named]:
    parts = {f"first.{n}": layer[f"mlp.{n}_proj.weight"] for n in ("gate", "up")}
    return "post_attention_layernorm.weight", parts | {"second.down": layer["mlp.down_proj.weight"]}


def _mixture(layer: Named, config: ModelConfig) -> tuple[str, Named]:
    gate, up = layer["mlp.experts.gate_up_proj"].chunk(2, dim=1)
    return "post_attention_layernorm.weight", {
        "small.weight": layer["mlp.gate.weight"],
        "second.gate": gate,
        "second.up": up,
        "second.down": layer["mlp.experts.down_proj"],
    }


def _mamba2(layer: Named, config: ModelConfig) -> tuple[str, Named]:
    heads = len(layer["mixer.A_log"])
    inner, state = heads * config.mamba_head_dim, config.mamba_groups * config.mamba_state
    widths = [inner, inner, state, state, heads]
    parts = dict(zip("zxBC", layer["mixer.in_proj.weight"].split(widths)[:4], strict=True))
    parts["dt"] = layer["mixer.in_proj.weight"].split(widths)[4]
    for suffix, packed in (("", "weight"), ("_bias", "bias")):
        filters = layer[f"mixer.conv1d.{packed}"].split(widths[1:4])
        for n, p in zip("xBC", filters, strict=True):
            parts[f"conv_{n}{suffix}"] = p.squeeze(1) if suffix == "" else p
    small = {f"small.{n}": layer[f"mixer.{n}"] for n in ("A_log", "dt_bias", "D")}
    second = {"second.norm": "mixer.norm.weight", "second.out": "mixer.out_proj.weight"}
    return "norm.weight", (
        {f"first.{n}": p for n, p in parts.items()}
        | small
        | {ours: layer[theirs] for ours, theirs in second.items()}
    )


def empty(config: ModelConfig) -> Decoder:
    """Our model in fp64, its weights yet to be filled; computes its loss seven tokens at a time."""
    with torch.device("meta"):
        model = Decoder(config, loss_chunk=7)
    return model.to(torch.float64).to_empty(device="cpu")


def decoder(config: ModelConfig, weights: Mapping[str, Tensor]) -> Decoder:
    """Our model in fp64 with these weights."""
    model = empty(config)
    model.load_state_dict(dict(weights))  # strict: names and shapes agree, or it raises
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient, by name; one that has none is an error."""
    named = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} has no gradient"
        named[name] = p.grad
    return named
